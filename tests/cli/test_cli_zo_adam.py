"""ZO-Adam from the command line."""

import json

import pytest
from helpers import SMALL, assert_same_weights, pseuzo
from pseuzo.train.arguments import PseuZOTrainingArguments

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.slow
def test_zo_adam_trains_and_both_kinds_of_moments_are_the_same_within_the_window(tmp_path):
    for moments in ("seeds", "state"):
        given = f"--method zo-adam --moments {moments} --steps 4 --keep last --eval-every 0"
        pseuzo("train", *SMALL, *given.split(), "--output", tmp_path / moments)
        results = json.loads((tmp_path / moments / "results.json").read_text())
        assert results["method"] == "zo-adam" and results["forwards"] == 8
        assert results["lr"] == 1e-5 and results["skipped_steps"] == 0
    assert_same_weights(tmp_path / "seeds" / "model", tmp_path / "state" / "model")


def test_a_journal_is_refused_before_anything_is_loaded(tmp_path):
    journal = tmp_path / "run.pzj"
    with pytest.raises(ValueError, match="method zo-adam: a journal replays sums of seeded noise"):
        PseuZOTrainingArguments(str(tmp_path), method="zo-adam", journal=str(journal))
    assert not journal.exists()
