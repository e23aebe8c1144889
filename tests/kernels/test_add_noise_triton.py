"""The Triton kernels give the bits of the reference.

Without a GPU they run in the interpreter, with one they are compiled.
"""

import warnings

import pytest
import torch
from helpers import KNOWN_ELEMENTS, KNOWN_ROUNDED, KNOWN_TERMS, assert_same_bits
from triton_ops import DEVICE, DTYPES, SIZES, assert_close_normal, seeds_coefs, values

from pseuzo_kernels import NOISES, reference

pytest.importorskip("triton")
import triton
import triton.language as tl

from pseuzo_kernels.triton import device as px
from pseuzo_kernels.triton.launch import (
    add_noise_list_out_triton,
    add_noise_list_triton_,
    add_noise_rows_triton,
    add_noise_steps_triton_,
    prepared,
)

pytestmark = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.slow  # the interpreter is slow


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("K", [1, 5])
def test_one_tensor(noise, dtype, stochastic, K):
    if stochastic and (dtype is torch.float32 or noise == "normal"):
        pytest.skip("fp32 is not rounded, and sums of normal noise differ before they are rounded")
    seeds, coefs = seeds_coefs(K)
    for n in SIZES if K == 1 and noise == "hadamard" else (2049, 8192):
        band = torch.full((n + 64,), 7.0, dtype=dtype)
        band[32 : 32 + n] = values(n, dtype)
        want = band.clone()
        got = band.to(DEVICE)
        args = ([2**32 - 1], [0.75], [1.5], noise, stochastic, 9)
        add_noise_list_triton_([got[32 : 32 + n]], seeds, coefs, *args)
        reference.add_noise_list_([want[32 : 32 + n]], seeds.cpu(), coefs.cpu(), *args)
        if noise == "normal":
            assert_close_normal(got, want, K)
        else:
            assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", KNOWN_ROUNDED, ids=str)
def test_known_answers(dtype):
    x = torch.full((4096,), 0.5, dtype=dtype, device=DEVICE)
    seeds, coefs = (torch.tensor(values, device=DEVICE) for values in KNOWN_TERMS)
    add_noise_list_triton_([x], seeds, coefs, [3], [0.75], [1.0], "hadamard", True, 9)
    got = [bits & 0xFFFF for bits in x.view(torch.int16)[KNOWN_ELEMENTS].tolist()]
    assert got == KNOWN_ROUNDED[dtype]


