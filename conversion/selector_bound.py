# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What an untrained conversion loses with the compressed keys that it starts from, and how far other keys could help.

`python conversion/selector_bound.py OUTPUT.json` converts a dense model, and measures its loss above the dense one's on
slices of a text, at positions where blocks are left out, with blocks scored in four ways:

- mean: by the mean of a compression block's keys, which φ_K is before training;
- tokens: by every token of it, the log of the mean of exp(q·k): nothing is compressed;
- fitted: by one key per block, fitted to the scores of "tokens" over all queries of the slice, weighed by the share
  that a query gives to the block. No φ_K knows the queries: this is about what one key can say at most;
- linear: by a linear map of the mean, fitted on every second slice to the keys of "fitted" there. What it brings on the
  other slices is what can be told from the mean key alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from nsa_conversion import NSAError, convert, load_model, smollm2_gguf
from nsa_conversion.data import builtin_text
from nsa_conversion.diagnosis import choose_blocks, forced_blocks
from nsa_conversion.loss import take_slices, token_losses
from nsa_kernels.reference import fold_importance

__all__ = ["main", "measure"]

# Part of the mean eigenvalue that is added before a least-squares problem is solved: of a block's key, of a map.
KEY_RIDGE, MAP_RIDGE = 0.1, 0.1
QUERIES = 512  # at once


