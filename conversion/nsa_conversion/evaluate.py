# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Loss by position: what a sparse model keeps of the dense one, bucket by bucket, on long text.

The average over a whole text hides long-context damage, because most models lose only far from the start. Buckets are
counted by the position p of the query whose logits predict token p + 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from .data import builtin_text, read_text
from .errors import NSAError
from .plots import bucket_label, plot_position_loss, require_matplotlib
from .sources import load_model

__all__ = [
    "EvaluationReport",
    "PositionBucket",
    "evaluate",
    "format_position_table",
    "loss_by_position",
    "main",
    "paired_interval",
    "position_edges",
    "take_slices",
]

FIRST_EDGE = 256
# Between the last hidden state and the logits these do more than a matrix product, so the whole model must run.
LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


class PositionBucket(NamedTuple):
    """Mean loss over the query positions `start <= p < end`, and the mean of each text that reaches them."""

    start: int
    end: int
    loss: float
    count: int
    by_text: tuple[float, ...] = ()


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


def _token_losses(model, ids: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Loss of predicting ids[:, 1:], fp32 on the CPU, [1, T] -> [T - 1]; logits of `chunk_size` tokens at a time."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    config = getattr(model, "config", None)
    plain_head = head is not None and all(getattr(config, name, None) in (None, 1) for name in LOGIT_TRANSFORMS)
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
def loss_by_position(
    model,
    input_ids: torch.Tensor | Sequence[torch.Tensor],
    edges: Sequence[int],
    *,
    chunk_size: int = 1024,
    progress: bool = False,
    description: str = "Evaluating",
) -> list[PositionBucket]:
    """Mean next-token loss per bucket of query positions, softmax in fp32.

    Args:
        model: a causal language model of transformers; its training mode is restored afterwards.
        input_ids: [B, T] token ids, or a sequence of [t] tensors of any lengths; each runs alone, from position 0.
        edges: ascending bucket edges; bucket i holds the positions edges[i] <= p < edges[i + 1].
        chunk_size: tokens whose logits are held in fp32 at a time.
        progress: show a progress bar.
        description: label of the progress bar.

    Returns:
        One bucket per pair of edges that holds at least one position, in order.

    Raises:
        NSAError: the edges do not ascend, or no sequence has two tokens.
    """
    edges = list(edges)
    if len(edges) < 2 or any(left >= right for left, right in itertools.pairwise(edges)) or edges[0] < 0:
        raise NSAError(f"edges must be at least two ascending positions from 0 on, got {edges}")
    device = next(model.parameters()).device
    spans = list(itertools.pairwise(edges))
    losses = [[] for _ in spans]
    was_training = model.training
    model.eval()
    try:
        for ids in tqdm(input_ids, desc=description, unit=" texts", disable=not progress, leave=False):
            if len(ids) < 2:
                continue
            text = _token_losses(model, ids[None].to(device=device, dtype=torch.long), chunk_size).double()
            for (start, end), bucket in zip(spans, losses):
                if len(text) > start:
                    bucket.append(text[start:end])
    finally:
        model.train(was_training)
    if not any(losses):
        raise NSAError(f"no sequence has a token to predict inside positions {edges[0]}-{edges[-1] - 1}")
    buckets = []
    for (start, end), texts in zip(spans, losses):
        if texts:
            together = torch.cat(texts)
            means = tuple(text.mean().item() for text in texts)
            buckets.append(PositionBucket(start, end, together.mean().item(), len(together), means))
    return buckets


def paired_interval(
    first: Sequence[float], second: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean of `second - first`, both measured on the same texts.

    Whole texts are drawn with replacement, so what makes one text harder than another for both cancels.

    Args:
        first: one value per text, at least two.
        second: the same texts, in the same order.
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
    draws = np.random.default_rng(seed).integers(len(differences), size=(resamples, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_loss(buckets: Sequence[PositionBucket]) -> float:
    """Mean over all tokens of all buckets."""
    return sum(bucket.loss * bucket.count for bucket in buckets) / sum(bucket.count for bucket in buckets)


def _signed(difference: float) -> str:
    return f"{round(difference, 4) + 0.0:+.4f}"  # + 0.0 turns a negative zero into a positive one


def format_position_table(series: Mapping[str, Sequence[PositionBucket]], difference: str | None = None) -> str:
    """A text table of loss by position: one row per bucket, one column per model.

    Args:
        series: label -> buckets, all with the same edges.
        difference: heading of a last column, second label minus first; None leaves it out.
    """
    columns = list(series.values())
    # Texts measured one by one under both labels: the difference gets an interval.
    paired = bool(difference) and all(len(bucket.by_text) > 1 for buckets in columns[:2] for bucket in buckets)
    header = [
        "position",
        *series,
        *([difference] if difference else []),
        *(["95 % interval"] if paired else []),
        "tokens",
    ]
    rows = []
    for i in range(len(columns[0])):
        row = [bucket_label(columns[0][i]), *(f"{buckets[i].loss:.4f}" for buckets in columns)]
        if difference:
            row.append(_signed(columns[1][i].loss - columns[0][i].loss))
        if paired:
            row.append(" … ".join(map(_signed, paired_interval(columns[0][i].by_text, columns[1][i].by_text))))
        rows.append([*row, f"{columns[0][i].count:,}"])
    means = [mean_loss(buckets) for buckets in columns]
    rows.append(
        [
            "all",
            *(f"{mean:.4f}" for mean in means),
            *([_signed(means[1] - means[0])] if difference else []),
            *([""] if paired else []),
            f"{sum(bucket.count for bucket in columns[0]):,}",
        ]
    )
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [header, *rows]]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def positions_as_dicts(buckets: Sequence[PositionBucket]) -> list[dict[str, Any]]:
    """Buckets for JSON; `end` is exclusive."""
    return [bucket._asdict() for bucket in buckets]


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """Loss by position of one model, and of the dense one beside it.

    Attributes:
        model: name of the model.
        against: name of the model compared with, or None.
        text: where the text came from.
        length: tokens per slice.
        slices: number of slices.
        positions: buckets of the model.
        against_positions: buckets of the other model, or None.
    """

    model: str
    against: str | None
    text: str
    length: int
    slices: int
    positions: list[PositionBucket]
    against_positions: list[PositionBucket] | None

    @property
    def series(self) -> dict[str, list[PositionBucket]]:
        """Label -> buckets, for tables and pictures; the model compared with comes first."""
        if self.against_positions is None:
            return {_short_name(self.model): self.positions}
        labels = [_short_name(self.against), _short_name(self.model)]
        if labels[0] == labels[1]:
            labels = ["against", "model"]
        return dict(zip(labels, [self.against_positions, self.positions]))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; losses in nats per token."""
        report = {
            "model": self.model,
            "against": self.against,
            "text": self.text,
            "length": self.length,
            "slices": self.slices,
            "loss": mean_loss(self.positions),
            "positions": positions_as_dicts(self.positions),
        }
        if self.against_positions is not None:
            report["against_loss"] = mean_loss(self.against_positions)
            report["against_positions"] = positions_as_dicts(self.against_positions)
            if self.slices > 1:
                pairs = zip(self.against_positions, self.positions)
                report["difference_95"] = [paired_interval(dense.by_text, own.by_text) for dense, own in pairs]
        return report

    def table(self) -> str:
        """The report as a text table."""
        return format_position_table(self.series, "difference" if self.against_positions is not None else None)

    def save(self, directory: str | Path) -> tuple[Path, Path]:
        """Write `eval.json` and `loss_by_position.png` into `directory`, made if missing; return their paths."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        json_path, png_path = directory / "eval.json", directory / "loss_by_position.png"
        json_path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        plot_position_loss(self.series, png_path, f"Loss by position, mean of {self.slices} x {self.length:,} tokens")
        return json_path, png_path


def default_device() -> torch.device:
    """The first accelerator, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def _short_name(name: str) -> str:
    return Path(name).name or name


def evaluate(
    model,
    against=None,
    text: str | None = None,
    *,
    tokenizer=None,
    text_name: str | None = None,
    length: int = 4096,
    slices: int = 5,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    edges: Sequence[int] | None = None,
    chunk_size: int = 1024,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> EvaluationReport:
    """Measure loss by position, beside another model if one is given. The models are loaded one after the other.

    Args:
        model: a directory, hub id or GGUF file, or a loaded model (then `tokenizer` is needed).
        against: the model to compare with, usually the dense source; the same kinds of value.
        text: the text; None takes `nsa_conversion.data.builtin_text()`.
        tokenizer: the tokenizer of a loaded `model`.
        text_name: what to call the text in the report.
        length: tokens per slice, at least 2.
        slices: number of slices, spread evenly over the text.
        dtype: weights' type for models loaded here; None is the checkpoint's own.
        device: where to load; None is the first accelerator, else the CPU.
        edges: bucket edges; None is `position_edges(length)`.
        chunk_size: tokens whose logits are held in fp32 at a time.
        trust_remote_code: allow code from the checkpoints to run.
        progress: show progress bars.

    Returns:
        The report.

    Raises:
        NSAError: a model cannot be loaded, the text is too short, or the two models' vocabularies differ.
    """
    if text is None:
        text, text_name = builtin_text(), text_name or "built-in (Python help topics)"
    if not text.strip():
        raise NSAError("text is empty; give at least two tokens of it, or None for the built-in text")

    def load(name_or_model, tokenizer):
        if not isinstance(name_or_model, (str, Path)):
            return name_or_model, tokenizer, type(name_or_model).__name__
        place = device or default_device()
        loaded = load_model(name_or_model, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
        return loaded[0], tokenizer or loaded[1], str(name_or_model)

    current, tokenizer, name = load(model, tokenizer)
    if tokenizer is None:
        raise NSAError("tokenizer is needed to evaluate an already loaded model on text")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    cut = take_slices(ids, length, slices)
    vocab_size = current.get_input_embeddings().weight.shape[0]
    if edges is None:
        edges = position_edges(cut.shape[1])
    positions = loss_by_position(
        current, cut, edges, chunk_size=chunk_size, progress=progress, description=_short_name(name)
    )
    against_name = against_positions = None
    if against is not None:
        if isinstance(model, (str, Path)):
            del current  # one model in memory at a time
            gc.collect()
        other, _, against_name = load(against, tokenizer)
        other_size = other.get_input_embeddings().weight.shape[0]
        if other_size != vocab_size:
            raise NSAError(
                f"{name} has {vocab_size} tokens in its vocabulary and {against_name} has {other_size}; "
                "losses per token can only be compared between models with the same tokenizer"
            )
        against_positions = loss_by_position(
            other, cut, edges, chunk_size=chunk_size, progress=progress, description=_short_name(against_name)
        )
    return EvaluationReport(
        model=name,
        against=against_name,
        text=text_name or "given text",
        length=cut.shape[1],
        slices=cut.shape[0],
        positions=positions,
        against_positions=against_positions,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nsa eval",
        description="Loss by position on long text, side by side with another model.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, hub id or GGUF file")
    parser.add_argument("--against", metavar="DENSE", help="the model to compare with, usually the dense source")
    parser.add_argument("--text-file", metavar="FILE", help="UTF-8 text (default: a built-in technical text)")
    parser.add_argument("--length", type=int, default=4096, help="tokens per slice (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=5, help="slices, spread over the text (default: %(default)s)")
    parser.add_argument("--output", metavar="DIR", help="write eval.json and loss_by_position.png here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the first accelerator, else cpu)")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow code in the checkpoints to run")
    return parser


def main(argv: list[str]) -> int:
    """Command line of `nsa eval`.

    Args:
        argv: arguments after `nsa eval`.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(argv)
    if args.output is not None:
        require_matplotlib()
    report = evaluate(
        args.model,
        args.against,
        None if args.text_file is None else read_text(args.text_file),
        text_name=args.text_file,
        length=args.length,
        slices=args.slices,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    if report.length < args.length:
        print(f"the text holds only {report.length:,} tokens: one slice of that length", file=sys.stderr)
    elif report.slices < args.slices:
        print(f"the text holds only {report.slices} slices of {report.length:,} tokens", file=sys.stderr)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(f"loss by position (nats per token), {report.slices} x {report.length:,} tokens of {report.text}\n")
        print(report.table())
    if args.output is not None:
        json_path, png_path = report.save(args.output)
        print(f"wrote {json_path} and {png_path}", file=sys.stderr)
    return 0
