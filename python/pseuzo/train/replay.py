"""Replay of a journal: base weights + journal = trained weights, bit for bit."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.optim.seeds import mask_seed
from pseuzo.train.journal_file import (
    JournalError,
    Record,
    fingerprint,
    frozen_fingerprint,
    read_journal,
)
from pseuzo_kernels.ops import add_noise_masked_list_, add_noise_steps_
from pseuzo_kernels.reference import add_noise_steps_ as one_by_one

STEPS_AT_ONCE = 64  # steps that one pass over the weights applies


@torch.no_grad()
def replay(
    path: str | os.PathLike,
    model: nn.Module | Mapping[str, Tensor],
    *,
    until: int | None = None,
    salvage: bool = False,
    progress: Callable[[Record], Any] | None = None,
) -> int:
    """Apply a journal to the base weights, in place; return the number of the next step.

    model: a module or {name: tensor} with the weights that the run started from (the same bits, on
    any device). until: stop before that step; the file may be damaged from there on. salvage: stop
    where the file is damaged, with a warning that says what is lost. progress: called with every
    record, for a progress bar. Raises JournalError, with the weights untouched, if they are not the
    base, or if a record is damaged or missing.
    """
    header, records = read_journal(path, until=until, salvage=salvage)
    params = _base(header, model)
    wanted = list(records)  # read everything before writing anything
    for record in wanted:
        if len(record.groups) != header["groups"]:
            raise JournalError(
                f"{path}: the record of step {record.step} has {len(record.groups)} groups"
            )
    for first in range(0, len(wanted), STEPS_AT_ONCE):
        some = wanted[first : first + STEPS_AT_ONCE]
        _apply(some, header, params)
        if progress is not None:
            for record in some:
                progress(record)
    return wanted[-1].step + 1 if wanted else header["first_step"]


def _base(header: dict[str, Any], model: nn.Module | Mapping[str, Tensor]) -> list[Tensor]:
    """Return the weights that the journal changes. JournalError if the run started from others."""
    have = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
    entries = header["params"]
    missing = [entry["name"] for entry in entries if entry["name"] not in have]
    if missing:
        raise JournalError(
            f"the base model lacks {missing[0]!r} and {len(missing) - 1} more of the journal's "
            "weights"
        )
    trained = {entry["name"]: have[entry["name"]] for entry in entries}
    for entry, p in zip(entries, trained.values(), strict=True):
        dtype = str(p.dtype).removeprefix("torch.")
        if list(p.shape) != entry["shape"] or dtype != entry["dtype"]:
            raise JournalError(
                f"{entry['name']} is {list(p.shape)} {dtype} in the base model, but "
                f"{entry['shape']} {entry['dtype']} in the run"
            )
    if fingerprint(trained) != header["base_sha256"]:
        raise JournalError("the base model's weights are not those that the run started from")
    frozen = header["frozen_sha256"]  # None: the optimizer had bare parameters
    if frozen is not None and isinstance(model, nn.Module):
        if frozen_fingerprint(model, trained.values()) != frozen:
            raise JournalError(
                "the weights that the run did not train differ between the base model and the run"
            )
    return [p.detach() for p in trained.values()]


def _apply(records: list[Record], header: dict[str, Any], params: list[Tensor]) -> None:
    """Apply several updates, as the optimizer did, in one pass over the weights of a group."""
    unused = [set(record.unused) for record in records]
    for number in range(header["groups"]):
        for device in {p.device for p in params}:
            mine = [
                i
                for i, entry in enumerate(header["params"])
                if entry["group"] == number and params[i].device == device
            ]
            if not mine:
                continue
            seeds, coefs, keeps, scales = [], [], [], []
            for record, left_alone in zip(records, unused, strict=True):
                lr, weight_decay, noise_scale, maximize = record.groups[number]
                seeds.append(record.seeds)
                coefs.append(record.coefs * (lr if maximize else -lr))
                keeps += [1.0 - lr * weight_decay] * len(mine)
                scales += [0.0 if record.skipped or i in left_alone else noise_scale for i in mine]
            steps: Callable[..., None] = add_noise_steps_
            if masks := header.get("masks"):
                limits = [masks["limits"][i] for i in mine]
                steps = partial(one_by_one, op=_masked(records, limits, masks, device))
            steps(
                [params[i] for i in mine],
                torch.cat(seeds).to(device),
                torch.cat(coefs).to(device),
                [len(record.seeds) for record in records],
                [header["params"][i]["stream"] for i in mine],
                keeps,
                scales,
                header["noise"],
                header["rounding"] == "stochastic",
                [record.rounding_seed for record in records],
            )


def _masked(
    records: list[Record], limits: list[float], masks: dict[str, Any], device: torch.device
) -> Callable[..., None]:
    """Return an op that applies the updates of the records, one at each call.

    The masks of small weights depend on the weights before each update, so that no update can be
    made together with the next.
    """
    of_steps = iter(records)

    def apply(*arguments: Any) -> None:
        seed, step = None, next(of_steps).step
        if masks["seed"] is not None:
            number = mask_seed(masks["seed"], step, masks["renewed"])
            seed = torch.full((1,), number, dtype=torch.int64, device=device)
        add_noise_masked_list_(*arguments, None, limits, seed)

    return apply
