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
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nsa_kernels import compressed_cu_seqlens, fold_importance

__all__ = [
    "SELECTOR_TARGETS",
    "LayerInput",
    "Queries",
    "choose_queries",
    "dense_forward",
    "dense_statistics",
    "distillation_loss",
    "layer_inputs",
    "selector_losses",
    "selector_modules",
    "sparse_layers",
]

SELECTOR_TARGETS = ("mass", "output", "vector")
# Probabilities held at once, in elements.
_MAX_SCORES = 2**26
_LOGIT_ROWS = 2048


def sparse_layers(model) -> list[torch.nn.Module]:
    """The attention modules of the sparse layers, in order."""
    # by attribute: a checkpoint with its own code brings its own classes
    return [module for module in model.modules() if hasattr(module, "compress_k")]


# ---------------------------------------------------------------------------------------------------------------------
# Inside the forward pass
# ---------------------------------------------------------------------------------------------------------------------


class LayerInput(NamedTuple):
    """What a sparse layer was called with: `[1, T, hidden_size]`, cos and sin `[1, T, D]`, and the layout."""

    attention: torch.nn.Module
    hidden_states: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    layout: object


@contextlib.contextmanager
def layer_inputs(model) -> Iterator[list[LayerInput]]:
    """Collect the detached inputs of the sparse layers of every forward pass inside the context."""
    inputs: list[LayerInput] = []

    def hook(attention, args, kwargs):
        hidden_states = kwargs["hidden_states"].detach()
        inputs.append(LayerInput(attention, hidden_states, kwargs["position_embeddings"], kwargs["layout"]))

    handles = [attention.register_forward_pre_hook(hook, with_kwargs=True) for attention in sparse_layers(model)]
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
        for start, stop in _documents(layout, hidden_states.shape[1])
    ]
    output = torch.cat(outputs, dim=2).transpose(1, 2) * gates[..., 1, None].to(v.dtype)
    return attention.o_proj(output.flatten(2)), None


def _documents(layout, tokens: int) -> list[tuple[int, int]]:
    """First slot and end of every document."""
    return list(itertools.pairwise([0, tokens] if layout.cu_seqlens is None else layout.cu_seqlens.tolist()))


# ---------------------------------------------------------------------------------------------------------------------
# The selector
# ---------------------------------------------------------------------------------------------------------------------


class Queries(NamedTuple):
    """Chosen queries of one document: its index in the row, its first slot and end, positions inside it int64 `[Q]`."""

    document: int
    start: int
    stop: int
    positions: torch.Tensor


