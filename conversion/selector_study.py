# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Compare designs of φ_K and what it learns from on a CPU, layer by layer, without a backward pass through the model.

`python conversion/selector_study.py OUTPUT.json --train FILE --eval FILE …` runs the dense model once over a few texts
and keeps the inputs of its attention layers. Every design is then trained in every layer alone, from the start that
conversion gives it, and measured on other texts: the share of the dense attention mass in the chosen blocks, and the
squared error of the layer's output, relative to the output of dense attention. Queries that repeat earlier text are
reported apart ("copy"): half of the texts have a passage written twice. With --needles, so are those that answer from a
number hidden in a long prompt ("needle"): found is the share of what dense attention takes from the number's blocks,
of all it takes from blocks that are not forced, where the block is chosen. --practice says what is done to the texts to
train on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from nsa_conversion import NSAError, convert, load_model, smollm2_gguf
from nsa_conversion.data import builtin_text, encode_documents, read_files, repeat_passage, state_facts
from nsa_conversion.diagnosis import block_mass
from nsa_conversion.distill import (
    LayerInput,
    choose_queries,
    dense_forward,
    dense_statistics,
    layer_inputs,
    selector_losses,
    selector_modules,
)
from nsa_conversion.tasks import Material, make_trials
from nsa_kernels import importance, topn_blocks

__all__ = ["DESIGNS", "main", "study"]

# name: (settings of `convert`, target of the selector's loss, learning rate), or no target for the start itself
DESIGNS: dict[str, tuple[dict[str, Any], str | None, float]] = {
    "mean": ({"compress_type": "pool"}, None, 0.0),
    "mean 16/8": ({"compress_type": "pool", "compress_block_size": 16, "compress_stride": 8}, None, 0.0),
    "mlp mass": ({"compress_type": "residual_mlp"}, "mass", 1e-3),
    "mlp output": ({"compress_type": "residual_mlp"}, "output", 1e-3),
    "pool mass": ({"compress_type": "pool"}, "mass", 1e-3),
    "pool output": ({"compress_type": "pool"}, "output", 1e-3),
    "pool output 16/8": (
        {"compress_type": "pool", "compress_block_size": 16, "compress_stride": 8},
        "output",
        1e-3,
    ),
}
COPIED_TOKENS = 6
NEEDLES, DEPTHS = ("needle_choice", "passkey_choice"), (0.1, 0.3, 0.5)

PRACTICE = {
    "none": "as they are",
    "passage": "in every second one a long passage is written twice",
    "passages": "short ones are, in all",
    "facts": "made-up facts are stated and used again further on",
}


class Needle(NamedTuple):
    """A prompt with its answer; positions of the queries that answer, and of the number they ask for; int64."""

    ids: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor


class _Stop(Exception):
    pass


def _layout(model, ids):
    """The layout that a text has in the layers of a model."""

    def hook(attention, args, kwargs):
        raise _Stop(kwargs["layout"])

    (first, *_) = (module for module in model.modules() if hasattr(module, "compress_k"))
    handle = first.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(ids, use_cache=False)
    except _Stop as stop:
        return stop.args[0]
    finally:
        handle.remove()
    raise AssertionError("the first sparse layer was not called")


@torch.no_grad()
def _inputs(model, texts) -> list[list[LayerInput]]:
    """Inputs of all layers for every text."""
    found = []
    for ids in texts:
        with dense_forward(model), layer_inputs(model) as layers:
            model.model(ids[None], use_cache=False)
        found.append([each._replace(hidden_states=each.hidden_states.bfloat16()) for each in layers])
    return found


def _copy_queries(ids: torch.Tensor, first: int) -> torch.Tensor:
    """Positions from `first` on whose last tokens occurred before, `first` tokens ago or more."""
    seen: dict[tuple, int] = {}
    found, tokens = [], ids.tolist()
    for position in range(COPIED_TOKENS - 1, len(tokens)):
        key = tuple(tokens[position - COPIED_TOKENS + 1 : position + 1])
        if position >= first and position - seen.get(key, position) >= first:
            found.append(position)
        seen.setdefault(key, position)
    return torch.tensor(found, dtype=torch.long)


