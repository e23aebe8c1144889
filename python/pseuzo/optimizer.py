"""PseuZO and MeZO as torch optimizers: two forward passes a step, no backward through the model, no state of its size.

    opt = PseuZO(model, lr=1e-6, eps=1e-3);  loss = opt.step(forward, head, groups=labels)
    opt = MeZO(model, lr=1e-6, eps=1e-3);    loss = opt.step(closure)

Symbols of the papers: h = forward, g = head, o = h(x), e = dg/do, z(s) = the perturbation of seed s, lambda = momentum.
Sources: PseuZO (NeurIPS 2025); MeZO, Malladi et al., "Fine-tuning language models with just forward passes" (2023).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.perturbed import PerturbedForward, forward_of, frozen_mode
from pseuzo.schedule import Schedule, as_schedule
from pseuzo_kernels import EmaWindow
from pseuzo_kernels.api import check_noise, check_not_negative, check_rounding, check_tensors, signed64
from pseuzo_kernels.reference import hash_seed

ROUNDING_DOMAIN = 0x726F756E64  # keeps the bits that round apart from the bits that perturb


def step_seed(run_seed: int, step: int, domain: int = 0) -> int:
    """The seed of a step, a function of (run seed, step) alone: no global generator is read or written."""
    return hash_seed(hash_seed(run_seed ^ domain) + step)


class _Skips:
    """Counts skipped steps on the device, and says so when the news reaches the host, without waiting for it."""

    def __init__(self) -> None:
        self.count: Tensor | None = None
        self._host: Tensor | None = None
        self._event: Any = None
        self._told = 0

    def add(self, found_inf: Tensor) -> None:
        self.tell()
        if self.count is None:
            self.count = torch.zeros(1, dtype=torch.int64, device=found_inf.device)
        self.count += found_inf.long()
        if found_inf.is_cuda and self._event is None and not torch.cuda.is_current_stream_capturing():
            if self._host is None:
                self._host = torch.zeros(1, dtype=torch.int64, pin_memory=True, device="cpu")
            self._host.copy_(self.count, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        elif not found_inf.is_cuda:
            self._host = self.count
            self.tell()

    def tell(self) -> None:
        if self._host is None or (self._event is not None and not self._event.query()):
            return
        self._event = None
        total = int(self._host)
        if total > self._told:
            warnings.warn(
                f"{total - self._told} step(s) skipped, {total} in all: the loss or the projected gradient was NaN or "
                "infinite; the weights were left as they are. Lower lr or eps, or use float32, if this goes on",
                stacklevel=4,
            )
            self._told = total


class ZeroOrder(torch.optim.Optimizer):
    """What PseuZO and MeZO share: parameters, streams, seeds, the perturbed passes and the fused update."""

    def __init__(
        self,
        params: nn.Module | Iterable,
        *,
        lr: float,
        eps: float,
        weight_decay: float,
        noise: str,
        noise_scale: float,
        rounding: str,
        seed: int,
        maximize: bool,
        model: nn.Module | None,
    ):
        name = type(self).__name__
        check_noise(name, noise)
        check_rounding(name, rounding)
        check_not_negative(name, "lr", lr)
        check_not_negative(name, "weight_decay", weight_decay)
        check_not_negative(name, "noise_scale", noise_scale)
        if not check_not_negative(name, "eps", eps):
            raise ValueError(f"{name}: eps must be positive, got 0")
        self.eps, self.noise, self.rounding = float(eps), noise, rounding
        self.seed = signed64(name, seed)
        if isinstance(params, nn.Module):
            model = params
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError(f"{name}: no parameter of the model requires grad; there is nothing to train")
        self.model = model
        self._model_streams = {p: i for i, p in enumerate(model.parameters())} if model is not None else None
        self._streams: dict[Tensor, int] = {}
        self._step = 0
        self._forward: PerturbedForward | None = None  # of the model, for the step that runs
        self._offset = 0.0
        self._originals: dict[Tensor, Tensor] = {}  # of bare bf16 and fp16 parameters: x, while they hold x + eps z
        self._skips = _Skips()
        self.journal: Any = None  # a pseuzo.journal.Journal that is told of every update
        self.stats: dict[str, Any] = {}  # of the last step: tensors on the device and numbers
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, noise_scale=noise_scale, maximize=maximize))

    def add_param_group(self, param_group: dict) -> None:
        """As in torch; new parameters get the next streams (with a model: their position in model.parameters())."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        name = type(self).__name__
        try:
            for key in ("lr", "weight_decay", "noise_scale"):
                check_not_negative(name, key, group[key])
            for device in {p.device for p in group["params"]}:
                check_tensors(name, [p for p in group["params"] if p.device == device], "parameter")
            for p in group["params"]:
                if self._model_streams is None:
                    self._streams[p] = len(self._streams)
                elif p in self._model_streams:
                    self._streams[p] = self._model_streams[p]
                else:
                    raise ValueError(f"{name}: a parameter of shape {tuple(p.shape)} is not one of the model's")
        except Exception:
            self.param_groups.pop()
            raise

    @property
    def skipped_steps(self) -> int:
        """Steps that left the weights alone as something was not finite. Waits for the device."""
        return 0 if self._skips.count is None else int(self._skips.count)

    def _places(self) -> dict[nn.Parameter, tuple[int, float]]:
        """Each trained parameter's stream and noise scale."""
        return {p: (self._streams[p], g["noise_scale"]) for g in self.param_groups for p in g["params"]}

    def _trained(self) -> list[tuple[dict, list[Tensor]]]:
        """The groups with their parameters that take noise."""
        for group in self.param_groups:
            for key in ("lr", "weight_decay", "noise_scale"):  # schedulers and users write them
                check_not_negative(f"{type(self).__name__}.step", key, group[key])
        return [(g, g["params"]) for g in self.param_groups if g["noise_scale"] and g["params"]]

    @contextmanager
    def _passes(self, seed: int) -> Iterator[None]:
        """The passes of a step: without autograd and dropout; on an error, bare parameters are put back."""
        self._offset = 0.0  # what bare parameters are shifted by
        self._trained()  # bad groups are refused before anything is written
        if self.model is not None:
            self._forward = forward_of(self.model, self._places(), self.noise)
        try:
            with torch.no_grad(), frozen_mode(self.model):
                yield
        except BaseException:
            if self._offset:
                with torch.no_grad():
                    self._shift(seed, 0.0)
            raise

    def _at(self, seed: int, sign: int, kind: str, run: Callable[[], Any]) -> Any:
        """run() at x + sign * eps * z(seed): exactly with a model; bare parameters are shifted, and stay so."""
        if self._forward is not None:
            with self._forward(seed, sign * self.eps, kind):
                return run()
        self._shift(seed, sign * self.eps)
        return run()

    def _shift(self, seed: int, to: float) -> None:
        """Bare parameters from x + offset * z to x + to * z, in place: fp32 through the op, to rounding; bf16 and fp16
        from a copy of x, to the bit, as their rounding errors would add up to the size of the updates."""
        first, by = self._offset == 0, to - self._offset
        self._offset = to
        for group, params in self._trained():
            for device in {p.device for p in params}:
                seeds = torch.full((1,), seed, dtype=torch.int64, device=device)
                rest = (group["noise_scale"], self.noise, False, 0, None)
                fp32 = [p for p in params if p.device == device and p.dtype is torch.float32]
                self._add(fp32, None, seeds, torch.full_like(seeds, by, dtype=torch.float32), 1.0, *rest)
                half = [p for p in params if p.device == device and p.dtype is not torch.float32]
                for p in half if first else ():
                    if p not in self._originals:
                        self._originals[p] = torch.empty_like(p, requires_grad=False)
                    self._originals[p].copy_(p)
                if to:
                    coefs = torch.full_like(seeds, to, dtype=torch.float32)
                    self._add(half, self._originals, seeds, coefs, 1.0, *rest)
                else:
                    for p in half:
                        p.copy_(self._originals[p])

    def _add(self, params, originals, seeds, coefs, keeps, scales, noise, stochastic, rounding_seed, skip) -> None:
        """p <- keep * x + scale * sum_k coefs[k] z(seeds[k]) for each of params; x is p, or originals[p]."""
        if not params:
            return
        n = len(params)
        keeps = [keeps] * n if isinstance(keeps, float) else keeps
        scales = [scales] * n if isinstance(scales, int | float) else scales
        outs = [p.detach() for p in params]
        args = (seeds, coefs, [self._streams[p] for p in params], keeps, scales, noise, stochastic, rounding_seed, skip)
        if originals is None:
            torch.ops.pseuzo.add_noise_list_(outs, *args)
        else:
            torch.ops.pseuzo.add_noise_list_out([originals[p] for p in params], *args, out=outs)
        torch.autograd.graph.increment_version(params)

    @torch.no_grad()
    def _update(self, kind: str, seed: int, seeds: Tensor, coefs: Tensor, found_inf: Tensor) -> None:
        """x <- keep * x - lr * sum_k coefs[k] z(seeds[k]) in one pass, which also takes back what bare parameters were
        shifted by. coefs are zero where found_inf is 1: then nothing but that happens. Weights that no pass of this
        kind has used (an output head of its own) are left alone: noise is all they would get."""
        unused: set[nn.Parameter] = set()
        if self._forward is not None:
            unused = self._forward.unused(kind)
            if unused == self._forward.params.keys():
                raise RuntimeError(
                    f"{type(self).__name__}.step: the pass used no weight of the model that is trained; run that very "
                    "model in it (not a copy, and not a scripted or exported one), or give the optimizer its parameters"
                )
        self._skips.add(found_inf)
        launches: dict[tuple, list[tuple[dict, Tensor]]] = {}
        for group, params in self._trained():
            step = group["lr"] if group["maximize"] else -group["lr"]
            for p in params:
                if p in unused:
                    continue
                copied = self._offset != 0 and p in self._originals
                # what is taken back decays with its weight: one rate a launch
                back = group["weight_decay"] * group["lr"] if self._offset and not copied else None
                launches.setdefault((step, back, copied, p.device), []).append((group, p))
        rounding_seed = step_seed(self.seed, self._step, ROUNDING_DOMAIN)
        for (step, back, copied, device), members in launches.items():
            keeps = [1.0 - g["lr"] * g["weight_decay"] for g, _ in members]
            s, c, skip = seeds.to(device), (coefs * step).to(device), found_inf.to(device)
            if back is not None:
                shift = torch.where(skip != 0, torch.full_like(skip, -self._offset), -self._offset * keeps[0])
                s, c = torch.cat([s, s.new_full((1,), seed)]), torch.cat([c, shift])
            self._add(
                [p for _, p in members], self._originals if copied else None, s, c, keeps,
                [g["noise_scale"] for g, _ in members], self.noise, self.rounding == "stochastic", rounding_seed, skip,
            )  # fmt: skip
        self._offset = 0.0
        self._step += 1
        if self.journal is not None:
            self.journal.record(self._step - 1, rounding_seed, unused, seeds, coefs, found_inf)

    def _mezo(self, loss_of: Callable[[], Any], two_sided: bool = True) -> Tensor:
        """One step of MeZO on the loss: c = (L(x + eps z) - L(x - eps z)) / (2 eps), x <- x - lr * c * z."""
        seed = step_seed(self.seed, self._step)
        with self._passes(seed):
            device = self.param_groups[0]["params"][0].device

            def loss_at(sign: int) -> Tensor:
                return _scalar(self._at(seed, sign, "loss", loss_of), device)

            if two_sided:
                plus, minus = loss_at(1), loss_at(-1)
                loss, c = (plus + minus) / 2, (plus - minus) / (2 * self.eps)
            else:
                loss = _scalar(loss_of(), device)
                c = (loss_at(1) - loss) / self.eps
            ok = c.isfinite() & loss.isfinite()
            c = torch.where(ok, c, torch.zeros_like(c))
            seeds = torch.full((1,), seed, dtype=torch.int64, device=device)
            self._update("loss", seed, seeds, c, (~ok).to(torch.float32))
        self.stats = {"projected_grad": c, "momentum": 0.0, "window": 0}
        return loss.view(())

    def state_dict(self) -> dict[str, Any]:
        """Torch's, plus the step, the run seed and the window: what the next step depends on, to the bit."""
        self.state["zero_order"] = self._own_state()
        try:
            return super().state_dict()
        finally:
            del self.state["zero_order"]  # a second copy of the window

    def _own_state(self) -> dict[str, Any]:
        return {"step": self._step, "seed": self.seed, "eps": self.eps, "noise": self.noise,
                "rounding": self.rounding, "skipped": self.skipped_steps}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as the saved optimizer would have. ValueError, and nothing changed, if it is another's state."""
        own = state_dict.get("state", {}).get("zero_order")
        missing = set(self._own_state()) - set(own or ())
        if missing:
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: not a state of {type(self).__name__}, it lacks "
                + ", ".join(sorted(missing))
            )
        self._check_own_state(own)
        super().load_state_dict(state_dict)
        self.state.pop("zero_order", None)
        self.eps, self.noise, self.rounding, self.seed = own["eps"], own["noise"], own["rounding"], own["seed"]
        self._step = own["step"]
        self._skips = _Skips()
        self._skips.add(torch.zeros(1, device=self.param_groups[0]["params"][0].device))
        self._skips.count += own["skipped"]
        self._skips._told = own["skipped"]
        self._load_own_state(own)

    def _check_own_state(self, own: dict[str, Any]) -> None:
        pass

    def _load_own_state(self, own: dict[str, Any]) -> None:
        pass


