# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The whole of native sparse attention in Triton: three branches and their gates under one autograd function.

The window branch comes last and writes the gated sum in its epilogue. Backward, one pass over the outputs yields the
gates' gradients and the row sums that softmax gradients need; then each branch adds its part of dq to the one before.
"""

import torch
import triton
import triton.language as tl

from .compressed import compressed_backward, compressed_forward
from .library import WHERE, define, define_attention
from .reference import unroll
from .selected import selected_backward, selected_forward
from .selection import chosen_blocks, empty_choice
from .triton_common import LOG2E, Layout, cdiv, check_inputs, empty_values, load_pair, next_power_of_2
from .window import window_backward, window_forward

__all__ = ["nsa_attention"]


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
    window_ring=False,
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
    scale = check_inputs(q, scale, q_offset, k=k, v=v, k_cmp=k_cmp, v_cmp=v_cmp, k_win=k_win, v_win=v_win)
    if window_ring:
        k_win, v_win = (unroll(x, q_offset + q.shape[1]) for x in (k_win, v_win))
    sizes = (compress_block_size, compress_stride, select_block_size, num_selected_blocks)
    sizes += (num_initial_blocks, num_local_blocks, window_size, scale)
    tensors = (q, k, v, k_cmp, v_cmp, k_win, v_win, g_cmp, g_slc, g_win)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    operation = _operation if learns else _inference
    o, block_indices, *_ = operation(*tensors, *sizes, leftpad, q_offset, cu_seqlens)
    return o, block_indices, None


def _forward(
    q, k, v, k_cmp, v_cmp, k_win, v_win, g_cmp, g_slc, g_win,
    compress_block_size, compress_stride, select_block_size, num_selected_blocks, num_initial_blocks, num_local_blocks,
    window_size, scale, layout, keep=True,
):  # fmt: skip
    compression = (compress_block_size, compress_stride)
    forced = (num_initial_blocks, num_local_blocks)
    S = cdiv(k.shape[0] if layout.packed else k.shape[1], select_block_size)
    o_cmp, lse_cmp = compressed_forward(q, k_cmp, v_cmp, *compression, scale, layout)
    block_indices = chosen_blocks(
        q, k_cmp, lse_cmp, S, *compression, select_block_size, num_selected_blocks, *forced, scale, layout
    )
    o_slc, lse_slc = selected_forward(q, k, v, block_indices, select_block_size, scale, layout)
    branches = (o_cmp, o_slc, g_cmp, g_slc, g_win)
    o_win, lse_win, o = window_forward(q, k_win, v_win, window_size, scale, layout, branches, keep=keep)
    return o, block_indices, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win


def _backward(
    do, q, k, v, k_cmp, v_cmp, k_win, v_win, g_cmp, g_slc, g_win,
    block_indices, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win,
    compress_block_size, compress_stride, select_block_size, num_selected_blocks, num_initial_blocks, num_local_blocks,
    window_size, scale, layout,
):  # fmt: skip
    (delta_cmp, gate_cmp), stats_slc, (delta_win, gate_win), dgates = _prepare(
        do, (o_cmp, o_slc, o_win), (g_cmp, g_slc, g_win), lse_slc, layout
    )
    dq, dk_cmp, dv_cmp = compressed_backward(
        do, q, k_cmp, v_cmp, lse_cmp, delta_cmp, compress_block_size, compress_stride, scale, layout, gate=gate_cmp
    )
    dq, dk, dv = selected_backward(do, q, k, v, block_indices, stats_slc, select_block_size, scale, layout, dq=dq)
    dq, dk_win, dv_win = window_backward(
        do, q, k_win, v_win, lse_win, delta_win, window_size, scale, layout, gate=gate_win, dq=dq
    )
    return dq, dk, dv, dk_cmp, dv_cmp, dk_win, dv_win, *dgates


def _allocate(q, k, v, k_cmp, v_cmp, k_win, v_win, g_cmp, g_slc, g_win, *sizes):
    outputs = [q.new_empty(*q.shape[:-1], v.shape[-1]) for _ in range(4)]
    lse = (empty_values(q.shape[:-1], q.device, by_head=by_head) for by_head in (True, False, True))
    return outputs[0], empty_choice(q, k_cmp, sizes[3]), *outputs[1:], *lse


_TENSORS = "q k v k_cmp v_cmp k_win v_win g_cmp g_slc g_win"
_SIZES = (
    "int compress_block_size, int compress_stride, int select_block_size, int num_selected_blocks, "
    "int num_initial_blocks, int num_local_blocks, int window_size, float scale"
)
_operation = define_attention(
    "nsa_attention",
    _TENSORS,
    _SIZES,
    "o block_indices o_cmp o_slc o_win lse_cmp lse_slc lse_win",
    _forward,
    _backward,
    _allocate,
    learned=10,
    graded=1,
    kept=slice(1, None),
)


# Without gradients: a tensor less to write, two less to keep.
_inference = define(
    f"nsa_attention_inference({', '.join(f'Tensor {name}' for name in _TENSORS.split())}, {_SIZES}, {WHERE}) "
    "-> (Tensor, Tensor)",
    lambda *args: _forward(*args[:-3], Layout(args[0], *args[-3:]), keep=False)[:2],
    lambda *args: _allocate(*args)[:2],
)


def _prepare(do, outputs, gates, lse_slc, layout):
    """One pass over the outputs of the branches, before their backward passes.

    Args:
        do: `[B, T, HQ, DV]`, gradient of the gated sum.
        outputs: Contiguous o_cmp, o_slc, o_win; gates: g_cmp, g_slc, g_win.
        lse_slc: Contiguous fp32 `[B, T, HQ]`.

    Returns:
        delta_cmp, gate_cmp: fp32 `[B, T, HQ]`, Σ o_cmp · do, and g_cmp as the kernels read it.
        stats_slc: `pack_stats` of the selected branch.
        delta_win, gate_win: Like the first.
        dgates: Σ o · do in the dtypes of the gates.
    """
    shape, device = gates[0].shape, do.device
    delta_cmp, gate_cmp, delta_win, gate_win = (empty_values(shape, device, by_head=True) for _ in range(4))
    stats = torch.empty(*shape, 4, dtype=torch.float32, device=device)
    dgates = [torch.empty_like(g, memory_format=torch.contiguous_format) for g in gates]
    do = layout.rows(do)
    B, T, HQ, DV = do.shape
    tile = 16
    if do.numel():
        _prepare_kernel[(cdiv(T * HQ, tile), B)](
            do, *outputs, *gates, lse_slc, delta_cmp, gate_cmp, stats, delta_win, gate_win, *dgates, *do.stride()[:3],
            *(stride for g in gates for stride in layout.rows(g[..., None]).stride()[:3]),
            T, HQ, DV, TILE=tile, BLOCK=next_power_of_2(DV), num_warps=4,
        )  # fmt: skip
    return (delta_cmp, gate_cmp), stats, (delta_win, gate_win), dgates


@triton.jit(do_not_specialize=["T"])
def _prepare_kernel(
    do_ptr, o_cmp_ptr, o_slc_ptr, o_win_ptr, g_cmp_ptr, g_slc_ptr, g_win_ptr, lse_slc_ptr, delta_cmp_ptr, gate_cmp_ptr,
    stats_ptr, delta_win_ptr, gate_win_ptr, dg_cmp_ptr, dg_slc_ptr, dg_win_ptr, stride_dob, stride_dot, stride_doh,
    stride_gcb, stride_gct, stride_gch, stride_gsb, stride_gst, stride_gsh, stride_gwb, stride_gwt, stride_gwh, T, HQ,
    DV: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `_prepare`. Outputs are contiguous; deltas and gates of `cmp` and `win` lie by head.

    Grid: (cdiv(T * HQ, TILE), B)
    """
    i_b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    t, h = row // HQ, row % HQ
    mask = t < T
    by_token = i_b * T * HQ + row
    by_head = (i_b * HQ + h) * T + t
    do, _ = load_pair(do_ptr + i_b * stride_dob + t * stride_dot + h * stride_doh, mask, DV, BLOCK, 0, True)
    do = do.to(tl.float32)
    g_cmp = tl.load(g_cmp_ptr + i_b * stride_gcb + t * stride_gct + h * stride_gch, mask=mask, other=0.0)
    g_slc = tl.load(g_slc_ptr + i_b * stride_gsb + t * stride_gst + h * stride_gsh, mask=mask, other=0.0)
    g_win = tl.load(g_win_ptr + i_b * stride_gwb + t * stride_gwt + h * stride_gwh, mask=mask, other=0.0)
    g_cmp, g_slc, g_win = g_cmp.to(tl.float32), g_slc.to(tl.float32), g_win.to(tl.float32)

    dg_cmp = _dot_rows(o_cmp_ptr + by_token * DV, do, mask, DV, BLOCK)
    dg_slc = _dot_rows(o_slc_ptr + by_token * DV, do, mask, DV, BLOCK)
    dg_win = _dot_rows(o_win_ptr + by_token * DV, do, mask, DV, BLOCK)
    tl.store(delta_cmp_ptr + by_head, dg_cmp, mask=mask)
    tl.store(gate_cmp_ptr + by_head, g_cmp, mask=mask)
    lse = tl.load(lse_slc_ptr + by_token, mask=mask, other=0.0)
    tl.store(stats_ptr + by_token * 4, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=mask)
    tl.store(stats_ptr + by_token * 4 + 1, dg_slc, mask=mask)
    tl.store(stats_ptr + by_token * 4 + 2, g_slc, mask=mask)
    tl.store(delta_win_ptr + by_head, dg_win, mask=mask)
    tl.store(gate_win_ptr + by_head, g_win, mask=mask)
    tl.store(dg_cmp_ptr + by_token, dg_cmp.to(dg_cmp_ptr.dtype.element_ty), mask=mask)
    tl.store(dg_slc_ptr + by_token, dg_slc.to(dg_slc_ptr.dtype.element_ty), mask=mask)
    tl.store(dg_win_ptr + by_token, dg_win.to(dg_win_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dot_rows(o_ptrs, do, mask, DV: tl.constexpr, BLOCK: tl.constexpr):
    o, _ = load_pair(o_ptrs, mask, DV, BLOCK, 0, True)
    return tl.sum(o.to(tl.float32) * do, 1)
