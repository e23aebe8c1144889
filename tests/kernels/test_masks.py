"""Masked noise: the definition, and that C++ and Triton give its bits."""

import pytest
import torch
from cpu_ops import BIT_EXACT, DTYPES, banded, needs_native, ops, same_bytes, special_values, terms
from helpers import assert_same_bits
from triton_ops import DEVICE

from pseuzo_kernels import masks, reference

SIZES = (1, 127, 2048, 2049, 5000)
SEED = torch.tensor([-5])
# On a CPU the kernels run in Triton's interpreter, which is slow.
on_triton = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.slow
KINDS = {"small": (0.6, None), "random": (0.3, SEED)}  # limit, mask_seed


def xs_of(sizes=SIZES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(n, generator=generator).to(dtype) for n in sizes for dtype in DTYPES]
    for x in xs:
        x[-1] = float("nan")
    return xs


def arguments(xs: list, kind: str, noise: str, k: int, stochastic: bool = True) -> tuple:
    """Return the arguments of the ops that follow xs."""
    T, (limit, seed) = len(xs), KINDS[kind]
    numbers = [3 + t for t in range(T)], [0.9] * T, [(1.0, 0.5)[t % 2] for t in range(T)]
    limits = [limit * (1 + t % 2) for t in range(T)]
    return *terms(k), *numbers, noise, stochastic, 7, None, limits, seed


@pytest.mark.parametrize("kind", KINDS)
def test_elements_take_the_noise_of_the_op_or_stay(kind):
    """By definition, each element has the bits of the unmasked op or those of x."""
    xs = xs_of()
    args = arguments(xs, kind, "hadamard", 4)
    plain, masked = [x.clone() for x in xs], [x.clone() for x in xs]
    reference.add_noise_list_(plain, *args[:-2])
    masks.add_noise_masked_list_(masked, *args)
    for x, new, got, stream, limit in zip(xs, plain, masked, args[2], args[-2], strict=True):
        takes = masks.takes_noise(x, stream, limit, args[-1])
        if kind == "small":
            assert torch.equal(takes, x.float().abs() <= torch.tensor(limit)), "NaN takes no noise"
        assert same_bytes(got[takes], new[takes]) and same_bytes(got[~takes], x[~takes])
        assert x.numel() < 2000 or 0.2 < takes.float().mean() < 0.8


def test_a_random_mask_has_its_share_and_depends_on_seed_and_stream():
    x, n = torch.zeros(1 << 18), 1 << 18
    one, other = (masks.takes_noise(x, 3, 0.3, torch.tensor([s])) for s in (1, 2))
    third = masks.takes_noise(x, 4, 0.3, torch.tensor([1]))
    for a in (one, other, third):
        assert abs(a.sum() - 0.3 * n) < 5 * (0.21 * n) ** 0.5  # 5 standard deviations
    for a, b in ((one, other), (one, third)):
        assert abs((a & b).sum() - 0.09 * n) < 5 * (0.0819 * n) ** 0.5
    assert masks.takes_noise(x, 3, 1.0, SEED).all()
    assert not masks.takes_noise(x, 3, 0.0, SEED).any()
    at = torch.randint(n, (50, 7))
    assert torch.equal(masks.takes_noise(x[at], 3, 0.3, torch.tensor([1]), at), one[at])


@needs_native
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", BIT_EXACT)
def test_cpp(noise, kind):
    for k, stochastic in ((1, False), (4, True), (14, True)):
        xs = xs_of(SIZES if k == 4 else (2049,))
        args = arguments(xs, kind, noise, k, stochastic)
        want = [x.clone() for x in xs]
        masks.add_noise_masked_list_(want, *args)
        got, bands = zip(*map(banded, xs), strict=True)
        out = [torch.empty_like(x) for x in xs]
        ops.add_noise_masked_list_(list(got), *args)
        ops.add_noise_masked_list_out(xs, *args, out=out)
        for x, a, b, band, c in zip(xs, got, out, bands, want, strict=True):
            assert_same_bits(a, c)
            assert_same_bits(b, c)
            assert (band != 7).sum() <= x.numel(), "wrote outside x"


