# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny random NSA models of every kind, for the tests of the model and of its cache."""

import pytest
import torch

from modeling_nsa import NSAConfig, NSAForCausalLM

__all__ = [
    "BASE",
    "VARIANTS",
    "close",
    "every_variant",
    "logits",
    "main_variants",
    "make_ids",
    "make_model",
    "sparse_variants",
]

BASE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "compress_block_size": 8,
    "compress_stride": 4,
    "select_block_size": 8,
    "num_selected_blocks": 3,
    "window_size": 10,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
}
HYBRID = {"layer_types": ["full_attention", "native_sparse_attention"]}
GEMMA3 = {
    "decoder_type": "gemma3",
    "hidden_act": "gelu_pytorch_tanh",
    "use_qk_norm": True,
    "query_pre_attn_scalar": 12,
    "layer_rope_theta": [100.0, None],
    "final_logit_softcapping": 30.0,
}
VARIANTS = {
    "separate": {},
    "shared": {"shared_kv": True},
    "hybrid": HYBRID,
    "mean": {"compress_type": "mean"},
    "mlp": {"compress_type": "mlp", "shared_kv": True},
    "pool": {"compress_type": "pool", "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "qwen3-like": {"use_qk_norm": True, "attention_bias": True, "gate_scale": True, "v_head_dim": 12},
    "smollm3-like": {"no_rope_layers": [1, 0]},
    "sliding": {"layer_types": ["sliding_attention", "native_sparse_attention"], "sliding_window": 7},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, "shared_kv": True},
    "gemma3-like": GEMMA3,
    "gemma3 sliding": {
        **GEMMA3,
        "layer_types": ["sliding_attention", "native_sparse_attention"],
        "sliding_window": 7,
        "shared_kv": True,
    },
    "one group": {"num_key_value_heads": 6},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
# recording by full and sliding layers is transformers' own, and has changed between versions
sparse_variants = pytest.mark.parametrize("variant", [name for name in VARIANTS if "sliding" not in name])
main_variants = pytest.mark.parametrize("variant", ["separate", "shared", "hybrid", "gemma3-like"])


def make_model(variant="separate", seed=0, **changes):
    """A tiny model in which every parameter is at work, those that start at zero too."""
    torch.manual_seed(seed)
    model = NSAForCausalLM(NSAConfig(**{**BASE, **VARIANTS[variant], **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("fc2", "w2", "b2", "pos_embed")):
                parameter.normal_(0, 0.3)
            elif "gate_scale" in name:
                parameter.normal_(0, 0.02)
    return model


def make_ids(*shape, seed=0):
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits
