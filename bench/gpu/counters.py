"""Shows the hardware's counts for the noise kernels, torch's, and x + c z with tl.randn.

python bench/gpu/counters.py: runs itself under ncu and prints a line a kernel; $OUT/counters.csv
has all that ncu said. --run: the kernels alone. Without a GPU, they run on a few elements, in
Triton's interpreter.
"""

import collections
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

# Triton reads this variable when it is imported.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from pseuzo_kernels import add_noise, update_
from pseuzo_kernels.bench.randn import add_tl_randn

GPU = torch.cuda.is_available()
N, WINDOW = 1 << 26 if GPU else 5000, 14  # elements: 128 MB in bf16, more than a cache holds
# Every ncu knows these metrics, which have these names in the output. METRICS has all that we ask
# for.
FEW = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "DRAM",
    "smsp__inst_executed.sum": "instructions of warps",
    "launch__registers_per_thread": "registers",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of DRAM",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% of SM",
}
METRICS = FEW | {
    "sm__cycles_elapsed.avg.per_second": "clock",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "% of issue slots",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% of warps",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "% of ALU",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active": "% of FMA",
}


def run() -> None:
    """Run each kernel once to compile it, and once more while ncu counts."""
    device = "cuda" if GPU else "cpu"
    x = torch.randn(N, device=device).bfloat16()
    y = torch.empty_like(x)
    seeds, coefs = torch.arange(WINDOW, device=device), torch.ones(WINDOW, device=device)
    for counted in (False, True):
        if GPU:
            torch.cuda.synchronize()
        if GPU and counted:
            torch.cuda.profiler.start()
        update_(x, seeds, coefs, lr=1e-6, rounding="stochastic", rounding_seed=1)
        add_noise(x, 1, 1e-3, 0, out=y)
        y.copy_(x)  # this is not a kernel; neg reads and writes as much
        torch.neg(x, out=y)
        torch.randn(N, device=device, dtype=torch.bfloat16)
        add_tl_randn(x, seeds[:1], coefs[:1], out=y)
        if GPU:
            torch.cuda.synchronize()
        if GPU and counted:
            torch.cuda.profiler.stop()
    assert y.isfinite().all()


def count(file: Path, metrics: dict[str, str]) -> bool:
    """Let ncu write these metrics of run() to the file. Return whether it did."""
    command = ["ncu", "--profile-from-start", "off", "--clock-control", "none"]
    command += ["--csv", "--log-file", str(file), "--metrics", ",".join(metrics)]
    command += [sys.executable, __file__, "--run"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not rows_of(file):
        written = file.read_text() if file.exists() else ""
        print(done.stdout[-2000:] + done.stderr[-2000:] + written[-2000:])
        return False
    return True


def rows_of(file: Path) -> list[dict[str, str]]:
    """Return a row per kernel and metric. ncu writes them between other lines."""
    lines = file.read_text().splitlines() if file.exists() else []
    return list(csv.DictReader(line for line in lines if line.startswith('"')))


def table(rows: list[dict[str, str]]) -> str:
    kernels = collections.defaultdict(list)
    for row in rows:
        metric, unit = row["Metric Name"], row["Metric Unit"].replace("%", "")
        text = f"{METRICS.get(metric, metric)} {row['Metric Value']} {unit}".strip()
        kernels[row["ID"], row["Kernel Name"]].append(text)
    return "\n".join(f"{name[:60]}: " + ", ".join(values) for (_, name), values in kernels.items())


def main() -> None:
    if "--run" in sys.argv or not GPU:
        run()
        return
    if not shutil.which("ncu"):
        sys.exit("ncu (Nsight Compute) is not on the PATH")
    file = Path(os.environ["OUT"], "counters.csv")
    if not count(file, METRICS) and not count(file, FEW):
        sys.exit("ncu counts nothing here; what it says is above")
    print(table(rows_of(file)))
    print(
        f"{N} elements; an instruction of a warp is one of 32 lanes; "
        f"an update makes {WINDOW} normals an element"
    )


if __name__ == "__main__":
    main()
