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

    D = shape[-1]
    return draw(*shape), [draw(block_size, D), draw(hidden, block_size * D), draw(hidden), draw(D, hidden), draw(D)]


def check(shape, block_size, stride, **where):
    x, phi = make(shape, block_size)
    sizes = {"compress_block_size": block_size, "compress_stride": stride}
    for name, inputs in (("compress_mean", [x]), ("compress_mlp", [x, *phi])):
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
    x, phi = make((1, 5000, 4, 64), 32, hidden=128, dtype=torch.float32)
    phi = [parameter.detach() / parameter.shape[-1] ** 0.5 for parameter in phi]
    inputs = [x.detach(), *phi]
    sizes = {"compress_block_size": 32, "compress_stride": 16}
    for name, arguments in (("compress_mean", inputs[:1]), ("compress_mlp", inputs)):
        low = [y.to(dtype) for y in arguments]
        exact = getattr(reference, name)(*(y.double() for y in low), **sizes)
        errors = [
            (getattr(module, name)(*low, **sizes).double() - exact).abs().max().item()
            for module in (compression, reference)
        ]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps, (name, errors)
