"""The tables of a comparison, from its ledger alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pseuzo.compare.statistics import LEVEL, Interval, mean_of, over_seeds, paired

Line = dict[str, Any]


def summarise(lines: Sequence[Line]) -> dict[str, Any]:
    """Return what compare.json holds: for each task and method, how it was tuned, what it reached
    and how it differs from the reference. ValueError if the lines have no plan."""
    plans = [line for line in lines if line["kind"] == "plan"]
    if not plans:
        raise ValueError("the ledger has no plan, so there is no comparison to report")
    plan, runs = plans[-1], [line for line in lines if line["kind"] != "plan"]
    tasks: dict[str, Any] = {}
    used: list[Line] = []
    for cell in plan["cells"]:
        own = [line for line in runs if _of(line, cell)]
        used += own
        tasks.setdefault(cell["task"], {})[cell["method"]] = own
    summary = {
        "seeds": plan["seeds"],
        "level": LEVEL,
        "code": _distinct(line.get("code") for line in used),
        "hardware": _distinct(line.get("hardware") for line in used),
        "versions": _distinct(line.get("versions") for line in used),
        "tasks": {},
    }
    for task, methods in tasks.items():
        cells = {c["method"]: c for c in plan["cells"] if c["task"] == task}
        summary["tasks"][task] = _task(cells, methods, plan["references"][task], plan["seeds"])
    return summary


def finals(lines: Iterable[Line], seeds: int) -> dict[int, Line]:
    """Return the final runs that have figures, by seed. The last line of a seed counts."""
    last = {line["seed"]: line for line in lines if line["kind"] == "final"}
    return {s: last[s] for s in range(seeds) if s in last and last[s]["status"] != "failed"}


def _of(line: Line, cell: Mapping[str, Any]) -> bool:
    return all(line.get(name) == cell[name] for name in ("task", "method", "setup"))


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value is not None and value not in found:
            found.append(value)
    return found


def _task(
    cells: Mapping[str, Any], methods: Mapping[str, list[Line]], reference: str, seeds: int
) -> dict[str, Any]:
    rows = {title: _row(cells[title], own, seeds) for title, own in methods.items()}
    base = finals(methods[reference], seeds)
    done = [row for row in rows.values() if row["seeds"]]
    least = min((row["seconds"] for row in done), default=math.nan)
    target = rows[reference].get("dev_mean", math.nan)
    for title, row in rows.items():
        own = finals(methods[title], seeds)
        if not own:
            continue
        curves = [line["evaluations"] for line in own.values()]
        row["dev_at_equal_time"] = float(np.mean([_at(curve, 2, least) for curve in curves]))
        row["forwards_to_reference"] = _reached(curves, target)
        if title != reference:
            row["difference"] = _difference(own, base)
    any_cell = cells[reference]
    return {
        "reference": reference,
        "metric": next((line["metric"] for line in base.values()), "metric"),
        "forwards": any_cell["forwards"],
        "trials": any_cell["trials"],
        "trial_forwards": any_cell["trial_forwards"],
        "data": any_cell["data"],
        "equal_seconds": least,
        "methods": rows,
    }


def _row(cell: Mapping[str, Any], lines: Sequence[Line], seeds: int) -> dict[str, Any]:
    """What one method was given and reached, without what compares it with others."""
    own = finals(lines, seeds)
    trials = [line for line in lines if line["kind"] == "trial"]
    tuning = [line for line in lines if line["kind"] in ("trial", "calibration")]
    failed = [line["reason"] for line in lines if line["status"] == "failed"]
    row: dict[str, Any] = {
        "setup": cell["setup"],
        "tuned": cell["tuned"],
        "fixed": cell["fixed"],
        "searches_itself": cell["searches_itself"],
        "trials": len(trials),
        "tried": {name: sorted({line[name] for line in trials}) for name in cell["tuned"]},
        "tuning_forwards": sum(
            line.get("forwards", 0) + line.get("judge_forwards", 0) for line in tuning
        ),
        "tuning_seconds": sum(line.get("train_seconds", 0.0) for line in tuning),
        "seeds": sorted(own),
        "failed": failed[-1] if failed else None,
        "diverged": sum(line["status"] == "diverged" for line in own.values()),
    }
    if not own:
        return row
    runs = list(own.values())
    metric = runs[0]["metric"]
    test = [line["test"][metric] for line in runs]
    last = [line["evaluations"][-1] for line in runs]

    def mean(name: str) -> float:
        return float(np.mean([line[name] for line in runs]))

    return row | {
        "lr": _distinct(line["lr"] for line in runs),
        "eps": _distinct(line["eps"] for line in runs if line["lr"]),  # at lr 0 nothing takes noise
        "test": test,
        "test_interval": _interval(over_seeds(test)),
        "dev_mean": float(np.mean([one[4] for one in last])),
        "forwards": mean("forwards"),
        "search_forwards": mean("search_forwards"),
        "steps": mean("steps"),
        "seconds": mean("train_seconds"),
        "peak_memory_mib": mean("peak_memory_mib"),
    }


def _interval(one: Interval) -> dict[str, Any]:
    return {"mean": one.mean, "half": one.half, "df": one.df}


def _difference(own: Mapping[int, Line], base: Mapping[int, Line]) -> dict[str, Any] | None:
    """The difference from the reference on the seeds that both have."""
    both = sorted(own.keys() & base.keys())
    if not both:
        return None
    one = paired(*([runs[seed]["outcomes"] for seed in both] for runs in (own, base)))
    return _interval(one) | {"word": one.word, "seeds": both}


def _at(curve: Sequence[Sequence[float]], what: int, x: float) -> float:
    """Return the metric of the last evaluation at or before x, with a tolerance for the noise of
    clocks; that of the first one if there is none."""
    before = [row[4] for row in curve if row[what] <= 1.02 * x]
    return before[-1] if before else curve[0][4]


def _reached(curves: Sequence[Sequence[Sequence[float]]], target: float) -> float | None:
    """Return after how many passes the mean curve is first at the target or above; None if it never
    is."""
    xs, table = aligned(curves, 1)
    means = zip(xs, table.mean(0), strict=True)
    return next((float(at) for at, value in means if value >= target), None)


def aligned(
    curves: Sequence[Sequence[Sequence[float]]], what: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return x [E], the mean over seeds, and the metric [S, E] at each of E evaluations.

    what: the column of the evaluations that is x. Runs that searched for different numbers of
    passes have evaluations at different steps: their metric is interpolated linearly, on as many
    points of the range that all of them have.
    """
    tables = [np.asarray(curve, dtype=float) for curve in curves]
    if all(np.array_equal(table[:, 0], tables[0][:, 0]) for table in tables):
        whole = np.stack(tables)
        return whole[:, :, what].mean(0), whole[:, :, 4]
    low = max(table[0, what] for table in tables)
    high = min(table[-1, what] for table in tables)
    xs = np.linspace(low, high, max(len(table) for table in tables))
    return xs, np.stack([np.interp(xs, table[:, what], table[:, 4]) for table in tables])


