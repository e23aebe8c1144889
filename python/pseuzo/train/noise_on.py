"""Decides which weights take noise, and lr and eps for them: by args.noise_on, or by a probe.

The result of a probe is kept in the output folder, since a resumed run must not probe again.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pseuzo.files import read_json, write_json
from pseuzo.models import placement, probe
from pseuzo.optim.together import Together
from pseuzo.train.arguments import PseuZOTrainingArguments

PLACEMENT_FILE = "noise_on.json"
# The arguments for which a probe's result holds.
REQUEST = ("method", "noise_on", "learning_rate", "eps", "noise", "scale_lr", "scale_eps")

Losses = Callable[[int], list[Callable[[], Tensor]]]  # n -> the losses of n batches, as closures


def decide(
    model: nn.Module,
    args: PseuZOTrainingArguments,
    find: Callable[[], dict[str, Any]],
    together: Together,
) -> tuple[dict[nn.Parameter, float], float, float]:
    """Return the parameters that take noise (first-order methods: that are trained), lr and eps.

    find: finds them by a probe. It is called if args ask for one and this output folder has none:
    on every rank, as the ranks draw the batches together, but the decision is that of rank 0.
    """
    if args.noise_on != ["auto"] and not (args.scale_lr or args.scale_eps):
        return placement.place(model, args.noise_on), args.learning_rate, args.eps
    file = Path(str(args.output_dir)) / PLACEMENT_FILE
    request = {name: getattr(args, name) for name in REQUEST}
    if not together.of_root(file.exists):
        # Data loaders draw from the generator, and dropout must be the same as without a probe.
        with torch.random.fork_rng(devices=[]), together.one_speaks():
            found = find()
        together.of_root(lambda: _write(file, found | {"request": request}))
    keys = "noise_on", "lr", "eps", "request"
    decided = together.of_root(lambda: read_json(file, *keys))
    if decided["request"] != request:
        other = next(name for name in REQUEST if decided["request"].get(name) != request[name])
        raise ValueError(
            f"{file} holds the decision for {other} {decided['request'].get(other)}, not "
            f"{request[other]}; choose another output folder, or delete that file"
        )
    return placement.place(model, decided["noise_on"]), decided["lr"], decided["eps"]


def _write(file: Path, found: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found)


def find(model: nn.Module, args: PseuZOTrainingArguments, losses: Losses) -> dict[str, Any]:
    """See PseuZOTrainer.find_placement."""
    where, lr, eps, table = list(args.noise_on), args.learning_rate, args.eps, []
    how = "lr and eps as given"
    if where == ["auto"]:
        groups = placement.groups_of(model)
        what = "probing where noise pays"
        rows = _probe(model, args, losses, groups, args.probe_forwards, what)
        where = probe.choose(rows)
        table = [asdict(row) | {"cost": row.cost, "chosen": row.name in where} for row in rows]
        _print(table)
    everywhere = dict.fromkeys((p for p in model.parameters() if p.requires_grad), 1.0)
    here = placement.place(model, where)
    both = {"here": here} if here == everywhere else {"here": here, "everywhere": everywhere}
    forwards = max(args.probe_forwards // 3, 10)
    rows = _probe(model, args, losses, both, forwards, "probing the curvature")
    found = {row.name: row for row in rows}
    if len(found) == 2 and (args.scale_lr or args.scale_eps):
        scaled = probe.equal_change(lr, eps, found["everywhere"], found["here"])
        how = scaled.how
        if args.scale_lr:
            how = f"{how}; lr times {scaled.lr / lr:.3g} is {scaled.lr:.3g}"
            lr = scaled.lr
        if args.scale_eps:
            how = f"{how}; eps times {scaled.eps / eps:.3g} is {scaled.eps:.3g}"
            eps = scaled.eps
        print(f"noise on {', '.join(where)}: {how}", flush=True)
    return {
        "noise_on": where,
        "lr": lr,
        "eps": eps,
        "how": how,
        "curvature": found["here"].cost[0],
        "table": table,
    }


def _probe(
    model: nn.Module,
    args: PseuZOTrainingArguments,
    losses: Losses,
    groups: Mapping[str, Any],
    forwards: int,
    what: str,
) -> list[probe.Row]:
    per_batch = 1 + 2 * len(groups)
    n = max(3, forwards // per_batch)
    total = n * per_batch
    with tqdm(
        total=total, desc=what, unit="forward", disable=args.disable_tqdm, leave=False
    ) as bar:
        return probe.probe(
            model,
            groups,
            losses(n),
            eps=args.eps,
            noise=args.noise,
            seed=args.seed,
            progress=bar.update,
        )


def _print(table: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Where noise pays: slope^2 / curvature, by group of weights")
    for column in ("group", "weights", "slope^2", "curvature", "ratio", "noise"):
        shown.add_column(column, justify="left" if column == "group" else "right")
    for row in table:
        cost, error = row["cost"]
        shown.add_row(
            row["name"],
            f"{row['parameters']:.0f}",
            f"{row['slope2']:.3g} ± {row['slope2_error']:.1g}",
            f"{cost:.3g} ± {error:.1g}",
            f"{row['slope2'] / cost:.2g}" if cost > 0 else "-",
            "yes" if row["chosen"] else "",
        )
    Console().print(shown)
