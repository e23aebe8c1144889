"""Adapters: patched trainers make the steps of a plain loop over noise of the public function."""

import re
from collections.abc import Iterable, Mapping

import numpy as np
import peers
import pytest
import torch
from helpers import assert_same_bits
from peers import DECAY, EPS, RATE, small_model
from torch import Tensor

import pseuzo_kernels as pk
from pseuzo_kernels.adapters import SeededWeights, es, lozo, mezo, unpatch, zo2, zo_llm

LOSSES = [0.5, 0.49, 0.3, 0.32, 0.2, 0.25]
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}


def weights_of(model) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad}


def z(name: str, x: Tensor, seed: int, noise: str = "normal") -> Tensor:
    return pk.noise(x.shape, seed, pk.stream_of_name(name), noise=noise).double()


def plus(
    weights: Mapping[str, Tensor],
    terms: Iterable[tuple[int, float]],
    keep: float = 1.0,
    noise: str = "normal",
    without: tuple[str, ...] = ("bias", "layer_norm"),
) -> dict[str, Tensor]:
    """keep * x + sum of scale * z(seed), in float64; keep is not for names with those words."""
    result = {}
    for name, x in weights.items():
        result[name] = x.double() * (1.0 if any(word in name for word in without) else keep)
        for seed, scale in terms:
            result[name] = result[name] + scale * z(name, x, seed, noise)
    return result


def assert_near(got: Mapping[str, Tensor], want: Mapping[str, Tensor], roundings: int) -> None:
    """Each of the roundings is half an ulp at most of the largest weight, which is below 8; fp32
    sums add as much."""
    for name, x in want.items():
        dtype = got[name].dtype
        bound = 8 * (roundings * HALF_ULP[dtype] + 8 * HALF_ULP[torch.float32])
        assert x.abs().max() < 8 and (got[name].double() - x).abs().max() <= bound, name


def slopes(losses: list[float] = LOSSES, width: float = 2 * EPS) -> list[float]:
    return [
        (torch.tensor(a) - torch.tensor(b)).item() / width
        for a, b in zip(losses[::2], losses[1::2], strict=True)
    ]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_weights_move_along_the_noise_of_their_names(dtype, exact):
    model = small_model(dtype)
    start = weights_of(model)
    moved = SeededWeights(list(model.named_parameters())[::-1], exact=exact, noise="hadamard")
    moved.perturb(4, 0.25)
    assert_near(weights_of(model), plus(start, [(4, 0.25)], noise="hadamard"), 1)
    part = SeededWeights(list(model.named_parameters())[:2], noise="hadamard")
    part.perturb(4, -0.25)  # a part of the model has the noise it has in the whole
    first = dict(list(start.items())[:2])
    assert_near(weights_of(model), plus(first, [], noise="hadamard"), 2)
    before = weights_of(model)
    moved.update([1, 2], [0.5, -0.25], lr=0.5, weight_decay=0.25)
    want = plus(before, [(1, -0.25), (2, 0.125)], 0.875, "hadamard", without=())
    assert_near(weights_of(model), want, 1)


def test_an_exact_restore_gives_the_bits_back_and_one_in_place_drifts():
    for dtype in (torch.bfloat16, torch.float16):
        drift = 0.0
        for exact in (True, False):
            model = small_model(dtype)
            start = weights_of(model)
            moved = SeededWeights(model.named_parameters(), exact=exact)
            for seed in (5, 6):
                for scale in (1, -2, 1):
                    moved.perturb(seed, scale * EPS)
            now = weights_of(model)
            if exact:
                for name, x in start.items():
                    assert_same_bits(now[name], x)
            else:
                assert_near(now, {name: x.double() for name, x in start.items()}, 6)
                drift = max((now[name] - x).abs().max().item() for name, x in start.items())
        assert drift > 0


def test_exact_takes_weights_that_were_replaced_and_another_seed():
    model = small_model(torch.bfloat16)
    start = weights_of(model)
    moved = SeededWeights(model.named_parameters(), exact=True)
    moved.perturb(1, EPS)
    moved.perturb(2, EPS)  # from there
    assert_near(weights_of(model), plus(start, [(1, EPS), (2, EPS)]), 2)
    for x in model.parameters():
        x.data.zero_()
    moved.settle()
    moved.perturb(2, EPS)
    moved.perturb(2, -EPS)
    assert not any(x.any() for x in model.parameters())


