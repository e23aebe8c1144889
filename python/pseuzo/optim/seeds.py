"""Seeds of a step: functions of (run seed, step) alone. No global generator is read or written."""

from pseuzo_kernels.reference import hash_seed

ROUNDING_DOMAIN = 0x726F756E64  # keeps the bits that round apart from the bits that perturb


def step_seed(run_seed: int, step: int, domain: int = 0) -> int:
    """The seed of a step."""
    return hash_seed(hash_seed(run_seed ^ domain) + step)


def direction_seed(run_seed: int, step: int, direction: int) -> int:
    """The seed of one of a step's directions; that of direction 0 is the step's."""
    seed = step_seed(run_seed, step)
    return hash_seed(seed + direction) if direction else seed
