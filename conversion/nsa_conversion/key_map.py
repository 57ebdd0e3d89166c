# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What each source architecture becomes: its configuration as `NSAConfig` fields, its keys as NSA parameters.

The map is closed on both sides: a source key without a rule and a parameter without a source are errors.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nsa_conversion.errors import NSAError, listing

__all__ = [
    "ARCHITECTURES",
    "NEW_PARAMETERS",
    "Architecture",
    "build_key_map",
    "changed_window",
    "check_model_type",
    "check_source_keys",
    "config_kwargs",
    "parse_layers",
    "source_layer_types",
]

# Fields that mean the same, under the same name, in every supported source but those whose `Architecture` gives them.
_COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)
# Rotary tables that old versions of transformers saved; every model computes them from rope_parameters.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# Parameters of an NSA layer that no dense checkpoint has: `model.layers.{i}.self_attn.<this>`.
NEW_PARAMETERS = ("compress_k.", "compress_v.", "gate.", "gate_scale.")


@dataclass(frozen=True)
class Architecture:
    """How one source architecture differs from the common fields.

    Attributes:
        fields (Callable[[PreTrainedConfig], dict]): the `NSAConfig` fields that are not common.
        reads (frozenset[str]): the source's own fields that `fields` or the layer types take account of.
    """

    fields: Callable[[object], dict]
    reads: frozenset[str]


def _head_dim(config):
    # transformers lets a configuration of any architecture carry head_dim, and divides where it does not.
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _llama(config):
    return {
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _mistral(config):
    return {"attention_bias": False, "attention_output_bias": False, "mlp_bias": False}


def _qwen2(config):
    return {"attention_bias": True, "attention_output_bias": False, "mlp_bias": False}


def _qwen3(config):
    return {
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "mlp_bias": False,
        "use_qk_norm": True,
    }


def _smollm3(config):
    rope = list(config.no_rope_layers)[: config.num_hidden_layers]
    return {**_llama(config), "no_rope_layers": [int(flag) for flag in rope]}


def _gemma3(config):
    for name in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, name):
            raise NSAError(f"the source sets {name}={getattr(config, name)}, which no NSA layer computes.")
    local = config.rope_parameters["sliding_attention"]
    if set(local) != {"rope_type", "rope_theta"} or local["rope_type"] != "default":
        raise NSAError(f"the RoPE of the source's sliding layers must be unscaled (rope_type 'default'), got {local}.")
    kinds = source_layer_types(config)
    return {
        "decoder_type": "gemma3",
        "hidden_act": config.hidden_activation,
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "mlp_bias": False,
        "use_qk_norm": True,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "final_logit_softcapping": config.final_logit_softcapping,
        "rope_parameters": dict(config.rope_parameters["full_attention"]),
        "layer_rope_theta": [local["rope_theta"] if kind == "sliding_attention" else None for kind in kinds],
    }


