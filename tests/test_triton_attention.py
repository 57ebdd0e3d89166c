# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The whole of native sparse attention in Triton against the reference: outputs, blocks, all gradients, the model."""

import os

import pytest
import torch
from transformers import DynamicCache

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import sm90
from sm90_launches import compile_launches
from tiny_nsa import make_ids, make_model
from triton_checks import DEVICE, packed, poisoned

import nsa_kernels as nsa
from nsa_kernels import reference

SIZES = {
    "compress_block_size": 8,
    "compress_stride": 4,
    "select_block_size": 16,
    "num_selected_blocks": 4,
    "window_size": 20,
}
PAPER = {
    "compress_block_size": 32,
    "compress_stride": 16,
    "select_block_size": 64,
    "num_selected_blocks": 16,
    "window_size": 512,
}


def make_inputs(T, heads, groups, dim, v_dim, sizes, *, dtype, past=0, leftpad=None, cu_seqlens=None, batch=2, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(length, *shape):
        shape = (length, *shape) if cu_seqlens is not None else (batch, length, *shape)
        return torch.randn(shape, device=DEVICE, generator=generator)

    length = T + past
    compression = {name: sizes[name] for name in ("compress_block_size", "compress_stride")}
    if cu_seqlens is not None:
        compression["cu_seqlens"] = cu_seqlens
    elif leftpad is not None:
        compression |= {"first_slot": leftpad, "num_blocks": nsa.num_compressed_blocks(length, *compression.values())}
    q = 2 * draw(T, heads * groups, dim)
    k, k_win = (2 * draw(length, heads, dim) for _ in range(2))
    v, v_win = (draw(length, heads, v_dim) for _ in range(2))
    k_cmp = nsa.compress_mean(3 * draw(length, heads, dim), **compression)
    v_cmp = nsa.compress_mean(draw(length, heads, v_dim), **compression)
    gates = [draw(T, heads * groups).sigmoid() for _ in range(3)]
    return [x.to(dtype).requires_grad_() for x in (q, k, v, k_cmp, v_cmp, k_win, v_win, *gates)]


def run(backend, inputs, do, **settings):
    o, block_indices, _ = nsa.nsa_attention(*inputs, **settings, backend=backend)
    return o, block_indices, torch.autograd.grad(o, inputs, do.to(o.dtype))


def check(
    T, heads, groups, dim, v_dim, sizes=SIZES, *, dtype=torch.float32, past=0, leftpad=None, lengths=None, **rest
):
    leftpad = None if leftpad is None else torch.tensor(leftpad, device=DEVICE)
    cu_seqlens = None if lengths is None else packed(lengths)
    where = {"leftpad": leftpad, "cu_seqlens": cu_seqlens}
    inputs = make_inputs(T, heads, groups, dim, v_dim, sizes, dtype=dtype, past=past, **where, **rest)
    settings = {**sizes, **where, "q_offset": past}
    do = torch.randn_like(inputs[0][..., :1].expand(*inputs[0].shape[:-1], v_dim))
    plain = run("reference", inputs, do, **settings)
    exact = run("reference", [x.detach().double().requires_grad_() for x in inputs], do, **settings)
    with poisoned():
        got = run("triton", inputs, do, **settings)
    rounding = 4 * 30 * torch.finfo(torch.float32).eps  # of fp32 scores up to 30, when lse is subtracted
    same = (got[1] == plain[1]).all(dim=-1)
    assert same.float().mean() > (0.999 if dtype == torch.float32 else 0.95)  # rounding may flip near-ties
    if not same.all():
        return got, exact
    names = ("o", "dq", "dk", "dv", "dk_cmp", "dv_cmp", "dk_win", "dv_win", "dg_cmp", "dg_slc", "dg_win")
    for name, a, b, want in zip(names, (got[0], *got[2]), (plain[0], *plain[2]), (exact[0], *exact[2])):
        if not want.numel():  # no compressed block
            assert a.shape == want.shape
            continue
        size = max(1.0, want.abs().max().item())
        limit = 2 * (b.double() - want).abs().max().item() + (4 * torch.finfo(dtype).eps + rounding) * size
        off = (a.double() - want).abs().max().item()
        assert off <= limit, f"{name}: off by {off}, allowed {limit}"
    return got, exact


@pytest.mark.parametrize(
    "T, heads, groups, dim, v_dim, rest",
    [
        (65, 1, 4, 32, 32, {}),
        (70, 2, 3, 16, 32, {"dtype": torch.float16}),
        (70, 3, 1, 32, 16, {"leftpad": [0, 9]}),
        (90, 2, 2, 32, 32, {"lengths": [30, 0, 1, 59]}),
        (20, 2, 2, 32, 32, {"past": 37}),
        (5, 1, 1, 16, 16, {}),  # no complete block
    ],
)
def test_matches_reference(T, heads, groups, dim, v_dim, rest):
    check(T, heads, groups, dim, v_dim, **rest)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "heads, groups, dim, v_dim", [(3, 3, 64, 64), (2, 16, 128, 128), (2, 7, 192, 128), (1, 4, 80, 80)]
)
def test_matches_reference_at_the_papers_sizes(dtype, heads, groups, dim, v_dim):
    check(1500, heads, groups, dim, v_dim, PAPER, dtype=dtype, batch=1)


