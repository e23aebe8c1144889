"""Block-wise ZO-SGD: each step perturbs and moves one block of the weights, and they take turns.

Source: Zhang et al., "Revisiting zeroth-order optimization for memory-efficient LLM fine-tuning: a
benchmark" (2024), block-wise ZO fine-tuning.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pseuzo.optim.groups import trained
from pseuzo.optim.mezo import MeZO, Slopes
from pseuzo_kernels.checks import check_count


class ZOBlocks(MeZO):
    """MeZO on one block of weights per step, in a cycle over the blocks.

    Step t perturbs block t mod `blocks` alone and moves it as MeZO would; all other weights take
    neither noise nor weight decay. A block is a run of whole parameters, in the order of the model
    (without a model, in the order that they were given), and all blocks have about equally many
    elements. Noise is made for one block only, so the variance of an estimate is that of one block.
    A step costs as many passes as a MeZO step. ValueError if fewer parameters are trained than
    there are blocks; frozen parameters are in no block until they are trained. capture is refused,
    because the memory that passes use changes with the block.
    """

    own_settings = (*MeZO.own_settings, "blocks")

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        blocks: int = 4,
        **options: Any,
    ):
        check_count("ZOBlocks", "blocks", blocks)
        if options.get("capture"):
            raise ValueError(
                "ZOBlocks: capture records passes whose memory stays, and a step perturbs another "
                "block than the one before; leave it off"
            )
        self.blocks = blocks
        super().__init__(params, lr, eps, momentum=0.0, **options)
        self.block()

    def block(self) -> list[Tensor]:
        """The parameters that the next step perturbs and moves."""
        params = [p for _, ps in trained("ZOBlocks.step", self.param_groups) for p in ps]
        params.sort(key=self.streams.__getitem__)
        if len(params) < self.blocks:
            raise ValueError(
                f"ZOBlocks: {len(params)} parameters are trained, too few for {self.blocks} blocks"
            )
        sizes = cut(self.blocks, [p.numel() for p in params])
        i = self.steps % self.blocks
        return params[sum(sizes[:i]) : sum(sizes[: i + 1])]

    def measure(self, closure: Callable[[], Any]) -> Slopes:
        self.passes.limit(self.steps % self.blocks, self.block())
        return super().measure(closure)

    def keep(self, state: Any) -> None:
        super().keep(state)
        self.passes.release()

    def own_state(self) -> dict[str, Any]:
        return super().own_state() | {"blocks": self.blocks}

    def load_own_state(self, own: Mapping[str, Any]) -> None:
        super().load_own_state(own)
        self.blocks = own["blocks"]


def cut(parts: int, sizes: Sequence[int]) -> list[int]:
    """How many of the sizes, in order, go to each part, at least one, so that their sums are about
    equal."""
    counts, first = [], 0
    for part in range(parts):
        left = parts - part - 1  # parts after this one, which need a size each
        share, total, n = sum(sizes[first:]) / (left + 1), 0, 0
        while first + n < len(sizes) - left and (
            left == 0 or n == 0 or total + sizes[first + n] / 2 <= share
        ):
            total += sizes[first + n]
            n += 1
        counts.append(n)
        first += n
    return counts
