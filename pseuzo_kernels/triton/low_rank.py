"""The ops of `pseuzo_kernels.low_rank` as launches of the kernels in `outer`."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pseuzo_kernels import low_rank, parts, reference
from pseuzo_kernels.bits import CHUNK
from pseuzo_kernels.laws import resolve
from pseuzo_kernels.triton import launch
from pseuzo_kernels.triton.outer import add_outer_kernel, outer_factors_kernel
from pseuzo_kernels.triton.tables import Kept, blocks_of, columns_of, to_device

ROWS = 16  # of a tile
WIDE, NARROW = 512, 128  # its columns, of four warps and of one
FACTOR_BYTES = 1 << 25


class Group(NamedTuple):
    """Matrices of one dtype whose factors are made together, and whose products share a launch."""

    t: int  # one of them
    aligned: bool
    columns: int  # of a tile
    factors: Tensor  # [programs, 2]: factor, chunk
    tiles: Tensor  # [programs, 2]: tensor, tile


class Tables(NamedTuple):
    groups: list[Group]
    factors: list[Tensor]  # begins, pitches, firsts, counts, streams, sides, of 2 T factors
    tensors: list[Tensor]  # outs, xs, ms, ns, firsts, strides, lefts, rights, streams, takes
    room: int  # fp32 numbers for the factors of any group


def _tables(
    out_ptrs: tuple[int, ...],
    x_ptrs: tuple[int, ...],
    takes_ptrs: tuple[int, ...],
    shapes: tuple[tuple[int, int], ...],
    dtypes: tuple[torch.dtype, ...],
    places: tuple[parts.Part, ...],
    streams: tuple[int, ...],
    rank: int,
    R: int,
    device: torch.device,
) -> Tables:
    T = len(shapes)
    kinds: dict[tuple, list[int]] = {}
    for t, ((_, n), dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        aligned = n % 16 == out_ptrs[t] % 16 == x_ptrs[t] % 16 == 0
        kinds.setdefault((dtype, aligned, WIDE if n > 2 * NARROW else NARROW), []).append(t)
    factors: list[list[int]] = [[0] * 6 for _ in range(2 * T)]
    tensors: list[list[int]] = [[] for _ in range(T)]
    groups: list[tuple[tuple, list[int]]] = []
    room = 0
    for kind, ts in kinds.items():
        used = FACTOR_BYTES  # so that the first one begins a group
        for t in ts:
            (m, n), (row, column) = shapes[t], low_rank.corner(places[t], shapes[t][1])
            pitches = -(-m // ROWS) * ROWS, -(-n // kind[2]) * kind[2]
            if 4 * (used + R * sum(pitches)) > FACTOR_BYTES:
                groups.append((kind, []))
                used = 0
            groups[-1][1].append(t)
            begins = used, used + R * pitches[0]
            used += R * sum(pitches)
            room = max(room, used)
            stride = places[t].stride if places[t].width else n
            at = places[t].offset, stride, *begins, streams[t]
            takes = takes_ptrs[t] if takes_ptrs else 0
            tensors[t] = [out_ptrs[t], x_ptrs[t], m, n, *at, takes]
            firsts = row * rank, low_rank.RIGHT + column * rank
            for side, count in enumerate((m * rank, n * rank)):
                here = begins[side], pitches[side], firsts[side], count, streams[t], side
                factors[2 * t + side] = list(here)
    made = []
    for (_, aligned, columns), ts in groups:
        fs = [2 * t + side for t in ts for side in (0, 1)]
        touched = [factors[f][2] % CHUNK + factors[f][3] for f in fs]
        tiles = [-(-shapes[t][0] // ROWS) * -(-shapes[t][1] // columns) for t in ts]
        programs = blocks_of(touched, CHUNK, device), blocks_of(tiles, 1, device)
        for table, numbers in zip(programs, (fs, ts), strict=True):
            table[:, 0] = to_device(numbers, torch.int32, device)[table[:, 0].long()]
        made.append(Group(ts[0], aligned, columns, *programs))
    return Tables(made, columns_of(factors, device), columns_of(tensors, device), room)


def add_low_rank_out_triton(
    xs,
    seeds,
    right_seeds,
    coefs,
    rank,
    streams,
    keeps,
    factors,
    noise,
    stochastic,
    rounding_seed,
    found_inf,
    places,
    limits,
    mask_seed,
    takes,
    *,
    out,
):
    """low_rank.add_low_rank_out: two launches for each dtype, and two more for rows that do not
    begin on multiples of 16 elements, and for each FACTOR_BYTES of factors."""
    op = "add_low_rank_out"
    how = noise, stochastic, rounding_seed, found_inf, places, limits, mask_seed, takes
    largest = max((max(low_rank.sides(y.shape)) for y in out), default=0)
    if not launch.implemented(noise, op) or (limits and takes) or largest * rank >= 1 << 31:
        terms = seeds, right_seeds, coefs, rank, streams, keeps, factors
        low_rank.add_low_rank_out(xs, *terms, *how, out=out)
        return
    if not any(y.numel() for y in out):
        return
    if found_inf is not None and not any(factors):
        found_inf.masked_fill_(~coefs.isfinite().all(), 1.0)
    for x, y, factor in zip(xs, out, factors, strict=True):
        if not factor and y.data_ptr() != x.data_ptr():
            y.copy_(x)
    ts = [t for t, y in enumerate(out) if y.numel() and factors[t]]
    if not ts:
        return
    columns = xs, out, streams, keeps, factors, parts.parts_of(places, len(out))
    xs, out, streams, keeps, factors, whole = ([column[t] for t in ts] for column in columns)
    limits, takes = ([column[t] for t in ts] if column else [] for column in (limits, takes))
    device, K = out[0].device, seeds.numel()
    key = (
        launch.addresses_of(op, "out", out),
        launch.addresses_of(op, "x", xs),
        launch.addresses_of(op, "a mask", takes),
        tuple(low_rank.sides(y.shape) for y in out),
        tuple(y.dtype for y in out),
        tuple(whole),
        tuple(streams),
        rank,
        K * rank,
        device,
    )
    law = resolve(noise)[0]
    asm = launch.is_compiled()
    with launch.on_device(device):
        kept = Kept(op, device)
        tables = kept.get(("low rank", *key), partial(_tables, *key))
        of_tensors = (
            kept.numbers(keeps, torch.float32),
            kept.numbers(factors, torch.float32),
            kept.numbers(limits, torch.float32) if limits else None,
        )
        ones = coefs.new_ones(2 * K)
        both = torch.cat([seeds, right_seeds]), torch.cat([coefs, ones[:K]]), ones
        made = coefs.new_empty(tables.room)
        scale = launch.factor(law, 1.0)
        rounding_hash = reference.hash_seed(rounding_seed) if stochastic else 0
        rest = made, coefs.contiguous(), K, K * rank, rounding_hash, found_inf, mask_seed
        *of_lists, masks = tables.tensors
        shared = *of_lists, masks if takes else None
        for group in tables.groups:
            outer_factors_kernel[(len(group.factors) * K,)](
                *(made, *tables.factors, group.factors, *both, K, rank, scale),
                NOISE=law,
                ASM=asm,
                num_warps=1,
                enable_fp_fusion=False,
            )
            dtype = out[group.t].dtype
            add_outer_kernel[(len(group.tiles),)](
                *(out[group.t], *shared, group.tiles, *of_tensors, *rest),
                ROWS=ROWS,
                COLUMNS=group.columns,
                STOCHASTIC=stochastic and dtype is not torch.float32,
                ALIGNED=group.aligned,
                ASM=asm,
                num_warps=4 if group.columns == WIDE else 1,
                enable_fp_fusion=False,
            )
