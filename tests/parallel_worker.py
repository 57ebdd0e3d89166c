# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""One process of the tests of context parallelism: loss, logits and gradients of its share of every case.

python parallel_worker.py STORE RANK SIZE OUTPUT DEVICE
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tiny_nsa import make_ids, make_model
from torch.distributed.device_mesh import DeviceMesh

from modeling_nsa import shard_inputs

DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 64}
# name: kind of model, changes of its configuration, shape of the batch or lengths of packed sequences
CASES = {
    "one sequence": ("separate", {}, (1, 257)),
    "shared, packed": ("shared", {}, [5, 130, 1, 64, 63]),
    "full attention": ("hybrid", {}, [90, 41, 7]),
    "sliding attention": ("sliding", {}, (1, 131)),
    "mean, rows of a batch": ("mean", {}, (3, 65)),
    "mlp, sequences end with chunks": ("mlp", {}, [64, 32, 32]),
    "qwen3-like": ("qwen3-like", {}, [63, 66]),
    "no rope": ("smollm3-like", {}, (1, 97)),
    "dynamic rope": ("separate", DYNAMIC, (1, 143)),
    "two ropes": ("gemma3-like", {}, [90, 41]),
    "two ropes, sliding attention": ("gemma3 sliding", {}, (1, 131)),
    "shorter than a window": ("separate", {}, (1, 3)),
    "no blocks": ("shared", {}, [5, 7, 3, 6, 7, 2]),
    "no window": ("separate", {"window_size": 1}, (1, 75)),
    "checkpointed": ("separate", {"gradient_checkpointing": True}, [150, 21]),
    "checkpointed, a head at a time": ("separate", {"gradient_checkpointing": True, "heads_at_once": 1}, [150, 21]),
}


def make_case(name, device="cpu"):
    """Model and batch of a case, and the key/value heads that are gathered at a time."""
    variant, changes, shape = CASES[name]
    changes = dict(changes)
    checkpointing, heads = changes.pop("gradient_checkpointing", False), changes.pop("heads_at_once", None)
    model = make_model(variant, **changes)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {"input_ids": make_ids(*(shape if isinstance(shape, tuple) else (1, sum(shape))))}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, : batch["labels"].shape[1] // 3] = -100  # the early chunks have fewer labels than the late ones
    if isinstance(shape, list):
        batch["position_ids"] = torch.cat([torch.arange(length) for length in shape])[None]
    return model.to(device), {key: x.to(device) for key, x in batch.items()}, heads


def run(model, inputs):
    """Loss, logits, the blocks chosen and every parameter's gradient."""
    model.zero_grad()
    output = model(**inputs, use_cache=False, output_block_indices=True)
    output.loss.backward()
    gradients = {name: x.grad if x.grad is None else x.grad.cpu() for name, x in model.named_parameters()}
    return {
        "loss": output.loss.item(),
        "logits": output.logits.detach().cpu(),
        "block_indices": [x.cpu() for x in output.block_indices],
        "gradients": gradients,
    }


def main(store, rank, size, output, device):
    rank, size = int(rank), int(size)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    mesh = DeviceMesh(device, list(range(size)))
    results = {}
    for name in CASES:
        model, batch, heads = make_case(name, device)
        results[name] = run(model, shard_inputs(batch, mesh, model.config, heads))
    torch.save(results, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