def choose_queries(layout, tokens: int, first: int, count: int) -> list[Queries]:
    """Draw `count` queries of a row at random, or take all there are, from position `first` of a document on."""
    documents = _documents(layout, tokens)
    slots = torch.cat([torch.arange(min(start + first, stop), stop) for start, stop in documents])
    if count < len(slots):
        slots = slots[torch.randperm(len(slots))[:count]].sort().values
    chosen = [
        Queries(i, start, stop, slots[(slots >= start) & (slots < stop)] - start)
        for i, (start, stop) in enumerate(documents)
    ]
    return [queries for queries in chosen if len(queries.positions)]


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
    target: str = "mass",
    outside: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mass of causal dense attention by block, and its output outside the window, in chunks of queries.

    Args:
        q: `[Q, HQ, D]`, queries at `positions`, int64 `[Q]` ascending, of one document.
        k: `[T, H, D]`, v: `[T, H, DV]`, of the whole document.
        select_block_size: l', tokens.
        window_size: w, tokens.
        scale: factor of the scores.
        target: "mass" sums probabilities, "output" probabilities times the norm of the value; "vector" takes, per
            head, the norm of the sum of probabilities times values.
        outside: whether the output is wanted.

    Returns:
        fp32 mass `[Q, H, S]`, summed over the heads of a group, S blocks cover the document; and fp32 `[Q, HQ, DV]`,
        attention renormalised over the tokens before the window, or None.
    """
    tokens, heads = k.shape[:2]
    blocks = -(-tokens // select_block_size)
    q, k, v = q.float().unflatten(1, (heads, -1)), k.float(), v.float()
    norms = v.norm(dim=-1).T[:, None] if target == "output" else 1.0  # [H, 1, T]
    v_blocks = F.pad(v, (0, 0, 0, 0, 0, blocks * select_block_size - tokens)).unflatten(0, (blocks, -1))
    key = torch.arange(tokens, device=q.device)
    size = max(1, _MAX_SCORES // (q.shape[1] * q.shape[2] * tokens))
    mass, outputs = [], []
    for chunk, position in zip(q.split(size), positions.to(q.device)[:, None, None, None].split(size)):
        scores = scale * torch.einsum("qhgd,khd->qhgk", chunk, k)
        p = scores.masked_fill_(key > position, float("-inf")).softmax(dim=-1)
        if target == "vector":
            by_block = F.pad(p, (0, blocks * select_block_size - tokens)).unflatten(-1, (blocks, -1))
            mass.append(torch.einsum("qhgsk,skhd->qhgsd", by_block, v_blocks).norm(dim=-1).sum(2))
        else:
            weighted = F.pad((p * norms).sum(2), (0, blocks * select_block_size - tokens))
            mass.append(weighted.unflatten(-1, (blocks, -1)).sum(-1))
        if outside:
            far = p.masked_fill_(key > position - window_size, 0.0)
            far /= far.sum(-1, keepdim=True).clamp(min=torch.finfo(far.dtype).tiny)
            outputs.append(torch.einsum("qhgk,khd->qhgd", far, v).flatten(1, 2))
    return torch.cat(mass), torch.cat(outputs) if outside else None


def selector_modules(attention: torch.nn.Module) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    """What the two losses of `selector_losses` train: φ_K and φ_V, and with separate K/V what they read."""
    if attention.config.shared_kv:
        return [attention.compress_k], [attention.compress_v]
    keys = [attention.compress_k, attention.k_proj_cmp, attention.k_norm_cmp]
    return keys, [attention.compress_v, attention.v_proj_cmp]


def selector_losses(
    layer: LayerInput, queries: list[Queries], target: str = "mass", values: bool = True
) -> tuple[torch.Tensor, ...]:
    """How far φ_K is from the dense choice of blocks, and φ_V from what dense attention reads outside the window.

    The first is KL(dense ‖ importance), eq. 9-10, both normalised over the visible blocks that are not forced, in nats
    per query and group. The second is the squared error of o_cmp over the squared norm of its target. Queries, and what
    other branches read, are detached; the compressed probabilities are, for the second.

    Args:
        layer: of `layer_inputs`.
        queries: of `choose_queries`; 0 and 0 where there are none.
        target: see `dense_statistics`.
        values: whether the second is wanted; 0 if not.

    Returns:
        Two fp32 scalars with gradients for `compress_k` and for `compress_v`, and what they read (`selector_modules`).
    """
    attention, hidden_states, position_embeddings, layout = layer
    config, device = attention.config, hidden_states.device
    if not queries:
        return tuple(
            sum(parameter.sum() for module in modules for parameter in module.parameters()) * 0.0
            for modules in selector_modules(attention)
        )
    with torch.no_grad():
        rotate = attention._rotation(position_embeddings)
        k = rotate(attention._heads(hidden_states, attention.k_proj, attention.k_norm))
        v = attention._heads(hidden_states, attention.v_proj)
        taught = []
        for chosen in queries:
            slots = (chosen.start + chosen.positions).to(device)
            turn = attention._rotation([x[:, slots] for x in position_embeddings])
            q = turn(attention._heads(hidden_states[:, slots], attention.q_proj, attention.q_norm))[0]
            with torch.autocast(device.type, enabled=False):
                statistics = dense_statistics(
                    q,
                    k[0, chosen.start : chosen.stop],
                    v[0, chosen.start : chosen.stop],
                    chosen.positions,
                    select_block_size=config.select_block_size,
                    window_size=config.window_size,
                    scale=attention.scaling,
                    target=target,
                    outside=values,
                )
            taught.append((q, *statistics))
    bounds = [0, hidden_states.shape[1]] if layout.cu_seqlens is None else layout.cu_seqlens
    cu_seqlens = torch.as_tensor(bounds, dtype=torch.int32, device=device)
    # recomputed in the backward pass: what one layer holds is freed before the next
    return checkpoint(_taught, layer, cu_seqlens, queries, taught, use_reentrant=False)


def _taught(layer, cu_seqlens, queries, taught):
    """The losses of one layer; `taught`: (q, mass, outside) for every entry of `queries`."""
    attention, hidden_states, position_embeddings, layout = layer
    config = attention.config
    with torch.set_grad_enabled(not config.shared_kv):
        if config.shared_kv:
            k_cmp = attention._heads(hidden_states, attention.k_proj, attention.k_norm)
            v_cmp = attention._heads(hidden_states, attention.v_proj)
        else:
            k_cmp, v_cmp = attention._branch(hidden_states, "cmp")
        rotated = attention._rotation(position_embeddings)(k_cmp)
        tails = {name: x[0] for name, x in attention._tails(k_cmp, rotated, v_cmp).items()}
    sizes = {name: getattr(config, name) for name in ("compress_block_size", "compress_stride", "select_block_size")}
    embeddings = tuple(x.reshape(-1, x.shape[-1]) for x in layout.block_embeddings)
    keys, values = attention._compress(tails, 0, None, embeddings, cu_seqlens)
    block_bounds = compressed_cu_seqlens(cu_seqlens, config.compress_block_size, config.compress_stride).tolist()
    divergence, count = 0.0, 0
    error, norm = torch.zeros(2, device=keys.device)
    with torch.autocast(keys.device.type, enabled=False):
        for chosen, (q, mass, outside) in zip(queries, taught):
            first, last = block_bounds[chosen.document : chosen.document + 2]
            k_cmp, v_cmp = keys[first:last].float(), values[first:last].float()
            position = chosen.positions.to(q.device)[:, None, None]
            end = config.compress_stride * torch.arange(last - first, device=q.device) + config.compress_block_size - 1
            q = q.float().unflatten(1, (k_cmp.shape[1], -1))
            scores = attention.scaling * torch.einsum("qhgd,chd->qhgc", q, k_cmp)
            p = scores.masked_fill(end > position[..., None], float("-inf")).softmax(dim=-1)

            blocks = torch.arange(mass.shape[-1], device=q.device)
            free = blocks <= position // config.select_block_size - config.num_local_blocks
            free &= blocks >= config.num_initial_blocks
            teacher = _normalised(mass * free)
            student = _normalised(fold_importance(p.sum(2), num_blocks=len(blocks), **sizes) * free)
            tiny = torch.finfo(student.dtype).tiny
            divergence += (torch.xlogy(teacher, teacher) - teacher * student.clamp(min=tiny).log()).sum()
            count += mass.shape[0] * mass.shape[1]
            if outside is not None:
                o_cmp = torch.einsum("qhgc,chd->qhgd", p.detach(), v_cmp).flatten(1, 2)
                error = error + (o_cmp - outside).square().sum()
                norm = norm + outside.square().sum()
    return divergence / count, error / norm.clamp(min=torch.finfo(norm.dtype).tiny)


def _normalised(x):
    return x / x.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


# ---------------------------------------------------------------------------------------------------------------------
# Logits
# ---------------------------------------------------------------------------------------------------------------------


def distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) of the next token, mean over the tokens that have a label, in chunks of them.

    Args:
        logits, teacher_logits: `[B, T, vocab_size]`.
        labels: int64 `[B, T]`, -100 where none; token t is predicted at t - 1.

    Returns:
        fp32 scalar, nats per token.
    """

    kept = labels[:, 1:] != -100

    def chunk(student, teacher, kept):
        student, teacher = (x.float().log_softmax(-1) for x in (student, teacher))
        divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
        return (divergence * kept).sum()

    # slices: the gradient of rows picked by index is slow to put together
    parts = [x.split(_LOGIT_ROWS, dim=1) for x in (logits[:, :-1], teacher_logits[:, :-1], kept)]
    total = sum(checkpoint(chunk, *part, use_reentrant=False) for part in zip(*parts))
    return total / kept.sum().clamp(min=1)
