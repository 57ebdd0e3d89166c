# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of selected attention against the reference."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from sm90 import MAX_SHARED
from sm90_launches import compile_launches
from triton_checks import DEVICE, check_attention, make_qkv, packed, poisoned

from nsa_kernels import reference, selected
from nsa_kernels.triton_common import Layout


def choose(shape, blocks, seed=0):
    """Random block indices with -1, repetitions and blocks of the future among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, blocks + 1, shape, generator=generator, dtype=torch.int32).to(DEVICE)


def check(q_len, heads, groups, dim, v_dim, n, block, *, batch=1, dtype=torch.float32, leftpad=None, q_offset=0,
          lengths=None, scale=None, logit=3.0, indices=None, seed=0):  # fmt: skip
    if lengths is not None:
        q_len = sum(lengths)
    q, k, v = make_qkv(
        q_len, q_len + q_offset, heads, groups, dim, v_dim, batch=batch, dtype=dtype, is_packed=lengths is not None,
        logit=logit, seed=seed,
    )  # fmt: skip
    blocks = -(-(max(lengths) if lengths else q_len + q_offset) // block)
    if indices is None:
        indices = choose((*q.shape[:-2], heads, n), blocks, seed)
    cu_seqlens = None if lengths is None else packed(lengths)
    leftpad = None if leftpad is None else torch.tensor(leftpad, device=DEVICE)
    kwargs = {"select_block_size": block, "leftpad": leftpad, "q_offset": q_offset, "scale": scale}
    kwargs["cu_seqlens"] = cu_seqlens

    def mask(q, k, indices):
        return reference._chosen_tokens(q, k.shape[1], 0, q.shape[1], indices, block, leftpad, q_offset)

    if lengths is None:
        masks = mask(q, k, indices)
    else:
        bounds = reference._bounds(cu_seqlens)
        masks = [(a, b, mask(q[None, a:b], k[None, a:b], indices[None, a:b])) for a, b in bounds]
    check_attention(
        lambda *x: selected.selected_attention(*x, indices, **kwargs),
        lambda *x: reference.selected_attention(*x, indices, **kwargs),
        q, k, v, masks,
    )  # fmt: skip


@pytest.mark.parametrize(
    "q_len, heads, groups, dim, v_dim, n, block",
    [
        (1, 1, 1, 16, 16, 1, 16),
        (63, 1, 16, 64, 64, 3, 32),
        (65, 2, 4, 32, 16, 3, 32),
        (65, 1, 3, 16, 32, 5, 32),
        (257, 1, 1, 16, 16, 4, 64),
    ],
)
def test_matches_reference(q_len, heads, groups, dim, v_dim, n, block):
    check(q_len, heads, groups, dim, v_dim, n, block)


@pytest.mark.parametrize("dim, v_dim", [(80, 80), (192, 128), (24, 40)])
def test_head_dims(dim, v_dim):
    check(40, 1, 2, dim, v_dim, 2, 16)


@pytest.mark.parametrize("block", [8, 48, 80])
def test_block_sizes(block):
    check(100, 1, 2, 16, 16, 2, block)


def test_half_precision():
    check(65, 1, 4, 32, 32, 3, 16, dtype=torch.float16)


def test_left_padding():
    check(40, 1, 2, 16, 16, 3, 16, batch=3, leftpad=[0, 19, 40])


def test_queries_behind_a_cache():
    check(33, 1, 2, 16, 16, 3, 16, batch=2, leftpad=[40, 3], q_offset=30)


def test_packed_sequences():
    check(0, 1, 4, 16, 16, 3, 16, lengths=(1, 39, 1, 17))


def test_refuses_a_negative_scale():
    q, k, v = make_qkv(20, 20, 1, 2, 16, 16)
    with pytest.raises(NotImplementedError, match=r"`scale` must be > 0 for the Triton kernels, got -0\.3"):
        selected.selected_attention(q, k, v, choose((1, 20, 1, 2), 2), select_block_size=16, scale=-0.3)


def test_extreme_logits():
    check(40, 1, 2, 16, 16, 2, 16, logit=300.0)


def test_rows_without_a_block():
    indices = choose((1, 40, 1, 2), 3)
    indices[:, 5:9] = -1
    indices[:, 20:] = -1
    check(40, 1, 2, 16, 16, 2, 16, indices=indices)
    check(40, 1, 2, 16, 16, 2, 16, indices=torch.full_like(indices, -1))


def test_more_heads_than_a_tile_holds():
    check(5, 1, 70, 16, 16, 2, 16)


SCATTERED = [{}, {"batch": 3, "leftpad": [0, 19, 150]}, {"q_offset": 30}, {"lengths": (1, 139, 1, 117)}]


@pytest.mark.parametrize("where", SCATTERED, ids=["plain", "padded", "cached", "packed"])
@pytest.mark.parametrize("groups", [16, 21])
def test_queries_taken_alone(groups, where, monkeypatch):
    """Tiles of both kinds: neighbours that share their blocks, and neighbours that do not."""
    built, found = selected._union_lists, []
    monkeypatch.setattr(selected, "_union_lists", lambda *x: found.append(built(*x)) or found[-1])
    q_len, block, n = sum(where.get("lengths", [150])), 8, 3
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(where.get("batch", 1), q_len, 1, 23, generator=generator).argsort(-1)[..., :n].int()
    indices[:, : q_len // 3] = 0
    indices = (indices[0] if "lengths" in where else indices).to(DEVICE)
    check(q_len, 1, groups, 16, 24, n, block, indices=indices, **where)
    assert len(found) == 2  # forward and backward
    for unions in found:
        assert unions.alone is not None
        assert {True, False} == set((unions.counts > unions.limit).flatten().tolist())


@pytest.mark.parametrize("groups", [1, 4])
def test_every_query_alone(groups, monkeypatch):
    """What benchmark_selected.py holds the tiles to."""
    monkeypatch.setattr(selected, "_ALONE", 1)
    monkeypatch.setattr(selected, "_LONG", 0.0)
    check(70, 1, groups, 16, 24, 3, 16)


def test_queries_are_not_taken_alone_where_unions_are_short():
    q, *_ = make_qkv(64, 64, 1, 16, 16, 16)
    indices = choose((1, 64, 1, 3), 4)
    unions = selected._union_lists(indices, 64, Layout(q), 16, *selected._tiles(16, 3))
    assert unions.alone is None
    assert unions.counts.max() <= unions.limit


def test_inputs_whose_last_dim_is_strided():
    q, k, v = make_qkv(30, 30, 2, 1, 16, 16)
    indices = choose((1, 30, 2, 2), 2)
    strided = [x.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_() for x in (q, k, v)]
    with poisoned():
        o, _ = selected.selected_attention(q, k, v, indices, select_block_size=16)
        o_strided, _ = selected.selected_attention(*strided, indices, select_block_size=16)
        do = torch.randn_like(o)
        for a, b in zip(torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(o_strided, strided, do)):
            assert torch.equal(a, b)


def test_strided_inputs():
    q, k, v = make_qkv(30, 30, 2, 1, 16, 16)
    indices = choose((1, 30, 2, 2), 2)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    o, lse = selected.selected_attention(q, k, v, indices, select_block_size=16)
    o_strided, lse_strided = selected.selected_attention(
        *strided, indices.transpose(1, 2).contiguous().transpose(1, 2), select_block_size=16
    )
    assert torch.equal(o, o_strided)
    assert torch.equal(lse, lse_strided)
    do = torch.randn_like(o)
    for a, b in zip(torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(o_strided, strided, do)):
        assert torch.equal(a, b)


def test_long_lists_are_split(monkeypatch):
    monkeypatch.setattr(selected, "_SPLIT", 8)
    check(60, 1, 2, 16, 24, 3, 16)
    check(0, 1, 2, 16, 16, 2, 16, lengths=(35, 1, 15))


def test_heads_one_by_one(monkeypatch):
    monkeypatch.setattr(selected, "_MAX_CELLS", 1)
    check(30, 3, 1, 16, 16, 2, 16)


def test_same_bits_twice(monkeypatch):
    monkeypatch.setattr(selected, "_SPLIT", 8)
    q, k, v = make_qkv(40, 40, 1, 2, 16, 16)
    indices = choose((1, 40, 1, 2), 3)
    runs = []
    for _ in range(2):
        o, _lse = selected.selected_attention(q, k, v, indices, select_block_size=16)
        runs.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_gate_and_gradient_of_other_branches():
    q, k, v = make_qkv(40, 40, 1, 4, 16, 16)
    indices = choose((1, 40, 1, 3), 3)
    gate = torch.rand(1, 40, 4, device=DEVICE, requires_grad=True)
    o, _ = reference.selected_attention(q, k, v, indices, select_block_size=16)
    do = torch.randn_like(o)
    want = torch.autograd.grad(o * gate[..., None], (q, k, v), do)
    layout = Layout(q)
    q, k, v, gate = (x.detach() for x in (q, k, v, gate))
    o, lse = selected.selected_forward(q, k, v, indices, 16, 0.25, layout)
    stats = selected.pack_stats(lse, (o * do).sum(-1), gate)
    arguments = (do, q, k, v, indices, stats, 16, 0.25, layout)
    got = selected.selected_backward(*arguments)
    other = torch.randn_like(q)
    total, *_ = selected.selected_backward(*arguments, dq=other.clone())
    for a, b in zip((*got, total), (*want, want[0] + other)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_query_lists():
    T, H, n, block = 100, 2, 3, 16
    indices = choose((1, T, H, n), 7)
    queries, bounds = selected._query_lists(indices, T, Layout(torch.zeros(1, T, H, 16, device=DEVICE)), block)
    for head in range(H):
        for j in range(bounds.shape[1] - 1):
            want = [t for t in range(T) if j in indices[0, t, head].tolist() and j * block <= t]
            assert queries[bounds[head, j] : bounds[head, j + 1]].tolist() == want


def test_refusals():
    q, k, v = make_qkv(4, 4, 1, 1, 16, 16)
    indices = choose((1, 4, 1, 1), 1)
    with pytest.raises(NotImplementedError, match="return_weights"):
        selected.selected_attention(q, k, v, indices, select_block_size=16, return_weights=True)
    with pytest.raises(NotImplementedError, match="q_offset"):
        selected.selected_attention(q, k, v, indices, select_block_size=16, q_offset=torch.tensor(0))


@pytest.mark.parametrize("heads, groups, dim, v_dim", [(4, 16, 128, 128), (2, 4, 192, 128)])
def test_compiles_for_hopper(heads, groups, dim, v_dim):
    launches = compile_launches(f"""
