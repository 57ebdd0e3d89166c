# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Time native sparse attention against torch's dense attention on one GPU, forward and backward.

    python kernels/benchmarks/benchmark_attention.py --output kernels/benchmarks/results/attention.csv

NSA is all of it: three branches, selection, gated sum, from q, k, v and compressed k, v to o. Two kinds of input:
"random" (independent queries and keys: neighbours share few blocks, unlike any model) and "local" (drawn so that 2, 4,
8, 16 neighbouring queries need about as many blocks together as in SmolLM2-135M on English text: 18, 20, 23, 25, where
one reads 16; the columns union_2 … union_16 say what they do need). A kernel that does not agree with the reference is
not timed.
Rows give the median and the 20 % and 80 % quantiles in milliseconds, and the peak memory of the pass. Beside the CSV
file: time by length, and how many times faster than dense attention.

Dense attention and flash-linear-attention (`parallel_nsa`, if it is installed; its own compression and no window) get
the same q, k and v.
"""

import torch
import torch.nn.functional as F
from common import (
    COLORS,
    INPUTS,
    SHAPES,
    SIZES,
    Results,
    check,
    machine,
    make_inputs,
    make_parser,
    measure_passes,
    new_figure,
    numbers,
    require_cuda,
    save_figure,
    unions,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import nsa_kernels as nsa

DENSE = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}


def sparse(inputs):
    return lambda: nsa.nsa_attention(*inputs, **SIZES, backend="triton")[0]


def dense(inputs, backend):
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])

    def run():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return run


def fla(inputs):
    """flash-linear-attention's operation, or None with a line that says why."""
    try:
        from fla.ops.nsa import parallel_nsa
    except ImportError as error:
        print(f"flash-linear-attention is left out: {error}", flush=True)
        return None
    q, k, v, *_, g_cmp, g_slc, _ = inputs
    sizes = {"block_counts": SIZES["num_selected_blocks"], "block_size": SIZES["select_block_size"]}

    def run():
        return parallel_nsa(q, k, v, g_cmp, g_slc, None, **sizes)

    try:
        torch.autograd.grad(run().sum(), (q, k, v, g_cmp, g_slc))
    except Exception as error:  # whatever another library refuses is a line in the report, not the end of it
        print(f"flash-linear-attention is left out: {error}", flush=True)
        return None
    return run


def plot(rows, path):
    """Time by length, one picture per shape, and the speed-ups over dense attention, one bar per shape and length."""
    written = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        figure, axes = new_figure(f"Attention, {shape}, {rows[0]['dtype']}, {rows[0]['gpu']}", 2)
        for ax, direction in zip(axes, ("forward", "backward")):
            series = dict.fromkeys((row["implementation"], row["input"]) for row in rows if row["shape"] == shape)
            for color, (name, kind) in zip(COLORS, series):
                wanted = {"shape": shape, "implementation": name, "input": kind, "pass": direction}
                points = numbers(rows, "median_ms", **wanted)
                label = name if name in DENSE else f"{name}, {kind} input"
                ax.plot(*zip(*points), marker="o", color=color, label=label)
            ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms (median)", title=direction)
            ticks = sorted({row["tokens"] for row in rows})
            ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            ax.minorticks_off()
        axes[0].legend(frameon=False, fontsize=8)
        written.append(path.with_name(f"{path.stem}_{shape}.png"))
        save_figure(figure, written[-1])

    base = {(row["shape"], row["tokens"], row["pass"], row["implementation"]): row["median_ms"]
            for row in rows if row["implementation"] in DENSE}  # fmt: skip
    if not base:
        return written
    figure, axes = new_figure(f"Times faster than dense attention, {rows[0]['gpu']}", 2)
    for ax, direction in zip(axes, ("forward", "backward")):
        bars = {}
        for row in rows:
            if row["implementation"] != "nsa" or row["pass"] != direction or row["input"] != rows[0]["input"]:
                continue
            for name in DENSE:
                if (dense_ms := base.get((row["shape"], row["tokens"], direction, name))) is not None:
                    bars.setdefault(name, {})[f"{row['shape']}\n{row['tokens']:,}"] = dense_ms / row["median_ms"]
        places = list(dict.fromkeys(label for values in bars.values() for label in values))
        for i, (name, values) in enumerate(bars.items()):
            where = [places.index(label) + 0.38 * (i - 0.5) for label in values]
            drawn = ax.bar(where, values.values(), width=0.36, color=COLORS[i], label=f"over {name}")
            ax.bar_label(drawn, fmt="%.1f", fontsize=7)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_xticks(range(len(places)), places, fontsize=6)
        ax.set(title=direction, ylabel="times faster")
    axes[0].legend(frameon=False, fontsize=8)
    written.append(path.with_name(f"{path.stem}_speedup.png"))
    save_figure(figure, written[-1])
    return written


def parse(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["HQ64-H4-D128", "HQ32-H8-D128"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 65536], help="tokens")
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=300, help="milliseconds of repetitions per measurement")
    parser.add_argument("--no-dense", action="store_true", help="leave torch's dense attention out")
    parser.add_argument(
        "--peer-tokens", type=int, default=8192, help="longest text for flash-linear-attention; 0 leaves it out"
    )
    return parser.parse_args(arguments)


def main():
    args = parse()
    require_cuda()
    dtype = getattr(torch, args.dtype)
    results = Results(args.output, {"dtype": args.dtype, **machine(args.commit)})
    for shape in args.shapes:
        HQ, H, D = SHAPES[shape]
        for kind in args.inputs:
            same = check(kind, HQ, H, D, dtype)
            print(
                f"{shape} {kind}: kernels agree with the reference, {same:.2%} of the selections identical", flush=True
            )
            for T in args.lengths:
                inputs = make_inputs(kind, T, HQ, H, D, dtype)
                do = torch.randn_like(inputs[0])
                with torch.no_grad():
                    needed = unions(nsa.nsa_attention(*inputs, **SIZES, backend="triton")[1][0])
                needed = {name: round(value, 2) for name, value in needed.items()}
                candidates = {"nsa": (sparse(inputs), inputs)}
                if kind == args.inputs[0] and not args.no_dense:
                    candidates |= {name: (dense(inputs, backend), inputs[:3]) for name, backend in DENSE.items()}
                if kind == args.inputs[0] and args.peer_tokens >= T and (peer := fla(inputs)) is not None:
                    candidates["fla, no window"] = (peer, [*inputs[:3], *inputs[7:9]])
                for name, (function, leaves) in candidates.items():
                    for direction, measured in measure_passes(function, leaves, do, args.repeats).items():
                        row = {"implementation": name, "shape": shape, "input": kind, "tokens": T, "pass": direction}
                        results.add(**row, **measured, **needed)
                        together = "/".join(f"{value:.1f}" for value in needed.values()) if name == "nsa" else ""
                        time = f"{measured['median_ms']:9.3f} ms"
                        print(f"{shape} {kind} {T:7,d} {name:14s} {direction:8s} {time} {together}", flush=True)
                del inputs, do, candidates
                torch.cuda.empty_cache()
    plot(results.rows, args.output)


if __name__ == "__main__":
    main()
