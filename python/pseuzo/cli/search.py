"""The search for a learning rate by short trials."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pseuzo.cli.folder import LR_FILE, plain
from pseuzo.files import read_json, write_json
from pseuzo.tasks import evaluate
from pseuzo.train.methods import METHODS, ZEROTH_ORDER, default_rate
from pseuzo.train.noise_on import PLACEMENT_FILE

if TYPE_CHECKING:
    from pseuzo.cli.run import Run

EVALUATED = 200  # the number of dev examples of a trial
TRIALS = 10  # the largest number of rates on the way up or down


def search_lr(run: Run, output: Path) -> dict[str, Any]:
    """Find a rate for the run by short trials from the same start. A trial has a tenth of the run's
    steps (20 to 200), and is judged by the loss on at most 200 dev examples.

    Rates go up by a factor of 2 until a trial ends with a larger loss than it started with. A long
    run may diverge at a rate that a short one survives, so the rate with the least loss is chosen
    among those up to a quarter of the largest that survived. The first rate comes from the
    curvature T along the noise, which a few forward passes measure: for a quadratic loss the best
    rate of a step is |g|^2 / (|g|^2 T + 2 g'Hg), nearly 1 / T, and the first trial takes an eighth
    of that. Where a step is not the slope along noise times the rate (first order, evolution,
    zo-adam and others), the first rate is the default, and the factor is 4.
    """
    c = run.c
    steps = min(max(20, c["steps"] // 10), 200)
    model = run.model()
    chosen: dict[str, Any] = {}
    zeroth = c["method"] in ZEROTH_ORDER
    if zeroth or list(c["noise_on"]) == ["auto"]:
        found = run.trainer(model, output, lr=1.0, scale_lr=False, journal=None).find_placement()
        # A run without eps keeps none, as --config refuses it.
        chosen = {"noise_on": found["noise_on"], "eps": found["eps"] if c["eps"] else None}
    if METHODS[c["method"]].rate != "lr":  # not the rate of a step along the slope
        first, factor = default_rate(c["method"], c["mode"]), 4.0
    elif found["curvature"] > 0:
        first, factor = 0.125 / found["curvature"], 2.0
    else:
        raise ValueError(
            "--lr auto: the loss does not curve upwards along the noise "
            f"({found['curvature']:.3g}), so there is no scale to start from; give --lr, or "
            "another --eps"
        )
    own: dict[str, Any] = {"scale_lr": False, "scale_eps": False, "journal": None}
    # What the method refuses of the whole run, such as cycles that it is too short for, is refused
    # here, before the trials. A trial is too short for cycles: its schedule is that of one.
    run.trainer(model, output, lr=1.0, **own, **chosen).create_optimizer()
    trial = own | {"cycles": None, "pseuzo_epochs": None, "eval_every": 0, "save_every": 0}
    trial |= {"keep": "last", "quiet": True, "report_to": (), "resume": None}
    dev = run.part("dev", EVALUATED)
    start = evaluate(model, dev, batch_size=c["eval_batch_size"])["loss"]
    del model
    file, request = output / LR_FILE, plain(c) | chosen
    before = read_json(file) if file.exists() else {}
    trials: dict[float, float] = {}
    if before.get("request") == request:  # a search that was killed has made these
        trials = {
            float(lr): math.inf if loss is None else loss for lr, loss in before["trials"].items()
        }
        print(f"{file}: {len(trials)} trials are done already", flush=True)

    def survives(lr: float) -> bool:
        lr = _rounded(lr)
        if lr not in trials:
            model = run.model()
            run.trainer(model, output, lr=lr, steps=steps, **trial, **chosen).train()
            loss = evaluate(model, dev, batch_size=c["eval_batch_size"])["loss"]
            trials[lr] = loss if math.isfinite(loss) else math.inf  # null in the file
            write_json(file, {"request": request, "trials": trials})
            print(
                f"lr {lr:.2g}: dev loss {loss:.4f} after {steps} steps, {start:.4f} before",
                flush=True,
            )
        return trials[lr] < 1.05 * start

    lr = first
    while not survives(lr) and len(trials) < TRIALS:
        lr /= factor
    while survives(lr) and survives(lr * factor) and len(trials) < TRIALS:
        lr *= factor
    if not survives(lr):
        raise ValueError(
            f"--lr auto: every rate from {min(trials):.2g} to {max(trials):.2g} made the loss "
            "worse; look at the data and the dtype, or give --lr"
        )
    largest = max(rate for rate in trials if survives(rate))
    for rate in (largest / 4, largest / 8):
        survives(rate)
    best = min((rate for rate in trials if rate <= 1.05 * largest / 4), key=trials.__getitem__)
    chosen |= {"lr": best}
    if "noise_on" in chosen:
        write_json(output / PLACEMENT_FILE, found | chosen)
    return {"request": request, "steps": steps, "start": start, "trials": trials, "chosen": chosen}


def _rounded(lr: float) -> float:
    return float(f"{lr:.2g}")
