# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: the tokens of a sequence spread over processes, each of which holds the whole model.

A batch is laid side by side as one row of packed sequences and cut into 2N equal chunks; of N processes the one of rank
r holds chunks r and 2N - 1 - r, an early and a late one, since late queries see more compressed blocks. In a sparse
layer a process computes queries, keys and values of its own tokens and φ of the blocks that start in its chunks. It
gathers the selection's keys and values and the compressed ones of all processes; of the window's keys and values, and
of what φ reads, only the edges of the chunks travel. Gradients take the same ways back and are summed.

Shapes: N processes, c tokens in a chunk, 2c tokens of a process, T = 2Nc tokens of the row; H, D as elsewhere.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from nsa_kernels import num_compressed_blocks

from .layout_nsa import NSALayout, packed_sequences

__all__ = ["ContextShard", "ParallelLayout", "build_parallel_layout", "shard_inputs"]

# Queries of a sliding layer that are computed at once.
_SLIDING_QUERIES = 1024
_IGNORED = -100


@dataclass
class ContextShard:
    """Which tokens of a row this process holds; the model takes it as `context_shard`.

    Attributes:
        group: Processes that hold the row together, `N` of them.
        rank: This process among them.
        size: N.
        chunk_length: c.
        cu_seqlens: Where the sequences of the row start, and T. Padding of the row is a sequence of its own.
        last_position: The largest position id of the row; dynamic RoPE types adapt to it.
        heads_at_once: Key/value heads of a sparse layer that are gathered at a time, or None for all.
    """

    group: "dist.ProcessGroup"
    rank: int
    size: int
    chunk_length: int
    cu_seqlens: list[int]
    last_position: torch.Tensor
    heads_at_once: int | None = None

    @property
    def chunks(self) -> tuple[int, int]:
        """The chunks of this process."""
        return self.rank, 2 * self.size - 1 - self.rank

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """This process's tokens `[1, 2c]` of a row `[1, T]`."""
        return torch.cat([x[:, i * self.chunk_length : (i + 1) * self.chunk_length] for i in self.chunks], dim=1)


