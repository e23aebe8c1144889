"""Tasks on hand-made rows in the public schemas: prompts, draws, token rows, batches, order; what users get wrong."""

import json
import warnings
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pseuzo
import pytest
import torch
from helpers import PUBLIC, write
from pseuzo import CausalLMObjective
from pseuzo.tasks import BUILTIN, Example, StratifiedSampler, Task, TaskData, load_task, sources
from pseuzo.tasks.task import PARTS
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO_MODEL = Path(pseuzo.__file__).parent / "demo" / "assets" / "model"
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def demo_model():
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What datasets writes when it reads Parquet goes to the test's own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", PUBLIC)
def test_builtin_prompts(name, suffix, tmp_path):
    """Through files laid out as the hub's are: training rows, and test rows from the validation split."""
    rows = [row for row, *_ in PUBLIC[name]]
    folder = tmp_path / name
    write(folder / f"train-00000-of-00001{suffix}", rows * 2)
    write(folder / f"validation-00000-of-00001{suffix}", rows)
    write(folder / f"test-00000-of-00001{suffix}", [row | {"label": -1} for row in rows])
    task = load_task(name)
    parts = task.load(folder, train=len(rows), dev=len(rows), test=len(rows))
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


def numbered(n, start=0):
    return [{"sentence": f"number {i}", "label": i % 2, "idx": i} for i in range(start, start + n)]


def numbers(examples):
    return [int(e.prompt.split()[1]) for e in examples]


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
        "task sst2: the split 'train' has 30 rows, too few: 20 of 1000 for train, 10 of 500 for dev",
        "task sst2: the split 'validation' has 7 rows, too few: 7 of 1000 for test",
    ]
    assert sorted(numbers(parts["train"] + parts["dev"])) == list(range(30))
    assert (len(parts["train"]), len(parts["dev"]), len(parts["test"])) == (20, 10, 7)


@pytest.mark.filterwarnings("ignore:task sst2. the data has .* too few")
@pytest.mark.parametrize("n", [3, 4, 11, 30, 2000, 2499, 2501, 4000])
def test_test_rows_of_one_file_do_not_depend_on_the_others(n, tmp_path):
    """Else an evaluation that asks for a few shots would be on rows that a run was trained on."""
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
        "task sst2: the data has 30 rows, too few: 12 of 1000 for train, 6 of 500 for dev, 12 of 1000 for test"
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
    # shards, and folders named like splits
    write(tmp_path / "shards" / "train-00000-of-00002.parquet", numbered(2))
    write(tmp_path / "shards" / "train-00001-of-00002.parquet", numbered(5, 2))
    write(tmp_path / "shards" / "validation-00000-of-00001.parquet", numbered(9, 100))
    assert load(tmp_path / "shards") == {"train": (0, 0), "dev": (0, 0), "test": (1, 1)}
    write(tmp_path / "folders" / "train" / "0000.parquet", numbered(12))
    write(tmp_path / "folders" / "test" / "0000.parquet", numbered(9, 200))
    assert load(tmp_path / "folders") == {"train": (0, 0), "dev": (0, 0), "test": (2, 2)}
    # three splits: a built-in task keeps to the hub's use of them, a user's takes them as they are called
    for split, start in (("train", 0), ("val", 100), ("test", 200)):
        write(tmp_path / "three" / f"{split}.jsonl", numbered(12, start))
    assert load(tmp_path / "three", TASK) == {"train": (0, 0), "dev": (1, 1), "test": (2, 2)}
    write(tmp_path / "sst2" / "train.jsonl", numbered(12))
    write(tmp_path / "sst2" / "dev.jsonl", numbered(9, 100))
    write(tmp_path / "sst2" / "test.jsonl", [row | {"label": -1} for row in numbered(9, 200)])
    assert load(tmp_path / "sst2") == {"train": (0, 0), "dev": (0, 0), "test": (1, 1)}
    # save_to_disk
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
    for name in ("one", "two"):  # data sets of several configurations have a folder for each
        write(tmp_path / "many" / name / "train-00000-of-00001.parquet", numbered(12))
    with pytest.raises(
        ValueError,
        match=r"the split 'train' is in several folders, .*/one, .*/two; give one of them",
    ):
        TASK.load(tmp_path / "many", train=1, dev=1, test=1)
    assert len(TASK.load(tmp_path / "many" / "one", train=1, dev=1, test=1)["test"]) == 1


TASK = Task(
    name="mine", kind="classification", prompt="{{ sentence }} is", label="label", labels={0: "bad", 1: "good"}
)  # fmt: skip


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


YAML = """\
name: capitals
kind: choice
data: capitals.jsonl
prompt: "The capital of {{ country }} is"
options: ["{{ a }}", "{{ b }}"]
answer: right
"""


def test_a_task_of_ones_own(tmp_path):
    (tmp_path / "capitals.yaml").write_text(YAML)
    write(
        tmp_path / "capitals.jsonl",
        [{"country": "Peru", "a": "Lima", "b": "Quito", "right": "Lima"}] * 3,
    )
    parts = load_task(tmp_path / "capitals.yaml").load(train=1, dev=1, test=1)
    assert parts["test"] == [Example("The capital of Peru is", ("Lima", "Quito"), 0, ("Lima",))]


def test_words_that_yaml_takes_for_truth_values(tmp_path):
    text = (
        "kind: classification\nprompt: '{{ q }}'\nlabel: a\nlabels: {yes: Yes, no: No, true: On}\n"
    )
    (tmp_path / "t.yaml").write_text(text)
    task = load_task(str(tmp_path / "t.yaml"))
    assert task.labels == {"yes": "Yes", "no": "No", True: "On"} and task.name == "t"
    assert [task.example({"q": "x", "a": a}).golds for a in ("no", True, "yes")] == [
        ("No",),
        ("On",),
        ("Yes",),
    ]


def test_rows_without_a_template(tmp_path):
    rows = [
        {"prompt": f"{i} is", "options": ["odd", "even"], "answer": (i + 1) % 2} for i in range(6)
    ]
    task = load_task(write(tmp_path / "parity.jsonl", rows))
    assert task.kind == "classification" and task.name == "parity"
    parts = task.load(train=2, dev=2, test=2)
    assert {(int(e.prompt.split()[0]) + 1) % 2 == e.answer for p in PARTS for e in parts[p]} == {
        True
    }
    rows = [row | {"answer": row["options"][row["answer"]]} for row in rows]
    task = load_task(write(tmp_path / "words.jsonl", rows))
    assert task.kind == "classification" and task.example(rows[3]) == Example(
        "3 is", ("odd", "even"), 0, ("odd",)
    )
    rows[1]["options"] = ["odd", "even", "neither"]
    task = load_task(write(tmp_path / "choice.jsonl", rows))
    assert task.kind == "choice" and task.example(rows[1]).options == ("odd", "even", "neither")
    task = load_task(
        write(tmp_path / "free.jsonl", [{"prompt": "2 + 2 =", "answers": ["4", "four"]}] * 3)
    )
    assert task.kind == "generation" and task.load(train=1, dev=1, test=1)["dev"][0].golds == (
        "4",
        "four",
    )


