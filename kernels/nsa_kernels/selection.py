# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Importance and top-n in Triton: `reference.select_blocks`.

Two kernels work through the queries in chunks, so that the scores between them stay small and in cache. The first
recomputes the probabilities of a tile of queries and compressed blocks, sums them over the heads of a group while the
keys stay in place, and folds them into importances (eq. 8-10). The second finds the n-th best importance of a row by
bisection over the bits of the floats, which is exact, needs no sort and finds equals: of those the smaller index wins.
"""

import torch
import triton
import triton.language as tl

from .compressed import cu_blocks, head_dims, locate_blocks, strides, visible_blocks
from .library import WHERE, define
from .triton_common import (
    LOG2E,
    Layout,
    cdiv,
    check_inputs,
    describe,
    dot_pair,
    interpreted,
    load_pair,
    load_tile,
    locate,
    next_power_of_2,
    precision,
)
from .tuning import tunable

__all__ = ["select_blocks"]

# Importances held at once, in elements: 64 MB of fp32, about what the L2 cache of a large GPU holds.
_MAX_SCORES = 2**24
# Widest row of importances that the second kernel holds in registers; longer rows are read again and again.
_MAX_WIDTH = 1024
# Arguments that change with the number of tokens: a kernel is not compiled anew for each kind of value.
_VARYING = ["T", "C", "q_offset", "row_tiles", "S", "first_tile", "first_head", "stride_lb", "stride_lh"]


def select_blocks(
    q,
    k_cmp,
    lse,
    *,
    num_blocks=None,
    compress_block_size,
    compress_stride,
    select_block_size,
    num_selected_blocks,
    num_initial_blocks=1,
    num_local_blocks=2,
    scale=None,
    leftpad=None,
    q_offset=0,
    cu_seqlens=None,
) -> torch.Tensor:
    """Choose blocks by their importance (eq. 8-11), as the reference does, equals included; no gradient.

    Args:
        q: `[B, T, HQ, D]`, k_cmp: `[B, C, H, D]`; bf16, fp16 or fp32.
        lse: fp32 `[B, T, HQ]`, of `compressed_attention`.
        num_blocks: S, needed unless packed: number of blocks of l' slots that cover the keys.
        scale: Factor of the scores, > 0, default `D ** -0.5`.
        leftpad, q_offset, cu_seqlens: As for the reference; `q_offset` is an int.

    Returns:
        block_indices, int32 `[B, T, H, n]` (packed: `[T, H, n]`), ascending, padded with -1.

    Raises:
        ValueError: `num_blocks` is missing, or too small for the queries.
        NotImplementedError: `q_offset` is a tensor, `scale` <= 0, a dtype or head dim without a kernel, or compression
            blocks that overlap more selection blocks than a tile holds.
    """
    scale = check_inputs(q, scale, q_offset, k_cmp=k_cmp)
    S = _num_blocks(q, num_blocks, select_block_size, q_offset, cu_seqlens)
    sizes = (compress_block_size, compress_stride, select_block_size, num_selected_blocks)
    sizes += (num_initial_blocks, num_local_blocks, scale)
    with torch.no_grad():
        return _operation(q, k_cmp, lse, S, *sizes, leftpad, q_offset, cu_seqlens)


def chosen_blocks(
    q,
    k_cmp,
    lse,
    S,
    compress_block_size,
    compress_stride,
    select_block_size,
    num_selected_blocks,
    num_initial_blocks,
    num_local_blocks,
    scale,
    layout,
):
    """Launch the kernels of `select_blocks` for S blocks."""
    block_indices = empty_choice(q, k_cmp, num_selected_blocks)
    q, k, lse, out = layout.rows(q), layout.rows(k_cmp), lse[None] if layout.packed else lse, layout.rows(block_indices)
    H, free = k.shape[2], num_selected_blocks - num_initial_blocks - num_local_blocks
    if not out.numel():
        return block_indices

    config = _score_config(
        q.get_device(), q.dtype, q.shape[-1], q.shape[2] // H, compress_block_size, compress_stride, select_block_size
    )
    rows = 32 if interpreted() else 1  # one row a warp is fastest on a GPU, many at once in the interpreter
    narrowest = 64 if q.dtype == torch.float32 and q.shape[-1] > 128 else 128  # what shared memory holds
    fold = fold_sizes(compress_block_size, compress_stride, select_block_size, narrowest)
    tile = config["BLOCK_M"]
    row_tiles = layout.tiles(tile)
    tiles = layout.B * row_tiles
    heads = max(1, min(H, _MAX_SCORES // (tile * S)))
    chunk = max(1, min(tiles, _MAX_SCORES // (tile * S * heads)))
    padded = 16 * cdiv(S, 16)  # rows start where 16-byte loads can
    scores = torch.empty(chunk * tile, heads, padded, dtype=torch.float32, device=q.device)
    cu_k = cu_blocks(layout, compress_block_size, compress_stride)
    where = {"map_ptr": layout.map(tile), **layout.where(), "row_tiles": row_tiles, "S": S}
    forced = {
        "BLOCKS": select_block_size,
        "N": num_selected_blocks,
        "INITIAL": num_initial_blocks,
        "LOCAL": num_local_blocks,
    }
    C = k.shape[1]
    k = k if C else k.new_zeros(layout.B, 1, H, k.shape[-1])  # a descriptor needs something to describe
    described = {**describe("q", q, tile), **describe("k", k, fold["BLOCK_N"])}
    for first_head in range(0, H, heads):
        count = min(heads, H - first_head)
        for first in range(0, tiles, chunk):
            size = min(chunk, tiles - first)
            last = _last_block(layout, first, size, row_tiles, tile, select_block_size, S)
            where |= {"first_tile": first, "first_head": first_head}
            if free and last >= num_selected_blocks:
                _score_kernel[(cdiv(last + 1, fold["OUT"]), size, count)](
                    k, lse, scores, *strides(k, lse), *scores.stride()[:2], **described,
                    cu_k_ptr=cu_k, C=C, scale=scale, G=q.shape[2] // H, **where, **head_dims(q, "D"),
                    SIZE=compress_block_size, STRIDE=compress_stride, PRECISION=precision(q.dtype),
                    **fold, **forced, **config,
                )  # fmt: skip
            width = next((x for x in (128, 256, 512, _MAX_WIDTH) if last < x), _MAX_WIDTH)
            _topn_kernel[(tile // rows, size, count)](
                scores, out, *scores.stride()[:2], *out.stride()[:3], **where, **forced, TILE=tile, ROWS=rows,
                WIDTH=width, HELD=last < width, WIDTH_OUT=next_power_of_2(num_selected_blocks), num_warps=1,
            )  # fmt: skip
    return block_indices


def empty_choice(q, k_cmp, num_selected_blocks):
    """Room for block_indices."""
    shape = (*q.shape[:-2], k_cmp.shape[-2], num_selected_blocks)
    return torch.empty(shape, dtype=torch.int32, device=q.device)


_operation = define(
    "select_blocks(Tensor q, Tensor k_cmp, Tensor lse, SymInt num_blocks, int compress_block_size, "
    "int compress_stride, int select_block_size, int num_selected_blocks, int num_initial_blocks, "
    "int num_local_blocks, float scale, "
    f"{WHERE}) -> Tensor",
    lambda *args: chosen_blocks(*args[:-3], Layout(args[0], *args[-3:])),
    lambda q, k_cmp, *rest: empty_choice(q, k_cmp, rest[5]),
)


def _num_blocks(q, num_blocks, select_block_size, q_offset, cu_seqlens):
    """Number of selectable blocks, or an upper bound if packed."""
    if cu_seqlens is not None:
        return cdiv(q.shape[0], select_block_size)
    if num_blocks is None:
        raise ValueError("`num_blocks` is required for sequences that are not packed, got None.")
    needed = cdiv(q_offset + q.shape[1], select_block_size)
    if num_blocks < needed:
        raise ValueError(f"`num_blocks` must cover the queries' own blocks, at least {needed}, got {num_blocks}.")
    return num_blocks


def _last_block(layout, first, size, row_tiles, tile, select_block_size, S):
    """The last block that any query of the tiles `first … first + size - 1` can see."""
    if first // row_tiles != (first + size - 1) // row_tiles:
        return S - 1
    stop = min((first % row_tiles + size) * tile, layout.T)  # packed: a token's position is below tile · (its tile + 1)
    return min(S - 1, (layout.q_offset + stop - 1) // select_block_size)


def fold_sizes(compress_block_size, compress_stride, select_block_size, narrowest=128):
    """How a tile of at least `narrowest` compressed blocks becomes a row of importances.

    Returns:
        RATIO: Compressed blocks that start in a selectable block. COLUMNS: its next power of two.
        HALO: Selectable blocks before its own that a compressed block can end in.
        BLOCK_N: Compressed blocks of a tile. OUT: Importances of a tile, without the halo.
    """
    ratio = select_block_size // compress_stride
    columns = next_power_of_2(ratio)
    halo = cdiv(compress_block_size // compress_stride - 1, ratio)
    for block in (16, 32, 64, 128, 256):
        if block >= narrowest and block // columns > halo:
            out = block // columns - halo
            return {"RATIO": ratio, "COLUMNS": columns, "HALO": halo, "BLOCK_N": block, "OUT": out}
    raise NotImplementedError(
        "`compress_block_size` and `select_block_size` must be at most about 128 strides for the Triton kernels, got "
        f"compress_block_size={compress_block_size}, select_block_size={select_block_size} and "
        f"compress_stride={compress_stride}; use backend='reference'."
    )


@tunable(
    "scores",
    (64, 4, 2), (64, 4, 3), (64, 8, 2), (32, 4, 2), (128, 8, 2), (32, 8, 1), (32, 4, 1),
    held="k", streamed="q", accumulated="s s",
)  # fmt: skip
def _score_config(dtype, D, G, compress_block_size, compress_stride, select_block_size):
    """Tiles of the kernel that computes importances; BLOCK_N comes from `fold_sizes`."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_M": 64, "num_warps": 4 if D <= 128 else 8, "num_stages": 2}


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_VARYING)
def _score_kernel(
    k_ptr, lse_ptr, imp_ptr, stride_kb, stride_kt, stride_kh, stride_lb, stride_lt, stride_lh, stride_it, stride_ih,
    q_desc, q_desc2, k_desc, k_desc2,
    map_ptr, cu_ptr, cu_k_ptr, leftpad_ptr, T, C, q_offset, scale, row_tiles, S, first_tile, first_head,
    G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    PACKED: tl.constexpr, LEFTPAD: tl.constexpr, PRECISION: tl.constexpr,
    RATIO: tl.constexpr, COLUMNS: tl.constexpr, HALO: tl.constexpr, OUT: tl.constexpr, BLOCKS: tl.constexpr,
    N: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Importances of OUT blocks to a tile of queries, summed over the heads of a group (eq. 8-10).

    Column c of the tile is compressed block RATIO · j + c % COLUMNS of selectable block j = j0 + c // COLUMNS; the
    first HALO selectable blocks only lend their compressed blocks to the ones after them.

    Grid: (tiles of OUT blocks, tiles of queries, key/value heads)
    """
    i_tile, i_head = first_tile + tl.program_id(1), first_head + tl.program_id(2)
    i_b = (i_tile // row_tiles).to(tl.int64)
    i_seq, start, rows, row0, pos0, _ = locate(
        i_tile % row_tiles, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, BLOCK_M, PACKED, LEFTPAD
    )
    if start >= rows:
        return
    j0 = tl.program_id(0) * OUT - HALO
    own = (pos0 + tl.minimum(start + BLOCK_M, rows) - 1) // BLOCKS
    # fewer visible blocks than N: all are chosen; and no block after `own - LOCAL` needs a score
    if (own < N) | (j0 + HALO > own - LOCAL):
        return
    block0, blocks = locate_blocks(i_seq, cu_k_ptr, C, PACKED)

    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_N)
    mask_m = offs_m < rows - start
    offs_key = (j0 + offs_c // COLUMNS) * RATIO + offs_c % COLUMNS
    mask_key = (offs_key >= 0) & (offs_key < blocks) & (offs_c % COLUMNS < RATIO)
    # rows that lie together are copied in bulk; what they hold outside the sequence is masked below
    if RATIO == COLUMNS:
        k_1, k_2 = load_tile(k_desc, k_desc2, i_b, i_head, block0, blocks, j0 * RATIO, D1, D2, False)
    else:
        k_ptrs = k_ptr + i_b * stride_kb + i_head * stride_kh + (block0 + offs_key) * stride_kt
        k_1, k_2 = load_pair(k_ptrs, mask_key, D, D1, D2, True)
    lse_ptr += i_b * stride_lb + i_head * G * stride_lh + (row0 + start) * stride_lt

    scale_log2 = scale * LOG2E
    p = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for g in range(G):
        q_1, q_2 = load_tile(q_desc, q_desc2, i_b, i_head * G + g, row0, rows, start, D1, D2, False)
        lse = tl.load(lse_ptr + g * stride_lh + offs_m * stride_lt, mask=mask_m, other=0.0) * LOG2E
        s = dot_pair(q_1, q_2, k_1, k_2, D2, PRECISION)
        p += tl.exp2(s * scale_log2 - lse[:, None])
    every = (j0 >= 0) & ((j0 + BLOCK_N // COLUMNS) * RATIO <= visible_blocks(pos0 + start, blocks, SIZE, STRIDE))
    if (RATIO < COLUMNS) | (every == 0):  # most tiles need no mask
        n_visible = visible_blocks(pos0 + start + offs_m, blocks, SIZE, STRIDE)
        p = tl.where(mask_key[None, :] & (offs_key[None, :] < n_visible[:, None]), p, 0.0)

    imp = fold_tile(p, RATIO, COLUMNS, HALO, SIZE // STRIDE)
    offs_j = tl.arange(0, BLOCK_N // COLUMNS)
    offs_imp = (tl.program_id(1) * BLOCK_M + offs_m).to(tl.int64) * stride_it + tl.program_id(2) * stride_ih
    mask_j = (offs_j >= HALO) & (offs_j < HALO + OUT) & (j0 + offs_j < S)
    tl.store(imp_ptr + offs_imp[:, None] + (j0 + offs_j)[None, :], imp, mask=mask_m[:, None] & mask_j[None, :])


@triton.jit
def fold_tile(p, RATIO: tl.constexpr, COLUMNS: tl.constexpr, HALO: tl.constexpr, OVERLAP: tl.constexpr):
    """Importances of the selectable blocks of a tile of probabilities; of the first HALO only a part."""
    imp = fold_shifted(p, 0, RATIO, COLUMNS, OVERLAP)
    offs_j = tl.arange(0, p.shape[1] // COLUMNS)
    for shift in tl.static_range(1, HALO + 1):
        before = fold_shifted(p, shift, RATIO, COLUMNS, OVERLAP)
        index = tl.broadcast_to(tl.maximum(offs_j - shift, 0)[None, :], before.shape)
        imp += tl.gather(before, index, 1)
    return imp


@triton.jit
def fold_shifted(p, shift: tl.constexpr, RATIO: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr):
    """What compressed blocks that start in block j add to the importance of block j + shift: `[M, columns // COLUMNS]`.

    Compressed block RATIO · j + m counts once for every k in 0 … OVERLAP - 1 with m + k inside block j + shift (eq. 9).
    """
    m = tl.arange(0, COLUMNS) - shift * RATIO
    count = tl.minimum(OVERLAP - 1, RATIO - 1 - m) - tl.maximum(0, -m) + 1
    weight = tl.where(m + shift * RATIO < RATIO, tl.maximum(count, 0), 0).to(tl.float32)
    if COLUMNS > 1:
        parts = tl.reshape(p, [p.shape[0], p.shape[1] // COLUMNS, COLUMNS])
        folded = tl.sum(parts * weight[None, None, :], 2)
    else:
        folded = p * weight[None, :]
    return folded


@triton.jit
def _ranks(imp_ptrs, start, stop, WIDTH: tl.constexpr, INITIAL: tl.constexpr):
    """Importances of WIDTH blocks from `start` on as integers of the same order; -1 and less where no candidate is."""
    offs_j = start + tl.arange(0, WIDTH)
    candidate = (offs_j[None, :] >= INITIAL) & (offs_j[None, :] < stop[:, None])
    imp = tl.load(imp_ptrs[:, None] + offs_j[None, :], mask=candidate, other=-1.0)
    return imp.to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=_VARYING)
def _topn_kernel(
    imp_ptr, out_ptr, stride_it, stride_ih, stride_ob, stride_ot, stride_oh,
    map_ptr, cu_ptr, leftpad_ptr, T, q_offset, row_tiles, S, first_tile, first_head,
    PACKED: tl.constexpr, LEFTPAD: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr, INITIAL: tl.constexpr,
    LOCAL: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr,
    WIDTH_OUT: tl.constexpr,
):  # fmt: skip
    """Block indices of ROWS queries: the forced blocks, and the most important ones between them.

    Grid: (TILE // ROWS, tiles of queries, key/value heads)
    """
    i_tile, i_head = first_tile + tl.program_id(1), first_head + tl.program_id(2)
    i_b = (i_tile // row_tiles).to(tl.int64)
    _, start, rows, row0, pos0, _ = locate(
        i_tile % row_tiles, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, TILE, PACKED, LEFTPAD
    )
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_r = start + offs_r < rows
    position = pos0 + start + offs_r
    out_ptrs = out_ptr + i_b * stride_ob + (row0 + start + offs_r) * stride_ot + i_head * stride_oh
    offs_imp = (tl.program_id(1) * TILE + offs_r).to(tl.int64) * stride_it + tl.program_id(2) * stride_ih
    choose_blocks(
        imp_ptr + offs_imp, out_ptrs, position, mask_r, BLOCKS, N, INITIAL, LOCAL, ROWS, WIDTH, HELD, WIDTH_OUT
    )


@triton.jit
def choose_blocks(
    imp_ptrs, out_ptrs, position, mask_r, BLOCKS: tl.constexpr, N: tl.constexpr, INITIAL: tl.constexpr,
    LOCAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, WIDTH_OUT: tl.constexpr,
):  # fmt: skip
    """Store the block indices of ROWS queries: the forced blocks, and the most important ones between them.

    Args:
        imp_ptrs: `[ROWS]`, rows of importances, read where a query sees at least N blocks.
        out_ptrs: `[ROWS]`, rows of N block indices.
        position, mask_r: `[ROWS]`, positions of the queries, and which of them exist.
        WIDTH: Importances looked at together; HELD: all that count are among the first WIDTH.
    """
    own = tl.where(position >= 0, position // BLOCKS, -1)
    searched = mask_r & (own >= N)

    offs_n = tl.arange(0, WIDTH_OUT)[None, :]
    few = tl.where(offs_n <= own[:, None], offs_n, -1)
    many = tl.where(offs_n < INITIAL, offs_n, own[:, None] - (N - 1 - offs_n))
    forced = (offs_n < INITIAL) | (offs_n >= N - LOCAL)
    mask_out = mask_r[:, None] & (offs_n < N) & (forced | (searched[:, None] == 0))
    tl.store(out_ptrs[:, None] + offs_n, tl.where(searched[:, None], many, few), mask=mask_out)

    if N > INITIAL + LOCAL:
        wanted: tl.constexpr = N - INITIAL - LOCAL
        stop = tl.where(searched, own - LOCAL + 1, 0)
        end = tl.max(stop)
        if end > 0:
            if HELD:
                held = _ranks(imp_ptrs, 0, stop, WIDTH, INITIAL)
            # at least `wanted` candidates rank `low` or higher, fewer rank `high` or higher
            if HELD and wanted <= 32 and WIDTH >= 128:
                low, high = _bounds(held, WIDTH, ROWS)
            else:
                low = tl.zeros([ROWS], dtype=tl.int32)
                high = tl.where(searched, 0x7FFFFFFF, 1)
            while tl.max(high - low) > 1:
                middle = low + (high - low) // 2
                count = tl.zeros([ROWS], dtype=tl.int32)
                if HELD:
                    count = tl.sum((held >= middle[:, None]).to(tl.int32), 1)
                else:
                    for j in range(0, end, WIDTH):
                        ranks = _ranks(imp_ptrs, j, stop, WIDTH, INITIAL)
                        count += tl.sum((ranks >= middle[:, None]).to(tl.int32), 1)
                # exactly `wanted` ends a row's search, and a search that has ended changes no more
                high = tl.where(count == wanted, middle + 1, tl.where(count > wanted, high, middle))
                low = tl.where(count >= wanted, middle, low)

            above = tl.zeros([ROWS], dtype=tl.int32)
            if HELD:
                above = tl.sum((held > low[:, None]).to(tl.int32), 1)
            else:
                for j in range(0, end, WIDTH):
                    ranks = _ranks(imp_ptrs, j, stop, WIDTH, INITIAL)
                    above += tl.sum((ranks > low[:, None]).to(tl.int32), 1)
            equals = tl.zeros([ROWS], dtype=tl.int32)
            taken = tl.zeros([ROWS], dtype=tl.int32)
            if HELD:
                equals, taken = _store_chosen(
                    out_ptrs, held, 0, low, wanted - above, equals, taken, searched, WIDTH, INITIAL
                )
            else:
                for j in range(0, end, WIDTH):
                    ranks = _ranks(imp_ptrs, j, stop, WIDTH, INITIAL)
                    equals, taken = _store_chosen(
                        out_ptrs, ranks, j, low, wanted - above, equals, taken, searched, WIDTH, INITIAL
                    )


@triton.jit
def _bounds(ranks, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Where the search for up to 32 candidates begins: 32 rank `low` or higher, if there are any, none `high`.

    The candidates are dealt out to 32 groups, as to the threads of a warp, and each group's best counts.
    """
    groups = tl.reshape(ranks, [ROWS, WIDTH // 128, 32, 4])
    best = tl.max(tl.max(groups, 3), 1)
    if ROWS == 1:  # by way of scalars: the layout of `best` must not become that of `ranks`
        low = tl.full([ROWS], tl.min(best), dtype=tl.int32)
        high = tl.full([ROWS], tl.max(best), dtype=tl.int32)
    else:
        low = tl.min(best, 1)
        high = tl.max(best, 1)
    return tl.maximum(low, 0), tl.minimum(high, 0x7FFFFFFE) + 1


@triton.jit
def _store_chosen(
    out_ptrs, ranks, start, low, wanted_equals, equals, taken, searched, WIDTH: tl.constexpr, INITIAL: tl.constexpr
):  # fmt: skip
    """Store, in order, the blocks that rank above `low`, and of those that rank `low` the first `wanted_equals`.

    Returns:
        equals, taken: Blocks of rank `low` and blocks chosen so far.
    """
    equal = (ranks == low[:, None]) & searched[:, None]
    order = equals[:, None] + tl.cumsum(equal.to(tl.int32), 1)
    chosen = ((ranks > low[:, None]) & searched[:, None]) | (equal & (order <= wanted_equals[:, None]))
    slot = INITIAL - 1 + taken[:, None] + tl.cumsum(chosen.to(tl.int32), 1)
    offs_j = start + tl.arange(0, WIDTH)
    tl.store(out_ptrs[:, None] + slot, tl.broadcast_to(offs_j[None, :], slot.shape), mask=chosen)
    return equals + tl.sum(equal.to(tl.int32), 1), taken + tl.sum(chosen.to(tl.int32), 1)
