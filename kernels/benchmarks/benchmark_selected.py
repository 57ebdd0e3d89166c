# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Time selected attention as it is against the same kernels with one query to a program, forward and backward.

    python kernels/benchmarks/benchmark_selected.py --output selected.csv

Tiles of neighbouring queries that walk the union of their blocks win where neighbours choose alike ("local" inputs).
Where they do not ("random"), they should lose nothing: the rows "one query" are what they are held to. What does not
agree is not timed. Rows give the median and the 20 % and 80 % quantiles in ms; beside the CSV file, a picture.
"""

import contextlib

import torch
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
    require_cuda,
    save_figure,
    unions,
)

import nsa_kernels as nsa
from nsa_kernels import selected

AS_IT_IS, ONE_QUERY = "as it is", "one query"


@contextlib.contextmanager
def one_query():
    """Every query alone, however many blocks it shares with its neighbours."""
    before = selected._ALONE, selected._LONG
    selected._ALONE, selected._LONG = 1, 0.0
    try:
        yield
    finally:
        selected._ALONE, selected._LONG = before


def measure_both(q, k, v, chosen, milliseconds):
    """(implementation, direction, what `measure` returns); the two in turn, after a check that they agree."""

    def attend():
        size = SIZES["select_block_size"]
        return nsa.selected_attention(q, k, v, chosen, select_block_size=size, backend="triton")[0]

    do = torch.randn_like(v).repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    ways = {AS_IT_IS: contextlib.nullcontext, ONE_QUERY: one_query}
    results = []
    for way in ways.values():
        with way():
            o = attend()
            results.append((o, *torch.autograd.grad(o, (q, k, v), do)))
    for i, (a, b) in enumerate(zip(*results)):
        off = ((a.float() - b.float()).norm() / b.float().norm()).item()
        if not off < 0.02:
            raise SystemExit(f"output {i} is off by {off:.3g}: not timed.")
    for name, way in ways.items():
        with way():
            for direction, measured in measure_passes(attend, (q, k, v), do, milliseconds).items():
                yield name, direction, measured


def plot(rows, path):
    """Part of the time of one query to a program: one bar per shape, length and input."""
    figure, axes = new_figure(f"Selected attention over one query to a program, {rows[0]['gpu']}", 2)
    for ax, direction in zip(axes, ("forward", "backward")):
        times = {(r["shape"], r["tokens"], r["input"], r["implementation"]): r["median_ms"]
                 for r in rows if r["pass"] == direction}  # fmt: skip
        cells = list(dict.fromkeys(key[:3] for key in times))
        parts = [times[*cell, AS_IT_IS] / times[*cell, ONE_QUERY] for cell in cells]
        colors = [COLORS[INPUTS.index(kind)] for *_, kind in cells]
        bars = ax.barh([f"{shape} {tokens:,} {kind}" for shape, tokens, kind in cells], parts, color=colors)
        ax.bar_label(bars, fmt="%.2f", fontsize=7)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.tick_params(axis="y", labelsize=6)
        ax.set(title=direction, xlabel="part of its time")
    picture = path.with_suffix(".png")
    save_figure(figure, picture)
    return picture


def parse(arguments=None):
    parser = make_parser(__doc__)
    shapes = ["HQ64-H4-D128", "HQ32-H8-D128", "HQ16-H16-D128"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--lengths", nargs="+", type=int, default=[16384, 65536], help="tokens")
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--repeats", type=int, default=200, help="milliseconds of repetitions per measurement")
    return parser.parse_args(arguments)


def main():
    args = parse()
    require_cuda()
    results = Results(args.output, {"dtype": "bfloat16", **machine(args.commit)})
    for shape in args.shapes:
        for kind in args.inputs:
            check(kind, *SHAPES[shape], torch.bfloat16)
            for T in args.lengths:
                inputs = make_inputs(kind, T, *SHAPES[shape], torch.bfloat16)
                with torch.no_grad():
                    chosen = nsa.nsa_attention(*inputs, **SIZES, backend="triton")[1]
                needed = {name: round(value, 2) for name, value in unions(chosen[0]).items()}
                for name, direction, measured in measure_both(*inputs[:3], chosen, args.repeats):
                    about = {"implementation": name, "shape": shape, "input": kind, "tokens": T, "pass": direction}
                    results.add(**about, **measured, **needed)
                    time = f"{measured['median_ms']:9.3f} ms"
                    print(f"{shape} {kind} {T:7,d} {name:10s} {direction:8s} {time}", flush=True)
                del inputs, chosen
                torch.cuda.empty_cache()
    plot(results.rows, args.output)


if __name__ == "__main__":
    main()
