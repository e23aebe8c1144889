"""Recorded passes have the bits of passes that are run. Without a GPU, a tape of ops replaces the
CUDA graph. Like a graph it contains no Python, only the numbers and the memory that each op had
when it was recorded."""

import copy
import warnings
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from helpers import LABELS, MAKERS, run_steps
from pseuzo import CausalLMObjective, MeZO, PseuZO, ZOConservative
from pseuzo.cli.commands import main
from pseuzo.cli.run import max_length, model_path
from pseuzo.models.loading import load_model
from pseuzo.models.positions import padded
from pseuzo.optim.schedule import Constant
from pseuzo.perturb import graphs as capture
from pseuzo.perturb import scratch
from pseuzo.perturb.module import known_passes
from pseuzo.tasks import TaskData, load_task
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.methods import methods_with
from pseuzo.train.trainer import PseuZOTrainer
from tiny_models import Tied, batch_of, causal_lm

STEPS = 7


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_recorded_passes_give_the_same_bits(make, tapes):
    model = causal_lm("opt").to(torch.bfloat16).eval()
    twin = copy.deepcopy(model)
    lrs = [1e-3 * (t + 1) for t in range(10)]
    want = run_steps(make(model), model, 10, (12, 9), lrs)
    assert not tapes
    got = run_steps(make(twin, capture=True), twin, 10, (12, 9), lrs)
    # PseuZO has a clean and a perturbed pass, MeZO one perturbed pass that serves both signs.
    passes = {PseuZO: 2, MeZO: 1, ZOConservative: 3}[type(make(model))]
    assert len(tapes) >= 2 * passes, "not everything was recorded"
    assert torch.equal(got, want)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_exact_gradient_of_an_untied_head(tapes):
    model = causal_lm("opt", tied=False).eval()
    twin = copy.deepcopy(model)

    def make(m, **k):
        rest = [p for p in m.parameters() if p is not m.lm_head.weight]
        head = {"params": [m.lm_head.weight], "exact_gradient": True, "lr": 0.5}
        return PseuZO([{"params": rest}, head], 1e-3, 1e-2, 3, model=m, **k)

    assert torch.equal(run_steps(make(model), model), run_steps(make(twin, capture=True), twin))
    assert tapes and torch.equal(model.lm_head.weight, twin.lm_head.weight)


@pytest.mark.parametrize("keep_view, recorded", [(False, 1), (True, 0)])
def test_a_weight_used_outside_its_module(keep_view, recorded, tapes):
    """The weight is copied for the whole pass once the watch has seen it, and then all passes are
    recorded. A view that was kept needs the watch in every pass."""
    model, twin = Tied(keep_view=keep_view).eval(), Tied(keep_view=keep_view).eval()
    ids = torch.randint(0, 300, (4, 5))
    losses = []
    for m, captured in ((model, False), (twin, True)):
        opt = MeZO(m, 1e-6, 1e-3, capture=captured)
        closure = lambda m=m: m(ids).square().mean()  # noqa: E731
        losses.append(torch.stack([opt.step(closure) for _ in range(STEPS)]))
    assert len(tapes) == recorded and torch.equal(*losses) and losses[0].isfinite().all()


def test_passes_whose_outputs_are_compared_are_recorded_together(tapes):
    """A recorded pass may choose other kernels than one that is run. If only one of two compared
    passes were recorded, this difference would look like a change of the output. Here the perturbed
    pass needs the watch, so it is never recorded, and neither is the clean one."""
    model, twin = Tied(keep_view=True).eval(), Tied(keep_view=True).eval()
    ids = torch.randint(0, 300, (4, 5))
    losses = []
    for m, captured in ((model, False), (twin, True)):
        opt = PseuZO(m, 1e-6, 1e-3, 3, capture=captured)
        forward, head = lambda m=m: m(ids), lambda o: o.square().mean()
        losses.append(torch.stack([opt.step(forward, head) for _ in range(STEPS)]))
    assert not tapes and torch.equal(*losses)


