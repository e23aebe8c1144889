"""eval takes its rows from the run whose folder holds the model."""

import pytest
from cli_refusals import BASE, refused
from helpers import pseuzo
from pseuzo.cli import run as runs

pytestmark = pytest.mark.slow


def test_eval_takes_the_rows_that_train_takes(monkeypatch):
    seen = {}
    monkeypatch.setattr(runs, "evaluate_run", lambda given: seen.update(given) or {})
    pseuzo("eval", *BASE)
    assert (seen["train_size"], seen["dev_size"], seen["data_seed"]) == (1000, 500, None)
    pseuzo("eval", *BASE, *"--train-size 7 --dev-size 8 --data-seed 9".split())
    assert (seen["train_size"], seen["dev_size"], seen["data_seed"]) == (7, 8, 9)


LAUGHS = "".join(f"  - &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]\n" for i in range(9))


@pytest.mark.parametrize(
    "config, words",
    [
        ("model: demo\ntask:\n" + LAUGHS, "line 4: aliases (*name) are not read"),
        ("task: " + "[" * 9999, "line 1: there are more than 32 levels"),
        ("task: demo\ntest_size: 0\n", "config.yaml: test_size: 0 is not in the range"),
        (
            "task: demo\ndata_seed: 99999999999999999999\n",
            "config.yaml: data_seed: 99999999999999999999 is not in",
        ),
        ("- task\n", "must hold `option: value` lines"),
    ],
)
def test_eval_of_a_model_in_the_folder_of_a_hostile_run(tmp_path, monkeypatch, config, words):
    monkeypatch.setattr(runs, "evaluate_run", lambda given: {})
    (tmp_path / "model").mkdir()
    (tmp_path / ".pseuzo").write_text("made by pseuzo train\n")
    (tmp_path / "config.yaml").write_text(config)
    assert words in refused("eval", "--model", tmp_path / "model", "--task", "demo")


@pytest.mark.parametrize(
    "config",
    [
        "task: [demo]\n",
        "task: demo\ntest_size: [5]\ndev_size: true\ndata_seed: 1.5\nchat: 5\n",
        "task: 5\n",
        "{}\n",
        "task: demo\ndata: {a: b}\n",
        "model: x\n",
    ],
)
def test_settings_of_a_run_that_are_of_other_types_are_not_taken(tmp_path, monkeypatch, config):
    monkeypatch.setattr(runs, "evaluate_run", lambda given: {})
    (tmp_path / "model").mkdir()
    (tmp_path / ".pseuzo").write_text("made by pseuzo train\n")
    (tmp_path / "config.yaml").write_text(config)
    assert "rows as in" not in pseuzo("eval", "--model", tmp_path / "model", "--task", "demo")
