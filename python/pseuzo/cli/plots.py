"""Curves of runs: the dev metric over forward passes and over seconds, and the training loss."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


def curve(results: dict[str, Any], x: str, y: str) -> tuple[list[float], list[float]]:
    """Return x and y of the rows that have both, by step, with nan for null. If a resumed run
    evaluated a step twice, the last one counts."""
    rows = [row for row in results["history"] if row.get(x) is not None and y in row]
    last = {row.get("step", row[x]): row for row in rows}
    rows = [last[step] for step in sorted(last)]
    return [row[x] for row in rows], [math.nan if row[y] is None else row[y] for row in rows]


def plot_runs(runs: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Draw one PNG with a line for each run, which has the results of its folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(18, 4.5), layout="constrained")
    for axis in axes:
        axis.set_prop_cycle(
            color=matplotlib.color_sequences["tab20" if len(runs) > 10 else "tab10"]
        )
    for name, results in runs.items():
        metric = results["metric"]
        for axis, x, y in (
            (axes[0], "forwards", f"eval_{metric}"),
            (axes[1], "train_seconds", f"eval_{metric}"),
            (axes[2], "forwards", "loss"),
        ):
            xs, ys = curve(results, x, y)
            if xs:
                marker = "o" if len(xs) < 30 else None
                axis.plot(xs, ys, marker=marker, markersize=3, label=name)
    metrics = sorted({results["metric"] for results in runs.values()})
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
