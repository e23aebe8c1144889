"""Times calls in turn, so that a machine whose speed drifts slows all of them alike."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from pseuzo_kernels import _C

Call = Callable[[], object]


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with the instruction set that our C++ uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t: ")
    except (OSError, IndexError):
        name = platform.processor() or platform.machine()
    return f"{name} ({_C.cpu_isa() if _C else 'no C++'})"


def last_cache(device: torch.device) -> int:
    """The bytes of the largest cache, or 32 MiB (64 on a GPU) if the system does not tell."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    found = [32 << 20]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        texts = [path.read_text().strip() for path in sizes]
        found = [int(text[:-1]) * units[text[-1]] for text in texts] or found
    except (OSError, ValueError, KeyError, IndexError):
        pass
    return max(found)


def memory(device: torch.device) -> int:
    """The bytes that tensors may take: those of the machine, or those that are free on a GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _ms_on_host(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) * 1e3 / repeats


def _ms_between_events(call: Call, repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def measure_ms(call: Call, device: torch.device, repeats: int = 1) -> float:
    """How long a call takes, in ms, as a mean of `repeats` calls that follow each other.

    On a GPU, several calls hide Python's work before a launch behind the launch before it.
    """
    return (_ms_between_events if device.type == "cuda" else _ms_on_host)(call, repeats)


def in_turn(
    calls: Mapping[str, Call], seconds: float, measure: Callable[[Call], float]
) -> dict[str, list[float]]:
    """Time the calls in turn, forwards and backwards; return the ms of each.

    Each call may use the same share of the seconds, and is timed at least once. Its first time is
    a warm-up and does not count, unless it leaves no time for a second one.
    """
    share = 1e3 * seconds / max(1, len(calls))
    spent = {name: measure(call) for name, call in calls.items()}
    times = {name: [first] if 2 * first > share else [] for name, first in spent.items()}
    order = list(calls)
    while order:
        for name in order:
            times[name].append(measure(calls[name]))
            spent[name] += times[name][-1]
        order = [name for name in reversed(order) if spent[name] + times[name][-1] <= share]
    return times


def quantile(times: Sequence[float], q: float) -> float:
    """The time at the share q of the sorted times, without interpolation."""
    return sorted(times)[int(q * (len(times) - 1))]