def test_the_documented_example(tokenizer):
    task = load_task(EXAMPLES / "my-task.yaml")
    parts = task.load(train=8, dev=4, test=4)
    assert [len(parts[p]) for p in PARTS] == [8, 4, 4] and task.kind == "classification"
    data = TaskData(parts["train"], task, tokenizer, max_length=128)
    batch = data.collate([data[i] for i in range(8)])
    forward, head = CausalLMObjective(
        AutoModelForCausalLM.from_pretrained(DEMO_MODEL), data.options
    )(batch)
    assert head(forward()).isfinite()


GOOD = {
    "kind": "classification",
    "prompt": "{{ sentence }}",
    "label": "label",
    "labels": {0: "bad", 1: "good"},
}


@pytest.mark.parametrize("change, sentence", [
    ({"kind": "regression"}, "kind must be one of classification, choice, generation, got 'regression'"),
    ({"labels": None}, "'labels' is missing, which a task of the kind classification needs"),
    ({"answers": "x"}, "'answers' belongs to tasks of the kind generation"),
    ({"metric": "f1"}, "metric must be one of accuracy"),
    ({"prompt": "{{ sentence"}, "prompt is not a Jinja template"),
    ({"label": "a b"}, "label is not a Jinja expression"),
    ({"labels": {0: "same", 1: " same"}}, "different words"),
    ({"labels": {0: "one"}}, "two or more"),
    ({"colour": "red"}, "unknown key 'colour'; known: name, kind, prompt"),
    ({"dataset": {"path": "x", "name": "y"}}, "dataset has the unknown key 'name'"),
    ({"dataset": {"config": "x"}}, "dataset lacks 'path'"),
    ({"dataset": {"path": "x"}, "data": "y"}, "both 'dataset'"),
    ({"splits": {"validation": "x"}}, "splits has the unknown key 'validation'"),
    ({"prompt": 3}, "prompt must be text, got 3"),
    ({"max_new_tokens": 0}, "max_new_tokens must be"),
    ({"max_new_tokens": True}, "max_new_tokens must be"),
    ({"chat": "yes"}, "chat must be true or false, got 'yes'"),
    ({"prompt": None}, "prompt must be text, got None"),
    ({"name": 5}, "name must be text, got 5"),
    ({"data": 5}, "data must be the path of a local file or folder, got 5"),
    ({"labels": {0: None, 1: "good"}}, "labels must give each label a word, got None for '0'"),
    ({"labels": {0: True, 1: "good"}}, "labels must give each label a word, got True for '0'"),
])  # fmt: skip
def test_malformed_task_files(change, sentence, tmp_path):
    (tmp_path / "x.yaml").write_text(json.dumps(GOOD | change))  # JSON is YAML
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")) as error:
        load_task(tmp_path / "x.yaml")
    assert str(error.value).startswith("task ") and "\n" not in str(error.value)


