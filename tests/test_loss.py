# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tiny import make_model, random_ids

from nsa_conversion.errors import NSAError
from nsa_conversion.loss import (
    PositionBucket,
    difference_interval,
    format_position_table,
    loss_by_position,
    loss_by_recall,
    losses_by_position,
    mean_loss,
    paired_interval,
    position_edges,
    position_rows,
    take_slices,
    take_texts,
    token_losses,
)


def expected_losses(model, ids):
    logits = model(input_ids=ids).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
def test_loss_by_position_is_the_mean_of_token_losses(chunk_size):
    model = make_model("llama")
    ids = random_ids(50, batch=3)
    buckets = loss_by_position(model, ids, [0, 8, 20, 64], chunk_size=chunk_size)
    with torch.no_grad():
        losses = expected_losses(model, ids)
    assert [(bucket.start, bucket.end, bucket.count) for bucket in buckets] == [(0, 8, 24), (8, 20, 36), (20, 64, 87)]
    for bucket in buckets:
        assert bucket.loss == pytest.approx(losses[:, bucket.start : bucket.end].mean().item(), rel=1e-5)


def test_loss_by_position_takes_texts_of_different_lengths():
    model = make_model("llama")
    texts = [random_ids(length, seed=length)[0] for length in (30, 12, 1)]
    buckets = loss_by_position(model, texts, [0, 10, 40])
    with torch.no_grad():
        long, short = (expected_losses(model, text[None])[0] for text in texts[:2])
    assert [bucket.count for bucket in buckets] == [20, 20]
    assert buckets[0].loss == pytest.approx(torch.cat([long[:10], short[:10]]).mean().item(), rel=1e-5)
    assert buckets[1].loss == pytest.approx(torch.cat([long[10:], short[10:]]).mean().item(), rel=1e-5)


def test_loss_by_position_leaves_out_empty_buckets_and_restores_the_mode():
    model = make_model("llama").train()
    assert [bucket.start for bucket in loss_by_position(model, random_ids(9), [0, 4, 100, 200])] == [0, 4]
    assert model.training


def test_loss_by_position_keeps_what_a_model_does_to_its_logits():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.1,
        initializer_range=1.0,
    )
    model = Gemma2ForCausalLM(config).eval()
    ids = random_ids(20)
    with torch.no_grad():
        expected = expected_losses(model, ids).mean().item()
    assert loss_by_position(model, ids, [0, 20])[0].loss == pytest.approx(expected, rel=1e-5)


def test_paired_interval_sees_through_what_both_share():
    first = [1.0, 5.0, 9.0, 2.0, 7.0]
    low, high = paired_interval(first, [x + shift for x, shift in zip(first, (0.1, 0.3, 0.2, 0.2, 0.2))])
    assert 0.1 < low < 0.2 < high < 0.3
    assert paired_interval(first, first) == (0, 0)


@pytest.mark.parametrize(("first", "second"), [([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])])
def test_paired_interval_needs_pairs(first, second):
    with pytest.raises(NSAError, match="an interval needs the same two or more texts from both"):
        paired_interval(first, second)


@pytest.mark.parametrize("edges", [[0], [0, 0], [4, 2], [-1, 4]])
def test_loss_by_position_refuses_bad_edges(edges):
    with pytest.raises(NSAError, match="edges must be at least two ascending positions"):
        loss_by_position(make_model("llama"), random_ids(9), edges)


def test_loss_by_position_refuses_texts_without_a_prediction():
    with pytest.raises(NSAError, match="no sequence has a token to predict inside positions 0-9"):
        loss_by_position(make_model("llama"), [random_ids(1)[0]], [0, 10])


@pytest.mark.parametrize(
    ("length", "edges"),
    [
        (2, [0, 2]),
        (256, [0, 256]),
        (257, [0, 256, 257]),
        (4096, [0, 256, 512, 1024, 2048, 4096]),
        (5000, [0, 256, 512, 1024, 2048, 4096, 5000]),
    ],
)
def test_position_edges_double(length, edges):
    assert position_edges(length) == edges


def test_take_slices_spreads_without_overlap():
    ids = torch.arange(103)
    slices = take_slices(ids, 20, 4)
    assert slices.shape == (4, 20)
    assert slices[0, 0] == 0
    assert slices[-1, -1] >= 100  # reaches the end
    assert len(slices.unique()) == slices.numel()


def test_take_slices_gives_what_a_short_text_has():
    assert take_slices(torch.arange(50), 20, 4).shape == (2, 20)
    assert take_slices(torch.arange(15), 20, 4).shape == (1, 15)


@pytest.mark.parametrize(
    ("tokens", "length", "slices", "error"),
    [
        (1, 20, 4, r"the text holds 1 token\(s\); at least 2"),
        (0, 20, 4, r"the text holds 0 token\(s\); at least 2"),
        (50, 1, 4, "length must be at least 2 tokens, got 1"),
        (50, 20, 0, "slices must be at least 1, got 0"),
    ],
)
def test_take_slices_refuses(tokens, length, slices, error):
    with pytest.raises(NSAError, match=error):
        take_slices(torch.arange(tokens), length, slices)


