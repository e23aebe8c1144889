"""Tasks on hand-made rows in the public schemas: prompts, draws, token rows, batches, order; what users get wrong."""

import json
import warnings
from pathlib import Path

import pseuzo
import pytest
import torch
from helpers import PUBLIC, write
from pseuzo import CausalLMObjective
from pseuzo.tasks import BUILTIN, Example, StratifiedSampler, Task, TaskData, load_task
from pseuzo.tasks.task import PARTS
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO_MODEL = Path(pseuzo.__file__).parent / "demo" / "assets" / "model"
EXAMPLES = Path(__file__).parent.parent / "examples"


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
    assert len(parts["train"]) == len(parts["dev"]) == len(rows) and set(parts["train"] + parts["dev"]) == want
    assert task.metric == ("f1" if name in ("squad", "drop") else "accuracy")


def test_all_builtin_tasks_are_tested_and_described():
    assert set(BUILTIN) == {*PUBLIC, "demo"}
    for name in BUILTIN:
        task = load_task(name)
        assert task.name == name and task.description and (task.dataset or name == "demo")


def test_squad_without_titles(tmp_path):
    row = {k: v for k, v in PUBLIC["squad"][0][0].items() if k != "title"}
    (example,) = load_task("squad").load(write(tmp_path / "x.jsonl", [row]), train=0, dev=0, test=1)["test"]
    assert example.prompt == "Passage: The Nile is long.\nQuestion: What is long?\nAnswer:"


def test_the_demo_task_is_the_demo():
    parts = load_task("demo").load(train=20, dev=400, test=30)
    assert {k: len(v) for k, v in parts.items()} == {"train": 20, "dev": 400, "test": 30}
    assert all(e.prompt.endswith("\n# kind:") and e.options == ("code", "prose") for e in parts["test"])
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    data = TaskData(parts["dev"], load_task("demo"), tokenizer, max_length=126)
    assert data.options == [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" code", " prose")]
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
    assert len({*train, *dev}) == 50 and max(*train, *dev) < 100 and min(test) >= 100 and len(set(test)) == 10
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
    for sizes in ({"train": 2, "dev": 0}, {"train": 0, "dev": 0}, {"train": 1, "dev": 3}, {"train": 9999, "dev": 9999}):
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
    both = {"train": Dataset.from_list(numbered(12)), "validation": Dataset.from_list(numbered(9, 100))}
    DatasetDict(both).save_to_disk(str(tmp_path / "saved-dict"))
    assert load(tmp_path / "saved-dict") == {"train": (0, 0), "dev": (0, 0), "test": (1, 1)}


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
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(
        ValueError, match=r"task sst2: the split 'train' .* nyu-mll/glue \(sst2\) cannot be loaded: no rou"
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
    write(tmp_path / "capitals.jsonl", [{"country": "Peru", "a": "Lima", "b": "Quito", "right": "Lima"}] * 3)
    parts = load_task(tmp_path / "capitals.yaml").load(train=1, dev=1, test=1)
    assert parts["test"] == [Example("The capital of Peru is", ("Lima", "Quito"), 0, ("Lima",))]


def test_words_that_yaml_takes_for_truth_values(tmp_path):
    text = "kind: classification\nprompt: '{{ q }}'\nlabel: a\nlabels: {yes: Yes, no: No, true: On}\n"
    (tmp_path / "t.yaml").write_text(text)
    task = load_task(str(tmp_path / "t.yaml"))
    assert task.labels == {"yes": "Yes", "no": "No", True: "On"} and task.name == "t"
    assert [task.example({"q": "x", "a": a}).golds for a in ("no", True, "yes")] == [("No",), ("On",), ("Yes",)]


def test_rows_without_a_template(tmp_path):
    rows = [{"prompt": f"{i} is", "options": ["odd", "even"], "answer": (i + 1) % 2} for i in range(6)]
    task = load_task(write(tmp_path / "parity.jsonl", rows))
    assert task.kind == "classification" and task.name == "parity"
    parts = task.load(train=2, dev=2, test=2)
    assert {(int(e.prompt.split()[0]) + 1) % 2 == e.answer for p in PARTS for e in parts[p]} == {True}
    rows = [row | {"answer": row["options"][row["answer"]]} for row in rows]
    task = load_task(write(tmp_path / "words.jsonl", rows))
    assert task.kind == "classification" and task.example(rows[3]) == Example("3 is", ("odd", "even"), 0, ("odd",))
    rows[1]["options"] = ["odd", "even", "neither"]
    task = load_task(write(tmp_path / "choice.jsonl", rows))
    assert task.kind == "choice" and task.example(rows[1]).options == ("odd", "even", "neither")
    task = load_task(write(tmp_path / "free.jsonl", [{"prompt": "2 + 2 =", "answers": ["4", "four"]}] * 3))
    assert task.kind == "generation" and task.load(train=1, dev=1, test=1)["dev"][0].golds == ("4", "four")


def test_the_documented_example(tokenizer):
    task = load_task(EXAMPLES / "my-task.yaml")
    parts = task.load(train=8, dev=4, test=4)
    assert [len(parts[p]) for p in PARTS] == [8, 4, 4] and task.kind == "classification"
    data = TaskData(parts["train"], task, tokenizer, max_length=128)
    batch = data.collate([data[i] for i in range(8)])
    forward, head = CausalLMObjective(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), data.options)(batch)
    assert head(forward()).isfinite()