@needs_native
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("stochastic", (False, True))
def test_cpp_leaves_every_value_as_it_is(stochastic):
    """Elements that a mask excludes keep their bits, including NaNs with any payload and
    subnormals."""
    for dtype in DTYPES:
        x = special_values(dtype).clone()
        args = [x], *terms(2), [0], [0.5], [1.0], "hadamard", stochastic, 7, None, [0.001], None
        want = x.clone()
        masks.add_noise_masked_list_([want], *args[1:])
        ops.add_noise_masked_list_(*args)
        assert same_bytes(x, want)
        left = ~(want.float().abs() <= 0.001)
        assert same_bytes(x[left & x.isnan()], special_values(dtype)[left & x.isnan()])


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", (1, 128, 2050))
def test_rows(kind, width):
    index = torch.tensor([[0, 39, 5], [5, 17, 1]])
    for dtype in DTYPES:
        x = torch.randn(40, width, generator=torch.Generator().manual_seed(1)).to(dtype)
        want = x.clone()
        limit, seed = KINDS[kind]
        shared = [3], [1.0], [0.5], "hadamard", False, 0, None, [limit], seed
        ops.add_noise_masked_list_([want], *terms(2), *shared)
        for rows in (ops.add_noise_masked_rows, masks.add_noise_masked_rows):
            got = rows(x, index, *terms(2), 3, 0.5, "hadamard", limit, seed)
            assert same_bytes(got, want[index])


@on_triton
@pytest.mark.parametrize(
    "kind, noise, k, stochastic",
    [("small", "rademacher", 5, True), ("random", "hadamard", 1, False)],
)
def test_triton(kind, noise, k, stochastic):
    launch = pytest.importorskip("pseuzo_kernels.triton.launch")
    xs = xs_of((2049,))
    args = arguments(xs, kind, noise, k, stochastic)
    want, got, alone = ([x.clone() for x in xs] for _ in range(3))
    masks.add_noise_masked_list_(want, *args)
    xs, got, alone = ([x.to(DEVICE) for x in tensors] for tensors in (xs, got, alone))
    args = tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args)
    launch.add_noise_list_triton_(got, *args)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    numbers = [column[1:2] for column in args[2:5]]  # only those of the bf16 tensor
    own = *args[:2], *numbers, *args[5:9], args[9][1:2], args[10]
    launch.add_noise_list_out_triton(xs[1:2], *own, out=alone[1:2])
    assert_same_bits(alone[1], want[1])


@on_triton
@pytest.mark.parametrize("kind", KINDS)
def test_triton_rows(kind):
    launch = pytest.importorskip("pseuzo_kernels.triton.launch")
    index = torch.tensor([3, 5])
    x = torch.randn(6, 1300, generator=torch.Generator().manual_seed(1)).bfloat16()
    args = x, index, *terms(2), 3, 0.5, "hadamard", *KINDS[kind]
    there = (a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args)
    got = launch.add_noise_rows_triton(*there).cpu()
    assert same_bytes(got, masks.add_noise_masked_rows(*args))


def test_skipped_ops_leave_everything_and_set_the_flag():
    for kind in KINDS:
        xs = xs_of((300,))
        args = list(arguments(xs, kind, "hadamard", 2))
        args[1] = torch.tensor([1.0, float("inf")])
        args[8] = torch.zeros(1)
        for op in (ops.add_noise_masked_list_, masks.add_noise_masked_list_):
            args[8].zero_()
            got = [x.clone() for x in xs]
            op(got, *args)
            assert args[8] == 1 and all(map(same_bytes, got, xs))


@needs_native
@pytest.mark.parametrize(
    "limits, seed, message",
    [
        ([0.1], None, "one per tensor"),
        ([0.1] * 3, torch.tensor([1.0]), "mask_seed must be int64"),
    ],
)
def test_cpp_refuses(limits, seed, message):
    xs = xs_of((5,))
    args = *arguments(xs, "small", "hadamard", 2)[:-2], limits, seed
    with pytest.raises(RuntimeError, match=message):
        ops.add_noise_masked_list_(xs, *args)


@pytest.mark.slow
def test_opcheck():
    xs = [x.nan_to_num() for x in xs_of((5,))]
    args, checks = arguments(xs, "random", "hadamard", 2), ("test_schema", "test_faketensor")
    in_place, out_of_place = ops.add_noise_masked_list_, ops.add_noise_masked_list_out
    torch.library.opcheck(in_place.default, (xs, *args), test_utils=checks)
    out = {"out": [x.clone() for x in xs]}
    torch.library.opcheck(out_of_place.default, (xs, *args), out, test_utils=checks)
    rows = torch.randn(4, 9), torch.tensor([1, 3]), *terms(2), 3, 0.5, "hadamard", *KINDS["small"]
    torch.library.opcheck(ops.add_noise_masked_rows.default, rows)
