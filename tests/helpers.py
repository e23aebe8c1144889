"""Helpers that several test files share. The models are in tiny_models.py."""

import copy
import itertools
import json
import multiprocessing
import os
import pkgutil
import signal
from pathlib import Path

import torch
from optimizers import with_data
from pseuzo import CausalLMObjective, MeZO, PseuZO, ZOConservative
from pseuzo.optim.schedule import Schedule
from torch.utils._python_dispatch import TorchDispatchMode

from pseuzo_kernels import reference


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Compare bits. Only the payloads of NaN may differ, as they do between conversions."""
    got, want = got.cpu(), want.cpu()
    assert got.dtype is want.dtype and got.shape == want.shape
    integer = {4: torch.int32, 2: torch.int16}[got.element_size()]
    same = (got.view(integer) == want.view(integer)) | (got.isnan() & want.isnan())
    assert same.all(), (
        f"{(~same).sum()} of {same.numel()} differ, first {got[~same][0]} for {want[~same][0]}"
    )


# The known values are elements 0, 1, 2, 127, 128, 2047, 2048, 4095 of 0.75 * 0.5 + sum_k coefs[k]
# z(seeds[k], 3), with rounding_seed 9.
KNOWN_TERMS = [1, 2, 3], [0.1, -0.2, 0.3]
KNOWN_ELEMENTS = [0, 1, 2, 127, 128, 2047, 2048, 4095]
KNOWN_HADAMARD = torch.tensor(  # the same elements of z(0, 0)
    [0.83796775, -0.25703105, 0.82517433, 0.32332414]
    + [1.4113448, 1.2560793, 0.5873334, -0.8112179]
)
KNOWN_DITHER = [0xE99F, 0x78E9, 0xD07E, 0xDEE0, 0x7B65, 0xBFB7, 0x8B62, 0xE9FA]
KNOWN_ROUNDED = {
    torch.bfloat16: [0x3E44, 0x3EE5, 0x3EB2, 0xBC14, 0x3F06, 0x3E67, 0x3F14, 0x3E8B],
    torch.float16: [0x321B, 0x3726, 0x358D, 0xA0A1, 0x382D, 0x333A, 0x38A3, 0x3458],
}


def rounded_by_definition(
    x: torch.Tensor, dither: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return floor(|x| / ulp + dither / 2^16) ulps with the sign of x, for finite fp32 x. float64
    holds the at most 40 bits."""
    exact, info = x.double(), torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.smallest_normal)).exponent - 1
    ulp = torch.ldexp(torch.full_like(exact, info.eps), exponent)
    size = torch.floor(exact.abs() / ulp + dither.double() / 2**16) * ulp
    return torch.copysign(size, exact).to(dtype)  # exact, or infinite


def snapshot(model):
    return [(p, p.data_ptr(), p.clone()) for p in model.parameters()]


def assert_untouched(model, before):
    assert [p.data_ptr() for p in model.parameters()] == [ptr for _, ptr, _ in before]
    assert all(
        p is q and torch.equal(p, was)
        for p, (q, _, was) in zip(model.parameters(), before, strict=True)
    )