_SLIDING = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
# pretraining_tp only split matrix products; transformers ignores it too.
ARCHITECTURES = {
    "llama": Architecture(_llama, frozenset({"attention_bias", "mlp_bias", "pretraining_tp"})),
    "mistral": Architecture(_mistral, frozenset({"sliding_window"})),
    "qwen2": Architecture(_qwen2, _SLIDING),
    "qwen3": Architecture(_qwen3, _SLIDING | {"attention_bias"}),
    "smollm3": Architecture(
        _smollm3, _SLIDING | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"}
    ),
    "gemma3_text": Architecture(
        _gemma3,
        frozenset({"hidden_activation", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"})
        | {"final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"},
    ),
}
# Read by `config_kwargs` itself.
_READ_BY_ALL = frozenset(_COMMON) | {"head_dim", "rope_parameters"}


def check_model_type(model_type: str | None) -> None:
    """Raise unless a source of this model type can be converted.

    Raises:
        NSAError: it cannot; the text lists what can, and where it says how to add one.
    """
    if model_type == "native_sparse_attention":
        raise NSAError("the source is an NSA model already (model_type 'native_sparse_attention').")
    if model_type not in ARCHITECTURES:
        raise NSAError(
            f"model_type {model_type!r} cannot be converted. Supported: {', '.join(ARCHITECTURES)}. "
            "CONTRIBUTING.md says how to add a source architecture."
        )


def config_kwargs(config, *, full_attention_layers: Iterable[int] = (), convert_sliding: bool = False) -> dict:
    """Translate a source configuration into the backbone fields of `NSAConfig`.

    Args:
        config (PreTrainedConfig): of a supported model type.
        full_attention_layers (Iterable[int]): layers that stay dense.
        convert_sliding (bool): sliding-window layers become native sparse ones too.

    Returns:
        dict: keyword arguments; the NSA sizes are not among them.

    Raises:
        NSAError: an unsupported model type, a layer that does not exist, a sliding layer asked to be dense, layer
            types that the source's own model does not compute.
    """
    check_model_type(config.model_type)
    kwargs = {"head_dim": _head_dim(config), "rope_parameters": dict(config.rope_parameters)}
    kwargs |= ARCHITECTURES[config.model_type].fields(config)
    kwargs |= {name: getattr(config, name) for name in _COMMON if name not in kwargs}

    sources = source_layer_types(config)
    layers = sorted(set(full_attention_layers))
    if bad := [i for i in layers if not 0 <= i < len(sources)]:
        raise NSAError(f"full_attention_layers must be in 0 … {len(sources) - 1}, got {listing(bad)}.")
    sliding = [i for i, kind in enumerate(sources) if kind == "sliding_attention"]
    if not convert_sliding and (bad := [i for i in layers if i in sliding]):
        raise NSAError(
            f"full_attention_layers names layers {listing(bad)}, which are sliding-window layers in the source and "
            "stay so. Leave them out, or pass --convert-sliding (convert_sliding=True) to change sliding layers."
        )
    kept = set() if convert_sliding else set(sliding)
    kwargs["layer_types"] = [
        "sliding_attention" if i in kept else "full_attention" if i in layers else "native_sparse_attention"
        for i in range(len(sources))
    ]
    if "native_sparse_attention" not in kwargs["layer_types"]:
        hint = " All its layers are sliding-window layers: pass --convert-sliding." if kept else ""
        raise NSAError(f"no layer would become native sparse; there is nothing to convert.{hint}")
    if kept:
        kwargs["sliding_window"] = config.sliding_window
    return kwargs


def source_layer_types(config) -> list[str]:
    """`"full_attention"` or `"sliding_attention"` for each layer, as the source's own model computes it."""
    count = config.num_hidden_layers
    declared = getattr(config, "layer_types", None)
    if config.model_type == "mistral":  # one mask for all layers, whatever the configuration declares
        kinds = ["full_attention" if config.sliding_window is None else "sliding_attention"] * count
        if declared is not None and list(declared) != kinds:
            raise NSAError(
                "this Mistral configuration mixes layer_types, but transformers' Mistral model gives every layer the "
                f"same mask (sliding_window={config.sliding_window}). Correct the source's config.json."
            )
        return kinds
    kinds = list(declared) if declared is not None else ["full_attention"] * count
    if other := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise NSAError(f"the source has layer types that cannot be converted: {', '.join(other)}.")
    if len(kinds) != count:
        raise NSAError(f"the source's layer_types must have {count} entries (num_hidden_layers), got {len(kinds)}.")
    return kinds


def changed_window(config, layer_types: Iterable[str]) -> float:
    """Up to how many tokens converted sliding layers still compute what they did: their window, or infinity.

    Args:
        config (PreTrainedConfig): of the source.
        layer_types (Iterable[str]): of the converted model.
    """
    pairs = zip(source_layer_types(config), layer_types)
    changed = any(old == "sliding_attention" != new for old, new in pairs)
    return config.sliding_window if changed else float("inf")


def build_key_map(config) -> dict[str, tuple[str, ...]]:
    """Name, for every key a dense source of this shape has, the parameters it is copied to.

    Args:
        config (NSAConfig): of the converted model.

    Returns:
        dict[str, tuple[str, ...]]: source key → parameter names. Without `shared_kv`, K and V (biases and k-norm too)
        of a native sparse layer go to all three branches. `lm_head.weight` is absent when embeddings are tied.
    """
    keys = {"model.embed_tokens.weight": (), "model.norm.weight": ()}
    if not config.tie_word_embeddings:
        keys["lm_head.weight"] = ()
    branches = () if config.shared_kv else ("_cmp", "_win")
    for i, kind in enumerate(config.layer_types or ["native_sparse_attention"] * config.num_hidden_layers):
        layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        copies = branches if kind == "native_sparse_attention" else ()
        norms = ("input", "post_attention")
        if config.decoder_type == "gemma3":
            norms += ("pre_feedforward", "post_feedforward")
        keys |= {f"{layer}{name}_layernorm.weight": () for name in norms}
        for name in ("gate", "up", "down"):
            for part in ("weight", "bias") if config.mlp_bias else ("weight",):
                keys[f"{layer}mlp.{name}_proj.{part}"] = ()
        for name in "qkvo":
            bias = config.attention_output_bias if name == "o" else config.attention_bias
            for part in ("weight", "bias") if bias else ("weight",):
                extra = copies if name in "kv" else ()
                keys[f"{attention}{name}_proj.{part}"] = tuple(f"{attention}{name}_proj{b}.{part}" for b in extra)
        if config.use_qk_norm:
            keys[f"{attention}q_norm.weight"] = ()
            keys[f"{attention}k_norm.weight"] = tuple(f"{attention}k_norm{b}.weight" for b in copies)
    return {key: (key, *copies) for key, copies in keys.items()}


def check_source_keys(present: Iterable[str], expected: Iterable[str], *, tied: bool) -> set[str]:
    """Compare the keys of a source with those its configuration promises.

    Args:
        present (Iterable[str]): keys in the checkpoint.
        expected (Iterable[str]): keys of `build_key_map`.
        tied (bool): the source ties its embeddings; a stored `lm_head.weight` then needs no rule.

    Returns:
        set[str]: keys left out by rule: saved rotary tables, and `lm_head.weight` of tied embeddings.

    Raises:
        NSAError: missing keys, or keys without a rule; both are named.
    """
    present, expected = set(present), set(expected)
    ignored = {key for key in present if _IGNORED.fullmatch(key)}
    if tied:
        ignored |= present & {"lm_head.weight"} - expected
    problems = []
    if unmapped := sorted(present - expected - ignored):
        problems.append(f"keys that no rule maps: {listing(unmapped)}")
    if missing := sorted(expected - present):
        problems.append(f"missing keys: {listing(missing)}")
    if problems:
        raise NSAError(f"the source does not hold what its configuration promises; {'; '.join(problems)}.")
    return ignored


def parse_layers(text: str) -> list[int]:
    """`"0,5,20-23"` → `[0, 5, 20, 21, 22, 23]`; `"none"` → `[]`.

    Raises:
        NSAError: not a list of layer numbers and ranges.
    """
    if text.strip().lower() in ("", "none"):
        return []
    layers = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise NSAError(f"full_attention_layers must look like 0,5,20-23 or none, got {text!r}.")
        layers |= set(range(first, last + 1))
    return sorted(layers)
