# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Attention to the last w tokens in Triton: banded flash attention, the query heads of a group stacked in one tile.

Every loop takes the tiles at both ends of the band first, with a mask, and then those that need none.

Symbols: see `reference.py`; W is w, GT the heads of a group in one tile.
"""

import itertools

import torch
import triton
import triton.language as tl

from .library import define_attention
from .triton_common import (
    LOG2E,
    NEGATIVE,
    add_dkdv,
    add_dq,
    add_pair,
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
    precision,
    row_delta,
    softmax_end,
    softmax_step,
    split_head_dim,
    store_pair,
)
from .tuning import tunable

__all__ = ["window_attention", "window_backward", "window_forward"]


def window_attention(
    q, k, v, *, window_size, scale=None, leftpad=None, q_offset=0, cu_seqlens=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the tokens t - w + 1 … t (branch win); see `reference.window_attention`.

    Raises:
        NotImplementedError: `q_offset` is a tensor, `scale` <= 0, or a dtype or head dim without a kernel.
    """
    scale = check_inputs(q, scale, q_offset, k=k, v=v)
    return _attention(q, k, v, window_size, scale, leftpad, q_offset, cu_seqlens)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------


def _arguments(q, k, v, layout, window_size, scale):
    """Arguments that every kernel takes."""
    (d_1, d_2), (dv_1, dv_2) = split_head_dim(q.shape[-1]), split_head_dim(v.shape[-1])
    return {
        **layout.where(),
        "TW": k.shape[1],
        "W": window_size,
        "scale": scale,
        "G": q.shape[2] // k.shape[2],
        "D": q.shape[-1],
        "D1": d_1,
        "D2": d_2,
        "DV": v.shape[-1],
        "DV1": dv_1,
        "DV2": dv_2,
        "PRECISION": precision(q.dtype),
        "enable_fp_fusion": True,
    }


def _tiles(heads: int, rows: int) -> dict[str, int]:
    """Queries TILE and heads GT of a query tile of `rows` rows, and tiles GROUPS that hold all heads."""
    in_tile = min(heads, rows)
    return {"TILE": rows // in_tile, "GT": in_tile, "GROUPS": cdiv(heads, in_tile)}


def window_forward(q, k, v, window_size, scale, layout, branches=None, *, keep=True):
    """Forward pass, and the gated sum in its epilogue.

    Args:
        layout: Describes q, k, v.
        scale: Positive.
        branches: Contiguous o_cmp and o_slc, and g_cmp, g_slc, g_win; None: no sum.
        keep: Whether a backward pass may follow; else the sum takes the place of o_cmp, and is all there is.

    Returns:
        o_win, lse, None both unless `keep`; and `reference.gated_sum`, None without `branches`.
    """
    o, lse = empty_outputs(q, v, by_head=True) if keep else (None, None)
    total = None if branches is None else torch.empty_like(o) if keep else branches[0]
    if not q.numel():
        return o, lse, total
    q, k, v, b_o = map(layout.rows, (q, k, v, o if keep else total))
    lse_strides = layout.rows(lse[..., None]).stride()[:3] if keep else (0, 0, 0)
    o_cmp, o_slc, *gates = branches or (None,) * 5
    gate_rows = [layout.rows(g[..., None]).stride()[:3] if branches else (0, 0, 0) for g in gates]
    config = _forward_config(*_shape_key(q, k, v))
    tiles = _tiles(q.shape[2] // k.shape[2], config["BLOCK_M"])
    _forward_kernel[(layout.tiles(tiles["TILE"]), k.shape[2] * tiles["GROUPS"], layout.B)](
        q, o, lse, o_cmp, o_slc, total, *gates, layout.map(tiles["TILE"]),
        *q.stride()[:3], *b_o.stride()[:3], *lse_strides, *itertools.chain(*gate_rows),
        **describe("k", k, config["BLOCK_N"], packed=layout.packed),
        **describe("v", v, config["BLOCK_N"], packed=layout.packed),
        **_arguments(q, k, v, layout, window_size, scale), KEEP=keep, SUM=total is not None, **tiles, **config,
    )  # fmt: skip
    return o, lse, total


def _shape_key(q, k, v):
    """What configurations are chosen by."""
    return q.get_device(), q.dtype, q.shape[-1], v.shape[-1], q.shape[2] // k.shape[2]


@tunable(
    "window_forward",
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3),
    (64, 32, 8, 1), (64, 16, 8, 1), (32, 32, 4, 1),
    held="q", streamed="k v", accumulated="o s",
)  # fmt: skip
def _forward_config(dtype, D, DV, G):
    widest = max(D, DV)
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 32 if widest <= 64 else 16, "num_warps": 8, "num_stages": 1}
    warps = 4 if DV <= 128 else 8  # the outputs of two branches at once
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": warps, "num_stages": 3 if widest <= 128 else 2}


