# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The model card tells what the records say, and nothing else."""

import json
from dataclasses import fields

import pytest
from huggingface_hub import ModelCard

from nsa_conversion.card import MARK, base_model_of, model_card, write_card
from nsa_conversion.errors import NSAError
from nsa_conversion.stages import StageArguments

CONFIG = {
    "model_type": "native_sparse_attention",
    "architectures": ["NSAForCausalLM"],
    "auto_map": {"AutoModel": "modeling_nsa.NSAModel"},
    "num_selected_blocks": 16,
    "select_block_size": 64,
    "window_size": 512,
    "layer_types": ["full_attention", "native_sparse_attention", "native_sparse_attention"],
}
CONVERSION = {
    "source": {
        "name": "owner/dense",
        "format": "safetensors",
        "model_type": "llama",
        "revision": "0123abcd",
        "license": "apache-2.0",
        "sha256": {"model.safetensors": "f" * 64},
    },
    "versions": {"transformers": "5.23.0", "nsa-transformers": None},
    "date": "2026-01-02T03:04:05+00:00",
}
TRAINING = {
    "report": {
        "steps": 12,
        "train_loss": 2.34567,
        "train_rows": 345,
        "train_tokens": 67890,
        "before": [{"start": 0, "end": 1024, "loss": 3.0}],
        "after": [{"start": 0, "end": 1024, "loss": 2.5}],
    },
    "arguments": {
        "model": {"model": "/home/somebody/private/model"},
        "data": {"max_length": 4096, "train_file": ["/home/somebody/private/text.txt"]},
        "lora": {"lora": True, "lora_r": 8},
        "stage": {"stage": "adapt", "teacher": "/home/somebody/private/dense", "selector_scope": "model"},
        "training": {"learning_rate": 1e-4, "output_dir": "/home/somebody/private/out", "seed": 42},
    },
}
EVALUATION = {
    "text": "/home/somebody/private/prose.txt",
    "length": 8192,
    "slices": 4,
    "positions": [{"start": 0, "end": 1024, "loss": 2.5}, {"start": 1024, "end": 8192, "loss": 2.25}],
    "against_positions": [{"start": 0, "end": 1024, "loss": 2.5}, {"start": 1024, "end": 8192, "loss": 2.125}],
    "retention": [
        {"name": "needle", "length": 4096, "dense": 0.9, "score": 0.81, "value": 0.9, "low": 0.85, "high": 0.95},
        {"name": "words", "length": 4096, "dense": 0.1, "score": 0.1, "value": None, "low": None, "high": None},
    ],
}


@pytest.fixture
def directory(tmp_path):
    def write(**records):
        for name, record in records.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(record))
        return tmp_path

    return write


def test_everything_that_is_recorded(directory):
    folder = directory(config=CONFIG, nsa_conversion=CONVERSION, nsa_finetune=TRAINING, eval=EVALUATION)
    card = model_card(folder, repo_id="me/tiny-nsa")
    data = card.data.to_dict()
    assert data["base_model"] == "owner/dense"
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert "native-sparse-attention" in data["tags"]
    (entry,) = data["model-index"]
    assert entry["name"] == "tiny-nsa"
    metrics = [metric for result in entry["results"] for metric in result["metrics"]]
    assert [(metric["type"], metric["value"]) for metric in metrics] == [
        ("loss", 2.5),
        ("loss", 2.25),
        ("retention", 0.9),
    ]
    for part in (
        'from_pretrained("me/tiny-nsa", trust_remote_code=True)',
        "| `layer_types` | 1 × full_attention, 2 × native_sparse_attention |",
        "[owner/dense](https://huggingface.co/owner/dense) at commit 0123abcd",
        "LoRA, 12 steps; 67,890 tokens in 345 packed rows. Mean training loss 2.3457.",
        "| `lora_r` | 8 |",
        "| `teacher` | dense |",
        "| `selector_scope` | model |",
        "| 0-1,023 | 3.0000 | 2.5000 |",
        "| 1,024-8,191 | 2.2500 | 2.1250 | +0.1250 |",
        "| needle | 4,096 | 0.900 | 0.810 | 90.0% (85.0% … 95.0%) |",
        "not compared: the dense model is near chance",
        "apache-2.0, as the base model.",
    ):
        assert part in card.content, part
    assert "/home/somebody" not in card.content
    # It survives the hub's own reader.
    assert ModelCard(card.content).data.to_dict() == data


