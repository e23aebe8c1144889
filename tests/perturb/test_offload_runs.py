"""Offloaded models with adapters, journals, states and label words; what is refused."""

import copy
import gc
import json
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from offload_cases import Run, assert_same, labelled, llm, model_bytes, offloaded
from pseuzo import (
    CausalLMObjective,
    DeepZero,
    ForwardGradient,
    Journal,
    MeZO,
    MeZOSVRG,
    NodePseuZO,
    PseuZO,
    SparseMeZO,
    ZOAdam,
    ZOBlocks,
    ZOConservative,
    ZOSign,
    offload,
    perturbed,
    replay,
)
from pseuzo.models.modes import tune
from torch import nn

WORDS = [5, 17, 900]


def adapted(mode: str) -> nn.Module:
    model = tune(llm("opt"), mode).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # half of LoRA's weights have no effect at its start
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("mode, method", [("lora", MeZO), ("lora", PseuZO), ("prefix", MeZO)])
def test_adapters_have_the_same_bits(mode, method):
    def make(model):
        return method(model, lr=1e-2, eps=1e-2)

    runs = [Run(adapted(mode), make)]
    model, memory = offloaded(adapted(mode))
    runs.append(Run(model, make))
    for run in runs:
        run.steps(range(2))
        run.evaluate()
    before = memory.uploaded
    for run in runs:
        run.step(2)
    assert memory.uploaded - before <= model_bytes(model)
    assert_same(*runs)


def test_label_words_have_the_same_bits_and_upload_no_head():
    seen = []
    for model in (llm("opt"), offloaded(llm("opt"))[0]):
        batch = labelled() | {"labels": torch.tensor([0, 2, 1])}
        objective = CausalLMObjective(model, WORDS)
        optimizer = MeZO(model, lr=1e-2)
        for _ in range(3):
            forward, head = objective(batch)
            seen.append([optimizer.step(lambda f=forward, h=head: h(f())), objective.scores(batch)])
    assert all(
        torch.equal(a, b)
        for x, y in zip(seen[:3], seen[3:], strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda model: ZOBlocks(model, blocks=2, lr=1e-3),
        lambda model: ZOConservative(model, lr=1e-3),
    ],
)
def test_passes_one_by_one_have_the_same_bits(make):
    runs = [Run(llm("opt"), make), Run(offload(llm("opt"), "cpu"), make)]
    for run in runs:
        run.steps(range(3))
    assert_same(*runs)


def test_perturbed_and_autocast_have_the_same_bits():
    ids, seen = labelled()["input_ids"], []
    for model in (llm("llama", False), offload(llm("llama", False), "cpu")):
        with torch.no_grad(), perturbed(model, 3, 1e-2):
            seen.append(model(input_ids=ids).logits)
        with torch.autocast("cpu", torch.bfloat16):
            run = Run(model, lambda m: PseuZO(m, lr=1e-3)).steps(range(2))
        seen += run.seen
    assert all(torch.equal(x, y) for x, y in zip(seen[:3], seen[3:], strict=True))


def test_journals_states_and_replays_are_the_same(tmp_path):
    files, runs = [], []
    for name in ("plain", "offloaded"):
        model = llm("opt", dtype=torch.bfloat16)
        model = model if name == "plain" else offload(model, "cpu")
        run = Run(model, lambda m: PseuZO(m, lr=1e-3, eps=1e-2))
        with Journal(tmp_path / name, run.optimizer, run="a run"):
            run.steps(range(2))
            weights = {n: x.clone() for n, x in model.state_dict().items()}
            state = run.optimizer.state_dict()
            run.steps(range(2, 4))
            assert float(run.optimizer.update_rms()["bfloat16"]) > 0
        files.append((tmp_path / name).read_bytes())
        runs.append((run, weights, state))
    assert files[0] == files[1]
    base = llm("opt", dtype=torch.bfloat16)
    assert replay(tmp_path / "offloaded", base) == 4
    (plain, *_), (other, weights, state) = runs
    assert_same(plain, other)
    assert all(torch.equal(x, other.model.state_dict()[n]) for n, x in base.state_dict().items())
    # a run that goes on from the state in the middle
    fresh = Run(offload(llm("opt", dtype=torch.bfloat16), "cpu"), lambda m: PseuZO(m, lr=1e-3))
    fresh.model.load_state_dict(weights)
    fresh.optimizer.load_state_dict(state)
    fresh.seen += other.seen[:2]
    assert_same(fresh.steps(range(2, 4)), other)


class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


