# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Attention to the compressed blocks in Triton, forward and backward: `reference.compressed_attention`.

Flash attention with a staircase for a mask: position t sees the first (t + 1 - l) // d + 1 compressed blocks. Forward
and dq take a tile of queries of one head; dk and dv take a tile of blocks and one query head, and the heads of a group
are summed afterwards in fixed order: two runs give the same bits.
"""

import torch
import triton
import triton.language as tl

from .library import define_attention
from .reference import compressed_cu_seqlens
from .triton_common import (
    LOG2E,
    NEGATIVE,
    add_dq,
    add_product,
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
    softmax_step,
    split_head_dim,
    store_pair,
    tile_map,
)
from .tuning import tunable

__all__ = ["compressed_attention", "compressed_backward", "compressed_forward"]

# Arguments that change with the number of tokens: a kernel is not compiled anew for each kind of value.
_VARYING = ["T", "C", "q_offset", "tiles", "stride_lb", "stride_lh"]


def compressed_attention(
    q,
    k_cmp,
    v_cmp,
    *,
    compress_block_size,
    compress_stride,
    scale=None,
    leftpad=None,
    q_offset=0,
    cu_seqlens=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the compressed blocks (eq. 5, branch cmp): block i is visible to position t if i·d + l - 1 <= t.

    Args:
        q: `[B, T, HQ, D]`; bf16, fp16 or fp32.
        k_cmp: `[B, C, H, D]`, v_cmp: `[B, C, H, DV]`, in the dtype of `q`.
        scale: Factor of the scores, > 0, default `D ** -0.5`.
        leftpad, q_offset, cu_seqlens: As for the reference; `q_offset` is an int.

    Returns:
        o_cmp `[B, T, HQ, DV]` in the dtype of `q`, lse `[B, T, HQ]` fp32, both with gradients.

    Raises:
        NotImplementedError: `q_offset` is a tensor, `scale` <= 0, or a dtype or head dim without a kernel.
    """
    scale = check_inputs(q, scale, q_offset, k_cmp=k_cmp, v_cmp=v_cmp)
    return _attention(q, k_cmp, v_cmp, compress_block_size, compress_stride, scale, leftpad, q_offset, cu_seqlens)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------


def compressed_forward(q, k_cmp, v_cmp, compress_block_size, compress_stride, scale, layout):
    """Outputs of `compressed_attention`, without autograd; the values of a head of `lse` lie side by side."""
    HQ = q.shape[-2]
    o, lse = empty_outputs(q, v_cmp, by_head=True)
    config = _forward_config(*_shape_key(q, k_cmp, v_cmp, compress_block_size, compress_stride))
    tiles = layout.tiles(config["BLOCK_M"])
    q, k, v, o_rows, b_lse = map(layout.rows, (q, k_cmp, v_cmp, o, lse[..., None]))
    if not k.numel():
        o.zero_()
        lse.fill_(float("-inf"))
    elif o.numel():
        _forward_kernel[(HQ, tiles, layout.B)](
            q, o_rows, b_lse, *strides(q, o_rows, b_lse),
            **describe("k", k, config["BLOCK_N"], packed=layout.packed),
            **describe("v", v, config["BLOCK_N"], packed=layout.packed),
            map_ptr=layout.map(config["BLOCK_M"]),
            cu_k_ptr=cu_blocks(layout, compress_block_size, compress_stride),
            **layout.where(),
            C=k.shape[1], scale=scale, tiles=tiles,
            **_shapes(q, k, v, compress_block_size, compress_stride), **config,
        )  # fmt: skip
    return o, lse


def compressed_backward(
    do, q, k_cmp, v_cmp, lse, delta, compress_block_size, compress_stride, scale, layout, *, gate=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `compressed_attention`.

    Args:
        do: `[B, T, HQ, DV]`, gradient of o_cmp, or with a gate of `gate · o_cmp`.
        lse: `[B, T, HQ]`, of the forward pass.
        delta: fp32 `[B, T, HQ]`, of `row_delta` by head, without the gate.
        gate: `[B, T, HQ]` or None.

    Returns:
        dq, dk_cmp, dv_cmp in the shapes and dtypes of q, k_cmp, v_cmp.
    """
    HQ, D, DV, G = *q.shape[-2:], v_cmp.shape[-1], q.shape[-2] // k_cmp.shape[-2]
    (dq,) = like(q)
    q, k, v, do, dq_rows = (layout.rows(x) for x in (q, k_cmp, v_cmp, do, dq))
    lse, delta, gate = map(layout.head_values, (lse, delta, gate))
    B, C = k.shape[:2]
    cu_k = cu_blocks(layout, compress_block_size, compress_stride)
    stats = {f"stride_l{dim}": stride for dim, stride in zip("bth", lse.stride(), strict=True)}
    stats["HAS_GATE"] = gate is not None
    shapes = _shapes(q, k, v, compress_block_size, compress_stride)
    dk_cmp, dv_cmp = like(k_cmp, v_cmp)
    if not k.numel() or not dq.numel():
        return dq.zero_(), dk_cmp.zero_(), dv_cmp.zero_()
    key = _shape_key(q, k, v, compress_block_size, compress_stride)
    config = _dq_config(*key)
    tiles = layout.tiles(config["BLOCK_M"])
    _backward_q_kernel[(HQ, tiles, B)](
        q, do, dq_rows, lse, delta, gate, *strides(q, do, dq_rows),
        **describe("k", k, config["BLOCK_N"], packed=layout.packed),
        **describe("v", v, config["BLOCK_N"], packed=layout.packed), **stats,
        map_ptr=layout.map(config["BLOCK_M"]), cu_k_ptr=cu_k, **layout.where(),
        C=C, scale=scale, tiles=tiles, **shapes, **config,
    )  # fmt: skip

    # one partial gradient per query head: enough programs at any G, and a sum in fixed order
    allocate = torch.zeros if layout.packed else torch.empty  # packed: rows behind the last sequence have no program
    part_k, part_v = (allocate(B, HQ, C, x, dtype=torch.float32, device=q.device).transpose(1, 2) for x in (D, DV))
    config = _dkdv_config(*key)
    together = _held_together(q.dtype, D, DV)
    tile = config["BLOCK_N"]
    tiles = C // tile + layout.N if layout.packed else cdiv(C, tile)
    map_ptr = tile_map(cu_k, tile, C) if layout.packed else None
    for want_dk, want_dv in ((True, True),) if together else ((True, False), (False, True)):
        _backward_kv_kernel[(HQ, tiles, B)](
            k, v, part_k, part_v, lse, delta, gate, *strides(k, v),
            **describe("q", q, config["BLOCK_M"], packed=layout.packed),
            **describe("do", do, config["BLOCK_M"], packed=layout.packed), **stats,
            map_ptr=map_ptr, cu_k_ptr=cu_k, **layout.where(), C=C, scale=scale,
            WANT_DK=want_dk, WANT_DV=want_dv, **shapes, **config,
        )  # fmt: skip
    for part, grad in ((part_k, layout.rows(dk_cmp)), (part_v, layout.rows(dv_cmp))):
        _sum_heads_kernel[(cdiv(C, 16), k.shape[2], B)](
            part, grad, *strides(part, grad), C, G=G, D=grad.shape[-1], BLOCK=next_power_of_2(grad.shape[-1]), TILE=16,
            num_warps=4,
        )  # fmt: skip
    return dq, dk_cmp, dv_cmp


def _backward(do, dlse, q, k_cmp, v_cmp, o, lse, *sizes):
    do = torch.zeros_like(o) if do is None else do
    delta = row_delta(sizes[-1], o, do, dlse, by_head=True)
    return compressed_backward(do, q, k_cmp, v_cmp, lse, delta, *sizes)


_attention = define_attention(
    "compressed_attention",
    "q k_cmp v_cmp",
    "int compress_block_size, int compress_stride, float scale",
    "o lse",
    compressed_forward,
    _backward,
    lambda q, k_cmp, v_cmp, *_: empty_outputs(q, v_cmp, by_head=True),
    learned=3,
    graded=2,
    kept=slice(2),
)


def strides(*tensors):
    """Strides of batch, token and head of each tensor."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def head_dims(x, name):
    """A head dim and the two tiles that hold it, named e.g. D, D1 and D2."""
    first, second = split_head_dim(x.shape[-1])
    return {name: x.shape[-1], f"{name}1": first, f"{name}2": second}


def _shapes(q, k, v, compress_block_size, compress_stride):
    return {
        "G": q.shape[2] // k.shape[2],
        **head_dims(q, "D"),
        **head_dims(v, "DV"),
        "SIZE": compress_block_size,
        "STRIDE": compress_stride,
        "PRECISION": precision(q.dtype),
    }


def cu_blocks(layout, compress_block_size, compress_stride):
    """Cumulative numbers of compressed blocks, None unless packed."""
    if not layout.packed:
        return None
    return compressed_cu_seqlens(layout.cu_seqlens, compress_block_size, compress_stride)


def _shape_key(q, k, v, compress_block_size, compress_stride):
    """What configurations are chosen by."""
    G = q.shape[-2] // k.shape[-2]
    return q.get_device(), q.dtype, q.shape[-1], v.shape[-1], G, compress_block_size, compress_stride


@tunable(
    "compressed_forward",
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3),
    (128, 128, 8, 2), (64, 32, 8, 1), (64, 16, 8, 1), (32, 32, 4, 1),
    held="q", streamed="k v", accumulated="o s",
)  # fmt: skip
def _forward_config(dtype, D, DV, G, compress_block_size, compress_stride):
    return _row_config(dtype, D, DV, backward=False)


