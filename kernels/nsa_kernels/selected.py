# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Attention to the selected blocks in Triton, over the union of the blocks that neighbouring queries chose.

Forward and dQ: a program holds a tile of TQ neighbouring queries times the heads of a group (about 64 rows) and walks
the union of their blocks; a word per block tells which of its queries chose it. Where neighbours chose different
blocks, and the heads of one query fill a matrix product, a second launch takes each of them alone (`_walks`). dK/dV: a
program holds a block and walks the exact list of the queries that chose it, in ascending order; long lists are split
and their fp32 parts are summed in a fixed order, so that two runs give the same bits.

Symbols: see `reference.py`. L is l', NP the next power of two of n, GT the heads of a group in one tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .library import define_attention
from .triton_common import (
    LOG2E,
    NEGATIVE,
    TRITON_VERSION,
    add_dkdv,
    add_dq,
    add_pair,
    add_values,
    cdiv,
    check_inputs,
    describe,
    dot_pair,
    empty_outputs,
    empty_pair,
    like,
    load_pair,
    load_tile,
    locate,
    next_power_of_2,
    precision,
    row_delta,
    softmax_end,
    softmax_step_rows,
    softmax_weights_rows,
    split_head_dim,
    store_pair,
    tile_map,
)
from .tuning import tunable

__all__ = ["selected_attention", "selected_backward", "selected_forward"]

# Entries of a query list that one dK/dV program takes, fewer where that keeps a GPU busy; longer lists are split.
_SPLIT, _SHORT_SPLIT, _BUSY = 2048, 256, 2048
# Cells of the (block, chunk) table of one call that builds query lists; more heads than fit are taken one by one.
_MAX_CELLS = 2**28
_NO_BLOCK = tl.constexpr(2**31 - 1)
# Heads from which a program may hold one query alone, and the part of TQ·n blocks in a union above which it does.
_ALONE, _LONG = 16, 0.7


