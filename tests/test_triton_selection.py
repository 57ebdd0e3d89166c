# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Block selection in Triton against the reference; equals must fall to the smaller index."""

import pytest
import torch
from sm90 import MAX_SHARED
from sm90_launches import compile_launches
from triton_checks import check_choice

from nsa_kernels import compressed_cu_seqlens, num_compressed_blocks, reference

selection = pytest.importorskip("nsa_kernels.selection", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# l, d, l', n, initial blocks, local blocks
PAPER = (32, 16, 64, 4, 1, 2)
FINE = (8, 4, 8, 5, 1, 2)
NAMES = (
    "compress_block_size",
    "compress_stride",
    "select_block_size",
    "num_selected_blocks",
    "num_initial_blocks",
    "num_local_blocks",
)


@pytest.fixture(autouse=True)
def _poison():
    """Fill uninitialised memory, so that an element that no program writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def compression(sizes):
    return {name: sizes[name] for name in ("compress_block_size", "compress_stride")}


def make(B, T, HQ, H, D, sizes, dtype=torch.float32, q_offset=0, factor=1.0):
    torch.manual_seed(0)
    C = num_compressed_blocks(T + q_offset, sizes[0], sizes[1])
    q, k = torch.randn(B, T, HQ, D, device=DEVICE), torch.randn(B, C, H, D, device=DEVICE)
    sizes = dict(zip(NAMES, sizes, strict=True))
    sizes["num_blocks"] = -(-(T + q_offset) // sizes["select_block_size"])
    return (q * factor).to(dtype), k.to(dtype), sizes


def check(q, k, sizes, exact=False, **where):
    """The chosen blocks are the reference's, but for importances that rounding cannot tell apart."""
    _, lse = reference.compressed_attention(q, k, k, **compression(sizes), **where)
    actual = selection.select_blocks(q, k, lse, **sizes, **where)
    expected = reference.select_blocks(q, k, lse, **sizes, **where)
    if exact:
        assert torch.equal(actual, expected)
        return actual
    keys = {name: sizes[name] for name in ("num_blocks", *NAMES[:3])}
    check_choice(actual, expected, reference.importance(q.double(), k.double(), lse.double(), **keys, **where))
    return actual


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 1, 2, 1, 32), PAPER),
        ((1, 63, 2, 1, 32), PAPER),
        ((2, 330, 3, 1, 64), PAPER),
        ((1, 65, 2, 2, 80), FINE),
        ((1, 130, 16, 1, 32), FINE),
        ((1, 100, 2, 1, 192), FINE),
        ((1, 130, 2, 2, 40), FINE),  # tiles wider than a head
        ((1, 150, 2, 2, 32), (16, 4, 4, 7, 1, 1)),
        ((1, 150, 2, 1, 32), (24, 4, 12, 3, 0, 1)),
        ((1, 150, 2, 1, 32), (8, 8, 8, 6, 2, 3)),
        ((1, 150, 2, 1, 32), (8, 8, 8, 5, 2, 3)),
    ],
    ids=str,
)
def test_matches_reference(shape, sizes):
    check(*make(*shape, sizes))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 3000, 16, 1, 128), (32, 16, 64, 16, 1, 2)),
        ((2, 2050, 8, 2, 64), (32, 16, 64, 11, 1, 2)),
        ((1, 2049, 3, 1, 96), (64, 64, 64, 16, 1, 2)),
        ((1, 3000, 7, 7, 80), (32, 16, 32, 16, 1, 2)),
        ((1, 2000, 6, 3, 112), (32, 16, 64, 16, 1, 2)),
        ((1, 1500, 4, 1, 192), (64, 16, 16, 24, 2, 4)),
        ((1, 1100, 4, 2, 256), (32, 16, 64, 7, 1, 2)),
        ((1, 9000, 4, 2, 64), (8, 4, 4, 16, 1, 2)),
    ],
    ids=str,
)
def test_matches_reference_on_gpu(shape, sizes, dtype):
    check(*make(*shape, sizes, dtype=dtype))


def test_half_precision():
    check(*make(1, 130, 4, 1, 32, FINE, dtype=torch.float16))


def test_equal_importances_fall_to_the_smaller_index():
    q, k, sizes = make(1, 140, 2, 1, 32, FINE)
    actual = check(torch.zeros_like(q), torch.zeros_like(k), sizes, exact=True)
    assert actual[0, -1, 0].tolist() == [0, 1, 2, 16, 17]


