"""Times callables, and appends a row per measurement to a CSV file, with device and versions.

$OUT is the folder of the results (bench/results by default). $COMMIT is written as the commit if
there is no git.
"""

import argparse
import csv
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pseuzo_kernels.bench.timing import device_name, measure_ms, quantile

HERE = Path(__file__).parent
RESULTS = Path(os.environ.get("OUT", HERE / "results"))
COMMON = ("date", "commit", "device", "threads", "torch", "triton", "command")
QUANTILES = ("ms_p20", "ms_p50", "ms_p80")

# OPT: layers, width, heads, width of the embedding
MODELS = {
    "tiny": (2, 64, 4, 64),
    "opt-125m": (12, 768, 12, 768),
    "opt-350m": (24, 1024, 16, 512),
    "opt-1.3b": (24, 2048, 32, 2048),
    "opt-2.7b": (32, 2560, 32, 2560),
    "opt-6.7b": (32, 4096, 32, 4096),
    "opt-13b": (40, 5120, 40, 5120),
    "opt-30b": (48, 7168, 56, 7168),
    "opt-66b": (64, 9216, 72, 9216),
    "opt-175b": (96, 12288, 96, 12288),
}
LARGER = ("opt-66b", "opt-175b")  # than any GPU; only offload_plan.py has these


def floor_of(impl: str) -> str:
    """Return the way whose two forwards a step is compared with."""
    return "inference, captured" if "captured" in impl else "inference"


def parser(doc: str) -> argparse.ArgumentParser:
    """Make a parser of the arguments that every benchmark takes."""
    p = argparse.ArgumentParser(description=doc.splitlines()[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=1, help="on a CPU")
    p.add_argument(
        "--seconds", type=float, default=0.5, help="for each measurement, at least three calls"
    )
    p.add_argument(
        "--no-check", action="store_true", help="time without comparing with the reference first"
    )
    return p


def commit() -> str:
    """Return the commit, with "-dirty" if there are uncommitted changes other than results."""
    if given := os.environ.get("COMMIT"):
        return given

    def git(*args: str) -> str:
        command = ["git", "-C", str(HERE.parent), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
        return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")
    except OSError:
        return "unknown"


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Record the call as a CUDA graph, after calls that do what only the first ones do."""
    # The first calls use the graph's stream, since launch tables belong to the stream on which they
    # are made.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(), call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        call()
    return graph.replay


def quantiles_ms(
    call: Callable[[], object], device: torch.device, seconds: float
) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile of the time of a call, after a warm-up. On a GPU it
    is measured between events. The cache is flushed before each call, unless a call takes so long
    that only three are made."""
    if measure_ms(call, device) < seconds * 1e3 / 3 and device.type == "cuda":
        import triton

        options = dict(warmup=50, rep=seconds * 1e3, quantiles=[0.2, 0.5, 0.8])
        return tuple(triton.testing.do_bench(call, **options))
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        times.append(measure_ms(call, device))
    return tuple(quantile(times, q) for q in (0.2, 0.5, 0.8))


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file, restval=""))


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Append rows that have the same columns. A file that lacks some of them is written again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = read(path)
    fields = list(dict.fromkeys([*(old[0] if old else ()), *rows[0]]))
    whole = not old or len(fields) > len(old[0])
    target = path.with_suffix(".new") if whole else path
    with open(target, "w" if whole else "a", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="")
        if whole:
            writer.writeheader()
            writer.writerows(old)
        writer.writerows(rows)
    target.replace(path)


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return a and b, neither negative, that minimise the squared relative error of a + b x."""
    w = [(x, y, 1 / y**2) for x, y in points]
    s, sx, sxx = (sum(v * x**k for x, _, v in w) for k in range(3))
    sy, sxy = (sum(v * y * x**k for x, y, v in w) for k in range(2))
    det = s * sxx - sx * sx
    if det > 0:
        a, b = (sy * sxx - sx * sxy) / det, (s * sxy - sx * sy) / det
        if a >= 0 and b >= 0:
            return a, b
        if b < 0:
            return sy / s, 0.0
    return 0.0, sxy / sxx


def fits(rows: list[dict]) -> dict[tuple[str, str], tuple[float, float]]:
    """Return (against, what) of the rows of growth -> a [ms] and b [ms per unit] of the line
    through their medians."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r in rows:
        points.setdefault((r["against"], r["what"]), []).append((float(r["x"]), float(r["ms_p50"])))
    return {key: fit(line) for key, line in points.items()}


class Table:
    """Prints each measurement of a benchmark and appends it to results/<name>.csv at once."""

    def __init__(self, name: str, args: argparse.Namespace, columns: tuple[str, ...]):
        self.device, self.seconds = torch.device(args.device), args.seconds
        if self.device.type == "cpu":
            torch.set_num_threads(args.threads)
        self.path, self.columns = RESULTS / f"{name}.csv", columns
        try:
            import triton

            triton_version = triton.__version__
        except ImportError:
            triton_version = ""
        name = device_name(self.device)
        self.common = dict(
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            commit=commit(),
            device=name,
            threads=args.threads if self.device.type == "cpu" else "",
            torch=torch.__version__,
            triton=triton_version,
            command=" ".join(["python", *sys.argv]),
        )
        print(f"{name}, torch {torch.__version__}, threads {torch.get_num_threads()}")

    def time(self, call: Callable[[], object], kernel: bool = False) -> dict[str, float]:
        """Return the columns of QUANTILES, in ms. kernel: time the GPU alone, without Python's work
        before a launch."""
        if kernel and self.device.type == "cuda":
            call = captured(call)
        return dict(zip(QUANTILES, quantiles_ms(call, self.device, self.seconds), strict=True))

    def add(self, **values: object) -> None:
        """Append a row; a fraction is written with 4 digits."""
        assert values.keys() <= set(self.columns), values.keys() - set(self.columns)
        row = self.common | dict.fromkeys(self.columns, "")
        row |= {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in values.items()}
        append(self.path, [row])
        print("  " + "  ".join(str(row[k]) for k in self.columns if row[k] != ""), flush=True)
