# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Decoding in Triton: `reference.nsa_attention` for up to 16 new queries a row over a long past; forward only.

Four launches. The first splits the past: every split attends to a share of the compressed blocks, and notes what each
of them adds to the importance of the selectable blocks. The second joins the statistics of the splits into importances
and takes the top n. The third attends to the window and to the chosen blocks, the fourth joins all splits and adds up
the gated branches.

Nothing is read back by the host: grids and workspaces follow from the capacity of the cache, programs divide what is
there at run time, and those without a share return at once. So a CUDA graph can hold all of it. Where the GPU lets a
kernel start before the one before has ended, it does what needs none of its results: the window and the forced blocks,
while few programs rank the others.

Bytes that must be read of the compressed keys and values, the n blocks and the window bound the speed from below:
`B · H · (C + n · l' + w) · (D + DV)` elements, at H = 4, D = 128, 65,536 tokens, batch 16 and the paper's sizes 184 MB.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .compressed import head_dims, strides, visible_blocks
from .library import define
from .selection import fold_shifted, fold_sizes, fold_tile
from .triton_common import (
    LOG2E,
    NEGATIVE,
    add_product,
    cdiv,
    check_inputs,
    dot_pair,
    empty_pair,
    interpreted,
    load_pair,
    next_power_of_2,
    precision,
    softmax_step,
    split_head_dim,
    store_pair,
)
from .tuning import tunable
from .validation import MAX_DECODE_QUERIES
from .window import _query_rows, _tiles

__all__ = ["decode_attention"]

# Programs that a multiprocessor holds at once, and those of the kernel that reads window and chosen blocks.
_RESIDENT = 2
_RESIDENT_SELECTED = 3
# Splits of one branch: the kernels that join them hold their statistics at once.
_MAX_SPLITS = 128
# Importances ranked at once.
_MAX_WIDTH = 1024
# Importances times heads joined at once, in registers.
_HELD = 16384
# Warps of the kernel that joins and ranks them.
_MERGE_WARPS = 8
# Ranking narrows candidates down to this many times those that are kept; more than 128 are not compared at once.
_FACTOR = 8
# Fewest that are kept: narrowing 8 groups down to 2 gave wrong ones on a GPU under Triton 3.6.
_FEWEST = 4
# Outputs of splits that are loaded before any is used, and that a warp of the last kernel holds at once.
_JOINED, _COMBINED = 8192, 2048
# Arguments that change with the number of tokens: a kernel is not compiled anew for each kind of value.
_VARYING = ["q_offset", "T", "C", "TW", "tiles", "splits", "all_splits"]


