# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Requirements on block sizes and tensor shapes, shared by the operations and by the model configuration."""

import torch

__all__ = ["MAX_DECODE_QUERIES", "check_layout", "check_sizes", "check_tensors", "rotation_error"]

# New queries a row that the decode kernels take.
MAX_DECODE_QUERIES = 16


def check_sizes(
    *,
    compress_block_size: int = 32,
    compress_stride: int = 16,
    select_block_size: int = 64,
    num_selected_blocks: int = 16,
    num_initial_blocks: int = 1,
    num_local_blocks: int = 2,
    window_size: int = 512,
) -> None:
    """Check l, d, l', n, the forced blocks and w against each other.

    Raises:
        ValueError: Names the argument, what it must satisfy, and the value given.
    """
    sizes = dict(locals())
    for name, value in sizes.items():
        smallest = 0 if name == "num_initial_blocks" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ValueError(f"`{name}` must be an integer >= {smallest}, got {value!r}.")
    for name in ("compress_block_size", "select_block_size"):
        if sizes[name] % compress_stride:
            raise ValueError(
                f"`compress_stride` (d) must divide `{name}`, got compress_stride={compress_stride} and "
                f"{name}={sizes[name]}. Choose a stride that divides both block sizes, e.g. 16 with 32 and 64."
            )
    if num_selected_blocks < num_initial_blocks + num_local_blocks:
        raise ValueError(
            "`num_selected_blocks` (n) must be at least num_initial_blocks + num_local_blocks, because the forced "
            f"blocks count, got {num_selected_blocks} < {num_initial_blocks} + {num_local_blocks}."
        )


def check_layout(name: str, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[int, str]:
    """Check that a tensor is `[B, T, H, D]`, or `[T, H, D]` when packed by a valid `cu_seqlens`.

    Returns:
        The number of dimensions expected, and the layout in words.

    Raises:
        ValueError: Names the tensor, the requirement and the shape given.
    """
    rank = 3 if cu_seqlens is not None else 4
    layout = "[T, H, D] because `cu_seqlens` is given" if rank == 3 else "[B, T, H, D]"
    if cu_seqlens is not None and (
        cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            "`cu_seqlens` must be an int32 or int64 tensor [N + 1] with N >= 1, got "
            f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}."
        )
    if x.dim() != rank:
        raise ValueError(f"`{name}` must be {layout}, got shape {list(x.shape)}.")
    return rank, layout


def check_tensors(
    q: torch.Tensor,
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor | None]],
    gates: dict[str, torch.Tensor] | None = None,
    cu_seqlens: torch.Tensor | None = None,
    leftpad: torch.Tensor | None = None,
) -> None:
    """Check that queries, the key/value pairs of the branches and the gates fit together.

    Args:
        q: `[B, T, HQ, D]`, packed `[T, HQ, D]`.
        pairs: Name of the branch's keys to (keys, values); values may be None.

    Raises:
        ValueError: Names the tensor, the requirement and the shape given.
    """
    rank, layout = check_layout("q", q, cu_seqlens)
    if cu_seqlens is not None and leftpad is not None:
        raise ValueError("`leftpad` must be None when `cu_seqlens` is given: packed sequences have no padding.")
    if leftpad is not None and leftpad.shape != (q.shape[0],):
        raise ValueError(f"`leftpad` must have shape [B] = [{q.shape[0]}], got {list(leftpad.shape)}.")
    for name, (k, v) in pairs.items():
        if k.dim() != rank:
            raise ValueError(f"`{name}` must be {layout}, got shape {list(k.shape)}.")
        if rank == 4 and k.shape[0] != q.shape[0]:
            raise ValueError(f"`{name}` must have the batch size of `q` ({q.shape[0]}), got {k.shape[0]}.")
        if k.shape[-1] != q.shape[-1]:
            raise ValueError(f"`{name}` must have the head dim of `q` ({q.shape[-1]}), got {k.shape[-1]}.")
        if q.shape[-2] % k.shape[-2]:
            raise ValueError(
                f"The query heads must be a multiple of the key/value heads of `{name}`, got {q.shape[-2]} and "
                f"{k.shape[-2]}."
            )
        if v is not None and v.shape[:-1] != k.shape[:-1]:
            raise ValueError(
                f"The values that go with `{name}` must have its shape but for the head dim, got {list(v.shape)} for "
                f"{list(k.shape)}."
            )
    for name, gate in (gates or {}).items():
        if gate.shape != q.shape[:-1]:
            raise ValueError(
                f"`{name}` must have shape {list(q.shape[:-1])}, one gate per query head, got {list(gate.shape)}."
            )


def rotation_error(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    """Reason why the Triton kernel of `rotate` cannot take its arguments, or None if it can."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    if x.dtype not in kinds or cos.dtype not in kinds or cos.dtype != sin.dtype:
        return (
            "`x`, `cos` and `sin` must be bfloat16, float16 or float32, `cos` and `sin` alike, for the Triton kernel, "
            f"got {x.dtype}, {cos.dtype} and {sin.dtype}."
        )
    if x.shape[-1] % 2 or x.shape[-1] > 256:
        return f"`x` must have an even head dim of at most 256 for the Triton kernel, got {x.shape[-1]}."
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "`cos` and `sin` must not require gradients for the Triton kernel, which computes that of `x` alone."
    return None
