"""The tables of options, methods and modes on the pages agree with the definitions in the code."""

import re
from pathlib import Path

import click
import pytest
import yaml
from pseuzo.cli.commands import train, train_defaults
from pseuzo.cli.options import APPLIES_TO
from pseuzo.models.modes import MODES, by_mode
from pseuzo.train.methods import METHODS, forwards_per_step, methods_with
from pseuzo.train.options import DIRECTIONS, MOMENTA

ROOT = Path(__file__).parents[2]
ZEROTH_ORDER = [name for name in METHODS if not name.startswith("fo-")]
# The page says this in place of a default that depends on the method, where the code has None.
BY_METHOD = {
    "momentum": MOMENTA.replace(";", ","),
    "two-sided": "mezo and evolution two, pseuzo, fzoo and deepzero one",
    "directions": DIRECTIONS,
}


def rows(page: str, heading: str, skip: int = 2) -> list[list[str]]:
    """Return the cells of the first table whose heading begins with this cell, without its two
    heading lines."""
    text = (ROOT / page).read_text()
    table = text[text.index(f"\n| {heading} |") :].split("\n\n")[0]
    lines = table.strip().splitlines()[skip:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def options_on_the_page() -> dict[str, tuple[str | None, str]]:
    """Return the default and the methods of each option by name, from docs/methods.md."""
    found = {}
    for names, methods, _ in rows("docs/methods.md", "option"):
        # A default belongs to all names since the previous default.
        waiting = []
        for name, default in re.findall(r"`([\w-]+)`(?: \[(.*?)\](?=,|$))?", names):
            waiting.append(name)
            if default:
                found |= {name: (default, methods) for name in waiting}
                waiting = []
    return found


PAGE = options_on_the_page()
OPTIONS = {p.opts[0].removeprefix("--"): p for p in train.params if isinstance(p, click.Option)}


def test_the_page_has_every_option_and_no_other():
    assert PAGE.keys() - {"one-sided"} == OPTIONS.keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_the_default_on_the_page(name):
    written, option = PAGE[name][0], OPTIONS[name]
    default = train_defaults().get(option.name)
    if option.required:
        assert written == "required"
    elif name in ("lr", "eps"):
        pairs = re.findall(r"(\w+) ([\d.e-]+)", written.removeprefix("of the mode: "))
        assert {mode: float(value) for mode, value in pairs} == by_mode(name)
    elif name in BY_METHOD:
        assert written == BY_METHOD[name]
    elif default and isinstance(default, tuple | list):
        assert written == " ".join(default)
    elif default is False or default is None or default == ():
        assert not re.fullmatch(r"[\d.e-]+", written), "the code lacks this number"
    elif isinstance(default, int | float):
        assert float(written) == default
    else:
        assert written == default


@pytest.mark.parametrize("name", OPTIONS)
def test_the_methods_on_the_page(name):
    written, *others = re.split(r"[;]|, on a GPU", PAGE[name][1])[0].split(" but ")
    expected = APPLIES_TO.get(OPTIONS[name].name, {}).get("method", tuple(METHODS))
    groups = {"all": list(METHODS), "zeroth order": ZEROTH_ORDER}
    named = set(groups.get(written, written.split(", ")))
    for other in others:  # "zeroth order but a, b"
        assert named >= set(other.split(", ")), "the exceptions are not in the group"
        named -= set(other.split(", "))
    assert sorted(named) == sorted(expected)


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_the_methods(page):
    table = {}
    for names, _, passes, *_ in rows(page, "`--method`"):
        methods = re.findall(r"`([\w-]+)`", names)
        each = passes.split(", ") if re.fullmatch(r"[\d, ]+", passes) else [passes]
        table |= zip(methods, each if len(each) > 1 else each * len(methods), strict=True)
    assert table.keys() == METHODS.keys()
    for name, passes in table.items():
        if passes.startswith("1 and a backward"):
            assert forwards_per_step(name) == 3
        elif passes != "as `mezo`":
            assert float(passes.split()[0]) == forwards_per_step(name)


def test_the_modes():
    assert [row[0] for row in rows("docs/methods.md", "`--mode`")] == [f"`{m}`" for m in MODES]
    overview = {name: choices for name, choices, *_ in rows("docs/index.md", "tasks", 0)}
    assert re.findall(r"`([\w-]+)`", overview["modes"]) == list(MODES)
    assert set(re.findall(r"`([\w-]+)`", overview["methods"])) == set(METHODS)


def test_the_defaults_of_the_overview():
    overview = {name: default for name, default, _ in rows("docs/index.md", "option")}
    for name, row in (("`--lr`", "lr"), ("`--eps`", "eps")):
        pairs = re.findall(r"(\w+) (\d[\d.e-]*)", overview[name].split(" (")[0])
        assert {mode: float(value) for mode, value in pairs} == by_mode(row)
    for names, defaults in overview.items():
        named = re.findall(r"--([\w-]+)", names)
        values = defaults.split(", ")
        if len(named) > 1 and len(named) == len(values):
            for name, value in zip(named, values, strict=True):
                assert PAGE[name][0].split(",")[0].removeprefix("pseuzo ") == value


def test_the_published_settings():
    for file, mode, eps, lr in rows("docs/methods.md", "file"):
        settings = yaml.safe_load((ROOT / file.strip("`")).read_text())
        assert settings["mode"] == mode
        assert settings["eps"] == float(eps) == MODES[mode].eps
        assert settings["lr"] == float(lr) == MODES[mode].lr


def test_the_page_names_the_methods_that_take_their_rate_from_the_curvature():
    page = (ROOT / "docs/methods.md").read_text()
    rate = page[page.index("### A rate from the curvature\n") : page.index("### Races\n")]
    assert set(re.findall(r"`([\w-]+)`", rate)) & set(METHODS) == set(methods_with("find_lr"))


def test_the_page_names_the_methods_whose_rate_is_not_that_of_a_slope():
    others = {name for name in ZEROTH_ORDER if METHODS[name].rate != "lr"}
    (lr,) = (row for row in rows("docs/methods.md", "option") if row[0].startswith("`lr` "))
    assert set(re.findall(r"`([\w-]+)`", lr[2])) & set(ZEROTH_ORDER) == others
