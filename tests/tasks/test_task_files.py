"""A user's task file is read, or its mistakes and the rows that do not fit it are named."""

import json

import pytest
from pseuzo import CausalLMObjective
from pseuzo.tasks import Example, Task, TaskData, load_task
from pseuzo.tasks.drawing import PARTS
from public_rows import write
from task_examples import DEMO_MODEL, EXAMPLES, GOOD, TASK
from transformers import AutoModelForCausalLM

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


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"kind": "regression"},
            "kind must be one of classification, choice, generation, got 'regression'",
        ),
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
    ],
)
def test_malformed_task_files(change, sentence, tmp_path):
    (tmp_path / "x.yaml").write_text(json.dumps(GOOD | change))  # JSON is YAML
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")) as error:
        load_task(tmp_path / "x.yaml")
    assert str(error.value).startswith("task ") and "\n" not in str(error.value)


def test_files_that_are_no_task(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"unknown task 'sst3'; known: boolq, cb, .*, wsc; one of your own",
    ):
        load_task("sst3")
    with pytest.raises(ValueError, match="there is no such file"):
        load_task(tmp_path / "nothing.yaml")
    for content, sentence in (
        ("kind: [", "is not YAML"),
        ("- 1", "must be a YAML mapping"),
        ("kind: choice", "lacks"),
        ("kind: 2001-99-99", "is not YAML: month must be in 1..12"),
    ):
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


@pytest.mark.parametrize(
    "row, sentence",
    [
        (
            {"text": "x", "label": 0},
            "prompt asks for the column 'sentence', which the data does not have; its columns: la",
        ),
        (
            {"sentence": "x"},
            "label asks for the column 'label', which the data does not have; "
            "its columns: sentence",
        ),
        ({"sentence": "x", "label": 2}, "label 2 has no label word; known: 0, 1"),
        ({"sentence": "x", "label": -1}, "label -1 has no label word"),
        (
            {"sentence": None, "label": 1},
            "prompt cannot be filled in from the row: a value it prints is missing",
        ),
    ],
)
def test_rows_that_do_not_fit(row, sentence, tmp_path):
    data = write(
        tmp_path / "x.jsonl",
        [{"sentence": "x", "label": "0"}] * 2 + [row] + [{"sentence": "y", "label": 1}],
    )
    with pytest.raises(ValueError, match=f"task mine, line 3 of {data}: {sentence}"):
        Task(**(GOOD | {"name": "mine"})).load(data, train=2, dev=1, test=1)


def test_the_place_of_a_row_that_does_not_fit(tmp_path):
    """The place is the row's file and line, also after empty lines and in the second of two files.
    If rows have no lines, the place is the row's number."""
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


def test_hostile_files(tmp_path):
    laughs = "".join(
        f"  - &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]\n" for i in range(9)
    )
    for content, sentence in (
        ("name:\n" + laughs, r"line 3: aliases \(\*name\) are not read; write the value again"),
        ("prompt: &x [*x]", "line 1: aliases"),
        ("[" * 5000, "line 1: there are more than 32 levels"),
        (
            "a:\n" + "".join(f"{' ' * i}-\n" for i in range(1, 60)),
            "line 33: there are more than 32 levels",
        ),
        ("x" * 300_000, "it is larger than 262144 bytes"),
        ('a: !!int ""', "index out of range"),
        ("a: !!bool 5", "'5'"),
        ("a: !!python/name:os.system", "could not determine"),
        ("a: " + "1" * 5000, "Exceeds the limit"),
    ):
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


def test_half_a_character_is_refused_with_its_row(tmp_path):
    rows = [
        {"sentence": "bad \ud83d" if i == 2 else "bad \U0001f600", "label": i % 2} for i in range(4)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "\\ud83d\\ude00" in (tmp_path / "x.jsonl").read_text(), "the other rows were changed"
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