def test_without_gradients_the_result_is_the_same():
    inputs = make_inputs(100, 2, 3, 32, 32, SIZES, dtype=torch.float32)
    o, chosen, _ = nsa.nsa_attention(*inputs, **SIZES, backend="triton")
    with torch.no_grad():
        alone, chosen_alone, _ = nsa.nsa_attention(*inputs, **SIZES, backend="triton")
    assert torch.equal(alone, o)
    assert torch.equal(chosen_alone, chosen)


def test_two_runs_give_the_same_bits():
    inputs = make_inputs(100, 2, 3, 32, 32, SIZES, dtype=torch.float32)
    do = torch.randn_like(inputs[0])
    first, second = (run("triton", inputs, do, **SIZES) for _ in range(2))
    for a, b in zip((first[0], *first[2]), (second[0], *second[2])):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 4, 16])
def test_two_runs_give_the_same_bits_on_a_gpu(groups):
    inputs = make_inputs(6000, 2, groups, 128, 128, PAPER, dtype=torch.bfloat16, batch=1)  # block 0's list is split
    do = torch.randn_like(inputs[0])
    first, second = (run("triton", inputs, do, **PAPER) for _ in range(2))
    for a, b in zip((first[0], *first[2]), (second[0], *second[2])):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_the_host_never_waits():
    inputs = make_inputs(3000, 2, 4, 64, 64, PAPER, dtype=torch.bfloat16)
    do = torch.randn_like(inputs[0])
    run("triton", inputs, do, **PAPER)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run("triton", inputs, do, **PAPER)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shared_kv", [False, True])
