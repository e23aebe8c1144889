"""PseuZO and MeZO as torch optimizers: two forward passes a step, no backward through the model, no state of its size.

    opt = PseuZO(model, lr=1e-6, eps=1e-3);  loss = opt.step(forward, head, groups=labels)
    opt = MeZO(model, lr=1e-6, eps=1e-3);    loss = opt.step(closure)

or in two halves, as training loops want it: loss = opt.estimate(forward, head, groups=labels); opt.step().
Losses are scalars, or [B] per-example losses whose mean is the loss.

Symbols of the papers: h = forward, g = head, o = h(x), e = dg/do, z(s) = the perturbation of seed s, lambda = momentum.
Sources: PseuZO (NeurIPS 2025); MeZO, Malladi et al., "Fine-tuning language models with just forward passes" (2023).
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.machine import Fetched, refuse_replicas
from pseuzo.optim.schedule import Schedule, as_schedule
from pseuzo.perturb.graphs import Graphs, check_device
from pseuzo.perturb.module import PerturbedForward, forward_of, frozen_mode, no_cached_casts
from pseuzo_kernels import EmaWindow
from pseuzo_kernels.checks import (
    check_noise,
    check_not_negative,
    check_rounding,
    check_tensors,
    signed64,
)
from pseuzo_kernels.reference import ROUNDING_VERSION, hash_seed, round_stochastically

ROUNDING_DOMAIN = 0x726F756E64  # keeps the bits that round apart from the bits that perturb
AT_ONCE = 1 << 22  # elements of an exact gradient's update; bounds its temporaries


def step_seed(run_seed: int, step: int, domain: int = 0) -> int:
    """The seed of a step, a function of (run seed, step) alone: no global generator is read or written."""
    return hash_seed(hash_seed(run_seed ^ domain) + step)


def direction_seed(run_seed: int, step: int, direction: int) -> int:
    """The seed of one of a step's directions; that of direction 0 is the step's."""
    seed = step_seed(run_seed, step)
    return hash_seed(seed + direction) if direction else seed


@dataclass
class _Estimate:
    """What the passes of a step found, until step() applies it."""

    kind: str  # of its passes
    coefficients: Callable[
        [], tuple[Tensor, Tensor, Tensor]
    ]  # -> seeds, coefs, found_inf; step() calls it, once
    gradients: dict[Tensor, Tensor]  # of the parameters of exact_gradient groups


@contextmanager
def _normal_mode() -> Iterator[None]:
    """Without autograd, but not in inference mode either: what a step keeps must be of use outside of that, too."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Skips:
    """Counts skipped steps on the device, and says so when the news reaches the host, without waiting for it: of the
    first, and whenever there are ten times as many."""

    def __init__(self) -> None:
        self.count: Tensor | None = None
        self._news: Fetched | None = None
        self._told = 0

    def add(self, found_inf: Tensor) -> None:
        self.tell()
        if self.count is None:
            self.count = torch.zeros(1, dtype=torch.int64, device=found_inf.device)
        self.count += found_inf.long()
        if not found_inf.is_cuda:
            self._news = Fetched(self.count)
            self.tell()
        elif self._news is None and not torch.cuda.is_current_stream_capturing():
            self._news = Fetched(self.count)

    def tell(self) -> None:
        if self._news is None or not self._news.here():
            return
        total = int(self._news.get()[0])
        self._news = None
        if (
            total > self._told and total >= 10 * self._told
        ):  # a run that diverged would say it at every step
            warnings.warn(
                f"{total} step(s) skipped so far: the loss or the projected gradient was NaN or infinite (as where no "
                "label carries a loss); the weights were left as they are. Lower lr or eps, or use float32, if this "
                "goes on",
                stacklevel=4,
            )
            self._told = total


def _frozen(p: Tensor) -> bool:
    """Parameters that require no grad are left alone, as torch's optimizers do; plain tensors need not require it."""
    return isinstance(p, nn.Parameter) and not p.requires_grad


def _not_frozen(params: Iterable[Tensor]) -> list[Tensor]:
    return [p for p in params if p.requires_grad or not _frozen(p)]


