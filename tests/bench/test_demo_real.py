"""The demo on a real model prints what it promises, here on the embedded model."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import demo_real

    yield demo_real
    sys.modules.pop("demo_real")


def test_sparkline(demo):
    assert demo.sparkline([0.5, 1.0, 0.75]) == "▁█▅"
    assert demo.sparkline([0.5, 0.5]) == "▁▁"


def test_passes(demo, tmp_path):
    sizes = "--steps 10 --eval-every 4 --dev-size 33 --eval-batch-size 16".split()
    command = ["--model", "demo", "--task", "demo", "--output", str(tmp_path), *sizes]
    for method, forwards in {"mezo": 20, "mezo --one-sided": 20, "pseuzo": 20}.items():
        c = demo.settings_of([*command, "--method", *method.split()])
        # The dev rows are evaluated at steps 0, 4 and 8, and the test rows before and after.
        assert demo.passes(c, 1000) == {"steps": forwards, "dev": 9, "test": 126}


@pytest.mark.slow
def test_what_is_printed(demo, capsys, monkeypatch, tmp_path):
    out, sizes = tmp_path / "out", "--steps 4 --eval-every 2 --test-size 40 --dev-size 20"
    arguments = f"--model demo --task demo --output {out} {sizes} --train-size 40 --lr=1e-3 --quiet"
    monkeypatch.setattr(sys, "argv", ["demo_real.py", *arguments.split()])
    monkeypatch.setenv("COLUMNS", "140")
    assert demo.main() == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert (results["lr"], results["steps"], results["method"]) == (1e-3, 4, "mezo")
    first, *_ = printed.splitlines()
    assert "4 steps are 8 forward passes of 16 rows, evaluations on dev rows 6, before" in first
    assert "on 40 test rows 6. A forward pass takes" in first and "--lr 1.5e-4" not in printed
    accuracy = f"{results['test']['accuracy']:.3f}"
    row = next(line for line in printed.splitlines() if "accuracy on 40 test rows" in line)
    assert row.split("│")[3].strip() == accuracy
    assert printed.count("# kind:") == demo.ASKED
    marks = printed.count("✓"), printed.count("✗")
    assert sum(marks) == 2 * demo.ASKED, marks
    assert "accuracy on the dev rows during the run: 0." in printed and "peak memory" in printed
    assert (out / "curves.png").exists() and f"Model: {out}/model" in printed


def test_refusals_are_one_sentence(demo, capsys, monkeypatch, tmp_path):
    for arguments, sentence in (
        ("--task nothing --model demo", "unknown task 'nothing'"),
        ("--task demo --model demo --lr no", "Invalid value for '--lr'"),
    ):
        monkeypatch.setattr(sys, "argv", ["demo_real.py", *arguments.split()])
        assert demo.main() == 2
        assert sentence in capsys.readouterr().err
    monkeypatch.setattr(demo, "MODEL", tmp_path / "smollm2")
    monkeypatch.setattr(sys, "argv", ["demo_real.py"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "run make real" in capsys.readouterr().err
