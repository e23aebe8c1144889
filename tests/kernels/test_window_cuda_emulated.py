"""The CUDA window without a GPU: nvcc compiles csrc/window/window.cu, and its source, run on the
CPU, agrees with the reference.
"""

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pseuzo_kernels import reference, window

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
GXX = shutil.which("g++")
U32 = 2.0**-24  # half an ulp of 1 in fp32
BAND = 64  # elements on either side of a tensor
ORDERS = (0, 1, 2)  # orders of threads and blocks: forward, backward, shuffled

WRAPPER = r"""
#include "cuda_on_cpu.h"
#include "window.cu"
extern "C" int64_t scratch_of(const pseuzo::WindowStep* step) {
  return pseuzo::window_step_scratch(*step);
}
extern "C" int window_step(const pseuzo::WindowStep* step, int order) {
  emulated::order = static_cast<emulated::Order>(order);
  return pseuzo::launch_window_step(*step, nullptr);
}
extern "C" int64_t size_of() { return sizeof(pseuzo::WindowStep); }
"""

POINTERS = (
    "values",
    "seeds",
    "groups",
    "counts",
    "skipped",
    "o0",
    "o1",
    "grad",
    "group",
    "loss",
    "seeds_out",
    "coefs",
    "found_inf",
    "scratch",
)
INTEGERS = (
    "capacity",
    "rows_max",
    "positions_max",
    "width",
    "rows",
    "positions",
    "seed",
    "slot",
    "used",
)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class WindowStep(ctypes.Structure):
    """pseuzo::WindowStep of csrc/window/window.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in POINTERS]
        + [(name, ctypes.c_int64) for name in INTEGERS]
        + [(name, ctypes.c_double) for name in ("momentum", "eps")]
        + [(name, ctypes.c_int32) for name in ("o_dtype", "grad_dtype")]
    )


def cuda_include() -> Path | None:
    homes = [Path(NVCC).resolve().parent.parent] if NVCC else []
    for home in [*homes, Path("/usr/local/cuda")]:
        for include in (home / "include", home / "targets/x86_64-linux/include"):
            if (include / "cuda_fp16.h").exists():
                return include
    return None


def build(folder: Path, threads: int, blocks: int) -> ctypes.CDLL:
    path = folder / f"window_{threads}_{blocks}.so"
    command = [
        GXX,
        "-x",
        "c++",
        "-std=c++20",
        "-O1",
        "-Wno-unknown-pragmas",
        "-shared",
        "-fPIC",
        f"-DPSEUZO_WINDOW_THREADS={threads}",
        f"-DPSEUZO_WINDOW_BLOCKS={blocks}",
        f"-I{Path(__file__).parent}",
        f"-I{ROOT / 'csrc/window'}",
        f"-isystem{cuda_include()}",
        "-",
        "-o",
        str(path),
    ]
    subprocess.run(command, input=WRAPPER, text=True, check=True)
    library = ctypes.CDLL(str(path))
    for function in (library.scratch_of, library.size_of):
        function.restype = ctypes.c_int64
    assert library.size_of() == ctypes.sizeof(WindowStep)
    return library


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Build two libraries. small has many blocks and several rows per block; real has the block
    size of a GPU."""
    if GXX is None:
        pytest.skip("needs g++")
    if cuda_include() is None:
        pytest.skip("needs the CUDA headers (cuda_fp16.h)")
    folder = tmp_path_factory.mktemp("window")
    with ThreadPoolExecutor() as pool:
        small = pool.submit(build, folder, 32, 4)
        real = pool.submit(build, folder, 256, 512)
        return {"small": small.result(), "real": real.result()}


