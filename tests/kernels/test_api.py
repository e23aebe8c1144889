"""The public functions: what they compute, what they refuse, and that the dispatcher and torch.compile know them."""

import numpy as np
import pytest
import torch
from torch import nn

import pseuzo_kernels as pk
from pseuzo_kernels import reference


@pytest.mark.parametrize("noise", ["hadamard", "hadamard-fp16", "rademacher"])
@pytest.mark.parametrize("api", [pk, reference], ids=["ops", "reference"])
def test_perturb_restore_update_are_add_noise(api, noise):
    xs = [torch.randn(5000), torch.randn(3, 7), torch.randn(0), torch.randn(2048)]
    start = [x.clone() for x in xs]
    atol = (
        0.2 * 5.5 * 2.0**-17
    )  # coefficients up to 0.2 are rounded to 17 bits, |z| < 5.5; fp32's own errors are far less
    api.perturb_(xs, 5, 0.1, streams=[4, 9, 2, 0], noise=noise, noise_scale=[1.0, 2.0, 1.0, 0.0])
    for x, was, stream, scale in zip(xs, start, (4, 9, 2, 0), (1.0, 2.0, 1.0, 0.0), strict=True):
        z = reference.noise(x.shape, 5, stream, noise=noise)
        torch.testing.assert_close(x, was + 0.1 * scale * z, rtol=0, atol=atol)
    api.restore_(xs, 5, 0.1, streams=[4, 9, 2, 0], noise=noise, noise_scale=[1.0, 2.0, 1.0, 0.0])
    for x, was in zip(xs, start, strict=True):
        torch.testing.assert_close(
            x, was, rtol=0, atol=2.0**-21
        )  # two roundings of numbers below 8
    assert torch.equal(xs[3], start[3])
    api.update_(xs[:2], [1, 2], [0.5, -2.0], lr=0.1, weight_decay=[0.3, 0.0], noise=noise)
    for i, (x, was) in enumerate(zip(xs[:2], start, strict=False)):
        z = 0.5 * reference.noise(x.shape, 1, i, noise=noise) - 2 * reference.noise(
            x.shape, 2, i, noise=noise
        )
        # in half precision coefs up to 0.2 are off by up to 2^-11 of 0.25, and two sums below 0.5 by 2^-12 each,
        # which the transform of 16 inputs of up to 1.86 adds up
        more = 0.2978 * 16 * (2 * 1.86 * 2.0**-13 + 2 * 2.0**-12) if noise == "hadamard-fp16" else 0
        torch.testing.assert_close(
            x, (1 - 0.1 * (0.3, 0.0)[i]) * was - 0.1 * z, rtol=0, atol=2 * atol + more
        )


@pytest.mark.parametrize("api", [pk, reference], ids=["ops", "reference"])
def test_a_scale_may_be_negative(api):
    """MeZO goes from x + eps z to x - eps z by -2 eps."""
    start = torch.randn(5000)
    x, want = start.clone(), start.clone()
    api.perturb_(x, 5, -0.1)
    api.restore_(want, 5, 0.1)
    assert torch.equal(x, want) and not torch.equal(x, start)
    api.restore_(x, 5, -0.1)
    api.perturb_(want, 5, 0.1)
    assert torch.equal(x, want)
    torch.testing.assert_close(x, start, rtol=0, atol=2.0**-21)  # two roundings of numbers below 8


@pytest.mark.parametrize("api", [pk, reference], ids=["ops", "reference"])
def test_numbers_may_come_from_numpy_and_torch(api):
    got, want = [torch.ones(300), torch.ones(9)], [torch.ones(300), torch.ones(9)]
    half, number = np.float32(0.5), torch.tensor(0.25)
    api.perturb_(got, np.int64(3), number, noise_scale=half)
    api.update_(
        got,
        np.array([1, 2]),
        np.array([0.5, 2.0]),
        lr=np.array(0.25),
        weight_decay=number,
        noise_scale=number,
    )
    api.add_noise_(got[0], 3, half, 0, keep=number, noise_scale=half)
    api.perturb_(want, 3, 0.25, noise_scale=0.5)
    api.update_(want, [1, 2], [0.5, 2.0], lr=0.25, weight_decay=0.25, noise_scale=0.25)
    api.add_noise_(want[0], 3, 0.5, 0, keep=0.25, noise_scale=0.5)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("api", [pk, reference], ids=["ops", "reference"])
