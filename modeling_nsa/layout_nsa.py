# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of a batch lie: padding, packing, and which compression blocks a forward pass completes.

Computed once per forward pass and shared by all sparse layers. Blocks are counted from each row's first real token, so
the sparse layers keep every row as `[padding, real tokens]`; rows padded elsewhere are brought into that order on their
way into the layer and back on the way out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from nsa_kernels import MAX_DECODE_QUERIES, compressed_cu_seqlens, num_compressed_blocks

__all__ = ["NSALayout", "build_layout", "packed_sequences"]


@dataclass
class NSALayout:
    """
    Attributes:
        past_length: Slots already in the cache; an int, or a 0-dim tensor with a static cache.
        query_length: T, new slots.
        leftpad: int64 `[B]`, padding slots before each row's first real token, or None where there are none.
        order: int64 `[B, T]`, which new token goes to which slot, or None to keep the order.
        cu_seqlens: int32 `[N + 1]` for packed sequences, over the flattened batch, or None.
        first_block: Complete compression blocks before this pass; an int, or a tensor `[B]` or `[]`.
        num_blocks: Blocks that this pass may complete, NC.
        block_embeddings: cos and sin at the mean position of these blocks, `[B or 1, NC, D]` (packed: `[NC, D]`).
        embed: Position embeddings (cos, sin) of positions `[B or 1, N]`.
        first_position: Position id of each row's first real token, `[B or 1, 1]`.
        slots: int64 `[T]`, slots of the new tokens, where `past_length` is a tensor; else None.
        cache: Layout of the same tokens in the cache, where it differs: rows padded on the right are computed as they
            come, but cached as `[padding, real tokens]`, so that more tokens can follow.
        to_cache: int64 `[B, T]`, which token goes to which slot of the cache; in `cache` only.
        trailing: int64 `[B]`, new padding behind cached real tokens, or None; the cache moves it to the front.
        real: bool `[B, T]`, new tokens that are no padding, where padding is computed in place; else None.
        parallel: Where other processes hold the rest of the tokens: `ParallelLayout`, else None.
    """

    past_length: int | torch.Tensor
    query_length: int
    compress_block_size: int
    compress_stride: int
    leftpad: torch.Tensor | None = None
    order: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    first_block: int | torch.Tensor = 0
    num_blocks: int = 0
    block_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None
    embed: Callable | None = None
    first_position: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    cache: "NSALayout | None" = None
    to_cache: torch.Tensor | None = None
    trailing: torch.Tensor | None = None
    real: torch.Tensor | None = None
    parallel: Any = None

    def first_slot(self, origin):
        """Slot of the first new block's first token, counted from slot `origin`: an int or a tensor `[B]`."""
        slot = self.first_block * self.compress_stride - origin
        return slot if self.leftpad is None else slot + self.leftpad

    def block_index(self, none: int) -> torch.Tensor | None:
        """Index `[B or 1, NC]` of each new block, `none` where it is not complete; None if all are new and complete."""
        if not isinstance(self.first_block, torch.Tensor):
            return None
        end = self.past_length + self.query_length - (0 if self.leftpad is None else self.leftpad)
        complete = _complete_blocks(end, self.compress_block_size, self.compress_stride).reshape(-1, 1)
        index = self.first_block.reshape(-1, 1) + torch.arange(self.num_blocks, device=complete.device)
        return torch.where(index < complete, index, none)

    def mean_positions(self, first_block, num_blocks: int) -> torch.Tensor:
        """Mean position id of blocks: `[B or 1, num_blocks]`, half-integers where l is even."""
        steps = torch.arange(num_blocks, device=self.first_position.device)
        if isinstance(first_block, torch.Tensor):
            first_block = first_block.reshape(-1, 1)
        return self.first_position + (first_block + steps) * self.compress_stride + (self.compress_block_size - 1) / 2