@tunable(
    "compressed_dq",
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2),
    (64, 32, 8, 1), (64, 16, 8, 1), (32, 32, 4, 1),
    held="q o", streamed="k v", accumulated="q s s",
)  # fmt: skip
def _dq_config(dtype, D, DV, G, compress_block_size, compress_stride):
    return _row_config(dtype, D, DV, backward=True)


def _row_config(dtype, D, DV, backward):
    """Tiles of the kernels that own a tile of queries."""
    widest = max(D, DV)
    if dtype == torch.float32:
        keys = 32 if widest <= (32 if backward else 64) else 16
        return {"BLOCK_M": 64 if widest <= 128 else 32, "BLOCK_N": keys, "num_warps": 8, "num_stages": 1}
    if widest <= 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2 if backward else 3}
    return {"BLOCK_M": 128, "BLOCK_N": 32 if backward else 64, "num_warps": 8, "num_stages": 2}


@tunable(
    "compressed_dkdv",
    (32, 128, 8, 3), (32, 128, 8, 4), (32, 64, 4, 3), (32, 64, 4, 4), (32, 64, 8, 2), (32, 64, 8, 3), (64, 64, 8, 2),
    (64, 128, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1),
    held="k v", streamed="q o", accumulated="k v s s",
)  # fmt: skip
def _dkdv_config(dtype, D, DV, G, compress_block_size, compress_stride):
    widest = max(D, DV)
    if dtype == torch.float32:
        keys, stages = 32, 1
    elif widest <= 128:
        keys, stages = 128, 4
    else:
        keys, stages = 64, 2
    return {"BLOCK_M": 32, "BLOCK_N": keys, "num_warps": 8, "num_stages": stages}


