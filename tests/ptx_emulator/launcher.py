"""Replaces the functions by which Triton calls a GPU's driver."""

from typing import Any

import numpy as np
import torch

from ptx_emulator.memory import WARP, also_allowed
from ptx_emulator.program import Program, parse, run


class Launcher:
    """Launches a kernel when Triton calls it."""

    def __init__(self, source: Any, metadata: Any):
        self.types, self.threads = list(source.signature.values()), WARP * metadata.num_warps

    def __call__(self, x: int, y: int, z: int, stream: int, program: Program, *rest: Any) -> None:
        _, _, _, _, *given = rest  # metadata and hooks
        given = [
            value for value, kind in zip(given, self.types, strict=True) if kind != "constexpr"
        ]
        assert y == z == 1
        values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given]
        # These are pointers to scratch, which these kernels do not use.
        values += [0] * (len(program.parameters) - len(values))
        arguments = [
            np.array(value, dtype)
            if dtype.kind == "f"
            else np.array(value & (1 << 8 * dtype.itemsize) - 1, dtype)
            for value, dtype in zip(values, program.parameters, strict=True)
        ]
        with also_allowed([value for value in given if isinstance(value, torch.Tensor)]):
            run(program, arguments, x, self.threads)


class Utilities:
    @staticmethod
    def load_binary(name: str, ptx: bytes, shared: int, device: int) -> tuple:
        return object(), parse(ptx.decode(), shared), 0, 0, 1024

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 227 << 10,
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": WARP,
        }


def install(arch: int) -> None:
    """Make Triton compile for this compute capability (90: 9.0), and run launches in the
    emulator."""
    import triton
    from triton import backends
    from triton.backends.compiler import GPUTarget

    nvidia = backends.backends["nvidia"]

    class OnlyPtx(nvidia.compiler):
        """Stops after PTX, which the emulator launches."""

        def __init__(self, target: GPUTarget):
            super().__init__(target)
            self.binary_ext = "ptx"

        def hash(self) -> str:  # this compiler has its own cache
            return f"{super().hash()} only ptx"

        def add_stages(self, stages: dict, options: Any, language: Any) -> None:
            super().add_stages(stages, options, language)
            stages["ptx"] = lambda source, metadata, make=stages["ptx"]: make(
                source, metadata
            ).encode()
            del stages["cubin"]

    class Driver:
        utils, launcher_cls = Utilities, Launcher
        get_current_device = get_current_stream = staticmethod(lambda *args: 0)
        set_current_device = staticmethod(lambda device: None)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, WARP))
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    backends.backends["nvidia"] = backends.Backend(compiler=OnlyPtx, driver=nvidia.driver)
    triton.runtime.driver.set_active(Driver())
