"""The C++ noise ops skip or refuse bad arguments, and touch only the memory of their tensors."""

import ctypes
import importlib
import math
import mmap
import os
import subprocess
import sys

import pytest
import torch
from cpu_ops import (
    BIT_EXACT,
    DTYPES,
    normals,
    on_every_isa,
    ops,
    same_bytes,
    special_values,
    steps_in_a_row,
    terms,
)
from helpers import (
    assert_same_bits,
)

import pseuzo_kernels
from pseuzo_kernels import NOISES, reference

pytestmark = on_every_isa


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_nothing_beyond_x(dtype):
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 12 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    for guard in (0, 11):
        # The guard pages allow no access.
        assert mprotect(ctypes.c_void_p(base + guard * page), ctypes.c_size_t(page), 0) == 0
    size = dtype.itemsize
    for n in (1, 127, 2047, 2049, 5000):
        for offset in (page, 11 * page - n * size):  # after the first guard, before the last
            x = torch.frombuffer(memory, dtype=dtype, count=n, offset=offset)
            ops.add_noise_list_([x], *terms(2), [0], [0.5], [1.0], "hadamard", True, 0, None)
            index = torch.tensor([0, n - 1])
            ops.add_noise_rows(x.view(n, 1), index, *terms(2), 0, 1.0, "hadamard")


# The last one overflows when it is rounded to 17 bits.
NOT_FINITE = (
    math.nan,
    math.inf,
    -math.inf,
    torch.finfo(torch.float32).max,
)