@triton.jit
def _round_kernel(
    x_ptr,
    out_ptr,
    stream: tl.int64,
    rounding_hash: tl.int64,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ASM: tl.constexpr,
):
    # One program for all N would take minutes to compile.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q, stream = i.to(tl.uint32), stream.to(tl.uint32)
    words = px.philox(q, stream, rounding_hash, px.ROUNDING_KEY0, px.ROUNDING_KEY1, 7, ASM)
    x = tl.load(x_ptr + i)
    for j in tl.static_range(16):
        tl.store(out_ptr + j * N + i, px.cast(x, words, j, out_ptr.dtype.element_ty, True, ASM))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_value_is_rounded_as_the_reference_does(dtype):
    """The test covers all upper halves of fp32, with varying lower bits, in all 16 planes."""
    upper = torch.arange(-(2**15), 2**15).int()
    x = ((upper << 16) | (upper * 40503 & 0xFFFF)).view(torch.float32)
    q, seed_hash = torch.arange(len(x)), reference.hash_seeds(torch.tensor(9))
    dither = reference.rounding_dither(q, 3, seed_hash)
    want = reference.round_stochastically(x.expand(16, -1).contiguous(), dither, dtype)
    got = torch.empty(16, len(x), dtype=dtype, device=DEVICE)
    asm = isinstance(_round_kernel, triton.runtime.JITFunction)
    block = 1024 if asm else len(x)  # in the interpreter, each program takes time
    grid = (len(x) // block,)
    _round_kernel[grid](x.to(DEVICE), got, 3, int(seed_hash), len(x), block, asm)
    assert_same_bits(got, want)


@pytest.mark.parametrize(
    "K, noise",
    [
        (14, "hadamard"),
        (100, "hadamard"),
        (14, "hadamard-fp16"),
        (16, "hadamard-fp16"),
        (40, "hadamard-fp16"),
    ],
)
def test_many_seeds(K, noise):
    seeds, coefs = seeds_coefs(K)
    x = values(5000, torch.bfloat16)
    want, got = x.clone(), x.to(DEVICE)
    args = ([7], [1.0], [0.5], noise, True, 3)
    add_noise_list_triton_([got], seeds, coefs, *args)
    reference.add_noise_list_([want], seeds.cpu(), coefs.cpu(), *args)
    assert_same_bits(got, want)


@pytest.mark.parametrize("K, noise", [(3, "hadamard"), (9, "hadamard"), (9, "hadamard-fp16")])
def test_strided_seeds_and_coefs(K, noise):
    seeds, coefs = seeds_coefs(2 * K)
    for s, c in ((seeds[::2], coefs[1::2]), (seeds[:1].expand(K), coefs[:1].expand(K))):
        want, got = torch.ones(300), torch.ones(300, device=DEVICE)
        args = ([7], [1.0], [0.5], noise, False, 3)
        add_noise_list_triton_([got], s, c, *args)
        reference.add_noise_list_([want], s.cpu(), c.cpu(), *args)
        assert_same_bits(got, want)


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e38, float("inf"), float("nan")])
def test_fp16_coefs_of_any_size(size):
    """The exponent of 2^e is bounded, and beyond the bounds the op is skipped. There may be more
    coefs than a program prepares, and the largest need not be the first."""
    with warnings.catch_warnings():  # the interpreter's numpy warns of NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        for K in (2, 129, 300):
            seeds, coefs = seeds_coefs(K)
            coefs *= torch.linspace(0.1, 1, K, device=DEVICE) * size
            hashes, coefs_of_sums, _ = prepared(seeds, coefs, "hadamard-fp16")
            assert torch.equal(hashes, reference.hash_seeds(seeds))
            rounded, power = reference.fp16_coefs(coefs.cpu())
            # The sign of 0 does not matter.
            assert_same_bits(coefs_of_sums, torch.cat([rounded + 0.0, power.view(1)]))
        seeds, coefs = seeds_coefs(2)
        coefs *= size
        want, got = torch.ones(300), torch.ones(300, device=DEVICE)
        add_noise_list_triton_([got], seeds, coefs, [7], [1.0], [0.5], "hadamard-fp16", False, 3)
    reference.add_noise_list_(
        [want], seeds.cpu(), coefs.cpu(), [7], [1.0], [0.5], "hadamard-fp16", False, 3
    )
    assert_same_bits(got, want)
    assert (got == 1).all() if not size < 1 else got.isfinite().all()


@pytest.mark.parametrize("noise, K", [("hadamard", 2), ("hadamard-fp16", 17)])
def test_out_of_place_and_without_x(noise, K):
    """Tensors share a launch, and one is not aligned. With a scale of 0 no noise is made."""
    seeds, coefs = seeds_coefs(K)
    xs = [values(n, torch.float16).to(DEVICE) for n in (8192, 2049, 2100)]
    xs += [values(301, torch.float16).to(DEVICE)[1:] for _ in range(2)]
    for first_term in (xs, []):
        got = [torch.full_like(x, 3.0) for x in xs[:3]]
        got += [torch.full((301,), 3.0, dtype=torch.float16, device=DEVICE)[1:] for _ in range(2)]
        want = [torch.full_like(x, 3.0, device="cpu") for x in xs]
        args = (
            [1, 2, 3, 4, 5],
            [0.5, 2.0, 0.7, 0.3, 1.0],
            [1.0, 1e-60, 0.0, 0.0, 2.0],
            noise,
            True,
            5,
        )
        add_noise_list_out_triton(first_term, seeds, coefs, *args, out=got)
        cpu = [x.cpu() for x in first_term]
        reference.add_noise_list_out(cpu, seeds.cpu(), coefs.cpu(), *args, out=want)
        for g, w in zip(got, want, strict=True):
            assert_same_bits(g, w)


