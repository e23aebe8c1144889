"""Adam's update with moments from seeds: its formula, and the same bits on every backend."""

import functools

import pytest
import torch
from cpu_ops import DTYPES, normals, on_every_isa, terms
from helpers import assert_same_bits
from triton_ops import DEVICE

import pseuzo_kernels
from pseuzo_kernels import adam, ops, reference

SIZES = (0, 1, 129, 2048, 2049)
# noise, steps in the window, directions per step
CASES = (
    ("hadamard", 1, 1),
    ("hadamard", 4, 1),
    ("hadamard", 14, 1),
    ("hadamard", 40, 1),
    ("hadamard", 2, 18),
    ("hadamard-fp16", 3, 2),
    ("rademacher", 5, 3),
    ("rademacher", 4, 1),
)
BETAS = 0.9, 0.999


def arguments(noise: str, n: int, q: int, stochastic: bool = True) -> tuple:
    factors = adam.adam_factors(-0.01, *BETAS, n)
    places = [3, 2**32 - 1, 0, 9, 5] * 3, [0.9, 1.0, 0.75] * 5, [1.0, 1.3, 0.7, 0.0, 2.0] * 3
    return *terms(n * q), q, *places, [*BETAS, *factors, 1e-8], noise, stochastic, 77


def tensors() -> list[torch.Tensor]:
    return [normals(n, dtype, seed=n) for dtype in DTYPES for n in SIZES]


@functools.cache
def wanted(noise: str, n: int, q: int) -> list[torch.Tensor]:
    xs = tensors()
    adam.adam_list_(xs, *arguments(noise, n, q))
    return xs


@pytest.mark.usefixtures("isa")
class TestCpp:
    pytestmark = on_every_isa

    @pytest.mark.parametrize("noise, n, q", CASES)
    def test_bits(self, noise, n, q):
        got = tensors()
        ops.adam_list_(got, *arguments(noise, n, q), None)
        for g, w in zip(got, wanted(noise, n, q), strict=True):
            assert_same_bits(g, w)

    def test_normal(self):
        got, want = normals(3000), normals(3000)
        for x, op in ((got, ops.adam_list_), (want, adam.adam_list_)):
            numbers = [*BETAS, -1.0, 1.0, 1e-3]
            op([x], *terms(6), 2, [3], [1.0], [1.0], numbers, "normal", False, 0, None)
        # The tolerance covers the error of each backend's logarithm and cosine, passed through
        # a root of sums of squares.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_refusals(self):
        x, args = normals(5), arguments("hadamard", 2, 1)
        one = [a[:1] if isinstance(a, list) and len(a) > 5 else a for a in args]
        with pytest.raises(ValueError, match="2 a step, are needed, got 3"):
            ops.adam_list_([x], *terms(3), 2, *one[3:], None)
        with pytest.raises(RuntimeError, match="numbers five"):
            ops.adam_list_([x], *terms(2), 1, *one[3:6], [0.9], *one[7:], None)
        assert torch.equal(x, normals(5))


def selections(xs: list[torch.Tensor]) -> dict[str, tuple]:
    """Places and masks of the tensors of a list."""
    limits, seed = [0.4] * len(xs), torch.tensor([8], device=xs[0].device)
    takes = [(torch.arange(x.numel()) % 3 > 0).to(x.device) for x in xs]
    rows, columns = [], []
    for t, x in enumerate(xs):
        width = x.numel() // 3 if x.numel() % 3 == 0 else 0
        rows += [2050 * t + 1, 0, 0]
        columns += [2040, width, width + 9]
    return {
        "rows": (rows, [], None, []),
        "columns": (columns, [], None, []),
        "random": (rows, limits, seed, []),
        "small": ([], limits, None, []),
        "given": (columns, [], None, takes),
    }


@functools.cache
def wanted_parts(name: str) -> list[torch.Tensor]:
    xs = tensors()
    adam.adam_parts_(xs, *arguments("hadamard", 3, 2), None, *selections(xs)[name])
    return xs


@pytest.mark.usefixtures("isa")
class TestPartsInCpp:
    pytestmark = on_every_isa

    @pytest.mark.parametrize("name", ["rows", "columns", "random", "small", "given"])
    def test_bits(self, name):
        got = tensors()
        ops.adam_parts_(got, *arguments("hadamard", 3, 2), None, *selections(got)[name])
        for g, w in zip(got, wanted_parts(name), strict=True):
            assert_same_bits(g, w)


@pytest.mark.parametrize("update", [pseuzo_kernels.adam_update_, adam.adam_update_])
def test_a_part_becomes_what_it_becomes_in_its_tensor(update):
    """A block of columns, under a mask; what the mask leaves out keeps its bits."""
    whole = normals(40 * 70, torch.bfloat16).view(40, 70)
    takes = normals(2800, seed=1).view(40, 70) > 0
    how = dict(lr=0.1, weight_decay=0.2, streams=[5], rounding="stochastic", rounding_seed=3)
    want, got = whole.clone(), whole[:, 5:60].clone()
    update(want, [1, 2, 3], [0.3, -0.4, 0.2], **how)
    place = pseuzo_kernels.Part(5, 55, 70)
    mask = takes[:, 5:60].contiguous()
    update(got, [1, 2, 3], [0.3, -0.4, 0.2], offset=place, mask=mask, **how)
    assert_same_bits(got, torch.where(takes, want, whole)[:, 5:60])


