# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What a decoding step writes into a static cache, `reference.append_tokens`, in Triton: at most three launches.

The first rotates queries and keys and puts the new tokens into the cache. The others compress the blocks that they
complete: programs whose rows complete none return at once, which is decided on the device, so that a CUDA graph can
hold all of it. The last writes the blocks; the hidden layer of an MLP, and the pooled tokens, are made by one before.

Results are rounded to the dtype of the model wherever PyTorch's operations round theirs.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .decode import _overlaps, _wait_for_the_kernel_before
from .library import define
from .rotary import add_turned, describe_embeddings
from .triton_common import (
    cdiv,
    check_inputs,
    dot_pair,
    load_pair,
    next_power_of_2,
    precision,
    split_head_dim,
)
from .validation import MAX_DECODE_QUERIES

__all__ = ["append_tokens"]

_NEW = ("k", "v", "k_cmp", "v_cmp", "k_win", "v_win")
_CACHE = ("keys", "values", "k_cmp", "v_cmp", "v_tail", "length", "k_tail", "k_tail_rot", "k_win", "v_win")
# Heads of a program that puts tokens into the cache.
_HEADS = 8
# Programs that share the tokens of a block, for the hidden layer of its MLP.
_SPLITS = 8
# Most rows, a block of one head each, of a program.
_MAX_ROWS = 64
# Most registers of a thread of the kernel that writes blocks: left alone, ptxas spills to fit more programs at once.
_REGISTERS = 168
# Arguments that change with the cache: a kernel is not compiled anew for each kind of value.
_VARYING = ["T", "B", "NC", "capacity", "blocks", "tail", "window"]


def append_tokens(
    q,
    new,
    cache,
    phi_k,
    phi_v,
    *,
    slots,
    compress_type,
    compress_block_size,
    compress_stride,
    leftpad=None,
    embeddings=None,
    block_embeddings=None,
) -> torch.Tensor:
    """Put a decoding step's tokens into a static cache, and φ of the blocks they complete; see `reference`.

    Returns:
        Rotated queries `[B, T, HQ, D]`.

    Raises:
        NotImplementedError: More than 16 tokens, a cache that is not contiguous, or a dtype or head dim without a
            kernel.
    """
    if q.shape[1] > MAX_DECODE_QUERIES:
        raise NotImplementedError(
            f"The append kernels take at most {MAX_DECODE_QUERIES} tokens a row, got {q.shape[1]}; use "
            "backend='reference'."
        )
    check_inputs(q, None, **new)
    given = {f"cache[{name!r}]": x for name, x in cache.items() if name != "length"}
    given |= {f"{name}[{i}]": x for name, phi in (("phi_k", phi_k), ("phi_v", phi_v)) for i, x in enumerate(phi)}
    for name, x in given.items():
        if x.dtype != q.dtype or not x.is_contiguous():
            raise NotImplementedError(
                f"`{name}` must be contiguous and of the dtype of `q` for the append kernels, got {x.dtype} with "
                f"strides {x.stride()}; use backend='reference'."
            )
    return _append(
        q, *(new.get(name) for name in _NEW), *(embeddings or (None, None)), *(block_embeddings or (None, None)),
        slots, leftpad, phi_k, phi_v, *(cache.get(name) for name in _CACHE), compress_type, compress_block_size,
        compress_stride,
    )  # fmt: skip