def test_stochastic_updates_keep_what_nearest_loses():
    for rounding in ("nearest", "stochastic"):
        model = small_model(torch.bfloat16)
        start = weights_of(model)
        moved = SeededWeights(model.named_parameters(), rounding=rounding)
        moved.update(7, 1.0, lr=1e-6)
        changed = {name for name, x in weights_of(model).items() if not torch.equal(x, start[name])}
        assert bool(changed) == (rounding == "stochastic")


def test_weights_are_refused_with_a_sentence():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="same stream"):
        SeededWeights([("a", x), ("a", x.clone())])
    with pytest.raises(ValueError, match="unknown noise 'gauss'"):
        SeededWeights([("a", x)], noise="gauss")
    moved = SeededWeights([("a", x)])
    for call in (lambda: moved.perturb(1, np.inf), lambda: moved.update(1, np.nan, lr=1.0)):
        with pytest.raises(ValueError, match="finite"):
            call()
    assert torch.equal(x, torch.ones(3))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("of_class", [False, True])
def test_mezo(of_class, exact):
    class Trainer(peers.MeZOTrainer):
        pass

    own = dict(vars(peers.MeZOTrainer))
    trainer = Trainer(small_model(), LOSSES)
    target = Trainer if of_class else trainer
    assert mezo.patch(target, exact=exact) is target
    want = weights_of(trainer.model)
    for step, slope in enumerate(slopes()):
        trainer.zo_step(trainer.model, None)
        seed = trainer.zo_random_seed
        for sign, seen in zip((1, -1), trainer.seen[-2:], strict=True):
            assert_near(seen, plus(want, [(seed, sign * EPS)]), 4 * (step + 1))
        lr = RATE / (1 + step)
        trainer.zo_update(trainer.model)
        want = plus(want, [(seed, -lr * slope)], 1 - lr * DECAY)
    assert_near(weights_of(trainer.model), want, 12)
    assert trainer.lr_scheduler.steps == 3
    unpatch(target)
    trainer.zo_random_seed = 1
    trainer.zo_perturb_parameters()  # the stand-in's own, with its own noise
    assert "zo_update" not in vars(trainer) and dict(vars(peers.MeZOTrainer)) == own


def test_mezo_clips_slopes_as_qzo_does_and_refuses_momentum():
    trainer = mezo.patch(peers.MeZOTrainer(small_model(), LOSSES, clip_zo_grad=True))
    start = weights_of(trainer.model)
    trainer.begin()
    trainer.projected_grad = -1e6
    trainer.zo_update(trainer.model)
    assert trainer.projected_grad == -100
    got = weights_of(trainer.model)
    for name, x in plus(start, [(10, RATE * 100)], 1 - RATE * DECAY).items():
        assert x.abs().max() < 256
        assert (got[name] - x).abs().max() <= 4 * 256 * HALF_ULP[torch.float32], name
    trainer.momentum = True
    with pytest.raises(NotImplementedError, match="momentum and window"):
        trainer.zo_update(trainer.model)


def test_the_window_of_pseuzo():
    trainer = mezo.patch(peers.PZOTrainer(small_model(), [0.0] * 3))
    want = weights_of(trainer.model)
    draw = torch.Generator().manual_seed(2)
    changes, seeds = [], []
    for step, tokens in enumerate((3, 5, 4)):
        changes.append(torch.randn(2, tokens, 6, generator=draw) / 64)
        gradient = torch.randn(2, 4, 6, generator=draw) / 64
        trainer.pzo_step(changes[-1], gradient)
        seeds.append(trainer.zo_random_seed)
        assert_near(trainer.seen[-1], plus(want, [(seeds[-1], EPS)]), 3 * (step + 1))
        trainer.pzo_update(trainer.model)
        lr, terms = RATE / (1 + step), []
        factors = [1.0] if step == 0 else [0.5, 1.0]  # the window is two steps long
        for factor, seed, change in zip(factors, seeds[-2:], changes[-2:], strict=True):
            n = min(4, change.shape[1])
            dot = (change[:, -n:] * gradient[:, -n:]).double().sum().item()
            terms.append((seed, -lr * factor * dot / EPS))
        want = plus(want, terms, 1 - lr * DECAY)
    assert_near(weights_of(trainer.model), want, 12)


