"""eval evaluates models and runs, also with shots."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from cli_runs import PLAIN
from helpers import (
    SMALL,
    ZERO_ORDER,
    last_json,
    pseuzo,
    weights,
)
from pseuzo import files
from pseuzo.cli.run import model_path
from pseuzo.tasks import TaskData, evaluate, load_task
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow


def test_eval_shots_and_output(tmp_path):
    common = [*SMALL[:4], "--test-size", 24, "--device", "cpu", "--quiet"]
    zero = last_json(pseuzo("eval", *common, "--output", tmp_path / "eval.json"))
    assert json.loads((tmp_path / "eval.json").read_text()) == zero and zero["shots"] == 0
    few = last_json(pseuzo("eval", *common, "--shots", 3))
    assert few["shots"] == 3 and few["test"]["loss"] != zero["test"]["loss"]
    assert few["shots_mean"] == 3 == few["shots_least"] and few["cut_prompts"] == 0
    text = pseuzo("eval", *common, *"--shots 20 --train-size 12 --dev-size 12".split())
    many = last_json(text)
    assert many["shots"] == 20 and 3 <= many["shots_least"] <= many["shots_mean"] < 12
    assert f"{many['shots_least']} at least, as there are 12 training rows, 128 tokens" in text


def test_eval_with_calibration():
    common = [*SMALL[:4], "--test-size", 200, "--device", "cpu", "--quiet"]
    plain, figures = (last_json(pseuzo("eval", *common, *more)) for more in ([], ["--sfc"]))
    assert figures["sfc"] and not plain["sfc"]
    assert figures["test"]["loss"] == plain["test"]["loss"]
    assert figures["test"]["accuracy"] != plain["test"]["accuracy"]
    said = pseuzo("eval", "--model", "nowhere", "--task", "squad", "--sfc", code=2)
    assert "task squad: it has no sfc template" in said


def test_eval_of_weights_that_are_not_finite(tmp_path):
    """The figures are standard JSON, and a line says why some are null."""
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
    figures = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert figures["test"] == {"accuracy": 0.0, "loss": None, "examples": 8}
    assert json.loads((tmp_path / "eval.json").read_text()) == figures
    assert "the loss on the test rows is nan, as the model's logits are not finite" in said


CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def test_a_run_asks_as_in_a_chat_and_so_does_its_evaluation(tmp_path):
    base, out = tmp_path / "base", tmp_path / "run"
    tokenizer = AutoTokenizer.from_pretrained(model_path("demo"))
    tokenizer.chat_template = CHAT
    files.save_model(AutoModelForCausalLM.from_pretrained(model_path("demo")), tokenizer, base)
    sizes = [*"--train-size 24 --dev-size 4 --test-size 12".split()]
    pseuzo(
        "train",
        "--model",
        base,
        *SMALL[2:4],
        *sizes,
        *SMALL[10:],
        "--method",
        "mezo",
        "--steps",
        1,
        "--chat",
        "--output",
        out,
    )
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


def test_eval_of_a_run_takes_its_rows(tmp_path, monkeypatch):
    """With one file of data, another seed or more test rows would draw rows of the training set."""
    task, out = tmp_path / "rows.jsonl", tmp_path / "run"
    task.write_text("".join(json.dumps(row) + "\n" for row in PLAIN["classification"]))
    sizes = [*"--train-size 24 --dev-size 4 --test-size 12".split()]
    pseuzo(
        "train",
        "--model",
        "demo",
        "--task",
        task,
        *sizes,
        *ZERO_ORDER,
        *"--seed 5 --steps 2 --keep last --batch-size 4 --save-every 2".split(),
        *"--device cpu --quiet".split(),
        "--output",
        out,
    )
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
    # These sizes and this seed are the ones that eval would take in any case.
    assert "rows as in" not in pseuzo(*common, out / "model", *sizes, "--seed", 5)
    # The task is another one.
    assert "rows as in" not in pseuzo(*common, out / "model", "--task", "demo", "--test-size", 8)
    monkeypatch.chdir(out)  # "demo" names the built-in model, not a folder here
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
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import OPTConfig as Config, "
        "OPTForCausalLM as Model\n"
    )
    known = kind == "opt"  # Transformers' own code is used for this kind
    text = pseuzo(
        "eval", *SMALL[2:4], "--model", folder, "--test-size", 8, "--quiet", code=0 if known else 2
    )
    assert not ran.exists()
    assert known or text.strip().splitlines()[-1].startswith("Error: ")
