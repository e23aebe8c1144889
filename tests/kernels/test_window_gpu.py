"""EmaWindow on a GPU has the right values, is deterministic, waits for nothing and can be
captured."""

import math

import pytest
import torch
from window_formula import DTYPES, U32, Formula, draw

from pseuzo_kernels import window


@pytest.mark.gpu
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 128, 2048])
@pytest.mark.parametrize("capacity", [1, 14, 40])
def test_gpu_matches_formula(grouped, dtype, width, capacity):
    generator = torch.Generator().manual_seed(9)
    settings = {"capacity": capacity, "momentum": 0.9}
    got, want, size = window.EmaWindow(**settings), Formula(**settings), Formula(**settings)
    for step in range(capacity + 5):
        rows, positions = 1 + (7 * step) % 33, 1 + (5 * step) % 6
        o0, o1, grad = draw(generator, rows, positions, width, dtype)
        groups = torch.randint(0, 3, (rows,), generator=generator) if grouped else None
        on_gpu = None if groups is None else groups.cuda()
        seeds, coefs = got.step(step, o0.cuda(), o1.cuda(), grad.cuda(), on_gpu)
        want_seeds, want_coefs, _ = want.step(step, o0, o1, grad, groups)
        # These are the sums of the sizes of all terms, including those that cancel in a mean.
        sizes = size.step(step, None, (o1.float() - o0.float()).abs(), grad.abs(), groups)[1]
        assert seeds.tolist() == want_seeds and coefs.is_cuda
        # One thread rounds in fp32 when it adds 4 columns of each row for a dot product, sums over
        # rows, takes an old mean of up to 33 rows, multiplies, and adds to the result.
        tol = (5 * rows + 33 + 8) * U32
        assert ((coefs.cpu().double() - want_coefs).abs() <= tol * sizes).all()


@pytest.mark.gpu
def test_gpu_bad_step_and_determinism():
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(10)
        got = window.EmaWindow(3)
        coefs = []
        for step in range(6):
            o0, o1, grad = (o.cuda() for o in draw(generator, 16, 4, 1024))
            if step == 2:
                o1[3, 1, 7] = math.nan
            coefs.append(got.step(step, o0, o1, grad, torch.arange(16, device="cuda") % 2)[1])
            assert got.found_inf.item() == (step == 2)
        assert (
            got.skipped == 1 and (coefs[2] == 0).all() and (coefs[3][1] == 0) and (coefs[3][2] != 0)
        )
        runs.append(torch.cat(coefs))
    assert torch.equal(runs[0], runs[1])


@pytest.mark.gpu
def test_gpu_makes_no_sync():
    generator = torch.Generator().manual_seed(11)
    o0, o1, grad = (o.cuda() for o in draw(generator, 4, 2, 64))
    groups, loss = torch.tensor([0, 1, 1, 0]).cuda(), torch.tensor(1.0).cuda()
    got = window.EmaWindow(3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5):
            got.step(step, o0, o1, grad, groups, loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_graph_replay():
    """A captured step can be replayed, since each step sets the ticket back to zero."""
    generator = torch.Generator().manual_seed(12)
    o0, o1, grad = (o.cuda() for o in draw(generator, 8, 2, 512))
    got = window.EmaWindow(1)
    want = got.step(1, o0, o1, grad)[1].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        coefs = got.step(2, o0, o1, grad)[1]
    for _ in range(3):
        graph.replay()
        assert torch.equal(coefs, want)
