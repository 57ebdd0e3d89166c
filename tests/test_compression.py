# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""φ chunk by chunk against the reference: values and gradients."""

import itertools

import pytest
import torch

from nsa_kernels import compression, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def no_short_cut(monkeypatch):
    monkeypatch.setattr(compression, "_FEW", 1)


def make(shape, block_size, hidden=6, dtype=torch.float64):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=dtype, device=DEVICE, generator=generator).requires_grad_()

    D, x = shape[-1], draw(*shape)
    mlp = [x, draw(block_size, D), draw(hidden, block_size * D), draw(hidden), draw(D, hidden), draw(D)]
    pool = [x, draw(*shape), draw(block_size), draw(hidden, D), draw(hidden), draw(hidden)]
    return {"compress_mean": [x], "compress_mlp": mlp, "compress_pool": pool}


def check(shape, block_size, stride, **where):
    sizes = {"compress_block_size": block_size, "compress_stride": stride}
    for name, inputs in make(shape, block_size).items():
        want = getattr(reference, name)(*inputs, **sizes, **where)
        got = getattr(compression, name)(*inputs, **sizes, **where)
        torch.testing.assert_close(got, want)
        if not want.numel():
            continue
        grad = torch.randn_like(want)
        for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "length, block_size, stride", [(64, 8, 4), (63, 8, 4), (65, 8, 8), (50, 12, 4), (7, 8, 4), (8, 8, 4), (40, 16, 4)]
)
def test_equals_the_reference(length, block_size, stride):
    check((2, length, 3, 5), block_size, stride)


def test_blocks_from_a_slot_on():
    check((2, 61, 3, 5), 8, 4, first_slot=9)
    check((2, 61, 3, 5), 8, 4, first_slot=9, num_blocks=5)
    check((2, 61, 3, 5), 8, 4, first_slot=torch.tensor([0, 7], device=DEVICE), num_blocks=5)


@pytest.mark.parametrize("lengths", [(30, 1, 0, 8, 21), (7, 3), (9, 64)])
def test_packed_sequences(lengths):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    check((sum(lengths), 3, 5), 8, 4, cu_seqlens=cu_seqlens)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_worse_than_the_reference_on_a_gpu(dtype):
    """Against float64, each in its own dtype: within twice the error of the reference."""
    sizes = {"compress_block_size": 32, "compress_stride": 16}
    for name, arguments in make((1, 5000, 4, 64), 32, hidden=128, dtype=torch.float32).items():
        arguments = [y.detach() / (1.0 if y.dim() == 4 else y.shape[-1] ** 0.5) for y in arguments]
        low = [y.to(dtype) for y in arguments]
        exact = getattr(reference, name)(*(y.double() for y in low), **sizes)
        errors = [
            (getattr(module, name)(*low, **sizes).double() - exact).abs().max().item()
            for module in (compression, reference)
        ]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps, (name, errors)


def test_tables_of_packed_sequences_follow_changes_in_place():
    cu_seqlens = torch.tensor([0, 40, 64], dtype=torch.int32, device=DEVICE)
    check((64, 3, 5), 8, 4, cu_seqlens=cu_seqlens)
    check((64, 3, 5), 8, 4, cu_seqlens=cu_seqlens)
    assert len(compression._PACKED[cu_seqlens]) == 1
    cu_seqlens[1] = 20
    check((64, 3, 5), 8, 4, cu_seqlens=cu_seqlens)
    with torch.inference_mode():
        inputs = make((64, 3, 5), 8)["compress_mean"]
        where = {"compress_block_size": 8, "compress_stride": 4, "cu_seqlens": cu_seqlens.clone()}
        torch.testing.assert_close(
            compression.compress_mean(*inputs, **where), reference.compress_mean(*inputs, **where)
        )
    held = len(compression._PACKED)
    del cu_seqlens
    assert len(compression._PACKED) == held - 1