def test_graphs_do_not_outlive_the_scratch_that_they_write(tapes, monkeypatch):
    """With lambda 0 the tied head, the largest weight, also runs. The scratch grows, and graphs
    recorded before are invalid."""
    model = causal_lm("qwen2").eval()
    twin = copy.deepcopy(model)
    ids = batch_of()["input_ids"]
    labels = ids.clone()
    record, replays = capture._record, []

    def recorded(call, stream, pool):
        outputs, replay = record(call, stream, pool)
        then = known_passes(twin).replaced

        def checked() -> None:
            assert known_passes(twin).replaced == then, "the graph writes to freed memory"
            replays.append(then)
            replay()

        return outputs, checked

    monkeypatch.setattr(capture, "_record", recorded)
    # Without these values, the weights of so small a model have memory of their own or are made
    # together.
    monkeypatch.setattr(scratch, "SMALL", 200)
    monkeypatch.setattr(scratch, "TOGETHER", 0)

    class Now(Constant):
        def __call__(self, step: int) -> float:
            return 0.0 if step in (9, 10) else 1.0

    results = []
    for m, captured in ((model, False), (twin, True)):
        opt = PseuZO(m, 1e-3, 1e-2, 3, momentum=Now(1.0), capture=captured)
        forward, head = CausalLMObjective(m)({"input_ids": ids, "labels": labels})
        results.append(torch.stack([opt.step(forward, head) for _ in range(18)]))
    assert torch.equal(*results)
    assert len(set(replays)) == 2, "not all graphs were replayed"


def test_other_weights_are_recorded_anew(tapes):
    """A run is resumed, or a weight is replaced. Graphs that were recorded before would read freed
    memory."""
    model = causal_lm("opt").eval()
    twin = copy.deepcopy(model)
    plain, captured = PseuZO(model, 1e-3, 1e-2, 3), PseuZO(twin, 1e-3, 1e-2, 3, capture=True)
    for m, opt in ((model, plain), (twin, captured)):
        run_steps(opt, m, 5)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        weight = m.model.decoder.layers[0].fc1.weight
        weight.data = weight.data.clone()
    before = len(tapes)
    assert torch.equal(run_steps(plain, model), run_steps(captured, twin))
    assert len(tapes) > before
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_a_state_that_is_loaded_forgets_which_weights_were_used(tapes):
    """Passes that are replayed would not show again which weights are used."""
    model = causal_lm("opt").eval()
    twin = copy.deepcopy(model)
    results = []
    for m, captured in ((model, {}), (twin, {"capture": True})):
        opt = PseuZO(m, 1e-3, 1e-2, 3, **captured)
        objective = CausalLMObjective(m, [17, 4])
        forward, head = objective({**batch_of(), "labels": LABELS})
        start = copy.deepcopy(opt.state_dict())
        for _ in range(6):
            opt.step(forward, head)
        opt.load_state_dict(start)
        results.append(torch.stack([opt.step(forward, head) for _ in range(6)]))
    assert torch.equal(*results) and len(tapes) == 4


def test_losses_that_were_returned_stay(tapes):
    model = causal_lm("opt").eval()
    opt = PseuZO(model, 1e-2, 1e-2, 3, capture=True)
    losses = run_steps(opt, model, 6)
    kept = losses.clone()
    run_steps(opt, model, 2)
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
    with pytest.raises(
        RuntimeError,
        match=r"cannot hold.*not permitted when stream is capturing.*leave capture off",
    ):
        for _ in range(5):
            opt.step(closure)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    """torch 2.11 stays on the stream of a graph if ending the capture fails. It fails after an
    error during the capture. Its allocator is told of the end, and another capture ends well."""
    before, other = (SimpleNamespace(device=torch.device("cuda", 0)) for _ in range(2))
    current, ended, graphs_made = [before], [], []

    @contextmanager
    def graph(_, pool=None, stream=None, capture_error_mode=None):
        current[0] = stream
        graphs_made.append(pool)
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    end = lambda device, pool: ended.append((device, pool))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    with pytest.raises(RuntimeError, match="previous error"):
        capture._record(lambda: 1 / 0, other, (0, 7))
    assert current == [before] and ended == [(0, (0, 7))] and graphs_made == [(0, 7), None]

    graphs = capture.Graphs(torch.device("cpu"))
    graphs._stream = other
    for _ in range(capture.WARM_UP):
        with graphs.step("key", ready=True):
            graphs.run("pass", lambda: torch.ones(1))
    calls = iter((torch.ones(1), None))  # the pass works, then fails while it is recorded
    with (
        pytest.raises(RuntimeError, match=r"cannot hold.*'NoneType'.*leave capture off"),
        graphs.step("key", True),
    ):
        graphs.run("pass", lambda: next(calls).clone())


