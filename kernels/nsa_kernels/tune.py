# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Measure the launch configurations of the Triton kernels on this GPU, for one shape, and keep the fastest.

    python -m nsa_kernels.tune --heads 64 --key-value-heads 4 --head-dim 128

Every kernel of `nsa_attention` and of decoding is timed alone with each of its candidates that can fit, after its
results have been held to those of the built-in configuration. What is faster is written to the file that later
processes read, see `tuning.py`. Shapes are told apart by dtype, head dims, heads per group and block sizes; the number
of tokens only sets how much work is timed.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable

import torch

from .availability import triton_error
from .tuning import TUNABLES, cache_path, forget, machine, read_cache
from .validation import check_sizes

__all__ = ["KERNELS", "main", "tune"]

# Names of kernels by what computes them: `_Pass` has a method for each of these.
_COMPUTED_BY = {
    "compressed_forward": ("compressed_forward", ("_forward_kernel",)),
    "scores": ("chosen_blocks", ("_score_kernel",)),
    "selected_forward": ("selected_forward", ("_forward_kernel",)),
    "window_forward": ("window_forward", ("_forward_kernel",)),
    "compressed_dq": ("compressed_backward", ("_backward_q_kernel",)),
    "compressed_dkdv": ("compressed_backward", ("_backward_kv_kernel",)),
    "selected_dq": ("selected_backward", ("_dq_kernel",)),
    "selected_dkdv": ("selected_backward", ("_dkdv_kernel",)),
    "window_dq": ("window_backward", ("_dq_kernel",)),
    "window_dkdv": ("window_backward", ("_dkdv_kernel",)),
    "decode": ("decode", ("_partial_kernel", "_selected_kernel")),
}
KERNELS = tuple(_COMPUTED_BY)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# A candidate replaces the built-in configuration where it takes at most this part of its time.
_GAIN = 0.99
# Every candidate is timed in so many rounds, of so many ms each but no more launches than that.
_ROUNDS, _ROUND_MS, _MOST_LAUNCHES = 3, 20, 50
# Queries in a row that differ by so much noise: 2, 4, 8, 16 of them choose about 18, 21, 23, 24 blocks together, as in
# models on text, where independent ones would choose many more.
_ALIKE, _APART = 64, 0.3


def tune(
    *,
    heads: int,
    key_value_heads: int,
    head_dim: int,
    value_head_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 16384,
    kernels: list[str] | None = None,
    **sizes: int,
) -> list[dict]:
    """Find the fastest configuration of each kernel for a shape on the current GPU, and store what was found.

    Args:
        heads, key_value_heads: HQ and H; HQ is a multiple of H.
        head_dim, value_head_dim: D and DV, at most 256; DV defaults to D.
        dtype: bfloat16, float16 or float32.
        tokens: T of the inputs, batch 1.
        kernels: Which of `KERNELS`; default: all that run with these sizes.
        sizes: Block sizes as `check_sizes` takes them, default the paper's.

    Returns:
        For each kernel {"machine", "kernel", "shape", "built_in", "built_in_ms", "best", "best_ms", "tried", "refused":
        reason by configuration, of those that do not compile, do not fit or give other results}.

    Raises:
        ValueError: A bad argument, or the file of measured configurations cannot be written.
        NotImplementedError: The kernels cannot run here.
    """
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    check_sizes(**sizes)
    sizes = {**check_sizes.__kwdefaults__, **sizes}
    forced = sizes["num_initial_blocks"] + sizes["num_local_blocks"]
    offered = [name for name in KERNELS if name != "scores" or sizes["num_selected_blocks"] > forced]
    kernels = offered if kernels is None else list(dict.fromkeys(kernels))
    _check(heads, key_value_heads, head_dim, value_head_dim, dtype, tokens, kernels, offered, sizes)
    device = _device()
    path = cache_path()
    _check_writable(path)
    from tqdm import tqdm

    rows = []
    try:
        work = _Pass(device, heads, key_value_heads, head_dim, value_head_dim, dtype, tokens, sizes)
        jobs = [(name, work.shape(name)) for name in kernels]
        counts = [len(TUNABLES[name].fitting(shape, work.max_shared)) for name, shape in jobs]
        with tqdm(total=sum(counts), unit="configuration", disable=None) as bar:
            for name, shape in jobs:
                bar.set_description(name)
                rows.append(_tune_one(name, shape, work, bar.update))
        _store(path, rows)
    finally:
        forget()
    return rows