import torch
from nsa_kernels.selected import pack_stats, selected_backward, selected_forward
from nsa_kernels.triton_common import Layout
q, k, v = (torch.empty(1, 4096, h, d, dtype=torch.bfloat16) for h, d in
           (({heads * groups}, {dim}), ({heads}, {dim}), ({heads}, {v_dim})))
indices = torch.empty(1, 4096, {heads}, 16, dtype=torch.int32)
o, lse = selected_forward(q, k, v, indices, 64, 0.1, Layout(q))
selected_backward(o, q, k, v, indices, pack_stats(lse, lse), 64, 0.1, Layout(q))
""")
    attention = ("_forward_kernel", "_dq_kernel", "_dkdv_kernel")
    assert set(attention) <= {launch["kernel"] for launch in launches}
    # a query taken alone has too few rows for wgmma
    alone = [launch for launch in launches if launch["kernel"] in attention and launch["warps"] < 4]
    assert [launch["kernel"] for launch in alone] == (["_forward_kernel", "_dq_kernel"] if groups == 16 else [])
    for launch in launches:
        assert launch["spills"] == 0, launch
        assert not launch["serialized"], launch
        assert launch["shared"] <= MAX_SHARED, launch
        assert launch["wgmma"] == (launch["kernel"] in attention and launch not in alone), launch


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "q_len, heads, groups, dim, v_dim, n, block",
    [
        (1000, 2, 16, 128, 128, 16, 64),
        (1000, 2, 16, 128, 128, 4, 16),
        (900, 1, 20, 192, 128, 4, 16),
        (900, 1, 17, 256, 96, 5, 32),
        (1000, 2, 4, 128, 128, 16, 64),
        (777, 3, 3, 64, 64, 16, 64),
        (1025, 2, 1, 80, 80, 8, 64),
        (600, 1, 5, 192, 128, 7, 32),
        (500, 1, 7, 112, 96, 5, 128),
        (300, 2, 2, 256, 256, 3, 64),
        (300, 1, 2, 96, 32, 3, 16),
    ],
)
def test_matches_reference_on_a_gpu(q_len, heads, groups, dim, v_dim, n, block, dtype):
    check(q_len, heads, groups, dim, v_dim, n, block, batch=2, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(60))
def test_random_configurations_on_a_gpu(seed):
    rng = random.Random(seed)
    lengths = None if rng.random() < 0.6 else [rng.choice((1, 2, 31, 64, 65, 200, 513)) for _ in range(5)]
    batch = 1 if lengths else rng.choice((1, 3))
    q_len = rng.choice((1, 63, 65, 257, 800))
    padded = lengths is None and rng.random() < 0.4
    check(
        q_len, rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 4, 5, 8, 16, 33)), rng.choice((32, 64, 80, 128, 192)),
        rng.choice((32, 64, 80, 128)), rng.choice((1, 3, 16, 20)), rng.choice((16, 32, 48, 64, 128)), batch=batch,
        dtype=rng.choice((torch.bfloat16, torch.float16, torch.float32)), lengths=lengths,
        leftpad=[rng.randrange(q_len + 1) for _ in range(batch)] if padded else None,
        q_offset=0 if lengths else rng.choice((0, 0, 1, 100)), seed=seed,
    )  # fmt: skip