class MeZO(ZeroOrder):
    """x <- x - lr * (L(x + eps z) - L(x - eps z)) / (2 eps) * z: two forward passes, one seed, nothing else kept.

    params: a module (its weights are then never written by a perturbation, see pseuzo.perturbed), or parameters or
    parameter groups as in every torch optimizer (perturbed in place; give `model` to have it exact). Group options: lr,
    weight_decay (decoupled, applied once), noise_scale (multiplies z; 0 freezes the group), maximize.
    eps: size of the perturbation. two_sided False: (L(x + eps z) - L(x)) / eps. noise, rounding: see pseuzo_kernels;
    rounding applies to bf16 and fp16 weights. seed: of the run; step t perturbs with a seed made from (seed, t).
    The passes of a step run with the module in eval mode; with bare parameters that is the caller's business.
    Source: Malladi et al. 2023, Algorithm 1.
    """

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        noise: str = "hadamard",
        noise_scale: float = 1.0,
        two_sided: bool = True,
        rounding: str = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        model: nn.Module | None = None,
    ):
        self.two_sided = two_sided
        super().__init__(
            params, lr=lr, eps=eps, weight_decay=weight_decay, noise=noise, noise_scale=noise_scale,
            rounding=rounding, seed=seed, maximize=maximize, model=model,
        )  # fmt: skip

    def step(self, closure: Callable[[], Any]) -> Tensor:
        """closure() -> loss, a scalar tensor or a number; called twice. Returns the mean of both (the clean loss if
        not two_sided), on the device: reading it waits.

        A loss that is NaN or infinite skips the update, is counted (`skipped_steps`) and warned of.
        """
        if not callable(closure):
            raise TypeError("MeZO.step: needs a closure that returns the loss, called twice a step")
        return self._mezo(closure, self.two_sided)


