# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from tiny import SMALL_NSA, make_checkpoint, random_ids
from transformers import AutoModelForCausalLM

from nsa_conversion import convert, distill
from nsa_conversion.distill import (
    choose_queries,
    dense_forward,
    dense_statistics,
    layer_inputs,
    logit_losses,
    selector_losses,
)
from nsa_kernels.reference import importance

# Two documents, of which the second is long enough for a choice in any case.
BOUNDS = torch.tensor([0, 41, 120], dtype=torch.int32)


@pytest.fixture(scope="module", params=["separate", "shared"])
def models(request, tmp_path_factory):
    """A dense model and its conversion."""
    root = tmp_path_factory.mktemp("models")
    dense = make_checkpoint(root / "dense", "qwen3")
    convert(dense, root / "nsa", progress=False, shared_kv=request.param == "shared", **SMALL_NSA)
    return tuple(AutoModelForCausalLM.from_pretrained(root / name) for name in ("dense", "nsa"))


@pytest.fixture
def packed():
    positions = torch.cat([torch.arange(41), torch.arange(79)])[None]
    return {"input_ids": random_ids(120), "position_ids": positions, "cu_seq_lens_q": BOUNDS, "use_cache": False}


@pytest.fixture
def layer(models, packed):
    with layer_inputs(models[1]) as inputs, torch.no_grad():
        models[1](**packed)
    return inputs[0]