@pytest.mark.parametrize(
    "noise, K, bad, found",
    [
        ("hadamard", 1, "nan", 0.0),
        ("hadamard", 200, "-nan", 0.0),
        ("hadamard-fp16", 3, "-inf", 0.0),
        ("hadamard-fp16", 20, "nan", 0.0),
        ("rademacher", 4, "3.4028235e38", 0.0),
        ("normal", 5, "3.4028235e38", 0.0),
        ("hadamard", 1, "1", 0.5),
        ("hadamard", 5, "1", float("nan")),
    ],
)
def test_skipped(noise, K, bad, found):
    """The op is skipped if found_inf is set, or if a coefficient is not finite, which sets it.

    The largest fp32 becomes infinite when it is rounded. In place nothing is written; out of place
    x is copied. Tensors share a launch, or have one each.
    """
    seeds, coefs = seeds_coefs(K)
    coefs[K - 1] = torch.tensor(float(bad))
    xs = [values(8193, torch.bfloat16), values(300, torch.float32), values(2100, torch.float16)]
    xs[2] = torch.cat([xs[2][:1], xs[2]])[1:]  # not aligned
    args = ([7] * 3, [0.5] * 3, [1.5, -1.0, 0.3], noise, True, 3)
    got, flag = [x.clone().to(DEVICE) for x in xs], torch.full((1,), found, device=DEVICE)
    add_noise_list_triton_(got, seeds, coefs, *args, flag)
    assert_same_bits(flag, torch.full((1,), found or 1.0))
    for g, x in zip(got, xs, strict=True):
        assert torch.equal(g.cpu().view(torch.uint8), x.view(torch.uint8))
    flag = flag if found else None
    out = [torch.full_like(g, 7.0) for g in got]
    add_noise_list_out_triton(got, seeds, coefs, *args, flag, out=out)
    for o, x in zip(out, xs, strict=True):
        assert_same_bits(o, x)
    add_noise_list_out_triton([], seeds, coefs, *args, flag, out=out)
    assert not any(o.view(torch.uint8).any() for o in out)
    if K < 5 and found == 0:
        x, index = values(40 * 128, torch.bfloat16).view(40, 128), torch.tensor([5, 39, 5])
        rows = add_noise_rows_triton(x.to(DEVICE), index.to(DEVICE), seeds, coefs, 3, 0.5, noise)
        assert_same_bits(rows, x[index])


def test_not_skipped():
    """A flag of 0 stays 0 and changes nothing."""
    seeds, coefs = seeds_coefs(14)
    for K in (1, 14):
        xs = [values(300, torch.float16)]
        got, want = [x.clone().to(DEVICE) for x in xs], xs
        args = ([7], [0.5], [1.0], "hadamard", True, 3)
        flag = torch.zeros(1, device=DEVICE)
        add_noise_list_triton_(got, seeds[:K], coefs[:K], *args, flag)
        reference.add_noise_list_(want, seeds[:K].cpu(), coefs[:K].cpu(), *args, flag.cpu())
        for g, w in zip(got, want, strict=True):
            assert_same_bits(g, w)
        assert flag == 0


def test_freed_memory_is_refused():
    seeds, coefs = seeds_coefs(1)
    x, out = torch.ones(300, device=DEVICE), torch.ones(300, device=DEVICE)
    x.untyped_storage().resize_(0)
    args = (seeds, coefs, [7], [0.5], [1.0], "hadamard", False, 3)
    for call in (
        lambda: add_noise_list_triton_([x], *args),
        lambda: add_noise_list_out_triton([x], *args, out=[out]),
        lambda: add_noise_list_out_triton([out], *args, out=[x]),
        lambda: add_noise_steps_triton_([x], seeds, coefs, [1], *args[2:-1], [3]),
        lambda: add_noise_rows_triton(
            x.view(3, 100), torch.tensor([1], device=DEVICE), seeds, coefs, 7, 1.0, "normal"
        ),
    ):
        with pytest.raises(ValueError, match=r"the memory of (x|out) was freed"):
            call()
    assert (out == 1).all()