def test_files_that_are_no_task(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown task 'sst3'; known: sst2, rte, .*, drop, demo; one of your own"
    ):
        load_task("sst3")
    with pytest.raises(ValueError, match="there is no such file"):
        load_task(tmp_path / "nothing.yaml")
    for content, sentence in (("kind: [", "is not YAML"), ("- 1", "must be a YAML mapping"), ("kind: choice", "lacks"),
                              ("kind: 2001-99-99", "is not YAML: month must be in 1..12")):  # fmt: skip
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(ValueError, match=f"^task .*x.yaml .*{sentence}"):
            load_task(tmp_path / "x.yaml")
    with pytest.raises(ValueError, match="the file is empty"):
        load_task(write(tmp_path / "x.jsonl", []))
    with pytest.raises(
        ValueError,
        match=r"its rows lack prompt; rows without .*, and these have answer, options, text",
    ):
        load_task(write(tmp_path / "x.jsonl", [{"text": 1, "options": ["a", "b"], "answer": 1}]))
    with pytest.raises(ValueError, match="its rows lack options or answers"):
        load_task(write(tmp_path / "x.jsonl", [{"prompt": "a"}]))
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "answers": "b"}\n{"prompt"\n')
    with pytest.raises(ValueError, match=r"line 2 of .*x.jsonl is not JSON"):
        load_task(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "answers": "b"}\n\n[1]\n')
    with pytest.raises(ValueError, match=r"line 3 of .*x.jsonl is not a JSON object"):
        load_task(tmp_path / "x.jsonl")


def test_templates_are_sandboxed(tmp_path):
    task = Task(
        **(GOOD | {"name": "evil", "prompt": "{{ ''.__class__.__mro__[1].__subclasses__() }}"})
    )
    with pytest.raises(
        ValueError, match="prompt cannot be filled in from the row: access to attribute '__class__'"
    ):
        task.example({"sentence": "x", "label": 0})
    task = Task(**(GOOD | {"name": "evil", "prompt": "{{ words.append(1) }}"}))
    with pytest.raises(ValueError, match="prompt cannot be filled in"):
        task.example({"words": ["x"], "label": 0})


@pytest.mark.parametrize("row, sentence", [
    ({"text": "x", "label": 0}, "prompt asks for the column 'sentence', which the data does not have; its columns: la"),
    ({"sentence": "x"}, "label asks for the column 'label', which the data does not have; its columns: sentence"),
    ({"sentence": "x", "label": 2}, "label 2 has no label word; known: 0, 1"),
    ({"sentence": "x", "label": -1}, "label -1 has no label word"),
    ({"sentence": None, "label": 1}, "prompt cannot be filled in from the row: a value it prints is missing"),
])  # fmt: skip
def test_rows_that_do_not_fit(row, sentence, tmp_path):
    data = write(
        tmp_path / "x.jsonl",
        [{"sentence": "x", "label": "0"}] * 2 + [row] + [{"sentence": "y", "label": 1}],
    )
    with pytest.raises(ValueError, match=f"task mine, line 3 of {data}: {sentence}"):
        Task(**(GOOD | {"name": "mine"})).load(data, train=2, dev=1, test=1)


def test_the_place_of_a_row_that_does_not_fit(tmp_path):
    """Its file and line, also after lines that are empty and in the second of two files; else its number."""
    from datasets import Dataset

    task, good, bad = (
        Task(**(GOOD | {"name": "mine"})),
        {"sentence": "x", "label": 0},
        {"sentence": None, "label": 1},
    )
    one = tmp_path / "one.jsonl"
    one.write_text(f"{json.dumps(good)}\n\n{json.dumps(bad)}\n{json.dumps(good)}\n")
    (tmp_path / "list.json").write_text(json.dumps([good, bad, good]))
    write(tmp_path / "two" / "train-0.jsonl", [good] * 2)
    write(tmp_path / "two" / "train-1.jsonl", [good, bad])
    table = write(tmp_path / "rows.parquet", [good, bad, good])
    Dataset.from_list([good, good, bad]).save_to_disk(str(tmp_path / "saved"))
    for path, place in (
        (one, f"line 3 of {one}"),
        (tmp_path / "list.json", f"row 2 of {tmp_path}/list.json"),
        (tmp_path / "two", f"line 2 of {tmp_path}/two/train-1.jsonl"),
        (table, rf"row 1 \(from 0\) of the data in {table}"),
        (tmp_path / "saved", rf"row 2 \(from 0\) of the data in {tmp_path}/saved"),
    ):
        with pytest.raises(ValueError, match=f"^task mine, {place}: prompt cannot be filled in"):
            task.load(path, train=2 if path.name == "two" else 1, dev=1, test=1)
    with pytest.raises(ValueError, match=r"^task mine, row 1 \(from 0\): prompt"):
        task.examples([good, bad])
    with pytest.raises(ValueError, match="labels must give each label a word, got nan for 0"):
        Task(**(GOOD | {"name": "mine", "labels": {0: float("nan"), 1: "good"}}))


NULLS = {
    "a": "x",
    "b": None,
    "xs": ["p", None],
    "ys": ["p", "q"],
    "d": {"k": None, "t": "v"},
    "nan": float("nan"),
}
REACH = [  # ways of a null into a text
    "{{ b }}", "{{ a ~ b }}", "{{ b ~ a }}", "{{ xs | join(' ') }}", "{{ ' '.join(xs) }}", "{{ b | string }}",
    "{{ b | upper }}", "{{ b | trim }}", "{{ b | title }}", "{{ b | e }}", "{{ '%s' | format(b) }}", "{{ '%s' % b }}",
    "{{ '%(k)s' % d }}", "{{ '{}'.format(b) }}", "{{ '{k}'.format_map(d) }}", "{{ d.k }}", "{{ d['k'] ~ '' }}",
    "{{ d.get('nothing') ~ '' }}", "{{ none ~ a }}", "{{ (none if a else a) ~ '' }}", "{{ b | replace('N', 'n') }}",
    "{{ xs | map('upper') | join }}", "{{ xs[1:] | join }}", "{{ d | tojson }}", "{{ xs | tojson }}",
    "{{ [b] | first }}",
    "{{ b | int }}", "{{ b | float }}", "{{ nan }}", "{{ nan ~ '' }}", "{{ '%f' % nan }}", "{{ nan | int }}",
    "{{ nan | round }}", "{{ b | default('x') }}", "{% for x in xs %}{{ x }}{% endfor %}", "{{ b | length }}",
    "{% set c %}{{ b }}{% endset %}{{ c }}", "{{ d.values() | join }}", "{{ d | dictsort | map('last') | join }}",
    "{{ (a, b) | join }}", "{{ {'k': b}['k'] ~ '' }}", "{{ b + a }}", "{{ b.c }}", "{{ 'N' ~ (b | lower) }}",
]  # fmt: skip


@pytest.mark.parametrize("prompt", REACH)
def test_nulls_never_become_text(prompt):
    task = Task(name="n", kind="generation", prompt=prompt, answers="a")
    with pytest.raises(
        ValueError,
        match=r"task n, row 0 \(from 0\): prompt cannot be filled in from the row: .*null",
    ):
        task.examples([NULLS])


@pytest.mark.parametrize(
    "null", [None, float("nan"), np.float32("nan"), Decimal("nan"), pd.NA, pd.NaT]
)
def test_every_kind_of_null(null):
    task = Task(name="n", kind="generation", prompt="{{ a ~ '' }}", answers="b")
    for row in ({"a": null, "b": "x"}, {"a": "x", "b": null}, {"a": "x", "b": ["y", null]}):
        with pytest.raises(
            ValueError,
            match=r"(prompt|answers) cannot be filled in from the row: a value .* \(null\)",
        ):
            task.example(row)
    for labels in (
        {0: "None", "None": "x"},
        {"nan": "a", "<NA>": "b", "NaT": "c"},
    ):  # not even those that look like it
        label = Task(name="n", kind="classification", prompt="x", label="a", labels=labels)
        with pytest.raises(
            ValueError, match=r"label cannot be filled in from the row: a value it gives is missing"
        ):
            label.example({"a": null})


@pytest.mark.parametrize("prompt, text", [
    ("{{ b or 'no b' }}", "no b"), ("{{ b | default('no b', true) }}", "no b"),
    ("{% if b %}b{% else %}no b{% endif %}", "no b"), ("{% if b is none %}no b{% endif %}", "no b"),
    ("{{ b is none }} {{ a is none }} {{ nan is none }}", "True False True"),
    ("{{ b == none }} {{ a != none }} {{ none in xs }}", "True True True"), ("{{ xs | select | join }}", "p"),
    ("{{ xs | reject('none') | join }}", "p"), ("{% for x in xs if x %}{{ x }}{% endfor %}", "p"),
    ("{{ ys | join(', ') }}", "p, q"), ("{{ ys | map('upper') | join }}", "PQ"),
    ("{{ ys[-1] }} {{ ys | length }}", "q 2"),
    ("{% for x in ys %}{{ loop.index }}{{ x }}{% endfor %}", "1p2q"), ("{{ ys | tojson }}", '["p", "q"]'),
    ("{{ d.items() | map('first') | join(' ') }}", "k t"), ("{% for k, v in d.items() %}{{ k }}{% endfor %}", "kt"),
    ("{{ '{:,}'.format(1234567) }} {{ '%5.1f' % 2.25 }} {{ 'ab' * 2 }}", "1,234,567   2.2 abab"),
    ("{{ '%s-%s' % (a, 1) }} {{ 1.26 | round(1) }} {{ 7 // 2 }}", "x-1 1.3 3"), ("{{ a | center(5) }}|", "  x  |"),
    ("{% set ns = namespace(t='') %}{% for x in ys %}{% set ns.t = ns.t ~ x %}{% endfor %}{{ ns.t }}", "pq"),
    ("{{ ys | groupby(0) | map(attribute='grouper') | join('-') }}", "p-q"), ("None null nan", "None null nan"),
])  # fmt: skip
def test_what_templates_do_with_nulls_and_lists(prompt, text):
    assert (
        Task(name="n", kind="generation", prompt=prompt, answers="a").example(NULLS).prompt == text
    )


@pytest.mark.parametrize("prompt", [
    "{{ ys }}", "{{ d }}", "{{ ys ~ '' }}", "{{ ys | string }}", "{{ ys | upper }}", "{{ '%s' % ys }}",
    "{{ ys[:1] ~ '' }}", "{{ '{}'.format(ys) }}", "{{ [ys] | join }}", "{{ [1, 2] }}", "{{ {'a': 1} ~ '' }}",
    "{{ (1, 2) }}", "{{ range(3) }}", "{{ ys | map('upper') }}", "{{ d.values() }}",
    "{% set c %}{{ ys }}{% endset %}{{ c }}",
])  # fmt: skip
def test_lists_where_a_text_is_wanted(prompt, tmp_path):
    with pytest.raises(
        ValueError,
        match="prompt cannot be filled in from the row: it prints a list or mapping where",
    ):
        Task(name="n", kind="generation", prompt=prompt, answers="a").example(NULLS)


def test_lists_in_rows_without_a_template(tmp_path):
    for row, sentence in (
        (
            {"prompt": ["a", "b"], "answers": "x"},
            "prompt cannot be .* it prints a list or mapping",
        ),
        (
            {"prompt": "a", "answers": [["x"]]},
            r"answers must give text or a list of texts, got \[\['x'\]\]",
        ),
        (
            {"prompt": "a", "options": ["x", ["y"]], "answer": 0},
            "options must give text or a list of texts",
        ),
        (
            {"prompt": "a", "options": {"x": 0, "y": 1}, "answer": 0},
            "options must give text or a list of texts",
        ),
    ):
        file = write(tmp_path / "x.jsonl", [row] * 3)
        with pytest.raises(ValueError, match=f"task x, line . of {file}: {sentence}"):
            load_task(file).load(train=1, dev=1, test=1)


HOSTILE = {  # what would take minutes or gigabytes, or a traceback of the compiler's
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that skip": "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
    "a long text in a loop": "{% for a in range(99999) %}" + "x" * 60000 + "{% endfor %}",
    "a search in a loop": "{% for a in range(99999) %}{% if big in big %}{% endif %}{% endfor %}",
    "texts that double": "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
    "lists that double": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x == x }}",
    "mappings that double": "{% set x = {1: 1} %}" + "{% set x = {1: x, 2: x} %}" * 60 + "{{ x | tojson }}",
    "captures that double": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x }}",
    "lists that double in a loop": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}",
    "longest words in a loop": "{% for a in range(99999) %}{{ big | wordcount }}{% endfor %}",
    "counts in a loop": "{% for a in range(99999) %}{{ big.count('z') }}{% endfor %}",
    "a test in a loop": "{% for a in range(99999) %}{% if 'y' is in big %}{% endif %}{% endfor %}",
    "long lists in a loop": "{% set x = range(9999) | list %}{% for a in x %}{{ x == x | list }}{% endfor %}",
    "numbers that double": "{% set x = 3 %}" + "{% set x = x * x %}" * 60 + "{{ x }}",
    "a power": "{{ 10 ** 10 ** 10 }}", "a product": "{{ 'x' * 10 ** 9 }}", "a list's product": "{{ 10 ** 9 * [1] }}",
    "a width": "{{ 'x' | center(10 ** 9) }}", "a width of a method": "{{ 'x'.rjust(10 ** 9) }}",
    "tabs": "{{ 'a\tb'.expandtabs(10 ** 9) }}", "an indent": "{{ 'x' | indent(10 ** 9, true) }}",
    "a format": "{{ '%999999999d' % 1 }}", "a format's argument": "{{ '%*d' % (999999999, 1) }}",
    "a filter's format": "{{ '%.999999999f' | format(1.5) }}", "a method's format": "{{ '{:999999999}'.format(1) }}",
    "a nested format": "{{ '{:{}}'.format(1, 999999999) }}", "bytes": "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "a replacement": "{{ big | replace('', big) }}", "a join": "{{ range(99999) | join(big) }}",
    "a translation": "{{ big.translate({122: big}) }}", "batches": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "slices": "{{ [1] | slice(10 ** 9) | list }}", "digits": "{{ 1.5 | round(10 ** 9) }}",
    "a width by name": "{{ ['x'] | map('center', 10 ** 9) | list }}",
    "a macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "brackets": "{{ " + "[" * 300 + "]" * 300 + " }}",
    "terms": "{{ " + "1 + " * 5000 + "1 }}", "conditions": "{% if " + " or ".join(["x"] * 9999) + " %}{% endif %}",
    "a long template": "x" * 70000, "a long number": "{{ " + "9" * 5000 + " }}", "an include": "{% include 'x' %}",
    "random text": "{{ lipsum(1000) }}", "a random choice": "{{ [1, 2] | random }}",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_templates(what):
    row = {"big": "z" * 100_000, "x": 0, "a": "b"}
    with pytest.raises(
        ValueError,
        match=r"^task h: prompt is not a Jinja template|^prompt (cannot be filled|asks for)",
    ):
        Task(name="h", kind="generation", prompt=HOSTILE[what] + "x", answers="a").example(row)


