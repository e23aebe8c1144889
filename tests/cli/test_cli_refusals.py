"""What the command line refuses before anything runs, what becomes one sentence, and what does not."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import SMALL, pseuzo
from pseuzo import files
from pseuzo.cli import commands as cli
from pseuzo.cli import compare
from pseuzo.cli import run as runs
from pseuzo.cli.commands import main
from pseuzo.cli.plots import mean_and_spread
from pseuzo.optim import MeZO
from safetensors import SafetensorError
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
BASE = ["--model", "demo", "--task", "demo"]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def settings(monkeypatch):
    """Runs end before they begin: what they would have been given."""
    seen = {}

    def train(given):
        seen.clear()
        seen.update(given)
        return {
            "test": {"accuracy": 0.5},
            "steps": 10,
            "forwards": 20,
            "best_step": given["steps"] - 2,
        }

    monkeypatch.setattr(runs, "train", train)
    return seen


def refused(*args: object) -> str:
    """The one sentence."""
    text = pseuzo(*args, code=2)
    assert "Traceback" not in text
    *_, last = text.strip().splitlines()
    assert last.startswith("Error: ")
    return last.removeprefix("Error: ")


def raising(error: BaseException):
    def run(*args, **kwargs):
        raise error

    return run


# --config

BAD_CONFIGS = {
    "not UTF-8": (b"model: d\xe9mo\n", "cannot be read as YAML"),
    "not YAML": (b"model: [demo\n", "line 2"),
    "two documents": (b"model: demo\n---\nmodel: demo\n", "cannot be read as YAML"),
    "a bad date": (b"seed: 2001-99-99\n", "seed: '2001-99-99'"),
    "a list": (b"eps: [1, 2]\n", "eps: one plain value"),
    "a list of one": (b"two_sided: [1]\n", "two_sided: one plain value"),
    "a mapping": (b"eps: {a: 1}\n", "eps: one plain value"),
    "a list where a path is due": (b"journal: [a]\n", "journal: one plain value"),
    "a nested list": (b"noise-on: [[all]]\n", "noise-on: a list of plain values"),
    "inf steps": (b"window: .inf\n", "window: '.inf'"),
    "inf": (b"eps: inf\n", "eps: 'inf' is not a finite number"),
    "a fraction": (b"window: 2.7\n", "window: '2.7'"),
    "a switch's value": (b"clip_examples: true\n", "clip_examples: true is for switches"),
    "a value for a switch": (b"quiet: much\n", "quiet: 'much'"),
    "out of range": (b"steps: 0\n", "steps: 0 is not in the range"),
    "unknown choice": (b"method: adam\n", "method: 'adam'"),
    "unknown rate": (b"lr: fast\n", "lr: 'fast' is neither a number nor auto"),
    "unknown option": (b"learning_rat: 1\n", "unknown option 'learning_rat'"),
    "unhashable key": (b"? [a]\n: 1\n", "cannot be read as YAML"),
    "aliases": (
        b"model: &a demo\ntask: *a\n",
        "line 2: aliases (*name) are not read; write the value again",
    ),
    "deep": (b"model: " + b"[" * 9999, "line 1: there are more than 32 levels"),
    "large": (b"model: " + b"x" * 300_000, "it is larger than 262144 bytes"),
    "a seed below 0": (b"seed: -1\n", "seed: -1 is not in the range 0<=x<=4294967295"),
    "a seed too large": (
        b"data_seed: 99999999999999999999\n",
        "is not in the range 0<=x<=4294967295",
    ),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_bad_config(tmp_path, settings, what):
    content, words = BAD_CONFIGS[what]
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    sentence = refused("train", *BASE, "--config", file, "--output", tmp_path / "run")
    assert str(file) in sentence and words in sentence and not settings


def test_config_path_that_is_not_there(tmp_path, settings):
    file = tmp_path / "config.yaml"
    file.write_text("data: 5\n")
    args = ("train", *BASE, "--config", file, "--output", tmp_path / "run")
    assert "'--data': Path '5' does not exist" in refused(*args)
    pseuzo(*args, "--data", tmp_path)
    assert settings["data"] == tmp_path


def test_config_values_are_read_as_on_the_command_line(tmp_path, settings):
    file = tmp_path / "config.yaml"
    file.write_text(
        "lr: 4e-4\neps: 1.0e-3\nclip_examples: 2\ntwo_sided: true\nnoise-on: v_proj\nquiet: no\nresume: true\n"
        "report_to: []\nmomentum: null\ndata_seed:\nmodel: demo\ntask: demo\noutput: 2024-01-01\nwindow: 5\n"
    )
    pseuzo("train", "--config", file, "--window", 7)
    expected = {"lr": 4e-4, "eps": 1e-3, "clip_examples": 2.0, "two_sided": True, "noise_on": ("v_proj",),
                "quiet": False, "resume": "auto", "report_to": (), "momentum": None, "data_seed": None,
                "output": Path("2024-01-01"), "window": 7}  # fmt: skip
    assert {k: settings[k] for k in expected} == expected
    file.write_text("resume: false\n")
    pseuzo("train", *BASE, "--config", file, "--output", tmp_path / "run")
    assert settings["resume"] is None


@pytest.mark.parametrize("args", [["--method", m] for m in cli.METHODS] + [
    ["--mode", "lora", "--lora-r", "3"], ["--method", "fo-adam", "--noise-on", "attention-out"],
    ["--method", "fo-sgd", "--noise-on", "auto", "--eps", "1e-2", "--noise", "normal", "--clip-examples", "2"],
])  # fmt: skip
def test_resolved_settings_are_taken_again(tmp_path, settings, args):
    pseuzo("train", *BASE, *args, "--output", tmp_path / "run")
    first = runs.resolve(dict(settings))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(runs.plain(first)))
    pseuzo("train", "--config", file)
    again = dict(settings)
    assert runs.plain(runs.resolve(again)) == runs.plain(first)


# options that do nothing

UNUSED = {
    ("--directions", "2"): ("pseuzo", "--directions is for mezo and mezo-momentum, not for pseuzo"),
    ("--objective", "metric"): (
        "pseuzo",
        "--objective is for mezo and mezo-momentum, not for pseuzo",
    ),
    ("--one-sided",): (
        "fo-sgd",
        "--two-sided is for pseuzo, mezo and mezo-momentum, not for fo-sgd",
    ),
    ("--eps", "1e-2"): ("fo-adam", "--eps is for"),
    ("--noise", "normal"): ("fo-adam", "--noise is for"),
    ("--rounding", "nearest"): ("fo-sgd", "--rounding is for"),
    ("--journal", "j.pzj"): ("fo-sgd", "--journal is for"),
    ("--window", "3"): ("mezo", "--window is for pseuzo and mezo-momentum, not for mezo"),
    ("--schedule", "linear"): ("mezo", "--schedule is for pseuzo, not for mezo"),
    ("--groups", "row"): ("mezo-momentum", "--groups is for pseuzo"),
    ("--head", "exact"): ("mezo", "--head is for pseuzo"),
    ("--head-lr", "1"): ("pseuzo", "--head-lr is for --head exact, not for --head frozen"),
    ("--momentum", "0.5"): (
        "mezo",
        "--momentum is for pseuzo, mezo-momentum and fo-sgd, not for mezo",
    ),
    ("--lora-r", "4"): ("mezo", "--lora-r is for --mode lora, not for --mode full"),
    ("--lora-alpha", "4"): ("mezo", "--lora-alpha is for"),
    ("--prefix-tokens", "4"): ("mezo", "--prefix-tokens is for --mode prefix"),
}


@pytest.mark.parametrize("option", UNUSED)
def test_option_without_use(tmp_path, settings, option):
    method, words = UNUSED[option]
    assert words in refused(
        "train", *BASE, "--method", method, *option, "--output", tmp_path / "run"
    )
    assert not settings and not (tmp_path / "run").exists()


def test_defaults_and_used_options_pass(tmp_path, settings):
    for args in (
        ["--method", "fo-adam", "--report_to", "wandb", "--report-to", "tensorboard"],
        [
            "--method",
            "fo-sgd",
            "--momentum",
            "0.5",
            "--groups",
            "label",
            "--directions",
            "1",
            "--noise-on",
            "v_proj",
        ],
        [
            "--method",
            "fo-adam",
            "--noise-on",
            "all=2",
            "--eps",
            "1e-2",
            "--noise",
            "normal",
            "--clip-examples",
            "2",
        ],
        ["--method", "pseuzo", "--head", "exact", "--head-lr", "1", "--window", "3", "--two-sided"],
        [
            "--method",
            "mezo-momentum",
            "--directions",
            "2",
            "--one-sided",
            "--objective",
            "metric",
            "--eps",
            "1",
        ],
    ):
        pseuzo("train", *BASE, *args, "--output", tmp_path / "run")
        assert settings["method"] == args[1]
        assert settings["report_to"] == (("wandb", "tensorboard") if "--report_to" in args else ())


def test_lr_is_scaled_to_where_a_first_order_run_trains_if_it_is_not_given(tmp_path, settings):
    def resolved(*args: object) -> dict:
        pseuzo("train", *BASE, "--method", "fo-sgd", *args, "--output", tmp_path / "run")
        found = runs.resolve(dict(settings))
        return {key: found[key] for key in ("eps", "scale_lr", "scale_eps")}

    assert resolved("--noise-on", "v_proj") == {"eps": 1e-3, "scale_lr": True, "scale_eps": False}
    assert resolved("--noise-on", "v_proj", "--lr", "0.1") == {
        "eps": 1e-3,
        "scale_lr": False,
        "scale_eps": False,
    }
    assert resolved() == {"eps": None, "scale_lr": False, "scale_eps": False}


def test_a_config_of_another_method_leaves_its_options_behind(tmp_path, settings):
    """Examples hold PseuZO's own options; --method mezo on the command line is the baseline to them."""
    file = EXAMPLES / "opt-1.3b-sst2.yaml"
    text = pseuzo("train", "--config", file, "--method", "mezo", "--output", tmp_path / "run")
    assert "--groups is for pseuzo, not for mezo: that of --config is left out" in text
    assert (settings["groups"], settings["schedule"], settings["momentum"]) == (
        "label",
        "constant",
        None,
    )
    assert "--groups" in refused("train", "--config", file, "--method", "mezo", "--groups", "row", "--output",
                                 tmp_path / "run")  # fmt: skip
    (tmp_path / "own.yaml").write_text("method: mezo\nschedule: linear\n")
    assert "--schedule is for pseuzo" in refused(
        "train", *BASE, "--config", tmp_path / "own.yaml", "--output", "run"
    )


