# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Verification of conversions: equal where they must be, and found out where they are not."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from nsa_conversion import convert, verify
from nsa_conversion.cli import main
from nsa_conversion.errors import NSAError

TEXT = "The committee met on Tuesday; nothing was decided, except that it would meet again. " * 20


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    source = tiny.make_checkpoint(root / "source", "qwen3", dtype=torch.bfloat16)
    convert(source, root / "nsa", progress=False, **tiny.SMALL_NSA)
    return source, root / "nsa"


def test_report_of_a_sound_conversion(pair):
    report = verify(*pair, text=TEXT, length=300)
    assert report.exact is True
    assert report.exact_tokens == 32
    assert report.max_abs_logit_diff <= 1e-4 * report.max_abs_logit
    assert report.length == 300
    source, nsa = report.losses["source"], report.losses["NSA"]
    assert [(bucket.start, bucket.end) for bucket in source] == [(0, 256), (256, 300)]
    assert source[1].loss != pytest.approx(nsa[1].loss, abs=1e-3)
    text = str(report)
    assert "max |Δlogit| over 32 tokens" in text
    assert "equal" in text
    assert "NSA - source" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["losses"]["NSA"][0]["start"] == 0


def test_default_length_is_four_times_the_selection(pair):
    report = verify(*pair, text=TEXT)
    assert report.length == 128
    assert report.text == "the given text"
    assert verify(*pair).text == "built-in text"


def test_a_changed_weight_is_found(pair, tmp_path):
    source, nsa = pair
    state = load_file(nsa / "model.safetensors")
    state["model.layers.1.self_attn.v_proj.weight"][0, 0] += 0.5
    for path in nsa.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    report = verify(source, tmp_path, text=TEXT, length=64)
    assert report.exact is False
    assert "NOT equal" in str(report)


def test_rounded_weights_get_no_verdict(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "llama")
    convert(source, tmp_path / "nsa", progress=False, dtype="bfloat16", **tiny.SMALL_NSA)
    report = verify(source, tmp_path / "nsa", text=TEXT, length=64)
    assert report.exact is None
    assert report.max_abs_logit_diff > 0
    assert "rounded" in str(report)


def test_without_gate_scales_no_equality_is_expected(tmp_path, capsys):
    source = tiny.make_checkpoint(tmp_path / "source", "llama")
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in tiny.SMALL_NSA.items()]
    arguments = ["convert", str(source), str(tmp_path / "nsa"), *sizes, "--no-gate-scale", "--no-progress"]
    assert main([*arguments, "--verify", "--verify-length", "64"]) == 0
    assert "does not start out equal" in capsys.readouterr().out


def test_a_source_that_names_no_dtype_is_judged_by_its_tensors(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    for dtype, exact in ((None, True), ("bfloat16", None)):
        convert(source, tmp_path / str(dtype), progress=False, dtype=dtype, **tiny.SMALL_NSA)
        assert verify(source, tmp_path / str(dtype), text=TEXT, length=64).exact is exact


def test_the_home_directory_may_be_written_as_a_tilde(pair, monkeypatch):
    source, nsa = pair
    monkeypatch.setenv("HOME", str(source.parent))
    assert verify(f"~/{source.name}", f"~/{nsa.name}", text=TEXT, length=40).exact is True


def test_without_tokenizer_random_tokens_are_used(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "llama", tokenizer=False)
    convert(source, tmp_path / "nsa", progress=False, **tiny.SMALL_NSA)
    report = verify(source, tmp_path / "nsa")
    assert report.exact is True
    assert report.text == "random tokens"
    with pytest.raises(NSAError, match="no tokenizer"):
        verify(source, tmp_path / "nsa", text=TEXT)


def test_converted_sliding_layers_are_compared_inside_their_window(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "mistral", sliding_window=9)
    convert(source, tmp_path / "nsa", progress=False, convert_sliding=True, **tiny.SMALL_NSA)
    report = verify(source, tmp_path / "nsa", text=TEXT, length=64)
    assert report.exact_tokens == 9
    assert report.exact is True


def test_pickle_source_needs_the_flag_here_too(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "llama")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    convert(source, tmp_path / "nsa", progress=False, allow_pickle=True, **tiny.SMALL_NSA)
    with pytest.raises(NSAError, match="--allow-pickle"):
        verify(source, tmp_path / "nsa")
    assert verify(source, tmp_path / "nsa", text=TEXT, length=40, allow_pickle=True).exact is True


def test_bad_requests(pair, tmp_path):
    source, nsa = pair
    with pytest.raises(NSAError, match="at least 2 tokens, got 1"):
        verify(source, nsa, length=1)
    with pytest.raises(NSAError, match="at least 2 tokens, got"):
        verify(source, nsa, text="")
    with pytest.raises(NSAError, match="not a converted model"):
        verify(source, source)
    with pytest.raises(NSAError, match=r"no config.json"):
        verify(source, tmp_path)
