# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Where the time of native sparse attention goes: its kernels, and the gaps between them, beside what the GPU allows.

    python kernels/benchmarks/benchmark_parts.py --output kernels/benchmarks/results/parts.csv

The profiler times every kernel inside whole forward and backward passes; of the repetitions the one of median length is
reported, so that its parts and gaps (the GPU waits for the next launch) add up to it. Rows `alone` time the operations
one by one, without the profiler, and the row `whole, alone` the pass.

The floor of a part is what it has to compute and to move at the rates that this GPU reached just before, in a bf16
product and in a copy: the floating-point operations of the query-key pairs that are visible (for selected attention
those of each query's own blocks, not of a tile's union), and each input and output once. The product that recomputes
the scores counts, for the selection and in every backward kernel.
"""

import json
import tempfile
from pathlib import Path

import torch
from common import (
    COLORS,
    COMPRESSION,
    INPUTS,
    SHAPES,
    SIZES,
    Results,
    check,
    machine,
    make_inputs,
    make_parser,
    measure,
    new_figure,
    require_cuda,
    save_figure,
    unions,
)
from torch.profiler import ProfilerActivity, profile, record_function

import nsa_kernels as nsa

# (launcher of `nsa_kernels.attention`, begin of the kernel's name, part); the first that fits.
PARTS = [
    ("compressed_forward", "", "compressed"),
    ("chosen_blocks", "_score", "scores"),
    ("chosen_blocks", "_topn", "top-n"),
    ("selected_forward", "_forward", "selected"),
    ("selected_forward", "", "lists"),
    ("window_forward", "", "window, gated sum"),
    ("_prepare", "", "gates, row sums"),
    ("compressed_backward", "_backward_q", "compressed dq"),
    ("compressed_backward", "", "compressed dk, dv"),
    ("selected_backward", "_dq", "selected dq"),
    ("selected_backward", "_dkdv", "selected dk, dv"),
    ("selected_backward", "_sum_parts", "selected dk, dv"),
    ("selected_backward", "", "lists"),
    ("window_backward", "_dq", "window dq"),
    ("window_backward", "", "window dk, dv"),
]
PASSES = ("forward", "backward")
GREYS = {"other": "#999999", "gaps": "#DDDDDD"}


# ---------------------------------------------------------------------------------------------------------------------
# Profile
# ---------------------------------------------------------------------------------------------------------------------


def label_launchers():
    """Let the profiler see which launcher of `nsa_kernels.attention` a kernel belongs to."""
    from nsa_kernels import attention

    def labelled(name, function):
        def run(*args, **kwargs):
            with record_function(name):
                return function(*args, **kwargs)

        return run

    for name in dict.fromkeys(launcher for launcher, _, _ in PARTS):
        if hasattr(attention, name):
            setattr(attention, name, labelled(name, getattr(attention, name)))
        else:
            print(f"nsa_kernels.attention has no {name}: its kernels count as other", flush=True)


def read_kernels(trace: dict) -> list[dict]:
    """Kernels of a profiler's Chrome trace, in the order of their start.

    Returns:
        For each {"name", "start", "stop" (ms), "ranges": names and begins of the ranges that were open at its launch,
        the outer ones first}.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]

    def ranges(category):
        found = [event for event in events if event.get("cat") == category]
        return sorted(((e["ts"], e["ts"] + e["dur"], e["name"]) for e in found), key=lambda r: (r[0], -r[1]))

    host, device = ranges("user_annotation"), ranges("gpu_user_annotation")
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    kernels = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launched = launches.get(event["args"].get("correlation"))
        at, opened = (event["ts"], device) if launched is None else (launched, host)
        kernels.append(
            {
                "name": event["name"],
                "start": event["ts"] / 1000,
                "stop": (event["ts"] + event["dur"]) / 1000,
                "ranges": [(name, begin) for begin, end, name in opened if begin <= at <= end],
            }
        )
    return sorted(kernels, key=lambda kernel: kernel["start"])


