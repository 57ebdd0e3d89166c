# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The reference operations against the definitions, dense attention and each other."""

import pytest
import torch
import torch.nn.functional as F

import nsa_kernels as nsa
from nsa_kernels import reference

SIZES = {
    "compress_block_size": 8,
    "compress_stride": 4,
    "select_block_size": 8,
    "num_selected_blocks": 4,
    "window_size": 10,
}
COMPRESSION = {name: SIZES[name] for name in ("compress_block_size", "compress_stride")}


def make_inputs(T, B=2, HQ=6, H=2, D=8, DV=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k, v, k_win, v_win = rand(B, T, HQ, D), *(rand(B, T, H, d) for d in (D, DV, D, DV))
    gates = tuple(torch.rand(B, T, HQ, generator=generator).to(dtype) for _ in range(3))
    return q, k, v, k_win, v_win, gates


def attend(q, k, v, k_win, v_win, gates, **changes):
    """nsa_attention with mean compression of k and v."""
    where = {name: changes[name] for name in ("cu_seqlens",) if name in changes}
    k_cmp, v_cmp = (nsa.compress_mean(x, **COMPRESSION, **where) for x in (k, v))
    return nsa.nsa_attention(q, k, v, k_cmp, v_cmp, k_win, v_win, *gates, **{**SIZES, **changes})


def dense(q, k, v, mask=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize("T", [1, 7, 8, 9, 31, 32])
def test_selection_alone_is_dense_attention_within_its_reach(T):
    q, k, v, k_win, v_win, gates = make_inputs(T)
    only_selection = (torch.zeros_like(gates[0]), torch.ones_like(gates[1]), torch.zeros_like(gates[2]))
    o, block_indices, _ = attend(q, k, v, k_win, v_win, only_selection)
    torch.testing.assert_close(o, dense(q, k, v))
    assert block_indices.shape == (2, T, 2, 4)


@pytest.mark.parametrize("G", [1, 3, 5, 7, 16])
def test_window_is_banded_attention_of_exactly_w_tokens(G):
    q, k, v, *_ = make_inputs(65, HQ=2 * G)
    t = torch.arange(65)
    band = (t[None] <= t[:, None]) & (t[None] > t[:, None] - 10)
    assert band.sum(1).max() == 10
    o, lse = nsa.window_attention(q, k, v, window_size=10)
    torch.testing.assert_close(o, dense(q, k, v, band))
    scores = torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(G, 2)) * 8**-0.5
    torch.testing.assert_close(lse, scores.masked_fill(~band[:, None], float("-inf")).logsumexp(-1))


def test_compressed_attention_sees_complete_blocks_only():
    q, k, v, *_ = make_inputs(30)
    k_cmp, v_cmp = nsa.compress_mean(k, **COMPRESSION), nsa.compress_mean(v, **COMPRESSION)
    torch.testing.assert_close(k_cmp[:, 1], k[:, 4:12].mean(1))
    o, lse = nsa.compressed_attention(q, k_cmp, v_cmp, **COMPRESSION)
    assert (o[:, :7] == 0).all()
    assert (lse[:, :7] == float("-inf")).all()
    mask = torch.arange(6)[None] * 4 + 7 <= torch.arange(30)[:, None]
    torch.testing.assert_close(o[:, 7:], dense(q[:, 7:], k_cmp, v_cmp, mask[7:]))


def test_importance_weights_at_the_papers_sizes():
    """imp[j] weighs p[4j - 1 … 4j + 3] by 1, 2, 2, 2, 1."""
    sizes = {"compress_block_size": 32, "compress_stride": 16, "select_block_size": 64}
    weights = reference.fold_importance(torch.eye(12), num_blocks=3, **sizes)
    assert weights[:, 1].tolist() == [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0, 0]
    assert weights[:, 0].tolist() == [2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("sizes", [(8, 4, 8), (8, 8, 8), (4, 2, 8), (16, 4, 8), (6, 3, 12)])
def test_importance_is_equation_9(sizes):
    l, d, select = sizes  # noqa: E741
    C, S = 23, 9
    p = torch.rand(2, C)
    expected = torch.zeros(2, S)
    for j in range(S):
        for m in range(select // d):
            for k in range(l // d):
                i = select // d * j + m - k
                if 0 <= i < C:
                    expected[:, j] += p[:, i]
    named = {"compress_block_size": l, "compress_stride": d, "select_block_size": select}
    torch.testing.assert_close(reference.fold_importance(p, num_blocks=S, **named), expected)


def test_importance_sums_probabilities_over_the_group():
    q, k, v, *_ = make_inputs(40)
    k_cmp, v_cmp = nsa.compress_mean(k, **COMPRESSION), nsa.compress_mean(v, **COMPRESSION)
    _, lse = nsa.compressed_attention(q, k_cmp, v_cmp, **COMPRESSION)
    imp = nsa.importance(q, k_cmp, lse, num_blocks=5, select_block_size=8, **COMPRESSION)
    assert (imp[:, :7] == 0).all()
    # blocks inside S count l/d times; G heads sum to G
    assert (imp[:, 7:].sum(-1) <= 3 * 2 + 1e-5).all()
    torch.testing.assert_close(imp[:, -1].sum(-1), torch.full((2, 2), 6.0), rtol=0.2, atol=0)


def test_top_n_forces_blocks_and_prefers_the_smaller_index_of_equals():
    chosen = nsa.topn_blocks(torch.zeros(1, 80, 1, 10), select_block_size=8, num_selected_blocks=5)
    assert chosen[0, 79, 0].tolist() == [0, 1, 2, 8, 9]  # forced 0, 8, 9; ties go to 1, 2
    assert chosen[0, 8, 0].tolist() == [0, 1, -1, -1, -1]
    imp = torch.zeros(1, 80, 1, 10)
    imp[..., 5] = 1.0
    chosen = nsa.topn_blocks(imp, select_block_size=8, num_selected_blocks=4)
    assert chosen[0, 79, 0].tolist() == [0, 5, 8, 9]
    assert chosen[0, 39, 0].tolist() == [0, 1, 3, 4]  # block 5 is in the future


def test_top_n_without_initial_blocks_and_with_more_blocks_than_there_are():
    sizes = {"select_block_size": 8, "num_initial_blocks": 0, "num_local_blocks": 1}
    chosen = nsa.topn_blocks(torch.zeros(1, 20, 1, 3), num_selected_blocks=7, **sizes)
    assert chosen.shape == (1, 20, 1, 7)
    assert chosen[0, -1, 0].tolist() == [0, 1, 2, -1, -1, -1, -1]


def test_selected_attention_is_dense_attention_to_the_chosen_tokens():
    q, k, v, *_ = make_inputs(65)
    chosen = torch.tensor([0, 2, 5, -1], dtype=torch.int32).expand(2, 65, 2, 4)
    o, _, weights = nsa.selected_attention(q, k, v, chosen, select_block_size=8, return_weights=True)
    t = torch.arange(65)
    mask = torch.isin(t // 8, torch.tensor([0, 2, 5]))[None] & (t[None] <= t[:, None])
    torch.testing.assert_close(o, dense(q, k, v, mask))
    assert ((weights > 0) == mask).all()
    torch.testing.assert_close(torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(3, 2)), o)


def test_gated_sum_of_three_branches():
    q, k, v, k_win, v_win, gates = make_inputs(50)
    zero = torch.zeros_like(gates[0])
    whole, *_ = attend(q, k, v, k_win, v_win, gates)
    parts = [attend(q, k, v, k_win, v_win, [g if i == j else zero for j, g in enumerate(gates)])[0] for i in range(3)]
    torch.testing.assert_close(whole, sum(parts))


@pytest.mark.parametrize("padding", [1, 7, 8, 40])
def test_left_padding_changes_nothing(padding):
    q, k, v, k_win, v_win, gates = make_inputs(45)
    o, block_indices, _ = attend(q, k, v, k_win, v_win, gates)

    def pad(x):
        return torch.cat((torch.randn(1, padding, *x.shape[2:]), x[:1]), dim=1)

    leftpad = torch.tensor([padding])
    q, k, v, k_win, v_win = (pad(x) for x in (q, k, v, k_win, v_win))
    where = {"first_slot": leftpad, "num_blocks": 12}  # two blocks too many: not complete, never seen
    k_cmp, v_cmp = (nsa.compress_mean(x, **COMPRESSION, **where) for x in (k, v))
    padded, padded_indices, _ = nsa.nsa_attention(
        q, k, v, k_cmp, v_cmp, k_win, v_win, *(pad(g) for g in gates), **SIZES, leftpad=leftpad
    )
    torch.testing.assert_close(padded[:, padding:], o[:1])
    assert (padded_indices[:, padding:] == block_indices[:1]).all()
    assert (padded[:, :padding] == 0).all()
    assert (padded_indices[:, :padding] == -1).all()


def test_packed_sequences_equal_separate_ones():
    q, k, v, k_win, v_win, gates = (
        x[0] if isinstance(x, torch.Tensor) else [g[0] for g in x] for x in make_inputs(100)
    )
    cu_seqlens = torch.tensor([0, 30, 31, 100], dtype=torch.int32)
    packed, packed_indices, _ = attend(q, k, v, k_win, v_win, gates, cu_seqlens=cu_seqlens)
    for start, stop in ((0, 30), (30, 31), (31, 100)):
        part = [x[None, start:stop] for x in (q, k, v, k_win, v_win)]
        o, block_indices, _ = attend(*part, [g[None, start:stop] for g in gates])
        torch.testing.assert_close(packed[start:stop], o[0])
        assert (packed_indices[start:stop] == block_indices[0]).all()


@pytest.mark.parametrize("past", [1, 12, 59])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_few_queries_against_a_long_past(past, as_tensor):
    q, k, v, k_win, v_win, gates = make_inputs(60)
    o, block_indices, _ = attend(q, k, v, k_win, v_win, gates)
    k_cmp, v_cmp = nsa.compress_mean(k, **COMPRESSION), nsa.compress_mean(v, **COMPRESSION)
    held = max(0, past - 9)
    late, late_indices, _ = nsa.nsa_attention(
        q[:, past:], k, v, k_cmp, v_cmp, k_win[:, held:], v_win[:, held:], *(g[:, past:] for g in gates),
        **SIZES, q_offset=torch.tensor(past) if as_tensor else past,
    )  # fmt: skip
    torch.testing.assert_close(late, o[:, past:])
    assert (late_indices == block_indices[:, past:]).all()


@pytest.mark.parametrize("T", [1, 9, 40, 300])
def test_no_output_depends_on_a_later_token(T):
    q, k, v, k_win, v_win, gates = make_inputs(T, B=1)
    o, *_ = attend(q, k, v, k_win, v_win, gates)
    for t in {0, T // 3, T // 2, T - 1}:
        q2, k2, v2, k_win2, v_win2 = (x.clone() for x in (q, k, v, k_win, v_win))
        for x in (q2, k2, v2, k_win2, v_win2):
            x[:, t:] += 10 * torch.randn_like(x[:, t:])
        changed, *_ = attend(q2, k2, v2, k_win2, v_win2, gates)
        assert torch.equal(changed[:, :t], o[:, :t])
        assert not torch.equal(changed[:, t:], o[:, t:])


def test_extreme_logits_stay_finite():
    q, k, v, k_win, v_win, gates = make_inputs(70)
    o, *_ = attend(300 * q, k, v, 300 * k_win, v_win, gates)
    assert torch.isfinite(o).all()


@pytest.mark.parametrize("T", [3, 21])
def test_gradients_in_double_precision(T):
    q, k, v, k_win, v_win, gates = make_inputs(T, B=1, HQ=2, H=1, D=3, DV=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    phi = [
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((8, 3), (4, 24), (4,), (3, 4), (3,))
    ]
    inputs = [x.requires_grad_() for x in (q, k, v, k_win, v_win, *gates, *phi)]

    def function(q, k, v, k_win, v_win, g_cmp, g_slc, g_win, *phi):
        k_cmp, v_cmp = nsa.compress_mlp(k, *phi, **COMPRESSION), nsa.compress_mean(v, **COMPRESSION)
        return nsa.nsa_attention(q, k, v, k_cmp, v_cmp, k_win, v_win, g_cmp, g_slc, g_win, **SIZES)[0]

    assert torch.autograd.gradcheck(function, inputs)


def test_chunks_do_not_show(monkeypatch):
    q, k, v, k_win, v_win, gates = make_inputs(150)
    q.requires_grad_()
    o, *_ = attend(q, k, v, k_win, v_win, gates)
    o.sum().backward()
    whole_grad, q.grad = q.grad, None
    monkeypatch.setattr(reference, "_MAX_SCORES", 1)
    chunked, *_ = attend(q, k, v, k_win, v_win, gates)
    chunked.sum().backward()
    torch.testing.assert_close(chunked, o)
    torch.testing.assert_close(q.grad, whole_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    inputs = make_inputs(80, dtype=dtype)
    o, *_ = attend(*inputs)
    assert o.dtype == dtype
    exact, *_ = attend(*(x.float() if isinstance(x, torch.Tensor) else [g.float() for g in x] for x in inputs))
    error = (o.float() - exact).abs().max()
    assert error < 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_pooling_weighs_the_tokens_of_a_block():
    x, pooled = torch.randn(2, 20, 3, 4), torch.randn(2, 20, 3, 6)
    pos_bias, w1, b1, w2 = (torch.randn(*shape) for shape in ((8,), (5, 4), (5,), (5,)))
    out = nsa.compress_pool(x, pooled, pos_bias, w1, b1, w2, **COMPRESSION)
    scores = torch.stack([w2 @ F.silu(w1 @ token + b1) for token in x[1, 4:12, 2]]) + pos_bias
    torch.testing.assert_close(out[1, 1, 2], scores.softmax(0) @ pooled[1, 4:12, 2])
    assert out.shape == (2, 4, 3, 6)
    mean = nsa.compress_pool(x, pooled, 0 * pos_bias, w1, b1, 0 * w2, **COMPRESSION)
    torch.testing.assert_close(mean, nsa.compress_mean(pooled, **COMPRESSION))
    packed = nsa.compress_pool(
        x.flatten(0, 1), pooled.flatten(0, 1), pos_bias, w1, b1, w2, **COMPRESSION, cu_seqlens=torch.tensor([0, 20, 40])
    )
    torch.testing.assert_close(packed, out.flatten(0, 1))


def test_mlp_compression_flattens_the_block():
    x = torch.randn(2, 20, 3, 4)
    pos_embed, w1, b1, w2, b2 = (torch.randn(*shape) for shape in ((8, 4), (6, 32), (6,), (5, 6), (5,)))
    out = nsa.compress_mlp(x, pos_embed, w1, b1, w2, b2, **COMPRESSION)
    block = (x[1, 4:12, 2] + pos_embed).flatten()
    torch.testing.assert_close(out[1, 1, 2], w2 @ F.silu(w1 @ block + b1) + b2)
    assert out.shape == (2, 4, 3, 5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"compress_stride": 3}, "`compress_stride` .d. must divide `compress_block_size`"),
        ({"select_block_size": 6}, "`compress_stride` .d. must divide `select_block_size`"),
        ({"num_selected_blocks": 2}, "`num_selected_blocks` .n. must be at least"),
        ({"num_local_blocks": 0}, "`num_local_blocks` must be an integer >= 1"),
        ({"window_size": 0}, "`window_size` must be an integer >= 1"),
        ({"window_size": 2.0}, "`window_size` must be an integer >= 1"),
        ({"backend": "cuda"}, "`backend` must be one of"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    q, k, v, k_win, v_win, gates = make_inputs(20)
    k_cmp, v_cmp = nsa.compress_mean(k, **COMPRESSION), nsa.compress_mean(v, **COMPRESSION)
    with pytest.raises(ValueError, match=message):
        nsa.nsa_attention(q, k, v, k_cmp, v_cmp, k_win, v_win, *gates, **{**SIZES, **changes})


def test_bad_shapes_are_named():
    q, k, v, k_win, v_win, gates = make_inputs(20)
    with pytest.raises(ValueError, match="multiple of the key/value heads of `k`"):
        nsa.window_attention(q[:, :, :5], k, v, window_size=4)
    with pytest.raises(ValueError, match="`g_slc` must have shape"):
        attend(q, k, v, k_win, v_win, (gates[0], gates[1][:, :3], gates[2]))
    with pytest.raises(ValueError, match="head dim of `q`"):
        nsa.selected_attention(q, k[..., :4], v, torch.zeros(2, 20, 2, 1).int(), select_block_size=8)
    with pytest.raises(ValueError, match="`cu_seqlens` must be an int32 or int64 tensor"):
        attend(*(x[0] for x in (q, k, v, k_win, v_win)), [g[0] for g in gates], cu_seqlens=torch.tensor([0.0, 20.0]))
