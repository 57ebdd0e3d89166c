# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Random valid configurations of the whole attention in Triton against the reference; a text of a million tokens."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from test_triton_attention import PAPER, SIZES, make_inputs
from triton_checks import DEVICE, check_choice, naive_attention, packed, poisoned

import nsa_kernels as nsa
from nsa_kernels import reference

NAMES = ("o", "dq", "dk", "dv", "dk_cmp", "dv_cmp", "dk_win", "dv_win", "dg_cmp", "dg_slc", "dg_win")


def draw(seed, small):
    """A configuration for `check`: sizes of blocks and tensors, layout, dtype."""
    rng = random.Random(seed)
    pick, stride = rng.choice, rng.choice((4, 8, 16))
    forced = {"num_initial_blocks": pick((0, 1, 1, 2)), "num_local_blocks": pick((1, 2, 2, 3))}
    sizes = {
        "compress_block_size": stride * pick((1, 2, 2, 3, 4)),
        "compress_stride": stride,
        "select_block_size": stride * pick((1, 2, 3, 4, 8)),
        "num_selected_blocks": sum(forced.values()) + pick((0, 1, 2, 5, 13)),
        **forced,
        "window_size": pick((1, 17, 64, 100, 512)),
    }
    T = pick((1, 5, 18) if small else (1, 2, 63, 65, 129, 257, 500, 777))
    case = {
        "sizes": sizes,
        "T": T,
        "batch": pick((1, 2) if small else (1, 2, 3)),
        "shared_kv": rng.random() < 0.3,
        "seed": seed,
    }
    if small:
        case |= {"heads": pick((1, 2)), "groups": pick((1, 2, 3)), "dim": pick((16, 24)), "v_dim": pick((16, 24))}
        case["dtype"] = pick((torch.float16, torch.float32))
    else:
        case |= {"heads": pick((1, 2, 3)), "groups": pick((1, 2, 3, 4, 5, 7, 8, 16, 33, 70))}
        case |= {"dim": pick((32, 40, 64, 80, 96, 112, 128, 192, 256)), "v_dim": pick((32, 64, 80, 128, 192, 256))}
        case["dtype"] = pick((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
        if case["groups"] > 16:  # plain PyTorch holds all scores at once
            case |= {"heads": 1, "batch": 1}
    layout = pick(("plain", "plain", "padded", "packed", "cached", "cached and padded", "short window"))
    if layout == "packed":
        lengths = (1, 2, 17, T) if small else (1, 2, 31, 200, T)
        case["batch"], case["lengths"] = 1, [pick(lengths) for _ in range(pick((2, 3, 5)))]
    if layout in ("cached", "cached and padded", "short window"):
        case["past"] = pick((1, 20) if small else (1, 100, 600))
    if "padded" in layout:
        case["leftpad"] = [rng.randrange(T + case.get("past", 0) + 1) for _ in range(case["batch"])]
    if layout == "short window":  # as a cache holds it: no more keys than the first query sees
        case["keep_window"] = min(T + case["past"], T + sizes["window_size"] - 1)
        case["shared_kv"] = False
    return case


def compression(sizes):
    return {name: sizes[name] for name in ("compress_block_size", "compress_stride")}


def one_by_one(inputs, chosen, sizes, where):
    """Batches as they are; packed sequences each as a batch of one."""
    if (cu_seqlens := where["cu_seqlens"]) is None:
        yield inputs, chosen, {name: where[name] for name in ("leftpad", "q_offset")}
        return
    cu_blocks = reference.compressed_cu_seqlens(cu_seqlens, **compression(sizes))
    for (a, b), (c, d) in zip(reference._bounds(cu_seqlens), reference._bounds(cu_blocks)):
        rows = [x[None, c:d] if i in (3, 4) else x[None, a:b] for i, x in enumerate(inputs)]
        yield rows, chosen[None, a:b], {"leftpad": None, "q_offset": 0}


def exact_attention(inputs, chosen, sizes, where):
    """The reference with the blocks given."""
    q, k, v, k_cmp, v_cmp, k_win, v_win, *gates = inputs
    o_cmp, _ = reference.compressed_attention(q, k_cmp, v_cmp, **compression(sizes), **where)
    o_slc, _ = reference.selected_attention(q, k, v, chosen, select_block_size=sizes["select_block_size"], **where)
    o_win, _ = reference.window_attention(q, k_win, v_win, window_size=sizes["window_size"], **where)
    return reference.gated_sum(o_cmp, o_slc, o_win, *gates)


def plain_attention(inputs, chosen, sizes, where):
    """The same in plain PyTorch in the dtype of the inputs: the error that the dtype costs."""
    q, k, v, k_cmp, v_cmp, k_win, v_win, g_cmp, g_slc, g_win = inputs
    T, at = q.shape[1], where.values()
    mask = reference._chosen_tokens(q, k.shape[1], 0, T, chosen, sizes["select_block_size"], *at)
    o = g_slc[..., None] * naive_attention(q, k, v, mask)
    first, last = reference._window_keys(q, k_win, 0, T, sizes["window_size"])
    mask = reference._window_tokens(q, k_win, first, last, 0, T, sizes["window_size"], *at)
    o = o + g_win[..., None] * naive_attention(q, k_win[:, first:last], v_win[:, first:last], mask)
    if not k_cmp.shape[1]:
        return o
    mask = reference._complete_blocks(q, k_cmp.shape[1], 0, T, *compression(sizes).values(), *at)
    return o + g_cmp[..., None] * naive_attention(q, k_cmp, v_cmp, mask)


def check_blocks(inputs, chosen, sizes, where):
    q, k, k_cmp = (inputs[i].detach().double() for i in (0, 1, 3))
    choice = ("select_block_size", "num_selected_blocks", "num_initial_blocks", "num_local_blocks")
    choice = {name: sizes[name] for name in choice}
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, **compression(sizes), **where)
    fold = {"num_blocks": -(-k.shape[1] // sizes["select_block_size"]), "select_block_size": sizes["select_block_size"]}
    imp = reference.importance(q, k_cmp, lse, **fold, **compression(sizes), **where)
    check_choice(chosen, reference.topn_blocks(imp, **choice, **where), imp)


def compare(got, inputs, chosen, sizes, where, do):
    """Blocks up to near-equals; outputs and gradients `got` within twice the error of plain PyTorch in the same dtype,
    plus rounding of the result and of the fp32 scores from which lse is subtracted. Gradients of q and k also get the
    rounding of do · v and of the row sum taken from it, which plain PyTorch computes from the same products: where a
    query sees one key they cancel."""
    for rows in one_by_one(inputs, chosen, sizes, where):
        check_blocks(*rows[:2], sizes, rows[2])
    results, dtype = [], inputs[0].dtype
    for function, to in ((exact_attention, torch.float64), (plain_attention, dtype)):
        copies = {x: x.detach().to(to, copy=True).requires_grad_() for x in inputs}
        leaves = [copies[x] for x in inputs]  # one leaf where keys and values are shared
        parts = [function(*rows[:2], sizes, rows[2]) for rows in one_by_one(leaves, chosen, sizes, where)]
        o = parts[0] if where["cu_seqlens"] is None else torch.cat(parts, dim=1)[0]
        gradients = torch.autograd.grad(o, leaves, do.to(to), allow_unused=True)
        results.append((o, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients))))
    fp32 = torch.finfo(torch.float32).eps
    values = max(inputs[i].detach().float().norm(dim=-1).max().item() for i in (2, 4, 6) if inputs[i].numel())
    keys = max(inputs[i].detach().abs().max().item() for i in (0, 1, 3, 5) if inputs[i].numel())
    cancelled = fp32 * do.float().norm(dim=-1).max().item() * values * keys * inputs[0].shape[-1] ** -0.5
    for name, x, want, plain in zip(NAMES, got, *results):
        assert x.shape == want.shape, name
        assert x.dtype == dtype, name
        if not want.numel():
            continue
        size = max(1.0, want.abs().max().item())
        limit = 2 * (plain.double() - want).abs().max().item() + (2 * torch.finfo(dtype).eps + 4 * fp32 * 30) * size
        if name in ("dq", "dk", "dk_cmp", "dk_win"):
            limit += cancelled
        off = (x.double() - want).abs().max().item()
        assert off <= limit, f"{name}: off by {off}, allowed {limit}"  # NaN fails too


def check(
    sizes, T, heads, groups, dim, v_dim, *, dtype, batch, shared_kv, seed, past=0, leftpad=None, lengths=None,
    keep_window=None,
):  # fmt: skip
    leftpad = None if leftpad is None else torch.tensor(leftpad, device=DEVICE)
    cu_seqlens = None if lengths is None else packed(lengths)
    inputs = make_inputs(
        sum(lengths) if lengths else T, heads, groups, dim, v_dim, sizes, dtype=dtype, past=past, leftpad=leftpad,
        cu_seqlens=cu_seqlens, batch=batch, seed=seed,
    )  # fmt: skip
    if shared_kv:
        inputs[5:7] = inputs[1:3]
    if keep_window is not None:
        inputs[5:7] = [x.detach()[:, -keep_window:].clone().requires_grad_() for x in inputs[5:7]]
    where = {"leftpad": leftpad, "q_offset": past, "cu_seqlens": cu_seqlens}
    do = torch.randn_like(inputs[0][..., :1].expand(*inputs[0].shape[:-1], v_dim))
    with poisoned():
        o, chosen, _ = nsa.nsa_attention(*inputs, **sizes, **where, backend="triton")
        gradients = torch.autograd.grad(o, inputs, do)
    compare((o, *gradients), inputs, chosen, sizes, where, do)


# packed, cached and padded, shared keys and values, a window as a cache holds it
@pytest.mark.parametrize("seed", (8, 9, 23, 29))
def test_random_configurations(seed):
    check(**draw(seed, small=True))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(200))
