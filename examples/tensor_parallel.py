# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Run an NSA model with its heads shared out over several devices (tensor parallelism).

    torchrun --nproc_per_node 3 examples/tensor_parallel.py smollm2-nsa --prompt "Gravity is"

The number of processes must divide the model's key/value heads, 3 in SmolLM2-135M.
"""

import argparse
import os

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import modeling_nsa  # noqa: F401 - registers the model type


def main() -> None:
    """Print the loss of the prompt, the norm of its gradient, and what follows it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="NSA model: a directory or hub id")
    parser.add_argument("--prompt", default="Gravity is the force by which", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=20, help="tokens to add")
    args = parser.parse_args()
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    heads = AutoConfig.from_pretrained(args.model).num_key_value_heads
    if heads % processes:
        parser.error(f"{processes} processes cannot share {heads} key/value heads: start a number that divides them")

    distributed = DistributedConfig(tp_size=processes) if processes > 1 else None
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32", distributed_config=distributed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    answer = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    if rank == 0:
        # the first norm lies whole on every device; what each device's heads say of it has been added up
        norm = model.model.layers[0].input_layernorm.weight.grad.norm()
        print(f"loss {loss.item():.6f}, gradient of the first norm {norm.item():.6g}")
        print(tokenizer.decode(answer[0]))
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
