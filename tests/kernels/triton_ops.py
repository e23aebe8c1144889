"""Tensors and terms for the tests of the Triton kernels."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 127, 2047, 2048, 2049, 5000, 8192, 8192 * 2 + 5)
SPECIAL = (
    float("nan"),
    float("inf"),
    -float("inf"),
    -0.0,
    1e-8,
    -6e-5,
    3e-39,
    65504.0,
    -65519.0,
    3.38e38,
)


def seeds_coefs(K: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(K)
    seeds = torch.randint(-(2**63), 2**63 - 1, (K,), generator=g)
    return seeds.to(DEVICE), torch.randn(K, generator=g).to(DEVICE)


def values(n: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    x[: len(SPECIAL)] = torch.tensor(SPECIAL[:n]).to(dtype)
    return x


def assert_close_normal(got, want, K):
    """Compare with normal noise. The fast functions have an error of at most 5e-5 per term (near a
    radius of 0), and the result is rounded."""
    want = want.cpu().float()
    torch.testing.assert_close(
        got.cpu().float(),
        want,
        rtol=2**-8 if got.dtype is torch.bfloat16 else 2**-10,
        atol=5e-5 * K,
        equal_nan=True,
    )
