# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What dense attention teaches a sparse model: which blocks matter, what lies outside the window, and its logits.

The inputs of the sparse layers are kept, detached, during a forward pass and the losses computed behind it, so that
gradient checkpointing can neither drop nor repeat them. Their gradients reach φ and, where it has its own, the
projections and the norm that φ reads.

Shapes: T tokens of a row of packed documents, Q chosen queries of one of them, HQ query heads, H key/value heads,
G = HQ // H, S selectable blocks.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nsa_kernels import compressed_cu_seqlens, fold_importance, num_compressed_blocks

__all__ = [
    "SELECTOR_TARGETS",
    "LayerInput",
    "Queries",
    "choose_queries",
    "dense_forward",
    "dense_statistics",
    "hidden_state_loss",
    "layer_inputs",
    "logit_losses",
    "selector_losses",
    "selector_modules",
    "sparse_decoder_layers",
    "sparse_layers",
]

SELECTOR_TARGETS = ("output", "mass")
# Probabilities held at once, in elements.
_MAX_SCORES = 2**26
_LOGIT_ROWS = 2048


def _unchanged(function: Callable) -> Callable:
    return function


def sparse_layers(model) -> list[torch.nn.Module]:
    """The attention modules of the sparse layers, in order."""
    # by attribute: a checkpoint with its own code brings its own classes
    return [module for module in model.modules() if hasattr(module, "compress_k")]


def sparse_decoder_layers(model) -> list[torch.nn.Module]:
    """The decoder layers around `sparse_layers`, in order."""
    return [module for module in model.modules() if hasattr(getattr(module, "self_attn", None), "compress_k")]


# ---------------------------------------------------------------------------------------------------------------------
# Inside the forward pass
# ---------------------------------------------------------------------------------------------------------------------


class LayerInput(NamedTuple):
    """What a sparse layer was called with, shapes `[B, T, hidden_size]`, cos and sin `[B or 1, T, D]`.

    `hidden_states` went into its attention and are detached, `residual` into the layer and is not. With `norm`, the
    layer's first one, the selector's losses take what went into the attention from `residual`, and reach below it.
    """

    attention: torch.nn.Module
    hidden_states: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    layout: object
    residual: torch.Tensor | None = None
    norm: torch.nn.Module | None = None


@contextlib.contextmanager
def layer_inputs(model, attached: bool = False) -> Iterator[list[LayerInput]]:
    """Collect the inputs of the sparse layers of every forward pass inside the context.

    Args:
        attached: let the selector's losses train what the inputs come from, and the queries.
    """
    inputs: list[LayerInput] = []

    def hook(layer, args, kwargs):
        with torch.no_grad():
            hidden_states = layer.input_layernorm(args[0])
        where = (kwargs["position_embeddings"], kwargs["layout"])
        norm = layer.input_layernorm if attached else None
        inputs.append(LayerInput(layer.self_attn, hidden_states, *where, residual=args[0], norm=norm))

    # on the layer, not on its attention: a compiled layer does not call hooks inside
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in sparse_decoder_layers(model)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def dense_forward(model) -> Iterator[None]:
    """Let the selection of every sparse layer read all tokens and leave the other branches out.

    Exactly the dense model where the gates are as conversion sets them. For packed or single rows without padding.
    """
    layers = sparse_layers(model)
    for attention in layers:
        attention.forward = functools.partial(_dense_attention, attention)
    try:
        yield
    finally:
        for attention in layers:
            del attention.forward


def _dense_attention(attention, hidden_states, position_embeddings, layout=None, **kwargs):
    rotate = attention._rotation(position_embeddings)
    q = rotate(attention._heads(hidden_states, attention.q_proj, attention.q_norm))
    k = rotate(attention._heads(hidden_states, attention.k_proj, attention.k_norm))
    v = attention._heads(hidden_states, attention.v_proj)
    gates = attention.gate(hidden_states)
    if attention.gate_scale is not None:
        gates = attention.gate_scale.scale(gates, attention.gate_scale(hidden_states))
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    outputs = [
        F.scaled_dot_product_attention(
            q[:, :, start:stop],
            k[:, :, start:stop],
            v[:, :, start:stop],
            is_causal=True,
            scale=attention.scaling,
            enable_gqa=True,
        )
        for _, start, stop in _documents(layout, 1, hidden_states.shape[1])
    ]
    output = torch.cat(outputs, dim=2).transpose(1, 2) * gates[..., 1, None].to(v.dtype)
    return attention.o_proj(output.flatten(2)), None


