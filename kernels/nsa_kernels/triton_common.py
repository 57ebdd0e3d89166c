# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share: where queries and keys lie, how head dims are tiled, the steps of their loops.

Every kernel works on `[B, T, H, D]` tensors of any strides whose last dim is contiguous. Packed `[T, H, D]` tensors are
seen as one row, `[1, T, H, D]`, that holds several sequences. Tiles never cross sequences: sequence s owns the tiles
`cu[s] // tile + s … cu[s + 1] // tile + s`, at least as many as it needs, so that their number has a bound without a
device value, `T // tile + N`; the tiles left over find `start >= rows` and return at once.

A head dim is held by one or two power-of-two tiles (`split_head_dim`); a pair of tiles whose second size is 0 repeats
the first as a stand-in that is never read.
"""

import functools
import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "TRITON_VERSION",
    "Layout",
    "add_dkdv",
    "add_dq",
    "add_pair",
    "add_product",
    "add_values",
    "cdiv",
    "check_inputs",
    "describe",
    "dot_pair",
    "empty_pair",
    "empty_outputs",
    "empty_values",
    "interpreted",
    "like",
    "load_pair",
    "load_rows",
    "load_tile",
    "locate",
    "next_power_of_2",
    "precision",
    "row_delta",
    "softmax_end",
    "softmax_step",
    "softmax_step_rows",
    "softmax_weights_rows",
    "split_head_dim",
    "store_pair",
    "store_rows",
    "tile_map",
]

# (major, minor): what fits into registers differs between versions.
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below every score, yet finite: the difference of two of them is 0, not NaN.
NEGATIVE = tl.constexpr(-1e30)
# Rows of a sequence end here for a descriptor of packed tensors; a power of two, so that `ROWS_END * 2**34` is 0.
ROWS_END = tl.constexpr(2**30)
_MOST = 2**31 - 2**16


def check_inputs(q, scale, q_offset=0, **tensors) -> float:
    """The scale of the scores; what has no kernel is refused by name.

    Args:
        q: Queries.
        scale: Number or None, then `D ** -0.5`.
        q_offset: As given.
        tensors: Keys and values by name.

    Raises:
        NotImplementedError: `q_offset` is a tensor, `scale` <= 0, or a dtype or head dim without a kernel.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if isinstance(q_offset, torch.Tensor):
        raise NotImplementedError(
            "`q_offset` must be an int for the Triton kernels, got a tensor; backend='reference' takes both."
        )
    if not scale > 0:
        raise NotImplementedError(f"`scale` must be > 0 for the Triton kernels, got {scale}; use backend='reference'.")
    for name, x in {"q": q, **tensors}.items():
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or x.dtype != q.dtype:
            raise NotImplementedError(
                f"`{name}` must be bfloat16, float16 or float32, and of the dtype of `q`, for the Triton kernels, got "
                f"{x.dtype}; use backend='reference'."
            )
        if x.shape[-1] > 256:
            raise NotImplementedError(
                f"`{name}` must have a head dim of at most 256 for the Triton kernels, got {x.shape[-1]}; use "
                "backend='reference'."
            )
    return scale


