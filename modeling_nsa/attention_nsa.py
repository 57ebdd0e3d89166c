# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Attention layers: native sparse attention, and the full and sliding attention that it is mixed with.

Shapes: B batch, T new tokens, TK tokens seen, HQ query heads, H key/value heads, D and DV head dims, NC new blocks,
l compress_block_size. Inside a sparse layer tensors are `[B, T, H, D]`; cache layers hold `[B, H, T, D]`.
"""

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from nsa_kernels import (
    MAX_DECODE_QUERIES,
    append_tokens,
    compress_mean,
    compress_mlp,
    compress_pool,
    nsa_attention,
    resolve_backend,
    rotate,
)

from .cache_nsa import NSACacheInput
from .configuration_nsa import NSAConfig
from .fusion_nsa import fuse_linears, fused_linear
from .layout_nsa import NSALayout

__all__ = [
    "NSAAttention",
    "NSACompression",
    "NSADenseAttention",
    "NSAGate",
    "NSAGateScale",
    "init_nsa_parameters",
    "make_norm",
    "split_ropes",
]


def make_norm(config: NSAConfig, size: int) -> nn.Module:
    """RMSNorm of the decoder's type."""
    return (Gemma3RMSNorm if config.decoder_type == "gemma3" else LlamaRMSNorm)(size, eps=config.rms_norm_eps)


def split_ropes(embeddings, head_dim: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """cos and sin of each RoPE in the order of `config.rope_thetas`; they lie side by side in `embeddings`."""
    return list(zip(*(x.split(head_dim, dim=-1) for x in embeddings)))


def _unrotate(x, cos, sin, backend):
    """Inverse of `rotate`; cos and sin may carry a common factor, the attention scaling of YaRN and kin."""
    return rotate(x, cos, -sin, backend=backend) / (cos.square() + sin.square()).unsqueeze(-2)


class NSACompression(nn.Module):
    """φ (eq. 7): pools each block of l keys or values into one, alike for every head.

    "mean": mean of the rotated keys; "mlp": MLP over the keys before RoPE, rotated to the block's mean position;
    "residual_mlp": the sum of both; "pool": a mean of the rotated keys whose weights are a softmax over the block of a
    score made from each key, plus a linear map of it in the frame of the block's mean position. Values have no RoPE.
    """

    def __init__(self, config: NSAConfig, head_dim: int):
        super().__init__()
        self.config = config
        self.compress_type = config.compress_type
        self.sizes = {
            "compress_block_size": config.compress_block_size,
            "compress_stride": config.compress_stride,
        }
        hidden = config.compress_hidden_size or 2 * config.head_dim
        if self.compress_type == "pool":
            self.pos_bias = nn.Parameter(torch.empty(config.compress_block_size))
            self.w1 = nn.Parameter(torch.empty(hidden, head_dim))
            self.b1 = nn.Parameter(torch.empty(hidden))
            self.w2 = nn.Parameter(torch.empty(hidden))
            self.linear = nn.Parameter(torch.empty(head_dim, head_dim))
        elif self.compress_type != "mean":
            self.pos_embed = nn.Parameter(torch.empty(config.compress_block_size, head_dim))
            self.w1 = nn.Parameter(torch.empty(hidden, config.compress_block_size * head_dim))
            self.b1 = nn.Parameter(torch.empty(hidden))
            self.w2 = nn.Parameter(torch.empty(head_dim, hidden))
            self.b2 = nn.Parameter(torch.empty(head_dim))

    def weights(self) -> list[torch.Tensor]:
        """Parameters of φ, as `nsa_kernels.append_tokens` takes them."""
        if self.compress_type == "mean":
            return []
        if self.compress_type == "pool":
            return [self.pos_bias, self.w1, self.b1, self.w2, self.linear]
        return [self.pos_embed, self.w1, self.b1, self.w2, self.b2]

    def forward(self, x, x_rotated, embeddings=None, first_slot=0, num_blocks=None, cu_seqlens=None):
        """
        Args:
            x: `[B, T, H, D]` before RoPE (packed: `[T, H, D]`); not read by "mean".
            x_rotated: The same after RoPE; not read by "mlp".
            embeddings: cos and sin at the blocks' mean positions, `[B or 1, NC, D]` (packed: `[NC, D]`), or None.
            first_slot, num_blocks, cu_seqlens: See `nsa_kernels.compress_mean`.

        Returns:
            `[B, NC, H, D]` (packed: `[NC, H, D]`).
        """
        where = {"first_slot": first_slot, "num_blocks": num_blocks, "cu_seqlens": cu_seqlens, **self.sizes}
        where["backend"] = backend = self.config.nsa_backend
        if self.compress_type == "mean":
            return compress_mean(x_rotated, **where)
        if self.compress_type == "pool":
            out = compress_pool(x, x_rotated, self.pos_bias, self.w1, self.b1, self.w2, **where)
            if embeddings is None:
                return out + F.linear(out, self.linear).to(out.dtype)
            change = F.linear(_unrotate(out, *embeddings, backend).to(out.dtype), self.linear)
            return out + rotate(change, *embeddings, backend=backend).to(out.dtype)
        out = compress_mlp(x, self.pos_embed, self.w1, self.b1, self.w2, self.b2, **where)
        if embeddings is not None:
            out = rotate(out, *embeddings, backend=backend)
        return out if self.compress_type == "mlp" else compress_mean(x_rotated, **where) + out


class NSAGate(nn.Module):
    """One gate per query head and branch: `sigmoid(MLP(x))`, order cmp, slc, win."""

    def __init__(self, config: NSAConfig):
        super().__init__()
        hidden = config.gate_hidden_size or 2 * config.head_dim
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.act_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden, 3 * config.num_attention_heads)
        self.fc2.starts_at_zero = True

    def forward(self, hidden_states, hidden=None):
        """`[B, T, hidden_size]` to `[B, T, HQ, 3]`; `hidden` is `fc1(hidden_states)` where that is known."""
        hidden = self.fc1(hidden_states) if hidden is None else hidden
        return torch.sigmoid(self.fc2(self.act_fn(hidden))).unflatten(-1, (-1, 3))