def test_the_dense_forward_pass_is_the_source(models, packed):
    dense, nsa = models
    with torch.no_grad():
        sparse = nsa(**packed).logits
        expected = torch.cat([dense(packed["input_ids"][:, a:b]).logits for a, b in ((0, 41), (41, 120))], dim=1)
        with dense_forward(nsa):
            torch.testing.assert_close(nsa(**packed).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(nsa(**packed).logits, sparse)
    assert (sparse - expected).abs().max() > 1e-2


def test_statistics_are_those_of_dense_attention(monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(40, 4, 8), torch.randn(40, 2, 8), torch.randn(40, 2, 6)
    positions = torch.tensor([3, 17, 18, 39])
    settings = {"select_block_size": 8, "window_size": 10, "scale": 0.4}
    worth, outside = dense_statistics(q[positions], k, v, positions, **settings)
    mass, _ = dense_statistics(q[positions], k, v, positions, **settings, target="mass")
    keys, values = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = 0.4 * torch.einsum("qhd,khd->hqk", q, keys)
    p = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf")).softmax(-1)[:, positions]
    expected = p.unflatten(-1, (5, 8)).sum(-1).unflatten(0, (2, 2)).sum(1).transpose(0, 1)
    torch.testing.assert_close(mass, expected)
    added = torch.einsum("hqsk,hskd->hqsd", p.unflatten(-1, (5, 8)), values.transpose(0, 1).unflatten(1, (5, 8)))
    torch.testing.assert_close(worth, added.square().sum(-1).unflatten(0, (2, 2)).sum(1).transpose(0, 1))
    far = p * (torch.arange(40) <= positions[:, None] - 10)
    renormalised = torch.einsum("hqk,khd->qhd", far, values) / far.sum(-1).T[..., None].clamp(min=1e-30)
    torch.testing.assert_close(outside, renormalised)
    monkeypatch.setattr(distill, "_MAX_SCORES", 2 * 4 * 40)  # two queries at a time
    for whole, chunked in zip((worth, outside), dense_statistics(q[positions], k, v, positions, **settings)):
        torch.testing.assert_close(whole, chunked)


def test_selector_losses_equal_a_direct_computation(layer):
    """Document by document, through the importance of the specification."""
    attention, config = layer.attention, layer.attention.config
    queries = choose_queries(layer, 32, 1000)
    assert [(each.slots, len(each.positions)) for each in queries] == [(slice(0, 41), 9), (slice(41, 120), 47)]
    divergence, count, error, norm = 0.0, 0, 0.0, 0.0
    rotate = attention._rotation(layer.position_embeddings)
    sizes = {name: getattr(config, name) for name in ("compress_block_size", "compress_stride", "select_block_size")}
    with torch.no_grad():
        x = layer.hidden_states
        q = rotate(attention._heads(x, attention.q_proj, attention.q_norm))[0]
        k, v = (
            rotate(attention._heads(x, attention.k_proj, attention.k_norm))[0],
            attention._heads(x, attention.v_proj)[0],
        )
        for start, stop in ((0, 41), (41, 120)):
            part = slice(start, stop)
            size = {"compress_block_size": 4, "compress_stride": 2}
            k_cmp, v_cmp = (_mean_blocks(x[part], **size) for x in (k, v))
            scores = attention.scaling * torch.einsum("qhd,chd->hqc", q[part], k_cmp.repeat_interleave(3, dim=1))
            end = 2 * torch.arange(len(k_cmp)) + 3
            scores = scores.masked_fill(end > torch.arange(stop - start)[:, None], float("-inf"))
            lse = scores.logsumexp(-1).T[None]
            imp = importance(q[None, part], k_cmp[None], lse, num_blocks=-(-(stop - start) // 8), **sizes)[0]
            every = torch.arange(stop - start)
            worth, outside = dense_statistics(
                q[part], k[part], v[part], every, select_block_size=8, window_size=12, scale=attention.scaling
            )
            o_cmp = torch.einsum("hqc,chd->qhd", scores.softmax(-1), v_cmp.repeat_interleave(3, dim=1))
            terms, weights = [], []
            for t in range(32, stop - start):
                free = slice(1, t // 8 - 1)  # neither the first block nor the last two
                for head in range(2):
                    teacher, student = (m[t, head, free] / m[t, head, free].sum() for m in (worth, imp))
                    terms.append((teacher * (teacher / student).log()).sum())
                    weights.append(worth[t, head, free].sum().sqrt())
            divergence += len(terms) * torch.stack(terms) @ torch.stack(weights) / sum(weights)
            count += len(terms)
            error += (o_cmp - outside)[32:].square().sum()
            norm += outside[32:].square().sum()
    selector, value = selector_losses(layer, queries)
    torch.testing.assert_close(selector.detach(), divergence / count, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value.detach(), error / norm, rtol=1e-4, atol=1e-6)


def _mean_blocks(x, compress_block_size, compress_stride):
    return x.unfold(0, compress_block_size, compress_stride).mean(-1)


@pytest.mark.gpu
def test_losses_on_a_gpu_equal_those_on_the_cpu(models, packed, layer):
    queries = choose_queries(layer, 32, 1000)
    nsa = copy.deepcopy(models[1]).cuda()
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in packed.items()}
    with layer_inputs(nsa) as inputs, torch.no_grad():
        nsa(**moved)
    own = choose_queries(inputs[0], 32, 1000)
    for cpu, gpu in zip(selector_losses(layer, queries), selector_losses(inputs[0], own)):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("attached", [False, True])
def test_the_host_never_waits_for_a_gpu(models, attached):
    """Else the device would be idle in every layer, while the host prepares the next one."""
    nsa = copy.deepcopy(models[1]).cuda()
    ids = torch.randint(32, (2, 96), device="cuda")

    def losses():
        with layer_inputs(nsa, attached=attached) as layers:
            nsa(input_ids=ids, use_cache=False)
        return sum(sum(selector_losses(layer, choose_queries(layer, 32, 8, documents=1))) for layer in layers)

    losses().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients_reach_nothing_but_phi_and_what_it_alone_reads(models, packed):
    _, nsa = models
    nsa.zero_grad()
    with layer_inputs(nsa) as inputs:
        nsa(**packed)
    queries = choose_queries(inputs[0], 32, 20)
    assert sum(len(each.positions) for each in queries) == 20
    sum(sum(selector_losses(each, queries)) for each in inputs).backward()
    moved = {name for name, parameter in nsa.named_parameters() if parameter.grad is not None}
    parts = ("compress_", "_proj_cmp", "k_norm_cmp")
    assert moved == {name for name, _ in nsa.named_parameters() if any(part in name for part in parts)}
    assert any("_proj_cmp" in name for name in moved) == (not nsa.config.shared_kv)
    for name in ("compress_k", "compress_v"):
        assert getattr(inputs[0].attention, name).w2.grad.abs().max() > 0
    nsa.zero_grad()


def test_attached_inputs_give_the_same_losses_and_train_queries_and_the_layers_below(models, packed, layer):
    _, nsa = models
    nsa.zero_grad()
    with layer_inputs(nsa, attached=True) as inputs:
        nsa(**packed)
    attached = [layer._replace(attention=inputs[0].attention), inputs[0]]
    queries = choose_queries(inputs[0], 32, 20)
    detached, own = (selector_losses(each, queries, values=False)[0] for each in attached)
    torch.testing.assert_close(own, detached)
    selector_losses(inputs[-1], queries, values=False)[0].backward()
    moved = {name for name, parameter in nsa.named_parameters() if parameter.grad is not None}
    last = f"layers.{inputs[-1].attention.layer_idx}."
    assert {f"model.{last}self_attn.q_proj.weight", "model.embed_tokens.weight"} <= moved
    untouched = ("self_attn.v_proj.", "self_attn.o_proj.", "mlp.")
    assert not any(last + part in name for name in moved for part in untouched)
    assert all(parameter.grad.isfinite().all() for parameter in nsa.parameters() if parameter.grad is not None)
    nsa.zero_grad()


def test_a_row_of_short_documents_gives_a_loss_of_zero(layer):
    losses = selector_losses(layer, choose_queries(layer, 1000, 20))
    assert [loss.item() for loss in losses] == [0.0, 0.0]
    sum(losses).backward()


def test_losses_of_the_logits_count_labelled_tokens_only(monkeypatch):
    torch.manual_seed(0)
    logits, teacher = torch.randn(1, 9, 30, requires_grad=True), torch.randn(1, 9, 30)
    labels = torch.arange(9)[None].clone()
    labels[0, [0, 4]] = -100
    kept = [t - 1 for t in range(1, 9) if t != 4]
    p, q = teacher[0, kept].softmax(-1), logits[0, kept].softmax(-1)
    next_token = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    expected = ((p * (p / q).log()).sum(-1).mean(), next_token)
    torch.testing.assert_close(logit_losses(logits, teacher, labels), expected)
    gradients = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in expected]
    monkeypatch.setattr(distill, "_LOGIT_ROWS", 3)
    for loss, gradient in zip(logit_losses(logits, teacher, labels), gradients):
        torch.testing.assert_close(torch.autograd.grad(loss, logits, retain_graph=True)[0], gradient)
    assert logit_losses(teacher, teacher, labels)[0].item() == pytest.approx(0, abs=1e-6)
