"""Decides which weights take noise, with which lr and eps: as given, scaled by a probe, or by a
race.

What was found is kept in the output folder, since a resumed run must not search again.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from pseuzo.files import read_json, write_json
from pseuzo.models import placement, probe
from pseuzo.optim.curvature import RELATIVE_LR
from pseuzo.optim.together import Together
from pseuzo.train.arguments import PseuZOTrainingArguments

FOUND_FILE = "found.json"
# The arguments for which what was found holds.
REQUEST = (
    *("method", "noise_on", "learning_rate", "eps", "noise", "scale_lr", "scale_eps"),
    *("find_lr", "search_share", "readout", "seed", "global_batch_size"),
)

Losses = Callable[[int], list[Callable[[], Any]]]  # n -> the losses of n batches, as closures


@dataclass(frozen=True)
class Found:
    """What a run trains by. forwards: the passes that finding it took of the run's budget."""

    noise_on: list[str]
    lr: float
    eps: float
    forwards: int = 0


def decide(
    args: PseuZOTrainingArguments,
    model: nn.Module,
    find: Callable[[], dict[str, Any]],
    together: Together,
    races: bool,
) -> Found:
    """Return what the run trains by. races: whether a race decides it.

    find: finds it by passes. It is called if it is asked for and this output folder has nothing:
    on every rank, as the ranks draw the batches together, but the decision is that of rank 0.
    """
    if args.find_lr and not races:  # the rate and eps are known without a pass
        return Found(args.noise_on, RELATIVE_LR, eps_of(args, model, args.noise_on))
    still = args.learning_rate == 0
    if still or not (races or args.scale_lr or args.scale_eps):
        return Found(args.noise_on, args.learning_rate, args.eps)
    file = Path(str(args.output_dir)) / FOUND_FILE
    request = {name: getattr(args, name) for name in REQUEST}
    known = together.of_root(file.exists)
    if not known:
        with _own_generators(args.device), together.one_speaks():
            found = find()
        together.of_root(lambda: _write(file, found | {"request": request}))
    keys = "noise_on", "lr", "eps", "forwards"
    decided = together.of_root(lambda: read_json(file, *keys, "request"))
    made = request | decided["request"]  # older versions noted less
    if other := next((name for name in REQUEST if made[name] != request[name]), None):
        raise ValueError(
            f"{file} holds the decision for {other} {decided['request'].get(other)}, not "
            f"{request[other]}; choose another output folder, or delete that file"
        )
    if known and together.is_root:
        print(f"noise on {', '.join(decided['noise_on'])}, as {file} says", flush=True)
    return Found(**{key: decided[key] for key in keys})


@contextmanager
def _own_generators(device: torch.device) -> Iterator[None]:
    """A block after which data loaders, collators and dropout draw as if it had not been."""
    python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)


def eps_of(args: PseuZOTrainingArguments, model: nn.Module, where: list[str]) -> float:
    """eps for noise on `where`, known without a pass: if args scale it, a perturbation is as long
    as one of all weights, but eps at most ten times as large."""
    if not args.scale_eps:
        return args.eps
    whole = probe.size_of(placement.place(model, ["all"]))
    return args.eps * probe.longer(whole, probe.size_of(placement.place(model, where)))


def _write(file: Path, found: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found)


def scaled(model: nn.Module, args: PseuZOTrainingArguments, losses: Losses) -> dict[str, Any]:
    """lr and eps, as far as args say so, scaled to the placement in args by a short probe; the
    curvature T along its noise; and how many passes that took, which do not count as the run's."""
    where, lr, eps = list(args.noise_on), args.learning_rate, args.eps
    how = "lr and eps as given"
    everywhere, here = placement.place(model, ["all"]), placement.place(model, where)
    groups = {"here": here} if here == everywhere else {"here": here, "everywhere": everywhere}
    each = 1 + 2 * len(groups)
    closures = losses(max(3, args.probe_forwards // each))
    found = {row.name: row for row in probed(model, args, closures, groups)}
    if len(found) == 2 and (args.scale_lr or args.scale_eps):
        found_scaled = probe.equal_change(lr, eps, found["everywhere"], found["here"])
        how = found_scaled.how
        if args.scale_lr:
            how = f"{how}; lr times {found_scaled.lr / lr:.3g} is {found_scaled.lr:.3g}"
            lr = found_scaled.lr
        if args.scale_eps:
            how = f"{how}; eps times {found_scaled.eps / eps:.3g} is {found_scaled.eps:.3g}"
            eps = found_scaled.eps
        print(f"noise on {', '.join(where)}: {how}", flush=True)
    decided = {"noise_on": where, "lr": lr, "eps": eps, "how": how, "forwards": 0}
    return decided | {"curvature": found["here"].cost[0], "probed": each * len(closures)}


def probed(
    model: nn.Module,
    args: PseuZOTrainingArguments,
    closures: list[Callable[[], Any]],
    groups: Mapping[str, Any],
) -> list[probe.Row]:
    """Probe the curvature along noise on each group, one direction for each closure."""
    total = len(closures) * (1 + 2 * len(groups))
    what, off = "probing the curvature", args.disable_tqdm
    with tqdm(total=total, desc=what, unit="forward", disable=off, leave=False) as bar:
        return probe.probe(
            model,
            groups,
            closures,
            eps=args.eps,
            noise=args.noise,
            seed=args.seed,
            progress=bar.update,
        )
