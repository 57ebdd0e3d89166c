# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Time `generate` with long prompts on one GPU: native sparse models against dense ones.

    python kernels/benchmarks/benchmark_generate.py --output kernels/benchmarks/results/generate.csv

Models have random weights in the sizes of Llama-3-8B and SmolLM2-135M, sparse ones as conversion lays them out, with
keys and values of each branch or shared, and with fused projections; `--source` measures a checkpoint and its
conversion. Prompts are "random" tokens or "runs", where a token often repeats the one before and neighbouring queries
share more blocks, see benchmark_training.py. The prompt is filled in first, in chunks for sparse models and row by row
for dense ones, with torch's FlashAttention-2 or cuDNN; then `generate` continues with a dynamic cache, a static one,
and a static one compiled as `generate` does by itself. Rows give the seconds of the prompt, and of a step the median
and the 20 % and 80 % quantiles in milliseconds over the second half of the steps (the first half compiles), tokens per
second, the peak memory, and how many graphs were compiled during the steps. `--kernels` prints what a step, and a chunk
of a sparse model's prompt, spends in each kernel.
"""

import gc
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

# a cache that grows leaves pieces behind that are too small for what it needs next
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from benchmark_attention import DENSE
from benchmark_parts import record_kernels
from benchmark_training import TEXTS, make_text
from common import COLORS, SIZES, Results, machine, make_parser, new_figure, numbers, require_cuda, save_figure
from torch.nn.attention import sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache, StoppingCriteria

from modeling_nsa import NSAConfig, NSAForCausalLM
from modeling_nsa.cache_nsa import CACHE_NAME

MODELS = {
    "8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
    },
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "max_position_embeddings": 524288,
    },
}
NAMES = ("nsa", "nsa, shared K/V", "dense")
MODES = ("dynamic", "static", "static, compiled")


def build(name, sizes, device="cuda", dtype=torch.bfloat16):
    """A model with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        if name == "dense":
            model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa"))
        else:
            settings = {**SIZES, "gate_scale": True, "shared_kv": name != "nsa", **sizes}
            model = NSAForCausalLM(NSAConfig(**settings))
    model = model.to(dtype).eval()
    return model if name == "dense" else model.fuse_projections()


