"""A model whose weights stay on the host takes the steps that it takes without offloading, to the
bit, in the memory that is promised, with one upload of each layer a step."""

import os
import signal

import pytest
import torch
from offload_cases import (
    CPU,
    NoWeightsOfTheHost,
    Run,
    assert_same,
    labelled,
    llm,
    model_bytes,
    offloaded,
    store_of_run,
)
from pseuzo import Evolution, MeZO, PseuZO, device_bytes, offload
from pseuzo.perturb.offload import flush
from pseuzo.perturb.regions import DeviceMemory, Regions

OPTIONS = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1, "clip_examples": None}
METHODS = {
    "mezo": (lambda model: MeZO(model, **OPTIONS), 2),
    "mezo-3": (
        lambda model: MeZO(model, directions=3, two_sided=False, momentum=0.9, **OPTIONS),
        3,
    ),
    "pseuzo": (lambda model: PseuZO(model, window=2, **OPTIONS), 1),
    "pseuzo-two-sided": (lambda model: PseuZO(model, two_sided=True, **OPTIONS), 2),
    "evolution": (lambda model: Evolution(model, directions=2, lr=1e-3, eps=1e-3), 4),
}
MODELS = [
    ("opt", True, torch.float32, "mezo"),
    ("opt", True, torch.bfloat16, "pseuzo"),
    ("llama", False, torch.bfloat16, "mezo-3"),
    ("llama", False, torch.float32, "pseuzo-two-sided"),
    ("gpt2", True, torch.float32, "evolution"),
    ("opt-projected", False, torch.float16, "mezo"),
]


@pytest.mark.parametrize("kind, tied, dtype, method", MODELS)
def test_the_bits_are_those_without_offloading(kind, tied, dtype, method):
    make, passes = METHODS[method]
    runs = [Run(llm(kind, tied, dtype), make)]
    model, memory = offloaded(llm(kind, tied, dtype), passes)
    runs.append(Run(model, make))
    for run in runs:
        run.steps(range(2))
        run.evaluate()
        run.steps(range(2, 4))
    assert_same(*runs)
    assert memory.taken == memory.promised


@pytest.mark.parametrize("method", ["mezo", "mezo-3", "pseuzo"])
@pytest.mark.parametrize("kind, tied", [("opt", True), ("llama", False)])
def test_a_step_uploads_each_weight_once_and_reads_none_on_the_host(kind, tied, method):
    make, passes = METHODS[method]
    model, memory = offloaded(llm(kind, tied), passes)
    run = Run(model, make).steps(range(2))  # the first one learns what follows the layers
    embedding = model.get_input_embeddings().weight
    rows_alone = 0 if tied else embedding.numel() * 4  # only rows of it are needed
    for number in (2, 3):
        before = memory.uploaded
        with NoWeightsOfTheHost(model):
            run.step(number)
        assert memory.uploaded - before == model_bytes(model) - rows_alone


def test_a_layer_is_uploaded_while_the_one_before_computes():
    model, _ = offloaded(llm("opt"))
    run = Run(model, METHODS["pseuzo"][0]).steps(range(1))
    store, ahead = store_of_run(run), []
    first, second = (r for r in store.regions.all if r.by_layer)

    def look(module, args):
        store._worker.submit(int).result()  # the worker has nothing more to do
        ahead.append(store.buffer_of(second).holds[0] is second)

    handle = model.model.decoder.layers[0].fc2.register_forward_pre_hook(look)
    run.step(1)
    handle.remove()
    assert ahead == [True, True]
    assert store.buffer_of(first) is not store.buffer_of(second)


def test_one_buffer_gives_the_same_bits_and_one_fewer_than_promised_is_refused():
    runs = [Run(llm("opt"), METHODS["mezo"][0])]
    model = llm("opt")
    memory = DeviceMemory(CPU, device_bytes(model, buffers=1))
    runs.append(Run(offload(model, "cpu", buffers=1, memory=memory), METHODS["mezo"][0]))
    for run in runs:
        run.steps(range(2))
    assert_same(*runs)
    assert memory.taken == memory.promised
    model = llm("opt")
    fewer = DeviceMemory(CPU, device_bytes(model) - Regions(model).largest())
    with pytest.raises(RuntimeError, match="were promised"):
        Run(offload(model, "cpu", memory=fewer), METHODS["mezo"][0]).step(0)


def test_updates_wait_for_the_next_upload_and_a_state_has_them():
    model, _ = offloaded(llm("opt"))
    run = Run(model, METHODS["mezo"][0])
    before = {n: p.clone() for n, p in model.named_parameters()}
    run.step(0)
    name, p = "model.decoder.layers.1.fc1.weight", model.model.decoder.layers[1].fc1.weight
    assert torch.equal(p, before[name])
    version = p._version
    assert not torch.equal(model.state_dict()[name], before[name])
    assert p._version == version  # the write was counted with the step
    state = {n: x.clone() for n, x in model.state_dict().items()}
    run.step(1)
    model.load_state_dict(state)
    flush(model)
    assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())


def fails(at: int, error: BaseException | None):
    """A hook of a layer that fails in its `at`-th call; without an error it presses Ctrl-C."""
    calls = []

    def hook(module, args):
        calls.append(None)
        if len(calls) == at:
            if error is not None:
                raise error
            os.kill(os.getpid(), signal.SIGINT)

    return hook


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt("x"), None])
@pytest.mark.parametrize("method", ["mezo", "pseuzo"])
def test_a_pass_that_fails_leaves_nothing(method, error, at):
    make = METHODS[method][0]
    runs = [Run(llm("opt"), make), Run(offloaded(llm("opt"))[0], make)]
    for run in runs:
        run.step(0)
    layer = runs[1].model.model.decoder.layers[1]
    handle = layer.register_forward_pre_hook(fails(at, error))
    with pytest.raises(KeyboardInterrupt if error is None else type(error)):
        runs[1].step(1)
    handle.remove()
    for run in runs:
        run.steps(range(1, 3))
    assert_same(*runs)


def test_parts_of_the_model_can_be_called_by_themselves():
    plain, (model, _) = llm("llama", False), offloaded(llm("llama", False))
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        for name in ("lm_head", "model.norm"):
            assert torch.equal(plain.get_submodule(name)(x), model.get_submodule(name)(x))
        ids = labelled()["input_ids"]
        assert torch.equal(plain.model(input_ids=ids)[0], model.model(input_ids=ids)[0])
        assert torch.equal(plain.model.embed_tokens(ids), model.model.embed_tokens(ids))
