"""Predicts milliseconds of OPT models from counted instructions and bytes.

python bench/sass_cost.py --predict

No GPU is needed. A time is the larger of arithmetic (cycles of the busiest pipe, as if nothing
waited) and memory (nine tenths of the data sheet's bandwidth), without launches and latencies.
Forwards are matrix products and attention at half of the data sheet's dense bf16 rate, or one read
of the weights. All weights are bf16.
"""

import csv
import os
from collections.abc import Callable

from harness import MODELS, RESULTS, commit

from pseuzo_kernels import NOISES
from pseuzo_kernels.bench.limits import CHIPS, Chip

PREDICTION, ESTIMATE = "prediction, no GPU was used", "estimate, no GPU was used"
TILE = 128  # rows of a matrix product's tile
ROWS, LENGTHS, WINDOW = 16, (64, 256), 14
COLUMNS = (
    "commit", "chip", "model", "params", "what", "noise", "K", "tokens", "ms", "bound", "label",
)  # fmt: skip


def sizes(model: str) -> tuple[int, int]:
    """Return the number of parameters, and how many of them are in the layers. Only the latter
    count in a perturbed pass, which perturbs an embedding only at the rows that it looks up."""
    layers, width, _, embedding = MODELS[model]
    in_layers = layers * (12 * width * width + 13 * width)
    # These belong to the last norm, or to projections from and to the embedding's width.
    rest = 2 * width if embedding == width else 2 * embedding * width
    return in_layers + rest + 50272 * embedding + 2050 * width, in_layers


def forward(chip: Chip, model: str, length: int) -> tuple[float, str]:
    layers, width, _, _ = MODELS[model]
    tokens = ROWS * length
    flops = 2 * sizes(model)[1] * tokens + 4 * layers * width * tokens * length
    return chip.ms(bytes_moved=2 * sizes(model)[0], flops=flops)


def rows_of(
    chip: Chip, model: str, update_costs: dict[str, float], perturb_cost: tuple[float, float]
) -> list[dict]:
    """Return the predictions for a model on a chip.

    update_costs: noise -> (cycles per normal in the loop, cycles around it). perturb_cost: the same
    for a kernel of one seed.
    """
    n, in_layers = sizes(model)
    rows = []

    def add(what: str, ms: tuple[float, str], **more) -> float:
        row = dict(chip=chip.name, model=model, params=n, what=what, ms=ms[0], bound=ms[1])
        rows.append(row | dict(label=PREDICTION) | more)
        return ms[0]

    perturb_ms = chip.ms(in_layers * sum(perturb_cost), 4 * in_layers)
    perturb = add("perturb", perturb_ms, noise="hadamard", K=1)
    entry = ROWS * MODELS[model][3]  # one position with a loss
    window = add("window", chip.ms(bytes_moved=entry * (3 * 2 + 4 * WINDOW)), K=WINDOW)
    forwards = {
        length: add("forward", forward(chip, model, length), tokens=ROWS * length)
        for length in LENGTHS
    }
    for noise in update_costs:
        for K in (1, WINDOW):
            loop, around = update_costs["hadamard" if K == 1 else noise]  # one term needs no sum
            update = add("update", chip.ms(n * (K * loop + around), 4 * n), noise=noise, K=K)
            beyond = perturb + update + window
            add("beyond two forwards", (beyond, ""), noise=noise, K=K)
            for length, one in forwards.items():
                add("step", (2 * one + beyond, ""), noise=noise, K=K, tokens=ROWS * length)
    return rows


def crossover(chip: Chip, noise_cost: float) -> list[dict]:
    """Return the number of tokens up to which a matrix product should make the noise of its
    weights.

    The product would make the noise once for each tile of rows. Making the weights in scratch
    instead reads 2 bytes per parameter and writes 2. If the product hides the reading of its
    weights behind the noise, 2 more bytes count.
    """
    made = chip.ms(noise_cost)[0]
    what, rows = "fused perturbed linear pays up to", []
    for extra in (4, 6):
        tokens = TILE * int(chip.ms(bytes_moved=extra)[0] / made)
        row = dict(chip=chip.name, what=what, noise="hadamard", K=1, tokens=tokens)
        rows.append(row | dict(bound=f"{extra} bytes a parameter", label=ESTIMATE))
    return rows


