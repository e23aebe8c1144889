"""Recorded passes: the bits of passes that are run. Without a GPU, a tape of ops stands in for the CUDA graph: like one
it knows no Python, only the numbers and the memory that each op had when it was recorded."""

import copy
import warnings
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from models import Tied, batch_of, causal_lm
from pseuzo import CausalLMObjective, MeZO, PseuZO, capture
from pseuzo.cli import main
from pseuzo.objective import padded
from pseuzo.runs import max_length, model_path
from pseuzo.schedule import Schedule
from pseuzo.tasks import TaskData, load_task
from pseuzo.trainer import PseuZOTrainer, PseuZOTrainingArguments
from pseuzo.tuning import load_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LABELS = torch.tensor([0, 1, 1, 0])
STEPS = 7


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, recorded in self.ops:
            given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """The tapes that were recorded so far."""
    made = []

    def record(call, stream, pool):
        with Tape() as tape:
            outputs = call()
        made.append(tape)
        return outputs, tape.replay

    monkeypatch.setattr(capture, "_record", record)
    monkeypatch.setattr("pseuzo.optimizer.check_device", lambda *args: None)
    return made


def run(opt, model, steps=STEPS, lengths=(12,), lrs=None):
    """Steps on batches of changing content; functions and memory are those of a length's first batch."""
    objective, functions, losses = CausalLMObjective(model, [17, 4]), {}, []
    device = next(model.parameters()).device
    for t in range(steps):
        length = lengths[t % len(lengths)]
        batch = {**batch_of(length=length, seed=t), "labels": LABELS}
        plan = objective.plan({k: v.to(device) for k, v in batch.items()})
        if length not in functions:
            static = {k: v.clone() for k, v in plan.items()}
            forward, head = objective.functions(static, reduction="none")
            functions[length] = static, forward, head, lambda f=forward, h=head: h(f())
        static, forward, head, closure = functions[length]
        for name, x in static.items():
            x.copy_(plan[name])
        for group in opt.param_groups if lrs else ():
            group["lr"] = lrs[t]
        losses.append(opt.step(forward, head, groups=LABELS) if isinstance(opt, PseuZO) else opt.step(closure))
    return torch.stack(losses)


class OffEveryThird(Schedule):
    def __call__(self, step: int) -> float:
        return float(step % 3 != 2)