def build_layout(config, inputs_embeds, attention_mask, position_ids, past_key_values, cu_seqlens, rotary_emb):
    """Work out the layout of a forward pass.

    Args:
        inputs_embeds: `[B, T, hidden_size]`.
        attention_mask: 2-D mask over past and new slots, 1 for real tokens, or None.
        position_ids: int `[B or 1, T]`, or None.
        past_key_values: Cache, or None.
        cu_seqlens: What `packed_sequences` returns.
        rotary_emb: Maps (x, positions) to (cos, sin).

    Returns:
        The `NSALayout`, position_ids `[B or 1, T]` as the other layers read them, and the position embeddings
        (cos, sin) of the new tokens.

    Raises:
        ValueError: A mask that is not 2-D, of other values than 0 and 1, or of a wrong shape; positions that restart
            beside it or a cache, or do not count its real tokens.
    """
    (B, T), device = inputs_embeds.shape[:2], inputs_embeds.device
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    if isinstance(past, torch.Tensor):
        # the kernels for long chunks need the number; decoding does not wait for it, and the cache counts on in place
        past = _read(past) if T > MAX_DECODE_QUERIES else past.to(device).clone()
    padding, mask = {}, None
    if attention_mask is not None:
        mask = _check_mask(attention_mask, B, T, past, past_key_values).to(device)
    if position_ids is not None and (mask is not None or past_key_values is not None):
        _check_counting(position_ids, mask, past, T)
    if mask is not None:
        padding = _padding(mask, past, T, position_ids, past_key_values)
    cached, order = padding.pop("cached", None), padding.get("order")
    if position_ids is None:
        if attention_mask is not None:
            position_ids = _take(mask.long().cumsum(1) - 1, past, T).clamp(min=0)
        elif cu_seqlens is not None:
            position_ids = _packed_positions(cu_seqlens, B, T)
        else:
            position_ids = (torch.arange(T, device=device) + past)[None]

    layout = NSALayout(
        past, T, config.compress_block_size, config.compress_stride, cu_seqlens=cu_seqlens,
        embed=lambda positions: rotary_emb(inputs_embeds, positions), **padding,
    )  # fmt: skip
    _set_blocks(layout)
    if isinstance(past, torch.Tensor):
        layout.slots = past + torch.arange(T, device=device)
    if cached is not None:
        layout.cache = replace(layout, leftpad=cached[0], to_cache=cached[1], real=None)
        _set_blocks(layout.cache)
    positions = position_ids if order is None else position_ids.expand(B, -1).gather(1, order)
    if cu_seqlens is not None:
        centres = _packed_centres(layout, position_ids.expand(B, -1).reshape(1, -1))
        position_ids = position_ids.expand(B, -1)
    else:
        _set_first_position(layout, positions)
        centres = layout.mean_positions(layout.first_block, layout.num_blocks)
    # one call for tokens and blocks: dynamic RoPE types adapt to the positions of each call
    if cu_seqlens is not None:
        cos, sin = rotary_emb(inputs_embeds, torch.cat((position_ids.reshape(1, -1).float(), centres), dim=1))
        layout.block_embeddings = (cos[0, B * T :], sin[0, B * T :])
        # full and sliding layers know sequences by positions that restart, which those given need not do
        restarting = _packed_positions(cu_seqlens, B, T)
        return layout, restarting, (cos[:, : B * T].view(B, T, -1), sin[:, : B * T].view(B, T, -1))
    rows = max(position_ids.shape[0], centres.shape[0])
    together = torch.cat((position_ids.expand(rows, -1).float(), centres.expand(rows, -1)), dim=1)
    cos, sin = rotary_emb(inputs_embeds, together)
    layout.block_embeddings = (cos[:, T:], sin[:, T:])
    if layout.cache is not None:  # blocks count from the first real token: their positions are the same
        layout.cache.block_embeddings, layout.cache.first_position = layout.block_embeddings, layout.first_position
    return layout, position_ids, (cos[:, :T], sin[:, :T])


@torch.compiler.disable
def _read(number: torch.Tensor) -> int:
    """Wait for a number from the device, where compiled code is interrupted."""
    return int(number)


# ---------------------------------------------------------------------------------------------------------------------
# Padding
# ---------------------------------------------------------------------------------------------------------------------


