# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Cache layers of native sparse attention, dynamic and static, for transformers' `DynamicCache` and `StaticCache`.

A layer holds, as `[B, H, tokens, D]`:
    keys, values    selection branch, every token
    k_cmp, v_cmp    compressed keys and values, one per complete block; φ runs once per block
    k_tail, k_tail_rot, v_tail
                    what φ reads of the last l - 1 tokens: keys before and after RoPE, and values
    k_win, v_win    window branch, the last w tokens (not with shared K/V: there they are the last keys and values)
and, only once a row's padding had to be moved to its front,
    columns         `[B, tokens]`, which column of the input each slot holds

With a static cache tails and windows are ring buffers with room for a decoding step: slot s lies at index s % size.

Registration: a layer class with `_layer_type` enters transformers' layer mappings when it is defined.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from nsa_kernels import MAX_DECODE_QUERIES, num_compressed_blocks

from .configuration_nsa import NSA_LAYER_TYPE
from .layout_nsa import NSALayout

__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "NSACacheInput",
    "NSADynamicLayer",
    "NSAStaticLayer",
    "prepare_cache",
    "takes_cache_by_either_name",
]

# What transformers calls a cache, as an argument and in outputs: the latter from 5.24 on.
CACHE_NAMES = ("past_key_values", "cache")
CACHE_NAME = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES)


def takes_cache_by_either_name(function: Callable) -> Callable:
    """Let a function with an argument `past_key_values` take it as `cache` too.

    Raises:
        ValueError: Both are given.
    """

    @functools.wraps(function)
    def renamed(*args, **kwargs):
        if "cache" in kwargs:
            cache = kwargs.pop("cache")
            if kwargs.get("past_key_values") is not None and cache is not None:
                raise ValueError("`past_key_values` and `cache` are one argument under two names: give one of them.")
            if cache is not None:
                kwargs["past_key_values"] = cache
        return function(*args, **kwargs)

    return renamed


@dataclass
class NSACacheInput:
    """What a sparse layer hands to its cache layer beside the selection keys and values; tensors are `[B, H, T, D]`.

    Attributes:
        layout: Of the forward pass.
        tails: New tokens' `k_tail`, `k_tail_rot` and `v_tail`, those that the layer's φ reads.
        k_win, v_win: New tokens' window keys and values, or None with shared K/V.
        compress: φ: maps (tails, first slot, number of blocks, block position embeddings) to `k_cmp, v_cmp`.
        unrotate: Takes RoPE off keys: maps (keys, first slot) to keys.
        window_size: w.
        learns: Whether the backward pass will read what `update` returns.
    """

    layout: NSALayout
    tails: dict[str, torch.Tensor]
    k_win: torch.Tensor | None
    v_win: torch.Tensor | None
    compress: Callable
    unrotate: Callable
    window_size: int
    learns: bool = False

    @property
    def tail_size(self) -> int:
        return self.layout.compress_block_size - 1


