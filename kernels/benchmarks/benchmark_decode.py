# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Time one decoding step of attention over a long cache on one GPU, native sparse against torch's dense attention.

    python kernels/benchmarks/benchmark_decode.py --output kernels/benchmarks/results/decode.csv

From q, gates and caches to o. Calls are held in a CUDA graph, each on the next of several caches, so that none finds
its data in the L2 cache; "nsa, eager" is the same without a graph. Keys, values and queries are random: the chosen
blocks lie all over the past. The offset of the queries is a tensor on the device and the cache has room for more, like
a static cache in `generate`. `append_ms` is what it takes to put the new tokens there, keys and values of all branches,
and `append_block_ms` where φ compresses a block too; neither is part of a step's time. The floor is what the bytes that
must be read take at the rate of a large copy on the same GPU. Kernels that do not agree with the reference are not
timed. Beside the CSV file: time by context, and speed-ups.
"""

import math

import torch
import torch.nn.functional as F
from benchmark_parts import measure_ceilings, record_kernels
from common import (
    COLORS,
    COMPRESSION,
    SHAPES,
    SIZES,
    Results,
    machine,
    make_parser,
    measure,
    new_figure,
    numbers,
    require_cuda,
    save_figure,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import nsa_kernels as nsa

DENSE = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}
KERNELS = ("_partial_kernel", "_merge_kernel", "_selected_kernel", "_combine_kernel")
# Bytes that the calls of a graph read at least: several times the L2 cache of a large GPU.
_ROTATED = 2**29


def bytes_read(shape, batch, context, element_size):
    """Bytes of keys and values that a step reads: (native sparse, dense)."""
    _, H, D = SHAPES[shape]
    blocks = nsa.num_compressed_blocks(context, *COMPRESSION.values())
    chosen = min(context, SIZES["num_selected_blocks"] * SIZES["select_block_size"])
    keys = blocks + chosen + min(context, SIZES["window_size"])
    return tuple(batch * H * tokens * 2 * D * element_size for tokens in (keys, context))


def make_cache(shape, batch, context, queries, dtype, device="cuda", spare=64):
    """Keys and values of the branches as caches hold them, `[B, H, tokens, D]` seen as `[B, tokens, H, D]`."""
    _, H, D = SHAPES[shape]
    blocks = nsa.num_compressed_blocks(context, *COMPRESSION.values())
    lengths = (context + spare, blocks + spare // COMPRESSION["compress_stride"], SIZES["window_size"] + queries - 1)
    return [
        torch.randn(batch, H, length, D, device=device, dtype=dtype).transpose(1, 2)
        for length in lengths
        for _ in ("keys", "values")
    ]


def make_queries(shape, batch, queries, dtype, device="cuda"):
    """q `[B, T, HQ, D]` and the three gates."""
    HQ, _, D = SHAPES[shape]
    q = torch.randn(batch, queries, HQ, D, device=device, dtype=dtype)
    return q, torch.rand(batch, queries, HQ, 3, device=device, dtype=dtype).unbind(-1)


def sparse(q, gates, cache, context, backend="triton", leftpad=None):
    offset = torch.tensor(context - q.shape[1], device=q.device)

    def run():
        return nsa.nsa_attention(q, *cache, *gates, **SIZES, q_offset=offset, leftpad=leftpad, backend=backend)[0]

    return run


def make_append(shape, cache, queries, dtype, completes):
    """Put new tokens into a cache of `make_cache`, φ "residual_mlp" of a converted model.

    Args:
        cache: With room for more tokens: the new ones lie behind those that it is timed with.
        completes: Whether the last of them completes a block; else none does, if there are fewer than 16.

    Returns:
        What does it, and the tensors that it writes to.
    """
    HQ, H, D = SHAPES[shape]
    (B, tokens), device = cache[0].shape[:2], cache[0].device
    size, stride = COMPRESSION.values()

    def draw(*shape):
        return torch.randn(shape, device=device, dtype=dtype)

    names = ("keys", "values", "k_cmp", "v_cmp", "k_win", "v_win")
    held = {name: x.transpose(1, 2) for name, x in zip(names, cache)}
    held |= {name: draw(B, H, size - 1 + nsa.MAX_DECODE_QUERIES, D) for name in ("k_tail", "k_tail_rot", "v_tail")}
    held["length"] = torch.zeros((), dtype=torch.long, device=device)
    new = {f"{x}{branch}": draw(B, queries, H, D) for branch in ("", "_cmp", "_win") for x in "kv"}
    q, hidden = draw(B, queries, HQ, D), 2 * D
    shapes = ((size, D), (hidden, size * D), (hidden,), (D, hidden), (D,))
    phi_k, phi_v = ([draw(*shape) / shape[-1] ** 0.5 for shape in shapes] for _ in range(2))
    last = tokens // stride * stride - 2 * stride - (1 if completes else 1 + stride - queries)
    where = {
        "slots": last + 1 - queries + torch.arange(queries, device=device),
        "embeddings": (draw(1, queries, D), draw(1, queries, D)),
        "block_embeddings": tuple(draw(1, -(-queries // stride), D) for _ in range(2)),
        "compress_type": "residual_mlp",
        **COMPRESSION,
    }

    def run(backend="triton"):
        return nsa.append_tokens(q, new, held, phi_k, phi_v, **where, backend=backend)

    return run, held


def dense(q, cache, context, backend):
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2)[:, :, :context] for x in cache[:2])

    def run():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run


def check(shape, queries, dtype, context=6000, device="cuda"):
    """Exit if the kernels and the reference disagree on ragged rows; returns how far they are off."""
    q, gates = make_queries(shape, 3, queries, dtype, device)
    cache = make_cache(shape, 3, context, queries, dtype, device)
    leftpad = torch.tensor([0, context // 5, context - 100], device=device)
    want, got = (sparse(q, gates, cache, context, x, leftpad)().float() for x in ("reference", "triton"))
    off = ((got - want).norm() / want.norm()).item()
    append, held = make_append(shape, cache, queries, dtype, completes=True)
    written = [held[name] for name in ("keys", "values", "k_cmp", "v_cmp", "k_win", "v_win")]
    results = []
    for backend in ("reference", "triton"):
        for x in written:
            x.zero_()
        results.append([append(backend).float(), *(x.float().clone() for x in written)])
    off = max(off, *(((got - want).norm() / want.norm()).item() for want, got in zip(*results)))
    if not off < 0.03:
        raise SystemExit(f"{shape}, {queries} queries: the kernels are off by {off:.3g}: not timed.")
    return off


def capture(functions):
    """A CUDA graph that calls each function, and what the last of them returns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            last = function()
    return graph, last


