# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import SMALL_NSA, make_checkpoint

from nsa_conversion import convert, load_model
from nsa_conversion.loss import token_losses


@pytest.fixture
def selector_bound(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "conversion"))
    yield importlib.import_module("selector_bound")
    sys.modules.pop("selector_bound", None)


def measure(selector_bound, tmp_path, **sizes):
    source = make_checkpoint(tmp_path / "dense")
    convert(source, tmp_path / "sparse", progress=False, **{**SMALL_NSA, **sizes})
    dense, sparse = (load_model(path, dtype="float32", device="cpu")[0] for path in (source, tmp_path / "sparse"))
    slices = torch.randint(5, dense.config.vocab_size, (3, 150), generator=torch.Generator().manual_seed(0))
    rows = selector_bound.measure(dense, sparse, slices, [(0, 20), (75, 150)], progress=False)
    difference = token_losses(sparse, slices)[1] - token_losses(dense, slices)[1]
    return {(row["way"], row["start"]): row for row in rows}, difference


def test_the_mean_is_the_conversion_itself_and_other_keys_choose_other_blocks(selector_bound, tmp_path):
    rows, difference = measure(selector_bound, tmp_path)
    assert rows["mean", 75]["by_slice"][1] == pytest.approx(difference[74:149].mean().item(), abs=1e-6)
    for way in ("mean", "tokens", "fitted", "linear"):
        assert rows[way, 0]["mean"] == pytest.approx(0, abs=1e-5)  # nothing is left out there
    assert len({round(rows[way, 75]["by_slice"][1], 6) for way in ("mean", "tokens", "fitted", "linear")}) == 4
    assert rows["linear", 75]["by_slice"][0::2] == [None, None]
    assert rows["linear", 75]["slices"] == 1


def test_blocks_of_one_token_leave_nothing_to_fit(selector_bound, tmp_path):
    rows, _ = measure(selector_bound, tmp_path, compress_block_size=1, compress_stride=1)
    for way in ("tokens", "fitted", "linear"):
        assert rows[way, 75]["by_slice"][1] == pytest.approx(rows["mean", 75]["by_slice"][1], abs=1e-4)


def test_a_fitted_key_is_nearer_to_the_scores(selector_bound):
    torch.manual_seed(0)
    q, k = torch.randn(96, 2, 8), 2 * torch.randn(96, 8)
    scores = selector_bound._token_scores(q, k, 8, 4, 1.0)
    expected = torch.stack([(q @ k[i : i + 8].T).exp().mean(-1).log() for i in range(0, 89, 4)], dim=-1)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    mean = k.unfold(0, 8, 4).mean(-1)
    future = torch.zeros(96, 1, len(mean), dtype=torch.bool)
    change = selector_bound._fit_keys(q, scores, future, mean)
    weights = scores.softmax(-1)

    def error(keys):
        return (weights * (scores - q @ keys.T) ** 2).sum((0, 1))

    assert (error(mean + change) < error(mean)).all()
    linear = selector_bound._fit_keys(q, q @ (mean + 1).T, future, mean)  # exact but for the ridge
    assert (linear - 1).abs().mean() < 0.3


def test_the_command_line_writes_every_slice(selector_bound, tmp_path, capsys):
    source = make_checkpoint(tmp_path / "dense")
    arguments = [str(tmp_path / "bound.json"), "--source", str(source), "--device", "cpu"]
    assert selector_bound.main([*arguments, "--length", "1024"]) == 2
    assert "--length must be more than n·l' = 1024 tokens, got 1024" in capsys.readouterr().err
    assert selector_bound.main([*arguments, "--length", "1100", "--slices", "2"]) == 0
    rows = json.loads((tmp_path / "bound.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["way"], row["start"], row["end"]) for row in rows] == [
        (way, 1024, 1100) for way in ("mean", "tokens", "fitted", "linear")
    ]
    assert "fitted" in capsys.readouterr().out
