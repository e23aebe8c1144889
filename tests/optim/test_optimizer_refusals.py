"""Optimizers refuse bad arguments, and a refusal leaves everything unchanged."""

import copy
import pickle

import pytest
import torch
from optimizers import Broken, data, head_for, small_model
from pseuzo import DeepZero, Evolution, MeZO, MeZOSVRG, NodePseuZO, PseuZO
from torch import nn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize(
    "method, fail_at",
    [
        ("mezo", 0),
        ("mezo", 1),
        ("pseuzo", 0),
        ("pseuzo", 1),
        ("pseuzo two-sided", 0),
        ("pseuzo two-sided", 1),
        ("pseuzo two-sided", 2),
    ],
)
def test_an_exception_in_a_pass_leaves_the_weights(method, bare, fail_at, dtype):
    model = small_model().to(dtype)
    before = [p.clone() for p in model.parameters()]
    target = model.parameters() if bare else model
    x, y = data(0)
    calls = []

    def forward():
        calls.append(1)
        if len(calls) > fail_at:
            raise Broken
        return model(x.to(dtype))

    if method == "mezo":
        opt, step = MeZO(target, 0.1, 1e-2), lambda: opt.step(lambda: head_for(y)(forward()))
    else:
        opt = PseuZO(target, 0.1, 1e-2, two_sided="two-sided" in method)
        step = lambda: opt.step(forward, head_for(y))  # noqa: E731
    with pytest.raises(Broken):
        step()
    for p, was in zip(model.parameters(), before, strict=True):
        # In place, adding and subtracting eps z rounds values below 2 twice. 16-bit weights are
        # restored from a copy.
        atol = 2 * 2.0**-23 if bare and dtype is torch.float32 else 0
        torch.testing.assert_close(p, was, rtol=0, atol=atol)


def test_groups_and_weights_that_cannot_be_meant_are_refused():
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="no option 'noise_scal'; did you mean 'noise_scale'"):
        MeZO([{"params": [w], "noise_scal": 0.0}], 0.1)
    with pytest.raises(ValueError, match="eps is one for all groups"):
        MeZO([{"params": [w], "eps": 0.1}], 0.1)
    MeZO([{"params": [w], "name": "all", "initial_lr": 0.1}], 0.1)
    offloaded = nn.Parameter(torch.ones(3, device="meta"), requires_grad=False)
    MeZO([offloaded, w], 0.1).step(lambda: w.sum())
    with pytest.raises(ValueError, match="on the meta device"):
        MeZO([nn.Parameter(torch.ones(3, device="meta"))], 0.1)
    opt = MeZO([w], 0.1)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(
            TypeError, match="make a new MeZO of the other weights, and give it state_dict"
        ):
            copied(opt)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(lr=-1.0), "PseuZO: lr must be finite and not negative"),
        (dict(lr=float("nan")), "PseuZO: lr must be finite"),
        (dict(eps=0.0), "PseuZO: eps must be positive"),
        (dict(eps=float("inf")), "eps must be finite"),
        (dict(weight_decay=-0.1), "PseuZO: weight_decay must be"),
        (dict(noise_scale=-1.0), "PseuZO: noise_scale must be"),
        (
            dict(noise="gauss"),
            "unknown noise 'gauss'; known: 'hadamard', 'hadamard-fp16', 'normal', 'rademacher'",
        ),
        (dict(rounding="up"), "unknown rounding 'up'; known: 'nearest', 'stochastic'"),
        (dict(window=0), "capacity must be an int of at least 1"),
        (dict(momentum=1.5), "must be in 0 .. 1"),
        (dict(seed=1 << 70), "a seed must fit 64 bits"),
        (dict(clip_examples=0.0), "PseuZO: clip_examples must be positive, or None, got 0"),
        (dict(clip_examples=-1.0), "PseuZO: clip_examples must be finite and not negative"),
    ],
)
def test_bad_options(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        PseuZO(small_model(), **arguments)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(directions=0), "MeZO: directions must be an int of at least 1, got 0"),
        (dict(directions=1.5), "MeZO: directions must be an int of at least 1, got 1.5"),
        (dict(window=0), "MeZO: window must be an int of at least 1"),
        (dict(momentum=1.1), "MeZO: momentum must be in 0 .. 1, got 1.1"),
        (dict(momentum=float("nan")), "MeZO: momentum must be in"),
    ],
)
def test_bad_options_of_mezo(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        MeZO(small_model(), **arguments)


def test_bad_parameters():
    frozen = small_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        MeZO(frozen)
    with pytest.raises(TypeError, match="must be float32, bfloat16 or float16"):
        MeZO(small_model().double())
    with pytest.raises(ValueError, match=r"must be contiguous.*call \.contiguous\(\)"):
        MeZO([nn.Parameter(torch.randn(4, 5).T)])
    with pytest.raises(ValueError, match="not one of the model's"):
        MeZO([nn.Parameter(torch.zeros(3))], model=small_model())
    with pytest.raises(ValueError, match="noise_scale must be finite and not negative"):
        MeZO([{"params": small_model().parameters(), "noise_scale": -2.0}])


@pytest.mark.parametrize(
    "forward, head, groups, error, sentence",
    [
        (
            lambda m, x: [1.0],
            head_for,
            None,
            TypeError,
            "forward must return a floating-point tensor",
        ),
        (
            lambda m, x: torch.arange(4),
            head_for,
            None,
            TypeError,
            "forward must return a floating-point tensor",
        ),
        (lambda m, x: m(x)[0], head_for, None, ValueError, r"must return \[B, P, D\] or \[B, D\]"),
        (None, head_for, None, ValueError, r"returned \(4, 5\) and then \(3, 5\)"),
        (lambda m, x: m(x), lambda y: lambda o: o, None, ValueError, "head must return a scalar"),
        (lambda m, x: m(x), lambda y: lambda o: 1.0, None, ValueError, "head must return a scalar"),
        (
            lambda m, x: m(x),
            lambda y: lambda o: torch.ones(()),
            None,
            ValueError,
            "does not depend on the output",
        ),
        (
            lambda m, x: m(x),
            head_for,
            torch.zeros(3, dtype=torch.long),
            ValueError,
            "one per row of the output, 4, got 3",
        ),
        (lambda m, x: m(x), head_for, torch.zeros(4), ValueError, "groups must be 4 integers"),
    ],
)
@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
def test_bad_steps_change_nothing(forward, head, groups, error, sentence, bare):
    model = small_model()
    before = [p.clone() for p in model.parameters()]
    x, y = data(0)
    calls = []
    if forward is None:
        forward = lambda m, x: m(x[: 4 - len(calls)])  # noqa: E731
    opt = PseuZO(model.parameters() if bare else model, 0.1, 1e-2)

    def run():
        o = forward(model, x)
        calls.append(1)
        return o

    with pytest.raises(error, match=sentence):
        opt.step(run, head(y), groups=groups)
    for p, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, was, rtol=0, atol=2 * 2.0**-23 if bare else 0)


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
def test_bad_losses(bare):
    model = small_model()
    opt = MeZO(model.parameters() if bare else model, 0.1, 1e-2)
    with pytest.raises(ValueError, match="the loss must be a scalar"):
        opt.step(lambda: torch.ones(3, 2))
    with pytest.raises(ValueError, match="the loss must be a scalar"):
        opt.step(lambda: torch.ones(0))
    with pytest.raises(ValueError, match=r"losses of shapes \(3,\) and \(2,\)"):
        sizes = iter((3, 2))
        opt.step(lambda: torch.ones(next(sizes)))
    with pytest.raises(TypeError, match="must return a scalar tensor or a number"):
        opt.step(lambda: None)
    with pytest.raises(TypeError, match="needs a closure"):
        opt.step(1.0)
    for step in (opt.step, PseuZO(model).step, lambda: opt.step(None)):
        with pytest.raises(RuntimeError, match="there is no estimate to apply; call estimate"):
            step()
    for arguments in ((model,), (None, model), (1.0, model)):
        with pytest.raises(TypeError, match=r"PseuZO.step: needs forward\(\) -> o and head"):
            PseuZO(model).step(*arguments)