class NSAGateScale(nn.Module):
    """Scale of the gates per key/value head and branch, `s = (0, 2, 0) + 64 · bias`: selection alone at the start.

    The factor lets AdamW open the branches at fine-tuning rates. Trainer exempts parameters named `bias` from weight
    decay.
    """

    start = (0.0, 2.0, 0.0)
    step = 64.0

    def __init__(self, config: NSAConfig):
        super().__init__()
        self.out_features = 3 * config.num_key_value_heads
        self.bias = nn.Parameter(torch.empty(self.out_features))

    def forward(self, hidden_states):
        """δ, `[1, 1, 3 · H]`; tensor parallelism wants an input, and shards the last dim of the output."""
        return self.bias.view(1, 1, -1)

    @classmethod
    def scale(cls, gates, delta):
        """Scale gates `[B, T, HQ, 3]` by δ."""
        scale = cls.step * delta.float().unflatten(-1, (-1, 3))  # [1, 1, H, 3]
        branch = torch.arange(len(cls.start), device=scale.device)
        scale = scale + sum(start * (branch == i) for i, start in enumerate(cls.start))
        return gates * scale.repeat_interleave(gates.shape[-2] // scale.shape[-2], dim=-2).to(gates.dtype)


class NSADenseAttention(nn.Module):
    """Full or sliding causal attention through `attn_implementation`; in sparse layers, the selection's projections."""

    fused = False

    def __init__(self, config: NSAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.v_head_dim = config.v_head_dim or config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = (config.query_pre_attn_scalar or self.head_dim) ** -0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.use_rope = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])
        self.rope_index = config.rope_thetas.index(config.layer_rope_theta[layer_idx]) if config.layer_rope_theta else 0
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

        self.q_proj = nn.Linear(
            config.hidden_size, config.num_attention_heads * self.head_dim, bias=config.attention_bias
        )
        self.k_proj, self.v_proj = self._key_value_projections(config)
        self.o_proj = nn.Linear(
            config.num_attention_heads * self.v_head_dim, config.hidden_size, bias=config.attention_output_bias
        )
        self.q_norm = self._head_norm(config)
        self.k_norm = self._head_norm(config)

    def _key_value_projections(self, config):
        heads, bias = config.num_key_value_heads, config.attention_bias
        return (
            nn.Linear(config.hidden_size, heads * self.head_dim, bias=bias),
            nn.Linear(config.hidden_size, heads * self.v_head_dim, bias=bias),
        )

    def _head_norm(self, config):
        return make_norm(config, self.head_dim) if config.use_qk_norm else nn.Identity()

    def fuse(self) -> bool:
        """Lay the weights of the projections into one tensor, see `NSAPreTrainedModel.fuse_projections`.

        Returns:
            Whether that can be done.
        """
        done = fuse_linears(self._linears())
        self.fused |= done
        return done

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.fused:  # every parameter may have a tensor of its own now
            self.fuse()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.fused:  # a deep copy gives every parameter a tensor of its own
            self.fuse()

    def _projections(self) -> dict[str, nn.Module]:
        """What makes queries, keys and values of the layer's input."""
        return {"q_proj": self.q_proj, "k_proj": self.k_proj, "v_proj": self.v_proj}

    def _linears(self) -> dict[str, nn.Module]:
        """All that can be one product."""
        return self._projections()

    def _project(self, x) -> dict[str, torch.Tensor]:
        """Projections of `[B, T, hidden_size]` by name, where the layer is fused those of `_linears`.

        One product pays while reading weights takes longer than computing; of a prompt, a cache would hold all of it.
        """
        fused = None
        if (
            self.fused
            and x.shape[1] <= MAX_DECODE_QUERIES
            and not (torch.is_grad_enabled() or x.is_meta or torch.is_autocast_enabled(x.device.type))
        ):
            fused = fused_linear(x, self._linears())
        return fused or {name: projection(x) for name, projection in self._projections().items()}

    def _heads(self, x, projection, norm=None):
        """`[B, T, hidden_size]` to `[B, T, heads, head dim]`."""
        return self._split_heads(projection(x), norm)

    def _split_heads(self, x, norm=None):
        x = x.unflatten(-1, (-1, self.v_head_dim if norm is None else self.head_dim))
        return x if norm is None else norm(x)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        layout: NSALayout | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As transformers' attention layers; `layout` is for the sparse ones."""
        projected = self._project(hidden_states)
        query = self._split_heads(projected["q_proj"], self.q_norm).transpose(1, 2)
        key = self._split_heads(projected["k_proj"], self.k_norm).transpose(1, 2)
        value = self._split_heads(projected["v_proj"]).transpose(1, 2)
        if self.use_rope:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layout is not None and layout.parallel is not None:
            attn_output = layout.parallel.dense_attention(
                query, key, value, scaling=self.scaling, window=self.sliding_window,
                dropout=self.attention_dropout if self.training else 0.0,
            )  # fmt: skip
            return self.o_proj(attn_output.flatten(2)), None
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(attn_output.flatten(2).contiguous()), attn_weights