GOOD = {"kind": "classification", "prompt": "{{ sentence }}", "label": "label", "labels": {0: "bad", 1: "good"}}


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
    with pytest.raises(ValueError, match=r"unknown task 'sst3'; known: sst2, rte, .*, drop, demo; one of your own"):
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
        ValueError, match=r"its rows lack prompt; rows without .*, and these have answer, options, text"
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
    task = Task(**(GOOD | {"name": "evil", "prompt": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}))
    with pytest.raises(ValueError, match="prompt cannot be filled in from the row: access to attribute '__class__'"):
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
    data = write(tmp_path / "x.jsonl", [{"sentence": "x", "label": "0"}] * 2 + [row] * 9)
    with pytest.raises(ValueError, match=f"task mine, row . of those drawn: {sentence}"):
        Task(**(GOOD | {"name": "mine"})).load(data, train=4, dev=4, test=3)


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
        ValueError, match="answers cannot be filled in from the row: 'dict object' has no attribute 'te"
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
        (tmp_path / "named", "train examples come from the split 'train', but there is only first, second"),
        (tmp_path / "mixed", "as Parquet and as JSON"),
        (tmp_path / "bad.parquet", "cannot be read as Parquet"),
        (write(tmp_path / "x.csv", []), "is no data that can be read"),
        (write(tmp_path / "empty.jsonl", []), "the data is empty"),
        (write(tmp_path / "two.jsonl", numbered(2)), r"has 2 row\(s\), too few for train and dev and test"),
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
TEXTS = ("for i in range(10):", "Return a copy of it.", "x = 1", "The default is None, which means no limit at all.")


def examples_of(task, kinds=("code", "prose", "code", "prose")):
    return [task.example({"text": text, "label": kind}) for text, kind in zip(TEXTS, kinds, strict=True)]


def decoded(tokenizer, ids, mask):
    return [tokenizer.decode(i[m != 0]) for i, m in zip(ids, mask, strict=True)]


