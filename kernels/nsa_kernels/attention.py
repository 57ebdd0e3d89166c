# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The whole of native sparse attention in Triton: three branches and their gates under one autograd function.

The backward kernels take the gradient of the gated sum and the gate itself (`gate · do` is never formed); the gates'
gradients come from the same row sums that softmax gradients need.
"""

import torch
import triton
import triton.language as tl

from .compressed import check_inputs, compressed_backward, compressed_forward
from .selected import selected_backward, selected_forward
from .selection import select_blocks
from .triton_common import Layout, row_delta
from .window import window_backward, window_forward

__all__ = ["nsa_attention"]


@torch.compiler.disable
def nsa_attention(
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
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Native Sparse Attention (eq. 5); see `reference.nsa_attention`.

    Returns:
        o `[B, T, HQ, DV]` in the dtype of `q`, block_indices int32 `[B, T, H, n]`, and None.

    Raises:
        NotImplementedError: `return_weights`, `q_offset` is a tensor, `scale` <= 0, or a dtype or head dim without a
            kernel.
    """
    if return_weights:
        raise NotImplementedError("`return_weights` is not computed by the Triton kernels; use backend='reference'.")
    scale = check_inputs(q, k_cmp, v_cmp, scale)
    layout = Layout(q, leftpad, q_offset, cu_seqlens)
    compression = {"compress_block_size": compress_block_size, "compress_stride": compress_stride}
    sizes = {
        "select_block_size": select_block_size,
        "num_selected_blocks": num_selected_blocks,
        "num_initial_blocks": num_initial_blocks,
        "num_local_blocks": num_local_blocks,
        "num_blocks": None if layout.packed else -(-k.shape[1] // select_block_size),
        "leftpad": leftpad,
        "q_offset": q_offset,
        "cu_seqlens": cu_seqlens,
    }
    tensors = (q, k, v, k_cmp, v_cmp, k_win, v_win, g_cmp, g_slc, g_win)
    return *_NSAAttention.apply(*tensors, layout, scale, window_size, compression, sizes), None


class _NSAAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, k_cmp, v_cmp, k_win, v_win, g_cmp, g_slc, g_win, layout, scale, window_size, compression, sizes
    ):
        compression_sizes = tuple(compression.values())
        o_cmp, lse_cmp = compressed_forward(q, k_cmp, v_cmp, layout, *compression_sizes, scale)
        block_indices = select_blocks(q, k_cmp, lse_cmp, scale=scale, **compression, **sizes)
        select_block_size = sizes["select_block_size"]
        o_slc, lse_slc, union = selected_forward(q, k, v, block_indices, layout, select_block_size, scale)
        o_win, lse_win = window_forward(q, k_win, v_win, layout, window_size, scale)
        o = _gated_sum(o_cmp, o_slc, o_win, g_cmp, g_slc, g_win)
        ctx.save_for_backward(
            q, k, v, k_cmp, v_cmp, k_win, v_win, g_cmp, g_slc, g_win,
            o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, block_indices, *union,
        )  # fmt: skip
        ctx.layout, ctx.scale, ctx.window_size = layout, scale, window_size
        ctx.compression_sizes, ctx.select_block_size = compression_sizes, select_block_size
        ctx.mark_non_differentiable(block_indices)
        return o, block_indices

    @staticmethod
    def backward(ctx, do, _):
        q, k, v, k_cmp, v_cmp, k_win, v_win, g_cmp, g_slc, g_win, *rest = ctx.saved_tensors
        o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, block_indices, *union = rest
        layout, scale = ctx.layout, ctx.scale

        rows = [layout.rows(x) for x in (o_cmp, do, g_cmp[..., None])]
        delta, dg_cmp = row_delta(*rows[:2], None, rows[2].squeeze(-1), by_head=True)
        if layout.packed:
            delta, dg_cmp = delta[0], dg_cmp[0]
        dq, dk_cmp, dv_cmp = compressed_backward(
            q, k_cmp, v_cmp, do, lse_cmp, delta, layout, *ctx.compression_sizes, scale, gate=g_cmp
        )
        dq_slc, dk, dv, dg_slc = selected_backward(
            do, q, k, v, block_indices, o_slc, lse_slc, union, layout, ctx.select_block_size, scale, gate=g_slc
        )
        dq_win, dk_win, dv_win, dg_win = window_backward(
            do, q, k_win, v_win, o_win, lse_win, layout, ctx.window_size, scale, gate=g_win
        )
        dq = dq + dq_slc + dq_win
        gates = (dg_cmp.to(g_cmp.dtype), dg_slc.to(g_slc.dtype), dg_win.to(g_win.dtype))
        return dq, dk, dv, dk_cmp, dv_cmp, dk_win, dv_win, *gates, None, None, None, None, None


def _gated_sum(o_cmp, o_slc, o_win, g_cmp, g_slc, g_win):
    """`reference.gated_sum` of contiguous outputs `[B, T, HQ, DV]` in one pass over memory."""
    o, DV = torch.empty_like(o_slc), o_slc.shape[-1]
    rows, tile = o[..., 0].numel(), 16
    if o.numel():
        _gated_sum_kernel[(triton.cdiv(rows, tile),)](
            o_cmp, o_slc, o_win, g_cmp.contiguous(), g_slc.contiguous(), g_win.contiguous(), o, rows, DV,
            TILE=tile, BLOCK=triton.next_power_of_2(DV), num_warps=4,
        )  # fmt: skip
    return o


@triton.jit(do_not_specialize=["rows"])
def _gated_sum_kernel(
    o_cmp_ptr,
    o_slc_ptr,
    o_win_ptr,
    g_cmp_ptr,
    g_slc_ptr,
    g_win_ptr,
    o_ptr,
    rows,
    DV,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows / TILE); a row is one head of one token."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK)
    mask_row = row < rows
    mask = mask_row[:, None] & (column < DV)[None, :]
    offs = row[:, None] * DV + column[None, :]
    g_cmp = tl.load(g_cmp_ptr + row, mask=mask_row, other=0.0).to(tl.float32)
    g_slc = tl.load(g_slc_ptr + row, mask=mask_row, other=0.0).to(tl.float32)
    g_win = tl.load(g_win_ptr + row, mask=mask_row, other=0.0).to(tl.float32)
    b_o = g_cmp[:, None] * tl.load(o_cmp_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    b_o += g_slc[:, None] * tl.load(o_slc_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    b_o += g_win[:, None] * tl.load(o_win_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(o_ptr + offs, b_o.to(o_ptr.dtype.element_ty), mask=mask)