def markdown(rows: list[dict]) -> str:
    def ms(chip: str, model: str, what: str, **where) -> float:
        where |= dict(chip=chip, model=model, what=what)
        return next(r["ms"] for r in rows if all(r.get(k) == v for k, v in where.items()))

    def line_of(chip: str, model: str, noise: str) -> list[str]:
        at, where = (chip, model), dict(noise=noise, K=WINDOW)
        beyond = ms(*at, "beyond two forwards", **where)
        cells = [
            ms(*at, "perturb"),
            ms(*at, "update", noise=noise, K=1),
            ms(*at, "update", **where),
        ]
        cells += [ms(*at, "window"), beyond]
        cells += [ms(*at, "forward", tokens=ROWS * length) for length in LENGTHS]
        share = 100 * beyond / ms(*at, "step", tokens=ROWS * 256, **where)
        numbers = [f"{c:.3g}" for c in cells]
        return [model, f"{sizes(model)[0] / 1e9:.3g} G", *numbers, f"{share:.0f} %"]

    head = ["model", "parameters", "perturb", "update K = 1", "K = 14", "window"]
    head += ["beyond two forwards, K = 14"]
    head += [f"one forward, {ROWS} x {length}" for length in LENGTHS]
    head += ["beyond, of the step at 16 x 256"]
    lines = []
    for noise in dict.fromkeys(r["noise"] for r in rows if r["what"] == "update"):
        for chip in CHIPS:
            lines.append(f'\n**{chip.name}, "{noise}", bf16, ms ({PREDICTION})**\n')
            lines += [_line(head), _line(["---"] * len(head))]
            models = [model for model in MODELS if model != "tiny"]
            lines += [_line(line_of(chip.name, model, noise)) for model in models]
    what = "**A perturbed linear layer that makes its own noise** could pay up to"
    lines.append(f"\n{what} ({ESTIMATE}):\n")
    lines += ["| | " + " | ".join(c.name for c in CHIPS) + " |", "| --- |" + " --- |" * len(CHIPS)]
    estimates = [r for r in rows if r["label"] == ESTIMATE]
    for bound in dict.fromkeys(r["bound"] for r in estimates):
        tokens = [str(r["tokens"]) for r in estimates if r["bound"] == bound]
        lines.append(_line([f"tokens in a batch, scratch at {bound}", *tokens]))
    return "\n".join(lines).strip()


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


NOTE = """\
Predictions, made without a GPU, from counted machine instructions and bytes
(`python bench/sass_cost.py --predict`; bench/predict.py says how). They are lower bounds: launches
and latencies come on top, and on an A100, whose FP32 pipe is half as wide as the count assumes, up
to a fifth of the arithmetic."""


def predict(cost: Callable, one: str, many: str) -> None:
    """Write predicted.csv and predicted.md.

    cost: the function of sass_cost.py; one, many: the names of the kernels for a tensor and for a
    list of them."""
    rows = []
    for chip in CHIPS:
        update = {}
        for noise in [kind for kind in NOISES if kind.startswith("hadamard")]:
            c = cost(many, chip.arch, dtype="bf16", noise=noise, stochastic=True)
            update[noise] = (c.cycles_per_normal, c.around_per_normal)
        c = cost(one, chip.arch, dtype="bf16", hash_in_kernel=True)
        perturb = (c.cycles_per_normal, c.around_per_normal)
        for model in MODELS:
            rows += rows_of(chip, model, update, perturb) if model != "tiny" else []
        c = cost(one, chip.arch, dtype="fp32", hash_in_kernel=True, has_x=False)
        rows += crossover(chip, c.cycles_per_normal + c.around_per_normal)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS / "predicted.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for row in rows:
            ms = {"ms": f"{row['ms']:.4f}"} if "ms" in row else {}
            writer.writerow(dict(commit=commit()) | row | ms)
    text = f"{NOTE}\n\n{markdown(rows)}\n"
    (RESULTS / "predicted.md").write_text(text)
    print(f"\n{text}\n{os.path.relpath(RESULTS)}/predicted.csv and .md")
