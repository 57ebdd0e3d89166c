# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The decode kernels against the reference: outputs and blocks, on caches whose unused slots hold NaN."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from sm90 import MAX_SHARED
from sm90_launches import compile_launches
from triton_checks import DEVICE, poisoned

import nsa_kernels as nsa
from nsa_kernels import reference

decode = pytest.importorskip("nsa_kernels.decode", reason="needs Triton")

SIZES = {
    "compress_block_size": 8,
    "compress_stride": 4,
    "select_block_size": 16,
    "num_selected_blocks": 4,
    "num_initial_blocks": 1,
    "num_local_blocks": 2,
    "window_size": 20,
}
PAPER = {
    "compress_block_size": 32,
    "compress_stride": 16,
    "select_block_size": 64,
    "num_selected_blocks": 16,
    "num_initial_blocks": 1,
    "num_local_blocks": 2,
    "window_size": 512,
}
GATES = slice(7, 10)


def make_cache(past, T, heads, groups, dim, v_dim, sizes, *, batch=2, leftpad=None, dtype=torch.float32, seed=0):
    """Arguments of `nsa_attention` for T queries after `past` slots, as long as they need to be."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape):
        return torch.randn(batch, *shape, device=DEVICE, generator=generator)

    length = past + T
    compression = {name: sizes[name] for name in ("compress_block_size", "compress_stride")}
    if leftpad is not None:
        compression |= {"first_slot": leftpad, "num_blocks": nsa.num_compressed_blocks(length, *compression.values())}
    held = min(length, sizes["window_size"] + T)
    q = 2 * draw(T, heads * groups, dim)
    k, v = 2 * draw(length, heads, dim), draw(length, heads, v_dim)
    k_cmp = nsa.compress_mean(3 * draw(length, heads, dim), **compression)
    v_cmp = nsa.compress_mean(draw(length, heads, v_dim), **compression)
    k_win, v_win = 2 * draw(held, heads, dim), draw(held, heads, v_dim)
    gates = [draw(T, heads * groups).sigmoid() for _ in range(3)]
    return [x.to(dtype) for x in (q, k, v, k_cmp, v_cmp, k_win, v_win, *gates)]


def as_held(x, spare, first=None):
    """`[B, T, H, D]` as a cache holds it: `[B, H, T + spare, D]` transposed, NaN in what is spare or padding."""
    buffer = x.new_full((x.shape[0], x.shape[2], x.shape[1] + spare, x.shape[3]), float("nan"))
    buffer[:, :, : x.shape[1]] = x.transpose(1, 2)
    for row, slots in enumerate(first if first is not None else ()):
        buffer[row, :, :slots] = float("nan")
    return buffer.transpose(1, 2)


def as_ring(x, size, stop):
    """The last keys `[B, TW, H, D]` before slot `stop`, each at its slot modulo `size`, the rest NaN."""
    ring = x.new_full((x.shape[0], size, *x.shape[2:]), float("nan"))
    ring[:, torch.arange(stop - x.shape[1], stop, device=x.device) % size] = x
    return ring


def check(
    past, T, heads, groups, dim, v_dim, sizes=SIZES, *, spare=0, leftpad=None, dtype=torch.float32, offset="int",
    ring=None, exact_blocks=True, **rest,
):  # fmt: skip
    leftpad = None if leftpad is None else torch.tensor(leftpad, device=DEVICE)
    inputs = make_cache(past, T, heads, groups, dim, v_dim, sizes, leftpad=leftpad, dtype=dtype, **rest)
    want, block_indices, _ = reference.nsa_attention(*inputs, **sizes, leftpad=leftpad, q_offset=past)
    exact, *_ = reference.nsa_attention(*(x.double() for x in inputs), **sizes, leftpad=leftpad, q_offset=past)
    q, k, v, k_cmp, v_cmp, k_win, v_win, *gates = inputs
    held = [as_held(x, spare, leftpad) for x in (k, v)] + [as_held(x, spare // 4) for x in (k_cmp, v_cmp)]
    q_offset = {
        "int": past,
        "scalar": torch.tensor(past, device=DEVICE),
        "rows": torch.full((q.shape[0],), past, device=DEVICE),
    }[offset]
    gates = torch.stack(gates, -1).unbind(-1)
    window = [k_win, v_win] if ring is None else [as_ring(x, ring, past + T) for x in (k_win, v_win)]
    with poisoned():
        o, chosen, _ = decode.decode_attention(
            q, *held, *window, *gates, **sizes, leftpad=leftpad, q_offset=q_offset, window_ring=ring is not None
        )
    if ring is not None:
        held = [x.nan_to_num() for x in (*held, *window)]
        doubles = (x.double() for x in (q, *held, *gates))
        again, *_ = reference.nsa_attention(*doubles, **sizes, leftpad=leftpad, q_offset=q_offset, window_ring=True)
        torch.testing.assert_close(again, exact)
    assert chosen.dtype == torch.int32
    assert o.dtype == dtype
    same = (chosen == block_indices).all(-1)  # [B, T, H]
    assert same.all() if exact_blocks else same.float().mean() > 0.95
    same = same.repeat_interleave(groups, dim=-1)
    size = max(1.0, exact.abs().max().item())
    error = (want.double() - exact)[same].abs().max().item()
    limit = 2 * error + (2 * torch.finfo(dtype).eps + 4 * 30 * torch.finfo(torch.float32).eps) * size
    off = (o.double() - exact)[same].abs().max().item()
    assert off <= limit, f"off by {off}, allowed {limit}"
    return o, chosen


@pytest.mark.parametrize(
    "past, T, heads, groups, dim, v_dim, rest",
    [
        (200, 1, 2, 4, 32, 32, {"spare": 90, "batch": 1}),
        (130, 3, 1, 2, 16, 16, {"leftpad": [118, 2], "ring": 35, "offset": "scalar"}),
        (6, 2, 1, 2, 16, 16, {"ring": 35, "offset": "rows"}),
        (45, 1, 1, 2, 16, 16, {"ring": 90, "spare": 44}),  # every slot has its place
        (130, 2, 1, 3, 32, 16, {"leftpad": [0, 61], "spare": 7, "offset": "scalar"}),
        (97, 3, 2, 1, 16, 32, {"offset": "rows", "spare": 64}),
        (90, 16, 1, 5, 48, 48, {"batch": 1}),  # two tiles of queries, a head dim in two tiles
        (90, 1, 1, 5, 80, 80, {"dtype": torch.float16, "leftpad": [89, 3], "batch": 2}),
        (5, 1, 1, 2, 32, 32, {"spare": 30, "offset": "scalar"}),  # no complete block
        (0, 1, 1, 2, 16, 16, {"spare": 40, "offset": "scalar"}),  # the first token
        (60, 3, 1, 2, 16, 16, {"leftpad": [60, 63]}),  # rows of one real token, and of none
        (63, 2, 1, 4, 32, 32, {}),  # as many blocks as are chosen, and one more
    ],
)
def test_matches_reference(past, T, heads, groups, dim, v_dim, rest):
    check(past, T, heads, groups, dim, v_dim, **rest)


@pytest.mark.gpu
@pytest.mark.parametrize("n", range(4, 37))
def test_any_number_of_blocks(n):
    """Ranking compiles to other code for each: once it chose wrong blocks on a GPU for n = 5 alone."""
    check(1000, 1, 2, 3, 16, 16, SIZES | {"num_selected_blocks": n})


@pytest.mark.parametrize(
    "changes",
    [
        {"compress_block_size": 16, "select_block_size": 12, "num_selected_blocks": 6},  # l'/d = 3
        {"compress_block_size": 24, "select_block_size": 4, "num_selected_blocks": 7, "num_local_blocks": 3},  # l > l'
        {"compress_block_size": 4, "num_selected_blocks": 3, "window_size": 1},  # nothing but forced blocks
        {"num_initial_blocks": 0, "num_local_blocks": 1, "num_selected_blocks": 1, "window_size": 300},
    ],
)
def test_other_sizes(changes):
    check(170, 2, 1, 2, 16, 16, {**SIZES, **changes}, batch=1, spare=20)


def test_heads_that_need_several_tiles():
    check(70, 1, 1, 65, 16, 16, batch=1)


@pytest.mark.parametrize("width, splits", [(1024, 1), (1024, 5), (4, 2)])
def test_equal_importances_fall_to_the_smaller_index(monkeypatch, width, splits):
    monkeypatch.setattr(decode, "_MAX_WIDTH", width)
    monkeypatch.setattr(decode, "_splits", lambda tiles, programs, device: splits)
    inputs = make_cache(300, 1, 1, 2, 16, 16, SIZES)
    q, gates = torch.zeros_like(inputs[0]), inputs[GATES]
    _, chosen, _ = decode.decode_attention(q, *inputs[1:7], *gates, **SIZES, q_offset=300)
    assert chosen[0, 0, 0].tolist() == [0, 1, 17, 18]


def test_many_chosen_blocks():
    check(1200, 1, 1, 2, 16, 16, {**SIZES, "select_block_size": 8, "num_selected_blocks": 40}, batch=1)


def test_rows_longer_than_are_ranked_at_once(monkeypatch):
    monkeypatch.setattr(decode, "_MAX_WIDTH", 16)
    monkeypatch.setattr(decode, "_JOINED", 32)
    monkeypatch.setattr(decode, "_HELD", 32)
    check(400, 1, 1, 2, 16, 16, {**SIZES, "select_block_size": 8, "num_selected_blocks": 9}, batch=1)


@pytest.mark.parametrize("splits", [1, 11])
def test_any_number_of_splits(monkeypatch, splits):
    monkeypatch.setattr(decode, "_splits", lambda tiles, programs, device: splits)
    check(300, 1, 1, 4, 16, 16, batch=1, spare=100)


def test_extreme_logits():
    inputs = make_cache(300, 1, 1, 2, 16, 16, SIZES)
    q, gates = 100 * inputs[0], inputs[GATES]
    want, blocks, _ = reference.nsa_attention(q, *inputs[1:], **SIZES, q_offset=300)
    o, chosen, _ = decode.decode_attention(q, *inputs[1:7], *gates, **SIZES, q_offset=300)
    torch.testing.assert_close(o, want, rtol=1e-3, atol=1e-4)
    assert torch.equal(chosen[..., :1], blocks[..., :1])


def test_refuses_by_name():
    inputs = make_cache(30, 17, 1, 2, 16, 16, SIZES)
    with pytest.raises(NotImplementedError, match="at most 16 queries a row, got 17"):
        decode.decode_attention(*inputs, **SIZES, q_offset=30)
    few = [x[:, :1] if x.shape[1] == 17 else x for x in inputs]
    with pytest.raises(NotImplementedError, match="`return_weights` is not computed"):
        decode.decode_attention(*few, **SIZES, q_offset=30, return_weights=True)
    with pytest.raises(NotImplementedError, match="got packed sequences"):
        decode.decode_attention(*few, **SIZES, cu_seqlens=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "T, past, as_tensor, grad, decodes",
    [(2, 40, False, False, True), (2, 40, True, False, True), (2, 0, False, False, False), (2, 40, False, True, False),
     (17, 40, False, False, False)],
)  # fmt: skip
def test_few_queries_with_a_past_are_decoded(monkeypatch, T, past, as_tensor, grad, decodes):
    called = []
    attention = decode._attention
    monkeypatch.setattr(decode, "_attention", lambda *args: called.append(True) or attention(*args))
    inputs = make_cache(past, T, 1, 1, 16, 16, SIZES, batch=1)
    inputs[0].requires_grad_(grad)
    q_offset = torch.tensor(past, device=DEVICE) if as_tensor else past
    o, blocks, weights = nsa.nsa_attention(*inputs, **SIZES, q_offset=q_offset, backend="triton")
    want, wanted, _ = reference.nsa_attention(*inputs, **SIZES, q_offset=past)
    torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(blocks, wanted)
    assert weights is None
    assert bool(called) == decodes


def test_is_one_node_of_a_compiled_graph():
    torch._dynamo.reset()
    inputs = make_cache(40, 1, 1, 2, 16, 16, SIZES, batch=1)

    @torch.no_grad()
    def step(q_offset, *inputs):
        return nsa.nsa_attention(*inputs, **SIZES, q_offset=q_offset, backend="triton")[0]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    offset = torch.tensor(40, device=DEVICE)
    torch.testing.assert_close(compiled(offset, *inputs), step(offset, *inputs))


def test_compiles_for_hopper():
    launches = compile_launches("""