def test_tensors_of_a_list_share_no_memory(api):
    x = torch.ones(12)
    for xs in (
        [x[:6], x[3:]],
        [x[3:], x[:6]],
        [x, x[4:5]],
        [torch.ones(2), x[6:], x[:7]],
        [x[:3], x[:6]],
    ):
        with pytest.raises(
            ValueError,
            match="the same tensor, or a part of it, is in the list twice; pass each once",
        ):
            api.perturb_(xs, 1, 0.1)
    for out in (x[3:9], x[5:11]):
        with pytest.raises(ValueError, match="out must be x itself or share no memory with it"):
            api.add_noise(x[4:10], 1, 1.0, 0, out=out)
    assert (x == 1).all()
    api.perturb_(
        [x[:6], x[9:], x[6:9], torch.empty(0), x[3:3]], 1, 0.1
    )  # side by side, in any order
    assert (x != 1).all()
    want = api.add_noise(x[:6], 1, 1.0, 0)
    api.add_noise(x[:6], 1, 1.0, 0, out=x[6:])
    api.add_noise(x[:6], 1, 1.0, 0, out=x[:6])
    assert torch.equal(x[6:], want) and torch.equal(x[:6], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ops_equal_the_reference(dtype):
    got = [torch.randn(n).to(dtype) for n in (5000, 1, 2049)]
    want = [x.clone() for x in got]
    for api, xs in ((pk, got), (reference, want)):
        api.perturb_(xs, 3, 0.5, rounding="stochastic", rounding_seed=1)
        api.update_(xs, torch.tensor([1, 2, 3]), torch.tensor([0.1, 0.2, -0.3]), lr=0.3, weight_decay=0.1,
                    rounding="stochastic", rounding_seed=2, noise_scale=0.7)  # fmt: skip
        api.add_noise_(xs[0], 8, 0.25, 11, keep=0.5)
        xs.append(api.add_noise(xs[0], [8, 9], [0.25, 1.0], 2**32 - 1, keep=0.5))
        xs.append(api.noise((3, 1000), -1, 5, dtype=dtype))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_one_tensor_or_many_and_views_and_out():
    x = torch.randn(100, 50)
    view = x[20:40]
    want = x.clone()
    want[20:40] = reference.add_noise(view, 1, 2.0, 0)
    pk.perturb_(view, 1, 2.0)
    assert torch.equal(x, want)
    out = torch.empty_like(x)
    assert pk.add_noise(x, 1, 2.0, 0, out=out) is out and torch.equal(x, want)
    assert torch.equal(pk.add_noise(x, 1, 2.0, 0, noise_scale=0.0), x)
    pk.add_noise(x, 1, 2.0, 0, out=x)
    assert torch.equal(x, out)
    pk.perturb_([], 1, 1.0)


def test_parameters_are_written_and_autograd_is_told():
    w = nn.Parameter(torch.randn(10))
    loss = (w * w).sum()
    pk.perturb_([w], 1, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unsigned_and_signed_seeds_are_the_same():
    assert torch.equal(pk.noise((9,), 2**64 - 1, 0), pk.noise((9,), -1, 0))


def test_seeds_and_coefs_may_be_strided():
    seeds, coefs = torch.arange(6), torch.linspace(-1, 2, 6)
    got, want = torch.ones(300), torch.ones(300)
    pk.update_(got, seeds[::2], coefs[:1].expand(3), lr=0.1)
    pk.update_(want, [0, 2, 4], [-1.0] * 3, lr=0.1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("api", [pk, reference], ids=["ops", "reference"])
def test_bad_input_is_refused_before_anything_is_written(api):
    x, y = torch.ones(4, 6), torch.ones(5)
    ints = torch.ones(3, dtype=torch.int32)
    meta = torch.empty(5, device="meta")
    cases = [
        (
            lambda: api.perturb_([y, x.T], 1, 0.1),
            ValueError,
            r"params\[1\] must be contiguous, got strides \(1, 6\)",
        ),
        (
            lambda: api.perturb_([y, ints], 1, 0.1),
            TypeError,
            r"params\[1\] must be float32, bfloat16 or float16",
        ),
        (lambda: api.perturb_([y, y.double()], 1, 0.1), TypeError, "got torch.float64"),
        (lambda: api.perturb_([y, None], 1, 0.1), TypeError, "must be a tensor, got NoneType"),
        (lambda: api.perturb_([y, meta], 1, 0.1), ValueError, "mixed devices"),
        (lambda: api.perturb_([y, y], 1, 0.1), ValueError, "in the list twice"),
        (
            lambda: api.perturb_(y, 1, -float("inf")),
            ValueError,
            "scale must be finite in float32, got -inf",
        ),
        (
            lambda: api.restore_(y, 1, float("nan")),
            ValueError,
            "scale must be finite in float32, got nan",
        ),
        (
            lambda: api.perturb_(y, 1, 10**400),
            ValueError,
            "scale must be finite in float32, got 1000",
        ),
        (lambda: api.perturb_(y, 1, None), TypeError, "scale must be a number, got NoneType"),
        (lambda: api.perturb_(y, 1, "0.1"), TypeError, "scale must be a number, got str"),
        (
            lambda: api.perturb_(y, 1, 0.1, noise_scale=None),
            TypeError,
            "noise_scale must be a number, got NoneType",
        ),
        (
            lambda: api.perturb_(y, 1, 0.1, noise_scale=[None]),
            TypeError,
            "noise_scale must be a number, got NoneType",
        ),
        (
            lambda: api.perturb_(y, 1, 0.1, noise_scale=torch.tensor(1j)),
            TypeError,
            "must be a number, got complex",
        ),
        (
            lambda: api.update_(y, 1, None, lr=0.1),
            TypeError,
            "each of coefs must be a number, got NoneType",
        ),
        (
            lambda: api.update_(y, 1, 1e300, lr=0.1),
            ValueError,
            r"each of coefs must be finite in float32, got 1e\+300",
        ),
        (
            lambda: api.update_(y, 1, 1.0, lr=1e30, weight_decay=1e30),
            ValueError,
            r"1 - lr \* weight_decay must be fin",
        ),
        (
            lambda: api.add_noise_(y, 1, 1.0, 0, keep=None),
            TypeError,
            "keep must be a number, got NoneType",
        ),
        (
            lambda: api.perturb_(y, 1, 0.1, noise="gauss"),
            ValueError,
            "unknown noise 'gauss'; known: 'hadamard'",
        ),
        (
            lambda: api.perturb_(y, 1, 0.1, rounding="up"),
            ValueError,
            "unknown rounding 'up'; known: 'nearest'",
        ),
        (
            lambda: api.perturb_(y, 1, 0.1, noise_scale=-1.0),
            ValueError,
            "noise_scale must be finite",
        ),
        (
            lambda: api.perturb_([y], 1, 0.1, noise_scale=[1.0, 2.0]),
            ValueError,
            "one number or one per tensor",
        ),
        (lambda: api.perturb_([y], 1, 0.1, streams=[0, 1]), ValueError, "one stream per tensor"),
        (
            lambda: api.perturb_([y], 1, 0.1, streams=[2**32]),
            ValueError,
            r"stream must be an int in 0 .. 2\^32 - 1",
        ),
        (lambda: api.perturb_(y, 1.5, 0.1), TypeError, "a seed must be an int"),
        (lambda: api.perturb_(y, 1 << 64, 0.1), ValueError, "a seed must fit 64 bits"),
        (
            lambda: api.update_(y, [1, 2], [0.1], lr=0.1),
            ValueError,
            "as many coefs as seeds.* 2 seeds and 1 coefs",
        ),
        (
            lambda: api.update_(y, [], [], lr=0.1),
            ValueError,
            "at least one seed is needed, got K = 0",
        ),
        (
            lambda: api.update_(y, [1], [float("inf")], lr=0.1),
            ValueError,
            "each of coefs must be finite",
        ),
        (
            lambda: api.update_(y, [1], [1.0], lr=-0.1),
            ValueError,
            "lr must be finite and not negative",
        ),
        (
            lambda: api.update_(y, [1], [1.0], lr=0.1, weight_decay=-1.0),
            ValueError,
            "weight_decay must be",
        ),
        (
            lambda: api.update_(y, torch.ones(1), [1.0], lr=0.1),
            TypeError,
            "seeds must be torch.int64",
        ),
        (
            lambda: api.update_(y, meta.long(), [1.0], lr=0.1),
            ValueError,
            "mixed devices, seeds is on meta",
        ),
        (
            lambda: api.update_(y, torch.ones(1, 1).long(), [1.0], lr=0.1),
            ValueError,
            "must have one dimension",
        ),
        (
            lambda: api.add_noise_(y, 1, 1.0, 0, keep=float("nan")),
            ValueError,
            "keep must be finite",
        ),
        (lambda: api.add_noise_(y, 1, 1.0, -1), ValueError, "stream must be"),
        (lambda: api.add_noise(y, 1, 1.0, 0, out=torch.ones(6)), ValueError, "out must be like x"),
        (lambda: api.noise((5,), 1, 0, dtype=torch.int64), TypeError, "must be float32"),
        (
            lambda: api.perturb_(y, 1, 0.1, found_inf=0.0),
            TypeError,
            "found_inf must be a float32 tensor .*, got float",
        ),
        (
            lambda: api.update_(y, 1, 0.1, lr=0.1, found_inf=y),
            TypeError,
            r"of one element, or None, got \(5,\) torch.fl",
        ),
        (lambda: api.restore_(y, 1, 0.1, found_inf=ints[:1]), TypeError, r"got \(1,\) torch.int32"),
        (
            lambda: api.add_noise(y, 1, 0.1, 0, found_inf=meta[:1]),
            ValueError,
            "mixed devices, found_inf is on meta",
        ),
        (lambda: api.perturb_(y, 1, 0.1, rounding_seed="a"), TypeError, "a seed must be an int"),
    ]
    for call, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            call()
    assert (x == 1).all() and (y == 1).all()


def test_tensor_too_large_for_the_counter():
    x = torch.empty((1 << 36) + 1, device="meta", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"68719476737 elements, more than the 2\^36"):
        pk.add_noise_(x, 1, 1.0, 0)


# every public op that writes, on x
WRITES = {
    "add_noise_": lambda api, x, **k: api.add_noise_(x, [1, 2], COEFS, 0, keep=0.5, **k),
    "add_noise": lambda api, x, **k: x.copy_(api.add_noise(x, [1, 2], COEFS, 0, keep=0.5, **k)),
    "add_noise out": lambda api, x, **k: api.add_noise(x, [1, 2], COEFS, 0, keep=0.5, out=x, **k),
    "perturb_": lambda api, x, **k: api.perturb_([x], 1, 0.1, **k),
    "restore_": lambda api, x, **k: api.restore_(x, 1, 0.1, **k),
    "update_": lambda api, x, **k: api.update_([x], [1, 2], COEFS, lr=0.1, weight_decay=0.5, **k),
}
COEFS = torch.tensor([0.5, 2.0])
apis = pytest.mark.parametrize("api", [pk, reference], ids=["ops", "reference"])
writes = pytest.mark.parametrize("name", WRITES)


@apis
@writes
def test_stochastic_rounding_needs_its_seed(api, name):
    """Equal seeds draw equal bits at every call, and 400 roundings by the same bits are off by tens of ulps."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(300, dtype=dtype)
        op = name.split()[0]
        with pytest.raises(
            ValueError,
            match=f'{op}: rounding="stochastic" needs a rounding_seed, another one at each',
        ):
            WRITES[name](api, x, rounding="stochastic")
        assert (x == 1).all()
        WRITES[name](api, x, rounding="stochastic", rounding_seed=0)
        assert (x != 1).any()
    twins = [torch.ones(300, dtype=torch.bfloat16) for _ in range(3)]
    for x, seed in zip(twins, (3, 3, 4), strict=True):
        WRITES[name](api, x, rounding="stochastic", rounding_seed=seed)
    assert torch.equal(*twins[:2]) and not torch.equal(*twins[1:])


@apis
@writes
def test_found_inf_leaves_x_as_it_is(api, name):
    start = torch.tensor([-0.0, 1.0, float("inf"), 1e-45])
    for flag, skipped in (
        (torch.zeros(1), False),
        (torch.ones(1), True),
        (torch.tensor(2.0), True),
    ):
        x, was = start.clone(), flag.clone()
        WRITES[name](api, x, found_inf=flag)
        assert torch.equal(x.view(torch.int32), start.view(torch.int32)) == skipped
        assert torch.equal(flag, was)


@apis
@pytest.mark.parametrize(
    "name", [name for name in WRITES if "store" not in name and "perturb" not in name]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_coefs_that_are_not_finite_are_skipped_and_counted(api, name, bad, monkeypatch):
    start = torch.tensor([-0.0, 1.0, float("inf"), 1e-45])
    found_inf, skipped = torch.zeros(1), 0
    for factor in (1.0, bad, 1.0, bad):
        monkeypatch.setitem(globals(), "COEFS", torch.tensor([0.5, 2.0 * factor]))
        x, alone = start.clone(), start.clone()
        WRITES[name](api, x, found_inf=found_inf.zero_())
        WRITES[name](api, alone)  # without found_inf, too
        assert torch.equal(x.view(torch.int32), alone.view(torch.int32))
        assert (
            torch.equal(x.view(torch.int32), start.view(torch.int32))
            == (factor != 1)
            == bool(found_inf)
        )
        skipped += int(found_inf)
    assert skipped == 2


@apis
def test_a_product_with_lr_that_overflows_is_skipped(api):
    found_inf = torch.zeros(1)
    x = torch.ones(300)
    api.update_(x, 1, torch.tensor([3e38]), lr=10.0, weight_decay=0.01, found_inf=found_inf)
    assert (x == 1).all() and found_inf == 1


@apis
def test_a_step_that_the_window_skipped_does_not_decay(api):
    window = api.EmaWindow(2)
    ones, zeros = torch.ones(2, 4), torch.zeros(2, 4)
    x, start = torch.full((300,), 2.0), torch.full((300,), 2.0)
    for seed, factor in enumerate((1.0, float("nan"), 1.0)):
        seeds, coefs = window.step(seed, zeros, ones * factor, ones)
        given, brought = x.clone(), x.clone()
        api.update_(brought, seeds, coefs, lr=0.1, weight_decay=1.0)
        api.update_(given, seeds, coefs * 1.0, lr=0.1, weight_decay=1.0, found_inf=window.found_inf)
        assert torch.equal(brought, given) and window.found_inf == (seed == 1)
        assert torch.equal(brought, x) == (seed == 1)
    assert window.skipped == 1 and torch.equal(x, start)


@apis
@writes
def test_freed_memory_is_refused(api, name):
    """As offloading and sharding leave a tensor; it would be taken for no x at all, or crash the process."""
    freed, flag = torch.ones(300), torch.ones(1)
    for tensor in (freed, flag):
        tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name.split()[0]}: the memory of (x|params) was freed"):
        WRITES[name](api, freed)
    x = torch.ones(300)
    empty = torch.ones(0)
    empty.untyped_storage().resize_(0)
    api.perturb_([empty, x], 1, 0.1)
    want = reference.add_noise(torch.ones(300), 1, 0.1, 1)
    assert torch.equal(x, want)
    with pytest.raises(ValueError, match=r"the memory of params\[1\] was freed"):
        api.perturb_([x, freed], 1, 0.1)
    with pytest.raises(ValueError, match="the memory of out was freed"):
        api.add_noise(x, 1, 0.1, 0, out=freed)
    with pytest.raises(ValueError, match="the memory of coefs was freed"):
        api.update_(x, list(range(300)), freed, lr=0.1)
    with pytest.raises(ValueError, match="the memory of found_inf was freed"):
        api.update_(x, 1, 0.1, lr=0.1, found_inf=flag)
    assert torch.equal(x, want)


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


# calls of f(x, i): what changes from call to call
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
    """Once for the first numbers and once for all others; the bits are those of the op. Python numbers, as a training
    loop has them: a seed, a scale, a rate."""
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
    pk._C is None, reason="pseuzo_kernels._C is not built, which looks at the memory then"
)
def test_freed_memory_is_refused_in_a_compiled_graph():
    torch._dynamo.reset()
    x = torch.ones(300)
    compiled = torch.compile(lambda x: pk.perturb_([x], 1, 0.1), backend="eager", fullgraph=True)
    compiled(x)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the memory of x was freed"):
        compiled(x)
