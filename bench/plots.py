"""Plots measured rows and predictions."""

import collections

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cases import OURS, Rows, cases_of
from harness import RESULTS, fits
from matplotlib.ticker import NullFormatter

WIDE = 7.5  # inches, of which a page shows about 7
SMALL = 8  # points of text, for this width

# panel -> (label, part -> length) of its bars
Groups = dict[str, list[tuple[str, dict[str, float]]]]


def plot_growth(rows: Rows, device: str, file: str) -> list[str]:
    """Draw log-log plots with fits, and return the fits as sentences."""
    kinds = list(dict.fromkeys(row["against"] for row in rows))
    figure, axes = plt.subplots(
        len(kinds), 1, figsize=(WIDE, 2.6 * len(kinds)), squeeze=False, layout="constrained"
    )
    axes, sentences = dict(zip(kinds, axes[:, 0], strict=True)), []
    for (kind, what), (a, b) in fits(rows).items():
        line = [r for r in rows if (r["against"], r["what"]) == (kind, what)]
        points = sorted((float(r["x"]), float(r["ms_p50"])) for r in line)
        xs, ys = zip(*points, strict=True)
        sentences.append(f"{what}: {a:.3g} ms + {b:.3g} ms per {'K' if kind == 'K' else kind[:-1]}")
        (dots,) = axes[kind].loglog(xs, ys, "o", label=sentences[-1])
        axes[kind].loglog(xs, [a + b * x for x in xs], color=dots.get_color())
    for kind, ax in axes.items():
        ax.set(xlabel=kind, ylabel="ms")
        ax.xaxis.set_minor_formatter(NullFormatter())  # labels between powers of ten overlap
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.legend(fontsize=SMALL)
    save(figure, device, file)
    return sentences


def plot_bars(groups: Groups, title: str, file: str, **axis) -> None:
    """Save a plot with a panel per group and a bar per label, stacked from named parts."""
    heights = [1 + len(bars) for bars in groups.values()]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(WIDE, 0.6 + 0.22 * sum(heights)),
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
        ax.set_ylim(len(bars) - 0.4, -0.6)
        ax.tick_params(labelsize=SMALL)
        ax.set_title(name, fontsize=SMALL + 1)
        ax.set(**axis)
    if len(parts) > 1:
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(parts), fontsize=SMALL)
    save(figure, title, file)


def save(figure, title: str, file: str) -> None:
    figure.suptitle(title, fontsize=SMALL + 2)
    figure.savefig(RESULTS / file, dpi=120)
    plt.close(figure)


def bars_of_steps(rows: Rows) -> Groups:
    """Split our bars into parts. The rest of the step is a separate part."""
    groups: Groups = collections.defaultdict(list)
    for (model, dtype, batch, tokens), case in cases_of(rows).items():
        for (impl, part), row in case.items():
            if part not in ("step", "two forwards") or not row["ms_p50"]:
                continue
            bar, whole = {}, float(row["ms_p50"])
            if impl == OURS[0] and case.ms(impl, "perturb") is not None:
                bar = {"forwards": 2 * case.ms(impl, "forward")}
                bar |= {p: case.ms(impl, p) for p in ("perturb", "head", "window", "update")}
            name = "forwards" if part == "two forwards" else "rest, or not split"
            bar |= {name: max(0, whole - sum(bar.values()))}
            groups[model].append((f"{dtype} {batch} x {tokens} {impl}", bar))
    return groups


def bars_of_methods(rows: Rows) -> tuple[Groups, Groups]:
    """Return the times of a step and the memory beyond inference, by method."""
    seconds, memory = [], []
    for row in rows:
        beyond, step = (float(row[key]) / 1e3 for key in ("beyond_ms", "step_ms"))
        seconds.append((row["method"], {"forwards": step - beyond, "beyond": beyond}))
        kept, peak = float(row["kept_mb"]), float(row["peak_mb"])
        memory.append((row["method"], {"between steps": kept, "at most": peak - kept}))
    title = f"{rows[0]['model']}, {rows[0]['rows']} x {rows[0]['tokens']}"
    return {title: seconds}, {title: memory}