class Bands:
    """Copies of tensors between guard bands."""

    def __init__(self):
        self.bands = []

    def copy(self, tensor: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """Copy a tensor. shift: the number of elements by which the copy is misaligned."""
        band = torch.full((tensor.numel() + 2 * BAND,), 77, dtype=tensor.dtype)
        at = BAND + shift
        inside = band[at : at + tensor.numel()]
        inside.copy_(tensor.reshape(-1))
        self.bands.append((band, at, tensor.numel()))
        return inside.view(tensor.shape)

    def check(self):
        for band, at, n in self.bands:
            assert (band[:at] == 77).all() and (band[at + n :] == 77).all(), (
                "wrote outside a tensor"
            )


def emulate(
    library, order, values, seeds, groups, counts, skipped, o0, o1, grad, group, loss, *scalars
):
    """pseuzo::window_step as csrc/window/cuda.cpp calls it.

    The tensors of the state must be contiguous.
    """
    seed, slot, used, momentum, eps = scalars
    bands = Bands()
    nan = float("nan")
    out = {
        "seeds_out": bands.copy(torch.zeros(used, dtype=torch.int64)),
        "coefs": bands.copy(torch.full((used,), nan)),
        "found_inf": bands.copy(torch.full((1,), nan)),
    }
    if o0 is not None and o0.dtype != o1.dtype:
        o0, o1 = o0.float(), o1.float()
    tensors = {
        "values": values,
        "seeds": seeds,
        "groups": groups,
        "counts": counts,
        "skipped": skipped,
        "o0": o0,
        "o1": o1,
        "grad": grad,
        "group": group,
        "loss": loss,
        **out,
    }
    numbers = (*values.shape, o1.shape[0], o1.shape[1], seed, slot, used)
    step = WindowStep(
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
        **dict(zip(INTEGERS, numbers, strict=True)),
        momentum=momentum,
        eps=eps,
        o_dtype=DTYPES[o1.dtype],
        grad_dtype=DTYPES[grad.dtype],
    )
    scratch = bands.copy(
        torch.full((library.scratch_of(ctypes.byref(step)),), nan, dtype=torch.float64)
    )
    scratch[-1] = 0
    step.scratch = scratch.data_ptr()
    assert library.window_step(ctypes.byref(step), order) == 0, (
        "threads of a block waited at different barriers"
    )
    assert scratch[-1] == 0, "the ticket was not given back"
    bands.check()
    return out["seeds_out"], out["coefs"], out["found_inf"]


def random_state(generator, capacity, rows_max, positions_max, width, n_groups):
    """Return a ring with NaN in the rows that must not be read. With n_groups None, row i is its
    own group."""
    values = torch.randn(capacity, rows_max, positions_max, width, generator=generator)
    counts = torch.randint(0, 3, (capacity, rows_max), generator=generator, dtype=torch.int32)
    groups = torch.arange(rows_max).repeat(capacity, 1)
    if n_groups is not None:  # each group occurs once among the rows that count
        for k in range(capacity):
            groups[k] = torch.randperm(max(rows_max, n_groups), generator=generator)[:rows_max]
    values[counts == 0] = float("nan")
    groups[counts == 0] = 0
    seeds = torch.randint(-(2**62), 2**62, (capacity,), generator=generator)
    return [values, seeds, groups, counts, torch.tensor(5)]


def compare(library, state, slot, used, inputs, momentum=0.9, eps=2e-3, seed=-3, shift=0):
    """Check that the emulated kernel agrees with the reference, with the same bits in all orders.

    inputs: o0, o1, grad, group, loss.
    """
    o0, o1, grad, group, _ = inputs
    rows = o1.shape[0]
    want_state = [t.clone() for t in state]
    want = reference.window_step(*want_state, *inputs, seed, slot, used, momentum, eps)
    # The error is relative to sum_k of the sizes of the terms.
    change = (o1.float() if o0 is None else o1.float() - o0.float()).abs()
    sizes = [state[0].abs(), *(t.clone() for t in state[1:])]
    size = reference.window_step(
        *sizes, None, change, grad.abs(), group, None, seed, slot, used, momentum, eps
    )[1]
    # One thread rounds in fp32 when it adds at most 4 columns of each row for a dot product, sums
    # over rows, takes the mean, multiplies, and adds to the result.
    tol = (4 * rows + 2 * rows + 4) * U32

    first = None
    for order in ORDERS:
        bands = Bands()
        got_state = [bands.copy(t, shift if i == 0 else 0) for i, t in enumerate(state)]
        got_state[0][slot] = float("nan")  # the old content of the slot is not read
        got_inputs = [None if t is None else bands.copy(t, shift) for t in inputs]
        got = emulate(library, order, *got_state, *got_inputs, seed, slot, used, momentum, eps)
        bands.check()
        everything = [*got, *got_state]
        if first is not None:
            for a, b in zip(everything, first, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            continue
        first = everything

        assert got[0].tolist() == want[0].tolist()
        assert ((got[1] - want[1]).abs() <= tol * size).all() or not size.isfinite().all(), (
            got[1],
            want[1],
        )
        if not size.isfinite().all():
            assert (got[1] == 0).all()
        assert got[2].tolist() == want[2].tolist()
        assert got_state[1].tolist() == want_state[1].tolist()
        assert got_state[4] == want_state[4]
        assert (got_state[3] == want_state[3]).all()
        assert (got_state[2][slot, :rows] == want_state[2][slot, :rows]).all()
        others = [k for k in range(state[0].shape[0]) if k != slot]
        for a, b in zip(got_state, state, strict=True):
            if a.dim() > 1:
                torch.testing.assert_close(a[others], b[others], rtol=0, atol=0, equal_nan=True)
        kept = want_state[3][slot] > 0
        # A mean over c rows takes c - 1 additions and a division.
        atol = float(change.max()) * rows * U32 if kept.any() else 0
        torch.testing.assert_close(
            got_state[0][slot][kept], want_state[0][slot][kept], rtol=2 * U32, atol=atol
        )
    return first


def random_inputs(
    generator, rows, positions, width, n_groups, o_dtype=torch.float32, g_dtype=torch.float32
):
    def draw(dtype):
        return torch.randn(rows, positions, width, generator=generator).to(dtype)

    group = None if n_groups is None else torch.randint(0, n_groups, (rows,), generator=generator)
    return [draw(o_dtype), draw(o_dtype), draw(g_dtype), group, None]


SHAPES = [
    # K, slot, used, R, B, P_max, P, D, n_groups
    (1, 0, 1, 1, 1, 1, 1, 1, None),
    (1, 0, 1, 3, 2, 2, 1, 7, 2),
    (4, 0, 1, 3, 3, 2, 2, 128, None),
    (4, 2, 3, 5, 4, 3, 2, 7, 2),
    (4, 1, 4, 5, 5, 3, 3, 128, 3),
    (4, 0, 4, 5, 2, 3, 1, 128, None),
    (14, 13, 14, 16, 16, 2, 2, 12, 2),
    (14, 3, 14, 33, 33, 1, 1, 128, 5),
    (14, 3, 14, 33, 31, 1, 1, 7, None),
    (17, 5, 17, 4, 3, 2, 1, 4, 2),  # 16 old entries: one tile, full
    (18, 5, 18, 4, 4, 2, 2, 4, 2),  # 17: two tiles
    (40, 7, 40, 6, 5, 2, 2, 7, 3),
    (40, 39, 25, 6, 6, 2, 1, 128, None),
    (3, 1, 3, 70, 67, 1, 1, 8, 40),  # more rows than threads in a block
    (3, 1, 3, 4, 4, 9, 5, 128, 1),  # one group
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(libraries, shape):
    capacity, slot, used, rows_max, rows, positions_max, positions, width, n_groups = shape
    generator = torch.Generator().manual_seed(sum(x or 0 for x in shape))
    state = random_state(generator, capacity, rows_max, positions_max, width, n_groups)
    inputs = random_inputs(generator, rows, positions, width, n_groups)
    compare(libraries["small"], state, slot, used, inputs)


@pytest.mark.parametrize("o_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "shift"), [(12, 0), (12, 1), (5, 0)])
def test_dtypes_and_alignment(libraries, o_dtype, g_dtype, width, shift):
    generator = torch.Generator().manual_seed(width + shift)
    state = random_state(generator, 3, 4, 2, width, 2)
    inputs = random_inputs(generator, 4, 2, width, 2, o_dtype, g_dtype)
    compare(libraries["small"], state, 1, 3, inputs, shift=shift)
    inputs[0], inputs[4] = None, torch.tensor(0.5)
    compare(libraries["small"], state, 1, 3, inputs, momentum=0.0, eps=0.1, shift=shift)


def test_real_block_size(libraries):
    generator = torch.Generator().manual_seed(0)
    for n_groups in (None, 2):
        state = random_state(generator, 20, 6, 3, 400, n_groups)
        compare(libraries["real"], state, 4, 20, random_inputs(generator, 5, 3, 400, n_groups))
    state = random_state(generator, 3, 300, 1, 4, 3)
    compare(libraries["real"], state, 0, 3, random_inputs(generator, 290, 1, 4, 3))


@pytest.mark.parametrize("n_groups", [None, 2])
@pytest.mark.parametrize("where", ["o0", "o1", "grad", "loss", "old"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_not_finite(libraries, n_groups, where, bad):
    generator = torch.Generator().manual_seed(1)
    state = random_state(generator, 4, 5, 2, 128, None)
    inputs = random_inputs(generator, 4, 2, 128, n_groups)
    inputs[4] = torch.tensor(bad if where == "loss" else 1.0)
    if where == "old":
        state[3][:] = 1
        state[2][:] = torch.arange(5)
        state[0].nan_to_num_()
        state[0][1, 0, 1, 5] = bad
    elif where != "loss":
        inputs[("o0", "o1", "grad").index(where)][2, 1, 77] = bad
    seeds, coefs, found_inf, values, _, _, counts, skipped = compare(
        libraries["small"], state, 3, 4, inputs
    )
    assert len(seeds) == 4 and (coefs == 0).all() and found_inf == 1 and skipped == 6
    assert bool((counts[3] == 0).all()) == (where != "old")
    assert values.shape == (4, 5, 2, 128)


def test_no_rows_or_no_positions(libraries):
    """The step still makes an entry, and all coefficients are zero."""
    generator = torch.Generator().manual_seed(2)
    for rows, positions in ((0, 2), (3, 0)):
        state = random_state(generator, 3, 4, 2, 8, None)
        empty = torch.zeros(rows, positions, 8)
        scalars = (9, 2, 3, 0.5, 1e-3)
        seeds, coefs, found_inf = emulate(
            libraries["small"], 0, *state, empty, empty, empty, None, None, *scalars
        )
        assert seeds[-1] == 9 and (coefs == 0).all() and found_inf == 0
        assert state[3][2].tolist() == [1] * rows + [0] * (4 - rows)


@pytest.mark.parametrize("grouped", [True, False])
def test_many_steps(libraries, grouped):
    """EmaWindow handles batches and lengths that differ, growth, wrap-around, and a bad step."""

    class Emulated(window.EmaWindow):
        _op = staticmethod(lambda *args: emulate(libraries["small"], 2, *args))

    generator = torch.Generator().manual_seed(3)
    settings = dict(momentum=0.8, eps=1e-2)
    got, want, size = (
        Emulated(5, **settings),
        reference.EmaWindow(5, **settings),
        reference.EmaWindow(5, **settings),
    )
    for step in range(14):
        rows, positions = (
            int(torch.randint(1, 4 + step // 2, (), generator=generator)) for _ in range(2)
        )
        o0, o1, grad, group, _ = random_inputs(
            generator, rows, positions, 12, 3 if grouped else None
        )
        if step == 6:
            o1[0, 0, 0] = float("inf")
        seeds, coefs = got.step(step, o0, o1, grad, group)
        want_seeds, want_coefs = want.step(step, o0, o1, grad, group)
        _, sizes = size.step(step, None, (o1 - o0).abs(), grad.abs(), group)
        assert seeds.tolist() == want_seeds.tolist()
        # The bound is that of compare(), plus the rounding of each kept mean over at most 10 rows.
        tol = (6 * rows + 4 + 10) * U32
        assert ((coefs - want_coefs).abs() <= tol * sizes).all()
        assert got.skipped == want.skipped == (step >= 6)
        assert torch.equal(got.found_inf, want.found_inf)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_nvcc_compiles(tmp_path):
    """window.cu compiles for sm_80 and sm_90, without torch. The build is unoptimized, since the
    test only asks whether the code is legal."""
    archs = [flag for n in (80, 90) for flag in ("-gencode", f"arch=compute_{n},code=sm_{n}")]
    flags = [
        "-std=c++17",
        "-Werror=all-warnings",
        "-Xcicc",
        "-O1",
        "-Xptxas",
        "-O1",
        "--threads",
        "2",
    ]
    run = subprocess.run(
        [
            NVCC,
            "-c",
            *flags,
            *archs,
            str(ROOT / "csrc/window/window.cu"),
            "-o",
            str(tmp_path / "window.o"),
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
