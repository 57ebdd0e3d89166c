# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Native Sparse Attention operations for PyTorch (arXiv 2502.11089), without any model around them."""

from .interface import (
    BACKENDS,
    append_tokens,
    compress_mean,
    compress_mlp,
    compress_pool,
    compressed_attention,
    gated_sum,
    importance,
    nsa_attention,
    resolve_backend,
    rotate,
    select_blocks,
    selected_attention,
    topn_blocks,
    window_attention,
)
from .reference import compressed_cu_seqlens, fold_importance, num_compressed_blocks
from .validation import MAX_DECODE_QUERIES, check_sizes

__all__ = [
    "BACKENDS",
    "MAX_DECODE_QUERIES",
    "append_tokens",
    "check_sizes",
    "compress_mean",
    "compress_mlp",
    "compress_pool",
    "compressed_attention",
    "compressed_cu_seqlens",
    "fold_importance",
    "gated_sum",
    "importance",
    "nsa_attention",
    "num_compressed_blocks",
    "resolve_backend",
    "rotate",
    "select_blocks",
    "selected_attention",
    "topn_blocks",
    "window_attention",
]