def test_what_several_ranks_cannot_do():
    """They are refused before anything is changed. A group of one rank is allowed."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model, (x, y) = small_model(), data(0)
    before = copy.deepcopy(model.state_dict())
    early = MeZO(model)
    exact = [{"params": model[2].weight, "exact_gradient": True}, {"params": model[0].weight}]
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        ddp = nn.parallel.DistributedDataParallel(model)
        for refused, match in (
            (lambda: early.step(lambda: head_for(y)(model(x))), "made before the process group"),
            (lambda: early.estimate(lambda: head_for(y)(model(x))), "after init_process_group"),
            (lambda: MeZO(ddp), "give it the model itself and not DistributedDataParallel"),
            (lambda: MeZO(model, direction_ranks=3), "must divide the number of ranks, 2, got 3"),
            (lambda: MeZO(model, direction_ranks=0), "must divide the number of ranks, 2, got 0"),
            (lambda: MeZO(model.parameters(), direction_ranks=2), "bare fp32 parameters"),
            (lambda: DeepZero(model), "DeepZero: runs in one process, but this is one of"),
            (lambda: MeZOSVRG(model), "MeZOSVRG: runs in one process"),
            (lambda: NodePseuZO(model), "NodePseuZO: runs in one process"),
            (lambda: Evolution(model, split_batch=True), "Evolution with split_batch: runs in one"),
            (lambda: PseuZO(exact, model=model), "exact_gradient groups are for one process"),
        ):
            with pytest.raises(ValueError, match=match):
                refused()
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    finally:
        torch.distributed.destroy_process_group()
    early.step(lambda: head_for(y)(model(x)))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        MeZO(model).step(lambda: head_for(y)(model(x)))
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ValueError, match="must divide the number of ranks, 1, got 2"):
        MeZO(model, direction_ranks=2)
