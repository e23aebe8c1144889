"""The public functions refuse bad arguments before they write anything, and count skipped calls."""

import pytest
import torch

import pseuzo_kernels as pk
from pseuzo_kernels import reference


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
    # The tensors are adjacent, in any order.
    api.perturb_([x[:6], x[9:], x[6:9], torch.empty(0), x[3:3]], 1, 0.1)
    assert (x != 1).all()
    want = api.add_noise(x[:6], 1, 1.0, 0)
    api.add_noise(x[:6], 1, 1.0, 0, out=x[6:])
    api.add_noise(x[:6], 1, 1.0, 0, out=x[:6])
    assert torch.equal(x[6:], want) and torch.equal(x[:6], want)


@pytest.mark.parametrize("api", [pk, reference], ids=["ops", "reference"])
def test_bad_input_is_refused_before_anything_is_written(api):
    x, y = torch.ones(4, 6), torch.ones(5)
    ints = torch.ones(3, dtype=torch.int32)
    meta = torch.empty(5, device="meta")
    cases = [
        (
            lambda: api.perturb_([y, x[:, ::2]], 1, 0.1),
            ValueError,
            r"params\[1\] must be contiguous, got strides \(6, 2\)",
        ),
        (
            lambda: api.perturb_([y, y[:1].expand(3)], 1, 0.1),
            ValueError,
            r"params\[1\] must be contiguous, got strides \(0,\)",
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
        *(
            (lambda shape=shape: api.noise(shape, 1, 0), ValueError, "noise: shape must be")
            for shape in (-3, (2, -1), 2.5, (2, "3"), None)
        ),
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


# Each entry calls one public op that writes to x.
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
    """With equal seeds all calls draw equal bits, so that the errors of 400 roundings would add up
    to tens of ulps."""
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
        WRITES[name](api, alone)  # the call also works without found_inf
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
    """Offloading and sharding free the memory of a tensor. An op would mistake it for an absent x,
    or crash.
    """
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