@tunable(
    "window_dq",
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2),
    (64, 32, 8, 1), (64, 16, 8, 1), (32, 32, 4, 1),
    held="q o", streamed="k v", accumulated="q s s",
)  # fmt: skip
def _dq_config(dtype, D, DV, G):
    widest = max(D, DV)
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 32 if widest <= 32 else 16, "num_warps": 8, "num_stages": 1}
    if widest <= 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}


@tunable(
    "window_dkdv",
    (32, 64, 3, 4, 3), (32, 64, 2, 4, 3), (32, 64, 3, 4, 4), (32, 64, 2, 4, 2), (32, 64, 2, 8, 2), (32, 32, 2, 8, 2),
    (32, 128, 3, 8, 3), (32, 32, 1, 8, 1), (32, 16, 1, 8, 1),
    held="k v", streamed="q o", accumulated="k v s s",
)  # fmt: skip
def _dkdv_config(dtype, D, DV, G):
    widest = max(D, DV)
    if dtype == torch.float32:
        keys, config = 32 if widest <= 128 else 16, {"EDGE_STAGES": 1, "num_warps": 8, "num_stages": 1}
    elif widest <= 128:
        keys, config = 64, {"EDGE_STAGES": 3, "num_warps": 4, "num_stages": 3}
    else:
        keys, config = 64 if widest <= 192 else 32, {"EDGE_STAGES": 2, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 32, "BLOCK_N": keys, **config}