def _compute(
    q, k, v, k_phi, v_phi, k_new, v_new, cos, sin, block_cos, block_sin, slots, leftpad, phi_k, phi_v,
    keys, values, k_cmp, v_cmp, v_tail, length, k_tail, k_tail_rot, k_win, v_win,
    compress_type, compress_block_size, compress_stride,
):  # fmt: skip
    (B, T, HQ, D), (H, DV) = q.shape, v.shape[2:]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not q.numel():
        return out
    (q,), steps_q = _rows(q)
    (k, k_phi, k_new), steps_k = _rows(k, k_phi, k_new)
    (v, v_phi, v_new), steps_v = _rows(v, v_phi, v_new)
    slots, leftpad = slots.contiguous(), None if leftpad is None else leftpad.contiguous()
    separate, tail = k_phi is not None, v_tail.shape[2]
    pdl = _overlaps(q.device)
    tiles = {"HQ": HQ, "H": H, "TILE": min(_HEADS, next_power_of_2(HQ))}
    parts = cdiv(HQ, tiles["TILE"]) + (6 if separate else 2) * cdiv(H, tiles["TILE"])
    wide = {"D": D, "DV": DV, "BLOCK": next_power_of_2(D), "BLOCK_V": next_power_of_2(DV)}
    _append_kernel[(parts, T, B)](
        q, k, v, k_phi, v_phi, k_new, v_new, *steps_q, *steps_k, *steps_v, *describe_embeddings(cos, sin), slots,
        length, out, keys, values, k_tail, k_tail_rot, v_tail, k_win, v_win,
        T=T, capacity=keys.shape[2], tail=tail, window=k_win.shape[2] if separate else 0, **tiles, **wide,
        ROPE=cos is not None, SEPARATE=separate, PDL=pdl, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip

    NC, fp32 = cdiv(T, compress_stride), q.dtype == torch.float32
    rows = B * NC * H
    block_m = min(_MAX_ROWS, max(16, next_power_of_2(rows)))
    where = {
        "slots_ptr": slots, "leftpad_ptr": leftpad, "T": T, "B": B, "NC": NC, "blocks": k_cmp.shape[2] - 1,
        "tail": tail, "H": H, "SIZE": compress_block_size, "STRIDE": compress_stride,
    }  # fmt: skip
    chained = {"PDL": pdl, "launch_pdl": pdl, "enable_fp_fusion": True}
    hidden, splits, width, dims = None, 1, 0, {"D": D, "DV": DV}
    pairs = dict(zip(("D1", "D2", "DV1", "DV2"), split_head_dim(D) + split_head_dim(DV)))
    if compress_type == "pool":
        width = max(D, DV)
        hidden = q.new_empty(2, rows, width)
        _pool_kernel[(rows, 2)](
            k_tail, k_tail_rot, v_tail, *phi_k[:4], *phi_v[:4], hidden, WIDTH=width, **where, **dims, **pairs,
            F=phi_k[1].shape[0], TOKENS=max(16, next_power_of_2(compress_block_size)), BLOCK_F=16 if fp32 else 32,
            PRECISION=precision(q.dtype), num_warps=8 if fp32 else 4, **chained,
        )  # fmt: skip
    elif compress_type != "mean":
        width, splits = phi_k[1].shape[0], min(_SPLITS, compress_block_size)
        hidden = torch.empty(2, splits, rows, width, dtype=torch.float32, device=q.device)
        _hidden_kernel[(cdiv(width, 32), cdiv(rows, block_m), 2 * splits)](
            k_tail, v_tail, *phi_k[:2], *phi_v[:2], hidden, **where, **dims, **pairs, F=width, SPLITS=splits,
            BLOCK_M=block_m, BLOCK_F=32, PRECISION=precision(q.dtype), num_warps=4, num_stages=2, **chained,
        )  # fmt: skip
    # the output of "mlp" and "residual_mlp" has a bias, that of "pool" none
    b1_k, w2_k, b2_k, b1_v, w2_v, b2_v = (None,) * 6
    if compress_type == "pool":
        w2_k, w2_v = phi_k[4], phi_v[4]
    elif compress_type != "mean":
        (b1_k, w2_k, b2_k), (b1_v, w2_v, b2_v) = phi_k[2:], phi_v[2:]
    block_n = min(32, max(16, next_power_of_2(max(D, DV))))
    _block_kernel[(cdiv(max(D, DV), block_n), cdiv(rows, 16), 2)](
        k_tail_rot, v_tail, hidden, b1_k, w2_k, b2_k, b1_v, w2_v, b2_v, *describe_embeddings(block_cos, block_sin),
        k_cmp, v_cmp, WIDTH=width, **where, **dims, SPLITS=splits, TYPE=compress_type, ROPE=block_cos is not None,
        BLOCK_M=16, BLOCK_N=block_n, BLOCK_K=16 if fp32 else 32, CHUNK=4, PRECISION=precision(q.dtype),
        num_warps=8 if fp32 else 4, maxnreg=_REGISTERS, **chained,
    )  # fmt: skip
    return out


_append = define(
    "append_tokens(Tensor q, Tensor k, Tensor v, Tensor? k_phi, Tensor? v_phi, Tensor? k_new, Tensor? v_new, "
    "Tensor? cos, Tensor? sin, Tensor? block_cos, Tensor? block_sin, Tensor slots, Tensor? leftpad, "
    "Tensor[] phi_k, Tensor[] phi_v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) k_cmp, Tensor(d!) v_cmp, "
    "Tensor(e!) v_tail, Tensor(f!) length, Tensor(g!)? k_tail, Tensor(h!)? k_tail_rot, Tensor(i!)? k_win, "
    "Tensor(j!)? v_win, str compress_type, int compress_block_size, int compress_stride) -> Tensor",
    _compute,
    lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format),
    any_strides=True,
)


