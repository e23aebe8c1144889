"""DTensors: their local parts become what the whole tensor becomes."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

import pseuzo_kernels as pk

tensors = pytest.importorskip("torch.distributed.tensor")
Shard, Replicate, Partial = tensors.Shard, tensors.Replicate, tensors.Partial
SHAPE = (10, 7, 6)
# The placements on a mesh of 3 x 2, and whether the local part is rows of a matrix.
PLACEMENTS = {
    "whole": (Replicate(), Replicate()),
    "FSDP": (Shard(0), Replicate()),
    "tensor parallel": (Replicate(), Shard(1)),
    "both": (Shard(0), Shard(1)),
    "last": (Shard(2), Replicate()),
    "first and last": (Shard(0), Shard(-1)),
    "nested": (Shard(0), Shard(0)),
}


@pytest.fixture(scope="module")
def meshes():
    """Return the mesh as each of six ranks sees it. No process is started."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized()
    meshes = []
    for rank in range(6):
        dist.init_process_group("fake", rank=rank, world_size=6, store=FakeStore())
        meshes.append(DeviceMesh("cpu", torch.arange(6).view(3, 2)))
        if rank < 5:
            dist.destroy_process_group()
    yield meshes
    dist.destroy_process_group()


def pieces(rank: int, placements) -> tuple[slice, ...]:
    """Return what torch.chunk gives this rank, dimension by dimension."""
    bounds = [(0, n) for n in SHAPE]
    for place, n, placement in zip((rank // 2, rank % 2), (3, 2), placements, strict=True):
        if isinstance(placement, Shard):
            low, high = bounds[placement.dim % 3]
            chunks = torch.arange(low, high).chunk(n)
            found = chunks[place].tolist() if place < len(chunks) else []
            bounds[placement.dim % 3] = (found[0], found[-1] + 1) if found else (high, high)
    return tuple(slice(*bound) for bound in bounds)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_local_part_has_the_bits_of_the_whole(meshes, name):
    whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    step = dict(lr=0.5, streams=[4, 5], rounding="stochastic", rounding_seed=3)
    want = pk.update([whole, whole.clone()], [1, 2], [0.3, -0.4], **step)
    for rank, mesh in enumerate(meshes):
        where = pieces(rank, PLACEMENTS[name])
        local = whole[where].clone(memory_format=torch.contiguous_format)
        x = tensors.DTensor.from_local(
            local, mesh, PLACEMENTS[name], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        pk.update_([x, whole.clone()], [1, 2], [0.3, -0.4], **step)
        assert torch.equal(x.to_local(), want[0][where]), rank
        out = torch.empty_like(local)
        pk.perturb([x], 1, 0.5, streams=[4], out=[out])
        z = pk.noise(SHAPE, 1, 4)[where]
        torch.testing.assert_close(out.float(), local.float() + 0.5 * z, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_adam_and_low_rank_update_their_parts(meshes, name):
    whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    how: dict = dict(lr=0.5, streams=[4], rounding="stochastic", rounding_seed=3)
    updates = [
        partial(pk.adam_update_, seeds=[1, 2], coefs=[0.3, -0.4], **how),
        partial(pk.low_rank_update_, seeds=[1, 2], coefs=[0.3, -0.4], rank=3, **how),
    ]
    for update in updates:
        want = whole.clone()
        update([want])
        for rank, mesh in enumerate(meshes):
            where = pieces(rank, PLACEMENTS[name])
            local = whole[where].clone(memory_format=torch.contiguous_format)
            x = tensors.DTensor.from_local(
                local,
                mesh,
                PLACEMENTS[name],
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
            if "last" in name and update is updates[1]:  # no block of the matrix [10, 42]
                with pytest.raises(ValueError, match="low rank is not defined for other parts"):
                    update([x])
                continue
            update([x])
            assert torch.equal(x.to_local(), want[where]), rank


def test_placements_that_are_no_rows_are_refused(meshes):
    whole = torch.ones(SHAPE)
    for placements, shape, sentence in (
        ((Partial(), Replicate()), SHAPE, "must be placed by Shard or Replicate, got Partial"),
        ((Shard(1), Shard(2)), (10, 3, 3), r"sharded along dimensions \[1, 2\], is not rows of a"),
    ):
        local = torch.ones(shape)
        x = tensors.DTensor.from_local(
            local, meshes[0], placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
        with pytest.raises(ValueError, match=sentence):
            pk.perturb_([x], 1, 1.0, streams=[0])
        assert (local == 1).all()
    y = tensors.DTensor.from_local(torch.ones(3), meshes[0], run_check=False)
    with pytest.raises(ValueError, match="DTensors know their offset"):
        pk.perturb_([y], 1, 1.0, offset=3)
    with pytest.raises(TypeError, match="x must be a DTensor, got Tensor"):
        pk.part_of(whole)
