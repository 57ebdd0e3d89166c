# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Makers of tiny random checkpoints, so that every test is fast and needs no network."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["ARCHITECTURES", "SMALL_NSA", "VOCAB_SIZE", "make_checkpoint", "make_config", "make_tokenizer", "random_ids"]

VOCAB_SIZE = 272
# n·l' = 32 tokens, so that short sequences already need a selection.
SMALL_NSA = {
    "compress_block_size": 4,
    "compress_stride": 2,
    "select_block_size": 8,
    "num_selected_blocks": 4,
    "num_initial_blocks": 1,
    "num_local_blocks": 2,
    "window_size": 12,
}
_BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What is special about each architecture is switched on.
ARCHITECTURES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1], "tie_word_embeddings": True},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 10,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
        },
        "tie_word_embeddings": True,
    },
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_config(arch="llama", **changes):
    """The transformers configuration of a tiny model.

    Args:
        arch: a key of `ARCHITECTURES`.
        changes: configuration fields.
    """
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[arch](**{**_BASE, **ARCHITECTURES[arch], **changes})


def make_tokenizer(path):
    """Save a byte-level tokenizer of 259 tokens with a chat template in `path`, and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=_CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(path)
    return tokenizer


def make_model(arch="llama", *, seed=0, **changes):
    """A tiny dense model whose every parameter is random: norms and biases too, so that none can be forgotten."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(arch, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.25 * noise)
    return model.eval()


def make_checkpoint(path, arch="llama", *, shards=1, dtype=torch.float32, tokenizer=True, seed=0, **config):
    """Save a tiny random dense checkpoint.

    Args:
        path: directory to create.
        arch: a key of `ARCHITECTURES`.
        shards: number of safetensors files; more than one adds the index file.
        dtype: of the weights.
        tokenizer: save one too.
        seed: of the weights.
        config: configuration fields that differ from the tiny defaults.

    Returns:
        Path: the directory.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    model = make_model(arch, seed=seed, **config).to(dtype)
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    model.generation_config.max_new_tokens = 7
    model.generation_config.save_pretrained(path)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    save_sharded(state, path, shards)
    if tokenizer:
        make_tokenizer(path)
    return path


def save_sharded(state, path, shards=1):
    """Write `state` as `shards` safetensors files of about the same number of tensors."""
    if shards == 1:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map, names = {}, list(state)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: state[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def random_ids(tokens, *, batch=1, seed=0):
    """[batch, tokens] token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, tokens), generator=generator)
