"""The dispatcher and torch.compile know the ops."""

import pytest
import torch

import pseuzo_kernels as pk


def op_arguments():
    seeds, coefs = torch.tensor([1, -2]), torch.tensor([0.5, 2.0])
    rest = ([0, 1], [0.5, 1.0], [1.0, 2.0], "hadamard", True, 3, None)
    xs = lambda: [torch.randn(2500, dtype=torch.bfloat16), torch.randn(3)]  # noqa: E731
    ops = torch.ops.pseuzo
    yield ops.add_noise_list_.default, (xs(), seeds, coefs, *rest), {}
    yield ops.add_noise_list_.default, (xs(), seeds, coefs, *rest[:-1], torch.zeros(1)), {}
    yield ops.add_noise_list_out.default, (xs(), seeds, coefs, *rest), {"out": xs()}
    yield ops.add_noise_list_out.default, ([], seeds, coefs, *rest), {"out": xs()}
    tensors = (rest[0], torch.tensor(rest[1]), torch.tensor(rest[2]), *rest[3:-1], torch.zeros(1))
    yield ops.add_noise_list_.traced, (xs(), seeds, coefs, *tensors), {}
    yield ops.add_noise_list_out.traced, (xs(), seeds, coefs, *tensors), {"out": xs()}
    two_steps = (
        [2, 1],
        [0, 1],
        [0.5, 1.0, 1.0, 0.9],
        [1.0, 2.0, 0.0, 1.0],
        "hadamard",
        True,
        [3, -4],
    )
    yield (
        ops.add_noise_steps_.default,
        (xs(), torch.tensor([3, -4, 5]), torch.randn(3), *two_steps),
        {},
    )
    index = torch.tensor([[0, 3], [1, 3]])
    yield (
        ops.add_noise_rows.default,
        (torch.randn(4, 100), index, seeds, coefs, 0, 1.0, "hadamard"),
        {},
    )


@pytest.mark.parametrize(
    "op, args, kwargs", list(op_arguments()), ids=lambda v: getattr(v, "_name", None)
)
def test_opcheck(op, args, kwargs):
    torch.library.opcheck(op, args, kwargs)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_under_torch_compile(backend):
    def step(x, w, seeds, coefs):
        pk.perturb_([w], 3, 0.1)
        y = x @ w
        pk.restore_([w], 3, 0.1)
        pk.update_([w], seeds, coefs, lr=0.1, weight_decay=0.5)
        return y

    torch._dynamo.reset()
    x, w = torch.randn(5, 40), torch.randn(40, 60)
    seeds, coefs = torch.tensor([1, 2]), torch.tensor([0.3, 0.4])
    w2 = w.clone()
    want = step(x, w, seeds, coefs)
    got = torch.compile(step, backend=backend, fullgraph=True)(x, w2, seeds, coefs)
    torch.testing.assert_close(got, want)
    assert torch.equal(w, w2)


# Each entry names what changes from call to call of f(x, i).
CHANGING = {
    "seed": lambda x, i: pk.perturb_([x], 2**62 + i, 1e-3),
    "negative seed": lambda x, i: pk.restore_(x, -i, 1e-3),
    "seeds, coefs and scale": lambda x, i: pk.update_(
        x, [i, 7], [0.1 * i, 2.0], lr=0.1, noise_scale=0.3 * i
    ),
    "seed, rounding seed and stream": lambda x, i: pk.perturb_(
        x, i, 0.1 * i, streams=[i], rounding="stochastic", rounding_seed=i
    ),
    "lr": lambda x, i: pk.update_(x, [1, 2], [0.1, 0.2], lr=0.01 * i, weight_decay=0.1),
    "weight decay": lambda x, i: pk.update_(
        [x], [1, 2], [0.1, 0.2], lr=0.01 * i, weight_decay=[0.1 * i]
    ),
    "keep": lambda x, i: pk.add_noise_(x, 3, 0.1, i, keep=0.1 * i),
    "keep, out of place": lambda x, i: x.copy_(pk.add_noise(x, i, 0.3, 0, keep=0.1 * i)),
    "found_inf": lambda x, i: pk.update_(
        x, [1, 2], torch.ones(2) * i, lr=0.1, weight_decay=0.1, found_inf=torch.ones(1) * (i % 2)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGING)
def test_numbers_that_change_are_compiled_once(name):
    """An op is compiled once for the first numbers and once for all others, with the same bits.

    The numbers are Python numbers, as in a training loop: a seed, a scale, a rate.
    """
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(CHANGING[name], backend=backend, fullgraph=True)
    got, want = torch.ones(3000, dtype=torch.bfloat16), torch.ones(3000, dtype=torch.bfloat16)
    for i in range(5, 9 + torch._dynamo.config.recompile_limit):
        compiled(got, i)
        CHANGING[name](want, i)
        assert torch.equal(got, want), i
    assert len(graphs) <= 2


def test_the_window_and_its_update_are_compiled_together():
    def step(window, x, seed, o0, o1, grad):
        seeds, coefs = window.step(seed, o0, o1, grad)
        pk.update_([x], seeds, coefs, lr=0.1, weight_decay=0.5, found_inf=window.found_inf)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    twins = [(run, pk.EmaWindow(2), torch.ones(300)) for run in (step, compiled)]
    for seed in range(6):
        o0, o1, grad = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(seed)).unbind()
        before = twins[0][2].clone()
        for run, window, x in twins:
            run(window, x, seed, o0, o1 * (float("nan") if seed == 3 else 1.0), grad)
        assert torch.equal(twins[0][2], twins[1][2])
        assert torch.equal(before, twins[0][2]) == (seed == 3)


def test_an_unsigned_seed_beyond_int64_is_compiled_as_a_constant():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, seed: pk.perturb_([x], seed, 0.1), backend="aot_eager", fullgraph=True
    )
    for seed in (2**64 - 1, 2**64 - 2, 2**64 - 3):
        got, want = torch.ones(300), torch.ones(300)
        compiled(got, seed)
        pk.perturb_(want, seed, 0.1)
        assert torch.equal(got, want)


@pytest.mark.skipif(
    pk._C is None, reason="pseuzo_kernels._C, which checks the memory, is not built"
)
def test_freed_memory_is_refused_in_a_compiled_graph():
    torch._dynamo.reset()
    x = torch.ones(300)
    compiled = torch.compile(lambda x: pk.perturb_([x], 1, 0.1), backend="eager", fullgraph=True)
    compiled(x)
    x.untyped_storage().resize_(0)
    # After an error, torch leaves autograd as the graph had set it, for all that comes after it.
    with pytest.raises(RuntimeError, match="the memory of x was freed"), torch.enable_grad():
        compiled(x)
