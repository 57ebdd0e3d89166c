# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a model's sparse layers read in a text: one HTML page that needs no other file.

Shapes: T tokens, HQ query heads, H key/value heads, L sparse layers, S selectable blocks.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from pathlib import Path
from typing import BinaryIO

import torch

from nsa_kernels import compressed_attention, importance

from .data import builtin_text, read_text
from .diagnosis import _as_mask, _chunks, behind_layers, block_mass, is_sparse, query_key_value
from .errors import NSAError
from .evaluate import default_device
from .parsing import Parser
from .plots import plot_block_maps, plot_heatmaps, require_matplotlib
from .sources import load_model

__all__ = ["Inspection", "inspect_text", "main"]

_MAX_PANELS = 12
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66em; margin: 2em auto; padding: 0 1em; color: #222; }
h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
img { max-width: 100%; }
.text { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; border: 1px solid #ddd; padding: 1em; }
"""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What every sparse layer does with one text; lists run over sparse layers.

    Attributes:
        config: of the model.
        pieces: the text of each selectable block, S of them.
        layers: indices of the sparse layers.
        selected: share of the key/value heads that select a block, [T, S].
        gates: mean over the tokens of the gates (compressed, selected, window), [HQ, 3].
        importance: score that the selection goes by, as a share of the row, mean over heads, [T, S].
        mass: share of the dense attention mass, mean over heads, [T, S].
        kept: share of the dense attention mass inside the blocks that a head selects, mean over heads, [T].
    """

    config: object
    pieces: list[str]
    layers: list[int]
    selected: list[torch.Tensor]
    gates: list[torch.Tensor]
    importance: list[torch.Tensor]
    mass: list[torch.Tensor]
    kept: list[torch.Tensor]

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.selected[0])

    def masks(self, layer: int) -> dict[str, torch.Tensor]:
        """Share of each block's tokens that a query sees, by branch: [T, S] in [0, 1]; `layer` counts sparse layers."""
        config, size = self.config, self.config.select_block_size
        t, s = torch.arange(self.tokens)[:, None], torch.arange(len(self.pieces)) * size
        seen = (((t + 1) - config.compress_block_size) // config.compress_stride + 1).clamp(min=0)
        covered = torch.where(seen > 0, (seen - 1) * config.compress_stride + config.compress_block_size, 0)
        window = torch.minimum(t + 1, s + size) - torch.maximum(t + 1 - config.window_size, s)
        return {
            "compressed": ((covered - s) / size).clamp(0, 1),
            "selected": self.selected[layer] * ((t + 1 - s) / size).clamp(0, 1),
            "window": (window / size).clamp(0, 1),
        }

    def draw_masks(self, path: str | Path | BinaryIO, layer: int | None = None) -> None:
        """Draw `masks` as PNG into a file; by default of the sparse layer in the middle."""
        masks = self.masks(len(self.layers) // 2 if layer is None else layer)
        plot_block_maps(masks, path, block_size=self.config.select_block_size)

    def draw_selection(self, path: str | Path | BinaryIO) -> None:
        """Draw which blocks the layers choose, a dozen of them at most."""
        shown = sorted({round(i) for i in torch.linspace(0, len(self.layers) - 1, _MAX_PANELS).tolist()})
        panels = {f"layer {self.layers[i]}": self.selected[i] for i in shown}
        plot_block_maps(panels, path, block_size=self.config.select_block_size)

    def draw_importance(self, path: str | Path | BinaryIO) -> None:
        """Draw square roots of importance and dense attention mass in the first, the middle and the last layer."""
        panels = {
            f"layer {self.layers[i]}, {name}": rows[i].sqrt()
            for i in sorted({0, len(self.layers) // 2, len(self.layers) - 1})
            for name, rows in (("importance", self.importance), ("dense mass", self.mass))
        }
        plot_block_maps(panels, path, block_size=self.config.select_block_size, columns=2)

    def draw_gates(self, path: str | Path | BinaryIO) -> None:
        """Draw the mean gates by layer and head."""
        gates = {
            name: [layer[:, branch].tolist() for layer in self.gates]
            for branch, name in enumerate(("compressed", "selected", "window"))
        }
        plot_heatmaps(gates, path, x_label="query head", y_label="sparse layer")

    def draw_query(self, path: str | Path | BinaryIO, token: int = -1) -> None:
        """Draw which blocks one query reads in every layer, beside the dense attention mass (square roots)."""
        panels = {
            "share of the key/value heads that select it": torch.stack([rows[token] for rows in self.selected]),
            "dense attention mass, square root": torch.stack([rows[token] for rows in self.mass]).sqrt(),
        }
        panels = {name: rows.tolist() for name, rows in panels.items()}
        plot_heatmaps(panels, path, x_label="block", y_label="sparse layer", limits=(0, 1))

    def html(self, title: str) -> str:
        """The page."""
        reach = self.config.num_selected_blocks * self.config.select_block_size
        middle = self.layers[len(self.layers) // 2]
        parts = [
            f"<p>{self.tokens:,} tokens in {len(self.pieces):,} blocks of {self.config.select_block_size}, "
            f"{len(self.layers)} sparse layers. Up to {reach:,} tokens the selection holds every block.</p>",
            f"<h2>The three masks</h2><p>What each branch lets a query see in layer {middle}: share of a "
            "block's tokens, for the selected branch times the share of key/value heads that select the block.</p>",
            _figure(self.draw_masks),
            "<h2>Which blocks each layer chooses</h2><p>Share of the key/value heads that select a block.</p>",
            _figure(self.draw_selection),
            "<h2>Importance and dense attention</h2><p>What the selection goes by, beside the attention mass that a "
            "dense layer would give: share of the row, mean over heads, square roots for contrast.</p>",
            _figure(self.draw_importance),
            "<h2>Gates</h2><p>Mean over the tokens.</p>",
            _figure(self.draw_gates),
            "<h2>What the last token reads</h2><p>The darker a block, the more layers and heads select it.</p>",
            self._last_token(),
            _figure(self.draw_query),
        ]
        head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
        return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'

    def _last_token(self):
        shares = torch.stack([selected[-1] for selected in self.selected]).mean(0).tolist()
        spans = [
            f'<span title="block {i}: {share:.0%}" style="background: rgba(33, 113, 181, {share:.2f})">'
            f"{html.escape(piece)}</span>"
            for i, (piece, share) in enumerate(zip(self.pieces, shares))
        ]
        return f'<div class="text">{"".join(spans)}</div>'


def _figure(draw):
    png = io.BytesIO()
    draw(png)
    return f'<p><img src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}" alt=""></p>'


@torch.no_grad()
def inspect_text(model, tokenizer, text: str, *, length: int | None = None) -> Inspection:
    """Run a model on a text and record what its sparse layers read.

    Args:
        model: a causal language model with sparse layers.
        tokenizer: its tokenizer.
        text: to be read from its start.
        length: tokens; default: twice n·l', or what the text has.

    Raises:
        NSAError: the model has no sparse layers, or the text is too short.
    """
    if not is_sparse(model):
        raise NSAError(f"nothing to inspect: this {type(model).__name__} has no layers of native sparse attention")
    config = model.config
    if length is not None and length < 1:
        raise NSAError(f"length must be at least 1 token, got {length}")
    length = length or 2 * config.num_selected_blocks * config.select_block_size
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :length].to(model.device)
    if ids.shape[1] < config.compress_block_size:
        raise NSAError(f"the text has {ids.shape[1]} tokens; at least {config.compress_block_size} are needed")
    found = {name: {} for name in ("selected", "gates", "importance", "mass", "kept")}
    blocks = -(-ids.shape[1] // config.select_block_size)

    def record(layer, attention, kwargs, outputs):
        _, _, chosen, gates = outputs
        q, k, _ = query_key_value(attention, kwargs["hidden_states"], kwargs["position_embeddings"])
        chosen = _as_mask(chosen[0], blocks)
        found["selected"][layer] = chosen.float().mean(1).cpu()
        found["gates"][layer] = gates[0].float().mean(0).cpu()
        scores = _importance(attention, q, blocks, **kwargs)
        found["importance"][layer] = (scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)).mean(1).cpu()
        mass, kept = torch.zeros(ids.shape[1], blocks), torch.zeros(ids.shape[1])
        of_query_heads = chosen.repeat_interleave(q.shape[2] // chosen.shape[1], dim=1)
        for start, stop in _chunks(0, ids.shape[1], q.shape[2] * ids.shape[1]):
            part = block_mass(q[0], k[0], start, stop, config.select_block_size, attention.scaling)  # [c, HQ, S]
            mass[start:stop, : part.shape[2]] = part.mean(1).cpu()
            kept[start:stop] = (part * of_query_heads[start:stop, :, : part.shape[2]]).sum(-1).mean(1).cpu()
        found["mass"][layer], found["kept"][layer] = mass, kept

    with behind_layers(model, record):
        model.get_decoder()(ids, use_cache=False)
    pieces = [tokenizer.decode(piece) for piece in ids[0].split(config.select_block_size)]
    return Inspection(config, pieces, list(found["selected"]), *(list(rows.values()) for rows in found.values()))


def _importance(attention, q, blocks, hidden_states, position_embeddings, layout, **kwargs):
    """Scores that the selection goes by, [T, H, S]: eq. 8-10 over the compressed keys."""
    config, rotate = attention.config, attention._rotation(position_embeddings)
    if config.shared_kv:
        k = attention._heads(hidden_states, attention.k_proj, attention.k_norm)
        v = attention._heads(hidden_states, attention.v_proj)
    else:
        k, v = attention._branch(hidden_states, "cmp")
    tails = attention._tails(k, rotate(k), v)
    k_cmp, v_cmp = attention._compress(tails, layout.first_slot(0), layout.num_blocks, layout.block_embeddings)
    sizes = {"compress_block_size": config.compress_block_size, "compress_stride": config.compress_stride}
    settings = {**sizes, "scale": attention.scaling, "backend": "reference"}
    lse = compressed_attention(q, k_cmp, v_cmp, **settings)[1]
    settings |= {"num_blocks": blocks, "select_block_size": config.select_block_size}
    return importance(q, k_cmp, lse, **settings)[0].float()


def _parser() -> Parser:
    parser = Parser(
        prog="nsa inspect",
        description="Draw what a model's sparse layers read in a text: masks, chosen blocks, gates, importance.",
    )
    parser.add_argument("model", metavar="MODEL", help="a directory or hub id")
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 text (default: a built-in technical text)")
    parser.add_argument("--output", metavar="FILE", default="inspect.html", help="the page (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that is there")
    parser.add_argument("--length", type=int, help="tokens (default: twice what the selection holds)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the first accelerator, else cpu)")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow code in the checkpoint to run")
    return parser


def main(argv: list[str]) -> int:
    """Command line of `nsa inspect`.

    Args:
        argv: arguments after `nsa inspect`.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(argv)
    output = Path(args.output)
    if output.is_dir():
        raise NSAError(f"--output {output} is a directory; name a file in it")
    if output.exists() and not args.overwrite:
        raise NSAError(f"--output {output} exists; choose another file or add --overwrite")
    if not output.absolute().parent.is_dir():
        raise NSAError(f"--output {output}: the directory {output.absolute().parent} does not exist")
    require_matplotlib()
    text = builtin_text() if args.text is None else read_text(args.text)
    model, tokenizer = load_model(
        args.model, dtype=args.dtype, device=args.device or default_device(), trust_remote_code=args.trust_remote_code
    )
    if tokenizer is None:
        raise NSAError(f"{args.model} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    found = inspect_text(model, tokenizer, text, length=args.length)
    output.write_text(found.html(f"What {Path(args.model).name} reads"), encoding="utf-8")
    print(f"wrote {output}: {found.tokens:,} tokens, {len(found.layers)} sparse layers")
    return 0