def _check(heads, key_value_heads, head_dim, value_head_dim, dtype, tokens, kernels, offered, sizes):
    whole = {"heads": heads, "key_value_heads": key_value_heads, "head_dim": head_dim, "tokens": tokens}
    for name, value in {**whole, "value_head_dim": value_head_dim}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer >= 1, got {value!r}.")
        if name.endswith("head_dim") and value > 256:
            raise ValueError(f"`{name}` must be at most 256 for the Triton kernels, got {value}.")
    if heads % key_value_heads:
        raise ValueError(f"`heads` must be a multiple of key_value_heads = {key_value_heads}, got {heads}.")
    if dtype not in DTYPES.values():
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}.")
    if not kernels or set(kernels) - set(offered):
        unknown = ", ".join(str(name) for name in kernels if name not in offered) or "none"
        raise ValueError(f"`kernels` must be among {', '.join(offered)} for these block sizes, got {unknown}.")
    # of fewer blocks the selection takes all, and no score is computed
    least = (sizes["num_selected_blocks"] + 1) * sizes["select_block_size"]
    if tokens < least:
        raise ValueError(f"`tokens` must be at least (n + 1) · l' = {least}, got {tokens}.")


def _device():
    if (reason := triton_error()) is not None:
        raise NotImplementedError(f"The kernels cannot be timed: {reason}")
    if not torch.cuda.is_available():
        raise NotImplementedError("The kernels cannot be timed: no CUDA device is available.")
    return torch.device("cuda", torch.cuda.current_device())


def _check_writable(path):
    """Find out before the work, not after it."""
    try:
        read_cache(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"Measured configurations must go to a file that can be written, got {path}: {error.strerror}. Let "
            "NSA_KERNELS_CACHE name another one."
        ) from error


def _store(path, rows):
    """Add what was found to the file; an interruption leaves the old file or the new one."""
    found = read_cache(path)
    for row in rows:
        found.setdefault(row["machine"], {}).setdefault(row["kernel"], {})[row["shape"]] = row["best"]
    handle, partial = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=2, sort_keys=True)
            file.write("\n")
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Inputs, and what computes each kernel's results
# ---------------------------------------------------------------------------------------------------------------------