def test_every_option_of_a_stage_is_told(directory):
    names = {each.name for each in fields(StageArguments)} - {"compile_layers"}
    arguments = {**TRAINING["arguments"], "stage": {**dict.fromkeys(names, 1), "teacher": "owner/dense"}}
    card = model_card(directory(config=CONFIG, nsa_finetune={**TRAINING, "arguments": arguments}))
    assert {name for name in names if f"| `{name}` |" in card.content} == names
    assert "| `teacher` | owner/dense |" in card.content


def test_what_is_not_recorded_is_left_out(directory):
    folder = directory(config={name: value for name, value in CONFIG.items() if name != "auto_map"})
    card = model_card(folder)
    assert card.data.base_model is None
    assert card.data.license is None
    assert card.data.eval_results is None
    assert "trust_remote_code" not in card.content
    assert "import modeling_nsa" in card.content
    for title in ("Conversion", "Training", "Evaluation"):
        assert f"## {title}" not in card.content
    assert "Not recorded" in card.content


@pytest.mark.parametrize(
    "architecture, task, auto_class",
    [
        ("NSAForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        ("NSAForTokenClassification", "token-classification", "AutoModelForTokenClassification"),
        ("NSAForQuestionAnswering", "question-answering", "AutoModelForQuestionAnswering"),
        ("NSAModel", "feature-extraction", "AutoModel"),
    ],
)
def test_the_task_is_that_of_the_class(directory, architecture, task, auto_class):
    card = model_card(directory(config=CONFIG | {"architectures": [architecture]}))
    assert card.data.pipeline_tag == task
    assert f"model = {auto_class}.from_pretrained" in card.content
    assert "generate" not in card.content


def test_a_dense_model_has_a_card_without_sparse_parts(directory):
    card = model_card(directory(config={"model_type": "llama"}, nsa_finetune=TRAINING), base_model="owner/dense")
    assert "A llama model, made from [owner/dense]" in card.content
    assert "trust_remote_code" not in card.content
    assert card.data.tags is None
    assert "12 steps" in card.content


def test_what_a_trained_model_came_from_is_kept(directory):
    origin = {"license": "mit", "base_model": "owner/dense"}
    card = model_card(directory(config={"model_type": "llama"}, nsa_finetune={**TRAINING, "origin": origin}))
    assert (card.data.base_model, card.data.license) == ("owner/dense", "mit")
    unknown = {"license": None, "base_model": None}
    card = model_card(directory(config={"model_type": "llama"}, nsa_finetune={**TRAINING, "origin": unknown}))
    assert (card.data.base_model, card.data.license) == (None, None)


def test_an_adapter(directory):
    card = model_card(directory(adapter_config={"base_model_name_or_path": "owner/base-nsa"}), repo_id="me/lora")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "owner/base-nsa"
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/lora", trust_remote_code=True)' in card.content


def test_the_nearest_base_model_wins_and_paths_are_none(directory):
    folder = directory(config=CONFIG, nsa_conversion=CONVERSION, nsa_finetune=TRAINING)
    assert base_model_of(folder) == "owner/dense"
    trained = {**TRAINING, "arguments": {**TRAINING["arguments"], "model": {"model": "owner/converted"}}}
    assert base_model_of(directory(nsa_finetune=trained)) == "owner/converted"
    gguf = {**CONVERSION["source"], "name": "owner/dense-gguf/file.gguf"}
    assert base_model_of(directory(nsa_conversion=CONVERSION | {"source": gguf}, nsa_finetune=TRAINING)) == (
        "owner/dense-gguf"
    )
    local = {**CONVERSION["source"], "name": "models/dense", "revision": None}
    assert base_model_of(directory(nsa_conversion=CONVERSION | {"source": local}, nsa_finetune=TRAINING)) is None


def test_a_card_of_ones_own_is_kept(directory):
    folder = directory(config=CONFIG)
    assert MARK in write_card(folder).read_text()
    assert write_card(folder, license="mit") is not None
    assert "license: mit" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    assert write_card(folder) is None
    assert (folder / "README.md").read_text() == "mine"
    (folder / "README.md").write_bytes(b"caf\xe9")
    assert write_card(folder) is None
    assert (folder / "README.md").read_bytes() == b"caf\xe9"


def test_records_of_others_are_ignored_and_broken_ones_refused(directory):
    folder = directory(config=CONFIG, nsa_conversion={"source": "somewhere"}, nsa_finetune=["something"])
    assert "## Conversion" not in model_card(folder).content
    (folder / "eval.json").write_text("{")
    with pytest.raises(NSAError, match=r"eval\.json is not valid JSON"):
        model_card(folder)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(NSAError, match=r"neither config\.json nor adapter_config\.json"):
        model_card(tmp_path)
