"""For masked language models and classifiers the loss is the model's own, and they are loaded,
tuned and saved as their kind."""

import copy

import pytest
import torch
from helpers import perturbed_copy
from pseuzo import CausalLMObjective, MeZO, PseuZO, perturbed
from pseuzo.models.kinds import kind_of, max_positions
from pseuzo.models.loading import load_model
from pseuzo.models.modes import tune
from pseuzo.models.split import head_parameters
from pseuzo.optim.seeds import step_seed
from tiny_models import encoder_tokenizer, tiny, tiny_encoder
from torch.nn import functional as F

from pseuzo_kernels import reference

ENCODERS = ("bert", "roberta", "distilbert", "deberta-v2", "electra", "albert", "modernbert")
KINDS = ("masked", "classifier")
ALL = [
    pytest.param(name, kind, marks=() if name in ("bert", "roberta", "opt") else pytest.mark.slow)
    for name in (*ENCODERS, "opt", "llama", "gpt2")
    for kind in (KINDS if name in ENCODERS else KINDS[1:])
]
OPTIONS = {"masked": [17, 4, 90], "classifier": [0, 1, 2]}
LENGTHS = (12, 9, 7, 5)
LABELS = torch.tensor([0, 2, 1, 2])


def batch_of(kind, side="right"):
    """Return rows of different lengths, whose mask token is the last but one."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 128, (n,), generator=g) for n in LENGTHS]
    batch = {"input_ids": torch.ones(4, 12, dtype=torch.long)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for i, row in enumerate(rows):
        here = slice(len(row)) if side == "right" else slice(12 - len(row), 12)
        batch["input_ids"][i, here], batch["attention_mask"][i, here] = row, 1
    if kind == "masked":
        at = [n - 2 if side == "right" else 10 for n in LENGTHS]
        batch["positions"] = torch.tensor(at)[:, None]
    return {**batch, "labels": LABELS}


def stock_logits(model, kind):
    """Return the model's own logits of the classes, from a forward of the whole batch."""
    batch = batch_of(kind)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if kind == "masked":
        logits = logits[torch.arange(4), batch["positions"][:, 0]][:, OPTIONS[kind]]
    return logits