def load(name, source, device="cuda", dtype=torch.bfloat16):
    """A checkpoint, or its conversion."""
    from nsa_conversion import convert
    from nsa_conversion.sources import load_model

    if name == "dense":
        return load_model(str(source), dtype=dtype, device=device)[0].eval()
    with tempfile.TemporaryDirectory() as folder:
        dest = Path(folder) / "converted"
        convert(source, dest, shared_kv=name != "nsa", progress=False)
        return load_model(str(dest), dtype=dtype, device=device)[0].eval().fuse_projections()


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fill(model, ids, cache, chunk=None, backend=None):
    """Fill a cache with a prompt; returns the seconds."""
    synchronize()
    start = time.perf_counter()
    with torch.no_grad(), nullcontext() if backend is None else sdpa_kernel(backend):
        for part in ids.split(chunk or ids.shape[1], dim=1):
            model(part, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
    synchronize()
    return time.perf_counter() - start


def fill_by_rows(model, ids, cache, backend=None):
    """`fill` at once, but one row after the other: activations of all rows and their cache do not fit; the seconds."""
    rows = [DynamicCache(config=model.config) for _ in ids]
    seconds = sum(fill(model, row[None], own, backend=backend) for row, own in zip(ids, rows))
    for index in range(model.config.num_hidden_layers):
        layers = [own.layers[index] for own in rows]
        cache.update(*(torch.cat([getattr(x, name) for x in layers]) for name in ("keys", "values")), index)
        for layer in layers:
            layer.keys = layer.values = None
    return seconds


def to_static(cache, config, length):
    """Move a dynamic cache of full-attention layers into a static one, layer by layer."""
    static = StaticCache(config=config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        static.update(layer.keys, layer.values, index)
        layer.keys = layer.values = None
    return static


class Clock(StoppingCriteria):
    """Notes when each step ends, and stops nothing."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def decode(model, ids, cache, steps, compiled):
    """Let `generate` continue a cache that holds all of `ids` but the last token.

    Returns:
        Tokens, and the measurements of a row.
    """
    clock, graphs = Clock(), torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False, eos_token_id=None,
        pad_token_id=0, disable_compile=not compiled, stopping_criteria=[clock], **{CACHE_NAME: cache},
    )  # fmt: skip
    times = [1000 * (b - a) for a, b in zip(clock.times, clock.times[1:])]
    late = sorted(times[len(times) // 2 :])
    median = statistics.median(late)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return tokens, {
        "median_ms": round(median, 3),
        "q20_ms": round(late[len(late) // 5], 3),
        "q80_ms": round(late[-1 - len(late) // 5], 3),
        "tokens_per_s": round(1000 * len(ids) / median, 1),
        "peak_gib": round(peak / 2**30, 2),
        "graphs": graphs["unique_graphs"] - before,
    }


def print_kernels(run, steps, most=25):
    """Print what each of the steps that `run` makes spends in each kernel, the largest first; what it returns."""
    spent, done = {}, []
    for kernel in record_kernels(lambda: done.append(run())):
        entry = spent.setdefault(kernel["name"][:90], [0.0, 0])
        entry[0] += 1000 * (kernel["stop"] - kernel["start"]) / steps
        entry[1] += 1 / steps
    total, launches = (sum(entry[i] for entry in spent.values()) for i in (0, 1))
    print(f"{total:9.1f} us {launches:7.1f} launches in all", flush=True)
    for kernel, (microseconds, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:most]:
        print(f"{microseconds:9.1f} us {count:7.1f} x {kernel}", flush=True)
    return done[0]


def measure(add, model, name, batch, context, steps, chunk, modes, text="runs", device="cuda", kernels=False):
    """Measure one model: `add` takes a mode and its measurements, first those of the prompt."""
    ids = torch.cat([make_text(text, context + 1, model.config.vocab_size, device, seed) for seed in range(batch)])
    room = context + (len(MODES) + 1) * steps + 64
    backends = DENSE if name == "dense" and device == "cuda" else {f"chunks of {chunk:,}": None}
    for label, backend in backends.items():
        cache = DynamicCache(config=model.config)
        run = partial(fill_by_rows, backend=backend) if name == "dense" else partial(fill, chunk=chunk)
        run(model, ids[:, : min(context, 2 * chunk)], DynamicCache(config=model.config))  # compiles kernels
        seconds = run(model, ids[:, :-1], cache)
        add(f"prompt, {label}", {"prompt_s": round(seconds, 3), "tokens_per_s": round(batch * context / seconds)})
        if label != list(backends)[-1]:
            del cache
    if kernels and name != "dense":
        part = ids[:, : min(context, 4 * chunk)]
        print_kernels(partial(fill, model, part, DynamicCache(config=model.config), chunk), part.shape[1] / chunk)
    for mode in modes:
        if mode != "dynamic" and not isinstance(cache, StaticCache):
            if name == "dense":  # a static cache would be filled with an explicit mask of all its keys
                cache = to_static(cache, model.config, room)
            else:
                del cache
                cache = StaticCache(config=model.config, max_cache_len=room)
                fill(model, ids[:, :-1], cache, chunk)
        # each mode goes on where the one before stopped
        ids, measured = decode(model, ids, cache, steps, compiled="compiled" in mode)
        add(mode, measured)
        if kernels:
            ids, _ = print_kernels(partial(decode, model, ids, cache, 8, "compiled" in mode), 8)


def plot(rows, path):
    """Milliseconds of a step by context: a picture for every model, a column per batch size."""
    written = []
    steps = [row for row in rows if "median_ms" in row]
    for model in dict.fromkeys(row["model"] for row in steps):
        batches = sorted({row["batch"] for row in steps if row["model"] == model})
        figure, axes = new_figure(f"One step of generate, {model}, {rows[0]['gpu']}", len(batches))
        for ax, batch in zip(axes, batches):
            for color, name in zip(COLORS, NAMES):
                for style, mode in zip((":", "--", "-"), MODES):
                    wanted = {"model": model, "batch": batch, "implementation": name, "mode": mode}
                    if points := numbers(steps, "median_ms", **wanted):
                        ax.plot(*zip(*points), marker="o", linestyle=style, color=color, label=f"{name}, {mode}")
            ticks = sorted({row["tokens"] for row in steps})
            ax.set(xscale="log", yscale="log", xlabel="tokens in the cache", title=f"batch {batch}")
            ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            ax.minorticks_off()
        axes[0].set_ylabel("ms (median)")
        axes[0].legend(frameon=False, fontsize=7)
        written.append(path.with_name(f"{path.stem}_{model}.png"))
        save_figure(figure, written[-1])
    return written


def parse(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--source", type=Path, help="a dense checkpoint to measure instead, beside its conversion")
    parser.add_argument("--implementations", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--contexts", nargs="+", type=int, default=[8192, 65536], help="tokens of the prompt")
    parser.add_argument("--text", choices=TEXTS, default="runs", help="kind of prompts, see benchmark_training.py")
    parser.add_argument("--steps", type=int, default=64, help="tokens to generate in each mode")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a sparse model's prompt taken at once")
    parser.add_argument("--kernels", action="store_true", help="print what a step spends in each kernel")
    return parser.parse_args(arguments)


def main():
    args = parse()
    require_cuda()
    results = Results(args.output, {"dtype": "bfloat16", **machine(args.commit)})
    for model_name in [args.source.name] if args.source else args.models:
        for name in args.implementations:
            model = load(name, args.source) if args.source else build(name, MODELS[model_name])
            for batch in args.batches:
                for context in args.contexts:
                    about = {"model": model_name, "implementation": name, "text": args.text}
                    about |= {"batch": batch, "tokens": context}

                    def add(mode, measured, about=about):
                        results.add(**about, mode=mode, **measured)
                        print(*about.values(), mode, measured, flush=True)

                    try:
                        about_steps = (args.steps, args.chunk, args.modes, args.text)
                        measure(add, model, name, batch, context, *about_steps, kernels=args.kernels)
                    except torch.OutOfMemoryError:
                        print(*about.values(), "out of memory, the rest is left out", flush=True)
                    torch._dynamo.reset()
                    gc.collect()
                    torch.cuda.empty_cache()
            del model
            gc.collect()
            torch.cuda.empty_cache()
    plot(results.rows, args.output)


if __name__ == "__main__":
    main()
