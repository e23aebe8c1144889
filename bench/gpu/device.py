"""What this is run on; builds the extension where it is missing, or lacks the CUDA window that could be built."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import torch


def built() -> dict | None:
    """What the extension holds, as another process finds it."""
    code = "import json; from pseuzo_kernels import _C; print(json.dumps(_C and _C.build_info()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    print("extension:", done.stdout.strip() or done.stderr.strip()[-1000:])
    return json.loads(done.stdout) if done.returncode == 0 else None


def build() -> None:
    env = {"PSEUZO_BUILD": "auto", **os.environ}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        env=env,
        capture_output=True,
        text=True,
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("pseuzo:")]
    print(
        *(said if done.returncode == 0 else (done.stdout + done.stderr).splitlines()[-40:]),
        sep="\n",
    )


def main() -> None:
    gpu = torch.cuda.is_available()
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "triton", "transformers", "numpy", "pytest")
    )
    print(f"python {sys.version.split()[0]}, {packages}, {os.cpu_count()} CPUs")
    if gpu:
        query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory"
        subprocess.run(["nvidia-smi", query, "--format=csv,noheader"])
        print(f"compute capability {torch.cuda.get_device_capability()}, cuDNN {torch.backends.cudnn.version()}, "
              f"attention backends in this order: {torch._C._get_sdp_priority_order()}")  # fmt: skip
    found = built()
    if found is None or (gpu and not found["cuda"]):
        build()
        found = built()
    if not os.environ.get("DRY"):
        assert gpu, "torch sees no GPU"
        assert found is not None and found["cuda"], (
            "the extension is without CUDA: the window runs in plain torch"
        )


if __name__ == "__main__":
    main()
