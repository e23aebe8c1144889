"""Times callables and appends tidy rows to a CSV file: one row a measurement, with what is needed to read it later."""

import csv
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pseuzo_kernels import _C

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
COMMON = ("date", "commit", "device", "threads", "torch", "triton", "command")
QUANTILES = ("ms_p20", "ms_p50", "ms_p80")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t: ")
    except (OSError, IndexError):
        name = platform.processor() or platform.machine()
    return f"{name} ({_C.cpu_isa() if _C else 'no C++'})"


def quantiles_ms(call: Callable[[], object], device: torch.device, seconds: float = 0.5) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of one call, after a warm-up; on a GPU between events, with the cache flushed."""
    if device.type == "cuda":
        import triton

        times = triton.testing.do_bench(call, warmup=100, rep=seconds * 1000, quantiles=[0.2, 0.5, 0.8])
        return tuple(times)
    call()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    return tuple(times[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))


class Table:
    """Measurements of one benchmark: printed as they come, appended to results/<name>.csv."""

    def __init__(self, name: str, device: torch.device, columns: tuple[str, ...]):
        self.device, self.path = device, RESULTS / f"{name}.csv"
        self.fields = (*COMMON, *columns)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        try:
            import triton

            triton_version = triton.__version__
        except ImportError:
            triton_version = ""
        self.common = dict(
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), commit=commit.stdout.strip(),
            device=device_name(device), threads=torch.get_num_threads() if device.type == "cpu" else "",
            torch=torch.__version__, triton=triton_version, command=" ".join(["python", *sys.argv]),
        )  # fmt: skip
        print(f"{self.common['device']}, torch {torch.__version__}, threads {self.common['threads']}")

    def time(self, call: Callable[[], object]) -> dict[str, float]:
        """The columns of QUANTILES, in ms."""
        return dict(zip(QUANTILES, quantiles_ms(call, self.device), strict=True))

    def add(self, **values: object) -> None:
        """Append a row; fractions with 4 digits."""
        row = self.common | {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in values.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print("  " + "  ".join(str(v) for k, v in row.items() if k not in COMMON), flush=True)
