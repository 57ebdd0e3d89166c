# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The numbers of a dry run, against the model's own parameters and cache and against counting by brute force."""

import json

import pytest
import tiny
import torch

from modeling_nsa import NSAConfig, NSAForCausalLM
from nsa_conversion import plan as make_plan
from nsa_conversion.errors import NSAError
from nsa_conversion.key_map import config_kwargs
from nsa_conversion.plan import attention_flops, kv_cache_bytes, parameter_counts


def small_config(**changes):
    source = tiny.make_config(
        "qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=10, max_window_layers=2
    )
    settings = {**tiny.SMALL_NSA, "gate_scale": True, **changes}
    return NSAConfig(**config_kwargs(source, full_attention_layers=[1]), **settings)


def paper_config(**changes):
    """SmolLM2-135M's shape at the paper's sizes."""
    shape = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30}
    return NSAConfig(**shape, **changes)


@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("compress_type", ["mean", "residual_mlp", "pool"])
def test_parameters_are_those_of_the_model(shared_kv, compress_type):
    config = small_config(shared_kv=shared_kv, compress_type=compress_type)
    counts = parameter_counts(config)
    dense = tiny.make_model(
        "qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=10, max_window_layers=2
    )
    assert counts["source"] == sum(p.numel() for p in dense.parameters())
    assert counts["total"] == sum(p.numel() for p in NSAForCausalLM(config).parameters())
    assert counts["total"] == counts["source"] + counts["copied"] + counts["new"]
    assert (counts["copied"] == 0) == shared_kv
    assert counts["new"] > 0


@pytest.mark.parametrize("tokens", [1, 3, 5, 16, 45])
@pytest.mark.parametrize(
    "changes", [{}, {"shared_kv": True}, {"compress_type": "mean"}, {"compress_type": "mlp"}, {"compress_type": "pool"}]
)
def test_cache_bytes_are_what_the_cache_holds(tokens, changes):
    config = small_config(**changes)
    torch.manual_seed(0)
    model = NSAForCausalLM(config).eval()
    with torch.no_grad():
        cache = model(tiny.random_ids(tokens), use_cache=True).past_key_values
        cache = model(tiny.random_ids(1), past_key_values=cache).past_key_values
    names = ("keys", "values", "k_cmp", "v_cmp", "k_tail", "k_tail_rot", "v_tail", "k_win", "v_win")
    states = [getattr(layer, name, None) for layer in cache.layers for name in names]
    held = sum(state.nbytes for state in states if state is not None)
    assert kv_cache_bytes(config, tokens + 1, itemsize=4) == held


@pytest.mark.parametrize("shared_kv, ratio", [(False, 1.07), (True, 1.06)])
def test_cache_ratio_at_64k_is_the_papers(shared_kv, ratio):
    config = paper_config(shared_kv=shared_kv)
    dense = paper_config(layer_types=["full_attention"] * 30)
    assert kv_cache_bytes(config, 65536) / kv_cache_bytes(dense, 65536) == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize("tokens", [1, 3, 4, 31, 33, 77])
def test_attention_flops_by_brute_force(tokens):
    config = small_config(compress_type="mean")
    length, stride, block = config.compress_block_size, config.compress_stride, config.select_block_size
    pairs = 0
    for t in range(tokens):
        compressed = sum(i * stride + length - 1 <= t for i in range(tokens))
        visible = t // block + 1
        whole = min(visible, config.num_selected_blocks) - 1
        pairs += compressed + whole * block + t % block + 1 + min(t + 1, config.window_size)
        pairs += t + 1  # the full layer
        pairs += min(t + 1, 10)  # the sliding layer
    assert attention_flops(config, tokens) == 4 * config.num_attention_heads * config.head_dim * pairs


def test_pooling_is_counted():
    mean, mlp = small_config(compress_type="mean"), small_config(compress_type="mlp", compress_hidden_size=5)
    blocks = (40 - 4) // 2 + 1
    expected = blocks * 2 * (2 * 5 * 4 * 8 + 2 * 5 * 8) * 2  # H, then φ_K and φ_V
    assert attention_flops(mlp, 40) - attention_flops(mean, 40) == expected


def test_long_prefill_is_cheaper():
    dense = paper_config(layer_types=["full_attention"] * 30)
    ratios = [attention_flops(paper_config(), tokens) / attention_flops(dense, tokens) for tokens in (8192, 65536)]
    assert ratios[1] < ratios[0] < 1


def test_plan_of_a_checkpoint(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "smollm3", dtype=torch.bfloat16)
    plan = make_plan(source, full_attention_layers="0", **tiny.SMALL_NSA)
    assert plan.model_type == "smollm3"
    assert plan.dtype == "bfloat16"
    assert plan.exact_tokens == 32
    assert plan.layers == {"full_attention": 1, "native_sparse_attention": 3}
    assert plan.lengths == (8192, 65536)
    assert plan.dense_kv_cache_bytes[0] == 4 * 8192 * 2 * (8 + 8) * 2
    assert plan.nsa["window_size"] == 12
    text = str(plan)
    for part in ("8k tokens", "64k tokens", "KV cache, converted", "attention FLOPs", f"{plan.total_parameters:,}"):
        assert part in text
    assert json.loads(json.dumps(plan.to_dict()))["new_parameters"] == plan.new_parameters
    assert make_plan(source, dtype="float32").dtype == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_plan_refuses_what_the_conversion_would(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "llama")
    with pytest.raises(NSAError, match="compress_stride"):
        make_plan(source, compress_stride=5)
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(NSAError, match="not a complete safetensors file"):
        make_plan(source)


def test_plan_of_sliding_layers(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "mistral", sliding_window=20)
    plan = make_plan(source, convert_sliding=True, **tiny.SMALL_NSA)
    assert plan.exact_tokens == 20
    assert plan.dense_kv_cache_bytes[0] == 2 * 19 * 2 * (16 + 16) * 4
    assert plan.dense_attention_flops[0] == 2 * 4 * 6 * 16 * (20 * 21 // 2 + (8192 - 20) * 20)