def _documents(layout, rows: int, tokens: int) -> list[tuple[int, int, int]]:
    """Row, first slot and end of every document."""
    if layout.cu_seqlens is None:
        return [(row, 0, tokens) for row in range(rows)]
    return [(0, *bounds) for bounds in itertools.pairwise(layout.cu_seqlens.tolist())]


# ---------------------------------------------------------------------------------------------------------------------
# The selector
# ---------------------------------------------------------------------------------------------------------------------


class Queries(NamedTuple):
    """Chosen queries of one document: its row, slots, compressed blocks, and positions inside it int64 `[Q]`."""

    row: int
    slots: slice
    blocks: slice
    positions: torch.Tensor


def choose_queries(layer: LayerInput, first: int, count: int, documents: int | None = None) -> list[Queries]:
    """Draw `count` queries of a batch at random, or take all there are, from position `first` of a document on.

    With `documents`, from at most so many of the batch's, drawn by the number of such queries in them.
    """
    layout, (rows, tokens) = layer.layout, layer.hidden_states.shape[:2]
    bounds = _documents(layout, rows, tokens)
    numbers = torch.tensor([max(0, stop - start - first) for _, start, stop in bounds])
    drawn = numbers.nonzero().flatten()
    if documents is not None and documents < len(drawn):
        drawn = numbers.double().multinomial(documents).sort().values
    queries = [torch.arange(number) for number in numbers[drawn].tolist()]
    if count < sum(map(len, queries)):
        kept = torch.randperm(sum(map(len, queries)))[:count].sort().values
        ends = torch.tensor([0, *map(len, queries)]).cumsum(0).tolist()
        queries = [kept[(kept >= a) & (kept < b)] - a for a, b in itertools.pairwise(ends)]
    sizes = (layout.compress_block_size, layout.compress_stride)
    lengths = torch.tensor([0] + [stop - start for _, start, stop in bounds])
    ends = [0] * (len(bounds) + 1) if layout.cu_seqlens is None else compressed_cu_seqlens(lengths.cumsum(0), *sizes)
    chosen = []
    for document, positions in zip(drawn.tolist(), queries):
        row, start, stop = bounds[document]
        first_block = int(ends[document])
        blocks = slice(first_block, first_block + num_compressed_blocks(stop - start, *sizes))
        if len(positions):
            # not waiting for the device, which would then be idle in every layer until more work comes
            positions = (positions + first).to(layer.hidden_states.device, non_blocking=True)
            chosen.append(Queries(row, slice(start, stop), blocks, positions))
    return chosen