class NSAAttention(NSADenseAttention):
    """Native sparse attention (eq. 5): compression, selection and window branches over gated outputs.

    Each branch has its own key and value projections and key norm, or all use one with `shared_kv`.
    """

    def __init__(self, config: NSAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if not config.shared_kv:
            self.k_proj_cmp, self.v_proj_cmp = self._key_value_projections(config)
            self.k_proj_win, self.v_proj_win = self._key_value_projections(config)
            self.k_norm_cmp, self.k_norm_win = self._head_norm(config), self._head_norm(config)
        self.compress_k = NSACompression(config, self.head_dim)
        self.compress_v = NSACompression(config, self.v_head_dim)
        self.gate = NSAGate(config)
        self.gate_scale = NSAGateScale(config) if config.gate_scale else None

    def _projections(self):
        projections = super()._projections()
        if not self.config.shared_kv:
            names = ("k_proj_cmp", "v_proj_cmp", "k_proj_win", "v_proj_win")
            projections |= {name: getattr(self, name) for name in names}
        return projections

    def _linears(self):
        linears = self._projections()
        if type(self.gate) is NSAGate:  # not wrapped by an adapter
            linears["gate.fc1"] = self.gate.fc1
        return linears

    def _branch(self, x, branch):
        """Keys (before RoPE) and values of a branch other than selection."""
        k_proj, v_proj = getattr(self, f"k_proj_{branch}"), getattr(self, f"v_proj_{branch}")
        return self._heads(x, k_proj, getattr(self, f"k_norm_{branch}")), self._heads(x, v_proj)

    def _compress(self, tails, first_slot, num_blocks, embeddings, cu_seqlens=None):
        """φ over tensors of `_tails`, `[B, T, H, D]` or packed; returns k_cmp and v_cmp alike."""
        embeddings = split_ropes(embeddings, self.head_dim)[self.rope_index] if self.use_rope else None
        where = {"first_slot": first_slot, "num_blocks": num_blocks, "cu_seqlens": cu_seqlens}
        k_cmp = self.compress_k(tails.get("k_tail"), tails.get("k_tail_rot"), embeddings, **where)
        return k_cmp, self.compress_v(tails["v_tail"], tails["v_tail"], **where)

    def _tails(self, k, k_rotated, v):
        """What φ reads, by the names of the cache."""
        tails = {"v_tail": v}
        if self.config.compress_type != "mean":
            tails["k_tail"] = k
        if self.config.compress_type != "mlp":
            tails["k_tail_rot"] = k_rotated
        return tails

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        layout: NSALayout | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `[B, T, hidden_size]`.
            position_embeddings: cos and sin, `[B or 1, T, D]`.
            attention_mask: Unused; padding and packing are in `layout`.
            layout: See `build_layout`.

        Returns:
            Output `[B, T, hidden_size]`; with `output_attentions` the probabilities of the selection branch
            `[B, HQ, T, TK]`, else None; the chosen blocks, int32 `[B, T, H, n]`; the gates `[B, T, HQ, 3]`.
        """
        shape = hidden_states.shape[:2]
        if layout.order is not None:
            hidden_states, *position_embeddings = (
                _gather_tokens(x.expand(shape[0], -1, -1), layout.order) for x in (hidden_states, *position_embeddings)
            )
        projected = self._project(hidden_states)
        q = self._split_heads(projected["q_proj"], self.q_norm)
        k, v = self._split_heads(projected["k_proj"], self.k_norm), self._split_heads(projected["v_proj"])
        new = {"k": k, "v": v}
        if not self.config.shared_kv:
            for branch in ("cmp", "win"):
                norm = getattr(self, f"k_norm_{branch}")
                new[f"k_{branch}"] = self._split_heads(projected[f"k_proj_{branch}"], norm)
                new[f"v_{branch}"] = self._split_heads(projected[f"v_proj_{branch}"])
        gates = self.gate(hidden_states, projected.get("gate.fc1"))
        if self.gate_scale is not None:
            gates = NSAGateScale.scale(gates, self.gate_scale(hidden_states))

        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        # any gradient makes the backward pass keep keys and values
        learns = torch.is_grad_enabled() and any(
            x.requires_grad for x in (q, gates, *new.values(), *self.compress_k.weights(), *self.compress_v.weights())
        )
        if not learns and self._appends(layer, layout, q, new):
            q, keys, values = self._append(layer, layout, q, new, position_embeddings)
        else:
            turn = self._rotation(position_embeddings)
            q, k = turn(q), turn(new["k"])
            if self.config.shared_kv:
                tails, k_win, v_win = self._tails(new["k"], k, v), k, v
            else:
                k_cmp = new["k_cmp"]
                k_rotated = turn(k_cmp) if self.config.compress_type != "mlp" else None
                tails, k_win, v_win = self._tails(k_cmp, k_rotated, new["v_cmp"]), turn(new["k_win"]), new["v_win"]
            if layout.parallel is not None:
                output, block_indices = self._attend_in_parallel(layout.parallel, q, k, v, tails, k_win, v_win, gates)
                return self.o_proj(output.flatten(2)), None, block_indices, gates
            if layer is not None:
                where = layout.cache or layout
                keys, values = self._update(past_key_values, where, k, v, tails, k_win, v_win, learns)

        window_ring = False
        if layer is not None:
            (k_cmp, v_cmp) = keys[1], values[1]
            if layout.cache is None:
                (k, _, k_win), (v, _, v_win) = keys, values
                window_ring = layer.window_ring
        cu_seqlens = layout.cu_seqlens
        tensors = (q, k, v, k_win, v_win, *gates.unbind(-1))
        if cu_seqlens is not None:
            tensors = tuple(x.flatten(0, 1) for x in tensors)
            tails = {name: x.flatten(0, 1) for name, x in tails.items()}
        if past_key_values is None:
            first_slot = layout.first_slot(0) if cu_seqlens is None else 0
            num_blocks = layout.num_blocks if cu_seqlens is None else None
            k_cmp, v_cmp = self._compress(tails, first_slot, num_blocks, layout.block_embeddings, cu_seqlens)

        output_attentions = kwargs.get("output_attentions")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        q, k, v, k_win, v_win, *gate_tensors = tensors
        output, block_indices, weights = self._nsa_attention(
            q, k, v, k_cmp, v_cmp, k_win, v_win, *gate_tensors,
            leftpad=layout.leftpad,
            q_offset=layout.past_length,
            cu_seqlens=cu_seqlens,
            return_weights=bool(output_attentions) and cu_seqlens is None,
            window_ring=window_ring,
        )  # fmt: skip
        output = output.reshape(*shape, -1)
        if layout.real is not None:  # padding gives 0, wherever it lies
            output = output.masked_fill(~layout.real[..., None], 0.0)
        output = self.o_proj(output)
        block_indices = block_indices.view(*shape, *block_indices.shape[-2:])
        if layout.order is not None:
            back = layout.order.argsort(dim=1)
            output, block_indices, gates = (_gather_tokens(x, back) for x in (output, block_indices, gates))
            weights = None if weights is None else _gather_tokens(weights.transpose(1, 2), back).transpose(1, 2)
        return output, weights, block_indices, gates

    def _appends(self, layer, layout, q, new):
        """Whether kernels, which have no gradients, put the tokens into the cache: few, into a static one begun."""
        if layout.slots is None or not layer.is_compileable or not layer.is_initialized:
            return False
        tensors = (q, *new.values(), *self.compress_k.weights(), *self.compress_v.weights())
        # under autocast dtypes differ, and offloaded weights lie elsewhere
        held = (x for name, x in layer.states().items() if name != "length")
        if len({(x.dtype, x.device) for x in (*tensors, *held)}) > 1:
            return False
        return resolve_backend(self.config.nsa_backend, q) == "triton"

    def _append(self, layer, layout, q, new, position_embeddings):
        """Put new tokens and the blocks that they complete into a static cache layer; rotated q, then as `_update`."""
        rope = {"embeddings": None, "block_embeddings": None}
        if self.use_rope:
            rope["embeddings"] = position_embeddings
            rope["block_embeddings"] = split_ropes(layout.block_embeddings, self.head_dim)[self.rope_index]
        q = append_tokens(
            q, new, layer.states(), self.compress_k.weights(), self.compress_v.weights(), slots=layout.slots,
            leftpad=layout.leftpad, compress_type=self.config.compress_type, **self.compress_k.sizes, **rope,
            backend=self.config.nsa_backend,
        )  # fmt: skip
        keys, values = layer.held()
        return q, tuple(x.transpose(1, 2) for x in keys), tuple(x.transpose(1, 2) for x in values)

    def _nsa_attention(self, q, k, v, k_cmp, v_cmp, k_win, v_win, *gates, **where):
        settings = {"scale": self.scaling, "backend": self.config.nsa_backend}
        # under autocast RoPE and norms leave queries and keys in fp32
        tensors = (x.to(v.dtype) for x in (q, k, v, k_cmp, v_cmp, k_win, v_win))
        return nsa_attention(*tensors, *gates, **self.config.block_sizes, **settings, **where)

    def _attend_in_parallel(self, parallel, q, k, v, tails, k_win, v_win, gates):
        """This process's part of the attention, from tensors of its own tokens `[1, 2c, H, D]`.

        Returns:
            `[1, 2c, HQ, DV]`, and the chosen blocks, int32 `[1, 2c, H, n]`.
        """
        windows, extended = parallel.exchange_edges((k_win, v_win), tails.values())
        compressed = []
        for slot, blocks in enumerate(parallel.chunk_blocks):
            chunk_tails = {name: x[slot] for name, x in zip(tails, extended)}
            embeddings = parallel.block_embeddings[slot]
            if blocks.whole and blocks.count:  # equal distances need no table of blocks
                chunk_tails = {name: x[None] for name, x in chunk_tails.items()}
                embeddings = [x[None] for x in embeddings]
                pair = self._compress(chunk_tails, blocks.first_slot, blocks.count, embeddings)
                compressed.append([x[0] for x in pair])
            else:
                compressed.append(self._compress(chunk_tails, 0, None, embeddings, parallel.cu_seqlens[slot]))
        k_cmp, v_cmp = parallel.gather_blocks(*(torch.cat(pair) for pair in zip(*compressed)))

        tensors = (k, v, k_cmp, v_cmp, *itertools.chain(*windows))
        heads, groups = parallel.shard.heads_at_once or k.shape[2], self.num_key_value_groups
        if heads >= k.shape[2]:
            return self._attend_to_heads(parallel, q, gates, *tensors)
        parts = []
        for first in range(0, k.shape[2], heads):
            own, queries = slice(first, first + heads), slice(first * groups, (first + heads) * groups)
            some = (q[:, :, queries], gates[:, :, queries], *(x[..., own, :] for x in tensors))
            # what is gathered is not kept but gathered again in the backward pass
            parts.append(checkpoint(self._attend_to_heads, parallel, *some, use_reentrant=False))
        return tuple(torch.cat(part, dim=2) for part in zip(*parts))

    def _attend_to_heads(self, parallel, q, gates, k, v, k_cmp, v_cmp, *windows):
        """Gather keys and values, and run this process's queries; `windows`: both chunks of k_win, both of v_win."""
        k, v = parallel.gather_tokens(k), parallel.gather_tokens(v)
        c, edge = parallel.shard.chunk_length, parallel.window_edge
        outputs, choices = [], []
        for segment in parallel.segments:
            first, last = segment.queries
            own = slice(segment.slot * c + first, segment.slot * c + last)
            window = slice(edge + first - min(edge, segment.offset), edge + last)
            keys, blocks = slice(*segment.keys), slice(*segment.blocks)
            tensors = (q[0, own], k[keys], v[keys], k_cmp[blocks], v_cmp[blocks])
            tensors += tuple(x[window] for x in windows[segment.slot :: 2]) + gates[0, own].unbind(-1)
            if segment.cu_seqlens is None:
                tensors = tuple(x[None] for x in tensors)
            output, block_indices, _ = self._nsa_attention(
                *tensors, q_offset=segment.offset, cu_seqlens=segment.cu_seqlens
            )
            outputs.append(output if segment.cu_seqlens is not None else output[0])
            choices.append(block_indices if segment.cu_seqlens is not None else block_indices[0])
        return torch.cat(outputs)[None], torch.cat(choices)[None]

    def _rotation(self, position_embeddings):
        if not self.use_rope:
            return lambda x: x
        cos, sin = position_embeddings
        return functools.partial(rotate, cos=cos, sin=sin, backend=self.config.nsa_backend)

    def _update(self, past_key_values, layout, k, v, tails, k_win, v_win, learns):
        """Hand everything to the cache layer in one call; tensors `[B, T, H, D]` in and out."""
        if layout.to_cache is not None:
            k, v, k_win, v_win, *tail_states = (
                _gather_tokens(x, layout.to_cache) for x in (k, v, k_win, v_win, *tails.values())
            )
            tails = dict(zip(tails, tail_states))

        def compress(tails, *where):
            tails = {name: x.transpose(1, 2) for name, x in tails.items()}
            return tuple(x.transpose(1, 2) for x in self._compress(tails, *where))

        def unrotate(keys, first_slot):
            if not self.use_rope:
                return keys
            slots = torch.arange(first_slot, first_slot + keys.shape[2], device=keys.device)
            positions = layout.first_position + (slots if layout.leftpad is None else slots - layout.leftpad[:, None])
            embeddings = split_ropes(layout.embed(positions), self.head_dim)[self.rope_index]
            return _unrotate(keys.transpose(1, 2), *embeddings, self.config.nsa_backend).transpose(1, 2)

        separate = not self.config.shared_kv
        nsa = NSACacheInput(
            layout=layout,
            tails={name: x.transpose(1, 2) for name, x in tails.items()},
            k_win=k_win.transpose(1, 2) if separate else None,
            v_win=v_win.transpose(1, 2) if separate else None,
            compress=compress,
            unrotate=unrotate,
            window_size=self.config.window_size,
            learns=learns,
        )
        keys, values = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx, nsa=nsa)
        return tuple(x.transpose(1, 2) for x in keys), tuple(x.transpose(1, 2) for x in values)


