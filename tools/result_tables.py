"""Writes the tables of measurements on the pages of docs/: python tools/result_tables.py

    <!-- table: NAME, from FILE -->
    ...
    <!-- end of the table -->

What is between two such lines is replaced by what TABLES[NAME] makes of FILE, whose path is
relative to the root: a CSV file with a header, JSON, or JSON lines, one run in each. A test
compares the pages with the files, so that a page never has a number that its file lacks.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
PLACE = re.compile(
    r"(?P<head><!-- table: (?P<name>[\w-]+), from (?P<file>\S+) -->\n).*?"
    r"(?P<end><!-- end of the table -->)",
    re.DOTALL,
)
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Return the rows of a file of measurements."""
    text = path.read_text()
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """Return a table of Markdown. head: the names of the columns, between bars."""
    lines = [f"| {head} |", "|---" * (head.count(" | ") + 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def digits(value: float, n: int = 3) -> str:
    """Return a number with n significant digits, never as a power of ten."""
    size = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, n - size)}f}"


def share(value: float) -> str:
    """Return an accuracy as .912."""
    return f"{value:.3f}".removeprefix("0")


def latest(rows: list[Row], *keys: str) -> dict[tuple[str, ...], Row]:
    """Return the last row of each measurement: a benchmark appends to its file."""
    return {tuple(row[key] for key in keys): row for row in rows}