class _Pass:
    """One forward and backward pass of `nsa_attention`, of which every launcher can be called alone."""

    def __init__(self, device, HQ, H, D, DV, dtype, T, sizes):
        from . import attention, decode  # which register all configurations
        from .reference import num_compressed_blocks
        from .triton_common import Layout

        self.launchers, self.decoding = attention, decode
        self.sizes = sizes
        self.compression = (self.sizes["compress_block_size"], self.sizes["compress_stride"])
        self.block, self.n = self.sizes["select_block_size"], self.sizes["num_selected_blocks"]
        self.width, self.scale = self.sizes["window_size"], D**-0.5
        self.heads, self.dims, self.dtype = (HQ, H), (D, DV), dtype
        self.index = -1 if device.type == "cpu" else device.index
        on_gpu = device.type == "cuda"
        self.max_shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin if on_gpu else 2**18
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape):
            return torch.randn(1, *shape, device=device, generator=generator, dtype=dtype)

        self.q = draw(-(-T // _ALIKE), HQ, D).repeat_interleave(_ALIKE, dim=1)[:, :T] + _APART * draw(T, HQ, D)
        C = num_compressed_blocks(T, *self.compression)
        shapes = [(length, H, dim) for length in (T, C, T) for dim in (D, DV)]
        self.k, self.v, self.k_cmp, self.v_cmp, self.k_win, self.v_win = (draw(*shape) for shape in shapes)
        self.gates = [draw(T, HQ).sigmoid() for _ in range(3)]
        self.do = draw(T, HQ, DV)
        self.layout = Layout(self.q)
        self.last = min(T, self.width)
        for name in KERNELS:  # not what an earlier call found
            self.use(name)

    def shape(self, name):
        """What the kernel of this name is chosen by."""
        (HQ, H), (D, DV), (size, stride) = self.heads, self.dims, self.compression
        given = {"dtype": self.dtype, "D": D, "DV": DV, "G": HQ // H}
        given["BLOCK_M"] = self.decoding._row_tiles(*given.values(), 1)["BLOCK_M"]  # decoding takes one query at a time
        given |= {"compress_block_size": size, "compress_stride": stride, "select_block_size": self.block}
        return tuple(given[x] for x in TUNABLES[name].names)

    def use(self, name, config=None):
        """Let the kernel be launched with this configuration, default the built-in one."""
        shape = self.shape(name)
        TUNABLES[name].chosen[(self.index, *shape)] = TUNABLES[name].built_in(*shape) if config is None else config

    # what later kernels need of earlier ones, computed once
    compressed = functools.cached_property(lambda self: self.compressed_forward())
    block_indices = functools.cached_property(lambda self: self.chosen_blocks()[0])
    selected = functools.cached_property(lambda self: self.selected_forward())
    window = functools.cached_property(lambda self: self.window_forward()[:2])

    @functools.cached_property
    def rows(self):
        """Row sums and gates as the backward kernels of the branches read them."""
        outputs = (self.compressed[0], self.selected[0], self.window[0])
        return self.launchers._prepare(self.do, outputs, self.gates, self.selected[1], self.layout)

    def compressed_forward(self):
        return self.launchers.compressed_forward(
            self.q, self.k_cmp, self.v_cmp, *self.compression, self.scale, self.layout
        )

    def chosen_blocks(self):
        S = -(-self.k.shape[1] // self.block)
        forced = (self.sizes["num_initial_blocks"], self.sizes["num_local_blocks"])
        sizes = (*self.compression, self.block, self.n, *forced, self.scale)
        return (self.launchers.chosen_blocks(self.q, self.k_cmp, self.compressed[1], S, *sizes, self.layout),)

    def selected_forward(self):
        return self.launchers.selected_forward(
            self.q, self.k, self.v, self.block_indices, self.block, self.scale, self.layout
        )

    def window_forward(self):
        branches = (self.compressed[0], self.selected[0], *self.gates)
        return self.launchers.window_forward(
            self.q, self.k_win, self.v_win, self.width, self.scale, self.layout, branches
        )

    def compressed_backward(self):
        delta, gate = self.rows[0]
        saved = (self.do, self.q, self.k_cmp, self.v_cmp, self.compressed[1], delta)
        return self.launchers.compressed_backward(*saved, *self.compression, self.scale, self.layout, gate=gate)

    def selected_backward(self):
        saved = (self.do, self.q, self.k, self.v, self.block_indices, self.rows[1])
        return self.launchers.selected_backward(
            *saved, self.block, self.scale, self.layout, dq=torch.zeros_like(self.q)
        )

    def window_backward(self):
        (delta, gate), dq = self.rows[2], torch.zeros_like(self.q)
        saved = (self.do, self.q, self.k_win, self.v_win, self.window[1], delta)
        return self.launchers.window_backward(*saved, self.width, self.scale, self.layout, gate=gate, dq=dq)

    def decode(self):
        keys = (self.k, self.v, self.k_cmp, self.v_cmp, self.k_win[:, -self.last :], self.v_win[:, -self.last :])
        gates = (gate[:, -1:] for gate in self.gates)
        return self.decoding.decode_attention(
            self.q[:, -1:], *keys, *gates, **self.sizes, q_offset=self.q.shape[1] - 1
        )[:2]


# ---------------------------------------------------------------------------------------------------------------------
# Comparison and clock
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _tune_one(name, shape, work, done):
    """Time the candidates of one kernel, round by round; see `tune` for what is returned."""
    from triton.errors import TritonError

    method, names = _COMPUTED_BY[name]
    run = getattr(work, method)
    configs, refused = TUNABLES[name].fitting(shape, work.max_shared), {}
    times = {0: []}
    try:
        work.use(name)
        expected = run()
        done()
        for i, config in enumerate(configs[1:], 1):
            work.use(name, config)
            try:
                with _poisoned():
                    reason = _difference(run(), expected, 4 * torch.finfo(work.dtype).eps + 1e-5)
            except (TritonError, RuntimeError) as error:
                if not _is_refusal(error, TritonError):
                    raise
                reason = str(error).strip().partition("\n")[0]
            if reason is None:
                times[i] = []
            else:
                refused[json.dumps(config)] = reason
            done()
        for _ in range(_ROUNDS):
            for i in times:
                work.use(name, configs[i])
                times[i].append(_milliseconds(run, names))
    finally:
        work.use(name)
    medians = {i: statistics.median(found) for i, found in times.items()}
    best = min(medians, key=medians.get)
    best = best if medians[best] <= _GAIN * medians[0] else 0
    return {
        "machine": machine(work.index),
        "kernel": name,
        "shape": TUNABLES[name].label(shape),
        "built_in": configs[0],
        "built_in_ms": medians[0],
        "best": configs[best],
        "best_ms": medians[best],
        "tried": len(configs),
        "refused": refused,
    }


def _is_refusal(error, triton_errors):
    """Whether a configuration does not compile or fit, as against a launch that went wrong."""
    return isinstance(error, triton_errors) or "PassManager" in str(error)


@contextlib.contextmanager
def _poisoned():
    """Fill what is allocated with NaN, so that results cannot be left over from another configuration."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def _difference(results, expected, allowed):
    """How results differ from those of the built-in configuration, None where rounding explains it."""
    for i, (x, y) in enumerate(zip(results, expected, strict=True)):
        if not x.is_floating_point():
            same = (x == y).float().mean().item()  # rounding swaps near-equals
            if not same >= 0.99:
                return f"other result: {1 - same:.1%} of the blocks differ"
            continue
        infinite = torch.isinf(y)  # lse of a query without a key
        if not torch.equal(torch.isinf(x), infinite):
            return f"other result: output {i} has other empty rows"
        x, y = x.float().masked_fill(infinite, 0), y.float().masked_fill(infinite, 0)
        off = ((x - y).norm() / y.norm().clamp(min=1e-30)).item()
        if not off <= allowed:
            return f"other result: output {i} is off by {off:.3g}"
    return None


def _milliseconds(run: Callable, names: tuple[str, ...]) -> float:
    """Time on the GPU of the kernels whose names begin so, for one call of `run`."""
    from torch.profiler import ProfilerActivity, profile

    def measure(launches):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(launches):
                run()
            torch.cuda.synchronize()
        spent = [event.self_device_time_total for event in profiler.key_averages() if event.key.startswith(names)]
        if not sum(spent):
            raise NotImplementedError(
                f"The kernels cannot be timed: torch.profiler sees no {' or '.join(names)} on the GPU; "
                "another profiler may be at work."
            )
        return sum(spent) / launches / 1000

    return measure(max(1, min(_MOST_LAUNCHES, int(_ROUND_MS / measure(1)))))


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def _table(rows):
    def short(config):
        return " ".join(f"{name}={value}" for name, value in config.items())

    header = ("kernel", "built-in ms", "best ms", "tried", "refused", "configuration")
    cells = [header]
    for row in rows:
        same = row["best"] == row["built_in"]
        times = (f"{row['built_in_ms']:.4f}", f"{row['best_ms']:.4f}", str(row["tried"]), str(len(row["refused"])))
        cells.append((row["kernel"], *times, short(row["best"]) + (" (built in)" if same else "")))
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]

    def pad(i, text):
        return text.rjust(widths[i]) if 0 < i < 5 else text.ljust(widths[i])

    lines = ["  ".join(pad(i, text) for i, text in enumerate(line)).rstrip() for line in cells]
    for row in rows:
        lines += [f"{row['kernel']}: {short(json.loads(c))} refused: {why}" for c, why in row["refused"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line of `python -m nsa_kernels.tune`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nsa_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, required=True, help="query heads HQ")
    parser.add_argument("--key-value-heads", type=int, required=True, help="key/value heads H")
    parser.add_argument("--head-dim", type=int, required=True, help="head dim D of queries and keys")
    parser.add_argument("--value-head-dim", type=int, help="head dim DV of values (default: D)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the inputs (default: %(default)s)")
    parser.add_argument(
        "--kernels", nargs="+", metavar="NAME", help=f"which kernels (default: all): {', '.join(KERNELS)}"
    )
    for name, value in check_sizes.__kwdefaults__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="(default: %(default)s)")
    args = vars(parser.parse_args(argv))
    args["dtype"] = DTYPES[args["dtype"]]
    try:
        rows = tune(**args)
    except (ValueError, NotImplementedError, OSError, torch.OutOfMemoryError) as error:
        print(f"nsa_kernels.tune: error: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 2
    print(f"{rows[0]['machine']}, {args['tokens']:,} tokens")
    print(_table(rows))
    print(f"wrote {cache_path()}")
    if os.environ.get("NSA_KERNELS_TUNING") == "0":
        print("NSA_KERNELS_TUNING=0 is set: kernels keep to their built-in configurations.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