def test_work_is_for_each_row_and_template():
    """Long prompts and loops of usual size are far from the limits."""
    words = [f"word{i}" for i in range(2000)]
    prompt = "{% for w in words %}{{ loop.index }}: {{ w | upper }}, {% endfor %}{{ text | replace('a', 'bb') }}"
    task = Task(name="w", kind="generation", prompt=prompt, answers="text")
    (one, two) = task.examples([{"words": words, "text": "a" * 50_000}] * 2)
    assert (
        one.prompt
        == two.prompt
        == "".join(f"{i}: {w.upper()}, " for i, w in enumerate(words, 1)) + "b" * 100_000
    )


def test_hostile_files(tmp_path):
    laughs = "".join(
        f"  - &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]\n" for i in range(9)
    )
    for content, sentence in (
        ("name:\n" + laughs, r"line 3: aliases \(\*name\) are not read; write the value again"),
        ("prompt: &x [*x]", "line 1: aliases"),
        ("[" * 5000, "line 1: there are more than 32 levels"),
        ("a:\n" + "".join(f"{' ' * i}-\n" for i in range(1, 60)), "line 33: there are more than 32 levels"),
        ("x" * 300_000, "it is larger than 262144 bytes"),
        ('a: !!int ""', "index out of range"), ("a: !!bool 5", "'5'"),
        ("a: !!python/name:os.system", "could not determine"),
        ("a: " + "1" * 5000, "Exceeds the limit"),
    ):  # fmt: skip
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(ValueError, match=f"^task .*x.yaml is not YAML: .*{sentence}"):
            load_task(tmp_path / "x.yaml")
    for content, sentence in (
        ("[" * 100_000, "x.jsonl cannot be read as JSON: it is nested too deeply"),
        ('{"a": ' * 100_000, "line 1 of .*x.jsonl is not JSON: it is nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "line 1 of .*x.jsonl is not JSON: Exceeds the limit"),
    ):
        (tmp_path / "x.jsonl").write_text(content)
        with pytest.raises(ValueError, match=sentence):
            TASK.load(tmp_path / "x.jsonl")
    deep = json.loads("[" * 100 + "]" * 100)
    with pytest.raises(
        ValueError, match="prompt cannot be filled in from the row: a value is nested more than 64"
    ):
        TASK.example({"sentence": deep, "label": 0})


def test_json_of_any_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "JSON_BYTES", 1000)
    file = write(tmp_path / "x.jsonl", numbered(100))
    with pytest.raises(
        ValueError, match=r"x.jsonl has \d+ bytes, and JSON is read whole, up to 1000; save"
    ):
        TASK.load(file)