class _Layer:
    """Queries, keys and values of a layer for one text, `[T, heads, D]`, and its compressed keys `[1, C, H, D]`."""

    def __init__(self, layer: LayerInput):
        attention, x, embeddings, layout = layer[:4]
        rotate = attention._rotation(embeddings)
        k, v = attention._heads(x, attention.k_proj, attention.k_norm), attention._heads(x, attention.v_proj)
        tails = attention._tails(k, rotate(k), v)
        self.k_cmp, _ = attention._compress(tails, 0, layout.num_blocks, layout.block_embeddings)
        self.q = rotate(attention._heads(x, attention.q_proj, attention.q_norm))[0]
        self.k, self.v = rotate(k)[0], v[0]
        self.config, self.scale, self.o_proj = attention.config, attention.scaling, attention.o_proj
        self.group = self.q.shape[1] // self.k.shape[1]
        self.sizes = {
            name: getattr(self.config, name) for name in ("compress_block_size", "compress_stride", "select_block_size")
        }

    def importance(self, position: int, blocks: int) -> torch.Tensor:
        """`[1, 1, H, blocks]`, of the query at a position."""
        query, stride = self.q[position][None], self.config.compress_stride
        end = stride * torch.arange(self.k_cmp.shape[1]) + self.config.compress_block_size - 1
        known = self.k_cmp[:, end <= position].contiguous()
        scores = self.scale * torch.einsum("qhd,chd->hqc", query, known[0].repeat_interleave(self.group, dim=1))
        where = {"num_blocks": blocks, "q_offset": position, "scale": self.scale}
        return importance(query[None], known, scores.logsumexp(-1).T[None], **where, **self.sizes)

    def choose(self, scores: torch.Tensor, position: int) -> torch.Tensor:
        """Bool `[H, S]`: the blocks that are read where scores are `[1, 1, H, S]`."""
        names = ("select_block_size", "num_selected_blocks", "num_initial_blocks", "num_local_blocks")
        settings = {name: getattr(self.config, name) for name in names}
        blocks = topn_blocks(scores, q_offset=position, **settings)[0, 0].long()  # [H, n]
        mask = torch.zeros(len(blocks), scores.shape[-1] + 1, dtype=torch.bool)
        return mask.scatter_(1, torch.where(blocks < 0, scores.shape[-1], blocks), True)[:, :-1]


@torch.no_grad()
def _measure(layer: LayerInput, positions: torch.Tensor) -> tuple[float, float, float]:
    """Mass of the chosen blocks and of the dense choice, and the relative squared error of the output."""
    x = _Layer(layer)
    size = x.config.select_block_size
    chosen_mass, best_mass, error, norm = [], [], 0.0, 0.0
    for position in positions.tolist():
        mass = block_mass(x.q[: position + 1], x.k, position, position + 1, size, x.scale)  # [1, HQ, S]
        by_group = mass.unflatten(1, (-1, x.group)).sum(2)[None]
        chosen, best = (
            x.choose(scores, position).repeat_interleave(x.group, dim=0)
            for scores in (x.importance(position, mass.shape[-1]), by_group)
        )
        chosen_mass.append((mass[0] * chosen).sum(-1).mean().item())
        best_mass.append((mass[0] * best).sum(-1).mean().item())
        k, values = (each[: position + 1].repeat_interleave(x.group, dim=1) for each in (x.k, x.v))
        s = x.scale * torch.einsum("hd,khd->hk", x.q[position], k)
        read = chosen.repeat_interleave(size, dim=1)[:, : position + 1]
        dense, own = (
            torch.einsum("hk,khd->hd", scores.softmax(-1), values)
            for scores in (s, s.masked_fill(~read, float("-inf")))
        )
        change, whole = (F.linear(each.flatten(), x.o_proj.weight) for each in (own - dense, dense))
        error, norm = error + change.square().sum().item(), norm + whole.square().sum().item()
    return float(np.mean(chosen_mass)), float(np.mean(best_mass)), error / norm


