# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The public operations: inputs are checked, then the chosen backend runs.

Every operation has the signature and meaning of its namesake in `reference.py`, plus `backend`:

- `"auto"`: the Triton kernels for CUDA tensors that they can take, else the reference (see `resolve_backend`).
- `"reference"`: pure PyTorch, on any device.
- `"triton"`: the Triton kernels; an error where they cannot run, never a silent fallback.

`importance`, `topn_blocks` and `gated_sum` have one implementation that runs anywhere. Of `compress_mean`,
`compress_mlp` and `compress_pool`, "triton" stands for a faster one in plain PyTorch.
"""

import functools
import inspect
from collections.abc import Callable

import torch

from . import reference
from .availability import triton_error
from .validation import MAX_DECODE_QUERIES, check_layout, check_sizes, check_tensors, rotation_error

__all__ = [
    "BACKENDS",
    "append_tokens",
    "compress_mean",
    "compress_mlp",
    "compress_pool",
    "compressed_attention",
    "gated_sum",
    "importance",
    "nsa_attention",
    "resolve_backend",
    "rotate",
    "select_blocks",
    "selected_attention",
    "topn_blocks",
    "window_attention",
]

BACKENDS = ("auto", "triton", "reference")

# the operations with a second, faster implementation
_TRITON_OPERATIONS = (
    "append_tokens",
    "compress_mean",
    "compress_mlp",
    "compress_pool",
    "compressed_attention",
    "nsa_attention",
    "rotate",
    "select_blocks",
    "selected_attention",
    "window_attention",
)


def resolve_backend(
    backend: str = "auto",
    q: torch.Tensor | None = None,
    *,
    q_offset: int | torch.Tensor = 0,
    return_weights: bool = False,
) -> str:
    """Name of the implementation that `backend` stands for.

    "auto" takes the kernels for CUDA tensors in bf16, fp16 or fp32, head dims up to 256, an int `q_offset` and no
    `return_weights`. (A tensor `q_offset` is for the decode kernels, which `nsa_attention` chooses by itself for at
    most 16 queries with a past and without gradients.)

    Args:
        backend: "auto", "triton" or "reference".
        q: Queries; default: what the current device would run.
        q_offset, return_weights: As given to the operation.

    Returns:
        "triton" or "reference".

    Raises:
        ValueError: Unknown name.
        NotImplementedError: "triton" where the kernels cannot run; says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}.")
    if backend == "reference":
        return backend
    device = None if q is None else q.device
    if backend == "triton":
        if (reason := triton_error(device)) is not None:
            raise NotImplementedError(f"backend='triton' cannot run: {reason} backend='reference' runs anywhere.")
        return backend
    if q is None:
        return "triton" if torch.cuda.is_available() and triton_error() is None else "reference"
    takes = (
        device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and q.shape[-1] <= 256
        and not isinstance(q_offset, torch.Tensor)
        and not return_weights
        and triton_error(device) is None
    )
    return "triton" if takes else "reference"


def _decodes(q, k, *tensors, q_offset=0, cu_seqlens=None, **rest) -> bool:
    """Whether the decode kernels serve `nsa_attention`: few queries with a past, no gradient."""
    if cu_seqlens is not None or q.shape[1] > MAX_DECODE_QUERIES:
        return False
    past = isinstance(q_offset, torch.Tensor) or q.shape[1] < k.shape[1]
    given = (x for x in (q, k, *tensors, *rest.values()) if isinstance(x, torch.Tensor))
    return past and not (torch.is_grad_enabled() and any(x.requires_grad for x in given))


def _public(name: str, check: Callable, refusal: Callable | None = None) -> Callable:
    """The operation `name` of the reference, with `backend` and input checks added.

    Args:
        check: Raises for wrong arguments.
        refusal: Reason why the kernels of this operation alone cannot take its arguments, or None if they can.
    """
    specification = getattr(reference, name)
    signature = inspect.signature(specification)
    first, *_ = names = tuple(signature.parameters)

    @functools.wraps(specification)
    def operation(*args, backend: str = "auto", **kwargs):
        if not torch.compiler.is_compiling():
            try:
                check(**dict(zip(names, args)), **kwargs)
            except TypeError:
                signature.bind(*args, **kwargs)  # says what is missing or given twice, and takes many times longer
                raise
        implementation = specification
        if name in _TRITON_OPERATIONS:
            decodes = name == "nsa_attention" and _decodes(*args, **kwargs)
            asked = ("return_weights",) if decodes else ("return_weights", "q_offset")
            choice = {name: kwargs[name] for name in asked if name in kwargs}
            if backend == "auto" and refusal is not None and refusal(*args, **kwargs) is not None:
                return specification(*args, **kwargs)
            if resolve_backend(backend, args[0] if args else kwargs[first], **choice) == "triton":
                implementation = _triton("decode_attention" if decodes else name)
        elif backend not in BACKENDS:
            raise ValueError(f"`backend` must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}.")
        return implementation(*args, **kwargs)

    parameter = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, default="auto", annotation=str)
    operation.__signature__ = signature.replace(parameters=[*signature.parameters.values(), parameter])
    return operation


