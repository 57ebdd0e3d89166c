# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Native Sparse Attention in pure PyTorch: the specification that every kernel is held to.

Source: "Native Sparse Attention", arXiv 2502.11089; equation numbers are the paper's, indices are 0-based.

Symbols
    B   rows of the batch           T   query tokens          TK  key tokens
    HQ  query heads                 H   key/value heads       G   HQ // H, query heads of one group
    D   query/key head dim          DV  value head dim        C   compressed blocks     S  selectable blocks
    l   compress_block_size         d   compress_stride       l'  select_block_size
    n   num_selected_blocks         w   window_size

Layout
    Tensors are `[B, T, H, D]`; with `cu_seqlens` (int, `[N + 1]`) they are packed, `[T, H, D]`, and every sequence is
    computed alone. `leftpad` (int, `[B]`, default 0) counts the padding slots before a row's first real token. The
    first query sits in slot `q_offset` (int, or an int tensor `[]` or `[B]`, default 0). The position of a token is its
    slot minus `leftpad`: blocks are counted from the first real token. A query at a negative position is padding:
    output 0, lse -inf.

Softmax and its statistics are computed in fp32 (fp64 for fp64 inputs); lse is log Σ exp of the scaled scores, natural.
Queries are worked through in chunks; with gradients each chunk is recomputed in the backward pass, so that memory
grows with T and not with T².
"""

import itertools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

__all__ = [
    "append_tokens",
    "compress_mean",
    "compress_mlp",
    "compress_pool",
    "compressed_attention",
    "compressed_cu_seqlens",
    "fold_importance",
    "gated_sum",
    "importance",
    "nsa_attention",
    "num_compressed_blocks",
    "rotate",
    "select_blocks",
    "selected_attention",
    "topn_blocks",
    "window_attention",
]

# Scores held at once, in elements: 16 MB of fp32, which memory allocators reuse. Chunks of more than 512 queries waste
# work on keys in their future.
_MAX_SCORES = 2**22
_MIN_CHUNK, _MAX_CHUNK = 64, 512


def num_compressed_blocks(length: int, compress_block_size: int, compress_stride: int) -> int:
    """Number of complete compression blocks of a sequence of `length` tokens: C = (length - l) // d + 1, at least 0."""
    return max(0, (length - compress_block_size) // compress_stride + 1)


def compressed_cu_seqlens(cu_seqlens: torch.Tensor, compress_block_size: int, compress_stride: int) -> torch.Tensor:
    """Cumulative numbers of compressed blocks of packed sequences.

    Args:
        cu_seqlens: int `[N + 1]`, cumulative sequence lengths in tokens, starting with 0.

    Returns:
        Tensor of the same shape and dtype.
    """
    blocks = ((cu_seqlens.diff() - compress_block_size) // compress_stride + 1).clamp(min=0)
    return F.pad(blocks.cumsum(0), (1, 0)).to(cu_seqlens.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Compression (eq. 7)
# ---------------------------------------------------------------------------------------------------------------------


def _unfold_blocks(x, block_size, stride, first_slot, num_blocks, cu_seqlens):
    """Cut `[B, T, H, D]` into overlapping blocks `[B, C, l, H, D]`; packed: `[T, H, D]` into `[C, l, H, D]`."""
    if cu_seqlens is not None:
        starts = [
            start + stride * i
            for start, stop in _bounds(cu_seqlens)
            for i in range(num_compressed_blocks(stop - start, block_size, stride))
        ]
        starts = torch.tensor(starts, dtype=torch.long, device=x.device)
        return x[starts[:, None] + torch.arange(block_size, device=x.device)]
    if num_blocks is None:
        if isinstance(first_slot, torch.Tensor):
            raise ValueError("`num_blocks` is required when `first_slot` is a tensor, got `num_blocks=None`.")
        num_blocks = num_compressed_blocks(x.shape[1] - first_slot, block_size, stride)
    if isinstance(first_slot, torch.Tensor):
        starts = first_slot.reshape(-1, 1) + stride * torch.arange(num_blocks, device=x.device)  # [B or 1, C]
        slots = starts[..., None] + torch.arange(block_size, device=x.device)  # [B or 1, C, l]
        slots = slots.clamp(0, x.shape[1] - 1)  # incomplete blocks: any content, every later step masks them
        rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
        return x[rows, slots]
    if num_blocks == 0:
        return x.new_zeros(x.shape[0], 0, block_size, *x.shape[2:])
    last_slot = first_slot + (num_blocks - 1) * stride + block_size
    return x[:, first_slot:last_slot].unfold(1, block_size, stride).movedim(-1, 2)


def compress_mean(
    x, *, compress_block_size, compress_stride, first_slot=0, num_blocks=None, cu_seqlens=None
) -> torch.Tensor:
    """Mean of each block's tokens.

    Args:
        x: `[B, T, H, D]` keys or values (packed: `[T, H, D]`).
        first_slot: Slot of block 0's first token; an int, or an int tensor `[B]`.
        num_blocks: Number of blocks C to return; default: all complete ones. Required when `first_slot` is a tensor:
            blocks that run past the end are then returned with arbitrary finite content.
        cu_seqlens: int `[N + 1]`, for packed sequences.

    Returns:
        `[B, C, H, D]` (packed: `[C, H, D]`, see `compressed_cu_seqlens`), in the dtype of `x`.
    """
    blocks = _unfold_blocks(x, compress_block_size, compress_stride, first_slot, num_blocks, cu_seqlens)
    return blocks.to(_compute_dtype(x)).mean(dim=-3).to(x.dtype)


def compress_mlp(
    x,
    pos_embed,
    w1,
    b1,
    w2,
    b2,
    *,
    compress_block_size,
    compress_stride,
    first_slot=0,
    num_blocks=None,
    cu_seqlens=None,
) -> torch.Tensor:
    """The paper's φ (eq. 7): an MLP over each head's flattened block with an intra-block position embedding.

    `φ(block) = w2 · silu(w1 · flatten(block + pos_embed) + b1) + b2`, for every key/value head alike.

    Args:
        x: `[B, T, H, D]` keys or values (packed: `[T, H, D]`).
        pos_embed: `[l, D]`, w1: `[F, l · D]`, b1: `[F]`, w2: `[DO, F]`, b2: `[DO]`.
        first_slot, num_blocks, cu_seqlens: As for `compress_mean`.

    Returns:
        `[B, C, H, DO]` (packed: `[C, H, DO]`), in the dtype of `x`.
    """
    blocks = _unfold_blocks(x, compress_block_size, compress_stride, first_slot, num_blocks, cu_seqlens)
    blocks = blocks.transpose(-3, -2) + pos_embed  # [..., C, H, l, D]
    return F.linear(F.silu(F.linear(blocks.flatten(-2), w1, b1)), w2, b2).to(x.dtype)


def compress_pool(
    x,
    pooled,
    pos_bias,
    w1,
    b1,
    w2,
    *,
    compress_block_size,
    compress_stride,
    first_slot=0,
    num_blocks=None,
    cu_seqlens=None,
) -> torch.Tensor:
    """A φ (eq. 7) whose weights depend on the content: the tokens that stand out in a block count more than the rest.

    `φ(block) = Σ_t p_t · pooled_t` with `p = softmax over the block of w2 · silu(w1 · x_t + b1) + pos_bias_t`, for
    every key/value head alike. With w2 and pos_bias 0 it is the mean.

    Args:
        x: `[B, T, H, D]`, what the weights are made from (packed: `[T, H, D]`).
        pooled: `[B, T, H, DO]` (packed: `[T, H, DO]`), what is summed.
        pos_bias: `[l]`, w1: `[F, D]`, b1: `[F]`, w2: `[F]`.
        first_slot, num_blocks, cu_seqlens: As for `compress_mean`.

    Returns:
        `[B, C, H, DO]` (packed: `[C, H, DO]`), in the dtype of `pooled`.
    """
    where = (compress_block_size, compress_stride, first_slot, num_blocks, cu_seqlens)
    scores = F.linear(F.silu(F.linear(x, w1, b1)), w2[None])  # [..., T, H, 1]
    dtype = _compute_dtype(pooled)
    p = (_unfold_blocks(scores, *where).to(dtype) + pos_bias[:, None, None].to(dtype)).softmax(dim=-3)
    return (p * _unfold_blocks(pooled, *where).to(dtype)).sum(dim=-3).to(pooled.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The three branches
# ---------------------------------------------------------------------------------------------------------------------


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
        q: `[B, T, HQ, D]`.
        k_cmp: `[B, C, H, D]`, v_cmp: `[B, C, H, DV]`.
        scale: Factor of the scores, default `D ** -0.5`.
        leftpad, q_offset, cu_seqlens: See the top of the file; packed keys follow `compressed_cu_seqlens`.

    Returns:
        o_cmp `[B, T, HQ, DV]` in the dtype of `q`, lse `[B, T, HQ]` fp32. Queries with no complete block: 0 and -inf.
    """
    if cu_seqlens is not None:
        cu_blocks = compressed_cu_seqlens(cu_seqlens, compress_block_size, compress_stride)
        return _per_sequence(
            lambda q, k_cmp, v_cmp: compressed_attention(
                q, k_cmp, v_cmp, compress_block_size=compress_block_size, compress_stride=compress_stride, scale=scale
            ),
            (q, cu_seqlens), (k_cmp, cu_blocks), (v_cmp, cu_blocks),
        )  # fmt: skip

    def chunk(start, stop):
        blocks = k_cmp.shape[1]
        if isinstance(q_offset, int):  # later blocks are incomplete for every query of the chunk
            blocks = min(blocks, num_compressed_blocks(q_offset + stop, compress_block_size, compress_stride))
        mask = _complete_blocks(q, blocks, start, stop, compress_block_size, compress_stride, leftpad, q_offset)
        return _attend(q[:, start:stop], k_cmp[:, :blocks], v_cmp[:, :blocks], mask, scale)

    return _over_chunks(chunk, q, k_cmp.shape[1], (q, k_cmp, v_cmp))


def selected_attention(
    q,
    k,
    v,
    block_indices,
    *,
    select_block_size,
    scale=None,
    leftpad=None,
    q_offset=0,
    cu_seqlens=None,
    return_weights=False,
) -> tuple[torch.Tensor, ...]:
    """Attention to the tokens of the chosen blocks (eq. 11-12), causal inside the query's own block.

    Args:
        q: `[B, T, HQ, D]`, k: `[B, TK, H, D]`, v: `[B, TK, H, DV]`.
        block_indices: int `[B, T, H, n]`, block j holds positions j·l' … j·l' + l' - 1; -1 is no block.
        scale, leftpad, q_offset, cu_seqlens: As for `compressed_attention`.
        return_weights: Return the probabilities too, at once for all queries: T · TK memory. Not for packed sequences.

    Returns:
        o_slc `[B, T, HQ, DV]` in the dtype of `q`, lse `[B, T, HQ]` fp32, and with `return_weights` the probabilities
        `[B, HQ, T, TK]` in the dtype of `q`, 0 for tokens that are not chosen.
    """
    if return_weights:
        if cu_seqlens is not None:
            raise NotImplementedError("`return_weights` needs sequences that are not packed, got `cu_seqlens`.")
        mask = _chosen_tokens(q, k.shape[1], 0, q.shape[1], block_indices, select_block_size, leftpad, q_offset)
        p, lse, empty = _softmax(q, k, mask, scale)
        weights = p.masked_fill(empty[..., None], 0.0).flatten(1, 2).to(q.dtype)
        return _weighted_sum(weights.unflatten(1, (k.shape[2], -1)), v, q.dtype), _by_token(lse), weights
    if cu_seqlens is not None:
        return _per_sequence(
            lambda q, k, v, block_indices: selected_attention(
                q, k, v, block_indices, select_block_size=select_block_size, scale=scale
            ),
            (q, cu_seqlens), (k, cu_seqlens), (v, cu_seqlens), (block_indices, cu_seqlens),
        )  # fmt: skip

    def chunk(start, stop):
        keys = min(k.shape[1], q_offset + stop) if isinstance(q_offset, int) else k.shape[1]
        mask = _chosen_tokens(q, keys, start, stop, block_indices, select_block_size, leftpad, q_offset)
        return _attend(q[:, start:stop], k[:, :keys], v[:, :keys], mask, scale)

    return _over_chunks(chunk, q, k.shape[1], (q, k, v))


def window_attention(
    q, k, v, *, window_size, scale=None, leftpad=None, q_offset=0, cu_seqlens=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the tokens t - w + 1 … t (branch win): exactly w of them.

    Args:
        q: `[B, T, HQ, D]`, k: `[B, TW, H, D]`, v: `[B, TW, H, DV]`. The last key belongs to the last query; a cache
            may hold fewer keys than the sequence has tokens.
        scale, leftpad, q_offset, cu_seqlens: As for `compressed_attention`.

    Returns:
        o_win `[B, T, HQ, DV]` in the dtype of `q`, and lse `[B, T, HQ]` fp32.
    """
    if cu_seqlens is not None:
        return _per_sequence(
            lambda q, k, v: window_attention(q, k, v, window_size=window_size, scale=scale),
            (q, cu_seqlens), (k, cu_seqlens), (v, cu_seqlens),
        )  # fmt: skip

    def chunk(start, stop):
        first, last = _window_keys(q, k, start, stop, window_size)
        mask = _window_tokens(q, k, first, last, start, stop, window_size, leftpad, q_offset)
        return _attend(q[:, start:stop], k[:, first:last], v[:, first:last], mask, scale)

    return _over_chunks(chunk, q, min(k.shape[1], window_size + _MAX_CHUNK), (q, k, v))


def gated_sum(o_cmp, o_slc, o_win, g_cmp, g_slc, g_win) -> torch.Tensor:
    """Sum of the branches (eq. 5): `g_cmp · o_cmp + g_slc · o_slc + g_win · o_win`, summed in fp32.

    Args:
        o_cmp, o_slc, o_win: `[..., HQ, DV]`.
        g_cmp, g_slc, g_win: `[..., HQ]`, one gate per query head and branch.

    Returns:
        `[..., HQ, DV]`, in the dtype of `o_slc`.
    """
    dtype = _compute_dtype(o_slc)
    pairs = ((g_cmp, o_cmp), (g_slc, o_slc), (g_win, o_win))
    return sum(gate.to(dtype)[..., None] * out.to(dtype) for gate, out in pairs).to(o_slc.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Importance and selection
# ---------------------------------------------------------------------------------------------------------------------


def fold_importance(p, *, num_blocks, compress_block_size, compress_stride, select_block_size) -> torch.Tensor:
    """Importance of selection blocks from compressed probabilities (eq. 9, spatially aligned).

    `imp[j] = Σ_{m = 0 .. l'/d - 1} Σ_{k = 0 .. l/d - 1} p[(l'/d)·j + m - k]`, terms out of range dropped.

    Args:
        p: `[..., C]`.
        num_blocks: S.

    Returns:
        `[..., S]`.
    """
    overlap, ratio = compress_block_size // compress_stride, select_block_size // compress_stride
    length = num_blocks * ratio
    if not length:  # an empty sequence
        return p[..., :0]
    p = F.pad(p[..., :length], (overlap - 1, max(0, length - p.shape[-1])))
    covering = p.unfold(-1, overlap, 1).sum(-1)  # the sum over k: [..., S · l'/d]
    return covering.unflatten(-1, (num_blocks, ratio)).sum(-1)


def importance(
    q,
    k_cmp,
    lse,
    *,
    num_blocks,
    compress_block_size,
    compress_stride,
    select_block_size,
    scale=None,
    leftpad=None,
    q_offset=0,
) -> torch.Tensor:
    """Importance of every selection block to every query, summed over the heads of a group (eq. 8-10).

    Args:
        q: `[B, T, HQ, D]`, k_cmp: `[B, C, H, D]`.
        lse: `[B, T, HQ]`, of `compressed_attention`.
        num_blocks: S.
        scale, leftpad, q_offset: As for `compressed_attention`.

    Returns:
        fp32 `[B, T, H, S]`.
    """
    mask = _complete_blocks(q, k_cmp.shape[1], 0, q.shape[1], compress_block_size, compress_stride, leftpad, q_offset)
    scores = _scores(q, k_cmp, scale).masked_fill(~mask, float("-inf"))  # [B, H, G, T, C]
    lse = lse.unflatten(2, (k_cmp.shape[2], -1)).permute(0, 2, 3, 1)[..., None]  # [B, H, G, T, 1]
    p = torch.exp(scores - torch.where(lse == float("-inf"), 0.0, lse))
    p = p.sum(dim=2).transpose(1, 2)  # eq. 10 before eq. 9: both are sums
    return fold_importance(
        p,
        num_blocks=num_blocks,
        compress_block_size=compress_block_size,
        compress_stride=compress_stride,
        select_block_size=select_block_size,
    )


def topn_blocks(
    imp,
    *,
    select_block_size,
    num_selected_blocks,
    num_initial_blocks=1,
    num_local_blocks=2,
    leftpad=None,
    q_offset=0,
) -> torch.Tensor:
    """Choose blocks (eq. 11): the forced ones, then the most important visible ones; of equals the smaller index.

    Block j is visible to position t if j·l' <= t. Forced: blocks 0 … num_initial_blocks - 1, the query's own block and
    the num_local_blocks - 1 before it. Fewer visible blocks than n: all of them.

    Args:
        imp: `[B, T, H, S]`, see `importance`.
        leftpad, q_offset: See the top of the file.

    Returns:
        int32 `[B, T, H, n]`, ascending, padded with -1.
    """
    blocks = torch.arange(imp.shape[-1], device=imp.device)
    position = _positions(imp, 0, imp.shape[1], leftpad, q_offset)[:, :, None, None]
    own = torch.div(position, select_block_size, rounding_mode="floor")
    visible = (blocks <= own) & (position >= 0)
    forced = visible & ((blocks < num_initial_blocks) | (blocks > own - num_local_blocks))
    rank = imp.masked_fill(forced, float("inf")).masked_fill(~visible, float("-inf"))
    # a stable sort keeps the smaller index first among equals; topk promises nothing
    chosen = rank.sort(dim=-1, descending=True, stable=True).indices[..., :num_selected_blocks]
    none = imp.shape[-1]
    chosen = torch.where(visible.expand_as(imp).gather(-1, chosen), chosen, none).sort(dim=-1).values
    chosen = F.pad(chosen, (0, num_selected_blocks - chosen.shape[-1]), value=none)
    return torch.where(chosen == none, -1, chosen).int()


@torch.no_grad()
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
    """`importance` and `topn_blocks` in one, in chunks of queries. No gradient goes through top-n.

    Args:
        q, k_cmp, lse: As for `importance`.
        num_blocks: S, needed unless packed: number of blocks of l' slots that cover the keys.
        cu_seqlens: For packed sequences; block indices then count from each sequence's start.

    Returns:
        block_indices, int32 `[B, T, H, n]` (packed: `[T, H, n]`), ascending, padded with -1.
    """
    sizes = {
        "compress_block_size": compress_block_size,
        "compress_stride": compress_stride,
        "select_block_size": select_block_size,
    }
    forced = {"num_initial_blocks": num_initial_blocks, "num_local_blocks": num_local_blocks}
    if cu_seqlens is not None:
        cu_blocks = compressed_cu_seqlens(cu_seqlens, compress_block_size, compress_stride)
        return _per_sequence(
            lambda q, k_cmp, lse: select_blocks(
                q, k_cmp, lse, num_blocks=-(-q.shape[1] // select_block_size), num_selected_blocks=num_selected_blocks,
                scale=scale, **sizes, **forced,
            ),
            (q, cu_seqlens), (k_cmp, cu_blocks), (lse, cu_seqlens),
        )  # fmt: skip
    if num_blocks is None:
        raise ValueError("`num_blocks` is required for sequences that are not packed, got None.")

    def chunk(start, stop):
        offset = q_offset + start
        imp = importance(
            q[:, start:stop], k_cmp, lse[:, start:stop], num_blocks=num_blocks, scale=scale, leftpad=leftpad,
            q_offset=offset, **sizes,
        )  # fmt: skip
        return (
            topn_blocks(
                imp, select_block_size=select_block_size, num_selected_blocks=num_selected_blocks, leftpad=leftpad,
                q_offset=offset, **forced,
            ),
        )  # fmt: skip

    return _over_chunks(chunk, q, max(k_cmp.shape[1], num_blocks), ())[0]


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Native Sparse Attention (eq. 5): compression, selection and window, weighted by their gates.

    `o_t = g_cmp·Attn(q, K~cmp, V~cmp) + g_slc·Attn(q, K~slc, V~slc) + g_win·Attn(q, K~win, V~win)`

    Args:
        q: `[B, T, HQ, D]`, queries; the first sits in slot `q_offset`.
        k: `[B, TK, H, D]`, v: `[B, TK, H, DV]`, keys and values of the selection branch, from slot 0.
        k_cmp: `[B, C, H, D]`, v_cmp: `[B, C, H, DV]`, see `compress_mean` and `compress_mlp`.
        k_win: `[B, TW, H, D]`, v_win: `[B, TW, H, DV]`, see `window_attention`.
        g_cmp, g_slc, g_win: `[B, T, HQ]`, gates.
        compress_block_size, compress_stride, select_block_size, num_selected_blocks, num_initial_blocks,
        num_local_blocks, window_size: l, d, l', n and w of the paper, and the forced blocks.
        scale: Factor of the scores, default `D ** -0.5`.
        leftpad: int `[B]`, padding slots before each row's first real token.
        q_offset: int, or an int tensor `[]` or `[B]`.
        cu_seqlens: int `[N + 1]`; all tensors are then packed, without the batch dimension.
        return_weights: See `selected_attention`.
        window_ring: Whether k_win and v_win are ring buffers: the key of slot s lies at index s % TW; TW >= w + T - 1,
            or all slots fit.

    Returns:
        o `[B, T, HQ, DV]` in the dtype of `q`, block_indices int32 `[B, T, H, n]`, and None or the probabilities of the
        selection branch `[B, HQ, T, TK]`.

    Raises:
        ValueError: Sizes or shapes that do not fit together.
    """
    if window_ring:
        k_win, v_win = (unroll(x, q_offset + q.shape[1]) for x in (k_win, v_win))
    where = {"scale": scale, "leftpad": leftpad, "q_offset": q_offset, "cu_seqlens": cu_seqlens}
    compression = {"compress_block_size": compress_block_size, "compress_stride": compress_stride}
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, **compression, **where)
    block_indices = select_blocks(
        q,
        k_cmp,
        lse,
        num_blocks=-(-k.shape[1] // select_block_size) if cu_seqlens is None else None,
        select_block_size=select_block_size,
        num_selected_blocks=num_selected_blocks,
        num_initial_blocks=num_initial_blocks,
        num_local_blocks=num_local_blocks,
        **compression,
        **where,
    )
    o_slc, _, *weights = selected_attention(
        q, k, v, block_indices, select_block_size=select_block_size, return_weights=return_weights, **where
    )
    o_win, _ = window_attention(q, k_win, v_win, window_size=window_size, **where)
    o = gated_sum(o_cmp, o_slc, o_win, g_cmp, g_slc, g_win)
    return o, block_indices, weights[0] if weights else None


def unroll(ring, stop) -> torch.Tensor:
    """A ring buffer `[B, TW, H, D]`, where slot s lies at index s % TW, in the order of the slots up to `stop`."""
    size = ring.shape[1]
    index = _positions(ring, 0, size, None, stop - size) % max(1, size)
    return ring[torch.arange(ring.shape[0], device=ring.device)[:, None], index]


# ---------------------------------------------------------------------------------------------------------------------
# Rotary position embedding
# ---------------------------------------------------------------------------------------------------------------------


def rotate(x, cos, sin) -> torch.Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34), with columns i and i + D / 2 as pairs.

    `x * cos + (-x[D/2:], x[:D/2]) * sin`

    Args:
        x: `[B, T, H, D]`, packed `[T, H, D]`.
        cos, sin: `[B or 1, T, D]`, packed `[T, D]`.

    Returns:
        Tensor of the shape of `x`, in the dtype that x, cos and sin are promoted to.
    """
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding with a static cache
# ---------------------------------------------------------------------------------------------------------------------


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
    """Put a decoding step's tokens into a static cache, and φ (eq. 7) of the blocks that they complete.

    φ by `compress_type`: "mean", the mean of the rotated keys; "mlp", `compress_mlp` of the keys before RoPE, rotated
    to the block's mean position; "residual_mlp", the sum of both; "pool", with x the `compress_pool` of the rotated
    keys, `x + rotate(linear · unrotate(x))` at the block's mean position. Values have no RoPE.

    Args:
        q: `[B, T, HQ, D]` before RoPE.
        new: The new tokens before RoPE, `k` `[B, T, H, D]` and `v` `[B, T, H, DV]` of the selected branch and, unless
            all branches share them, `k_cmp`, `v_cmp`, `k_win` and `v_win`.
        cache: Written in place. `keys`, `values` `[B, H, N, …]`, slot s at index s; `k_cmp`, `v_cmp`
            `[B, H, C + 1, …]`, the last one for incomplete blocks; ring buffers of at least l - 1 + T slots, or N, slot
            s at index s % size: `v_tail`, `k_tail` before RoPE (not for "mean") and `k_tail_rot` after RoPE (not for
            "mlp") hold what φ reads, `k_win` and `v_win` the window unless it is shared; `length`, int64 `[]`, the
            slots that are taken.
        phi_k, phi_v: Parameters of φ, as `compress_mlp` takes them (none for "mean") or `compress_pool` and then
            `linear` `[D, D]`.
        slots: int64 `[T]`, the new tokens' slots, consecutive; no memory of the cache.
        embeddings: cos and sin of the new tokens, `[B or 1, T, D]`, or None.
        block_embeddings: cos and sin at the mean positions of the first `cdiv(T, d)` blocks that were not complete
            before, `[B or 1, NC, D]`, or None.

    Returns:
        Rotated queries `[B, T, HQ, D]`.
    """
    k, v = _rotate(new["k"], embeddings), new["v"]
    k_phi, v_phi = new.get("k_cmp", new["k"]), new.get("v_cmp", v)
    written = {"keys": k, "values": v, "v_tail": v_phi}
    if "k_tail" in cache:
        written["k_tail"] = k_phi
    if "k_tail_rot" in cache:
        written["k_tail_rot"] = _rotate(k_phi, embeddings)
    if "k_win" in cache:
        written |= {"k_win": _rotate(new["k_win"], embeddings), "v_win": new["v_win"]}
    for name, x in written.items():
        at = slots if name in ("keys", "values") else slots % cache[name].shape[2]
        cache[name].index_copy_(2, at, x.transpose(1, 2))
    cache["length"].copy_(slots[-1] + 1)

    B, T = q.shape[:2]
    start = slots[0] if leftpad is None else slots[0] - leftpad
    before, complete = (
        torch.div(tokens - compress_block_size + compress_stride, compress_stride, rounding_mode="floor")
        for tokens in (start, start + T)
    )
    before, complete = (count.clamp(min=0).reshape(-1, 1) for count in (before, complete))  # [B or 1, 1]
    block = before + torch.arange(-(-T // compress_stride), device=q.device)  # [B or 1, NC]
    first = before[:, 0] * compress_stride - start + compress_block_size - 1
    recent = slots[0] + torch.arange(1 - compress_block_size, T, device=q.device)
    tails = {
        name: cache[name].index_select(2, recent % cache[name].shape[2]).transpose(1, 2)
        for name in ("k_tail", "k_tail_rot", "v_tail") if name in cache
    }  # fmt: skip
    where = {"compress_block_size": compress_block_size, "compress_stride": compress_stride}
    where |= {"first_slot": first, "num_blocks": block.shape[1]}
    k_cmp = _compress(compress_type, tails.get("k_tail"), tails.get("k_tail_rot"), phi_k, block_embeddings, where)
    v_cmp = _compress(compress_type, tails["v_tail"], tails["v_tail"], phi_v, None, where)
    rows, heads = (torch.arange(n, device=q.device) for n in (B, v.shape[2]))
    for name, x in (("k_cmp", k_cmp), ("v_cmp", v_cmp)):
        index = torch.where(block < complete, block, cache[name].shape[2] - 1)[:, None]  # [B or 1, 1, NC]
        cache[name].index_put_((rows[:, None, None], heads[:, None], index), x.transpose(1, 2))
    return _rotate(q, embeddings)


def _compress(compress_type, x, x_rotated, parameters, embeddings, where):
    if compress_type == "mean":
        return compress_mean(x_rotated, **where)
    if compress_type == "pool":
        out = compress_pool(x, x_rotated, *parameters[:4], **where)
        change = out
        if embeddings is not None:
            cos, sin = embeddings
            change = (_rotate(out, (cos, -sin)) / (cos.square() + sin.square()).unsqueeze(-2)).to(out.dtype)
        return out + _rotate(F.linear(change, parameters[4]), embeddings).to(out.dtype)
    out = _rotate(compress_mlp(x, *parameters, **where), embeddings)
    return out if compress_type == "mlp" else compress_mean(x_rotated, **where) + out


def _rotate(x, embeddings):
    return x if embeddings is None else rotate(x, *embeddings)


# ---------------------------------------------------------------------------------------------------------------------
# Masks: which keys a query sees
# ---------------------------------------------------------------------------------------------------------------------


def _positions(x, start, stop, leftpad, q_offset):
    """Positions of the queries `start … stop - 1`: int64 `[B or 1, stop - start]`."""
    first = q_offset.reshape(-1, 1) if isinstance(q_offset, torch.Tensor) else q_offset
    slots = torch.arange(start, stop, device=x.device)[None] + first
    return slots if leftpad is None else slots - leftpad[:, None].long()


def _complete_blocks(q, blocks, start, stop, compress_block_size, compress_stride, leftpad, q_offset):
    """`[B or 1, 1, 1, T, C]`: compression block i ends at or before the query."""
    last = compress_stride * torch.arange(blocks, device=q.device) + compress_block_size - 1
    return (last <= _positions(q, start, stop, leftpad, q_offset)[..., None])[:, None, None]


def _chosen_tokens(q, keys, start, stop, block_indices, select_block_size, leftpad, q_offset):
    """`[B, H, 1, T, TK]`: the token is in a chosen block and not in the future."""
    position = _positions(q, start, stop, leftpad, q_offset)[..., None]  # [B or 1, T, 1]
    key_position = torch.arange(keys, device=q.device)[None]
    if leftpad is not None:
        key_position = key_position - leftpad[:, None].long()
    key_block = torch.div(key_position, select_block_size, rounding_mode="floor")  # [B or 1, TK]
    causal = (key_position[:, None] <= position) & (key_position[:, None] >= 0)  # [B or 1, T, TK]

    indices = block_indices[:, start:stop].long().transpose(1, 2)  # [B, H, T, n]
    blocks = -(-keys // select_block_size)
    none = blocks  # one column more, for -1 and for blocks that hold no key of this chunk
    indices = torch.where((indices < 0) | (indices > blocks), none, indices)
    chosen = torch.zeros(*indices.shape[:3], blocks + 1, dtype=torch.bool, device=q.device)
    chosen = chosen.scatter(-1, indices, True)
    chosen[..., none] = False
    key_block = torch.where(key_block < 0, none, key_block)
    if leftpad is None:
        chosen = chosen[..., key_block[0]]
    else:
        chosen = chosen.gather(-1, key_block[:, None, None].expand(-1, *chosen.shape[1:3], -1))
    return (chosen & causal[:, None])[:, :, None]


def _window_keys(q, k, start, stop, window_size):
    """Range of window keys that the queries `start … stop - 1` can see; key and query arrays end together."""
    shift = k.shape[1] - q.shape[1]
    return max(0, start + shift - window_size + 1), stop + shift


def _window_tokens(q, k, first, last, start, stop, window_size, leftpad, q_offset):
    """`[B or 1, 1, 1, T, last - first]`: the token is one of the query's last w."""
    position = _positions(q, start, stop, leftpad, q_offset)[..., None]
    shift = q_offset + q.shape[1] - k.shape[1]
    key_position = _positions(k, first, last, leftpad, shift)[:, None]
    mask = (key_position <= position) & (key_position > position - window_size) & (key_position >= 0)
    return mask[:, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Softmax attention
# ---------------------------------------------------------------------------------------------------------------------


def _compute_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scores(q, k, scale):
    """Scaled scores `[B, H, G, T, TK]` in the compute dtype."""
    dtype, scale = _compute_dtype(q), q.shape[-1] ** -0.5 if scale is None else scale
    q = q.to(dtype).unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [B, H, G, T, D]
    return (q * scale) @ k.to(dtype).permute(0, 2, 3, 1)[:, :, None]


def _softmax(q, k, mask, scale):
    """Probabilities `[B, H, G, T, TK]`, lse and "has no key" `[B, H, G, T]`; rows without a key: any finite p, -inf."""
    scores = _scores(q, k, scale)
    empty = (~mask.any(dim=-1)).expand(scores.shape[:-1])
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf")), empty
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # finite: -inf alone in a row has no gradient
    return scores.softmax(dim=-1), scores.logsumexp(dim=-1).masked_fill(empty, float("-inf")), empty


def _attend(q, k, v, mask, scale):
    """Masked attention: o `[B, T, HQ, DV]` and lse `[B, T, HQ]`."""
    p, lse, empty = _softmax(q, k, mask, scale)
    o = _weighted_sum(p, v, q.dtype).masked_fill(_by_token(empty)[..., None], 0.0)
    return o, _by_token(lse)


def _weighted_sum(p, v, dtype):
    """`[B, H, G, T, TK]` times `[B, TK, H, DV]`: `[B, T, HQ, DV]`, summed in the compute dtype."""
    compute = _compute_dtype(v)
    o = p.to(compute) @ v.to(compute).permute(0, 2, 1, 3)[:, :, None]
    return _by_token(o).to(dtype)


def _by_token(x):
    """`[B, H, G, T, ...]` to `[B, T, HQ, ...]`."""
    return x.movedim(3, 1).flatten(2, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Chunks and packed sequences
# ---------------------------------------------------------------------------------------------------------------------


def _over_chunks(function, q, keys, differentiable):
    """Apply `function(start, stop)` to chunks of queries and join its outputs along dim 1."""
    B, T, HQ = q.shape[:3]
    size = min(_MAX_CHUNK, max(_MIN_CHUNK, _MAX_SCORES // max(1, B * HQ * keys)))
    bounds = [(start, min(T, start + size)) for start in range(0, max(T, 1), size)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in differentiable):
        parts = [checkpoint(function, *pair, use_reentrant=False, preserve_rng_state=False) for pair in bounds]
    else:
        parts = [function(*pair) for pair in bounds]
    return tuple(torch.cat(part, dim=1) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))


def _bounds(cu_seqlens):
    return list(itertools.pairwise(cu_seqlens.tolist()))


def _per_sequence(function, *packed):
    """Apply `function` to each sequence of packed tensors, given as (tensor, cu_seqlens), and pack the outputs."""
    tensors, bounds = [x for x, _ in packed], [_bounds(cu) for _, cu in packed]
    parts = [
        function(*(x[None, start:stop] for x, (start, stop) in zip(tensors, limits, strict=True)))
        for limits in zip(*bounds, strict=True)
    ]
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(part, dim=1)[0] for part in zip(*parts, strict=True))
    return torch.cat(parts, dim=1)[0]