@pytest.mark.parametrize("name, kind", ALL)
def test_the_loss_is_the_models_own(name, kind):
    """This holds with padding on either side, for a row alone, and for the gradient."""
    model = tiny_encoder(name, kind, num_labels=3)
    assert kind_of(model) == kind
    objective = CausalLMObjective(model, OPTIONS[kind])
    want = stock_logits(model, kind)
    loss = F.cross_entropy(want, LABELS)
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    for side in ("right", "left"):
        batch = batch_of(kind, side)
        # The logits are about 1, and products of another shape round differently.
        torch.testing.assert_close(objective.scores(batch), want, rtol=0, atol=1e-6)
        forward, head = objective(batch)
        torch.testing.assert_close(head(forward()), loss, rtol=0, atol=1e-6)
    got = torch.autograd.grad(head(forward()), weights, allow_unused=True)
    for one, other in zip(got, gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    batch = batch_of(kind)
    for row, n in enumerate(LENGTHS):
        alone = {k: x[row : row + 1] for k, x in batch.items() if k != "attention_mask"}
        alone["input_ids"] = alone["input_ids"][:, :n]
        scores = objective.scores(alone)[0]
        torch.testing.assert_close(scores, want[row], rtol=0, atol=1e-6)
    if kind == "classifier":
        alone |= {"labels": LABELS[row : row + 1]}
        forward, head = objective(alone)
        torch.testing.assert_close(head(forward()), model(**alone).loss, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, kind", [("bert", "masked"), ("roberta", "classifier")])
def test_steps_are_the_formula(name, kind):
    lr, eps, seed = 0.01, 0.01, step_seed(5, 0)

    def parts(model):
        return CausalLMObjective(model, OPTIONS[kind])(batch_of(kind))

    start = tiny_encoder(name, kind, num_labels=3)
    up, down = (parts(perturbed_copy(start, seed, s * eps)) for s in (1, -1))
    with torch.no_grad(), perturbed(start, seed, eps):
        o = parts(start)[0]()
    assert torch.equal(o, up[0]())
    for make in (MeZO, PseuZO):
        model = copy.deepcopy(start)
        forward, head = parts(model)
        trained = {n: p for n, p in model.named_parameters()}
        with torch.no_grad():
            slope = (up[1](up[0]()) - down[1](down[0]())) / (2 * eps)
        if make is PseuZO:
            own = set(head_parameters(model))
            trained = {n: p for n, p in trained.items() if p not in own}
            o0 = forward().detach().requires_grad_()
            (e,) = torch.autograd.grad(head(o0), o0)
            slope = ((up[0]().detach() - o0) * e).sum().detach() / eps
        groups = [{"params": list(trained.values())}]
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        opt = make(groups, lr=lr, eps=eps, seed=5, model=model)
        args = (forward, head, LABELS)
        opt.step(*args if make is PseuZO else [lambda f=forward, h=head: h(f())])
        # perturbed_copy numbers streams by all weights that train, as MeZO does.
        for i, (n, p) in enumerate(model.named_parameters()):
            if n not in trained:
                assert torch.equal(p, before[n])
                continue
            step = lr * slope * reference.noise(p.shape, seed, i)
            # The slope has the error of a few roundings of losses about 1, divided by eps. |z| < 6.
            torch.testing.assert_close(p, before[n] - step, rtol=0, atol=lr * 6 * 4e-6 / eps)


def saved(folder, model, **special):
    model.save_pretrained(folder)
    encoder_tokenizer(**special).save_pretrained(folder)
    return folder


def test_kinds_are_what_the_checkpoint_says(tmp_path):
    masked = saved(tmp_path / "masked", tiny_encoder("bert", "masked"))
    classifier = saved(tmp_path / "classifier", tiny_encoder("roberta", "classifier", num_labels=3))
    causal = saved(tmp_path / "causal", tiny("opt"))
    for folder, kind, side in (
        (masked, "masked", "right"),
        (classifier, "classifier", "right"),
        (causal, "causal", "left"),
    ):
        model, tokenizer = load_model(folder, device="cpu")
        assert kind_of(model) == kind and tokenizer.padding_side == side
        assert kind_of(load_model(folder, device="cpu", kind=kind)[0]) == kind
    assert max_positions(load_model(classifier, device="cpu")[0]) == 62  # 64, less 2 for padding
    for folder, kind, labels, sentence in (
        (masked, "causal", None, "is no causal language model but a BertForMaskedLM"),
        (causal, "masked", None, "is no masked language model but a OPTForCausalLM"),
        (masked, "classifier", None, "has no classification head, and a new one needs the classes"),
        (classifier, "auto", ["a", "b"], "has a head for 3 classes, and the task has 2"),
        (masked, "seq2seq", None, "kind must be one of auto, causal, masked, classifier, got"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_model(folder, device="cpu", kind=kind, labels=labels)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "opt"])
def test_a_new_head_is_drawn_by_the_seed(name, tmp_path):
    model = tiny(name) if name == "opt" else tiny_encoder(name, "masked")
    folder = saved(tmp_path / "base", model)

    def load(seed):
        torch.manual_seed(seed + 7)
        before = torch.get_rng_state()
        model, _ = load_model(
            folder, device="cpu", kind="classifier", labels=["bad", "good", "fair"], seed=seed
        )
        assert torch.equal(torch.get_rng_state(), before)
        return model

    first, again, other = load(1), load(1), load(2)
    assert first.config.id2label == {0: "bad", 1: "good", 2: "fair"}
    weights = [dict(m.named_parameters()) for m in (first, again, other)]
    assert all(torch.equal(p, weights[1][n]) for n, p in weights[0].items())
    differ = {n for n, p in weights[0].items() if not torch.equal(p, weights[2][n])}
    assert any("classifier" in n or "score" in n for n in differ)
    assert not any(".layer" in n or "embed" in n for n in differ)


@pytest.mark.parametrize("mode", ["full", "head", "lora"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ENCODERS if n != "bert")],
)
def test_modes_train_and_load_again(name, kind, mode, tmp_path):
    folder = saved(tmp_path / "base", tiny_encoder(name, "masked"))
    labels = list("abc") if kind == "classifier" else None
    model, tokenizer = load_model(folder, device="cpu", kind=kind, labels=labels, seed=3)
    model = tune(model, mode)
    options = [17, 4, 90] if kind == "masked" else [0, 1, 2]
    batch = batch_of(kind)
    batch["input_ids"] %= 60
    forward, head = CausalLMObjective(model, options)(batch)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):  # LoRA's A has an effect from the second step on
        MeZO(model, lr=1e-1, eps=1e-2).step(lambda: head(forward()))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= {n for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    again, _ = load_model(tmp_path / "tuned", device="cpu")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
    if mode == "head":
        assert {p for p in model.parameters() if p.requires_grad} == set(head_parameters(model))


def test_what_cannot_be():
    masked, batch = tiny_encoder("bert", "masked"), batch_of("masked")
    for mode in ("prefix", "prompt"):
        with pytest.raises(ValueError, match=f"BertForMaskedLM cannot be given a {mode}"):
            tune(masked, mode)
    with pytest.raises(ValueError, match="BertForMaskedLM predicts no next token"):
        CausalLMObjective(masked)
    del batch["positions"]
    with pytest.raises(ValueError, match="must have positions"):
        CausalLMObjective(masked, OPTIONS["masked"])(batch)
    # FNet mixes all tokens, so the padding changes the numbers of every token.
    mixing = tiny_encoder("fnet", "classifier", num_labels=3)
    with pytest.raises(ValueError, match="padding on either side changes the numbers of FNet"):
        CausalLMObjective(mixing, OPTIONS["classifier"])(batch_of("classifier"))
    # The sentence says so if its passes with padding fail.
    fussy = tiny_encoder("bert", "classifier", num_labels=3)

    def fail(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and len(mask) == 1 and not mask.all():
            raise RuntimeError("no kernel for padding\nat all")

    fussy.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(ValueError, match=r"or fails \(no kernel for padding\); make"):
        CausalLMObjective(fussy, OPTIONS["classifier"])(batch_of("classifier"))
    # The logits of this classifier are a mean over those of the tokens.
    pooling = tiny_encoder("eurobert", "classifier", num_labels=3)
    with pytest.raises(RuntimeError, match="more than once, or does more to its logits"):
        CausalLMObjective(pooling, OPTIONS["classifier"])(batch_of("classifier"))