def test_half_a_character_is_refused_with_its_row(tmp_path):
    rows = [
        {"sentence": "bad \ud83d" if i == 2 else "bad \U0001f600", "label": i % 2} for i in range(4)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "\\ud83d\\ude00" in (tmp_path / "x.jsonl").read_text(), "the others are whole"
    with pytest.raises(
        ValueError,
        match=r"task mine, line 3 of .*x.jsonl: after 'bad ' comes '\\ud83d', half of a ",
    ):
        TASK.load(tmp_path / "x.jsonl", train=2, dev=1, test=1)
    free = Task(name="g", kind="generation", prompt="?", answers="a")
    with pytest.raises(ValueError, match="half of a character"):
        free.examples([{"a": ["x", "\udc00"]}])


def test_answers_that_do_not_fit():
    choice = Task(name="c", kind="choice", prompt="{{ q }}", options="options", answer="answer")
    with pytest.raises(ValueError, match="answer must be the number of an option, 0 to 1, got 2"):
        choice.example({"q": "?", "options": ["a", "b"], "answer": 2})
    with pytest.raises(ValueError, match=r"answer 'c' is none of the options \['a', 'b'\]"):
        choice.example({"q": "?", "options": ["a", "b"], "answer": "c"})
    with pytest.raises(ValueError, match="options must be two or more different texts"):
        choice.example({"q": "?", "options": ["a", "a"], "answer": "a"})
    with pytest.raises(ValueError, match="options must give text or a list of texts, got 5"):
        choice.example({"q": "?", "options": 5, "answer": "a"})
    free = Task(name="g", kind="generation", prompt="{{ q }}", answers="golds.text")
    with pytest.raises(ValueError, match="answers must give at least one text"):
        free.example({"q": "?", "golds": {"text": []}})
    with pytest.raises(
        ValueError,
        match="answers cannot be filled in from the row: 'dict object' has no attribute 'te",
    ):
        free.example({"q": "?", "golds": {}})


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
        (write(tmp_path / "x.csv", []), "is no data that can be read"),
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


CODE = Task(
    name="kind", kind="classification", prompt="{{ text }}\n# kind:", label="label",
    labels={"code": "code", "prose": "prose"},
)  # fmt: skip
LONG = Task(
    name="long", kind="classification", prompt="{{ text }}\n# kind:", label="label",
    labels={"code": "a piece of code", "prose": "prose", "none": "neither of them"},
)  # fmt: skip
TEXTS = (
    "for i in range(10):",
    "Return a copy of it.",
    "x = 1",
    "The default is None, which means no limit at all.",
)


def examples_of(task, kinds=("code", "prose", "code", "prose")):
    return [
        task.example({"text": text, "label": kind}) for text, kind in zip(TEXTS, kinds, strict=True)
    ]


def decoded(tokenizer, ids, mask):
    return [tokenizer.decode(i[m != 0]) for i, m in zip(ids, mask, strict=True)]


def test_batches_of_label_words(tokenizer):
    data = TaskData(examples_of(CODE), CODE, tokenizer, max_length=100)
    assert data.train_on == "label-words" and data.options == tokenizer.convert_tokens_to_ids(
        ["Ġcode", "Ġprose"]
    )
    assert data.labels == [0, 1, 0, 1]
    batch = data.collate([data[i] for i in (2, 1, 3)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "groups", "rows"}
    assert batch["labels"].tolist() == batch["groups"].tolist() == [0, 1, 1] and batch[
        "rows"
    ].tolist() == [2, 1, 3]
    texts = [f"</s>{TEXTS[i]}\n# kind:" for i in (2, 1, 3)]
    assert decoded(tokenizer, batch["input_ids"], batch["attention_mask"]) == texts
    assert (batch["attention_mask"][:, -1] == 1).all() and batch["attention_mask"][0, 0] == 0
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_batches_of_options(tokenizer):
    data = TaskData(
        examples_of(LONG, ("code", "prose", "none", "prose")), LONG, tokenizer, max_length=100
    )
    assert data.train_on == "options" and data.options is None and data.labels == [0, 1, 2, 1]
    batch = data.collate([data[i] for i in (2, 1)])
    words = [" a piece of code", " prose", " neither of them"]
    texts = [f"</s>{TEXTS[i]}\n# kind:{word}" for i in (2, 1) for word in words]
    assert decoded(tokenizer, batch["input_ids"], batch["attention_mask"]) == texts
    assert decoded(tokenizer, batch["labels"], batch["labels"] != -100) == words * 2
    assert batch["examples"].tolist() == [0, 0, 0, 1, 1, 1] and batch["answers"].tolist() == [2, 4]
    assert batch["rows"].tolist() == [2, 1] and batch["groups"].tolist() == [6, 7, 8, 3, 4, 5]
    assert batch["option_rows"].tolist() == [[0, 1, 2], [3, 4, 5]]
    device_free = {
        k: v for k, v in batch.items() if k not in ("positions", "targets", "option_rows")
    }
    objective = CausalLMObjective(AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval())
    (forward, head), (forward_too, head_too) = objective(batch), objective(device_free)
    assert torch.equal(head(forward()), head_too(forward_too()))


def test_batches_of_answers(tokenizer):
    choice = Task(
        name="c", kind="choice", prompt="{{ q }} Answer:", options="options", answer="answer"
    )
    rows = [{"q": "1?", "options": ["one", "two or so", "three"], "answer": 1},
            {"q": "Longer than 1?", "options": ["one", "two"], "answer": 0}]  # fmt: skip
    examples = choice.examples(rows)
    data = TaskData(examples, choice, tokenizer, max_length=60)
    assert data.train_on == "answer" and data.options is None and data.labels is None
    batch = data.collate([data[i] for i in range(2)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "rows", "positions", "targets"}
    assert decoded(tokenizer, batch["labels"], batch["labels"] != -100) == [" two or so", " one"]
    assert (
        decoded(tokenizer, batch["input_ids"], batch["attention_mask"])[0]
        == "</s>1? Answer: two or so"
    )
    ragged = TaskData(examples, choice, tokenizer, max_length=60, train_on="options")
    batch = ragged.collate([ragged[i] for i in (1, 0)])
    assert batch["examples"].tolist() == [0, 0, 1, 1, 1] and batch["answers"].tolist() == [0, 3]
    assert "groups" not in batch
    free = Task(name="g", kind="generation", prompt="{{ q }}\nAnswer:", answers="a", stop="\n")
    data = TaskData(
        free.examples([{"q": "Who?", "a": ["the king", "a king"]}]), free, tokenizer, max_length=60
    )
    batch = data.collate([data[0]])
    assert decoded(tokenizer, batch["labels"], batch["labels"] != -100) == [
        " the king\n"
    ]  # it learns to stop


def test_a_batch_without_padding_has_no_mask(tokenizer, demo_model):
    """And the same loss, to the bit, as with a mask that leaves nothing out."""
    for task, keys in (
        (CODE, {"labels"}),
        (LONG, {"labels", "examples", "answers", "option_rows"}),
    ):
        data = TaskData(
            [examples_of(task)[3]] * 2, task, tokenizer, max_length=10
        )  # cut to one length
        batch = data.collate([data[0], data[1]])
        assert (
            "attention_mask" not in batch
            and keys < set(batch)
            and len({*map(len, batch["input_ids"])}) == 1
        )
        objective = CausalLMObjective(demo_model, data.options)
        (forward, head), (masked, head_too) = (
            objective(b)
            for b in (batch, batch | {"attention_mask": torch.ones_like(batch["input_ids"])})
        )
        assert torch.equal(head(forward()), head_too(masked()))
    data = TaskData(examples_of(CODE), CODE, tokenizer, max_length=100)
    assert "attention_mask" in data.collate([data[0], data[1]])


def test_label_words_and_options_of_one_token_are_the_same_loss(tokenizer, demo_model):
    """Also where prompts are cut. In float64 but for the logits, which are cast to fp32."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).double().eval()
    for max_length in (100, 12):
        losses = []
        for train_on in ("label-words", "options"):
            data = TaskData(
                examples_of(CODE), CODE, tokenizer, max_length=max_length, train_on=train_on
            )
            batch = data.collate([data[i] for i in range(4)])
            assert ("examples" in batch) == (train_on == "options")
            forward, head = CausalLMObjective(model, data.options)(batch, reduction="none")
            losses.append(head(forward()))
        # log-likelihoods of about 3 in fp32
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=2e-6)
    assert losses[0].std() > 1e-3, "a test that could tell"


def test_prompts_are_cut_on_the_left(tokenizer):
    whole = TaskData(examples_of(LONG), LONG, tokenizer, max_length=100)
    cut = TaskData(examples_of(LONG), LONG, tokenizer, max_length=14)
    for long, short in zip(whole[3]["tokens"], cut[3]["tokens"], strict=True):
        option = long.answer
        assert len(short.tokens) == 14 and short.answer == option
        assert short.tokens == [2, *long.tokens[-13:]], (
            "the token before every text stays, and the end of the prompt"
        )
    words = TaskData(examples_of(CODE), CODE, tokenizer, max_length=8)
    assert len(words[3]["tokens"][0].tokens) == 7, "room for the word, as in a row of an option"
    assert tokenizer.decode(words[3]["tokens"][0].tokens).endswith("# kind:")
    free = Task(
        name="g", kind="generation", prompt="{{ q }}\nAnswer:", answers="a", max_new_tokens=6
    )
    data = TaskData(
        free.examples([{"q": "one two three " * 9, "a": "x"}]), free, tokenizer, max_length=20
    )
    assert (data.fit()["cut_prompts"], whole.fit()["cut_prompts"], words.fit()["cut_prompts"]) == (
        1,
        0,
        4,
    )
    lengths = [len(row[0].tokens) for row in (whole.token_rows(i, "options") for i in range(4))]
    assert cut.fit()["cut_prompts"] == sum(length > 14 for length in lengths)
    assert (
        len(data.token_rows(0, "prompt")[0].tokens) == 14
        and len(data.token_rows(0, "answer")[0].tokens) == 20
    )
    with pytest.raises(
        ValueError,
        match=r"task long: an answer of . tokens, beginning ' a piece of code', leaves no room",
    ):
        TaskData(examples_of(LONG), LONG, tokenizer, max_length=4)[0]
    with pytest.raises(
        ValueError,
        match="task g: max_new_tokens 6 leaves no room for a prompt in max_length, 7 tokens",
    ):
        TaskData(data.examples, free, tokenizer, max_length=7).token_rows(0, "prompt")


def test_shots(tokenizer):
    *shots, example = examples_of(CODE)
    data = TaskData([example], CODE, tokenizer, max_length=100, shots=shots)
    parts = [f"{TEXTS[0]}\n# kind: code", f"{TEXTS[1]}\n# kind: prose", f"{TEXTS[2]}\n# kind: code",
             f"{TEXTS[3]}\n# kind:"]  # fmt: skip
    (row,) = data[0]["tokens"]
    assert tokenizer.decode(row.tokens) == "</s>" + "\n\n".join(parts)
    # too long by a token: the first shot goes, whole; and so on
    n = len(row.tokens)
    short = TaskData([example], CODE, tokenizer, max_length=n, shots=shots)[0]["tokens"][0]
    assert tokenizer.decode(short.tokens) == "</s>" + "\n\n".join(parts[1:])
    assert data[0] == TaskData([example], CODE, tokenizer, max_length=n + 1, shots=shots)[0]
    some = TaskData(examples_of(CODE), CODE, tokenizer, max_length=n, shots=shots)
    used = [some[i]["tokens"][0].shots for i in range(4)]
    assert (
        some.fit() == {"cut_prompts": 0, "shots_mean": sum(used) / 4, "shots_least": 2}
        and used[3] == 2
    )
    none = TaskData([example], CODE, tokenizer, max_length=25, shots=shots)[0]
    assert none == TaskData([example], CODE, tokenizer, max_length=25)[0]
    lines = TaskData(load_task("rte").examples([PUBLIC["rte"][1][0]]), load_task("rte"), tokenizer, max_length=120,
                     shots=load_task("rte").examples([PUBLIC["rte"][0][0]]))  # fmt: skip
    assert "is true? Yes or No?\nYes\n\nA cat sat.\n" in tokenizer.decode(
        lines[0]["tokens"][0].tokens
    )


def test_an_answer_that_merges_with_the_prompt(tokenizer):
    """Without a separator the last token of the prompt may become part of the option's first: it is scored then."""
    task = Task(name="m", kind="classification", prompt="{{ text }}", label="label", labels={0: "turn", 1: "sult"},
                separator="")  # fmt: skip
    data = TaskData(task.examples([{"text": "x re", "label": 1}]), task, tokenizer, max_length=20)
    assert data.train_on == "options", "the prompts of the two words are not the same tokens"
    rows = data[0]["tokens"]
    assert [tokenizer.decode(row.tokens) for row in rows] == ["</s>x return", "</s>x result"]
    assert [tokenizer.decode(row.answer) for row in rows] == [" return", " result"]


def test_task_data_refuses(tokenizer):
    with pytest.raises(ValueError, match="task kind: no examples: the data set is empty"):
        TaskData([], CODE, tokenizer, max_length=100)
    with pytest.raises(
        ValueError,
        match="task long: the label word 'a piece of code' is not one token of this tokeniz",
    ):
        TaskData(examples_of(LONG), LONG, tokenizer, max_length=100, train_on="label-words")
    with pytest.raises(
        ValueError, match="train_on must be one of auto, label-words, options, answer, got 'prompt'"
    ):
        TaskData(examples_of(CODE), CODE, tokenizer, max_length=100, train_on="prompt")
    free = Task(name="g", kind="generation", prompt="{{ q }}", answers="a")
    example = Example("?", (), None, ("x",))
    for train_on, sentence in (
        ("label-words", "is for classifications"),
        ("options", "needs options"),
    ):
        with pytest.raises(ValueError, match=f"task g: train_on '{train_on}' {sentence}"):
            TaskData([example], free, tokenizer, max_length=100, train_on=train_on)
    with pytest.raises(ValueError, match="max_length must be 2"):
        TaskData([example], free, tokenizer, max_length=1)


def test_a_prompt_without_any_token_before_the_answer():
    gpt2_like = AutoTokenizer.from_pretrained(DEMO_MODEL)
    gpt2_like.backend_tokenizer.post_processor = None  # puts nothing before a text
    free = Task(name="g", kind="generation", prompt="{{ q }}", answers="a")
    assert (
        TaskData([Example("x", (), None, ("y",))], free, gpt2_like, max_length=9)[0]["tokens"][
            0
        ].prompt
        != []
    )
    with pytest.raises(ValueError, match="task g: a prompt is empty"):
        TaskData([Example("", (), None, ("x",))], free, gpt2_like, max_length=9)[0]


def with_chat(template):
    """The demo's tokenizer, whose text begins with </s>, with a chat template and tokens for turns."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]}
    )
    tokenizer.chat_template = template
    return tokenizer


TURNS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPACED = (  # no words of its own for a turn to come, and a space before the answer
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|> {{ m.content }} <|end|>"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = TURNS.replace(
    "{{ m.content | trim }}",
    "{% if m.role == 'assistant' and loop.last %}<x>\n\n</x>\n{% endif %}{{ m.content | trim }}",
)
CHAT = Task(**(vars(CODE) | {"chat": True, "labels": {"code": "code", "prose": "text"}}))


@pytest.mark.parametrize("template", [TURNS, SPACED], ids=["turns", "spaced"])
def test_chat(template):
    """Prompts are what the tokenizer makes of the conversation; answers, the assistant's tokens after it; one BOS."""
    tokenizer = with_chat(template)

    def asked(*turns):
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)
        ]
        last = len(turns) % 2 == 1
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=last, return_dict=False
        )

    examples = examples_of(CHAT)
    data = TaskData(examples, CHAT, tokenizer, max_length=100)
    word = (" code", " text") if template == SPACED else ("code", "text")
    assert data.train_on == "label-words" and data.options == [
        data._ids([w], "")[0][0] for w in word
    ]
    for i, example in enumerate(examples):
        (row,) = data.token_rows(i, "label-words")
        assert row.tokens == asked(example.prompt) and row.tokens.count(tokenizer.bos_token_id) == 1
    shots = TaskData(examples[3:], CHAT, tokenizer, max_length=200, shots=examples[:3])
    turns = [text for e in examples[:3] for text in (e.prompt, e.golds[0])] + [examples[3].prompt]
    assert shots[0]["tokens"][0].tokens == asked(*turns) and shots[0]["tokens"][0].shots == 3
    n = len(asked(*turns))  # room is left for the word: for one token less, the first shot goes
    fewer = TaskData(examples[3:], CHAT, tokenizer, max_length=n, shots=examples[:3])
    assert fewer[0]["tokens"][0].tokens == asked(*turns[2:]) and fewer[0]["tokens"][0].shots == 2

    options = TaskData(examples, CHAT, tokenizer, max_length=100, train_on="options")
    for row, w in zip(options[0]["tokens"], word, strict=True):
        assert row.prompt == asked(examples[0].prompt) and tokenizer.decode(row.answer) == w
    free = Task(
        name="g", kind="generation", prompt="{{ q }}", answers="a", chat=True, max_new_tokens=20
    )
    data = TaskData(
        free.examples([{"q": "Who is it?", "a": "the king"}]), free, tokenizer, max_length=100
    )
    (row,), (prompt,) = data.token_rows(0, "answer"), data.token_rows(0, "prompt")
    assert prompt.tokens == row.prompt == asked("Who is it?")
    assert row.tokens == asked("Who is it?", "the king")[: len(row.tokens)], (
        "it learns to end its turn"
    )
    end = "<|end|>" if template == TURNS else tokenizer.eos_token
    assert tokenizer.convert_ids_to_tokens(row.answer)[-1] == end and data.end_tokens() == {
        row.answer[-1]
    }


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="templates are tried within limits on Linux alone"
)
@pytest.mark.parametrize("template", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='x' * 99999) %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{{ 'x' * 10 ** 11 }}",
], ids=["loops", "doubles", "wide"])  # fmt: skip
def test_a_chat_template_without_bounds_is_refused(template, monkeypatch):
    monkeypatch.setattr("pseuzo.tasks.data.TEMPLATE_SECONDS", 1)
    monkeypatch.setattr("pseuzo.tasks.data.TEMPLATE_MEMORY", 1 << 28)
    with pytest.raises(
        ValueError, match="the tokenizer's chat template takes more than 1 s or 256 MB"
    ):
        TaskData(examples_of(CHAT), CHAT, with_chat(TURNS + template), max_length=100)