def test_random_configurations_on_a_gpu(seed):
    check(**draw(1000 + seed, small=False))


def check_last_queries(T, some, groups, dim, sizes, dtype):
    """The last queries of a long text, and all gradients of their outputs."""
    inputs = make_inputs(T, 1, groups, dim, dim, sizes, dtype=dtype, batch=1)
    o, chosen, _ = nsa.nsa_attention(*inputs, **sizes, backend="triton")
    assert o.isfinite().all()
    do = torch.zeros_like(o)
    do[:, -some:] = torch.randn_like(do[:, -some:])
    got = [o.detach(), *torch.autograd.grad(o, inputs, do)]
    for i in (0, 5, 6, 7, 8, 9):  # all but the keys and values that any query may choose
        seen = sizes["window_size"] + some if i in (5, 6) else some
        assert not got[i + 1][:, :-seen].any(), NAMES[i + 1]
        inputs[i], got[i + 1] = inputs[i].detach()[:, -seen:], got[i + 1][:, -seen:]
    got[0] = got[0][:, -some:]
    sizes = {"num_initial_blocks": 1, "num_local_blocks": 2, **sizes}
    where = {"leftpad": None, "q_offset": T - some, "cu_seqlens": None}
    compare(got, inputs, chosen[:, -some:], sizes, where, do[:, -some:])


def test_last_queries():
    check_last_queries(45, 8, 1, 16, SIZES, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("groups, dim", [(2, 32), (16, 128)])
def test_a_million_tokens(groups, dim, half_a_gpu):
    """T = 1,048,576; 16 heads of 128 pass 2**31 elements, so that offsets need 64 bits."""
    check_last_queries(2**20, 8, groups, dim, PAPER, torch.bfloat16)