class PseuZO(ZeroOrder):
    """x <- x - lr * sum_k c_k z(s_k), c_k = lambda^age_k <do_k, e> / eps, over a window of the last K output changes.

    A step: o0 = h(x); e = dg/do at o0, by autograd through the head alone; o1 = h(x + eps z); the change o1 - o0 enters
    the window; every entry is projected on e; one fused update. momentum: lambda, a number or a pseuzo.schedule; while
    it is 0 the step is a two-sided MeZO step on the loss. two_sided: changes are (h(x + eps z) - h(x - eps z)) / 2, for
    a third pass. window: K. Other arguments as MeZO. Source: PseuZO (NeurIPS 2025).
    """

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        window: int = 14,
        momentum: float | Schedule = 1.0,
        weight_decay: float = 0.0,
        noise: str = "hadamard",
        *,
        noise_scale: float = 1.0,
        two_sided: bool = False,
        rounding: str = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        model: nn.Module | None = None,
    ):
        self.two_sided = two_sided
        self.schedule = as_schedule(momentum)
        super().__init__(
            params, lr=lr, eps=eps, weight_decay=weight_decay, noise=noise, noise_scale=noise_scale,
            rounding=rounding, seed=seed, maximize=maximize, model=model,
        )  # fmt: skip
        self.window = EmaWindow(window, eps=eps)
        if plan := self.schedule.plan():
            print(plan, flush=True)

    def step(
        self,
        forward: Callable[[], Tensor],
        head: Callable[[Tensor], Tensor],
        groups: Tensor | list[int] | None = None,
    ) -> Tensor:
        """forward() -> o, [B, P, D] or [B, D]; head(o) -> scalar loss, differentiable in o. Returns the loss at x.

        groups: [B] integers, see EmaWindow: rows of old batches are paired with rows of the same group (the label, for
        classification); None pairs row by row, as published. A NaN or infinity in the loss or a coefficient skips the
        update, is counted (`skipped_steps`) and warned of.
        """
        momentum = self.schedule(self._step)
        if self.schedule.clears(self._step):
            self.window.clear()
        if momentum == 0:
            self.window.clear()  # the changes it holds would be of weights long gone when it is used next
            return self._mezo(lambda: head(_output(forward())))
        self.window.momentum, self.window.eps = momentum, self.eps
        seed = step_seed(self.seed, self._step)
        with self._passes(seed):
            o0 = _output(forward())
            if groups is not None and len(groups) != len(o0):
                raise ValueError(f"PseuZO.step: groups must be one per row of the output, {len(o0)}, got {len(groups)}")
            loss, e = _gradient(head, o0)

            def output_at(sign: int) -> Tensor:
                return _output(self._at(seed, sign, "output", forward), like=o0)

            o1, base = output_at(1), o0
            if self.two_sided:
                o1, base = (o1.float() - output_at(-1).float()) / 2, None  # the difference itself
            seeds, coefs = self.window.step(seed, base, o1, e, groups, loss)
            self._update("output", seed, seeds, coefs, self.window.found_inf)
        self.stats = {"projected_grad": coefs[-1:], "momentum": momentum, "window": len(self.window)}
        return loss

    def _own_state(self) -> dict[str, Any]:
        return super()._own_state() | {"window": self.window.state_dict()}

    def _check_own_state(self, own: dict[str, Any]) -> None:
        EmaWindow().load_state_dict(own["window"])

    def _load_own_state(self, own: dict[str, Any]) -> None:
        device = self.param_groups[0]["params"][0].device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in own["window"].items()}
        self.window.load_state_dict(moved)


