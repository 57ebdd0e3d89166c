# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Time native sparse attention against torch's dense attention on one GPU, forward and backward.

    python kernels/benchmarks/benchmark_attention.py --output kernels/benchmarks/results/attention.csv

NSA is all of it: three branches, selection, gated sum, from q, k, v and compressed k, v to o. Two kinds of input:
"random" (independent queries and keys: neighbours share few blocks, unlike any model) and "local" (queries that drift
slowly, drawn so that 2, 4, 8, 16 neighbours need about as many blocks together as in SmolLM2-135M on English text: 18,
20, 23, 25 of 16; the columns union_2 … union_16 say what they do need). A kernel that does not agree with the reference
is not timed. Rows give the median and the 20 % and 80 % quantiles in milliseconds, and the peak memory of the pass.
"""

import argparse
import csv
import datetime
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nsa_kernels as nsa

SHAPES = {"HQ64-H4-D128": (64, 4, 128), "HQ32-H8-D128": (32, 8, 128), "HQ9-H3-D64": (9, 3, 64)}
SIZES = {
    "compress_block_size": 32,
    "compress_stride": 16,
    "select_block_size": 64,
    "num_selected_blocks": 16,
    "num_initial_blocks": 1,
    "num_local_blocks": 2,
    "window_size": 512,
}
COMPRESSION = {name: SIZES[name] for name in ("compress_block_size", "compress_stride")}


def _drift(shape, correlation, generator):
    """Unit-variance noise `[B, T, H, D]` whose neighbours in T have the given correlation."""
    noise = torch.randn(shape, device="cuda", generator=generator)
    steps = min(shape[1], 4096)
    decay = correlation ** torch.arange(steps, device="cuda", dtype=torch.float32)
    size = shape[1] + steps
    out = torch.fft.irfft(
        torch.fft.rfft(noise, n=size, dim=1) * torch.fft.rfft(decay, n=size)[:, None, None], n=size, dim=1
    )
    return out[:, : shape[1]] * (1 - correlation**2) ** 0.5


def make_inputs(kind, T, HQ, H, D, dtype, seed=0):
    """q, k, v, k_cmp, v_cmp, k_win, v_win and three gates."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def noise(*shape):
        return torch.randn(1, T, *shape, device="cuda", generator=generator)

    if kind == "random":
        q, k = noise(HQ, D), noise(H, D)
    else:
        group = _drift((1, T, H, D), 0.995, generator).repeat_interleave(HQ // H, dim=2)
        q = (group + _drift((1, T, HQ, D), 0.995, generator)) / 2**0.5
        q = 2 * (q + 0.2 * noise(HQ, D)) / 1.04**0.5
        k = 2 * _drift((1, T, H, D), 0.9, generator)
    v, k_win, v_win = noise(H, D), noise(H, D), noise(H, D)
    k_cmp, v_cmp = nsa.compress_mean(k, **COMPRESSION), nsa.compress_mean(v, **COMPRESSION)
    gates = [noise(HQ).sigmoid() for _ in range(3)]
    return [x.to(dtype).contiguous().requires_grad_() for x in (q, k, v, k_cmp, v_cmp, k_win, v_win, *gates)]


def unions(block_indices):
    """Mean number of blocks that 2, 4, 8, 16 neighbouring queries need together, in the second half of the text."""
    chosen = block_indices[0, block_indices.shape[1] // 2 :].long()
    S = int(chosen.max()) + 1
    mask = torch.zeros(*chosen.shape[:2], S + 1, dtype=torch.bool, device=chosen.device)
    mask.scatter_(-1, torch.where(chosen < 0, S, chosen), True)
    length = mask.shape[0] // 16 * 16
    mask = mask[:length, :, :S]
    return {f"union_{w}": mask.unflatten(0, (-1, w)).any(1).sum(-1).float().mean().item() for w in (2, 4, 8, 16)}


def check(kind, HQ, H, D, dtype):
    """Raise if kernels and reference disagree: never time what is wrong."""
    inputs = make_inputs(kind, 2048, HQ, H, D, dtype, seed=1)
    do = torch.randn_like(inputs[0])
    results = []
    for backend in ("reference", "triton"):
        o, chosen, _ = nsa.nsa_attention(*inputs, **SIZES, backend=backend)
        results.append((o, *torch.autograd.grad(o, inputs, do), chosen))
    same = (results[0][-1] == results[1][-1]).all(-1).float().mean().item()
    for i, (a, b) in enumerate(zip(*(result[:-1] for result in results))):
        off = ((a.float() - b.float()).norm() / b.float().norm()).item()
        if not off < 0.03 + 0.3 * (1 - same):
            raise SystemExit(f"{kind} HQ={HQ} H={H} D={D}: output {i} is off by {off:.3g}: not timed.")
    return same


def measure(function, repeats):
    """Median, 20 % and 80 % quantiles in ms, and peak memory in GiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    peak = torch.cuda.max_memory_allocated() / 2**30
    times = triton.testing.do_bench(function, warmup=50, rep=repeats, quantiles=[0.5, 0.2, 0.8])
    return [round(x, 4) for x in times], round(peak, 3)


def passes(make_output, inputs, do, repeats):
    """Rows of forward and backward."""
    with torch.no_grad():
        forward = measure(make_output, repeats)
    o = make_output()
    backward = measure(lambda: torch.autograd.grad(o, inputs, do, retain_graph=True), repeats)
    return {"forward": forward, "backward": backward}


def dense(inputs, backend):
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])

    def run():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return run


def commit():
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["HQ64-H4-D128", "HQ32-H8-D128"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 65536], help="tokens")
    parser.add_argument("--inputs", nargs="+", choices=["local", "random"], default=["local", "random"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=300, help="milliseconds of repetitions per measurement")
    parser.add_argument("--no-dense", action="store_true", help="leave torch's dense attention out")
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--commit", default=None, help="commit to record where git is not available")
    return parser.parse_args()


def main():
    args = parse()
    dtype = getattr(torch, args.dtype)
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": args.commit or commit(),
        "date": datetime.date.today().isoformat(),
    }
    rows = []
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

                def sparse(inputs=inputs):
                    return nsa.nsa_attention(*inputs, **SIZES, backend="triton")[0]

                with torch.no_grad():
                    needed = unions(nsa.nsa_attention(*inputs, **SIZES, backend="triton")[1])
                candidates = {"nsa": (sparse, inputs)}
                if not args.no_dense and kind == args.inputs[0]:
                    candidates["sdpa-flash"] = (dense(inputs, SDPBackend.FLASH_ATTENTION), inputs[:3])
                    candidates["sdpa-cudnn"] = (dense(inputs, SDPBackend.CUDNN_ATTENTION), inputs[:3])
                for name, (function, leaves) in candidates.items():
                    for direction, (times, peak) in passes(function, leaves, do, args.repeats).items():
                        row = {"implementation": name, "shape": shape, "input": kind, "tokens": T, "pass": direction}
                        row |= dict(zip(("median_ms", "q20_ms", "q80_ms"), times)) | {"peak_gib": peak}
                        row |= {key: round(value, 2) for key, value in needed.items()} | {"dtype": args.dtype} | machine
                        rows.append(row)
                        print(f"{shape} {kind} {T:6d} {name:10s} {direction:8s} {times[0]:9.3f} ms", flush=True)
                del inputs, do, candidates
                torch.cuda.empty_cache()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(args.output)


if __name__ == "__main__":
    main()