def _check_mask(attention_mask, B, T, past, past_key_values):
    supported = (
        "Native sparse attention supports 2-D masks [batch, past + new tokens] of 0 and 1 that mark left or right "
        "padding, and packed sequences (`cu_seq_lens_q`, or `position_ids` that restart)."
    )
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        given = list(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask)
        raise ValueError(f"`attention_mask` must be 2-D, got {given}. {supported}")
    rows, width = attention_mask.shape
    fits = width == past + T if isinstance(past, int) else width >= T
    # a mask prepared for a static cache has the cache's length
    fits = fits or (past_key_values is not None and width == past_key_values.get_max_length())
    if rows != B or not fits:
        raise ValueError(
            f"`attention_mask` must have shape [{B}, {past} past + {T} new], got {[rows, width]}. {supported}"
        )
    if attention_mask.dtype == torch.bool:
        return attention_mask
    known = not torch.compiler.is_compiling() and isinstance(past, int)
    if known and ((attention_mask != 0) & (attention_mask != 1)).any():
        raise ValueError(f"`attention_mask` must hold only 0 and 1, got other values. {supported}")
    return attention_mask.bool()


def _take(x, past, T):
    """Columns `past … past + T - 1`; `past` may be a tensor."""
    if isinstance(past, torch.Tensor):
        return x.index_select(1, past + torch.arange(T, device=x.device))
    return x[:, past : past + T]


def _padding(mask, past, T, position_ids, past_key_values):
    """The fields of `NSALayout` that padding decides, and `cached`: the cache's (leftpad, order) where they differ."""
    compiling = torch.compiler.is_compiling()
    unread = compiling or isinstance(past, torch.Tensor)  # nothing may be read back from the device
    if not unread and mask.all():
        return {}
    new = _take(mask, past, T)
    seen = mask.sum(1) - new.sum(1)  # real tokens in the cache
    begun = seen > 0
    leftpad = torch.where(begun, past - seen, past + T - new.sum(1))
    late = (
        "`attention_mask` has padding behind real tokens that a static cache already holds. Pad the rows on the left, "
    )
    late += "or use a dynamic cache."
    if unread and not compiling:
        torch._assert_async(~(begun[:, None] & ~new).any(), late)
    if unread and T == 1:
        return {"leftpad": leftpad}
    # rows not begun: padding first; rows begun: padding last
    key = (new ^ begun[:, None]).int()
    order = key.argsort(dim=1, stable=True)
    if unread:
        return {"leftpad": leftpad, "order": order}
    if not (key[:, 1:] < key[:, :-1]).any():
        order = None
    holes = ((mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0] > 1).any()
    if holes:
        _check_holes(mask, past, T, position_ids)
    trailing = (begun[:, None] & ~new).sum(1)
    trailing = trailing if trailing.any() else None
    static = past_key_values is not None and past_key_values.is_compileable
    if trailing is not None and static:
        raise ValueError(late)
    # padding at negative positions gives 0 by itself; trailing padding has to be told apart
    cached, real = None, None if trailing is None else new if order is None else new.gather(1, order)
    if order is not None and isinstance(past, int) and past == 0 and not holes and not static:
        # right padding is in every real token's future: nothing to move but in the cache
        cached = (leftpad, order) if past_key_values is not None else None
        leftpad, order, real = (mask.cumsum(1) == 0).sum(1), None, new
    leftpad = leftpad if leftpad.any() else None
    return {"leftpad": leftpad, "order": order, "trailing": trailing, "real": real, "cached": cached}


