"""Measures what the checks of a repeated list cost the host: python bench/bench_lists.py

A list of 160 tensors of 512 elements is perturbed again and again, by perturb_, which checks it,
and by the op below it, which does not. The difference is the cost of the checks. Those of the list
itself are timed alone, too: of one that is new, and of one that passed before.
"""

import time
from collections.abc import Callable

import torch

from pseuzo_kernels import backends, ops, perturb_
from pseuzo_kernels.lists import CheckedLists

TENSORS, ELEMENTS, CALLS, REPEATS = 160, 512, 30, 60


def us_per_tensor(call: Callable[[], object]) -> float:
    """Return the least time of a call in microseconds, divided by the number of tensors."""
    for _ in range(CALLS):
        call()
    best = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        best = min(best, (time.process_time() - start) / CALLS)
    return best * 1e6 / TENSORS


def main() -> None:
    torch.set_num_threads(1)
    params = [torch.nn.Parameter(torch.zeros(ELEMENTS)) for _ in range(TENSORS)]
    xs, seeds = [p.detach() for p in params], iter(range(10**9))
    terms = torch.tensor([1]), torch.tensor([1e-3]), list(range(TENSORS))
    ones = [1.0] * TENSORS
    alone = us_per_tensor(
        lambda: ops.add_noise_list_(xs, *terms, ones, ones, "hadamard", False, 0, None)
    )
    checked = us_per_tensor(lambda: perturb_(params, next(seeds), 1e-3))
    new = us_per_tensor(lambda: CheckedLists().check("perturb_", params))
    known = CheckedLists()
    again = us_per_tensor(lambda: known.check("perturb_", params))
    print(
        f"{backends().cpu}: perturb_ {checked:.2f} us a tensor, the op alone {alone:.2f}, checks "
        f"{checked - alone:.2f}; of a new list {new:.2f}, of one that passed {again:.2f}"
    )


if __name__ == "__main__":
    main()
