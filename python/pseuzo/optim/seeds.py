"""The seeds of a step depend on (run seed, step) alone; no global generator is read or written."""

from pseuzo_kernels.reference import hash_seed

ROUNDING_DOMAIN = 0x726F756E64  # keeps the bits that round apart from the bits that perturb
MASK_DOMAIN = 0x6D61736B  # keeps the bits of random masks apart from both
HASH_DOMAIN = 0x68617368  # draws the weights that ranks compare


def step_seed(run_seed: int, step: int, domain: int = 0) -> int:
    """The seed of a step."""
    return hash_seed(hash_seed(run_seed ^ domain) + step)


def mask_seed(run_seed: int, step: int, renewed: bool) -> int:
    """The seed of a step's random masks. renewed: each step has its own masks."""
    return step_seed(run_seed, step if renewed else 0, MASK_DOMAIN)


def direction_seed(run_seed: int, step: int, direction: int) -> int:
    """The seed of one of a step's directions; that of direction 0 is the step's."""
    seed = step_seed(run_seed, step)
    return hash_seed(seed + direction) if direction else seed
