"""Tensors and text as bytes, in a format of our own: nothing that is received is ever executed."""

import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

DTYPES = (
    *(torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8),
    *(torch.float16, torch.bfloat16),
)
HEAD = struct.Struct("<BB6x")  # of a tensor: the number of its dtype, and how many sizes follow


def packed(*tensors: Tensor) -> bytes:
    """The tensors one after another: 8 bytes, 8 bytes for each dimension, and the data."""
    return b"".join(part for x in tensors for part in _parts(x.detach()))


def _parts(x: Tensor) -> Iterator[bytes]:
    yield HEAD.pack(DTYPES.index(x.dtype), x.dim())
    yield struct.pack(f"<{x.dim()}q", *x.shape)
    yield bytes(buffer_of(x))


def unpacked(body: bytes | memoryview) -> list[Tensor]:
    """The tensors that `packed` was given, on the CPU. ValueError if the bytes are not theirs."""
    body, tensors = memoryview(body), []
    try:
        while body:
            number, dims = HEAD.unpack_from(body)
            shape = struct.unpack_from(f"<{dims}q", body, HEAD.size)
            body = body[HEAD.size + 8 * dims :]
            x = torch.empty(shape, dtype=DTYPES[number])
            size = x.numel() * x.element_size()
            if size:
                x = torch.frombuffer(bytearray(body[:size]), dtype=x.dtype).view(shape)
            tensors.append(x)
            body = body[size:]
    except (struct.error, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"a message of another rank is damaged: {error}") from None
    return tensors


def buffer_of(x: Tensor) -> Any:
    """The data of x in the order of its elements, on the host, as an array of bytes. It is not
    copied if it is there."""
    x = x.detach().reshape(-1)
    return x.contiguous().view(torch.uint8).cpu().numpy() if x.numel() else b""


def text(message: str) -> Tensor:
    """A text as a tensor of its bytes."""
    return torch.tensor(list(message.encode()), dtype=torch.uint8)


def read_text(x: Tensor) -> str:
    return bytes(x.tolist()).decode()
