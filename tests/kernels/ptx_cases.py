"""The kernels' PTX gives the bits of the reference. test_ptx.py runs this file for each compute
capability, in a process of its own: PSEUZO_EMULATE=90 pytest tests/kernels/ptx_cases.py.

Compiling takes most of the time, so each path through the kernels is compiled once, and only some
of them for sm_80. To run all cases of the interpreter's tests: PSEUZO_EMULATE=90 pytest
tests/kernels/test_add_noise_triton.py.
"""

import inspect
import os
import re

import ptx_emulator
import pytest
import torch
from helpers import assert_same_bits
from triton.runtime import JITFunction
from triton_ops import assert_close_normal, seeds_coefs, values

from pseuzo_kernels import adam, low_rank, masks, parts, reference
from pseuzo_kernels.triton import adam as adam_kernels
from pseuzo_kernels.triton import adam_parts as adam_parts_kernels
from pseuzo_kernels.triton import device as philox
from pseuzo_kernels.triton import kernels, outer, sums
from pseuzo_kernels.triton import low_rank as low_rank_kernels
from pseuzo_kernels.triton import parts as parts_kernels
from pseuzo_kernels.triton.launch import (
    add_noise_list_out_triton,
    add_noise_list_triton_,
    add_noise_rows_triton,
    add_noise_steps_triton_,
)

MODULES = kernels, adam_kernels, adam_parts_kernels, parts_kernels, outer
SM_90 = os.environ["PSEUZO_EMULATE"] == "90"
only_sm_90 = pytest.mark.skipif(not SM_90, reason="run for sm_90")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIZES = (2 * 8192 + 5, 1, 2047, 8192)  # whole programs and masked tails


@pytest.mark.parametrize(
    "noise, dtype, stochastic, Ks",
    [
        ("hadamard", BF16, True, (14, 40, 1, 4)),
        ("hadamard", FP16, True, (14,)),
        pytest.param("hadamard", FP32, False, (14, 40), marks=only_sm_90),
        ("hadamard-fp16", BF16, True, (14, 40)),
        pytest.param("rademacher", FP16, False, (14,), marks=only_sm_90),
        ("normal", FP32, False, (14,)),
    ],
)
def test_lists(noise, dtype, stochastic, Ks):
    got = [values(n, dtype) for n in SIZES]
    want = [x.clone() for x in got]
    args = (
        [7, 2**32 - 1, 0, 3],
        [0.75, 1.0, 0.9, -0.5],
        [1.5, 1.0, -0.7, 1.0],
        noise,
        stochastic,
        9,
    )
    found_inf = torch.zeros(1) if noise == "hadamard" and dtype is FP32 else None
    for K in Ks if SM_90 else Ks[:1]:
        seeds, coefs = seeds_coefs(K)
        with ptx_emulator.memory_of(*got):
            add_noise_list_triton_(got, seeds, coefs, *args, found_inf)
        reference.add_noise_list_(want, seeds, coefs, *args, found_inf)
        for g, w in zip(got, want, strict=True):
            if noise == "normal":
                assert_close_normal(g, w, K)
            else:
                assert_same_bits(g, w)


@pytest.mark.parametrize("dtype, has_x, misaligned", [(FP32, False, False), (FP16, True, True)])
def test_one_tensor(dtype, has_x, misaligned):
    seeds, coefs = seeds_coefs(1)
    band = torch.full((8192 + 2100,), 7.0, dtype=dtype)
    got = band[16 + misaligned : 16 + misaligned + 8192 + 2049]
    x = [values(len(got), dtype)] if has_x else []
    want = torch.empty_like(got)
    args = (seeds, coefs, [5], [0.5], [1.0], "hadamard", False, 0)
    with ptx_emulator.memory_of(got):
        add_noise_list_out_triton(x, *args, out=[got])
    reference.add_noise_list_out(x, *args, out=[want])
    assert_same_bits(got, want)
    assert (band != 7).sum() == len(got)


