# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of training and evaluation, written as PNG without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import NSAError

if TYPE_CHECKING:
    import torch

__all__ = [
    "bucket_label",
    "plot_bars",
    "plot_block_maps",
    "plot_heatmaps",
    "plot_loss_curve",
    "plot_position_loss",
    "require_matplotlib",
]

# Okabe-Ito: told apart by colour-blind readers and in grey print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
MAX_ROWS = 400  # of a picture


def require_matplotlib() -> None:
    """Check that matplotlib is there, before work starts.

    Raises:
        NSAError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NSAError("drawing needs matplotlib: pip install 'nsa-transformers[eval]'") from None


def _canvas(width: float, height: float):
    """An empty figure that never touches pyplot's global state; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _new_figure(title: str, x_label: str, y_label: str):
    """One axes with the house look."""
    figure = _canvas(7.2, 4.2)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_loss_curve(log_history: Sequence[Mapping[str, Any]], path: str | Path, title: str = "Training loss") -> None:
    """Draw training and evaluation loss, and the terms of the former, over optimizer steps.

    Args:
        log_history: `trainer.state.log_history`; entries with `step` and `loss`, `eval_loss` or a term of
            `nsa finetune --stage` are drawn.
        path: the PNG to write.
        title: shown above the axes.
    """
    figure, axes = _new_figure(title, "optimizer step", "loss (nats per token)")
    drawn = 0
    curves = {
        "loss": "training",
        "eval_loss": "evaluation",
        "next_token_loss": "next token",
        "distill_loss": "KL to the teacher",
        "hidden_loss": "distance of hidden states",
        "selector_loss": "KL of the selector",
        "value_loss": "relative error of φ_V",
    }
    for key, label in curves.items():
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            marker = MARKERS[drawn] if len(points) <= 50 else None
            axes.plot(*zip(*points), color=COLORS[drawn], marker=marker, markersize=4, linewidth=1.6, label=label)
            drawn += 1
    axes.xaxis.get_major_locator().set_params(integer=True)
    if drawn:
        axes.legend(frameon=False)
    figure.savefig(path)


def plot_position_loss(
    series: Mapping[str, Sequence[Any]], path: str | Path | BinaryIO, title: str = "Loss by position in the text"
) -> None:
    """Draw mean loss per position bucket, one line per model.

    Args:
        series: label -> buckets with `start`, `end` (exclusive) and `loss`, as `loss_by_position` returns them.
        path: the PNG to write, or a binary file.
        title: shown above the axes.
    """
    figure, axes = _new_figure(title, "position in the text (tokens)", "mean loss (nats per token)")
    names = [bucket_label(bucket) for bucket in max(series.values(), key=len)]
    for index, (label, buckets) in enumerate(series.items()):
        axes.plot(
            [names.index(bucket_label(bucket)) for bucket in buckets],
            [bucket.loss for bucket in buckets],
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.6,
            linestyle="-" if index % 2 == 0 else "--",  # equal curves stay visible under each other
            label=label,
        )
    crowded = len(names) > 6
    axes.set_xticks(range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axes.margins(x=0.04, y=0.12)
    axes.legend(frameon=False)
    figure.savefig(path)


def plot_bars(
    series: Mapping[str, Sequence[float]],
    names: Sequence[str],
    path: str | Path | BinaryIO,
    title: str,
    y_label: str,
    limits: tuple[float, float] | None = (0, 1),
) -> None:
    """Draw groups of bars side by side, one colour per label.

    Args:
        series: label -> one height per name.
        names: of the groups.
        path: the PNG to write, or a binary file.
        title: shown above the axes.
        y_label: of the heights.
        limits: of the scale; None takes them from the heights.
    """
    figure, axes = _new_figure(title, "", y_label)
    width = 0.8 / len(series)
    for index, (label, heights) in enumerate(series.items()):
        places = [group + (index - (len(series) - 1) / 2) * width for group in range(len(names))]
        axes.bar(places, heights, width, color=COLORS[index % len(COLORS)], label=label)
    if limits is None:
        axes.axhline(0, color="black", linewidth=0.8)
    else:
        axes.set_ylim(*limits)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.legend(frameon=False)
    figure.savefig(path)


def plot_heatmaps(
    panels: Mapping[str, Sequence[Sequence[float]]],
    path: str | Path | BinaryIO,
    *,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] | None = None,
    y_names: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
    columns: int = 3,
) -> None:
    """Draw matrices side by side on one colour scale.

    Args:
        panels: title -> rows of numbers.
        path: the PNG to write, or a binary file.
        x_label, y_label: of columns and rows.
        x_names, y_names: of every column and row, with the numbers written in; None numbers them.
        limits: ends of the colour scale; None takes the smallest and the largest number.
        columns: panels in a row, at most.
    """
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    rows = len(next(iter(panels.values())))
    figure = _canvas(1 + 2.7 * columns, lines * max(1.9, 0.9 + 0.16 * rows))
    every = [number for matrix in panels.values() for row in matrix for number in row]
    low, high = limits or (min(every), max(every))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, matrix) in zip(grid.flat, panels.items()):
        image = axes.imshow(matrix, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set_title(title, fontsize=8, loc="left")
        axes.set_xlabel(x_label, fontsize=8)
        axes.set_ylabel(y_label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.locator_params(integer=True)
        if x_names is not None:
            axes.set_xticks(range(len(x_names)), x_names)
        if y_names is not None:
            axes.set_yticks(range(len(y_names)), y_names)
        if x_names is not None and y_names is not None:
            for y, row in enumerate(matrix):
                for x, number in enumerate(row):
                    dark = number < (low + high) / 2
                    axes.text(x, y, f"{number:.2f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
    figure.colorbar(image, ax=list(grid.flat[: len(panels)]), shrink=0.8, aspect=20 * lines).ax.tick_params(labelsize=7)
    figure.savefig(path)


def plot_block_maps(
    panels: Mapping[str, torch.Tensor], path: str | Path | BinaryIO, *, block_size: int, columns: int = 3
) -> None:
    """Draw what queries see of each block of keys, side by side, on one scale from 0 to 1.

    Args:
        panels: title -> shares, [queries, blocks]; of many queries every so many are drawn.
        path: the PNG to write, or a binary file.
        block_size: tokens in a block.
        columns: panels in a row.
    """
    lines = -(-len(panels) // columns)
    figure = _canvas(1 + 2.6 * columns, 2.5 * lines)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, matrix) in zip(grid.flat, panels.items()):
        tokens, blocks = matrix.shape
        rows = matrix[:: -(-tokens // MAX_ROWS)]
        where = {"extent": (0, blocks * block_size, tokens, 0), "aspect": "auto", "interpolation": "nearest"}
        image = axes.imshow(rows, vmin=0, vmax=1, cmap="viridis", **where)
        axes.set_title(title, fontsize=8, loc="left")
        axes.tick_params(labelsize=7)
    figure.supxlabel("token that is read", fontsize=8)
    figure.supylabel("query", fontsize=8)
    figure.colorbar(image, ax=list(grid.flat[: len(panels)]), shrink=0.8, aspect=20 * lines).ax.tick_params(labelsize=7)
    figure.savefig(path)


def bucket_label(bucket: Any) -> str:
    """`1,024-2,047` for the bucket of positions 1024 <= p < 2048."""
    return f"{bucket.start:,}-{bucket.end - 1:,}"
