"""Tables (tables.md) and plots (PNG) of bench/results from its CSV files, one per device: python bench/report.py

Of repeated measurements the last counts. Nothing is measured or predicted here; targets are checked on rows of the GPUs
that they name, never on rows of a CPU. --add DIR takes in the rows of other folders first, as a GPU machine sends them.
"""

import argparse
import collections
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import COMMON, RESULTS, append, fits, floor_of, read

KEYS = {
    "add_noise": ("op", "impl", "dtype", "n", "K", "shape"),
    "steps": ("model", "dtype", "rows", "tokens", "impl", "part"),
    "growth": ("against", "x", "what"),
}
OURS = ("pseuzo PseuZO", "pseuzo PseuZO, captured")
PUBLISHED = "PseuZO as published"
Rows = list[dict[str, str]]


def rows_of(name: str) -> dict[str, Rows]:
    """The last row of each measurement, by device (with its threads)."""
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


class Case(dict):
    """The rows of one model and shape, by (impl, part)."""

    def ms(self, impl: str, part: str) -> float | None:
        row = self.get((impl, part))
        return float(row["ms_p50"]) if row else None

    def beyond(self, impl: str) -> float | None:
        """ms of a step beyond two forwards."""
        step, floor = self.ms(impl, "step"), self.ms(floor_of(impl), "two forwards")
        return None if step is None or floor is None else step - floor

    def memory(self, impl: str) -> tuple[float, float] | None:
        """Peak in GB, and over that of inference: of what is allocated in a call, or, with graphs, of all that is held
        from the first call on, since their memory is allocated only while they are recorded."""
        kind = "reserved_gb" if "captured" in impl else "peak_gb"
        peaks = [
            self.get(at, {}).get(kind) for at in ((impl, "step"), ("inference", "two forwards"))
        ]
        return (float(peaks[0]), float(peaks[0]) / float(peaks[1])) if all(peaks) else None

    def best(self) -> str | None:
        """Our faster way."""
        return min(
            (impl for impl in OURS if self.beyond(impl) is not None),
            key=lambda i: self.ms(i, "step"),
            default=None,
        )

    def lost(self, impl: str) -> bool:
        """It did not fit."""
        parts = [part for at, part in self if at == impl]
        return bool(parts) and all("does not fit" in part for part in parts)


def cases_of(rows: Rows) -> dict[tuple[str, ...], Case]:
    cases: dict[tuple[str, ...], Case] = collections.defaultdict(Case)
    for row in rows:
        cases[tuple(row[k] for k in ("model", "dtype", "rows", "tokens"))][
            row["impl"], row["part"]
        ] = row
    return cases


def split(rows: Rows) -> str:
    """Our step in parts, and beside the other ways: a line a model and shape."""
    lines = []
    for (model, dtype, batch, tokens), case in cases_of(rows).items():
        floor = case.ms("inference", "two forwards")
        line = {
            "model": model,
            "batch": f"{batch} x {tokens}",
            "dtype": dtype,
            "two forwards, ms": floor,
        }
        line["one of twice the rows"] = case.ms("inference", "one forward of twice the rows")
        line |= {part: case.ms(OURS[0], part) for part in ("perturb", "head", "window", "update")}
        for impl in OURS:
            ours, beyond, memory = case.ms(impl, "step"), case.beyond(impl), case.memory(impl)
            name = "step" + impl.removeprefix(OURS[0])
            line |= {
                name: ours,
                f"{name}: beyond": beyond,
                f"{name}: % of it": beyond and 100 * beyond / ours,
            }
            line[f"{name}: memory, of inference"] = memory and memory[1]
        for impl in ("MeZO as published", PUBLISHED, "FO SGD", "FO Adam"):
            line[impl] = "does not fit" if case.lost(impl) else case.ms(impl, "step")
            line[f"{impl}: memory, of inference"] = (memory := case.memory(impl)) and memory[1]
        lines.append({k: f"{v:.4g}" if isinstance(v, float) else v or "" for k, v in line.items()})
    return table(lines)