def _rows(*tensors):
    """Tensors `[B, T, heads, D]` or None whose heads lie side by side, and the strides of batch and token they share.

    What projections made in one product is read where it lies; anything else is copied.
    """
    given = [x for x in tensors if x is not None]
    steps = {tuple(x.stride(i) if x.shape[i] > 1 else 0 for i in (0, 1)) for x in given}
    if len(steps) > 1 or any(x.stride(3) != 1 or (x.stride(2) != x.shape[3] and x.shape[2] > 1) for x in given):
        tensors = [None if x is None else x.contiguous() for x in tensors]
        steps = {tensors[0].stride()[:2]}
    return tensors, steps.pop()


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _rounded(x, like):
    """fp32 values as the dtype of `like` holds them, in fp32."""
    return x.to(like.dtype).to(tl.float32)


@triton.jit
def _rotate(x, partner, cos, sin, offs_d, D: tl.constexpr):
    """RoPE of columns `offs_d` of x, in its dtype; `partner` holds columns `(offs_d + D // 2) % D`."""
    turned = tl.where(offs_d < D // 2, -partner.to(tl.float32), partner.to(tl.float32))
    return add_turned(x, turned, cos, sin, x.dtype)


@triton.jit
def _load_heads(row_ptrs, mask, D: tl.constexpr, BLOCK: tl.constexpr):
    offs_d = tl.arange(0, BLOCK)
    return tl.load(row_ptrs[:, None] + offs_d[None, :], mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def _store_heads(row_ptrs, x, mask, D: tl.constexpr, BLOCK: tl.constexpr):
    offs_d = tl.arange(0, BLOCK)
    tl.store(row_ptrs[:, None] + offs_d[None, :], x, mask=mask[:, None] & (offs_d < D)[None, :])


@triton.jit
def _rotated_heads(row_ptrs, x, mask, cos_ptr, sin_ptr, D: tl.constexpr, BLOCK: tl.constexpr, ROPE: tl.constexpr):
    """RoPE of x, which `_load_heads` read from the same rows."""
    if ROPE:
        offs_d = tl.arange(0, BLOCK)
        other = (offs_d + D // 2) % D
        cos = tl.load(cos_ptr + offs_d, mask=offs_d < D, other=0.0)
        sin = tl.load(sin_ptr + offs_d, mask=offs_d < D, other=0.0)
        partner = tl.load(row_ptrs[:, None] + other[None, :], mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)
        x = _rotate(x, partner, cos[None, :], sin[None, :], offs_d[None, :], D)
    return x


@triton.jit(do_not_specialize=_VARYING)
def _append_kernel(
    q_ptr, k_ptr, v_ptr, k_phi_ptr, v_phi_ptr, k_new_ptr, v_new_ptr, stride_qb, stride_qt, stride_kb, stride_kt,
    stride_vb, stride_vt, cos_ptr, sin_ptr, stride_cb, stride_ct, stride_sb, stride_st, slots_ptr, length_ptr,
    out_ptr, keys_ptr, values_ptr, k_tail_ptr, k_tail_rot_ptr, v_tail_ptr, k_win_ptr, v_win_ptr,
    T, capacity, tail, window,
    HQ: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr, ROPE: tl.constexpr, SEPARATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rotate some heads of q, or put some heads of one new key or value at its slot.

    Grid: (tiles of q's heads + tiles of H heads of k, v, then of k and v of the compressed and of the window branch,
    T, B)
    """
    if PDL:
        gdc_launch_dependents()
    i_part, i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    slot = tl.load(slots_ptr + i_t).to(tl.int32)
    if (i_part == 0) & (i_t == T - 1) & (i_b == 0):
        tl.store(length_ptr, slot + 1)
    if ROPE:
        cos_ptr += i_b * stride_cb + i_t * stride_ct
        sin_ptr += i_b * stride_sb + i_t * stride_st
    Q_PARTS: tl.constexpr = (HQ + TILE - 1) // TILE
    PARTS: tl.constexpr = (H + TILE - 1) // TILE
    kind = tl.where(i_part < Q_PARTS, 0, (i_part - Q_PARTS) // PARTS + 1)
    heads = tl.where(kind == 0, i_part, (i_part - Q_PARTS) % PARTS) * TILE + tl.arange(0, TILE)
    # nothing is written behind the end of the cache
    mask = heads < tl.where(kind == 0, HQ, tl.where(slot < capacity, H, 0))
    # every branch's keys have the same strides, and every branch's values
    row_k = i_b * stride_kb + i_t * stride_kt + heads * D
    row_v = i_b * stride_vb + i_t * stride_vt + heads * DV
    head = i_b * H + heads
    at, at_tail = head * capacity + slot, head * tail + slot % tail
    if kind == 0:
        ptrs = q_ptr + i_b * stride_qb + i_t * stride_qt + heads * D
        x = _rotated_heads(ptrs, _load_heads(ptrs, mask, D, BLOCK), mask, cos_ptr, sin_ptr, D, BLOCK, ROPE)
        _store_heads(out_ptr + ((i_b * T + i_t) * HQ + heads) * D, x, mask, D, BLOCK)
    elif kind == 1:
        ptrs = k_ptr + row_k
        x = _load_heads(ptrs, mask, D, BLOCK)
        rotated = _rotated_heads(ptrs, x, mask, cos_ptr, sin_ptr, D, BLOCK, ROPE)
        _store_heads(keys_ptr + at * D, rotated, mask, D, BLOCK)
        if not SEPARATE:
            _store_tails(k_tail_ptr, k_tail_rot_ptr, at_tail, x, rotated, mask, D, BLOCK)
    elif kind == 2:
        x = _load_heads(v_ptr + row_v, mask, DV, BLOCK_V)
        _store_heads(values_ptr + at * DV, x, mask, DV, BLOCK_V)
        if not SEPARATE:
            _store_heads(v_tail_ptr + at_tail * DV, x, mask, DV, BLOCK_V)
    if SEPARATE:
        at_window = head * window + slot % window
        if kind == 3:
            ptrs = k_phi_ptr + row_k
            x = _load_heads(ptrs, mask, D, BLOCK)
            rotated = _rotated_heads(ptrs, x, mask, cos_ptr, sin_ptr, D, BLOCK, ROPE)
            _store_tails(k_tail_ptr, k_tail_rot_ptr, at_tail, x, rotated, mask, D, BLOCK)
        elif kind == 4:
            x = _load_heads(v_phi_ptr + row_v, mask, DV, BLOCK_V)
            _store_heads(v_tail_ptr + at_tail * DV, x, mask, DV, BLOCK_V)
        elif kind == 5:
            ptrs = k_new_ptr + row_k
            x = _rotated_heads(ptrs, _load_heads(ptrs, mask, D, BLOCK), mask, cos_ptr, sin_ptr, D, BLOCK, ROPE)
            _store_heads(k_win_ptr + at_window * D, x, mask, D, BLOCK)
        elif kind == 6:
            x = _load_heads(v_new_ptr + row_v, mask, DV, BLOCK_V)
            _store_heads(v_win_ptr + at_window * DV, x, mask, DV, BLOCK_V)


@triton.jit
def _store_tails(k_tail_ptr, k_tail_rot_ptr, at, x, rotated, mask, D: tl.constexpr, BLOCK: tl.constexpr):
    """Store keys before and after RoPE, those that φ reads."""
    if k_tail_ptr is not None:
        _store_heads(k_tail_ptr + at * D, x, mask, D, BLOCK)
    if k_tail_rot_ptr is not None:
        _store_heads(k_tail_rot_ptr + at * D, rotated, mask, D, BLOCK)


@triton.jit
def _complete(length, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Complete blocks of `length` tokens."""
    return tl.where(length >= SIZE, (length - SIZE) // STRIDE + 1, 0)


@triton.jit
def _new_blocks(
    row, slots_ptr, leftpad_ptr, T, B, NC, blocks, H: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr
):
    """Where the blocks of one head each lie that the new tokens may complete, for rows in the order batch, block, head.

    Returns:
        i_b: int64, row of the batch.
        head: int64, `i_b * H` and the head.
        i_new: Which of the NC new blocks of the row.
        block: Its index.
        slot: Slot of its first token.
        mask: Whether it is complete, and was not before.
    """
    i_b, i_new = (row // (NC * H)).to(tl.int64), row // H % NC
    past = tl.load(slots_ptr).to(tl.int32)
    pad = row * 0
    if leftpad_ptr is not None:
        pad = tl.load(leftpad_ptr + i_b, mask=i_b < B, other=0).to(tl.int32)
    block = _complete(past - pad, SIZE, STRIDE) + i_new
    # a block behind the end of the cache is not written
    stop = tl.minimum(_complete(past - pad + T, SIZE, STRIDE), blocks)
    return i_b, i_b * H + row % H, i_new, block, pad + block * STRIDE, (block < stop) & (i_b < B)


@triton.jit(do_not_specialize=_VARYING)
def _hidden_kernel(
    k_tail_ptr, v_tail_ptr, pos_k_ptr, w1_k_ptr, pos_v_ptr, w1_v_ptr, hidden_ptr, slots_ptr, leftpad_ptr,
    T, B, NC, blocks, tail,
    H: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, F: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`w1 · (block + pos_embed)` over a share of the blocks' tokens, for keys or values.

    Grid: (cdiv(F, BLOCK_F), cdiv(B * NC * H, BLOCK_M), 2 * SPLITS)
    """
    i_f, i_m, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2) // 2
    row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    _, head, _, _, slot, mask = _new_blocks(row, slots_ptr, leftpad_ptr, T, B, NC, blocks, H, SIZE, STRIDE)
    _wait_for_the_kernel_before(PDL)
    if tl.max(mask.to(tl.int32), 0) > 0:
        offs_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
        first = head * tail
        if tl.program_id(2) % 2 == 0:
            acc = _hidden_part(
                k_tail_ptr, pos_k_ptr, w1_k_ptr, first, slot, tail, mask, offs_f, i_split, SIZE, D, D1, D2, F, SPLITS,
                PRECISION,
            )  # fmt: skip
        else:
            acc = _hidden_part(
                v_tail_ptr, pos_v_ptr, w1_v_ptr, first, slot, tail, mask, offs_f, i_split, SIZE, DV, DV1, DV2, F,
                SPLITS, PRECISION,
            )  # fmt: skip
        part = (tl.program_id(2) % 2 * SPLITS + i_split).to(tl.int64) * (B * NC * H)
        out_ptrs = hidden_ptr + (part + row)[:, None] * F + offs_f[None, :]
        tl.store(out_ptrs, acc, mask=mask[:, None] & (offs_f < F)[None, :])


@triton.jit
def _hidden_part(
    tail_ptr, pos_ptr, w1_ptr, first, slot, tail, mask, offs_f, i_split, SIZE: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, F: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SHARE: tl.constexpr = (SIZE + SPLITS - 1) // SPLITS
    acc = tl.zeros([slot.shape[0], offs_f.shape[0]], dtype=tl.float32)
    for i in range(i_split * SHARE, tl.minimum(SIZE, (i_split + 1) * SHARE)):
        x_1, x_2 = load_pair(tail_ptr + (first + (slot + i) % tail) * D, mask, D, D1, D2, True)
        x_1 = _plus_row(x_1, pos_ptr + i * D, 0, D)
        if D2 > 0:
            x_2 = _plus_row(x_2, pos_ptr + i * D, D1, D)
        w_1, w_2 = load_pair(w1_ptr + offs_f.to(tl.int64) * (SIZE * D) + i * D, offs_f < F, D, D1, D2, True)
        acc += dot_pair(x_1, x_2, w_1, w_2, D2, PRECISION)
    return acc


@triton.jit
def _plus_row(x, row_ptr, START: tl.constexpr, D: tl.constexpr):
    offs_d = START + tl.arange(0, x.shape[1])
    y = tl.load(row_ptr + offs_d, mask=offs_d < D, other=0.0)
    return (x.to(tl.float32) + y.to(tl.float32)[None, :]).to(x.dtype)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=_VARYING)
def _pool_kernel(
    k_tail_ptr, k_tail_rot_ptr, v_tail_ptr, bias_k_ptr, w1_k_ptr, b1_k_ptr, w2_k_ptr, bias_v_ptr, w1_v_ptr, b1_v_ptr,
    w2_v_ptr, pooled_ptr, slots_ptr, leftpad_ptr, T, B, NC, blocks, tail,
    H: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The mean of a block's tokens, weighted by scores made from each of them; keys or values of one head.

    Grid: (B * NC * H, 2)
    """
    row = tl.program_id(0)
    _, head, _, _, slot, mask = _new_blocks(row, slots_ptr, leftpad_ptr, T, B, NC, blocks, H, SIZE, STRIDE)
    _wait_for_the_kernel_before(PDL)
    if mask:
        first = head * tail
        if tl.program_id(1) == 0:
            _pool_block(
                k_tail_ptr, k_tail_rot_ptr, bias_k_ptr, w1_k_ptr, b1_k_ptr, w2_k_ptr, pooled_ptr + row * WIDTH, first,
                slot, tail, SIZE, D, D1, D2, F, TOKENS, BLOCK_F, PRECISION,
            )  # fmt: skip
        else:
            _pool_block(
                v_tail_ptr, v_tail_ptr, bias_v_ptr, w1_v_ptr, b1_v_ptr, w2_v_ptr,
                pooled_ptr + (tl.num_programs(0) + row) * WIDTH, first, slot, tail, SIZE, DV, DV1, DV2, F, TOKENS,
                BLOCK_F, PRECISION,
            )  # fmt: skip


@triton.jit
def _pool_block(
    x_ptr, y_ptr, bias_ptr, w1_ptr, b1_ptr, w2_ptr, out_ptr, first, slot, tail, SIZE: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, F: tl.constexpr, TOKENS: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    offs_t = tl.arange(0, TOKENS)
    token = (first + (slot + offs_t) % tail) * D
    mask_t = offs_t < SIZE
    x_1, x_2 = load_pair(x_ptr + token, mask_t, D, D1, D2, True)
    score = tl.zeros([TOKENS], dtype=tl.float32)
    for f in range(0, F, BLOCK_F):
        offs_f = f + tl.arange(0, BLOCK_F)
        w_1, w_2 = load_pair(w1_ptr + offs_f * D, offs_f < F, D, D1, D2, True)
        b1 = tl.load(b1_ptr + offs_f, mask=offs_f < F, other=0.0).to(tl.float32)
        w2 = tl.load(w2_ptr + offs_f, mask=offs_f < F, other=0.0).to(tl.float32)
        h = _rounded(dot_pair(x_1, x_2, w_1, w_2, D2, PRECISION) + b1[None, :], x_1)
        score += tl.sum(_rounded(_silu(h), x_1) * w2[None, :], 1)
    bias = tl.load(bias_ptr + offs_t, mask=mask_t, other=0.0).to(tl.float32)
    score = tl.where(mask_t, _rounded(score, x_1) + bias, float("-inf"))
    p = tl.exp(score - tl.max(score, 0))
    p = p / tl.sum(p, 0)
    y_1, y_2 = load_pair(y_ptr + token, mask_t, D, D1, D2, True)
    offs_d = tl.arange(0, D1)
    tl.store(out_ptr + offs_d, tl.sum(p[:, None] * y_1.to(tl.float32), 0).to(x_1.dtype), mask=offs_d < D)
    if D2 > 0:
        offs_d = D1 + tl.arange(0, D2)
        tl.store(out_ptr + offs_d, tl.sum(p[:, None] * y_2.to(tl.float32), 0).to(x_1.dtype), mask=offs_d < D)


@triton.jit(do_not_specialize=_VARYING)
def _block_kernel(
    k_tail_rot_ptr, v_tail_ptr, hidden_ptr, b1_k_ptr, w2_k_ptr, b2_k_ptr, b1_v_ptr, w2_v_ptr, b2_v_ptr,
    cos_ptr, sin_ptr, stride_cb, stride_ct, stride_sb, stride_st, k_cmp_ptr, v_cmp_ptr, slots_ptr, leftpad_ptr,
    T, B, NC, blocks, tail,
    H: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, TYPE: tl.constexpr, ROPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write some columns of the new blocks, of keys or values.

    Grid: (cdiv(max(D, DV), BLOCK_N), cdiv(B * NC * H, BLOCK_M), 2)
    """
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_b, head, i_new, block, slot, mask = _new_blocks(
        row, slots_ptr, leftpad_ptr, T, B, NC, blocks, H, SIZE, STRIDE
    )  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    _wait_for_the_kernel_before(PDL)
    if tl.max(mask.to(tl.int32), 0) > 0:
        first, rows = head * tail, B * NC * H
        at = head * (blocks + 1) + block
        if tl.program_id(2) == 0:
            cos_ptrs, sin_ptrs = i_b, i_b
            if ROPE:
                cos_ptrs = cos_ptr + i_b * stride_cb + i_new * stride_ct
                sin_ptrs = sin_ptr + i_b * stride_sb + i_new * stride_st
            _write_columns(
                k_tail_rot_ptr, hidden_ptr, b1_k_ptr, w2_k_ptr, b2_k_ptr, cos_ptrs, sin_ptrs, k_cmp_ptr + at * D, row,
                rows, first, slot, tail, mask, offs_n, SIZE, D, WIDTH, SPLITS, TYPE, ROPE, BLOCK_K, CHUNK, PRECISION,
            )  # fmt: skip
        else:
            _write_columns(
                v_tail_ptr, hidden_ptr, b1_v_ptr, w2_v_ptr, b2_v_ptr, i_b, i_b, v_cmp_ptr + at * DV,
                row + SPLITS * rows, rows, first, slot, tail, mask, offs_n, SIZE, DV, WIDTH, SPLITS, TYPE, False,
                BLOCK_K, CHUNK, PRECISION,
            )  # fmt: skip


@triton.jit
def _write_columns(
    tail_ptr, hidden_ptr, b1_ptr, w2_ptr, b2_ptr, cos_ptrs, sin_ptrs, out_ptrs, row, rows, first, slot, tail, mask,
    offs_n, SIZE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, TYPE: tl.constexpr,
    ROPE: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns `offs_n` of φ.

    Args:
        hidden_ptr: fp32 `[2, SPLITS, rows, WIDTH]`, parts of the hidden layer, or `[2, rows, WIDTH]`, pooled tokens.
        row: int `[M]`, into the first three dims of it.
        cos_ptrs, sin_ptrs: `[M]`, read only if ROPE.
        out_ptrs: `[M]`, where blocks start.
        first: int64 `[M]`, first row of the head in the tail.
        mask: `[M]`, blocks to write.
    """
    mask_n = mask[:, None] & (offs_n < D)[None, :]
    offs_p = (offs_n + D // 2) % D  # what RoPE pairs the columns with
    dtype: tl.constexpr = out_ptrs.dtype.element_ty
    if TYPE != "mean":
        y = tl.zeros([row.shape[0], offs_n.shape[0]], dtype=tl.float32)
        partner = y
        DEPTH: tl.constexpr = D if TYPE == "pool" else WIDTH
        for k in range(0, DEPTH, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < DEPTH
            if TYPE == "pool":
                x = _pooled(hidden_ptr + row * WIDTH, cos_ptrs, sin_ptrs, mask, offs_k, D, ROPE)
            else:
                ptrs = hidden_ptr + row[:, None] * WIDTH + offs_k[None, :]
                h = tl.zeros([row.shape[0], BLOCK_K], dtype=tl.float32)
                for i in tl.static_range(SPLITS):
                    h += tl.load(ptrs + i * rows * WIDTH, mask=mask[:, None] & mask_k[None, :], other=0.0)
                h += tl.load(b1_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
                x = _silu(h.to(dtype).to(tl.float32)).to(dtype)
            ptrs = w2_ptr + offs_k[None, :]
            w2 = tl.load(ptrs + offs_n[:, None] * DEPTH, mask=(offs_n < D)[:, None] & mask_k[None, :], other=0.0)
            y = tl.dot(x, tl.trans(w2), y, input_precision=PRECISION)
            if ROPE:
                w2 = tl.load(ptrs + offs_p[:, None] * DEPTH, mask=(offs_n < D)[:, None] & mask_k[None, :], other=0.0)
                partner = tl.dot(x, tl.trans(w2), partner, input_precision=PRECISION)
        if TYPE != "pool":
            y += tl.load(b2_ptr + offs_n, mask=offs_n < D, other=0.0).to(tl.float32)[None, :]
            partner += tl.load(b2_ptr + offs_p, mask=offs_n < D, other=0.0).to(tl.float32)[None, :]
        y = y.to(dtype)
        if ROPE:
            cos = tl.load(cos_ptrs[:, None] + offs_n[None, :], mask=mask_n, other=0.0)
            sin = tl.load(sin_ptrs[:, None] + offs_n[None, :], mask=mask_n, other=0.0)
            y = _rotate(y, partner.to(dtype), cos, sin, offs_n[None, :], D)
        if TYPE == "pool":
            base = tl.load(hidden_ptr + row[:, None] * WIDTH + offs_n[None, :], mask=mask_n, other=0.0)
        elif TYPE == "residual_mlp":
            base = _mean(tail_ptr, first, slot, tail, mask_n, offs_n, SIZE, D, CHUNK).to(dtype)
        if TYPE != "mlp":
            y = (base.to(tl.float32) + y.to(tl.float32)).to(dtype)
    else:
        y = _mean(tail_ptr, first, slot, tail, mask_n, offs_n, SIZE, D, CHUNK).to(dtype)
    tl.store(out_ptrs[:, None] + offs_n[None, :], y, mask=mask_n)


@triton.jit
def _mean(
    tail_ptr, first, slot, tail, mask_n, offs_n, SIZE: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Mean of the blocks' tokens, columns `offs_n`, in fp32."""
    total = tl.zeros([slot.shape[0], offs_n.shape[0]], dtype=tl.float32)
    for t in range(0, SIZE, CHUNK):
        offs_t = t + tl.arange(0, CHUNK)
        token = (first[:, None] + (slot[:, None] + offs_t[None, :]) % tail) * D
        mask = mask_n[:, None, :] & (offs_t < SIZE)[None, :, None]
        x = tl.load(tail_ptr + token[:, :, None] + offs_n[None, None, :], mask=mask, other=0.0)
        total += tl.sum(x.to(tl.float32), 1)
    return total / SIZE


@triton.jit
def _pooled(row_ptrs, cos_ptrs, sin_ptrs, mask, offs_k, D: tl.constexpr, ROPE: tl.constexpr):
    """Columns `offs_k` of the pooled tokens in the frame of the block: RoPE and its factor taken off."""
    mask_k = mask[:, None] & (offs_k < D)[None, :]
    x = tl.load(row_ptrs[:, None] + offs_k[None, :], mask=mask_k, other=0.0)
    if ROPE:
        partner = tl.load(row_ptrs[:, None] + ((offs_k + D // 2) % D)[None, :], mask=mask_k, other=0.0)
        cos = tl.load(cos_ptrs[:, None] + offs_k[None, :], mask=mask_k, other=1.0)
        sin = tl.load(sin_ptrs[:, None] + offs_k[None, :], mask=mask_k, other=0.0)
        x = _rotate(x, partner, cos, -sin, offs_k[None, :], D)
        cos, sin = cos.to(tl.float32), sin.to(tl.float32)
        norm = _rounded(_rounded(cos * cos, x) + _rounded(sin * sin, x), x)
        x = (x.to(tl.float32) / norm).to(x.dtype)
    return x
