"""What limits the kernels besides memory: the rate at which a GPU issues instructions.

COSTS has instructions of our Triton kernels per element, counted in their machine code by
bench/sass_cost.py. A time from them is a lower bound: nothing waits, and memory is free.
"""

from dataclasses import dataclass, replace

import torch

MEMORY, MATRIX = 0.9, 0.5  # shares of the data sheet's rates that predictions count on
LANES = 128  # instructions per multiprocessor and cycle: four warps of 32 lanes


@dataclass(frozen=True)
class Chip:
    """A GPU, with the terabytes/s and dense bf16 teraflops/s of its data sheet."""

    name: str
    arch: int
    multiprocessors: int
    ghz: float
    terabytes: float = 0.0
    teraflops: float = 0.0

    def issue_ms(self, instructions: float) -> float:
        """The time in which this number of instructions is issued, counted for one lane."""
        return instructions / (LANES * self.multiprocessors * self.ghz * 1e6)

    def ms(
        self, instructions: float = 0, bytes_moved: float = 0, flops: float = 0
    ) -> tuple[float, str]:
        """The longest of the three times, and its name. instructions: the count for one lane."""
        times = {
            "arithmetic": self.issue_ms(instructions),
            "memory": bytes_moved / (MEMORY * self.terabytes * 1e9),
            "matrix products": flops / (MATRIX * self.teraflops * 1e9),
        }
        bound = max(times, key=lambda name: times[name])
        return times[bound], bound


CHIPS = (
    Chip("A100 SXM 80 GB", 80, 108, 1.41, 2.039, 312),
    Chip("H100 SXM", 90, 132, 1.755, 3.35, 989),
    Chip("H200", 90, 132, 1.755, 4.8, 989),
)

# (compute capability, op, dtype) -> instructions per normal in the loop over seeds, and per element
# around it. All are for "hadamard"; updates of 16-bit weights round stochastically.
COSTS = {
    (80, "update", "float32"): (4.5625, 9.859375),
    (80, "update", "bfloat16"): (4.5625, 22.4375),
    (80, "perturb", "bfloat16"): (4.96875, 11.828125),
    (80, "noise", "float32"): (4.96875, 7.4375),
    (90, "update", "float32"): (4.546875, 9.875),
    (90, "update", "bfloat16"): (4.546875, 22.46875),
    (90, "perturb", "bfloat16"): (4.953125, 11.984375),
    (90, "noise", "float32"): (4.953125, 7.5625),
}  # fmt: skip


def chip_named(device: str) -> Chip | None:
    """The GPU of the table that a device's name means."""
    return next((chip for chip in CHIPS if chip.name.split()[0] in device), None)


def chip_of(device: torch.device) -> Chip | None:
    """The GPU, from the table or from what the driver says; None if its clock is unknown or no
    kernel was counted for it."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if known := chip_named(properties.name):  # on a PCIe card it has fewer multiprocessors
        return replace(known, multiprocessors=properties.multi_processor_count)
    khz = getattr(properties, "clock_rate", 0)  # torch 2.6 does not tell
    if not khz or properties.major not in (8, 9):
        return None
    arch = 10 * properties.major  # the counts of 8.0 stand for 8.6 and 8.9, too
    return Chip(properties.name, arch, properties.multi_processor_count, khz / 1e6)


def issue_ms(chip: Chip | None, op: str, dtype: torch.dtype, n: int, K: int) -> float | None:
    """The least ms in which the GPU issues the instructions of an op on n elements, or None if they
    were not counted."""
    cost = COSTS.get((chip.arch, op, str(dtype)[6:])) if chip else None
    return chip.issue_ms(n * (K * cost[0] + cost[1])) if chip and cost else None
