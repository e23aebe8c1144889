"""Steps neither use nor leave casts that autocast caches."""

from contextlib import nullcontext

import pytest
import torch
from optimizers import LABELS
from pseuzo import (
    MeZO,
    PseuZO,
    perturbed,
)
from tiny_models import Tied
from torch import nn

AUTOCAST_MAKERS = {
    "mezo": lambda p: MeZO(p, 1e-2, 1e-2, seed=2),
    "mezo one-sided": lambda p: MeZO(p, 1e-2, 1e-2, two_sided=False, seed=2),
    "pseuzo": lambda p: PseuZO(p, 1e-2, 1e-2, 3, seed=2),
    "pseuzo two-sided": lambda p: PseuZO(p, 1e-2, 1e-2, 3, two_sided=True, seed=2),
}


WHERE = (
    "a step",
    "the loop",
    "a pass",
    "the loop and a pass, which caches",
    "the loop, and what is run before a step",
)


def steps_under_autocast(make, bare, where, cache):
    """Return the slopes, losses and weights of some steps, and the losses of an evaluation after
    each step."""
    net, ids = Tied(vocab=24, width=16), torch.arange(12).view(4, 3)
    opt = make(net.parameters() if bare else net)

    def autocast(inside="", cache=cache):
        return (
            torch.autocast("cpu", torch.bfloat16, cache_enabled=cache)
            if inside in where
            else nullcontext()
        )

    inner = torch.autocast("cpu", torch.bfloat16, cache_enabled=cache)

    def run():
        with inner if "pass" in where else nullcontext():
            return net.eval()(ids).float()

    def loss_of(o):
        return nn.functional.cross_entropy(o, LABELS)

    found = []
    with autocast("the loop"):
        for _ in range(5):
            if "before" in where:  # this caches casts of weights that the step changes
                loss_of(run()).backward()
            with autocast("a step"):
                args = (run, loss_of) if isinstance(opt, PseuZO) else (lambda: loss_of(run()),)
                enabled = torch.is_autocast_cache_enabled()
                found += [opt.step(*args), *opt.stats["projected_grad"]]
                assert torch.is_autocast_cache_enabled() == enabled
                with torch.no_grad():
                    found.append(loss_of(run()))
    return torch.stack(found), [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("bare", [False, True], ids=["module", "parameters"])
@pytest.mark.parametrize("name", AUTOCAST_MAKERS)
def test_no_step_uses_or_leaves_casts_that_autocast_caches(name, bare, where):
    """The steps have the bits of steps under an autocast that caches nothing. The model uses a
    weight outside its module."""
    got, want = (
        steps_under_autocast(AUTOCAST_MAKERS[name], bare, where, cache) for cache in (True, False)
    )
    assert torch.equal(got[0], want[0])
    assert all(map(torch.equal, got[1], want[1]))
    plain = steps_under_autocast(AUTOCAST_MAKERS[name], bare, "nowhere", True)
    assert not torch.equal(plain[0], want[0]), "the steps were not in bf16"


def test_a_context_of_perturbed_weights_leaves_no_casts():
    # One weight is not copied before the pass.
    net, ids = (
        Tied().eval(),
        torch.arange(12).view(4, 3),
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = net(ids)
        with perturbed(net, 3, 0.5):
            inside = net(ids)
        assert torch.equal(net(ids), before)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        perturbed(net, 3, 0.5),
    ):
        assert torch.equal(net(ids), inside) and not torch.equal(inside, before)