COMBINATIONS = {
    "metric and clip": (
        ["--objective", "metric", "--clip-examples", "2", "--method", "mezo"],
        "--clip-examples needs",
    ),
    "metric and auto": (["--objective", "metric", "--lr", "auto", "--method", "mezo"], "give --lr"),
    "no warmup": (["--lr-scheduler", "constant_with_warmup"], "constant_with_warmup"),
    "meta": (["--device", "meta"], "cpu or cuda"),
    "nan eps": (["--eps", "nan"], "not a finite number"),
    "nan decay": (["--weight-decay", "nan"], "not a finite number"),
    "inf lr": (["--lr", "inf"], "not a finite number"),
    "fo-adam on fp16": (["--method", "fo-adam", "--dtype", "fp16"], "use --dtype bf16 or fp32"),
    "its head on fp16": (
        ["--method", "fo-adam", "--dtype", "fp16", "--mode", "head"],
        "its eps of 1e-8 is 0",
    ),
    "no folder for the journal": (
        ["--journal", "no/such/folder/j.pzj"],
        "there is no folder no/such/folder",
    ),
}


@pytest.mark.parametrize("what", COMBINATIONS)
def test_refused_at_once(tmp_path, settings, what):
    args, words = COMBINATIONS[what]
    assert words in refused("train", *BASE, *args, "--output", tmp_path / "run")
    assert not settings


