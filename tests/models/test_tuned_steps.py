"""Perturbed passes and steps of a tuned model see exact noise, on the weights of its mode alone."""

import pytest
import torch
from helpers import perturbed_copy
from objective_cases import OPTIONS
from pseuzo import CausalLMObjective, MeZO, PseuZO, perturbed
from pseuzo.models.modes import MODES, tune
from pseuzo.optim.seeds import step_seed
from tiny_models import ALL_KINDS, batch_of, causal_lm
from tuned_models import LABELS, parts, tuned

from pseuzo_kernels import reference


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_perturbed_pass_is_one_with_perturbed_weights(kind, mode):
    model = tuned(kind, mode)
    before = [p.clone() for p in model.parameters()]
    others = {sign: perturbed_copy(model, 7, sign * 0.1) for sign in (1, -1)}
    for options in (OPTIONS, None):
        forward, head = parts(model, options)
        clean = head(forward())
        for sign in (1, -1, 1):  # with the watch, and without it
            want, want_head = parts(others[sign], options)
            with perturbed(model, 7, 0.1, sign=sign):
                o = forward()
                loss = head(o)
            assert torch.equal(o, want()) and torch.equal(loss, want_head(o))
            assert loss != clean
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["lora", "prefix", "prompt"])
# Mistral's window also counts padding.
@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if kind != "mistral"])
def test_padding_does_not_matter(kind, mode):
    model = tuned(kind, mode)
    batch = batch_of() | {"labels": LABELS}
    o = CausalLMObjective(model, OPTIONS)(batch)[0]()
    for row in range(1, 4):
        alone = {
            k: v[row : row + 1, row:] if v.dim() > 1 else v[row : row + 1] for k, v in batch.items()
        }
        assert alone["attention_mask"].all()
        # Normalised states of up to 4 come from products of another shape.
        torch.testing.assert_close(
            CausalLMObjective(model, OPTIONS)(alone)[0]()[0], o[row], rtol=0, atol=4e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["opt-projected", "gpt2", "qwen3", "neox"])
@pytest.mark.parametrize("mode", ["lora", "prefix", "prompt"])
def test_steps_are_the_formula_and_keep_to_their_weights(kind, mode):
    lr, eps = 0.05, 0.1
    for make in (MeZO, PseuZO):
        model = tuned(kind, mode)
        want = {n: p.detach().clone() for n, p in model.named_parameters()}
        forward, head = parts(model)
        opt = make(model, lr=lr, eps=eps, seed=11)
        loss = (
            opt.step(forward, head, LABELS)
            if make is PseuZO
            else opt.step(lambda f=forward, h=head: h(f()))
        )
        seed = step_seed(11, 0)
        with torch.no_grad():
            fresh = tuned(kind, mode)
            (f, h), (up, h_up), (down, h_down) = (
                parts(m)
                for m in (
                    fresh,
                    perturbed_copy(fresh, seed, eps),
                    perturbed_copy(fresh, seed, -eps),
                )
            )
            o0, o1 = f(), up()
            g = (h_up(o1) - h_down(down())) / (2 * eps)
            want_loss = (h_up(o1) + h_down(down())) / 2
        if make is PseuZO:
            o = o0.clone().requires_grad_()
            (e,) = torch.autograd.grad(h(o), o)
            g, want_loss = ((o1 - o0) * e).sum() / eps, h(o0)
        torch.testing.assert_close(
            loss, want_loss.detach().reshape(loss.shape), rtol=1e-6, atol=1e-6
        )
        for i, (name, p) in enumerate(model.named_parameters()):
            if not p.requires_grad:
                assert torch.equal(p, want[name]), f"{name} is not trained in this mode"
                continue
            step = lr * g * reference.noise(p.shape, seed, i)
            # g has the error of a few roundings of losses about 1, divided by eps. |z| < 6.
            torch.testing.assert_close(p, want[name] - step, rtol=0, atol=lr * 6 * 4e-6 / eps)
            assert step.abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("make, kind, mode, lr", [
    (MeZO, "opt", "lora", 0.03),
    (PseuZO, "opt", "lora", 3e-3),
    (MeZO, "neox", "lora", 0.01),
    (MeZO, "opt", "prefix", 10.0),
    (PseuZO, "gpt2", "prefix", 1.0),
    (PseuZO, "qwen3", "prefix", 0.1),
    (PseuZO, "qwen3", "prompt", 0.1),
])  # fmt: skip
def test_training_lowers_the_loss(make, kind, mode, lr):
    model = tuned(kind, mode)
    forward, head = parts(model)
    opt = make(model, lr=lr, eps=1e-2, seed=1)
    losses = []
    for _ in range(60):
        losses.append(
            opt.step(forward, head, LABELS) if make is PseuZO else opt.step(lambda: head(forward()))
        )
    assert opt.skipped_steps == 0
    assert losses[-1] < losses[0] - 0.1, (losses[0], losses[-1])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["lora", "prefix"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapters_of_16_bit_models(mode, dtype):
    """Adapters are fp32, and their effect on a 16-bit model is exact as well."""
    model = tune(causal_lm("llama").to(dtype), mode).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    forward, _ = parts(model)
    for _ in range(3):
        with perturbed(model, 2, 0.3):
            o = forward()
        assert o.dtype is dtype and torch.equal(o, parts(perturbed_copy(model, 2, 0.3))[0]())
    assert not torch.equal(o, forward())
