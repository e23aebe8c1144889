"""Options that have no effect, or exclude each other, are refused before anything runs."""

import pytest
import yaml
from cli_refusals import BASE, EXAMPLES, raising, refused
from helpers import pseuzo
from pseuzo.cli import compare, printing
from pseuzo.cli import run as runs
from pseuzo.cli.errors import listed
from pseuzo.train.methods import methods_with

pytestmark = pytest.mark.slow


def of(option):
    return listed(methods_with(option))


UNUSED = {
    ("--directions", "2"): ("pseuzo", f"--directions is for {of('directions')}, not for pseuzo"),
    ("--objective", "metric"): (
        "pseuzo",
        f"--objective is for {of('objective')}, not for pseuzo",
    ),
    ("--one-sided",): (
        "fo-sgd",
        f"--two-sided is for {of('two_sided')}, not for fo-sgd",
    ),
    ("--weights", "raw"): ("fzoo", f"--weights is for {of('weights')}, not for fzoo"),
    ("--split-batch",): ("mezo", f"--split-batch is for {of('split_batch')}, not for mezo"),
    ("--eps", "1e-2"): ("fo-adam", "--eps is for"),
    ("--noise", "normal"): ("fo-adam", "--noise is for"),
    ("--rounding", "nearest"): ("fo-sgd", "--rounding is for"),
    ("--journal", "j.pzj"): ("fo-sgd", "--journal is for"),
    ("--window", "3"): ("mezo", f"--window is for {of('window')}, not for mezo"),
    ("--schedule", "linear"): ("mezo", "--schedule is for pseuzo, not for mezo"),
    ("--cycles", "2"): ("mezo", "--cycles is for pseuzo, not for mezo"),
    ("--weighting", "mean"): ("mezo-momentum", "--weighting is for pseuzo"),
    ("--groups", "row"): ("mezo-momentum", "--groups is for pseuzo"),
    ("--head", "exact"): ("mezo", "--head is for pseuzo"),
    ("--head-lr", "1"): ("pseuzo", "--head-lr is for --head exact, not for --head frozen"),
    ("--momentum", "0.5"): (
        "mezo",
        "--momentum is for pseuzo, mezo-momentum and fo-sgd, not for mezo",
    ),
    ("--lora-r", "4"): ("mezo", "--lora-r is for --mode lora, not for --mode full"),
    ("--lora-alpha", "4"): ("mezo", "--lora-alpha is for"),
    ("--prompt-tokens", "4"): ("mezo", "--prompt-tokens is for --mode prompt"),
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
        [*"--method fo-adam --report_to wandb --report-to tensorboard".split()],
        [
            *"--method fo-sgd --momentum 0.5 --groups label --directions 1".split(),
            *"--noise-on v_proj".split(),
        ],
        [
            *"--method fo-adam --noise-on all=2 --eps 1e-2 --noise normal".split(),
            *"--clip-examples 2".split(),
        ],
        [*"--method pseuzo --head exact --head-lr 1 --window 3 --two-sided".split()],
        [
            *"--method mezo-momentum --directions 2 --one-sided --objective metric".split(),
            *"--eps 1".split(),
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
    """The example files hold PseuZO's own options, and --method mezo on the command line runs the
    baseline."""
    file = EXAMPLES / "opt-1.3b-sst2.yaml"
    text = pseuzo("train", "--config", file, "--method", "mezo", "--output", tmp_path / "run")
    assert "--groups is for pseuzo, not for mezo: that of --config is left out" in text
    assert (settings["groups"], settings["schedule"], settings["momentum"]) == (
        "label",
        "constant",
        None,
    )
    assert "--groups" in refused(
        "train",
        "--config",
        file,
        "--method",
        "mezo",
        "--groups",
        "row",
        "--output",
        tmp_path / "run",
    )
    (tmp_path / "own.yaml").write_text("method: mezo\nschedule: linear\n")
    assert "--schedule is for pseuzo" in refused(
        "train", *BASE, "--config", tmp_path / "own.yaml", "--output", "run"
    )


COMBINATIONS = {
    "metric and clip": (
        [*"--objective metric --clip-examples 2 --method mezo".split()],
        "--clip-examples needs",
    ),
    "metric and auto": ([*"--objective metric --lr auto --method mezo".split()], "give --lr"),
    "auto of another method": (
        [*"--method zo-adam --lr auto".split()],
        "--lr auto needs --method pseuzo or mezo or mezo-momentum, not zo-adam",
    ),
    "auto and a rate": (
        [*"--method mezo --noise-on auto --lr 1e-6".split()],
        "--noise-on auto needs a rate that suits every placement: leave out --lr",
    ),
    "auto and decay": (
        [*"--method mezo --lr auto --weight-decay 0.1".split()],
        "does not suit --weight-decay",
    ),
    "auto and exact": (
        [*"--method pseuzo --lr auto --head exact".split()],
        "--lr auto finds no rate for an exact head; give --head-lr",
    ),
    "a race and exact": (
        [*"--method pseuzo --noise-on auto --head exact --head-lr 1".split()],
        "--noise-on auto cannot be used with --head exact",
    ),
    "no warmup": (["--lr-scheduler", "constant_with_warmup"], "constant_with_warmup"),
    "meta": (["--device", "meta"], "cpu or cuda"),
    "one direction to compare": (
        [*"--method fzoo --directions 1".split()],
        "--method fzoo: one-sided directions are compared with each other",
    ),
    "fewer examples than parts": (
        [*"--method evolution --split-batch --batch-size 7".split()],
        "--method evolution: split_batch needs an example for each of the 8 directions",
    ),
    "captured parts": ([*"--method fzoo --split-batch --capture".split()], "which capture does"),
    "nan eps": (["--eps", "nan"], "not a finite number"),
    "nan decay": (["--weight-decay", "nan"], "not a finite number"),
    "inf lr": (["--lr", "inf"], "not a finite number"),
    "fo-adam on fp16": (["--method", "fo-adam", "--dtype", "fp16"], "use --dtype bf16 or fp32"),
    "its head on fp16": (
        [*"--method fo-adam --dtype fp16 --mode head".split()],
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


@pytest.mark.parametrize(
    "names, words",
    [
        (
            ["tensorboard", "wandb"],
            "--report-to wandb: WandbCallback requires wandb to be installed",
        ),
        (["wandbb"], "wandbb is not supported"),
    ],
)
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
    assert "--until" not in pseuzo(*args, journal, "--steps", 10), "--until was not needed"
    journal.touch()
    text = pseuzo(*args, journal, "--steps", 10)
    assert "model/ is step 8" in text and "--until 8" in text
    assert "--until" not in pseuzo(*args, journal, "--steps", 10, "--keep", "last")
    assert "--until" not in pseuzo(*args, journal, "--steps", 12)
    journal.write_bytes(b"records")
    assert "exists already" in refused(*args, journal)
    assert "exists already" in refused(*args, journal, "--resume")  # there is no run to resume
    assert "are the same" in refused(*args, out) and not out.exists()
    assert (
        "the run writes results.json itself" in refused(*args, out / "results.json")
        and not out.exists()
    )
    pseuzo(*args, out / "inside.pzj")  # the run makes this folder
    out.mkdir()
    (out / "config.yaml").touch()
    pseuzo(*args, journal, "--resume")


@pytest.mark.parametrize("file, forwards", [("compare-demo", 600), ("lambda-ablation", 1200)])
def test_the_compare_examples_are_accepted(monkeypatch, tmp_path, file, forwards):
    seen = {}

    def compared(request, output, **rest):
        seen["request"] = request
        raise ValueError("that is all")

    monkeypatch.setattr(compare, "compare", compared)
    example = EXAMPLES / f"{file}.yaml"
    text = refused("compare", "--config", example, "--output", tmp_path / "out")
    assert text == "that is all"
    listed = yaml.safe_load(example.read_text())["methods"]
    request = seen["request"]
    of, *others = request.tasks.values()
    assert list(of.methods) == listed and of.reference == "mezo"
    assert (of.forwards, request.seeds, request.trials) == (forwards, 3, 6 if others else 8)
    if file == "compare-demo":
        assert [list(other.methods) for other in others] == [listed]
        assert of.methods["mezo:noise_on=attention-out"]["noise_on"] == ("attention-out",)
        assert of.methods["best"] == {
            **of.methods["mezo"],
            **{"readout": "auto", "noise_on": ("attention-out",), "lr": "auto"},
        }
    else:
        assert of.settings["cycles"] == 2 and of.settings["weighting"] == "mean"


@pytest.mark.parametrize(
    "file, tasks, methods",
    [("real", 4, 2), ("recipe", 2, 3), ("encoder", 2, 3), ("real-long", 5, 8)],
)
def test_the_comparisons_of_real_models_are_accepted(monkeypatch, tmp_path, file, tasks, methods):
    seen = []
    monkeypatch.setattr(compare, "compare", lambda request, output, **rest: seen.append(request))
    monkeypatch.setattr(printing, "print_comparison", lambda summary, output: None)
    pseuzo("compare", "--config", EXAMPLES / f"compare-{file}.yaml", "--output", tmp_path / "out")
    (request,) = seen
    assert len(request.tasks) == tasks
    for title, of in request.tasks.items():
        assert len(of.methods) == methods and of.reference == "mezo", title
        if of.settings["task"] != "sst2":
            task, encoder = EXAMPLES.parent / of.settings["task"], "MiniLM" in title
            assert task.exists() and title.split(",")[0] == task.stem.split("-")[0]
            assert of.settings["model_kind"] == ("classifier" if encoder else "auto")
            assert of.settings["model"] == ("real/minilm" if encoder else "real/smollm2")