@pytest.mark.parametrize("names, words", [
    (["tensorboard", "wandb"], "--report-to wandb: WandbCallback requires wandb to be installed"),
    (["wandbb"], "wandbb is not supported"),
])  # fmt: skip
def test_a_missing_integration_is_refused_before_anything_is_made(
    tmp_path, monkeypatch, names, words
):
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.is_wandb_available", lambda: False
    )
    monkeypatch.setattr(runs, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setattr(runs, "load_task", raising(AssertionError("loads")))
    given = [x for name in names for x in ("--report-to", name)]
    assert words in refused("train", *BASE, *given, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for usable in ([], ["none"], ["all"], ["tensorboard"]):
        runs.check_integrations(usable)


def test_journal(tmp_path, settings):
    journal, out = tmp_path / "run.pzj", tmp_path / "run"
    args = ("train", *BASE, "--output", out, "--journal")
    assert "--until" not in pseuzo(*args, journal, "--steps", 10), "it is not there"
    journal.touch()
    text = pseuzo(*args, journal, "--steps", 10)
    assert "model/ is step 8" in text and "--until 8" in text
    assert "--until" not in pseuzo(*args, journal, "--steps", 10, "--keep", "last")
    assert "--until" not in pseuzo(*args, journal, "--steps", 12)
    journal.write_bytes(b"records")
    assert "exists already" in refused(*args, journal)
    assert "exists already" in refused(*args, journal, "--resume")  # there is no run to go on with
    assert "are the same" in refused(*args, out) and not out.exists()
    assert (
        "the run writes results.json itself" in refused(*args, out / "results.json")
        and not out.exists()
    )
    pseuzo(*args, out / "inside.pzj")  # its folder will be made
    out.mkdir()
    (out / "config.yaml").touch()
    pseuzo(*args, journal, "--resume")


# what becomes a sentence


def own_error(**kwargs):
    parameter = torch.nn.Parameter(torch.zeros(3))
    MeZO([parameter], lr=1e-3, eps=1e-3).step()  # without an estimate


def damaged(folder):
    (folder / "x.safetensors").write_bytes(b"\xff" * 50)
    return lambda given: load_file(folder / "x.safetensors")


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "a smaller --batch-size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "a 16-bit --dtype"),
    (MemoryError(), "out of memory"),
    (yaml.YAMLError("a colon too many"), "a colon too many"),
    (ValueError("two\nlines"), "two lines"),
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "the disk is full, or a limit on files was hit"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "make room"),
])  # fmt: skip
def test_one_sentence(tmp_path, monkeypatch, error, words):
    monkeypatch.setattr(runs, "train", raising(error))
    assert words in refused("train", *BASE, "--output", tmp_path / "run")
    monkeypatch.setattr(runs, "evaluate_run", raising(error))
    assert "--batch-size" not in refused("eval", *BASE)