def overall(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by method the difference from the reference on each task, and "all", their mean, for
    methods that have all of them."""
    table: dict[str, dict[str, Any]] = {}
    for task, of in summary["tasks"].items():
        for title, row in of["methods"].items():
            if row.get("difference") is not None:
                table.setdefault(title, {})[task] = row["difference"]
    for found in table.values():
        if len(found) == len(summary["tasks"]) > 1:
            parts = [Interval(one["mean"], one["half"], one["df"]) for one in found.values()]
            one = mean_of(parts)
            found["all"] = _interval(one) | {"word": one.word}
    return table


# Markdown


def markdown(summary: Mapping[str, Any]) -> str:
    """Return table.md."""
    parts = [
        f"## {task}\n\n{_protocol(of, summary)}\n\n{_table(rows_of(of))}{_tuning(of)}"
        for task, of in summary["tasks"].items()
    ]
    if len(summary["tasks"]) > 1:
        parts.append(f"## Differences from MeZO\n\n{_table(overall_rows(summary))}")
    parts.append(_circumstances(summary))
    return "\n".join(parts)


def rows_of(of: Mapping[str, Any]) -> list[list[str]]:
    """Return the head and the rows of the table of one task."""
    metric = of["metric"]
    least = f"{of['equal_seconds']:.3g}"
    head = [
        "method",
        "lr",
        "eps",
        f"test {metric}",
        "difference from MeZO",
        "",
        f"forwards to MeZO's dev {metric}",
        f"dev {metric} after {least} s",
        "seconds",
        "peak memory",
    ]
    return [head] + [_cells(title, row, of["reference"]) for title, row in of["methods"].items()]


def _cells(title: str, row: Mapping[str, Any], reference: str) -> list[str]:
    if not row["seeds"]:
        return [
            title,
            *["-"] * 4,
            f"failed: {row['failed']}" if row["failed"] else "not run yet",
            *["-"] * 4,
        ]
    at = row["forwards_to_reference"]
    difference = row.get("difference")
    word = "" if difference is None else difference["word"]
    notes = [word] if word else []
    if title == reference:
        notes = ["the reference"]
    if row["diverged"]:
        notes.append(f"{row['diverged']} run(s) diverged")
    return [
        title,
        _chosen(row, "lr"),
        _chosen(row, "eps"),
        _pm(row["test_interval"]),
        "" if difference is None else _pm(difference, sign=True),
        "; ".join(notes),
        "-" if at is None else f"{at:.0f}",
        f"{row['dev_at_equal_time']:.3f}",
        f"{row['seconds']:.3g}",
        f"{row['peak_memory_mib']:.0f} MiB",
    ]


def _chosen(row: Mapping[str, Any], name: str) -> str:
    values = [f"{value:.3g}" for value in row[name]]
    if name == "lr" and row["searches_itself"]:  # 0: no weight moves
        values = [f"{value} / T" if float(value) else value for value in values]
    how = " fixed" if name in row["fixed"] else ""
    return (" ".join(values) or "-") + how


def _pm(one: Mapping[str, Any], sign: bool = False) -> str:
    mean = f"{one['mean']:+.3f}" if sign else f"{one['mean']:.3f}"
    half = one["half"]
    return mean if half is None or math.isnan(half) else f"{mean} ± {half:.3f}"


def overall_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return the head and the rows of the table of all tasks."""
    tasks = [*summary["tasks"], "all"]
    rows = []
    for title, found in overall(summary).items():
        cells = [f"{_pm(found[t], True)} {found[t]['word']}" if t in found else "-" for t in tasks]
        rows.append([title, *cells])
    return [["method", *tasks], *rows]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *rest])