def judged(rows: Rows, device: str) -> bool:
    """Targets are for an H100 or H200."""
    return bool(re.search("H100|H200", device)) and not any(row["threads"] for row in rows)


Target = tuple[str, str, str]  # what we set out to reach, what was measured, and whether it is met


def target(
    text: str, measured: dict[str, float | None], met: Callable[[float], bool], unit: str = ""
) -> Target:
    """measured: by where it was measured."""
    if not measured or None in measured.values():
        return text, "not measured", "-"
    values = ", ".join(f"{value:.3g}{unit} ({where})" for where, value in measured.items())
    return text, values, "met" if all(map(met, measured.values())) else "NOT MET"


def kernel_targets(rows: Rows, device: str) -> list[Target]:
    """Of the rows of add_noise."""
    if not judged(rows, device):
        return []

    def of(column: str, **where: str) -> dict[str, float | None]:
        where |= dict(dtype="bfloat16")
        found = [row for row in rows if where.items() <= row.items() and row.get(column)]
        return {f"{row['n']} elements": float(row[column]) for row in found}

    update = of("pct_of_predicted", op="update", impl="pseuzo", K="14")
    perturb = of("pct_of_copy", op="perturb", impl="pseuzo, out of place")
    return [
        target(
            "update, bf16, K = 14: at least 80 % of the predicted rate",
            update,
            lambda x: x >= 80,
            " %",
        ),
        target(
            "perturb, bf16: at least 85 % of the bandwidth of copy_",
            perturb,
            lambda x: x >= 85,
            " %",
        ),
    ]


def step_targets(rows: Rows, device: str) -> list[Target]:
    """Of the rows of steps."""
    if not judged(rows, device):
        return []
    cases = {k: c for k, c in cases_of(rows).items() if k[1:3] == ("bfloat16", "16")}

    def of(model: str, tokens: str, what) -> dict[str, float | None]:
        case = cases.get((model, "bfloat16", "16", tokens), Case())
        best = case.best()
        where = f"16 x {tokens}" + (best or "").removeprefix(OURS[0])
        return {where: what(case, best) if best else None}

    def times_less(case: Case, best: str) -> float | None:
        """Overhead of the published way over ours; one below what can be told counts as a microsecond."""
        published = case.beyond(PUBLISHED)
        return published and published / max(case.beyond(best), 1e-3)

    def times_faster(case: Case, best: str) -> float | None:
        published = case.ms(PUBLISHED, "step")
        return published and published / case.ms(best, "step")

    def both(what) -> dict[str, float | None]:
        return of("opt-1.3b", "64", what) | of("opt-1.3b", "256", what)

    def share(case: Case, best: str) -> float:
        return 100 * case.beyond(best) / case.ms(best, "step")

    found = [
        target(
            "OPT-1.3B, K = 14: at most 7 ms beyond two forwards",
            both(Case.beyond),
            lambda ms: ms <= 7,
            " ms",
        ),
        target(
            "at most 25 % of the step at 16 x 256",
            of("opt-1.3b", "256", share),
            lambda x: x <= 25,
            " %",
        ),
        target(
            "at least 15 times less than PseuZO as published",
            both(times_less),
            lambda x: x >= 15,
            "x",
        ),
        target(
            "whole step at least 5 times faster at 16 x 64",
            of("opt-1.3b", "64", times_faster),
            lambda x: x >= 5,
            "x",
        ),
    ]
    for impl, how in zip(OURS, ("", ", captured"), strict=True):
        memory = {
            f"{model}, 16 x {tokens}": peak[1]
            for (model, _, _, tokens), case in cases.items() if (peak := case.memory(impl))
        }  # fmt: skip
        worst = dict([max(memory.items(), key=lambda item: item[1])]) if memory else {}
        text = f"peak memory at most 1.15 times inference, full tuning{how}"
        found.append(target(text, worst, lambda x: x <= 1.15, "x at most"))
    for model, text, gb, on in (
        ("opt-13b", "OPT-13B full tuning on one 80 GB card", 80, ""),
        ("opt-30b", "OPT-30B full tuning on an H200", 141, "H200"),
    ):
        here = {k[3]: c for k, c in cases.items() if k[0] == model} if on in device else {}
        if any(case.lost(OURS[0]) or case.lost("inference") for case in here.values()):
            found.append((text, "does not fit", "NOT MET"))
        elif on in device:
            peaks = {
                f"16 x {tokens}": m[0] for tokens, c in here.items() if (m := c.memory(OURS[0]))
            }
            found.append(target(text, peaks, lambda peak, gb=gb: peak <= gb, " GB"))
    return found