@pytest.mark.parametrize("n", [4, 16, 35, 36])
def test_more_candidates_than_a_search_starts_from(n):
    q, k, sizes = make(1, 33, 2, 1, 32, (4, 4, 4, n, 1, 2), q_offset=800)
    check(q, k, sizes, q_offset=800)
    check(torch.zeros_like(q), torch.zeros_like(k), sizes, exact=True, q_offset=800)


def test_rows_longer_than_a_tile_and_small_chunks(monkeypatch):
    monkeypatch.setattr(selection, "_MAX_WIDTH", 16)
    monkeypatch.setattr(selection, "_MAX_SCORES", 2**11)
    q, k, sizes = make(2, 140, 4, 2, 32, (4, 4, 4, 9, 1, 2))
    check(q, k, sizes)
    check(torch.zeros_like(q), torch.zeros_like(k), sizes, exact=True)


def test_left_padding_and_cached_keys():
    q, k, sizes = make(3, 90, 2, 1, 32, FINE, q_offset=40)
    check(q, k, sizes, leftpad=torch.tensor([0, 33, 129], device=DEVICE), q_offset=40)


def test_extreme_logits():
    check(*make(1, 130, 2, 1, 32, FINE, factor=80.0))


def test_packed_sequences_equal_single_ones():
    lengths = [1, 63, 0, 90, 7]
    cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    blocks = compressed_cu_seqlens(cu, *FINE[:2])
    q, k, sizes = make(1, cu[-1], 4, 2, 32, FINE)
    q, k = q[0], k[0, : blocks[-1]]
    del sizes["num_blocks"]
    _, lse = reference.compressed_attention(q, k, k, **compression(sizes), cu_seqlens=cu)
    actual = selection.select_blocks(q, k, lse, **sizes, cu_seqlens=cu)
    for i, length in enumerate(lengths):
        rows, keys = slice(cu[i], cu[i + 1]), slice(blocks[i], blocks[i + 1])
        expected = selection.select_blocks(
            q[None, rows], k[None, keys], lse[None, rows], num_blocks=-(-length // 8), **sizes
        )
        assert torch.equal(actual[None, rows], expected)


@pytest.mark.gpu
def test_workspace_is_bounded():
    q, k, sizes = make(1, 65536, 8, 4, 64, (32, 16, 64, 16, 1, 2), dtype=torch.bfloat16)
    lse = torch.zeros(q.shape[:-1], device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = selection.select_blocks(q, k, lse, **sizes)
    assert torch.cuda.max_memory_allocated() - before - out.nbytes <= 256 * 2**20


def test_refuses_by_name():
    q, k, sizes = make(1, 70, 2, 1, 32, FINE)
    lse = torch.zeros(q.shape[:-1], device=DEVICE)
    with pytest.raises(NotImplementedError, match="`q_offset`"):
        selection.select_blocks(q, k, lse, **sizes, q_offset=torch.tensor(0))
    with pytest.raises(NotImplementedError, match="`scale`"):
        selection.select_blocks(q, k, lse, **sizes, scale=0.0)
    with pytest.raises(ValueError, match="`num_blocks` must cover"):
        selection.select_blocks(q, k, lse, **{**sizes, "num_blocks": 8})
    with pytest.raises(ValueError, match="`num_blocks` is required"):
        selection.select_blocks(q, k, lse, **{**sizes, "num_blocks": None})
    with pytest.raises(NotImplementedError, match="compress_block_size=2048"):
        selection.select_blocks(
            q, k, lse, **{**sizes, "compress_block_size": 2048, "select_block_size": 4, "num_blocks": 18}
        )


@pytest.mark.slow
def test_compiles_for_sm90_without_spills():
    launches = compile_launches("""
import torch
from nsa_kernels.selection import select_blocks
sizes = {"compress_block_size": 32, "compress_stride": 16, "select_block_size": 64, "num_selected_blocks": 16}
for dim, tokens in ((64, 4096), (80, 4096), (128, 4096), (192, 4096), (256, 4096), (64, 131072)):
    q = torch.empty(1, tokens, 4, dim, dtype=torch.bfloat16)
    k_cmp = torch.empty(1, tokens // 16 - 1, 1, dim, dtype=torch.bfloat16)
    select_blocks(q, k_cmp, torch.empty(1, tokens, 4), num_blocks=tokens // 64, **sizes)
""")
    assert {launch["kernel"] for launch in launches} == {"_score_kernel", "_topn_kernel"}
    for launch in launches:
        assert launch["spills"] == 0, launch
        assert launch["wgmma"] == (launch["kernel"] == "_score_kernel"), launch
        assert launch["shared"] <= MAX_SHARED, launch