def test_table_lines_up():
    series = {
        "dense": [PositionBucket(0, 256, 2.0, 256), PositionBucket(256, 1024, 1.0, 768)],
        "sparse": [PositionBucket(0, 256, 2.0, 256), PositionBucket(256, 1024, 1.5, 768)],
    }
    lines = format_position_table(series, "difference").splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["position", "dense", "sparse", "difference", "tokens"]
    assert lines[3].split() == ["256-1,023", "1.0000", "1.5000", "+0.5000", "768"]
    series["sparse"][0] = PositionBucket(0, 256, 1.99999, 256)
    assert format_position_table(series, "difference").splitlines()[2].split()[3] == "+0.0000"
    assert lines[5].split() == ["all", "1.2500", "1.6250", "+0.3750", "1,024"]


def test_token_losses_of_a_single_token_are_empty():
    losses = token_losses(make_model("llama"), [random_ids(5)[0], random_ids(1)[0]])
    assert [len(text) for text in losses] == [4, 0]


def test_take_texts_begins_with_the_long_documents():
    documents = [torch.arange(length) for length in (5, 30, 12, 40)]
    assert [len(text) for text in take_texts(documents, 20, 3)] == [20, 20, 5]
    assert [text[0].item() for text in take_texts(documents[1:2], 10, 3)] == [0, 10, 20]


def test_recall_separates_far_near_and_new():
    #       0  1  2  3  4  5  6  7  8  9
    ids = torch.tensor([7, 8, 9, 1, 7, 8, 9, 9, 7, 8])
    losses = torch.arange(9, dtype=torch.double)  # losses[i] belongs to ids[i + 1]
    far, near, new = loss_by_recall([ids], [losses], n=2, far=5)
    # 7 8 comes at 1, 5 (4 later) and 9 (4 later); 8 9 at 2 and 6 (4 later); others are new
    assert (far.count, far.loss) == (0, None)
    assert (near.count, near.loss) == (3, pytest.approx((4 + 5 + 8) / 3))
    assert new.count == 6
    far, near, new = loss_by_recall([ids], [losses], n=2, far=4)
    assert (far.count, near.count, new.count) == (3, 0, 6)
    assert mean_loss([far, near, new]) == pytest.approx(losses.mean().item())


def test_recall_keeps_texts_apart_and_pairs_them():
    ids = torch.tensor([1, 2, 3, 1, 2, 3, 4])
    groups = loss_by_recall([ids, ids[:3]], [torch.ones(6), torch.zeros(2)], n=3, far=3)
    assert [group.count_by_text for group in groups] == [(1, 0), (0, 0), (5, 2)]
    assert [group.by_text for group in groups] == [(1.0, 0.0), (0.0, 0.0), (1.0, 0.0)]
    assert difference_interval(groups[0], groups[0]) is None  # one text only
    assert difference_interval(groups[2], groups[2]) == (0, 0)
    header, rows, total = position_rows({"dense": groups, "sparse": groups}, "difference")
    assert header == ["tokens", "dense", "sparse", "difference", "95 % interval", "count"]
    assert [row[1:4] for row in rows] == [
        ["1.0000", "1.0000", "+0.0000"],
        ["", "", ""],
        ["0.7143", "0.7143", "+0.0000"],
    ]
    assert total[-1] == "8"


@pytest.mark.parametrize("settings", [{"n": 1}, {"far": 0}])
def test_recall_refuses(settings):
    with pytest.raises(NSAError, match="n must be at least 2 and far at least 1"):
        loss_by_recall([torch.arange(4)], [torch.zeros(3)], **settings)


def test_intervals_weigh_texts_by_their_tokens():
    assert paired_interval([0.0, 0.0], [1.0, 5.0], [1, 0.999e6])[1] == 5
    assert paired_interval([0.0, 0.0, 0.0], [1.0, 3.0, 99.0], [1, 1, 0]) == paired_interval([0.0, 0.0], [1.0, 3.0])
    with pytest.raises(NSAError, match="two or more texts of some weight, got 1"):
        paired_interval([0.0, 0.0], [1.0, 5.0], [1, 0])


def test_table_has_a_difference_for_every_other_model():
    series = {
        label: losses_by_position([torch.full((9,), loss)], [0, 9]) for label, loss in zip("abc", (1.0, 2.0, 4.0))
    }
    header, rows, total = position_rows(series, "difference")
    assert header == ["position", "a", "b", "c", "b - a", "c - a", "tokens"]
    assert rows == [["0-8", "1.0000", "2.0000", "4.0000", "+1.0000", "+3.0000", "9"]]
    assert total[-3:-1] == ["+1.0000", "+3.0000"]
