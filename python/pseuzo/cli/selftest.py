"""The self-test of pseuzo info: compares the ops of this machine with the reference, in a second or
two."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

import pseuzo_kernels as pk
from pseuzo_kernels import reference

BITS, ROUNDED = "same bits as the reference", "as the reference, but for rounding"


def checks(devices: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """Yield for each op and device what was tested, how it should agree with the reference, and
    whether it does."""
    for device in devices:
        for noise in ("hadamard", "hadamard-fp16", "rademacher"):
            x = torch.linspace(-1, 1, 50_000).to(torch.bfloat16)
            got = x.to(device, copy=True)
            for api, y in ((pk, got), (reference, x)):
                api.update_(
                    y,
                    [1, 2, 3],
                    [0.1, -0.2, 0.3],
                    lr=0.1,
                    noise=noise,
                    rounding="stochastic",
                    rounding_seed=4,
                )
            yield f"{noise} on {device}", BITS, torch.equal(got.cpu(), x)
        got, want = (
            api.noise(50_000, 1, 0, noise="normal", device=d)
            for api, d in ((pk, device), (reference, "cpu"))
        )
        yield f"normal on {device}", ROUNDED, _near(got, want, 2**-21 if device == "cpu" else 5e-5)
        # The windows get o0, o1 and grad of three steps.
        outputs = torch.linspace(0, 1, 72_000).square().view(3, 3, 4, 2, 1000)
        windows = (
            pk.EmaWindow(2, momentum=0.9, eps=1.0),
            reference.EmaWindow(2, momentum=0.9, eps=1.0),
        )
        for seed, (o0, o1, grad) in enumerate(outputs):
            got, want = (
                w.step(seed, o0.to(d), o1.to(d), grad.to(d), [0, 1, 0, 1])[1]
                for w, d in zip(windows, (device, "cpu"), strict=True)
            )
        yield f"window on {device}", ROUNDED, _near(got, want, 1e-5)


def _near(got: Tensor, want: Tensor, atol: float) -> bool:
    return bool(((got.cpu() - want).abs() <= atol * want.abs().clamp(min=1)).all())