def test_a_full_disk_does_not_end_a_run_for_good(tmp_path):
    """Neither in the middle of a checkpoint's weights, 4.3 MB, nor of Adam's state, 8.6 MB."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (1_000_000, 6_000_000):
        out = tmp_path / str(most)
        args = [
            "train",
            *SMALL,
            "--method",
            "fo-adam",
            "--steps",
            2,
            "--save-every",
            1,
            "--output",
            out,
        ]
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            text = refused(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (
            text.startswith("the disk is full, or a limit on files was hit")
            and "--resume goes on" in text
        )
        pseuzo(*args, "--resume")
        assert json.loads((out / "results.json").read_text())["steps"] == 2


def test_a_model_that_cannot_be_saved_is_refused_before_anything_is_tried(tmp_path, monkeypatch):
    """Of its tries for a rate, too, which save nothing themselves."""
    load = runs.load_model

    def unsavable(*args, **kwargs):
        model, tokenizer = load(*args, **kwargs)
        model.generation_config.temperature = 0.9
        return model, tokenizer

    monkeypatch.setattr(runs, "load_model", unsavable)
    monkeypatch.setattr(runs, "evaluate", raising(AssertionError("a trial began")))
    out = tmp_path / "run"
    text = refused(
        "train",
        *SMALL,
        "--steps",
        2,
        "--lr",
        "auto",
        "--save-every",
        0,
        "--keep",
        "last",
        "--output",
        out,
    )
    assert "could not be saved, so no step is made" in text and "`temperature`" in text
    assert not list(out.iterdir())


def test_errors_of_our_own_and_of_safetensors_are_sentences(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "train", lambda given: own_error())
    assert "estimate" in refused("train", *BASE, "--output", tmp_path / "run")
    monkeypatch.setattr(runs, "train", damaged(tmp_path))
    assert "safetensors" in refused("train", *BASE, "--output", tmp_path / "run")
    monkeypatch.setattr(
        compare, "compare", lambda *args, **kwargs: compare.summarise({"edited by hand": [{}]})
    )
    assert "'train_seconds' is missing" in refused(
        "compare", *BASE, "--output", tmp_path / "compared"
    )
    of = {"train_seconds": 1.0, "metric": "f1", "test": {"f1": 0.5}, "history": []}
    monkeypatch.setattr(
        compare, "compare", lambda *args, **kwargs: compare.summarise({"edited by hand": [of]})
    )
    assert "an evaluation is missing in the results of a run" in refused(
        "compare", *BASE, "--output", tmp_path / "c"
    )


def test_what_our_ops_refuse_is_a_sentence(tmp_path, monkeypatch):
    """The traceback of a C++ error of ours ends in torch, which our code called for an op."""
    source = "import torch\ndef run(given): torch.ops.aten.mm.default(torch.zeros(2, 3), torch.zeros(2, 3))"
    for module, code in (("pseuzo_kernels.ops", 2), ("somebody.elses", 1)):
        made = {"__name__": module}
        exec(source, made)
        monkeypatch.setattr(runs, "train", made["run"])
        assert (
            "cannot be multiplied"
            in pseuzo("train", *BASE, "--output", tmp_path / "run", code=code)
            or code == 1
        )


def test_an_instruction_set_that_is_not_there_is_refused_at_the_start(tmp_path):
    pytest.importorskip("pseuzo_kernels._C", reason="the C++ extension is not built")
    done = subprocess.run([sys.executable, "-m", "pseuzo", "train", *SMALL, "--output", tmp_path / "run"],
                          env=os.environ | {"PSEUZO_CPU_ISA": "avx3"}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr and not any(tmp_path.iterdir())
    assert done.stderr.strip().splitlines()[-1].startswith("Error: PSEUZO_CPU_ISA: must be one of ")


def test_a_sentence_is_not_as_long_as_what_it_quotes(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "train", raising(ValueError(f"this {'x' * 10**6} is wrong; do that")))
    sentence = refused("train", *BASE, "--output", tmp_path / "run")
    assert (
        len(sentence) < 2000
        and sentence.startswith("this xxx")
        and sentence.endswith("xxx is wrong; do that")
    )


@pytest.mark.parametrize("bug", [
    lambda given: torch.zeros(2, 3) @ torch.zeros(2, 3), lambda given: {}["key"], lambda given: [][0],
])  # fmt: skip
def test_a_bug_is_not_hidden(tmp_path, monkeypatch, bug):
    monkeypatch.setattr(runs, "train", bug)
    result = CliRunner().invoke(main, ["train", *BASE, "--output", str(tmp_path / "run")])
    assert result.exit_code == 1 and isinstance(
        result.exception, (RuntimeError, KeyError, IndexError)
    )


def during_import(given):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ModuleNotFoundError("Could not import module 'OPTForCausalLM'") from error


def test_interruptions(tmp_path, monkeypatch):
    from pseuzo.demo import run as demo

    for module, name in (
        (runs, "train"),
        (runs, "evaluate_run"),
        (demo, "run"),
        (compare, "compare"),
    ):
        monkeypatch.setattr(module, name, raising(KeyboardInterrupt()))
    said = {
        "train": pseuzo("train", *BASE, "--output", tmp_path / "run", code=130),
        "eval": pseuzo("eval", *BASE, code=130),
        "demo": pseuzo("demo", "--out", tmp_path / "demo", code=130),
        "compare": pseuzo("compare", *BASE, "--output", tmp_path / "compared", code=130),
    }
    assert "--resume" in said["train"] and "the same command" in said["compare"]
    assert said["eval"] == said["demo"] == "interrupted\n"
    monkeypatch.setattr(runs, "train", during_import)
    pseuzo("train", *BASE, "--output", tmp_path / "run", code=130)


# compare, eval, plot


@pytest.fixture
def compared(monkeypatch):
    seen = {}

    def run(common, methods, output, **kwargs):
        seen.update({title: common | own for title, own in methods.items()})
        raise ValueError("far enough")

    monkeypatch.setattr(compare, "compare", run)
    return seen


BAD_METHODS = {
    "mezo:lr=fast": "lr: 'fast' is neither",
    "mezo:lr=[1": "lr: '[1' is neither",
    "mezo:eps=-1": "eps: -1.0 is not in the range",
    "mezo:steps=5": "steps is not a method's own",
    "mezo:output=x": "output is not a method's own",
    "mezo:resume=true": "resume is not a method's own",
    "mezo:config=x": "is not KEY=VALUE",
    "mezo:method=pseuzo": "method is not a method's own",
    "mezo:lr": "is not KEY=VALUE",
    "mezo:lr=": "is not KEY=VALUE",
    "mezo:groups=row": "--groups is for pseuzo, not for mezo",
    "mezo:objective=metric": "give --lr",
    "adam": "is not a method",
}


@pytest.mark.parametrize("text", BAD_METHODS)
def test_compare_refuses(tmp_path, compared, text):
    sentence = refused(
        "compare", *BASE, "--methods", "fo-sgd", "--methods", text, "--output", tmp_path / "out"
    )
    assert BAD_METHODS[text] in sentence and not compared and not (tmp_path / "out").exists()


def test_compare_reads_values_and_gives_each_method_its_options(tmp_path, compared):
    titles = [
        "mezo:lr=4e-4,noise_on=v_proj+out_proj=2,two-sided=false",
        "pseuzo:groups=none",
        "fo-adam",
    ]
    methods = [word for title in titles for word in ("--methods", title)]
    sentence = refused(
        "compare", *BASE, *methods, "--window", 5, "--eps", "1e-2", "--output", tmp_path / "out"
    )
    assert sentence == "far enough"
    mezo, pseuzo, adam = (compared[title] for title in titles)
    assert (
        mezo["lr"] == 4e-4
        and mezo["noise_on"] == ["v_proj", "out_proj=2"]
        and mezo["two_sided"] is False
    )
    assert (mezo["window"], pseuzo["window"], adam["window"]) == (14, 5, 14)
    assert (mezo["eps"], pseuzo["eps"], adam["eps"]) == (1e-2, 1e-2, None)
    assert pseuzo["groups"] == "none" and pseuzo["lr"] == adam["lr"] == "auto"
    assert yaml.safe_load(yaml.safe_dump(compared)) == compared, "plain values only"
    assert "--directions is for mezo" in refused("compare", *BASE, "--methods", "fo-sgd", "--methods", "pseuzo",
                                                 "--directions", 2, "--output", tmp_path / "out")  # fmt: skip


def test_compare_refuses_capture_without_a_gpu_before_its_folder_is_made(tmp_path, compared):
    args = (
        "--device",
        "cpu",
        "--methods",
        "fo-sgd",
        "--methods",
        "mezo",
        "--capture",
        "--output",
        tmp_path / "out",
    )
    assert "mezo: --capture: capture needs a CUDA GPU" in refused("compare", *BASE, *args)
    assert not compared and not (tmp_path / "out").exists()


def test_compare_prints_whole_names_of_methods(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    title = "mezo:lr=4e-4,noise_on=attention-out,clip_examples=2,directions=4"
    row = {"lr": 4e-4, "test_mean": 0.7, "test_std": 0.01, "dev_mean": 0.7, "dev_at_equal_time": 0.7, "seconds": 10,
           "equal_seconds": 10, "peak_memory_mib": 650}  # fmt: skip
    summary = {
        "metric": "accuracy",
        "forwards": 12,
        "seeds": 1,
        "hardware": "cpu",
        "methods": {title: row},
    }
    cli._print_comparison(summary, tmp_path)
    rows = [
        line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")
    ]
    assert "".join(cells[1].strip() for cells in rows) == title


@pytest.mark.parametrize("there", [
    ("thesis.txt",), ("start/thesis.txt",), ("lr.json",), ("noise_on.json",), ("config.yaml",), ("table.md",),
    ("compare.json", "runs/mine.txt"), ("model/thesis.txt",), ("summary.json", "metrics.jsonl"), (".pseuzo",),
])  # fmt: skip
def test_no_command_fills_a_folder_of_other_files(tmp_path, there):
    out = tmp_path / "out"
    for name in there:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    before = sorted(out.rglob("*"))
    for command in (["train", *BASE, "--output", out], ["train", *BASE, "--resume", "--output", out],
                    ["compare", *BASE, "--output", out], ["demo", "--steps", 1, "--out", out]):  # fmt: skip
        assert "is not empty, and not the folder of" in refused(*command)
        assert sorted(out.rglob("*")) == before and all(
            (out / name).read_text() == "{}" for name in there
        )


def test_a_folder_is_of_one_command(tmp_path):
    for _ in range(2):
        with files.claim(tmp_path / "out", "demo"):
            assert [f.name for f in (tmp_path / "out").iterdir()] == [files.MARKER]
    with pytest.raises(ValueError, match="not the folder of a run of pseuzo compare"):
        with files.claim(tmp_path / "out", "compare"):
            pass


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["train", "compare", "demo"])
def test_a_folder_at_work_is_left_alone(tmp_path, command):
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    journal = out / "run.pzj"
    args = {
        "train": [*MEZO, "--noise-on", "no_such", "--journal", journal],
        "compare": BASE,
        "demo": ["--steps", 1],
    }
    with files.claim(out, command):
        for name in ("lr.json", "start/adapter_model.safetensors", "metrics.jsonl", "run.pzj"):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(b"" if name == "run.pzj" else b"{}")
        before = contents(out)
        for more in ([], ["--resume"]) if command == "train" else ([],):
            assert "is in use by another pseuzo process" in refused(
                command, *args[command], *more, "--output", out
            )
        if command == "train":  # of a comparison that was killed, and left its run at work
            with pytest.raises(ValueError, match="is in use by another pseuzo process"):
                compare._train({}, out)
        assert contents(out) == before


HOLD = """
import sys, time
from pathlib import Path
from pseuzo.files import claim
with claim(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_free_again_when_its_process_was_killed(tmp_path):
    pytest.importorskip("fcntl")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="is in use by another pseuzo process"):
            with files.claim(tmp_path / "out", "train"):
                pass
    finally:
        process.kill()
        process.communicate()
    with files.claim(tmp_path / "out", "train"):
        pass