class ZeroOrder(torch.optim.Optimizer):
    """What PseuZO and MeZO share: parameters, streams, seeds, the perturbed passes and the fused update."""

    _has_gradient = False  # does it differentiate a head?

    def __init__(
        self,
        params: nn.Module | Iterable,
        *,
        lr: float,
        eps: float,
        weight_decay: float,
        noise: str,
        noise_scale: float,
        clip_examples: float | None,
        rounding: str,
        seed: int,
        maximize: bool,
        model: nn.Module | None,
        capture: bool,
    ):
        name = type(self).__name__
        refuse_replicas(name)
        check_noise(name, noise)
        check_rounding(name, rounding)
        check_not_negative(name, "lr", lr)
        check_not_negative(name, "weight_decay", weight_decay)
        check_not_negative(name, "noise_scale", noise_scale)
        if not check_not_negative(name, "eps", eps):
            raise ValueError(f"{name}: eps must be positive, got 0")
        if clip_examples is not None and not check_not_negative(
            name, "clip_examples", clip_examples
        ):
            raise ValueError(f"{name}: clip_examples must be positive, or None, got 0")
        self.eps, self.noise, self.rounding = float(eps), noise, rounding
        self.clip_examples = clip_examples
        self.seed = signed64(name, seed)
        if isinstance(params, nn.Module):
            model = params
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError(
                    f"{name}: no parameter of the model requires grad; there is nothing to train"
                )
        self.model = model
        self._model_streams = (
            {p: i for i, p in enumerate(model.parameters())} if model is not None else None
        )
        self._streams: dict[Tensor, int] = {}
        self._step = 0
        self._pending: _Estimate | None = None
        self._forward: PerturbedForward | None = None  # of the model
        self._used: dict[
            str, list[int]
        ] = {}  # what a loaded state knew of it: kind of pass -> streams
        self._shift_seed, self._offset = 0, 0.0  # bare parameters hold x + offset * z(shift_seed)
        self._originals: dict[
            Tensor, Tensor
        ] = {}  # of bare bf16 and fp16 parameters: x, while they are shifted
        self._skips = _Skips()
        # of the last update: coefs, and what was moved with its lr * noise scale
        self._last: tuple[Tensor, list[tuple[list[Tensor], float]]] | None = None
        self._places: tuple[list, dict] = [], {}  # what _find_places found, and of what
        self.journal: Any = None  # a pseuzo.journal.Journal that is told of every update
        self.journal_run: str | None = None  # the run whose journal records the steps so far
        self.recorded_weights: Any = (
            None  # a journal's marks of the weights as the last step left them
        )
        self.stats: dict[str, Any] = {}  # of the last step: tensors on the device and numbers
        super().__init__(
            params,
            dict(
                lr=lr,
                weight_decay=weight_decay,
                noise_scale=noise_scale,
                maximize=maximize,
                exact_gradient=False,
            ),
        )
        self._check_trains(name)
        if capture:
            check_device(name, self._device)
        self._graphs = Graphs(self._device) if capture else None
        self._memory: tuple | None = None  # that the graphs were recorded of

    def add_param_group(self, param_group: dict) -> None:
        """As in torch; new parameters get the next streams (with a model: their position in model.parameters())."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        name = type(self).__name__
        try:
            for key in ("lr", "weight_decay", "noise_scale"):
                check_not_negative(name, key, group[key])
            if group["exact_gradient"] and not self._has_gradient:
                raise ValueError(
                    f"{name}: exact_gradient=True needs the head that PseuZO differentiates; use PseuZO"
                )
            if "eps" in param_group:
                raise ValueError(
                    f"{name}: eps is one for all groups; give it to {name}, or a group a noise_scale"
                )
            for key in param_group.keys() - self.defaults.keys():
                if meant := get_close_matches(key, self.defaults, n=1, cutoff=0.8):
                    raise ValueError(
                        f"{name}: a group has no option {key!r}; did you mean {meant[0]!r}?"
                    )
            used = _not_frozen(group["params"])
            for device in {p.device for p in used}:
                if device.type == "meta":
                    raise ValueError(
                        f"{name}: a parameter is on the meta device (offloaded?); load the weights first"
                    )
                check_tensors(name, [p for p in used if p.device == device], "parameter")
            for p in group["params"]:
                if self._model_streams is None:
                    self._streams[p] = len(self._streams)
                elif p in self._model_streams:
                    self._streams[p] = self._model_streams[p]
                else:
                    raise ValueError(
                        f"{name}: a parameter of shape {tuple(p.shape)} is not one of the model's"
                    )
        except Exception:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        name = type(self).__name__
        raise TypeError(f"{name} cannot be copied or pickled, as it belongs to its weights; make a new {name} of the "
                        "other weights, and give it state_dict()")  # fmt: skip

    @property
    def skipped_steps(self) -> int:
        """Steps that left the weights alone as something was not finite. Waits for the device."""
        return 0 if self._skips.count is None else int(self._skips.count)

    @property
    def _device(self) -> torch.device:
        trained = (
            p for group in self.param_groups for p in group["params"] if not _frozen(p)
        )  # to the first one
        return next(trained, self.param_groups[0]["params"][0]).device

    def _check_trains(self, op: str) -> None:
        if all(_frozen(p) for group in self.param_groups for p in group["params"]):
            raise ValueError(f"{op}: no parameter requires grad; there is nothing to train")

    @property
    def _shift_noise(self) -> str:
        """The noise that bare parameters are shifted by: the same z, but sums in half precision would not restore x."""
        return self.noise.removesuffix("-fp16")

    def _find_places(self) -> dict[nn.Parameter, tuple[int, float]]:
        """The stream and noise scale of each parameter that may take noise; the same dict while they are the same."""
        groups = [
            (g, _not_frozen(g["params"])) for g in self.param_groups if not g["exact_gradient"]
        ]
        of = [(g["noise_scale"], list(map(id, params))) for g, params in groups]
        if self._places[0] != of:
            self._places = (
                of,
                {p: (self._streams[p], g["noise_scale"]) for g, params in groups for p in params},
            )
        return self._places[1]

    def _trained(self) -> list[tuple[dict, list[Tensor]]]:
        """The groups with their parameters that take noise."""
        for group in self.param_groups:
            for key in ("lr", "weight_decay", "noise_scale"):  # schedulers and users write them
                check_not_negative(f"{type(self).__name__}.step", key, group[key])
        return [
            (g, _not_frozen(g["params"]))
            for g in self.param_groups if g["noise_scale"] and not g["exact_gradient"]
        ]  # fmt: skip

    @contextmanager
    def _passes(self, kind: str, key: tuple) -> Iterator[None]:
        """The passes of a step: without autograd and dropout; on an error, bare parameters are put back. kind: of the
        perturbed ones; key: what they are made of. They are recorded under both."""
        self._pending = None  # an estimate that was not applied is forgotten
        refuse_replicas(f"{type(self).__name__}.step")
        self._trained()  # bad groups are refused before anything is written
        self._check_trains(f"{type(self).__name__}.step")
        if self.model is not None:
            forward = forward_of(self.model, self._find_places(), self.noise)
            if (
                forward is not self._forward
            ):  # it begins with what this optimizer knows, no more and no less
                forward.note_used(self._used_so_far())
                self._forward, self._memory = forward, None
        graphs = nullcontext()
        if self._graphs is not None:
            memory = (self._forward, self._forward and self._forward.replaced)
            if memory != self._memory:  # graphs would read or write what is not there any more
                self._memory = memory
                self._graphs.clear()
            graphs = self._graphs.step(
                (kind, *key), self._forward is None or self._forward.settled(kind)
            )
        with (
            self._put_back_on_error(),
            _normal_mode(),
            frozen_mode(self.model),
            no_cached_casts(),
            graphs,
        ):
            yield

    def _used_so_far(self) -> dict[str, list[int]]:
        """The streams of the weights that each kind of pass has used."""
        return self._used if self._forward is None else self._forward.used()

    def _run(self, name: str, run: Callable[[], Any]) -> Any:
        """run(), or the graph that was recorded of the pass of this name in an earlier step like this one."""
        return run() if self._graphs is None else self._graphs.run(name, run)

    def _at(self, seed: int, sign: int, kind: str, run: Callable[[], Any]) -> Any:
        """run() at x + sign * eps * z(seed): exactly with a model; bare parameters are shifted, and stay so."""
        forward = self._forward
        if forward is None:
            self._shift(seed, sign * self.eps)
            return self._run(kind, run)
        forward.aim(seed, sign * self.eps)

        def perturbed_run() -> Any:
            with forward.passing(kind):
                return run()

        return self._run(kind, perturbed_run)

    def _shift(self, seed: int, to: float) -> None:
        """Bare parameters from x + offset * z(shift_seed) to x + to * z(seed), in place: fp32 through the op, to
        rounding; bf16 and fp16 from a copy of x, to the bit, as their rounding errors would add up to the size of the
        updates."""
        first = self._offset == 0
        if first and self.journal is not None:
            self.journal.check_weights()
        if first or seed == self._shift_seed:
            terms = [(seed, to - self._offset)]
        else:
            terms = [(self._shift_seed, -self._offset), (seed, to)]
        self._shift_seed, self._offset = seed, to
        for group, params in self._trained():
            for device in {p.device for p in params}:
                rest = (1.0, group["noise_scale"], self._shift_noise, False, 0, None)
                fp32 = [p for p in params if p.device == device and p.dtype is torch.float32]
                self._add(fp32, None, *_terms(terms, device), *rest)
                half = [p for p in params if p.device == device and p.dtype is not torch.float32]
                for p in half if first else ():
                    if p not in self._originals:
                        self._originals[p] = torch.empty_like(p, requires_grad=False)
                    self._originals[p].copy_(p)
                if to:
                    self._add(half, self._originals, *_terms([(seed, to)], device), *rest)
                else:
                    for p in half:
                        p.copy_(self._originals[p])
        torch.clear_autocast_cache()  # a pass that turns the cache on itself leaves casts of the weights as they were
        if self.journal is not None:
            self.journal.note_weights()

    @torch.no_grad()
    def _put_back(self) -> None:
        if self._offset:
            self._shift(self._shift_seed, 0.0)

    @contextmanager
    def _put_back_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._pending = None
            self._put_back()
            raise

    def _add(
        self, params, originals, seeds, coefs, keeps, scales, noise, stochastic, rounding_seed, skip
    ) -> None:
        """p <- keep * x + scale * sum_k coefs[k] z(seeds[k]) for each of params; x is p, or originals[p]."""
        if not params:
            return
        n = len(params)
        keeps = [keeps] * n if isinstance(keeps, float) else keeps
        scales = [scales] * n if isinstance(scales, int | float) else scales
        streams = list(map(self._streams.__getitem__, params))
        args = (seeds, coefs, streams, keeps, scales, noise, stochastic, rounding_seed, skip)
        if originals is None:
            torch.ops.pseuzo.add_noise_list_(params, *args)
        else:
            torch.ops.pseuzo.add_noise_list_out([originals[p] for p in params], *args, out=params)
        torch.autograd.graph.increment_version(params)

    def _apply(self) -> None:
        """The second half of a step: the update that the passes found."""
        if self._pending is None:
            raise RuntimeError(
                f"{type(self).__name__}.step: there is no estimate to apply; call estimate(...) first, or give step "
                "what estimate takes"
            )
        pending, self._pending = self._pending, None
        with self._put_back_on_error(), _normal_mode():
            if self.journal is not None:
                self.journal.prepare()  # what cannot be recorded is not made
            self._update(pending.kind, *pending.coefficients(), pending.gradients)

    def _update(
        self, kind: str, seeds: Tensor, coefs: Tensor, found_inf: Tensor, gradients: dict
    ) -> None:
        """x <- keep * x - lr * sum_k coefs[k] z(seeds[k]) in one pass, which also takes back what bare parameters were
        shifted by. coefs are zero where found_inf is 1: then nothing but that happens. Weights that no pass of this
        kind has used (an output head of its own) are left alone: noise is all they would get."""
        unused: set[nn.Parameter] = set()
        if self._forward is not None:
            unused = self._forward.unused(kind)
            if self._forward.params and unused == self._forward.params.keys():
                raise RuntimeError(
                    f"{type(self).__name__}.step: the pass used no weight of the model that is trained; run that very "
                    "model in it (not a copy, and not a scripted or exported one), or give the optimizer its parameters"
                )
        self._skips.add(found_inf)
        self.stats["skipped_steps"] = self._skips.count
        launches: dict[tuple, tuple[list[Tensor], list[float], list[float]]] = {}
        moved: list[tuple[list[Tensor], float]] = []
        for group, params in self._trained():
            params = [p for p in params if p not in unused] if unused else params
            moved.append((params, group["lr"] * group["noise_scale"]))
            step = group["lr"] if group["maximize"] else -group["lr"]
            decay = group["lr"] * group["weight_decay"]
            for device, copied, part in self._alike(params):
                # what is taken back decays with its weight: one rate a launch
                back = decay if self._offset and not copied else None
                members, keeps, scales = launches.setdefault(
                    (step, back, copied, device), ([], [], [])
                )
                members += part
                keeps += [1.0 - decay] * len(part)
                scales += [group["noise_scale"]] * len(part)
        rounding_seed = step_seed(self.seed, self._step, ROUNDING_DOMAIN)
        for (step, back, copied, device), (members, keeps, scales) in launches.items():
            s, c = seeds.to(device), (coefs * step).to(device)
            # The op sets its flag where coefs * step overflow. That is of one launch; the step's flag stays as it is.
            skip = found_inf.to(device, copy=abs(step) > 0.25)
            if back is not None:
                s = torch.cat([s, s.new_full((1,), self._shift_seed)])
                c = torch.cat([c, c.new_full((1,), -self._offset * keeps[0])])
            self._add(
                members, self._originals if copied else None, s, c, keeps, scales,
                self.noise if back is None else self._shift_noise, self.rounding == "stochastic", rounding_seed, skip,
            )  # fmt: skip
            if (
                back is not None
            ):  # a launch that was skipped took nothing back; any other one must not be followed
                alone = torch.full_like(skip, float("nan")).masked_fill_(skip != 0, -self._offset)
                self._add(
                    members, None, s[-1:], alone, 1.0, scales, self._shift_noise, False, 0, None
                )
        self._descend(gradients, found_inf, rounding_seed)
        torch.clear_autocast_cache()  # its casts are of the weights as they were
        self._last = coefs, moved
        self._offset = 0.0
        self._step += 1
        if self.journal is not None:
            frozen = {p for group in self.param_groups for p in group["params"] if _frozen(p)}
            self.journal.record(
                self._step - 1, rounding_seed, unused | frozen, seeds, coefs, found_inf
            )

    def _alike(self, params: list[Tensor]) -> Iterator[tuple[torch.device, bool, list[Tensor]]]:
        """params by their device, and by whether a copy of them holds x."""
        devices = {p.device for p in params}
        for device in devices:
            there = params if len(devices) == 1 else [p for p in params if p.device == device]
            copied = [p for p in there if p in self._originals] if self._offset else []
            if copied:
                yield device, True, copied
                there = [p for p in there if p not in self._originals]
            if there:
                yield device, False, there

    def _descend(
        self, gradients: dict[Tensor, Tensor], found_inf: Tensor, rounding_seed: int
    ) -> None:
        """x <- (1 - lr * weight decay) x - lr * gradient, rounded like every update; not where found_inf is 1."""
        for group in self.param_groups if gradients else ():
            step = group["lr"] if group["maximize"] else -group["lr"]
            for p in group["params"]:
                if p not in gradients:
                    continue
                generator = torch.Generator(p.device).manual_seed(
                    hash_seed(rounding_seed + self._streams[p])
                )
                parts = zip(
                    p.view(-1).split(AT_ONCE), gradients[p].reshape(-1).split(AT_ONCE), strict=True
                )
                for x, gradient in parts:
                    y = (
                        1.0 - group["lr"] * group["weight_decay"]
                    ) * x.float() + step * gradient.float()
                    y = torch.where(found_inf.to(p.device) != 0, x.float(), y)
                    if self.rounding == "stochastic" and p.dtype is not torch.float32:
                        dither = torch.randint(
                            1 << 16,
                            y.shape,
                            dtype=torch.int64,
                            device=p.device,
                            generator=generator,
                        )
                        y = round_stochastically(y, dither, p.dtype)
                    x.copy_(y)

    def _mezo(
        self, key: tuple, loss_of: Callable[[], Any], two_sided: bool = True, directions: int = 1
    ) -> Tensor:
        """The passes of a MeZO step: c_j = (L(x + eps z_j) - L(x - eps z_j)) / (2 eps), along q directions z_j; the
        update is the mean of c_j z_j."""
        seeds = [direction_seed(self.seed, self._step, j) for j in range(directions)]
        losses, slopes, ok = [], [], torch.ones((), dtype=torch.bool, device=self._device)
        with self._passes("loss", (two_sided, *key)):
            clean = None if two_sided else self._losses(self._run("clean", loss_of))
            for seed in seeds:
                plus = self._losses(self._at(seed, 1, "loss", loss_of))
                minus = self._losses(self._at(seed, -1, "loss", loss_of)) if two_sided else clean
                if plus.shape != minus.shape:
                    raise ValueError(
                        f"step: the passes of a step gave losses of shapes {tuple(plus.shape)} and "
                        f"{tuple(minus.shape)}; they must run on the same batch"
                    )
                slope = (plus - minus) / (2 * self.eps if two_sided else self.eps)
                loss = (plus + minus) / 2 if two_sided else clean
                ok = ok & slope.isfinite().all() & loss.isfinite().all()
                if self.clip_examples is not None:
                    limit = _limit(slope.abs(), self.clip_examples)
                    slope = slope.clamp(-limit, limit)
                losses.append(loss.mean())
                slopes.append(slope.mean())
        c = torch.stack(slopes)
        c = torch.where(ok, c, torch.zeros_like(c))

        def coefficients() -> tuple[Tensor, Tensor, Tensor]:
            self.stats = {"projected_grad": c, "momentum": 0.0, "window": 0}
            return _filled(seeds, torch.int64, self._device), c / directions, (~ok).float().view(1)

        self._pending = _Estimate("loss", coefficients, {})
        return torch.stack(losses).mean()

    def _losses(self, loss: Any) -> Tensor:
        """fp32 on the device: [] from a scalar tensor or a number, [B] from per-example losses."""
        if isinstance(loss, Tensor):
            if loss.numel() != 1 and (loss.dim() != 1 or loss.numel() == 0):
                raise ValueError(
                    "step: the loss must be a scalar, or a vector of per-example losses, got shape "
                    f"{tuple(loss.shape)}; reduce it, e.g. .mean()"
                )
            loss = loss.detach().to(device=self._device, dtype=torch.float32)
            loss = loss if loss.dim() == 1 else loss.reshape(())
        elif isinstance(loss, int | float):
            loss = torch.full((), float(loss), dtype=torch.float32, device=self._device)
        else:
            raise TypeError(
                f"step: the closure must return a scalar tensor or a number, got {type(loss).__name__}"
            )
        if self.clip_examples is not None and loss.dim() == 0:
            raise ValueError(
                "step: clip_examples needs the loss of each example, [B], and got one number; return the losses before "
                "their mean, or leave clip_examples off"
            )
        return loss

    @torch.no_grad()
    def update_rms(self) -> dict[str, Tensor]:
        """Root mean square of the last update over an ulp of the root mean square weight, by dtype ("float32", ...).

        Below about 1, rounding to nearest would lose most of the update. The update's is known without looking at it:
        z has mean 0 and variance 1, so it is lr * noise_scale * sqrt(sum_k coefs[k]^2). The weights' takes one reading
        of those that the update moved, so log it every N steps. Nothing waits for the device. Empty before a step.
        """
        if self._last is None:
            return {}
        coefs, moved = self._last
        size = coefs.square().sum().sqrt()
        ratios = {}
        for dtype in {p.dtype for params, _ in moved for p in params}:
            rates = [(p, rate) for params, rate in moved for p in params if p.dtype is dtype]
            n = sum(p.numel() for p, _ in rates)
            rate = math.sqrt(sum(p.numel() * rate**2 for p, rate in rates) / max(n, 1))
            norms = [
                torch.linalg.vector_norm(p, dtype=torch.float32).to(size.device) for p, _ in rates
            ]
            rms = torch.stack(norms).square().sum().div(max(n, 1)).sqrt()
            ulp = torch.exp2(rms.log2().floor()) * torch.finfo(dtype).eps
            ratios[str(dtype).removeprefix("torch.")] = rate * size / ulp
        return ratios

    def state_dict(self) -> dict[str, Any]:
        """Torch's, plus the step, the run seed and the window: what the next step depends on, to the bit. An estimate
        that step() has not applied yet is not part of it."""
        self.state["zero_order"] = self._own_state()
        try:
            return super().state_dict()
        finally:
            del self.state["zero_order"]  # a second copy of the window

    def _own_state(self) -> dict[str, Any]:
        return {"step": self._step, "seed": self.seed, "eps": self.eps, "noise": self.noise, "rounding": self.rounding,
                "rounding_version": ROUNDING_VERSION, "skipped": self.skipped_steps, "used": self._used_so_far(),
                "journal": self.journal_run}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as the saved optimizer would have. ValueError, and nothing changed, if it is another's state, or if
        it rounds 16-bit weights by another version of the rule."""
        own = state_dict.get("state", {}).get("zero_order")
        own = (
            own and {"rounding_version": 1, "journal": None} | own
        )  # these were not always written down
        missing = set(self._own_state()) - set(own or ())
        if missing:
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: not a state of {type(self).__name__}, it lacks "
                + ", ".join(sorted(missing))
            )
        sixteen_bits = any(
            p.dtype is not torch.float32
            for group in self.param_groups
            for p in _not_frozen(group["params"])
        )
        if (
            own["rounding_version"] != ROUNDING_VERSION
            and own["rounding"] == "stochastic"
            and sixteen_bits
        ):
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: the state is of a run whose 16-bit weights were rounded "
                f"stochastically by version {own['rounding_version']} of the rule, this pseuzo has version "
                f"{ROUNDING_VERSION}; resume it with the pseuzo that wrote it"
            )
        self._check_own_state(own)
        super().load_state_dict(state_dict)
        self.state.pop("zero_order", None)
        self.eps, self.noise, self.rounding, self.seed = (
            own["eps"],
            own["noise"],
            own["rounding"],
            own["seed"],
        )
        self._step, self._pending, self._last = own["step"], None, None
        self.journal_run, self.recorded_weights = own["journal"], None
        self._forward, self._used = (
            None,
            {kind: list(streams) for kind, streams in own["used"].items()},
        )
        self._skips = _Skips()
        self._skips.add(torch.zeros(1, device=self._device))
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
    directions: q; the update is the mean over q perturbations (2 q passes, or q + 1 if not two_sided).
    momentum: mu; the update is sum_age mu^age * (that of `age` steps ago) over the last `window` steps: SGD's momentum
    cut off after K steps, in seeds and coefficients in place of a buffer of the model's size. It costs the noise of
    K * q seeds an update. A skipped step counts as one of gradient 0.
    clip_examples: r; the projected gradient of each example is clamped to r times the batch's median size (not where
    that is 0). The closure must then return per-example losses, [B].
    The passes of a step run with the module in eval mode; with bare parameters that is the caller's business.
    Under torch.autocast no step uses or leaves a cast that is cached, wherever the autocast block begins and ends.
    One process only: ValueError where the process group has several ranks, as replicas would drift apart.
    capture: record the passes as CUDA graphs, from the third step with the same closure on, and replay them:
    hundreds of launches fewer (bits: see pseuzo.capture). The closure must then be the same object at every step
    (or one of a few), read its batch from tensors that you write before the step (tensor.copy_(...)), and never
    wait for the device. lr, weight decay and eps may change; weights and what else the closure reads must stay
    where they are in memory.
    Source: Malladi et al. 2023, Algorithms 1 and 2.
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
        directions: int = 1,
        momentum: float = 0.0,
        window: int = 14,
        clip_examples: float | None = None,
        rounding: str = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        model: nn.Module | None = None,
        capture: bool = False,
    ):
        for key, value in (("directions", directions), ("window", window)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"MeZO: {key} must be an int of at least 1, got {value!r}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"MeZO: momentum must be in 0 .. 1, got {momentum}")
        self.two_sided, self.directions, self.momentum, self.window = (
            two_sided,
            directions,
            float(momentum),
            window,
        )
        self._past: tuple[Tensor, Tensor] | None = (
            None  # seeds and coefs of the last steps, [n, q], the newest last
        )
        super().__init__(
            params, lr=lr, eps=eps, weight_decay=weight_decay, noise=noise, noise_scale=noise_scale,
            clip_examples=clip_examples, rounding=rounding, seed=seed, maximize=maximize, model=model,
            capture=capture,
        )  # fmt: skip

    def estimate(self, closure: Callable[[], Any]) -> Tensor:
        """The passes of a step, for step() without arguments to apply; the weights are as before. See step.

        An estimate that was not applied is replaced by the next.
        """
        loss = self._estimate(closure)
        self._put_back()
        return loss

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:
        """closure() -> loss, a scalar tensor or a number, or per-example losses [B]; called twice. Returns the mean of
        both (the clean loss if not two_sided), on the device: reading it waits. Without a closure, applies the last
        estimate; RuntimeError if there is none.

        A loss that is NaN or infinite skips the update, is counted (`skipped_steps`) and warned of.
        """
        loss = None if closure is None else self._estimate(closure)
        self._apply()
        return loss

    def _estimate(self, closure: Callable[[], Any]) -> Tensor:
        if not callable(closure):
            raise TypeError("MeZO.step: needs a closure that returns the loss, called twice a step")
        loss = self._mezo((closure,), closure, self.two_sided, self.directions)
        if self.momentum:
            now = self._pending.coefficients
            self._pending.coefficients = lambda: self._with_the_past(*now())
        return loss

    def _with_the_past(
        self, seeds: Tensor, coefs: Tensor, found_inf: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The last K steps' seeds, and their coefficients times momentum^age; zero where found_inf is 1."""
        if self._past is None:
            self._past = seeds.new_empty(0, self.directions), coefs.new_empty(0, self.directions)
        self._past = tuple(
            torch.cat([old, new[None]])[-self.window :]
            for old, new in zip(self._past, (seeds, coefs), strict=True)
        )
        seeds, coefs = self._past
        ages = torch.arange(len(coefs) - 1, -1, -1, device=coefs.device)
        faded = (
            coefs
            * torch.pow(torch.full_like(ages, self.momentum, dtype=torch.float64), ages)[:, None]
        )
        self.stats |= {"momentum": self.momentum, "window": len(coefs)}
        return seeds.flatten(), torch.where(found_inf != 0, 0.0, faded.float().flatten()), found_inf

    def _own_state(self) -> dict[str, Any]:
        seeds, coefs = self._past or (None, None)
        return super()._own_state() | {
            "past": {"seeds": seeds, "coefs": coefs, "directions": self.directions, "momentum": self.momentum,
                     "window": self.window}
        }  # fmt: skip

    def _load_own_state(self, own: dict[str, Any]) -> None:
        past = own["past"]
        self.directions, self.momentum, self.window = (
            past["directions"],
            past["momentum"],
            past["window"],
        )
        if past["seeds"] is not None:
            self._past = past["seeds"].to(self._device), past["coefs"].to(self._device)
        else:
            self._past = None


class PseuZO(ZeroOrder):
    """x <- x - lr * sum_k c_k z(s_k), c_k = lambda^age_k <do_k, e> / eps, over a window of the last K output changes.

    A step: o0 = h(x); e = dg/do at o0, by autograd through the head alone; o1 = h(x + eps z); the change o1 - o0 enters
    the window; every entry is projected on e; one fused update. momentum: lambda, a number or a pseuzo.schedule; while
    it is 0 the step is a two-sided MeZO step on the loss. two_sided: changes are (h(x + eps z) - h(x - eps z)) / 2, for
    a third pass. window: K.
    clip_examples: r; the rows of e are scaled such that no example's projected gradient <do_i, e_i> / eps of the newest
    entry exceeds r times the batch's median size (no scaling where that is 0); older entries are projected on the same
    e. In a MeZO step as in MeZO: the head must then return per-example losses.
    The group option exact_gradient=True is for weights of the head that h does not use, as an untied output layer: they
    take no noise, and x <- (1 - lr * weight_decay) x - lr * dg/dx, by the autograd through the head that is done
    anyway. MeZO steps leave them alone. Without it PseuZO leaves such weights as they are.
    capture: see MeZO; forward and head are then the same objects at every step.
    Other arguments as MeZO. Source: PseuZO (NeurIPS 2025).
    """

    _has_gradient = True

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
        clip_examples: float | None = None,
        rounding: str = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        model: nn.Module | None = None,
        capture: bool = False,
    ):
        self.two_sided = two_sided
        self.schedule = as_schedule(momentum)
        super().__init__(
            params, lr=lr, eps=eps, weight_decay=weight_decay, noise=noise, noise_scale=noise_scale,
            clip_examples=clip_examples, rounding=rounding, seed=seed, maximize=maximize, model=model,
            capture=capture,
        )  # fmt: skip
        self.window = EmaWindow(window, eps=eps)
        if plan := self.schedule.plan():
            print(plan, flush=True)

    def estimate(
        self,
        forward: Callable[[], Tensor],
        head: Callable[[Tensor], Tensor],
        groups: Tensor | list[int] | None = None,
        examples: Tensor | None = None,
    ) -> Tensor:
        """The passes of a step, for step() without arguments to apply; the weights are as before. See step.

        An estimate that was not applied is replaced by the next: the window takes it in when it is applied.
        """
        loss = self._estimate(forward, head, groups, examples)
        self._put_back()
        return loss

    def step(
        self,
        forward: Callable[[], Tensor] | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        groups: Tensor | list[int] | None = None,
        examples: Tensor | None = None,
    ) -> Tensor | None:
        """forward() -> o, [B, P, D] or [B, D]; head(o) -> loss, a scalar or per-example losses, differentiable in o.
        Returns the loss at x. Without arguments, applies the last estimate; RuntimeError if there is none.

        groups: [B] integers, see EmaWindow: rows of old batches are paired with rows of the same group (the label, for
        classification); None pairs row by row, as published. examples: [B] integers, for clip_examples: rows of the
        same number belong to one example; None: each row is one. A NaN or infinity in the loss or a coefficient skips
        the update, is counted (`skipped_steps`) and warned of.
        """
        loss = (
            None
            if forward is None and head is None
            else self._estimate(forward, head, groups, examples)
        )
        self._apply()
        return loss

    def _estimate(self, forward, head, groups, examples) -> Tensor:
        if not callable(forward) or not callable(head):
            raise TypeError(
                "PseuZO.step: needs forward() -> o and head(o) -> loss, or nothing after estimate(...)"
            )
        momentum, eps = self.schedule(self._step), self.eps
        if momentum == 0:
            loss = self._mezo((forward, head), lambda: head(_output(forward())))
            mezo = self._pending.coefficients
            # the changes that the window holds would be of weights long gone when it is used next
            self._pending.coefficients = lambda: (self.window.clear(), mezo())[1]
            return loss
        seed = step_seed(self.seed, self._step)
        exact = [
            p for g in self.param_groups if g["exact_gradient"] for p in _not_frozen(g["params"])
        ]

        def clean() -> tuple[Tensor, ...]:
            o = _output(forward())
            return o, *_gradient(head, o, exact)

        with self._passes("output", (forward, head, *exact)):
            o0, loss, e, *gradients = self._run("clean", clean)
            if groups is not None and len(groups) != len(o0):
                raise ValueError(
                    f"PseuZO.step: groups must be one per row of the output, {len(o0)}, got {len(groups)}"
                )

            def output_at(sign: int) -> Tensor:
                return _output(self._at(seed, sign, "output", forward), like=o0)

            o1, base = output_at(1), o0
            if self.two_sided:
                o1, base = (o1.float() - output_at(-1).float()) / 2, None  # the difference itself
            if self.clip_examples is not None:
                change = o1 if base is None else o1.float() - base.float()
                e = _clip_rows(e, change, self.clip_examples, examples)
        finite = loss
        for gradient in gradients:  # one that is not finite skips the step, as a loss does
            finite = torch.where(gradient.isfinite().all().to(loss.device), finite, float("nan"))

        def coefficients() -> tuple[Tensor, Tensor, Tensor]:
            if self.schedule.clears(self._step):
                self.window.clear()
            self.window.momentum, self.window.eps = momentum, eps
            seeds, coefs = self.window.step(seed, base, o1, e, groups, finite)
            self.stats = {
                "projected_grad": coefs[-1:],
                "momentum": momentum,
                "window": len(self.window),
            }
            return seeds, coefs, self.window.found_inf

        self._pending = _Estimate("output", coefficients, dict(zip(exact, gradients, strict=True)))
        return loss

    def _own_state(self) -> dict[str, Any]:
        return super()._own_state() | {"window": self.window.state_dict()}

    def _check_own_state(self, own: dict[str, Any]) -> None:
        EmaWindow().load_state_dict(own["window"])

    def _load_own_state(self, own: dict[str, Any]) -> None:
        moved = {
            k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in own["window"].items()
        }
        self.window.load_state_dict(moved)


def _filled(values: Sequence[int | float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a few numbers, each filled in by a kernel: a copy from pageable memory would wait."""
    parts = [torch.full((1,), value, dtype=dtype, device=device) for value in values]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _terms(terms: list[tuple[int, float]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Seeds and coefficients as the ops take them."""
    seeds, coefs = zip(*terms, strict=True)
    return _filled(seeds, torch.int64, device), _filled(coefs, torch.float32, device)


def _limit(sizes: Tensor, ratio: float, counted: Tensor | None = None) -> Tensor:
    """[1]: ratio times the median (of an even number: the lower one) of sizes [B], infinite where that is 0. counted:
    [B] bool, those that the median is of. NaN counts as the largest."""
    counted = torch.ones_like(sizes, dtype=torch.bool) if counted is None else counted
    ordered = torch.where(counted, sizes, float("inf")).sort().values
    median = ordered.gather(0, (counted.sum() - 1).view(1) // 2)
    return torch.where(median > 0, ratio * median, float("inf"))


def _clip_rows(e: Tensor, change: Tensor, ratio: float, examples: Tensor | None) -> Tensor:
    """e [B, ...] in fp32, its rows scaled such that no example's <change_i, e_i> exceeds _limit of them all."""
    factors = row_factors((change * e.float()).flatten(1).sum(1), ratio, examples)
    return e.float() * factors.view(-1, *[1] * (e.dim() - 1))


def row_factors(rows: Tensor, ratio: float, examples: Tensor | None) -> Tensor:
    """[n]: by what to scale each of n rows so that no example's |sum of rows| exceeds _limit of them all. Rows of one
    example (the same number in examples; None: each is one) are scaled alike."""
    n = len(rows)
    if examples is None:
        examples = torch.arange(n, device=rows.device)
    examples = torch.as_tensor(examples).to(rows.device, non_blocking=True)
    if examples.shape != (n,) or examples.dtype.is_floating_point:
        raise ValueError(
            f"clip_examples: examples must be {n} integers, one per row of the output, got shape "
            f"{tuple(examples.shape)} {examples.dtype}"
        )
    same = (
        examples[:, None] == examples[None, :]
    )  # sums in a fixed order, where index_add would use atomics
    sizes = torch.where(same, rows, 0.0).sum(1).abs()
    first = same.int().argmax(1) == torch.arange(n, device=rows.device)
    limit = _limit(sizes, ratio, first)
    return torch.where(sizes > limit, limit / sizes, 1.0)


def _output(o: Any, like: Tensor | None = None) -> Tensor:
    if not isinstance(o, Tensor) or not o.dtype.is_floating_point:
        kind = o.dtype if isinstance(o, Tensor) else type(o).__name__
        raise TypeError(f"PseuZO.step: forward must return a floating-point tensor, got {kind}")
    if o.dim() not in (2, 3):
        raise ValueError(
            f"PseuZO.step: forward must return [B, P, D] or [B, D], got shape {tuple(o.shape)}"
        )
    if like is not None and o.shape != like.shape:
        raise ValueError(
            f"PseuZO.step: forward returned {tuple(like.shape)} and then {tuple(o.shape)}; both passes of a step "
            "must run on the same batch"
        )
    return o.detach()


def _gradient(
    head: Callable[[Tensor], Tensor], o0: Tensor, exact: list[Tensor]
) -> tuple[Tensor, ...]:
    """The mean loss, e = dg/do at o0, and the gradients of the parameters `exact`."""
    with torch.inference_mode(False), torch.enable_grad():
        o = o0.clone().requires_grad_()
        loss = head(o)
        if not isinstance(loss, Tensor) or (
            loss.numel() != 1 and (loss.dim() != 1 or loss.numel() == 0)
        ):
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                "PseuZO.step: head must return a scalar loss, or a vector of per-example losses, got "
                f"{got}; reduce it, e.g. .mean()"
            )
        loss = loss.mean() if loss.numel() > 1 else loss.reshape(())
        if not loss.requires_grad:
            raise ValueError("PseuZO.step: the loss does not depend on the output given to head")
        with torch.autograd.set_multithreading_enabled(
            False
        ):  # another thread would need its own cuBLAS workspace
            e, *gradients = torch.autograd.grad(loss, [o, *exact], allow_unused=True)
    if e is None:
        raise ValueError("PseuZO.step: the loss does not depend on the output given to head")
    for p, gradient in zip(exact, gradients, strict=True):
        if gradient is None:
            raise ValueError(
                f"PseuZO.step: the head does not use a parameter of shape {tuple(p.shape)} that is to be trained by "
                "the exact gradient (exact_gradient=True); only weights of the head have one"
            )
    return loss.detach(), e, *gradients