def time_graph(name, functions, milliseconds, rounding=0.0):
    """Milliseconds of one of the functions inside a graph of all; exit if the graph computes something else.

    Args:
        rounding: Relative difference that is allowed. Replays of cuDNN were seen to differ from its calls.
    """
    graph, last = capture(functions)
    graph.replay()
    want = functions[-1]().float()
    off = (last.float() - want).norm() / want.norm()
    if not off <= rounding:
        raise SystemExit(f"{name}: a replayed CUDA graph is off by {off:.3g} from what its calls give: not timed.")
    times = measure(graph.replay, milliseconds)
    return {name: round(value / len(functions), 5) for name, value in times.items() if name != "peak_gib"}


def kernel_times(functions):
    """Mean milliseconds of each kernel of a step."""

    def run():
        for function in functions:
            function()

    kernels = record_kernels(run)
    spent = {name: [x["stop"] - x["start"] for x in kernels if x["name"] == name] for name in KERNELS}
    return {f"{name.strip('_')}_ms": round(sum(x) / len(x), 5) for name, x in spent.items() if x}


def measure_point(results, about, dtype, rate, milliseconds, most):
    """Add the rows of one shape, batch and context."""
    shape, batch, context, queries = (about[name] for name in ("shape", "batch", "tokens", "queries"))
    needed = dict(zip(("nsa", "dense"), bytes_read(shape, batch, context, dtype.itemsize)))
    q, gates = make_queries(shape, batch, queries, dtype)
    first = make_cache(shape, batch, context, queries, dtype)
    held = sum(x.nbytes for x in first)
    caches = [first]
    copies = min(math.ceil(_ROTATED / needed["nsa"]), max(1, int(most * 2**30) // held))
    caches += [make_cache(shape, batch, context, queries, dtype) for _ in range(copies - 1)]

    def add(name, reads, measured, **more):
        floor = needed[reads] / rate
        fraction = round(floor / measured["median_ms"], 3)
        results.add(
            implementation=name, **about, **measured, floor_ms=round(floor, 5), fraction=fraction, caches=copies, **more
        )
        place = f"{shape} batch {batch:3d} {context:7,d} tokens"
        print(f"{place} {name:11s} {measured['median_ms']:9.4f} ms, {fraction:.0%} of the floor's rate", flush=True)

    calls = [sparse(q, gates, cache, context) for cache in caches]
    appends = {}
    for name, completes in (("append_ms", False), ("append_block_ms", True)):
        puts = [make_append(shape, cache, queries, dtype, completes)[0] for cache in caches]
        appends[name] = time_graph(name, puts, milliseconds)["median_ms"]
        del puts
    add("nsa", "nsa", time_graph("nsa", calls, milliseconds), **kernel_times(calls), **appends)
    eager = measure(lambda: [call() for call in calls], milliseconds)
    add("nsa, eager", "nsa", {name: round(x / copies, 5) for name, x in eager.items() if name != "peak_gib"})
    for name, backend in DENSE.items():
        calls = [dense(q, cache, context, backend) for cache in caches]
        try:
            calls[0]()
        except RuntimeError as error:
            print(f"{shape} batch {batch} {context:,} tokens: {name} is left out: {str(error)[:200]}", flush=True)
            continue
        # each of the two results is rounded once
        add(name, "dense", time_graph(name, calls, milliseconds, torch.finfo(dtype).eps))


def plot(rows, path):
    """Time by context, a column per batch size, one picture per shape; and speed-ups over the best dense."""
    written = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        batches = sorted({row["batch"] for row in rows if row["shape"] == shape})
        figure, axes = new_figure(f"Decoding, {shape}, {rows[0]['dtype']}, {rows[0]['gpu']}", len(batches))
        for ax, batch in zip(axes, batches):
            wanted = {"shape": shape, "batch": batch}
            names = dict.fromkeys(row["implementation"] for row in rows)
            for color, name in zip(COLORS, names):
                points = numbers(rows, "median_ms", implementation=name, **wanted)
                if points:
                    ax.plot(*zip(*points), marker="o", color=color, label=name)
                if points and "eager" not in name:
                    floor = numbers(rows, "floor_ms", implementation=name, **wanted)
                    ax.plot(*zip(*floor), linestyle=":", color=color, label=f"{name}, floor")
            ticks = sorted({row["tokens"] for row in rows})
            ax.set(xscale="log", yscale="log", xlabel="tokens in the cache", title=f"batch {batch}")
            ax.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
            ax.minorticks_off()
        axes[0].set_ylabel("ms (median)")
        axes[0].legend(frameon=False, fontsize=7)
        written.append(path.with_name(f"{path.stem}_{shape}.png"))
        save_figure(figure, written[-1])

    lines = {}
    for row in rows:
        if row["implementation"] == "nsa":
            same = ("shape", "batch", "tokens", "queries")
            base = [other["median_ms"] for other in rows if other["implementation"] in DENSE
                    and all(other[name] == row[name] for name in same)]  # fmt: skip
            if base:
                points = lines.setdefault(f"{row['shape']}, batch {row['batch']}", [])
                points.append((row["tokens"], min(base) / row["median_ms"]))
    if not lines:
        return written
    figure, axes = new_figure(f"Times faster than the best of torch's dense attention, {rows[0]['gpu']}")
    for color, (label, points) in zip(COLORS * len(lines), lines.items()):
        axes[0].plot(*zip(*sorted(points)), marker="o", color=color, label=label)
    axes[0].axhline(1, color="black", linewidth=0.8)
    axes[0].set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="times faster")
    axes[0].legend(frameon=False, fontsize=7)
    written.append(path.with_name(f"{path.stem}_speedup.png"))
    save_figure(figure, written[-1])
    return written


def parse(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["HQ64-H4-D128", "HQ32-H8-D128"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    contexts = [4096, 16384, 65536, 262144]
    parser.add_argument("--contexts", nargs="+", type=int, default=contexts, help="tokens in the cache")
    parser.add_argument("--queries", type=int, default=1, help="new tokens of a row, 1 to 16")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=100, help="milliseconds of repetitions per measurement")
    parser.add_argument("--most", type=float, default=60.0, help="GiB that the caches of a measurement may take")
    return parser.parse_args(arguments)


@torch.no_grad()
def main():
    args = parse()
    require_cuda()
    dtype = getattr(torch, args.dtype)
    results = Results(args.output, {"dtype": args.dtype, **machine(args.commit)})
    _, rate = measure_ceilings()
    print(f"a large copy moves {rate / 1e9:.2f} TB/s", flush=True)
    for shape in args.shapes:
        off = check(shape, args.queries, dtype)
        print(f"{shape}: kernels agree with the reference, relative difference {off:.1e}", flush=True)
        for batch in args.batches:
            for context in args.contexts:
                about = {"shape": shape, "batch": batch, "tokens": context, "queries": args.queries}
                try:
                    measure_point(results, about, dtype, rate, args.repeats, args.most)
                except torch.OutOfMemoryError:
                    print(f"{shape} batch {batch} {context:,} tokens: out of memory, left out", flush=True)
                torch.cuda.empty_cache()
    plot(results.rows, args.output)


if __name__ == "__main__":
    main()
