# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, `reference.rotate`, in Triton: every element is read once and written once.

PyTorch takes five kernels for it, which read and write every element several times. The embeddings themselves, cos and
sin, are transformers'.

Results are bitwise those of PyTorch: products, then their sum, are rounded to the dtype of the result, and no product
is added without being rounded.
"""

import torch
import triton
import triton.language as tl

from .library import define
from .triton_common import cdiv, next_power_of_2
from .validation import rotation_error

__all__ = ["add_turned", "describe_embeddings", "rotate"]

# Bytes of each half of the columns that a program takes: two loads of 16 bytes a thread.
_HALF_BYTES = 4096


def rotate(x, cos, sin) -> torch.Tensor:
    """Rotary position embedding; see `reference.rotate`.

    Returns:
        Contiguous tensor of the shape of `x`.

    Raises:
        NotImplementedError: A dtype or head dim without a kernel, or `cos` or `sin` that require gradients.
    """
    if (reason := rotation_error(x, cos, sin)) is not None:
        raise NotImplementedError(f"{reason} backend='reference' takes any.")
    dtype = torch.promote_types(x.dtype, cos.dtype)
    if x.dim() == 3:
        return _rotate(x[None], cos[None], sin[None], False, dtype)[0]
    return _rotate(x, cos, sin, False, dtype)


def describe_embeddings(*embeddings):
    """cos and sin `[B or 1, N, D]`, and the strides of batch and token of each; None and 0 without RoPE."""
    if embeddings[0] is None:
        return None, None, 0, 0, 0, 0
    embeddings = [x if x.stride(-1) == 1 else x.contiguous() for x in embeddings]
    steps = ((x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)) for x in embeddings)
    return *embeddings, *(step for pair in steps for step in pair)


def _compute(x, cos, sin, transposed, dtype):
    out = _empty(x, cos, sin, transposed, dtype)
    if not x.numel():
        return out
    B, T, H, D = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    block = next_power_of_2(D // 2)
    rows = max(1, _HALF_BYTES // (block * max(x.itemsize, out.itemsize)))
    tiles = cdiv(T * H, rows)
    _rotate_kernel[(B * tiles,)](
        x, *describe_embeddings(cos, sin), out, *x.stride()[:3], T=T, tiles=tiles, H=H, D=D, ROWS=rows, BLOCK=block,
        TRANSPOSED=transposed, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _empty(x, cos, sin, transposed, dtype):
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    x, cos, sin, ctx.transposed, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad):
    return _rotate(grad, *ctx.saved_tensors, not ctx.transposed, ctx.dtype), None, None, None, None


# its gradient is the same operation, transposed, with products rounded to the dtype of the result there too
_rotate = define(
    "rotate(Tensor x, Tensor cos, Tensor sin, bool transposed, ScalarType dtype) -> Tensor",
    _compute,
    _empty,
    gradient=(_setup_context, _backward),
    any_strides=True,
)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def add_turned(x, turned, cos, sin, DTYPE: tl.constexpr):
    """`x * cos + turned * sin`, both products and the sum rounded to DTYPE."""
    along = (x.to(tl.float32) * cos.to(tl.float32)).to(DTYPE)
    across = (turned.to(tl.float32) * sin.to(tl.float32)).to(DTYPE)
    return (along.to(tl.float32) + across.to(tl.float32)).to(DTYPE)


@triton.jit(do_not_specialize=["T", "tiles"])
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, stride_cb, stride_ct, stride_sb, stride_st, out_ptr, stride_xb, stride_xt, stride_xh,
    T, tiles,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Rotate some rows, each a head of a token, or multiply them by the transposed matrix.

    Grid: (B * cdiv(T * H, ROWS),)
    """
    HALF: tl.constexpr = D // 2
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    i_t, i_h = (row // H).to(tl.int64), (row % H).to(tl.int64)
    offs = tl.arange(0, BLOCK)[None, :]
    mask = (row < T * H)[:, None] & (offs < HALF)
    x_ptrs = x_ptr + (i_b * stride_xb + i_t * stride_xt + i_h * stride_xh)[:, None] + offs
    # the heads of a token read the same cos and sin: all but the first find them in the cache
    cos_ptrs = cos_ptr + (i_b * stride_cb + i_t * stride_ct)[:, None] + offs
    sin_ptrs = sin_ptr + (i_b * stride_sb + i_t * stride_st)[:, None] + offs
    x_1, x_2 = tl.load(x_ptrs, mask=mask), tl.load(x_ptrs + HALF, mask=mask)
    cos_1, cos_2 = tl.load(cos_ptrs, mask=mask), tl.load(cos_ptrs + HALF, mask=mask)
    # the transposed matrix has the other sign, and the sine of the other half
    FIRST: tl.constexpr = HALF if TRANSPOSED else 0
    SIGN: tl.constexpr = 1.0 if TRANSPOSED else -1.0
    sin_1, sin_2 = tl.load(sin_ptrs + FIRST, mask=mask), tl.load(sin_ptrs + (HALF - FIRST), mask=mask)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    out_ptrs = out_ptr + (i_b * T * H + row)[:, None] * D + offs
    tl.store(out_ptrs, add_turned(x_1, SIGN * x_2.to(tl.float32), cos_1, sin_1, DTYPE), mask=mask)
    tl.store(out_ptrs + HALF, add_turned(x_2, -SIGN * x_1.to(tl.float32), cos_2, sin_2, DTYPE), mask=mask)
