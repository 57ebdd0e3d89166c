# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: inputs, clocks, and files that an interrupted run leaves whole."""

import argparse
import csv
import datetime
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import nsa_kernels as nsa

__all__ = [
    "COLORS",
    "COMPRESSION",
    "INPUTS",
    "SHAPES",
    "SIZES",
    "Results",
    "check",
    "machine",
    "make_inputs",
    "make_parser",
    "measure",
    "measure_passes",
    "new_figure",
    "numbers",
    "plot_steps",
    "require_cuda",
    "save_figure",
    "unions",
]

# Query heads, key heads, head dim: the paper's, of Llama 3 8B, 3.2 3B and 70B, Qwen 2.5 14B and 7B, SmolLM2 135M, and
# a group of one.
SHAPES = {
    f"HQ{HQ}-H{H}-D{D}": (HQ, H, D)
    for HQ, H, D in [
        (64, 4, 128),
        (32, 8, 128),
        (24, 8, 128),
        (64, 8, 128),
        (40, 8, 128),
        (28, 4, 128),
        (9, 3, 64),
        (16, 16, 128),
    ]
}
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
INPUTS = ("local", "random")
# Okabe-Ito, and a dark red: told apart by colour-blind readers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#882255")

# Of the "local" inputs: blocks of one topic, tokens before another topic is asked for, its size in queries and keys.
_TOPIC_BLOCKS, _TOPIC_TOKENS, _TOPIC = 64, 1024, 1.1


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def _drift(noise, correlation):
    """Turn independent noise `[T, H, D]` of variance 1 into one whose neighbours in T have the given correlation."""
    steps = min(len(noise), 4096)
    decay = correlation ** torch.arange(steps, device=noise.device, dtype=torch.float32)
    size = len(noise) + steps
    out = torch.fft.irfft(
        torch.fft.rfft(noise, n=size, dim=0) * torch.fft.rfft(decay, n=size)[:, None, None], n=size, dim=0
    )
    return out[: len(noise)] * (1 - correlation**2) ** 0.5


