# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import sys
from pathlib import Path

import pytest
from tiny import SMALL_NSA, make_checkpoint

from nsa_conversion import convert, load_model
from nsa_conversion.data import builtin_text
from nsa_conversion.tasks import make_trials, run_task

LENGTH = 420


@pytest.fixture
def needle_study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "conversion"))
    yield importlib.import_module("needle_study")
    sys.modules.pop("needle_study", None)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    convert(make_checkpoint(root / "dense"), root / "nsa", progress=False, **SMALL_NSA)
    return root


def test_every_prompt_is_asked_and_the_lost_ones_once_more(needle_study, places, tmp_path, capsys):
    """The prompts and the scores are those of `nsa eval`."""
    output = tmp_path / "needles.json"
    sizes = {"length": LENGTH, "depths": 3, "trials": 4, "found": 2}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    flags += ["--dense", str(places / "dense"), "--dtype", "float32"]
    assert needle_study.main([str(output), str(places / "nsa"), *flags]) == 0
    made = json.loads(output.read_text())
    assert made["settings"]["length"] == LENGTH
    assert made["settings"]["dtype"] == "float32"
    rows = made["prompts"]
    assert [(row["depth"], row["trial"]) for row in rows] == [(d, i) for d in (0.0, 0.5, 1.0) for i in range(4)]
    for name, key in (("nsa", "margin"), ("dense", "dense_margin")):
        model, tokenizer = load_model(places / name)
        for depth in (0.0, 0.5, 1.0):
            result = run_task(model, tokenizer, builtin_text(), "needle_choice", LENGTH, depth, trials=4)
            own = [row[key] for row in rows if row["depth"] == depth]
            assert [float(margin > 0) for margin in own] == list(result.scores)
    lost = [row for row in rows if row["margin"] <= 0]
    looked_at = [row for row in rows if "layers" in row]
    assert lost
    assert all(row in looked_at for row in lost)
    assert len(looked_at) <= len(lost) + 2
    for row in looked_at:
        assert [(entry["layer"], entry["head"]) for entry in row["layers"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert all(0 <= entry["chosen"] <= entry["mass"] + 1e-4 for entry in row["layers"])
    assert output.with_suffix(".png").stat().st_size > 5000
    assert f"lost: {len(lost)} of 12" in capsys.readouterr().out


def test_with_all_blocks_nothing_is_left_out(needle_study, places):
    model, tokenizer = load_model(places / "nsa")
    model.config.num_selected_blocks = LENGTH
    (trial,) = make_trials("needle_choice", tokenizer, builtin_text(), LENGTH, depth=0.3, trials=1)
    for entry in needle_study.attention_to_number(model, tokenizer, trial):
        assert entry["chosen"] == pytest.approx(entry["mass"], abs=1e-6)
    own = needle_study.margin(model, tokenizer, trial)
    dense, _ = load_model(places / "dense")
    assert own == pytest.approx(needle_study.margin(dense, tokenizer, trial), abs=1e-3)


def test_nothing_to_look_at(needle_study, places, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(needle_study, "margin", lambda *_: 1.0)
    command = [str(tmp_path / "out.json"), str(places / "nsa"), "--length", str(LENGTH), "--depths", "1"]
    assert needle_study.main([*command, "--trials", "2", "--found", "0", "--dtype", "float32"]) == 0
    assert "lost: 0 of 2" in capsys.readouterr().out
    assert not (tmp_path / "out.png").exists()


def test_a_dense_model_is_refused(needle_study, places, tmp_path, capsys):
    assert needle_study.main([str(tmp_path / "out.json"), str(places / "dense"), "--length", str(LENGTH)]) == 2
    assert "needs sparse layers" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_mistakes_are_told_before_the_work(needle_study, places, tmp_path, capsys):
    assert needle_study.main([str(tmp_path / "no" / "out.json"), str(places / "nsa")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert needle_study.main([str(tmp_path / "out.json"), str(places / "nsa"), "--found", "-1"]) == 2
    assert "found not negative, got 6 and -1" in capsys.readouterr().err