def window_backward(do, q, k, v, lse, delta, window_size, scale, layout, *, gate=None, dq=None):
    """Backward pass.

    Args:
        do: Gradient of o, or with a gate of `gate · o`.
        q, k, v, layout, window_size, scale: As given to `window_forward`.
        lse: What it returned.
        delta: fp32 `[B, T, HQ]`, of `row_delta` by head, without the gate.
        gate: `[B, T, HQ]` or None.
        dq: Contiguous gradient of q by other branches, to which this one is added in place, or None.

    Returns:
        dq, dk, dv in the dtypes of q, k, v.
    """
    add = dq is not None
    dq = dq if add else like(q)[0]
    dk, dv = like(k, v)
    q, k, v, do, b_dq, b_dk, b_dv = map(layout.rows, (q, k, v, do, dq, dk, dv))
    lse, delta, gate = map(layout.head_values, (lse, delta, gate))
    if not q.numel() or not k.numel():
        return dq if add else dq.zero_(), dk.zero_(), dv.zero_()
    arguments = _arguments(q, k, v, layout, window_size, scale)
    H = k.shape[2]

    config = _dq_config(*_shape_key(q, k, v))
    tiles = _tiles(q.shape[2] // H, config["BLOCK_M"])
    _dq_kernel[(layout.tiles(tiles["TILE"]), H * tiles["GROUPS"], layout.B)](
        q, do, lse, delta, gate, b_dq, layout.map(tiles["TILE"]), *q.stride()[:3], *do.stride()[:3], *lse.stride(),
        *b_dq.stride()[:3], **describe("k", k, config["BLOCK_N"], packed=layout.packed),
        **describe("v", v, config["BLOCK_N"], packed=layout.packed), **arguments,
        HAS_GATE=gate is not None, ADD=add, **tiles, **config,
    )  # fmt: skip

    config = _dkdv_config(*_shape_key(q, k, v))
    keys = config["BLOCK_N"]
    tiles = layout.tiles(keys) if layout.packed else cdiv(k.shape[1], keys)
    _dkdv_kernel[(tiles, H, layout.B)](
        k, v, lse, delta, gate, b_dk, b_dv, layout.map(keys), *k.stride()[:3], *v.stride()[:3], *lse.stride(),
        *b_dk.stride()[:3], *b_dv.stride()[:3], **describe("q", q, config["BLOCK_M"], packed=layout.packed),
        **describe("do", do, config["BLOCK_M"], packed=layout.packed), **arguments, HAS_GATE=gate is not None, **config,
    )  # fmt: skip
    return dq, dk, dv


def _backward(do, dlse, q, k, v, o, lse, *sizes):
    do = torch.zeros_like(o) if do is None else do
    return window_backward(do, q, k, v, lse, row_delta(sizes[-1], o, do, dlse, by_head=True), *sizes)


_attention = define_attention(
    "window_attention",
    "q k v",
    "int window_size, float scale",
    "o lse",
    lambda *args: window_forward(*args)[:2],
    _backward,
    lambda q, k, v, *_: empty_outputs(q, v, by_head=True),
    learned=3,
    graded=2,
    kept=slice(2),
)


# ---------------------------------------------------------------------------------------------------------------------
# Forward and dQ
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _query_tile(
    i_tile, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, TW, W, PACKED: tl.constexpr, LEFTPAD: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where a tile of queries lies, and the key tiles of its band.

    Returns:
        start, rows, row0, pos0: See `locate`.
        slot0: Index of the key at position 0, negative if the keys start later.
        low: Position of the band's first key, where its first tile starts.
        front, total: Tiles with keys in front of a query's window; tiles of the band.
        whole: Tiles behind the front that every query sees in full.
    """
    _seq, start, rows, row0, pos0, pad = locate(
        i_tile, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, TILE, PACKED, LEFTPAD
    )
    slot0 = 0 if PACKED else pad + TW - T - q_offset
    first = pos0 + start
    last = pos0 + tl.minimum(start + TILE, rows) - 1
    low = tl.maximum(first - W + 1, tl.maximum(-slot0, 0))
    total = tl.cdiv(tl.maximum(last + 1 - low, 0), BLOCK_N)
    front = tl.minimum(tl.cdiv(tl.maximum(last - W + 1 - low, 0), BLOCK_N), total)
    whole = tl.maximum(tl.maximum(first + 1 - low, 0) // BLOCK_N - front, 0)
    return start, rows, row0, pos0, slot0, low, front, total, whole


@triton.jit
def _query_rows(start, rows, i_h, i_g, TILE: tl.constexpr, GT: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of a query tile: query inside the sequence, query head, and whether the row is used."""
    offs_m = tl.arange(0, BLOCK_M)
    i_q = start + offs_m // GT
    i_head = i_g * GT + offs_m % GT
    used = (offs_m // GT < TILE) & (i_head < G) & (i_q < rows)
    return i_q, i_h * G + i_head, used


@triton.jit
def _in_window(distance, W):
    """Whether a key so many tokens before a query is one of its W: 0 <= distance < W in one comparison."""
    return distance.to(tl.uint32, bitcast=True) < W.to(tl.uint32)


@triton.jit
def _load_keys(
    key, pos, W, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h, key0, rows, D1: tl.constexpr, D2: tl.constexpr,
    DV1: tl.constexpr, DV2: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Tiles of k and v from position `key` on, and `[M, N]`: which of them the queries at `pos` see."""
    k_1, k_2 = load_tile(k_desc, k_desc2, i_b, i_h, key0, rows, key, D1, D2, PACKED)
    v_1, v_2 = load_tile(v_desc, v_desc2, i_b, i_h, key0, rows, key, DV1, DV2, PACKED)
    keys = key + tl.arange(0, BLOCK_N)
    visible = _in_window(pos[:, None] - keys[None, :], W)
    return k_1, k_2, v_1, v_2, visible


@triton.jit(do_not_specialize=["T", "TW", "W", "q_offset"])
def _forward_kernel(
    q_ptr, o_ptr, lse_ptr, o_cmp_ptr, o_slc_ptr, sum_ptr, g_cmp_ptr, g_slc_ptr, g_win_ptr, map_ptr, stride_qb,
    stride_qt, stride_qh, stride_ob, stride_ot, stride_oh, stride_lb, stride_lt, stride_lh, stride_gcb, stride_gct,
    stride_gch, stride_gsb, stride_gst, stride_gsh, stride_gwb, stride_gwt, stride_gwh, k_desc, k_desc2, v_desc,
    v_desc2, cu_ptr, leftpad_ptr, T, q_offset, PACKED: tl.constexpr, LEFTPAD: tl.constexpr, TW, W, scale,
    G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr,
    DV2: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, GT: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEEP: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries to its band if KEEP; if SUM the gated sum of all branches, laid out like o.

    Grid: (tiles, H * GROUPS, B)
    """
    i_tile, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i_h, i_g = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    start, rows, row0, pos0, slot0, low, front, total, whole = _query_tile(
        i_tile, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, TW, W, PACKED, LEFTPAD, TILE, BLOCK_N
    )
    if start >= rows:
        return
    i_q, i_head, used = _query_rows(start, rows, i_h, i_g, TILE, GT, G, BLOCK_M)
    t = row0 + i_q
    pos = tl.where(used, pos0 + i_q, pos0 + start)
    q_1, q_2 = load_pair(q_ptr + i_b * stride_qb + t * stride_qt + i_head * stride_qh, used, D, D1, D2, True)
    key0 = row0 + slot0

    scale_log2 = scale * LOG2E
    m = tl.full([BLOCK_M], NEGATIVE, dtype=tl.float32)
    z = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc_1, acc_2 = empty_pair(BLOCK_M, DV1, DV2)
    for i in range(0, total - whole):
        key = low + tl.where(i < front, i, i + whole) * BLOCK_N
        k_1, k_2, v_1, v_2, visible = _load_keys(
            key, pos, W, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h, key0, rows, D1, D2, DV1, DV2, BLOCK_N, PACKED
        )
        s = tl.where(visible, dot_pair(q_1, q_2, k_1, k_2, D2, PRECISION), float("-inf"))
        m, z, acc_1, acc_2 = softmax_step(s, m, z, acc_1, acc_2, v_1, v_2, scale_log2, DV2, PRECISION)
    for i in range(front, front + whole):
        key = low + i * BLOCK_N
        k_1, k_2, v_1, v_2, visible = _load_keys(
            key, pos, W, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h, key0, rows, D1, D2, DV1, DV2, BLOCK_N, PACKED
        )
        s = dot_pair(q_1, q_2, k_1, k_2, D2, PRECISION)
        m, z, acc_1, acc_2 = softmax_step(s, m, z, acc_1, acc_2, v_1, v_2, scale_log2, DV2, PRECISION)
    acc_1, acc_2, lse = softmax_end(m, z, acc_1, acc_2, scale_log2, DV2)
    offs_o = i_b * stride_ob + t * stride_ot + i_head * stride_oh
    if KEEP:
        store_pair(o_ptr + offs_o, acc_1, acc_2, used, DV, DV1, DV2)
        tl.store(lse_ptr + i_b * stride_lb + t * stride_lt + i_head * stride_lh, lse, mask=used)
    if SUM:
        g_win = tl.load(g_win_ptr + i_b * stride_gwb + t * stride_gwt + i_head * stride_gwh, mask=used, other=0.0)
        g_slc = tl.load(g_slc_ptr + i_b * stride_gsb + t * stride_gst + i_head * stride_gsh, mask=used, other=0.0)
        g_cmp = tl.load(g_cmp_ptr + i_b * stride_gcb + t * stride_gct + i_head * stride_gch, mask=used, other=0.0)
        acc_1 *= g_win.to(tl.float32)[:, None]
        if DV2 > 0:
            acc_2 *= g_win.to(tl.float32)[:, None]
        acc_1, acc_2 = _add_gated(acc_1, acc_2, o_slc_ptr + offs_o, g_slc, used, DV, DV1, DV2)
        acc_1, acc_2 = _add_gated(acc_1, acc_2, o_cmp_ptr + offs_o, g_cmp, used, DV, DV1, DV2)
        store_pair(sum_ptr + offs_o, acc_1, acc_2, used, DV, DV1, DV2)


@triton.jit
def _add_gated(acc_1, acc_2, row_ptrs, gate, used, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr):
    """Add `gate · o` of another branch."""
    o_1, o_2 = load_pair(row_ptrs, used, DV, DV1, DV2, True)
    acc_1 += gate.to(tl.float32)[:, None] * o_1.to(tl.float32)
    if DV2 > 0:
        acc_2 += gate.to(tl.float32)[:, None] * o_2.to(tl.float32)
    return acc_1, acc_2


@triton.jit(do_not_specialize=["T", "TW", "W", "q_offset"])
def _dq_kernel(
    q_ptr, do_ptr, lse_ptr, delta_ptr, gate_ptr, dq_ptr, map_ptr, stride_qb, stride_qt, stride_qh, stride_dob,
    stride_dot, stride_doh, stride_lb, stride_lt, stride_lh, stride_dqb, stride_dqt, stride_dqh, k_desc, k_desc2,
    v_desc, v_desc2, cu_ptr, leftpad_ptr, T, q_offset, PACKED: tl.constexpr, LEFTPAD: tl.constexpr, TW, W, scale,
    HAS_GATE: tl.constexpr, ADD: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    GT: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, added to what is there if ADD.

    Grid: (tiles, H * GROUPS, B)
    """
    i_tile, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i_h, i_g = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    start, rows, row0, pos0, slot0, low, front, total, whole = _query_tile(
        i_tile, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, TW, W, PACKED, LEFTPAD, TILE, BLOCK_N
    )
    if start >= rows:
        return
    i_q, i_head, used = _query_rows(start, rows, i_h, i_g, TILE, GT, G, BLOCK_M)
    t = row0 + i_q
    pos = tl.where(used, pos0 + i_q, pos0 + start)
    q_1, q_2 = load_pair(q_ptr + i_b * stride_qb + t * stride_qt + i_head * stride_qh, used, D, D1, D2, True)
    do_ptrs = do_ptr + i_b * stride_dob + t * stride_dot + i_head * stride_doh
    do_1, do_2 = load_pair(do_ptrs, used, DV, DV1, DV2, True)
    row = i_b * stride_lb + t * stride_lt + i_head * stride_lh
    lse = tl.load(lse_ptr + row, mask=used, other=float("inf"))
    lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)  # a row without a key: every p is 0
    delta = tl.load(delta_ptr + row, mask=used, other=0.0)
    gate = delta
    if HAS_GATE:
        gate = tl.load(gate_ptr + row, mask=used, other=0.0)
    key0 = row0 + slot0

    scale_log2 = scale * LOG2E
    acc_1, acc_2 = empty_pair(BLOCK_M, D1, D2)
    for i in range(0, total - whole):
        key = low + tl.where(i < front, i, i + whole) * BLOCK_N
        k_1, k_2, v_1, v_2, visible = _load_keys(
            key, pos, W, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h, key0, rows, D1, D2, DV1, DV2, BLOCK_N, PACKED
        )
        acc_1, acc_2 = add_dq(
            acc_1, acc_2, q_1, q_2, do_1, do_2, k_1, k_2, v_1, v_2, visible, lse_log2, delta, gate, scale_log2,
            D2, DV2, HAS_GATE, True, PRECISION,
        )  # fmt: skip
    for i in range(front, front + whole):
        key = low + i * BLOCK_N
        k_1, k_2, v_1, v_2, visible = _load_keys(
            key, pos, W, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h, key0, rows, D1, D2, DV1, DV2, BLOCK_N, PACKED
        )
        acc_1, acc_2 = add_dq(
            acc_1, acc_2, q_1, q_2, do_1, do_2, k_1, k_2, v_1, v_2, visible, lse_log2, delta, gate, scale_log2,
            D2, DV2, HAS_GATE, False, PRECISION,
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
# dK, dV
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _dkdv_step(
    first, end, i_b, i_head, row0, rows, key, pos0, W, k_1, k_2, v_1, v_2, dk_1, dk_2, dv_1, dv_2, q_desc, q_desc2,
    do_desc, do_desc2, lse_ptr, delta_ptr, gate_ptr, stride_lt, stride_lh, scale_log2, D1: tl.constexpr,
    D2: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, HAS_GATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Add the queries `first … first + BLOCK_M - 1` of one head, up to `end`, to dk and dv."""
    q_1, q_2 = load_tile(q_desc, q_desc2, i_b, i_head, row0, rows, first, D1, D2, PACKED)
    do_1, do_2 = load_tile(do_desc, do_desc2, i_b, i_head, row0, rows, first, DV1, DV2, PACKED)
    t = first + tl.arange(0, BLOCK_M)
    used = t < end
    stat = i_head * stride_lh + t * stride_lt
    gate_ptrs = gate_ptr + stat if HAS_GATE else delta_ptr + stat
    if MASKED:
        lse = tl.load(lse_ptr + stat, mask=used, other=float("inf"))
        delta = tl.load(delta_ptr + stat, mask=used, other=0.0)
        gate = tl.load(gate_ptrs, mask=used, other=0.0)
    else:
        lse = tl.load(lse_ptr + stat)
        delta = tl.load(delta_ptr + stat)
        gate = tl.load(gate_ptrs)
    pos = tl.where(used, pos0 + t, -1)  # before every key
    visible = _in_window(pos[None, :] - key[:, None], W)
    return add_dkdv(
        dk_1, dk_2, dv_1, dv_2, k_1, k_2, v_1, v_2, q_1, q_2, do_1, do_2, visible, lse * LOG2E, delta, gate,
        scale_log2, D2, DV2, HAS_GATE, MASKED, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "TW", "W", "q_offset"])
def _dkdv_kernel(
    k_ptr, v_ptr, lse_ptr, delta_ptr, gate_ptr, dk_ptr, dv_ptr, map_ptr, stride_kb, stride_kt, stride_kh, stride_vb,
    stride_vt, stride_vh, stride_lb, stride_lt, stride_lh, stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt,
    stride_dvh, q_desc, q_desc2, do_desc, do_desc2, cu_ptr, leftpad_ptr, T, q_offset, PACKED: tl.constexpr,
    LEFTPAD: tl.constexpr, TW, W, scale, HAS_GATE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys.

    Grid: (key tiles, H, B)
    """
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    _seq, start, rows, row0, pos0, pad = locate(
        i_tile, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, BLOCK_N, PACKED, LEFTPAD
    )
    keys = rows if PACKED else TW
    if start >= keys:
        return
    slot0 = 0 if PACKED else pad + TW - T - q_offset
    slot = start + tl.arange(0, BLOCK_N)
    inside = slot < keys
    t_key = row0 + slot
    key = slot - slot0
    key = tl.where(key < 0, 2**30, key)  # padding: behind every query
    k_1, k_2 = load_pair(k_ptr + i_b * stride_kb + i_h * stride_kh + t_key * stride_kt, inside, D, D1, D2, True)
    v_1, v_2 = load_pair(v_ptr + i_b * stride_vb + i_h * stride_vh + t_key * stride_vt, inside, DV, DV1, DV2, True)
    stat = i_b * stride_lb + row0 * stride_lt
    lse_ptr += stat
    delta_ptr += stat
    if HAS_GATE:
        gate_ptr += stat

    # queries that see a key of the tile: first … end - 1; all keys: from tile `front` on, `whole` tiles
    first_key = start - slot0
    first = tl.maximum(tl.maximum(first_key, 0) - pos0, 0)
    end = tl.minimum(first_key + BLOCK_N + W - 1 - pos0, rows)
    seen = tl.minimum(first_key + W - pos0, rows)
    total = tl.cdiv(tl.maximum(end - first, 0), BLOCK_M)
    front = tl.minimum(tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - pos0 - first, 0), BLOCK_M), total)
    whole = tl.maximum(tl.maximum(seen - first, 0) // BLOCK_M - front, 0)
    whole = tl.where(first_key < 0, 0, whole)
    edge = total - whole
    # compilers take a divisor for anything but 0, and the loops below for loops that run
    per_edge, per_whole = tl.maximum(edge, 1), tl.maximum(whole, 1)

    scale_log2 = scale * LOG2E
    dk_1, dk_2 = empty_pair(BLOCK_N, D1, D2)
    dv_1, dv_2 = empty_pair(BLOCK_N, DV1, DV2)
    for i in tl.range(0, G * edge, num_stages=EDGE_STAGES):
        tile = i % per_edge
        tile = tl.where(tile < front, tile, tile + whole)
        dk_1, dk_2, dv_1, dv_2 = _dkdv_step(
            first + tile * BLOCK_M, end, i_b, i_h * G + i // per_edge, row0, rows, key, pos0, W, k_1, k_2, v_1, v_2,
            dk_1, dk_2, dv_1, dv_2, q_desc, q_desc2, do_desc, do_desc2, lse_ptr, delta_ptr, gate_ptr, stride_lt,
            stride_lh, scale_log2, D1, D2, DV1, DV2, HAS_GATE, PRECISION, BLOCK_M, True, PACKED,
        )  # fmt: skip
    for i in range(0, G * whole):
        dk_1, dk_2, dv_1, dv_2 = _dkdv_step(
            first + (front + i % per_whole) * BLOCK_M, end, i_b, i_h * G + i // per_whole, row0, rows, key, pos0, W,
            k_1, k_2, v_1, v_2, dk_1, dk_2, dv_1, dv_2, q_desc, q_desc2, do_desc, do_desc2, lse_ptr, delta_ptr,
            gate_ptr, stride_lt, stride_lh, scale_log2, D1, D2, DV1, DV2, HAS_GATE, PRECISION, BLOCK_M, False, PACKED,
        )  # fmt: skip
    dk_1 *= scale
    if D2 > 0:
        dk_2 *= scale
    store_pair(dk_ptr + i_b * stride_dkb + i_h * stride_dkh + t_key * stride_dkt, dk_1, dk_2, inside, D, D1, D2)
    store_pair(dv_ptr + i_b * stride_dvb + i_h * stride_dvh + t_key * stride_dvt, dv_1, dv_2, inside, DV, DV1, DV2)
