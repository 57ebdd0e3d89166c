# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from tiny import make_checkpoint, make_model, make_tokenizer, random_ids

from nsa_conversion.errors import NSAError
from nsa_conversion.evaluate import (
    PositionBucket,
    evaluate,
    format_position_table,
    loss_by_position,
    main,
    paired_interval,
    position_edges,
    take_slices,
)

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("dense") / "model-a", "llama")


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("other") / "model-b", "llama", seed=1)


def token_losses(model, ids):
    logits = model(input_ids=ids).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
def test_loss_by_position_is_the_mean_of_token_losses(chunk_size):
    model = make_model("llama")
    ids = random_ids(50, batch=3)
    buckets = loss_by_position(model, ids, [0, 8, 20, 64], chunk_size=chunk_size)
    with torch.no_grad():
        losses = token_losses(model, ids)
    assert [(bucket.start, bucket.end, bucket.count) for bucket in buckets] == [(0, 8, 24), (8, 20, 36), (20, 64, 87)]
    for bucket in buckets:
        assert bucket.loss == pytest.approx(losses[:, bucket.start : bucket.end].mean().item(), rel=1e-5)


def test_loss_by_position_takes_texts_of_different_lengths():
    model = make_model("llama")
    texts = [random_ids(length, seed=length)[0] for length in (30, 12, 1)]
    buckets = loss_by_position(model, texts, [0, 10, 40])
    with torch.no_grad():
        long, short = (token_losses(model, text[None])[0] for text in texts[:2])
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
        expected = token_losses(model, ids).mean().item()
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


def test_evaluate_compares_two_checkpoints(checkpoint, other_checkpoint):
    report = evaluate(str(checkpoint), str(other_checkpoint), TEXT, length=300, slices=2, device="cpu", progress=False)
    assert (report.length, report.slices) == (300, 2)
    assert list(report.series) == ["model-b", "model-a"]
    assert [bucket.start for bucket in report.positions] == [0, 256]
    assert report.to_dict()["loss"] != report.to_dict()["against_loss"]
    same = evaluate(str(checkpoint), str(checkpoint), TEXT, length=300, slices=2, device="cpu", progress=False)
    assert same.positions == same.against_positions == report.positions
    assert list(same.series) == ["against", "model"]


def test_evaluate_takes_loaded_models_and_the_builtin_text(tmp_path):
    model, tokenizer = make_model("llama"), make_tokenizer(tmp_path)
    report = evaluate(model, tokenizer=tokenizer, length=64, slices=1, progress=False)
    assert report.text.startswith("built-in")
    assert sum(bucket.count for bucket in report.positions) == 63
    with pytest.raises(NSAError, match="tokenizer is needed"):
        evaluate(model, text=TEXT, progress=False)


def test_evaluate_refuses_other_vocabularies_and_empty_text(tmp_path, checkpoint):
    wider = make_checkpoint(tmp_path / "wider", "llama", vocab_size=300)
    with pytest.raises(NSAError, match=r"has 272 tokens in its vocabulary and .* has 300"):
        evaluate(str(checkpoint), str(wider), TEXT, length=64, slices=1, device="cpu", progress=False)
    with pytest.raises(NSAError, match="text is empty"):
        evaluate(str(checkpoint), text="  ", device="cpu", progress=False)


def test_command_prints_a_table_and_writes_files(tmp_path, capsys, checkpoint, other_checkpoint):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = [str(checkpoint), "--against", str(other_checkpoint), "--text-file", str(tmp_path / "text.txt")]
    arguments += ["--length", "300", "--slices", "2", "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "difference" in printed
    assert "95 % interval" in printed
    assert "256-299" in printed
    saved = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert saved["positions"][1]["start"] == 256
    assert len(saved["positions"][1]["by_text"]) == 2
    assert [low <= high for low, high in saved["difference_95"]] == [True, True]
    assert (tmp_path / "out" / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["positions"] == saved["positions"]


def test_command_says_when_the_text_is_short(tmp_path, capsys, checkpoint):
    (tmp_path / "text.txt").write_text("just a few words", encoding="utf-8")
    assert main([str(checkpoint), "--text-file", str(tmp_path / "text.txt"), "--device", "cpu"]) == 0
    assert "the text holds only 16 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["no-such-directory"], "no-such-directory"),
        (["MODEL", "--text-file", "missing.txt"], "missing.txt does not exist"),
        (["MODEL", "--length", "1"], "length must be at least 2"),
        (["MODEL", "--slices", "0"], "slices must be at least 1"),
        (["MODEL", "--dtype", "float3"], "dtype"),
    ],
)
def test_command_refuses(checkpoint, arguments, error):
    with pytest.raises(NSAError, match=error):
        main([str(checkpoint) if argument == "MODEL" else argument for argument in arguments])


def test_sparse_equals_dense_where_everything_is_selected(tmp_path):
    from tiny import SMALL_NSA

    from nsa_conversion import convert

    source = make_checkpoint(tmp_path / "dense", "llama")
    convert(str(source), str(tmp_path / "sparse"), **SMALL_NSA)
    settings = {"length": 200, "slices": 2, "edges": [0, 32, 200], "device": "cpu", "progress": False}
    report = evaluate(str(tmp_path / "sparse"), str(source), TEXT, **settings)
    (near, far), (dense_near, dense_far) = report.positions, report.against_positions
    assert near.loss == pytest.approx(dense_near.loss, rel=1e-5)
    assert abs(far.loss - dense_far.loss) > 1e-4