def test_batches_of_label_words(tokenizer):
    data = TaskData(examples_of(CODE), CODE, tokenizer, max_length=100)
    assert data.train_on == "label-words" and data.options == tokenizer.convert_tokens_to_ids(["Ġcode", "Ġprose"])
    assert data.labels == [0, 1, 0, 1]
    batch = data.collate([data[i] for i in (2, 1, 3)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "groups", "rows"}
    assert batch["labels"].tolist() == batch["groups"].tolist() == [0, 1, 1] and batch["rows"].tolist() == [2, 1, 3]
    texts = [f"</s>{TEXTS[i]}\n# kind:" for i in (2, 1, 3)]
    assert decoded(tokenizer, batch["input_ids"], batch["attention_mask"]) == texts
    assert (batch["attention_mask"][:, -1] == 1).all() and batch["attention_mask"][0, 0] == 0
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_batches_of_options(tokenizer):
    data = TaskData(examples_of(LONG, ("code", "prose", "none", "prose")), LONG, tokenizer, max_length=100)
    assert data.train_on == "options" and data.options is None and data.labels == [0, 1, 2, 1]
    batch = data.collate([data[i] for i in (2, 1)])
    words = [" a piece of code", " prose", " neither of them"]
    texts = [f"</s>{TEXTS[i]}\n# kind:{word}" for i in (2, 1) for word in words]
    assert decoded(tokenizer, batch["input_ids"], batch["attention_mask"]) == texts
    assert decoded(tokenizer, batch["labels"], batch["labels"] != -100) == words * 2
    assert batch["examples"].tolist() == [0, 0, 0, 1, 1, 1] and batch["answers"].tolist() == [2, 4]
    assert batch["rows"].tolist() == [2, 1] and batch["groups"].tolist() == [6, 7, 8, 3, 4, 5]
    assert batch["option_rows"].tolist() == [[0, 1, 2], [3, 4, 5]]
    device_free = {k: v for k, v in batch.items() if k not in ("positions", "targets", "option_rows")}
    objective = CausalLMObjective(AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval())
    (forward, head), (forward_too, head_too) = objective(batch), objective(device_free)
    assert torch.equal(head(forward()), head_too(forward_too()))


def test_batches_of_answers(tokenizer):
    choice = Task(name="c", kind="choice", prompt="{{ q }} Answer:", options="options", answer="answer")
    rows = [{"q": "1?", "options": ["one", "two or so", "three"], "answer": 1},
            {"q": "Longer than 1?", "options": ["one", "two"], "answer": 0}]  # fmt: skip
    examples = choice.examples(rows)
    data = TaskData(examples, choice, tokenizer, max_length=60)
    assert data.train_on == "answer" and data.options is None and data.labels is None
    batch = data.collate([data[i] for i in range(2)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "rows", "positions", "targets"}
    assert decoded(tokenizer, batch["labels"], batch["labels"] != -100) == [" two or so", " one"]
    assert decoded(tokenizer, batch["input_ids"], batch["attention_mask"])[0] == "</s>1? Answer: two or so"
    ragged = TaskData(examples, choice, tokenizer, max_length=60, train_on="options")
    batch = ragged.collate([ragged[i] for i in (1, 0)])
    assert batch["examples"].tolist() == [0, 0, 1, 1, 1] and batch["answers"].tolist() == [0, 3]
    assert "groups" not in batch
    free = Task(name="g", kind="generation", prompt="{{ q }}\nAnswer:", answers="a", stop="\n")
    data = TaskData(free.examples([{"q": "Who?", "a": ["the king", "a king"]}]), free, tokenizer, max_length=60)
    batch = data.collate([data[0]])
    assert decoded(tokenizer, batch["labels"], batch["labels"] != -100) == [" the king\n"]  # it learns to stop


def test_a_batch_without_padding_has_no_mask(tokenizer, demo_model):
    """And the same loss, to the bit, as with a mask that leaves nothing out."""
    for task, keys in ((CODE, {"labels"}), (LONG, {"labels", "examples", "answers", "option_rows"})):
        data = TaskData([examples_of(task)[3]] * 2, task, tokenizer, max_length=10)  # cut to one length
        batch = data.collate([data[0], data[1]])
        assert "attention_mask" not in batch and keys < set(batch) and len({*map(len, batch["input_ids"])}) == 1
        objective = CausalLMObjective(demo_model, data.options)
        (forward, head), (masked, head_too) = (
            objective(b) for b in (batch, batch | {"attention_mask": torch.ones_like(batch["input_ids"])})
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
            data = TaskData(examples_of(CODE), CODE, tokenizer, max_length=max_length, train_on=train_on)
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
        assert short.tokens == [2, *long.tokens[-13:]], "the token before every text stays, and the end of the prompt"
    words = TaskData(examples_of(CODE), CODE, tokenizer, max_length=8)
    assert len(words[3]["tokens"][0].tokens) == 7, "room for the word, as in a row of an option"
    assert tokenizer.decode(words[3]["tokens"][0].tokens).endswith("# kind:")
    free = Task(name="g", kind="generation", prompt="{{ q }}\nAnswer:", answers="a", max_new_tokens=6)
    data = TaskData(free.examples([{"q": "one two three " * 9, "a": "x"}]), free, tokenizer, max_length=20)
    assert (data.fit()["cut_prompts"], whole.fit()["cut_prompts"], words.fit()["cut_prompts"]) == (1, 0, 4)
    lengths = [len(row[0].tokens) for row in (whole.token_rows(i, "options") for i in range(4))]
    assert cut.fit()["cut_prompts"] == sum(length > 14 for length in lengths)
    assert len(data.token_rows(0, "prompt")[0].tokens) == 14 and len(data.token_rows(0, "answer")[0].tokens) == 20
    with pytest.raises(
        ValueError, match=r"task long: an answer of . tokens, beginning ' a piece of code', leaves no room"
    ):
        TaskData(examples_of(LONG), LONG, tokenizer, max_length=4)[0]
    with pytest.raises(
        ValueError, match="task g: max_new_tokens 6 leaves no room for a prompt in max_length, 7 tokens"
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
    assert some.fit() == {"cut_prompts": 0, "shots_mean": sum(used) / 4, "shots_least": 2} and used[3] == 2
    none = TaskData([example], CODE, tokenizer, max_length=25, shots=shots)[0]
    assert none == TaskData([example], CODE, tokenizer, max_length=25)[0]
    lines = TaskData(load_task("rte").examples([PUBLIC["rte"][1][0]]), load_task("rte"), tokenizer, max_length=120,
                     shots=load_task("rte").examples([PUBLIC["rte"][0][0]]))  # fmt: skip
    assert "is true? Yes or No?\nYes\n\nA cat sat.\n" in tokenizer.decode(lines[0]["tokens"][0].tokens)


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
        ValueError, match="task long: the label word 'a piece of code' is not one token of this tokeniz"
    ):
        TaskData(examples_of(LONG), LONG, tokenizer, max_length=100, train_on="label-words")
    with pytest.raises(ValueError, match="train_on must be one of auto, label-words, options, answer, got 'prompt'"):
        TaskData(examples_of(CODE), CODE, tokenizer, max_length=100, train_on="prompt")
    free = Task(name="g", kind="generation", prompt="{{ q }}", answers="a")
    example = Example("?", (), None, ("x",))
    for train_on, sentence in (("label-words", "is for classifications"), ("options", "needs options")):
        with pytest.raises(ValueError, match=f"task g: train_on '{train_on}' {sentence}"):
            TaskData([example], free, tokenizer, max_length=100, train_on=train_on)
    with pytest.raises(ValueError, match="max_length must be 2"):
        TaskData([example], free, tokenizer, max_length=1)


def test_a_prompt_without_any_token_before_the_answer():
    gpt2_like = AutoTokenizer.from_pretrained(DEMO_MODEL)
    gpt2_like.backend_tokenizer.post_processor = None  # puts nothing before a text
    free = Task(name="g", kind="generation", prompt="{{ q }}", answers="a")
    assert TaskData([Example("x", (), None, ("y",))], free, gpt2_like, max_length=9)[0]["tokens"][0].prompt != []
    with pytest.raises(ValueError, match="task g: a prompt is empty"):
        TaskData([Example("", (), None, ("x",))], free, gpt2_like, max_length=9)[0]


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
    loader = torch.utils.data.DataLoader(data, 2, sampler=data.sampler(2, seed=0), collate_fn=data.collate)
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
