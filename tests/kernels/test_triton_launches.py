"""Launches of the Triton kernels: which tensors share one, cached tables, repeated launches."""

import inspect
import sys
import threading
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from helpers import assert_same_bits
from triton_ops import DEVICE, DTYPES, seeds_coefs, values

from pseuzo_kernels import NOISES, reference

pytest.importorskip("triton")

from pseuzo_kernels.triton import kernels, launch, tables
from pseuzo_kernels.triton.launch import (
    Launches,
    Together,
    add_noise_list_out_triton,
    add_noise_list_triton_,
)

pytestmark = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.slow  # the interpreter is


@pytest.mark.parametrize("stochastic", [False, True])
def test_list_in_one_launch(stochastic):
    """Sizes and dtypes differ. One view is misaligned, one tensor is empty, one has a scale of
    0."""
    seeds, coefs = seeds_coefs(3)
    xs = [
        values(n, dtype)
        for n, dtype in zip((8192 * 2 + 1, 5000, 0, 1, 130, 2048), DTYPES * 2, strict=True)
    ]
    xs.append(torch.ones(4099, dtype=torch.bfloat16)[1:])
    xs.append(values(300, torch.bfloat16))
    streams, keeps = list(range(10, 18)), [1.0, 0.5, 0.5, 0.25, 1.0, 0.9, 0.9, 0.1]
    scales = [1.0, 2.0, 1.0, 0.3, 1.0, 1.0, 1.0, 0.0]
    got = [x.clone().to(DEVICE) for x in xs[:6]] + [
        xs[6].clone().to(DEVICE),
        xs[7].clone().to(DEVICE),
    ]
    got[6] = torch.ones(4099, dtype=torch.bfloat16, device=DEVICE)[1:]
    want = [x.clone() for x in xs]
    for _ in range(2):  # the second launch uses the tables of the first
        add_noise_list_triton_(got, seeds, coefs, streams, keeps, scales, "hadamard", stochastic, 5)
        reference.add_noise_list_(
            want, seeds.cpu(), coefs.cpu(), streams, keeps, scales, "hadamard", stochastic, 5
        )
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)


def test_tables_of_a_captured_graph(monkeypatch):
    """A graph launches over a table that was cached before, which is then kept.

    It makes no table, because the graph would hold the address of memory that is filled when the
    graph is captured, not when it is replayed.
    """
    seeds, coefs = seeds_coefs(1)
    rest = ([3, 4], [1.0, 1.0], [1.0, 1.0], "hadamard", False, 0)

    def launches(xs):
        counts = []
        with monkeypatch.context() as patch:
            for name in ("add_noise_kernel", "add_noise_many_kernel"):
                kernel, calls = getattr(kernels, name), []
                spy = type(
                    "Spy",
                    (),
                    {
                        "__getitem__": lambda self, grid, k=kernel, c=calls: (
                            c.append(grid) or k[grid]
                        )
                    },
                )
                patch.setattr(kernels, name, spy())
                counts.append(calls)
            want = [x.cpu().clone() for x in xs]
            reference.add_noise_list_(want, seeds.cpu(), coefs.cpu(), *rest)
            add_noise_list_triton_(xs, seeds, coefs, *rest)
        for x, w in zip(xs, want, strict=True):
            assert_same_bits(x, w)
        return [len(calls) for calls in counts]

    monkeypatch.setattr(tables, "cache", type(tables.cache)())
    monkeypatch.setattr(tables, "captured", {})
    xs = [values(n, torch.bfloat16).to(DEVICE) for n in (5000, 300)]
    others = [x.clone() for x in xs]
    assert launches(xs) == [0, 1] and not tables.captured
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    assert launches(others) == [2, 0] and launches(xs) == [0, 1]
    assert len(tables.captured) == 2 and all(
        tables.cache[key] is kept for key, kept in tables.captured.items()
    )
    tables.captured.clear()
    with tables.tables_of_a_graph() as kept:  # the owner of the graph also keeps them
        assert launches(xs) == [0, 1]
    assert len(kept) == 2 and not tables.captured


