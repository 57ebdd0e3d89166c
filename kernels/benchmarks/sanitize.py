# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Launch every kernel on small shapes, for compute-sanitizer to watch. The first call fills Triton's cache.

    python kernels/benchmarks/sanitize.py
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 1 python kernels/benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python kernels/benchmarks/sanitize.py

Without the setting in the third line torch hands out pieces of one large allocation, and a write behind a tensor lands
in the next one unseen. Neighbouring tensors are of odd sizes on purpose.
"""

import argparse
import itertools

import torch
from common import require_cuda

import nsa_kernels as nsa

SIZES = {
    "compress_block_size": 32,
    "compress_stride": 16,
    "select_block_size": 64,
    "num_selected_blocks": 4,
    "num_initial_blocks": 1,
    "num_local_blocks": 2,
    "window_size": 100,
}
FINE = {**SIZES, "compress_block_size": 12, "compress_stride": 4, "select_block_size": 24, "num_selected_blocks": 7}
SCATTERED = {**FINE, "num_initial_blocks": 0, "num_local_blocks": 1}  # neighbours share few blocks
BFLOAT16 = {"heads": 2, "groups": 4, "dim": 64, "v_dim": 64, "dtype": torch.bfloat16, "sizes": SIZES}
CASES = {
    "bfloat16": {**BFLOAT16, "T": 401},
    "sixteen heads to a group": {**BFLOAT16, "T": 401, "heads": 1, "groups": 16, "dim": 128, "v_dim": 128},
    "odd head dims": {**BFLOAT16, "T": 333, "groups": 3, "dim": 80, "v_dim": 48, "dtype": torch.float16},
    "two tiles to a head": {**BFLOAT16, "T": 333, "groups": 1, "dim": 192, "v_dim": 128},
    "float32": {**BFLOAT16, "T": 201, "dim": 96, "v_dim": 96, "dtype": torch.float32},
    "fine blocks": {**BFLOAT16, "T": 333, "sizes": FINE},
    "packed": {**BFLOAT16, "T": 302, "lengths": (1, 130, 171)},
    "padded": {**BFLOAT16, "T": 301, "leftpad": (0, 77, 301)},
    "queries behind a cache": {**BFLOAT16, "T": 101, "past": 300, "leftpad": (0, 77)},
    "queries taken alone": {**BFLOAT16, "T": 1801, "heads": 1, "groups": 16, "sizes": SCATTERED},
    "lists that are split": {**BFLOAT16, "T": 4401, "heads": 1, "groups": 1, "dim": 32, "v_dim": 32},
    "decoding": {**BFLOAT16, "T": 1, "past": 703, "leftpad": (0, 77), "learns": False},
    "decoding five": {**BFLOAT16, "T": 5, "past": 699, "learns": False},
}


def run(
    T, heads, groups, dim, v_dim, dtype, sizes, *, past=0, leftpad=None, lengths=None, learns=True, device="cuda",
    backend="triton",
):  # fmt: skip
    """The whole attention and each operation alone, forward and backward; returns the output of the whole."""
    torch.manual_seed(0)
    batch = 1 if leftpad is None else len(leftpad)
    compression = {name: sizes[name] for name in ("compress_block_size", "compress_stride")}
    where, cut = {"q_offset": past}, dict(compression)
    if leftpad is not None:
        where["leftpad"] = cut["first_slot"] = torch.tensor(leftpad, device=device)
        cut["num_blocks"] = nsa.num_compressed_blocks(T + past, *compression.values())
    if lengths is not None:
        ends = [0, *itertools.accumulate(lengths)]
        where["cu_seqlens"] = cut["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)

    def noise(length, *shape):
        shape = (length, *shape) if lengths is not None else (batch, length, *shape)
        return torch.randn(shape, device=device)

    q = noise(T, heads * groups, dim)
    k, k_win, v, v_win = (noise(T + past, heads, size) for size in (dim, dim, v_dim, v_dim))
    k_cmp, v_cmp = nsa.compress_mean(k, **cut), nsa.compress_mean(v, **cut)
    gates = [noise(T, heads * groups).sigmoid() for _ in range(3)]
    inputs = [x.to(dtype).requires_grad_(learns) for x in (q, k, v, k_cmp, v_cmp, k_win, v_win, *gates)]
    q, k, v, k_cmp, v_cmp, k_win, v_win, *gates = inputs

    o, chosen, _ = nsa.nsa_attention(*inputs, **sizes, **where, backend=backend)
    if learns:
        alone = {
            "compressed": nsa.compressed_attention(q, k_cmp, v_cmp, **compression, **where, backend=backend),
            "selected": nsa.selected_attention(
                q, k, v, chosen, select_block_size=sizes["select_block_size"], **where, backend=backend
            ),
            "window": nsa.window_attention(
                q, k_win, v_win, window_size=sizes["window_size"], **where, backend=backend
            ),
            "rotated": (nsa.rotate(q, *(noise(T, dim).to(dtype) for _ in range(2)), backend=backend), None),
        }  # fmt: skip
        for out, lse in ((o, None), *alone.values()):
            leaves = [x for x in inputs if x.numel()]
            some = out.float().sum() + (0.0 if lse is None else lse[lse.isfinite()].sum())
            gradients = torch.autograd.grad(some, leaves, allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in gradients)
    assert o.isfinite().all()
    return o


def append(
    T, heads, groups, dim, v_dim, dtype, sizes, *, past, leftpad=None, learns=False, device="cuda", backend="triton"
):
    """What a step writes into a static cache without room for more, with every φ; returns the compressed keys."""
    torch.manual_seed(0)
    batch, total = 1 if leftpad is None else len(leftpad), past + T
    size, stride = sizes["compress_block_size"], sizes["compress_stride"]

    def noise(*shape):
        return torch.randn(shape, device=device, dtype=dtype)

    lengths = {"": total, "_cmp": nsa.num_compressed_blocks(total, size, stride) + 1}
    lengths |= {"_tail": size - 1 + nsa.MAX_DECODE_QUERIES, "_win": sizes["window_size"] - 1 + nsa.MAX_DECODE_QUERIES}
    cache = {f"{x}{name}": noise(batch, heads, length, width)
             for x, width in (("k", dim), ("v", v_dim)) for name, length in lengths.items()}  # fmt: skip
    cache |= {"keys": cache.pop("k"), "values": cache.pop("v"), "k_tail_rot": torch.randn_like(cache["k_tail"])}
    cache["length"] = torch.tensor(past, device=device)
    new = {f"{x}{branch}": noise(batch, T, heads, width)
           for x, width in (("k", dim), ("v", v_dim)) for branch in ("", "_cmp", "_win")}  # fmt: skip
    rotations = [(noise(batch, count, dim), noise(batch, count, dim)) for count in (T, -(-T // stride))]
    where = {"slots": past + torch.arange(T, device=device), "compress_block_size": size, "compress_stride": stride}
    where |= dict(zip(("embeddings", "block_embeddings"), rotations))
    where["leftpad"] = None if leftpad is None else torch.tensor(leftpad, device=device)
    shapes = {
        "mean": lambda d: (),
        "residual_mlp": lambda d: ((size, d), (50, size * d), (50,), (d, 50), (d,)),
        "pool": lambda d: ((size,), (50, d), (50,), (50,), (d, d)),
    }
    written = []
    for compress_type, shape in shapes.items():
        phi = ([noise(*x) / x[-1] ** 0.5 for x in shape(width)] for width in (dim, v_dim))
        q = noise(batch, T, heads * groups, dim)
        nsa.append_tokens(q, new, cache, *phi, **where, compress_type=compress_type, backend=backend)
        written.append(cache["k_cmp"][:, :, :-1].clone())
    return torch.cat(written)


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    return parser.parse_args(arguments)


def main():
    args = parse()
    require_cuda()
    for name in args.cases:
        run(**CASES[name])
        if "past" in CASES[name] and not CASES[name].get("learns", True):
            append(**CASES[name])
        torch.cuda.synchronize()
        print(f"ran: {name}", flush=True)


if __name__ == "__main__":
    main()
