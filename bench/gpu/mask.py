"""Checks whether attention on this device honours a padding mask: python bench/gpu/mask.py

Each backend of scaled_dot_product_attention gets rows padded on the left, and is compared with the
same rows alone in fp32. Padded queries see nothing ("nothing") or, with the objective's mask,
themselves ("itself"). NaN in rows that see nothing would spread to all others in the next layer.
The script fails if the backend that torch chooses by itself is wrong with the objective's mask.
"""

import itertools
import sys
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((12, 16), (64, 64), (192, 64), (256, 128))  # tokens, width of a head
BACKENDS = {
    "torch's choice": None,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}


def masks(tokens: int, padding: int) -> dict[str, Tensor]:
    """Return masks [2, 1, tokens, tokens]. The first row is padded on the left, the second is
    not."""
    keep = torch.ones(2, tokens, dtype=torch.bool, device=DEVICE)
    keep[0, :padding] = False
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE).tril()
    nothing = causal & keep[:, None, None, :]
    diagonal = torch.eye(tokens, dtype=torch.bool, device=DEVICE)
    itself = nothing | (~nothing.any(-1, keepdim=True) & diagonal)
    return {"nothing": nothing, "itself": itself}


def errors(
    dtype: torch.dtype, shape: tuple[int, int], backend: SDPBackend | None
) -> dict[str, tuple[float, int]]:
    """Return what padded queries see -> the largest error of a real row, and the number of NaN in
    padded rows. A mask that the backend does not accept is left out."""
    draw, (tokens, width), found = torch.Generator().manual_seed(0), shape, {}
    q, k, v = (torch.randn(2, 4, tokens, width, generator=draw).to(DEVICE, dtype) for _ in range(3))
    starts = (tokens // 3, 0)  # first tokens of the two rows
    for sees, mask in masks(tokens, starts[0]).items():
        try:
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).float()
        except RuntimeError:
            continue
        worst = []
        for i, start in enumerate(starts):
            alone = (x[i : i + 1, :, start:].float() for x in (q, k, v))
            want = F.scaled_dot_product_attention(*alone, is_causal=True)[0]
            worst.append((out[i, :, start:] - want).abs().max())
        found[sees] = torch.stack(worst).max().item(), int(out[0, :, : starts[0]].isnan().sum())
    return found


def main() -> None:
    right = True
    dtypes = (torch.bfloat16, torch.float16)
    for dtype, (name, backend) in itertools.product(dtypes, BACKENDS.items()):
        found, said = {shape: errors(dtype, shape, backend) for shape in SHAPES}, []
        for sees in ("nothing", "itself"):
            text, wrong = verdict({shape: at[sees] for shape, at in found.items() if sees in at})
            said.append(f"{sees}: {text}")
            right &= not wrong or (name, sees) != ("torch's choice", "itself")
        print(f"{str(dtype)[6:]:9} {name:15} " + "; ".join(said), flush=True)
    sys.exit(not right)


def verdict(taken: dict[tuple[int, int], tuple[float, int]]) -> tuple[str, bool]:
    """Return what to print about a mask, given its errors and NaN for each shape, and whether it is
    wrong."""
    if not taken:
        return "takes no such mask", False
    text = f"error {max(error for error, _ in taken.values()):.4f}"
    if nan := sum(nan for _, nan in taken.values()):
        text += f", {nan} NaN"
    # Values are below 5 and rounded to 8 bits, and so are the weights. NaN is not below any bound.
    wrong = [f"{tokens} x {width}" for (tokens, width), (e, _) in taken.items() if not e < 0.05]
    return text + (f", WRONG for {', '.join(wrong)}" if wrong else ""), bool(wrong)


if __name__ == "__main__":
    main()
