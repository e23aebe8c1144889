"""Tables (tables.md) and plots (PNG) of bench/results from its CSV files, one per device: python bench/report.py

Of repeated measurements the last counts. Nothing is measured or predicted here.
"""

import collections
import csv
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import COMMON, RESULTS

KEYS = {
    "add_noise": ("op", "impl", "dtype", "n", "K"),
    "steps": ("model", "params", "dtype", "rows", "tokens", "impl", "part"),
    "growth": ("against", "x", "what"),
}


def rows_of(name: str) -> dict[str, list[dict[str, str]]]:
    """The last row of each measurement, by device (with its threads)."""
    path = RESULTS / f"{name}.csv"
    found: dict[str, dict[tuple, dict[str, str]]] = collections.defaultdict(dict)
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                device = row["device"] + (f", {row['threads']} thread(s)" if row["threads"] else "")
                found[device][tuple(row[key] for key in KEYS[name])] = row
    return {device: list(rows.values()) for device, rows in found.items()}


def table(rows: list[dict[str, str]]) -> str:
    columns = [c for c in rows[0] if c not in COMMON and any(row[c] for row in rows)]
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(row[c] or "-" for c in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares of the relative error of a + b x, a and b not negative."""
    w = [(x, y, 1 / y**2) for x, y in points]
    s, sx, sxx = (sum(v * x**k for x, _, v in w) for k in range(3))
    sy, sxy = (sum(v * y * x**k for x, y, v in w) for k in range(2))
    det = s * sxx - sx * sx
    if det > 0:
        a, b = (sy * sxx - sx * sxy) / det, (s * sxy - sx * sy) / det
        if a >= 0 and b >= 0:
            return a, b
        if b < 0:
            return sy / s, 0.0
    return 0.0, sxy / sxx


def plot_growth(rows: list[dict[str, str]], device: str, file: str) -> list[str]:
    """Log-log plots with fits; returns the fits as sentences."""
    kinds = list(dict.fromkeys(row["against"] for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 4), squeeze=False)
    fits = []
    for kind, ax in zip(kinds, axes[0], strict=True):
        for what in dict.fromkeys(row["what"] for row in rows if row["against"] == kind):
            points = sorted(
                (float(r["x"]), float(r["ms_p50"])) for r in rows if (r["against"], r["what"]) == (kind, what)
            )
            a, b = fit(points)
            fits.append(f"{what}: {a:.4g} ms + {b:.4g} ms a unit of {kind}")
            xs = [x for x, _ in points]
            (line,) = ax.loglog(xs, [y for _, y in points], "o", label=what)
            ax.loglog(xs, [a + b * x for x in xs], color=line.get_color())
        ax.set(xlabel=kind, ylabel="ms")
        ax.legend(fontsize=7)
    save(figure, device, file)
    return fits


def plot_bars(bars: list[tuple[str, float]], device: str, file: str) -> None:
    figure, ax = plt.subplots(figsize=(8, 1 + 0.3 * len(bars)))
    ax.barh([label for label, _ in bars], [ms for _, ms in bars])
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="ms (median)")
    save(figure, device, file)


def save(figure, device: str, file: str) -> None:
    figure.suptitle(device, fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / file, dpi=120)
    plt.close(figure)


def main() -> None:
    parts = ["# Measurements\n\nMade by `python bench/report.py` from the CSV files here."]
    for name in KEYS:
        for device, rows in rows_of(name).items():
            file = f"{name}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.png"
            commands = sorted({f"`{row['command']}` at {row['commit']}" for row in rows})
            parts.append(f"## {name}: {device}\n\n{'; '.join(commands)}\n\n![{name}]({file})\n\n{table(rows)}")
            if name == "growth":
                parts.append("Fits: " + "; ".join(plot_growth(rows, device, file)) + ".")
            elif name == "steps":
                steps = [r for r in rows if r["part"] in ("step", "two forwards")]
                bars = [(f"{r['model']} {r['rows']}x{r['tokens']} {r['impl']}", float(r["ms_p50"])) for r in steps]
                plot_bars(bars, device, file)
            else:
                bars = [(f"{r['op']} {r['dtype']} K={r['K']}: {r['impl']}", float(r["ms_p50"])) for r in rows]
                plot_bars(bars, device, file)
    (RESULTS / "tables.md").write_text("\n\n".join(parts) + "\n")
    print(f"{RESULTS / 'tables.md'} and {len(list(RESULTS.glob('*.png')))} plots")


if __name__ == "__main__":
    main()
