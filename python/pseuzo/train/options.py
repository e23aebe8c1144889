"""The options of a training run, each defined once: default, type, help, choices and range.

ZeroOrderOptions are the fields that PseuZOTrainingArguments adds to Transformers' arguments.
OPTIONS describes the same fields for the command line. To add an option, add a field here; if not
every method takes it, name it in the rows of METHODS that do. This module imports neither torch nor
Transformers, so `--help` is quick.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pseuzo.train.methods import METHODS, methods_with

# These two are repeated here, because pseuzo_kernels, which defines them, imports torch.
NOISES = ("hadamard", "hadamard-fp16", "rademacher", "normal")
ROUNDINGS = ("stochastic", "nearest")
SCHEDULES = ("constant", "linear", "reciprocal", "cyclic-hyperbola")
WEIGHTINGS = ("sum", "mean")
GROUPS = ("label", "row", "none")
HEADS = ("frozen", "exact")
READOUTS = ("none", "fit", "auto")
OBJECTIVES = ("loss", "metric")
MOMENTS = ("seeds", "state")
MASKS = ("small", "random")
OFFLOADS = ("none", "cpu")
SCORES = ("grasp", "magnitude", "random")
WEIGHTS = ("raw", "spread", "zscore", "rank")
# The default of directions: 1 for every method that is not named.
DIRECTIONS = ", ".join(
    ["1", *(f"{name} {m.directions}" for name, m in METHODS.items() if m.directions != 1)]
)
MOMENTA = "; ".join(f"{name} {METHODS[name].momentum:g}" for name in methods_with("momentum"))


@dataclass(frozen=True)
class Flag:
    """What the command line needs to know about an option besides its default, type and help."""

    name: str = ""  # such as "--lr", where it is not made from the field's name
    hidden: bool = False  # the command line sets it itself
    metavar: str | None = None
    positive: bool = False
    least: float | None = None
    most: float | None = None
    # Another option, and its values with which this one has an effect.
    only_with: Mapping[str, tuple[str, ...]] | None = None
    # The probe of noise_on uses this option under every method, wherever noise_on is not all.
    probes: bool = False


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    # HfArgumentParser passes the metadata to argparse: it must be keywords of add_argument.
    metadata: dict[str, Any] = {"help": help}
    if choices:
        metadata["choices"] = choices
    return field(default=default, metadata=metadata)


@dataclass
class ZeroOrderOptions:
    learning_rate: Annotated[float, Flag("--lr", least=0)] = _option(
        1e-6,
        "Initial learning rate; 0, with readout=fit, trains the head alone, by one pass a step.",
    )
    lr_scheduler_type: Annotated[str, Flag("--lr-scheduler")] = _option(
        "constant", "Transformers' schedule of the learning rate."
    )
    method: str = _option(
        "pseuzo", "Optimization method; fo-* use backpropagation, to compare.", tuple(METHODS)
    )
    eps: Annotated[float, Flag(positive=True, probes=True)] = _option(
        1e-3, "Size of the perturbation; fo-*: of the probe of noise_on."
    )
    window: Annotated[int, Flag(least=1)] = _option(
        14, "Number of past steps in the window of pseuzo, mezo-momentum and zo-adam."
    )
    moments: str = _option(
        "seeds",
        "Where zo-adam's moments come from: the seeds of the window, which take no memory, or two "
        "fp32 numbers per weight that include all steps (state).",
        MOMENTS,
    )
    momentum: Annotated[float | None, Flag(least=0, most=1)] = _option(
        None, f"Decay of the window (lambda) or of the momentum. Default: {MOMENTA}."
    )
    schedule: str = _option(
        "constant",
        "Schedule of pseuzo's lambda; cyclic-hyperbola is the published one.",
        SCHEDULES,
    )
    cycles: Annotated[int | None, Flag(least=1)] = _option(
        None,
        "Number of cycles of whole epochs, each of which repeats the schedule. Default: 1; "
        "cyclic-hyperbola 2.",
    )
    pseuzo_epochs: Annotated[int | None, Flag(least=1)] = _option(
        None,
        "Number of epochs at the start of each cycle that follow the schedule; in the rest, "
        "lambda is 0, which is MeZO. Default: all; cyclic-hyperbola 11.",
    )
    weighting: str = _option(
        "sum",
        "What pseuzo makes of its window: the sum of lambda^age times each entry, as in the "
        "published code, or their weighted mean, as in the paper.",
        WEIGHTINGS,
    )
    directions: Annotated[int | None, Flag(least=1)] = _option(
        None,
        "Number of perturbations per step (q); deepzero uses them in its first step. Default: "
        f"{DIRECTIONS}.",
    )
    blocks: Annotated[int, Flag(least=1)] = _option(
        4, "Number of blocks that zo-blocks cuts the weights into; each step trains one of them."
    )
    two_sided: Annotated[bool | None, Flag("--two-sided/--one-sided")] = _option(
        None,
        "Perturb to both sides. Default: mezo and evolution yes, pseuzo, fzoo and deepzero no.",
    )
    weights: str = _option(
        "rank",
        "How evolution weights a direction: by its slope (raw), by the slope over the spread of "
        "the losses, or by their z-score or rank.",
        WEIGHTS,
    )
    split_batch: bool = _option(
        False,
        "Measure each direction of fzoo or evolution on its own part of the batch: q directions "
        "then cost two forward passes.",
    )
    noise: Annotated[str, Flag(probes=True)] = _option(
        "hadamard",
        "Distribution of the noise; hadamard-fp16 sums over the window in half precision, which is "
        "faster on a GPU.",
        NOISES,
    )
    coordinates: Annotated[int, Flag(least=1)] = _option(
        32, "Number of weights that a step of deepzero estimates; each costs a forward pass."
    )
    scores: str = _option(
        "grasp",
        "What divides the coordinates of deepzero among the layers.",
        SCORES,
    )
    rounding: str = _option("stochastic", "Rounding of 16-bit weights.", ROUNDINGS)
    groups: str = _option(
        "label",
        "Pair rows of old batches with rows of the same label, with the same row (as published), "
        "or with all rows.",
        GROUPS,
    )
    noise_on: Annotated[list[str], Flag(metavar="PATTERN[=SCALE]")] = field(
        default_factory=lambda: ["all"],
        metadata={
            "help": "Where the noise goes: names or globs of parameters, attention-out, last-half, "
            "all; or auto, decided by a race. fo-*: which weights are trained, at SCALE^2 "
            "times the learning rate, because noise of that scale moves weights by as much."
        },
    )
    scale_lr: Annotated[bool, Flag(hidden=True)] = _option(
        False,
        "Scale the learning rate to noise_on: the same expected change of the loss as with noise "
        "on all weights.",
    )
    scale_eps: Annotated[bool, Flag(hidden=True)] = _option(
        False,
        "Scale eps to noise_on in the same way; with find_lr so that a perturbation is as long as "
        "one of all weights.",
    )
    probe_forwards: Annotated[int, Flag(hidden=True, least=1)] = _option(
        100, "Number of forward passes of the probe by which scale_lr and scale_eps scale."
    )
    find_lr: Annotated[bool, Flag(hidden=True)] = _option(
        False,
        "Measure the curvature T of the loss along the noise in every step, and take a rate of "
        "0.1 / T; the learning rate is ignored.",
    )
    search_share: Annotated[float, Flag(least=0, most=0.9)] = _option(
        0.25,
        "Share of the run's forward passes that a race, of --noise-on auto or of a readout with "
        "--lr auto, may take.",
    )
    clip_examples: Annotated[float | None, Flag(metavar="MULTIPLE", positive=True)] = _option(
        None,
        "Limit each example's projected gradient (fo-*: the norm of its gradient at the head's "
        "input) to this multiple of the batch's median.",
    )
    head: str = _option(
        "frozen",
        "What pseuzo does with an untied output head: it stays frozen, or is trained by its exact "
        "gradient.",
        HEADS,
    )
    head_lr: Annotated[float | None, Flag(positive=True, only_with={"head": ("exact",)})] = _option(
        None, "Learning rate of an exact head. Default: 1000 times the learning rate."
    )
    readout: str = _option(
        "none",
        "Fit the output head's rows for the answers to the outputs of past steps by logistic "
        "regression, which takes no pass, while the method trains the other weights; auto: where "
        "this is possible, which is in classifications.",
        READOUTS,
    )
    readout_decay: Annotated[float, Flag(positive=True, only_with={"readout": ("fit", "auto")})] = (
        _option(0.01, "Penalty on how far a fit moves the head.")
    )
    objective: str = _option(
        "loss",
        "What is minimized; metric is 1 - the task's metric, which needs no derivative.",
        OBJECTIVES,
    )
    sparsity: Annotated[float, Flag(least=0, most=1)] = _option(
        0.75, "Share of each tensor's weights that sparse-mezo leaves alone."
    )
    mask: str = _option(
        "small",
        "Which weights sparse-mezo trains: the smallest of each tensor, or random ones.",
        MASKS,
    )
    renew_mask: Annotated[bool, Flag(only_with={"mask": ("random",)})] = _option(
        False, "Draw the random weights of sparse-mezo anew in each step."
    )
    anchor_every: Annotated[int, Flag(least=1)] = _option(
        10, "Steps from one anchor of mezo-svrg to the next (q)."
    )
    anchor_batches: Annotated[int | None, Flag(least=1)] = _option(
        None, "Number of batches that an anchor is measured on. Default: all the training data."
    )
    anchor_lr: Annotated[float | None, Flag(positive=True)] = _option(
        None, "Learning rate of the steps that set an anchor. Default: the learning rate."
    )
    journal: str | None = _option(None, "File that records every update, for pseuzo replay.")
    direction_ranks: Annotated[int, Flag(least=1)] = _option(
        1,
        "Under torchrun: number of ranks that share the passes of a step on the same rows; a batch "
        "is divided into as many parts as there are groups of such ranks.",
    )
    offload: str = _option(
        "none",
        "Where the weights live, if not on the device: cpu keeps them in host memory, and uploads "
        "each layer once a step, for models larger than the GPU.",
        OFFLOADS,
    )
    capture: bool = _option(
        False,
        "Record the passes as CUDA graphs: faster where launches are the limit (small models, "
        "few tokens). Batches are padded to multiples of 64 tokens.",
    )


@dataclass(frozen=True)
class Option:
    """A field of ZeroOrderOptions, as the command line and the checks see it."""

    name: str
    type: type  # of a value that is not None: str, int, float, bool, or list[str]
    default: Any
    help: str
    choices: tuple[str, ...]
    flag: Flag
    # Other options, and their values with which this one has an effect; {}: it always has one.
    applies_to: Mapping[str, tuple[str, ...]]

    @property
    def flag_name(self) -> str:
        return self.flag.name or "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> None:
        """Raise ValueError if value is not one of the choices, or out of range."""
        flag = self.flag
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name} must be one of {', '.join(self.choices)}, got {value!r}")
        if value is None:
            return
        if flag.positive and not value > 0:
            raise ValueError(f"{self.name} must be positive, got {value}")
        if flag.least is not None and not value >= flag.least:
            raise ValueError(f"{self.name} must be at least {flag.least}, got {value}")
        if flag.most is not None and not value <= flag.most:
            raise ValueError(f"{self.name} must be at most {flag.most}, got {value}")


def _described(f: Field, annotation: Any) -> Option:
    flag = Flag()
    if get_origin(annotation) is Annotated:
        annotation, flag = get_args(annotation)
    methods = methods_with(f.name)
    applies_to = {} if methods == tuple(METHODS) else {"method": methods}
    return Option(
        name=f.name,
        type=next(iter(get_args(annotation)), annotation)
        if annotation != list[str]
        else annotation,
        default=f.default_factory() if callable(f.default_factory) else f.default,
        help=f.metadata["help"],
        choices=f.metadata.get("choices", ()),
        flag=flag,
        applies_to=applies_to | dict(flag.only_with or {}),
    )


_HINTS = get_type_hints(ZeroOrderOptions, include_extras=True)
OPTIONS = {f.name: _described(f, _HINTS[f.name]) for f in fields(ZeroOrderOptions)}