def test_a_chat_template_that_writes_before_an_answer():
    """An empty thought, as of models that may think: it is asked with it, and the answer is what is scored."""
    tokenizer = with_chat(THINKING)
    data = TaskData(examples_of(CHAT), CHAT, tokenizer, max_length=100)
    (row,) = data.token_rows(0, "label-words")
    assert tokenizer.decode(row.tokens).endswith("<|end|>\n<|assistant|>\n<x>\n\n</x>\n")
    assert data.options == tokenizer.convert_tokens_to_ids(["code", "text"])


@pytest.mark.parametrize("length", [60, 24])
def test_what_is_too_long_in_a_chat_is_cut_from_the_users_text(length):
    tokenizer = with_chat(TURNS)
    long = Task(**(vars(LONG) | {"chat": True}))
    text = "one two three four five six seven eight nine ten " * 9
    data = TaskData(long.examples([{"text": text, "label": "code"}, {"text": "x", "label": "code"}]), long, tokenizer,
                    max_length=length)  # fmt: skip
    cut, whole = data.token_rows(0, "options"), data.token_rows(1, "options")
    assert (
        data.fit() == {"cut_prompts": 1, "shots_mean": 0, "shots_least": 0}
        and cut[0].lost > 0 == whole[0].lost
    )
    longest = max(len(row.tokens) for row in cut)
    assert length - 2 <= longest <= length, "a character less is a token less, or none"
    (question,) = {tokenizer.decode(row.prompt) for row in cut}
    assert question.startswith("</s><|user|>\n") and question.endswith(
        "ten \n# kind:<|end|>\n<|assistant|>\n"
    )
    user = question.removeprefix("</s><|user|>\n").removesuffix("<|end|>\n<|assistant|>\n")
    assert data.examples[0].prompt.endswith(user) and len(user) > 10
    with pytest.raises(
        ValueError,
        match=r"task long, row 0 .*: the chat template leaves no room for a prompt in 10 token",
    ):
        TaskData(data.examples, long, tokenizer, max_length=10)[0]