def _protocol(of: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Say what every method got."""
    return (
        f"Each run has {of['forwards']} forward passes, a backward pass counting as two, with "
        f"whatever the run itself searches or probes; {summary['seeds']} seeds. lr and eps were "
        f"tuned for each method by {of['trials']} trials of {of['trial_forwards']} forward passes "
        "on the dev loss, with another seed. The test rows were not seen before the end of a "
        f"final run. ± is a {summary['level']:.0%} confidence interval: of the mean, over seeds; "
        "of the difference, over seeds and test rows."
    )


def _tuning(of: Mapping[str, Any]) -> str:
    """Say what was tuned, over which values."""
    rows = [["method", "tuned", "trials", "lr tried", "eps tried", "forwards of the tuning"]]
    for title, row in of["methods"].items():
        tried = [" ".join(f"{v:.3g}" for v in row["tried"].get(n, [])) for n in ("lr", "eps")]
        fixed = [f"{name} fixed at {value:.3g}" for name, value in row["fixed"].items()]
        what = ["nothing: lr is from the curvature"] if row["searches_itself"] else []
        what += [", ".join(row["tuned"])] if row["tuned"] else []
        rows.append(
            [
                title,
                "; ".join(what + fixed),
                str(row["trials"]),
                *tried,
                str(row["tuning_forwards"]),
            ]
        )
    return "\nWhat was tuned:\n\n" + _table(rows)


def _circumstances(summary: Mapping[str, Any]) -> str:
    code = [f"{one['version']} ({one['digest']})" for one in summary["code"]]
    lines = [f"Code: {', '.join(code)}."]
    if len(code) > 1:
        lines.append("The runs are of several versions of the code, which was accepted.")
    lines.append(f"Hardware: {'; '.join(summary['hardware'])}.")
    if len(summary["hardware"]) > 1:
        lines.append("Seconds of different hardware are not comparable.")
    return " ".join(lines) + "\n"
