"""A noise law is one row of LAWS, in plain torch, which all ops then run.

No backend takes a name that has no row, and Triton and C++ implement what the table says.
"""

import pytest
import torch
from helpers import assert_same_bits
from pseuzo import MeZO
from torch import nn

import pseuzo_kernels as pk
from pseuzo_kernels import laws, ops, reference

SEEDS, COEFS = torch.tensor([3, -7]), torch.tensor([0.5, -2.0])
needs_native = pytest.mark.skipif(
    pk._C is None,
    reason="pseuzo_kernels._C is not built: PSEUZO_BUILD=cpu pip install --no-build-isolation -e .",
)


def uniform(words: laws.Words) -> torch.Tensor:
    """Return uniform numbers in -0.5 .. 0.5, from the 16 bits of each half of 8 words."""
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return (torch.stack(halves).float() - 32767.5) / 65536


@pytest.fixture
def toy(monkeypatch):
    law = laws.Law(uniform, scale=12**0.5, keys=laws.KEYS_NOISE)
    monkeypatch.setitem(laws.LAWS, "uniform", law)
    return "uniform"


@pytest.fixture(params=["reference", "ops", "triton"])
def backend(request):
    """Return the four ops by name."""
    if request.param == "reference":
        return reference
    if request.param == "ops":
        return ops
    pytest.importorskip("triton")
    from pseuzo_kernels.triton import launch

    return TritonOps(launch)


class TritonOps:
    def __init__(self, launch):
        self.add_noise_list_ = launch.add_noise_list_triton_
        self.add_noise_list_out = launch.add_noise_list_out_triton
        self.add_noise_steps_ = launch.add_noise_steps_triton_
        self.add_noise_rows = launch.add_noise_rows_triton


def calls(backend, noise):
    """Return by name the tensors that an op writes, and a function that calls it."""
    x, out, steps = (torch.ones(3000, dtype=torch.bfloat16) for _ in range(3))
    how = noise, True, 5
    rows = torch.ones(20, 300), torch.tensor([3, 19])
    return {
        "add_noise_list_": (
            [x],
            lambda: backend.add_noise_list_([x], SEEDS, COEFS, [7], [0.5], [2.0], *how, None),
        ),
        "add_noise_list_out": (
            [out],
            lambda: backend.add_noise_list_out(
                [], SEEDS, COEFS, [7], [1.0], [1.0], *how, None, out=[out]
            ),
        ),
        "add_noise_steps_": (
            [steps],
            lambda: backend.add_noise_steps_(
                [steps], SEEDS, COEFS, [1, 1], [7], [0.5, 1.0], [1.0, 2.0], noise, True, [5, 6]
            ),
        ),
        "add_noise_rows": (
            [rows[0]],
            lambda: backend.add_noise_rows(*rows, SEEDS, COEFS, 7, 0.5, noise),
        ),
    }


def test_names():
    assert pk.NOISES == laws.noise_names() == ("hadamard", "hadamard-fp16", "normal", "rademacher")
    assert laws.resolve("hadamard") == ("hadamard", "fp32")
    assert laws.resolve("hadamard-fp16") == ("hadamard", "fp16")


@pytest.mark.parametrize(
    "noise", ["gauss", "", "normal-fp16", "-fp16", "hadamard-fp16-fp16", None, ["hadamard"], 3]
)
def test_what_has_no_row_is_refused(noise):
    with pytest.raises(ValueError, match=r"add_noise_: unknown noise .*; known: 'hadamard', "):
        laws.resolve(noise, "add_noise_")


@pytest.mark.parametrize("op", calls(reference, "normal"))
@pytest.mark.parametrize("noise", ["gauss", "rademacher-fp16"])
def test_every_backend_refuses_an_unknown_law(backend, op, noise):
    written, call = calls(backend, noise)[op]
    with pytest.raises(ValueError, match=f"unknown noise '{noise}'; known: 'hadamard'"):
        call()
    assert all((x == 1).all() for x in written)


def test_the_kernels_themselves_refuse_an_unknown_law():
    pytest.importorskip("triton")
    from pseuzo_kernels.triton import kernels, launch

    if launch.is_compiled():
        pytest.skip("needs the interpreter")
    x = torch.ones(8)
    with pytest.raises(Exception):  # noqa: B017  (Triton wraps an assertion in its own class)
        kernels.add_noise_kernel[(1,)](
            x,
            x,
            8,
            0,
            SEEDS,
            COEFS,
            2,
            1.0,
            1.0,
            0,
            None,
            None,
            None,
            NOISE="gauss",
            COUNTERS=512,
            HAS_X=True,
            HASH=True,
            STOCHASTIC=False,
            ASM=False,
        )
    assert (x == 1).all()


@pytest.mark.parametrize("op", calls(reference, "normal"))
def test_a_row_is_all_that_a_law_needs(backend, toy, op):
    """Every op of every backend gives the values of the definition."""
    (want, call), (got, other) = calls(reference, toy)[op], calls(backend, toy)[op]
    returned = call(), other()
    for w, g in zip(want, got, strict=True):
        assert_same_bits(g, w)
        assert op == "add_noise_rows" or not (w == 1).all()
    if returned[0] is not None:
        assert_same_bits(returned[1], returned[0])


def test_a_row_in_the_public_functions(toy):
    z = pk.noise((1 << 16,), 1, 2, noise=toy)
    assert_same_bits(z, reference.noise((1 << 16,), 1, 2, noise=toy))
    # The mean and variance of 65536 uniform numbers are known to 5 standard deviations.
    assert abs(z.mean()) < 5 / 256 and abs(z.var() - 1) < 5 * 0.8**0.5 / 256
    assert z.abs().max() <= 3**0.5
    x = torch.ones(5000)
    pk.update_([x], [1, 2], [0.5, -1.0], lr=0.1, noise=toy)
    z1, z2 = (pk.noise((5000,), seed, 0, noise=toy) for seed in (1, 2))
    torch.testing.assert_close(x, 1 - 0.1 * (0.5 * z1 - z2), rtol=0, atol=1e-6)
    assert toy in laws.noise_names()


def test_a_row_in_an_optimizer(toy):
    def trained(noise):
        model = nn.Linear(40, 3)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.5)
        optimizer = MeZO(model.parameters(), lr=1e-2, eps=1e-3, noise=noise, seed=1, model=model)
        for _ in range(3):
            optimizer.step(lambda: model(torch.ones(2, 40)).square().mean())
        return model.weight.detach()

    assert trained(toy).isfinite().all() and not torch.equal(trained(toy), trained("hadamard"))


@needs_native
def test_cpp_implements_the_table():
    assert tuple(sorted(pk._C.build_info()["noises"])) == laws.noise_names()


def test_triton_implements_the_table():
    pytest.importorskip("triton")
    from pseuzo_kernels.triton import launch

    assert launch.IMPLEMENTED == set(laws.LAWS)


@pytest.mark.parametrize("name", laws.LAWS)
def test_a_row_says_what_it_is(name):
    """b has mean 0 and, with the scale, variance 1. One key gives 16 planes from 4 words."""
    law = laws.LAWS[name]
    q = torch.arange(1 << 14)
    b = law.column_noise(q, 3, reference.hash_seeds(torch.tensor(1)))
    assert b.shape == (16, 1 << 14) and b.dtype is torch.float32
    # The transform of 16 terms multiplies the variance by 16. With 2^18 numbers, the bounds are
    # 5 standard deviations.
    variance = b.double().var() * law.scale**2 * (16 if law.transform else 1)
    assert abs(variance - 1) < 5 * 2**0.5 / 2**9 and abs(b.double().mean()) < 5 / 2**9