# The operations that have kernels, by name, once they are imported.
_LOADED: dict[str, Callable] = {}


def _triton(name):
    if not _LOADED:
        _LOADED.update(_load())
    return _LOADED[name]


def _load():
    # on first use: importing this package never imports triton
    from .append import append_tokens
    from .attention import nsa_attention
    from .compressed import compressed_attention
    from .compression import compress_mean, compress_mlp, compress_pool
    from .decode import decode_attention
    from .rotary import rotate
    from .selected import selected_attention
    from .selection import select_blocks
    from .window import window_attention

    operations = (
        append_tokens, compress_mean, compress_mlp, compress_pool, compressed_attention, decode_attention,
        nsa_attention, rotate, select_blocks, selected_attention, window_attention,
    )  # fmt: skip
    return {operation.__name__: operation for operation in operations}


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------

_SIZES = inspect.signature(check_sizes).parameters


def _check_attention(q, k=None, v=None, k_cmp=None, v_cmp=None, k_win=None, v_win=None, **rest):
    sizes = {name: value for name, value in rest.items() if name in _SIZES}
    if {"compress_stride", "select_block_size"} - sizes.keys():
        sizes = {name: value for name, value in sizes.items() if name == "window_size"}
    elif "num_selected_blocks" not in sizes:  # fits whatever is forced
        sizes["num_selected_blocks"] = sizes.get("num_initial_blocks", 1) + sizes.get("num_local_blocks", 2)
    check_sizes(**sizes)
    pairs = {"k": (k, v), "k_cmp": (k_cmp, v_cmp), "k_win": (k_win, v_win)}
    pairs = {name: pair for name, pair in pairs.items() if pair[0] is not None}
    gates = {name: rest[name] for name in ("g_cmp", "g_slc", "g_win") if name in rest}
    check_tensors(q, pairs, gates, rest.get("cu_seqlens"), rest.get("leftpad"))


def _check_compress(x, compress_block_size, compress_stride, cu_seqlens=None, **rest):
    check_sizes(
        compress_block_size=compress_block_size, compress_stride=compress_stride, select_block_size=compress_block_size
    )
    check_layout("x", x, cu_seqlens)


def _check_topn(imp, select_block_size, num_selected_blocks, num_initial_blocks=1, num_local_blocks=2, **rest):
    check_sizes(
        compress_block_size=select_block_size,
        compress_stride=select_block_size,
        select_block_size=select_block_size,
        num_selected_blocks=num_selected_blocks,
        num_initial_blocks=num_initial_blocks,
        num_local_blocks=num_local_blocks,
    )
    check_layout("imp", imp, None)


def _check_sum(o_cmp, o_slc, o_win, **gates):
    for name, gate in gates.items():
        if gate.shape != o_slc.shape[:-1]:
            raise ValueError(f"`{name}` must have shape {list(o_slc.shape[:-1])}, got {list(gate.shape)}.")


def _check_rotate(x, cos, sin):
    if x.dim() != 3:
        check_layout("x", x, None)
    *batch, T, _, D = x.shape
    for name, each in (("cos", cos), ("sin", sin)):
        if list(each.shape) not in ([*batch, T, D], [*(1 for _ in batch), T, D]):
            raise ValueError(
                f"`{name}` must have shape {[*batch, T, D]}, that of `x` without heads{', or 1 row' if batch else ''}, "
                f"got {list(each.shape)}."
            )


def _check_append(q, new, cache, compress_block_size, compress_stride, **rest):
    check_sizes(
        compress_block_size=compress_block_size, compress_stride=compress_stride, select_block_size=compress_block_size
    )
    separate = ("k_cmp" in new) == ("k_win" in new) == ("k_win" in cache)
    if not separate:
        raise ValueError(
            "`new` must hold `k_cmp`, `v_cmp`, `k_win` and `v_win` if `cache` holds `k_win` and `v_win`, and else none "
            f"of them, got {sorted(new)} and {sorted(cache)}."
        )
    check_tensors(q, {f"k{x}": (new[f"k{x}"], new[f"v{x}"]) for x in ("", "_cmp", "_win") if f"k{x}" in new})


append_tokens = _public("append_tokens", _check_append)
compress_mean = _public("compress_mean", _check_compress)
compress_mlp = _public("compress_mlp", _check_compress)
compress_pool = _public("compress_pool", _check_compress)
compressed_attention = _public("compressed_attention", _check_attention)
importance = _public("importance", _check_attention)
rotate = _public("rotate", _check_rotate, rotation_error)
topn_blocks = _public("topn_blocks", _check_topn)
select_blocks = _public("select_blocks", _check_attention)
selected_attention = _public("selected_attention", _check_attention)
window_attention = _public("window_attention", _check_attention)
gated_sum = _public("gated_sum", _check_sum)
nsa_attention = _public("nsa_attention", _check_attention)