import torch
from nsa_kernels import decode
decode._multiprocessors = lambda device: 132
decode._overlaps = lambda device: True
sizes = {"compress_block_size": 32, "compress_stride": 16, "select_block_size": 64}
for B, T, HQ, H, D, DV, dtype, q_offset, n in (
    (16, 1, 64, 4, 128, 128, torch.bfloat16, torch.tensor(5), 16),
    (1, 16, 32, 8, 128, 128, torch.bfloat16, 5, 16),
    (1, 8, 32, 8, 80, 80, torch.float16, 5, 64),
    (4, 2, 32, 8, 128, 128, torch.float32, 5, 16),
):
    def keys(length, dim):
        return torch.empty(B, H, length, dim, dtype=dtype).transpose(1, 2)
    q, gates = torch.empty(B, T, HQ, D, dtype=dtype), torch.empty(B, T, HQ, 3, dtype=dtype).unbind(-1)
    pairs = [keys(length, dim) for length in (65536, 4096, 512 + T) for dim in (D, DV)]
    decode.decode_attention(
        q, *pairs, *gates, **sizes, num_selected_blocks=n, window_size=512, q_offset=q_offset
    )
""")
    assert len(launches) == 16
    for launch in launches:
        assert launch["spills"] == 0, launch
        assert launch["shared"] <= MAX_SHARED, launch


@pytest.mark.gpu
def test_a_cuda_graph_replays_at_every_length():
    inputs = make_cache(3000, 1, 2, 4, 64, 64, PAPER, dtype=torch.bfloat16)
    leftpad, offset = torch.tensor([0, 70], device=DEVICE), torch.tensor(2999, device=DEVICE)

    def step():
        return nsa.nsa_attention(*inputs, **PAPER, leftpad=leftpad, q_offset=offset)[:2]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = step()
    for length, pad in ((0, 0), (40, 3), (1100, 1100), (2500, 17), (3000, 70)):
        offset.fill_(length)
        leftpad[1] = pad
        graph.replay()
        for got, want in zip(captured, step()):
            assert torch.equal(got, want), length


@pytest.mark.gpu
def test_nothing_is_read_back_on_a_gpu(monkeypatch):
    """ "auto" decodes at an offset on the device, and the host never waits."""
    called = []
    attention = decode._attention
    monkeypatch.setattr(decode, "_attention", lambda *args: called.append(True) or attention(*args))
    inputs = make_cache(3000, 2, 2, 4, 64, 64, PAPER, dtype=torch.bfloat16)
    where = {"leftpad": torch.tensor([0, 70], device=DEVICE), "q_offset": torch.tensor(3000, device=DEVICE)}
    nsa.nsa_attention(*inputs, **PAPER, **where)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        nsa.nsa_attention(*inputs, **PAPER, **where)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(called) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(60))
def test_random_configurations_on_a_gpu(seed):
    rng = random.Random(seed)
    past, T = rng.choice((0, 31, 500, 1023, 1024, 5000, 9001)), rng.choice((1, 1, 2, 5, 16))
    batch = rng.choice((1, 2, 5))
    dtype = rng.choice((torch.bfloat16, torch.float16, torch.float32))
    sizes = PAPER | rng.choice(
        ({}, {"num_selected_blocks": 24, "select_block_size": 32}, {"compress_block_size": 16, "compress_stride": 8})
    )
    leftpad = [rng.randrange(past + T + 1) for _ in range(batch)] if rng.random() < 0.5 else None
    check(
        past, T, rng.choice((1, 2, 8)), rng.choice((1, 3, 4, 5, 7, 8, 16, 33)), rng.choice((32, 64, 80, 128, 192, 256)),
        rng.choice((32, 64, 80, 128)), sizes, batch=batch, leftpad=leftpad, dtype=dtype, seed=seed,
        spare=rng.choice((0, 100, 70000)), ring=rng.choice((None, sizes["window_size"] + 16)),
        offset=rng.choice(("int", "scalar", "rows")),
        exact_blocks=dtype == torch.float32,
    )  # fmt: skip
