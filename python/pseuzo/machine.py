"""The device of a run, its processes, its peak memory, and tensors that are copied from a GPU or
wrap other tensors."""

import platform
import resource
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, distributed

from pseuzo.sentences import first_line


def usable_device(device: torch.device | str | None = None) -> torch.device:
    """Return the device; None means cuda if there is one, else cpu. ValueError if it cannot hold a
    tensor."""
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {first_line(error)}") from None
    return where


def world_size() -> int:
    """The number of ranks of the default process group; 1 if there is none."""
    grouped = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if grouped else 1


def refuse_replicas(op: str, ranks: int | None = None) -> None:
    """Raise ValueError if there are several ranks. ranks=None counts those of the default process
    group, if there is one."""
    if ranks is None:
        ranks = world_size()
    if ranks > 1:
        raise ValueError(
            f"{op}: runs in one process, but this is one of {ranks} ranks: each would step by its "
            "own data, and the replicas would drift apart; start one process (python, not "
            "torchrun) and give it the whole batch"
        )


def hardware(device: torch.device | str) -> str:
    """The name of the GPU, or of the CPU with the number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        name = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t: ")
    except (OSError, IndexError):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def reset_peak(device: torch.device | str) -> None:
    """Start measuring the peak from now on."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # On Linux this resets the high-water mark of the resident set.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory(device: torch.device | str) -> float:
    """Return the peak in MiB: on CUDA, of what was allocated on the GPU; on a CPU, of the resident
    memory of the process, which includes libraries and the interpreter."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def available_memory() -> int | None:
    """The bytes of host memory that programs can still take; None where Linux does not say."""
    try:
        free = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
    except (OSError, IndexError):
        return None
    return int(free) * 2**10


def parts_of(x: Tensor) -> list[Tensor]:
    """Return the tensors that hold the numbers of x: x itself, or the parts of a quantised weight
    of torchao."""
    if not hasattr(x, "__tensor_flatten__"):
        return [x]
    names, _ = x.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(x, name))]


def holds_codes(x: Tensor) -> bool:
    """Return whether x is quantised: whether it holds codes for numbers (bitsandbytes, torchao,
    8-bit floats)."""
    return not x.is_floating_point() or x.element_size() < 2 or hasattr(x, "__tensor_flatten__")


def refuse_meta(op: str, params: Iterable[Tensor]) -> None:
    """Raise ValueError if one of the weights is on the meta device."""
    if n := sum(p.device.type == "meta" for p in params):
        raise ValueError(
            f"{op}: {n} weights are on the meta device, where accelerate leaves those that its "
            "device_map puts on the cpu or the disk; load the model on the CPU, and call "
            "pseuzo.offload(model, device), which keeps its weights there"
        )


class Fetched:
    """Copies tensors, as they are now, from a GPU to the host while other work goes on: get() does
    not wait once here() is true.

    Tensors on a CPU are not copied.
    """

    def __init__(self, *tensors: Tensor):
        self._host, self._event = tensors, None
        if tensors[0].is_cuda:
            pinned = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True, device="cpu") for t in tensors
            ]
            self._host = tuple(
                to.copy_(t, non_blocking=True) for to, t in zip(pinned, tensors, strict=True)
            )
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensors[0].device))

    def here(self) -> bool:
        return self._event is None or self._event.query()

    def get(self) -> tuple[Tensor, ...]:
        """Return the tensors on the host; wait if the copy is not done."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
