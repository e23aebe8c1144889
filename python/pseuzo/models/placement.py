"""Where the noise goes, by patterns of parameter names.

    where = place(model, ["attention-out"])  # {parameter: noise scale}
    opt = MeZO(param_groups(model, where, lr=1e-5, weight_decay=0.0), lr=1e-5, model=model)

`pseuzo.train.contest` compares `candidates`.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn

HEADS = {"lm_head", "embed_out", "score", "classifier"}
ROLES = {
    "embedding": ("embed_tokens", "wte", "embed_in", "word_embeddings"),
    "positions": ("embed_positions", "wpe", "position_embeddings", "token_type_embeddings"),
    "q": ("q_proj", "query", "q_lin", "query_proj"),
    "k": ("k_proj", "key", "k_lin", "key_proj"),
    "v": ("v_proj", "value", "v_lin", "value_proj"),
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
OUTSIDE = ("embedding", "positions", "head")  # the roles of what is not in a layer


def _role(name: str, p: Tensor) -> str:
    """Return what a parameter does, by the names of its modules: "small" for norms and biases,
    "other" if that is not known."""
    if p.dim() < 2 or name.endswith("bias"):
        return "small"
    parts = name.split(".")
    if not HEADS.isdisjoint(parts):
        return "head"
    for part in reversed(parts):
        if part in _ROLE_OF:
            return _ROLE_OF[part]
        if part in ("c_proj", "dense"):  # names that attention and MLP share
            if any(other in ATTENTION for other in parts):
                return "out"
            return "mlp-in" if "intermediate" in parts else "mlp-out"
    return "other"


def _layer(name: str) -> int | None:
    """Return the number of the layer that a parameter is in: the first number in its name."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else None


def _depth(model: nn.Module) -> int:
    """Return the number of layers."""
    layers = [_layer(name) for name, _ in model.named_parameters()]
    return max((layer + 1 for layer in layers if layer is not None), default=0)


def groups_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that require grad, by role and third of the depth, such as "v:late".

    Roles: embedding, positions, q, k, v, qkv (if they are one weight), out (of the attention),
    mlp-in, mlp-out, small (norms and biases), head, other. Parameters outside the layers have no
    third. place() takes these names too.
    """
    depth, groups = _depth(model), dict[str, list[nn.Parameter]]()
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer = _layer(name)
            third = "" if layer is None else f":{THIRDS[3 * layer // depth]}"
            groups.setdefault(_role(name, p) + third, []).append(p)
    return groups


def _preset(model: nn.Module, preset: str) -> list[nn.Parameter]:
    """Return the parameters of a preset that require grad. ValueError if the preset has no meaning
    for the model."""
    named, depth = list(model.named_parameters()), _depth(model)
    kind = type(model).__name__
    if preset == "all":
        return [p for _, p in named if p.requires_grad]
    if preset == "last-half":
        if depth < 2:
            raise ValueError(
                f"place: the layers of {kind} are not known; give names of parameters instead of "
                "last-half"
            )
        return [p for name, p in named if p.requires_grad and 2 * (_layer(name) or 0) >= depth]
    if not any(_role(name, p) in ATTENTION_OUT and _layer(name) is not None for name, p in named):
        raise ValueError(
            f"place: {kind} has no attention weights of a known name; give names of parameters "
            "instead of attention-out"
        )
    return [
        p
        for name, p in named
        if p.requires_grad and _role(name, p) in ATTENTION_OUT and _layer(name)
    ]


def place(model: nn.Module, patterns: Iterable[str]) -> dict[nn.Parameter, float]:
    """Return the noise scale of every parameter that takes noise, in the order of the model.

    patterns: NAME or NAME=SCALE; later ones override earlier ones, and scale 0 excludes. A name is
    a preset, a group of groups_of ("v:late"), or a glob of parameter names or of whole ends of them
    ("v_proj.weight", "layers.3.*"). Only parameters that require grad count. Presets:

        all             every parameter
        attention-out   weights of the value and output projections of attention, in all layers but
                        the first (where query, key and value are one weight: that one)
        last-half       the upper half of the layers

    ValueError if a pattern matches nothing, if a scale is not a number of at least 0, or if no
    parameter is left.
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
                f"place: the scale in {pattern!r} must be a number of at least 0, got "
                f"{scale_text!r}"
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
                "place: auto is a value of noise_on alone, without a scale and without other "
                "patterns"
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


def candidates(model: nn.Module, dominant: str | None = None) -> dict[str, list[str]]:
    """Return placements that are worth comparing, by name, as patterns for place(); "all" is first.

    The presets; all but embeddings, positions and head; and the layer `dominant`, the name of a
    module (see probe.first_outliers). Those that the model lacks are left out, and so is the second
    of two that hold the same parameters.
    """
    outside = [name for name in groups_of(model) if name in OUTSIDE]
    wanted = {preset: [preset] for preset in PRESETS}
    wanted["all but embeddings"] = ["all", *(f"{name}=0" for name in outside)]
    if dominant is not None:
        wanted[dominant] = [f"{dominant}.*"]
    found: dict[str, list[str]] = {}
    seen: list[dict[nn.Parameter, float]] = []
    for name, patterns in wanted.items():
        try:
            where = place(model, patterns)
        except ValueError:
            continue  # the model has no such parameters
        if where not in seen:
            seen.append(where)
            found[name] = patterns
    return found


def halves(model: nn.Module, patterns: Iterable[str]) -> dict[str, list[str]]:
    """Cut a placement into its lower and its upper layers, half of them each; {} if it is in one
    layer alone. What is outside of the layers is in neither half."""
    names = {p: name for name, p in model.named_parameters()}
    layers: dict[int, list[str]] = {}
    for p, scale in place(model, patterns).items():
        if (layer := _layer(names[p])) is not None:
            layers.setdefault(layer, []).append(f"{names[p]}={scale:g}")
    numbers = sorted(layers)
    cut = len(numbers) // 2
    parts = [numbers[:cut], numbers[cut:]] if cut else []
    return {
        f"layers {part[0]} to {part[-1]}": [name for layer in part for name in layers[layer]]
        for part in parts
    }


def _hint(what: str, named: Iterable[str], groups: Iterable[str]) -> str:
    """Return the end of an error: names near to one that matches nothing, or some names."""
    ends = {".".join(name.split(".")[-2:]) for name in named}
    if what in PRESETS:
        return ", as some modes train few; choose another placement, such as all"
    near = difflib.get_close_matches(
        what, [*PRESETS, *groups, *sorted(ends), *named], n=3, cutoff=0.5
    )
    if near:
        return f"; similar names: {', '.join(near)}"
    return f"; some names: {', '.join([*PRESETS, *sorted(ends)][:6])}"


def param_groups(
    model: nn.Module,
    placement: Mapping[nn.Parameter, float],
    *,
    lr: float,
    weight_decay: float = 0.0,
) -> list[dict]:
    """Make groups for PseuZO, MeZO or an optimizer of torch, by noise scale and weight decay.

    Norms and biases get no weight decay.
    """
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