def test_tables_are_forgotten_by_size(monkeypatch):
    monkeypatch.setattr(tables, "MAX_BYTES", 3 * tables.ENTRY_BYTES + 100)
    plans = tables.TableCache()
    for t in range(5):
        plans.keep((t,), Launches([], []))
    assert list(plans) == [(2,), (3,), (4,)]
    large = Together(
        [0],
        torch.zeros(tables.ENTRY_BYTES, dtype=torch.int8),
        torch.zeros(20, dtype=torch.int8),
        torch.zeros(0),
    )
    plans.keep(("large",), Launches([], [large]))
    assert list(plans) == [(4,), ("large",)] and plans.n_bytes == 3 * tables.ENTRY_BYTES + 20
    plans.keep(("too large",), torch.zeros(1 << 20))
    assert list(plans) == [("too large",)], "the newest entry was evicted"


def test_tables_of_several_threads(monkeypatch):
    """A thread may evict a table that another one is about to use.

    Each still gets the table of its key, and the sizes add up.
    """
    monkeypatch.setattr(tables, "MAX_BYTES", 3 * tables.ENTRY_BYTES)
    monkeypatch.setattr(tables, "cache", type(tables.cache)())
    errors, interval = [], sys.getswitchinterval()

    def work(first: int) -> None:
        try:
            for i in range(first, first + 4000):
                assert tables.cached((i % 5,), lambda i=i: torch.full((1,), i % 5), False) == i % 5
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert (
        tables.cache.n_bytes
        == sum(map(tables.cache.size_of, tables.cache.values()))
        <= 3 * tables.ENTRY_BYTES
    )


class Jitted:
    """A kernel in the interpreter that is launched as compiled ones are.

    `kernel[grid](...)` returns a launch that takes all arguments by position, constants included.
    """

    def __init__(self, kernel):
        self.kernel, self.names = kernel, list(inspect.signature(kernel.fn).parameters)
        self.params = [SimpleNamespace(name=name) for name in self.names]

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.kernel[grid](*args, **options)
            return Compiled(self, {k: v for k, v in options.items() if k not in self.names})

        return launch


class Compiled(NamedTuple):
    of: Jitted
    options: dict

    def __getitem__(self, grid):
        def launch(*args, stream):
            assert len(args) == len(self.of.names) and len(grid) == 3
            self.of.kernel[grid[:1]](*args, **self.options)

        return launch


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/bench/test_gpu.py tests it on a GPU")
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launches_are_made_again(noise, dtype, monkeypatch):
    for name in ("add_noise_kernel", "add_noise_many_kernel"):
        monkeypatch.setattr(kernels, name, Jitted(getattr(kernels, name)))
    sizes, scales = (1, 2048, 5000, 9000), [1.0, 0.5, 2.0, -1.0]
    xs = [values(n, dtype) for n in sizes]
    outs = [torch.empty(n + 1, dtype=dtype)[n == 5000 :][:n] for n in sizes]  # one is not aligned
    seeds, coefs, launches = torch.empty(1, dtype=torch.int64), torch.empty(1), []
    args = (xs, seeds, coefs, [3, 0, 7, 9], [1.0] * 4, scales, noise, False, 0, None)
    for step in range(3):
        seeds.fill_(step)
        coefs.fill_(0.25 + step)
        for x in xs:
            x += 1  # in place
        if step == 0:
            add_noise_list_out_triton(*args, out=outs, launched=launches)
        for again in launches if step else ():
            again(stream=5)
        want = [torch.empty_like(x) for x in xs]
        add_noise_list_out_triton(*args, out=want)
        for got, wanted in zip(outs, want, strict=True):
            assert_same_bits(got, wanted)
    assert len(launches) == 2