@only_sm_90
@pytest.mark.parametrize("K", [14, 1])
def test_skipped(K):
    """A skipped op reads and writes nothing in place, and copies x out of place. It sets the
    flag."""
    seeds, coefs = seeds_coefs(K)
    coefs[-1] = float("nan")
    xs = [values(n, FP32) for n in SIZES]
    got, out = [x.clone() for x in xs], [torch.empty_like(x) for x in xs]
    args = (
        [7, 2**32 - 1, 0, 3],
        [0.75, 1.0, 0.9, -0.5],
        [1.5, 1.0, -0.7, 1.0],
        "hadamard",
        False,
        9,
    )
    flags = torch.zeros(2, 1)
    with ptx_emulator.memory_of():
        add_noise_list_triton_(got, seeds, coefs, *args, flags[0])
    with ptx_emulator.memory_of(*xs, *out):
        add_noise_list_out_triton(xs, seeds, coefs, *args, flags[1], out=out)
    for x, g, o in zip(xs, got, out, strict=True):
        assert torch.equal(g.view(torch.int32), x.view(torch.int32))
        assert_same_bits(o, x)
    assert (flags == 1).all()


def test_launches_are_made_again():
    """A launch can be repeated with other seeds and other numbers, as perturbed passes do."""
    xs, scales, launches = [values(n, BF16) for n in SIZES], [0.0, 0.5, 2.0, -1.0], []
    outs = [torch.empty_like(x) for x in xs]
    seeds, coefs = torch.empty(1, dtype=torch.int64), torch.empty(1)
    args = (xs, seeds, coefs, [3, 0, 7, 9], [1.0] * 4, scales, "hadamard", False, 0, None)
    for step in range(3):
        seeds.fill_(step)
        coefs.fill_(0.25 + step)
        for x in xs:
            x *= -1.5  # in place
        with ptx_emulator.memory_of(*xs, *outs):
            if step == 0:
                add_noise_list_out_triton(*args, out=outs, launched=launches)
            for launch in launches if step else ():
                launch(stream=5)
        want = [torch.empty_like(x) for x in xs]
        reference.add_noise_list_out(*args, out=want)
        for got, wanted in zip(outs, want, strict=True):
            assert_same_bits(got, wanted)
    assert len(launches) == 1


@pytest.mark.parametrize("widths", [(128, 2048, 2176), (1, 100, 2050)], ids=["planes", "anywhere"])
def test_rows(widths):
    seeds, coefs = seeds_coefs(2)
    index = torch.tensor([[0, 39, 5], [5, 17, 1]])
    for width in widths:
        x = values(40 * width, BF16).view(40, width)
        want = x.clone()
        got = add_noise_rows_triton(x, index, seeds, coefs, 3, 0.5, "hadamard")
        reference.add_noise_list_([want], seeds, coefs, [3], [1.0], [0.5], "hadamard", False, 0)
        assert_same_bits(got, want[index])
        for wrong in (-1, 40):
            with (
                ptx_emulator.memory_of(x, got),
                pytest.raises(AssertionError, match="an index is out of range"),
            ):
                add_noise_rows_triton(x, torch.tensor([3, wrong]), seeds, coefs, 3, 0.5, "hadamard")


@only_sm_90
def test_masked():
    """The sizes give a whole program and a tail. NaNs take no noise."""
    got = [values(n, BF16) for n in (8192 + 5, 2047)]
    want = [x.clone() for x in got]
    args = *seeds_coefs(1), [7, 3], [0.75] * 2, [1.0] * 2, "hadamard", False, 9, None, [0.6, 0.1]
    with ptx_emulator.memory_of(*got):
        add_noise_list_triton_(got, *args, None)
    masks.add_noise_masked_list_(want, *args, None)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)


def test_parts():
    """Shards that are aligned or not, of whole programs or tails, with a given mask or signs."""
    xs = [values(n, BF16) for n in (3 * 8192, 75, 100)]
    places = [2048, 0, 0, 2047, 25, 130, 8, 0, 0]
    takes = [torch.arange(x.numel()) % 3 > 0 for x in xs]
    terms = *seeds_coefs(1), [7, 3, 0], [0.75] * 3, [1.0, 0.5, 2.0], "hadamard", False, 0, None
    for masks_of, sign in ((takes, False), ([], True)) if SM_90 else (([], True),):
        got, want = [x.clone() for x in xs], [x.clone() for x in xs]
        rest = places, [], None, masks_of, sign
        with ptx_emulator.memory_of(*got, *takes):
            parts_kernels.add_noise_parts_triton_(got, *terms, *rest)
        parts.add_noise_parts_(want, *terms, *rest)
        for g, w in zip(got, want, strict=True):
            assert_same_bits(g, w)