def test_what_cannot_be_offloaded_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="layers of Alone cannot be found"):
        offload(Alone(), "cpu")
    with torch.device("meta"):
        away = nn.Sequential(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    with pytest.raises(ValueError, match="a weight is on meta; load the model on the CPU"):
        offload(away, "cpu")
    with pytest.raises(ValueError, match="buffers must be at least 1, got 0"):
        offload(llm("opt"), "cpu", buffers=0)
    model = offload(llm("opt"), "cpu")
    with pytest.raises(ValueError, match="MeZO: capture need the weights on the device"):
        MeZO(model, capture=True)
    for method in (DeepZero, ForwardGradient, MeZOSVRG, SparseMeZO, ZOAdam, ZOSign):
        with pytest.raises(ValueError, match="passes or updates need the weights on the device"):
            method(model)
    with pytest.raises(ValueError, match=r"NodePseuZO: .* this model is offloaded"):
        NodePseuZO(model)
    model.double()
    with pytest.raises(RuntimeError, match="moved or converted since offload"):
        model(input_ids=labelled()["input_ids"])


def test_an_op_on_two_regions_at_once_is_refused():
    model = offload(llm("opt"), "cpu")
    first, second = (layer.fc1.weight for layer in model.model.decoder.layers)
    with pytest.raises(RuntimeError, match=r"layers\.0 and .*layers\.1 at once"):
        MeZO(model).step(lambda: torch.cat([first, second]).sum())


def test_weights_used_outside_of_their_layer_have_the_same_bits():
    def loss(model):
        weights = [layer.fc1.weight for layer in model.model.decoder.layers]
        return sum(w.square().mean() for w in (weights[1], weights[0], *weights))

    runs = []
    for model in (llm("opt"), offload(llm("opt"), "cpu")):
        optimizer = MeZO(model, lr=1e-3)
        runs.append([optimizer.step(lambda m=model: loss(m)) for _ in range(4)])
    assert runs[0] == runs[1]


def test_a_forward_in_another_thread_at_the_same_time_is_refused():
    model, ids = offload(llm("opt"), "cpu"), labelled()["input_ids"]
    optimizer = MeZO(model, lr=1e-3)

    def run() -> torch.Tensor:
        return model(input_ids=ids).logits.mean()

    with ThreadPoolExecutor(1) as other:

        def both() -> torch.Tensor:
            with pytest.raises(RuntimeError, match="another thread"):
                other.submit(run).result()
            return run()

        loss = optimizer.step(both)
        model.get_input_embeddings()(ids)
        in_turn = other.submit(run).result()
    assert torch.equal(in_turn, run())
    same = MeZO(llm("opt"), lr=1e-3)
    assert torch.equal(loss, same.step(lambda: same.model(input_ids=ids).logits.mean()))


def test_a_copy_of_the_model_is_not_offloaded_and_the_model_can_be_freed():
    model, ids = offload(llm("opt"), "cpu"), labelled()["input_ids"]
    optimizer = MeZO(model, lr=1e-3)
    optimizer.step(lambda m=model: m(input_ids=ids).logits.mean())
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
        other.model.decoder.final_layer_norm.bias.add_(1)
        assert not torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
    optimizer.step(lambda m=model: m(input_ids=ids).logits.mean())
    models = [weakref.ref(model), weakref.ref(other)]
    del model, other, optimizer
    gc.collect()
    assert [m() for m in models] == [None, None]


@pytest.mark.gpu
@pytest.mark.parametrize("make", [MeZO, PseuZO])
def test_on_a_gpu_the_bits_are_those_of_the_resident_model(make):
    seen = []
    for offloads in (False, True):
        model = llm("opt", dtype=torch.bfloat16)
        model = offload(model, "cuda") if offloads else model.cuda()
        optimizer, objective = make(model, lr=1e-3), CausalLMObjective(model)
        losses = []
        for i in range(4):
            forward, head = objective({k: v.cuda() for k, v in labelled(i).items()})
            step = (forward, head) if make is PseuZO else (lambda f=forward, h=head: h(f()),)
            losses.append(float(optimizer.step(*step)))
        seen.append((losses, [x.cpu() for x in model.state_dict().values()]))
    assert seen[0][0] == seen[1][0]
    assert all(torch.equal(x, y) for x, y in zip(seen[0][1], seen[1][1], strict=True))


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_the_trainer_offloads(tmp_path, device):
    """On a GPU, it captures, too."""
    pytest.importorskip("pseuzo.train.trainer", exc_type=ImportError)
    from pseuzo import PseuZOTrainer, PseuZOTrainingArguments

    rows = [{k: v[0] for k, v in labelled(i, 1).items()} for i in range(8)]
    models, logs = [], []
    for how in ({}, {"offload": "cpu"}, *([{"capture": True}] if device == "cuda" else [])):
        args = PseuZOTrainingArguments(
            str(tmp_path / "-".join(how)),
            method="pseuzo",
            learning_rate=1e-3,
            max_steps=6,
            **how,
            per_device_train_batch_size=2,
            use_cpu=device == "cpu",
            report_to=[],
            disable_tqdm=True,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            logging_steps=1,
        )
        trainer = PseuZOTrainer(llm("opt"), args, train_dataset=rows, eval_dataset=rows[:2])
        trainer.train()
        models.append({name: x.cpu() for name, x in trainer.model.state_dict().items()})
        logs.append(
            [
                {k: row[k] for k in ("loss", "eval_loss") if k in row}
                for row in trainer.state.log_history
            ]
        )
    for model, log in zip(models[1:], logs[1:], strict=True):
        assert json.dumps(logs[0]) == json.dumps(log)
        assert all(torch.equal(x, model[name]) for name, x in models[0].items())


@pytest.mark.slow
def test_the_trainer_refuses_backpropagation_through_an_offloaded_model(tmp_path):
    from pseuzo import PseuZOTrainer, PseuZOTrainingArguments

    args = PseuZOTrainingArguments(str(tmp_path), method="fo-sgd", use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="fo-sgd needs its weights on the device"):
        PseuZOTrainer(offload(llm("opt"), "cpu"), args, train_dataset=[labelled()])