def like(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Room for their gradients, contiguous."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; many times faster on the host than Triton's own, and launches are many."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


@functools.cache
def split_head_dim(size: int) -> tuple[int, int]:
    """Tile sizes (first, second) that hold a head dim: powers of two >= 16, the second 0 where one suffices.

    192 is held by 128 + 64, 80 by 64 + 16; 112 by 128, masked.
    """
    whole = max(16, next_power_of_2(size))
    half = whole // 2
    rest = max(16, next_power_of_2(size - half)) if size > half >= 16 else whole
    return (half, rest) if half + rest < whole else (whole, 0)


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot` for operands of this dtype: fp32 is multiplied as fp32, not as tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


class Layout:
    """Where the queries lie, as the kernels take it.

    Args:
        q: `[B, T, HQ, D]`, packed `[T, HQ, D]`.
        leftpad: int `[B]` or None.
        q_offset: int, slot of the first query.
        cu_seqlens: int `[N + 1]` or None.

    Attributes:
        packed: Whether sequences are packed.
        B, T: Rows (1 if packed) and query tokens of a row.
        N: Sequences of the batch.
    """

    def __init__(self, q, leftpad=None, q_offset=0, cu_seqlens=None):
        self.packed = cu_seqlens is not None
        self.leftpad = None if leftpad is None else leftpad.contiguous()
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.q_offset = q_offset
        self.B, self.T = (1, q.shape[0]) if self.packed else q.shape[:2]
        self.N = cu_seqlens.shape[0] - 1 if self.packed else self.B

    def rows(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """`x` as `[B, T, H, D]` with a contiguous last dim."""
        if x is None:
            return None
        x = x[None] if self.packed else x
        return x if x.stride(-1) == 1 else x.contiguous()

    def row_values(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """`x`, one value per query head, as contiguous fp32 `[B, T, HQ]`."""
        if x is None:
            return None
        return (x[None] if self.packed else x).float().contiguous()

    def head_values(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """`x`, one value per query head, as fp32 `[B, T, HQ]` where a head's values lie side by side."""
        if x is None:
            return None
        return (x[None] if self.packed else x).float().transpose(1, 2).contiguous().transpose(1, 2)

    def tiles(self, tile: int) -> int:
        """Number of tiles of `tile` queries in every row, an upper bound if packed."""
        return self.T // tile + self.N if self.packed else cdiv(self.T, tile)

    def map(self, tile: int) -> torch.Tensor | None:
        """`tile_map` of the queries, None unless packed."""
        return tile_map(self.cu_seqlens, tile, self.T) if self.packed else None

    def where(self) -> dict:
        """Arguments of `locate` that do not depend on the tile."""
        return {
            "cu_ptr": self.cu_seqlens,
            "leftpad_ptr": self.leftpad,
            "T": self.T,
            "q_offset": self.q_offset,
            "PACKED": self.packed,
            "LEFTPAD": self.leftpad is not None,
        }


def describe(name, x, rows, *, packed=False):
    """A tensor from whose heads tiles of `rows` rows are copied in bulk, as `load_tile` takes it.

    Args:
        name: Prefix of the kernel's arguments.
        x: `[B, T, H, D]`.
        packed: Whether copies end with sequences of any bounds, instead of with the T rows.

    Returns:
        {name}_desc, {name}_desc2: Descriptors of the two tiles that hold a head dim, the second None where one does.
    """
    B, T, H, D = x.shape
    steps = _steps(x)
    if x.data_ptr() % 16 or any(step == 0 or step * x.element_size() % 16 for step in steps):
        x = F.pad(x, (0, -D % 8)).contiguous()
        steps = _steps(x)
    batch, pitch, head = steps
    shape, strides, box = [B, H, T, D], [batch, head, pitch, 1], [1, 1]
    if packed:
        # As in triton.tools.ragged_tma: the fourth coordinate, `row - rows + ROWS_END`, ends with the sequence; the
        # second adds `row0 + rows`, and the first takes ROWS_END back, as addresses wrap around at 64 bits.
        shape, strides, box = [_MOST, _MOST, H, ROWS_END.value, D], [2**34 - pitch, pitch, head, pitch, 1], [1, 1, 1]
    tiles = (TensorDescriptor(x, shape, strides, [*box, rows, tile]) if tile else None for tile in split_head_dim(D))
    return dict(zip((f"{name}_desc", f"{name}_desc2"), tiles, strict=True))


def _steps(x):
    """Strides of batch, token and head; of a dim of size 1 any that a descriptor can have."""
    return [step if size > 1 else 8 * cdiv(x.shape[-1], 8) for size, step in zip(x.shape[:3], x.stride())]


def tile_map(cu_seqlens: torch.Tensor, tile: int, total: int) -> torch.Tensor:
    """Sequence and first token of every tile of packed sequences, computed on the device.

    Args:
        cu_seqlens: int `[N + 1]` or `[R, N + 1]` of any strides, ascending; a row need not start with 0.
        tile: Tokens of a tile.
        total: Tokens of all sequences of a row, or more.

    Returns:
        int32 `[total // tile + N, 2]` or `[R, …, 2]`: sequence, and first token counted inside it; a tile without
        tokens starts at or behind its sequence's end.
    """
    cu = cu_seqlens if cu_seqlens.dim() == 2 else cu_seqlens[None]
    rows, sequences = cu.shape[0], cu.shape[1] - 1
    tiles = total // tile + sequences
    out = torch.empty(rows, tiles, 2, dtype=torch.int32, device=cu.device)
    block = 128
    _tile_map_kernel[(cdiv(tiles, block), rows)](
        cu, out, *cu.stride(), sequences, tiles, sequences.bit_length(), TILE=tile, BLOCK=block, num_warps=4
    )
    return out if cu_seqlens.dim() == 2 else out[0]


@triton.jit(do_not_specialize=["N", "tiles", "steps"])
def _tile_map_kernel(cu_ptr, out_ptr, stride_row, stride_seq, N, tiles, steps, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Find the last sequence s with (cu[s] - cu[0]) // TILE + s <= tile by bisection.

    Grid: (cdiv(tiles, BLOCK), rows)
    """
    i_row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cu_ptr += i_row * stride_row
    out_ptr += i_row * tiles * 2
    origin = tl.load(cu_ptr)
    low = tl.zeros([BLOCK], dtype=tl.int32)
    high = low + N
    for _ in range(steps):
        middle = (low + high) // 2
        first = ((tl.load(cu_ptr + middle.to(tl.int64) * stride_seq) - origin) // TILE).to(tl.int32) + middle
        right = (first <= i) & (high - low > 1)
        high = tl.where(right | (high - low <= 1), high, middle)
        low = tl.where(right, middle, low)
    first = ((tl.load(cu_ptr + low.to(tl.int64) * stride_seq) - origin) // TILE).to(tl.int32) + low
    tl.store(out_ptr + 2 * i, low, mask=i < tiles)
    tl.store(out_ptr + 2 * i + 1, (i - first) * TILE, mask=i < tiles)


@triton.jit
def locate(
    i_tile, i_batch, map_ptr, cu_ptr, leftpad_ptr, T, q_offset, TILE: tl.constexpr, PACKED: tl.constexpr,
    LEFTPAD: tl.constexpr,
):  # fmt: skip
    """Where tile `i_tile` of row `i_batch` lies.

    Returns:
        seq: Sequence, to index `cu` or `leftpad` with.
        start: The tile's first query, counted inside its sequence; >= rows: nothing to do.
        rows: Queries of the sequence.
        row0: int64, the sequence's first query inside its row of the tensor.
        pos0: Position of the sequence's query 0, negative in left padding.
        pad: Padding slots before the first real token: slot = position + pad.
    """
    if PACKED:
        seq = tl.load(map_ptr + 2 * i_tile)
        start = tl.load(map_ptr + 2 * i_tile + 1)
        row0 = tl.load(cu_ptr + seq).to(tl.int64)
        rows = (tl.load(cu_ptr + seq + 1) - row0).to(tl.int32)
        pad = 0
        pos0 = 0
    else:
        seq = i_batch
        start = i_tile * TILE
        row0 = tl.zeros([], dtype=tl.int64)
        rows = T
        pad = 0
        if LEFTPAD:
            pad = tl.load(leftpad_ptr + i_batch).to(tl.int32)
        pos0 = q_offset - pad
    return seq, start, rows, row0, pos0, pad


@triton.jit
def load_rows(ptrs, mask_rows, offs_d, D: tl.constexpr, END: tl.constexpr, MASKED: tl.constexpr):
    """Load a tile whose last dim is indexed by `offs_d`, up to END; what lies behind D elements is 0.

    Args:
        ptrs: `[rows, len(offs_d)]`, pointers.
        mask_rows: `[rows]`, rows to load, read only if MASKED; the others are 0.
    """
    if MASKED:
        if D < END:
            x = tl.load(ptrs, mask=mask_rows[:, None] & (offs_d[None, :] < D), other=0.0)
        else:
            x = tl.load(ptrs, mask=mask_rows[:, None], other=0.0)
    else:
        if D < END:
            x = tl.load(ptrs, mask=offs_d[None, :] < D, other=0.0)
        else:
            x = tl.load(ptrs)
    return x


@triton.jit
def store_rows(ptrs, x, mask_rows, offs_d, D: tl.constexpr, END: tl.constexpr):
    """Store a tile, in the dtype of the tensor, where `mask_rows` holds; the counterpart of `load_rows`."""
    x = x.to(ptrs.dtype.element_ty)
    if D < END:
        tl.store(ptrs, x, mask=mask_rows[:, None] & (offs_d[None, :] < D))
    else:
        tl.store(ptrs, x, mask=mask_rows[:, None])


@triton.jit
def load_pair(row_ptrs, mask_rows, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASKED: tl.constexpr):
    """Load rows of D elements as tiles `[rows, D1]` and `[rows, D2]`; what lies outside is 0.

    Args:
        row_ptrs: `[rows]`, pointers to the rows' first elements.
        mask_rows: `[rows]`, read only if MASKED.
    """
    offs_1 = tl.arange(0, D1)
    x_1 = load_rows(row_ptrs[:, None] + offs_1[None, :], mask_rows, offs_1, D, D1, MASKED)
    x_2 = x_1
    if D2 > 0:
        offs_2 = D1 + tl.arange(0, D2)
        x_2 = load_rows(row_ptrs[:, None] + offs_2[None, :], mask_rows, offs_2, D, D1 + D2, MASKED)
    return x_1, x_2


@triton.jit
def load_tile(desc, desc2, i_b, i_h, row0, rows, row, D1: tl.constexpr, D2: tl.constexpr, PACKED: tl.constexpr):
    """Rows of a head as tiles `[rows, D1]` and `[rows, D2]`; what lies behind the last row, or behind D, is 0.

    Args:
        desc, desc2: Of `describe`.
        i_b, i_h: Row of the batch, and head.
        row0, rows: The sequence's first row, and the number of its rows, read only if PACKED.
        row: The tile's first row, counted inside the sequence.
    """
    x_1 = _copy(desc, i_b, i_h, row0, rows, row, 0, PACKED)
    x_2 = x_1
    if D2 > 0:
        x_2 = _copy(desc2, i_b, i_h, row0, rows, row, D1, PACKED)
    return x_1, x_2


@triton.jit
def _copy(desc, i_b, i_h, row0, rows, row, column: tl.constexpr, PACKED: tl.constexpr):
    i_h = i_h.to(tl.int32)
    if PACKED:
        x = desc.load([ROWS_END, (row0 + rows).to(tl.int32), i_h, row - rows + ROWS_END, column])
    else:
        x = desc.load([i_b.to(tl.int32), i_h, (row0 + row).to(tl.int32), column])
    return tl.reshape(x, x.shape[-2:])


@triton.jit
def store_pair(row_ptrs, x_1, x_2, mask_rows, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Store tiles `[rows, D1]` and `[rows, D2]` as rows of D elements, in the dtype of the tensor."""
    offs_1 = tl.arange(0, D1)
    store_rows(row_ptrs[:, None] + offs_1[None, :], x_1, mask_rows, offs_1, D, D1)
    if D2 > 0:
        offs_2 = D1 + tl.arange(0, D2)
        store_rows(row_ptrs[:, None] + offs_2[None, :], x_2, mask_rows, offs_2, D, D1 + D2)


@triton.jit
def add_pair(row_ptrs, x_1, x_2, mask_rows, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Add tiles to rows of D elements that another kernel has written; the counterpart of `store_pair`."""
    old_1, old_2 = load_pair(row_ptrs, mask_rows, D, D1, D2, True)
    x_1 += old_1.to(tl.float32)
    if D2 > 0:
        x_2 += old_2.to(tl.float32)
    store_pair(row_ptrs, x_1, x_2, mask_rows, D, D1, D2)


@triton.jit
def dot_pair(a_1, a_2, b_1, b_2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """`a @ bᵀ` over a head dim held in two tiles: `[M, D]`, `[N, D]` to fp32 `[M, N]`."""
    x = tl.dot(a_1, tl.trans(b_1), input_precision=PRECISION)
    if D2 > 0:
        x = tl.dot(a_2, tl.trans(b_2), x, input_precision=PRECISION)
    return x


@triton.jit
def add_product(acc_1, acc_2, a, b_1, b_2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """`acc + a @ b` for `a` `[M, N]` and `b` `[N, D]` held in two tiles."""
    acc_1 = tl.dot(a, b_1, acc_1, input_precision=PRECISION)
    if D2 > 0:
        acc_2 = tl.dot(a, b_2, acc_2, input_precision=PRECISION)
    return acc_1, acc_2


@triton.jit
def empty_pair(M: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Accumulators `[M, D1]` and `[M, D2]`, fp32 zeros."""
    acc_1 = tl.zeros([M, D1], dtype=tl.float32)
    acc_2 = acc_1
    if D2 > 0:
        acc_2 = tl.zeros([M, D2], dtype=tl.float32)
    return acc_1, acc_2


@triton.jit
def softmax_step(s, m, z, acc_1, acc_2, v_1, v_2, scale_log2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the running softmax: the keys with raw scores `s` `[M, N]`, -inf where hidden, and values `v`.

    Args:
        m: `[M]`, running maximum of the raw scores, finite from the start (`NEGATIVE`), so that no difference is NaN.
        z: `[M]`, running sum.
        scale_log2: Scale of the scores times log2(e), positive.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    p, alpha, m, z = _weights(s, m, m_new, m_new * scale_log2, z, scale_log2)
    acc_1, acc_2 = add_values(p, alpha, acc_1, acc_2, v_1, v_2, D2, PRECISION)
    return m, z, acc_1, acc_2


@triton.jit
def softmax_step_rows(s, seeing, m, z, acc_1, acc_2, v_1, v_2, scale_log2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """`softmax_step` for the rows that are `seeing` `[M]`; cheaper than a mask of every score."""
    p, alpha, m, z = softmax_weights_rows(s, seeing, m, z, scale_log2)
    acc_1, acc_2 = add_values(p, alpha, acc_1, acc_2, v_1, v_2, D2, PRECISION)
    return m, z, acc_1, acc_2


@triton.jit
def softmax_weights_rows(s, seeing, m, z, scale_log2):
    """The part of `softmax_step_rows` that needs no values.

    Returns:
        p: `[M, N]`, weights of the values. alpha: `[M]`, factor of what was summed before. m, z: The new ones.
    """
    m_new = tl.maximum(m, tl.where(seeing, tl.max(s, 1), NEGATIVE))
    peak = tl.where(seeing, m_new * scale_log2, float("inf"))
    return _weights(s, m, m_new, peak, z, scale_log2)


@triton.jit
def _weights(s, m, m_new, peak, z, scale_log2):
    p = tl.exp2(s * scale_log2 - peak[:, None])
    alpha = tl.exp2((m - m_new) * scale_log2)
    return p, alpha, m_new, z * alpha + tl.sum(p, 1)


@triton.jit
def add_values(p, alpha, acc_1, acc_2, v_1, v_2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """`acc · alpha + p @ v`."""
    acc_1 = acc_1 * alpha[:, None]
    if D2 > 0:
        acc_2 = acc_2 * alpha[:, None]
    return add_product(acc_1, acc_2, p.to(v_1.dtype), v_1, v_2, D2, PRECISION)


@triton.jit
def softmax_end(m, z, acc_1, acc_2, scale_log2, D2: tl.constexpr):
    """Output tiles and natural lse of a running softmax; rows without a key: 0 and -inf."""
    total = tl.where(z == 0, 1.0, z)
    lse = tl.where(z == 0, float("-inf"), (m * scale_log2 + tl.log2(total)) * LN2)
    acc_1 = acc_1 / total[:, None]
    if D2 > 0:
        acc_2 = acc_2 / total[:, None]
    return acc_1, acc_2, lse


@triton.jit
def add_dq(
    acc_1, acc_2, q_1, q_2, do_1, do_2, k_1, k_2, v_1, v_2, visible, lse_log2, delta, gate, scale_log2,
    D2: tl.constexpr, DV2: tl.constexpr, HAS_GATE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dq += ds @ k` for one tile of keys, still without the scale.

    Args:
        visible: `[M, N]`, read only if MASKED.
        lse_log2: `[M]`, lse times log2(e), +inf for a row without a key.
        delta: `[M]`, of `row_delta`.
        gate: `[M]`, read only if HAS_GATE: `do` is the gradient of `gate · o` then, and delta knows no gate.
    """
    s = dot_pair(q_1, q_2, k_1, k_2, D2, PRECISION)
    p = tl.exp2(s * scale_log2 - lse_log2[:, None])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    if HAS_GATE:
        p *= gate[:, None]
    dp = dot_pair(do_1, do_2, v_1, v_2, DV2, PRECISION)
    ds = p * (dp - delta[:, None])
    return add_product(acc_1, acc_2, ds.to(k_1.dtype), k_1, k_2, D2, PRECISION)


@triton.jit
def add_dkdv(
    dk_1, dk_2, dv_1, dv_2, k_1, k_2, v_1, v_2, q_1, q_2, do_1, do_2, visible, lse_log2, delta, gate, scale_log2,
    D2: tl.constexpr, DV2: tl.constexpr, HAS_GATE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk += dsᵀ @ q`, still without the scale, and `dv += pᵀ @ do` for one tile of query rows.

    Args:
        visible: `[N, M]`, read only if MASKED.
        lse_log2, delta, gate: `[M]`, see `add_dq`.
    """
    s = dot_pair(k_1, k_2, q_1, q_2, D2, PRECISION)  # [N, M]
    p = tl.exp2(s * scale_log2 - lse_log2[None, :])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    if HAS_GATE:
        p *= gate[None, :]
    dp = dot_pair(v_1, v_2, do_1, do_2, DV2, PRECISION)
    dv_1, dv_2 = add_product(dv_1, dv_2, p.to(do_1.dtype), do_1, do_2, DV2, PRECISION)
    ds = p * (dp - delta[None, :])
    dk_1, dk_2 = add_product(dk_1, dk_2, ds.to(q_1.dtype), q_1, q_2, D2, PRECISION)
    return dk_1, dk_2, dv_1, dv_2


def row_delta(layout, o, do, dlse, *, by_head: bool = False) -> torch.Tensor:
    """What the gradient of a softmax row subtracts: `delta = Σ o · do - dlse`, fp32 `[B, T, HQ]` (packed `[T, HQ]`).

    Args:
        layout: Describes o.
        o, do: `[B, T, HQ, DV]` (packed `[T, HQ, DV]`).
        dlse: `[B, T, HQ]` (packed `[T, HQ]`) or None.
        by_head: Whether the values of a head shall lie side by side, instead of those of a token.
    """
    delta = empty_values(o.shape[:-1], o.device, by_head=by_head)
    o, do, e = map(layout.rows, (o, do, delta[..., None]))
    dlse = layout.row_values(dlse)
    B, T, HQ, DV = o.shape
    tile, block = 32, next_power_of_2(DV)
    _row_delta_kernel[(cdiv(T * HQ, tile), B)](
        o, do, dlse, e, *o.stride()[:3], *do.stride()[:3], *e.stride()[:3],
        *(dlse.stride() if dlse is not None else (0, 0, 0)),
        T, HQ, DV, TILE=tile, BLOCK=block, HAS_DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip
    return delta


def empty_values(shape, device, *, by_head: bool) -> torch.Tensor:
    """Room for one fp32 value per query head, `[..., T, HQ]`; `by_head`: those of a head lie side by side."""
    if not by_head:
        return torch.empty(shape, dtype=torch.float32, device=device)
    *batch, T, HQ = shape
    return torch.empty(*batch, HQ, T, dtype=torch.float32, device=device).transpose(-1, -2)


def empty_outputs(q, v, *, by_head: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for o and lse."""
    return q.new_empty(*q.shape[:-1], v.shape[-1]), empty_values(q.shape[:-1], q.device, by_head=by_head)


@triton.jit(do_not_specialize=["T"])
def _row_delta_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr, stride_ob, stride_ot, stride_oh, stride_dob, stride_dot, stride_doh, stride_eb,
    stride_et, stride_eh, stride_lb, stride_lt, stride_lh, T, HQ, DV: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(T * HQ, TILE), B)"""
    i_b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    t, h = row // HQ, row % HQ
    mask = t < T
    b_o, _ = load_pair(o_ptr + i_b * stride_ob + t * stride_ot + h * stride_oh, mask, DV, BLOCK, 0, True)
    b_do, _ = load_pair(do_ptr + i_b * stride_dob + t * stride_dot + h * stride_doh, mask, DV, BLOCK, 0, True)
    delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + i_b * stride_lb + t * stride_lt + h * stride_lh, mask=mask, other=0.0)
    tl.store(delta_ptr + i_b * stride_eb + t * stride_et + h * stride_eh, delta, mask=mask)
