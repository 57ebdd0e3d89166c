# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The append kernels against the reference: on caches whose unwritten slots hold NaN, step by step, in a model."""

import os
import random
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from sm90 import MAX_SHARED
from sm90_launches import compile_launches
from tiny_nsa import VARIANTS, close, logits, make_ids, make_model
from transformers import StaticCache
from triton_checks import DEVICE, poisoned

import nsa_kernels as nsa
from modeling_nsa import NSAStaticLayer, attention_nsa
from nsa_kernels import reference

append = pytest.importorskip("nsa_kernels.append", reason="needs Triton")

SIZES = {"compress_block_size": 8, "compress_stride": 4}
TYPES = ("mean", "mlp", "residual_mlp", "pool")
every_type = pytest.mark.parametrize("compress_type", TYPES)


def make_phi(compress_type, dim, draw, block_size, hidden):
    if compress_type == "mean":
        return []
    if compress_type == "pool":
        shapes = ((block_size,), (hidden, dim), (hidden,), (hidden,), (dim, dim))
    else:
        shapes = ((block_size, dim), (hidden, block_size * dim), (hidden,), (dim, hidden), (dim,))
    return [draw(*shape) / max(1, shape[-1]) ** 0.5 for shape in shapes]


def make_step(
    compress_type, past, T, heads=2, groups=2, dim=16, v_dim=16, *, batch=2, shared=False, leftpad=None, capacity=100,
    window=12, rope=True, hidden=24, dtype=torch.float32, sizes=SIZES, seed=0,
):  # fmt: skip
    """Arguments of `append_tokens` after `past` slots; what is not written, padding too, is NaN."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    block_size, stride = sizes.values()

    def draw(*shape):
        return torch.randn(shape, device=DEVICE, generator=generator)

    def embeddings(count):
        angles = 3 * draw(batch, count, dim // 2).repeat(1, 1, 2)
        return [1.1 * angles.cos().to(dtype), 1.1 * angles.sin().to(dtype)]

    def held(size, width, slots=range(past)):
        state = torch.full((batch, heads, size, width), float("nan"), device=DEVICE)
        for row in range(batch):
            for slot in slots if isinstance(slots, range) else slots(row):
                if not isinstance(slots, range) or leftpad is None or slot >= leftpad[row]:
                    state[row, :, slot % size] = draw(heads, width)
        return state.to(dtype)

    def blocks(row):
        return range(nsa.num_compressed_blocks(past - (leftpad[row] if leftpad else 0), *sizes.values()))

    count = nsa.num_compressed_blocks(capacity, *sizes.values()) + 1
    tail = range(max(0, past - block_size + 1), past)
    ring = min(capacity, block_size - 1 + 16)
    new = {name: draw(batch, T, heads, width).to(dtype) for name, width in (("k", dim), ("v", v_dim))}
    cache = {"keys": held(capacity, dim), "values": held(capacity, v_dim)}
    cache |= {"k_cmp": held(count, dim, blocks), "v_cmp": held(count, v_dim, blocks), "v_tail": held(ring, v_dim, tail)}
    if compress_type != "mean":
        cache["k_tail"] = held(ring, dim, tail)
    if compress_type != "mlp":
        cache["k_tail_rot"] = held(ring, dim, tail)
    if not shared:
        new |= {f"{x}_{y}": draw(*new[x].shape).to(dtype) for x in ("k", "v") for y in ("cmp", "win")}
        size = min(capacity, window + 15)
        seen = range(max(0, past - window + 1), past)
        cache |= {"k_win": held(size, dim, seen), "v_win": held(size, v_dim, seen)}
    cache["length"] = torch.tensor(past, device=DEVICE)
    where = {
        "slots": past + torch.arange(T, device=DEVICE),
        "leftpad": None if leftpad is None else torch.tensor(leftpad, device=DEVICE),
        "embeddings": embeddings(T) if rope else None,
        "block_embeddings": embeddings(-(-T // stride)) if rope else None,
        "compress_type": compress_type,
        **sizes,
    }
    phi = ([x.to(dtype) for x in make_phi(compress_type, width, draw, block_size, hidden)] for width in (dim, v_dim))
    return [draw(batch, T, heads * groups, dim).to(dtype), new, cache, *phi], where


def clone(x, dtype=None):
    if isinstance(x, (list, tuple)):
        return [clone(each, dtype) for each in x]
    if isinstance(x, dict):
        return {name: clone(each, dtype) for name, each in x.items()}
    if not isinstance(x, torch.Tensor):
        return x
    return x.to(dtype).clone() if dtype is not None and x.is_floating_point() else x.clone()


def states(q, cache):
    """What is compared; the last block's content is arbitrary."""
    return {"q": q, **{name: x[:, :, :-1] if name in ("k_cmp", "v_cmp") else x for name, x in cache.items()}}


