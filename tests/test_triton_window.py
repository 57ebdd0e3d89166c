# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of window attention against the reference."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from sm90 import MAX_SHARED
from sm90_launches import compile_launches
from triton_checks import DEVICE, check_attention, make_qkv, packed, poisoned

from nsa_kernels import reference, window
from nsa_kernels.triton_common import Layout


def check(q_len, heads, groups, dim, v_dim, size, *, batch=1, dtype=torch.float32, leftpad=None, q_offset=0,
          k_len=None, lengths=None, scale=None, logit=3.0, seed=0):  # fmt: skip
    if lengths is not None:
        q_len = sum(lengths)
    k_len = q_len + q_offset if k_len is None else k_len
    q, k, v = make_qkv(
        q_len, k_len, heads, groups, dim, v_dim, batch=batch, dtype=dtype, is_packed=lengths is not None, logit=logit,
        seed=seed,
    )  # fmt: skip
    cu_seqlens = None if lengths is None else packed(lengths)
    leftpad = None if leftpad is None else torch.tensor(leftpad, device=DEVICE)
    kwargs = {"window_size": size, "leftpad": leftpad, "q_offset": q_offset, "scale": scale, "cu_seqlens": cu_seqlens}

    def mask(q, k):
        return reference._window_tokens(q, k, 0, k.shape[1], 0, q.shape[1], size, leftpad, q_offset)

    if lengths is None:
        masks = mask(q, k)
    else:
        masks = [(a, b, mask(q[None, a:b], k[None, a:b])) for a, b in reference._bounds(cu_seqlens)]
    check_attention(
        lambda *x: window.window_attention(*x, **kwargs), lambda *x: reference.window_attention(*x, **kwargs),
        q, k, v, masks,
    )  # fmt: skip


@pytest.mark.parametrize(
    "q_len, heads, groups, dim, v_dim, size",
    [
        (1, 1, 1, 16, 16, 1),
        (63, 1, 16, 64, 64, 64),
        (65, 2, 4, 32, 16, 16),
        (65, 1, 3, 16, 32, 200),
        (257, 1, 1, 16, 16, 40),
        (200, 1, 2, 16, 16, 130),
    ],
)
def test_matches_reference(q_len, heads, groups, dim, v_dim, size):
    check(q_len, heads, groups, dim, v_dim, size)


@pytest.mark.parametrize("dim, v_dim", [(80, 80), (192, 128), (24, 40)])
def test_head_dims(dim, v_dim):
    check(40, 1, 2, dim, v_dim, 20)


def test_half_precision():
    check(130, 1, 4, 32, 32, 33, dtype=torch.float16)


def test_left_padding():
    check(90, 1, 2, 16, 16, 20, batch=3, leftpad=[0, 19, 90])


@pytest.mark.parametrize("k_len", [None, 60, 33])
def test_queries_behind_a_cache(k_len):
    check(33, 1, 2, 16, 16, 30, batch=2, leftpad=[290, 315], q_offset=300, k_len=k_len)


def test_packed_sequences():
    check(0, 1, 4, 16, 16, 33, lengths=(1, 39, 1, 64, 17))


def test_refuses_a_negative_scale():
    q, k, v = make_qkv(20, 20, 1, 2, 16, 16)
    with pytest.raises(NotImplementedError, match=r"`scale` must be > 0 for the Triton kernels, got -0\.3"):
        window.window_attention(q, k, v, window_size=7, scale=-0.3)


def test_extreme_logits():
    check(130, 1, 4, 16, 16, 33, logit=300.0)


def test_more_heads_than_a_tile_holds():
    check(5, 1, 70, 16, 16, 3)


def test_inputs_whose_last_dim_is_strided():
    q, k, v = make_qkv(30, 30, 2, 1, 16, 16)
    strided = [x.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_() for x in (q, k, v)]
    with poisoned():
        o, _ = window.window_attention(q, k, v, window_size=20)
        o_strided, _ = window.window_attention(*strided, window_size=20)
        do = torch.randn_like(o)
        for a, b in zip(torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(o_strided, strided, do)):
            assert torch.equal(a, b)


