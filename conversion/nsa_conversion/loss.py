# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Loss on long texts: by position, and on what repeats an earlier passage; bootstrap intervals of differences.

The average over a whole text hides long-context damage, because most models lose only far from the start. Buckets are
counted by the position p of the query whose logits predict token p + 1. Tokens that complete an n-gram which the text
has had before can be looked up instead of guessed: their loss shows whether the model finds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from .errors import NSAError
from .plots import bucket_label

__all__ = [
    "PositionBucket",
    "RecallGroup",
    "difference_interval",
    "format_position_table",
    "format_table",
    "loss_by_position",
    "loss_by_recall",
    "losses_by_position",
    "mean_loss",
    "paired_interval",
    "position_edges",
    "position_rows",
    "signed",
    "take_slices",
    "take_texts",
    "token_losses",
]

FIRST_EDGE = 256
RESAMPLES = 10_000
# Between the last hidden state and the logits these do more than a matrix product, so the whole model must run.
LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


class PositionBucket(NamedTuple):
    """Mean loss over the query positions `start <= p < end`, and mean and tokens of each text that reaches them."""

    start: int
    end: int
    loss: float
    count: int
    by_text: tuple[float, ...] = ()
    count_by_text: tuple[int, ...] = ()


class RecallGroup(NamedTuple):
    """Mean loss over the tokens of one kind (None where there is none), and mean and tokens of each text."""

    name: str
    loss: float | None
    count: int
    by_text: tuple[float, ...]
    count_by_text: tuple[int, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------------------------------


def position_edges(length: int) -> list[int]:
    """Bucket edges 0, 256, 512, 1024, … doubling up to `length`, which ends the last bucket.

    Args:
        length: tokens in the longest sequence, at least 2.
    """
    edges = [0]
    edge = FIRST_EDGE
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def take_slices(ids: torch.Tensor, length: int, slices: int) -> torch.Tensor:
    """Cut `slices` pieces of `length` tokens, spread evenly over a text without overlap.

    A text too short for all of them gives as many as fit; one shorter than `length` gives a single, shorter piece.

    Args:
        ids: [T] token ids.
        length: tokens per piece, at least 2.
        slices: number of pieces, at least 1.

    Returns:
        [N, t] with N <= slices and t <= length.

    Raises:
        NSAError: the text has fewer than two tokens, or an argument is too small.
    """
    if length < 2:
        raise NSAError(f"length must be at least 2 tokens, got {length}")
    if slices < 1:
        raise NSAError(f"slices must be at least 1, got {slices}")
    if len(ids) < 2:
        raise NSAError(f"the text holds {len(ids)} token(s); at least 2 are needed to have a loss")
    length = min(length, len(ids))
    slices = min(slices, len(ids) // length)
    stride = (len(ids) - length) // max(slices - 1, 1)
    return torch.stack([ids[i * stride : i * stride + length] for i in range(slices)])


def take_texts(documents: Sequence[torch.Tensor], length: int, slices: int) -> list[torch.Tensor]:
    """Texts to measure: slices of a single document (`take_slices`), or the beginnings of several.

    Of several, those of at least `length` tokens come first, each once.

    Args:
        documents: [T] token ids each.
        length: tokens per text, at least 2.
        slices: number of texts, at least 1.

    Returns:
        At most `slices` tensors of at most `length` tokens.
    """
    if len(documents) == 1:
        return list(take_slices(documents[0], length, slices))
    documents = sorted(documents, key=lambda ids: len(ids) < length)
    return [take_slices(ids[:length], length, 1)[0] for ids in documents[:slices]]


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def _text_losses(model, ids: torch.Tensor, chunk_size: int, sharded: bool) -> torch.Tensor:
    """Loss of predicting ids[:, 1:], fp32 on the CPU, [1, T] -> [T - 1]; logits of `chunk_size` tokens at a time."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    config = getattr(model, "config", None)
    plain_head = not sharded and head is not None
    plain_head = plain_head and all(getattr(config, name, None) in (None, 1) for name in LOGIT_TRANSFORMS)
    if plain_head:
        # The logits of a whole long sequence can be larger than the model: apply the head chunk by chunk.
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    else:
        states = model(input_ids=ids, use_cache=False).logits
    losses = []
    for start in range(0, ids.shape[1] - 1, chunk_size):
        end = min(start + chunk_size, ids.shape[1] - 1)
        logits = head(states[:, start:end]) if plain_head else states[:, start:end]
        losses.append(F.cross_entropy(logits[0].float(), ids[0, start + 1 : end + 1], reduction="none").cpu())
    return torch.cat(losses)


@torch.no_grad()
def token_losses(
    model,
    input_ids: torch.Tensor | Sequence[torch.Tensor],
    *,
    chunk_size: int = 1024,
    sharded: bool = False,
    progress: bool = False,
    description: str = "Evaluating",
) -> list[torch.Tensor]:
    """Next-token loss of every token but a text's first, softmax in fp32.

    Args:
        model: a causal language model of transformers; its training mode is restored afterwards.
        input_ids: [B, T] token ids, or a sequence of [t] tensors of any lengths; each runs alone, from position 0.
        chunk_size: tokens whose logits are held in fp32 at a time.
        sharded: the model is wrapped by FSDP or DeepSpeed: it works as a whole only, on all processes at once.
        progress: show a progress bar.
        description: label of the progress bar.

    Returns:
        fp64 [t - 1] per text, on the CPU; empty for a text of one token.
    """
    device = next(model.parameters()).device
    losses = []
    was_training = model.training
    model.eval()
    try:
        for ids in tqdm(input_ids, desc=description, unit=" texts", disable=not progress, leave=False):
            if len(ids) < 2:
                losses.append(torch.empty(0, dtype=torch.double))
                continue
            ids = ids[None].to(device=device, dtype=torch.long)
            losses.append(_text_losses(model, ids, chunk_size, sharded).double())
    finally:
        model.train(was_training)
    return losses


def _means(texts: Sequence[torch.Tensor]) -> tuple[float | None, int, tuple[float, ...], tuple[int, ...]]:
    """Mean over all tokens, their number, and both for each text; texts of no token count as 0."""
    together = torch.cat(list(texts))
    mean = together.mean().item() if len(together) else None
    by_text = tuple(text.mean().item() if len(text) else 0.0 for text in texts)
    return mean, len(together), by_text, tuple(map(len, texts))


def _spans(edges: Sequence[int]) -> list[tuple[int, int]]:
    edges = list(edges)
    spans = list(itertools.pairwise(edges))
    if not spans or any(left >= right for left, right in spans) or edges[0] < 0:
        raise NSAError(f"edges must be at least two ascending positions from 0 on, got {edges}")
    return spans


def losses_by_position(losses: Sequence[torch.Tensor], edges: Sequence[int]) -> list[PositionBucket]:
    """Mean of token losses per bucket of query positions.

    Args:
        losses: of `token_losses`.
        edges: ascending bucket edges; bucket i holds the positions edges[i] <= p < edges[i + 1].

    Returns:
        One bucket per pair of edges that holds at least one position, in order.

    Raises:
        NSAError: the edges do not ascend, or no text has a position inside them.
    """
    buckets = []
    for start, end in _spans(edges):
        texts = [text[start:end] for text in losses if len(text) > start]
        if texts:
            buckets.append(PositionBucket(start, end, *_means(texts)))
    if not buckets:
        raise NSAError(f"no sequence has a token to predict inside positions {edges[0]}-{edges[-1] - 1}")
    return buckets


def loss_by_position(
    model, input_ids: torch.Tensor | Sequence[torch.Tensor], edges: Sequence[int], **settings
) -> list[PositionBucket]:
    """`token_losses` and `losses_by_position` in one.

    Args:
        model, input_ids: as for `token_losses`.
        edges: as for `losses_by_position`.
        settings: `chunk_size`, `sharded`, `progress` and `description` of `token_losses`.
    """
    _spans(edges)  # refuses bad edges before the work starts
    return losses_by_position(token_losses(model, input_ids, **settings), edges)


def _recall_distances(ids: torch.Tensor, n: int) -> torch.Tensor:
    """For ids[1:]: tokens since the last time that the n-gram ending there was seen; 0 where never. [T] -> [T - 1]"""
    last_seen: dict[tuple[int, ...], int] = {}
    tokens = ids.tolist()
    distances = [0] * (len(tokens) - 1)
    for end in range(n - 1, len(tokens)):
        gram = tuple(tokens[end - n + 1 : end + 1])
        if end:
            distances[end - 1] = end - last_seen.get(gram, end)
        last_seen[gram] = end
    return torch.tensor(distances)


def loss_by_recall(
    input_ids: Sequence[torch.Tensor], losses: Sequence[torch.Tensor], *, n: int = 4, far: int = 1024
) -> list[RecallGroup]:
    """Mean loss of the tokens that complete an n-gram seen before in the same text, against the others.

    Args:
        input_ids: [t] token ids each.
        losses: of `token_losses` on the same texts.
        n: tokens of an n-gram, the predicted one included; at least 2.
        far: an n-gram last seen at least this many tokens before is recalled from afar.

    Returns:
        Three groups: recalled from afar, recalled from nearer, and not seen before.

    Raises:
        NSAError: `n` or `far` is too small.
    """
    if n < 2 or far < 1:
        raise NSAError(f"n must be at least 2 and far at least 1 token, got n={n} and far={far}")
    distances = [_recall_distances(ids, n) for ids in input_ids]
    kinds = {
        f"{n}-gram seen {far:,} or more tokens before": lambda distance: distance >= far,
        f"{n}-gram seen nearer": lambda distance: (distance > 0) & (distance < far),
        "not seen before": lambda distance: distance == 0,
    }
    return [
        RecallGroup(name, *_means([text[kind(distance)] for text, distance in zip(losses, distances, strict=True)]))
        for name, kind in kinds.items()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def paired_interval(
    first: Sequence[float],
    second: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean of `second - first`, both measured on the same texts.

    Whole texts are drawn with replacement, so what makes one text harder than another for both cancels.

    Args:
        first: one value per text, at least two.
        second: the same texts, in the same order.
        weights: of each text in the mean, for instance its number of tokens; None weighs all alike.
        level: probability that the interval should cover, inside (0, 1).
        resamples: draws.
        seed: of the draws; equal inputs give equal intervals.

    Returns:
        The lower and the upper end.

    Raises:
        NSAError: fewer than two texts, or unequal numbers of them.
    """
    if len(first) != len(second) or len(first) < 2:
        raise NSAError(f"an interval needs the same two or more texts from both, got {len(first)} and {len(second)}")
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    weights = np.ones_like(differences) if weights is None else np.asarray(weights, dtype=np.float64)
    differences, weights = differences[weights > 0], weights[weights > 0]
    if len(differences) < 2:
        raise NSAError(f"an interval needs two or more texts of some weight, got {len(differences)}")
    draws = np.random.default_rng(seed).integers(len(differences), size=(resamples, len(differences)))
    means = (differences * weights)[draws].sum(axis=1) / weights[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference_interval(
    first: PositionBucket | RecallGroup, second: PositionBucket | RecallGroup
) -> tuple[float, float] | None:
    """`paired_interval` of the loss in one bucket or group, or None where fewer than two texts have tokens in it."""
    if sum(count > 0 for count in first.count_by_text) < 2:
        return None
    return paired_interval(first.by_text, second.by_text, first.count_by_text)


def mean_loss(groups: Sequence[PositionBucket | RecallGroup]) -> float:
    """Mean over all tokens of all groups."""
    return sum(group.loss * group.count for group in groups if group.count) / sum(group.count for group in groups)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def signed(difference: float) -> str:
    """`+0.0123`."""
    return f"{round(difference, 4) + 0.0:+.4f}"  # + 0.0 turns a negative zero into a positive one


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], summary: Sequence[str] | None = None) -> str:
    """A text table, right-aligned, with a rule under the header and one above the summary."""
    every = [header, *rows, *([] if summary is None else [summary])]
    widths = [max(len(row[i]) for row in every) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in every]
    rule = "  ".join("-" * width for width in widths)
    end = [] if summary is None else [rule, lines[-1]]
    return "\n".join([lines[0], rule, *lines[1 : len(rows) + 1], *end])


def position_rows(
    series: Mapping[str, Sequence[PositionBucket | RecallGroup]], difference: str | None = None
) -> tuple[list[str], list[list[str]], list[str]]:
    """Loss by position or by recall as the cells of a table.

    Args:
        series: label -> buckets or groups, all of the same texts and edges.
        difference: heading of the second label minus the first; with more labels each but the first gets a column of
            its own, headed by its name. None leaves differences out.

    Returns:
        The header; one row per bucket; the row of all together.
    """
    labels = list(series)
    base = series[labels[0]]
    others = labels[1:] if difference else []
    intervals = {
        label: [difference_interval(bucket, other) for bucket, other in zip(base, series[label])] for label in others
    }
    paired = any(ends for column in intervals.values() for ends in column)
    named = isinstance(base[0], RecallGroup)
    header = ["tokens" if named else "position", *labels]
    for label in others:
        header += [difference if len(others) == 1 else f"{label} - {labels[0]}", *(["95 % interval"] if paired else [])]
    header.append("count" if named else "tokens")
    rows = []
    for i, bucket in enumerate(base):
        row = [bucket.name if named else bucket_label(bucket)]
        row += [f"{series[label][i].loss:.4f}" if bucket.count else "" for label in labels]
        for label in others:
            other = series[label][i]
            row.append(signed(other.loss - bucket.loss) if bucket.count else "")
            if paired:
                row.append(" … ".join(map(signed, intervals[label][i] or ())))
        rows.append([*row, f"{bucket.count:,}"])
    means = [mean_loss(series[label]) for label in labels]
    total = ["all", *(f"{mean:.4f}" for mean in means)]
    for mean in means[1 : 1 + len(others)]:
        total += [signed(mean - means[0]), *([""] if paired else [])]
    return header, rows, [*total, f"{sum(bucket.count for bucket in base):,}"]


def format_position_table(series: Mapping[str, Sequence[PositionBucket]], difference: str | None = None) -> str:
    """A text table of loss by position: one row per bucket, one column per model; see `position_rows`."""
    return format_table(*position_rows(series, difference))