def test_chats_that_cannot_be(tokenizer):
    with pytest.raises(
        ValueError,
        match="task kind: to ask as in a chat takes a tokenizer with a chat template, and this",
    ):
        TaskData(examples_of(CHAT), CHAT, tokenizer, max_length=100)
    picky = "{% if messages | length > 2 %}{{ raise_exception('one, please') }}{% endif %}{{ messages[0].content }}"
    examples = examples_of(CHAT)
    assert TaskData(examples, CHAT, with_chat(picky), max_length=100)[0]
    with pytest.raises(
        ValueError,
        match="task kind: the tokenizer's chat template cannot be filled in: one, please",
    ):
        TaskData(examples, CHAT, with_chat(picky), max_length=100, shots=examples[:1])[0]
    with pytest.raises(ValueError, match="the tokenizer's chat template cannot be filled in"):
        TaskData(examples, CHAT, with_chat("{% for"), max_length=100)


def test_a_prompt_that_begins_as_every_text_does_gets_no_second_beginning(tokenizer):
    for max_length in (100, 12):
        plain, own = (
            TaskData([Example(f"{begin}{text}", ("a", "b"), 0, ("a",)) for text in TEXTS], CODE, tokenizer,
                     max_length=max_length, shots=[Example(f"{begin}one", ("a",), 0, ("a",))] * 2, train_on=train_on)
            for begin, train_on in (("", "options"), ("</s>", "options"))
        )  # fmt: skip
        for i in range(len(TEXTS)):
            assert own[i] == plain[i]
            assert all(row.tokens.count(tokenizer.bos_token_id) == 1 for row in own[i]["tokens"])
    assert plain.fit() == own.fit()
    chat = with_chat(TURNS)
    plain, own = (
        TaskData([Example(f"{begin}{TEXTS[0]}", ("a", "b"), 0, ("a",))], CHAT, chat, max_length=100,
                 shots=[Example(f"{begin}one", ("a",), 0, ("a",))]) for begin in ("", "</s>")
    )  # fmt: skip
    assert own[0] == plain[0] and own[0]["tokens"][0].tokens.count(chat.bos_token_id) == 1


