# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Time training steps of a 1B model on one GPU: native sparse attention against torch's dense attention.

    python kernels/benchmarks/benchmark_training.py --output kernels/benchmarks/results/training.csv

Both models have the sizes of Llama-3.2-1B and random weights: `NSAForCausalLM` as conversion lays it out (separate keys
and values for the branches, scaled gates), and `LlamaForCausalLM` with torch's FlashAttention-2 or cuDNN attention.
Batch 1, bf16 weights, activation checkpointing of every layer, the loss in chunks of tokens, fused AdamW with bf16
moments, no compilation. Rows give the median step in milliseconds, tokens per second and the peak memory.

Two kinds of text, neither like a language: "random" tokens, so that neighbouring queries share few blocks, and "runs",
where a token repeats the one before with a probability of 0.9; the columns union_2 … union_16 say how many blocks 2, 4,
8, 16 neighbours need together (18, 20, 23, 25 in SmolLM2-135M on English text). Dense attention takes as long on both.
phi_gates_share is the kernel time of φ and the gates, forward and backward, over that of the attention they serve.
"""

import gc
import statistics
import time
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from benchmark_attention import DENSE
from benchmark_parts import record_kernels
from common import (
    SIZES,
    Results,
    check,
    machine,
    make_parser,
    plot_steps,
    require_cuda,
    unions,
)
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_nsa import NSAConfig, NSAForCausalLM, attention_nsa

# Llama-3.2-1B's
MODEL = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
NAMES = ("nsa", *DENSE)
TEXTS = ("random", "runs")
LOSS_CHUNK = 4096


def build(name, sizes, device="cuda", dtype=torch.bfloat16):
    """The model in training mode, with activation checkpointing."""
    torch.manual_seed(0)
    with torch.device(device):
        if name == "nsa":
            model = NSAForCausalLM(NSAConfig(**{**SIZES, "gate_scale": True, **sizes}))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa"))
    model = model.to(dtype).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_text(kind, tokens, vocab_size, device="cuda", seed=0):
    """Token ids `[1, tokens]`."""
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.randint(vocab_size, (tokens,), device=device, generator=generator)
    if kind == "runs":
        new = torch.rand(tokens, device=device, generator=generator) < 0.1
        new[0] = True
        ids = ids[new][new.cumsum(0) - 1]
    return ids[None]


def chunked_loss(hidden, weight, ids):
    """Next-token cross-entropy of hidden states `[1, T, hidden_size]`, never with all logits at once."""
    return summed_loss(hidden[0, :-1], weight, ids[0, 1:]) / (ids.shape[1] - 1)


def summed_loss(hidden, weight, labels):
    """The same from hidden states `[T, hidden_size]` and their labels `[T]`, summed."""

    def chunk(hidden, labels):
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    pairs = zip(hidden.split(LOSS_CHUNK), labels.split(LOSS_CHUNK))
    return sum(checkpoint(chunk, *pair, use_reentrant=False) for pair in pairs)


def step(model, optimizer, ids, backend=None):
    """One training step; the dense kernels are chosen for the recomputation in the backward pass too."""
    with sdpa_kernel(backend) if backend is not None else nullcontext():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = chunked_loss(hidden, model.lm_head.weight, ids)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def measure_steps(run, tokens, steps):
    """Median, 20 % and 80 % quantile of steps in ms after two that are not counted, tokens/s, peak memory, loss.

    Args:
        run: One step; returns the loss.
    """
    times = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2 + steps):
        start = time.perf_counter()
        loss = run()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    times = sorted(times[2:])
    median = statistics.median(times)
    return {
        "median_ms": round(median, 1),
        "q20_ms": round(times[len(times) // 5], 1),
        "q80_ms": round(times[-1 - len(times) // 5], 1),
        "tokens_per_s": round(1000 * tokens / median),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": round(loss, 3),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What the sparse layers do
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def model_unions(model, ids):
    """`unions` of the blocks that the model chooses, mean over its layers."""
    model.eval()
    layers = model.model(input_ids=ids, use_cache=False, output_block_indices=True).block_indices
    model.train()
    found = [unions(block_indices[0]) for block_indices in layers]
    return {name: round(statistics.mean(layer[name] for layer in found), 2) for name in found[0]}


def capture_layer(model, ids):
    """Calls of φ, of the gates and of the attention in the first layer: name to (function, args, kwargs)."""
    layer, calls = model.model.layers[0].self_attn, {}
    original = attention_nsa.nsa_attention

    def attention(*args, **kwargs):
        calls["attention"] = (original, args, kwargs)
        return original(*args, **kwargs)

    def hook(name):
        return lambda module, args, kwargs: calls.__setitem__(name, (module, args, kwargs))

    hooks = [
        getattr(layer, name).register_forward_pre_hook(hook(name), with_kwargs=True)
        for name in ("compress_k", "compress_v", "gate")
    ]
    attention_nsa.nsa_attention = attention
    try:
        with torch.no_grad():
            model.model(input_ids=ids, use_cache=False)
    finally:
        attention_nsa.nsa_attention = original
        for handle in hooks:
            handle.remove()
    return calls


def replay(function, args, kwargs):
    """Run a captured call forward and backward."""
    args = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in args]
    out = function(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(torch.ones_like(out))
    if isinstance(function, torch.nn.Module):
        function.zero_grad(set_to_none=True)


def measure_compression(model, ids, repeats=3):
    """Kernel times in ms of φ and the gates, and of the attention, in one layer, forward and backward."""
    times = {}
    for name, call in capture_layer(model, ids).items():
        replay(*call)
        kernels = record_kernels(lambda call=call: [replay(*call) for _ in range(repeats)])
        times[name] = sum(kernel["stop"] - kernel["start"] for kernel in kernels) / repeats
    attention = times.pop("attention")
    return {
        "phi_gates_ms": round(sum(times.values()), 4),
        "attention_ms": round(attention, 4),
        "phi_gates_share": round(sum(times.values()) / attention, 4),
    }


# ---------------------------------------------------------------------------------------------------------------------


def plot(rows, path):
    """Tokens per second and peak memory by length."""
    found = dict.fromkeys((row["implementation"], row["text"]) for row in rows)
    series = {f"{name}, {text} text": {"implementation": name, "text": text} for name, text in found}
    return plot_steps(rows, path, f"Training steps of a 1B model, {rows[0]['gpu']}", series, "step", "peak memory, GiB")


def parse(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--implementations", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768, 65536], help="tokens in a step")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS), help="dense models get the first")
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"], help="layers of the model")
    parser.add_argument("--steps", type=int, default=5, help="steps to time after two that are not counted")
    return parser.parse_args(arguments)


def main():
    args = parse()
    require_cuda()
    sizes = {**MODEL, "num_hidden_layers": args.layers}
    about = {"layers": args.layers, "optimizer": "fused AdamW, bf16", "checkpointing": "every layer"}
    results = Results(args.output, about | machine(args.commit))
    if "nsa" in args.implementations:
        heads = (sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["head_dim"])
        same = check("local", *heads, torch.bfloat16)
        print(f"kernels agree with the reference, {same:.2%} of the selections identical", flush=True)
    for name in args.implementations:
        model = build(name, sizes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name}: {parameters / 1e9:.2f} B parameters", flush=True)
        for tokens in args.lengths:
            for text in args.texts if name == "nsa" else args.texts[:1]:
                ids = make_text(text, tokens, sizes["vocab_size"])
                row = {"implementation": name, "text": text, "tokens": tokens, "parameters": parameters}
                try:
                    run = partial(step, model, optimizer, ids, DENSE.get(name))
                    row |= measure_steps(run, tokens, args.steps)
                    if name == "nsa":
                        row |= model_unions(model, ids) | measure_compression(model, ids)
                except torch.OutOfMemoryError:
                    row["note"] = "out of memory"
                    optimizer.zero_grad(set_to_none=True)
                results.add(**row)
                shown = ("median_ms", "tokens_per_s", "peak_gib", "union_8", "phi_gates_share", "note")
                values = "  ".join(f"{key} {row[key]:,}" for key in shown[:-1] if key in row)
                print(f"{name} {text} {tokens:,}: {values}{row.get('note', '')}", flush=True)
                gc.collect()
                torch.cuda.empty_cache()
        del model, optimizer
        gc.collect()
        torch.cuda.empty_cache()
    plot(results.rows, args.output)


if __name__ == "__main__":
    main()