class _Scorer:
    """Chooses blocks by one of the ways, for `forced_blocks`; learns the linear maps while it is "fitted"."""

    def __init__(self):
        self.way = "mean"
        self.learns = False
        self.sums: dict[tuple[int, int], list[torch.Tensor]] = {}  # (layer, head): XᵀX, Xᵀy over blocks

    def __call__(self, attention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """q [T, HQ, D], k [T, H, D] -> int32 [T, H, n]."""
        config, heads = attention.config, k.shape[1]
        q, k = q.float().unflatten(1, (heads, -1)), k.float()
        p = torch.stack([self._shares(attention, q[:, head], k[:, head], head) for head in range(heads)], dim=1)
        sizes = {"compress_block_size", "compress_stride", "select_block_size"}
        blocks = -(-len(q) // config.select_block_size)
        imp = fold_importance(p[None], num_blocks=blocks, **{name: getattr(config, name) for name in sizes})
        return choose_blocks(imp[0], config)

    def _shares(self, attention, q, k, head) -> torch.Tensor:
        """Softmax over the compressed blocks, summed over the group: q [T, G, D], k [T, D] -> [T, C]."""
        config, scale = attention.config, attention.scaling
        size, stride = config.compress_block_size, config.compress_stride
        mean = k.unfold(0, size, stride).mean(-1)  # [C, D]
        last = torch.arange(len(mean), device=q.device) * stride + size - 1
        future = (last > torch.arange(len(q), device=q.device)[:, None])[:, None]  # [T, 1, C]
        if self.way in ("tokens", "fitted"):
            scores = torch.cat([_token_scores(part, k, size, stride, scale) for part in q.split(QUERIES)])
        if self.way == "fitted":
            change = _fit_keys(q * scale, scores, future, mean)
            if self.learns:
                self._learn((attention.layer_idx, head), mean, change)
            mean = mean + change
        elif self.way == "linear":
            mean = mean + _with_one(mean) @ self._map(attention.layer_idx, head)
        if self.way != "tokens":
            scores = scale * q @ mean.T
        return scores.masked_fill(future, float("-inf")).softmax(-1).nan_to_num(0.0).sum(1)

    def _learn(self, where, mean, change) -> None:
        x = _with_one(mean).double()
        sums = self.sums.setdefault(where, [0, 0])
        sums[0], sums[1] = sums[0] + x.T @ x, sums[1] + x.T @ change.double()

    def _map(self, layer, head) -> torch.Tensor:
        return _solve(*self.sums[layer, head], MAP_RIDGE).float()


def _token_scores(q, k, size, stride, scale) -> torch.Tensor:
    """log mean exp of the scores of a block's tokens: q [c, G, D], k [T, D] -> [c, G, C]."""
    scores = scale * q @ k.T
    highest = scores.amax(-1, keepdim=True)
    return F.avg_pool1d((scores - highest).exp(), size, stride).clamp(min=1e-36).log() + highest


def _fit_keys(q, scores, future, mean) -> torch.Tensor:
    """What to add to every block's mean key [C, D], so that q·key is near `scores` for the queries that read the block.

    q [T, G, D], scaled; scores [T, G, C]; future [T, 1, C].
    """
    weights = scores.masked_fill(future, float("-inf")).softmax(-1).nan_to_num(0.0).flatten(0, 1)  # [T·G, C]
    missed = (scores - q @ mean.T).flatten(0, 1)
    q = q.flatten(0, 1)
    squares = torch.stack([(q * weight[:, None]).T @ q for weight in weights.T])  # [C, D, D]
    return _solve(squares, ((weights * missed).T @ q)[..., None], KEY_RIDGE)[..., 0]


def _with_one(x):
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def _solve(squares, products, ridge):
    """Ridge regression from XᵀX and Xᵀy; a block that nobody reads keeps zero."""
    mean = squares.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(squares.shape[-1], device=squares.device, dtype=squares.dtype)
    return torch.linalg.solve(squares + (ridge * mean + 1e-6) * eye, products)


def measure(
    dense, sparse, slices: torch.Tensor, positions: Sequence[tuple[int, int]], progress: bool = True
) -> list[dict[str, Any]]:
    """Loss above the dense model's, slice by slice.

    Args:
        dense, sparse: causal language models, the second converted from the first.
        slices: [N, T] token ids, N >= 2.
        positions: ranges (first, end) of positions.
        progress: show a progress bar.

    Returns:
        one row for each way of scoring and range of positions: way, start, end, slices, mean, and by_slice, None where
        a slice was used to learn the linear map.
    """
    device, odd = sparse.device, list(range(1, len(slices), 2))
    scorer, rows = _Scorer(), []
    bar = tqdm(total=4 * len(slices) + len(odd), desc="Slices", disable=not progress)

    def losses(model, index):
        bar.update()
        return token_losses(model, slices[index : index + 1].to(device))[0]

    reference = [losses(dense, index) for index in range(len(slices))]
    with forced_blocks(sparse, scorer):
        for way in ("mean", "tokens", "fitted", "linear"):
            scorer.way = way
            chosen = odd if way == "linear" else range(len(slices))
            found: dict[int, torch.Tensor] = {}
            for index in chosen:
                scorer.learns = index not in odd
                found[index] = losses(sparse, index) - reference[index]
            for start, end in positions:
                by_slice = [
                    found[index][max(start - 1, 0) : end - 1].mean().item() if index in found else None
                    for index in range(len(slices))
                ]
                values = [value for value in by_slice if value is not None]
                row = {"way": way, "start": start, "end": end, "slices": len(values)}
                rows.append({**row, "mean": sum(values) / len(values), "by_slice": by_slice})
    bar.close()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("output", metavar="OUTPUT.json")
    add("--source", help="the dense model (default: SmolLM2-135M-Instruct)")
    add("--text-file", metavar="FILE", help="plain text (default: the built-in text)")
    add("--length", type=int, default=4096, help="tokens per slice (default: %(default)s)")
    add("--slices", type=int, default=27, help="at most (default: %(default)s, all of the built-in text)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args(argv)
    source, start = args.source or smollm2_gguf(), time.time()
    try:
        dense, tokenizer = load_model(source, dtype="float32", device=args.device)
        text = Path(args.text_file).read_text(encoding="utf-8") if args.text_file else builtin_text()
        slices = take_slices(tokenizer(text, return_tensors="pt").input_ids[0], args.length, args.slices)
        if len(slices) < 2:
            raise NSAError(f"the text must hold two slices of --length {args.length} tokens; give a longer one")
        with tempfile.TemporaryDirectory() as folder:
            convert(source, Path(folder) / "sparse", progress=False)
            sparse, _ = load_model(Path(folder) / "sparse", dtype="float32", device=args.device)
        first = sparse.config.num_selected_blocks * sparse.config.select_block_size
        if first >= args.length:
            raise NSAError(f"--length must be more than n·l' = {first} tokens, got {args.length}")
        bounds = [first]
        while bounds[-1] < args.length:
            bounds.append(min(2 * bounds[-1], args.length))
        rows = measure(dense, sparse, slices, list(itertools.pairwise(bounds)))
    except (ValueError, OSError) as error:  # NSAError is a ValueError
        print(f"selector_bound: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    settings = {"source": Path(source).name, "length": args.length, "device": device, "torch": torch.__version__}
    settings |= {"minutes": round((time.time() - start) / 60, 1)}
    lines = ",\n".join(json.dumps(row) for row in _rounded(rows))
    Path(args.output).write_text(
        f'{{\n"settings": {json.dumps(settings)},\n"rows": [\n{lines}\n]\n}}\n', encoding="utf-8"
    )
    for row in rows:
        print(f"{row['way']:8s} {row['start']:6,d}-{row['end'] - 1:,d}  {row['mean']:+.4f}  ({row['slices']} slices)")
    return 0


def _rounded(rows):
    def short(value):
        return None if value is None else round(value, 5)

    return [{**row, "mean": short(row["mean"]), "by_slice": list(map(short, row["by_slice"]))} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