def check(*args, **kwargs):
    inputs, where = make_step(*args, **kwargs)
    dtype = inputs[0].dtype
    results = []
    for operation, precise in ((reference, True), (reference, False), (append, False)):
        tensors, settings = clone((inputs, where), torch.float64 if precise else None)
        with poisoned():
            q = operation.append_tokens(*tensors, **settings)
        results.append(states(q, tensors[2]))
    exact, want, got = results
    assert got["length"] == want["length"] == where["slots"][-1] + 1
    for name in exact:
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(got[name].isnan(), exact[name].isnan()), name
        a, b, c = (x[name].double().nan_to_num() for x in (exact, want, got))
        if not a.numel():  # no block fits into the cache
            continue
        size = max(1.0, a.abs().max().item())
        error = (b - a).abs().max().item()
        limit = 2 * error + (2 * torch.finfo(dtype).eps + 30 * torch.finfo(torch.float32).eps) * size
        off = (c - a).abs().max().item()
        assert off <= limit, f"{name}: off by {off}, allowed {limit}, PyTorch {error}"
    return got


@every_type
@pytest.mark.parametrize(
    "past, T, rest",
    [
        (39, 1, {}),  # completes a block
        (40, 1, {"shared": True}),  # completes none
        (33, 5, {"leftpad": [0, 3], "dim": 24, "v_dim": 40}),  # a block here, two there
        (51, 16, {"leftpad": [50, 60], "shared": True, "groups": 1}),  # a row of 7 real tokens
        (7, 1, {"leftpad": [0, 5], "rope": False, "batch": 2}),  # the first block
        (20, 16, {"capacity": 36, "window": 30, "dtype": torch.float16}),  # a full cache, every slot has its place
        (0, 3, {"batch": 1}),
        (38, 2, {"dtype": torch.bfloat16, "leftpad": [0, 1]}),
    ],
)
def test_matches_reference(compress_type, past, T, rest):
    if rest.get("dtype") == torch.bfloat16 and compress_type != "mean" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 wrongly; on a GPU this case runs")
    check(compress_type, past, T, **rest)


@every_type
def test_other_shapes(compress_type):
    check(compress_type, 47, 1, 9, 3, 48, 20, batch=8, hidden=40)  # more rows and heads than a program takes
    check(compress_type, 59, 2, 1, 5, 80, 16, sizes={"compress_block_size": 20, "compress_stride": 20}, batch=1)
    check(compress_type, 40, 9, sizes={"compress_block_size": 6, "compress_stride": 2}, batch=1, leftpad=[1])


def fuse(q, new, order=None):
    """The same values as slices of one tensor `[B, T, F]`, as one product leaves them."""
    tensors = {"q": q, **new}
    rows = [tensors[name].flatten(2) for name in order or tensors]
    parts = torch.cat([*rows, rows[0]], dim=2).split([*(x.shape[2] for x in rows), rows[0].shape[2]], dim=2)
    tensors |= {name: part.view(tensors[name].shape) for name, part in zip(order or tensors, parts)}
    return tensors.pop("q"), tensors


