"""Makes tables.md and PNG plots of the CSV files in bench/results: python bench/report.py

The last of repeated measurements counts. Nothing is measured or predicted here. Targets are checked
on rows of the GPUs that they name, never on rows of a CPU. --add DIR first adds the rows of other
folders, such as those from a GPU machine.
"""

import argparse
import collections
import math
import re
from pathlib import Path

from cases import OURS, PUBLISHED, Rows, cases_of
from harness import COMMON, RESULTS, append, read
from plots import Groups, bars_of_methods, bars_of_steps, plot_bars, plot_growth
from targets import TARGETS

KEYS = {
    "add_noise": ("op", "impl", "dtype", "n", "K", "shape"),
    "steps": ("model", "dtype", "rows", "tokens", "impl", "part"),
    "growth": ("against", "x", "what"),
    "methods": ("model", "dtype", "mode", "rows", "tokens", "method", "options"),
}


def rows_of(name: str) -> dict[str, Rows]:
    """Return the last row of each measurement, by device (with its threads)."""
    found: dict[str, dict[tuple, dict[str, str]]] = collections.defaultdict(dict)
    for row in read(RESULTS / f"{name}.csv"):
        device = row["device"] + (f", {row['threads']} thread(s)" if row["threads"] else "")
        found[device][tuple(row.get(key, "") for key in KEYS[name])] = row
    return {device: list(rows.values()) for device, rows in found.items()}


def table(rows: list[dict]) -> str:
    columns = [c for c in rows[0] if c not in COMMON and any(row[c] for row in rows)]
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(row[c] or "-" for c in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def split(rows: Rows) -> str:
    """Return a line per model and shape: our step, its parts, and the other ways."""
    lines = []
    for (model, dtype, batch, tokens), case in cases_of(rows).items():
        line = {"model": model, "batch": f"{batch} x {tokens}", "dtype": dtype}
        line["two forwards, ms"] = case.ms("inference", "two forwards")
        line["one of twice the rows"] = case.ms("inference", "one forward of twice the rows")
        line |= {part: case.ms(OURS[0], part) for part in ("perturb", "head", "window", "update")}
        for impl in OURS:
            ours, beyond, memory = case.ms(impl, "step"), case.beyond(impl), case.memory(impl)
            name = "step" + impl.removeprefix(OURS[0])
            line |= {name: ours, f"{name}: beyond": beyond}
            line[f"{name}: % of it"] = beyond and 100 * beyond / ours
            line[f"{name}: memory, of inference"] = memory and memory[1]
        for impl in ("MeZO as published", PUBLISHED, "FO SGD", "FO Adam"):
            line[impl] = "does not fit" if case.lost(impl) else case.ms(impl, "step")
            line[f"{impl}: memory, of inference"] = (memory := case.memory(impl)) and memory[1]
        lines.append({k: f"{v:.4g}" if isinstance(v, float) else v or "" for k, v in line.items()})
    return table(lines)


def predictions() -> str:
    """Return the text that sass_cost.py --predict wrote, and plot its numbers."""
    text, rows = RESULTS / "predicted.md", read(RESULTS / "predicted.csv")
    if not (text.exists() and rows):
        return ""
    groups: Groups = collections.defaultdict(list)
    # plot -> the rows that it shows
    drawn = {
        "forward": {"tokens": "4096"},
        "perturb": {},
        "update": {"K": "14", "noise": "hadamard"},
    }
    rows = [r for r in rows if r["what"] in drawn and drawn[r["what"]].items() <= r.items()]
    for chip, model in dict.fromkeys((r["chip"], r["model"]) for r in rows if r["model"]):
        bar = {}
        for r in rows:
            if (r["chip"], r["model"]) == (chip, model):
                name, times = ("two forwards", 2) if r["what"] == "forward" else (r["what"], 1)
                bar[name] = times * float(r["ms"]) / (float(r["params"]) / 1e9)
        groups[chip].append((model, bar))
    xlabel = "ms a billion parameters, 16 x 256, K = 14"
    plot_bars(groups, "prediction, no GPU was used", "predicted.png", xlabel=xlabel)
    return f"{text.read_text().strip()}\n\n![predicted](predicted.png)"


def take_in(folder: Path) -> None:
    """Append the rows of a folder that are not known yet."""
    for name in KEYS:
        known = read(RESULTS / f"{name}.csv")
        rows = read(folder / f"{name}.csv")
        new = [row for row in rows if not any(row.items() <= old.items() for old in known)]
        if new:
            append(RESULTS / f"{name}.csv", new)
        print(f"{folder / name}.csv: {len(new)} new rows")


def section(name: str, device: str, rows: Rows) -> str:
    """Return the rows of a benchmark on a device, as a plot and tables."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    file = f"{name}-{slug}.png"
    commands = "; ".join(sorted({f"`{row['command']}` at {row['commit']}" for row in rows}))
    parts = [f"## {name}: {device}", commands, f"![{name}]({file})"]
    if name == "growth":
        parts.append("Fits: " + "; ".join(plot_growth(rows, device, file)) + ".")
    elif name == "steps":
        plot_bars(bars_of_steps(rows), device, file, xlabel="ms (median)")
        parts.append(split(rows))
    elif name == "methods":
        seconds, memory = bars_of_methods([row for row in rows if row["mode"] == "full"])
        plot_bars(seconds, device, file, xlabel="s a step (median)")
        plot_bars(memory, device, f"memory-{slug}.png", xlabel="MB beyond a forward pass")
        parts.append(f"![memory](memory-{slug}.png)")
    else:
        groups: Groups = collections.defaultdict(list)
        for op in ("copy", "noise", "perturb", "update"):
            for row in rows:
                if row["op"] == op and row["K"] in ("0", "1", "14"):
                    label = op if op == "copy" else f"{op}, K = {row['K']}"
                    ms = float(row["ms_p50"])
                    groups[row["dtype"]].append((f"{label}: {row['impl']}", {"ms": ms}))
        shortest = min((ms["ms"] for bars in groups.values() for _, ms in bars), default=1.0)
        left = 10 ** math.floor(math.log10(shortest))
        plot_bars(groups, device, file, xscale="log", xlim=(left, None), xlabel="ms (median)")
    return "\n\n".join([*parts, table(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--add", metavar="DIR", type=Path, nargs="*", default=[], help="take in their rows first"
    )
    for folder in parser.parse_args().add:
        take_in(folder)

    sections, checked = [], collections.defaultdict(list)
    for name in KEYS:
        for device, rows in rows_of(name).items():
            if name in TARGETS:
                checked[device] += TARGETS[name](rows, device)
            sections.append(section(name, device, rows))
    if predicted := predictions():
        sections.append(f"## Predictions\n\n{predicted}")
    for device, targets in checked.items():
        if targets:
            lines = [f"| {' | '.join(target)} |" for target in targets]
            head = f"**Targets**, {device}\n\n| target | measured | |\n| --- | --- | --- |"
            text = "\n".join([head, *lines])
            print(text)
            sections.insert(0, text)
    if not any(checked.values()):
        sections.insert(
            0,
            "No target has been checked: they are for an H100 or H200, and there are no rows of "
            "one here.",
        )
    title = "# Measurements\n\nMade by `python bench/report.py` from the CSV files here."
    (RESULTS / "tables.md").write_text("\n\n".join([title, *sections]) + "\n")
    print(f"{RESULTS / 'tables.md'} and {len(list(RESULTS.glob('*.png')))} plots")


if __name__ == "__main__":
    main()
