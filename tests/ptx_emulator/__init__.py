"""Runs the PTX that Triton compiles for a GPU on a CPU, with numpy, inline asm included.

`install(90)` makes Triton compile for compute capability 9.0 where there is no GPU. From then on a
launch on tensors in host memory runs the kernel's PTX on them, through the same launch code as on a
GPU. It must be called before any kernel is launched, in a process in which TRITON_INTERPRET is not
set.

All programs of a launch run in lockstep; programs that branch to different places part and go on
alone. What is not emulated: timing, caches, the order of threads (every program's threads move as
one), launches that overlap, and the errors of the approximate units: lg2, sqrt, sin and cos are
rounded correctly here. An instruction that is not known here raises NotImplementedError.
"""

from ptx_emulator.arithmetic import fused_multiply_add
from ptx_emulator.launcher import install
from ptx_emulator.memory import memory_of
from ptx_emulator.program import kernels_run, opcodes_run, parse, run

__all__ = [
    "fused_multiply_add",
    "install",
    "kernels_run",
    "memory_of",
    "opcodes_run",
    "parse",
    "run",
]