class NSACacheLayerMixin:
    """State beside `keys` and `values`, and what both twins do with it."""

    supports_early_init = False  # the block sizes come with the first update
    window_ring = False
    state_names = ("k_cmp", "v_cmp", "k_tail", "k_tail_rot", "v_tail", "k_win", "v_win", "columns")

    def _clear(self):
        for name in self.state_names:
            setattr(self, name, None)

    def _map_state(self, function):
        for name in self.state_names:
            if isinstance(state := getattr(self, name), torch.Tensor):
                setattr(self, name, function(state))

    def _write_blocks(self, name, new, layout, capacity, inplace):
        """Put new blocks at their index; behind `capacity` blocks one more slot takes what is incomplete."""
        buffer, (B, H) = getattr(self, name), new.shape[:2]
        index = layout.block_index(none=capacity).clamp(max=capacity)[:, None]  # [B or 1, 1, NC]
        # an index for every dim but the last: compiled code writes in place, where it would copy for a scatter
        rows = torch.arange(B, device=new.device)[:, None, None]
        heads = torch.arange(H, device=new.device)[:, None]
        if inplace:
            buffer.index_put_((rows, heads, index), new)
        else:
            setattr(self, name, buffer.index_put((rows, heads, index), new))

    def offload(self):
        super().offload()
        self._map_state(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self):
        super().prefetch()
        if self.is_initialized:
            self._map_state(lambda x: x.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._map_state(lambda x: x.index_select(0, beam_idx.to(x.device)))

    @staticmethod
    def _require(nsa):
        if nsa is None:
            raise ValueError(
                "A native sparse attention cache layer is updated by `NSAAttention` only: `nsa` is missing."
            )


class NSADynamicLayer(NSACacheLayerMixin, DynamicLayer):
    """Grows with the sequence, in steps of at most 2 % of its length."""

    _layer_type = NSA_LAYER_TYPE

    def __init__(self, **kwargs):
        super().__init__()
        self._clear()
        self._buffers: dict[str, torch.Tensor] = {}
        self.record_past = False

    @classmethod
    def from_dense(cls, layer: DynamicLayer) -> "NSADynamicLayer":
        """Take over the keys and values of a plain layer; the next update builds the rest (shared K/V only)."""
        new = cls()
        new.lazy_initialization(layer.keys, layer.values)
        new.keys, new.values = layer.keys, layer.values
        return new

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def activate_past_recording(self):
        """Keep the whole window and tail until the next `crop`, so that it can roll back any number of tokens."""
        self.record_past = True

    def update(self, key_states, value_states, *args, nsa: NSACacheInput | None = None, **kwargs):
        """Append tokens and return `(keys, k_cmp, k_win), (values, v_cmp, v_win)`; the window ends with the new tokens.

        Args:
            key_states, value_states: `[B, H, T, D]` and `[B, H, T, DV]` of the selection branch.
            nsa: Everything else.
        """
        self._require(nsa)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        layout, past = nsa.layout, self.get_seq_length()
        if past:
            self._rebuild(nsa, past)

        spare = (past + layout.query_length) // 64
        extended = functools.partial(self._extended, learns=nsa.learns)
        tails = {name: extended(name, new, nsa.tail_size) for name, new in nsa.tails.items()}
        if layout.num_blocks or self.k_cmp is None or nsa.learns:
            self._compress(nsa, tails, past)
        self.keys = extended("keys", key_states, spare)
        self.values = extended("values", value_states, spare)
        seen = nsa.window_size - 1 + layout.query_length
        if nsa.k_win is None:
            window = self.keys[:, :, -seen:], self.values[:, :, -seen:]
        else:
            new = {"k_win": nsa.k_win, "v_win": nsa.v_win}
            whole = {name: extended(name, x, nsa.window_size // 8) for name, x in new.items()}
            window = tuple(x[:, :, -seen:] for x in whole.values())
            tails |= whole
        returned = (self.keys, self.k_cmp, window[0]), (self.values, self.v_cmp, window[1])
        self._track_columns(layout, past)
        if layout.trailing is not None:
            for name in ("keys", "values"):
                setattr(self, name, _shift(getattr(self, name), layout.trailing))
            tails = {name: _shift(state, layout.trailing) for name, state in tails.items()}
        for name, state in tails.items():
            self._keep(name, state, nsa.window_size if name in ("k_win", "v_win") else nsa.tail_size)
        self._sizes = (layout.compress_block_size, layout.compress_stride, nsa.window_size)
        return returned

    def _compress(self, nsa, tails, past):
        """Append the blocks that the new tokens complete."""
        layout = nsa.layout
        held = tails["v_tail"].shape[2] - layout.query_length
        blocks = nsa.compress(tails, layout.first_slot(past - held), layout.num_blocks, layout.block_embeddings)
        capacity = num_compressed_blocks(past + layout.query_length, layout.compress_block_size, layout.compress_stride)
        for name, new in zip(("k_cmp", "v_cmp"), blocks, strict=True):
            if not isinstance(layout.first_block, torch.Tensor):
                setattr(self, name, self._extended(name, new, capacity // 64, nsa.learns))
                continue
            # rows complete their blocks at different times
            old = 0 if getattr(self, name) is None else getattr(self, name).shape[2]
            grown = new.new_zeros(*new.shape[:2], capacity + 1 - old, new.shape[3])
            setattr(self, name, self._extended(name, grown, capacity // 64, nsa.learns))
            inplace = not (new.requires_grad or getattr(self, name).requires_grad)
            self._write_blocks(name, new, layout, capacity, inplace)
            setattr(self, name, getattr(self, name)[:, :, :capacity])

    def _keep(self, name, state, size):
        """Keep the last `size` tokens, all of them while recording."""
        if not self.record_past and state.shape[2] > size:
            long = state.shape[2] > 2 * size + MAX_DECODE_QUERIES
            state = state[:, :, state.shape[2] - size :]
            if long:  # a view would keep the whole prompt alive
                state = state.clone()
                self._buffers.pop(name, None)
        setattr(self, name, state)

    def _track_columns(self, layout, past):
        order = layout.order if layout.to_cache is None else layout.to_cache
        if self.columns is None and order is None and layout.trailing is None:
            return
        rows = self.keys.shape[0]
        new = torch.arange(past, past + layout.query_length, device=self.device).expand(rows, -1)
        new = new if order is None else new.gather(1, order)
        old = torch.arange(past, device=self.device).expand(rows, -1) if self.columns is None else self.columns
        columns = torch.cat((old, new), dim=1)
        self.columns = (
            columns if layout.trailing is None else _shift(columns[:, None, :, None], layout.trailing)[:, 0, :, 0]
        )

    def _extended(self, name, new, spare, learns):
        """The state `name` and new tokens, side by side; a new tensor where the backward pass reads it.

        Tokens are written behind the old ones, into a buffer with room for `spare` more that is copied when it is full.
        """
        old = getattr(self, name)
        if old is None or old.shape[2] == 0:
            return new
        # what was made in inference mode cannot be written outside it
        if learns or old.requires_grad or (old.is_inference() and not torch.is_inference_mode_enabled()):
            self._buffers.pop(name, None)
            return torch.cat((old, new), dim=2)
        held, added = old.shape[2], new.shape[2]
        buffer = self._buffers.get(name)
        start = None if buffer is None else _place(old, buffer)
        if start is None or start + held + added > buffer.shape[2]:
            buffer = old.new_empty(*old.shape[:2], held + added + spare, old.shape[3])
            buffer[:, :, :held] = old
            self._buffers[name], start = buffer, 0
        buffer[:, :, start + held : start + held + added] = new
        return buffer[:, :, start : start + held + added]

    def _map_state(self, function):
        super()._map_state(function)
        self._buffers.clear()  # what they hold has been moved or copied

    def _rebuild(self, nsa, past):
        """With shared K/V, recompute what is missing: after taking over a plain layer, or after a deep crop."""
        size = min(past, nsa.tail_size)
        have = 0 if self.v_tail is None else self.v_tail.shape[2]
        if self.k_cmp is not None and have >= size:
            return
        layout = nsa.layout
        for name, state in self._dense_tails(nsa, past - size).items():
            setattr(self, name, state)
        if self.k_cmp is None:
            blocks = num_compressed_blocks(past, layout.compress_block_size, layout.compress_stride)
            embeddings = layout.embed(layout.mean_positions(0, blocks))
            start = 0 if layout.leftpad is None else layout.leftpad
            self.k_cmp, self.v_cmp = nsa.compress(self._dense_tails(nsa, 0), start, blocks, embeddings)

    def _dense_tails(self, nsa, first):
        keys = self.keys[:, :, first:]
        tails = {"k_tail_rot": keys, "v_tail": self.values[:, :, first:]}
        if "k_tail" in nsa.tails:
            tails["k_tail"] = nsa.unrotate(keys, first)
        return {name: tails[name] for name in nsa.tails}

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False
        self._clear()
        self._buffers.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_state(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_state(lambda x: x[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (a positive number is the length to keep) and what recording kept.

        Raises:
            RuntimeError: The window or the tail of separate K/V is no longer held that far back.
        """
        length = self.get_seq_length()
        if length == 0:
            return
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        removed = min(removed, length)
        if removed == length:
            self.reset()
            return
        left = length - removed
        block_size, stride, window_size = self._sizes
        shared = self.k_win is None
        if removed and not shared and self.k_win.shape[2] - removed < min(left, window_size - 1):
            raise RuntimeError(
                f"`crop` cannot remove {removed} of {length} tokens: the window branch keeps only its last "
                f"{self.k_win.shape[2]}. Call `activate_past_recording()` on the cache before the tokens are added."
            )
        held = self.v_tail.shape[2] - removed
        if removed and not shared and held < min(left, block_size - 1):
            raise RuntimeError(
                f"`crop` cannot remove {removed} of {length} tokens: only the last {self.v_tail.shape[2]} tokens are "
                "kept for unfinished compression blocks. Call `activate_past_recording()` on the cache before the "
                "tokens are added."
            )
        names = ["keys", "values", "k_tail", "k_tail_rot", "v_tail", "k_win", "v_win"]
        states = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        slots = None if self.columns is None else (self.columns >= left).int().argsort(dim=1, stable=True)[:, :left]
        if slots is None or (slots == torch.arange(left, device=slots.device)).all():
            states = {name: state[:, :, : max(0, state.shape[2] - removed)] for name, state in states.items()}
        else:  # the last columns are padding, which lies in the first slots; states hold the last slots
            before = {name: length - state.shape[2] for name, state in states.items()}
            states = {name: _take_slots(x, slots[:, before[name] :] - before[name]) for name, x in states.items()}
        if self.columns is not None:
            self.columns = self.columns[:, :left] if slots is None else self.columns.gather(1, slots)
        for name, state in states.items():
            size = {"k_win": window_size, "v_win": window_size}.get(name, block_size - 1)
            first = 0 if name in ("keys", "values") else max(0, state.shape[2] - size)
            setattr(self, name, state[:, :, first:])
        blocks = num_compressed_blocks(left, block_size, stride)
        self.k_cmp, self.v_cmp = self.k_cmp[:, :, :blocks], self.v_cmp[:, :, :blocks]


class NSAStaticLayer(NSACacheLayerMixin, StaticLayer):
    """Preallocated for `max_cache_len` tokens and written in place, for compilation and CUDA graphs."""

    _layer_type = NSA_LAYER_TYPE

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(max_cache_len=max_cache_len)
        self._clear()

    def _allocate(self, nsa, key_states, value_states):
        layout = nsa.layout
        self.max_blocks = num_compressed_blocks(self.max_cache_len, layout.compress_block_size, layout.compress_stride)
        shapes = {"k_cmp": (key_states, self.max_blocks + 1), "v_cmp": (value_states, self.max_blocks + 1)}
        rings = {name: (state, nsa.tail_size) for name, state in nsa.tails.items()}
        if nsa.k_win is not None:
            rings |= {"k_win": (nsa.k_win, nsa.window_size - 1), "v_win": (nsa.v_win, nsa.window_size - 1)}
        for name, (like, before) in rings.items():
            shapes[name] = (like, min(self.max_cache_len, before + MAX_DECODE_QUERIES))
        for name, (like, size) in shapes.items():
            state = like.new_zeros(*like.shape[:2], size, like.shape[3])
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(state)
            setattr(self, name, state)

    def update(self, key_states, value_states, *args, nsa: NSACacheInput | None = None, **kwargs):
        """As `NSADynamicLayer.update`; `keys`, `values`, `k_cmp` and `v_cmp` are the whole preallocated tensors.

        For few new tokens so is the window, a ring buffer: `window_ring` says so, see `nsa_kernels.nsa_attention`.
        """
        self._require(nsa)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._allocate(nsa, key_states, value_states)
        layout, T = nsa.layout, nsa.layout.query_length
        past = self.cumulative_length.clone()
        super().update(key_states, value_states)

        tails = {}
        for name, new in nsa.tails.items():
            tails[name] = self._read_before(getattr(self, name), new, past, nsa.tail_size)
            self._write_ring(getattr(self, name), new, past)
        blocks = nsa.compress(
            tails, layout.first_slot(layout.past_length - nsa.tail_size), layout.num_blocks, layout.block_embeddings
        )
        for name, new in zip(("k_cmp", "v_cmp"), blocks, strict=True):
            if isinstance(layout.first_block, torch.Tensor):
                self._write_blocks(name, new, layout, self.max_blocks, inplace=True)
            else:
                getattr(self, name)[:, :, layout.first_block : layout.first_block + layout.num_blocks] = new

        self.window_ring = T <= MAX_DECODE_QUERIES
        if nsa.k_win is None:
            window = self.keys, self.values
            if not self.window_ring:
                size = min(self.max_cache_len, nsa.window_size - 1 + T)
                slots = (past + T - size + torch.arange(size, device=self.device)).clamp(min=0)
                window = tuple(x.index_select(2, slots) for x in window)
        else:
            pairs = (self.k_win, nsa.k_win), (self.v_win, nsa.v_win)
            window = tuple(self._window(*pair, past, layout, nsa.window_size) for pair in pairs)
        return (self.keys, self.k_cmp, window[0]), (self.values, self.v_cmp, window[1])

    def states(self) -> dict[str, torch.Tensor]:
        """Everything that is held, as `nsa_kernels.append_tokens` takes it."""
        held = {name: getattr(self, name) for name in ("keys", "values", *self.state_names)}
        held["length"] = self.cumulative_length
        return {name: state for name, state in held.items() if state is not None}

    def held(self):
        """What `update` returns for few tokens, after kernels have put them in place."""
        self.window_ring = True
        window = (self.keys, self.values) if self.k_win is None else (self.k_win, self.v_win)
        return (self.keys, self.k_cmp, window[0]), (self.values, self.v_cmp, window[1])

    def _window(self, ring, new, past, layout, window_size):
        """Put new tokens into a ring buffer; returns it, or for many tokens what they see."""
        if self.window_ring:
            seen = ring
        elif isinstance(layout.past_length, int) and layout.past_length == 0:
            seen = new
        else:
            seen = self._read_before(ring, new, past, window_size - 1)
        self._write_ring(ring, new, past)
        return seen

    def _read_before(self, ring, new, past, count):
        """The `count` tokens before slot `past`, in order, and new ones; what lies before slot 0 is arbitrary."""
        before = (past + torch.arange(-count, 0, device=self.device)) % ring.shape[2]
        return torch.cat((ring.index_select(2, before), new), dim=2)

    def _write_ring(self, ring, new, past):
        T, size = new.shape[2], ring.shape[2]
        slots = (past + torch.arange(T, device=self.device)) % size
        ring.index_copy_(2, slots[-size:], new[:, :, -size:])

    def reset(self) -> None:
        super().reset()
        self._map_state(lambda x: x.zero_())


def _take_slots(state, slots):
    """`state[b, :, slots[b, i]]` for `[B, H, tokens, D]`."""
    return state.gather(2, slots[:, None, :, None].expand(-1, state.shape[1], -1, state.shape[3]))


def _shift(state, count):
    """Move each row's last `count[b]` tokens of `[B, H, tokens, D]` to its front."""
    slots = torch.arange(state.shape[2], device=state.device) - count[:, None]
    return _take_slots(state, slots % state.shape[2])


def _place(state, buffer):
    """Slot of a buffer where a state starts that is a view of it, else None."""
    if state.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr() or state.stride() != buffer.stride():
        return None
    return (state.storage_offset() - buffer.storage_offset()) // buffer.stride(2)


def prepare_cache(cache: Cache, config) -> None:
    """Give every sparse layer of `config` a cache layer of its own kind.

    A user's `DynamicCache()` and PEFT's prefix tuning come with plain layers. Empty ones are replaced; of filled ones,
    shared K/V can rebuild the compressed state.

    Raises:
        ValueError: Filled plain layers with separate K/V, or another kind of cache (quantized, sliding, of another
            model).
    """
    use = "Use `DynamicCache(config=model.config)` or `StaticCache(config=model.config, ...)`."
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise ValueError(f"`past_key_values` must be a cache of a decoder, got {type(cache).__name__}. {use}")
    if cache.layer_class_to_replicate is not None:
        for layer_type in config.layer_types[len(cache.layers) : config.num_hidden_layers]:
            window = {"sliding_window": config.sliding_window} if layer_type == "sliding_attention" else {}
            cache.layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**window))
    if len(cache.layers) < config.num_hidden_layers:
        raise ValueError(
            f"`past_key_values` must have the model's {config.num_hidden_layers} layers, got {len(cache.layers)}. {use}"
        )
    for index, layer_type in enumerate(config.layer_types[: config.num_hidden_layers]):
        layer = cache.layers[index]
        sparse = getattr(layer, "_layer_type", None) == NSA_LAYER_TYPE
        if sparse == (layer_type == NSA_LAYER_TYPE):
            continue
        if sparse or type(layer) is not DynamicLayer:
            raise ValueError(
                f"Layer {index} is a {layer_type} layer and cannot use a {type(layer).__name__} cache layer. {use}"
            )
        if layer.get_seq_length() == 0:
            cache.layers[index] = NSADynamicLayer()
        elif config.shared_kv:
            cache.layers[index] = NSADynamicLayer.from_dense(layer)
        else:
            raise ValueError(
                f"Layer {index} got {layer.get_seq_length()} cached tokens without the keys and values of its "
                "compression and window branches. With `shared_kv=False` these cannot be rebuilt: start from an empty "
                "`DynamicCache(config=model.config)`; prefix tuning needs a model with `shared_kv=True`."
            )
