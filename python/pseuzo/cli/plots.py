"""Curves of runs: the dev metric over forward passes and over seconds, and the training loss."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def read_results(run: Path) -> dict[str, Any]:
    """Read results.json of a run's folder. ValueError if it has none."""
    file = run / "results.json" if run.is_dir() else run
    try:
        results = json.loads(file.read_text())
        rows, metric = results["history"], results["metric"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{run} is not the folder of a finished run: {type(error).__name__} at {file.name}"
        ) from None
    if not (
        isinstance(metric, str)
        and isinstance(rows, list)
        and all(isinstance(row, dict) for row in rows)
    ):
        raise ValueError(
            f"{run} is not the folder of a finished run: no metric and rows of a history in "
            f"{file.name}"
        )
    drawn = ("step", "forwards", "train_seconds", "loss", f"eval_{metric}")
    if bad := {
        k for row in rows for k in drawn if not isinstance(row.get(k, 0), int | float | None)
    }:
        raise ValueError(
            f"{run} is not the folder of a finished run: {min(bad)} is no number in {file.name}"
        )
    return results


def _points(results: dict[str, Any], x: str, y: str) -> dict[float, tuple[float, float]]:
    """Return (x, y) by step. If a resumed run evaluated a step twice, the last one counts."""
    rows = [row for row in results["history"] if row.get(x) is not None and y in row]
    points = {
        row.get("step", row[x]): (row[x], math.nan if row[y] is None else row[y]) for row in rows
    }
    return dict(sorted(points.items()))


def curve(results: dict[str, Any], x: str, y: str) -> tuple[list[float], list[float]]:
    """Return x and y of the rows that have both: the last row of each step, with nan for null."""
    points = _points(results, x, y).values()
    return [at for at, _ in points], [value for _, value in points]


def mean_and_spread(
    runs: Sequence[dict[str, Any]], x: str, y: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, and the mean and standard deviation of y over runs, at the steps that all have."""
    points = [_points(run, x, y) for run in runs]
    steps = [step for step in points[0] if all(step in of_run for of_run in points)]
    table = np.array([[of_run[step] for step in steps] for of_run in points], dtype=float).reshape(
        len(runs), -1, 2
    )
    xs, ys = table[..., 0], table[..., 1]
    spread = ys.std(0, ddof=1) if len(ys) > 1 else np.zeros(len(steps))
    return xs.mean(0), ys.mean(0), spread


def plot_runs(runs: Mapping[str, dict[str, Any] | Sequence[dict[str, Any]]], path: Path) -> None:
    """Draw one PNG with a line per name. Several runs under one name are drawn as their mean, with
    their standard deviation around it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(18, 4.5), layout="constrained")
    for axis in axes:
        axis.set_prop_cycle(
            color=matplotlib.color_sequences["tab20" if len(runs) > 10 else "tab10"]
        )
    for name, of_name in runs.items():
        of_name = [of_name] if isinstance(of_name, dict) else list(of_name)
        metric = of_name[0]["metric"]
        for axis, x, y in (
            (axes[0], "forwards", f"eval_{metric}"),
            (axes[1], "train_seconds", f"eval_{metric}"),
            (axes[2], "forwards", "loss"),
        ):
            xs, means, spread = mean_and_spread(of_name, x, y)
            if not len(xs):
                continue
            (line,) = axis.plot(
                xs, means, marker="o" if len(xs) < 30 else None, markersize=3, label=name
            )
            if len(of_name) > 1:
                axis.fill_between(
                    xs, means - spread, means + spread, alpha=0.15, color=line.get_color()
                )
    metrics = sorted(
        {run["metric"] for r in runs.values() for run in ([r] if isinstance(r, dict) else r)}
    )
    axes[0].set(
        xlabel="forward passes (a backward counts as two)", ylabel=f"dev {', '.join(metrics)}"
    )
    axes[1].set(xlabel="seconds of training", ylabel=f"dev {', '.join(metrics)}")
    axes[2].set(xlabel="forward passes (a backward counts as two)", ylabel="training loss")
    if axes[2].lines:  # the other axes are empty if nothing was evaluated
        figure.legend(*axes[2].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
