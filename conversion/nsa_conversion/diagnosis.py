# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What the selection of a model finds, layer by layer and head by head, and what better blocks would give.

Dense attention of the selection branch's queries and keys is the measure: the blocks that hold most of its mass, summed
over the heads of a group, are the dense choice. It is computed in chunks of queries, one key/value head at a time.
Selection leaves nothing out up to n·l' tokens, so only later queries count.

Shapes: T tokens, HQ query heads, H key/value heads, G = HQ // H, S selectable blocks, n selected ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from nsa_kernels import selected_attention, topn_blocks

from .errors import NSAError
from .loss import PositionBucket, losses_by_position, token_losses

__all__ = [
    "NEIGHBOURS",
    "Diagnosis",
    "behind_layers",
    "block_mass",
    "choose_blocks",
    "dense_choice",
    "diagnose",
    "forced_blocks",
    "is_sparse",
    "query_key_value",
]

NEIGHBOURS = (2, 4, 8, 16)
# Probabilities held at once, in elements.
_MAX_SCORES = 2**24
_MAX_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Means over the queries beyond n·l' tokens; lists run over sparse layers, then heads.

    Attributes:
        layers: indices of the sparse layers.
        tokens: queries measured per layer.
        block_recall: share of the dense choice's blocks that the model chose, forced ones included, [layers][H].
        mass_recall: attention mass in the chosen blocks, [layers][HQ].
        dense_mass_recall: the same of the dense choice, [layers][HQ].
        gate_mean, gate_std: gates (compressed, selected, window) over all queries, [layers][HQ][3].
        unions: neighbouring queries -> blocks that they need together, [layers][H].
        losses: blocks -> loss by position: the model's (`"own"`), those of the dense choice (`"oracle"`), and the first
            blocks with the last ones, chosen by nothing (`"recent"`).
    """

    layers: list[int]
    tokens: int
    block_recall: list[list[float]]
    mass_recall: list[list[float]]
    dense_mass_recall: list[list[float]]
    gate_mean: list[list[list[float]]]
    gate_std: list[list[list[float]]]
    unions: dict[str, list[list[float]]]
    losses: dict[str, list[PositionBucket]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        losses = {name: [bucket._asdict() for bucket in buckets] for name, buckets in self.losses.items()}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | {"losses": losses}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Diagnosis:
        """The inverse of `to_dict`."""
        losses = {name: [PositionBucket(**bucket) for bucket in buckets] for name, buckets in values["losses"].items()}
        return cls(**values | {"losses": losses})


def is_sparse(model) -> bool:
    """Whether the model has layers of native sparse attention."""
    return bool(_sparse_layers(model))


def _sparse_layers(model) -> dict[int, torch.nn.Module]:
    # by attribute: a checkpoint with its own code brings its own classes
    return {module.layer_idx: module for module in model.modules() if hasattr(module, "compress_k")}


# ---------------------------------------------------------------------------------------------------------------------
# Attention mass
# ---------------------------------------------------------------------------------------------------------------------


def query_key_value(attention, hidden_states, position_embeddings):
    """What the selection branch attends with: q [1, T, HQ, D], k [1, T, H, D], v [1, T, H, DV]."""
    rotate = attention._rotation(position_embeddings)
    q = rotate(attention._heads(hidden_states, attention.q_proj, attention.q_norm))
    k = rotate(attention._heads(hidden_states, attention.k_proj, attention.k_norm))
    return q, k, attention._heads(hidden_states, attention.v_proj)


def block_mass(q: torch.Tensor, k: torch.Tensor, start: int, stop: int, block_size: int, scale: float) -> torch.Tensor:
    """Mass of causal dense attention in every block, for the queries start … stop - 1.

    Args:
        q: [T, HQ, D], k: [T, H, D].
        block_size: l', tokens.
        scale: factor of the scores.

    Returns:
        fp32 [stop - start, HQ, S], S blocks cover `stop` keys.
    """
    heads, blocks = k.shape[1], -(-stop // block_size)
    q = q[start:stop].float().unflatten(1, (heads, -1))  # [c, H, G, D]
    future = torch.arange(stop, device=q.device) > torch.arange(start, stop, device=q.device)[:, None]
    mass = []
    for head in range(heads):
        scores = scale * q[:, head] @ k[:stop, head].float().T  # [c, G, stop]
        p = scores.masked_fill(future[:, None], float("-inf")).softmax(dim=-1)
        mass.append(F.pad(p, (0, blocks * block_size - stop)).unflatten(-1, (blocks, block_size)).sum(-1))
    return torch.cat(mass, dim=1)


def _chunks(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries, a multiple of the largest neighbourhood each but for the last."""
    unit = max(NEIGHBOURS)
    size = max(unit, min(_MAX_CHUNK, _MAX_SCORES // width) // unit * unit)
    return ((first, min(stop, first + size)) for first in range(start, stop, size))


def _sizes(config) -> dict[str, int]:
    names = ("select_block_size", "num_selected_blocks", "num_initial_blocks", "num_local_blocks")
    return {name: getattr(config, name) for name in names}


def choose_blocks(importance: torch.Tensor, config, start: int = 0) -> torch.Tensor:
    """The n blocks of highest importance, those that are forced first, for the queries from `start` on.

    Args:
        importance: [c, H, S].
        config: the model's `NSAConfig`.

    Returns:
        int32 [c, H, n], ascending, padded with -1.
    """
    return topn_blocks(importance[None], q_offset=start, **_sizes(config))[0]


def dense_choice(attention, q, k) -> torch.Tensor:
    """The blocks that hold most mass of dense attention, [T, H, n]; q [T, HQ, D], k [T, H, D]."""
    config, tokens = attention.config, len(q)
    group = q.shape[1] // k.shape[1]
    chosen = []
    for start, stop in _chunks(0, tokens, group * tokens):
        mass = block_mass(q, k, start, stop, config.select_block_size, attention.scaling)
        chosen.append(choose_blocks(mass.unflatten(1, (-1, group)).sum(2), config, start))
    return torch.cat(chosen)


def _recent(attention, q, k) -> torch.Tensor:
    """The forced first blocks and the last ones, [T, H, n]."""
    config, tokens = attention.config, len(q)
    blocks = torch.arange(-(-tokens // config.select_block_size), device=q.device, dtype=torch.float32)
    chosen = [
        choose_blocks(blocks.expand(stop - start, k.shape[1], -1), config, start)
        for start, stop in _chunks(0, tokens, k.shape[1] * len(blocks))
    ]
    return torch.cat(chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Hooks
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def behind_layers(model, hook: Callable) -> Iterator[None]:
    """Call `hook(layer index, attention, its keyword arguments, its outputs)` behind every sparse layer."""

    def forward_hook(attention, args, kwargs, outputs):
        return hook(attention.layer_idx, attention, kwargs, outputs)

    handles = [
        attention.register_forward_hook(forward_hook, with_kwargs=True) for attention in _sparse_layers(model).values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def forced_blocks(model, choose: Callable) -> Iterator[None]:
    """Make every sparse layer read blocks of another choice. For single texts, neither padded nor packed nor cached.

    Only the selection branch changes, so its difference is added to the layer's output.

    Args:
        model: a causal language model with sparse layers.
        choose: (attention module, q [T, HQ, D], k [T, H, D]) -> int32 [T, H, n], ascending, padded with -1.
    """

    def hook(layer, attention, kwargs, outputs):
        output, weights, blocks, gates = outputs
        q, k, v = query_key_value(attention, kwargs["hidden_states"], kwargs["position_embeddings"])
        settings = {
            "select_block_size": attention.config.select_block_size,
            "scale": attention.scaling,
            "backend": attention.config.nsa_backend,
        }
        other = choose(attention, q[0], k[0])[None]
        change = selected_attention(q, k, v, other, **settings)[0] - selected_attention(q, k, v, blocks, **settings)[0]
        change = (gates[..., 1, None] * change).flatten(2).to(output.dtype)
        return output + F.linear(change, attention.o_proj.weight), weights, other, gates

    with behind_layers(model, hook):
        yield


class _Statistics:
    """Sums over texts of what `Diagnosis` holds for one layer."""

    def __init__(self):
        self.sums: dict[Any, torch.Tensor] = {}
        self.counts: dict[Any, int] = {}

    def add(self, name, values: torch.Tensor) -> None:
        """Values [queries, ...]."""
        self.sums[name] = self.sums.get(name, 0) + values.double().sum(0).cpu()
        self.counts[name] = self.counts.get(name, 0) + len(values)

    def mean(self, name) -> torch.Tensor:
        return self.sums[name] / self.counts[name]

    def measure(self, attention, q, k, blocks, gates) -> None:
        """Add a text: q [T, HQ, D], k [T, H, D], blocks [T, H, n], gates [T, HQ, 3]."""
        config, (tokens, heads, n) = attention.config, blocks.shape
        group = q.shape[1] // heads
        self.add("gate", gates)
        self.add("gate squared", gates.double().square())
        for start, stop in _chunks(n * config.select_block_size, tokens, group * tokens):
            mass = block_mass(q, k, start, stop, config.select_block_size, attention.scaling)  # [c, HQ, S]
            own = _as_mask(blocks[start:stop], mass.shape[-1])  # [c, H, S]
            dense = _as_mask(choose_blocks(mass.unflatten(1, (-1, group)).sum(2), config, start), mass.shape[-1])
            self.add("block recall", (own & dense).sum(-1) / dense.sum(-1))
            self.add("mass recall", (mass * own.repeat_interleave(group, dim=1)).sum(-1))
            self.add("dense mass recall", (mass * dense.repeat_interleave(group, dim=1)).sum(-1))
            for size in NEIGHBOURS:
                whole = len(own) // size * size
                if whole:
                    self.add(size, own[:whole].unflatten(0, (-1, size)).any(1).sum(-1))


def _as_mask(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Block indices [c, H, n] -> bool [c, H, S]."""
    mask = torch.zeros(*blocks.shape[:2], count + 1, dtype=torch.bool, device=blocks.device)
    mask.scatter_(-1, torch.where(blocks < 0, count, blocks).long(), True)
    return mask[..., :count]


# ---------------------------------------------------------------------------------------------------------------------
# Diagnosis
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def diagnose(
    model,
    input_ids: torch.Tensor | Sequence[torch.Tensor],
    edges: Sequence[int],
    *,
    chunk_size: int = 1024,
    progress: bool = False,
    description: str = "Diagnosing",
) -> Diagnosis:
    """Measure the selection of every sparse layer and head, and the loss with other blocks.

    Args:
        model: a causal language model with sparse layers.
        input_ids: [B, T] token ids, or a sequence of [t] tensors; at least one longer than n·l' + 1 tokens.
        edges: of the buckets of the losses, see `losses_by_position`.
        chunk_size, progress, description: as for `token_losses`.

    Raises:
        NSAError: the model has no sparse layers, or every text is too short.
    """
    layers = _sparse_layers(model)
    if not layers:
        raise NSAError(f"a diagnosis needs sparse layers, and this {type(model).__name__} has none")
    config = next(iter(layers.values())).config
    reach = config.num_selected_blocks * config.select_block_size
    longest = max(map(len, input_ids))
    if longest < reach + max(NEIGHBOURS):
        raise NSAError(
            f"a diagnosis needs a text of at least n·l' + {max(NEIGHBOURS)} = {reach + max(NEIGHBOURS):,} tokens, "
            f"the longest has {longest:,}: up to n·l' nothing is left out"
        )
    statistics = {layer: _Statistics() for layer in layers}

    def measure(layer, attention, kwargs, outputs):
        _, _, blocks, gates = outputs
        q, k, _ = query_key_value(attention, kwargs["hidden_states"], kwargs["position_embeddings"])
        statistics[layer].measure(attention, q[0], k[0], blocks[0], gates[0])

    passes = {
        "own": behind_layers(model, measure),
        "oracle": forced_blocks(model, dense_choice),
        "recent": forced_blocks(model, _recent),
    }
    losses = {}
    for name, hooks in passes.items():
        with hooks:
            texts = token_losses(
                model, input_ids, chunk_size=chunk_size, progress=progress, description=f"{description}, {name} blocks"
            )
        losses[name] = losses_by_position(texts, edges)

    def by_layer(name):
        return [statistics[layer].mean(name).tolist() for layer in layers]

    deviations = [
        (each.mean("gate squared") - each.mean("gate").square()).clamp(min=0).sqrt().tolist()
        for each in statistics.values()
    ]
    return Diagnosis(
        layers=list(layers),
        tokens=next(iter(statistics.values())).counts["block recall"],
        block_recall=by_layer("block recall"),
        mass_recall=by_layer("mass recall"),
        dense_mass_recall=by_layer("dense mass recall"),
        gate_mean=by_layer("gate"),
        gate_std=deviations,
        unions={str(size): by_layer(size) for size in NEIGHBOURS},
        losses=losses,
    )
