# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Hold a Triton attention kernel to the reference: forward and all gradients, on outputs poisoned with NaN."""

import contextlib
import itertools

import torch

__all__ = ["DEVICE", "check_attention", "check_choice", "make_qkv", "naive_attention", "packed", "poisoned"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed(lengths):
    """`cu_seqlens` of sequences of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def make_qkv(
    q_len, k_len, heads, groups, dim, v_dim, *, batch=1, dtype=torch.float32, is_packed=False, logit=3.0, seed=0
):
    """Random q, k, v whose logits have a standard deviation of `logit`."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(length, heads, dim):
        shape = (length, heads, dim) if is_packed else (batch, length, heads, dim)
        return torch.randn(shape, device=DEVICE, generator=generator)

    q = draw(q_len, heads * groups, dim) * logit**0.5
    k, v = draw(k_len, heads, dim) * logit**0.5, draw(k_len, heads, v_dim)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


@contextlib.contextmanager
def poisoned():
    """Fill what is allocated and not written with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def naive_attention(q, k, v, mask, scale=None):
    """Attention in the inputs' dtype: `[B, T, HQ, D]`, mask `[B, H or 1, 1, T, TK]`; the error that the dtype costs."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)
    k, v = k.permute(0, 2, 1, 3)[:, :, None], v.permute(0, 2, 1, 3)[:, :, None]
    scores = ((q * scale) @ k.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
    p = torch.softmax(scores.float(), dim=-1).nan_to_num().to(v.dtype)
    return (p @ v).movedim(3, 1).flatten(2, 3)


def check_choice(actual, expected, imp):
    """Compare chosen blocks `[B, T, H, n]`, up to importances `[B, T, H, S]` that rounding cannot tell apart."""
    assert actual.shape == expected.shape
    assert actual.dtype == torch.int32
    assert torch.equal(actual == -1, expected == -1)
    steps = actual[..., 1:] - actual[..., :-1]
    assert ((steps > 0) | (actual[..., 1:] == -1)).all(), "not ascending"
    chosen, wanted = (torch.zeros_like(imp, dtype=torch.bool) for _ in range(2))
    for mask, indices in ((chosen, actual), (wanted, expected)):
        mask.scatter_(-1, indices.clamp(min=0).long(), True)
    imp = imp.masked_fill(imp == 0, 1e-30)
    gained = torch.where(chosen & ~wanted, imp, float("inf")).amin(-1)
    lost = torch.where(wanted & ~chosen, imp, 0.0).amax(-1)
    assert (lost <= gained * 1.0001).all(), "an important block is missing"


def _gradients(outputs, inputs, do, dlse):
    o, lse = outputs
    lse = torch.where(torch.isfinite(lse), lse, 0.0)  # empty rows are constant
    return torch.autograd.grad((o * do).sum() + (lse * dlse).sum(), inputs)


def check_attention(kernel, reference, q, k, v, masks):
    """Compare `kernel(q, k, v)` with `reference(q, k, v)`, both returning (o, lse).

    Args:
        masks: Mask as `naive_attention` takes it; packed: for every sequence (start, stop, mask).

    A kernel may be off by twice the error of plain PyTorch in the same dtype, plus rounding: of the result, and of the
    fp32 scores that the backward pass subtracts lse from.
    """
    exact_dtype = torch.float32 if DEVICE == "cuda" else torch.float64
    exact = [x.detach().to(exact_dtype).requires_grad_() for x in (q, k, v)]
    o, lse = reference(*exact)
    do, dlse = torch.randn_like(o).to(q.dtype), torch.randn_like(lse)
    dlse = torch.where(torch.isfinite(lse), dlse, 0.0)
    expected = (o, *_gradients((o, lse), exact, do, dlse))

    plain = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    if isinstance(masks, list):
        parts = [naive_attention(*(x[None, a:b] for x in plain), mask)[0] for a, b, mask in masks]
        o_plain = torch.cat(parts)
    else:
        o_plain = naive_attention(*plain, masks)
    # the gradient of lse is left out here: it only widens the tolerance
    plain_errors = (o_plain, *torch.autograd.grad(o_plain, plain, do))
    zero = torch.zeros_like(dlse)
    plain_expected = (o, *_gradients(reference(*exact), exact, do, zero))
    plain_errors = [(a.double() - b.double()).abs().max().item() for a, b in zip(plain_errors, plain_expected)]

    with poisoned():
        o_kernel, lse_kernel = kernel(q, k, v)
        gradients = torch.autograd.grad((o_kernel, lse_kernel), (q, k, v), (do, dlse))
    assert o_kernel.dtype == q.dtype
    assert lse_kernel.dtype == torch.float32
    empty = torch.isinf(lse)
    assert torch.equal(torch.isinf(lse_kernel), empty), "empty rows differ"
    assert (o_kernel[empty] == 0).all()
    peak = 10 + (lse[~empty].abs().max().item() if (~empty).any() else 0.0)
    fp32 = torch.finfo(torch.float32).eps
    off = (lse_kernel[~empty].double() - lse[~empty].double()).abs().max().item() if (~empty).any() else 0.0
    assert off <= 8 * fp32 * peak, f"lse: off by {off}, allowed {8 * fp32 * peak}"
    for name, got, want, error in zip(("o", "dq", "dk", "dv"), (o_kernel, *gradients), expected, plain_errors):
        size = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        off = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
        limit = 2 * error + (2 * torch.finfo(q.dtype).eps + 4 * fp32 * peak) * size
        assert off <= limit, f"{name}: off by {off}, allowed {limit}, plain PyTorch {error}"  # NaN fails too
