# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Compare designs of φ_K and what it learns from on a CPU, layer by layer, without a backward pass through the model.

`python conversion/selector_study.py OUTPUT.json --train FILE --eval FILE …` runs the dense model once over a few texts
and keeps the inputs of its attention layers. Every design is then trained in every layer alone, from the start that
conversion gives it, and measured on other texts: the share of the dense attention mass in the chosen blocks, and the
squared error of the layer's output, relative to the output of dense attention. Queries that repeat earlier text are
reported apart ("copy"): half of the texts have a passage written twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from nsa_conversion import NSAError, convert, load_model, smollm2_gguf
from nsa_conversion.data import PackedRows, encode_documents, read_files, repeat_passages
from nsa_conversion.diagnosis import block_mass
from nsa_conversion.distill import (
    LayerInput,
    choose_queries,
    dense_forward,
    layer_inputs,
    selector_losses,
    selector_modules,
)
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


@torch.no_grad()
def _measure(layer: LayerInput, positions: torch.Tensor) -> tuple[float, float, float]:
    """Mass of the chosen blocks and of the dense choice, and the relative squared error of the output."""
    attention, x, embeddings, layout, _ = layer
    config = attention.config
    rotate = attention._rotation(embeddings)
    q = rotate(attention._heads(x, attention.q_proj, attention.q_norm))[0]
    k_raw, v = attention._heads(x, attention.k_proj, attention.k_norm), attention._heads(x, attention.v_proj)
    k = rotate(k_raw)
    k_cmp, _ = attention._compress(attention._tails(k_raw, k, v), 0, layout.num_blocks, layout.block_embeddings)
    k, v = k[0], v[0]
    group, size = q.shape[1] // k.shape[1], config.select_block_size
    sizes = {name: getattr(config, name) for name in ("compress_block_size", "compress_stride", "select_block_size")}
    chosen_mass, best_mass, error, norm = [], [], 0.0, 0.0
    for position in positions.tolist():
        query = q[position][None]
        mass = block_mass(q[: position + 1], k, position, position + 1, size, attention.scaling)  # [1, HQ, S]
        end = config.compress_stride * torch.arange(k_cmp.shape[1]) + config.compress_block_size - 1
        known = k_cmp[:, end <= position].contiguous()
        scores = attention.scaling * torch.einsum("qhd,chd->hqc", query, known[0].repeat_interleave(group, dim=1))
        where = {"num_blocks": mass.shape[-1], "q_offset": position, "scale": attention.scaling}
        worth = importance(query[None], known, scores.logsumexp(-1).T[None], **where, **sizes)
        select = {"select_block_size": size, "q_offset": position, "num_selected_blocks": config.num_selected_blocks}
        select |= {name: getattr(config, name) for name in ("num_initial_blocks", "num_local_blocks")}
        s = attention.scaling * torch.einsum("hd,khd->hk", query[0], k[: position + 1].repeat_interleave(group, dim=1))
        values = v[: position + 1].repeat_interleave(group, dim=1)
        dense = torch.einsum("hk,khd->hd", s.softmax(-1), values)
        for scores_of, into in ((worth, chosen_mass), (mass.unflatten(1, (-1, group)).sum(2)[None], best_mass)):
            blocks = topn_blocks(scores_of, **select)[0, 0].long()  # [H, n]
            mask = torch.zeros(len(blocks), mass.shape[-1] + 1, dtype=torch.bool)
            mask.scatter_(1, torch.where(blocks < 0, mass.shape[-1], blocks), True)
            mask = mask[:, :-1].repeat_interleave(group, dim=0)
            into.append((mass[0] * mask).sum(-1).mean().item())
            if into is chosen_mass:
                read = mask.repeat_interleave(size, dim=1)[:, : position + 1]
                own = torch.einsum("hk,khd->hd", s.masked_fill(~read, float("-inf")).softmax(-1), values)
        change, whole = (F.linear(each.flatten(), attention.o_proj.weight) for each in (own - dense, dense))
        error, norm = error + change.square().sum().item(), norm + whole.square().sum().item()
    return float(np.mean(chosen_mass)), float(np.mean(best_mass)), error / norm


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

    Returns:
        One row per design, layer and kind of query: mass recall, that of the dense choice, relative squared error.
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
            known = {"train": _inputs(model, train), "eval": _inputs(model, held_out)}
        layouts = {"train": [_layout(model, ids[None]) for ids in train]}
        layouts["eval"] = [_layout(model, ids[None]) for ids in held_out]

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
        if progress:
            for kind in ("any", "copy"):
                of_kind = [row for row in rows if row["design"] == name and row["queries"] == kind]
                if of_kind:
                    recall, error = (float(np.mean([row[key] for row in of_kind])) for key in ("mass_recall", "error"))
                    seconds = time.monotonic() - start
                    print(f"{name}, {kind}: mass {recall:.4f}, error {error:.5f}, {seconds:.0f} s", flush=True)
    return rows


def _texts(path: str, tokenizer, length: int, count: int) -> list[torch.Tensor]:
    """The first long documents of a file; every second one with a repeated passage."""
    long = (document for document in read_files([path]) if len(document) > 2 * length)
    found = []
    with contextlib.suppress(StopIteration):
        while len(found) < count:
            (ids,) = encode_documents([next(long)[: 8 * length]], tokenizer, progress=False)
            if len(ids) >= length:
                found.append(ids[:length])
    if len(found) < count:
        raise NSAError(f"{path} has {len(found)} documents of {length:,} tokens, and {count} are wanted")
    repeated = repeat_passages(PackedRows([[ids] for ids in found[1::2]]), 1.0, 1).rows
    found[1::2] = [row[0] for row in repeated]
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
    args = parser.parse_args(argv)
    source = args.source or smollm2_gguf()
    try:
        _, tokenizer = load_model(source, dtype="float32", device="cpu")
        train, *held_out = (_texts(path, tokenizer, args.length, args.texts) for path in (args.train, *args.eval))
        held_out = [ids for texts in held_out for ids in texts]
        options = {"layers": args.layers, "designs": args.designs, "steps": args.steps, "queries": args.queries}
        rows = study(train, held_out, source=source, **options)
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