def shard_inputs(inputs: dict, mesh, config, heads_at_once: int | None = None) -> dict:
    """Keep the tokens of a batch that this process computes: `loss = model(**shard_inputs(batch, mesh, config)).loss`.

    Every process of the mesh passes the same batch. The mean of their losses, and of their gradients, is the loss and
    the gradient of the batch in one process: what DDP and FSDP over these processes compute.

    Args:
        inputs: `input_ids` `[B, T]` and, as for the model, `labels`, `position_ids` (which may restart: packed
            sequences), `cu_seq_lens_q`. `attention_mask` may hold only ones.
        mesh: One-dimensional `DeviceMesh`, or a process group.
        config: The model's `NSAConfig`.
        heads_at_once: Gather so many key/value heads at a time in sparse layers: less memory where keys and values of
            the whole row are large, but their attention is computed once more in the backward pass.

    Returns:
        `input_ids`, `position_ids` `[1, 2c]` and `context_shard`; with labels also `labels`, `shift_labels` (labels of
        the next token: it may lie in another process) and `num_items_in_batch`, the labels of the batch per process.

    Raises:
        ValueError: An input that cannot be sharded.
    """
    known = {"input_ids", "labels", "position_ids", "attention_mask"}
    known |= {f"{name}_{side}" for name in ("cu_seq_lens", "max_length") for side in "qk"}
    if unknown := sorted(inputs.keys() - known):
        raise ValueError(f"Context parallelism takes the inputs {', '.join(sorted(known))}, got {', '.join(unknown)}.")
    mask = inputs.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or not mask.bool().all()):
        raise ValueError(
            "`attention_mask` must be 2-D and hold only ones with context parallelism, got padding or another mask. "
            "Pack the sequences instead: one row, `position_ids` that restart, no mask."
        )
    if heads_at_once is not None and heads_at_once < 1:
        raise ValueError(f"`heads_at_once` must be at least 1 or None, got {heads_at_once}.")
    group = mesh if isinstance(mesh, dist.ProcessGroup) else mesh.get_group()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    ids, positions, labels = (inputs.get(name) for name in ("input_ids", "position_ids", "labels"))
    B, T = ids.shape

    cu_seqlens = packed_sequences(B, T, None, positions, None, inputs.get("cu_seq_lens_q"))
    # without packing, the rows of the batch are the sequences
    bounds = sorted(set(range(0, B * T + 1, T) if cu_seqlens is None else cu_seqlens.tolist()))
    if positions is None:
        starts = torch.tensor(bounds[:-1], device=ids.device).repeat_interleave(
            torch.tensor(bounds, device=ids.device).diff(), output_size=B * T
        )
        positions = (torch.arange(B * T, device=ids.device) - starts).view(B, T)
    # edges of a chunk are all in the next one
    chunk_length = max(-(-B * T // (2 * size)), config.window_size - 1, config.compress_block_size - 1)
    spare = 2 * size * chunk_length - B * T
    if spare:
        bounds.append(B * T + spare)

    shard = ContextShard(group, rank, size, chunk_length, bounds, positions.max(), heads_at_once)

    def take(x, fill):
        return shard.take(F.pad(x.expand(B, -1).reshape(1, -1), (0, spare), value=fill))

    local = {"input_ids": take(ids, 0), "position_ids": take(positions, 0), "context_shard": shard}
    if labels is not None:
        shifted = F.pad(labels, (0, 1), value=_IGNORED)[:, 1:]
        local["labels"], local["shift_labels"] = take(labels, _IGNORED), take(shifted, _IGNORED)
        local["num_items_in_batch"] = (shifted != _IGNORED).sum() / size
    return local


# ---------------------------------------------------------------------------------------------------------------------
# Layout
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Segment:
    """Queries that one call serves: of one sequence from some position on, or of several sequences from their starts.

    Attributes:
        slot: 0 for the process's early chunk, 1 for the late one.
        queries: Their range in the chunk.
        keys: The range in the row of the keys that they may see.
        blocks: The same of compressed keys.
        offset: Position of the first query in its sequence.
        bounds: Where the sequences start, from the first query on, and where the last ends.
        cu_seqlens: The same as an int32 tensor, if there are several, else None.
    """

    slot: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    blocks: tuple[int, int]
    offset: int
    bounds: list[int]
    cu_seqlens: torch.Tensor | None


@dataclass
class ChunkBlocks:
    """The compression blocks that start in a chunk; slots count from its start and run on into the next chunk.

    Attributes:
        bounds: Ranges of slots, each of which is cut into blocks; those that are too short have none.
        first_slot: Slot of the first block's first token.
        count: Blocks.
        whole: All blocks lie d apart.
    """

    bounds: list[int]
    first_slot: int
    count: int
    whole: bool


@dataclass
class ParallelLayout:
    """What a forward pass does with a `ContextShard`.

    Attributes:
        shard: See `ContextShard`.
        segments: The queries of this process, in order.
        chunk_blocks: Blocks of this process's chunks.
        block_counts: Blocks that start in each of the 2N chunks.
        window_edge: Tokens that the window reads before a chunk, w - 1.
        block_edge: Tokens that blocks read behind a chunk, l - 1.
        cu_seqlens: Bounds of both `chunk_blocks` as int32 tensors.
        block_embeddings: cos and sin of the blocks of both chunks, `[count, D]` each.
    """

    shard: ContextShard
    segments: list[Segment]
    chunk_blocks: list[ChunkBlocks]
    block_counts: list[int]
    window_edge: int
    block_edge: int
    cu_seqlens: list[torch.Tensor]
    block_embeddings: list[tuple[torch.Tensor, torch.Tensor]]

    def gather_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values of the row, `[T, H, D]`, from those of this process, `[1, 2c, H, D]`."""
        x = _AllGather.apply(x[0].contiguous(), self.shard.group).unflatten(0, (self.shard.size, 2, -1))
        return torch.cat((x[:, 0].flatten(0, 1), x[:, 1].flip(0).flatten(0, 1)))

    def gather_blocks(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Compressed keys and values of the row, `[C, H, D]`, from those of this process, `[count, H, D]`."""
        N, counts = self.shard.size, self.block_counts
        rows = max(1, *(counts[i] + counts[2 * N - 1 - i] for i in range(N)))
        flat = torch.cat([x.flatten(1) for x in tensors], dim=1)
        flat = _AllGather.apply(F.pad(flat, (0, 0, 0, rows - flat.shape[0])), self.shard.group).unflatten(0, (N, rows))
        early = [flat[i, : counts[i]] for i in range(N)]
        late = [flat[i, counts[i] : counts[i] + counts[2 * N - 1 - i]] for i in reversed(range(N))]
        parts = torch.cat(early + late).split([x.shape[1] * x.shape[2] for x in tensors], dim=1)
        return [part.unflatten(1, x.shape[1:]).contiguous().to(x.dtype) for part, x in zip(parts, tensors)]

    def exchange_edges(self, before: Iterable[torch.Tensor], after: Iterable[torch.Tensor]) -> tuple[list, list]:
        """Extend both chunks by tokens that other processes hold.

        Args:
            before: Tensors `[1, 2c, H, D]` that need the last w - 1 tokens of the chunk before.
            after: The same with the first l - 1 tokens of the chunk behind.

        Returns:
            For every tensor the two extended chunks, `[c + w - 1, H, D]` and `[c + l - 1, H, D]`. What lies before the
            row or behind it is arbitrary.
        """
        before, after, c = list(before), list(after), self.shard.chunk_length
        edges = [x[0].unflatten(0, (2, c))[:, c - self.window_edge :] for x in before]
        edges += [x[0].unflatten(0, (2, c))[:, : self.block_edge] for x in after]
        flat = torch.cat([x.flatten(1) for x in edges], dim=1)
        flat = _AllGather.apply(flat, self.shard.group)  # [2N, …]: both chunks of rank 0, both of rank 1, …
        flat = flat.split([x[0].numel() for x in edges], dim=1)
        N = self.shard.size

        def edge(number, chunk):
            chunk %= 2 * N
            row = 2 * chunk if chunk < N else 2 * (2 * N - 1 - chunk) + 1
            return flat[number][row].view(edges[number].shape[1:]).to(edges[number].dtype)

        def extend(number, x, step):
            parts = []
            for i, own in zip(self.shard.chunks, x[0].split(c)):
                other = edge(number, i + step)
                parts.append(torch.cat((other, own) if step < 0 else (own, other)))
            return parts

        return (
            [extend(i, x, -1) for i, x in enumerate(before)],
            [extend(len(before) + i, x, 1) for i, x in enumerate(after)],
        )

    def dense_attention(self, query, key, value, *, scaling, dropout, window) -> torch.Tensor:
        """Full or sliding attention of this process's tokens through torch's SDPA.

        Args:
            query: `[1, HQ, 2c, D]`; key: `[1, H, 2c, D]`; value: `[1, H, 2c, DV]`.
            window: Tokens that a query sees, itself included, or None.

        Returns:
            `[1, 2c, HQ, DV]`.
        """
        groups, device = query.shape[1] // key.shape[1], query.device.type
        key, value = (self.gather_tokens(x.transpose(1, 2)) for x in (key, value))
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        outputs = []
        for segment in self.segments:
            for start, stop in itertools.pairwise(segment.bounds):
                first = segment.slot * self.shard.chunk_length + segment.queries[0] + start
                keys = slice(segment.keys[0] + start, segment.keys[0] + segment.offset + stop)
                k, v = (x[None, keys].transpose(1, 2).repeat_interleave(groups, dim=1).to(dtype) for x in (key, value))
                q = query[:, :, first : first + stop - start].to(dtype)
                outputs.append(_causal_attention(q, k, v, scaling, dropout, window))
        return torch.cat(outputs, dim=2).transpose(1, 2)


def build_parallel_layout(config, inputs_embeds, position_ids, shard: ContextShard, rotary_emb: Callable):
    """Work out the layout of a forward pass over this process's tokens.

    Args:
        inputs_embeds: `[1, 2c, hidden_size]`.
        position_ids: int `[1, 2c]`.
        shard: See `ContextShard`.
        rotary_emb: Maps (x, positions) to (cos, sin).

    Returns:
        The `NSALayout`, position_ids, and the position embeddings (cos, sin) of the tokens.

    Raises:
        ValueError: Inputs that are not those of the shard.
    """
    c, device = shard.chunk_length, inputs_embeds.device
    if inputs_embeds.shape[:2] != (1, 2 * c) or position_ids is None or position_ids.shape != (1, 2 * c):
        given = None if position_ids is None else list(position_ids.shape)
        raise ValueError(
            f"`context_shard` belongs to input_ids and position_ids [1, {2 * c}], got {list(inputs_embeds.shape[:2])} "
            f"and {given}. Pass what `shard_inputs` returns."
        )
    l, d = sizes = config.compress_block_size, config.compress_stride  # noqa: E741
    edges = {"window_edge": config.window_size - 1, "block_edge": l - 1}
    if max(edges.values()) > c:
        raise ValueError(
            f"`context_shard` has chunks of {c} tokens, shorter than the window or the compression blocks of this "
            "model. Pass the model's own configuration to `shard_inputs`."
        )
    blocks = [_chunk_blocks(shard, i, *sizes) for i in range(2 * shard.size)]
    own = [blocks[i] for i in shard.chunks]
    layout = ParallelLayout(
        shard, list(_segments(shard, *sizes, device)), own, [x.count for x in blocks], **edges,
        cu_seqlens=[torch.tensor(x.bounds, dtype=torch.int32, device=device) for x in own], block_embeddings=[],
    )  # fmt: skip
    first = torch.cat([_block_starts(x, *sizes) + slot * c for slot, x in enumerate(own)]).to(device)
    centres = position_ids[:, first].float() + (l - 1) / 2
    # one call, with the row's last position: dynamic RoPE types adapt to the positions of each call
    positions = (position_ids.float(), centres, shard.last_position.to(device).float().view(1, 1))
    cos, sin = (x[:, :-1] for x in rotary_emb(inputs_embeds, torch.cat(positions, dim=1)))
    counts = [x.count for x in own]
    layout.block_embeddings = list(zip(*(x[0, 2 * c :].split(counts) for x in (cos, sin))))
    return NSALayout(0, 2 * c, l, d, parallel=layout), position_ids, (cos[:, : 2 * c], sin[:, : 2 * c])


def _overlapping(shard, chunk):
    """The row's bounds of a chunk, and the indices of the first sequence in it and of the one behind the last."""
    start, stop = chunk * shard.chunk_length, (chunk + 1) * shard.chunk_length
    first = bisect.bisect_right(shard.cu_seqlens, start) - 1
    return start, stop, first, bisect.bisect_left(shard.cu_seqlens, stop)


def _segments(shard, block_size, stride, device):
    """The queries of both chunks: first the rest of a sequence that began before, then what starts in the chunk."""
    cu = shard.cu_seqlens
    cu_blocks = [0]
    for begin, end in itertools.pairwise(cu):
        cu_blocks.append(cu_blocks[-1] + num_compressed_blocks(end - begin, block_size, stride))
    for slot, chunk in enumerate(shard.chunks):
        start, stop, first, last = _overlapping(shard, chunk)
        begun = first + 1 if cu[first] < start else first
        for sequences in filter(None, (range(first, begun), range(begun, last))):
            begin, end = max(start, cu[sequences[0]]), min(stop, cu[sequences[-1] + 1])
            bounds = [max(0, cu[i] - begin) for i in sequences] + [end - begin]
            # blocks of the last sequence are cut at the chunk's end like its keys: they are in its queries' future
            blocks = cu_blocks[sequences[-1]] + num_compressed_blocks(end - cu[sequences[-1]], block_size, stride)
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device) if len(sequences) > 1 else None
            yield Segment(
                slot, (begin - start, end - start), (cu[sequences[0]], end), (cu_blocks[sequences[0]], blocks),
                begin - cu[sequences[0]], bounds, cu_seqlens,
            )  # fmt: skip


def _chunk_blocks(shard, chunk, block_size, stride):
    """See `ChunkBlocks`."""
    cu = shard.cu_seqlens
    start, stop, first, last = _overlapping(shard, chunk)
    # a block that starts in the chunk ends at most l - 1 tokens behind it
    ends = [min(end, stop + block_size - 1) - start for end in cu[first + 1 : last + 1]]
    first_slot = min((cu[first] - start) % stride, ends[0])
    bounds = [0, first_slot, *ends]
    counts = [num_compressed_blocks(end - begin, block_size, stride) for begin, end in itertools.pairwise(bounds)]
    return ChunkBlocks(bounds, first_slot, sum(counts), len(ends) == 1)


def _block_starts(blocks, block_size, stride):
    """Slots of the first tokens of a chunk's blocks, int64 `[count]`."""
    starts = [
        begin + stride * torch.arange(num_compressed_blocks(end - begin, block_size, stride))
        for begin, end in itertools.pairwise(blocks.bounds)
    ]
    return torch.cat(starts)


# ---------------------------------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------------------------------


class _AllGather(torch.autograd.Function):
    """Tensors of all processes in a row along the first dim; each process gets the sum of its part's gradients."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x, size = x.contiguous(), dist.get_world_size(group)
        gathered = x.new_empty(size * x.shape[0], *x.shape[1:])
        _collective("all_gather_single", "all_gather_into_tensor")(gathered, x, group=group)
        return gathered

    @staticmethod
    def backward(ctx, dx):
        dx, size = dx.contiguous(), dist.get_world_size(ctx.group)
        own = dx.new_empty(dx.shape[0] // size, *dx.shape[1:])
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(own, dx, group=ctx.group)
        return own, None


def _collective(name, name_before):
    """torch 2.13 has renamed them."""
    return getattr(dist, name, None) or getattr(dist, name_before)


def _causal_attention(q, k, v, scaling, dropout, window):
    """Attention of the last queries of a sequence, `[1, HQ, T, D]`, to its keys `[1, HQ, TK, D]`."""
    T, TK = q.shape[2], k.shape[2]
    settings = {"dropout_p": dropout, "scale": scaling}
    if window is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, TK), **settings)
    parts = []
    for start in range(0, T, _SLIDING_QUERIES):
        stop = min(T, start + _SLIDING_QUERIES)
        first, last = max(0, TK - T + start - window + 1), TK - T + stop
        query = torch.arange(TK - T + start, last, device=q.device)[:, None]
        key = torch.arange(first, last, device=q.device)
        mask = (key <= query) & (key > query - window)
        keys = k[:, :, first:last], v[:, :, first:last]
        parts.append(F.scaled_dot_product_attention(q[:, :, start:stop], *keys, attn_mask=mask, **settings))
    return torch.cat(parts, dim=2)