def test_strided_inputs():
    q, k, v = make_qkv(50, 50, 2, 2, 16, 16)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    o, _ = window.window_attention(q, k, v, window_size=20)
    o_strided, _ = window.window_attention(*strided, window_size=20)
    assert torch.equal(o, o_strided)
    do = torch.randn_like(o)
    for a, b in zip(torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(o_strided, strided, do)):
        assert torch.equal(a, b)


def test_gate_and_gradient_of_other_branches():
    q, k, v = make_qkv(40, 40, 1, 4, 16, 16)
    gate = torch.rand(1, 40, 4, device=DEVICE, requires_grad=True)
    o, _ = reference.window_attention(q, k, v, window_size=20)
    do = torch.randn_like(o)
    want = torch.autograd.grad(o * gate[..., None], (q, k, v), do)
    layout = Layout(q)
    q, k, v, gate = (x.detach() for x in (q, k, v, gate))
    o, lse, _ = window.window_forward(q, k, v, 20, 0.25, layout)
    delta = (o * do).sum(-1)
    got = window.window_backward(do, q, k, v, lse, delta, 20, 0.25, layout, gate=gate)
    other = torch.randn_like(q)
    total, *_ = window.window_backward(do, q, k, v, lse, delta, 20, 0.25, layout, gate=gate, dq=other.clone())
    for a, b in zip((*got, total), (*want, want[0] + other)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads, groups, dim, v_dim", [(4, 16, 128, 128), (2, 4, 192, 128)])
def test_compiles_for_hopper(heads, groups, dim, v_dim):
    launches = compile_launches(f"""
import torch
from nsa_kernels.triton_common import Layout
from nsa_kernels.window import window_backward, window_forward
q, k, v = (torch.empty(1, 4096, h, d, dtype=torch.bfloat16) for h, d in
           (({heads * groups}, {dim}), ({heads}, {dim}), ({heads}, {v_dim})))
o, lse, _ = window_forward(q, k, v, 512, 0.1, Layout(q))
window_backward(o, q, k, v, lse, lse, 512, 0.1, Layout(q), gate=lse)
""")
    assert {"_forward_kernel", "_dq_kernel", "_dkdv_kernel"} <= {launch["kernel"] for launch in launches}
    for launch in launches:
        assert launch["spills"] == 0, launch
        assert launch["shared"] <= MAX_SHARED, launch
        assert launch["wgmma"], launch


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "q_len, heads, groups, dim, v_dim, size",
    [
        (1500, 2, 16, 128, 128, 512),
        (1500, 2, 4, 128, 128, 512),
        (777, 3, 3, 64, 64, 100),
        (1025, 2, 1, 80, 80, 512),
        (600, 1, 5, 192, 128, 200),
        (500, 1, 7, 112, 96, 64),
        (300, 2, 2, 256, 256, 33),
    ],
)
def test_matches_reference_on_a_gpu(q_len, heads, groups, dim, v_dim, size, dtype):
    check(q_len, heads, groups, dim, v_dim, size, batch=2, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(60))
def test_random_configurations_on_a_gpu(seed):
    rng = random.Random(seed)
    lengths = None if rng.random() < 0.6 else [rng.choice((1, 2, 31, 64, 65, 200, 513)) for _ in range(5)]
    batch = 1 if lengths else rng.choice((1, 3))
    q_len = rng.choice((1, 63, 65, 257, 800))
    q_offset = 0 if lengths else rng.choice((0, 0, 1, 100))
    size = rng.choice((1, 2, 63, 64, 100, 512, 5000))
    padded = lengths is None and rng.random() < 0.4
    check(
        q_len, rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 4, 5, 8, 16, 33)), rng.choice((32, 64, 80, 128, 192)),
        rng.choice((32, 64, 80, 128)), size, batch=batch,
        dtype=rng.choice((torch.bfloat16, torch.float16, torch.float32)), lengths=lengths,
        leftpad=[rng.randrange(q_len + q_offset + 1) for _ in range(batch)] if padded else None, q_offset=q_offset,
        k_len=min(q_len + q_offset, q_len + size) if q_offset and rng.random() < 0.5 else None, seed=seed,
    )  # fmt: skip
