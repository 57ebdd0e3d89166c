# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Standard suites by name, through the Language Model Evaluation Harness (`lm_eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import NSAError

__all__ = ["require_lm_eval", "run_lm_eval"]


def require_lm_eval() -> None:
    """Check that lm_eval is there, before work starts.

    Raises:
        NSAError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise NSAError("standard suites need lm_eval: pip install 'lm_eval[hf]'") from None


def run_lm_eval(
    model, tokenizer, tasks: Sequence[str], *, batch_size: int = 1, limit: float | None = None
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm_eval on a loaded model; their data must be within reach.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        tasks: names of tasks or groups.
        batch_size: rows per forward pass.
        limit: examples per task, or a share of them if below 1; None takes all.

    Returns:
        task -> metric -> value, as lm_eval names them.

    Raises:
        NSAError: lm_eval is not installed, or it refuses the tasks.
    """
    require_lm_eval()
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, log_samples=False)
    except (KeyError, ValueError, OSError) as error:
        raise NSAError(f"lm_eval cannot run {', '.join(tasks)}: {error}") from error
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, (int, float, str))}
        for task, metrics in found["results"].items()
    }