def _held_together(dtype, D, DV):
    """Whether one launch of the kernel that owns a tile of compressed blocks holds both dk and dv."""
    return max(D, DV) <= 128 or (dtype != torch.float32 and D + DV <= 320)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def visible_blocks(position, C, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Number of the C compressed blocks that are complete at a position: the last token of block i is i·d + l - 1."""
    return tl.minimum(tl.maximum(position + 1 - SIZE + STRIDE, 0) // STRIDE, C)


@triton.jit
def locate_blocks(i_seq, cu_k_ptr, C, PACKED: tl.constexpr):
    """First compressed block of a sequence inside its row of the tensor (int64), and their number."""
    if PACKED:
        block0 = tl.load(cu_k_ptr + i_seq).to(tl.int64)
        blocks = (tl.load(cu_k_ptr + i_seq + 1) - block0).to(tl.int32)
    else:
        block0 = tl.zeros([], dtype=tl.int64)
        blocks = C
    return block0, blocks


@triton.jit
def _forward_step(
    q_1, q_2, m, z, acc_1, acc_2, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h, block0, blocks,
    start, offs_n, n_visible, scale_log2,
    D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    MASK: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of compressed blocks; MASK where some query of the tile does not see all of it."""
    offs_key = start + offs_n
    k_1, k_2 = load_tile(k_desc, k_desc2, i_b, i_h, block0, blocks, start, D1, D2, PACKED)
    v_1, v_2 = load_tile(v_desc, v_desc2, i_b, i_h, block0, blocks, start, DV1, DV2, PACKED)
    s = dot_pair(q_1, q_2, k_1, k_2, D2, PRECISION)
    if MASK:
        s = tl.where(offs_key[None, :] < n_visible[:, None], s, float("-inf"))
    return softmax_step(s, m, z, acc_1, acc_2, v_1, v_2, scale_log2, DV2, PRECISION)


@triton.jit(do_not_specialize=_VARYING)
def _forward_kernel(
    q_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_ob, stride_ot, stride_oh, stride_lb, stride_lt, stride_lh,
    k_desc, k_desc2, v_desc, v_desc2,
    map_ptr, cu_ptr, cu_k_ptr, leftpad_ptr, T, C, q_offset, scale, tiles,
    G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    PACKED: tl.constexpr, LEFTPAD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o and lse of a tile of queries of one head.

    Grid: (HQ, tiles, B), the tiles with most blocks first.
    """
    i_head, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_tile = tiles - 1 - tl.program_id(1)
    i_seq, start, rows, row0, pos0, _ = locate(
        i_tile, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, BLOCK_M, PACKED, LEFTPAD
    )
    if start >= rows:
        return
    block0, blocks = locate_blocks(i_seq, cu_k_ptr, C, PACKED)

    offs_m = start + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < rows
    offs_row = row0 + offs_m
    n_visible = visible_blocks(pos0 + offs_m, blocks, SIZE, STRIDE)
    n_all = visible_blocks(pos0 + start, blocks, SIZE, STRIDE) // BLOCK_N * BLOCK_N
    n_any = visible_blocks(pos0 + tl.minimum(start + BLOCK_M, rows) - 1, blocks, SIZE, STRIDE)

    q_ptrs = q_ptr + i_b * stride_qb + i_head * stride_qh + offs_row * stride_qt
    q_1, q_2 = load_pair(q_ptrs, mask_m, D, D1, D2, True)

    acc_1, acc_2 = empty_pair(BLOCK_M, DV1, DV2)
    m = tl.full([BLOCK_M], NEGATIVE, dtype=tl.float32)
    z = tl.zeros([BLOCK_M], dtype=tl.float32)
    scale_log2 = scale * LOG2E
    for i in range(0, n_all, BLOCK_N):
        m, z, acc_1, acc_2 = _forward_step(
            q_1, q_2, m, z, acc_1, acc_2, k_desc, k_desc2, v_desc, v_desc2, i_b, i_head // G, block0, blocks,
            i, offs_n, n_visible, scale_log2, D1, D2, DV1, DV2, False, PACKED, PRECISION,
        )  # fmt: skip
    for i in range(n_all, n_any, BLOCK_N):
        m, z, acc_1, acc_2 = _forward_step(
            q_1, q_2, m, z, acc_1, acc_2, k_desc, k_desc2, v_desc, v_desc2, i_b, i_head // G, block0, blocks,
            i, offs_n, n_visible, scale_log2, D1, D2, DV1, DV2, True, PACKED, PRECISION,
        )  # fmt: skip

    acc_1, acc_2, lse = softmax_end(m, z, acc_1, acc_2, scale_log2, DV2)
    tl.store(lse_ptr + i_b * stride_lb + i_head * stride_lh + offs_row * stride_lt, lse, mask=mask_m)
    o_ptrs = o_ptr + i_b * stride_ob + i_head * stride_oh + offs_row * stride_ot
    store_pair(o_ptrs, acc_1, acc_2, mask_m, DV, DV1, DV2)


@triton.jit
def _backward_q_step(
    q_1, q_2, do_1, do_2, dq_1, dq_2, lse, delta, gate, k_desc, k_desc2, v_desc, v_desc2, i_b, i_h, block0, blocks,
    start, offs_n, n_visible, scale_log2, D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    HAS_GATE: tl.constexpr, MASK: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of compressed blocks, still without the factor `scale`."""
    offs_key = start + offs_n
    k_1, k_2 = load_tile(k_desc, k_desc2, i_b, i_h, block0, blocks, start, D1, D2, PACKED)
    v_1, v_2 = load_tile(v_desc, v_desc2, i_b, i_h, block0, blocks, start, DV1, DV2, PACKED)
    return add_dq(
        dq_1, dq_2, q_1, q_2, do_1, do_2, k_1, k_2, v_1, v_2, offs_key[None, :] < n_visible[:, None], lse, delta, gate,
        scale_log2, D2, DV2, HAS_GATE, MASK, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def _backward_q_kernel(
    q_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, gate_ptr,
    stride_qb, stride_qt, stride_qh, stride_ob, stride_ot, stride_oh, stride_gb, stride_gt, stride_gh,
    k_desc, k_desc2, v_desc, v_desc2,
    stride_lb, stride_lt, stride_lh,
    map_ptr, cu_ptr, cu_k_ptr, leftpad_ptr, T, C, q_offset, scale, tiles,
    G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    PACKED: tl.constexpr, LEFTPAD: tl.constexpr, HAS_GATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries of one head.

    Grid: (HQ, tiles, B), the tiles with most blocks first.
    """
    i_head, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_tile = tiles - 1 - tl.program_id(1)
    i_seq, start, rows, row0, pos0, _ = locate(
        i_tile, i_b, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, BLOCK_M, PACKED, LEFTPAD
    )
    if start >= rows:
        return
    block0, blocks = locate_blocks(i_seq, cu_k_ptr, C, PACKED)

    offs_m = start + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < rows
    offs_row = row0 + offs_m
    n_visible = visible_blocks(pos0 + offs_m, blocks, SIZE, STRIDE)
    n_all = visible_blocks(pos0 + start, blocks, SIZE, STRIDE) // BLOCK_N * BLOCK_N
    n_any = visible_blocks(pos0 + tl.minimum(start + BLOCK_M, rows) - 1, blocks, SIZE, STRIDE)

    q_ptrs = q_ptr + i_b * stride_qb + i_head * stride_qh + offs_row * stride_qt
    do_ptrs = do_ptr + i_b * stride_ob + i_head * stride_oh + offs_row * stride_ot
    q_1, q_2 = load_pair(q_ptrs, mask_m, D, D1, D2, True)
    do_1, do_2 = load_pair(do_ptrs, mask_m, DV, DV1, DV2, True)
    stat = i_b * stride_lb + i_head * stride_lh + offs_row * stride_lt
    lse = tl.load(lse_ptr + stat, mask=mask_m, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + stat, mask=mask_m, other=0.0)
    gate = delta
    if HAS_GATE:
        gate = tl.load(gate_ptr + stat, mask=mask_m, other=0.0)

    dq_1, dq_2 = empty_pair(BLOCK_M, D1, D2)
    scale_log2 = scale * LOG2E
    for i in range(0, n_all, BLOCK_N):
        dq_1, dq_2 = _backward_q_step(
            q_1, q_2, do_1, do_2, dq_1, dq_2, lse, delta, gate, k_desc, k_desc2, v_desc, v_desc2, i_b, i_head // G,
            block0, blocks, i, offs_n, n_visible, scale_log2, D1, D2, DV1, DV2, HAS_GATE, False, PACKED, PRECISION,
        )  # fmt: skip
    for i in range(n_all, n_any, BLOCK_N):
        dq_1, dq_2 = _backward_q_step(
            q_1, q_2, do_1, do_2, dq_1, dq_2, lse, delta, gate, k_desc, k_desc2, v_desc, v_desc2, i_b, i_head // G,
            block0, blocks, i, offs_n, n_visible, scale_log2, D1, D2, DV1, DV2, HAS_GATE, True, PACKED, PRECISION,
        )  # fmt: skip
    if D2 > 0:
        dq_2 *= scale
    dq_ptrs = dq_ptr + i_b * stride_gb + i_head * stride_gh + offs_row * stride_gt
    store_pair(dq_ptrs, dq_1 * scale, dq_2, mask_m, D, D1, D2)


@triton.jit
def _backward_kv_step(
    k_1, k_2, v_1, v_2, dk_1, dk_2, dv_1, dv_2, q_desc, q_desc2, do_desc, do_desc2, i_b, i_head, row0, rows,
    lse_ptr, delta_ptr, gate_ptr, stride_lt, start, offs_m, unseen, seeing, scale_log2,
    D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, HAS_GATE: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (still without the factor `scale`) and dv of one tile of queries.

    Args:
        unseen, seeing: `[N]`, queries before the first that sees a block, and queries from there on.
    """
    q_1, q_2 = load_tile(q_desc, q_desc2, i_b, i_head, row0, rows, start, D1, D2, PACKED)
    do_1, do_2 = load_tile(do_desc, do_desc2, i_b, i_head, row0, rows, start, DV1, DV2, PACKED)
    mask_m = offs_m < rows - start
    stat = start * stride_lt + offs_m * stride_lt
    lse = tl.load(lse_ptr + stat, mask=mask_m, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + stat, mask=mask_m, other=0.0)
    s = dot_pair(k_1, k_2, q_1, q_2, D2, PRECISION)
    p = tl.exp2(s * scale_log2 - lse[None, :])
    since = (start + offs_m)[None, :] - unseen[:, None]
    p = tl.where(since.to(tl.uint32, bitcast=True) < seeing[:, None].to(tl.uint32), p, 0.0)
    if HAS_GATE:
        p *= tl.load(gate_ptr + stat, mask=mask_m, other=0.0)[None, :]
    dp = p
    if WANT_DK:
        dp = dot_pair(v_1, v_2, do_1, do_2, DV2, PRECISION)
    if WANT_DV:
        dv_1, dv_2 = add_product(dv_1, dv_2, p.to(do_1.dtype), do_1, do_2, DV2, PRECISION)
    if WANT_DK:
        ds = p * (dp - delta[None, :])
        dk_1, dk_2 = add_product(dk_1, dk_2, ds.to(q_1.dtype), q_1, q_2, D2, PRECISION)
    return dk_1, dk_2, dv_1, dv_2


@triton.jit(do_not_specialize=_VARYING)
def _backward_kv_kernel(
    k_ptr, v_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, gate_ptr,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    q_desc, q_desc2, do_desc, do_desc2,
    stride_lb, stride_lt, stride_lh,
    map_ptr, cu_ptr, cu_k_ptr, leftpad_ptr, T, C, q_offset, scale,
    G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    PACKED: tl.constexpr, LEFTPAD: tl.constexpr, HAS_GATE: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What one query head adds to dk and dv of a tile of compressed blocks, `[B, HQ, C, D]` and `[B, HQ, C, DV]`.

    Grid: (HQ, tiles of blocks, B), the tiles with most queries first.
    """
    i_head, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    # the tiles are tiles of compressed blocks here: `cu_k` and C take the places of `cu` and T
    i_seq, first, blocks, block0, _, _ = locate(
        tl.program_id(1), i_b, map_ptr, cu_k_ptr, leftpad_ptr, C, q_offset, BLOCK_N, PACKED, False
    )
    if first >= blocks:
        return
    row0 = tl.zeros([], dtype=tl.int64)
    rows = T
    pos0 = q_offset
    if PACKED:
        row0 = tl.load(cu_ptr + i_seq).to(tl.int64)
        rows = (tl.load(cu_ptr + i_seq + 1) - row0).to(tl.int32)
        pos0 = 0
    if LEFTPAD:
        pos0 = q_offset - tl.load(leftpad_ptr + i_b).to(tl.int32)

    offs_n = tl.arange(0, BLOCK_N)
    mask_key = offs_n < blocks - first
    k_ptr += i_b * stride_kb + i_head // G * stride_kh + (block0 + first) * stride_kt
    v_ptr += i_b * stride_vb + i_head // G * stride_vh + (block0 + first) * stride_vt
    k_1, k_2 = load_pair(k_ptr + offs_n * stride_kt, mask_key, D, D1, D2, True)
    v_1, v_2 = load_pair(v_ptr + offs_n * stride_vt, mask_key, DV, DV1, DV2, True)

    # the first query that sees block i is at position i·d + l - 1
    unseen = (first + offs_n) * STRIDE + SIZE - 1 - pos0
    seeing = tl.maximum(rows - unseen, 0)
    begin = tl.maximum(first * STRIDE + SIZE - 1 - pos0, 0) // BLOCK_M * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    stat = i_b * stride_lb + i_head * stride_lh + row0 * stride_lt
    lse_ptr += stat
    delta_ptr += stat
    if HAS_GATE:
        gate_ptr += stat

    dk_1, dk_2 = empty_pair(BLOCK_N, D1, D2)
    dv_1, dv_2 = empty_pair(BLOCK_N, DV1, DV2)
    scale_log2 = scale * LOG2E
    # one loop, though most tiles need no mask: between two, ptxas would run the products one by one
    for i in range(begin, rows, BLOCK_M):
        dk_1, dk_2, dv_1, dv_2 = _backward_kv_step(
            k_1, k_2, v_1, v_2, dk_1, dk_2, dv_1, dv_2, q_desc, q_desc2, do_desc, do_desc2, i_b, i_head, row0, rows,
            lse_ptr, delta_ptr, gate_ptr, stride_lt, i, offs_m, unseen, seeing, scale_log2,
            D1, D2, DV1, DV2, HAS_GATE, WANT_DK, WANT_DV, PACKED, PRECISION,
        )  # fmt: skip

    part = (i_b * tl.num_programs(0) + i_head) * C + block0 + first
    if WANT_DK:
        if D2 > 0:
            dk_2 *= scale
        store_pair(dk_ptr + part * D + offs_n * D, dk_1 * scale, dk_2, mask_key, D, D1, D2)
    if WANT_DV:
        store_pair(dv_ptr + part * DV + offs_n * DV, dv_1, dv_2, mask_key, DV, DV1, DV2)


@triton.jit(do_not_specialize=["C", "stride_ph"])
def _sum_heads_kernel(
    part_ptr, grad_ptr, stride_pb, stride_pt, stride_ph, stride_gb, stride_gt, stride_gh, C,
    G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum of what the heads of a group add to a gradient, in fixed order.

    Grid: (tiles of blocks, H, B)
    """
    i_head, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    part_ptr += i_b * stride_pb + i_head * G * stride_ph
    total = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    for g in range(G):
        part, _ = load_pair(part_ptr + g * stride_ph + offs * stride_pt, offs < C, D, BLOCK, 0, True)
        total += part
    store_pair(grad_ptr + i_b * stride_gb + i_head * stride_gh + offs * stride_gt, total, total, offs < C, D, BLOCK, 0)
