"""LAWS, the noise laws: what the random words of a Philox counter become. A law is one row.

A row in plain torch is enough for every device, because Triton and C++ hand a law that they do not
implement to the reference. A test checks what they do implement against this table.

    b = columns(words)                 16 planes from the words of a counter, 4 words for each key
    z = scale * FWHT16(b) or scale * b the transform is linear, so a sum over seeds needs it once
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pseuzo_kernels.bits import KEYS_NOISE, counter_of, philox4x32

Sums = Literal["fp32", "fp16"]
Words = tuple[Tensor, ...]  # int64 in 0 .. 2^32 - 1, [n] each


class Pattern(NamedTuple):
    """Four half-precision numbers from a word w: the halves of (w & mask) | ones, and the same
    after the two bytes of each half of w were swapped."""

    mask: int
    ones: int

    def __call__(self, words: Words) -> Tensor:
        planes = []
        for word in words:
            swapped = ((word & 0x00FF00FF) << 8) | ((word >> 8) & 0x00FF00FF)
            for source in (word, swapped):
                bits = (source & self.mask) | self.ones
                planes += [bits & 0xFFFF, bits >> 16]
        halves = torch.stack(planes)
        halves = torch.where(halves >= 0x8000, halves - 0x10000, halves)  # the range of int16
        return halves.to(torch.int16).view(torch.float16).float()


HADAMARD = Pattern(0x8F708F70, 0x30003000)  # variance 0.7050395011901855, 7 significant bits
SIGNS = Pattern(0x80008000, 0x3C003C00)  # +1 or -1, from the top bit of each byte
# This is nearly half a step of the angle: with it, one fused multiply-add on bits gives the angle.
ANGLE = 219 / 2**22


def box_muller(words: Words) -> Tensor:
    """Planes 2w and 2w + 1 from word w: 16 bits of radius and 16 bits of angle."""
    stacked = torch.stack(words)  # [8, n]
    radius = torch.sqrt(-2 * torch.log(((stacked >> 16).float() + 0.5) / 65536))
    angle = ((stacked & 0xFFFF).float() - 32768) * (math.pi / 32768) + ANGLE
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1).flatten(0, 1)


@dataclass(frozen=True)
class Law:
    columns: Callable[[Words], Tensor]  # four words [n] for each key -> b, [16, n] fp32
    scale: float = 1.0  # makes the variance of z 1
    transform: bool = False  # whether z is FWHT16(b), or b itself
    keys: tuple[tuple[int, int], ...] = KEYS_NOISE[:1]  # Philox's
    rounds: int = 7
    sums: tuple[Sums, ...] = ("fp32",)  # the precisions in which sums over seeds may be made

    def column_noise(self, q: Tensor, stream: int, seed_hash: Tensor) -> Tensor:
        """b, [16, n] fp32: before transform and scale. q [n] and seed_hash [] are int64."""
        counter = counter_of(q, stream, seed_hash)
        words = [philox4x32(counter, key, self.rounds) for key in self.keys]
        return self.columns(sum(words, ()))


LAWS: dict[str, Law] = {
    "hadamard": Law(
        HADAMARD,  # type: ignore[arg-type]  # mypy does not see __call__ of a NamedTuple
        scale=1 / (4 * math.sqrt(0.7050395011901855)),
        transform=True,
        sums=("fp32", "fp16"),
    ),
    "normal": Law(box_muller, keys=KEYS_NOISE, rounds=10),
    "rademacher": Law(SIGNS),  # type: ignore[arg-type]  # the same
}


def noise_names() -> tuple[str, ...]:
    """What users may ask for: each law, and "law-fp16" where its sums may be made in half
    precision."""
    fp16 = (f"{name}-fp16" for name, law in LAWS.items() if "fp16" in law.sums)
    return tuple(sorted((*LAWS, *fp16)))


def resolve(noise: str, op: str = "noise") -> tuple[str, Sums]:
    """The name of the law and the precision of its sums. ValueError if there is no such noise."""
    if isinstance(noise, str):
        if noise in LAWS:
            return noise, "fp32"
        name = noise.removesuffix("-fp16")
        if name != noise and name in LAWS and "fp16" in LAWS[name].sums:
            return name, "fp16"
    known = ", ".join(map(repr, noise_names()))
    raise ValueError(f"{op}: unknown noise {noise!r}; known: {known}")