def _check_holes(mask, past, T, position_ids):
    """Padding between real tokens is skipped, as `generate` means it: position ids count the real tokens."""
    if position_ids is None:  # they will
        return
    new = _take(mask, past, T)
    drift = position_ids - _take(mask.long().cumsum(1), past, T)
    first = torch.where(new, drift, torch.iinfo(torch.long).max).amin(1, keepdim=True)
    if (new & (drift != first)).any():
        raise ValueError(
            "`position_ids` must number the real tokens consecutively where `attention_mask` has padding between them. "
            "Leave `position_ids` out, or pad on the left or on the right."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Packed sequences
# ---------------------------------------------------------------------------------------------------------------------


def packed_sequences(B, T, attention_mask, position_ids, past_key_values, cu_seqlens):
    """Cumulative lengths of packed sequences over the flattened batch, or None."""
    if cu_seqlens is not None:
        if past_key_values is not None or attention_mask is not None:
            _refuse_packing("past_key_values" if past_key_values is not None else "attention_mask")
        _check_cu_seqlens(cu_seqlens, B * T)
        return cu_seqlens
    if position_ids is None or attention_mask is not None or past_key_values is not None:
        return None
    return _restarts(position_ids, B)


def _check_cu_seqlens(cu_seqlens, tokens):
    required = f"`cu_seq_lens_q` must run from 0 to the number of tokens, {tokens}, as 1-D integers that do not fall"
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ValueError(f"{required}, got a {type(cu_seqlens).__name__}. Pass a tensor.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"{required}, got shape {list(cu_seqlens.shape)} of {cu_seqlens.dtype}.")
    if torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"{required}, got {cu_seqlens.tolist()[:8]}.")


def _refuse_packing(name):
    raise ValueError(
        f"Packed sequences (`cu_seq_lens_q`, or `position_ids` that restart) need `{name}=None`, got {name}. Leave it "
        "out, or pass one sequence per row."
    )


def _check_counting(position_ids, mask, past, T):
    """With a mask or a cache a row is one sequence. Steps of decoding and compiled code do not wait for the check."""
    if torch.compiler.is_compiling() or not isinstance(past, int) or T == 1 or (past and T <= MAX_DECODE_QUERIES):
        return
    jumps = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if mask is not None:
        real = _take(mask, past, T)
        jumps = jumps & real[:, 1:] & real[:, :-1]
    if jumps.any():
        _refuse_packing("past_key_values" if mask is None else "attention_mask")


@torch.compiler.disable(
    reason="`position_ids` without a mask and a cache may pack sequences, whose shapes depend on data. With "
    "fullgraph=True leave out `position_ids` that only count the tokens; packed sequences need fullgraph=False."
)
def _restarts(position_ids, B):
    """Cumulative lengths of the sequences that `position_ids` number, or None if they are one per row."""
    jumps = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not jumps.any():
        return None
    starts = torch.nn.functional.pad(jumps, (1, 0), value=True).expand(B, -1).reshape(-1).nonzero()[:, 0]
    return torch.nn.functional.pad(starts, (0, 1), value=position_ids.shape[1] * B).int()


def _packed_positions(cu_seqlens, B, T):
    """Positions `[B, T]` that start at 0 in every sequence."""
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=B * T)
    return (torch.arange(B * T, device=cu_seqlens.device) - starts).view(B, T)


def _packed_centres(layout, position_ids):
    """Mean position ids `[1, NC]` of the blocks of packed sequences."""
    block_size, stride, cu = layout.compress_block_size, layout.compress_stride, layout.cu_seqlens
    cu_blocks = compressed_cu_seqlens(cu, block_size, stride)
    counts = cu_blocks.diff().long()
    sequence = torch.repeat_interleave(counts)
    block = torch.arange(sequence.shape[0], device=cu.device) - cu_blocks[:-1].long()[sequence]
    return position_ids[:, cu[:-1].long()[sequence] + block * stride].float() + (block_size - 1) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


def _complete_blocks(length, block_size, stride):
    """Complete compression blocks of `length` tokens; tensors may be negative."""
    if isinstance(length, torch.Tensor):
        return (torch.div(length - block_size, stride, rounding_mode="floor") + 1).clamp(min=0)
    return num_compressed_blocks(length, block_size, stride)


def _set_blocks(layout):
    """Blocks complete before this pass, and how many it may complete."""
    if layout.cu_seqlens is not None:
        return
    sizes, past, T = (layout.compress_block_size, layout.compress_stride), layout.past_length, layout.query_length
    layout.first_block = _complete_blocks(past if layout.leftpad is None else past - layout.leftpad, *sizes)
    if not isinstance(layout.first_block, torch.Tensor):
        layout.num_blocks = num_compressed_blocks(past + T, *sizes) - layout.first_block
    elif isinstance(past, int) and past == 0:
        layout.num_blocks = num_compressed_blocks(T, *sizes)
    elif isinstance(past, int) and not torch.compiler.is_compiling():
        new = _complete_blocks(past + T - layout.leftpad, *sizes) - layout.first_block
        layout.num_blocks = int(new.max())
    else:
        layout.num_blocks = -(-T // layout.compress_stride)


def _set_first_position(layout, positions):
    """Position id of each row's first real token, read off its first real token in this pass."""
    if layout.leftpad is None:
        layout.first_position = positions[:, :1] - layout.past_length
        return
    slot = (layout.leftpad - layout.past_length).clamp(0, layout.query_length - 1)[:, None]
    index = layout.past_length + slot - layout.leftpad[:, None]
    layout.first_position = positions.expand(slot.shape[0], -1).gather(1, slot) - index
