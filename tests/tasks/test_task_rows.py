"""Rows become examples, by built-in prompts, draws by seed, and layouts of files and of the hub."""

import json
import warnings
from dataclasses import replace

import pytest
from pseuzo.tasks import BUILTIN, Example, TaskData, load_task, sources
from pseuzo.tasks.drawing import PARTS
from public_rows import PUBLIC, write
from task_examples import DEMO_MODEL, TASK, numbered, numbers
from transformers import AutoTokenizer


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", PUBLIC)
def test_builtin_prompts(name, suffix, tmp_path):
    """Rows come from files with the hub's layout, and test rows from the validation split."""
    rows = [row for row, *_ in PUBLIC[name]]
    folder = tmp_path / name
    write(folder / f"train-00000-of-00001{suffix}", rows * 2)
    write(folder / f"validation-00000-of-00001{suffix}", rows)
    write(folder / f"test-00000-of-00001{suffix}", [row | {"label": -1} for row in rows])
    task = load_task(name)
    parts = task.load(folder, train=len(rows), dev=len(rows), test=len(rows))
    parts = {part: [replace(e, domain="") for e in some] for part, some in parts.items()}
    want = {Example(*expected) for _, *expected in PUBLIC[name]}
    assert set(parts["test"]) == want and len(parts["test"]) == len(rows)
    assert (
        len(parts["train"]) == len(parts["dev"]) == len(rows)
        and set(parts["train"] + parts["dev"]) == want
    )
    assert task.metric == ("f1" if name in ("squad", "drop") else "accuracy")


def test_all_builtin_tasks_are_tested_and_described():
    assert set(BUILTIN) == {*PUBLIC, "demo"}
    for name in BUILTIN:
        task = load_task(name)
        assert task.name == name and task.description and (task.dataset or name == "demo")


def test_squad_without_titles(tmp_path):
    row = {k: v for k, v in PUBLIC["squad"][0][0].items() if k != "title"}
    (example,) = load_task("squad").load(
        write(tmp_path / "x.jsonl", [row]), train=0, dev=0, test=1
    )["test"]
    assert example.prompt == "Passage: The Nile is long.\nQuestion: What is long?\nAnswer:"


def test_the_demo_task_is_the_demo():
    parts = load_task("demo").load(train=20, dev=400, test=30)
    assert {k: len(v) for k, v in parts.items()} == {"train": 20, "dev": 400, "test": 30}
    assert all(
        e.prompt.endswith("\n# kind:") and e.options == ("code", "prose") for e in parts["test"]
    )
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    data = TaskData(parts["dev"], load_task("demo"), tokenizer, max_length=126)
    assert data.options == [
        tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" code", " prose")
    ]
    for i in range(0, 400, 7):
        assert data[i]["tokens"][0].tokens == tokenizer(parts["dev"][i].prompt)["input_ids"][-126:]


