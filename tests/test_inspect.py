# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What `nsa inspect` draws is what the model does."""

import pytest
import torch
from test_finetune import make_nsa
from tiny import make_checkpoint, make_tokenizer
from tiny_nsa import make_model

from nsa_conversion import cli
from nsa_conversion.data import builtin_text
from nsa_conversion.diagnosis import diagnose
from nsa_conversion.errors import NSAError
from nsa_conversion.inspect import inspect_text
from nsa_conversion.sources import load_model

TEXT = builtin_text()[:400]


@pytest.fixture(scope="module", params=[False, True], ids=["separate", "shared"])
def loaded(request, tmp_path_factory):
    kinds = ["native_sparse_attention", "full_attention"]
    return load_model(make_nsa(tmp_path_factory.mktemp("model"), shared_kv=request.param, layer_types=kinds))


@pytest.fixture(scope="module")
def found(loaded):
    return inspect_text(*loaded, TEXT, length=90)


def test_selection_and_gates_are_those_of_the_model(loaded, found):
    model, tokenizer = loaded
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :90]
    outputs = model(ids, output_block_indices=True, output_gates=True, use_cache=False)
    assert (found.layers, found.tokens, len(found.pieces)) == ([0], 90, 12)
    for t in (0, 31, 60, 89):
        heads = [set(row.tolist()) - {-1} for row in outputs.block_indices[0][0, t]]
        share = [sum(block in head for head in heads) / len(heads) for block in range(12)]
        assert found.selected[0][t].tolist() == pytest.approx(share)
    torch.testing.assert_close(found.gates[0], outputs.gates[0][0].float().mean(0))
    assert "".join(found.pieces) == tokenizer.decode(ids[0])


@pytest.mark.parametrize("variant", ["separate", "qwen3-like", "mean", "shared"])
def test_the_selection_follows_the_importance(tmp_path, variant):
    model = make_model(variant, num_key_value_heads=1, vocab_size=272, num_selected_blocks=5)
    found = inspect_text(model, make_tokenizer(tmp_path), TEXT, length=90)
    for selected, scores in zip(found.selected, found.importance):
        forced = {0, 10, 11}
        best = [block for block in scores[-1].argsort(descending=True).tolist() if block not in forced][:2]
        assert selected[-1].nonzero().flatten().tolist() == sorted({*best, *forced})


def test_kept_mass_is_what_the_diagnosis_finds(loaded):
    model, tokenizer = loaded
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0, :90]
    config = model.config
    reach = config.num_selected_blocks * config.select_block_size
    found = inspect_text(model, tokenizer, TEXT, length=90)
    (recall,) = diagnose(model, [ids], [0, 90]).mass_recall
    assert found.kept[0][:reach].tolist() == pytest.approx([1] * reach, abs=1e-5)
    assert found.kept[0][reach:].mean() == pytest.approx(sum(recall) / len(recall), abs=1e-5)


def test_importance_and_mass_are_shares(loaded, found):
    size = loaded[0].config.compress_block_size
    assert torch.allclose(found.mass[0].sum(-1), torch.ones(90), atol=1e-5)
    assert torch.allclose(found.importance[0].sum(-1)[size:], torch.ones(()), atol=1e-5)
    assert found.importance[0][: size - 1].eq(0).all()


def test_masks_count_the_tokens_that_a_query_sees(found):
    masks, size = found.masks(0), found.config.select_block_size
    assert masks["window"].sum(-1).mul(size).tolist() == pytest.approx(
        [min(t + 1, found.config.window_size) for t in range(90)]
    )
    assert masks["compressed"][:3].eq(0).all()
    assert masks["compressed"][3].sum() * size == 4
    assert masks["selected"][20, :3].tolist() == pytest.approx([1, 1, 5 / 8])


def test_page_from_the_command_line(tmp_path, capsys):
    model, page, text = make_nsa(tmp_path / "model"), tmp_path / "page.html", tmp_path / "text.txt"
    text.write_text("a < b & c " * 20)
    command = ["inspect", str(model), "--text", str(text), "--output", str(page), "--length", "80"]
    assert cli.main(command) == 0
    assert "80 tokens, 2 sparse layers" in capsys.readouterr().out
    content = page.read_text(encoding="utf-8")
    assert content.count("data:image/png;base64,") == 5
    assert "a &lt; b" in content
    assert "http" not in content
    assert cli.main(command) == 2
    assert "exists; choose another file or add --overwrite" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0


def test_what_cannot_be_inspected(tmp_path, loaded):
    dense, tokenizer = load_model(make_checkpoint(tmp_path / "dense"))
    with pytest.raises(NSAError, match="has no layers of native sparse attention"):
        inspect_text(dense, tokenizer, TEXT)
    with pytest.raises(NSAError, match="at least 4 are needed"):
        inspect_text(*loaded, "a")
    with pytest.raises(NSAError, match="length must be at least 1"):
        inspect_text(*loaded, TEXT, length=0)