@pytest.mark.parametrize("noise", NOISES)
def test_skipped(noise):
    """found_inf skips an op, and so does a coefficient that is not finite, which sets found_inf.

    In place no byte changes, not even in NaN and -0. Out of place all bytes are copied.
    """
    specials = torch.tensor([math.nan, -math.nan, -0.0, 1e-45, math.inf])
    for dtype in DTYPES:
        start = torch.cat([special_values(dtype), specials.to(dtype)])
        for k, at, bad, found in (
            *((k, k // 2, bad, 0.0) for k in (1, 3, 20) for bad in NOT_FINITE),
            (3, 0, 1.0, 1.0),
            (3, 0, 1.0, math.nan),
            (3, 0, math.nan, 2.0),
        ):
            seeds, coefs = terms(k)
            coefs[at] = bad
            for flag in (torch.full((1,), found), None) if found == 0 else (torch.full((), found),):
                x, out, empty = start.clone(), torch.empty_like(start), torch.full_like(start, 7.0)
                args = (seeds, coefs, [4], [0.5], [1.0], noise, True, 0, flag)
                ops.add_noise_list_([x], *args)
                assert same_bytes(x, start)
                assert flag is None or flag == (found if bad == 1 else 1) or found != found
                ops.add_noise_list_out([x], *args, out=[out])
                ops.add_noise_list_out([], *args, out=[empty])
                assert same_bytes(out, start) and same_bytes(empty, torch.zeros_like(start))


@pytest.mark.parametrize("noise", BIT_EXACT)
def test_skipped_matches_reference(noise):
    """A flag of 0 stays 0, and the op is not skipped."""
    for dtype in DTYPES:
        for bad, found in ((1.0, 0.0), (math.nan, 0.0), (1.0, 1.0)):
            got, want = normals(3000, dtype), normals(3000, dtype)
            flags = torch.full((1,), found), torch.full((1,), found)
            seeds, coefs = terms(3)
            coefs[1] *= bad
            args = (seeds, coefs, [4], [0.5], [1.0], noise, False, 0)
            ops.add_noise_list_([got], *args, flags[0])
            reference.add_noise_list_([want], *args, flags[1])
            assert_same_bits(got, want)
            assert torch.equal(*flags) and bool(flags[0]) == (bad != 1 or found == 1)
            assert torch.equal(got, normals(3000, dtype)) == bool(flags[0])


@pytest.mark.parametrize("noise", BIT_EXACT)
def test_a_step_in_a_row_is_skipped(noise):
    xs, args = steps_in_a_row(noise)
    seeds, coefs, counts, *rest = args
    coefs = coefs.clone()
    coefs[2] = math.nan  # one of the three of step 1
    got, want, without = ([x.clone() for x in xs] for _ in range(3))
    ops.add_noise_steps_(got, seeds, coefs, counts, *rest)
    reference.add_noise_steps_(want, seeds, coefs, counts, *rest)
    streams, keeps, scales, *more = rest
    scales = [0.0 if i // len(xs) == 1 else scale for i, scale in enumerate(scales)]
    ops.add_noise_steps_(without, seeds, args[1], counts, streams, keeps, scales, *more)
    for x, w, v in zip(got, want, without, strict=True):
        assert_same_bits(x, w)
        assert_same_bits(x, v)


def test_rows_of_a_skipped_op():
    x, index = normals(40 * 48).view(40, 48), torch.tensor([3, 39, 3])
    seeds, coefs = terms(3)
    for bad in NOT_FINITE:
        coefs[1] = bad
        for rows in (ops.add_noise_rows, reference.add_noise_rows):
            assert torch.equal(rows(x, index, seeds, coefs, 6, 1.3, "hadamard"), x[index])


def test_nothing_to_do_finds_nothing():
    seeds, coefs = terms(3)
    coefs[1] = math.nan
    for list_op in (ops.add_noise_list_, reference.add_noise_list_):
        flag = torch.zeros(1)
        for xs, scale in (([], 1.0), ([torch.empty(0)], 1.0), ([torch.ones(5)], 0.0)):
            n = len(xs)
            list_op(xs, seeds, coefs, [0] * n, [1.0] * n, [scale] * n, "hadamard", False, 0, flag)
        assert flag == 0


def test_rows_out_of_range():
    for row in (-1, 50):
        with pytest.raises(
            IndexError, match=rf"add_noise_rows: index must be in 0 .. 49, the rows of x, got {row}"
        ):
            ops.add_noise_rows(
                torch.zeros(50, 4), torch.tensor([1, row]), *terms(1), 0, 1.0, "hadamard"
            )


def test_an_extension_of_other_sources_is_refused(monkeypatch):
    """An old build would round by an old rule, while journals name the present one."""
    monkeypatch.setattr(reference, "ROUNDING_VERSION", 99)
    with pytest.raises(ImportError, match="built from other sources than these; build it again"):
        importlib.reload(pseuzo_kernels)


def test_refuses_what_would_corrupt_memory():
    seeds, coefs = terms(2)

    def call(xs, seeds=seeds, coefs=coefs, streams=(0,), out=None, found_inf=None):
        args = (seeds, coefs, list(streams), [1.0], [1.0], "hadamard", False, 0, found_inf)
        if out is None:
            ops.add_noise_list_(xs, *args)
        else:
            ops.add_noise_list_out(xs, *args, out=out)

    x, freed, short = torch.zeros(8), torch.zeros(8), torch.zeros(8)
    freed_seeds, freed_flag = freed.view(torch.int64)[:2], freed[:1]
    freed.untyped_storage().resize_(0)
    short.untyped_storage().resize_(16)
    for message, arguments in {
        "x must be contiguous": {"xs": [torch.zeros(8, 8).t()]},
        "x must be float32, bfloat16 or float16": {"xs": [x.double()]},
        "must be one per tensor": {"xs": [x], "streams": (0, 1)},
        "as many coefs as seeds": {"xs": [x], "coefs": coefs[:1]},
        "seeds must be int64": {"xs": [x], "seeds": seeds.int()},
        "coefs must be float32": {"xs": [x], "coefs": coefs.double()},
        "found_inf must be float32": {"xs": [x], "found_inf": torch.zeros(1, dtype=torch.int32)},
        "out must be like x": {"xs": [x], "out": [torch.zeros(9)]},
        "out must be like x,": {"xs": [x], "out": [torch.zeros(8, dtype=torch.float16)]},
        "the memory of x was freed": {"xs": [freed]},
        "the memory of x was freed.* has 16 bytes": {"xs": [short]},
        "the memory of out was freed": {"xs": [], "out": [freed]},
        "the memory of seeds was freed": {"xs": [x], "seeds": freed_seeds},
        "the memory of found_inf was freed": {"xs": [x], "found_inf": freed_flag},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)
    for message, changed in {
        "streams must be one per tensor": {2: [1], 4: [1.0, 1.0]},
        "counts must add up": {2: [3]},
        "counts must not be negative": {2: [3, -1], 4: [1.0, 1.0], 5: [1.0, 1.0], 8: [0, 0]},
    }.items():
        args = [seeds, coefs, [2], [0], [1.0], [1.0], "hadamard", False, [0]]
        for i, value in changed.items():
            args[i] = value
        with pytest.raises(RuntimeError, match=message):
            ops.add_noise_steps_([x], *args)
    assert (x == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["plain"], indirect=True)
def test_environment_chooses_the_isa(isa):
    code = "import pseuzo_kernels; print(pseuzo_kernels._C.cpu_isa())"

    def run(choice: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PSEUZO_CPU_ISA": choice}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )

    assert run(isa).stdout.strip() == isa
    assert "PSEUZO_CPU_ISA: must be one of" in run("sse9").stderr