def by_seed(rows: list[Row], *keys: str) -> dict[tuple[str, ...], dict[str, Row]]:
    """Return the last rows of each case, by seed in order of the seeds."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[key] for key in keys), {})[row["seed"]] = row
    return {case: dict(sorted(runs.items())) for case, runs in cases.items()}


def demo(summaries: list[Row]) -> str:
    """summaries: what `pseuzo demo --seed N` writes to summary.json, in order of the seeds."""
    lines = []
    for name, first in summaries[0]["methods"].items():
        each = [summary["methods"][name]["test_accuracy_after"] for summary in summaries]
        lr = re.sub(r"\.?0*e-0", "e-", f"{first['lr']:.5e}")
        title = f"{first['title']}, lr {lr}"
        lines.append([title, share(fmean(each)), " ".join(map(share, each))])
    return table("method | mean | seeds", lines)


def from_scratch(rows: list[Row], networks: tuple[str, ...]) -> str:
    lines = []
    for (network, method, epochs), runs in by_seed(rows, "network", "method", "epochs").items():
        if network in networks:
            each = [float(row["accuracy"]) for row in runs.values()]
            name = method if epochs == "40" else f"{method}, {epochs} epochs"
            seeds, passes = " ".join(map(share, each)), runs["0"]["forwards"]
            lines.append(
                ([network] * (len(networks) > 1)) + [name, share(fmean(each)), seeds, passes]
            )
    head = "method | mean | seeds | forward passes"
    return table(f"network | {head}" if len(networks) > 1 else head, lines)


def noise_op(rows: list[Row]) -> str:
    """Rows of the Xeon with AVX-512 but for one, which says so."""
    found = latest(rows, "device", "op", "impl", "dtype", "K", "n", "shape")

    def ms(op: str, impl: str, dtype: str = "float32", K: int = 0, isa: str = "avx512") -> float:
        key = (f"Intel(R) Xeon(R) Processor ({isa})", op, impl, dtype, str(K), "16777216", "")
        return float(found[key]["ms_p50"])

    def line(name: str, dtype: str, op: str, impl: str, K: int, isa: str = "avx512") -> list[str]:
        time, copy = ms(op, impl, dtype, K, isa), ms("copy", "torch copy_", dtype, 0, isa)
        loop = "MeZO-style torch loop"
        times = digits(ms(op, loop, dtype, K, isa) / time, 2) if op == "update" else ""
        return [name, digits(time), times, digits(time / copy, 2)]

    return table(
        " | ms | times faster than the torch loop | copies of the tensor",
        [
            ["`copy_`, fp32", digits(ms("copy", "torch copy_")), "", "1"],
            line("perturb out of place, fp32", "float32", "perturb", "pseuzo, out of place", 1),
            line("update K = 1, fp32", "float32", "update", "pseuzo", 1),
            line("update K = 14, fp32", "float32", "update", "pseuzo", 14),
            line(
                "update K = 14, fp32, a pass per seed",
                "float32",
                "update",
                "pseuzo, a pass per seed",
                14,
            ),
            line(
                "update K = 14, fp32, AVX2 (`PSEUZO_CPU_ISA=avx2`, a run of its own)",
                "float32",
                "update",
                "pseuzo",
                14,
                "avx2",
            ),
            line("update K = 14, bf16, stochastic rounding", "bfloat16", "update", "pseuzo", 14),
        ],
    )


STEPS = {
    ("inference", "two forwards"): "two forwards, inference",
    ("pseuzo PseuZO", "step"): "pseuzo, PseuZO step, K = 14",
    ("pseuzo MeZO", "step"): "pseuzo, MeZO step",
    ("MeZO as published", "step"): "MeZO as published: in place, four passes of `torch.normal`",
    ("PseuZO as published", "step"): "PseuZO as published: a pass per entry of the window",
    ("FO SGD", "step"): "backpropagation, SGD",
    ("FO Adam", "step"): "backpropagation, Adam",
}


def steps(rows: list[Row]) -> str:
    found = latest([row for row in rows if row["model"] == "opt-125m"], "impl", "part")
    seconds = {name: float(found[key]["ms_p50"]) / 1e3 for key, name in STEPS.items()}
    floor = next(iter(seconds.values()))
    lines = [[name, digits(s), f"{s / floor:.2f}"] for name, s in seconds.items()]
    lines[0][2] = "1"
    return table(" | s | relative to two plain forwards", lines)


def machine_code(rows: list[Row]) -> str:
    found = {row["kernel"]: row for row in rows if row["arch"] == 90}
    lines = []
    for noise in ("hadamard", "hadamard-fp16", "rademacher", "normal"):
        row = found[f"add_noise_many_kernel {noise} bf16 stochastic"]
        registers = str(row["registers"])
        if blocks := found.get(f"add_noise_many_kernel {noise} blocks bf16 stochastic"):
            registers += f" (K > 16: {blocks['registers']})"
        name = f'"{noise}"' + ", fp32 sums" * (noise == "hadamard")
        count = f"{row['instructions_per_normal']:.2f}"
        lines.append([name, count, registers, row["spill_accesses"]])
    head = "noise | instructions a normal, in the loop over seeds | registers | spills"
    return table(head, lines)


def memory(rows: list[Row]) -> str:
    lines = []
    for (method,), row in latest([row for row in rows if row["mode"] == "full"], "method").items():
        numbers = [float(row[key]) for key in ("step_ms", "beyond_ms", "peak_mb", "kept_mb")]
        step, beyond, peak, kept = numbers
        passes = f"{float(row['forwards']):.3g}"
        times = f"{float(row['times_forwards']):.2f}"
        seconds = [f"{ms / 1e3:.2f}" for ms in (step, beyond)]
        lines.append([f"`{method}`", passes, *seconds, times, f"{peak:.0f}", f"{kept:.0f}"])
    head = "method | forwards | s a step | beyond | relative to the forwards"
    return table(f"{head} | MB at most | MB between steps", lines)


def comparison(lines: list[Row]) -> str:
    """The table of each task of a ledger of `pseuzo compare`."""
    from pseuzo.compare.report import rows_of, summarise

    found = [rows_of(task) for task in summarise(lines)["tasks"].values()]
    return "\n\n".join(table(" | ".join(head), rows) for head, *rows in found)


def comparison_overall(lines: list[Row]) -> str:
    """The differences of all tasks of such a ledger."""
    from pseuzo.compare.report import overall_rows, summarise

    head, *rows = overall_rows(summarise(lines))
    return table(" | ".join(head), rows)


TABLES: dict[str, Callable[[Any], str]] = {
    "demo": demo,
    "digits": lambda rows: from_scratch(rows, ("mlp", "conv")),
    "digits-small": lambda rows: from_scratch(rows, ("small",)),
    "noise-op": noise_op,
    "steps": steps,
    "machine-code": machine_code,
    "memory": memory,
    "comparison": comparison,
    "comparison-overall": comparison_overall,
}


def filled(text: str) -> str:
    """Return a page with its tables made anew."""

    def fill(place: re.Match[str]) -> str:
        rows = read(ROOT / place["file"])
        return f"{place['head']}\n{TABLES[place['name']](rows)}\n\n{place['end']}"

    return PLACE.sub(fill, text)


def main() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text()
        if (new := filled(text)) != text:
            page.write_text(new)
            print(f"{page.relative_to(ROOT)}: tables written")


if __name__ == "__main__":
    main()
