# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Source configurations and keys: everything a dense model has is accounted for, nothing is guessed."""

import dataclasses

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from modeling_nsa import NSAConfig, NSAForCausalLM
from nsa_conversion import key_map
from nsa_conversion.errors import NSAError

VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True}),
    ("smollm3", {}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("gemma3_text", {}),
    ("gemma3_text", {"attention_bias": True, "tie_word_embeddings": False}),
]


def nsa_config(source, full_attention_layers=(), convert_sliding=False, **nsa):
    backbone = key_map.config_kwargs(
        source, full_attention_layers=full_attention_layers, convert_sliding=convert_sliding
    )
    return NSAConfig(**backbone, **{**tiny.SMALL_NSA, **nsa}, gate_scale=True)


def meta_state(build):
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build().state_dict().items()}


@pytest.mark.parametrize("arch, changes", VARIANTS)
@pytest.mark.parametrize("shared_kv", [False, True])
def test_key_map_is_closed_on_both_sides(arch, changes, shared_kv):
    source = tiny.make_config(arch, **changes)
    config = nsa_config(source, full_attention_layers=[1], shared_kv=shared_kv)
    dense = meta_state(lambda: AutoModelForCausalLM.from_config(source))
    nsa = meta_state(lambda: NSAForCausalLM(config))
    mapping = key_map.build_key_map(config)

    tied = {"lm_head.weight"} if source.tie_word_embeddings else set()
    assert set(mapping) == set(dense) - tied
    filled = [name for names in mapping.values() for name in names]
    assert len(filled) == len(set(filled))
    rest = set(nsa) - set(filled) - tied
    assert all(name.split(".self_attn.")[1].startswith(key_map.NEW_PARAMETERS) for name in rest)
    for key, names in mapping.items():
        assert names[0] == key
        assert all(nsa[name] == dense[key] for name in names)


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_every_field_of_the_source_configuration_is_accounted_for(arch):
    own = {f.name for f in dataclasses.fields(CONFIG_MAPPING[arch])}
    own -= {f.name for f in dataclasses.fields(PreTrainedConfig)}
    known = key_map.ARCHITECTURES[arch].reads | key_map._READ_BY_ALL
    assert own <= known, f"{arch} has fields that the conversion neither reads nor knows to be without effect"


def test_branches_get_copies_in_sparse_layers_only():
    config = nsa_config(tiny.make_config("qwen3", attention_bias=True), full_attention_layers=[0])
    mapping = key_map.build_key_map(config)
    prefix = "model.layers.{}.self_attn."
    for part in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias", "k_norm.weight"):
        module, kind = part.split(".")
        copies = tuple(f"{prefix.format(1)}{module}{branch}.{kind}" for branch in ("", "_cmp", "_win"))
        assert mapping[prefix.format(1) + part] == copies
        assert mapping[prefix.format(0) + part] == (prefix.format(0) + part,)
    assert mapping[prefix.format(1) + "q_norm.weight"] == (prefix.format(1) + "q_norm.weight",)


def test_biases_and_norms_follow_the_architecture():
    def kwargs(arch, **changes):
        found = key_map.config_kwargs(tiny.make_config(arch, **changes))
        return tuple(
            found.get(name, False) for name in ("attention_bias", "attention_output_bias", "mlp_bias", "use_qk_norm")
        )

    assert kwargs("llama", attention_bias=True, mlp_bias=False) == (True, True, False, False)
    assert kwargs("mistral") == (False, False, False, False)
    assert kwargs("qwen2") == (True, False, False, False)
    assert kwargs("qwen3") == (False, False, False, True)
    assert kwargs("smollm3") == (False, False, False, False)
    assert kwargs("gemma3_text") == (False, False, False, True)


def test_rope_and_head_dim_are_carried_over():
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    config = nsa_config(tiny.make_config("qwen3", rope_parameters=rope, head_dim=32))
    assert config.rope_parameters == rope
    assert config.head_dim == 32
    assert nsa_config(tiny.make_config("qwen2")).head_dim == 8
    assert nsa_config(tiny.make_config("smollm3")).no_rope_layers == [1, 0, 1, 1]


