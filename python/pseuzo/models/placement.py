"""Where the noise goes: patterns of parameter names, and a probe that finds out where it pays.

    where = place(model, ["attention-out"])                         # {parameter: noise scale}
    opt = MeZO(param_groups(model, where, lr=1e-5, weight_decay=0.0), lr=1e-5, model=model)

Near the largest stable learning rate, a step along noise of scales D gains about g^T D^2 g / tr(D^2 H), g the gradient
and H the Hessian of the loss. Both are averages of what two more forward passes along z show, so a few hundred of them
tell groups of weights apart:

    rows = probe(model, groups_of(model), closures)
    where = place(model, choose(rows))
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pseuzo.optim.seeds import step_seed
from pseuzo.perturb.contexts import frozen_mode
from pseuzo.perturb.module import forget_passes, passes_of

PROBE_DOMAIN = 0x70726F6265  # keeps the probe's noise apart from the run's
LARGEST_EPS = 10.0  # times the eps given; see probe

HEADS = {"lm_head", "embed_out", "score"}
ROLES = {
    "embedding": ("embed_tokens", "wte", "embed_in", "word_embeddings"),
    "positions": ("embed_positions", "wpe", "position_embeddings", "token_type_embeddings"),
    "q": ("q_proj", "query", "q_lin"),
    "k": ("k_proj", "key", "k_lin"),
    "v": ("v_proj", "value", "v_lin"),
    "qkv": ("c_attn", "query_key_value", "qkv_proj", "Wqkv"),
    "out": ("out_proj", "o_proj", "out_lin"),
    "mlp-in": (
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "fc1",
        "fc_in",
        "c_fc",
        "dense_h_to_4h",
        "intermediate",
    ),
    "mlp-out": ("down_proj", "fc2", "fc_out", "dense_4h_to_h"),
}
_ROLE_OF = {module: role for role, modules in ROLES.items() for module in modules}
ATTENTION = ("attn", "attention", "self_attn", "self_attention")
ATTENTION_OUT = ("v", "qkv", "out")  # the roles of the preset; fused projections have v in them
PRESETS = ("all", "attention-out", "last-half")
THIRDS = ("early", "middle", "late")


def _role(name: str, p: Tensor) -> str:
    """What a parameter does, by the names of its modules; "small" for norms and biases, "other" if it is not known."""
    if p.dim() < 2 or name.endswith("bias"):
        return "small"
    parts = name.split(".")
    if not HEADS.isdisjoint(parts):
        return "head"
    for part in reversed(parts):
        if part in _ROLE_OF:
            return _ROLE_OF[part]
        if part in ("c_proj", "dense"):  # of attention and of the MLP alike
            if any(other in ATTENTION for other in parts):
                return "out"
            return "mlp-in" if "intermediate" in parts else "mlp-out"
    return "other"


def _layer(name: str) -> int | None:
    """The number of the layer that a parameter is in: the first number in its name."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else None


def _depth(model: nn.Module) -> int:
    return (
        max(
            (layer for name, _ in model.named_parameters() if (layer := _layer(name)) is not None),
            default=-1,
        )
        + 1
    )


def groups_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters that require grad, by role and by third of the depth: "v:late" and the like. Roles: embedding,
    positions, q, k, v, qkv (where they are one weight), out (of the attention), mlp-in, mlp-out, small (norms and
    biases), head, other. Parameters outside the layers have no third. place() knows these names too."""
    depth, groups = _depth(model), {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer = _layer(name)
            third = "" if layer is None else f":{THIRDS[3 * layer // depth]}"
            groups.setdefault(_role(name, p) + third, []).append(p)
    return groups


def _preset(model: nn.Module, preset: str) -> list[nn.Parameter]:
    """The parameters that require grad and are the preset's. ValueError where it has no meaning for the model."""
    named, depth = list(model.named_parameters()), _depth(model)
    kind = type(model).__name__
    if preset == "all":
        return [p for _, p in named if p.requires_grad]
    if preset == "last-half":
        if depth < 2:
            raise ValueError(
                f"place: {kind} has no layers that are known here; give names of parameters for last-half"
            )
        return [p for name, p in named if p.requires_grad and 2 * (_layer(name) or 0) >= depth]
    if not any(_role(name, p) in ATTENTION_OUT and _layer(name) is not None for name, p in named):
        raise ValueError(
            f"place: {kind} has no attention weights of a known name; give names of parameters for attention-out"
        )
    return [
        p
        for name, p in named
        if p.requires_grad and _role(name, p) in ATTENTION_OUT and _layer(name)
    ]


