"""Compares methods on the same task, with the same number of forward passes and the same seeds.

Every run is a process of its own, since only then are its memory and time those of the method.
Finished runs are not repeated.
"""

import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pseuzo.cli.plots import curve, plot_runs, read_results
from pseuzo.files import claim, differing, read_json, read_yaml, write_atomically, write_json
from pseuzo.train.methods import forwards_per_step
from pseuzo.train.options import OPTIONS

EVALUATIONS = 12  # about how many a run makes


def compare(
    common: dict[str, Any],
    methods: Mapping[str, dict[str, Any]],
    output: Path,
    *,
    seeds: int,
    forwards: int,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run every method for the same number of forward passes with seeds 0 .. seeds - 1.

    common: the settings of `pseuzo train` that all share. methods: the settings of each method, by
    title. An lr of "auto" is searched for with the first seed and kept for the others. Writes
    compare.json, table.md and compare.png into output. ValueError if a run fails (with the last
    line of its log), if output has a run of that name with other settings, or if it has files that
    no comparison wrote.
    """
    with claim(output, "compare"):
        runs = _run(common, methods, output, seeds, forwards, progress)
        summary = {
            "forwards": forwards,
            "seeds": seeds,
            "hardware": next(iter(runs.values()))[0]["hardware"],
            "metric": next(iter(runs.values()))[0]["metric"],
            "methods": summarise(runs),
        }
        write_json(output / "compare.json", summary)
        write_atomically(output / "table.md", markdown(summary))
        plot_runs(runs, output / "compare.png")
    return summary


def _run(
    common: dict[str, Any],
    methods: Mapping[str, dict[str, Any]],
    output: Path,
    seeds: int,
    forwards: int,
    progress: Callable[[str], None],
) -> dict[str, list[dict[str, Any]]]:
    """Return the results of each method's runs, one per seed, by title."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for title, own in methods.items():
        settings = common | own
        counted = (*OPTIONS, "train_size", "batch_size")
        options = {name: settings[name] for name in counted if name in settings}
        steps = max(1, int(forwards / forwards_per_step(settings.get("method", "pseuzo"), options)))
        chosen: dict[str, Any] = {}
        for seed in range(seeds):
            folder = output / "runs" / f"{_slug(title)}-{seed}"
            every = max(1, steps // EVALUATIONS)
            config = settings | {
                "steps": steps,
                "seed": seed,
                "eval_every": every,
                "save_every": 0,
                "keep": "last",
            }
            config |= {"data_seed": settings.get("data_seed", 0)} | chosen
            if (folder / "results.json").exists():
                _same_settings(config, folder)
            else:
                progress(f"{title}, seed {seed}: {steps} steps")
                _train(config, folder)
            if (folder / "lr.json").exists():
                chosen = read_json(folder / "lr.json", "chosen")["chosen"]
            elif (folder / "noise_on.json").exists():
                decided = read_json(folder / "noise_on.json", "noise_on", "lr", "eps")
                chosen = {key: decided[key] for key in ("noise_on", "lr", "eps")}
            runs.setdefault(title, []).append(read_results(folder))
    return runs


def _slug(title: str) -> str:
    """Return a file name. Its checksum distinguishes titles that differ in punctuation alone."""
    words = "".join(ch if ch.isalnum() else "-" for ch in title.lower()).strip("-")
    return f"{words}-{zlib.crc32(title.encode()):08x}"


def _same_settings(config: dict[str, Any], folder: Path) -> None:
    if found := differing(read_yaml(folder.with_suffix(".yaml")), config):
        key, before, now = found
        raise ValueError(
            f"{folder} is a run with {key} {before}, not {now}; choose another --output"
        )


def _train(config: dict[str, Any], folder: Path) -> None:
    """Run `pseuzo train` in a process of its own, after removing what a killed one left behind."""
    if folder.exists():
        # Where only the comparison was killed, its run may still be going: then claim refuses.
        with claim(folder, "train"):
            pass
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    command = [
        sys.executable,
        "-m",
        "pseuzo",
        "train",
        "--config",
        str(file),
        "--output",
        str(folder),
        "--quiet",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        end = done.stdout.strip().splitlines()[-1:]
        raise ValueError(
            f"the run in {folder} failed (exit code {done.returncode}): {' '.join(end)}"
        )


def summarise(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return for each method the test metric after all forwards, and the dev metric then and at the
    time at which the quickest method was done."""
    seconds = {
        title: float(np.mean([r["train_seconds"] for r in results]))
        for title, results in runs.items()
    }
    least = min(seconds.values())
    rows = {}
    for title, results in runs.items():
        metric = results[0]["metric"]
        test = [r["test"][metric] for r in results]
        dev = [curve(r, "forwards", f"eval_{metric}")[1][-1] for r in results]
        at_time = [_at(curve(r, "train_seconds", f"eval_{metric}"), least) for r in results]
        rows[title] = {
            "test": test,
            "test_mean": float(np.mean(test)),
            "test_std": _std(test),
            "dev_mean": float(np.mean(dev)),
            "dev_std": _std(dev),
            "dev_at_equal_time": float(np.mean(at_time)),
            "equal_seconds": least,
            "seconds": seconds[title],
            "steps": results[0]["steps"],
            "forwards": results[0]["forwards"],
            "lr": results[0]["lr"],
            "eps": results[0]["eps"],
            "peak_memory_mib": float(np.mean([r["peak_memory_mib"] for r in results])),
        }
    return rows


def _std(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _at(curve: tuple[list[float], list[float]], x: float) -> float:
    """Return the last value at or before x, with a tolerance for the noise of clocks."""
    xs, ys = curve
    before = [y for at, y in zip(xs, ys, strict=True) if at <= 1.02 * x]
    return before[-1] if before else ys[0]


def columns(summary: dict[str, Any]) -> list[str]:
    """Return the head of the table whose rows cells() makes."""
    metric, least = (
        summary["metric"],
        min(row["equal_seconds"] for row in summary["methods"].values()),
    )
    return [
        "method",
        "lr",
        f"test {metric}",
        f"dev {metric}",
        f"dev {metric} after {least:.0f} s",
        "seconds",
        "peak memory",
    ]


def cells(title: str, row: dict[str, Any]) -> list[str]:
    """Return a row of the summary as it is printed."""
    return [
        title,
        f"{row['lr']:.2g}",
        f"{row['test_mean']:.3f} ± {row['test_std']:.3f}",
        f"{row['dev_mean']:.3f}",
        f"{row['dev_at_equal_time']:.3f}",
        f"{row['seconds']:.0f}",
        f"{row['peak_memory_mib']:.0f} MiB",
    ]


def markdown(summary: dict[str, Any]) -> str:
    """Return the summary as a table in Markdown."""
    head = columns(summary)
    lines = [
        head,
        ["---"] * len(head),
        *(cells(title, row) for title, row in summary["methods"].items()),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