def _gather_tokens(x, index):
    """`x[b, index[b, t]]` for `[B, T, ...]`."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def init_nsa_parameters(module: nn.Module, std: float) -> None:
    """Initialise the parameters that only sparse layers have, in `module` and below.

    First layers: normal(0, std). Zero: biases, intra-block embeddings, gate scales, the gates' last layer (every gate
    starts at exactly 0.5), and φ's last layers where they are added to the mean or weigh it. The last layer of a
    pure-MLP φ: normal(0, std).
    """
    for part in module.modules():
        if isinstance(part, NSACompression) and part.compress_type != "mean":
            init.normal_(part.w1, mean=0.0, std=std)
            if part.compress_type == "mlp":
                init.normal_(part.w2, mean=0.0, std=std)
            else:
                init.zeros_(part.w2)
            pool = part.compress_type == "pool"
            for parameter in (part.pos_bias, part.b1, part.linear) if pool else (part.pos_embed, part.b1, part.b2):
                init.zeros_(parameter)
        elif isinstance(part, NSAGate):
            init.normal_(part.fc1.weight, mean=0.0, std=std)
            init.zeros_(part.fc1.bias)
        elif getattr(part, "starts_at_zero", False):
            init.zeros_(part.weight)
            init.zeros_(part.bias)
        elif isinstance(part, NSAGateScale):
            init.zeros_(part.bias)