def decode_attention(
    q,
    k,
    v,
    k_cmp,
    v_cmp,
    k_win,
    v_win,
    g_cmp,
    g_slc,
    g_win,
    *,
    compress_block_size,
    compress_stride,
    select_block_size,
    num_selected_blocks,
    num_initial_blocks=1,
    num_local_blocks=2,
    window_size,
    scale=None,
    leftpad=None,
    q_offset=0,
    cu_seqlens=None,
    return_weights=False,
    window_ring=False,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Native Sparse Attention (eq. 5) of few queries; see `reference.nsa_attention`.

    Args:
        q: `[B, T, HQ, D]`, T <= 16; bf16, fp16 or fp32.
        k: `[B, TK, H, D]`, v: `[B, TK, H, DV]`; slots behind the last query are not read.
        k_cmp: `[B, C, H, D]`, v_cmp: `[B, C, H, DV]`; blocks that no query sees are not read.
        k_win: `[B, TW, H, D]`, v_win: `[B, TW, H, DV]`; the last key belongs to the last query,
            or with `window_ring` slot s lies at index s % TW.
        q_offset: int, or an int tensor `[]` or `[B]` on the device of `q`.

    Returns:
        o `[B, T, HQ, DV]` in the dtype of `q`, block_indices int32 `[B, T, H, n]`, and None.

    Raises:
        NotImplementedError: More than 16 queries, packed sequences, `return_weights`, `scale` <= 0, or a dtype, head
            dim or block size without a kernel.
    """
    if q.shape[1] > MAX_DECODE_QUERIES or cu_seqlens is not None:
        given = f"{q.shape[1]} queries" if cu_seqlens is None else "packed sequences"
        raise NotImplementedError(
            f"The decode kernels take at most {MAX_DECODE_QUERIES} queries a row, got {given}; use `nsa_attention`."
        )
    if return_weights:
        raise NotImplementedError("`return_weights` is not computed by the Triton kernels; use backend='reference'.")
    scale = check_inputs(q, scale, k=k, v=v, k_cmp=k_cmp, v_cmp=v_cmp, k_win=k_win, v_win=v_win)
    tensor = isinstance(q_offset, torch.Tensor)
    return *_attention(
        q, k, v, k_cmp, v_cmp, k_win, v_win, g_cmp, g_slc, g_win, leftpad, 0 if tensor else q_offset,
        q_offset if tensor else None, compress_block_size, compress_stride, select_block_size, num_selected_blocks,
        num_initial_blocks, num_local_blocks, window_size, scale, window_ring,
    ), None  # fmt: skip


def _allocate(q, v, num_selected_blocks):
    B, T, H = *q.shape[:2], v.shape[2]
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    return o, torch.empty(B, T, H, num_selected_blocks, dtype=torch.int32, device=q.device)


def _compute(
    q, k, v, k_cmp, v_cmp, k_win, v_win, g_cmp, g_slc, g_win, leftpad, q_offset, q_offset_tensor,
    compress_block_size, compress_stride, select_block_size, num_selected_blocks, num_initial_blocks,
    num_local_blocks, window_size, scale, window_ring,
):  # fmt: skip
    (B, T, HQ, D), (H, DV) = q.shape, v.shape[2:]
    G = HQ // H
    o, block_indices = _allocate(q, v, num_selected_blocks)
    if not o.numel():
        return o, block_indices
    q, k, v, k_cmp, v_cmp, k_win, v_win = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, k_cmp, v_cmp, k_win, v_win)
    )
    rows, single = (_row_tiles(q.dtype, D, DV, G, queries) for queries in (T, 1))
    blocks = (compress_block_size, compress_stride, select_block_size)
    config, config_single = (
        _config(q.get_device(), q.dtype, D, DV, G, tile["BLOCK_M"], *blocks) for tile in (rows, single)
    )
    fold = fold_sizes(compress_block_size, compress_stride, select_block_size, narrowest=config["BLOCK_N"])
    edge = fold["HALO"] == 1  # then tiles lend each other what reaches over their edges, and read no block twice
    if edge:
        fold = {**fold, "HALO": 0, "OUT": fold["OUT"] + 1}
    per = fold["BLOCK_N"] // fold["COLUMNS"]
    S = cdiv(k.shape[1], select_block_size)
    tiles = cdiv(S, fold["OUT"])
    query_tiles = cdiv(T, rows["TILE"])
    splits = _splits(tiles, B * H * rows["GROUPS"] * query_tiles, q.device)
    window_tiles = cdiv(min(window_size, k_win.shape[1]), config_single["BLOCK_N"])
    chosen_tiles = cdiv(num_selected_blocks * select_block_size, config_single["BLOCK_N"])
    programs = B * T * H * single["GROUPS"]
    chosen_splits = _splits(chosen_tiles, programs, q.device)
    # as many for the window as run beside those
    room = _RESIDENT_SELECTED * _multiprocessors(q.device) // programs - chosen_splits
    window_splits = max(1, min(cdiv(window_tiles, 2), room))
    all_splits = splits + window_splits + chosen_splits

    floats = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    lse, parts = floats(B, T, HQ, all_splits), floats(B, T, HQ, all_splits, DV)
    # every head's importances, each tile of them relative to its peak
    imp, peak = floats(B, T, HQ, tiles * per), floats(B, T, HQ, tiles)
    edges = floats(B, T, HQ, tiles) if edge else None

    by_tensor = q_offset_tensor is not None
    where = {
        "q_offset": q_offset_tensor if by_tensor else q_offset,
        "leftpad_ptr": None if leftpad is None else leftpad.contiguous(),
        "stride_offset": q_offset_tensor.stride(0) if by_tensor and q_offset_tensor.dim() else 0,
        "T": T,
        "HQ": HQ,
        "OFFSET": by_tensor,
        "LEFTPAD": leftpad is not None,
    }
    shapes = {"G": G, **head_dims(q, "D"), **head_dims(v, "DV"), "PRECISION": precision(q.dtype), "scale": scale}
    shapes["enable_fp_fusion"] = True
    compression = {"SIZE": compress_block_size, "STRIDE": compress_stride, "RATIO": fold["RATIO"], "OUT": fold["OUT"]}
    forced = {"N": num_selected_blocks, "INITIAL": num_initial_blocks, "LOCAL": num_local_blocks}
    free = num_selected_blocks - num_initial_blocks - num_local_blocks
    counts = {"C": k_cmp.shape[1], "tiles": tiles, "splits": splits, "all_splits": all_splits}
    chained = {"PDL": _overlaps(q.device), "launch_pdl": _overlaps(q.device)}

    _partial_kernel[(H * rows["GROUPS"] * query_tiles, B, splits)](
        q, k_cmp, v_cmp, parts, lse, imp, peak, edges, *strides(q, k_cmp, v_cmp), query_tiles=query_tiles, **counts,
        **where, **shapes, **compression, **rows, COLUMNS=fold["COLUMNS"], HALO=fold["HALO"], FOLD=free > 0,
        **{**config, "BLOCK_N": fold["BLOCK_N"]}, PDL=_overlaps(q.device), EDGE=edge,
    )  # fmt: skip
    heads, kept = next_power_of_2(G), max(_FEWEST, next_power_of_2(free))
    width = max(per, kept, min(_MAX_WIDTH, per * next_power_of_2(tiles), max(16, _HELD // heads)))
    # a tensor of fewer elements than threads would be loaded and worked on in every layout that it is needed in
    part_splits = max(next_power_of_2(splits), 32 * _MERGE_WARPS // heads)
    _merge_kernel[(T, H, B)](
        lse, imp, peak, edges, block_indices, **counts, **where, **compression, **forced, BLOCKS=select_block_size,
        G=G, HEADS=heads, PART_SPLITS=part_splits, PER=per, TILES=width // per, HALO=fold["HALO"], EDGE=edge,
        ONE=tiles * per <= width, KEPT=kept, FACTOR=max(2, min(_FACTOR, 128 // kept)),
        WIDTH_OUT=next_power_of_2(num_selected_blocks), num_warps=_MERGE_WARPS, enable_fp_fusion=True, **chained,
    )  # fmt: skip
    # fewer tiles ahead leave room for more programs: for those of the window beside those that wait for the choice
    _selected_kernel[(T * H * single["GROUPS"], B, window_splits + chosen_splits)](
        q, k, v, k_win, v_win, block_indices, parts, lse, *strides(q, k, v, k_win, v_win), TW=k_win.shape[1],
        window_splits=window_splits, first_split=splits, all_splits=all_splits, **where, **shapes, **single, **forced,
        BLOCKS=select_block_size, W=window_size, RING=window_ring,
        **{**config_single, "num_stages": min(2, config_single["num_stages"])}, **chained,
    )  # fmt: skip
    parts_tile, block = next_power_of_2(all_splits), next_power_of_2(DV)
    combined = min(parts_tile, _JOINED // block)
    # a single warp adds up without a barrier, and finds room earlier
    combine_warps = max(1, min(4, combined * block // _COMBINED))
    _combine_kernel[(HQ, T, B)](
        parts, lse, g_cmp, g_slc, g_win, o, *g_cmp.stride(), *g_slc.stride(), *g_win.stride(), HQ, T,
        splits, window_splits, all_splits, DV=DV, SPLITS=parts_tile,
        TILE=combined, BLOCK=block, num_warps=combine_warps, enable_fp_fusion=True, **chained,
    )  # fmt: skip
    return o, block_indices


_attention = define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor k_cmp, Tensor v_cmp, Tensor k_win, Tensor v_win, "
    "Tensor g_cmp, Tensor g_slc, Tensor g_win, Tensor? leftpad, SymInt q_offset, Tensor? q_offset_tensor, "
    "int compress_block_size, int compress_stride, int select_block_size, int num_selected_blocks, "
    "int num_initial_blocks, int num_local_blocks, int window_size, float scale, bool window_ring) -> (Tensor, Tensor)",
    _compute,
    lambda q, k, v, *rest: _allocate(q, v, rest[-6]),
    any_strides=True,
)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return 2 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it still runs, and wait for it by itself."""
    return not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def _wait_for_the_kernel_before(PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def _splits(tiles: int, programs: int, device: torch.device) -> int:
    """Splits of `tiles` tiles of keys: all programs run at once, where each split is worked on by `programs`."""
    fitting = max(1, _RESIDENT * _multiprocessors(device) // programs)
    return min(_MAX_SPLITS, tiles if tiles < 2 * fitting else fitting)


def _row_tiles(dtype, D, DV, G, T):
    """Rows of a tile: TILE of T queries times GT of the G heads of a group, at most what registers hold."""
    most = 16 if dtype == torch.float32 else 32 if max(D, DV) > 128 else 64
    rows = min(most, max(16, next_power_of_2(G * T)))
    return {**_tiles(G, rows), "BLOCK_M": rows}


@tunable(
    "decode",
    (64, 4, 2), (64, 4, 3), (64, 4, 4), (32, 4, 3), (32, 4, 4), (64, 8, 2), (64, 8, 3), (128, 8, 2),
    (32, 8, 1), (32, 4, 1), (16, 4, 1),
    held="q", streamed="k v", accumulated="o s",
)  # fmt: skip
def _config(dtype, D, DV, G, BLOCK_M, compress_block_size, compress_stride, select_block_size):
    """Tiles of keys for tiles of BLOCK_M rows."""
    widest, pairs = max(D, DV), any(split_head_dim(size)[1] for size in (D, DV))
    if dtype == torch.float32:
        keys, warps, stages = (32, 8, 2) if widest <= 128 else (16, 4, 1)
    else:
        keys, warps = 64, 8 if BLOCK_M > 16 and (widest > 128 or pairs) else 4
        stages = 3 if widest <= 128 else 2
    return {"BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _first_position(i_b, q_offset, leftpad_ptr, stride_offset, OFFSET: tl.constexpr, LEFTPAD: tl.constexpr):
    """Position of a row's first query, and its padding slots: slot = position + pad."""
    offset = q_offset
    if OFFSET:
        offset = tl.load(q_offset + i_b * stride_offset).to(tl.int32)
    pad = 0
    if LEFTPAD:
        pad = tl.load(leftpad_ptr + i_b).to(tl.int32)
    return offset - pad, pad


@triton.jit
def _live_tiles(blocks, tiles, SIZE: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, OUT: tl.constexpr):
    """Tiles of OUT selectable blocks that the first `blocks` compressed blocks reach into."""
    reached = tl.where(blocks > 0, (blocks - 1 + SIZE // STRIDE - 1) // RATIO + 1, 0)
    return tl.minimum(tl.cdiv(reached, OUT), tiles)


@triton.jit
def _store_split(o_ptr, lse_ptr, row, used, m_log2, z, acc_1, acc_2, DV: tl.constexpr, DV1: tl.constexpr,
                 DV2: tl.constexpr):  # fmt: skip
    """Store a split's output and base-2 lse, -inf and no output where it has no key.

    Args:
        row: int64 `[M]`, the rows' places among all splits.
        m_log2, z: `[M]`, running maximum in base 2 and sum.
    """
    some = z > 0
    total = tl.where(some, z, 1.0)
    tl.store(lse_ptr + row, tl.where(some, m_log2 + tl.log2(total), float("-inf")), mask=used)
    acc_1 = acc_1 / total[:, None]
    if DV2 > 0:
        acc_2 = acc_2 / total[:, None]
    store_pair(o_ptr + row * DV, acc_1, acc_2, used & some, DV, DV1, DV2)


@triton.jit(do_not_specialize=_VARYING)
def _partial_kernel(
    q_ptr, k_cmp_ptr, v_cmp_ptr, o_ptr, lse_ptr, imp_ptr, peak_ptr, edge_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    q_offset, leftpad_ptr, stride_offset, T, HQ, C, tiles, splits, all_splits, query_tiles, scale,
    OFFSET: tl.constexpr, LEFTPAD: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    RATIO: tl.constexpr, COLUMNS: tl.constexpr, HALO: tl.constexpr, OUT: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, GT: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries to a share of the compressed blocks, with their importances.

    Column c of a tile of compressed blocks is block RATIO · j + c % COLUMNS of selectable block j = j0 + c // COLUMNS;
    the first HALO selectable blocks only lend their compressed blocks to the importances of the ones after them.
    Peaks are whole numbers, so that equal scores stay equal in the importances of different tiles.

    Grid: (H * GROUPS * query_tiles, B, splits)
    """
    if PDL:
        gdc_launch_dependents()
    i_tile, i_b, i_split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    start = i_tile % query_tiles * TILE
    i_h, i_g = i_tile // query_tiles // GROUPS, i_tile // query_tiles % GROUPS
    pos0, _ = _first_position(i_b, q_offset, leftpad_ptr, stride_offset, OFFSET, LEFTPAD)
    i_q, i_head, used = _query_rows(start, T, i_h, i_g, TILE, GT, G, BLOCK_M)
    position = pos0 + i_q
    row = (i_b * T + i_q) * HQ + i_head
    q_ptrs = q_ptr + i_b * stride_qb + i_q * stride_qt + i_head * stride_qh
    q_1, q_2 = load_pair(q_ptrs, used, D, D1, D2, True)
    scale_log2 = scale * LOG2E
    m = tl.full([BLOCK_M], NEGATIVE, dtype=tl.float32)
    z = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc_1, acc_2 = empty_pair(BLOCK_M, DV1, DV2)
    offs_n = tl.arange(0, BLOCK_N)

    blocks = visible_blocks(pos0 + T - 1, C, SIZE, STRIDE)
    live = _live_tiles(blocks, tiles, SIZE, STRIDE, RATIO, OUT)
    first, stop = i_split * live // splits, (i_split + 1) * live // splits
    n_visible = visible_blocks(position, blocks, SIZE, STRIDE)
    offs_j = tl.arange(0, BLOCK_N // COLUMNS)
    k_ptrs = k_cmp_ptr + i_b * stride_kb + i_h * stride_kh
    v_ptrs = v_cmp_ptr + i_b * stride_vb + i_h * stride_vh
    for i_keys in range(first, stop):
        j0 = i_keys * OUT - HALO
        offs_key = (j0 + offs_n // COLUMNS) * RATIO + offs_n % COLUMNS
        mask_key = (offs_key >= 0) & (offs_key < blocks) & (offs_n % COLUMNS < RATIO)
        own = offs_n >= HALO * COLUMNS
        k_1, k_2 = load_pair(k_ptrs + offs_key.to(tl.int64) * stride_kt, mask_key, D, D1, D2, True)
        v_1, v_2 = load_pair(v_ptrs + offs_key.to(tl.int64) * stride_vt, mask_key & own, DV, DV1, DV2, True)
        s = dot_pair(q_1, q_2, k_1, k_2, D2, PRECISION) * scale_log2
        s = tl.where(mask_key[None, :] & (offs_key[None, :] < n_visible[:, None]), s, float("-inf"))
        m_new = tl.maximum(m, tl.ceil(tl.max(s, 1)))
        p = tl.exp2(s - m_new[:, None])
        if FOLD:
            imp = fold_tile(p, RATIO, COLUMNS, HALO, SIZE // STRIDE)
            if EDGE:
                before = fold_shifted(p, 1, RATIO, COLUMNS, SIZE // STRIDE)
                index = tl.broadcast_to(tl.maximum(offs_j - 1, 0)[None, :], before.shape)
                imp += tl.where((offs_j > 0)[None, :], tl.gather(before, index, 1), 0.0)
                over = tl.sum(tl.where((offs_j == before.shape[1] - 1)[None, :], before, 0.0), 1)
                tl.store(edge_ptr + row * tiles + i_keys, over, mask=used)
            imp_ptrs = imp_ptr + ((row * tiles + i_keys) * (BLOCK_N // COLUMNS))[:, None] + offs_j[None, :]
            tl.store(imp_ptrs, imp, mask=used[:, None])
            tl.store(peak_ptr + row * tiles + i_keys, m_new, mask=used)
        p = tl.where(own[None, :], p, 0.0)
        alpha = tl.exp2(m - m_new)
        z = z * alpha + tl.sum(p, 1)
        acc_1 = acc_1 * alpha[:, None]
        if DV2 > 0:
            acc_2 = acc_2 * alpha[:, None]
        acc_1, acc_2 = add_product(acc_1, acc_2, p.to(v_1.dtype), v_1, v_2, DV2, PRECISION)
        m = m_new
    _store_split(o_ptr, lse_ptr, row * all_splits + i_split, used, m, z, acc_1, acc_2, DV, DV1, DV2)


@triton.jit
def _weigh(lse):
    """Base-2 lse `[HEADS, splits]` joined: its whole part as an exponent, and 2 to the rest, 0 where it is -inf."""
    highest = tl.max(lse, 1)
    some = highest > float("-inf")
    highest = tl.where(some, highest, 0.0)
    lse = highest + tl.log2(tl.where(some, tl.sum(tl.exp2(lse - highest[:, None]), 1), 1.0))
    whole = tl.floor(lse)  # scaling by whole powers of two keeps equals equal
    return whole, tl.where(some, tl.exp2(whole - lse), 0.0)


@triton.jit
def _load_scores(
    imp_ptr, peak_ptr, edge_ptr, t0, live, tiles, G: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr,
    PER: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Importances of TILES tiles from t0 on, `[HEADS, TILES, PER]`; and of each tile the peak, what the tile before it
    lends to it, and the peak of that, `[HEADS, TILES]`."""
    head, tile = tl.arange(0, HEADS), t0 + tl.arange(0, TILES)
    place = head[:, None] * tiles + tile[None, :]
    mask = (head < G)[:, None] & (tile < live)[None, :]
    # as rows, of which a thread holds a piece of every head
    offs = t0 * PER + tl.arange(0, TILES * PER)
    mask_imp = (head < G)[:, None] & (offs < live * PER)[None, :]
    imp = tl.load(imp_ptr + (head * tiles * PER)[:, None] + offs[None, :], mask=mask_imp, other=0.0)
    imp = tl.reshape(imp, [HEADS, TILES, PER])
    peak = tl.load(peak_ptr + place, mask=mask, other=NEGATIVE)
    over, peak_over = peak, peak
    if EDGE:
        mask &= (tile > 0)[None, :]
        over = tl.load(edge_ptr + place - 1, mask=mask, other=0.0)
        peak_over = tl.load(peak_ptr + place - 1, mask=mask, other=NEGATIVE)
    return imp, peak, over, peak_over


@triton.jit
def _make_keys(
    imp, peak, over, peak_over, whole, rest, t0, stop, OUT: tl.constexpr, HALO: tl.constexpr, INITIAL: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Importances summed over heads as distinct keys in their order; of equals the smaller index has the larger key."""
    offs_c = tl.arange(0, imp.shape[2])
    imp *= tl.exp2(peak - whole[:, None])[:, :, None]
    if EDGE:
        over *= tl.exp2(peak_over - whole[:, None])
        imp += tl.where((offs_c == 0)[None, None, :], over[:, :, None], 0.0)
    total = tl.sum(imp * rest[:, None, None], 0)
    block = (t0 + tl.arange(0, imp.shape[1]))[:, None] * OUT + (offs_c - HALO)[None, :]
    candidate = ((offs_c >= HALO) & (offs_c < HALO + OUT))[None, :] & (block >= INITIAL) & (block < stop)
    bits = tl.where(candidate, total, -1.0).to(tl.int32, bitcast=True)  # of floats >= 0 they have their order
    # what is no candidate has distinct keys, too
    place = (t0 + tl.arange(0, imp.shape[1]))[:, None] * imp.shape[2] + offs_c[None, :]
    keys = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - tl.where(candidate, block, place))
    return tl.reshape(keys, [imp.shape[1] * imp.shape[2]])


@triton.jit
def _rank(keys, AXIS: tl.constexpr):
    """How many of the distinct keys are larger than each; AXIS is summed over: few threads should share it."""
    COUNT: tl.constexpr = keys.shape[0]
    if COUNT <= 128:
        if AXIS == 0:
            rank = tl.sum((keys[:, None] > keys[None, :]).to(tl.int32), 0)
        else:
            rank = tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), 1)
    else:
        rank = tl.zeros([COUNT], dtype=tl.int32)
        for i in range(0, COUNT, 32):
            some = tl.gather(keys, i + tl.arange(0, 32), 0)
            rank += tl.sum((some[:, None] > keys[None, :]).to(tl.int32), 0)
    return rank


@triton.jit
def _narrow_down(keys, KEPT: tl.constexpr, GROUPS: tl.constexpr):
    """Keys of the KEPT groups, of GROUPS, whose maxima are largest: the KEPT largest of distinct keys are among them.

    A key of another group is below KEPT maxima.
    """
    keys = tl.reshape(keys, [GROUPS, keys.shape[0] // GROUPS])
    ranked = _rank(tl.max(keys, 1), 1)[:, None] == tl.arange(0, KEPT)[None, :]
    group = tl.sum(tl.where(ranked, tl.arange(0, GROUPS)[:, None], 0), 0)
    keys = tl.gather(keys, tl.broadcast_to(group[:, None], [KEPT, keys.shape[1]]), 0)
    return tl.reshape(keys, [KEPT * keys.shape[1]])


@triton.jit
def _few(keys, KEPT: tl.constexpr, FACTOR: tl.constexpr):
    """At most FACTOR · KEPT of the keys, the KEPT largest among them."""
    for _ in tl.static_range(16):
        if keys.shape[0] > FACTOR * KEPT:
            keys = _narrow_down(keys, KEPT, FACTOR * KEPT)
    return keys


@triton.jit
def _choose(
    lse_ptr, imp_ptr, peak_ptr, edge_ptr, out_ptr, row, live, stop, tiles, splits, all_splits,
    OUT: tl.constexpr, N: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, G: tl.constexpr,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, PER: tl.constexpr, TILES: tl.constexpr, HALO: tl.constexpr,
    EDGE: tl.constexpr, ONE: tl.constexpr, KEPT: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Store the blocks below `stop` of the highest importance, summed over splits and heads, between forced ones.

    TILES tiles are joined and ranked at a time, in registers: all that is read is under way before anything is used.

    Args:
        row: Of the group's first head. live: Tiles that have importances, those of others are 0.
    """
    head, offs_s = tl.arange(0, HEADS), tl.arange(0, SPLITS)
    mask_s = (head < G)[:, None] & (offs_s < splits)[None, :]
    lse = tl.load(lse_ptr + (row + head)[:, None] * all_splits + offs_s[None, :], mask=mask_s, other=float("-inf"))
    imp_ptr += row * tiles * PER
    peak_ptr += row * tiles
    if EDGE:
        edge_ptr += row * tiles
    live = tl.minimum(live, tl.cdiv(stop, OUT))
    imp, peak, over, peak_over = _load_scores(
        imp_ptr, peak_ptr, edge_ptr, 0, live, tiles, G, HEADS, TILES, PER, EDGE
    )  # fmt: skip
    whole, rest = _weigh(lse)
    few = _few(_make_keys(imp, peak, over, peak_over, whole, rest, 0, stop, OUT, HALO, INITIAL, EDGE), KEPT, FACTOR)
    if not ONE:
        for t0 in range(TILES, tl.cdiv(stop, OUT), TILES):
            imp, peak, over, peak_over = _load_scores(
                imp_ptr, peak_ptr, edge_ptr, t0, live, tiles, G, HEADS, TILES, PER, EDGE
            )  # fmt: skip
            more = _make_keys(imp, peak, over, peak_over, whole, rest, t0, stop, OUT, HALO, INITIAL, EDGE)
            more = _few(more, KEPT, FACTOR)
            few = _narrow_down(tl.reshape(tl.join(few, more), [2 * few.shape[0]]), KEPT, 2 * KEPT)
    chosen = _rank(few, 0) < N - INITIAL - LOCAL
    index = tl.where(chosen, 0x7FFFFFFF - (few & 0x7FFFFFFF).to(tl.int32), 0x7FFFFFFF)
    tl.store(out_ptr + INITIAL + _rank(-index, 0), index, mask=chosen)


@triton.jit
def _store_forced(out_ptr, own, N: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, WIDTH: tl.constexpr):
    """Store the blocks that are chosen without a search; all of them where there are at most N."""
    slot = tl.arange(0, WIDTH)
    first = tl.where(own >= N, INITIAL, N)
    block = tl.where(slot < first, slot, own - (N - 1 - slot))
    mask_slot = ((slot < first) | (slot >= N - LOCAL)) & (slot < N)
    tl.store(out_ptr + slot, tl.where(block <= own, block, -1), mask=mask_slot)


@triton.jit(do_not_specialize=_VARYING)
def _merge_kernel(
    lse_ptr, imp_ptr, peak_ptr, edge_ptr, out_ptr,
    q_offset, leftpad_ptr, stride_offset, T, HQ, C, tiles, splits, all_splits,
    OFFSET: tl.constexpr, LEFTPAD: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr,
    OUT: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    G: tl.constexpr, HEADS: tl.constexpr, PART_SPLITS: tl.constexpr, PER: tl.constexpr, TILES: tl.constexpr,
    HALO: tl.constexpr, EDGE: tl.constexpr, ONE: tl.constexpr, KEPT: tl.constexpr, FACTOR: tl.constexpr,
    WIDTH_OUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Block indices of a query: the forced blocks, and those of the highest importance, summed over splits and heads.

    Grid: (T, H, B)
    """
    if PDL:  # window and forced blocks are read beside the tail of the kernel before
        gdc_launch_dependents()
    i_q, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pos0, _ = _first_position(i_b, q_offset, leftpad_ptr, stride_offset, OFFSET, LEFTPAD)
    position = pos0 + i_q
    own = tl.where(position >= 0, position // BLOCKS, -1)
    out_ptr += ((i_b * T + i_q) * tl.num_programs(1) + i_h) * N
    _store_forced(out_ptr, own, N, INITIAL, LOCAL, WIDTH_OUT)
    live = _live_tiles(visible_blocks(pos0 + T - 1, C, SIZE, STRIDE), tiles, SIZE, STRIDE, RATIO, OUT)
    if PDL:
        gdc_wait()
    if (N > INITIAL + LOCAL) & (own >= N):
        _choose(
            lse_ptr, imp_ptr, peak_ptr, edge_ptr, out_ptr, (i_b * T + i_q) * HQ + i_h * G, live, own - LOCAL + 1,
            tiles, splits, all_splits, OUT, N, INITIAL, LOCAL, G, HEADS, PART_SPLITS, PER, TILES, HALO, EDGE, ONE, KEPT,
            FACTOR,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*_VARYING, "window_splits", "first_split"])
def _selected_kernel(
    q_ptr, k_ptr, v_ptr, k_win_ptr, v_win_ptr, index_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_kwb, stride_kwt, stride_kwh, stride_vwb, stride_vwt, stride_vwh,
    q_offset, leftpad_ptr, stride_offset, T, HQ, TW, window_splits, first_split, all_splits, scale,
    OFFSET: tl.constexpr, LEFTPAD: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, BLOCKS: tl.constexpr, W: tl.constexpr, RING: tl.constexpr,
    TILE: tl.constexpr, GT: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one query to a share of its window, or of its chosen blocks.

    Grid: (T * H * GROUPS, B, splits of the window + of the chosen blocks), those first that wait for nothing.
    """
    i_row, i_b, i_split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_g, i_t = i_row % GROUPS, i_row // GROUPS % T
    i_h, heads = i_row // GROUPS // T, tl.num_programs(0) // GROUPS // T
    pos0, pad = _first_position(i_b, q_offset, leftpad_ptr, stride_offset, OFFSET, LEFTPAD)
    i_q, i_head, used = _query_rows(i_t, i_t + 1, i_h, i_g, TILE, GT, G, BLOCK_M)
    q_ptrs = q_ptr + i_b * stride_qb + i_q * stride_qt + i_head * stride_qh
    q_1, q_2 = load_pair(q_ptrs, used, D, D1, D2, True)
    scale_log2 = scale * LOG2E
    m = tl.full([BLOCK_M], NEGATIVE, dtype=tl.float32)
    z = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc_1, acc_2 = empty_pair(BLOCK_M, DV1, DV2)

    position = pos0 + i_t
    if i_split < window_splits:
        first = pos0 + T - TW  # position of the first key
        low = tl.maximum(tl.maximum(position - W + 1, first), 0)
        share = tl.cdiv(tl.cdiv(tl.maximum(position + 1 - low, 0), BLOCK_N), window_splits) * BLOCK_N
        low += i_split * share
        k_ptrs = k_win_ptr + i_b * stride_kwb + i_h * stride_kwh
        v_ptrs = v_win_ptr + i_b * stride_vwb + i_h * stride_vwh
        for key in range(low, tl.minimum(low + share, position + 1), BLOCK_N):
            keys = key + tl.arange(0, BLOCK_N)
            mask_key = keys <= position
            index = ((keys + pad) % TW if RING else keys - first).to(tl.int64)
            k_1, k_2 = load_pair(k_ptrs + index * stride_kwt, mask_key, D, D1, D2, True)
            v_1, v_2 = load_pair(v_ptrs + index * stride_vwt, mask_key, DV, DV1, DV2, True)
            s = dot_pair(q_1, q_2, k_1, k_2, D2, PRECISION)
            s = tl.where(mask_key[None, :], s, float("-inf"))
            m, z, acc_1, acc_2 = softmax_step(s, m, z, acc_1, acc_2, v_1, v_2, scale_log2, DV2, PRECISION)
    else:
        i_part, parts = i_split - window_splits, tl.num_programs(2) - window_splits
        own = tl.where(position >= 0, position // BLOCKS, -1)
        chosen = tl.minimum(own + 1, N)
        tiles = tl.cdiv(chosen * BLOCKS, BLOCK_N)
        # the forced blocks come first: they are known before the kernel before has ended
        FORCED: tl.constexpr = INITIAL + LOCAL
        known = tl.where((own < N) | (FORCED == N), tiles, FORCED * BLOCKS // BLOCK_N)
        later = i_part + tl.cdiv(tl.maximum(known - i_part, 0), parts) * parts
        index_ptr += ((i_b * T + i_t) * heads + i_h) * N
        k_ptrs = k_ptr + i_b * stride_kb + i_h * stride_kh
        v_ptrs = v_ptr + i_b * stride_vb + i_h * stride_vh
        for part in tl.static_range(2):
            if part == 1:
                _wait_for_the_kernel_before(PDL)
            for i_tile in range(i_part if part == 0 else later, known if part == 0 else tiles, parts):
                offs_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
                # one index where a tile lies in one block
                order = i_tile * BLOCK_N // BLOCKS if BLOCKS % BLOCK_N == 0 else offs_n // BLOCKS
                if part == 0:
                    block = tl.where(order < tl.where(own < N, N, INITIAL), order, own - (FORCED - 1 - order))
                else:
                    slot = tl.where(order < FORCED, order + N - FORCED, order - LOCAL)
                    block = tl.load(index_ptr + tl.where(order < INITIAL, order, slot), mask=order < chosen, other=0)
                token = block * BLOCKS + offs_n % BLOCKS
                mask_key = (offs_n < chosen * BLOCKS) & (token <= position)
                slot = (token + pad).to(tl.int64)
                k_1, k_2 = load_pair(k_ptrs + slot * stride_kt, mask_key, D, D1, D2, True)
                v_1, v_2 = load_pair(v_ptrs + slot * stride_vt, mask_key, DV, DV1, DV2, True)
                s = dot_pair(q_1, q_2, k_1, k_2, D2, PRECISION)
                s = tl.where(mask_key[None, :], s, float("-inf"))
                m, z, acc_1, acc_2 = softmax_step(s, m, z, acc_1, acc_2, v_1, v_2, scale_log2, DV2, PRECISION)
    row = ((i_b * T + i_q) * HQ + i_head) * all_splits + first_split + i_split
    _store_split(o_ptr, lse_ptr, row, used, m * scale_log2, z, acc_1, acc_2, DV, DV1, DV2)


@triton.jit(do_not_specialize=["T", "splits_cmp", "splits_win", "splits"])
def _combine_kernel(
    parts_ptr, lse_ptr, g_cmp_ptr, g_slc_ptr, g_win_ptr, o_ptr,
    stride_gcb, stride_gct, stride_gch, stride_gsb, stride_gst, stride_gsh, stride_gwb, stride_gwt, stride_gwh,
    HQ, T, splits_cmp, splits_win, splits,
    DV: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Join the splits of each branch of one head of one query, and add up the gated branches.

    Splits of the compressed branch come first, then those of the window, then those of the selected branch.

    Grid: (HQ, T, B)
    """
    i_head, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g_cmp = tl.load(g_cmp_ptr + i_b * stride_gcb + i_t * stride_gct + i_head * stride_gch).to(tl.float32)
    g_slc = tl.load(g_slc_ptr + i_b * stride_gsb + i_t * stride_gst + i_head * stride_gsh).to(tl.float32)
    g_win = tl.load(g_win_ptr + i_b * stride_gwb + i_t * stride_gwt + i_head * stride_gwh).to(tl.float32)
    _wait_for_the_kernel_before(PDL)
    row = (i_b * T + i_t) * HQ + i_head
    parts_ptr += row * splits * DV
    lse_ptr += row * splits
    split, offs_d = tl.arange(0, TILE), tl.arange(0, BLOCK)
    # loaded before their weights are known: what a split without a key left there is dropped below
    mask_d = (offs_d < DV)[None, :]
    mask = (split < splits)[:, None] & mask_d
    part = tl.load(parts_ptr + split[:, None] * DV + offs_d[None, :], mask=mask, other=0.0)
    every = tl.arange(0, SPLITS)
    lse = tl.load(lse_ptr + every, mask=every < splits, other=float("-inf"))
    first_win, first_slc = splits_cmp, splits_cmp + splits_win
    peak_cmp, g_cmp = _normalize(tl.where(every < first_win, lse, float("-inf")), g_cmp)
    peak_win, g_win = _normalize(tl.where((every >= first_win) & (every < first_slc), lse, float("-inf")), g_win)
    peak_slc, g_slc = _normalize(tl.where(every >= first_slc, lse, float("-inf")), g_slc)

    o = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(0, splits, TILE):
        split = i + tl.arange(0, TILE)
        if i > 0:
            mask = (split < splits)[:, None] & mask_d
            part = tl.load(parts_ptr + split[:, None] * DV + offs_d[None, :], mask=mask, other=0.0)
        part_lse = tl.load(lse_ptr + split, mask=split < splits, other=float("-inf"))
        peak = tl.where(split < first_win, peak_cmp, tl.where(split < first_slc, peak_win, peak_slc))
        gate = tl.where(split < first_win, g_cmp, tl.where(split < first_slc, g_win, g_slc))
        some = part_lse > float("-inf")
        o += tl.sum(tl.where(some[:, None], part, 0.0) * (tl.exp2(part_lse - peak) * gate)[:, None], 0)
    tl.store(o_ptr + row * DV + offs_d, o.to(o_ptr.dtype.element_ty), mask=offs_d < DV)


@triton.jit
def _normalize(lse, gate):
    """Peak of the splits of a branch, and the gate over their sum relative to it."""
    peak = tl.max(lse, 0)
    peak = tl.where(peak > float("-inf"), peak, 0.0)
    total = tl.sum(tl.exp2(lse - peak), 0)
    return peak, gate / tl.where(total == 0, 1.0, total)