def test_draws(tmp_path):
    write(tmp_path / "train.jsonl", numbered(100))
    write(tmp_path / "validation.jsonl", numbered(50, 100))
    task = load_task("sst2")
    parts = task.load(tmp_path, train=30, dev=20, test=10, seed=3)
    train, dev, test = (numbers(parts[p]) for p in PARTS)
    assert (len(train), len(dev), len(test)) == (30, 20, 10)
    assert (
        len({*train, *dev}) == 50
        and max(*train, *dev) < 100
        and min(test) >= 100
        and len(set(test)) == 10
    )
    assert task.load(tmp_path, train=30, dev=20, test=10, seed=3) == parts
    other = task.load(tmp_path, train=30, dev=20, test=10, seed=4)
    assert all(numbers(other[p]) != numbers(parts[p]) for p in PARTS)
    assert train != sorted(train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = task.load(tmp_path, train=60, dev=40, test=50)
    assert sorted(numbers(exact["train"] + exact["dev"])) == list(range(100))
    assert task.load(tmp_path, train=0, dev=0, test=5, seed=1)["train"] == []


def test_fewer_rows_than_asked_for(tmp_path):
    write(tmp_path / "train.jsonl", numbered(30))
    write(tmp_path / "validation.jsonl", numbered(7, 100))
    with pytest.warns(UserWarning) as told:
        parts = load_task("sst2").load(tmp_path)
    assert [str(w.message) for w in told] == [
        "task sst2: the split 'train' has 30 rows, too few: 20 of 1000 for train, 10 of 500 for "
        "dev",
        "task sst2: the split 'validation' has 7 rows, too few: 7 of 1000 for test",
    ]
    assert sorted(numbers(parts["train"] + parts["dev"])) == list(range(30))
    assert (len(parts["train"]), len(parts["dev"]), len(parts["test"])) == (20, 10, 7)


@pytest.mark.filterwarnings("ignore:task sst2. the data has .* too few")
@pytest.mark.parametrize("n", [3, 4, 11, 30, 2000, 2499, 2501, 4000])
def test_test_rows_of_one_file_do_not_depend_on_the_others(n, tmp_path):
    """Otherwise an evaluation with a few shots would use rows that a run was trained on."""
    data, task = write(tmp_path / "one.jsonl", numbered(n)), load_task("sst2")
    run = {part: numbers(examples) for part, examples in task.load(data, seed=5).items()}
    every = [i for part in PARTS for i in run[part]]
    assert len(every) == len(set(every)) == min(n, 2500) and all(run.values())
    assert len(run["test"]) == min(1000, max(1, 2 * n // 5))
    for sizes in (
        {"train": 2, "dev": 0},
        {"train": 0, "dev": 0},
        {"train": 1, "dev": 3},
        {"train": 9999, "dev": 9999},
    ):
        other = task.load(data, **sizes, seed=5)
        assert numbers(other["test"]) == run["test"], sizes
        assert not {*numbers(other["train"]), *numbers(other["dev"])} & {*run["test"]}
    assert numbers(task.load(data, seed=6)["test"]) != run["test"] or n < 11
    some = task.load(data, train=1, dev=1, test=1, seed=5)
    assert [len(some[part]) for part in PARTS] == [1, 1, 1]


def test_shares_of_one_file_with_few_rows(tmp_path):
    data, task = write(tmp_path / "one.jsonl", numbered(30)), load_task("sst2")
    with pytest.warns(UserWarning) as told:
        parts = task.load(data)
    assert [len(parts[part]) for part in PARTS] == [12, 6, 12]
    with pytest.warns(UserWarning, match="the data has 33 rows, too few: 13 of 20 for test$"):
        task.load(write(tmp_path / "more.jsonl", numbered(33)), train=0, dev=0, test=20)
    assert [str(w.message) for w in told] == [
        "task sst2: the data has 30 rows, too few: 12 of 1000 for train, 6 of 500 for dev, 12 of "
        "1000 for test"
    ]


def test_layouts_of_local_data(tmp_path):
    from datasets import Dataset, DatasetDict

    task = load_task("sst2")
    sizes = dict(train=4, dev=3, test=2)

    def load(path, of=task):
        parts = of.load(path, **sizes)
        assert {p: len(parts[p]) for p in PARTS} == sizes
        assert len({n for p in PARTS for n in numbers(parts[p])}) == 9
        return {p: (min(numbers(parts[p])) // 100, max(numbers(parts[p])) // 100) for p in PARTS}

    everywhere = dict.fromkeys(PARTS, (0, 0))
    assert load(write(tmp_path / "one.jsonl", numbered(12))) == everywhere
    assert load(write(tmp_path / "one.parquet", numbered(12))) == everywhere
    assert load(write(tmp_path / "single" / "reviews.jsonl", numbered(12)).parent) == everywhere
    assert load(write(tmp_path / "only" / "train.jsonl", numbered(12)).parent) == everywhere
    (tmp_path / "list.json").write_text(json.dumps(numbered(12)))
    assert load(tmp_path / "list.json") == everywhere
    # Splits may be shards, or folders named like them.
    write(tmp_path / "shards" / "train-00000-of-00002.parquet", numbered(2))
    write(tmp_path / "shards" / "train-00001-of-00002.parquet", numbered(5, 2))
    write(tmp_path / "shards" / "validation-00000-of-00001.parquet", numbered(9, 100))
    assert load(tmp_path / "shards") == {"train": (0, 0), "dev": (0, 0), "test": (1, 1)}
    write(tmp_path / "folders" / "train" / "0000.parquet", numbered(12))
    write(tmp_path / "folders" / "test" / "0000.parquet", numbered(9, 200))
    assert load(tmp_path / "folders") == {"train": (0, 0), "dev": (0, 0), "test": (2, 2)}
    # Of three splits a built-in task uses the two that it uses on the hub; a user's task uses each
    # as its name says.
    for split, start in (("train", 0), ("val", 100), ("test", 200)):
        write(tmp_path / "three" / f"{split}.jsonl", numbered(12, start))
    assert load(tmp_path / "three", TASK) == {"train": (0, 0), "dev": (1, 1), "test": (2, 2)}
    write(tmp_path / "sst2" / "train.jsonl", numbered(12))
    write(tmp_path / "sst2" / "dev.jsonl", numbered(9, 100))
    write(tmp_path / "sst2" / "test.jsonl", [row | {"label": -1} for row in numbered(9, 200)])
    assert load(tmp_path / "sst2") == {"train": (0, 0), "dev": (0, 0), "test": (1, 1)}
    # These are folders of save_to_disk.
    Dataset.from_list(numbered(12)).save_to_disk(str(tmp_path / "saved"))
    assert load(tmp_path / "saved") == everywhere
    both = {
        "train": Dataset.from_list(numbered(12)),
        "validation": Dataset.from_list(numbered(9, 100)),
    }
    DatasetDict(both).save_to_disk(str(tmp_path / "saved-dict"))
    assert load(tmp_path / "saved-dict") == {"train": (0, 0), "dev": (0, 0), "test": (1, 1)}


def test_the_hubs_layout(tmp_path):
    for split, start in (("train", 0), ("validation", 100), ("test", 200)):
        write(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", numbered(12, start))
        write(tmp_path / "lines" / "data" / f"{split}.jsonl", numbered(12, start))
    (tmp_path / "hub" / "README.md").write_text("---\nsplits: 3\n")
    (tmp_path / "hub" / "dataset_infos.json").write_text("{}")
    for folder in ("hub", "lines"):
        parts = TASK.load(tmp_path / folder, train=12, dev=12, test=12)
        assert [min(numbers(parts[part])) for part in PARTS] == [0, 100, 200]
        assert [len(parts[part]) for part in PARTS] == [12, 12, 12]
    for name in ("one", "two"):  # each configuration has its folder
        write(tmp_path / "many" / name / "train-00000-of-00001.parquet", numbered(12))
    with pytest.raises(
        ValueError,
        match=r"the split 'train' is in several folders, .*/one, .*/two; give one of them",
    ):
        TASK.load(tmp_path / "many", train=1, dev=1, test=1)
    assert len(TASK.load(tmp_path / "many" / "one", train=1, dev=1, test=1)["test"]) == 1


def test_the_hub_is_asked_for_what_the_task_names(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, config, split, **more):
        asked.append((path, config, split, more))
        return datasets.Dataset.from_list([PUBLIC["rte"][0][0]] * 9)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    parts = load_task("rte").load(train=4, dev=5, test=3)
    assert [len(parts[p]) for p in PARTS] == [4, 5, 3]
    more = {"data_dir": "rte", "revision": "refs/convert/parquet"}
    assert asked == [("aps/super_glue", None, s, more) for s in ("train", "validation")]
    asked.clear()
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route"))
    )
    with pytest.raises(
        ValueError,
        match=r"task sst2: the split 'train' .* nyu-mll/glue \(sst2\) cannot be loaded: no rou",
    ):
        load_task("sst2").load()


def test_data_that_cannot_be_used(tmp_path):
    task = load_task("sst2")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_text("no Parquet")
    write(tmp_path / "named" / "first.jsonl", numbered(3))
    write(tmp_path / "named" / "second.jsonl", numbered(3))
    write(tmp_path / "mixed" / "train.jsonl", numbered(3))
    write(tmp_path / "mixed" / "train-0.parquet", numbered(3))
    for path, sentence in (
        (tmp_path / "nothing", "there is no file or folder"),
        (tmp_path / "empty", "holds no data"),
        (
            tmp_path / "named",
            "train examples come from the split 'train', but there is only first, second",
        ),
        (tmp_path / "mixed", "as Parquet and as JSON"),
        (tmp_path / "bad.parquet", "cannot be read as Parquet"),
        (write(tmp_path / "x.csv", []), "cannot be read as data"),
        (write(tmp_path / "empty.jsonl", []), "the data is empty"),
        (
            write(tmp_path / "two.jsonl", numbered(2)),
            r"has 2 row\(s\), too few for train and dev and test",
        ),
    ):
        with pytest.raises(ValueError, match=f"task sst2: .*{sentence}"):
            task.load(path)
    with pytest.raises(ValueError, match="train must be a number of examples from 0 up, got -1"):
        task.load(tmp_path, train=-1)
    with pytest.raises(ValueError, match="there is nothing to load"):
        task.load(tmp_path, train=0, dev=0, test=0)
    with pytest.raises(ValueError, match="it names no data; add 'data'"):
        TASK.load()


def test_json_of_any_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "JSON_BYTES", 1000)
    file = write(tmp_path / "x.jsonl", numbered(100))
    with pytest.raises(
        ValueError, match=r"x.jsonl has \d+ bytes, and JSON is read whole, up to 1000; save"
    ):
        TASK.load(file)


def test_a_file_may_begin_with_a_mark_of_its_byte_order(tmp_path):
    """As editors on Windows write it."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8-sig")
    assert [row for _, row in sources.read_json(file)] == [{"text": "a"}, {"text": "b"}]