def test_a_try_that_fails_leaves_what_was_there(tmp_path):
    """The trials of a search that was killed, and a journal that another run has begun in the meantime."""
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    with files.claim(out, "train"):
        (out / "lr.json").write_text("{}")
    journal.touch()
    before = contents(tmp_path)
    args = [
        "train",
        *MEZO,
        "--mode",
        "head",
        "--noise-on",
        "no_such",
        "--journal",
        journal,
        "--resume",
    ]
    assert "matches 'no_such'" in refused(*args, "--output", out)
    assert contents(tmp_path) == before


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    out = tmp_path / "out"
    args = ("train", *BASE, "--output", out, "--resume")
    assert f"{out}/checkpoint-3: that is no checkpoint of a run in {out}" in refused(
        *args, out / "checkpoint-3"
    )
    (tmp_path / "checkpoint-3").mkdir()
    assert "that is no checkpoint of a run in" in refused(
        *args, tmp_path / "checkpoint-3"
    )  # but of another one
    assert not out.exists()


MEZO = [*SMALL, "--method", "mezo"]


def test_a_try_that_fails_before_its_first_step_leaves_nothing(tmp_path, monkeypatch):
    """Whatever failed: the next try may need other settings, and its journal."""
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    args = ["train", *MEZO, "--mode", "head", "--steps", 2, "--journal", journal, "--output", out]
    with monkeypatch.context() as patched:
        patched.setattr(MeZO, "step", raising(torch.OutOfMemoryError("CUDA out of memory")))
        assert "out of memory" in refused(*args)
    assert not journal.exists() and not list(out.iterdir())
    assert "matches 'no_such'" in refused(*args, "--noise-on", "no_such") and not list(
        out.iterdir()
    )
    assert "auto is for noise_on, where it stands alone" in refused(*args, "--noise-on", "auto=2")
    journal.mkdir()
    assert "is a directory" in refused(*args)
    journal.rmdir()
    pseuzo(*args, "--batch-size", 3)
    assert (out / "results.json").exists() and journal.stat().st_size > 0


