"""Runs the PTX that Triton compiles for a GPU on a CPU, with numpy, inline asm included.

`install(90)` makes Triton compile for compute capability 9.0 where there is no GPU. From then on a
launch on tensors in host memory runs the kernel's PTX on them, through the same launch code as on a
GPU. It must be called before any kernel is launched, in a process in which TRITON_INTERPRET is not
set.

All programs of a launch run in lockstep. Programs that branch to different places are split and run
separately from there. The emulator does not model timing, caches, the order of threads (all threads
of a program move together) or launches that overlap. Nor does it model the errors of the
approximate units: it rounds lg2, sqrt, sin and cos correctly. An instruction that it does not know
raises NotImplementedError.
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
