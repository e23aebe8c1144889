"""Build pseuzo_kernels._C from csrc/; everything else is in pyproject.toml.

PSEUZO_BUILD=auto|cuda|cpu|none chooses what is built. auto (the default) builds the best that is
possible here and says in one line what is slower without the rest. cuda and cpu fail if they are
not possible.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "pseuzo: torch must be importable while pseuzo is built, as its extension is compiled "
        'against it; pip install torch "setuptools>=77", then pip install --no-build-isolation -e .'
    ) from error

MODES = ("auto", "cuda", "cpu", "none")
FLAGS = ["-O3", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-g0"]
ROOT = Path(__file__).parent


def say(line: str) -> None:
    print(f"pseuzo: {line}", file=sys.stderr, flush=True)


def cuda_home() -> str | None:
    """Return the folder of the CUDA toolkit.

    torch assumes that this folder holds nvcc. If that nvcc is a script of ccache or of a package
    manager that calls another nvcc, there are no headers beside it. Then nvcc itself is asked.
    """
    home = cpp_extension.CUDA_HOME
    if (
        home is None
        or Path(home, "include", "cuda_runtime.h").exists()
        or not Path(home, "bin", "nvcc").exists()
    ):
        return home
    command = [str(Path(home, "bin", "nvcc")), "--dryrun", "-x", "cu", os.devnull]
    try:
        said = subprocess.run(command, capture_output=True, text=True).stderr
    except OSError:
        return home
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return (
        str(Path(top[1]).resolve())
        if top and Path(top[1], "include", "cuda_runtime.h").exists()
        else home
    )


def missing_for_cuda() -> str | None:
    """Return what is missing here for a CUDA build, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if cpp_extension.CUDA_HOME is None or not Path(cpp_extension.CUDA_HOME, "bin", "nvcc").exists():
        return "there is no nvcc (CUDA_HOME is unset and nvcc is not on the PATH)"
    return None


def missing_for_cpu() -> str | None:
    compilers = os.environ.get(
        "CXX", "c++ g++ clang++" if sys.platform != "win32" else "cl"
    ).split()
    return (
        None
        if any(map(shutil.which, compilers))
        else f"there is no C++ compiler ({', '.join(compilers)})"
    )


def extension(mode: str):
    names = [
        f"noise/{name}.cpp"
        for name in ("cpu", "cpu_isa", "cpu_outer", "cpu_parts", "cpu_pieces", "cpu_rows")
    ]
    names += ["window/cpu.cpp", "module.cpp"]
    if mode == "cuda":
        names += ["window/window.cu", "window/cuda.cpp"]
    settings = {
        "name": "pseuzo_kernels._C",
        "sources": [f"csrc/{name}" for name in names],
        "depends": sorted(
            str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()
        ),
        "extra_link_args": ["-fopenmp"],
    }
    if mode == "cpu":
        built = cpp_extension.CppExtension(extra_compile_args={"cxx": FLAGS}, **settings)
    else:
        if not torch.cuda.is_available():  # with a GPU, torch compiles for those that it sees
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        built = cpp_extension.CUDAExtension(
            extra_compile_args={"cxx": FLAGS, "nvcc": ["-O3", "-fmad=false"]},
            define_macros=[("PSEUZO_WITH_CUDA", None)],
            **settings,
        )
    built.pseuzo_mode = mode
    return built


SLOWER = {
    "cuda": "the EMA window runs in plain torch on a GPU",
    "cpu": "noise on CPU tensors runs in plain torch, 100 times slower "
    "(Triton on a GPU is unaffected)",
}


def best_mode() -> str:
    """Return the mode that was asked for, or for auto the best one that can be tried."""
    asked = os.environ.get("PSEUZO_BUILD", "auto")
    if asked not in MODES:
        raise SystemExit(f"pseuzo: PSEUZO_BUILD must be one of {', '.join(MODES)}, got {asked!r}")
    missing = {
        "cuda": missing_for_cuda() or missing_for_cpu(),
        "cpu": missing_for_cpu(),
        "none": None,
    }
    if asked != "auto":
        if missing[asked]:
            raise SystemExit(f"pseuzo: PSEUZO_BUILD={asked} is impossible here: {missing[asked]}")
        return asked
    if missing["cpu"]:
        say(f"built without C++: {SLOWER['cpu']}; {missing['cpu']}")
        return "none"
    if missing["cuda"]:
        say(f"built without CUDA: {SLOWER['cuda']}; {missing['cuda']}")
        return "cpu"
    return "cuda"


class BuildExtension(cpp_extension.BuildExtension):
    """Extends torch's class by a fallback for PSEUZO_BUILD=auto.

    Extension.optional does not suffice, since it does not catch ninja's RuntimeError.
    """

    def build_extensions(self):
        while self.extensions:
            try:
                return super().build_extensions()
            except Exception as error:
                if os.environ.get("PSEUZO_BUILD", "auto") != "auto":
                    raise
                failed = self.extensions[0].pseuzo_mode
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                without = {"cuda": "CUDA", "cpu": "C++"}[failed]
                say(f"built without {without}: {SLOWER[failed]}; compiling failed: {reason}")
                self._replace_extension("cpu" if failed == "cuda" else "none")

    def _replace_extension(self, mode: str) -> None:
        """Change the list in place, since the distribution and the other commands hold the same
        list."""
        old = self.extensions[0]
        self.extensions[:] = [] if mode == "none" else [extension(mode)]
        for new in self.extensions:  # finalize_options set these on the old extension
            new._full_name, new._links_to_dynamic, new._needs_stub = old._full_name, False, False
            new._file_name = old._file_name
            self.ext_map[new.name] = self.ext_map[new._full_name] = new


cpp_extension.CUDA_HOME = cuda_home()
mode = best_mode()
setup(
    packages=[
        *find_packages(include=["pseuzo_kernels*"]),
        *find_packages("python", include=["pseuzo*"]),
    ],
    package_dir={"pseuzo": "python/pseuzo"},
    package_data={
        "pseuzo": ["py.typed"],
        "pseuzo_kernels": ["py.typed"],
        "pseuzo.demo": ["assets/**/*"],
        "pseuzo.tasks": ["builtin/*.yaml"],
    },
    include_package_data=False,
    ext_modules=[] if mode == "none" else [extension(mode)],
    cmdclass={"build_ext": BuildExtension},
)
