"""The PTX of the Triton kernels, run on the CPU, gives the bits of the reference.

The cases are in ptx_cases.py, the emulator is the package ptx_emulator.
"""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx_emulator import fused_multiply_add, memory_of, parse, run

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_kernels_give_the_bits_of_the_reference(arch, tmp_path):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels themselves are tested on the GPU")
    env = {**os.environ, "PSEUZO_EMULATE": arch, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        HERE / "ptx_cases.py",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


# The tests below check the emulator itself.


@pytest.mark.parametrize("dtype, small", [(np.float32, 2.0**-30), (np.float16, 2.0**-12)])
def test_fused_multiply_add_rounds_once(dtype, small):
    """The exact sum may be closer to the midpoint of two numbers than float64 can distinguish."""
    draw = np.random.default_rng(0)
    x, y, z = (
        (draw.standard_normal(300) * 2.0 ** draw.integers(-6, 6, 300)).astype(dtype)
        for _ in range(3)
    )
    x[:99] = y[:99] = small
    x[:33] *= -1
    ulp = np.spacing(np.abs(z[66:99]))
    x[66:99], y[66:99] = ulp, dtype(0.5) * (1 + np.finfo(dtype).eps)  # just beyond the midpoint
    for a, b, c, result in zip(x, y, z, fused_multiply_add(x, y, z), strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        error = abs(exact - Fraction(float(result)))
        others = (Fraction(float(np.nextafter(result, dtype(side * np.inf)))) for side in (-1, 1))
        assert all(error <= abs(exact - other) for other in others), (a, b, c)


FILL = """
.visible .entry fill(
	.param .u64 .ptr .global .align 1 fill_param_0,
	.param .u32 fill_param_1
)
.reqntid 32
{
	.reg .pred 	%p<2>;
	.reg .b32 	%r<5>;
	.reg .b64 	%rd<3>;
	ld.param.b64 	%rd1, [fill_param_0];
	ld.param.b32 	%r1, [fill_param_1];
	mov.u32 	%r2, %tid.x;
	mov.u32 	%r3, %ctaid.x;
	shl.b32 	%r4, %r3, 5;
	add.s32 	%r4, %r4, %r2;
	mad.wide.s32 	%rd2, %r4, 4, %rd1;
	setp.lt.s32 	%p1, %r4, %r1;
	{.reg .b32 %r1; mov.b32 %r1, 7; @%p1 st.global.b32 [ %rd2 + 0 ], { %r1 };}
	BRANCH
	mov.b32 	%r3, 8;
	@%p1 st.global.b32 [ %rd2 + 0 ], { %r3 };
$L__END:
	ret;
}
"""


def fill(x: torch.Tensor, n: int, branch: str = "bra $L__END;") -> None:
    with memory_of(x):
        run(
            parse(FILL.replace("BRANCH", branch), 0), [np.uint64(x.data_ptr()), np.uint32(n)], 3, 32
        )


def test_masks_and_scopes():
    x = torch.zeros(70, dtype=torch.int32)
    fill(x, 69)
    assert x.tolist() == [7] * 69 + [0]


def test_programs_branch_apart():
    x = torch.zeros(96, dtype=torch.int32)
    fill(x, 96, "setp.eq.b32 %p1, %r3, 1; @!%p1 bra $L__END;")
    assert x.tolist() == [7] * 32 + [8] * 32 + [7] * 32


def test_what_a_gpu_may_not_report_raises():
    x = torch.zeros(70, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="outside of the tensors"):
        fill(x, 71)
    with pytest.raises(RuntimeError, match="not aligned"):
        fill(x.view(torch.int16)[1:], 5)
    with pytest.raises(NotImplementedError, match="branch to different places"):
        fill(x, 5, "@%p1 bra $L__END;")
    with pytest.raises(NotImplementedError, match="ex2"):
        fill(x, 5, "ex2.approx.f32 %r1, %r2;")