TARGETS = {"add_noise": kernel_targets, "steps": step_targets}


def plot_growth(rows: Rows, device: str, file: str) -> list[str]:
    """Log-log plots with fits; returns the fits as sentences."""
    kinds = list(dict.fromkeys(row["against"] for row in rows))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(5 * len(kinds), 4), squeeze=False, layout="constrained"
    )
    axes, sentences = dict(zip(kinds, axes[0], strict=True)), []
    for (kind, what), (a, b) in fits(rows).items():
        found = [
            (float(r["x"]), float(r["ms_p50"]))
            for r in rows
            if (r["against"], r["what"]) == (kind, what)
        ]
        xs, ys = zip(*sorted(found), strict=True)
        sentences.append(f"{what}: {a:.3g} ms + {b:.3g} ms per {'K' if kind == 'K' else kind[:-1]}")
        (points,) = axes[kind].loglog(xs, ys, "o", label=sentences[-1])
        axes[kind].loglog(xs, [a + b * x for x in xs], color=points.get_color())
    for kind, ax in axes.items():
        ax.set(xlabel=kind, ylabel="ms")
        ax.legend(fontsize=6)
    save(figure, device, file)
    return sentences


def plot_bars(
    groups: dict[str, list[tuple[str, dict[str, float]]]], title: str, file: str, **axis
) -> None:
    """A panel a group, a bar a label, stacked from named parts."""
    heights = [1 + len(bars) for bars in groups.values()]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(9, 1 + 0.22 * sum(heights)),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    parts = list(dict.fromkeys(part for bars in groups.values() for _, bar in bars for part in bar))
    for (name, bars), ax in zip(groups.items(), axes[:, 0], strict=True):
        labels, left = [label for label, _ in bars], [0.0] * len(bars)
        for i, part in enumerate(parts):
            values = [bar.get(part, 0.0) for _, bar in bars]
            ax.barh(labels, values, left=left, color=f"C{i}", label=part)
            left = [x + v for x, v in zip(left, values, strict=True)]
        ax.invert_yaxis()
        ax.tick_params(labelsize=7)
        ax.set_title(name, fontsize=8)
        ax.set(**axis)
    if len(parts) > 1:
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=len(parts),
            fontsize=7,
        )
    save(figure, title, file)


def save(figure, title: str, file: str) -> None:
    figure.suptitle(title, fontsize=9)
    figure.savefig(RESULTS / file, dpi=120)
    plt.close(figure)


def bars_of_steps(rows: Rows) -> dict[str, list[tuple[str, dict[str, float]]]]:
    """Ours in parts; what the parts leave of the step is its own part."""
    groups: dict[str, list[tuple[str, dict[str, float]]]] = collections.defaultdict(list)
    for (model, dtype, batch, tokens), case in cases_of(rows).items():
        for (impl, part), row in case.items():
            if part not in ("step", "two forwards") or not row["ms_p50"]:
                continue
            bar, whole = {}, float(row["ms_p50"])
            if impl == OURS[0] and case.ms(impl, "perturb") is not None:
                bar = {"forwards": 2 * case.ms(impl, "forward")}
                bar |= {p: case.ms(impl, p) for p in ("perturb", "head", "window", "update")}
            name = "forwards" if part == "two forwards" else "rest, or not split"
            groups[model].append(
                (
                    f"{dtype} {batch} x {tokens} {impl}",
                    bar | {name: max(0, whole - sum(bar.values()))},
                )
            )
    return groups


