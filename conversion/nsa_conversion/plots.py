# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of training and evaluation, written as PNG without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import NSAError

__all__ = ["plot_loss_curve", "plot_position_loss", "require_matplotlib"]

# Okabe-Ito: told apart by colour-blind readers and in grey print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def require_matplotlib() -> None:
    """Check that matplotlib is there, before work starts.

    Raises:
        NSAError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NSAError("drawing needs matplotlib: pip install 'nsa-transformers[eval]'") from None


def _new_figure(title: str, x_label: str, y_label: str):
    """One axes with the house look; the figure never touches pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_loss_curve(log_history: Sequence[Mapping[str, Any]], path: str | Path, title: str = "Training loss") -> None:
    """Draw training and evaluation loss over optimizer steps.

    Args:
        log_history: `trainer.state.log_history`; entries with `loss` or `eval_loss` and `step` are drawn.
        path: the PNG to write.
        title: shown above the axes.
    """
    figure, axes = _new_figure(title, "optimizer step", "loss (nats per token)")
    drawn = 0
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
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
    series: Mapping[str, Sequence[Any]], path: str | Path, title: str = "Loss by position in the text"
) -> None:
    """Draw mean loss per position bucket, one line per model.

    Args:
        series: label -> buckets with `start`, `end` (exclusive) and `loss`, as `loss_by_position` returns them.
        path: the PNG to write.
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


def bucket_label(bucket: Any) -> str:
    """`1,024-2,047` for the bucket of positions 1024 <= p < 2048."""
    return f"{bucket.start:,}-{bucket.end - 1:,}"