def split_pass(kernels: list[dict], direction: str) -> tuple[float, dict[str, float]]:
    """Length in ms of the repetition of median length of a pass, and how its parts and gaps make it up."""
    repetitions = {}
    for kernel in kernels:
        for name, begin in kernel["ranges"]:
            if name == f"nsa {direction}":
                repetitions.setdefault(begin, []).append(kernel)
    if not repetitions:
        raise SystemExit(f"The profiler saw no kernel of the {direction} pass: its times cannot be split.")
    spans = sorted((max(k["stop"] for k in found) - found[0]["start"], begin) for begin, found in repetitions.items())
    span, begin = spans[len(spans) // 2]
    parts = {}
    for kernel in repetitions[begin]:
        part = _part_of(kernel)
        parts[part] = parts.get(part, 0.0) + kernel["stop"] - kernel["start"]
    return span, parts | {"gaps": span - sum(parts.values())}


def _part_of(kernel):
    launchers = [name for name, _ in kernel["ranges"]]
    for launcher, begin, part in PARTS:
        if launcher in launchers and kernel["name"].startswith(begin):
            return part
    return "other"


def record_kernels(run):
    """`read_kernels` of what `run()` launches."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_kernels(json.loads(path.read_text()))


def profile_passes(inputs, do, repeats):
    """`read_kernels` of so many forward and backward passes."""

    def run():
        for _ in range(repeats):
            with record_function("nsa forward"):
                o = nsa.nsa_attention(*inputs, **SIZES, backend="triton")[0]
            torch.cuda.synchronize()
            with record_function("nsa backward"):
                torch.autograd.grad(o, inputs, do)
            torch.cuda.synchronize()

    return record_kernels(run)


# ---------------------------------------------------------------------------------------------------------------------
# Floor
# ---------------------------------------------------------------------------------------------------------------------


def measure_ceilings():
    """What this GPU reaches: floating-point operations a ms in a bf16 product, bytes a ms in a copy."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * size**3 / measure(lambda: a @ b, 200)["median_ms"]
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / measure(lambda: target.copy_(source), 200)["median_ms"]
    return product, copied


def floors(T: int, HQ: int, H: int, D: int) -> dict[tuple[str, str], tuple[float, float]]:
    """(pass, part) to (floating-point operations, bytes) of bf16 inputs, batch 1, value head dim D."""
    size, stride = COMPRESSION.values()
    block, n = SIZES["select_block_size"], SIZES["num_selected_blocks"]
    C = nsa.num_compressed_blocks(T, size, stride)
    seen_cmp = sum(max(0, (t + 1 - size) // stride + 1) for t in range(T))
    seen_slc = sum((min(n, t // block + 1) - 1) * block + t % block + 1 for t in range(T))
    seen_win = sum(min(t + 1, SIZES["window_size"]) for t in range(T))
    scores = 4 * H * sum(t // block + 1 for t in range(T))  # fp32 importances
    queries, keys, blocks = 2 * T * HQ * D, 2 * T * H * D, 2 * C * H * D
    values, choice = 4 * T * HQ, 4 * T * H * n

    def products(pairs, count):
        return 2.0 * pairs * HQ * D * count

    return {
        ("forward", "compressed"): (products(seen_cmp, 2), 2 * queries + 2 * blocks + values),
        ("forward", "scores"): (products(seen_cmp, 1), queries + blocks + values + scores),
        ("forward", "top-n"): (0.0, scores + choice),
        ("forward", "lists"): (0.0, 2 * choice),
        ("forward", "selected"): (products(seen_slc, 2), 2 * queries + 2 * keys + values + choice),
        ("forward", "window, gated sum"): (products(seen_win, 2), 5 * queries + 2 * keys + 4 * values),
        ("backward", "gates, row sums"): (0.0, 5 * queries + 9 * values),
        ("backward", "compressed dq"): (products(seen_cmp, 3), 3 * queries + 2 * blocks + 2 * values),
        ("backward", "compressed dk, dv"): (products(seen_cmp, 4), 2 * queries + 4 * blocks + 2 * values),
        ("backward", "lists"): (0.0, 2 * choice),
        ("backward", "selected dq"): (products(seen_slc, 3), 4 * queries + 2 * keys + 3 * values + choice),
        ("backward", "selected dk, dv"): (products(seen_slc, 4), 2 * queries + 4 * keys + 3 * values + choice),
        ("backward", "window dq"): (products(seen_win, 3), 4 * queries + 2 * keys + 3 * values),
        ("backward", "window dk, dv"): (products(seen_win, 4), 2 * queries + 4 * keys + 3 * values),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Operations one by one
# ---------------------------------------------------------------------------------------------------------------------


def operations(inputs):
    """Name to (function, the leaves of its backward pass or None) of the public operations on these inputs."""
    q, k, v, k_cmp, v_cmp, k_win, v_win = inputs[:7]
    block = {"select_block_size": SIZES["select_block_size"]}
    with torch.no_grad():
        _, lse = nsa.compressed_attention(q, k_cmp, v_cmp, **COMPRESSION, backend="triton")
        chosen = nsa.nsa_attention(*inputs, **SIZES, backend="triton")[1]
    choice = {name: size for name, size in SIZES.items() if name != "window_size"}
    choice["num_blocks"] = -(-k.shape[1] // SIZES["select_block_size"])
    return {
        "compressed": (
            lambda: nsa.compressed_attention(q, k_cmp, v_cmp, **COMPRESSION, backend="triton")[0],
            (q, k_cmp, v_cmp),
        ),
        "scores, top-n": (lambda: nsa.select_blocks(q, k_cmp, lse, **choice, backend="triton"), None),
        "selected, lists": (
            lambda: nsa.selected_attention(q, k, v, chosen, **block, backend="triton")[0],
            (q, k, v),
        ),
        "window": (
            lambda: nsa.window_attention(q, k_win, v_win, window_size=SIZES["window_size"], backend="triton")[0],
            (q, k_win, v_win),
        ),
        "whole": (lambda: nsa.nsa_attention(*inputs, **SIZES, backend="triton")[0], inputs),
    }


def measure_alone(inputs, do, milliseconds):
    """(pass, name, ms) of every operation."""
    for name, (function, leaves) in operations(inputs).items():
        with torch.no_grad():
            yield "forward", f"{name}, alone", measure(function, milliseconds)["median_ms"]
        if leaves is not None:
            o = function()

            def backward(o=o, leaves=leaves):
                return torch.autograd.grad(o, leaves, do, retain_graph=True)

            yield "backward", f"{name}, alone", measure(backward, milliseconds)["median_ms"]


# ---------------------------------------------------------------------------------------------------------------------


def add_rows(results, about, T, shape, kernels, ceilings):
    """Rows of the parts of both passes, printed too."""
    floor = {
        key: (*costs, max(costs[0] / ceilings[0], costs[1] / ceilings[1])) for key, costs in floors(T, *shape).items()
    }
    for direction in PASSES:
        span, parts = split_pass(kernels, direction)
        for part, ms in parts.items():
            _add_row(results, about, direction, part, ms, *floor.get((direction, part), ()))
        whole = sum(least for (found, _), (*_, least) in floor.items() if found == direction)
        _add_row(results, about, direction, "whole", span, least=whole)


def _add_row(results, about, direction, part, ms, flops=0.0, moved=0.0, least=0.0):
    reached = f"floor {least:8.3f}  {least / ms:6.1%}" if least and ms else ""
    print(f"  {direction:8s} {part:22s} {ms:9.3f} ms  {reached}", flush=True)
    row = {**about, "pass": direction, "part": part, "median_ms": round(ms, 4)}
    row |= {"tflop": round(flops / 1e12, 4), "gbyte": round(moved / 1e9, 4), "floor_ms": round(least, 4)}
    results.add(**row, fraction=round(least / ms, 3) if least and ms else "")


def plot(rows, path):
    """Bars of both passes, one per shape, input and length, made of parts and gaps, and their floors."""
    figure, axes = new_figure(f"Parts of native sparse attention, {rows[0]['gpu']}", 2)
    for ax, direction in zip(axes, PASSES):
        chosen = [row for row in rows if row["pass"] == direction and not row["part"].endswith("alone")]
        places = list(dict.fromkeys((row["shape"], row["input"], row["tokens"]) for row in chosen))
        names = list(dict.fromkeys(row["part"] for row in chosen if row["part"] != "whole"))
        height = dict.fromkeys(places, 0.0)
        names = [name for name in names if name not in GREYS] + [name for name in GREYS if name in names]
        for i, name in enumerate(names):
            found = {(row["shape"], row["input"], row["tokens"]): row for row in chosen if row["part"] == name}
            times = [found[place]["median_ms"] if place in found else 0.0 for place in places]
            color = GREYS.get(name) or COLORS[i % len(COLORS)]
            ax.bar(range(len(places)), times, bottom=[height[place] for place in places], label=name, color=color)
            height = {place: height[place] + time for place, time in zip(places, times)}
        for i, place in enumerate(places):
            (whole,) = (r for r in chosen if r["part"] == "whole" and (r["shape"], r["input"], r["tokens"]) == place)
            ax.hlines(whole["floor_ms"], i - 0.4, i + 0.4, color="black", label="floor" if i == 0 else None)
        labels = [f"{shape}\n{kind}\n{tokens:,}" for shape, kind, tokens in places]
        ax.set_xticks(range(len(places)), labels, fontsize=6)
        ax.set(title=direction, ylabel="ms")
        ax.legend(frameon=False, fontsize=7, loc="upper left")
    picture = path.with_suffix(".png")
    save_figure(figure, picture)
    return picture


def parse(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["HQ64-H4-D128", "HQ32-H8-D128"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[16384, 65536], help="tokens")
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=["local"])
    parser.add_argument("--repeats", type=int, default=15, help="passes to profile")
    parser.add_argument(
        "--alone-ms", type=int, default=100, help="milliseconds for an operation alone; 0 leaves it out"
    )
    return parser.parse_args(arguments)


def main():
    args = parse()
    require_cuda()
    ceilings = measure_ceilings()
    print(f"ceilings: {ceilings[0] / 1e9:.0f} TFLOP/s in bf16, {ceilings[1] / 1e9:.2f} TB/s", flush=True)
    constant = {"ceiling_tflops": round(ceilings[0] / 1e9, 1), "ceiling_tb_s": round(ceilings[1] / 1e9, 3)}
    results = Results(args.output, {**constant, **machine(args.commit)})
    label_launchers()
    for shape in args.shapes:
        for kind in args.inputs:
            check(kind, *SHAPES[shape], torch.bfloat16)
            for T in args.lengths:
                about = {"shape": shape, "input": kind, "tokens": T}
                inputs = make_inputs(kind, T, *SHAPES[shape], torch.bfloat16)
                do = torch.randn_like(inputs[0])
                with torch.no_grad():
                    needed = unions(nsa.nsa_attention(*inputs, **SIZES, backend="triton")[1][0])
                about |= {name: round(value, 2) for name, value in needed.items()}
                print(f"{shape} {kind} {T:,}, unions {'/'.join(f'{x:.1f}' for x in needed.values())}", flush=True)
                if args.alone_ms:
                    for direction, name, ms in measure_alone(inputs, do, args.alone_ms):
                        _add_row(results, about, direction, name, ms)
                add_rows(results, about, T, SHAPES[shape], profile_passes(inputs, do, args.repeats), ceilings)
                del inputs, do
                torch.cuda.empty_cache()
    plot(results.rows, args.output)


if __name__ == "__main__":
    main()