def predictions() -> str:
    """The text that sass_cost.py --predict wrote, and a plot of its numbers."""
    text, rows = RESULTS / "predicted.md", read(RESULTS / "predicted.csv")
    if not (text.exists() and rows):
        return ""
    groups: dict[str, list[tuple[str, dict[str, float]]]] = collections.defaultdict(list)
    parts = {
        "forward": {"tokens": "4096"},
        "perturb": {},
        "update": {"K": "14", "noise": "hadamard"},
    }
    for chip, model in dict.fromkeys((r["chip"], r["model"]) for r in rows if r["model"]):
        bar = {}
        for r in rows:
            if (
                (r["chip"], r["model"]) == (chip, model)
                and r["what"] in parts
                and parts[r["what"]].items() <= r.items()
            ):
                name, times = ("two forwards", 2) if r["what"] == "forward" else (r["what"], 1)
                bar[name] = times * float(r["ms"]) / (float(r["params"]) / 1e9)
        groups[chip].append((model, bar))
    plot_bars(
        groups,
        "prediction, no GPU was used",
        "predicted.png",
        xlabel="ms a billion parameters, 16 x 256, K = 14",
    )
    return f"{text.read_text().strip()}\n\n![predicted](predicted.png)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--add",
        metavar="DIR",
        type=Path,
        nargs="*",
        default=[],
        help="take in the rows of these too",
    )
    args = parser.parse_args()
    for folder in args.add:
        for name in KEYS:
            known = read(RESULTS / f"{name}.csv")
            new = [
                row
                for row in read(folder / f"{name}.csv")
                if not any(row.items() <= old.items() for old in known)
            ]
            if new:
                append(RESULTS / f"{name}.csv", new)
            print(f"{folder / name}.csv: {len(new)} new rows")

    parts, checked = [], collections.defaultdict(list)
    for name in KEYS:
        for device, rows in rows_of(name).items():
            if name in TARGETS:
                checked[device] += TARGETS[name](rows, device)
            file = f"{name}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.png"
            commands = "; ".join(sorted({f"`{row['command']}` at {row['commit']}" for row in rows}))
            head = f"## {name}: {device}\n\n{commands}\n\n![{name}]({file})"
            if name == "growth":
                parts.append(
                    f"{head}\n\nFits: "
                    + "; ".join(plot_growth(rows, device, file))
                    + f".\n\n{table(rows)}"
                )
            elif name == "steps":
                plot_bars(bars_of_steps(rows), device, file, xlabel="ms (median)")
                parts.append(f"{head}\n\n{split(rows)}\n\n{table(rows)}")
            else:
                bars = [
                    (f"{r['op']} {r['dtype']} K={r['K']} {r.get('shape', '')}: {r['impl']}", r)
                    for r in rows
                ]
                bars = {"": [(label, {"ms": float(r["ms_p50"])}) for label, r in bars]}
                plot_bars(bars, device, file, xscale="log", xlabel="ms (median)")
                parts.append(f"{head}\n\n{table(rows)}")
    if predicted := predictions():
        parts.append(f"## Predictions\n\n{predicted}")
    for device, lines in checked.items():
        if lines:
            table_of = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            text = (
                f"**Targets**, {device}\n\n| target | measured | |\n| --- | --- | --- |\n{table_of}"
            )
            print(text)
            parts.insert(0, text)
    if not any(checked.values()):
        parts.insert(
            0,
            "No target has been checked: they are for an H100 or H200, and there are no rows of one here.",
        )
    title = "# Measurements\n\nMade by `python bench/report.py` from the CSV files here."
    (RESULTS / "tables.md").write_text("\n\n".join([title, *parts]) + "\n")
    print(f"{RESULTS / 'tables.md'} and {len(list(RESULTS.glob('*.png')))} plots")


if __name__ == "__main__":
    main()
