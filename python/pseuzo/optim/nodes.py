"""PseuZO by node perturbation: noise on the outputs of layers in place of their weights.

It trains networks from scratch, where noise on all weights has too many directions: a layer has
fewer outputs than weights, and each example has noise of its own. A clean pass gives the layers'
inputs, the output o and e = dg/do, the exact gradient of the loss with respect to o. Another pass
adds noise eps z_l to the outputs of the layers l, which changes o by do. For one example,

    E[z_l <do, e>] / eps = J_l^T e,    J_l = do / d(output of layer l),

is the gradient with respect to the layer's output, to the first order in eps: noise on another
layer or another example has mean 0 and drops out. The gradient of the weights follows by autograd
through that one layer (for a linear layer, dW = sum_b gradient_b input_b^T).

The window is PseuZO's EMA of Jacobians, kept for each layer. The seeds and do of the last K steps
give J_l = <do z_l^T> / eps, measured at other inputs, whose rows are paired with the present ones.

Source: PseuZO (NeurIPS 2025), Section 4.4. The paper has no formula for the pairing, so the one
here is ours. Its local losses are left out.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.interrupts import cleanly, uninterrupted
from pseuzo.machine import refuse_replicas
from pseuzo.optim.groups import check_numbers
from pseuzo.optim.outputs import as_output, head_gradients
from pseuzo.optim.passes import without_autograd
from pseuzo.optim.seeds import direction_seed
from pseuzo.perturb.contexts import frozen_mode, no_cached_casts, outside_inference_mode
from pseuzo.perturb.offloaded import store_of
from pseuzo_kernels import noise
from pseuzo_kernels.checks import check_count, check_noise, signed64

SETTINGS = ("eps", "directions", "window", "momentum", "together", "noise", "seed")


@dataclass(frozen=True)
class Entry:
    """What a step leaves in the window.

    seeds: [q], one per direction. changes: [q, n, B, D] fp32 or fp64, how the noise on each layer
    changed the model's output (together: n = 1, the noise on all layers). groups: [B], one per row.
    shapes: number of a layer that took noise -> shape of a row of its output.
    """

    seeds: tuple[int, ...]
    changes: Tensor
    groups: Tensor
    shapes: dict[int, tuple[int, ...]]


class _Hooks:
    """Hooks on the layers of a model; they do nothing while `shift` and `clean` are off.

    clean: each layer runs with autograd on a detached input, and passes a detached output on.
    shift: a function (number of the layer, output) -> the output with noise.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self.clean = False
        self.shift: Callable[[int, Tensor], Tensor] | None = None
        self.outputs: dict[int, Tensor] = {}  # with the graph of their layer
        self.passed_on: dict[int, Tensor] = {}
        self.handles: list[Any] = []

    def install(self) -> None:
        for i, layer in enumerate(self.layers):
            self.handles.append(
                layer.register_forward_pre_hook(partial(self._before, i), with_kwargs=True)
            )
            self.handles.append(layer.register_forward_hook(partial(self._after, i)))

    def remove(self) -> None:
        self.clean, self.shift = False, None
        for handle in self.handles:
            handle.remove()

    def _before(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> Any:
        if not self.clean:
            return None
        if i in self.outputs:
            raise ValueError(
                f"NodePseuZO: layer {i} ({type(layer).__name__}) runs twice in a pass, and each of "
                "its outputs would need noise of its own; give the module that runs it as a layer"
            )
        cut = lambda x: x.detach() if isinstance(x, Tensor) else x  # noqa: E731
        return tuple(map(cut, args)), {k: cut(v) for k, v in kwargs.items()}

    def _after(self, i: int, layer: nn.Module, args: tuple, output: Any) -> Any:
        if self.clean:
            if not isinstance(output, Tensor) or not output.dtype.is_floating_point:
                raise TypeError(
                    f"NodePseuZO: layer {i} ({type(layer).__name__}) must return a floating-point "
                    f"tensor, got {type(output).__name__}"
                )
            self.outputs[i], self.passed_on[i] = output, output.detach()
            return self.passed_on[i]
        return None if self.shift is None else self.shift(i, output)


class NodePseuZO:
    """Fills .grad of the layers' weights, from forward passes with noise on the layers' outputs.

        nodes = NodePseuZO(model)
        optimizer = torch.optim.Adam(model.parameters())
        for x, y in batches:
            optimizer.zero_grad()
            nodes.backward(lambda: model(x), lambda o: nn.functional.cross_entropy(o, y))
            optimizer.step()

    layers: types of modules, or a list of modules of the model, none of which contains another.
    Each layer is differentiated alone and exactly, from its output to its weights. If a block of a
    layer with its activation is one of the layers, the activation is differentiated exactly too,
    and noise only estimates what follows the block. Layers without a trained weight take no noise,
    and weights outside of all layers get no gradient. The layer whose output is the model's gets
    the exact gradient.

    With z_k,l,i the noise of step k at layer l and row (example) i, and do_k,l,i the change that it
    made in the model's output, the gradient at row b of a layer's output is

        G_l,b = sum_k lambda^age_k sum_i P_k,b,i <do_k,l,i, e_b> z_k,l,i / (eps sum_k lambda^age_k)

    over the last `window` steps. P pairs the rows. In the newest step each row is its own pair, so
    window=1 estimates the gradient without bias (to the first order in eps). In an older step P is
    1 / n for the n rows in the same group as b (groups=None: for all rows), and 0 for others. Such
    a step adds the mean Jacobian of those rows. It belongs to other inputs and older weights, which
    adds some bias and takes away a lot of variance. momentum: lambda.
    directions: q draws of noise per step, averaged. together: all layers take noise in the same
    pass, so a step has 1 + q passes. Otherwise each layer has a pass of its own, 1 + q n for n
    layers with noise, and the noise of one layer is not in the estimate of another.
    noise, seed: as in MeZO; layer l has the noise of stream l of the step's seeds, made again where
    it is needed.
    The passes run with the model in eval mode. Beyond inference, the clean pass keeps each layer's
    input in memory, as backpropagation does, and the window keeps K q n outputs of the model.
    An interrupt leaves a step undone or done, and state_dict() continues to the bit. Source: see
    the module.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[type | nn.Module] = (nn.Linear, nn.Conv2d),
        eps: float = 1e-3,
        *,
        directions: int = 1,
        window: int = 14,
        momentum: float = 1.0,
        together: bool = True,
        noise: str = "hadamard",
        seed: int = 0,
    ):
        refuse_replicas("NodePseuZO")
        if store_of(model) is not None:
            raise ValueError(
                "NodePseuZO: it differentiates layers, which need their weights on the device, and "
                "this model is offloaded; leave that off, or train by PseuZO"
            )
        check_noise("NodePseuZO", noise)
        check_numbers("NodePseuZO", eps=eps, clip_examples=None)
        for key, value in (("directions", directions), ("window", window)):
            check_count("NodePseuZO", key, value)
        if not 0 <= momentum <= 1:
            raise ValueError(f"NodePseuZO: momentum must be in 0 .. 1, got {momentum}")
        self.model, self.layers = model, _found(model, layers)
        self.eps, self.directions, self.window = float(eps), directions, window
        self.momentum, self.together = float(momentum), together
        self.noise, self.seed = noise, signed64("NodePseuZO", seed)
        self.forwards = 0  # passes so far
        self._held: tuple[int, tuple[Entry, ...]] = 0, ()  # steps so far, and the window

    @property
    def steps(self) -> int:
        """How many gradients were made."""
        return self._held[0]

    def backward(
        self,
        forward: Callable[[], Tensor],
        head: Callable[[Tensor], Tensor],
        groups: Tensor | list[int] | None = None,
    ) -> Tensor:
        """Add the estimates to .grad, as loss.backward() does; return the loss at the weights.

        forward() -> o, [B, P, D] or [B, D], which runs the model; head(o) -> loss, a scalar or
        per-example losses, whose mean is taken. The layers' outputs have B rows, too. groups: [B]
        integers, see the class. If the loss is not finite, neither are the gradients. Changes that
        are not finite enter the window as 0.
        """
        hooks = _Hooks(self.layers)
        return cleanly(partial(self._backward, hooks, forward, head, groups), hooks.remove)

    def _backward(self, hooks: _Hooks, forward: Any, head: Any, groups: Any) -> Tensor:
        with ExitStack() as stack:
            for context in (frozen_mode(self.model), no_cached_casts()):
                stack.enter_context(context)
            hooks.install()
            hooks.clean = True
            with outside_inference_mode(), torch.enable_grad():
                given = forward()
            hooks.clean = False
            o = as_output(given, op="NodePseuZO.backward")
            loss, e = head_gradients(head, o, [], op="NodePseuZO.backward")
            gradients, noisy = _exact(hooks, given, e)
            with without_autograd():
                entry = self._measured(hooks, forward, o, noisy, groups)
            entries = (*self._held[1], entry)[-self.window :]
            sizes = [(other.shapes, other.changes.shape[3]) for other in entries]
            if any(size != sizes[-1] for size in sizes):
                raise ValueError(
                    "NodePseuZO.backward: the layers that take noise, or the sizes of a row of "
                    "their outputs or of the model's, are others than in the window; make a new "
                    "NodePseuZO for them, or use window=1"
                )
            with without_autograd():
                gradients |= {
                    i: self._at_output(i, n, hooks.outputs[i], e, entries)
                    for n, i in enumerate(noisy)
                }
            found: dict[Tensor, Tensor] = {}
            for i, gradient in gradients.items():
                params = [p for p in self.layers[i].parameters() if p.requires_grad]
                parts = torch.autograd.grad(
                    hooks.outputs[i], params, gradient.to(hooks.outputs[i].dtype), allow_unused=True
                )
                for p, part in zip(params, parts, strict=True):
                    if part is not None:
                        found[p] = part if p not in found else found[p] + part
            kept = entry.changes
            kept = torch.where(kept.isfinite().all(), kept, torch.zeros_like(kept))
            entries = (*entries[:-1], replace(entry, changes=kept))
            with without_autograd():
                found = {p: g if p.grad is None else p.grad + g for p, g in found.items()}
        uninterrupted(self._keep, found, entries)
        return loss

    def _keep(self, found: Mapping[Tensor, Tensor], entries: tuple[Entry, ...]) -> None:
        for p, gradient in found.items():
            p.grad = gradient
        self._held = self.steps + 1, entries
        self.forwards += 1 + self.directions * entries[-1].changes.shape[1]

    def _measured(
        self, hooks: _Hooks, forward: Callable[[], Tensor], o: Tensor, noisy: list[int], groups: Any
    ) -> Entry:
        """Run the passes with noise."""
        seeds = tuple(direction_seed(self.seed, self.steps, j) for j in range(self.directions))
        together = [noisy] if self.together else [[i] for i in noisy]
        changes = []
        for seed in seeds:
            for active in together if noisy else ():
                hooks.shift = partial(self._shifted, seed, frozenset(active))
                output = as_output(forward(), like=o, op="NodePseuZO.backward")
                changes.append(_wide(output) - _wide(o))
        hooks.shift = None
        if groups is None:
            groups = torch.zeros(len(o), dtype=torch.int64)
        groups = torch.as_tensor(groups).to(o.device, non_blocking=True)
        if groups.shape != (len(o),) or groups.dtype.is_floating_point:
            raise ValueError(
                f"NodePseuZO.backward: groups must be {len(o)} integers, one per row of the "
                f"output, got shape {tuple(groups.shape)} {groups.dtype}"
            )
        shape = len(seeds), -1 if changes else 0, *o.flatten(1).shape
        stacked = torch.stack(changes) if changes else o.new_zeros(0)
        shapes = {i: tuple(hooks.outputs[i].shape[1:]) for i in noisy}
        return Entry(seeds, stacked.view(shape), groups, shapes)

    def _noise(self, seed: int, i: int, shape: Iterable[int], device: torch.device) -> Tensor:
        return noise(tuple(shape), seed, i, noise=self.noise, device=device)

    def _shifted(self, seed: int, active: frozenset[int], i: int, output: Tensor) -> Tensor:
        if i not in active:
            return output
        z = self._noise(seed, i, output.shape, output.device)
        wide = _wide(output)
        return (wide + self.eps * z.to(wide.dtype)).to(output.dtype)

    def _at_output(
        self, i: int, n: int, output: Tensor, e: Tensor, entries: tuple[Entry, ...]
    ) -> Tensor:
        """G of layer i, in the shape of its output. n: its index among the layers with noise."""
        e, groups = _wide(e).flatten(1), entries[-1].groups
        total = torch.zeros(output.shape, dtype=e.dtype, device=output.device)
        weights = [self.momentum**age for age in range(len(entries))]
        for age, entry in enumerate(reversed(entries)):
            share = weights[age] / (sum(weights) * len(entry.seeds) * self.eps)
            if not share:
                continue
            rows = entry.changes.shape[2]
            for seed, changes in zip(entry.seeds, entry.changes, strict=True):
                change = changes[0 if self.together else n]
                z = self._noise(seed, i, (rows, *output.shape[1:]), output.device)
                if age == 0:
                    slopes = (change * e).sum(1).view(-1, *[1] * (output.dim() - 1))
                    total += share * slopes * z
                    continue
                same = (groups[:, None] == entry.groups[None, :]).to(e.dtype)
                pairs = (e @ change.T) * same / same.sum(1, keepdim=True).clamp(min=1)
                total += share * (pairs @ z.flatten(1).to(e.dtype)).view_as(total)
        return total

    # State

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "NodePseuZO cannot be copied or pickled, as it belongs to its model; make a new one of "
            "the other model, and give it state_dict()"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next gradient depends on: the settings, the steps and the window."""
        steps, entries = self._held
        settings = {name: getattr(self, name) for name in SETTINGS}
        window = [{**vars(entry), "seeds": list(entry.seeds)} for entry in entries]
        so_far = {"steps": steps, "forwards": self.forwards, "entries": window}
        return {"settings": settings, "layers": len(self.layers), **so_far}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as the saved one would have. ValueError, with nothing changed, if its number of
        layers is another."""
        if state.get("layers") != len(self.layers):
            raise ValueError(
                f"NodePseuZO.load_state_dict: the state has {state.get('layers')} layers, and this "
                f"NodePseuZO has {len(self.layers)}"
            )
        device = next(self.model.parameters()).device
        entries = tuple(
            Entry(
                tuple(entry["seeds"]),
                entry["changes"].to(device),
                entry["groups"].to(device),
                {i: tuple(shape) for i, shape in entry["shapes"].items()},
            )
            for entry in state["entries"]
        )
        for name, value in state["settings"].items():
            setattr(self, name, value)
        self.forwards, self._held = state["forwards"], (state["steps"], entries)


def _exact(hooks: _Hooks, o: Tensor, e: Tensor) -> tuple[dict[int, Tensor], list[int]]:
    """The gradient of the layer whose output is o, and the numbers of the layers with noise."""
    exact, noisy = {}, []
    for i, output in hooks.outputs.items():
        if not any(p.requires_grad for p in hooks.layers[i].parameters()):
            continue
        if hooks.passed_on[i] is o:
            exact[i] = e
            continue
        if len(output) != len(o):
            raise ValueError(
                f"NodePseuZO: layer {i} ({type(hooks.layers[i]).__name__}) has an output of "
                f"shape {tuple(output.shape)}, which must begin with the {len(o)} rows of "
                "forward's output"
            )
        noisy.append(i)
    if not exact and not noisy:
        raise RuntimeError(
            "NodePseuZO: the pass used no layer with a trained weight; run that very model in "
            "it, not a copy"
        )
    return exact, sorted(noisy)


def _found(model: nn.Module, layers: Iterable[type | nn.Module]) -> list[nn.Module]:
    """The modules that are meant, in the order of model.modules()."""
    layers = [layers] if isinstance(layers, type | nn.Module) else list(layers)
    types = tuple(layer for layer in layers if isinstance(layer, type))
    modules = [layer for layer in layers if isinstance(layer, nn.Module)]
    own = list(model.modules())
    for layer in modules:
        if not any(layer is module for module in own):
            raise ValueError(f"NodePseuZO: a {type(layer).__name__} is not one of the model's")
    found = [m for m in own if isinstance(m, types) or any(m is layer for layer in modules)]
    for layer in found:
        if any(other is not layer and other in layer.modules() for other in found):
            raise ValueError(
                f"NodePseuZO: a {type(layer).__name__} contains another of the layers; give only "
                "one of the two"
            )
    if not any(p.requires_grad for layer in found for p in layer.parameters()):
        raise ValueError("NodePseuZO: none of the layers has a weight that requires grad")
    return found


def _wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if that is its dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
