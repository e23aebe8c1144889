"""An interrupt at any line of a perturbed pass leaves the model as it was, and the next pass works.

Ctrl-C raises KeyboardInterrupt between any two lines of Python, including those of a clean-up. Here
a trace function raises it at the n-th line of pseuzo that one pass runs, for every n.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pseuzo
import pytest
import torch
from pseuzo import perturbed
from pseuzo.perturb import scratch
from pseuzo.perturb.contexts import frozen_mode, no_cached_casts
from pseuzo.perturb.module import passes_of
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

PACKAGE = str(Path(pseuzo.__file__).parent)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Nested(nn.Module):
    """Has an embedding of which rows are looked up, blocks within blocks, and a tied weight.

    outside: the head uses the embedding's weight outside the embedding. alone: modules run outside
    the blocks in which they ran before.
    """

    def __init__(self, outside: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.drop = nn.Embedding(12, 6), nn.Dropout(0.5)
        self.layers = nn.Sequential(Inner())
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight
        self.outside, self.alone = outside, False
        self.eval()
        self.drop.train()

    def forward(self, ids):
        with frozen_mode(self):
            x = self.drop(self.embed(ids))
        x = self.layers[0].down(self.layers[0].up(x)) if self.alone else self.layers(x)
        return F.linear(x, self.embed.weight) if self.outside else self.head(x)


IDS = torch.tensor([[3, 1, 7], [0, 11, 3]])


class Lines:
    """Records the lines of pseuzo that run inside this context, and raises KeyboardInterrupt at the
    line with index `at`."""

    def __init__(self, at: int | None = None):
        self.at, self.ran = at, []

    def __call__(self, frame: FrameType, event: str, arg: object) -> Callable | None:
        if event == "call":
            return self if frame.f_code.co_filename.startswith(PACKAGE) else None
        if event == "line":
            self.ran.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.ran) - 1 == self.at:
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)


def places(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(p)) for m in model.modules() for name, p in m._parameters.items()]


def assert_as_before(model: nn.Module, was: list[tuple[str, int]], twin: nn.Module) -> None:
    assert places(model) == was, "a perturbed copy is left in the model"
    assert all(map(torch.equal, model.parameters(), twin.parameters())), "a weight was written"
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._forward_hooks_always_called,
        )
        assert not any(hooks), "a hook is left"
        assert module.training == other.training, "a training mode was not restored"
    assert torch.is_autocast_cache_enabled()
    assert not _get_current_dispatch_mode_stack() and not _get_current_function_mode_stack()


def by_function(model: nn.Module, seed: int) -> torch.Tensor:
    with perturbed(model, seed, 0.1):
        return model(IDS)


def by_passes(model: nn.Module, seed: int) -> torch.Tensor:
    """Run a perturbed pass like an optimizer, with scales and on some weights only."""
    streams = {p: (2 * i, 1 + i % 3) for i, p in enumerate(model.parameters()) if i != 2}
    passes = passes_of(model, streams, "rademacher")
    with frozen_mode(model), no_cached_casts():
        passes.aim(seed, 0.1)
        with passes.passing("loss"):
            return model(IDS)


def first_and_last(lines: list[tuple[str, int]]) -> list[int]:
    """Return the indices at which each line runs for the first time and for the last time."""
    first = {line: i for i, line in reversed(list(enumerate(lines)))}
    last = {line: i for i, line in enumerate(lines)}
    return sorted({*first.values(), *last.values()})


def check(
    run: Callable[[nn.Module, int], torch.Tensor],
    outside: bool,
    warm: int,
    alone: bool,
    whole: bool,
) -> None:
    """Interrupt one pass, after `warm` others, at every line that it runs, or only at the first and
    the last run of each line.

    alone: in that pass, modules run outside the blocks in which they ran before.
    """
    twin = Nested(outside)
    want = [run(twin, seed) for seed in range(warm)]
    twin.alone = alone
    with Lines() as undisturbed:
        want.append(run(twin, warm))
    want += [run(twin, seed) for seed in (warm + 1, warm + 2)]
    lines, model = undisturbed.ran, None
    assert len(lines) > 300
    for at in range(len(lines)) if whole else first_and_last(lines):
        # Otherwise the next pass would differ by what this one learned.
        if model is None or not warm or alone:
            model = Nested(outside)
            for seed in range(warm):
                assert torch.equal(run(model, seed), want[seed])
        model.alone, was = alone, places(model)
        with pytest.raises(KeyboardInterrupt), Lines(at) as interrupted:
            run(model, warm)
        assert interrupted.ran == lines[: at + 1], "the pass ran other lines"
        assert_as_before(model, was, twin)
        for seed in range(warm, warm + 3 if whole else warm + 1):
            assert torch.equal(run(model, seed), want[seed]), lines[at]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make most weights of so small a model count as large."""
    monkeypatch.setattr(scratch, "SMALL", 8)


WAYS = {"watched": (0, False), "settled": (4, False), "alone": (4, True)}


@torch.no_grad()
@pytest.mark.parametrize(
    "run, outside, way",
    [(by_function, True, "watched"), (by_passes, False, "settled"), (by_passes, False, "alone")],
)
def test_interrupts_at_each_line(run, outside, way):
    check(run, outside, *WAYS[way], whole=False)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "run, outside, way",  # the pairs that the test above omits
    [(by_passes, False, "watched"), (by_function, True, "settled"), (by_function, True, "alone")],
)
def test_interrupts_at_each_run_of_each_line(run, outside, way):
    check(run, outside, *WAYS[way], whole=True)


def test_a_block_that_ends_late_leaves_the_cache_of_casts_on():
    outer, inner = no_cached_casts(), no_cached_casts()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)  # an interrupt's traceback can delay this exit
    assert torch.is_autocast_cache_enabled()