MAKERS = {
    "pseuzo": lambda m, **k: PseuZO(m, 1e-3, 1e-2, 3, 0.9, 0.1, seed=2, **k),
    "pseuzo two-sided, clipped": lambda m, **k: PseuZO(m, 1e-3, 1e-2, 3, two_sided=True, clip_examples=1.5, **k),
    "pseuzo scheduled": lambda m, **k: PseuZO(m, 1e-3, 1e-2, 3, OffEveryThird(), **k),
    "mezo": lambda m, **k: MeZO(m, 1e-3, 1e-2, directions=2, momentum=0.5, window=2, **k),
    "mezo one-sided": lambda m, **k: MeZO(m, 1e-3, 1e-2, two_sided=False, **k),
    "parameters": lambda m, **k: PseuZO(m.parameters(), 1e-3, 1e-2, 3, **k),
    "parameters, mezo": lambda m, **k: MeZO(m.parameters(), 1e-3, 1e-2, **k),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_recorded_passes_give_the_same_bits(make, tapes):
    model = causal_lm("opt").to(torch.bfloat16).eval()
    twin = copy.deepcopy(model)
    lrs = [1e-3 * (t + 1) for t in range(10)]
    want = run(make(model), model, 10, (12, 9), lrs)
    assert not tapes
    got = run(make(twin, capture=True), twin, 10, (12, 9), lrs)
    passes = {PseuZO: 2, MeZO: 1}[type(make(model))]  # a clean and a perturbed one; a perturbed one for both signs
    assert len(tapes) >= 2 * passes, "not everything was recorded"
    assert torch.equal(got, want)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_exact_gradient_of_an_untied_head(tapes):
    model = causal_lm("opt", tied=False).eval()
    twin = copy.deepcopy(model)

    def make(m, **k):
        rest = [p for p in m.parameters() if p is not m.lm_head.weight]
        head = {"params": [m.lm_head.weight], "exact_gradient": True, "lr": 0.5}
        return PseuZO([{"params": rest}, head], 1e-3, 1e-2, 3, model=m, **k)

    assert torch.equal(run(make(model), model), run(make(twin, capture=True), twin))
    assert tapes and torch.equal(model.lm_head.weight, twin.lm_head.weight)


@pytest.mark.parametrize("keep_view, recorded", [(False, 1), (True, 0)])
def test_a_weight_used_outside_its_module(keep_view, recorded, tapes):
    """It is copied for the whole pass once the watch has seen it, and then all is recorded. A view that was kept needs
    the watch in every pass."""
    model, twin = Tied(keep_view=keep_view).eval(), Tied(keep_view=keep_view).eval()
    ids = torch.randint(0, 300, (4, 5))
    losses = []
    for m, captured in ((model, False), (twin, True)):
        opt = MeZO(m, 1e-6, 1e-3, capture=captured)
        closure = lambda m=m: m(ids).square().mean()  # noqa: E731
        losses.append(torch.stack([opt.step(closure) for _ in range(STEPS)]))
    assert len(tapes) == recorded and torch.equal(*losses) and losses[0].isfinite().all()


def test_other_weights_are_recorded_anew(tapes):
    """A resumed run, and a weight that was replaced: graphs of what was there before would read freed memory."""
    model = causal_lm("opt").eval()
    twin = copy.deepcopy(model)
    plain, captured = PseuZO(model, 1e-3, 1e-2, 3), PseuZO(twin, 1e-3, 1e-2, 3, capture=True)
    for m, opt in ((model, plain), (twin, captured)):
        run(opt, m, 5)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        weight = m.model.decoder.layers[0].fc1.weight
        weight.data = weight.data.clone()
    before = len(tapes)
    assert torch.equal(run(plain, model), run(captured, twin))
    assert len(tapes) > before
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_losses_that_were_returned_stay(tapes):
    model = causal_lm("opt").eval()
    opt = PseuZO(model, 1e-2, 1e-2, 3, capture=True)
    losses = run(opt, model, 6)
    kept = losses.clone()
    run(opt, model, 2)
    assert torch.equal(losses, kept) and len(set(losses.tolist())) == 6


def test_refusals(tapes, monkeypatch):
    model = causal_lm("opt").eval()
    objective = CausalLMObjective(model, [17, 4])
    forward, head = objective({**batch_of(), "labels": LABELS})
    with pytest.raises(TypeError, match="must return tensors"):
        MeZO(model, capture=True).step(lambda: float(head(forward())))

    def fails(call, stream, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(capture, "_record", fails)
    before = [p.clone() for p in model.parameters()]
    opt = MeZO(model, lr=0.0, capture=True)
    closure = lambda: head(forward())  # noqa: E731
    with pytest.raises(RuntimeError, match=r"cannot hold.*not permitted when stream is capturing.*leave capture off"):
        for _ in range(5):
            opt.step(closure)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_functions_that_are_new_each_time_are_warned_of(tapes, monkeypatch):
    monkeypatch.setattr(capture, "MOST", 4)
    model = causal_lm("opt").eval()
    objective = CausalLMObjective(model, [17, 4])
    opt = MeZO(model, capture=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(2 * capture.MOST + 2):
            forward, head = objective({**batch_of(seed=t), "labels": LABELS})
            opt.step(lambda f=forward, h=head: h(f()))
    assert not tapes
    assert sum("every step brings new functions" in str(w.message) for w in caught) == 1
    assert len(opt._graphs._passes) <= capture.MOST, "a long run would keep every batch"


def test_needs_a_gpu():
    with pytest.raises(ValueError, match="PseuZO: capture needs a CUDA GPU, and the weights are on cpu"):
        PseuZO(causal_lm("opt"), capture=True)


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_padded_plan_has_the_same_loss(kind, masked):
    model = causal_lm(kind).eval()
    objective = CausalLMObjective(model)
    batch = batch_of(length=13)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -5:] = batch["input_ids"][:, -5:]
    labels[0, 3] = 5
    if not masked:
        del batch["attention_mask"]
    plan = objective.plan({**batch, "labels": labels})
    more = padded(plan, 8, 4)
    assert more["input_ids"].shape == (4, 16) and more["positions"].shape == more["targets"].shape == (4, 8)
    with torch.no_grad():
        (forward, head), (forward_padded, head_padded) = objective.functions(plan), objective.functions(more)
        torch.testing.assert_close(head_padded(forward_padded()), head(forward()), rtol=1e-5, atol=1e-6)
    again = padded(more, 8, 4)
    assert all(torch.equal(again[k], more[k]) for k in more)


@pytest.mark.parametrize("method, train_on", [("pseuzo", "options"), ("mezo", "label-words")])
def test_trainer(method, train_on, tapes, monkeypatch, tmp_path):
    """Batches of many lengths come in few shapes, and their functions are recorded and replayed."""
    task = load_task("demo")
    examples = task.load(None, train=50, dev=20, test=20, seed=0)["train"]

    def train(folder):
        model, tokenizer = load_model(model_path("demo"))
        data = TaskData(examples, task, tokenizer, max_length=max_length(model), train_on=train_on)
        args = PseuZOTrainingArguments(
            str(tmp_path / folder), method=method, max_steps=8, per_device_train_batch_size=5, learning_rate=2e-4,
            clip_examples=2.0, capture=True, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        PseuZOTrainer(model, args, train_dataset=data).train()
        return list(model.parameters())

    recorded = train("recorded")
    assert 1 <= len(tapes) <= 6, "as many graphs as batches"
    monkeypatch.setattr(capture, "WARM_UP", 1000)
    assert all(torch.equal(p, q) for p, q in zip(recorded, train("run"), strict=True))


def test_what_does_not_go_with_it(tmp_path):
    make = partial(PseuZOTrainingArguments, str(tmp_path), capture=True, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="capture need a zeroth-order method, not fo-sgd"):
        make(method="fo-sgd")
    with pytest.raises(ValueError, match="objective=metric is computed on the host"):
        make(method="mezo", objective="metric")
    with pytest.raises(ValueError, match="capture needs CausalLMObjective"):
        PseuZOTrainer(causal_lm("opt"), make(), train_dataset=[1], objective=lambda batch: None)
    args = ["train", "--model", "demo", "--task", "demo", "--capture", "--device", "cpu", "--output"]
    result = CliRunner().invoke(main, [*args, str(tmp_path / "run")])
    assert result.exit_code == 2 and "--capture: capture needs a CUDA GPU, and the weights are on cpu" in result.output
    assert not (tmp_path / "run").exists()