def test_the_step_that_is_kept_is_said(tmp_path, settings):
    args = [
        "train",
        *BASE,
        "--method",
        "mezo",
        "--steps",
    ]  # 10 steps are made, of those 2 less than asked for kept
    assert "model/ is step 5, the best checkpoint on the dev rows\n" in pseuzo(
        *args, 7, "--output", tmp_path / "run"
    )
    (tmp_path / "run.pzj").touch()
    text = pseuzo(*args, 7, "--journal", tmp_path / "run.pzj", "--output", tmp_path / "run")
    assert (
        "model/ is step 5, the best checkpoint on the dev rows: pseuzo replay --until 5 makes it"
        in text
    )
    assert "model/ is step" not in pseuzo(*args, 12, "--output", tmp_path / "run")
    assert "model/ is step" not in pseuzo(*args, 7, "--keep", "last", "--output", tmp_path / "run")


def test_what_is_scaled_to_the_noise_is_said(tmp_path):
    args = ["train", *MEZO, "--steps", 1, "--noise-on", "attention-out", "--output"]
    for name, own, scaled in (("mezo", [], {"lr", "eps"}), ("eps given", ["--eps", "1e-3"], {"lr"}),
                              ("fo-sgd", ["--method", "fo-sgd"], {"lr"})):  # fmt: skip
        text = pseuzo(*args, tmp_path / name, *own)
        assert {word for word in ("lr", "eps") if f"; {word} times " in text} == scaled