def test_the_model_learns_the_same(shared_kv):
    changes = {"shared_kv": shared_kv, "head_dim": 16, "select_block_size": 16, "num_hidden_layers": 1}
    ids, results = make_ids(2, 50).to(DEVICE), []
    for backend in ("reference", "triton"):
        model = make_model(nsa_backend=backend, **changes).to(DEVICE).train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(
            results[1][1][name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_generation_is_the_same():
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids, answers = make_ids(1, 30).to(DEVICE), []
    for backend in ("reference", "triton"):
        model = make_model(nsa_backend=backend, head_dim=16, num_hidden_layers=1).to(DEVICE)
        answers.append(model.generate(ids, **settings))
    assert torch.equal(*answers)


def test_the_choice_of_a_backend(monkeypatch):
    q = torch.zeros(1, 4, 2, 16)
    assert nsa.resolve_backend("auto", q) == "reference"
    assert nsa.resolve_backend("reference", q) == "reference"
    with pytest.raises(ValueError, match="`backend` must be one of 'auto', 'triton', 'reference', got 'cuda'"):
        nsa.resolve_backend("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match=r"cannot run: (no CUDA|the inputs are on cpu)"):
        nsa.window_attention(q, q, q, window_size=2, backend="triton")


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_a_gpu():
    q = torch.zeros(1, 4, 2, 16, device="cuda")
    assert nsa.resolve_backend("auto", q) == "triton"
    assert nsa.resolve_backend("auto", q.double()) == "reference"
    assert nsa.resolve_backend("auto", q, q_offset=torch.tensor(3)) == "reference"
    assert nsa.resolve_backend("auto", q, return_weights=True) == "reference"


def test_what_the_kernels_do_not_compute_is_refused_by_name():
    inputs = make_inputs(20, 1, 2, 16, 16, SIZES, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="`return_weights` is not computed"):
        nsa.nsa_attention(*inputs, **SIZES, return_weights=True, backend="triton")
    with pytest.raises(NotImplementedError, match="`q_offset` must be an int"):
        nsa.nsa_attention(*inputs, **SIZES, q_offset=torch.tensor(0), backend="triton")
    with pytest.raises(NotImplementedError, match="`scale` must be"):
        nsa.nsa_attention(*inputs, **SIZES, scale=-1.0, backend="triton")


def amid_nan(x, by_head):
    """`x` as a view of memory that holds NaN behind its tokens, and behind its heads and head dim unless `by_head`."""
    if x.dim() == 3:
        return amid_nan(x[None], by_head)[0]
    B, T, H, D = x.shape
    if by_head:
        buffer = x.new_full((B, H, T + 70, D), float("nan")).transpose(1, 2)
    else:
        buffer = x.new_full((B, T + 70, H + 1, D + 8), float("nan"))
    view = buffer[:, :T, :H, :D]
    return view.copy_(x)


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize(
    "T, dim, v_dim, dtype, rest",
    [
        (45, 16, 16, torch.float32, {"batch": 1}),
        (45, 40, 24, torch.float16, {"batch": 1}),  # tiles wider than the head dims
        (20, 80, 48, torch.float32, {"past": 30, "leftpad": [0, 19]}),
        (33, 16, 32, torch.float16, {"lengths": [19, 0, 1, 13]}),
        pytest.param(300, 112, 96, torch.bfloat16, {"past": 33}, marks=pytest.mark.gpu),
        pytest.param(700, 192, 128, torch.bfloat16, {"lengths": [65, 600, 35]}, marks=pytest.mark.gpu),
    ],
)
def test_what_lies_behind_a_tensor_changes_nothing(T, dim, v_dim, dtype, rest, by_head):
    where = {name: torch.tensor(x, device=DEVICE) for name, x in rest.items() if name == "leftpad"}
    if "lengths" in rest:
        where["cu_seqlens"] = packed(rest["lengths"])
    past = rest.get("past", 0)
    inputs = make_inputs(T, 2, 2, dim, v_dim, SIZES, dtype=dtype, past=past, batch=rest.get("batch", 2), **where)
    do = torch.randn_like(inputs[0][..., :1].expand(*inputs[0].shape[:-1], v_dim))
    held = [x if x.dim() < do.dim() else amid_nan(x.detach(), by_head).requires_grad_() for x in inputs]
    results = []
    with poisoned():
        for tensors, d in ((inputs, do), (held, amid_nan(do, by_head))):
            o, block_indices, gradients = run("triton", tensors, d, **SIZES, **where, q_offset=past)
            results.append((o, block_indices, *gradients))
    names = ("o", "blocks", "dq", "dk", "dv", "dk_cmp", "dv_cmp", "dk_win", "dv_win", "dg_cmp", "dg_slc", "dg_win")
    assert not [name for name, a, b in zip(names, *results, strict=True) if not torch.equal(a, b)]


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_sequence_of_nan_changes_no_other(is_packed):
    lengths = [23, 35, 21]
    where = {"cu_seqlens": packed(lengths)} if is_packed else {}
    inputs = make_inputs(sum(lengths) if is_packed else 40, 1, 2, 40, 24, SIZES, dtype=torch.float32, batch=3, **where)
    do = torch.randn_like(inputs[0][..., :1].expand(*inputs[0].shape[:-1], 24))
    bounds = where.get("cu_seqlens", torch.arange(4))
    blocks = bounds
    if is_packed:
        blocks = reference.compressed_cu_seqlens(bounds, SIZES["compress_block_size"], SIZES["compress_stride"])

    def spoil(x, name=None):
        start, stop = (blocks if name in ("k_cmp", "v_cmp") else bounds)[1:3].tolist()
        x[start:stop] = float("nan")
        return x

    names = ("q", "k", "v", "k_cmp", "v_cmp", "k_win", "v_win", "g_cmp", "g_slc", "g_win")
    spoiled = [spoil(x.detach().clone(), name).requires_grad_() for name, x in zip(names, inputs)]
    results = []
    for tensors, d in ((inputs, do), (spoiled, spoil(do.clone()))):
        o, _, gradients = run("triton", tensors, d, **SIZES, **where)
        gradients = [spoil(x, name) for name, x in zip(names, gradients)]
        results.append([x.nan_to_num(7.0) for x in (spoil(o.detach()), *gradients)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_room_for_more_in_a_cache_changes_nothing():
    ids, changes = make_ids(1, 50).to(DEVICE), {"head_dim": 16, "num_hidden_layers": 1}
    model, plain = (make_model(nsa_backend=name, **changes).to(DEVICE) for name in ("triton", "reference"))
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), poisoned():
        parts = [model(part, past_key_values=cache).logits for part in ids.split(30, dim=1)]
        expected = plain(ids).logits
    assert any(x.isnan().any() for x in cache.layers[0]._buffers.values())
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-3, atol=1e-5)


def test_ways_to_loop_agree(monkeypatch):
    from nsa_kernels import selected

    inputs = [x.detach() for x in make_inputs(150, 1, 3, 16, 32, SIZES, dtype=torch.float16, batch=1)]

    def attend():
        with torch.no_grad(), poisoned():
            return nsa.nsa_attention(*inputs, **SIZES, backend="triton")[:2]

    o, block_indices = attend()
    chosen = selected._forward_config.chosen
    assert any(config["LATE"] for config in chosen.values())
    changed = {key: {**config, "LATE": not config["LATE"]} for key, config in chosen.items()}
    monkeypatch.setattr(selected._forward_config, "chosen", changed)
    o_other, block_indices_other = attend()
    assert torch.equal(block_indices_other, block_indices)
    torch.testing.assert_close(o_other, o, atol=2 * torch.finfo(o.dtype).eps, rtol=torch.finfo(o.dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "heads, groups, dim, v_dim", [(4, 16, 128, 128), (2, 3, 64, 64), (2, 4, 192, 128), (1, 4, 256, 256)]
)
def test_compiles_for_hopper_without_spills(heads, groups, dim, v_dim):
    launches = compile_launches(f"""
import torch
from nsa_kernels.attention import nsa_attention
def make(*shape):
    return torch.empty(1, *shape, dtype=torch.bfloat16).requires_grad_()
T, HQ, C = 4096, {heads * groups}, 255
inputs = [make(T, HQ, {dim}), make(T, {heads}, {dim}), make(T, {heads}, {v_dim}), make(C, {heads}, {dim}),
          make(C, {heads}, {v_dim}), make(T, {heads}, {dim}), make(T, {heads}, {v_dim})]
gates = make(T, HQ, 3).unbind(-1)
o, *_ = nsa_attention(*inputs, *gates, compress_block_size=32, compress_stride=16, select_block_size=64,
                      num_selected_blocks=16, window_size=512)
torch.autograd.grad(o, (*inputs, *gates), torch.empty_like(o))
""")
    assert len(launches) > 12
    for launch in launches:
        assert launch["spills"] == 0, launch
        assert not launch["serialized"], launch
        assert launch["shared"] <= sm90.MAX_SHARED, launch
