"""Prints the device and the versions, and builds the extension if it is missing, or if it lacks the
CUDA window that could be built.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import torch


def built() -> dict | None:
    """Return the build info of the extension in a new process, or None if it cannot be imported."""
    code = "import json; from pseuzo_kernels import _C; print(json.dumps(_C and _C.build_info()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    print("extension:", done.stdout.strip() or done.stderr.strip()[-1000:])
    return json.loads(done.stdout) if done.returncode == 0 else None


def build() -> None:
    env = {"PSEUZO_BUILD": "auto", **os.environ}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    ours = [line for line in lines if line.startswith("pseuzo:")]
    print(*(ours if done.returncode == 0 else lines[-40:]), sep="\n")


def main() -> None:
    gpu = torch.cuda.is_available()
    names = ("torch", "triton", "transformers", "numpy", "pytest")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"python {sys.version.split()[0]}, {packages}, {os.cpu_count()} CPUs")
    if gpu:
        query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory"
        subprocess.run(["nvidia-smi", query, "--format=csv,noheader"])
        x = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16, device="cuda")
        torch.nn.functional.scaled_dot_product_attention(x, x, x)  # puts cuDNN in its place
        print(
            f"compute capability {torch.cuda.get_device_capability()}, "
            f"cuDNN {torch.backends.cudnn.version()}, "
            # torch has no public function that returns the order.
            f"attention backends in this order: {torch._C._get_sdp_priority_order()}"
        )
    found = built()
    if found is None or (gpu and not found["cuda"]):
        build()
        found = built()
    if not os.environ.get("DRY"):
        assert gpu, "torch sees no GPU"
        has_cuda = found is not None and found["cuda"]
        assert has_cuda, "the extension was built without CUDA, so the window runs in plain torch"


if __name__ == "__main__":
    main()