@every_type
@pytest.mark.parametrize(
    "past, T, rest, order",
    [
        (39, 1, {}, None),
        (33, 5, {"leftpad": [0, 3], "dim": 24, "v_dim": 40, "heads": 3}, None),
        (40, 2, {"shared": True}, None),
        (38, 3, {"v_dim": 12, "batch": 1}, ["v", "v_cmp", "v_win"]),  # norms leave queries and keys contiguous
        (38, 3, {}, ["q", "v"]),  # values unlike each other are copied
    ],
)
def test_slices_of_one_tensor_are_read_where_they_lie(monkeypatch, compress_type, past, T, rest, order):
    inputs, where = make_step(compress_type, past, T, **rest)
    want = clone(inputs)
    wanted = append.append_tokens(*want, **where)
    inputs[0], inputs[1] = fuse(*inputs[:2], order)
    copied, contiguous = [], torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, *args: copied.append(x.dim()) or contiguous(x, *args))
    q = append.append_tokens(*inputs, **where)
    monkeypatch.undo()
    assert copied.count(4) == (3 if order == ["q", "v"] else 0)
    assert q.is_contiguous()
    assert torch.equal(q, wanted)
    for name, state in want[2].items():
        if name in ("k_cmp", "v_cmp"):
            state, inputs[2][name] = state[:, :, :-1], inputs[2][name][:, :, :-1]
        torch.testing.assert_close(inputs[2][name], state, rtol=0, atol=0, equal_nan=True)


def test_heads_that_do_not_lie_side_by_side_are_copied():
    inputs, where = make_step("mean", 39, 2, heads=3)
    want = clone(inputs)
    wanted = append.append_tokens(*want, **where)
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    inputs[1] = {name: x.repeat_interleave(2, dim=3)[..., ::2] for name, x in inputs[1].items()}
    assert torch.equal(append.append_tokens(*inputs, **where), wanted)
    for name in ("keys", "v_tail", "v_win"):
        torch.testing.assert_close(inputs[2][name], want[2][name], rtol=0, atol=0, equal_nan=True)


@every_type
def test_step_by_step_as_at_once(compress_type):
    """Over more slots than the rings have, the same blocks as steps of another length give."""
    leftpad, total = [0, 6], 60
    (q, new, cache, *phi), where = make_step(compress_type, 0, total, leftpad=leftpad, capacity=total, rope=False)
    caches = []
    for seed in (0, 1):
        rng, own, start = random.Random(seed), clone(cache), 0
        while start < total:
            stop = min(total, start + rng.choice((1, 1, 3, 16)))
            tokens = {name: x[:, start:stop] for name, x in new.items()}
            steps = where | {"slots": torch.arange(start, stop, device=DEVICE)}
            nsa.append_tokens(q[:, start:stop], tokens, own, *phi, **steps, backend="triton")
            start = stop
        caches.append(own)
    one, other = caches
    sizes = where | {"num_blocks": 14, "first_slot": where["leftpad"]}
    sizes = {name: sizes[name] for name in ("compress_block_size", "compress_stride", "num_blocks", "first_slot")}
    parts = [new["k_cmp"], new["k_cmp"], phi[0], None], [new["v_cmp"], new["v_cmp"], phi[1], None]
    for name, part in zip(("k_cmp", "v_cmp"), parts):
        blocks = reference._compress(compress_type, *part, sizes).transpose(1, 2)
        for row, count in enumerate((14, 12)):
            for held in (one, other):
                torch.testing.assert_close(held[name][row, :, :count], blocks[row, :, :count], rtol=1e-4, atol=1e-5)
                assert held[name][row, :, count:-1].isnan().all()
    assert torch.equal(one["keys"], other["keys"])


@pytest.mark.parametrize(
    "variant, padded, fused",
    [
        ("separate", False, False),
        ("shared", False, True),
        ("separate", True, True),
        *((name, True, name in ("mlp", "qwen3-like")) for name in VARIANTS if "sliding" not in name),
    ],
)
@torch.no_grad()
def test_a_model_with_a_static_cache(monkeypatch, variant, padded, fused):
    """Steps of several lengths give what the whole text gives, and leave in the cache what PyTorch leaves there."""
    appended = []
    monkeypatch.setattr(
        attention_nsa, "append_tokens",
        lambda *args, backend, **where: appended.append(True) or append.append_tokens(*args, **where),
    )  # fmt: skip
    model = make_model(variant, nsa_backend="reference", v_head_dim=12).to(DEVICE)
    model = model.fuse_projections() if fused else model
    ids = make_ids(2, 75).to(DEVICE)
    mask = torch.ones(2, 80, dtype=torch.bool, device=DEVICE)
    mask[1, :13], mask[:, 75:] = not padded, False
    caches = []
    for backend in ("triton", "reference"):
        monkeypatch.setattr(attention_nsa, "resolve_backend", lambda *args, backend=backend: backend)
        cache, outputs = StaticCache(config=model.config, max_cache_len=80), []
        for start, stop in ((0, 30), (30, 31), (31, 36), (36, 52), (52, 53), (53, 75)):
            seen = mask & (torch.arange(80, device=DEVICE) < stop) if padded else None
            outputs.append(model(ids[:, start:stop], attention_mask=seen, past_key_values=cache).logits)
        caches.append(cache)
        close(torch.cat(outputs, 1)[mask[:, :75]], logits(model, ids, attention_mask=mask[:, :75].long())[mask[:, :75]])
    assert len(appended) == 4 * model.config.layer_types.count("native_sparse_attention")
    for got, want in zip(*(cache.layers for cache in caches)):
        if isinstance(got, NSAStaticLayer):
            for name, state in want.states().items():
                whole = name not in ("k_cmp", "v_cmp")  # the last block is for what is incomplete
                close(*(x if whole else x[:, :, :-1] for x in (got.states()[name], state)))