@(pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.slow)  # the interpreter is
@pytest.mark.parametrize("name", ["random", "given"])
def test_triton_parts(name):
    from pseuzo_kernels.triton.adam_parts import adam_parts_triton_

    some = (2, 4, 7, 11)  # as below
    xs = tensors()
    places, limits, seed, takes = selections(xs)[name]
    got = [xs[t].to(DEVICE) for t in some]
    places = [places[3 * t + i] for t in some for i in range(3)]
    limits, takes = ([c[t] for t in some] if c else [] for c in (limits, takes))
    seeds, coefs, directions, *lists, numbers, noise, stochastic, rounding_seed = arguments(
        "hadamard", 3, 2
    )
    lists = [[values[t] for t in some] for values in lists]
    terms = seeds.to(DEVICE), coefs.to(DEVICE), directions, *lists, numbers
    how = noise, stochastic, rounding_seed, None
    seed = None if seed is None else seed.to(DEVICE)
    takes = [mask.to(DEVICE) for mask in takes]
    adam_parts_triton_(got, *terms, *how, places, limits, seed, takes)
    for t, g in zip(some, got, strict=True):
        assert_same_bits(g, wanted_parts(name)[t])


@(pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.slow)  # the interpreter is
@pytest.mark.parametrize("noise, n, q", [CASES[1], CASES[5], CASES[6]])
def test_triton(noise, n, q):
    from pseuzo_kernels.triton.adam import adam_list_triton_

    some = (2, 4, 7, 11)  # 129 and 2049 of fp32, 129 of bf16, 1 of fp16
    got = [tensors()[t].to(DEVICE) for t in some]
    got[0] = torch.cat([got[0][:1], got[0]])[1:]  # this tensor is not aligned to 16 bytes
    seeds, coefs, directions, *lists, numbers, noise, stochastic, rounding_seed = arguments(
        noise, n, q
    )
    lists = [[values[t] for t in some] for values in lists]
    how = numbers, noise, stochastic, rounding_seed
    adam_list_triton_(got, seeds.to(DEVICE), coefs.to(DEVICE), directions, *lists, *how)
    for t, g in zip(some, got, strict=True):
        assert_same_bits(g, wanted(noise, n, q)[t])


@pytest.mark.parametrize("n, q", [(1, 1), (3, 2), (40, 1)])
def test_is_adam(n, q):
    """The update equals the published Adam, whose moments here are in float64 and in memory. They
    are computed from the noise that the op makes."""
    lr, decay, eps, scale = 0.1, 0.2, 1e-3, 0.7
    x, (seeds, coefs) = normals(300), terms(n * q)
    m = v = torch.zeros(300, dtype=torch.float64)
    for s, c in zip(seeds.split(q), coefs.split(q), strict=True):
        z = torch.stack([reference.noise(300, int(seed), 5) for seed in s]).double()
        g = scale * (c.double()[:, None] * z).sum(0)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g.square()
    size = (v / (1 - 0.99**n)).sqrt() + eps
    want = (1 - lr * decay) * x.double() - lr * m / (1 - 0.9**n) / size
    for update in (pseuzo_kernels.adam_update_, adam.adam_update_):
        got = x.clone()
        options = dict(lr=lr, beta2=0.99, eps=eps, directions=q, weight_decay=decay)
        update(got, seeds, coefs, streams=[5], noise_scale=scale, **options)
        # Coefs have 17 bits, and moments are rounded 3 n times. |m| / sqrt(v) is at most
        # 1 / sqrt(0.1).
        error = lr * 4 * (2**-17 + 3 * n * 2**-24)
        assert (got.double() - want).abs().max() <= error + 2**-23 * x.abs().max()


def test_skips():
    """If a coefficient is not finite or the flag is set, nothing is written and the flag ends up
    set."""
    x = normals(100)
    for coef, flag in ((float("nan"), 0.0), (float("inf"), 0.0), (1.0, 2.0)):
        for update in (pseuzo_kernels.adam_update_, adam.adam_update_):
            found_inf, before = torch.tensor([flag]), x._version
            options = dict(lr=0.1, weight_decay=1.0, found_inf=found_inf)
            update([x], [1, 2], torch.tensor([1.0, coef]), **options)
            assert torch.equal(x, normals(100)) and found_inf != 0 and x._version > before
    pseuzo_kernels.adam_update_(x, 1, 1.0, lr=0.1, noise_scale=0.0)
    assert torch.equal(x, normals(100))


def test_no_gradient_is_no_move():
    """0 / (sqrt(0) + eps) is 0, also where the square leaves fp32."""
    x = normals(100)
    for coef in (0.0, 1e-30):
        pseuzo_kernels.adam_update_(x, [1, 2], [coef, coef], lr=0.1)
    assert torch.equal(x, normals(100))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"eps": 0.0}, "eps must be positive in float32, got 0.0"),
        ({"beta1": 1.0}, "beta1 must be at least 0 and below 1, got 1.0"),
        ({"beta2": -0.1}, "beta2 must be at least 0 and below 1, got -0.1"),
        ({"directions": 0}, "directions must be an int of at least 1, got 0"),
        ({"directions": 3}, "3 seeds a step are needed, got 4 seeds"),
        ({"lr": -1.0}, "lr must be finite and not negative"),
        ({"rounding": "stochastic"}, "needs a rounding_seed"),
    ],
)
def test_refusals(options, sentence):
    x = normals(10)
    with pytest.raises(ValueError, match=f"adam_update_: .*{sentence}"):
        pseuzo_kernels.adam_update_(x, [1, 2, 3, 4], [1.0] * 4, **{"lr": 0.1} | options)
    assert torch.equal(x, normals(10))
