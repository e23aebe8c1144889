"""Sparse-MeZO agrees with its formula: which weights move, by how much, and that others never
do."""

import copy
import math

import pytest
import torch
from optimizers import arguments, data, equal, head_for, losses_beside, small_model
from pseuzo import Journal, SparseMeZO, replay
from pseuzo.optim.seeds import direction_seed, mask_seed
from pseuzo.optim.sparse import threshold
from torch import nn

from pseuzo_kernels import masks, reference

LR, EPS, DECAY, SEED, SPARSITY = 0.05, 1e-2, 0.3, 9, 0.6


def optimizer(params, **options):
    return SparseMeZO(params, LR, EPS, sparsity=SPARSITY, weight_decay=DECAY, seed=SEED, **options)


def plain_thresholds(model):
    """Find the thresholds by sorting: the k smallest |x| of each tensor are at most its
    threshold."""
    sizes = [p.detach().abs().flatten().sort().values for p in model.parameters()]
    return [float(s[round((1 - SPARSITY) * len(s)) - 1]) for s in sizes]


def masks_of(model, kind, thresholds, step):
    """Return the mask m of each tensor."""
    params = list(model.parameters())
    if kind == "small":
        return [p.detach().abs() <= h for p, h in zip(params, thresholds, strict=True)]
    seed = torch.tensor([mask_seed(SEED, step, kind == "renewed")])
    return [masks.takes_noise(p, i, 1 - SPARSITY, seed) for i, p in enumerate(params)]


KINDS = {
    "small": {},
    "random": {"mask": "random"},
    "renewed": {"mask": "random", "renew_mask": True},
}


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind, bare):
    model, want = small_model(), small_model()
    if kind == "small" and bare:
        with pytest.raises(ValueError, match="changes which are small; give the module"):
            optimizer(model.parameters())
        return
    directions = 2
    options = KINDS[kind] | {"directions": directions}
    opt = optimizer(model.parameters() if bare else model, **options)
    thresholds, seen = plain_thresholds(want), []
    for t in range(4):
        m = masks_of(want, kind, thresholds, t)
        seen.append(m)
        update = [torch.zeros_like(p, dtype=torch.float64) for p in want.parameters()]
        for j in range(directions):
            seed = direction_seed(SEED, t, j)
            z = [mi * reference.noise(mi.shape, seed, i) for i, mi in enumerate(m)]
            plus, minus = losses_beside(want, z, (EPS, -EPS), *data(t))
            for u, zi in zip(update, z, strict=True):
                u += (plus - minus) / (2 * EPS) * zi.double() / directions
        before = copy.deepcopy(want)
        opt.step(*arguments(opt, model, t))
        for p, q, mi, u in zip(want.parameters(), model.parameters(), m, update, strict=True):
            new = torch.where(mi, (1 - LR * DECAY) * p.double() - LR * u, p.double())
            # Slopes, from losses about 2 divided by eps, have an error of 2e-5. |z| is below 4.5.
            torch.testing.assert_close(q.double(), new, rtol=0, atol=1e-5)
            assert torch.equal(q[~mi], p[~mi]), "a weight outside the mask has changed"
            with torch.no_grad():
                p.copy_(q)
        assert not equal(want, before)
    same = all(torch.equal(a, b) for a, b in zip(seen[0], seen[3], strict=True))
    assert same == (kind == "random"), "only masks of small weights depend on the weights"


def test_passes_see_the_mask_of_the_update_in_16_bits_rows_and_large_tensors():
    """The noise is m * z in an embedding's rows, in a copy for the whole pass, and in the scratch
    of a large weight."""
    torch.manual_seed(0)
    for kind in ("small", "renewed"):
        model = nn.Sequential(nn.Embedding(300, 260), nn.Linear(260, 270)).bfloat16()
        opt = optimizer(model, **KINDS[kind])
        before = copy.deepcopy(model)
        index, outputs = torch.arange(40), []
        for _ in range(3):  # the watch is on at first, then off
            outputs.clear()
            m = masks_of(model, kind, plain_thresholds(before), opt.steps)
            weights = [p.detach().clone() for p in model.parameters()]

            def closure(model=model, index=index, outputs=outputs):
                outputs.append(model(index).detach().clone())
                return outputs[-1].float().square().mean()

            opt.step(closure)
            other = copy.deepcopy(model)
            with torch.no_grad():
                for i, (p, x, mi) in enumerate(zip(other.parameters(), weights, m, strict=True)):
                    z = reference.noise(x.shape, direction_seed(SEED, opt.steps - 1, 0), i)
                    p.copy_(torch.where(mi, x.float() + float(torch.tensor(EPS)) * z, x.float()))
            for a, p, mi in zip(weights, model.parameters(), m, strict=True):
                assert torch.equal(a[~mi], p.detach()[~mi])
            # Coefficients are rounded to 17 bits, so a few weights round to the neighbouring value.
            seen = other(index).detach()
            torch.testing.assert_close(outputs[0], seen, rtol=2**-6, atol=2**-6)
            assert float((outputs[0].float() - seen.float()).abs().mean()) < 2**-10