def test_an_answer_without_a_token_is_refused():
    """Else the last token of the prompt would be scored in its place, or nothing."""
    from tokenizers import normalizers

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    free = Task(name="g", kind="generation", prompt="{{ q }}:\n", answers="a", stop="")
    examples = free.examples([{"q": "x", "a": "y"}, {"q": "x", "a": "\u200b"}])
    data = TaskData(examples, free, tokenizer, max_length=50)
    assert data[0]["tokens"][0].answer
    with pytest.raises(
        ValueError,
        match=r"task g, row 1 \(from 0\): the answer '\\u200b' has no token of this tokenizer",
    ):
        data.fit()


def test_answers_that_are_too_long_are_known_before_a_run(tokenizer):
    """Not when the loss of the dev rows is computed, in the middle of it."""
    free = Task(name="g", kind="generation", prompt="{{ q }}", answers="a", max_new_tokens=5)
    data = TaskData(
        free.examples([{"q": "x", "a": "y"}, {"q": "x", "a": "long " * 50}]),
        free,
        tokenizer,
        max_length=30,
    )
    with pytest.raises(
        ValueError, match=r"task g, row 1 \(from 0\): an answer of \d+ tokens, .* leaves no room"
    ):
        data.fit()


def test_a_row_that_the_tokenizer_does_not_take_is_named(tokenizer):
    examples = [
        Example("x", ("a", "b"), 0, ("a",), "line 1 of x"),
        Example("\ud83d", ("a", "b"), 0, ("a",), "line 2 of x"),
    ]
    with pytest.raises(
        ValueError,
        match=r"^task kind, line 2 of x: the tokenizer does not take the text of this row",
    ):
        TaskData(examples, CODE, tokenizer, max_length=50)


@pytest.mark.parametrize("counts", [(500, 500), (30, 10), (7, 8, 9), (100, 3, 20, 1)])
def test_the_sampler(counts):
    classes = [c for c, n in enumerate(counts) for _ in range(n)]
    n, size = len(classes), 16
    sampler = StratifiedSampler(classes, size, seed=5)
    order = list(sampler)
    assert sorted(order) == list(range(n)) and len(sampler) == n
    assert list(sampler) == order == list(StratifiedSampler(classes, size, seed=5))
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(n)) and list(sampler) != order
    assert list(StratifiedSampler(classes, size, seed=6)) != order
    batches = [torch.tensor(order[i : i + size]) for i in range(0, n, size)]
    for batch in batches:
        share = torch.tensor(classes)[batch].bincount(minlength=len(counts))
        fair = torch.tensor(counts) * len(batch) / n
        # each class is spread evenly from its own start: less than one at each end of a batch, for every class
        assert (share - fair).abs().max() < 2
        if counts == (500, 500):
            assert share.tolist() in ([8, 8], [4, 4])
    if counts == (500, 500):
        firsts = {classes[batch[0]] for batch in batches}
        assert firsts == {0, 1}, "in random order within a batch"


def test_the_sampler_in_a_data_loader(tokenizer):
    data = TaskData(examples_of(CODE), CODE, tokenizer, max_length=100)
    loader = torch.utils.data.DataLoader(
        data, 2, sampler=data.sampler(2, seed=0), collate_fn=data.collate
    )
    batches = list(loader)
    assert sorted(i for b in batches for i in b["rows"].tolist()) == [0, 1, 2, 3]
    assert all(sorted(b["labels"].tolist()) == [0, 1] for b in batches)
    free = Task(name="g", kind="generation", prompt="{{ q }}", answers="a")
    data = TaskData([Example("?", (), None, ("x",))] * 40, free, tokenizer, max_length=100)
    assert sorted(data.sampler(7, seed=2)) == list(range(40)) != list(data.sampler(7, seed=2))
    with pytest.raises(ValueError, match="batch_size must be 1"):
        data.sampler(0, seed=2)


def test_task_data_travels_to_workers(tokenizer):
    import pickle

    data = TaskData(examples_of(CODE), CODE, tokenizer, max_length=100)
    again = pickle.loads(pickle.dumps(data))
    assert again[1] == data[1] and again.options == data.options
