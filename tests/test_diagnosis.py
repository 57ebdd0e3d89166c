# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import pytest
import tiny
import torch
from tiny_nsa import close, logits, make_ids, make_model

from nsa_conversion import diagnosis
from nsa_conversion.diagnosis import Diagnosis, block_mass, diagnose, forced_blocks, is_sparse
from nsa_conversion.errors import NSAError

TOKENS = 90


def attention_mass(q, k, block_size):
    """[T, HQ, S], the whole matrix at once."""
    tokens, group = len(q), q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, dim=1)) * q.shape[-1] ** -0.5
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    p = scores.masked_fill(future, float("-inf")).softmax(-1)
    blocks = torch.arange(tokens) // block_size
    mass = torch.zeros(*p.shape[:2], blocks.max() + 1).index_add_(2, blocks, p)
    return mass.transpose(0, 1)


def test_block_mass_is_that_of_dense_attention():
    torch.manual_seed(0)
    q, k = torch.randn(37, 6, 8), torch.randn(37, 2, 8)
    expected = attention_mass(q, k, 8)
    for start, stop in ((0, 37), (5, 17), (36, 37)):
        mass = block_mass(q, k, start, stop, 8, 8**-0.5)
        assert mass.shape == (stop - start, 6, -(-stop // 8))
        close(mass, expected[start:stop, :, : mass.shape[-1]])
    close(mass.sum(-1), torch.ones(1, 6))


@pytest.mark.parametrize("variant", ["separate", "qwen3-like", "hybrid", "smollm3-like"])
def test_forcing_the_models_own_blocks_changes_nothing(variant):
    model, ids = make_model(variant), make_ids(1, TOKENS)
    own = iter(model(ids, use_cache=False, output_block_indices=True).block_indices)
    with forced_blocks(model, lambda attention, q, k: next(own)[0]):
        forced = logits(model, ids)
    assert torch.equal(forced, logits(model, ids))


@pytest.mark.parametrize("variant", ["separate", "qwen3-like"])
def test_forcing_blocks_is_what_a_model_that_chooses_them_computes(variant, monkeypatch):
    """Against a model whose attention has the choice put in from the start."""
    from nsa_kernels import reference

    model, ids = make_model(variant, num_selected_blocks=5), make_ids(1, TOKENS)

    def recent(imp, **settings):
        return topn_blocks(torch.arange(imp.shape[-1]).expand(imp.shape).float(), **settings)

    topn_blocks = reference.topn_blocks
    with forced_blocks(model, diagnosis._recent):
        forced = logits(model, ids)
    assert not torch.allclose(forced, logits(model, ids), atol=1e-3)
    monkeypatch.setattr(reference, "topn_blocks", recent)
    close(forced, logits(model, ids))


def test_the_oracle_takes_the_blocks_of_most_mass():
    torch.manual_seed(0)
    attention = make_model(num_selected_blocks=5).model.layers[0].self_attn
    q, k = torch.randn(TOKENS, 6, 8), torch.randn(TOKENS, 2, 8)
    chosen = diagnosis.dense_choice(attention, q, k)
    mass = attention_mass(q, k, 8).unflatten(1, (2, 3)).sum(2)  # [T, H, S]
    assert chosen[23].tolist() == [[0, 1, 2, -1, -1]] * 2
    for t in (40, 60, TOKENS - 1):
        last = t // 8
        best = mass[t, :, 1 : last - 1].topk(2).indices.sort().values + 1  # the other three are forced
        assert chosen[t].tolist() == [[0, *free, last - 1, last] for free in best.tolist()]


@pytest.mark.parametrize("chunk", [16, 512])
def test_diagnosis_is_what_the_whole_matrices_give(chunk, monkeypatch):
    monkeypatch.setattr(diagnosis, "_MAX_CHUNK", chunk)
    model = make_model("hybrid", gate_scale=True, num_selected_blocks=4, num_hidden_layers=2)
    ids, first = make_ids(2, TOKENS), 32
    found = diagnose(model, ids, [0, first, TOKENS])
    assert found.layers == [1]
    assert found.tokens == 2 * (TOKENS - first)

    captured = []
    attention = model.model.layers[1].self_attn
    hook = attention.register_forward_hook(
        lambda module, args, kwargs, outputs: captured.append(
            (
                *diagnosis.query_key_value(module, kwargs["hidden_states"], kwargs["position_embeddings"])[:2],
                *outputs[2:],
            )
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        for row in ids:
            model(row[None], use_cache=False)
    hook.remove()
    recalls, masses, bests, unions = [], [], [], {2: [], 8: []}
    for q, k, blocks, _ in captured:
        mass = attention_mass(q[0], k[0], 8)
        dense = diagnosis.dense_choice(attention, q[0], k[0])
        for t in range(first, TOKENS):
            for head in range(2):
                own, best = set(blocks[0, t, head].tolist()), set(dense[t, head].tolist())
                recalls.append((head, len(own & best) / 4))
                for query_head in range(3 * head, 3 * head + 3):
                    masses.append((query_head, mass[t, query_head, sorted(own)].sum().item()))
                    bests.append((query_head, mass[t, query_head, sorted(best)].sum().item()))
        for size, counts in unions.items():
            for start in range(first, TOKENS - size + 1, size):
                counts += [(h, len(blocks[0, start : start + size, h].unique())) for h in range(2)]

    def by_head(values):
        heads = sorted({head for head, _ in values})
        return [[sum(each) / len(each) for each in ([v for h, v in values if h == head] for head in heads)]]

    close(torch.tensor(found.block_recall), torch.tensor(by_head(recalls)))
    close(torch.tensor(found.mass_recall), torch.tensor(by_head(masses)))
    close(torch.tensor(found.dense_mass_recall), torch.tensor(by_head(bests)))
    for size, counts in unions.items():
        close(torch.tensor(found.unions[str(size)]), torch.tensor(by_head(counts)))
    gates = torch.cat([each[-1][0] for each in captured])
    close(torch.tensor(found.gate_mean), gates.mean(0)[None])
    close(torch.tensor(found.gate_std), gates.std(0, unbiased=False)[None])


def test_losses_differ_only_where_the_selection_leaves_something_out():
    model = make_model(num_selected_blocks=4)
    found = diagnose(model, make_ids(2, TOKENS), [0, 32, TOKENS])
    assert list(found.losses) == ["own", "oracle", "recent"]
    own, oracle, recent = found.losses.values()
    assert own[0] == oracle[0] == recent[0]
    assert len({buckets[1].loss for buckets in (own, oracle, recent)}) == 3
    assert Diagnosis.from_dict(found.to_dict()) == found
    assert not model.model.layers[0].self_attn._forward_hooks


def test_only_sparse_models_and_long_texts():
    dense = tiny.make_model("llama")
    assert is_sparse(make_model())
    assert not is_sparse(dense)
    with pytest.raises(NSAError, match="needs sparse layers, and this LlamaForCausalLM has none"):
        diagnose(dense, make_ids(1, TOKENS), [0, TOKENS])
    with pytest.raises(NSAError, match=r"at least n·l' \+ 16 = 40 tokens, the longest has 39"):
        diagnose(make_model(), make_ids(2, 39), [0, 39])


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["separate", "qwen3-like"])
def test_the_kernels_give_the_same_diagnosis(variant):
    ids, edges = make_ids(2, 300), [0, 64, 300]
    sizes = {"num_selected_blocks": 4, "select_block_size": 16, "head_dim": 32, "v_head_dim": 32}
    model = make_model(variant, **sizes)
    expected = diagnose(model, ids, edges)
    model.config.nsa_backend = "triton"
    found = diagnose(model.cuda(), ids, edges)
    for name in ("block_recall", "mass_recall", "dense_mass_recall", "gate_mean", "gate_std"):
        got, wanted = (torch.tensor(getattr(each, name)) for each in (found, expected))
        torch.testing.assert_close(got, wanted, rtol=0, atol=5e-3)  # near ties may choose other blocks
    for name, buckets in expected.losses.items():
        losses = [[bucket.loss for bucket in each] for each in (found.losses[name], buckets)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-2)
