# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import SMALL_NSA, make_checkpoint, make_tokenizer

from nsa_conversion.data import builtin_text


@pytest.fixture
def selector_study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "conversion"))
    yield importlib.import_module("selector_study")
    sys.modules.pop("selector_study", None)


def test_training_a_design_finds_more_than_its_start(selector_study, tmp_path):
    dense = make_checkpoint(tmp_path / "dense")
    lines = [json.dumps({"text": builtin_text()[i : i + 400]}) + "\n" for i in range(0, 1600, 400)]
    (tmp_path / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    from nsa_conversion import load_model

    _, tokenizer = load_model(dense, dtype="float32", device="cpu")
    texts = selector_study._texts(str(tmp_path / "texts.jsonl"), tokenizer, 160, 2)
    sizes = {name: value for name, value in SMALL_NSA.items() if not name.startswith("compress_")}
    sizes |= {"compress_block_size": 4, "compress_stride": 2}
    designs = {"designs": ["mean", "pool mass"], "sizes": sizes, "steps": 60, "queries": 64, "progress": False}
    needle = selector_study.Needle(texts[0], torch.tensor([150, 155]), torch.tensor([[60, 61]]))
    rows = selector_study.study(texts, texts, source=dense, needles=[needle], **designs)
    hidden = [row for row in rows if row["queries"] == "needle"]
    assert [(row["design"], row["layer"]) for row in hidden] == [(d, i) for d in ("mean", "pool mass") for i in (0, 1)]
    assert all(0 <= row["found"] <= row["taken"] <= 2 * 2 for row in hidden)  # queries times groups
    rows = [row for row in rows if row["queries"] != "needle"]
    assert {(row["design"], row["layer"]) for row in rows} == {(d, i) for d in ("mean", "pool mass") for i in (0, 1)}
    assert any(row["queries"] == "copy" for row in rows)
    for row in rows:
        assert row["mass_recall"] <= row["dense_mass_recall"] + 1e-5
        assert row["error"] >= 0

    def recall(design):
        return sum(row["mass_recall"] for row in rows if row["design"] == design)

    assert recall("pool mass") > recall("mean")
    assert torch.equal(texts[0], selector_study._texts(str(tmp_path / "texts.jsonl"), tokenizer, 160, 2)[0])


def test_practice_changes_texts_and_not_their_length(selector_study, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": builtin_text()[:20000]}) + "\n", encoding="utf-8")
    tokenizer, length = make_tokenizer(tmp_path), 3600
    made = {
        name: selector_study._texts(str(tmp_path / "texts.jsonl"), tokenizer, length, 1, name)[0]
        for name in selector_study.PRACTICE
    }
    assert {len(ids) for ids in made.values()} == {length}
    assert torch.equal(made["passage"], made["none"])  # of every second text
    half = length // 2
    assert torch.equal(made["passages"][:half], made["none"][:half])
    assert len(selector_study._copy_queries(made["passages"], 1500)) > len(
        selector_study._copy_queries(made["none"], 1500)
    )
    assert not torch.equal(made["facts"], made["none"])


def test_needles_point_to_the_number(selector_study, tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    for ids, positions, places in selector_study._needles(tokenizer, 1500, 1):
        number = tokenizer.decode(ids[places[0]])
        assert number.isdigit()
        assert len(number) == 5
        assert number in tokenizer.decode(ids[positions + 1])
        assert places.max() < positions.min()
