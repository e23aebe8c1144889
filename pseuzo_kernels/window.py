"""EmaWindow and its op: c_k = momentum^age_k * <do_k, grad> / eps for every entry k of a window.

The op is one launch on a GPU (csrc/window/window.cu), one pass over the entries on a CPU
(csrc/window/cpu.cpp), and elsewhere `reference.window_step`, which defines what is correct. Source:
PseuZO (NeurIPS 2025), the EMA of Jacobians.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pseuzo_kernels.checks import DTYPES, check_count, signed64
from pseuzo_kernels.triton.tables import capturing

lib = torch.library.Library("pseuzo", "FRAGMENT")
lib.define(
    "window_step(Tensor(a!) values, Tensor(b!) seeds, Tensor(c!) groups, Tensor(d!) counts, "
    "Tensor(e!) skipped, Tensor? o0, Tensor o1, Tensor grad, Tensor? group, Tensor? loss, "
    "SymInt seed, SymInt slot, SymInt used, float momentum, float eps) -> (Tensor, Tensor, Tensor)"
)


def _window_step_fake(values, seeds, groups, counts, skipped, *inputs):
    used = inputs[7]
    return seeds.new_empty(used), values.new_empty(used), values.new_empty(1)


torch.library.register_fake("pseuzo::window_step", _window_step_fake, lib=lib)


class Ring(NamedTuple):
    """The memory of a window's entries, one slot an entry: one slot more than the window holds."""

    values: Tensor  # [slots, R, P, D] fp32: rows of output changes, or their means over a group
    seeds: Tensor  # [slots] int64
    groups: Tensor  # [slots, R] int64
    counts: Tensor  # [slots, R] int32: rows of the batch that a row stands for; 0: it is not read


RING_DTYPES = {
    "values": torch.float32,
    "seeds": torch.int64,
    "groups": torch.int64,
    "counts": torch.int32,
}


class Held(NamedTuple):
    """What a window holds. A step replaces all of it at once."""

    ring: Ring | None = None
    slot: int = -1  # of the newest entry; the one of age a is at (slot - a) mod slots
    used: int = 0  # entries, at most the window's capacity
    grouped: bool | None = None
    skipped: Tensor | None = None  # [] int64
    found_inf: Tensor | None = None  # [1] fp32


class Proposal(NamedTuple):
    """The result of a step that the window has not taken over yet; see EmaWindow.commit."""

    seeds: Tensor  # [n] int64, the newest last
    coefs: Tensor  # [n] fp32
    found_inf: Tensor  # [1] fp32
    held: Held

    @property
    def present(self) -> Tensor:
        """[n] bool: False for an entry that was dropped, because its own step was not finite."""
        ring, slot, used = self.held.ring, self.held.slot, self.held.used
        assert ring is not None  # a proposal has an entry
        return (ring.counts[_slots(slot, used, len(ring.seeds), ring.seeds.device)] > 0).any(1)


