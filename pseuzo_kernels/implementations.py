"""Which implementation the ops run on here, and one warning where it is the slow one.

CUDA tensors go to Triton (the window to CUDA C++), CPU tensors to C++, and all others, or all in a
build without these, to plain torch (`pseuzo_kernels.reference`): the same bits, and about 100 times
slower on a CPU.
"""

import shutil
import warnings
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch


class SlowWarning(UserWarning):
    """An op ran in plain torch, for the reason that it says."""


@dataclass(frozen=True)
class Backend:
    """What runs the ops on the tensors of a device.

    implementation: "c++", "triton", "cuda c++" or "torch". instructions: the instruction set in use
    ("avx512", "avx2" or "plain"), or the version of Triton or of CUDA. fast: whether this is more
    than plain torch. reason: why it is not, and what to do; "" otherwise.
    """

    implementation: str
    instructions: str = ""
    fast: bool = True
    reason: str = ""

    def __str__(self) -> str:
        said = (
            f"{self.implementation} ({self.instructions})" if self.instructions else "plain torch"
        )
        return f"{said}: {self.reason}" if self.reason else said


@dataclass(frozen=True)
class Backends:
    """The report of `backends`. cpu, cuda, other: of the noise ops, by the type of the device;
    cpu_window, cuda_window: of EmaWindow. laws: those that C++ or Triton implement; others run in
    plain torch."""

    cpu: Backend
    cuda: Backend
    other: Backend
    cpu_window: Backend
    cuda_window: Backend
    laws: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(
            f"{name} tensors: {backend}; EmaWindow: {window}"
            for name, backend, window in (
                ("CPU", self.cpu, self.cpu_window),
                ("CUDA", self.cuda, self.cuda_window),
                ("other", self.other, self.other),
            )
        )


TRITON = (3, 4)  # the oldest version that compiles the kernels, that of torch 2.8
BUILD = "PSEUZO_BUILD={0} pip install --no-build-isolation -e ."


def _plain(reason: str) -> Backend:
    return Backend("torch", fast=False, reason=reason)


def backends() -> Backends:
    """Report what the ops run on in this process: `print(pseuzo_kernels.backends())`.

    Nothing is compiled, and no CUDA context is made.
    """
    from pseuzo_kernels import _C, ops

    built: dict[str, Any] = _C.build_info() if _C else {}
    if _C:
        cpu = Backend("c++", _C.cpu_isa())
    else:
        compilers = ("c++", "g++", "clang++")
        why = (
            "pseuzo_kernels was built without C++"
            if any(map(shutil.which, compilers))
            else f"there is no C++ compiler ({', '.join(compilers)}), so nothing was built"
        )
        cpu = _plain(f"{why}; install a compiler and run {BUILD.format('cpu')}")
    if ops.launch is None:
        oldest = ".".join(map(str, TRITON))
        cuda = _plain(
            f"triton {oldest} or newer cannot be imported; install torch 2.8 or newer for CUDA, "
            "which brings it"
        )
    else:
        import triton

        cuda = Backend("triton", triton.__version__)
    window = Backend("cuda c++", built.get("cuda") or "")
    if not built.get("cuda"):
        window = _plain(f"pseuzo_kernels was built without nvcc; run {BUILD.format('cuda')}")
    other = _plain("only CPU and CUDA tensors have kernels")
    laws = set(built.get("noises", ())) | set(ops.launch.IMPLEMENTED if ops.launch else ())
    return Backends(cpu, cuda, other, cpu, window, tuple(sorted(laws)))


_said: set[tuple[str, str]] = set()
_lock = Lock()


def say_slow(op: str, device: torch.device, noise: str | None = None) -> None:
    """Warn the first time that an op runs in plain torch on this type of device, or for this noise,
    and say why."""
    if device.type == "meta":
        return
    report = backends()
    found = {"cpu": report.cpu, "cuda": report.cuda}.get(device.type, report.other)
    if noise is None:  # the window
        found = {"cpu": report.cpu_window, "cuda": report.cuda_window}.get(device.type, found)
    reason = found.reason or f"no kernel implements the noise {noise!r}"
    with _lock:
        key = device.type, reason
        if key in _said:
            return
        _said.add(key)
    warnings.warn(
        f"{op} runs in plain torch on {device.type} tensors, which gives the same bits but is "
        f"slow: {reason}. pseuzo_kernels.backends() reports all of them",
        SlowWarning,
        stacklevel=3,
    )
