# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest

from nsa_conversion.diagnosis import NEIGHBOURS, Diagnosis
from nsa_conversion.loss import PositionBucket, RecallGroup
from nsa_conversion.report import EvaluationReport
from nsa_conversion.tasks import TaskResult


def buckets(*losses):
    return [
        PositionBucket(256 * i, 256 * (i + 1), loss, 512, (loss - 0.1, loss + 0.1), (256, 256))
        for i, loss in enumerate(losses)
    ]


def recall(loss):
    return [RecallGroup("seen", loss, 2, (loss, loss), (1, 1)), RecallGroup("new", None, 0, (0.0, 0.0), (0, 0))]


def results(score):
    """Sixteen trials per cell, at two depths and two lengths of one task, and at one length of another."""
    cells = [("passkey", length, depth) for length in (1000, 2000) for depth in (0.0, 1.0)] + [("multikey", 1000, None)]
    return [TaskResult(*cell, 0.0, (1.0,) * round(16 * score) + (0.0,) * round(16 - 16 * score)) for cell in cells]


@pytest.fixture
def report():
    diagnosis = Diagnosis(
        layers=[0, 2],
        tokens=100,
        block_recall=[[0.5, 0.7], [0.9, 0.9]],
        mass_recall=[[0.8] * 4, [0.9] * 4],
        dense_mass_recall=[[0.9] * 4, [1.0] * 4],
        gate_mean=[[[0.0, 1.0, 0.25]] * 4] * 2,
        gate_std=[[[0.0, 0.1, 0.1]] * 4] * 2,
        unions={str(size): [[size, size + 1]] * 2 for size in NEIGHBOURS},
        losses={"own": buckets(2.0, 1.5), "oracle": buckets(2.0, 1.25), "recent": buckets(2.0, 1.75)},
    )
    return EvaluationReport(
        models={"dense": "some/dense", "<sparse>": "runs/sparse"},
        model="<sparse>",
        against="dense",
        texts={"prose.txt": [512, 512]},
        settings={"seed": 0, "length": 512},
        environment={"device": "cpu"},
        positions={"prose.txt": {"dense": buckets(2.0, 1.0), "<sparse>": buckets(2.0, 1.5)}},
        recall={"prose.txt": {"dense": recall(0.5), "<sparse>": recall(0.75)}},
        tasks={"dense": results(1.0), "<sparse>": results(0.75)},
        diagnosis={"prose.txt": {"<sparse>": diagnosis}},
        suites={"dense": {"arc": {"acc,none": 0.5, "alias": "arc"}}, "<sparse>": {"arc": {"acc,none": 0.25}}},
    )


def lines(text, start):
    """Lines of single-spaced cells that begin so."""
    return [line for line in (" ".join(line.split()) for line in text.splitlines()) if line.startswith(start)]


def test_tables_say_what_was_measured(report):
    text = report.text()
    assert lines(text, "256-511")[0] == "256-511 1.0000 1.5000 +0.5000 +0.5000 … +0.5000 512"
    assert lines(text, "seen") == ["seen 0.5000 0.7500 +0.2500 +0.2500 … +0.2500 2"]
    assert lines(text, "passkey, first third")[0] == "passkey, first third 1,000 0.000 1.000 0.750 16"
    assert lines(text, "passkey 1,000")[0] == "passkey 1,000 0.000 1.000 0.750 32"
    assert lines(text, "passkey 1,000")[1].startswith("passkey 1,000 75.0% ")
    assert lines(text, "average of 3")[0].startswith("average of 3 75.0% ")
    assert lines(text, "2 0.900") == ["2 0.900 0.900 1.000 0.000 1.000 0.250 2.500 4.500 8.500 16.500"]
    assert lines(text, "256-511")[1] == (
        "256-511 1.5000 1.2500 1.7500 -0.2500 -0.2500 … -0.2500 +0.2500 +0.2500 … +0.2500 512"
    )
    assert lines(text, "arc") == ["arc acc,none 0.5000 0.2500"]


def test_json_starts_with_the_first_model_on_the_first_text(report):
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["model"], data["against"], data["text"]) == ("runs/sparse", "some/dense", "prose.txt")
    assert (data["length"], data["slices"]) == (512, 2)
    assert (data["loss"], data["against_loss"]) == (1.75, 1.5)
    assert data["positions"][1]["loss"] == 1.5
    assert data["difference_95"][1] == pytest.approx([0.5, 0.5])
    assert data["retention"] == data["retention_by_model"]["<sparse>"]
    assert data["retention"][0]["value"] == 0.75
    assert data["positions_by_text"]["prose.txt"]["dense"][1]["loss"] == 1.0
    assert data["recall_by_text"]["prose.txt"]["<sparse>"][0]["loss"] == 0.75
    assert data["tasks"]["dense"][0]["mean"] == 1.0
    assert data["diagnosis"]["prose.txt"]["<sparse>"]["losses"]["oracle"][1]["loss"] == 1.25


def test_html_needs_no_other_file(report, tmp_path):
    json_path, html_path = report.save(tmp_path / "new")
    assert json.loads(json_path.read_text())["model"] == "runs/sparse"
    page = html_path.read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == 5  # positions, scores, passkey by depth, recall and gates
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert not re.search(r"https?:|href=|<script", page)
    assert "&lt;sparse&gt;" in page
    assert "<sparse>" not in page


def test_one_model_alone_has_neither_differences_nor_retention(report):
    report.models, report.against = {"<sparse>": "runs/sparse"}, None
    for by_label in (report.positions["prose.txt"], report.recall["prose.txt"], report.tasks, report.suites):
        by_label.pop("dense")
    text = report.text()
    assert "retention" not in text
    assert lines(text, "256-511")[0] == "256-511 1.5000 512"
    assert not {"against_loss", "retention", "difference_95"} & report.to_dict().keys()
    assert report.html().count("<img") == 5
