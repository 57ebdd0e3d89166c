# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What a conversion will give, computed from the configuration alone: parameters, KV-cache bytes, attention FLOPs.

Symbols: T tokens, l, d, l', n, w as in `NSAConfig`; H key/value heads, HQ query heads, D / DV head dimensions.
"""

from dataclasses import asdict, dataclass

__all__ = ["Plan", "attention_flops", "kv_cache_bytes", "parameter_counts", "plan", "plan_for"]

LENGTHS = (8192, 65536)


@dataclass(frozen=True)
class Plan:
    """The numbers `nsa convert --dry-run` prints.

    Attributes:
        source (str): as the user wrote it.
        model_type (str): of the source.
        layers (dict[str, int]): number of converted layers of each type.
        dtype (str): of the converted weights.
        exact_tokens (int): up to this length the converted model's logits equal the source's; 0 without `gate_scale`.
        source_parameters (int): in the dense model.
        copied_parameters (int): K, V projections and norms copied to the further branches.
        new_parameters (int): compression, gates and their scales, initialised by rule.
        total_parameters (int): in the converted model.
        lengths (tuple[int, ...]): tokens T that the lists below are for.
        kv_cache_bytes (tuple[int, ...]): one sequence of T tokens, converted model.
        dense_kv_cache_bytes (tuple[int, ...]): the source model's.
        attention_flops (tuple[int, ...]): attention of one prefill of T tokens, converted model.
        dense_attention_flops (tuple[int, ...]): the source model's.
        nsa (dict[str, object]): the NSA settings.
    """

    source: str
    model_type: str
    layers: dict[str, int]
    dtype: str
    exact_tokens: int
    source_parameters: int
    copied_parameters: int
    new_parameters: int
    total_parameters: int
    lengths: tuple[int, ...]
    kv_cache_bytes: tuple[int, ...]
    dense_kv_cache_bytes: tuple[int, ...]
    attention_flops: tuple[int, ...]
    dense_attention_flops: tuple[int, ...]
    nsa: dict[str, object]

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self):
        names = [f"{_tokens(length)} tokens" for length in self.lengths]
        header = ["", *names]
        cache = zip(self.kv_cache_bytes, self.dense_kv_cache_bytes)
        flops = zip(self.attention_flops, self.dense_attention_flops)
        rows = [
            ["KV cache, dense", *map(_bytes, self.dense_kv_cache_bytes)],
            ["KV cache, converted", *map(_bytes, self.kv_cache_bytes)],
            ["  ratio", *(f"{new / old:.3f}" for new, old in cache)],
            ["attention FLOPs of a prefill, dense", *map(_count, self.dense_attention_flops)],
            ["attention FLOPs of a prefill, converted", *map(_count, self.attention_flops)],
            ["  ratio", *(f"{new / old:.3f}" for new, old in flops)],
        ]
        layers = ", ".join(f"{count} {kind}" for kind, count in self.layers.items())
        settings = [f"{name}={value}" for name, value in self.nsa.items() if value is not None]
        facts = [
            ["source", f"{self.source} ({self.model_type}, {self.dtype})"],
            ["layers", layers],
            *(["" if i else "NSA settings", ", ".join(settings[i : i + 3])] for i in range(0, len(settings), 3)),
            ["equal to the source", f"up to {self.exact_tokens:,} tokens" if self.exact_tokens else "nowhere"],
            ["parameters, source", f"{self.source_parameters:,}"],
            ["  copied to further branches", f"{self.copied_parameters:,}"],
            ["  new", f"{self.new_parameters:,}"],
            ["parameters, converted", f"{self.total_parameters:,}"],
        ]
        return "\n".join([*_table(facts), "", *_table([header, *rows], right=True)])


def _table(rows, right=False):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = ["<" if i == 0 or not right else ">" for i in range(len(widths))]
    return ["  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths)).rstrip() for row in rows]


def _tokens(count):
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def _bytes(count):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024


def _count(value):
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 1000 or unit == "P":
            return f"{value:.1f} {unit}".rstrip()
        value /= 1000


def _layer_types(config):
    return list(config.layer_types or ["native_sparse_attention"] * config.num_hidden_layers)


def _value_dim(config):
    return config.v_head_dim or config.head_dim


def _sliding_window(window, tokens):
    return tokens if window is None else min(window, tokens)


def parameter_counts(config) -> dict[str, int]:
    """Count the parameters of a converted model.

    Args:
        config (NSAConfig): of the converted model.

    Returns:
        dict[str, int]: `source` (the dense model's), `copied`, `new` and their sum `total`; tied weights count once.
    """
    from nsa_conversion.key_map import build_key_map

    sizes = {name: spec.numel() for name, spec in parameter_shapes(config).items()}
    key_map = build_key_map(config)
    source = sum(sizes[key] for key in key_map)
    copied = sum(sizes[name] for names in key_map.values() for name in names[1:])
    total = sum(sizes.values())
    return {"source": source, "copied": copied, "new": total - source - copied, "total": total}


def parameter_shapes(config) -> dict:
    """`{parameter name: torch.Size}` of a converted model, without allocating it; tied weights once."""
    import torch

    from modeling_nsa import NSAForCausalLM

    with torch.device("meta"):
        model = NSAForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def kv_cache_bytes(config, tokens: int, itemsize: int = 2) -> int:
    """Bytes of the cache of one sequence.

    A native sparse layer keeps the selection K/V of all T tokens, (T - l) // d + 1 compressed K/V, of the last l - 1
    tokens what φ reads (keys before or after RoPE or both, values), and with separate projections the window K/V of the
    last w tokens. A sliding layer keeps its window but one token.

    Args:
        config (NSAConfig): of the converted model.
        tokens (int): T.
        itemsize (int): bytes of one number.

    Returns:
        int: bytes, all layers together.
    """
    width = config.head_dim + _value_dim(config)
    tail_keys = (config.compress_type != "mean") + (config.compress_type != "mlp")
    numbers = 0
    for kind in _layer_types(config):
        if kind == "native_sparse_attention":
            window = 0 if config.shared_kv else min(config.window_size, tokens)
            tail = min(config.compress_block_size - 1, tokens)
            numbers += (tokens + _blocks(config, tokens) + window) * width
            numbers += tail * (tail_keys * config.head_dim + _value_dim(config))
        else:
            numbers += _kept_tokens(config.sliding_window if kind == "sliding_attention" else None, tokens) * width
    return numbers * config.num_key_value_heads * itemsize


def _kept_tokens(window, tokens):
    return tokens if window is None else min(window - 1, tokens)


def _dense_kv_cache_bytes(config, tokens, itemsize, source_windows):
    width = config.num_key_value_heads * (config.head_dim + _value_dim(config)) * itemsize
    return width * sum(_kept_tokens(window, tokens) for window in source_windows)


def _blocks(config, tokens):
    return max(0, (tokens - config.compress_block_size) // config.compress_stride + 1)


def attention_flops(config, tokens: int) -> int:
    """Multiply-adds (two FLOPs each) of the attention of one prefill, causal pairs only.

    Counted: scores and values of every branch, and φ's two matrix products per compressed block. Projections from and
    to the hidden state are not attention and are left out.

    Args:
        config (NSAConfig): of the converted model.
        tokens (int): T.

    Returns:
        int: FLOPs, all layers together.
    """
    dims = config.head_dim + _value_dim(config)
    total = 0
    for kind in _layer_types(config):
        if kind == "full_attention":
            pairs, pooling = _window_pairs(tokens, tokens), 0
        elif kind == "sliding_attention":
            pairs, pooling = _window_pairs(tokens, _sliding_window(config.sliding_window, tokens)), 0
        else:
            pairs = _window_pairs(tokens, min(config.window_size, tokens))
            pairs += _compressed_pairs(config, tokens) + _selected_pairs(config, tokens)
            pooling = _blocks(config, tokens) * config.num_key_value_heads * _pooling_flops(config)
        total += 2 * pairs * config.num_attention_heads * dims + pooling
    return total


def _window_pairs(tokens, window):
    """Σ_t min(t + 1, w): query-key pairs of a causal window; w = T is full attention."""
    window = min(window, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window


def _compressed_pairs(config, tokens):
    """Block i is seen by the queries from its last token on."""
    length, stride, blocks = config.compress_block_size, config.compress_stride, _blocks(config, tokens)
    return blocks * (tokens - length + 1) - stride * blocks * (blocks - 1) // 2


def _selected_pairs(config, tokens):
    """Full attention while at most n blocks are visible, then n - 1 whole blocks and the query's own up to itself."""
    block, chosen = config.select_block_size, config.num_selected_blocks
    dense = min(tokens, block * chosen)
    rest = tokens - dense
    whole, last = divmod(rest, block)
    own = whole * (block * (block + 1) // 2) + last * (last + 1) // 2
    return dense * (dense + 1) // 2 + rest * (chosen - 1) * block + own


def _pooling_flops(config):
    """φ_K and φ_V of one block and head."""
    if config.compress_type == "mean":
        return 0
    hidden = config.compress_hidden_size or 2 * config.head_dim
    if config.compress_type == "pool":  # a score for every token, then one linear map
        share = config.compress_stride
        return sum(2 * (hidden * (dim + 1) * share + dim * dim) for dim in (config.head_dim, _value_dim(config)))
    return sum(2 * hidden * (config.compress_block_size * dim + dim) for dim in (config.head_dim, _value_dim(config)))


def plan_for(source, config, dtype: str, lengths=LENGTHS) -> Plan:
    """The plan of one conversion.

    Args:
        source (nsa_conversion.sources.Source): the dense checkpoint.
        config (NSAConfig): of the converted model.
        dtype (str): of the converted weights.
        lengths (tuple[int, ...]): tokens to compute cache and FLOPs for.

    Returns:
        Plan: all numbers.
    """
    from nsa_conversion.convert import NSA_SETTINGS
    from nsa_conversion.key_map import changed_window, source_layer_types
    from nsa_conversion.sources import parse_dtype

    counts = parameter_counts(config)
    itemsize = parse_dtype(dtype).itemsize
    kinds = _layer_types(config)
    window = getattr(source.config, "sliding_window", None)
    windows = [window if kind == "sliding_attention" else None for kind in source_layer_types(source.config)]
    exact = min(config.num_selected_blocks * config.select_block_size, changed_window(source.config, kinds))
    exact = exact if config.gate_scale else 0
    head_flops = 2 * config.num_attention_heads * (config.head_dim + _value_dim(config))
    dense_flops = [
        head_flops * sum(_window_pairs(tokens, _sliding_window(window, tokens)) for window in windows)
        for tokens in lengths
    ]
    return Plan(
        source=source.name,
        model_type=source.config.model_type,
        layers={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        dtype=dtype,
        exact_tokens=exact,
        source_parameters=counts["source"],
        copied_parameters=counts["copied"],
        new_parameters=counts["new"],
        total_parameters=counts["total"],
        lengths=tuple(lengths),
        kv_cache_bytes=tuple(kv_cache_bytes(config, tokens, itemsize) for tokens in lengths),
        dense_kv_cache_bytes=tuple(_dense_kv_cache_bytes(config, tokens, itemsize, windows) for tokens in lengths),
        attention_flops=tuple(attention_flops(config, tokens) for tokens in lengths),
        dense_attention_flops=tuple(dense_flops),
        nsa={name: getattr(config, name) for name in NSA_SETTINGS if name != "nsa_backend"},
    )


def plan(source, **settings) -> Plan:
    """Compute what `convert` would give, without reading weights; of a hub source only small files are fetched.

    Args:
        source (str | Path): as for `convert`.
        **settings: as for `convert`, those that change the model or say how to read the source.

    Returns:
        Plan: parameters, cache bytes, FLOPs; `print` shows it as a table.

    Raises:
        NSAError: everything `convert` refuses before it opens the weights.
    """
    from nsa_conversion.convert import prepare

    prepared = prepare(source, weights=False, **settings)
    return plan_for(prepared.source, prepared.config, prepared.dtype)