def test_gemma3s_own_fields_are_carried_over():
    config = nsa_config(tiny.make_config("gemma3_text", final_logit_softcapping=30.0))
    assert (config.decoder_type, config.hidden_act) == ("gemma3", "gelu_pytorch_tanh")
    assert (config.query_pre_attn_scalar, config.final_logit_softcapping) == (24, 30.0)
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert config.layer_rope_theta == [100.0, None, None]
    converted = nsa_config(tiny.make_config("gemma3_text"), convert_sliding=True)
    assert converted.layer_types == ["native_sparse_attention"] * 3
    assert converted.layer_rope_theta == [100.0, None, None]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
            "sliding layers must be unscaled .* 'linear'",
        ),
    ],
)
def test_what_no_layer_computes_of_gemma3_is_refused(changes, message):
    with pytest.raises(NSAError, match=message):
        key_map.config_kwargs(tiny.make_config("gemma3_text", **changes))


def test_sliding_layers_stay_unless_asked():
    mistral = tiny.make_config("mistral", sliding_window=16, num_hidden_layers=3)
    with pytest.raises(NSAError, match=r"no layer would become native sparse.*--convert-sliding"):
        key_map.config_kwargs(mistral)
    converted = key_map.config_kwargs(mistral, convert_sliding=True, full_attention_layers=[2])
    assert converted["layer_types"] == ["native_sparse_attention"] * 2 + ["full_attention"]
    assert converted.get("sliding_window") is None

    qwen2 = tiny.make_config("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    kept = key_map.config_kwargs(qwen2)
    assert kept["layer_types"] == ["native_sparse_attention", "sliding_attention"]
    assert kept["sliding_window"] == 16
    assert key_map.changed_window(qwen2, kept["layer_types"]) == float("inf")
    assert key_map.changed_window(qwen2, ["native_sparse_attention"] * 2) == 16
    with pytest.raises(NSAError, match="layers 1, which are sliding-window layers"):
        key_map.config_kwargs(qwen2, full_attention_layers=[1])

    smollm3 = tiny.make_config("smollm3", use_sliding_window=True, sliding_window=16)
    assert key_map.config_kwargs(smollm3)["layer_types"][1] == "sliding_attention"


def test_layer_types_the_source_model_does_not_compute_are_refused():
    mixed = tiny.make_config("mistral", sliding_window=16, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(NSAError, match="mixes layer_types"):
        key_map.config_kwargs(mixed)
    other = tiny.make_config("qwen2", layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(NSAError, match="chunked_attention"):
        key_map.config_kwargs(other)


def test_unsupported_model_types_are_refused():
    with pytest.raises(NSAError, match=r"'gpt2' cannot be converted. Supported: llama, .*CONTRIBUTING"):
        key_map.check_model_type("gpt2")
    with pytest.raises(NSAError, match="already"):
        key_map.check_model_type("native_sparse_attention")


def test_keys_without_rule_and_missing_keys_are_named():
    expected = {"model.norm.weight", "model.embed_tokens.weight"}
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"}
    present = expected | rotary
    assert key_map.check_source_keys(present, expected, tied=False) == rotary
    assert key_map.check_source_keys(present | {"lm_head.weight"}, expected, tied=True) == rotary | {"lm_head.weight"}
    with pytest.raises(NSAError, match=r"no rule maps: lm_head.weight"):
        key_map.check_source_keys(present | {"lm_head.weight"}, expected, tied=False)
    with pytest.raises(NSAError, match=r"no rule maps: score.weight; missing keys: model.norm.weight"):
        key_map.check_source_keys({"model.embed_tokens.weight", "score.weight"}, expected, tied=False)


@pytest.mark.parametrize(
    "text, layers",
    [("none", []), ("", []), ("0", [0]), ("0,5,20-23", [0, 5, 20, 21, 22, 23]), (" 3 - 4 , 1", [1, 3, 4])],
)
def test_parse_layers(text, layers):
    assert key_map.parse_layers(text) == layers


@pytest.mark.parametrize("text", ["a", "1,,2", "3-1", "-1", "1-2-3", "0.5"])
def test_parse_layers_refuses_what_it_cannot_read(text):
    with pytest.raises(NSAError, match="must look like"):
        key_map.parse_layers(text)


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(NSAError, match=r"must be in 0 … 1, got 2"):
        key_map.config_kwargs(tiny.make_config("llama"), full_attention_layers=[0, 2])
    with pytest.raises(NSAError, match="no layer would become native sparse"):
        key_map.config_kwargs(tiny.make_config("llama"), full_attention_layers=[0, 1])
