# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Compression φ without copies of overlapping blocks: the operations `compress_*` of `reference.py`.

A block of l tokens is l / d chunks of d tokens, and blocks share chunks: sums and products are taken once per chunk,
then added over the chunks of a block. Plain PyTorch, since matrix products are nearly all of it.

Symbols: see `reference.py`; M chunks, r = l / d chunks of a block.
"""

import functools

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

from .reference import compress_mean as mean_of_copies
from .reference import compress_mlp as mlp_of_copies
from .reference import compress_pool as pool_of_copies
from .reference import num_compressed_blocks

__all__ = ["compress_mean", "compress_mlp", "compress_pool"]

# Blocks from which sharing chunks pays; decoding makes one at a time.
_FEW = 16
# Where the chunks of packed sequences lie: all layers of a model are called with the same `cu_seqlens`.
_PACKED = WeakIdKeyDictionary()


def compress_mean(
    x, *, compress_block_size, compress_stride, first_slot=0, num_blocks=None, cu_seqlens=None
) -> torch.Tensor:
    """Mean of each block's tokens; see `reference.compress_mean`."""
    where = {"first_slot": first_slot, "num_blocks": num_blocks, "cu_seqlens": cu_seqlens}
    sizes = {"compress_block_size": compress_block_size, "compress_stride": compress_stride}
    if (found := _chunks(x, compress_block_size, compress_stride, **where)) is None:
        return mean_of_copies(x, **sizes, **where)
    chunks, blocks = found  # [B, M, d, H, D]
    wide = _wide(x)
    sums = chunks.sum(dim=-3, dtype=wide)  # [B, M, H, D]
    mean = sum(blocks(sums, i) for i in range(compress_block_size // compress_stride)) / compress_block_size
    return mean.to(x.dtype)


def compress_mlp(
    x, pos_embed, w1, b1, w2, b2, *,
    compress_block_size, compress_stride, first_slot=0, num_blocks=None, cu_seqlens=None,
) -> torch.Tensor:  # fmt: skip
    """The paper's φ (eq. 7), w1 and pos_embed applied chunk by chunk; see `reference.compress_mlp`."""
    where = {"first_slot": first_slot, "num_blocks": num_blocks, "cu_seqlens": cu_seqlens}
    sizes = {"compress_block_size": compress_block_size, "compress_stride": compress_stride}
    if (found := _chunks(x, compress_block_size, compress_stride, **where)) is None:
        return mlp_of_copies(x, pos_embed, w1, b1, w2, b2, **sizes, **where)
    chunks, blocks = found
    chunks = chunks.transpose(-3, -2).flatten(-2)  # [B, M, H, d · D]
    parts = w1.unflatten(1, (-1, chunks.shape[-1])).unbind(1)  # r of [F, d · D]
    hidden = sum(blocks(F.linear(chunks, part), i) for i, part in enumerate(parts))  # [B, C, H, F]
    hidden = hidden + F.linear(pos_embed.flatten(), w1, b1)
    return F.linear(F.silu(hidden), w2, b2).to(x.dtype)


def compress_pool(
    x, pooled, pos_bias, w1, b1, w2, *,
    compress_block_size, compress_stride, first_slot=0, num_blocks=None, cu_seqlens=None,
) -> torch.Tensor:  # fmt: skip
    """Content-dependent pooling, the softmax taken over the chunks of a block; see `reference.compress_pool`."""
    where = {"first_slot": first_slot, "num_blocks": num_blocks, "cu_seqlens": cu_seqlens}
    sizes = {"compress_block_size": compress_block_size, "compress_stride": compress_stride}
    if (found := _chunks(pooled, compress_block_size, compress_stride, **where)) is None:
        return pool_of_copies(x, pooled, pos_bias, w1, b1, w2, **sizes, **where)
    chunks, blocks = found
    scores = F.linear(F.silu(F.linear(x, w1, b1)), w2[None])  # [B, T, H, 1]
    scores, _ = _chunks(scores, compress_block_size, compress_stride, **where)
    wide = _wide(pooled)
    chunks, scores = chunks.to(wide), scores.to(wide)
    peaks, sums = [], []
    for i, bias in enumerate(pos_bias.to(wide).view(-1, compress_stride, 1, 1)):
        logits = scores + bias  # [B, M, d, H, 1]
        peak = logits.detach().amax(-3, keepdim=True)
        p = (logits - peak).exp()
        peaks.append(blocks(peak.squeeze(-3), i))
        sums.append([blocks(each.sum(-3), i) for each in (p * chunks, p)])
    highest = functools.reduce(torch.maximum, peaks)
    weights = [(peak - highest).exp() for peak in peaks]
    total, norm = (sum(weight * each for weight, each in zip(weights, part)) for part in zip(*sums))
    return (total / norm).to(pooled.dtype)


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(x, block_size, stride, *, first_slot, num_blocks, cu_seqlens):
    """Chunks of the tokens that blocks are made of.

    Args:
        x: `[B, T, H, D]`, packed `[T, H, D]`.

    Returns:
        chunks: `[B, M, d, H, D]`, packed `[M, d, H, D]`.
        blocks: From values per chunk, `[B, M, …]` or `[M, …]`, and i in 0 … r - 1 to those of every block's chunk i.
        None where blocks start anywhere in a row, or are few.
    """
    r = block_size // stride
    if isinstance(first_slot, torch.Tensor):
        return None
    if cu_seqlens is None:
        if num_blocks is None:
            num_blocks = num_compressed_blocks(x.shape[1] - first_slot, block_size, stride)
        if num_blocks < _FEW:
            return None
        count = num_blocks + r - 1
        chunks = x[:, first_slot : first_slot + count * stride].unflatten(1, (count, stride))
        return chunks, lambda values, i: values[:, i : i + num_blocks]

    num_blocks, count, tokens, first = _packed_chunks(cu_seqlens, block_size, stride)
    if num_blocks < _FEW:
        return None
    chunks = x.index_select(0, tokens).unflatten(0, (count, stride))
    return chunks, lambda values, i: values.index_select(0, first + i)


def _packed_chunks(cu_seqlens, block_size, stride):
    """Numbers of blocks and chunks, the tokens of all chunks, and the first chunk of every block."""
    # compiled code and inference tensors cannot be asked whether they changed
    kept = None
    if not (torch.compiler.is_compiling() or cu_seqlens.is_inference()):
        kept = _PACKED.setdefault(cu_seqlens, {})
        key = (block_size, stride, cu_seqlens._version)
        if key in kept:
            return kept[key]
    cu = cu_seqlens.long()
    blocks_of = ((cu.diff() - block_size) // stride + 1).clamp(min=0)
    chunks_of = torch.where(blocks_of > 0, blocks_of + block_size // stride - 1, 0)
    num_blocks, count = torch.stack((blocks_of.sum(), chunks_of.sum())).tolist()

    def places(of, total):
        """Sequence of every item, and its number inside the sequence."""
        seq = torch.repeat_interleave(of, output_size=total)
        return seq, torch.arange(total, device=cu.device) - (of.cumsum(0) - of)[seq]

    seq, number = places(chunks_of, count)
    tokens = (cu[seq] + stride * number)[:, None] + torch.arange(stride, device=cu.device)
    seq, number = places(blocks_of, num_blocks)
    found = (num_blocks, count, tokens.flatten(), (chunks_of.cumsum(0) - chunks_of)[seq] + number)
    if kept is not None:
        kept[key] = found
    return found