@pytest.mark.parametrize("noise", ["hadamard", "hadamard-fp16", "rademacher"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_steps(noise, stochastic):
    """Some steps have no seed, and some tensors get no noise. The sizes are close to a program's
    block, 4096."""
    counts = [2, 0, 1]
    seeds, coefs = seeds_coefs(3)
    sizes = (0, 1, 4095, 4097) if stochastic else (2049,)
    xs = [values(n, dtype) for n in sizes for dtype in DTYPES]
    got, want = [x.clone().to(DEVICE) for x in xs], [x.clone() for x in xs]
    size = len(xs) * len(counts)
    keeps = [(0.9, 1.0, 0.75, -0.3)[i % 4] for i in range(size)]
    scales = [(1.0, 0.0, 0.7, 0.5)[i * i % 7 % 4] for i in range(size)]
    args = (counts, list(range(3, 3 + len(xs))), keeps, scales, noise, stochastic, [5, -1, 2**40])
    add_noise_steps_triton_(got, seeds, coefs, *args)
    reference.add_noise_steps_(want, seeds.cpu(), coefs.cpu(), *args)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)


def test_scales_that_fp32_does_not_hold():
    """A scale that rounds to 0 in fp32 still counts as a scale, so keep applies. In a series of
    steps, only a scale of exactly 0 leaves a tensor unchanged."""
    seeds, coefs = seeds_coefs(3)
    start = torch.cat([torch.tensor([-0.0, 0.0]), values(300, torch.float32)])
    for scale in (1e-60, 0.0):
        got, want = (start.clone().to(DEVICE), start.to(DEVICE)), (start.clone(), start)
        args = ([1, 2], [3], [0.9, 0.8], [scale] * 2, "hadamard", True, [5, 6])
        add_noise_steps_triton_([got[0]], seeds, coefs, *args)
        reference.add_noise_steps_([want[0]], seeds.cpu(), coefs.cpu(), *args)
        assert_same_bits(got[0], want[0])
        args = ([3], [0.9], [scale], "hadamard", True, 5)
        out, wanted = torch.empty_like(got[1]), torch.empty_like(start)
        add_noise_list_out_triton([got[1]], seeds, coefs, *args, out=[out])
        reference.add_noise_list_out([want[1]], seeds.cpu(), coefs.cpu(), *args, out=[wanted])
        assert_same_bits(out, wanted)
    rows, index = torch.full((4, 5), -0.0, device=DEVICE), torch.tensor([1, 3], device=DEVICE)
    same = add_noise_rows_triton(rows, index, seeds, coefs, 0, 0.0, "hadamard")
    assert_same_bits(same, rows[index])


@pytest.mark.parametrize("noise, step", [("hadamard", 0), ("hadamard-fp16", 2)])
def test_a_step_in_a_row_is_skipped(noise, step):
    counts, dtypes = [2, 0, 3], (torch.float32, torch.bfloat16)
    seeds, coefs = seeds_coefs(5)
    coefs[4 if step == 2 else 0] = float("nan")
    xs = [values(300, dtype) for dtype in dtypes]
    got, want = [x.clone().to(DEVICE) for x in xs], [x.clone() for x in xs]
    keeps, scales = [0.9, 1.0, 0.75] * len(xs), [1.0, 0.7, 0.5] * len(xs)
    args = (counts, list(range(len(xs))), keeps, scales, noise, True, [5, -1, 2**40])
    add_noise_steps_triton_(got, seeds, coefs, *args)
    reference.add_noise_steps_(want, seeds.cpu(), coefs.cpu(), *args)
    for g, w, x in zip(got, want, xs, strict=True):
        assert_same_bits(g, w)
        assert not torch.equal(g.cpu().nan_to_num(), x.nan_to_num())


@pytest.mark.parametrize("width", [1, 7, 100, 128, 768, 2048, 2050, 4096])
@pytest.mark.parametrize("noise", ["hadamard", "hadamard-fp16"])
def test_rows(width, noise):
    seeds, coefs = seeds_coefs(2)
    x = torch.randn(40, width).to(torch.bfloat16)
    index = torch.tensor([[0, 39, 5], [5, 17, 1]])
    got = add_noise_rows_triton(x.to(DEVICE), index.to(DEVICE), seeds, coefs, 3, 0.5, noise)
    want = x.clone()
    reference.add_noise_list_([want], seeds.cpu(), coefs.cpu(), [3], [1.0], [0.5], noise, False, 0)
    assert got.shape == (2, 3, width)
    assert_same_bits(got, want[index])
    assert_same_bits(
        reference.add_noise_rows(x, index, seeds.cpu(), coefs.cpu(), 3, 0.5, noise), want[index]
    )
