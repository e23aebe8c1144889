"""The page for libraries that use the kernels: its code runs, and its table has the functions."""

import inspect
import re
from pathlib import Path

import torch

import pseuzo_kernels as pk

PAGE = (Path(__file__).parents[2] / "docs" / "backend.md").read_text()


def test_the_code_runs_and_learns(capsys):
    torch.manual_seed(0)
    names: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(code, names)
    assert "CPU tensors:" in capsys.readouterr().out
    with torch.no_grad():
        # The loss of a model as it begins, on the same data.
        before = (torch.nn.Linear(8, 1)(names["inputs"]) - names["targets"]).square().mean()
        after = names["loss"]([p for _, p in names["weights"]])
    assert after < 0.9 * before


def test_the_table_has_every_function_and_its_arguments():
    table = PAGE[PAGE.index("| Function |") :].split("\n\n")[0]
    calls = re.findall(
        r"`(\w+)(?:\((.*?)\))?`", "".join(r.split("|")[1] for r in table.split("\n"))
    )
    for name, arguments in calls:
        parameters = list(inspect.signature(getattr(pk, name)).parameters)
        written = [a.strip(" =*") for a in arguments.split(",") if a.strip(" *")]
        assert set(written) <= set(parameters), name
    others = {"backends", "part_of", "reference", "stream_of_name"}
    functions = {name for name in pk.__all__ if name[0].islower()} - others
    assert functions == {name for name, _ in calls}
    for name in re.findall(r"`pk\.(\w+)", PAGE):
        assert hasattr(pk, name), name
