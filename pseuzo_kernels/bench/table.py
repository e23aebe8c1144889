"""The numbers that follow from times, and a table and a plot of them."""

from collections.abc import Sequence
from html import escape
from math import log
from typing import Any

from pseuzo_kernels.bench.timing import quantile

Row = dict[str, Any]


def row_of(
    times: Sequence[float],
    *,
    n: int,
    itemsize: int,
    K: int,
    passes: int,
    copy_ms: float,
    limit_ms: float | None = None,
) -> Row:
    """The numbers of a way that took these times, in ms.

    gb_per_s: of the bytes that the op has to move, n * itemsize * passes, whatever the way moves.
    pct_of_copy: of the bandwidth of a copy of n elements, which took copy_ms and reads and writes
    all of them. pct_of_limit: limit_ms over the median; None if there is no limit_ms.
    """
    p20, p50, p80 = (quantile(times, q) for q in (0.2, 0.5, 0.8))
    return {
        "ms_p20": p20,
        "ms_p50": p50,
        "ms_p80": p80,
        "calls": len(times),
        "gb_per_s": passes * n * itemsize / p50 / 1e6,
        "gnormals_per_s": K * n / p50 / 1e6,
        "pct_of_copy": 50 * passes * copy_ms / p50,
        "pct_of_limit": None if limit_ms is None else 100 * limit_ms / p50,
    }


def number(value: float | None) -> str:
    """Three digits, or - for None and 0."""
    return f"{value:.3g}" if value and value < 1000 else f"{value:.0f}" if value else "-"


HEAD = ("op", "", "ms", "20 % .. 80 %", "calls", "GB/s", "% of copy", "% of limit", "Gnormals/s")


def table(rows: Sequence[Row]) -> str:
    """The rows as text, a part for each dtype."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        part = [row for row in rows if row["dtype"] == dtype]
        cells = [list(HEAD)]
        for row in part:
            spread = f"{number(row['ms_p20'])} .. {number(row['ms_p80'])}"
            numbers = [number(row[key]) for key in ("gb_per_s", "pct_of_copy", "pct_of_limit")]
            first = [row["op"], row["impl"], number(row["ms_p50"]), spread, str(row["calls"])]
            cells.append([*first, *numbers, number(row["gnormals_per_s"])])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines.append(f"\n{dtype}, {part[0]['n']} elements")
        for line in cells:
            left = [f"{cell:<{width}}" for cell, width in zip(line[:2], widths[:2], strict=True)]
            right = [f"{cell:>{width}}" for cell, width in zip(line[2:], widths[2:], strict=True)]
            lines.append("  ".join([*left, *right]))
    return "\n".join(lines)


LEFT, WIDE, HIGH = 270, 340, 16  # of the plot, in pixels: labels, bars, a line


def svg(rows: Sequence[Row], title: str) -> str:
    """A plot of the rows as SVG: bars of times relative to a copy's, logarithmic; ours are dark."""
    copies = {r["dtype"]: r["ms_p50"] for r in rows if r["op"] == "copy"}
    ratios = [row["ms_p50"] / copies[row["dtype"]] for row in rows]
    low, high = min(0.1, *ratios), max(10.0, *ratios)

    def across(ratio: float) -> float:
        return WIDE * log(ratio / low) / log(high / low)

    def text(x: float, y: float, words: str, anchor: str = "start") -> str:
        return f'<text x="{x:.0f}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'

    parts, y = (
        [
            text(8, 18, title),
            text(8, 36, "time in copies of the same tensor, logarithmic; dark: pseuzo"),
        ],
        48,
    )
    for i, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        if i and row["dtype"] != rows[i - 1]["dtype"]:
            y += HIGH
        fill = "#1f4e79" if row["impl"] == "pseuzo" else "#b8c4ce"
        label = f"{row['op']}, {row['impl']}, {row['dtype']}"
        parts.append(text(LEFT - 6, y + 11, label, "end"))
        box = f'x="{LEFT}" y="{y}" width="{max(across(ratio), 1):.1f}" height="{HIGH - 4}"'
        parts.append(f'<rect {box} fill="{fill}"/>')
        shown = f"{number(ratio)} ({number(row['ms_p50'])} ms)"
        parts.append(text(LEFT + across(ratio) + 5, y + 11, shown))
        y += HIGH
    one = LEFT + across(1)
    line = f'<line x1="{one:.1f}" x2="{one:.1f}" y1="44" y2="{y}" stroke="#c00" stroke-width="1"/>'
    size = f'width="{LEFT + WIDE + 110}" height="{y + 10}"'
    style = 'font-family="sans-serif" font-size="11"'
    back = '<rect width="100%" height="100%" fill="white"/>'
    inside = "\n".join([back, *parts, line])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{inside}\n</svg>\n'