def test_functions_that_are_new_each_time_are_warned_of(tapes, monkeypatch):
    monkeypatch.setattr(capture, "MAX_GRAPHS", 4)
    model = causal_lm("opt").eval()
    objective = CausalLMObjective(model, [17, 4])
    opt = MeZO(model, capture=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(2 * capture.MAX_GRAPHS + 2):
            forward, head = objective({**batch_of(seed=t), "labels": LABELS})
            opt.step(lambda f=forward, h=head: h(f()))
    assert not tapes
    assert sum("every step brings new functions" in str(w.message) for w in caught) == 1
    assert len(opt.passes._graphs._steps) <= capture.MAX_GRAPHS, "it keeps every batch"


def test_needs_a_gpu():
    with pytest.raises(
        ValueError, match="PseuZO: capture needs a CUDA GPU, and the weights are on cpu"
    ):
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
    assert more["input_ids"].shape == (4, 16) and more["positions"].shape == more[
        "targets"
    ].shape == (4, 8)
    with torch.no_grad():
        (forward, head), (forward_padded, head_padded) = (
            objective.functions(plan),
            objective.functions(more),
        )
        torch.testing.assert_close(
            head_padded(forward_padded()), head(forward()), rtol=1e-5, atol=1e-6
        )
    again = padded(more, 8, 4)
    assert all(torch.equal(again[k], more[k]) for k in more)


@pytest.mark.slow
@pytest.mark.parametrize("method, train_on", [("pseuzo", "options"), ("mezo", "label-words")])
def test_trainer(method, train_on, tapes, monkeypatch, tmp_path):
    """Batches of many lengths are padded to few shapes, whose functions are recorded and
    replayed."""
    task = load_task("demo")
    examples = task.load(None, train=50, dev=20, test=20, seed=0)["train"]

    def train(folder):
        model, tokenizer = load_model(model_path("demo"))
        data = TaskData(examples, task, tokenizer, max_length=max_length(model), train_on=train_on)
        args = PseuZOTrainingArguments(
            str(tmp_path / folder),
            method=method,
            max_steps=8,
            per_device_train_batch_size=5,
            learning_rate=2e-4,
            clip_examples=2.0,
            capture=True,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        PseuZOTrainer(model, args, train_dataset=data).train()
        return list(model.parameters())

    recorded = train("recorded")
    assert 1 <= len(tapes) <= 6, "nearly every batch has its own graph"
    monkeypatch.setattr(capture, "WARM_UP", 1000)
    assert all(torch.equal(p, q) for p, q in zip(recorded, train("run"), strict=True))


def test_what_does_not_go_with_it(tmp_path):
    make = partial(
        PseuZOTrainingArguments, str(tmp_path), capture=True, use_cpu=True, report_to="none"
    )
    takes = " or ".join(methods_with("capture"))
    with pytest.raises(ValueError, match=f"capture=True needs method {takes}, not fo-sgd"):
        make(method="fo-sgd")
    with pytest.raises(ValueError, match="objective=metric is computed on the host"):
        make(method="mezo", objective="metric")
    with pytest.raises(ValueError, match="capture needs CausalLMObjective"):
        PseuZOTrainer(causal_lm("opt"), make(), train_dataset=[1], objective=lambda batch: None)
    args = [*"train --model demo --task demo --capture --device cpu --output".split()]
    result = CliRunner().invoke(main, [*args, str(tmp_path / "run")])
    assert (
        result.exit_code == 2
        and "--capture: capture needs a CUDA GPU, and the weights are on cpu" in result.output
    )
    assert not (tmp_path / "run").exists()
