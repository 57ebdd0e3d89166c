# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import SMALL_NSA, make_checkpoint

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
    rows = selector_study.study(texts, texts, source=dense, **designs)
    assert {(row["design"], row["layer"]) for row in rows} == {(d, i) for d in ("mean", "pool mass") for i in (0, 1)}
    assert any(row["queries"] == "copy" for row in rows)
    for row in rows:
        assert row["mass_recall"] <= row["dense_mass_recall"] + 1e-5
        assert row["error"] >= 0

    def recall(design):
        return sum(row["mass_recall"] for row in rows if row["design"] == design)

    assert recall("pool mass") > recall("mean")
    assert torch.equal(texts[0], selector_study._texts(str(tmp_path / "texts.jsonl"), tokenizer, 160, 2)[0])