def test_lozo():
    trainer = peers.LOZOTrainer(small_model(), LOSSES, rank_r=2, step_interval=2)
    lozo.patch(trainer)
    want = {name: x.double() for name, x in weights_of(trainer.model).items()}
    for step, slope in enumerate(slopes()):
        trainer.lowrank_zo_step(trainer.model, None)
        trainer.lowrank_zo_update()
        seed, v_seed, lr = 10 + step, 10 + step // 2 * 2, RATE / (1 + step)
        for name, x in want.items():
            if x.ndim == 2:
                shape, stream = tuple(x.shape), pk.stream_of_name(name)
                how = dict(rank=2, right_seed=v_seed, noise="normal")
                u, v = (f.double() for f in pk.low_rank_factors(shape, seed, stream, **how))
                along = u @ v.T
            else:
                along = z(name, x, seed)
            if step == 0:
                seen = trainer.seen[0][name].double()
                assert (seen - x - EPS * along).abs().max() <= 64 * HALF_ULP[torch.float32]
            keep = 1 - lr * DECAY if "fc.weight" in name or "head.weight" in name else 1.0
            want[name] = keep * x - lr * slope * along
    got = weights_of(trainer.model)
    for name, x in want.items():  # values below 32, rounded 12 times, and products of rank 2
        assert x.abs().max() < 32
        assert (got[name] - x).abs().max() <= 32 * 24 * HALF_ULP[torch.float32], name
    trainer.projected_grad = float("inf")
    with pytest.raises(ValueError, match="projected_grad must be finite"):
        trainer.lowrank_zo_update()
    assert all(torch.equal(x, got[name]) for name, x in weights_of(trainer.model).items())


def test_zo2():
    optimizer = zo2.patch(peers.MeZOSGD(small_model(), LOSSES))
    want, rate = weights_of(optimizer.model), dict(without=("bias", "layer_norm"))
    for step, slope in enumerate(slopes()):
        optimizer.zo_forward()
        assert_near(optimizer.seen[2 * step], plus(want, [(10 + step, EPS)]), 4 * step + 1)
        want = plus(want, [(10 + step, -RATE * slope)], 1 - RATE * DECAY, **rate)
    assert_near(weights_of(optimizer.model), want, 12)
    optimizer.debug_mode = True
    before = weights_of(optimizer.model)
    optimizer.zo_perturb_parameters(optimizer.model, 2)
    for name, x in weights_of(optimizer.model).items():
        assert torch.equal(x, before[name] + 2 * EPS)
    with pytest.raises(ValueError, match="not a part of the optimizer's model"):
        optimizer.debug_mode = False
        optimizer.zo_perturb_parameters(small_model())


def test_zo2_updates_blocks_one_step_later_with_the_seed_of_that_step():
    class Offloading(peers.MeZO2SGD):
        pass

    zo2.patch(Offloading)
    optimizer = Offloading(small_model(), LOSSES)
    want = weights_of(optimizer.model)
    for step in range(3):
        if step:
            before, slope = want, slopes()[step - 1]
            want = plus(want, [(9 + step, -RATE * slope)], 1 - RATE * DECAY)
            name = "head.weight"  # the last part is not decayed
            want[name] = plus(before, [(9 + step, -RATE * slope)], 1.0)[name]
        optimizer.zo_forward()
        first = optimizer.seen[9 * step]
        block = {name: x for name, x in want.items() if name.startswith("blocks.0.")}
        assert_near(first, plus(block, [(10 + step, EPS)]), 4 * (step + 1))
    assert_near(weights_of(optimizer.model), want, 12)
    unpatch(Offloading)
    assert Offloading.zo_update is peers.MeZO2SGD.zo_update


@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("mode", ["two_side", "one_side"])
@pytest.mark.parametrize("kind", ["zo_sgd", "zo_sign_opt"])
def test_zo_llm(q, mode, kind):
    args = dict(q=q, perturbation_mode=mode, trainer=kind)
    trainer = zo_llm.patch(peers.ZOLLMTrainer(small_model(), LOSSES, **args))
    start = weights_of(trainer.model)
    np.random.seed(8)
    loss = (trainer.zo_step if q == 1 else trainer.zo_step_v1)(trainer.model, None)
    assert loss.item() == pytest.approx(LOSSES[2 * q - 2])
    np.random.seed(8)
    seeds = [np.random.randint(1000000000) for _ in range(q)]
    other = -EPS if mode == "two_side" else 0.0
    for scale, seen in zip((EPS, other), trainer.seen[-2:], strict=True):
        assert_near(seen, plus(start, [(seeds[-1], scale)]), 3 * q)
    found = slopes(LOSSES[: 2 * q], EPS if mode == "one_side" else 2 * EPS)
    if kind == "zo_sign_opt":
        found = [1.0 if slope > 0 else -1.0 for slope in found]
    terms = [(seed, -RATE * slope / q) for seed, slope in zip(seeds, found, strict=True)]
    want = plus(start, terms, 1 - RATE * DECAY, without=())  # torch's SGD decays all weights
    assert_near(weights_of(trainer.model), want, 3 * q + 1)