def perturbed_copy(model, seed, eps, noise="hadamard"):
    """Return a copy that is perturbed in plain torch. Every weight that requires grad gets the
    noise of the stream whose number is its position."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            if p.requires_grad:
                p.copy_(reference.add_noise(p, seed, eps, i, noise=noise))
    return other


class Waits(TorchDispatchMode):
    """Records the ops that make the host wait for a value or a size."""

    NAMES = (
        "_local_scalar_dense",
        "is_nonzero",
        "nonzero",
        "unique",
        "_unique2",
        "masked_select",
        "equal",
        "bincount",
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if masks or name in self.NAMES:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


# The helpers below run the command line.

SMALL = [
    *"--model demo --task demo --train-size 48 --dev-size 24 --test-size 24".split(),
    *"--batch-size 6 --eval-batch-size 24 --device cpu --quiet".split(),
]
ZERO_ORDER = ["--lr", "2e-4", "--eps", "1e-3"]


def pseuzo(*args: object, code: int = 0) -> str:
    from click.testing import CliRunner
    from pseuzo.cli.commands import main

    result = CliRunner().invoke(main, [str(a) for a in args])
    if result.exit_code != code:
        raise AssertionError(
            f"exit code {result.exit_code}, not {code}: {result.output}"
        ) from result.exception
    return result.output


def last_json(output: str) -> dict:
    return json.loads(output.strip().splitlines()[-1])  # the earlier lines are warnings


def weights(folder: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / file)


def assert_same_weights(a: Path, b: Path, file: str = "model.safetensors") -> None:
    left, right = weights(a, file), weights(b, file)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def start(args: list[str], killed_at: tuple[str, int] | None = None) -> None:
    from pseuzo.cli.commands import main

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if killed_at:
        _die_at(*killed_at)
    main(args, standalone_mode=True)


def _die_at(function: str, call: int) -> None:
    owner, name = function.rsplit(".", 1)
    owner, calls = pkgutil.resolve_name(owner), itertools.count(1)
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def _ended(*args: object) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pseuzo.cli.run"])
    process = context.Process(target=start, args=args)
    process.start()
    process.join()
    return process.exitcode


def killed(args: list[str], function: str, call: int) -> None:
    """Run the command in a process that is killed at the given call of a function (1 is the
    first)."""
    assert _ended(args, (function, call)) == -signal.SIGKILL


def run(args: list[str]) -> None:
    assert _ended(args) == 0


# The helper below runs optimizers whose passes are recorded.

LABELS = torch.tensor([0, 1, 1, 0])


def run_steps(opt, model, steps=7, lengths=(12,), lrs=None, padding=True):
    """Make steps on batches of changing content. All batches of a length use the functions and the
    memory of the first one."""
    from tiny_models import batch_of

    objective, functions, losses = CausalLMObjective(model, [17, 4]), {}, []
    device = next(model.parameters()).device
    for t in range(steps):
        length = lengths[t % len(lengths)]
        batch = {**batch_of(length=length, seed=t), "labels": LABELS}
        plan = objective.plan(
            {k: v.to(device) for k, v in batch.items() if padding or k != "attention_mask"}
        )
        if length not in functions:
            static = {k: v.clone() for k, v in plan.items()}
            forward, head = objective.functions(static, reduction="none")
            functions[length] = static, forward, head, lambda f=forward, h=head: h(f())
        static, forward, head, closure = functions[length]
        for name, x in static.items():
            x.copy_(plan[name])
        for group in opt.param_groups if lrs else ():
            group["lr"] = lrs[t]
        if isinstance(opt, PseuZO):
            losses.append(opt.step(forward, head, groups=LABELS))
        else:
            losses.append(opt.step(*with_data(opt, closure)))
    return torch.stack(losses)


class OffEveryThird(Schedule):
    def __call__(self, step: int) -> float:
        return float(step % 3 != 2)


MAKERS = {
    "pseuzo": lambda m, **k: PseuZO(m, 1e-3, 1e-2, 3, 0.9, 0.1, seed=2, **k),
    "pseuzo two-sided, clipped": lambda m, **k: PseuZO(
        m, 1e-3, 1e-2, 3, two_sided=True, clip_examples=1.5, **k
    ),
    "pseuzo scheduled": lambda m, **k: PseuZO(m, 1e-3, 1e-2, 3, OffEveryThird(), **k),
    "mezo": lambda m, **k: MeZO(m, 1e-3, 1e-2, directions=2, momentum=0.5, window=2, **k),
    "mezo one-sided": lambda m, **k: MeZO(m, 1e-3, 1e-2, two_sided=False, **k),
    "zo-conservative": lambda m, **k: ZOConservative(m, 1e-3, 1e-2, **k),
    "parameters": lambda m, **k: PseuZO(m.parameters(), 1e-3, 1e-2, 3, **k),
    "parameters, mezo": lambda m, **k: MeZO(m.parameters(), 1e-3, 1e-2, **k),
}


# The helpers below are for tasks.