def _scalar(loss: Any, device: torch.device) -> Tensor:
    """[1] fp32 on device, from a scalar tensor or a number."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(f"step: the loss must be a scalar, got shape {tuple(loss.shape)}; reduce it, e.g. .mean()")
        return loss.detach().reshape(1).to(device=device, dtype=torch.float32)
    if not isinstance(loss, int | float):
        raise TypeError(f"step: the closure must return a scalar tensor or a number, got {type(loss).__name__}")
    return torch.full((1,), float(loss), dtype=torch.float32, device=device)


def _output(o: Any, like: Tensor | None = None) -> Tensor:
    if not isinstance(o, Tensor) or not o.dtype.is_floating_point:
        kind = o.dtype if isinstance(o, Tensor) else type(o).__name__
        raise TypeError(f"PseuZO.step: forward must return a floating-point tensor, got {kind}")
    if o.dim() not in (2, 3):
        raise ValueError(f"PseuZO.step: forward must return [B, P, D] or [B, D], got shape {tuple(o.shape)}")
    if like is not None and o.shape != like.shape:
        raise ValueError(
            f"PseuZO.step: forward returned {tuple(like.shape)} and then {tuple(o.shape)}; both passes of a step "
            "must run on the same batch"
        )
    return o.detach()


def _gradient(head: Callable[[Tensor], Tensor], o0: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and e = dg/do at o0."""
    with torch.inference_mode(False), torch.enable_grad():
        o = o0.clone().requires_grad_()
        loss = head(o)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"PseuZO.step: head must return a scalar loss, got {got}; reduce it, e.g. .mean()")
        if not loss.requires_grad:
            raise ValueError("PseuZO.step: the loss does not depend on the output given to head")
        (e,) = torch.autograd.grad(loss, o)
    return loss.detach().reshape(()), e
