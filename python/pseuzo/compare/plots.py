"""Plots of a comparison, from its ledger alone: small multiples of dev curves, and differences."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pseuzo.compare.report import Line, aligned, finals, overall
from pseuzo.compare.statistics import BETTER, WORSE, over_seeds

GREY, BLUE, RED, GREEN = "0.55", "#1f6fb4", "#c0392b", "#2e8b57"
COLUMNS = 4
AXES = {
    "forwards": (1, "forward passes (a backward counts as two)"),
    "seconds": (2, "seconds of training"),
}


def draw(lines: Sequence[Line], summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw all plots into folder: for each task one over forward passes and one over seconds, and
    one of the differences. Return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    made = []
    for task, of in summary["tasks"].items():
        runs = {
            title: finals(
                [
                    line
                    for line in lines
                    if (line.get("task"), line.get("method")) == (task, title)
                    and line.get("setup") == row["setup"]
                ],
                summary["seeds"],
            )
            for title, row in of["methods"].items()
        }
        runs = {title: own for title, own in runs.items() if own}
        if of["reference"] not in runs:
            continue
        for name in AXES:
            file = "-".join(filter(None, (name, slug(task) if len(summary["tasks"]) > 1 else "")))
            made.append(folder / f"{file}.png")
            _multiples(runs, of, name, made[-1])
    if differences := overall(summary):
        made.append(folder / "differences.png")
        _differences(differences, [*summary["tasks"]], made[-1])
    return made


def slug(title: str) -> str:
    """Return a title as part of a file name."""
    return "-".join("".join(ch if ch.isalnum() else " " for ch in title.lower()).split())


def curve(runs: Mapping[int, Line], what: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, the mean metric and half its confidence interval over seeds, at each evaluation.
    what: the column of the evaluations that is x."""
    xs, table = aligned([line["evaluations"] for line in runs.values()], what)
    intervals = [over_seeds(column) for column in table.T]
    means, halves = ([one[i] for one in intervals] for i in (0, 1))
    return xs, np.asarray(means), np.asarray(halves)


def _multiples(
    runs: Mapping[str, Mapping[int, Line]], of: Mapping[str, Any], name: str, path: Path
) -> None:
    """One panel per method, on the same axes, with the reference in grey in each of them."""
    from matplotlib import pyplot as plt

    what, label = AXES[name]
    base = of["reference"]
    others = [title for title in runs if title != base] or [base]
    columns = min(COLUMNS, len(others))
    rows = math.ceil(len(others) / columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(12, 0.9 + 2.6 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    curves = {title: curve(own, what) for title, own in runs.items()}
    last = max(xs[-1] for xs, *_ in curves.values())
    for axis, title in zip(axes.flat, others, strict=False):
        ends = []
        for one, color, width in ((base, GREY, 2.0), (title, BLUE, 1.6)):
            xs, means, halves = curves[one]
            axis.plot(xs, means, color=color, linewidth=width, zorder=2 if one == base else 3)
            halves = np.nan_to_num(halves)
            axis.fill_between(xs, means - halves, means + halves, color=color, alpha=0.18, lw=0)
            ends.append((float(means[-1]), float(xs[-1]), one, color))
            if title == base:
                break
        _labels(axis, ends, base)
        axis.set_title(_lines(title), fontsize=9)
        axis.grid(alpha=0.25)
        axis.set_xlim(0, 1.24 * last)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(others) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(0, len(others) - columns) : len(others)]:
        axis.tick_params(labelbottom=True)  # also where the panel below is missing
    means = np.concatenate([means for _, means, _ in curves.values()])
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    axes[0, 0].set_ylim(low - 0.08 * (high - low) - 1e-3, high + 0.08 * (high - low) + 1e-3)
    figure.supxlabel(label, fontsize=10)
    figure.supylabel(f"dev {of['metric']}", fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _lines(title: str, most: int = 30) -> str:
    """A title in lines, with breaks between the settings of a method."""
    words = textwrap.wrap(title.replace(",", ", "), most, break_on_hyphens=False)
    return "\n".join(words).replace(", ", ",")


def _labels(axis: Any, ends: Sequence[tuple[float, float, str, str]], base: str) -> None:
    """Write a name and the last value at the end of each line; two that would touch are moved
    apart, each towards its own side."""
    ordered = sorted(ends)
    shifts = [0.0] if len(ends) == 1 else [-10.0, 10.0]
    for (value, x, title, color), shift in zip(ordered, shifts, strict=True):
        name = "MeZO" if title == base else title.split(":")[0]
        axis.annotate(
            f"{name}\n{value:.3f}",
            (x, value),
            xytext=(4, shift),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=7.5,
            bbox={"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 0.5},
        )


def _differences(table: Mapping[str, Mapping[str, Any]], tasks: Sequence[str], path: Path) -> None:
    """Each method's difference from the reference, with its interval; one panel per task."""
    from matplotlib import pyplot as plt

    panels = [*tasks, *(["all"] if any("all" in found for found in table.values()) else [])]
    columns = min(COLUMNS, len(panels))
    rows, titles = math.ceil(len(panels) / columns), [*table]
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(12, 1.2 + 0.32 * len(titles) * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        axis.axvline(0, color=GREY, linewidth=2)
        for place, title in enumerate(titles):
            one = table[title].get(panel)
            if one is None:
                continue
            color = {BETTER: GREEN, WORSE: RED}.get(one["word"], GREY)
            half = 0.0 if math.isnan(one["half"]) else one["half"]
            axis.errorbar(
                one["mean"], place, xerr=half, fmt="o", color=color, capsize=3, markersize=4
            )
        axis.set_yticks(range(len(titles)), titles, fontsize=8)
        axis.set_title("mean of the tasks" if panel == "all" else panel, fontsize=9)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("difference from MeZO on the test rows", fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)
