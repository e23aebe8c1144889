"""Curves of runs: the dev metric over forward passes and over seconds, and the training loss."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def read_results(run: Path) -> dict[str, Any]:
    """results.json of a run's folder. ValueError if it has none."""
    file = run / "results.json" if run.is_dir() else run
    try:
        results = json.loads(file.read_text())
        results["history"], results["metric"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run} is not the folder of a finished run: {type(error).__name__} at {file.name}") from None
    return results


def curve(results: dict[str, Any], x: str, y: str) -> tuple[list[float], list[float]]:
    """The rows of the history that have both."""
    rows = [row for row in results["history"] if x in row and y in row]
    return [row[x] for row in rows], [row[y] for row in rows]


def mean_and_spread(runs: Sequence[dict[str, Any]], x: str, y: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, mean and standard deviation of y over runs that were evaluated at the same steps."""
    curves = [curve(run, x, y) for run in runs]
    n = min(len(ys) for _, ys in curves)
    xs, ys = (np.array([c[i][:n] for c in curves], dtype=float) for i in (0, 1))
    spread = ys.std(0, ddof=1) if len(ys) > 1 else np.zeros(n)
    return xs.mean(0), ys.mean(0), spread


def plot_runs(runs: Mapping[str, dict[str, Any] | Sequence[dict[str, Any]]], path: Path) -> None:
    """One PNG: a line per name; several runs under one name are their mean, with their standard deviation around it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
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
            (line,) = axis.plot(xs, means, marker="o" if len(xs) < 30 else None, markersize=3, label=name)
            if len(of_name) > 1:
                axis.fill_between(xs, means - spread, means + spread, alpha=0.15, color=line.get_color())
    metrics = sorted({run["metric"] for r in runs.values() for run in ([r] if isinstance(r, dict) else r)})
    axes[0].set(xlabel="forward passes (a backward counts as two)", ylabel=f"dev {', '.join(metrics)}")
    axes[1].set(xlabel="seconds of training", ylabel=f"dev {', '.join(metrics)}")
    axes[2].set(xlabel="forward passes (a backward counts as two)", ylabel="training loss")
    if axes[2].lines:  # there may have been no evaluation
        axes[2].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