def _local_qk(T, HQ, H, D, noise):
    """q `[T, HQ, D]` and k `[T, H, D]` whose neighbouring queries choose nearly the same blocks, at any length.

    Blocks are dealt out to topics, 64 to each, and keys point in the direction of their block's topic. Queries point to
    one topic for 1,024 tokens, so that as many blocks compete for the choice at 65,536 tokens as at 4,096. Slowly
    drifting parts of queries and keys rank the blocks of a topic; white noise of the queries makes neighbours differ.
    """
    blocks = -(-T // SIZES["select_block_size"])
    topics = max(1, blocks // _TOPIC_BLOCKS)
    directions = torch.nn.functional.normalize(noise(topics, H, D), dim=-1) * _TOPIC * D**0.5
    # dealt like cards: of `topics` blocks in a row, each topic gets one
    dealt = noise(-(-blocks // topics), topics, H).argsort(dim=1).flatten(0, 1)
    asked = noise(-(-T // _TOPIC_TOKENS), topics, H).argmax(dim=1)

    def topic_of_tokens(choice, tokens):
        choice = choice.repeat_interleave(tokens, dim=0)[:T]
        return directions.gather(0, choice[..., None].expand(-1, -1, D))

    k = topic_of_tokens(dealt, SIZES["select_block_size"]) + 1.4 * _drift(noise(T, H, D), 0.9)
    group, own = (_drift(noise(T, h, D), 0.97) + 0.4 * noise(T, h, D) for h in (H, HQ))
    shared = (topic_of_tokens(asked, _TOPIC_TOKENS) + 1.4 * 0.8**0.5 * group).repeat_interleave(HQ // H, dim=1)
    return shared + 1.4 * 0.2**0.5 * own, k


def make_inputs(kind, T, HQ, H, D, dtype, device="cuda", seed=0):
    """q, k, v, k_cmp, v_cmp, k_win, v_win and three gates, batch 1, as `nsa_attention` takes them.

    "local": 2, 4, 8, 16 neighbouring queries need about 18, 20, 23, 25 blocks together, as SmolLM2-135M on English
    text. "random": independent queries and keys; neighbours share few blocks, unlike in any model.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, device=device, generator=generator)

    if kind == "local":
        q, k = _local_qk(T, HQ, H, D, noise)
    else:
        q, k = noise(T, HQ, D), noise(T, H, D)
    q, k, v, k_win, v_win = (x[None] for x in (q, k, *(noise(T, H, D) for _ in range(3))))
    k_cmp, v_cmp = nsa.compress_mean(k, **COMPRESSION), nsa.compress_mean(v, **COMPRESSION)
    gates = [noise(1, T, HQ).sigmoid() for _ in range(3)]
    return [x.to(dtype).contiguous().requires_grad_() for x in (q, k, v, k_cmp, v_cmp, k_win, v_win, *gates)]


def unions(block_indices):
    """Mean number of blocks that 2, 4, 8, 16 neighbouring queries need together, of queries that see n blocks or more.

    Args:
        block_indices: `[T, H, n]`, runs of 16 neighbours.
    """
    chosen = block_indices[: len(block_indices) // 16 * 16].long()
    chosen = chosen[(chosen >= 0).all(dim=-1).all(dim=-1).unflatten(0, (-1, 16)).all(dim=-1).repeat_interleave(16)]
    if not len(chosen):
        return {f"union_{width}": float("nan") for width in (2, 4, 8, 16)}
    mask = torch.zeros(*chosen.shape[:2], int(chosen.max()) + 1, dtype=torch.bool, device=chosen.device)
    mask.scatter_(-1, chosen, True)
    return {f"union_{w}": mask.unflatten(0, (-1, w)).any(1).sum(-1).float().mean().item() for w in (2, 4, 8, 16)}


def check(kind, HQ, H, D, dtype):
    """Exit if kernels and reference disagree: what is wrong is not timed.

    Returns:
        Share of the queries whose chosen blocks are the same; rounding may swap near-equals.
    """
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


# ---------------------------------------------------------------------------------------------------------------------
# Clocks
# ---------------------------------------------------------------------------------------------------------------------


def measure(function: Callable, milliseconds: int) -> dict:
    """Median, 20 % and 80 % quantiles in ms of calls during so many milliseconds, and the peak memory in GiB."""
    import triton

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    peak = torch.cuda.max_memory_allocated() / 2**30
    times = triton.testing.do_bench(function, warmup=50, rep=milliseconds, quantiles=[0.5, 0.2, 0.8])
    return dict(zip(("median_ms", "q20_ms", "q80_ms"), (round(x, 4) for x in times))) | {"peak_gib": round(peak, 3)}


def measure_passes(make_output: Callable, inputs: list, do: torch.Tensor, milliseconds: int) -> dict:
    """`measure` of forward and backward, the latter with the graph kept."""
    with torch.no_grad():
        forward = measure(make_output, milliseconds)
    o = make_output()
    backward = measure(lambda: torch.autograd.grad(o, inputs, do, retain_graph=True), milliseconds)
    return {"forward": forward, "backward": backward}


# ---------------------------------------------------------------------------------------------------------------------
# Command line and files
# ---------------------------------------------------------------------------------------------------------------------


def make_parser(description: str) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write, pictures beside it")
    parser.add_argument("--commit", default=None, help="commit to record where git is not available")
    return parser


def require_cuda() -> None:
    """Exit with one line where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device, and torch finds none.")


def machine(commit: str | None = None) -> dict:
    """What a figure depends on: GPU, versions, commit, date."""
    import triton

    if commit is None:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def _write_beside(path, write):
    """Let `write` fill a file beside `path` and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


class Results:
    """Rows of a CSV file, which is written anew with each of them: an interrupted run keeps what it measured.

    Args:
        path: The file.
        constant: Columns that are the same in all rows, the last ones.
    """

    def __init__(self, path: Path, constant: dict):
        self.path, self.constant, self.rows = Path(path), constant, []

    def add(self, **row) -> None:
        self.rows.append(row | self.constant)
        _write_beside(self.path, self._write)

    def _write(self, path):
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)


def numbers(rows: list[dict], value: str, **wanted) -> list[tuple[int, float]]:
    """(tokens, value) of the rows that have these entries and the value, by length."""
    found = [row for row in rows if all(row.get(name) == entry for name, entry in wanted.items())]
    return sorted((row["tokens"], row[value]) for row in found if isinstance(row.get(value), (int, float)))


def new_figure(title: str, columns: int = 1):
    """A figure with so many axes side by side, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns + 1.4, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, x=0.01, horizontalalignment="left")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(True, color="#DDDDDD", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_steps(rows: list[dict], path: Path, title: str, series: dict[str, dict], unit: str, memory: str) -> Path:
    """Tokens per second and peak memory of training steps by length, one line per label of `series`; see `numbers`.

    Args:
        path: CSV file, beside which the picture goes.
        series: What `numbers` selects a line's rows by.
        unit: What a length counts the tokens of.
        memory: Label of the second axis.

    Returns:
        The picture.
    """
    figure, axes = new_figure(title, 2)
    for ax, value, label in zip(axes, ("tokens_per_s", "peak_gib"), ("tokens per second", memory)):
        for color, (name, wanted) in zip(itertools.cycle(COLORS), series.items()):
            points = numbers(rows, value, **wanted)
            if points:
                ax.plot(*zip(*points), marker="o", color=color, label=name)
        ticks = sorted({row["tokens"] for row in rows})
        ax.set(xscale="log", xlabel=f"tokens in a {unit}", ylabel=label)
        if ax.lines:
            ax.set_ylim(0, 1.08 * ax.dataLim.ymax)
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.minorticks_off()
    axes[0].legend(frameon=False, fontsize=8)
    picture = path.with_suffix(".png")
    save_figure(figure, picture)
    return picture


def save_figure(figure, path: Path) -> None:
    """Write a PNG."""
    _write_beside(path, lambda partial: figure.savefig(partial, format="png"))
    print(f"wrote {path}", flush=True)