def test_bare_16_bit_parameters_are_the_module():
    models = [small_model().to(torch.bfloat16) for _ in range(2)]
    opts = [optimizer(models[0]), optimizer(models[1].parameters())]
    for t in range(3):
        for opt, model in zip(opts, models, strict=True):
            opt.step(*arguments(opt, model, t))
    assert equal(*models)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_continues_and_a_journal_replays_to_the_bit(kind, tmp_path):
    model, options = small_model(), KINDS[kind]
    base, opt = copy.deepcopy(model), optimizer(model, **options)
    with Journal(tmp_path / "run.pzj", opt):
        for t in range(2):
            opt.step(*arguments(opt, model, t))
        state, middle = opt.state_dict(), copy.deepcopy(model)
        for t in range(2, 5):
            opt.step(*arguments(opt, model, t))
    assert replay(tmp_path / "run.pzj", base) == 5
    assert equal(base, model)
    # The weights in the middle of the run give other thresholds, so the state must hold those of
    # the start.
    resumed = SparseMeZO(middle, LR, EPS)
    resumed.load_state_dict(copy.deepcopy(state))
    assert (resumed.sparsity, resumed.mask) == (SPARSITY, options.get("mask", "small"))
    for group in resumed.param_groups:
        assert group["weight_decay"] == DECAY
    for t in range(2, 5):
        resumed.step(*arguments(resumed, middle, t))
    assert equal(middle, model)


def test_a_journal_of_masks_belongs_to_them(tmp_path):
    model = small_model()
    with Journal(tmp_path / "run.pzj", optimizer(model)):
        pass
    other = SparseMeZO(model, LR, EPS, sparsity=0.1, seed=SEED)
    with pytest.raises(ValueError, match="of another model or of other settings"):
        Journal(tmp_path / "run.pzj", other)


def test_thresholds(monkeypatch):
    monkeypatch.setattr("pseuzo.optim.sparse.CHUNK", 100)
    many = torch.randn(997, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = many.to(dtype)
        for share in (0.01, 0.25, 0.999, 1.0):
            want = x.float().abs().sort().values[round(share * 997) - 1]
            assert threshold(x, share) == float(want)
    x = torch.tensor([3.0, -1.0, 2.0, -4.0])
    assert threshold(x, 0.5) == 2.0 and threshold(x, 1.0) == 4.0 and threshold(x, 0.1) == -1.0
    assert threshold(x.bfloat16(), 0.25) == 1.0 and threshold(x.half(), 0.25) == 1.0
    # In LoRA's B or a norm's weight, no threshold separates small from large values.
    for degenerate in (torch.zeros(5), torch.ones(4), torch.tensor([0.0, 0.0, 1.0, 2.0])):
        assert threshold(degenerate, 0.5) == math.inf
    with pytest.raises(ValueError, match="a weight is NaN"):
        threshold(torch.full((3,), math.nan), 0.5)


@pytest.mark.parametrize("options, message", [
    ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1"),
    ({"sparsity": 0.999}, "sparsity 0.999 leaves no weight to train"),
    ({"sparsity": 0.999999, "mask": "random"}, "leaves no weight to train"),
    ({"mask": "large"}, "mask must be one of small, random"),
    ({"renew_mask": True}, "renew_mask is for random masks"),
])  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        SparseMeZO(small_model(), **options)


def test_other_groups_and_a_step_that_is_skipped():
    model = small_model()
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    opt = optimizer([{"params": first}], model=model, maximize=True)
    opt.add_param_group({"params": second, "noise_scale": 0.5})
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(*arguments(opt, model, 0, poison=True))
        assert opt.skipped_steps == 1
    assert equal(model, before)
    x, y = data(0)
    opt.step(lambda: head_for(y)(model(x)))
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    assert all(bool((p != q).any()) for p, q in pairs)