def place(model: nn.Module, patterns: Iterable[str]) -> dict[nn.Parameter, float]:
    """The noise scale of every parameter that takes noise, in the order of the model; the others get none.

    patterns: NAME or NAME=SCALE, later ones override earlier ones, scale 0 excludes. A name is a preset, a group of
    groups_of ("v:late"), or a glob of parameter names or of whole ends of them ("v_proj.weight", "layers.3.*"). Only
    parameters that require grad count. Presets:
        all             every parameter
        attention-out   weights of the value and output projections of attention, in all layers but the first (where
                        query, key and value are one weight: that one)
        last-half       the upper half of the layers
    ValueError: a pattern that matches nothing, a scale that is no number from 0, or nothing that is left.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = groups_of(model)
    scales: dict[nn.Parameter, float] = {}
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        what, _, scale_text = pattern.partition("=")
        try:
            scale = float(scale_text) if "=" in pattern else 1.0
        except ValueError:
            scale = math.nan
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(
                f"place: the scale in {pattern!r} must be a number from 0, got {scale_text!r}"
            )
        if what in PRESETS:
            found = _preset(model, what)
        else:
            found = [p for name, ps in groups.items() if fnmatchcase(name, what) for p in ps]
            found += [
                p
                for name, p in named.items()
                if fnmatchcase(name, what) or fnmatchcase(name, f"*.{what}")
            ]
        if not found and what == "auto":
            raise ValueError(
                "place: auto is for noise_on, where it stands alone: no scale, no other pattern beside it"
            )
        if not found:
            raise ValueError(
                f"place: no parameter that is trained matches {what!r}{_hint(what, named, groups)}"
            )
        scales.update(dict.fromkeys(found, scale))
    placement = {p: scales[p] for p in named.values() if scales.get(p)}
    if not placement:
        raise ValueError(
            f"place: no parameter is left to take noise after {' '.join(patterns) or 'no pattern'}"
        )
    return placement


def _hint(what: str, named: Iterable[str], groups: Iterable[str]) -> str:
    """Names like it: whole ones if it has a dot and a number, else their last two parts."""
    ends = {".".join(name.split(".")[-2:]) for name in named}
    near = difflib.get_close_matches(
        what, [*PRESETS, *groups, *sorted(ends), *named], n=3, cutoff=0.5
    )
    return (
        f"; near it: {', '.join(near)}"
        if near
        else f"; some names: {', '.join([*PRESETS, *sorted(ends)][:6])}"
    )


def param_groups(
    model: nn.Module,
    placement: Mapping[nn.Parameter, float],
    *,
    lr: float,
    weight_decay: float = 0.0,
) -> list[dict]:
    """Groups for PseuZO, MeZO or an optimizer of torch's: by noise scale and weight decay, which norms and biases are
    spared."""
    groups: dict[tuple, dict] = {}
    for name, p in model.named_parameters():
        if p in placement:
            decay = 0.0 if _role(name, p) == "small" else weight_decay
            key = placement[p], decay
            group = groups.setdefault(
                key, {"params": [], "lr": lr, "weight_decay": decay, "noise_scale": placement[p]}
            )
            group["params"].append(p)
    return list(groups.values())


@dataclass
class Row:
    """What the probe saw of one group; z is noise on that group alone. Errors are standard errors of the means."""

    name: str
    parameters: float  # elements, each counted with the square of its noise scale
    slope2: float  # mean of (z . gradient)^2
    slope2_error: float
    curvature: float  # mean of z^T H z
    curvature_error: float
    fisher: float = (
        math.nan
    )  # mean of the examples' (z . gradient_i)^2; NaN without per-example losses
    fisher_error: float = math.nan
    forwards: int = 0

    @property
    def cost(self) -> tuple[float, float]:
        """What noise on the group costs, tr H, and its standard error: by fisher where there is one."""
        by_fisher = math.isfinite(self.fisher)
        return (
            (self.fisher, self.fisher_error)
            if by_fisher
            else (self.curvature, self.curvature_error)
        )


@torch.no_grad()
def probe(
    model: nn.Module,
    groups: Mapping[str, Iterable[nn.Parameter] | Mapping[nn.Parameter, float]],
    closures: Iterable[Callable[[], Tensor]],
    *,
    eps: float = 1e-3,
    directions: int = 1,
    noise: str = "hadamard",
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> list[Row]:
    """Slope and curvature of the loss along noise on each group alone, by forward passes; the weights are not written.

    groups: name -> parameters, or parameter -> noise scale. closures: one per batch, () -> loss of that batch (a scalar
    or per-example losses), each called 1 + 2 * groups * directions times, in eval mode. progress: called after every
    pass. For each batch and direction, with fresh noise z on the group and losses L0 at x and L+ and L- at x +- eps z:

        slope = (L+ - L-) / (2 eps)              mean of slope^2:   estimates |g|^2, g the gradient of the group
        curvature = (L+ + L- - 2 L0) / eps^2     mean of it:        estimates tr H of the group

    (with scales D: |D g|^2 and tr D^2 H.) The curvature is noisy and often comes out negative. If the closures return
    per-example losses, fisher is the mean over examples of the squares of their own slopes: for negative log
    likelihoods of a model that is about calibrated it estimates tr H too (its Gauss-Newton part, which has nearly all
    of the trace), is never negative and a lot less noisy. For other losses, return their mean.

    g is the gradient of a batch, so |g|^2 is that of the whole data plus the variance of the batch's: it favours groups
    with noisy gradients, the more the smaller the batches. Differences of losses drown in their rounding where eps is
    small: a group that has a share f of all parameters of `groups` is probed with eps / sqrt(f), as long a step as
    noise on all of them, though at most 10 eps.
    """
    closures = list(closures)
    if not closures or directions < 1 or not groups:
        raise ValueError("probe: needs at least one group, one closure and one direction")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"probe: eps must be positive, got {eps}")
    streams = {p: i for i, p in enumerate(model.parameters())}
    scales = {
        name: dict(g) if isinstance(g, Mapping) else dict.fromkeys(g, 1.0)
        for name, g in groups.items()
    }
    sizes = {name: sum(p.numel() * s * s for p, s in g.items()) for name, g in scales.items()}
    if not all(sizes.values()):
        raise ValueError(
            "probe: a group has no parameters: "
            + ", ".join(n for n, size in sizes.items() if not size)
        )
    whole = sum(p.numel() for p in {p for g in scales.values() for p in g})

    def losses_of(closure: Callable[[], Tensor]) -> Tensor:
        losses = torch.as_tensor(closure()).float()
        if progress is not None:
            progress()
        return losses

    rows = []
    with frozen_mode(model):
        clean = [losses_of(closure) for closure in closures]
        for name, group in scales.items():
            places = {p: (streams[p], scale) for p, scale in group.items()}
            by = eps * min(LARGEST_EPS, max(1.0, math.sqrt(whole / sizes[name])))
            passes, seen = passes_of(model, places, noise), []
            for i in range(len(closures) * directions):
                at_x, closure, z = (
                    clean[i // directions],
                    closures[i // directions],
                    step_seed(seed, i, PROBE_DOMAIN),
                )
                with passes.at(z, by, "probe"):
                    plus = losses_of(closure)
                with passes.at(z, -by, "probe"):
                    minus = losses_of(closure)
                slopes, curvature = (
                    (plus - minus) / (2 * by),
                    ((plus - at_x) + (minus - at_x)) / (by * by),
                )
                fisher = (
                    slopes.square().mean() if slopes.numel() > 1 else slopes.new_full((), math.nan)
                )
                seen.append(torch.stack([slopes.mean().square(), curvature.mean(), fisher]))
            rows.append(
                Row(
                    name, sizes[name], *_means_and_errors(torch.stack(seen)), forwards=2 * len(seen)
                )
            )
    forget_passes(model)  # frees their scratch
    return rows


def _means_and_errors(samples: Tensor) -> list[float]:
    """The mean of each column of [n, m], and after each its standard error: infinite for one sample."""
    samples = samples.double().cpu()
    n = len(samples)
    errors = samples.std(0) / math.sqrt(n) if n > 1 else torch.full_like(samples[0], math.inf)
    return torch.stack([samples.mean(0), errors], dim=1).flatten().tolist()


def choose(rows: Iterable[Row]) -> list[str]:
    """The names of the groups that noise should go to: those whose slope2 / cost is at least half of the best.

    cost is a row's fisher, or its curvature where there is none; below its standard error it is taken for that error,
    so a group whose curvature was not seen (or came out negative) wins nothing by it. The best is judged with a
    standard error against it on both counts, as the largest of many noisy ratios is too large. If no slope is clear of
    its error, all groups are returned: nothing was learned.
    """
    rows = list(rows)
    names = [r.name for r in rows]
    rows = [
        r
        for r in rows
        if all(map(math.isfinite, (r.slope2, r.slope2_error, *r.cost))) and max(r.cost) > 0
    ]
    sure = [r for r in rows if r.slope2 > r.slope2_error]
    if not sure:
        return names
    best = max((r.slope2 - r.slope2_error) / (max(r.cost) + r.cost[1]) for r in sure)
    return [r.name for r in rows if r.slope2 / max(r.cost) >= best / 2]


class Scaled(NamedTuple):
    """lr and eps for another placement of the noise, and a sentence that says by what they were scaled."""

    lr: float
    eps: float
    how: str


def equal_change(lr: float, eps: float, everywhere: Row, here: Row) -> Scaled:
    """lr and eps such that noise `here` changes the loss as much, on average, as noise `everywhere` does at lr and eps.

    E[L(x + eps z) - L(x)] = eps^2 / 2 * tr(D^2 H) =: eps^2 / 2 * T, and the largest stable lr is about 1 / T; so
    lr * T_everywhere / T_here and eps * sqrt(of that). T is the cost of the rows, if both are at least twice their
    standard error, else in proportion to the number of parameters (each with its scale squared).
    """
    (whole, whole_error), (part, part_error) = everywhere.cost, here.cost
    if all(math.isfinite(error) and t > 2 * error for t, error in (everywhere.cost, here.cost)):
        ratio = whole / part
        how = f"the curvature along the noise is {1 / ratio:.3g} of that along noise on all parameters"
    else:
        ratio = everywhere.parameters / here.parameters
        how = (
            f"the curvature along the noise could not be measured ({part:.3g} +- {part_error:.2g}, on all parameters "
            f"{whole:.3g} +- {whole_error:.2g}); by the share of the parameters, {1 / ratio:.3g}"
        )
    return Scaled(lr * ratio, eps * math.sqrt(ratio), how)
