# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The configuration: defaults, validation, round trip."""

import pytest
from transformers import AutoConfig

from modeling_nsa import NSAConfig


def test_defaults_are_the_papers():
    config = NSAConfig()
    assert config.block_sizes == {
        "compress_block_size": 32,
        "compress_stride": 16,
        "select_block_size": 64,
        "num_selected_blocks": 16,
        "num_initial_blocks": 1,
        "num_local_blocks": 2,
        "window_size": 512,
    }
    assert config.head_dim == 128
    assert set(config.layer_types) == {"native_sparse_attention"}


def test_round_trip_through_auto_config(tmp_path):
    config = NSAConfig(
        num_hidden_layers=3,
        layer_types=["native_sparse_attention", "full_attention", "sliding_attention"],
        sliding_window=128,
        shared_kv=True,
        no_rope_layers=[1, 0, 1],
        layer_rope_theta=[None, None, 1e3],
        decoder_type="gemma3",
        query_pre_attn_scalar=168,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, NSAConfig)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_fewer_layers_than_saved_can_be_saved_again(tmp_path):
    fields = {"no_rope_layers": [1, 0, 1], "layer_rope_theta": [None, None, 1e3]}
    NSAConfig(num_hidden_layers=3, **fields).save_pretrained(tmp_path / "three")
    AutoConfig.from_pretrained(tmp_path / "three", num_hidden_layers=2).save_pretrained(tmp_path / "two")
    two = AutoConfig.from_pretrained(tmp_path / "two")
    assert (two.num_hidden_layers, two.no_rope_layers, two.layer_rope_theta) == (2, [1, 0], [None, None])
    assert len(two.layer_types) == 2


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"compress_block_size": 24},
            "`compress_stride` .d. must divide `compress_block_size`.*got compress_stride=16",
        ),
        ({"select_block_size": 40}, "`compress_stride` .d. must divide `select_block_size`"),
        ({"num_selected_blocks": 2}, r"`num_selected_blocks` \(n\) must be at least .* got 2 < 1 \+ 2"),
        ({"num_local_blocks": 0}, "`num_local_blocks` must be an integer >= 1, got 0"),
        ({"window_size": 0}, "`window_size` must be an integer >= 1, got 0"),
        ({"num_attention_heads": 10, "num_key_value_heads": 4}, "multiple of `num_key_value_heads`.*got 10 and 4"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads` must be a positive integer, got 0"),
        ({"layer_types": ["mamba"] * 32}, "`layer_types` must hold only .* got "),
        ({"layer_types": ["full_attention"]}, "`layer_types` must have one entry per layer, got 1"),
        ({"no_rope_layers": [1]}, "`no_rope_layers` must have one entry per layer, got 1"),
        ({"layer_types": ["sliding_attention"] * 32}, "`sliding_window` must be a positive number of tokens"),
        ({"layer_rope_theta": [None]}, "`layer_rope_theta` must have one entry per layer, got 1"),
        ({"sliding_window": -3, "layer_types": ["sliding_attention"] * 32}, "`sliding_window` must be a .* got -3"),
        ({"layer_rope_theta": [0.0] * 32}, "`layer_rope_theta` must hold positive numbers or None, got .0.0"),
        ({"no_rope_layers": [2] * 32}, "`no_rope_layers` must hold only 0 .* and 1 .*, got .2"),
        ({"hidden_size": 0}, "`hidden_size` must be a positive integer, got 0"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be a positive integer, got 0"),
        ({"gate_hidden_size": -1}, "`gate_hidden_size` must be a positive integer, got -1"),
        ({"rms_norm_eps": -1.0}, "`rms_norm_eps` must be a number >= 0, got -1"),
        ({"partial_rotary_factor": 0.5}, "`rope_parameters` must rotate whole heads.* got 0.5"),
        ({"query_pre_attn_scalar": 0}, "`query_pre_attn_scalar` must be a positive number, got 0"),
        ({"final_logit_softcapping": -1.0}, "`final_logit_softcapping` must be a positive number, got -1"),
        ({"decoder_type": "gemma"}, "`decoder_type` must be one of llama, gemma3, got 'gemma'"),
        ({"compress_type": "max"}, "`compress_type` must be one of mean, mlp, residual_mlp, pool, got 'max'"),
        ({"nsa_backend": "cuda"}, "`nsa_backend` must be one of auto, triton, reference, got 'cuda'"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        NSAConfig(**fields)


def test_a_sliding_window_without_sliding_layers_has_no_effect():
    assert NSAConfig(sliding_window=2, num_hidden_layers=1).layer_types == ["native_sparse_attention"]


@pytest.mark.parametrize("shared_kv", [False, True])
def test_the_tensor_parallel_plan_names_only_what_exists(shared_kv):
    plan = NSAConfig(shared_kv=shared_kv, compress_type="mean", use_qk_norm=True).base_model_tp_plan
    assert ("layers.*.self_attn.k_proj_cmp" in plan) != shared_kv
    assert ("layers.*.self_attn.k_norm_win" in plan) != shared_kv
    assert "layers.*.self_attn.compress_k" not in plan
    assert "layers.*.self_attn.gate_scale" not in plan