def test_a_run_that_diverged_says_so(tmp_path):
    args = ["train", *MEZO, "--steps", 2, "--eval-every", 0, "--keep", "last", "--output"]
    text = pseuzo(*args, tmp_path / "far", "--lr", "1e30")
    assert "the run diverged: the loss on the test rows is nan" in text
    assert "the run diverged" not in pseuzo(*args, tmp_path / "near", "--lr", "1e-5")


def test_a_search_for_lr_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    args = ["train", *MEZO, "--lr", "auto", "--steps", 20, "--output"]
    whole = pseuzo(*args, tmp_path / "whole")
    real, made = runs.evaluate, []

    def interrupted(*args, **kwargs):
        made.append(1)
        if len(made) == 4:  # after the start and two trials
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "evaluate", interrupted)
        pseuzo(*args, tmp_path / "run", code=130)
    text = pseuzo(*args, tmp_path / "run", "--resume")
    assert (
        "2 trials are done already" in text
        and text.count("dev loss") == whole.count("dev loss") - 2
    )
    found, expected = (
        json.loads((tmp_path / of / "lr.json").read_text()) for of in ("run", "whole")
    )
    assert found | {"request": None} == expected | {"request": None}


def test_eval_takes_the_rows_that_train_takes(monkeypatch):
    seen = {}
    monkeypatch.setattr(runs, "evaluate_run", lambda given: seen.update(given) or {})
    pseuzo("eval", *BASE)
    assert (seen["train_size"], seen["dev_size"], seen["data_seed"]) == (1000, 500, None)
    pseuzo("eval", *BASE, "--train-size", 7, "--dev-size", 8, "--data-seed", 9)
    assert (seen["train_size"], seen["dev_size"], seen["data_seed"]) == (7, 8, 9)


LAUGHS = "".join(f"  - &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]\n" for i in range(9))


