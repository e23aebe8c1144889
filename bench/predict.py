"""Milliseconds of OPT models, predicted from counted instructions and bytes: python bench/sass_cost.py --predict

Predictions, made without a GPU: the larger of arithmetic (cycles of the busiest pipe, nothing waits) and memory (nine
tenths of the data sheet's bandwidth); no launches, no latencies. Forwards: matrix products and attention at half of the
data sheet's dense bf16 rate, or the weights read once. All weights are bf16.
"""

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass

from harness import MODELS, RESULTS, commit

from pseuzo_kernels import NOISES

PREDICTION, ESTIMATE = "prediction, no GPU was used", "estimate, no GPU was used"
MEMORY, MATRIX = 0.9, 0.5  # shares of the data sheet's rates
TILE = 128  # rows of a matrix product's tile
ROWS, LENGTHS, WINDOW = 16, (64, 256), 14
COLUMNS = (
    "commit",
    "chip",
    "model",
    "params",
    "what",
    "noise",
    "K",
    "tokens",
    "ms",
    "bound",
    "label",
)


@dataclass(frozen=True)
class Chip:
    """Terabytes/s and dense bf16 teraflops/s of the data sheet."""

    name: str
    arch: int
    multiprocessors: int
    ghz: float
    terabytes: float
    teraflops: float

    def ms(
        self, instructions: float = 0, bytes_moved: float = 0, flops: float = 0
    ) -> tuple[float, str]:
        """The longest of the three, and which it is. instructions: of one lane each."""
        times = {
            "arithmetic": instructions / (128 * self.multiprocessors * self.ghz * 1e6),
            "memory": bytes_moved / (MEMORY * self.terabytes * 1e9),
            "matrix products": flops / (MATRIX * self.teraflops * 1e9),
        }
        bound = max(times, key=times.get)
        return times[bound], bound


CHIPS = (
    Chip("A100 SXM 80 GB", 80, 108, 1.41, 2.039, 312),
    Chip("H100 SXM", 90, 132, 1.755, 3.35, 989),
    Chip("H200", 90, 132, 1.755, 4.8, 989),
)


def sizes(model: str) -> tuple[int, int]:
    """Parameters, and those of them in the layers: an embedding is perturbed at the rows that it looks up."""
    layers, width, _, embedding = MODELS[model]
    in_layers = layers * (12 * width * width + 13 * width)
    if embedding == width:
        rest = 2 * width  # the last norm
    else:
        rest = 2 * embedding * width  # projections from and to the embedding's width
    return in_layers + rest + 50272 * embedding + 2050 * width, in_layers


def forward(chip: Chip, model: str, length: int) -> tuple[float, str]:
    layers, width, _, _ = MODELS[model]
    tokens = ROWS * length
    flops = 2 * sizes(model)[1] * tokens + 4 * layers * width * tokens * length
    return chip.ms(bytes_moved=2 * sizes(model)[0], flops=flops)


def rows_of(
    chip: Chip, model: str, update_costs: dict[str, float], perturb_cost: tuple[float, float]
) -> list[dict]:
    """update_costs: noise -> (cycles a normal in the loop, around it); perturb_cost: the same of one seed."""
    n, in_layers = sizes(model)
    rows = []

    def add(what: str, ms: tuple[float, str], **more) -> float:
        row = dict(
            chip=chip.name,
            model=model,
            params=n,
            what=what,
            ms=ms[0],
            bound=ms[1],
            label=PREDICTION,
        )
        rows.append(row | more)
        return ms[0]

    perturb = add(
        "perturb", chip.ms(in_layers * sum(perturb_cost), 4 * in_layers), noise="hadamard", K=1
    )
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
    """Up to how many tokens a matrix product could make the noise of its weights itself, once for each tile of rows, in
    less time than making the weights in scratch takes: 2 bytes a parameter read and 2 written, and 2 more if those that
    the product reads count too, as hidden behind its noise."""
    made = chip.ms(noise_cost)[0]
    common = dict(
        chip=chip.name,
        what="fused perturbed linear pays up to",
        noise="hadamard",
        K=1,
        label=ESTIMATE,
    )
    return [
        common
        | dict(
            tokens=TILE * int(chip.ms(bytes_moved=extra)[0] / made),
            bound=f"{extra} bytes a parameter",
        )
        for extra in (4, 6)
    ]


def markdown(rows: list[dict]) -> str:
    def ms(chip: str, model: str, what: str, **where) -> float:
        where |= dict(chip=chip, model=model, what=what)
        return next(r["ms"] for r in rows if all(r.get(k) == v for k, v in where.items()))

    head = [
        "model",
        "parameters",
        "perturb",
        "update K = 1",
        "K = 14",
        "window",
        "beyond two forwards, K = 14",
    ]
    head += [f"one forward, {ROWS} x {length}" for length in LENGTHS] + [
        "beyond, of the step at 16 x 256"
    ]
    out = []
    for noise in dict.fromkeys(r["noise"] for r in rows if r["what"] == "update"):
        where = dict(noise=noise, K=WINDOW)
        for chip in CHIPS:
            out.append(f'\n**{chip.name}, "{noise}", bf16, ms ({PREDICTION})**\n')
            out += ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
            for model in [m for m in MODELS if m != "tiny"]:
                at = (chip.name, model)
                beyond = ms(*at, "beyond two forwards", **where)
                cells = [
                    ms(*at, "perturb"),
                    ms(*at, "update", noise=noise, K=1),
                    ms(*at, "update", **where),
                ]
                cells += [
                    ms(*at, "window"),
                    beyond,
                    *(ms(*at, "forward", tokens=ROWS * t) for t in LENGTHS),
                ]
                share = 100 * beyond / ms(*at, "step", tokens=ROWS * 256, **where)
                cells = [
                    model,
                    f"{sizes(model)[0] / 1e9:.3g} G",
                    *(f"{c:.3g}" for c in cells),
                    f"{share:.0f} %",
                ]
                out.append("| " + " | ".join(cells) + " |")
    out.append(
        f"\n**A perturbed linear layer that makes its own noise** could pay up to ({ESTIMATE}):\n"
    )
    out += ["| | " + " | ".join(c.name for c in CHIPS) + " |", "| --- |" + " --- |" * len(CHIPS)]
    for bound in dict.fromkeys(r["bound"] for r in rows if r["label"] == ESTIMATE):
        tokens = [str(r["tokens"]) for r in rows if r["label"] == ESTIMATE and r["bound"] == bound]
        out.append(f"| tokens in a batch, scratch at {bound} | " + " | ".join(tokens) + " |")
    return "\n".join(out).strip()


NOTE = """\
Predictions, made without a GPU, from counted machine instructions and bytes (`python bench/sass_cost.py --predict`;
how: bench/predict.py). Lower bounds: launches and latencies come on top, and on an A100, whose FP32 pipe is half as
wide as the count assumes, up to a fifth of the arithmetic."""


def predict(cost: Callable, one: str, many: str) -> None:
    """cost: of sass_cost.py; one and many: the names of the kernels for a tensor and for a list of them."""
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