@torch.no_grad()
@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda model: None, True),
        (lambda model: model.model.layers[0].self_attn.compress_k.double(), False),  # as if under autocast
        (lambda model: model.model.layers[0].self_attn.compress_v.to("meta"), False),  # as if offloaded
    ],
)
def test_kernels_append_where_all_tensors_are_alike(monkeypatch, change, expected):
    model = make_model(num_hidden_layers=1).to(DEVICE)
    layer = model.model.layers[0].self_attn
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids = make_ids(1, 20).to(DEVICE)
    model(ids[:, :19], past_key_values=cache)
    monkeypatch.setattr(attention_nsa, "resolve_backend", lambda *args: "triton")
    change(model)
    q = torch.zeros(1, 1, 1, 8, device=DEVICE)
    assert layer._appends(cache.layers[0], SimpleNamespace(slots=torch.tensor([19])), q, {}) == expected


def test_refuses_by_name():
    inputs, where = make_step("mean", 0, 17, batch=1)
    with pytest.raises(NotImplementedError, match="at most 16 tokens a row, got 17"):
        nsa.append_tokens(*inputs, **where, backend="triton")
    inputs, where = make_step("mlp", 5, 1, batch=1)
    inputs[2]["keys"] = inputs[2]["keys"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(NotImplementedError, match=r"`cache\['keys'\]` must be contiguous"):
        nsa.append_tokens(*inputs, **where, backend="triton")
    inputs, where = make_step("mlp", 5, 1, batch=1)
    inputs[3][1] = inputs[3][1].double()
    with pytest.raises(NotImplementedError, match=r"`phi_k\[1\]` must be contiguous and of the dtype of `q`"):
        nsa.append_tokens(*inputs, **where, backend="triton")
    del inputs[1]["k_win"]
    with pytest.raises(ValueError, match="`new` must hold `k_cmp`"):
        nsa.append_tokens(*inputs, **where)


@pytest.mark.slow
@pytest.mark.parametrize("compress_type, shared", [("residual_mlp", False), ("mean", True)])
def test_opcheck(monkeypatch, compress_type, shared):
    given = []
    monkeypatch.setattr(append, "_append", lambda *args: given.append(args))
    inputs, where = make_step(compress_type, 39, 1, batch=1, shared=shared, leftpad=[2], dim=8, v_dim=8, heads=1)
    inputs[2] = {name: x.nan_to_num() for name, x in inputs[2].items()}
    append.append_tokens(*inputs, **where)
    monkeypatch.undo()
    torch.library.opcheck(append._append, given[0])


def test_compiles_for_hopper():
    launches = compile_launches("""
import torch
from nsa_kernels import append, decode
append._overlaps = lambda device: True
for B, T, HQ, H, D, DV, dtype, F, separate, fused in (
    (4, 1, 32, 8, 128, 128, torch.bfloat16, 256, True, False),
    (4, 1, 32, 8, 128, 128, torch.bfloat16, 256, True, True),
    (1, 16, 32, 8, 128, 128, torch.bfloat16, 256, False, True),
    (16, 1, 64, 4, 192, 80, torch.float16, 384, True, False),
    (4, 2, 32, 8, 128, 128, torch.float32, 256, True, True),
):
    def empty(*shape):
        return torch.empty(*shape, dtype=dtype)
    for kind in ("mean", "mlp", "residual_mlp", "pool"):
        sizes = [HQ * D, H * D, H * DV]
        whole = empty(B, T, sum(sizes)).split(sizes, 2) if fused else [empty(B, T, size) for size in sizes]
        q, *pair = (x.unflatten(2, (-1, d)) for x, d in zip(whole, (D, D, DV)))
        new = dict(zip(append._NEW, 3 * pair if separate else pair))
        lengths = {"keys": 65536, "k_cmp": 4096, "k_tail": 47, "k_win": 527}
        cache = {name: empty(B, H, length, D) for name, length in lengths.items()}
        cache |= {"values": empty(B, H, 65536, DV), "v_cmp": empty(B, H, 4096, DV), "v_tail": empty(B, H, 47, DV)}
        cache |= {"k_tail_rot": empty(B, H, 47, D), "v_win": empty(B, H, 527, DV), "length": torch.tensor(5)}
        unread = {"mean": ["k_tail"], "mlp": ["k_tail_rot"]}.get(kind, [])
        cache = {name: x for name, x in cache.items() if name not in unread and (separate or "win" not in name)}
        phi = [
            [empty(32), empty(F, d), empty(F), empty(F), empty(d, d)] if kind == "pool" else
            [empty(32, d), empty(F, 32 * d), empty(F), empty(d, F), empty(d)] if kind != "mean" else []
            for d in (D, DV)
        ]
        append.append_tokens(
            q, new, cache, *phi, slots=torch.arange(T), leftpad=torch.zeros(B, dtype=torch.long),
            embeddings=[empty(B, T, D)] * 2, block_embeddings=[empty(B, 1, D)] * 2, compress_type=kind,
            compress_block_size=32, compress_stride=16,
        )
""")
    assert [launch["kernel"] for launch in launches[:2]] == ["_append_kernel", "_block_kernel"]
    assert len(launches) == 5 * (2 + 3 * 3)
    for launch in launches:
        assert launch["spills"] == 0, launch
        assert launch["shared"] <= MAX_SHARED, launch


@pytest.mark.gpu
@pytest.mark.parametrize("compress_type", TYPES)
def test_a_cuda_graph_replays_and_nothing_is_read_back(compress_type):
    """From slot to slot, ragged rows; the graph's blocks are those of the reference."""
    inputs, where = make_step(
        compress_type, 100, 1, 4, 4, 128, 128, leftpad=[0, 13], capacity=400, dtype=torch.bfloat16, hidden=256,
        sizes={"compress_block_size": 32, "compress_stride": 16}, window=64,
    )  # fmt: skip
    again = clone(inputs)
    nsa.append_tokens(*clone(inputs), **where, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad(), torch.cuda.graph(graph):
            nsa.append_tokens(*inputs, **where, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for slot in range(100, 180):
        where["slots"].fill_(slot)
        graph.replay()
        reference.append_tokens(*again, **where)
    for name, want in states(inputs[0], again[2]).items():
        got = states(inputs[0], inputs[2])[name]
        torch.testing.assert_close(got, want, rtol=2e-2, atol=4e-2, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(60))
def test_random_configurations_on_a_gpu(seed):
    rng = random.Random(seed)
    past, T, batch = rng.choice((0, 15, 31, 46, 200)), rng.choice((1, 1, 2, 5, 16)), rng.choice((1, 2, 5, 33))
    sizes = rng.choice(((32, 16), (16, 8), (64, 16), (8, 2), (24, 8)))
    leftpad = [rng.randrange(past + T + 1) for _ in range(batch)] if rng.random() < 0.5 else None
    check(
        rng.choice(TYPES), past, T, rng.choice((1, 2, 3, 8)), rng.choice((1, 3, 4, 7)),
        rng.choice((32, 64, 80, 128, 192, 256)), rng.choice((32, 40, 64, 128)), batch=batch, leftpad=leftpad,
        shared=rng.random() < 0.5, rope=rng.random() < 0.8, hidden=rng.choice((32, 100, 256)),
        window=rng.choice((1, 64)), capacity=rng.choice((past + T, 400)), sizes=dict(zip(SIZES, sizes)), seed=seed,
        dtype=rng.choice((torch.bfloat16, torch.float16, torch.float32)),
    )  # fmt: skip