@pytest.mark.parametrize("config, words", [
    ("model: demo\ntask:\n" + LAUGHS, "line 4: aliases (*name) are not read"),
    ("task: " + "[" * 9999, "line 1: there are more than 32 levels"),
    ("task: demo\ntest_size: 0\n", "config.yaml: test_size: 0 is not in the range"),
    ("task: demo\ndata_seed: 99999999999999999999\n", "config.yaml: data_seed: 99999999999999999999 is not in"),
    ("- task\n", "must hold `option: value` lines"),
])  # fmt: skip
def test_eval_of_a_model_in_the_folder_of_a_hostile_run(tmp_path, monkeypatch, config, words):
    monkeypatch.setattr(runs, "evaluate_run", lambda given: {})
    (tmp_path / "model").mkdir()
    (tmp_path / ".pseuzo").write_text("made by pseuzo train\n")
    (tmp_path / "config.yaml").write_text(config)
    assert words in refused("eval", "--model", tmp_path / "model", "--task", "demo")


@pytest.mark.parametrize("config", [
    "task: [demo]\n", "task: demo\ntest_size: [5]\ndev_size: true\ndata_seed: 1.5\nchat: 5\n", "task: 5\n", "{}\n",
    "task: demo\ndata: {a: b}\n", "model: x\n",
])  # fmt: skip
def test_settings_of_a_run_that_are_of_other_types_are_not_taken(tmp_path, monkeypatch, config):
    monkeypatch.setattr(runs, "evaluate_run", lambda given: {})
    (tmp_path / "model").mkdir()
    (tmp_path / ".pseuzo").write_text("made by pseuzo train\n")
    (tmp_path / "config.yaml").write_text(config)
    assert "rows as in" not in pseuzo("eval", "--model", tmp_path / "model", "--task", "demo")


@pytest.mark.parametrize("results", [
    [], 5, {"history": 5, "metric": "f1"}, {"history": [5], "metric": "f1"}, {"history": [], "metric": []},
    {"history": [{"step": 1, "forwards": 2, "loss": "low"}], "metric": "f1"},
])  # fmt: skip
def test_plot_of_what_is_no_run(tmp_path, results):
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "is not the folder of a finished run" in refused(
        "plot", tmp_path, "--output", tmp_path / "x.png"
    )
    assert not (tmp_path / "x.png").exists()


def test_means_are_over_the_same_steps():
    def run(*rows):
        return {"metric": "f1", "history": [dict(zip(("step", "forwards", "train_seconds", "eval_f1"), r, strict=True))
                                            for r in rows]}  # fmt: skip

    a = run((0, 0, 0.0, 0.1), (5, 10, 1.0, 0.2), (10, 20, 2.0, 0.6))
    b = run(
        (0, 0, 0.0, 0.3),
        (5, 10, 2.0, 9.0),
        (5, 10, 3.0, 0.4),
        (7, 14, 3.5, 9.0),
        (10, 20, 4.0, None),
    )
    xs, means, spread = mean_and_spread([a, b], "train_seconds", "eval_f1")  # b was resumed at 5
    np.testing.assert_allclose(xs, [0, 2, 3])
    np.testing.assert_allclose(means, [0.2, 0.3, np.nan])
    np.testing.assert_allclose(spread[:2], np.sqrt(0.02) * np.ones(2))
    assert [len(part) for part in mean_and_spread([a, run()], "forwards", "eval_f1")] == [0, 0, 0]
    assert mean_and_spread([b], "forwards", "eval_f1")[0].tolist() == [0, 10, 14, 20]


def test_the_compare_example_is_accepted(monkeypatch, tmp_path):
    seen = {}

    def compared(common, methods, output, **rest):
        seen.update(common=common, methods=methods, **rest)
        raise ValueError("that is all")

    monkeypatch.setattr(compare, "compare", compared)
    text = refused(
        "compare", "--config", EXAMPLES / "compare-demo.yaml", "--output", tmp_path / "out"
    )
    assert text == "that is all"
    listed = yaml.safe_load((EXAMPLES / "compare-demo.yaml").read_text())
    assert (
        list(seen["methods"]) == listed["methods"]
        and seen["forwards"] == 600
        and seen["seeds"] == 3
    )
    assert seen["methods"]["mezo:noise_on=attention-out"]["noise_on"] == ["attention-out"]


@pytest.mark.parametrize("command", ["train", "eval"])
def test_sequences_longer_than_the_model(command, tmp_path):
    """Asked for, they are refused; the default is what the model has."""
    sizes = [
        "--train-size",
        4,
        "--dev-size",
        4,
        "--test-size",
        4,
        "--device",
        "cpu",
        "--max-length",
        129,
    ]
    output = ["--output", tmp_path / "run"] if command == "train" else []
    text = refused(command, *BASE, *sizes, *output)
    assert "--max-length 129 is more than the model has positions for, 128" in text
    assert not any(tmp_path.glob("run/*"))