def test_zo_llm_refuses_what_one_update_does_not_compute():
    trainer = zo_llm.patch(peers.ZOLLMTrainer(small_model(), LOSSES))
    start = weights_of(trainer.model)
    with pytest.raises(NotImplementedError, match="zo_conserv_step is not covered"):
        trainer.zo_conserv_step(trainer.model, None)
    trainer.gradient_sparsity = 0.5
    with pytest.raises(NotImplementedError, match="gradient_sparsity is not covered"):
        trainer.zo_step(trainer.model, None)
    params = list(trainer.model.parameters())
    for optimizer in (torch.optim.Adam(params), torch.optim.SGD(params, lr=1.0, momentum=0.9)):
        trainer.optimizer = optimizer
        with pytest.raises(NotImplementedError, match="SGD with one group"):
            trainer.zo_step(trainer.model, None)
    for name, x in weights_of(trainer.model).items():
        assert_same_bits(x, start[name])


def test_workers_of_evolution_strategies():
    class Extension(peers.Worker):
        pass

    worker = Extension(small_model(torch.bfloat16))
    es.patch(Extension, exact=True)
    model = worker.model_runner.model
    model.requires_grad_(True)
    start = weights_of(model)
    assert worker.perturb_self_weights(np.int64(3), EPS) is True
    assert_near(weights_of(model), plus(start, [(3, EPS)]), 1)
    worker.restore_self_weights(3, EPS)
    for name, x in weights_of(model).items():
        assert_same_bits(x, start[name])
    worker.perturb_self_weights(4, EPS, negate=True)
    assert_near(weights_of(model), plus(start, [(4, -EPS)]), 1)
    worker.perturb_self_weights(4, EPS)  # an update by the same seed
    worker.update_weights_from_seeds([5, 6], [1.0, -2.0], alpha=0.5, population_size=2)
    assert_near(weights_of(model), plus(start, [(5, 0.25), (6, -0.5)]), 3)
    weights = SeededWeights(model.named_parameters())
    before = weights_of(model)
    es.update(weights, [7, 8], [1.0, -3.0], lr=0.1, sigma=0.5)
    assert_near(weights_of(model), plus(before, [(7, 0.1), (8, -0.3)]), 1)
    with pytest.raises(ValueError, match="one reward for each seed"):
        es.update(weights, [7, 8], [1.0], lr=0.1)


def test_workers_that_average_perturbations():
    worker = es.patch(peers.EnsembleWorker(small_model()))
    model = worker.model_runner.model
    start = weights_of(model)
    with pytest.raises(RuntimeError, match="store_base_weights first"):
        worker.apply_perturbation(1, EPS)
    worker.store_base_weights()
    worker.perturb_self_weights(9, 0.5)
    worker.apply_perturbation(1, EPS)
    head, rest = dict(start), dict(start)
    rest.pop("head.weight")
    assert_near(weights_of(model), plus(rest, [(1, EPS)]), 1)
    assert_same_bits(weights_of(model)["head.weight"], head["head.weight"])
    worker.apply_averaged_perturbations([(1, 0.5), (2, 0.25)], weights=[1.0, 3.0])
    assert_near(weights_of(model), plus(rest, [(1, 0.125), (2, 0.1875)]), 1)


@pytest.mark.parametrize("adapter", [mezo, lozo, zo2, zo_llm, es])
def test_another_interface_is_refused(adapter):
    class Trainer:
        def zo_update(self, model):
            pass

    before = dict(vars(Trainer))
    with pytest.raises(TypeError) as caught:
        adapter.patch(Trainer())
    name = adapter.__name__.rsplit(".", 1)[1]
    sentence = rf"{name}\.patch: Trainer has no method \w+; this adapter replaces methods of .* at"
    assert re.match(sentence + " [0-9a-f]{7}", str(caught.value))
    with pytest.raises(TypeError):
        adapter.patch(Trainer)
    assert dict(vars(Trainer)) == before
    with pytest.raises(ValueError, match="is not patched"):
        unpatch(Trainer)


def test_a_trainer_is_patched_once():
    trainer = mezo.patch(peers.MeZOTrainer(small_model(), LOSSES))
    with pytest.raises(ValueError, match="is patched already; unpatch it first"):
        mezo.patch(trainer)