def selected_attention(
    q,
    k,
    v,
    block_indices,
    *,
    select_block_size,
    scale=None,
    leftpad=None,
    q_offset=0,
    cu_seqlens=None,
    return_weights=False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the tokens of the chosen blocks (eq. 11-12); see `reference.selected_attention`.

    Raises:
        NotImplementedError: `return_weights`, `q_offset` is a tensor, `scale` <= 0, or a dtype or head dim without a
            kernel.
    """
    if return_weights:
        raise NotImplementedError("`return_weights` is not computed by the Triton kernels; use backend='reference'.")
    scale = check_inputs(q, scale, q_offset, k=k, v=v)
    return _attention(q, k, v, block_indices, select_block_size, scale, leftpad, q_offset, cu_seqlens)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------


# Rows of a query tile: wide ones read each block for more queries, and a wide tile's program fills a multiprocessor.
_ROWS = 64


def _tiles(heads: int, num_selected: int) -> tuple[int, int]:
    """Queries TQ and heads GT of a query tile: at most `_ROWS` rows, and lists that stay cheap to sort."""
    heads = min(heads, _ROWS)
    return max(1, min(_ROWS // heads, 64, 2048 // next_power_of_2(num_selected))), heads


def _key_tile(select_block_size: int, most: int) -> int:
    """Keys of a tile: a block, or a part of one."""
    return max(16, min(most, next_power_of_2(select_block_size)))


def _shape_arguments(q, k, v, select_block_size):
    """Constants that every attention kernel takes."""
    (d_1, d_2), (dv_1, dv_2) = split_head_dim(q.shape[-1]), split_head_dim(v.shape[-1])
    return {
        "G": q.shape[2] // k.shape[2],
        "L": select_block_size,
        "D": q.shape[-1],
        "D1": d_1,
        "D2": d_2,
        "DV": v.shape[-1],
        "DV1": dv_1,
        "DV2": dv_2,
        "PRECISION": precision(q.dtype),
        "enable_fp_fusion": True,
    }


class _Unions(NamedTuple):
    """Blocks that the queries of each tile chose together, see `_union_lists`."""

    blocks: torch.Tensor
    words: torch.Tensor
    counts: torch.Tensor
    limit: int
    alone: torch.Tensor | None
    alone_counts: torch.Tensor | None


def _union_lists(block_indices, keys, layout, select_block_size, tile, heads):
    """Blocks that the queries of each tile chose together.

    Args:
        block_indices: `[B, T, H, n]`.
        keys: TK.
        tile, heads: TQ and GT.

    Returns:
        blocks: int32 `[B, H, tiles, capacity]`, ascending.
        words: int32 or int64 `[B, H, tiles, capacity + 1]`: `words[u + 1] - words[u]` has bit i set if the tile's query
            i chose block u.
        counts: int32 `[B, H, tiles]`.
        limit: Of a tile with more blocks, each query is taken alone.
        alone, alone_counts: The same for tiles of one query, of those tiles only: int32 `[B, H, tiles, n]` and `[B, H,
            tiles]`. None where no union can be so long.
    """
    B, _T, H, n = block_indices.shape
    tiles = layout.tiles(tile)
    capacity = max(1, min(tile * n, cdiv(keys, select_block_size)))
    device = block_indices.device
    blocks = torch.empty(B, H, tiles, capacity, dtype=torch.int32, device=device)
    words = torch.empty(B, H, tiles, capacity + 1, dtype=torch.int32 if tile <= 32 else torch.int64, device=device)
    counts = torch.empty(B, H, tiles, dtype=torch.int32, device=device)
    limit, alone, alone_counts = capacity, None, None
    if tile > 1 and heads >= _ALONE and capacity > int(_LONG * tile * n):
        limit = int(_LONG * tile * n)
        alone = torch.empty(B, H, layout.tiles(1), n, dtype=torch.int32, device=device)
        alone_counts = torch.empty(B, H, layout.tiles(1), dtype=torch.int32, device=device)
    rows, width = next_power_of_2(tile), next_power_of_2(n)
    _union_kernel[(tiles, H, B)](
        block_indices, blocks, words, counts, alone, alone_counts, layout.map(tile), *block_indices.stride()[:3],
        **layout.where(), TK=keys, n=n, capacity=capacity, limit=limit, tiles_alone=layout.tiles(1), TILE=tile,
        ROWS=rows, NP=width, L=select_block_size, ALONE=alone is not None,
        num_warps=max(1, min(4, rows * width // 128)),
    )  # fmt: skip
    return _Unions(blocks, words, counts, limit, alone, alone_counts)


def _walks(unions, layout, tile, config, alone_config):
    """The launches that take all tiles: those with short unions, then the queries of the others, each alone.

    Yields:
        queries of a program; blocks, words, counts and map of its lists; its other sizes; configuration.
    """
    lists = {"limit": unions.limit, "long_ptr": unions.counts, "long_tiles": unions.counts.shape[-1]}
    blocks, words, counts = unions[:3]
    yield tile, (blocks, words, counts, layout.map(tile)), {**lists, "TILE": tile, "LONG": 0}, config
    if unions.alone is not None:
        where = (unions.alone, words, unions.alone_counts, layout.map(1))
        yield 1, where, {**lists, "TILE": 1, "LONG": tile}, alone_config


def selected_forward(q, k, v, block_indices, select_block_size, scale, layout):
    """Forward pass: o and lse; `layout` describes the inputs, and `scale` is positive."""
    o, lse = empty_outputs(q, v)
    q, k, v, block_indices, b_o, b_lse = map(layout.rows, (q, k, v, block_indices, o, lse[..., None]))
    H, n = block_indices.shape[2:]
    tile, heads = _tiles(q.shape[2] // H, n)
    unions = _union_lists(block_indices, k.shape[1], layout, select_block_size, tile, heads)
    groups = cdiv(q.shape[2] // H, heads)
    wide = _forward_config(*_shape_key(q, k, v, select_block_size))
    alone = {**_alone_config(heads, q.dtype, q.shape[-1], v.shape[-1], select_block_size, keys=64), "LATE": False}
    for rows, lists, sizes, config in _walks(unions, layout, tile, wide, alone) if q.numel() else ():
        _forward_kernel[(layout.tiles(rows), H * groups, layout.B)](
            q, b_o, b_lse, *lists, *q.stride()[:3], *b_o.stride()[:3],
            *b_lse.stride()[:3], **describe("k", k, config["BLOCK_N"], packed=layout.packed),
            **describe("v", v, config["BLOCK_N"], packed=layout.packed),
            **layout.where(), TK=k.shape[1], scale=scale, H=H, capacity=lists[0].shape[-1], GT=heads,
            GROUPS=groups, **sizes, **_shape_arguments(q, k, v, select_block_size), **config,
        )  # fmt: skip
    return o, lse


def _shape_key(q, k, v, select_block_size):
    """What configurations are chosen by."""
    return q.get_device(), q.dtype, q.shape[-1], v.shape[-1], q.shape[2] // k.shape[2], select_block_size


def _alone_config(heads, dtype, D, DV, select_block_size, keys):
    """Configuration of a program that holds the heads of one query; `keys` at most in a tile."""
    if dtype == torch.float32 or max(D, DV) > 128:
        keys, warps, stages = 16, 4, 1
    else:
        warps, stages = 2, 2
    keys, rows = _key_tile(select_block_size, keys), max(16, next_power_of_2(heads))
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def _holds_part(config, *, select_block_size, **_shape):
    """Whether a tile of keys is a block, or a part of one."""
    return config["BLOCK_N"] == _key_tile(select_block_size, config["BLOCK_N"])


@tunable(
    "selected_forward",
    (_ROWS, 64, False, 4, 2), (_ROWS, 64, False, 4, 3), (_ROWS, 64, False, 4, 4), (_ROWS, 32, False, 4, 3),
    (_ROWS, 32, False, 4, 4), (_ROWS, 64, False, 8, 2), (_ROWS, 64, True, 4, 3), (_ROWS, 64, True, 4, 5),
    (_ROWS, 32, True, 4, 5), (_ROWS, 32, False, 8, 1), (_ROWS, 16, False, 8, 1), (_ROWS, 16, False, 4, 1),
    held="q", streamed="k v", accumulated="o s", valid=_holds_part,
)  # fmt: skip
def _forward_config(dtype, D, DV, G, select_block_size):
    widest = max(D, DV)
    late = dtype != torch.float32 and widest <= 128
    if dtype == torch.float32:
        keys, warps, stages = 32 if widest <= 64 else 16, 8, 1
    elif late:  # of the stages, two go to the index of a block
        keys, warps, stages = 64, 4, 5
    else:
        keys, warps, stages = 64, 4, 2
    keys = _key_tile(select_block_size, keys)
    return {"BLOCK_M": _ROWS, "BLOCK_N": keys, "LATE": late, "num_warps": warps, "num_stages": stages}


@tunable(
    "selected_dq",
    (_ROWS, 64, 4, 2), (_ROWS, 64, 4, 3), (_ROWS, 32, 4, 3), (_ROWS, 32, 8, 2), (_ROWS, 64, 8, 2), (_ROWS, 64, 8, 3),
    (_ROWS, 32, 8, 1), (_ROWS, 16, 8, 1), (_ROWS, 16, 4, 1),
    held="q o", streamed="k v", accumulated="q s s", valid=_holds_part,
)  # fmt: skip
def _dq_config(dtype, D, DV, G, select_block_size):
    widest = max(D, DV)
    if dtype == torch.float32:
        keys, warps, stages = 32 if widest <= 32 else 16, 8, 1
    else:
        keys, warps, stages = (64, 4, 2) if widest <= 128 else (32, 8, 2)
    return {"BLOCK_M": _ROWS, "BLOCK_N": _key_tile(select_block_size, keys), "num_warps": warps, "num_stages": stages}


@tunable(
    "selected_dkdv",
    (32, 64, 4, 3), (32, 64, 4, 4), (32, 64, 4, 5), (32, 32, 4, 4), (32, 64, 8, 2), (32, 64, 8, 3), (32, 32, 8, 2),
    (32, 32, 8, 1), (32, 16, 8, 1),
    held="k v", streamed="q o", accumulated="k v s s", valid=_holds_part,
)  # fmt: skip
def _dkdv_config(dtype, D, DV, G, select_block_size):
    widest = max(D, DV)
    if dtype == torch.float32:
        keys, config = 32 if widest <= 128 else 16, {"num_warps": 8, "num_stages": 1}
    elif widest <= 128:  # the rows come from all over the memory: fetch them far ahead
        # a stage more spills registers in Triton 3.6
        keys, config = 64, {"num_warps": 4, "num_stages": 5 if widest <= 96 or TRITON_VERSION >= (3, 9) else 4}
    else:
        keys, config = 64 if widest <= 192 else 32, {"num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 32, "BLOCK_N": _key_tile(select_block_size, keys), **config}


def pack_stats(lse, delta, gate=None):
    """What the backward kernels read of a row, side by side, so that a gather needs one address.

    Args:
        lse: `[..., T, HQ]`, of `selected_forward`.
        delta: fp32 `[..., T, HQ]`, of `row_delta` without the gate.
        gate: `[..., T, HQ]` or None, then 1.

    Returns:
        fp32 `[..., T, HQ, 4]`: lse in base 2, +inf for a row without a key; delta; gate; 0.
    """
    lse = torch.where(lse == float("-inf"), float("inf"), lse * LOG2E.value)
    gate = torch.ones_like(lse) if gate is None else gate.float()
    return torch.stack((lse, delta, gate, torch.zeros_like(lse)), dim=-1)


def selected_backward(do, q, k, v, block_indices, stats, select_block_size, scale, layout, *, dq=None):
    """Backward pass.

    Args:
        do: Gradient of `gate · o`.
        q, k, v, block_indices, layout, select_block_size, scale: As given to `selected_forward`.
        stats: Contiguous fp32 `[B, T, HQ, 4]`, of `pack_stats`.
        dq: Contiguous gradient of q by other branches, to which this one is added in place, or None.

    Returns:
        dq, dk, dv in the dtypes of q, k, v.
    """
    add = dq is not None
    dq = dq if add else like(q)[0]
    dk, dv = like(k, v)
    if layout.leftpad is not None:  # no block holds the padding
        dk.zero_(), dv.zero_()
    q, k, v, block_indices, do, b_dq, b_dk, b_dv = map(layout.rows, (q, k, v, block_indices, do, dq, dk, dv))
    stats = stats[None] if layout.packed else stats
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    _launch_dq(q, k, v, block_indices, do, stats, b_dq, add, layout, select_block_size, scale)
    H = k.shape[2]
    G = q.shape[2] // H
    cells = layout.B * layout.tiles(_chunk(block_indices)) * cdiv(k.shape[1], select_block_size)
    step = max(1, min(H, _MAX_CELLS // cells))
    for first in range(0, H, step):
        kv, heads = slice(first, first + step), slice(first * G, (first + step) * G)
        _launch_dkdv(
            q[:, :, heads], k[:, :, kv], v[:, :, kv], block_indices[:, :, kv], do[:, :, heads], stats[:, :, heads],
            b_dk[:, :, kv], b_dv[:, :, kv], layout, select_block_size, scale,
        )  # fmt: skip
    return dq, dk, dv


def _backward(do, dlse, q, k, v, block_indices, o, lse, *sizes):
    do = torch.zeros_like(o) if do is None else do
    stats = pack_stats(lse, row_delta(sizes[-1], o, do, dlse))
    return selected_backward(do, q, k, v, block_indices, stats, *sizes)


_attention = define_attention(
    "selected_attention",
    "q k v block_indices",
    "int select_block_size, float scale",
    "o lse",
    selected_forward,
    _backward,
    lambda q, k, v, *_: empty_outputs(q, v),
    learned=3,
    graded=2,
    kept=slice(2),
)


def _launch_dq(q, k, v, block_indices, do, stats, dq, add, layout, select_block_size, scale):
    H, n = block_indices.shape[2:]
    tile, heads = _tiles(q.shape[2] // H, n)
    unions = _union_lists(block_indices, k.shape[1], layout, select_block_size, tile, heads)
    groups = cdiv(q.shape[2] // H, heads)
    wide = _dq_config(*_shape_key(q, k, v, select_block_size))
    alone = _alone_config(heads, q.dtype, q.shape[-1], v.shape[-1], select_block_size, keys=32)
    for rows, lists, sizes, config in _walks(unions, layout, tile, wide, alone):
        _dq_kernel[(layout.tiles(rows), H * groups, layout.B)](
            q, do, stats, dq, *lists, *q.stride()[:3], *do.stride()[:3], *stats.stride()[:2], *dq.stride()[:3],
            **describe("k", k, config["BLOCK_N"], packed=layout.packed),
            **describe("v", v, config["BLOCK_N"], packed=layout.packed), **layout.where(), TK=k.shape[1], scale=scale,
            H=H, capacity=lists[0].shape[-1], GT=heads, GROUPS=groups, ADD=add, **sizes,
            **_shape_arguments(q, k, v, select_block_size), **config,
        )  # fmt: skip


def _chunk(block_indices):
    """Queries of a chunk when query lists are built: about a thousand entries, sorted at once."""
    return max(1, min(64, 1024 // next_power_of_2(block_indices.shape[-1])))


def _query_lists(block_indices, keys, layout, select_block_size):
    """For each block the queries that chose it, in ascending order.

    Returns:
        queries: int32 `[B · T · H · n]`, queries counted inside their sequence.
        bounds: int32 `[B · H, blocks + 1]`, block i of row b and head h owns `queries[bounds[b·H + h, i] :
            bounds[b·H + h, i + 1]]`. Packed sequences number blocks like tiles, see `tile_map`.
    """
    B, T, H, n = block_indices.shape
    chunk = _chunk(block_indices)
    chunks = layout.tiles(chunk)
    blocks = layout.tiles(select_block_size) if layout.packed else cdiv(keys, select_block_size)
    width = next_power_of_2(n)
    device = block_indices.device
    entries = torch.empty(B, H, chunks, chunk * width, dtype=torch.int32, device=device)
    table = torch.zeros(B * H * blocks * chunks, dtype=torch.int32, device=device)
    queries = torch.empty(B * T * H * n, dtype=torch.int32, device=device)
    where, chunk_map = layout.where(), layout.map(chunk)
    sizes = {"blocks": blocks, "CHUNK": chunk, "ROWS": next_power_of_2(chunk), "NP": width}
    sizes["L"] = select_block_size
    warps = max(1, min(4, chunk * width // 128))
    _count_kernel[(chunks, H, B)](
        block_indices, entries, table, chunk_map, *block_indices.stride()[:3], **where, TK=keys, n=n, **sizes,
        num_warps=warps,
    )  # fmt: skip
    ends = torch.zeros(table.numel() + 1, dtype=torch.int32, device=device)
    torch.cumsum(table, 0, dtype=torch.int32, out=ends[1:])
    _list_kernel[(chunks, H, B)](entries, ends, queries, chunk_map, **where, **sizes, num_warps=warps)
    bounds = ends.as_strided((B * H, blocks + 1), (blocks * chunks, chunks))
    return queries, bounds


def _launch_dkdv(q, k, v, block_indices, do, stats, dk, dv, layout, select_block_size, scale):
    B, T, H, n = block_indices.shape
    queries, bounds = _query_lists(block_indices, k.shape[1], layout, select_block_size)
    split = min(_SPLIT, max(_SHORT_SPLIT, next_power_of_2(B * H * T * n // _BUSY)))
    split = max(split, next_power_of_2(T) // 32)  # bounds the memory for parts
    parts = tile_map(bounds, split, T * n)  # [B · H, programs, 2]: block, first entry
    config = _dkdv_config(*_shape_key(q, k, v, select_block_size))
    subs = cdiv(select_block_size, config["BLOCK_N"])
    # a list longer than `split` owns 2 · (length // split) slots or more
    slots = 2 * (T * n // split) if split < T else 0
    part_k = torch.empty(B * H, slots, select_block_size, k.shape[-1], dtype=torch.float32, device=k.device)
    part_v = torch.empty(B * H, slots, select_block_size, v.shape[-1], dtype=torch.float32, device=v.device)
    block_map = layout.map(select_block_size)
    shapes = _shape_arguments(q, k, v, select_block_size)
    _dkdv_kernel[(parts.shape[1] * subs, H, B)](
        q, k, v, do, stats, dk, dv, part_k, part_v, queries, bounds, parts, block_map, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *stats.stride()[:2], *dk.stride()[:3], *dv.stride()[:3],
        *bounds.stride(), **layout.where(), TK=k.shape[1], scale=scale, programs=parts.shape[1], slots=slots,
        SPLIT=split, SUBS=subs, **shapes, **config,
    )  # fmt: skip
    if slots:
        names = ("L", "D", "D1", "D2", "DV", "DV1", "DV2")
        _sum_parts_kernel[(bounds.shape[1] - 1, H, B)](
            part_k, part_v, dk, dv, bounds, block_map, *dk.stride()[:3], *dv.stride()[:3], *bounds.stride(),
            **layout.where(), TK=k.shape[1], slots=slots, SPLIT=split, BLOCK_N=16,
            **{name: shapes[name] for name in names}, num_warps=4,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Lists
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _sorted_choices(
    idx_ptr, stride_it, start, rows, pos0, keys, n, TILE: tl.constexpr, ROWS: tl.constexpr, NP: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """Choices of a tile's queries as sorted codes `block · ROWS + query`; what is no choice comes last, as _NO_BLOCK.

    Returns:
        code: `[ROWS · NP]`.
        block: Block of each code.
        new: Whether the code differs from the one before it: a choice, counted once.
        first: Whether it is the block's first.
    """
    i_q = tl.arange(0, ROWS)[:, None]
    i_n = tl.arange(0, NP)[None, :]
    t = start + i_q
    inside = (i_q < TILE) & (t < rows) & (i_n < n)
    block = tl.load(idx_ptr + t.to(tl.int64) * stride_it + i_n, mask=inside, other=-1).to(tl.int32)
    last = tl.minimum(pos0 + t, keys - 1)  # a block that starts behind it holds no key of this query
    chosen = inside & (block >= 0) & (block <= last // L) & (last >= 0)
    code = tl.where(chosen, block * ROWS + i_q, _NO_BLOCK)
    code = tl.sort(tl.reshape(code, [ROWS * NP]))
    i = tl.arange(0, ROWS * NP)
    before = tl.gather(code, tl.maximum(i - 1, 0), 0)
    new = (code != _NO_BLOCK) & ((i == 0) | (code != before))
    block = code // ROWS
    first = new & ((i == 0) | (block != before // ROWS))
    return code, block, new, first


@triton.jit(do_not_specialize=["T", "TK", "q_offset", "capacity", "n", "limit", "tiles_alone"])
def _union_kernel(
    idx_ptr, blocks_ptr, words_ptr, counts_ptr, alone_ptr, alone_counts_ptr, map_ptr, stride_ib, stride_it, stride_ih,
    cu_ptr, leftpad_ptr, T, q_offset, PACKED: tl.constexpr, LEFTPAD: tl.constexpr, TK, n, capacity, limit, tiles_alone,
    TILE: tl.constexpr, ROWS: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Union of the blocks that a tile's queries chose, see `_union_lists`.

    Grid: (tiles, H, B)
    """
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, start, rows, row0, pos0, pad = locate(
        i_tile, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, TILE, PACKED, LEFTPAD
    )
    keys = rows if PACKED else TK - pad
    idx_ptr += i_b.to(tl.int64) * stride_ib + row0 * stride_it + i_h * stride_ih
    code, block, new, first = _sorted_choices(idx_ptr, stride_it, start, rows, pos0, keys, n, TILE, ROWS, NP, L)

    i_list = (i_b * tl.num_programs(1) + i_h).to(tl.int64) * tl.num_programs(0) + i_tile
    blocks_ptr += i_list * capacity
    words_ptr += i_list * (capacity + 1)
    slot = tl.cumsum(first.to(tl.int32), 0) - 1
    count = tl.sum(first.to(tl.int32), 0)
    one = tl.full([ROWS * NP], 1, dtype=words_ptr.dtype.element_ty)
    bit = tl.where(new, one << (code % ROWS).to(one.dtype), 0)  # distinct bits of one block: their sum is their union
    total = tl.cumsum(bit, 0)
    tl.store(blocks_ptr + slot, block, mask=first)
    tl.store(words_ptr + slot, total - bit, mask=first)
    # 32 bits add up to a word that wraps around, as the cumulative sums do
    tl.store(words_ptr + count, tl.sum(bit.to(tl.int64), 0).to(one.dtype))
    tl.store(counts_ptr + i_list, count)
    if ALONE:
        i_list = (i_b * tl.num_programs(1) + i_h).to(tl.int64) * tiles_alone
        _list_alone(
            code, block, new, count > limit, start, rows, seq, alone_ptr + i_list * n, alone_counts_ptr + i_list, n,
            cu_ptr, TILE, ROWS, PACKED,
        )  # fmt: skip


@triton.jit
def _list_alone(
    code, block, new, wanted, start, rows, seq, alone_ptr, counts_ptr, n, cu_ptr, TILE: tl.constexpr,
    ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """List the blocks of each of a tile's queries, if they are wanted."""
    if wanted:
        for i_q in tl.static_range(TILE):
            own = new & (code % ROWS == i_q)
            row = _block_row(start + i_q, cu_ptr, seq, 1, PACKED)
            place = tl.cumsum(own.to(tl.int32), 0) - 1
            tl.store(alone_ptr + row.to(tl.int64) * n + place, block, mask=own)
            tl.store(counts_ptr + row, tl.sum(own.to(tl.int32), 0), mask=start + i_q < rows)


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _ranks(new, first):
    """Number of earlier choices of the same block in the tile."""
    i = tl.cumsum(new.to(tl.int32), 0) - 1
    return i - tl.associative_scan(tl.where(first, i, 0), 0, _maximum)


@triton.jit(do_not_specialize=["T", "TK", "q_offset", "blocks", "n"])
def _count_kernel(
    idx_ptr, entries_ptr, table_ptr, map_ptr, stride_ib, stride_it, stride_ih, cu_ptr, leftpad_ptr, T, q_offset,
    PACKED: tl.constexpr, LEFTPAD: tl.constexpr, TK, n, blocks, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    NP: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Sort the choices of a chunk of queries and count them: `table[b, h, block, chunk]`.

    Grid: (chunks, H, B)
    """
    i_chunk, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, start, rows, row0, pos0, pad = locate(
        i_chunk, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, CHUNK, PACKED, LEFTPAD
    )
    keys = rows if PACKED else TK - pad
    idx_ptr += i_b.to(tl.int64) * stride_ib + row0 * stride_it + i_h * stride_ih
    code, block, new, first = _sorted_choices(idx_ptr, stride_it, start, rows, pos0, keys, n, CHUNK, ROWS, NP, L)

    i = tl.arange(0, ROWS * NP)
    chunks = tl.num_programs(0)
    i_list = (i_b * tl.num_programs(1) + i_h).to(tl.int64)
    tl.store(entries_ptr + (i_list * chunks + i_chunk) * (ROWS * NP) + i, code)
    behind = tl.gather(code, tl.minimum(i + 1, ROWS * NP - 1), 0)
    last = (code != _NO_BLOCK) & ((i == ROWS * NP - 1) | (behind // ROWS != block))
    cell = (i_list * blocks + _block_row(block, cu_ptr, seq, L, PACKED)) * chunks + i_chunk
    tl.store(table_ptr + cell, _ranks(new, first) + 1, mask=last)


@triton.jit(do_not_specialize=["T", "q_offset", "blocks"])
def _list_kernel(
    entries_ptr, ends_ptr, queries_ptr, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, PACKED: tl.constexpr,
    LEFTPAD: tl.constexpr, blocks, CHUNK: tl.constexpr, ROWS: tl.constexpr, NP: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Write the choices of a chunk where the lists of their blocks have room for them.

    Grid: (chunks, H, B)
    """
    i_chunk, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, start, _rows, _row0, _pos0, _pad = locate(
        i_chunk, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, CHUNK, PACKED, LEFTPAD
    )
    i = tl.arange(0, ROWS * NP)
    chunks = tl.num_programs(0)
    i_list = (i_b * tl.num_programs(1) + i_h).to(tl.int64)
    entries_ptr += (i_list * chunks + i_chunk) * (ROWS * NP)
    code = tl.load(entries_ptr + i)
    block = code // ROWS
    before = tl.load(entries_ptr + i - 1, mask=i > 0, other=_NO_BLOCK)
    new = (code != _NO_BLOCK) & (code != before)
    first = new & (block != before // ROWS)
    cell = (i_list * blocks + _block_row(block, cu_ptr, seq, L, PACKED)) * chunks + i_chunk
    place = tl.load(ends_ptr + cell, mask=new, other=0) + _ranks(new, first)
    tl.store(queries_ptr + place, start + code % ROWS, mask=new)


@triton.jit
def _block_row(block, cu_ptr, seq, L: tl.constexpr, PACKED: tl.constexpr):
    """Number of a block among those of all sequences of a row, as `tile_map` numbers them."""
    row = block
    if PACKED:
        row += (tl.load(cu_ptr + seq) // L + seq).to(tl.int32)
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Forward and dQ: over the union of a query tile
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _next_block(
    u, word, before, blocks_ptr, words_ptr, i_q, pos, keys, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h, key0,
    L: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, BLOCK_N: tl.constexpr,
    SUBS: tl.constexpr, MASKED: tl.constexpr, LATE: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Load part `u % SUBS` of the union's block `u // SUBS`.

    Args:
        word: `words[u // SUBS]`.
        before: First key of the part before, of which v is loaded if LATE.
        MASKED: Whether a key may lie behind a query, or behind the last key.

    Returns:
        Tiles of k and v; `[BLOCK_M]`: rows whose query chose the block; `[BLOCK_M, BLOCK_N]`: keys that exist and are
        not in a row's future, all of them unless L % BLOCK_N or MASKED; the next word and `before`.
    """
    block = tl.load(blocks_ptr + u // SUBS)
    word_next = word
    if TILE > 1:
        word_next = tl.load(words_ptr + u // SUBS + 1)
    offset = 0 if SUBS == 1 else (u % SUBS) * BLOCK_N
    offs_n = offset + tl.arange(0, BLOCK_N)
    inside = offs_n < L
    key = block * L + offs_n
    if MASKED:
        inside = inside & (key < keys)
    now = block * L + offset
    k_1, k_2 = load_tile(k_desc, k_desc2, i_b, i_h, key0, keys, now, D1, D2, PACKED)
    v_1, v_2 = load_tile(v_desc, v_desc2, i_b, i_h, key0, keys, before if LATE else now, DV1, DV2, PACKED)
    chosen = i_q == 0
    if TILE > 1:
        chosen = (((word_next - word) >> i_q.to(word.dtype)) & 1) != 0
    visible = inside[None, :] & (i_q >= 0)[:, None]
    if MASKED:
        visible = visible & (key[None, :] <= pos[:, None])
    if SUBS > 1:
        word_next = tl.where(u % SUBS == SUBS - 1, word_next, word)
    return k_1, k_2, v_1, v_2, chosen, visible, word_next, now


@triton.jit
def _is_idle(
    start, rows, i_head, seq, cu_ptr, limit, long_ptr, long_tiles, LONG: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Whether a program has no query, or one of a tile that the other launch takes.

    Args:
        i_head: Number of row and key head.
        long_ptr: int32 `[B, H, long_tiles]`, blocks of each tile of LONG queries.
        LONG: Queries of a tile whose union is too long, of which this program takes one; or 0, takes whole tiles.
    """
    idle = start >= rows
    if LONG > 0:
        i_tile = i_head * long_tiles + _block_row(start // LONG, cu_ptr, seq, LONG, PACKED)
        idle = idle | (tl.load(long_ptr + i_tile, mask=start < rows, other=0) <= limit)
    return idle


@triton.jit
def _length(counts_ptr, limit, LONG: tl.constexpr):
    """Blocks of a program's list; none where the union is too long: the launch that follows writes over the result."""
    count = tl.load(counts_ptr)
    if LONG == 0:
        count = tl.where(count > limit, 0, count)  # a return in this place would make Triton 3.6 wait for every wgmma
    return count


@triton.jit
def _query_rows(start, rows, i_h, i_g, TILE: tl.constexpr, GT: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of a query tile: query inside the tile, query head, and whether the row is used."""
    offs_m = tl.arange(0, BLOCK_M)
    i_q = offs_m // GT
    i_head = i_g * GT + offs_m % GT
    used = (i_q < TILE) & (i_head < G) & (start + i_q < rows)
    return i_q, i_h * G + i_head, used


@triton.jit(do_not_specialize=["T", "TK", "q_offset", "capacity", "limit", "long_tiles"])
def _forward_kernel(
    q_ptr, o_ptr, lse_ptr, blocks_ptr, words_ptr, counts_ptr, map_ptr, stride_qb, stride_qt, stride_qh, stride_ob,
    stride_ot, stride_oh, stride_lb, stride_lt, stride_lh, k_desc, k_desc2, v_desc, v_desc2, cu_ptr, leftpad_ptr, T,
    q_offset, PACKED: tl.constexpr, LEFTPAD: tl.constexpr, TK, scale, H, capacity, limit, long_ptr, long_tiles,
    TILE: tl.constexpr, LONG: tl.constexpr, GT: tl.constexpr, GROUPS: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries to the union of their blocks.

    Grid: (tiles, H * GROUPS, B)
    """
    i_tile, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i_h, i_g = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    seq, start, rows, row0, pos0, pad = locate(
        i_tile, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, TILE, PACKED, LEFTPAD
    )
    if _is_idle(start, rows, i_b * H + i_h, seq, cu_ptr, limit, long_ptr, long_tiles, LONG, PACKED):
        return
    keys = rows if PACKED else TK - pad
    i_q, i_head, used = _query_rows(start, rows, i_h, i_g, TILE, GT, G, BLOCK_M)
    t = row0 + start + i_q
    pos = pos0 + start + i_q
    q_1, q_2 = load_pair(q_ptr + i_b * stride_qb + t * stride_qt + i_head * stride_qh, used, D, D1, D2, True)
    key0 = row0 + pad
    i_list = (i_b * H + i_h) * tl.num_programs(0) + i_tile
    blocks_ptr += i_list * capacity
    words_ptr += i_list * (capacity + 1)
    count = _length(counts_ptr + i_list, limit, LONG)

    SUBS: tl.constexpr = (L + BLOCK_N - 1) // BLOCK_N
    TRAILING: tl.constexpr = 1 + (TILE + L - 2) // L  # blocks that may hold keys behind the tile's first query
    scale_log2 = scale * LOG2E
    m = tl.full([BLOCK_M], NEGATIVE, dtype=tl.float32)
    z = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc_1, acc_2 = empty_pair(BLOCK_M, DV1, DV2)
    word = tl.zeros([], dtype=words_ptr.dtype.element_ty)
    whole = tl.maximum(count - TRAILING, 0) * SUBS
    if LATE:
        # the product with the values of a block runs beside the softmax of the next block
        p = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        alpha = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
        before = tl.zeros([], dtype=tl.int32)
        for u in range(0, whole):
            k_1, k_2, v_1, v_2, chosen, visible, word, before = _next_block(
                u, word, before, blocks_ptr, words_ptr, i_q, pos, keys, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h,
                key0, L, D1, D2, DV1, DV2, BLOCK_N, SUBS, False, True, PACKED, TILE,
            )  # fmt: skip
            s = dot_pair(q_1, q_2, k_1, k_2, D2, PRECISION)
            acc_1, acc_2 = add_values(p, alpha, acc_1, acc_2, v_1, v_2, DV2, PRECISION)
            if L % BLOCK_N != 0:
                s = tl.where(visible, s, float("-inf"))
            p, alpha, m, z = softmax_weights_rows(s, chosen, m, z, scale_log2)
        for u in range(whole, count * SUBS):
            k_1, k_2, v_1, v_2, chosen, visible, word, before = _next_block(
                u, word, before, blocks_ptr, words_ptr, i_q, pos, keys, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h,
                key0, L, D1, D2, DV1, DV2, BLOCK_N, SUBS, True, True, PACKED, TILE,
            )  # fmt: skip
            s = dot_pair(q_1, q_2, k_1, k_2, D2, PRECISION)
            acc_1, acc_2 = add_values(p, alpha, acc_1, acc_2, v_1, v_2, DV2, PRECISION)
            s = tl.where(visible, s, float("-inf"))
            p, alpha, m, z = softmax_weights_rows(s, chosen, m, z, scale_log2)
        v_1, v_2 = load_tile(v_desc, v_desc2, i_b, i_h, key0, keys, before, DV1, DV2, PACKED)
        acc_1, acc_2 = add_values(p, alpha, acc_1, acc_2, v_1, v_2, DV2, PRECISION)
    else:
        for u in range(0, whole):
            k_1, k_2, v_1, v_2, chosen, visible, word, _ = _next_block(
                u, word, 0, blocks_ptr, words_ptr, i_q, pos, keys, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h,
                key0, L, D1, D2, DV1, DV2, BLOCK_N, SUBS, False, False, PACKED, TILE,
            )  # fmt: skip
            s = dot_pair(q_1, q_2, k_1, k_2, D2, PRECISION)
            if L % BLOCK_N != 0:
                s = tl.where(visible, s, float("-inf"))
            m, z, acc_1, acc_2 = softmax_step_rows(
                s, chosen, m, z, acc_1, acc_2, v_1, v_2, scale_log2, DV2, PRECISION
            )  # fmt: skip
        for u in range(whole, count * SUBS):
            k_1, k_2, v_1, v_2, chosen, visible, word, _ = _next_block(
                u, word, 0, blocks_ptr, words_ptr, i_q, pos, keys, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h,
                key0, L, D1, D2, DV1, DV2, BLOCK_N, SUBS, True, False, PACKED, TILE,
            )  # fmt: skip
            s = dot_pair(q_1, q_2, k_1, k_2, D2, PRECISION)
            s = tl.where(visible, s, float("-inf"))
            m, z, acc_1, acc_2 = softmax_step_rows(
                s, chosen, m, z, acc_1, acc_2, v_1, v_2, scale_log2, DV2, PRECISION
            )  # fmt: skip
    acc_1, acc_2, lse = softmax_end(m, z, acc_1, acc_2, scale_log2, DV2)
    store_pair(o_ptr + i_b * stride_ob + t * stride_ot + i_head * stride_oh, acc_1, acc_2, used, DV, DV1, DV2)
    tl.store(lse_ptr + i_b * stride_lb + t * stride_lt + i_head * stride_lh, lse, mask=used)


@triton.jit(do_not_specialize=["T", "TK", "q_offset", "capacity", "limit", "long_tiles"])
def _dq_kernel(
    q_ptr, do_ptr, stats_ptr, dq_ptr, blocks_ptr, words_ptr, counts_ptr, map_ptr, stride_qb, stride_qt, stride_qh,
    stride_dob, stride_dot, stride_doh, stride_sb, stride_st, stride_dqb, stride_dqt, stride_dqh, k_desc, k_desc2,
    v_desc, v_desc2, cu_ptr, leftpad_ptr, T, q_offset, PACKED: tl.constexpr, LEFTPAD: tl.constexpr, TK, scale, H,
    capacity, limit, long_ptr, long_tiles, TILE: tl.constexpr, LONG: tl.constexpr, GT: tl.constexpr,
    GROUPS: tl.constexpr, ADD: tl.constexpr, G: tl.constexpr, L: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, added to what is there if ADD.

    Grid: (tiles, H * GROUPS, B)
    """
    i_tile, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i_h, i_g = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    seq, start, rows, row0, pos0, pad = locate(
        i_tile, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, TILE, PACKED, LEFTPAD
    )
    if _is_idle(start, rows, i_b * H + i_h, seq, cu_ptr, limit, long_ptr, long_tiles, LONG, PACKED):
        return
    keys = rows if PACKED else TK - pad
    i_q, i_head, used = _query_rows(start, rows, i_h, i_g, TILE, GT, G, BLOCK_M)
    t = row0 + start + i_q
    pos = pos0 + start + i_q
    q_1, q_2 = load_pair(q_ptr + i_b * stride_qb + t * stride_qt + i_head * stride_qh, used, D, D1, D2, True)
    do_ptrs = do_ptr + i_b * stride_dob + t * stride_dot + i_head * stride_doh
    do_1, do_2 = load_pair(do_ptrs, used, DV, DV1, DV2, True)
    stats_ptr += i_b * stride_sb + t * stride_st + i_head * 4
    lse_log2 = tl.load(stats_ptr, mask=used, other=float("inf"))
    delta = tl.load(stats_ptr + 1, mask=used, other=0.0)
    gate = tl.load(stats_ptr + 2, mask=used, other=0.0)
    key0 = row0 + pad
    i_list = (i_b * H + i_h) * tl.num_programs(0) + i_tile
    blocks_ptr += i_list * capacity
    words_ptr += i_list * (capacity + 1)
    count = _length(counts_ptr + i_list, limit, LONG)

    SUBS: tl.constexpr = (L + BLOCK_N - 1) // BLOCK_N
    TRAILING: tl.constexpr = 1 + (TILE + L - 2) // L
    scale_log2 = scale * LOG2E
    acc_1, acc_2 = empty_pair(BLOCK_M, D1, D2)
    word = tl.zeros([], dtype=words_ptr.dtype.element_ty)
    whole = tl.maximum(count - TRAILING, 0) * SUBS
    for u in range(0, whole):
        k_1, k_2, v_1, v_2, chosen, visible, word, _ = _next_block(
            u, word, 0, blocks_ptr, words_ptr, i_q, pos, keys, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h,
            key0, L, D1, D2, DV1, DV2, BLOCK_N, SUBS, False, False, PACKED, TILE,
        )  # fmt: skip
        acc_1, acc_2 = add_dq(
            acc_1, acc_2, q_1, q_2, do_1, do_2, k_1, k_2, v_1, v_2, visible, tl.where(chosen, lse_log2, float("inf")),
            delta, gate, scale_log2, D2, DV2, True, L % BLOCK_N != 0, PRECISION,
        )  # fmt: skip
    for u in range(whole, count * SUBS):
        k_1, k_2, v_1, v_2, chosen, visible, word, _ = _next_block(
            u, word, 0, blocks_ptr, words_ptr, i_q, pos, keys, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h,
            key0, L, D1, D2, DV1, DV2, BLOCK_N, SUBS, True, False, PACKED, TILE,
        )  # fmt: skip
        acc_1, acc_2 = add_dq(
            acc_1, acc_2, q_1, q_2, do_1, do_2, k_1, k_2, v_1, v_2, visible, tl.where(chosen, lse_log2, float("inf")),
            delta, gate, scale_log2, D2, DV2, True, True, PRECISION,
        )  # fmt: skip
    acc_1 *= scale
    if D2 > 0:
        acc_2 *= scale
    dq_ptrs = dq_ptr + i_b * stride_dqb + t * stride_dqt + i_head * stride_dqh
    if ADD:
        add_pair(dq_ptrs, acc_1, acc_2, used, D, D1, D2)
    else:
        store_pair(dq_ptrs, acc_1, acc_2, used, D, D1, D2)


# ---------------------------------------------------------------------------------------------------------------------
# dK, dV: over the queries that chose a block
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _dkdv_step(
    r, row_end, queries_ptr, key, k_1, k_2, v_1, v_2, dk_1, dk_2, dv_1, dv_2, q_ptr, do_ptr, stats_ptr, stride_qt,
    stride_qh, stride_dot, stride_doh, stride_st, scale_log2, G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the rows `r … r + BLOCK_M - 1` (entry · G + head) of a query list to dk and dv.

    Args:
        key: `[N]`, keys as the list counts queries.
    """
    row = r + tl.arange(0, BLOCK_M)
    used = row < row_end
    query = tl.load(queries_ptr + row // G, mask=used, other=0)
    head = row % G
    t = query.to(tl.int64)
    q_1, q_2 = load_pair(q_ptr + t * stride_qt + head * stride_qh, used, D, D1, D2, False)
    do_1, do_2 = load_pair(do_ptr + t * stride_dot + head * stride_doh, used, DV, DV1, DV2, False)
    stat = query * stride_st + head * 4  # int32: a register per column
    lse_log2 = tl.load(stats_ptr + stat)
    delta = tl.load(stats_ptr + stat + 1)
    gate = tl.load(stats_ptr + stat + 2)
    visible = key[:, None] <= tl.where(used, query, -(2**30))[None, :]
    return add_dkdv(
        dk_1, dk_2, dv_1, dv_2, k_1, k_2, v_1, v_2, q_1, q_2, do_1, do_2, visible, lse_log2, delta, gate, scale_log2,
        D2, DV2, True, True, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "TK", "q_offset", "programs", "slots", "SPLIT"])
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, dk_ptr, dv_ptr, part_k_ptr, part_v_ptr, queries_ptr, bounds_ptr,
    parts_ptr, map_ptr, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb,
    stride_vt, stride_vh, stride_dob, stride_dot, stride_doh, stride_sb, stride_st, stride_dkb, stride_dkt, stride_dkh,
    stride_dvb, stride_dvt, stride_dvh, stride_cr, stride_cb, cu_ptr, leftpad_ptr, T, q_offset, PACKED: tl.constexpr,
    LEFTPAD: tl.constexpr, TK, scale, programs, slots, SPLIT, SUBS: tl.constexpr,
    G: tl.constexpr, L: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
    DV1: tl.constexpr, DV2: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys from at most SPLIT queries of its block's list: final, or one part of a long list.

    Grid: (programs * SUBS, H, B)
    """
    i_part, i_sub = tl.program_id(0) // SUBS, tl.program_id(0) % SUBS
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_list = i_b * tl.num_programs(1) + i_h
    parts_ptr += (i_list * programs + i_part) * 2
    i_block = tl.load(parts_ptr)
    begin = tl.load(parts_ptr + 1)
    bounds_ptr += i_list * stride_cr
    base = tl.load(bounds_ptr)
    first = tl.load(bounds_ptr + i_block.to(tl.int64) * stride_cb)
    length = tl.load(bounds_ptr + (i_block + 1).to(tl.int64) * stride_cb) - first
    if (begin > 0) & (begin >= length):
        return
    _seq, start, rows, row0, pos0, pad = locate(
        i_block, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, L, PACKED, LEFTPAD
    )
    keys = rows if PACKED else TK - pad
    if start >= keys:
        return
    offs_n = i_sub * BLOCK_N + tl.arange(0, BLOCK_N)
    key = start + offs_n
    inside = (offs_n < L) & (key < keys)
    t_key = row0 + pad + key
    k_1, k_2 = load_pair(k_ptr + i_b * stride_kb + i_h * stride_kh + t_key * stride_kt, inside, D, D1, D2, True)
    v_1, v_2 = load_pair(v_ptr + i_b * stride_vb + i_h * stride_vh + t_key * stride_vt, inside, DV, DV1, DV2, True)
    q_ptr += i_b * stride_qb + row0 * stride_qt + i_h * G * stride_qh
    do_ptr += i_b * stride_dob + row0 * stride_dot + i_h * G * stride_doh
    stats_ptr += i_b * stride_sb + row0 * stride_st + i_h * G * 4
    queries_ptr += first + begin

    scale_log2 = scale * LOG2E
    dk_1, dk_2 = empty_pair(BLOCK_N, D1, D2)
    dv_1, dv_2 = empty_pair(BLOCK_N, DV1, DV2)
    row_end = tl.minimum(length - begin, SPLIT) * G
    # One loop with a mask, though only queries inside the block, the first of its list, see a part of it: between two
    # loops ptxas would run the products one by one.
    for r in range(0, row_end, BLOCK_M):
        dk_1, dk_2, dv_1, dv_2 = _dkdv_step(
            r, row_end, queries_ptr, key - pos0, k_1, k_2, v_1, v_2, dk_1, dk_2, dv_1, dv_2, q_ptr, do_ptr, stats_ptr,
            stride_qt, stride_qh, stride_dot, stride_doh, stride_st, scale_log2, G, D, D1, D2, DV, DV1, DV2,
            PRECISION, BLOCK_M,
        )  # fmt: skip
    dk_1 *= scale
    if D2 > 0:
        dk_2 *= scale
    if length > SPLIT:
        slot = 2 * ((first - base) // SPLIT) + begin // SPLIT
        row = (i_list * slots + slot) * L + offs_n
        store_pair(part_k_ptr + row * D, dk_1, dk_2, inside, D, D1, D2)
        store_pair(part_v_ptr + row * DV, dv_1, dv_2, inside, DV, DV1, DV2)
    else:
        store_pair(dk_ptr + i_b * stride_dkb + i_h * stride_dkh + t_key * stride_dkt, dk_1, dk_2, inside, D, D1, D2)
        store_pair(dv_ptr + i_b * stride_dvb + i_h * stride_dvh + t_key * stride_dvt, dv_1, dv_2, inside, DV, DV1, DV2)


@triton.jit(do_not_specialize=["T", "TK", "q_offset", "slots", "SPLIT"])
def _sum_parts_kernel(
    part_k_ptr, part_v_ptr, dk_ptr, dv_ptr, bounds_ptr, map_ptr, stride_dkb, stride_dkt, stride_dkh, stride_dvb,
    stride_dvt, stride_dvh, stride_cr, stride_cb, cu_ptr, leftpad_ptr, T, q_offset, PACKED: tl.constexpr,
    LEFTPAD: tl.constexpr, TK, slots, SPLIT, BLOCK_N: tl.constexpr, L: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
):  # fmt: skip
    """Sum the parts of a long list in ascending order.

    Grid: (blocks, H, B)
    """
    i_block, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_list = i_b * tl.num_programs(1) + i_h
    bounds_ptr += i_list * stride_cr
    base = tl.load(bounds_ptr)
    first = tl.load(bounds_ptr + i_block.to(tl.int64) * stride_cb)
    length = tl.load(bounds_ptr + (i_block + 1).to(tl.int64) * stride_cb) - first
    if length <= SPLIT:
        return
    _seq, start, rows, row0, _pos0, pad = locate(
        i_block, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, L, PACKED, LEFTPAD
    )
    keys = rows if PACKED else TK - pad
    slot = i_list * slots + 2 * ((first - base) // SPLIT)
    for offset in range(0, L, BLOCK_N):
        offs_n = offset + tl.arange(0, BLOCK_N)
        inside = (offs_n < L) & (start + offs_n < keys)
        dk_1, dk_2 = empty_pair(BLOCK_N, D1, D2)
        dv_1, dv_2 = empty_pair(BLOCK_N, DV1, DV2)
        for part in range(0, tl.cdiv(length, SPLIT)):
            row = (slot + part) * L + offs_n
            x_1, x_2 = load_pair(part_k_ptr + row * D, inside, D, D1, D2, True)
            dk_1 += x_1
            if D2 > 0:
                dk_2 += x_2
            x_1, x_2 = load_pair(part_v_ptr + row * DV, inside, DV, DV1, DV2, True)
            dv_1 += x_1
            if DV2 > 0:
                dv_2 += x_2
        t_key = row0 + pad + start + offs_n
        store_pair(dk_ptr + i_b * stride_dkb + i_h * stride_dkh + t_key * stride_dkt, dk_1, dk_2, inside, D, D1, D2)
        store_pair(dv_ptr + i_b * stride_dvb + i_h * stride_dvh + t_key * stride_dvt, dv_1, dv_2, inside, DV, DV1, DV2)