@torch.no_grad()
def dense_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *,
    select_block_size: int,
    window_size: int,
    scale: float,
    target: str = "output",
    outside: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What every block is worth to causal dense attention, and its output outside the window, in chunks of queries.

    Args:
        q: `[Q, HQ, D]`, queries at `positions`, int64 `[Q]` ascending, of one document.
        k: `[T, H, D]`, v: `[T, H, DV]`, of the whole document.
        select_block_size: l', tokens.
        window_size: w, tokens.
        scale: factor of the scores.
        target: "mass" is the sum of a block's probabilities; "output" the squared norm of what it adds to the output
            of a head, the sum of probabilities times values.
        outside: whether the output is wanted.

    Returns:
        fp32 worth `[Q, H, S]`, summed over the heads of a group, S blocks cover the document; and fp32 `[Q, HQ, DV]`,
        attention renormalised over the tokens before the window, or None.
    """
    tokens, heads = k.shape[:2]
    blocks = -(-tokens // select_block_size)
    q, k, v = scale * q.float().unflatten(1, (heads, -1)), k.float(), v.float()
    v_blocks = F.pad(v, (0, 0, 0, 0, 0, blocks * select_block_size - tokens)).unflatten(0, (blocks, -1))
    key = torch.arange(tokens, device=q.device)
    size = max(1, _MAX_SCORES // (q.shape[1] * q.shape[2] * tokens))
    worth, outputs = [], []
    for chunk, position in zip(q.split(size), positions.to(q.device)[:, None, None, None].split(size)):
        scores = torch.einsum("qhgd,khd->qhgk", chunk, k)
        p = scores.masked_fill(key > position, float("-inf")).softmax(dim=-1)
        by_block = F.pad(p, (0, blocks * select_block_size - tokens)).unflatten(-1, (blocks, -1))
        if target == "output":
            each = torch.einsum("qhgsk,skhd->qhgsd", by_block, v_blocks).square().sum(-1)
        else:
            each = by_block.sum(-1)
        worth.append(each.sum(2))
        if outside:
            far = p.masked_fill_(key > position - window_size, 0.0)
            far /= far.sum(-1, keepdim=True).clamp(min=torch.finfo(far.dtype).tiny)
            outputs.append(torch.einsum("qhgk,khd->qhgd", far, v).flatten(1, 2))
    return torch.cat(worth), torch.cat(outputs) if outside else None


def selector_modules(attention: torch.nn.Module) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    """What the two losses of `selector_losses` train: φ_K and φ_V, and with separate K/V what they read."""
    if attention.config.shared_kv:
        return [attention.compress_k], [attention.compress_v]
    keys = [attention.compress_k, attention.k_proj_cmp, attention.k_norm_cmp]
    return keys, [attention.compress_v, attention.v_proj_cmp]


def selector_losses(
    layer: LayerInput,
    queries: list[Queries],
    target: str = "output",
    values: bool = True,
    wrap: Callable[[Callable], Callable] = _unchanged,
) -> tuple[torch.Tensor, ...]:
    """How far φ_K is from the dense choice of blocks, and φ_V from what dense attention reads outside the window.

    The first is KL(dense ‖ importance), eq. 9-10, both normalised over the visible blocks that are not forced, in nats:
    a mean over queries and groups, each weighed, within its document, by the root of what those blocks are worth to it,
    so that those which read little but forced blocks count little. The second is the squared error of o_cmp over the
    squared norm of its target. Queries, and what other branches read, are detached; the compressed probabilities are,
    for the second.

    Args:
        layer: of `layer_inputs`.
        queries: of `choose_queries`; 0 and 0 where there are none.
        target: see `dense_statistics`.
        values: whether the second is wanted; 0 if not.
        wrap: what the functions that compute are called through, `torch.compile` for one.

    Returns:
        Two fp32 scalars with gradients for `compress_k` and for `compress_v`, and what they read (`selector_modules`).
    """
    attention, hidden_states, position_embeddings, layout, residual, norm = layer
    if not queries:
        return tuple(
            sum(parameter.sum() for module in modules for parameter in module.parameters()) * 0.0
            for modules in selector_modules(attention)
        )
    sums = torch.zeros(4, device=hidden_states.device)
    for row, slots, blocks, positions in queries:
        x = hidden_states[row : row + 1, slots] if norm is None else norm(residual[row : row + 1, slots])
        rotation = [_of_row(each, row)[:, slots] for each in position_embeddings]
        centres = [each.reshape(-1, *each.shape[-2:]) for each in layout.block_embeddings]
        centres = [_of_row(each, row)[:, blocks] for each in centres]
        taught = wrap(_dense_choice)(attention, x, rotation, positions, target, values)
        # recomputed in the backward pass: what one document holds is freed before the next
        part = checkpoint(
            wrap(_taught), attention, x, rotation, centres, positions, *taught,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        sums = sums + part
    divergence, count, error, norm = sums
    return divergence / count, error / norm.clamp(min=torch.finfo(norm.dtype).tiny)


def _of_row(x, row: int):
    return x if x.shape[0] == 1 else x[row : row + 1]


@torch.no_grad()
def _dense_choice(attention, hidden_states, position_embeddings, positions, target, outside):
    """Queries `[Q, HQ, D]` at `positions` of a document, and what `dense_statistics` says of them."""
    config = attention.config
    k = attention._heads(hidden_states, attention.k_proj, attention.k_norm)
    k = attention._rotation(position_embeddings)(k)[0]
    v = attention._heads(hidden_states, attention.v_proj)[0]
    q = attention._heads(hidden_states[:, positions], attention.q_proj, attention.q_norm)
    q = attention._rotation([x[:, positions] for x in position_embeddings])(q)[0]
    with torch.autocast(q.device.type, enabled=False):
        statistics = dense_statistics(
            q,
            k,
            v,
            positions,
            select_block_size=config.select_block_size,
            window_size=config.window_size,
            scale=attention.scaling,
            target=target,
            outside=outside,
        )
    return q, *statistics


def _taught(attention, hidden_states, position_embeddings, block_embeddings, positions, q, worth, outside):
    """Sums over the queries of a document: the divergence, their number times groups, the squared error and norm."""
    config = attention.config
    attached = hidden_states.requires_grad
    if attached:
        q = attention._heads(hidden_states[:, positions], attention.q_proj, attention.q_norm)
        q = attention._rotation([x[:, positions] for x in position_embeddings])(q)[0]
    with torch.set_grad_enabled(attached or not config.shared_kv):
        if config.shared_kv:
            k_cmp = attention._heads(hidden_states, attention.k_proj, attention.k_norm)
            v_cmp = attention._heads(hidden_states, attention.v_proj)
        else:
            k_cmp, v_cmp = attention._branch(hidden_states, "cmp")
        tails = attention._tails(k_cmp, attention._rotation(position_embeddings)(k_cmp), v_cmp)
    k_cmp, v_cmp = (x[0].float() for x in attention._compress(tails, 0, None, block_embeddings))
    sizes = {name: getattr(config, name) for name in ("compress_block_size", "compress_stride", "select_block_size")}
    with torch.autocast(q.device.type, enabled=False):
        position = positions[:, None, None]
        end = config.compress_stride * torch.arange(len(k_cmp), device=q.device) + config.compress_block_size - 1
        q = attention.scaling * q.float().unflatten(1, (k_cmp.shape[1], -1))
        scores = torch.einsum("qhgd,chd->qhgc", q, k_cmp)
        p = scores.masked_fill(end > position[..., None], float("-inf")).softmax(dim=-1)

        blocks = torch.arange(worth.shape[-1], device=q.device)
        free = blocks <= position // config.select_block_size - config.num_local_blocks
        free &= blocks >= config.num_initial_blocks
        worth = worth * free
        teacher = _normalised(worth)
        student = _normalised(fold_importance(p.sum(2), num_blocks=len(blocks), **sizes) * free)
        tiny = torch.finfo(student.dtype).tiny
        weight = worth.sum(-1).sqrt()
        weight = weight / weight.mean().clamp(min=tiny)
        divergence = (torch.xlogy(teacher, teacher) - teacher * student.clamp(min=tiny).log()).sum(-1)
        error = norm = torch.zeros((), device=q.device)
        if outside is not None:
            o_cmp = torch.einsum("qhgc,chd->qhgd", p.detach(), v_cmp).flatten(1, 2)
            error, norm = (o_cmp - outside).square().sum(), outside.square().sum()
    return torch.stack(((weight * divergence).sum(), torch.full_like(error, divergence.numel()), error, norm))


def _normalised(x):
    return x / x.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


# ---------------------------------------------------------------------------------------------------------------------
# Logits and hidden states
# ---------------------------------------------------------------------------------------------------------------------


def logit_losses(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    wrap: Callable[[Callable], Callable] = _unchanged,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher ‖ student) and loss of the next token, means over the tokens that have a label, in chunks of them.

    Args:
        logits, teacher_logits: `[B, T, vocab_size]`.
        labels: int64 `[B, T]`, -100 where none; token t is predicted at t - 1.
        wrap: see `selector_losses`.

    Returns:
        Two fp32 scalars, nats per token.
    """
    # whole rows of fp32, and slices: the gradient of rows picked by index is slow to put together
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    rows = max(1, _LOGIT_ROWS // len(labels))
    parts = [x.split(rows, dim=1) for x in (logits, teacher_logits, targets)]
    where = {"use_reentrant": False, "preserve_rng_state": False}
    sums = sum(checkpoint(wrap(_logit_sums), *part, **where) for part in zip(*parts))
    return tuple(sums / (targets != -100).sum().clamp(min=1))


def _logit_sums(student, teacher, targets):
    student, teacher = (x.float().log_softmax(-1) for x in (student, teacher))
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    missed = -student.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    kept = targets != -100
    return torch.stack([(each * kept).sum() for each in (divergence, missed)])


def hidden_state_loss(
    hidden_states: Sequence[torch.Tensor],
    teacher_states: Sequence[torch.Tensor],
    wrap: Callable[[Callable], Callable] = _unchanged,
) -> torch.Tensor:
    """Squared distance of hidden states from the teacher's over the squared norm of those.

    Args:
        hidden_states, teacher_states: one `[B, T, hidden_size]` per layer.
        wrap: see `selector_losses`.

    Returns:
        fp32 scalar, the mean over tokens and layers.
    """
    return sum(map(wrap(_distance), hidden_states, teacher_states)) / len(hidden_states)


def _distance(student, teacher):
    student, teacher = student.float(), teacher.float()
    norm = teacher.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((student - teacher).square().sum(-1) / norm).mean()
