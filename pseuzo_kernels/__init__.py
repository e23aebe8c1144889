"""Noise that is made again from seeds, fused into one pass over the weights, and PseuZO's window.

perturb_, restore_, update_, add_noise_, add_noise and noise compute, for tensors x of a model,
x <- keep * x + sum_k coefs[k] z(seeds[k], stream). adam_update_ makes Adam's moments again from
seeds. EmaWindow takes output changes and returns coefficients. `reference` has all of them in plain
torch and defines what is correct. CUDA tensors go to Triton and CUDA C++, CPU tensors to C++, and
others, or all in a build without C++, to the reference. `laws` is the table of noise laws; `ops`
has the unchecked ops for optimizers.
"""

from pseuzo_kernels import reference
from pseuzo_kernels.checks import NOISES, ROUNDINGS
from pseuzo_kernels.implementations import Backend, Backends, SlowWarning, backends
from pseuzo_kernels.ops import (
    adam_update_,
    add_noise,
    add_noise_,
    low_rank_factors,
    low_rank_perturb,
    low_rank_perturb_,
    low_rank_update_,
    noise,
    perturb,
    perturb_,
    restore_,
    sign_update_,
    update,
    update_,
)
from pseuzo_kernels.selection import Part, RandomMask, SmallMask, part_of
from pseuzo_kernels.streams import StreamWarning, stream_of_name
from pseuzo_kernels.window import EmaWindow

try:  # the schemas above must exist before the library registers its implementations of them
    from pseuzo_kernels import _C  # type: ignore[attr-defined]
except ImportError:
    _C = None
if _C is not None and _C.build_info().get("rounding_version") != reference.ROUNDING_VERSION:
    raise ImportError(  # the library would silently round by another rule
        "pseuzo_kernels._C was built from other sources than these; build it again: "
        "PSEUZO_BUILD=cpu pip install --no-build-isolation -e . (PSEUZO_BUILD=cuda for a GPU)"
    )

__version__ = "0.1.0"

__all__ = [
    "NOISES",
    "ROUNDINGS",
    "Backend",
    "Backends",
    "EmaWindow",
    "Part",
    "RandomMask",
    "SlowWarning",
    "SmallMask",
    "StreamWarning",
    "adam_update_",
    "add_noise",
    "add_noise_",
    "backends",
    "low_rank_factors",
    "low_rank_perturb",
    "low_rank_perturb_",
    "low_rank_update_",
    "noise",
    "part_of",
    "perturb",
    "perturb_",
    "reference",
    "restore_",
    "sign_update_",
    "stream_of_name",
    "update",
    "update_",
]
