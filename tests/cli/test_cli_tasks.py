"""The command line trains on built-in and user's tasks, and evaluates them."""

import json

import pytest
from cli_runs import OWN, PLAIN, ROWS
from helpers import SMALL, ZERO_ORDER, last_json, pseuzo
from public_rows import PUBLIC, write

pytestmark = pytest.mark.slow


BAD_TASKS = {
    "missing column": (OWN.replace("{{ text }}", "{{ sentence }}"), ROWS, [], "sentence"),
    "label without a word": (OWN, [*ROWS, {"text": "x", "label": 7}], [], "7"),
    "label word of several tokens": (
        OWN.replace("good", "supercalifragilistic"),
        ROWS,
        ["--train-on", "label-words"],
        "not one token",
    ),
    "empty data": (OWN, [], [], "empty"),
    "answer longer than the model": (
        OWN.replace("good", "very " * 300 + "good"),
        ROWS,
        [],
        "leaves no room",
    ),
    "unknown key": (OWN + "verbalizer: x\n", ROWS, [], "verbalizer"),
    "not YAML": ("name: [own", ROWS, [], "task.yaml"),
}


@pytest.mark.parametrize("what", BAD_TASKS)
def test_a_bad_task_is_refused_in_one_sentence(tmp_path, what):
    text, rows, args, word = BAD_TASKS[what]
    (tmp_path / "task.yaml").write_text(text)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = pseuzo(
        "train",
        *SMALL[:2],
        "--task",
        tmp_path / "task.yaml",
        *args,
        *"--train-size 20 --dev-size 10 --test-size 30 --device cpu".split(),
        "--output",
        tmp_path / "run",
        code=2,
    )
    error = output.strip().splitlines()[-1]
    assert error.startswith("Error: ") and word in error and "Traceback" not in output


def test_prompts_longer_than_the_model_lose_their_beginning(tmp_path):
    (tmp_path / "task.yaml").write_text(OWN)
    rows = [row | {"text": "long " * 300 + row["text"]} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = pseuzo(
        "train",
        *SMALL[:2],
        "--task",
        tmp_path / "task.yaml",
        *"--train-size 20 --dev-size 10 --test-size 30 --device cpu --quiet".split(),
        *"--steps 2 --method mezo".split(),
        "--output",
        tmp_path / "run",
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["examples"] == 24  # at most two fifths of the rows
    assert results["cut_prompts"] == {"train": 20, "dev": 10, "test": 24}
    assert (
        "20 of 20 prompts of the train split were too long for 128 tokens and lost their beginning"
        in text
    )
    text = pseuzo(
        "eval",
        "--model",
        tmp_path / "run" / "model",
        "--task",
        tmp_path / "task.yaml",
        *"--test-size 5 --device cpu --quiet --shots 2".split(),
    )
    figures = last_json(text)
    assert (
        figures["cut_prompts"],
        figures["shots"],
        figures["shots_mean"],
        figures["shots_least"],
    ) == (5, 2, 0, 0)
    assert (
        "5 of 5 prompts of the test split" in text
        and "--shots 2: a prompt has 0.0 on average" in text
    )


def test_generation_is_trained_and_scored_by_f1(tmp_path):
    """A task in the public schema of SQuAD is trained on the answers' tokens and on F1 itself."""
    rows = [
        {
            "context": f"The {c} is {n}.",
            "question": f"What is the {c}?",
            "answers": {"text": [n], "answer_start": [0]},
        }
        for c, n in zip(["code", "file", "name"] * 14, ["short", "open", "long"] * 14, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for method, args in (("pseuzo", []), ("mezo", ["--objective", "metric", "--eps", "0.05"])):
        out = tmp_path / method
        pseuzo(
            "train",
            *SMALL[:2],
            "--task",
            "squad",
            "--data",
            tmp_path / "rows.jsonl",
            *"--train-size 12 --dev-size 6 --test-size 6 --device cpu --quiet".split(),
            *"--steps 2 --batch-size 4".split(),
            "--method",
            method,
            "--eval-every",
            2,
            *args,
            "--output",
            out,
        )
        test = json.loads((out / "results.json").read_text())["test"]
        assert {"f1", "em", "loss"} <= test.keys() and 0 <= test["em"] <= test["f1"] <= 1


@pytest.mark.parametrize("name", PUBLIC)
def test_every_builtin_task_trains_and_scores(tmp_path, name):
    pytest.importorskip("datasets")
    rows = [row for row, *_ in PUBLIC[name]]
    for part, some in (("train", rows * 4), ("validation", rows)):
        write(tmp_path / "data" / f"{part}.parquet", some)
    out = tmp_path / "run"
    pseuzo(
        "train",
        *SMALL[:2],
        "--task",
        name,
        "--data",
        tmp_path / "data",
        *"--train-size 2 --dev-size 1 --test-size 1 --steps 1 --batch-size 2".split(),
        *"--device cpu --quiet".split(),
        "--output",
        out,
    )
    results = json.loads((out / "results.json").read_text())
    assert results["metric"] in results["test"] and results["test"]["examples"] == 1
    logged = next(row["loss"] for row in results["history"] if "loss" in row)
    assert logged > 0 and results["test"]["loss"] > 0


@pytest.mark.parametrize("kind", PLAIN)
def test_a_task_of_plain_rows_trains_and_scores_with_shots(tmp_path, kind):
    task = tmp_path / "rows.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in PLAIN[kind]))
    common = [
        "--task",
        task,
        *"--train-size 16 --dev-size 8 --test-size 8 --device cpu --quiet".split(),
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