class EmaWindow:
    """PseuZO's EMA of Jacobians: a window of output changes, projected on the present gradient.

    Each entry holds a seed and do = o1 - o0, the change of the model's output that the perturbation
    eps * z(seed) made. A step adds one and returns, for every entry,
    c_k = momentum^age_k * <do_k, grad> / eps (age 0: the newest). The update of the weights is then
    sum_k c_k z(seed_k).

    Rows of an old entry belong to another batch, so there are two ways to pair them with the rows
    of grad:
    - groups given ([B] integers, such as the labels): an entry keeps the mean of do over the rows
      of each group; that mean is paired with the sum of grad over the present rows of the same
      group. A group that either side lacks adds nothing. The newest entry pairs its own rows
      exactly.
    - groups None: row i pairs with row i, as published; a row that either side lacks adds nothing.
    Positions are aligned from the right: the last min(P_old, P) pair up. Batches of any size and
    length may follow each other. Mixing steps with and without groups is refused, because the
    pairing would have no meaning.

    Sums are made in fp32 on a GPU (in a fixed order, so deterministic), in fp64 on a CPU. Nothing
    waits for the device: if any coefficient is NaN or infinite (or loss is), all coefficients of
    the step are zero, found_inf ([1] fp32) is 1, `skipped` counts the step, and an entry whose own
    coefficient was not finite is dropped. update_ leaves the weights as they are in such a step,
    weight decay included: the coefs carry found_inf as an attribute of that name (not out of what
    torch.compile traces: give update_ found_inf=window.found_inf there).
    """

    _op: Callable = torch.ops.pseuzo.window_step.default

    def __init__(self, capacity: int = 14, *, momentum: float = 1.0, eps: float = 1e-3):
        check_count("EmaWindow", "capacity", capacity)
        if not 0 <= momentum <= 1:
            raise ValueError(f"EmaWindow: momentum must be in 0 .. 1, got {momentum}")
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"EmaWindow: eps must be finite and positive, got {eps}")
        self.capacity, self.momentum, self.eps = capacity, float(momentum), float(eps)
        self._held = Held()
        self._proposal: Proposal | None = None  # the latest: the slot that it wrote is its own

    def __len__(self) -> int:
        """The number of entries, at most capacity."""
        return self._held.used

    def clear(self) -> None:
        """Drop all entries; memory and the count of skipped steps stay."""
        self._proposal = None
        self._held = self._held._replace(slot=-1, used=0, grouped=None)

    @property
    def skipped(self) -> int:
        """Steps that were zeroed because something was not finite. Waits for the device."""
        return 0 if self._held.skipped is None else int(self._held.skipped)

    @property
    def found_inf(self) -> Tensor | None:
        """[1] fp32: 1 if the last step was zeroed. None before the first step."""
        return self._held.found_inf

    def step(
        self,
        seed: int,
        o0: Tensor | None,
        o1: Tensor,
        grad: Tensor,
        groups: Tensor | Sequence[int] | None = None,
        loss: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add (seed, o1 - o0) and project grad on all entries.

        Returns seeds [n] int64 and coefs [n] fp32, the newest last. o0, o1, grad: [B, P, D] or [B,
        D], floating point, one device; o0 None means that o1 is the difference already. groups: [B]
        integers or None. loss: a scalar tensor; where it is not finite, the step is skipped.
        """
        proposal = self.propose(seed, o0, o1, grad, groups, loss)
        self.commit(proposal)
        return proposal.seeds, proposal.coefs

    def propose(
        self,
        seed: int,
        o0: Tensor | None,
        o1: Tensor,
        grad: Tensor,
        groups: Tensor | Sequence[int] | None = None,
        loss: Tensor | None = None,
        *,
        momentum: float | None = None,
        eps: float | None = None,
        restart: bool = False,
    ) -> Proposal:
        """What step would return, without changing what the window holds; commit changes it.

        momentum, eps: None means those of the window. restart: as if clear() had been called first.
        The new entry goes into a slot that no held entry uses, so a proposal that is not committed
        leaves no trace. A proposal is void as soon as another one is made.
        """
        o0, o1, grad = _checked_outputs(o0, o1, grad)
        group = None if groups is None else _checked_groups(groups, o1)
        _check_loss(loss, o1)
        seed = signed64("EmaWindow.step", seed)
        grouped, used = group is not None, 0 if restart else self._held.used
        if used and self._held.grouped != grouped:
            has = "with" if self._held.grouped else "without"
            raise ValueError(
                f"EmaWindow.step: the window holds entries {has} groups; call clear() before "
                "changing that"
            )
        self._proposal = None  # the op writes to the slot of an earlier one
        ring = self._room_for(o1, used)
        slot, used = (self._held.slot + 1) % (self.capacity + 1), min(used + 1, self.capacity)
        skipped = self._skipped_on(o1.device)
        loss = None if loss is None else loss.detach().float()
        momentum = self.momentum if momentum is None else momentum
        eps = self.eps if eps is None else eps
        inputs = o0, o1, grad, group, loss, seed, slot, used, momentum, eps
        seeds, coefs, found_inf = type(self)._op(*ring, skipped, *inputs)
        if not torch.compiler.is_compiling():  # which cannot trace it
            coefs.found_inf = found_inf
        held = Held(ring, slot, used, grouped, skipped, found_inf)
        self._proposal = Proposal(seeds, coefs, found_inf, held)
        return self._proposal

    def commit(self, proposal: Proposal) -> None:
        """Take over the latest proposal.

        This is one assignment, so an interrupt leaves all of the state old or all of it new.
        Committing a proposal again changes nothing. ValueError if another one was made since, or
        the window was cleared or loaded.
        """
        if proposal is not self._proposal:
            raise ValueError(
                "EmaWindow.commit: the window has changed since this proposal was made, or another "
                "one was made after it; commit the latest"
            )
        self._held = proposal.held

    def _skipped_on(self, device: torch.device) -> Tensor:
        """The count of skipped steps, for the op to add to.

        It is a copy, except while a CUDA graph is captured, so that all replays are counted.
        """
        skipped = self._held.skipped
        if skipped is None:
            return torch.zeros((), dtype=torch.int64, device=device)
        if skipped.device != device:
            return skipped.to(device)
        return skipped if capturing(device) else skipped.clone()

    def _room_for(self, o: Tensor, used: int) -> Ring:
        """A ring with room for an entry like o beside `used` others.

        Entries are aligned to the first row and the last position.
        """
        rows, positions, width = o.shape
        old = self._held.ring
        fits = old is not None and old.values.shape[3] == width and old.values.device == o.device
        if old is not None and fits:
            _, r, p, _ = old.values.shape
            if rows <= r and positions <= p:
                return old
            # If lengths grow slowly, the ring would be copied each time: grow by at least a quarter
            rows = r if rows <= r else max(rows, r + r // 4)
            positions = p if positions <= p else max(positions, p + p // 4)
        elif old is not None and used:
            raise ValueError(
                f"EmaWindow.step: the window holds outputs of width {old.values.shape[3]} on "
                f"{old.values.device}, got {width} on {o.device}; call clear() first"
            )
        new = _empty_ring(self.capacity + 1, rows, positions, width, o.device)
        if old is not None and fits:
            new.values[:, :r, positions - p :].copy_(old.values)
            new.seeds.copy_(old.seeds)
            new.groups[:, :r].copy_(old.groups)
            new.counts[:, :r].copy_(old.counts)
            # The window holds the same entries, and the old memory becomes free.
            self._held = self._held._replace(ring=new)
        return new

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; tensors are copies, on the window's device."""
        held, capacity = self._held, self.capacity
        state: dict[str, Any] = {
            "capacity": capacity,
            "momentum": self.momentum,
            "eps": self.eps,
            "slot": held.used - 1,
            "used": held.used,
            "grouped": held.grouped,
            "skipped": self.skipped,
        }
        if held.ring is not None and held.used:  # capacity rows, the oldest entry first
            slots = _slots(held.slot, held.used, capacity + 1, held.ring.values.device)
            for name, tensor in held.ring._asdict().items():
                state[name] = tensor.new_zeros(capacity, *tensor.shape[1:])
                state[name][: held.used] = tensor[slots]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state_dict, with its capacity, momentum and eps.

        If it is not one, raises ValueError and changes nothing.
        """
        _check_state(state)
        capacity, used = state["capacity"], state["used"]
        ring: Ring | None = None
        device: torch.device | str = "cpu"
        if used:
            device = state["values"].device
            rows, positions, width = state["values"].shape[1:]
            ring = _empty_ring(capacity + 1, rows, positions, width, device)
            slots = _slots(state["slot"], used, capacity, device)
            for name, tensor in ring._asdict().items():
                tensor[:used] = state[name][slots]
        skipped = torch.tensor(state["skipped"], dtype=torch.int64, device=device)
        self.__dict__.update(
            capacity=capacity,
            momentum=state["momentum"],
            eps=state["eps"],
            _proposal=None,
            _held=Held(ring, used - 1, used, state["grouped"], skipped),
        )


def _slots(slot: int, used: int, slots: int, device: torch.device | str) -> Tensor:
    """Where the entries are, the oldest first."""
    return (slot - torch.arange(used - 1, -1, -1, device=device)) % slots


def _empty_ring(
    slots: int, rows: int, positions: int, width: int, device: torch.device | str
) -> Ring:
    shapes = ((slots, rows, positions, width), (slots,), (slots, rows), (slots, rows))
    tensors = map(lambda s, d: torch.zeros(s, dtype=d, device=device), shapes, RING_DTYPES.values())
    return Ring(*tensors)


def _checked_outputs(
    o0: Tensor | None, o1: Tensor, grad: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The three as the op takes them, [B, P, D] and contiguous."""
    o1, grad = _checked_output("o1", o1), _checked_output("grad", grad)
    o0 = None if o0 is None else _checked_output("o0", o0)
    for name, other in (("o0", o0), ("grad", grad)):
        if other is not None and (other.shape != o1.shape or other.device != o1.device):
            raise ValueError(
                f"EmaWindow.step: {name} must be like o1, {tuple(o1.shape)} on {o1.device}, "
                f"got {tuple(other.shape)} on {other.device}"
            )
    return o0, o1, grad


def _checked_output(name: str, o: Tensor) -> Tensor:
    if not isinstance(o, Tensor) or not o.dtype.is_floating_point:
        raise TypeError(f"EmaWindow.step: {name} must be a floating-point tensor, got {o!r}")
    if o.dim() not in (2, 3):
        raise ValueError(
            f"EmaWindow.step: {name} must be [B, P, D] or [B, D], got shape {tuple(o.shape)}"
        )
    if o.numel() == 0:
        raise ValueError(f"EmaWindow.step: {name} is empty, of shape {tuple(o.shape)}")
    o = o.detach()
    if o.dtype not in DTYPES:
        o = o.float()
    return (o if o.dim() == 3 else o[:, None]).contiguous()


def _checked_groups(groups: Tensor | Sequence[int], o1: Tensor) -> Tensor:
    group, rows = torch.as_tensor(groups), len(o1)
    if group.dtype.is_floating_point or group.dtype is torch.bool or group.shape != (rows,):
        raise ValueError(
            f"EmaWindow.step: groups must be {rows} integers, one per row of o1, "
            f"got shape {tuple(group.shape)} {group.dtype}"
        )
    # The driver stages a copy from pageable memory at once, so not waiting for it is safe.
    return group.to(device=o1.device, dtype=torch.int64, non_blocking=True).contiguous()


def _check_loss(loss: Tensor | None, o1: Tensor) -> None:
    if loss is None:
        return
    if not isinstance(loss, Tensor):
        raise TypeError(f"EmaWindow.step: loss must be a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or loss.device != o1.device:
        raise ValueError(
            f"EmaWindow.step: loss must be a scalar on {o1.device}, got shape {tuple(loss.shape)} "
            f"on {loss.device}"
        )


def _check_state(state: dict[str, Any]) -> None:
    op = "EmaWindow.load_state_dict"
    names = ("capacity", "momentum", "eps", "slot", "used", "grouped", "skipped")
    missing = [n for n in names + (Ring._fields if state.get("used") else ()) if n not in state]
    if missing:
        raise ValueError(f"{op}: not a window's state, it lacks {', '.join(missing)}")
    if not 0 <= state["used"] <= state["capacity"]:
        raise ValueError(
            f"{op}: {state['used']} entries do not fit a capacity of {state['capacity']}"
        )
    if not state["used"]:
        return
    k, rows = state["capacity"], getattr(state["groups"], "shape", (0, 0))[-1]
    for name, dtype in RING_DTYPES.items():
        leading = (k,) if name == "seeds" else (k, rows)
        t = state[name]
        if not isinstance(t, Tensor) or t.dtype is not dtype or t.shape[:2] != leading:
            raise ValueError(f"{op}: {name} is not what a window of {k} entries holds")