def test_steps():
    """Some steps have no seed and some tensors get no noise. The sizes are close to a program's
    block."""
    counts, dtypes = [2, 0, 1], (BF16, FP16)
    seeds, coefs = seeds_coefs(3)
    xs = [values(n, dtype) for n in (1, 4095, 4097) for dtype in dtypes]
    got, want = [x.clone() for x in xs], [x.clone() for x in xs]
    keeps = [(0.9, 1.0, 0.75, -0.3)[i % 4] for i in range(len(xs) * len(counts))]
    scales = [(1.0, 0.0, 0.7, 0.5)[i * i % 7 % 4] for i in range(len(keeps))]
    args = (counts, list(range(3, 3 + len(xs))), keeps, scales, "hadamard", True, [5, -1, 2**40])
    with ptx_emulator.memory_of(*got):
        add_noise_steps_triton_(got, seeds, coefs, *args)
    reference.add_noise_steps_(want, seeds, coefs, *args)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)


def test_adam():
    """Three steps use two directions each. Tensors share a launch, or one is launched alone."""
    got = [values(n, BF16)[10:].clone() for n in (4117, 11, 2057)]
    want, (seeds, coefs) = [x.clone() for x in got], seeds_coefs(6)
    numbers = [0.9, 0.999, *adam.adam_factors(-0.01, 0.9, 0.999, 3), 1e-8]
    for some in (slice(0, 3), slice(2, 3)):
        n = len(got[some])
        args = ([7, 2**32 - 1, 0][:n], [0.75, 1.0, 0.9][:n], [1.5, 1.0, 0.7][:n])
        args = (seeds, coefs, 2, *args, numbers, "hadamard", True, 9)
        with ptx_emulator.memory_of(*got):
            adam_kernels.adam_list_triton_(got[some], *args, torch.zeros(1))
        adam.adam_list_(want[some], *args)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)


def test_adam_of_parts():
    """Shards that are aligned or not, of whole programs or tails, under a random mask."""
    got = [values(n, BF16) for n in (4096, 75)]
    want, (seeds, coefs) = [x.clone() for x in got], seeds_coefs(2)
    numbers = [0.9, 0.999, *adam.adam_factors(-0.01, 0.9, 0.999, 2), 1e-8]
    args = seeds, coefs, 1, [7, 3], [0.75, 1.0], [1.5, 1.0], numbers, "hadamard", True, 9
    rest = None, [2048, 0, 0, 2047, 25, 130], [0.6, 0.5], torch.tensor([4])
    with ptx_emulator.memory_of(*got, rest[-1]):
        adam_parts_kernels.adam_parts_triton_(got, *args, *rest, [])
    adam.adam_parts_(want, *args, *rest, [])
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)


@pytest.mark.parametrize(
    "shapes, dtype, stochastic",
    [
        ([(2, 544), (1, 259)], BF16, True),
        pytest.param([(3, 128), (18, 5)], FP32, False, marks=only_sm_90),
    ],
)
def test_low_rank(shapes, dtype, stochastic):
    """Products are not fused with the sums that follow. Tiles are whole, or end within rows."""
    xs = [values(m * n, dtype).view(m, n) for m, n in shapes]
    got, want = ([torch.empty_like(x) for x in xs] for _ in range(2))
    seeds, coefs = seeds_coefs(4)
    terms = seeds[:2], seeds[2:], coefs[:2], 3, [7, 2**32 - 1], [0.75, 1.0], [0.5, -1.3]
    how = "hadamard", stochastic, 9, None, [k for _, n in shapes for k in (3 * n, 0, 0)]
    rest = [], None, []
    with ptx_emulator.memory_of(*xs, *got):
        low_rank_kernels.add_low_rank_out_triton(xs, *terms, *how, *rest, out=got)
    low_rank.add_low_rank_out(xs, *terms, *how, *rest, out=want)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)


def test_all_kernels_and_all_inline_asm_were_run():
    """This test comes last, since it checks what the cases above have run."""
    names = {
        name
        for module in MODULES
        for name, f in vars(module).items()
        if isinstance(f, JITFunction) and name.endswith("_kernel")
    }
    assert ptx_emulator.kernels_run == names
    source = "".join(map(inspect.getsource, (philox, sums, *MODULES)))
    asm = " ".join(
        re.findall(r"inline_asm_elementwise\(\s*(\"\"\"[^\"]*\"\"\"|\"[^\"]*\")", source)
    )
    opcodes = set(re.findall(r"[{;\"]\s*([a-z]\w*\.[\w.]+)", asm))
    assert len(opcodes) > 10 and opcodes <= ptx_emulator.opcodes_run, (
        opcodes - ptx_emulator.opcodes_run
    )
