"""The command line: what runs write, that they can be replayed, and what is refused, with exit code 2."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    PUBLIC,
    SMALL,
    ZERO_ORDER,
    assert_same_weights,
    last_json,
    pseuzo,
    weights,
    write,
)
from pseuzo import files
from pseuzo.cli.run import model_path
from pseuzo.tasks import TaskData, evaluate, load_task
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pseuzo_kernels

pytestmark = pytest.mark.slow
METHODS = {
    "pseuzo": ["--groups", "label"],
    "pseuzo, published": ["--groups", "row", "--schedule", "cyclic-hyperbola"],
    "mezo": ["--directions", "2", "--one-sided"],
    "mezo-momentum": ["--window", "3", "--momentum", "0.7"],
    "fo-sgd": ["--momentum", "0.5"],
    "fo-adam": [],
}


@pytest.mark.parametrize("name", METHODS)
def test_train_writes_a_run(tmp_path, name):
    method = name.split(",")[0]
    out = tmp_path / "run"
    rate = ["--lr", "1e-3"] if method.startswith("fo-") else [*ZERO_ORDER, "--clip-examples", "2"]
    text = pseuzo(
        "train", *SMALL, "--method", method, "--steps", 5, *rate, *METHODS[name], "--output", out
    )
    assert "accuracy" in text
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 5 and 0 <= results["test"]["accuracy"] <= 1
    passes = {"pseuzo": 2, "mezo": 3, "mezo-momentum": 2}.get(method, 3)
    assert results["forwards"] == 5 * passes
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["method"] == method and config["eval_every"] == 1
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    logged = [row for row in results["history"] if "loss" in row]
    assert len(logged) == 5 and all(row["tokens_per_second"] > 0 for row in logged)
    if not method.startswith("fo-"):
        assert {
            "projected_grad",
            "momentum",
            "window",
            "skipped_steps",
            "update_ulps_float32",
        } <= logged[-1].keys()
    start = weights(Path(model_path("demo")))
    assert any(
        not torch.equal(p, start[n]) for n, p in weights(out / "model").items() if n in start
    )
    again = tmp_path / "again"  # the resolved settings make the same run
    pseuzo("train", "--config", out / "config.yaml", "--output", again)
    assert_same_weights(out / "model", again / "model")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_journal_of_a_run_replays_to_its_weights(tmp_path, dtype):
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    pseuzo("train", *SMALL, *ZERO_ORDER, "--dtype", dtype, "--steps", 7, "--keep", "last", "--journal", journal,
           "--weight-decay", "0.1", "--output", out)  # fmt: skip
    pseuzo(
        "replay",
        "--base",
        model_path("demo"),
        "--journal",
        journal,
        "--output",
        tmp_path / "replayed",
    )
    assert_same_weights(out / "model", tmp_path / "replayed")
    pseuzo(
        "replay",
        "--base",
        out / "model",
        "--journal",
        journal,
        "--output",
        tmp_path / "other",
        code=2,
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("mode, method", [("lora", "pseuzo"), ("prefix", "mezo"), ("head", "mezo")])
def test_modes_train_replay_and_load_again(tmp_path, mode, method):
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    pseuzo("train", *SMALL, "--method", method, "--mode", mode, "--lr", "1e-3", "--steps", 4, "--keep", "last",
           "--journal", journal, "--output", out)  # fmt: skip
    pseuzo(
        "replay", "--base", out / "start", "--journal", journal, "--output", tmp_path / "replayed"
    )
    name = "model.safetensors" if mode == "head" else "adapter_model.safetensors"
    start, end, again = (
        load_file(d / name) for d in (out / "start", out / "model", tmp_path / "replayed")
    )
    assert any(not torch.equal(start[k], end[k]) for k in start)
    assert all(torch.equal(again[k], end[k]) for k in end)
    figures = last_json(
        pseuzo("eval", "--model", out / "model", *SMALL[2:4], "--test-size", 24, "--quiet")
    )
    results = json.loads((out / "results.json").read_text())
    assert figures["test"]["loss"] == pytest.approx(results["test"]["loss"], rel=1e-4)


def test_a_step_that_is_skipped_does_not_spoil_the_curves(tmp_path):
    out = tmp_path / "run"
    pseuzo("train", *SMALL, "--method", "mezo", "--dtype", "fp16", "--lr", "80", "--steps", 6, "--eval-every", 0,
           "--keep", "last", "--output", out)  # fmt: skip
    text = (out / "results.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    results = json.loads(text)
    assert results["skipped_steps"] > 0 and results["test"]["accuracy"] == 0, (
        "what is not finite is not right"
    )
    losses = [row["loss"] for row in results["history"] if "loss" in row]
    assert losses[0] is not None and len(losses) == 6


def test_prefix_adapters_are_evaluated_at_the_length_that_is_left(tmp_path):
    (tmp_path / "task.yaml").write_text(OWN)
    rows = [row | {"text": "long " * 300 + row["text"]} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ["--train-size", 20, "--dev-size", 10, "--test-size", 30, "--quiet"]
    common = ["--task", tmp_path / "task.yaml", *sizes]
    pseuzo(
        "train",
        "--model",
        "demo",
        *common,
        "--steps",
        1,
        "--mode",
        "prefix",
        "--output",
        tmp_path / "run",
    )
    scored = last_json(pseuzo("eval", "--model", tmp_path / "run" / "model", *common))
    assert scored["test"] == json.loads((tmp_path / "run" / "results.json").read_text())["test"], (
        "the same rows"
    )


def test_eval_shots_and_output(tmp_path):
    common = [*SMALL[:4], "--test-size", 24, "--device", "cpu", "--quiet"]
    zero = last_json(pseuzo("eval", *common, "--output", tmp_path / "eval.json"))
    assert json.loads((tmp_path / "eval.json").read_text()) == zero and zero["shots"] == 0
    few = last_json(pseuzo("eval", *common, "--shots", 3))
    assert few["shots"] == 3 and few["test"]["loss"] != zero["test"]["loss"]
    assert few["shots_mean"] == 3 == few["shots_least"] and few["cut_prompts"] == 0
    text = pseuzo("eval", *common, "--shots", 20, "--train-size", 12, "--dev-size", 12)
    many = last_json(text)
    assert many["shots"] == 20 and 3 <= many["shots_least"] <= many["shots_mean"] < 12
    assert f"{many['shots_least']} at least: there are 12 training rows, 128 tokens" in text


def test_eval_of_weights_that_are_not_finite(tmp_path):
    """Its figures are JSON as anything reads it, and a line says why they are not there."""
    for file in Path(model_path("demo")).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = weights(tmp_path)
    broken[min(broken)].fill_(float("nan"))
    save_file(broken, tmp_path / "model.safetensors", metadata={"format": "pt"})
    args = [
        "--model",
        tmp_path,
        "--task",
        "demo",
        "--test-size",
        8,
        "--quiet",
        "--output",
        tmp_path / "eval.json",
    ]
    *_, said, line = pseuzo("eval", *args).strip().splitlines()
    figures = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert figures["test"] == {"accuracy": 0.0, "loss": None, "examples": 8}
    assert json.loads((tmp_path / "eval.json").read_text()) == figures
    assert "the loss on the test rows is nan: the model's logits are not finite" in said


CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def test_a_run_asks_as_in_a_chat_and_so_does_its_evaluation(tmp_path):
    base, out = tmp_path / "base", tmp_path / "run"
    tokenizer = AutoTokenizer.from_pretrained(model_path("demo"))
    tokenizer.chat_template = CHAT
    files.save_model(AutoModelForCausalLM.from_pretrained(model_path("demo")), tokenizer, base)
    sizes = ["--train-size", 24, "--dev-size", 4, "--test-size", 12]
    pseuzo("train", "--model", base, *SMALL[2:4], *sizes, *SMALL[10:], "--method", "mezo", "--steps", 1, "--chat",
           "--output", out)  # fmt: skip
    assert yaml.safe_load((out / "config.yaml").read_text())["chat"] is True
    results = json.loads((out / "results.json").read_text())
    text = pseuzo("eval", "--model", out / "model", "--task", "demo", "--quiet")
    assert (
        f"rows as in {out}/config.yaml: --train-size 24 --dev-size 4 --test-size 12 --chat\n"
        in text
    )
    assert last_json(text)["test"] == pytest.approx(results["test"], rel=1e-4)
    plain = last_json(
        pseuzo("eval", "--model", out / "model", "--task", "demo", "--no-chat", "--quiet")
    )["test"]
    assert plain["loss"] != pytest.approx(results["test"]["loss"], rel=1e-3)
    task, model = load_task("demo"), AutoModelForCausalLM.from_pretrained(out / "model")
    lines = task.load(train=24, dev=4, test=12)["test"]
    prompts = [dataclasses.replace(e, prompt=f"</s>user:\n{e.prompt}\nassistant:\n") for e in lines]
    by_hand = TaskData(prompts, dataclasses.replace(task, separator=""), tokenizer, max_length=128)
    assert evaluate(model, by_hand) == pytest.approx(results["test"], rel=1e-4)
    assert "takes a tokenizer with a chat template" in pseuzo(
        "eval", *SMALL[:4], "--chat", "--quiet", code=2
    )


def test_plot_overlays_runs(tmp_path):
    for seed in (0, 1):
        pseuzo(
            "train",
            *SMALL,
            *ZERO_ORDER,
            "--steps",
            2,
            "--seed",
            seed,
            "--output",
            tmp_path / f"run{seed}",
        )
    png = tmp_path / "both.png"
    pseuzo("plot", tmp_path / "run0", tmp_path / "run1", "--output", png)
    assert png.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    assert "not the folder of a finished run" in pseuzo("plot", tmp_path / "empty", code=2)


def test_compare_runs_methods_for_equal_forwards(tmp_path):
    out = tmp_path / "compared"
    args = ["compare", *SMALL[:-1], "--methods", "mezo:lr=2e-4,directions=2", "--methods", "fo-adam", "--seeds", 2,
            "--forwards", 24, "--output", out]  # fmt: skip
    text = pseuzo(*args)
    assert "mezo" in text and "fo-adam" in text
    summary = json.loads((out / "compare.json").read_text())
    rows = summary["methods"]
    assert rows["mezo:lr=2e-4,directions=2"]["steps"] == 6 and rows["fo-adam"]["steps"] == 8
    assert all(
        row["forwards"] == 24 and row["peak_memory_mib"] > 0 and len(row["test"]) == 2
        for row in rows.values()
    )
    assert (out / "table.md").read_text().count("|\n") == 4 and (out / "compare.png").exists()
    searched = list((out / "runs").glob("fo-adam*/lr.json"))
    assert len(searched) == 1, "the rate is searched for with the first seed alone"
    made = {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*")}
    pseuzo(*args)  # finished runs are not run again
    assert made == {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*")}
    text = pseuzo(*args, "--batch-size", 3, code=2)  # but only if they are the same runs
    assert "batch_size 6, not 3" in text


def test_lr_auto_searches_and_says_what_it_found(tmp_path):
    out = tmp_path / "run"
    text = pseuzo(
        "train", *SMALL, "--method", "mezo", "--lr", "auto", "--steps", 20, "--output", out
    )
    found = json.loads((out / "lr.json").read_text())
    trials = {float(rate): loss for rate, loss in found["trials"].items()}
    assert len(trials) >= 3 and text.count("dev loss") == len(trials)
    largest = max(rate for rate, loss in trials.items() if loss < 1.05 * found["start"])
    best = min(
        (rate for rate in trials if rate <= 1.05 * largest / 4), key=trials.get
    )  # what a long run survives
    assert found["chosen"]["lr"] == best == json.loads((out / "results.json").read_text())["lr"]


def test_noise_on_auto_saves_its_table(tmp_path):
    out = tmp_path / "run"
    text = pseuzo(
        "train", *SMALL, "--method", "mezo", "--noise-on", "auto", "--steps", 3, "--output", out
    )
    decided = json.loads((out / "noise_on.json").read_text())
    assert decided["noise_on"] and decided["table"] and decided["lr"] != 1e-7
    assert all(row["name"] in text for row in decided["table"])


REFUSED = {
    "unknown task": (["--task", "sst3"], "sst3"),
    "lr zero": (["--lr", "0"], "lr"),
    "lr negative": (["--lr", "-1"], "lr"),
    "lr not a number": (["--lr", "fast"], "fast"),
    "no such model": (["--model", "./no/such/folder"], "no/such/folder"),
    "unknown placement": (["--noise-on", "no_such_layer"], "no_such_layer"),
    "unknown device": (["--device", "cuda:99"], "cuda:99"),
    "keep best without evaluation": (["--eval-every", "0", "--keep", "best"], "--keep"),
    "metric under pseuzo": (["--objective", "metric"], "objective"),
    "journal of a first-order run": (["--method", "fo-sgd", "--journal", "j.pzj"], "journal"),
    "directions under pseuzo": (["--directions", "2"], "directions"),
    "head under pseuzo": (["--mode", "head"], "fo-adam"),
    "no step": (["--steps", "0"], "steps"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_are_one_sentence_and_exit_code_2(tmp_path, what):
    args, word = REFUSED[what]
    out = tmp_path / "run"
    text = pseuzo("train", *SMALL, *args, "--output", out, code=2)
    error = text.strip().splitlines()[-1]
    assert error.startswith("Error: ") and word in error and "Traceback" not in text
    assert not out.exists() or not any(out.glob("model*"))


def test_refuses_a_folder_that_is_not_empty_and_loses_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "not empty" in pseuzo("train", *SMALL, "--output", tmp_path / "run", code=2)
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_refuses_a_pickle(tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in Path(model_path("demo")).iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(weights(Path(model_path("demo"))), folder / "pytorch_model.bin")
    text = pseuzo("train", *SMALL, "--model", folder, "--output", tmp_path / "run", code=2)
    assert "safetensors" in text


def test_refuses_a_config_with_an_unknown_option(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model: demo\ntask: demo\nlearning_rat: 1\n")
    assert "learning_rat" in pseuzo(
        "train", "--config", config, "--output", tmp_path / "run", code=2
    )
    config.write_text("- model\n")
    assert "option: value" in pseuzo(
        "train", "--config", config, "--output", tmp_path / "run", code=2
    )
    config.write_text("steps: many\nmodel: demo\ntask: demo\n")
    assert "many" in pseuzo("train", "--config", config, "--output", tmp_path / "run", code=2)


OWN = """
name: own
kind: classification
data: rows.jsonl
prompt: "{{ text }} It is"
label: label
labels: {0: bad, 1: good}
"""
ROWS = [{"text": f"line {i}", "label": i % 2} for i in range(60)]
BAD_TASKS = {
    "missing column": (OWN.replace("{{ text }}", "{{ sentence }}"), ROWS, [], "sentence"),
    "label without a word": (OWN, [*ROWS, {"text": "x", "label": 7}], [], "7"),
    "label word of several tokens": (OWN.replace("good", "supercalifragilistic"), ROWS, ["--train-on", "label-words"],
                                     "not one token"),
    "empty data": (OWN, [], [], "empty"),
    "answer longer than the model": (OWN.replace("good", "very " * 300 + "good"), ROWS, [], "leaves no room"),
    "unknown key": (OWN + "verbalizer: x\n", ROWS, [], "verbalizer"),
    "not YAML": ("name: [own", ROWS, [], "task.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_TASKS)
def test_a_bad_task_is_refused_in_one_sentence(tmp_path, what):
    text, rows, args, word = BAD_TASKS[what]
    (tmp_path / "task.yaml").write_text(text)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = pseuzo("train", *SMALL[:2], "--task", tmp_path / "task.yaml", *args, "--train-size", 20, "--dev-size", 10,
                    "--test-size", 30, "--device", "cpu", "--output", tmp_path / "run", code=2)  # fmt: skip
    error = output.strip().splitlines()[-1]
    assert error.startswith("Error: ") and word in error and "Traceback" not in output


def test_prompts_longer_than_the_model_lose_their_beginning(tmp_path):
    (tmp_path / "task.yaml").write_text(OWN)
    rows = [row | {"text": "long " * 300 + row["text"]} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = pseuzo("train", *SMALL[:2], "--task", tmp_path / "task.yaml", "--train-size", 20, "--dev-size", 10,
                  "--test-size", 30, "--device", "cpu", "--quiet", "--steps", 2, "--method", "mezo", "--output",
                  tmp_path / "run")  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["examples"] == 24  # two fifths at most
    assert results["cut_prompts"] == {"train": 20, "dev": 10, "test": 24}
    assert (
        "20 of 20 prompts of the train split were too long for 128 tokens and lost their beginning"
        in text
    )
    text = pseuzo("eval", "--model", tmp_path / "run" / "model", "--task", tmp_path / "task.yaml", "--test-size", 5,
                  "--device", "cpu", "--quiet", "--shots", 2)  # fmt: skip
    figures = last_json(text)
    assert (
        figures["cut_prompts"],
        figures["shots"],
        figures["shots_mean"],
        figures["shots_least"],
    ) == (5, 2, 0, 0)
    assert (
        "5 of 5 prompts of the test split" in text
        and "of 2 shots, before a prompt were 0.0 on average" in text
    )


def test_generation_is_trained_and_scored_by_f1(tmp_path):
    """A task in the public schema of SQuAD, trained on the answers' tokens and on F1 itself."""
    rows = [{"context": f"The {c} is {n}.", "question": f"What is the {c}?",
             "answers": {"text": [n], "answer_start": [0]}}
            for c, n in zip(["code", "file", "name"] * 14, ["short", "open", "long"] * 14, strict=True)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for method, args in (("pseuzo", []), ("mezo", ["--objective", "metric", "--eps", "0.05"])):
        out = tmp_path / method
        pseuzo("train", *SMALL[:2], "--task", "squad", "--data", tmp_path / "rows.jsonl", "--train-size", 12,
               "--dev-size", 6, "--test-size", 6, "--device", "cpu", "--quiet", "--steps", 2, "--batch-size", 4,
               "--method", method,
               "--eval-every", 2, *args, "--output", out)  # fmt: skip
        test = json.loads((out / "results.json").read_text())["test"]
        assert {"f1", "em", "loss"} <= test.keys() and 0 <= test["em"] <= test["f1"] <= 1


@pytest.mark.parametrize("name", PUBLIC)
def test_every_builtin_task_trains_and_scores(tmp_path, name):
    pytest.importorskip("datasets")
    rows = [row for row, *_ in PUBLIC[name]]
    for part, some in (("train", rows * 4), ("validation", rows)):
        write(tmp_path / "data" / f"{part}.parquet", some)
    out = tmp_path / "run"
    pseuzo("train", *SMALL[:2], "--task", name, "--data", tmp_path / "data", "--train-size", 2, "--dev-size",
           1, "--test-size", 1, "--steps", 1, "--batch-size", 2, "--device", "cpu", "--quiet",
           "--output", out)  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert results["metric"] in results["test"] and results["test"]["examples"] == 1
    logged = next(row["loss"] for row in results["history"] if "loss" in row)
    assert logged > 0 and results["test"]["loss"] > 0


QUESTIONS = [
    (f"line {i} has the number", str(i % 3), [str(i % 3), f"not {i % 3}"]) for i in range(40)
]
PLAIN = {
    "classification": [
        {"prompt": q, "options": ["0", "1", "2"], "answer": int(a)} for q, a, _ in QUESTIONS
    ],
    "choice": [{"prompt": q, "options": options, "answer": a} for q, a, options in QUESTIONS],
    "generation": [{"prompt": q, "answers": [a]} for q, a, _ in QUESTIONS],
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_task_of_plain_rows_trains_and_scores_with_shots(tmp_path, kind):
    task = tmp_path / "rows.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in PLAIN[kind]))
    common = [
        "--task",
        task,
        "--train-size",
        16,
        "--dev-size",
        8,
        "--test-size",
        8,
        "--device",
        "cpu",
        "--quiet",
    ]
    out = tmp_path / "run"
    pseuzo(
        "train",
        "--model",
        "demo",
        *common,
        *ZERO_ORDER,
        "--steps",
        2,
        "--batch-size",
        4,
        "--output",
        out,
    )
    results = json.loads((out / "results.json").read_text())
    assert (
        results["metric"] == ("f1" if kind == "generation" else "accuracy")
        and results["task"] == "rows"
    )
    zero, few = (
        last_json(pseuzo("eval", "--model", out / "model", *common, "--shots", shots, "--seed", 0))
        for shots in (0, 3)
    )
    assert zero["test"] == pytest.approx(results["test"], rel=1e-4) and zero["shots_mean"] == 0
    assert (
        few["shots_mean"] == 3 == few["shots_least"] and few["test"]["loss"] != zero["test"]["loss"]
    )


def test_eval_of_a_run_takes_its_rows(tmp_path, monkeypatch):
    """Of one file: another seed, or more test rows, would draw rows that the run was trained on."""
    task, out = tmp_path / "rows.jsonl", tmp_path / "run"
    task.write_text("".join(json.dumps(row) + "\n" for row in PLAIN["classification"]))
    sizes = ["--train-size", 24, "--dev-size", 4, "--test-size", 12]
    pseuzo("train", "--model", "demo", "--task", task, *sizes, *ZERO_ORDER, "--seed", 5, "--steps", 2, "--keep",
           "last", "--batch-size", 4, "--save-every", 2, "--device", "cpu", "--quiet", "--output", out)  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    common = ["eval", "--task", task, "--device", "cpu", "--quiet", "--model"]
    said = (
        f"rows as in {out}/config.yaml: --data-seed 5 --train-size 24 --dev-size 4 --test-size 12\n"
    )
    for folder in ("model", "checkpoint-2"):
        text = pseuzo(*common, out / folder)
        assert said in text and last_json(text)["test"] == pytest.approx(results["test"], rel=1e-4)
    text = pseuzo(*common, out / "model", "--data-seed", 0, "--test-size", 11)
    assert "--train-size 24 --dev-size 4\n" in text and last_json(text)["test"]["examples"] == 11
    assert last_json(text)["test"]["loss"] != pytest.approx(results["test"]["loss"], rel=1e-3)
    assert "rows as in" not in pseuzo(
        *common, out / "model", *sizes, "--seed", 5
    )  # as they would be anyway
    assert "rows as in" not in pseuzo(
        *common, out / "model", "--task", "demo", "--test-size", 8
    )  # of another task
    monkeypatch.chdir(out)  # a name is no model in this folder
    assert "rows as in" not in pseuzo(*common, "demo", "--test-size", 8)
    (out / "model").rename(tmp_path / "model")
    assert "rows as in" not in pseuzo(*common, tmp_path / "model", "--test-size", 8)


def test_eval_of_the_folder_of_a_run_says_where_its_model_is(tmp_path):
    out = tmp_path / "run"
    (out / "model").mkdir(parents=True)
    asked = ["eval", "--model", out, "--task", "demo"]
    assert "did you mean" not in pseuzo(*asked, code=2)
    (out / "model" / "config.json").touch()
    assert f"did you mean {out}/model?" in pseuzo(*asked, code=2)


def test_reports_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pseuzo(
        "train",
        *SMALL,
        *ZERO_ORDER,
        "--steps",
        3,
        "--report-to",
        "tensorboard",
        "--output",
        tmp_path / "run",
    )
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    log = EventAccumulator(str(events)).Reload()
    losses = [e.value for e in log.Scalars("train/loss")]
    history = json.loads((tmp_path / "run" / "results.json").read_text())["history"]
    assert (
        losses == pytest.approx([row["loss"] for row in history if "loss" in row])
        and len(losses) == 3
    )
    assert "train/projected_grad" in log.Tags()["scalars"]


@pytest.mark.parametrize("kind", ["opt", "unheard-of"])
def test_code_that_comes_with_a_model_is_never_run(tmp_path, kind):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    for file in Path(model_path("demo")).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": auto}))
    (folder / "custom.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import OPTConfig as Config, OPTForCausalLM as Model\n"
    )
    known = kind == "opt"  # then Transformers' own code is used
    text = pseuzo(
        "eval", *SMALL[2:4], "--model", folder, "--test-size", 8, "--quiet", code=0 if known else 2
    )
    assert not ran.exists()
    assert known or text.strip().splitlines()[-1].startswith("Error: ")


def test_info():
    text = pseuzo("info")
    assert (
        "DIFFERS" not in text and "self-test, hadamard on cpu: same bits as the reference" in text
    )
    assert "normal on cpu: as the reference" in text and "window on cpu: as the reference" in text


ALL_BITS = ["hadamard", "hadamard-fp16", "rademacher"]
BROKEN = {  # the op that is wrong, what it does instead, and the lines that tell
    "noise": ("noise", lambda op, *args, **k: op(*args, **k) * (1 + 1e-5), ["normal"]),
    "window": ("EmaWindow", lambda op, *args, momentum, **k: op(*args, momentum=momentum * (1 - 1e-4), **k),
               ["window"]),
    "last seed": ("update_", lambda op, x, seeds, coefs, **k: op(x, seeds[:-1], coefs[:-1], **k), ALL_BITS),
    "rounding": ("update_", lambda op, *args, rounding, **k: op(*args, **k), ALL_BITS),
    "one noise": ("update_", lambda op, *args, noise, **k: op(*args, noise=noise.removesuffix("-fp16"), **k),
                  ["hadamard-fp16"]),
    "nothing": ("update_", lambda *args, **k: None, ALL_BITS),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_info_notices_an_op_that_is_wrong(monkeypatch, what):
    name, wrong, lines = BROKEN[what]
    monkeypatch.setattr(
        pseuzo_kernels, name, functools.partial(wrong, getattr(pseuzo_kernels, name))
    )
    text = pseuzo("info", code=2)
    assert (
        re.findall("self-test, (.*) on cpu: DIFFERS", text) == lines
        and "disagree with the reference" in text
    )