@torch.no_grad()
def _find(layer: LayerInput, needle: Needle) -> tuple[float, float]:
    """Of what queries take from blocks that are not forced: the number's share, and where its block is chosen.

    Sums over queries and groups.
    """
    x, first = _Layer(layer), layer.attention.config.num_initial_blocks
    sizes = {"select_block_size": x.config.select_block_size, "window_size": x.config.window_size}
    where = {"scale": x.scale, "outside": False}
    worth, _ = dense_statistics(x.q[needle.positions], x.k, x.v, needle.positions, **sizes, **where)  # [Q, H, S]
    taken, found = 0.0, 0.0
    for position, each in zip(needle.positions.tolist(), worth):
        free = slice(first, position // x.config.select_block_size - x.config.num_local_blocks + 1)
        blocks = (needle.places // x.config.select_block_size).unique().tolist()
        held = [block for block in blocks if free.start <= block < free.stop]
        share = each[:, held] / each[:, free].sum(-1, keepdim=True).clamp(min=torch.finfo(each.dtype).tiny)
        chosen = x.choose(x.importance(position, each.shape[-1]), position)[:, held]
        taken, found = taken + share.sum().item(), found + (share * chosen).sum().item()
    return taken, found


def _train(inputs: Sequence[LayerInput], first: int, queries: int, target: str, steps: int, rate: float) -> None:
    """φ_K of one layer and what it reads, on one text at a time."""
    parameters = [each for module in selector_modules(inputs[0].attention)[0] for each in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 10) * 0.5 * (1 + np.cos(np.pi * step / steps))
    )
    for step in range(steps):
        layer = inputs[step % len(inputs)]
        loss, _ = selector_losses(layer, choose_queries(layer, first, queries), target, values=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def study(
    train: Sequence[torch.Tensor],
    held_out: Sequence[torch.Tensor],
    *,
    source: str | Path,
    layers: Sequence[int] | None = None,
    designs: Sequence[str] = tuple(DESIGNS),
    sizes: dict[str, int] | None = None,
    steps: int = 72,
    queries: int = 192,
    needles: Sequence[Needle] = (),
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train and measure designs.

    Args:
        train, held_out: texts, int64 `[T]` each, longer than n·l'.
        source: the dense model.
        layers: indices; None takes all.
        designs: keys of `DESIGNS`.
        sizes: settings of `convert` for all designs, which win.
        steps: of training, per layer.
        queries: drawn per text and step.
        needles: prompts with hidden numbers to measure on as well.

    Returns:
        One row per design, layer, text and kind of query: mass recall, that of the dense choice, relative squared
        error; for needles what is taken and what is found of it.
    """
    rows: list[dict[str, Any]] = []
    known: dict[str, list[list[LayerInput]]] = {}
    for name in designs:
        settings, target, rate = DESIGNS[name]
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            convert(source, Path(place) / "nsa", progress=False, remote_code=False, **settings | (sizes or {}))
            model, _ = load_model(Path(place) / "nsa", dtype="float32", device="cpu")
        modules = [module for module in model.modules() if hasattr(module, "compress_k")]
        config = modules[0].config
        first = max(config.num_selected_blocks * config.select_block_size, config.window_size)
        if not known:
            parts = {"train": train, "eval": held_out, "needle": [needle.ids for needle in needles]}
            known = {part: _inputs(model, texts) for part, texts in parts.items()}
        layouts = {part: [_layout(model, ids[None]) for ids in texts] for part, texts in parts.items()}

        def of(part, text, layer, known=known, modules=modules, layouts=layouts):
            given = known[part][text][layer]
            hidden = given.hidden_states.float()
            return LayerInput(modules[layer], hidden, given.position_embeddings, layouts[part][text])

        for layer in layers if layers is not None else range(len(modules)):
            if target is not None:
                torch.manual_seed(0)
                inputs = [of("train", text, layer) for text in range(len(train))]
                _train(inputs, first, queries, target, steps, rate)
            for text, ids in enumerate(held_out):
                every = torch.linspace(first, len(ids) - 1, min(queries, len(ids) - first)).long()
                copied = _copy_queries(ids, first)
                copied = copied[:: max(1, len(copied) // queries)]
                for kind, positions in (("any", every), ("copy", copied)):
                    if len(positions) < 8:
                        continue
                    recall, best, error = _measure(of("eval", text, layer), positions)
                    row = {"design": name, "layer": layer, "text": text, "queries": kind, "count": len(positions)}
                    rows.append(row | {"mass_recall": recall, "dense_mass_recall": best, "error": error})
            for text, needle in enumerate(needles):
                taken, found = _find(of("needle", text, layer), needle)
                row = {"design": name, "layer": layer, "text": text, "queries": "needle"}
                rows.append(row | {"count": len(needle.positions), "taken": taken, "found": found})
        if progress:
            for kind in ("any", "copy"):
                of_kind = [row for row in rows if row["design"] == name and row["queries"] == kind]
                if of_kind:
                    recall, error = (float(np.mean([row[key] for row in of_kind])) for key in ("mass_recall", "error"))
                    seconds = time.monotonic() - start
                    print(f"{name}, {kind}: mass {recall:.4f}, error {error:.5f}, {seconds:.0f} s", flush=True)
            hidden = [row for row in rows if row["design"] == name and row["queries"] == "needle"]
            if hidden:
                found, taken = (sum(row[key] for row in hidden) for key in ("found", "taken"))
                print(f"{name}, needle: found {found / taken:.4f}", flush=True)
    return rows


def _needles(tokenizer, length: int, count: int) -> list[Needle]:
    """`count` prompts of each task and depth."""
    material, needles = Material(builtin_text()), []
    for task, depth in ((task, depth) for task in NEEDLES for depth in DEPTHS):
        for trial in make_trials(task, tokenizer, material, length, depth=depth, trials=count):
            digits = [token for token in trial.continuation if tokenizer.decode([token]).strip().isdigit()]
            starts = range(len(trial.prompt) - len(digits) + 1)
            places = [place for place in starts if trial.prompt[place : place + len(digits)] == digits]
            ids = torch.tensor([*trial.prompt, *trial.continuation])
            answering = torch.arange(len(trial.prompt) - 1, len(ids) - 1)
            needles.append(Needle(ids, answering, torch.tensor(places)[:, None] + torch.arange(len(digits))))
    return needles


def _repeat_short(ids: np.ndarray, rng: random.Random) -> np.ndarray:
    """Passages of the first half of a text written again in the second, at least a quarter of it further on."""
    again, half = ids.copy(), len(ids) // 2
    for _ in range(6):
        length = rng.randint(24, min(160, half // 2))
        start = rng.randint(0, half - length)
        place = rng.randint(max(half, start + len(ids) // 4), len(ids) - length)
        again[place : place + length] = ids[start : start + length]
    return again


def _texts(path: str, tokenizer, length: int, count: int, practice: str = "passage") -> list[torch.Tensor]:
    """The first long documents of a file, changed as `PRACTICE` says."""
    long = (document for document in read_files([path]) if len(document) > 2 * length)
    found: list[np.ndarray] = []
    with contextlib.suppress(StopIteration):
        while len(found) < count:
            (ids,) = encode_documents([next(long)[: 8 * length]], tokenizer, progress=False)
            if len(ids) >= length:
                found.append(ids[:length])
    if len(found) < count:
        raise NSAError(f"{path} has {len(found)} documents of {length:,} tokens, and {count} are wanted")
    rng = random.Random(0)
    if practice == "passage":
        found[1::2] = [repeat_passage(ids, rng) for ids in found[1::2]]
    elif practice == "passages":
        found = [_repeat_short(ids, rng) for ids in found]
    elif practice == "facts":
        found = [state_facts(ids, rng, tokenizer) for ids in found]
    return [torch.from_numpy(ids).long() for ids in found]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("output", metavar="OUTPUT.json")
    add("--train", metavar="FILE", required=True, help="JSON Lines to train on")
    add("--eval", metavar="FILE", nargs="+", required=True, help="JSON Lines to measure on")
    add("--source", help="the dense model (default: SmolLM2-135M-Instruct)")
    add("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS), metavar="NAME", help=", ".join(DESIGNS))
    add("--layers", type=int, nargs="+", help="default: all")
    add("--length", type=int, default=4096, help="tokens per text (default: %(default)s)")
    add("--texts", type=int, default=6, help="of each file (default: %(default)s)")
    add("--steps", type=int, default=72, help="of training per layer (default: %(default)s)")
    add("--queries", type=int, default=192, help="per text and step (default: %(default)s)")
    practice = "; ".join(f"{name}: {what}" for name, what in PRACTICE.items())
    add("--practice", choices=PRACTICE, default="passage", help=f"texts to train on; {practice} (default: %(default)s)")
    add("--needles", type=int, default=0, help="prompts per task and depth to measure on (default: %(default)s)")
    args = parser.parse_args(argv)
    source = args.source or smollm2_gguf()
    try:
        _, tokenizer = load_model(source, dtype="float32", device="cpu")
        train = _texts(args.train, tokenizer, args.length, args.texts, args.practice)
        held_out = [ids for path in args.eval for ids in _texts(path, tokenizer, args.length, args.texts)]
        options = {"layers": args.layers, "designs": args.designs, "steps": args.steps, "queries": args.queries}
        needles = _needles(tokenizer, args.length, args.needles) if args.needles else ()
        rows = study(train, held_out, source=source, needles=needles, **options)
    except (ValueError, OSError) as error:  # NSAError is a ValueError
        print(f"selector_study: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "train", "eval", "source")}
    settings |= {"source": Path(source).name, "torch": torch.__version__}
    lines = ",\n".join(json.dumps(_rounded(row)) for row in rows)
    text = f'{{\n"settings": {json.dumps(settings)},\n"rows": [\n{lines}\n]\n}}\n'
    Path(args.output).write_text(text, encoding="utf-8")
    return 0


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())
