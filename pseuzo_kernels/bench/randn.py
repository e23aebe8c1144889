"""x + sum_k c_k z_k with Triton's own tl.randn, as a user would write it: the kernel to beat."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def add_tl_randn_kernel(
    out_ptr,  # [n] fp32 | bf16 | fp16
    x_ptr,  # [n], may be out_ptr
    seeds_ptr,  # [K] i64
    coefs_ptr,  # [K] fp32
    n: tl.int64,
    K: tl.int32,
    BLOCK: tl.constexpr,
):
    # tl.randn counts in 32 bits below 2^31 elements, as its users do
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    sums = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    k = 0
    while k < K:  # not range: the interpreter of Triton 3.6 fails on it with numpy 2.4
        seed = tl.load(seeds_ptr + k)
        sums += tl.load(coefs_ptr + k) * tl.randn(seed, offs)
        k += 1
    tl.store(out_ptr + offs, sums.to(out_ptr.dtype.element_ty), mask=mask)


def add_tl_randn(x: Tensor, seeds: Tensor, coefs: Tensor, *, out: Tensor) -> None:
    """out <- x + sum_k coefs[k] z(seeds[k]), rounded to nearest; below 2^31 elements."""
    programs = triton.cdiv(x.numel(), BLOCK)
    with torch.cuda.device(x.device) if x.is_cuda else torch.no_grad():
        add_tl_randn_kernel[(programs,)](out, x, seeds, coefs, x.numel(), len(seeds), BLOCK=BLOCK)
