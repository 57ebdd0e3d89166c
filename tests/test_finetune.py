# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import SMALL_NSA, make_checkpoint, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, SchedulerType

from modeling_nsa import NSAConfig, NSAForCausalLM
from nsa_conversion import finetune
from nsa_conversion.data import builtin_text, encode_documents
from nsa_conversion.errors import NSAError
from nsa_conversion.finetune import FinetuneArguments, main

finetune_module = importlib.import_module("nsa_conversion.finetune")
ROOT = Path(__file__).parents[1]
QUIET = {"disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
# More than n * l' = 32 tokens, so that selection is exercised.
SHORT = {"max_length": 96, "max_steps": 3, "eval_slices": 2, "learning_rate": 1e-3}


def make_nsa(path, dtype=torch.float32, **changes):
    """Save a tiny random NSA checkpoint with tokenizer, generation config and conversion record."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 272,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "gate_scale": True,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    config = NSAConfig(**{**settings, **SMALL_NSA, **changes})
    model = NSAForCausalLM(config).to(dtype)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(path)
    make_tokenizer(path)
    (path / "nsa_conversion.json").write_text('{"source": "somewhere"}')
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_nsa(tmp_path_factory.mktemp("nsa") / "model")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text(builtin_text()[:6000], encoding="utf-8")
    return path


def states_equal(left, right):
    left, right = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (left, right))
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_trains_and_leaves_a_directory_that_loads(tmp_path, checkpoint, text_file):
    output = tmp_path / "out"
    report = finetune(checkpoint, output, train_file=text_file, **SHORT, **QUIET)
    assert report.steps == 3
    assert report.adapter_dir is None
    assert [bucket.start for bucket in report.before] == [bucket.start for bucket in report.after] == [0]
    assert report.after[0].loss < report.before[0].loss

    model = AutoModelForCausalLM.from_pretrained(output)
    source = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model) is NSAForCausalLM
    assert not states_equal(output, checkpoint)
    model.config._name_or_path = source.config._name_or_path
    assert model.config.to_dict() == source.config.to_dict()  # Trainer's changes are undone
    assert model.generation_config.to_dict() == source.generation_config.to_dict()
    assert model.config.use_cache is True
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(checkpoint).chat_template
    assert json.loads((output / "nsa_conversion.json").read_text()) == {"source": "somewhere"}
    assert model.generate(tokenizer("Hello", return_tensors="pt")["input_ids"], do_sample=False).shape[1] <= 5 + 7

    history = json.loads((output / "log_history.json").read_text())
    assert len([entry for entry in history if "loss" in entry]) == 3
    record = json.loads((output / "nsa_finetune.json").read_text())
    assert record["report"]["steps"] == 3
    assert record["arguments"]["data"]["max_length"] == 96
    for name in ("loss_curve.png", "loss_by_position.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert not (output / finetune_module.STAGING_DIR).exists()


@pytest.mark.parametrize("source", ["nsa", "dense"])
def test_first_loss_is_the_loss_of_the_documents_one_by_one(tmp_path, checkpoint, source):
    lines = [builtin_text()[i : i + length] for i, length in ((0, 70), (500, 20), (900, 33), (2000, 40), (3000, 9))]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    model_path = checkpoint if source == "nsa" else make_checkpoint(tmp_path / "dense", "llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    total = count = 0
    with torch.no_grad():
        for document in encode_documents(lines, tokenizer, progress=False):
            ids = torch.from_numpy(document).long()[None]
            total += model(input_ids=ids, labels=ids).loss.item() * (len(document) - 1)
            count += len(document) - 1
    finetune(
        model_path,
        tmp_path / "out",
        train_file=path,
        eval_fraction=0,
        max_length=100,
        max_steps=1,
        per_device_train_batch_size=8,
        **QUIET,
    )
    history = json.loads((tmp_path / "out" / "log_history.json").read_text())
    assert history[0]["loss"] == pytest.approx(total / count, abs=2e-4)


def test_resume_continues_as_if_never_stopped(tmp_path, checkpoint, text_file):
    output = tmp_path / "out"
    settings = {**SHORT, "max_steps": 4, **QUIET, "save_strategy": "steps", "save_steps": 2, "train_file": text_file}
    settings |= {"eval_slices": 0, "weight_decay": 0.1}
    finetune(checkpoint, output, **settings)
    whole = tmp_path / "whole"
    shutil.copytree(output, whole)
    losses = [entry["loss"] for entry in json.loads((output / "log_history.json").read_text()) if "loss" in entry]

    shutil.rmtree(output / "checkpoint-4")
    (output / "config.json").unlink()
    report = finetune(checkpoint, output, **settings, resume_from_checkpoint="true")
    assert report.steps == 4
    assert states_equal(output, whole)
    resumed = [entry["loss"] for entry in json.loads((output / "log_history.json").read_text()) if "loss" in entry]
    assert resumed == losses


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}])
def test_a_training_that_has_ended_takes_no_further_step(tmp_path, checkpoint, text_file, length):
    output = tmp_path / "out"
    settings = {**SHORT, **QUIET, "save_strategy": "steps", "save_steps": 1, "eval_slices": 0, "train_file": text_file}
    settings |= {"gradient_accumulation_steps": 9, **length}
    steps = finetune(checkpoint, output, **settings).steps
    whole = shutil.copytree(output, tmp_path / "whole")
    (output / "config.json").unlink()  # as if it was killed before the model was saved
    assert finetune(checkpoint, output, **settings, resume_from_checkpoint="true").steps == steps
    assert states_equal(output, whole)
    # and where fewer steps are asked for than were taken
    settings |= {"max_steps": 1, "resume_from_checkpoint": output / f"checkpoint-{steps}"}
    assert finetune(checkpoint, tmp_path / "fewer", **settings).steps == steps
    assert states_equal(tmp_path / "fewer", whole)


@pytest.mark.parametrize("rest", [("model.safetensors",), ("model.safetensors", "trainer_state.json"), ()])
def test_a_kill_while_a_checkpoint_is_written_costs_no_more_than_it(tmp_path, checkpoint, text_file, rest):
    output = tmp_path / "out"
    settings = {**SHORT, **QUIET, "save_strategy": "steps", "save_steps": 1, "eval_slices": 0, "train_file": text_file}
    finetune(checkpoint, output, **settings)
    whole = shutil.copytree(output, tmp_path / "whole")
    shutil.rmtree(output / "checkpoint-2")
    for path in (output / "checkpoint-3").iterdir():
        if path.name in rest:
            path.write_bytes(path.read_bytes()[:-9])
        else:
            path.unlink()
    with pytest.raises(NSAError, match="checkpoint-3 was not written to its end"):
        finetune(checkpoint, output, **settings, resume_from_checkpoint=output / "checkpoint-3")
    assert finetune(checkpoint, output, **settings, resume_from_checkpoint="true").steps == 3
    assert states_equal(output, whole)
    assert finetune_module.last_whole_checkpoint(output) == output / "checkpoint-3"
    (output / "checkpoint-x").mkdir()
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3"):
        (output / name / "trainer_state.json").unlink()
    with pytest.raises(NSAError, match="there is no checkpoint in"):
        finetune(checkpoint, output, **settings, resume_from_checkpoint="true")


@pytest.mark.parametrize("source", ["nsa", "nsa_shared_mean", "dense"])
def test_lora_merges_into_a_model_equal_to_the_adapter(tmp_path, checkpoint, text_file, source):
    from peft import PeftModel

    if source == "nsa":
        model_path = checkpoint
    elif source == "dense":
        model_path = make_checkpoint(tmp_path / "dense", "qwen3")
    else:
        model_path = make_nsa(tmp_path / "shared", shared_kv=True, compress_type="mean")
    output = tmp_path / "out"
    # A large step, so that adapters and new modules move visibly.
    settings = {**SHORT, "learning_rate": 1e-2, "lora_dropout": 0.1}
    report = finetune(model_path, output, train_file=text_file, lora=True, lora_r=4, **settings, **QUIET)
    assert report.adapter_dir == output / "adapter"

    ids = torch.arange(3, 83)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(output)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(model_path)
        before = base(ids).logits
        adapter = PeftModel.from_pretrained(base, report.adapter_dir)
        torch.testing.assert_close(merged, adapter(ids).logits, rtol=1e-4, atol=1e-4)
    assert (merged - before).abs().max() > 1e-2
    assert not any("lora" in name for name, _ in AutoModelForCausalLM.from_pretrained(output).named_parameters())
    if source == "nsa":
        saved = {name for name, _ in adapter.named_parameters() if "modules_to_save.default" in name}
        for module in ("compress_k", "compress_v", "gate", "gate_scale"):
            assert any(f"self_attn.{module}.modules_to_save" in name for name in saved), module
        assert not any("gate_proj.modules_to_save" in name for name in saved)
        adapted = {name for name, _ in adapter.named_parameters() if "lora_A" in name}
        for layer in finetune_module.LORA_TARGETS + finetune_module.LORA_BRANCH_TARGETS:
            assert any(f".{layer}.lora_A" in name for name in adapted), layer
        # The new modules were trained, not only saved.
        key = "base_model.model.model.layers.0.self_attn.gate_scale.modules_to_save.default.bias"
        scale = dict(adapter.named_parameters())[key]
        assert not torch.equal(scale, base.get_parameter("model.layers.0.self_attn.gate_scale.original_module.bias"))


def test_lora_resumes(tmp_path, checkpoint, text_file):
    settings = {**SHORT, **QUIET, "save_strategy": "steps", "save_steps": 1, "train_file": text_file, "lora": True}
    settings |= {"eval_slices": 0}
    finetune(checkpoint, tmp_path / "whole", **settings)
    finetune(
        checkpoint, tmp_path / "resumed", **settings, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1")
    )
    assert states_equal(tmp_path / "whole", tmp_path / "resumed")


def test_lora_with_gradient_checkpointing_trains_the_same(tmp_path, checkpoint, text_file):
    settings = {**SHORT, **QUIET, "train_file": text_file, "lora": True, "eval_slices": 0}
    losses = []
    for name, extra in (("plain", {}), ("checkpointed", {"gradient_checkpointing": True})):
        finetune(checkpoint, tmp_path / name, **settings, **extra)
        history = json.loads((tmp_path / name / "log_history.json").read_text())
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_peft_knows_the_model_type_without_target_modules(checkpoint):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), LoraConfig(r=2))
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == set(finetune_module.LORA_TARGETS + finetune_module.LORA_BRANCH_TARGETS)


def test_weight_decay_leaves_the_gate_scales_alone(tmp_path, checkpoint):
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {
        names[parameter]
        for group in trainer.create_optimizer().param_groups
        if group["weight_decay"] > 0
        for parameter in group["params"]
    }
    scales = [name for name in names.values() if "gate_scale" in name]
    assert len(scales) == model.config.num_hidden_layers
    assert not decayed & set(scales)
    assert "model.layers.0.self_attn.q_proj.weight" in decayed


def test_every_new_parameter_moves_within_three_steps(tmp_path, text_file):
    from nsa_conversion import convert

    source = make_checkpoint(tmp_path / "dense", "llama")
    convert(str(source), str(tmp_path / "nsa"), **SMALL_NSA)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "nsa").state_dict()
    finetune(tmp_path / "nsa", tmp_path / "out", train_file=text_file, **SHORT, **QUIET)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    dense = AutoModelForCausalLM.from_pretrained(source).state_dict()
    new = sorted(set(after) - set(dense))
    assert any("gate_scale" in name for name in new)
    assert [name for name in new if torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize(("save_dtype", "expected"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_saves_in_the_type_of_the_source(tmp_path, text_file, save_dtype, expected):
    source = make_nsa(tmp_path / "nsa", dtype=torch.bfloat16)
    finetune(source, tmp_path / "out", train_file=text_file, save_dtype=save_dtype, **SHORT, **QUIET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.config.dtype == expected


def test_warns_when_selection_is_never_exercised(tmp_path, caplog, checkpoint, text_file):
    finetune(checkpoint, tmp_path / "short", train_file=text_file, **{**SHORT, "max_length": 32}, **QUIET)
    assert "max_length 32 is not more than n * l' = 4 * 8 = 32 tokens" in caplog.text
    caplog.clear()
    finetune(checkpoint, tmp_path / "long", train_file=text_file, **{**SHORT, "max_length": 33}, **QUIET)
    assert "n * l'" not in caplog.text


def test_evaluates_on_a_file_of_its_own(tmp_path, checkpoint, text_file):
    (tmp_path / "eval.txt").write_text(builtin_text()[9000:9300], encoding="utf-8")
    settings = {"train_file": text_file, "eval_file": tmp_path / "eval.txt", **SHORT, **QUIET}
    report = finetune(checkpoint, tmp_path / "out", **settings, eval_strategy="steps", eval_steps=1)
    assert sum(bucket.count for bucket in report.before) == 2 * 95
    assert report.train_tokens == len(text_file.read_bytes()) + 1  # nothing is held out
    history = json.loads((tmp_path / "out" / "log_history.json").read_text())
    assert len([entry for entry in history if "eval_loss" in entry]) == 3


def test_chats_and_datasets_train_too(tmp_path, checkpoint):
    datasets = pytest.importorskip("datasets")
    chat = [{"role": "user", "content": "Hello?" * 9}, {"role": "assistant", "content": "Hi." * 9}]
    datasets.Dataset.from_dict({"messages": [chat] * 8}).save_to_disk(tmp_path / "data")
    report = finetune(checkpoint, tmp_path / "out", dataset=tmp_path / "data", **SHORT, **QUIET)
    assert report.train_rows > 1


def test_refuses_a_full_output_and_never_the_source(tmp_path, checkpoint, text_file):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    settings = {"train_file": text_file, **SHORT, **QUIET}
    with pytest.raises(NSAError, match=r"is not empty.*--resume-from-checkpoint.*--overwrite"):
        finetune(checkpoint, output, **settings)
    with pytest.raises(NSAError, match="is the model itself"):
        finetune(checkpoint, checkpoint, **settings, overwrite=True)
    with pytest.raises(NSAError, match="there is no checkpoint in"):
        finetune(checkpoint, output, **settings, resume_from_checkpoint="true")
    with pytest.raises(NSAError, match="nowhere is not a directory"):
        finetune(checkpoint, output, **settings, resume_from_checkpoint="nowhere")
    with pytest.raises(NSAError, match="is a file"):
        finetune(checkpoint, output / "notes.txt", **settings)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_overwrite_deletes_nothing_before_training_begins(tmp_path, monkeypatch, checkpoint, text_file):
    class Refuses(finetune_module._Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            raise RuntimeError("at the last moment")

    output = shutil.copytree(checkpoint, tmp_path / "out")
    (output / "checkpoint-9").mkdir()
    monkeypatch.setattr(finetune_module, "_Trainer", Refuses)
    with pytest.raises(RuntimeError, match="at the last moment"):
        finetune(checkpoint, output, train_file=text_file, **SHORT, **QUIET, overwrite=True)
    assert states_equal(output, checkpoint)
    assert (output / "checkpoint-9").is_dir()


def test_overwrite_never_deletes_what_the_run_reads(tmp_path, checkpoint, text_file):
    output = tmp_path / "out"
    shutil.copytree(checkpoint, output / "checkpoint-3")
    shutil.copytree(checkpoint, output, dirs_exist_ok=True)
    shutil.copy(text_file, output / "checkpoint-3" / "train.txt")
    settings = {"train_file": text_file, **SHORT, **QUIET, "overwrite": True}
    before = sorted(output.rglob("*"))
    for model, changes, name in (
        (output / "checkpoint-3", {}, "the model"),
        (checkpoint, {"stage": "adapt", "teacher": str(output)}, "--teacher"),
        (checkpoint, {"train_file": output / "checkpoint-3" / "train.txt"}, "--train-file"),
        (checkpoint, {"eval_file": output / "." / "checkpoint-3" / "train.txt"}, "--eval-file"),
    ):
        with pytest.raises(NSAError, match=f"--overwrite would delete {name} .*out.* choose another one"):
            finetune(model, output, **settings | changes)
    assert sorted(output.rglob("*")) == before


def test_a_checkpoint_of_another_run_opens_no_full_output(tmp_path, checkpoint, text_file):
    settings = {"train_file": text_file, **SHORT, **QUIET, "save_strategy": "steps", "save_steps": 1, "eval_slices": 0}
    finetune(checkpoint, tmp_path / "other", **settings)
    settings |= {"resume_from_checkpoint": tmp_path / "other" / "checkpoint-1", "max_steps": 2}
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(NSAError, match="is not empty"):
        finetune(checkpoint, tmp_path / "out", **settings)
    assert (tmp_path / "out" / "config.json").read_text() == "mine"
    finetune(checkpoint, tmp_path / "out", **settings, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2"]


def test_overwrite_replaces_an_earlier_run_only(tmp_path, checkpoint, text_file):
    output = tmp_path / "out"
    settings = {"train_file": text_file, **SHORT, "use_cpu": True, "disable_tqdm": True}
    finetune(checkpoint, output, **settings, lora=True)
    assert (output / "checkpoint-3").is_dir()
    (output / "notes.txt").write_text("mine")
    (output / "model-00001-of-00002.safetensors").write_text("stale")
    finetune(checkpoint, output, **settings | {"save_strategy": "no"}, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    for name in ("checkpoint-3", "adapter", "model-00001-of-00002.safetensors"):
        assert not (output / name).exists()
    AutoModelForCausalLM.from_pretrained(output)


def test_a_failed_save_leaves_no_half_model(tmp_path, monkeypatch, checkpoint, text_file):
    from transformers import PreTrainedTokenizerFast

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        finetune(checkpoint, tmp_path / "out", train_file=text_file, **SHORT, **QUIET)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, "--train-file or --dataset, one of them; got neither"),
        ({"train_file": "TEXT", "dataset": "x"}, "one of them; got both"),
        ({"train_file": "missing.txt"}, "missing.txt does not exist"),
        ({"dataset": "no/such/data"}, "dataset 'no/such/data' cannot be loaded"),
        ({"train_file": "TEXT", "max_length": 1}, "--max-length must be at least 2 tokens, got 1"),
        ({"train_file": "TEXT", "eval_fraction": 1.5}, "--eval-fraction must be at least 0 and less than 1, got 1.5"),
        ({"train_file": "TEXT", "eval_slices": -1}, "--eval-slices must not be negative, got -1"),
        ({"train_file": "TEXT", "max_facts": 7}, "--max-facts must be at least 8, got 7"),
        ({"train_file": "TEXT", "eval_file": "missing.txt"}, "missing.txt does not exist"),
        ({"train_file": "TEXT", "dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ({"train_file": "TEXT", "save_dtype": "int8"}, "save_dtype must be one of"),
        ({"train_file": "TEXT", "lora": True, "lora_r": 0}, "--lora-r must be at least 1, got 0"),
        ({"train_file": "TEXT", "lora": True, "lora_dropout": 1.0}, "--lora-dropout must be"),
        ({"train_file": "TEXT", "lora_target_modules": ["q_proj"]}, "without --lora"),
        (
            {"train_file": "TEXT", "lora": True, "lora_target_modules": ["q_proj", "qproj", "mlp"]},
            r"\['qproj', 'mlp'\] match no linear layer of the model; it has .*'q_proj'",
        ),
        ({"train_file": "TEXT", "gradient_accumulation_steps": 0}, "--gradient-accumulation-steps must be at least 1"),
        ({"train_file": "TEXT", "per_device_train_batch_size": 0}, "--per-device-train-batch-size must be at least 1"),
        (
            {"train_file": "TEXT", "report_to": "paper"},
            "--report-to must be all, none or some of .*wandb.*, got 'paper'",
        ),
        ({"train_file": "TEXT", "metric_for_best_model": "f1"}, "must be one of loss, .*, got 'f1'"),
        (
            {"train_file": "TEXT", "lr_scheduler_kwargs": {"min": 1}},
            "--lr-scheduler-kwargs .*'min'.* --lr-scheduler-ty",
        ),
        ({"train_file": "TEXT", "lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr: .*min_lr"),
        ({"train_file": "TEXT", "learning_rat": 1.0}, r"unknown settings \['learning_rat'\]"),
    ],
)
def test_refuses_before_training(tmp_path, monkeypatch, checkpoint, text_file, settings, error):
    def unreachable(*args, **kwargs):
        raise AssertionError("training started")

    monkeypatch.setattr(finetune_module.Trainer, "train", unreachable)
    settings = {key: str(text_file) if value == "TEXT" else value for key, value in settings.items()}
    with pytest.raises(NSAError, match=error):
        finetune(checkpoint, tmp_path / "out", **settings, **QUIET)
    assert not (tmp_path / "out").exists()


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch, checkpoint, text_file):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(shutil.copytree(checkpoint, tmp_path / "model").parent)
    for name in ("train.txt", "eval.txt"):
        shutil.copy(text_file, tmp_path / name)
    settings = {"train_file": "~/train.txt", "eval_file": ["~/eval.txt"], **SHORT, **QUIET}
    report = finetune("~/model", "~/out", **settings)
    assert report.output_dir == tmp_path / "out"
    assert (tmp_path / "out" / "nsa_conversion.json").is_file()
    assert not (tmp_path / "~").exists()
    with pytest.raises(NSAError, match="is the model itself"):
        finetune("~/model", "~/model", **settings, overwrite=True)


def test_refuses_tokens_that_the_embedding_lacks(tmp_path, checkpoint, text_file):
    small = make_nsa(tmp_path / "small", vocab_size=100)
    with pytest.raises(NSAError, match=r"gives token \d{3}, and the model's embedding ends at 99; put the tokenizer"):
        finetune(small, tmp_path / "out", train_file=text_file, **SHORT, **QUIET)
    assert not (tmp_path / "out").exists()


def test_refuses_reports_to_what_is_not_installed(tmp_path, monkeypatch, checkpoint, text_file):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(NSAError, match=r"--report-to wandb: .*pip install wandb"):
        finetune(checkpoint, tmp_path / "out", train_file=text_file, report_to="wandb", **QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("schedule", list(SchedulerType))
def test_no_schedule_is_refused_that_trainer_takes(tmp_path, schedule):
    more = {
        "cosine_with_min_lr": {"min_lr": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 1},
    }
    settings = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": more.get(schedule.value)}
    finetune_module._check_training(FinetuneArguments(str(tmp_path), eval_strategy="steps", use_cpu=True, **settings))


@pytest.mark.parametrize(
    "changes", [{"train_file": "missing.txt"}, {"model": "missing"}, {"lora": True, "lora_target_modules": ["qproj"]}]
)
def test_makes_no_repository_for_a_mistake(tmp_path, monkeypatch, checkpoint, text_file, changes):
    made = []
    monkeypatch.setattr(finetune_module, "_make_repository", made.append)
    settings = {"model": checkpoint, "train_file": text_file, **changes}
    with pytest.raises(NSAError):
        finetune(output_dir=tmp_path / "out", push_to_hub=True, **settings, **SHORT, **QUIET)
    assert made == []


@pytest.mark.parametrize(
    ("content", "error"),
    [("", "is empty"), ("\n \n", "is empty")],
)
def test_refuses_data_without_tokens(tmp_path, checkpoint, content, error):
    (tmp_path / "train.txt").write_text(content)
    with pytest.raises(NSAError, match=error):
        finetune(checkpoint, tmp_path / "out", train_file=tmp_path / "train.txt", **QUIET)


def test_refuses_data_of_one_token_and_a_model_without_tokenizer(tmp_path, text_file):
    source = make_nsa(tmp_path / "nsa")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["eos_token"] = None
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(NSAError, match=r"holds 1 token\(s\) in 1 document\(s\); at least one document of 2 tokens"):
        finetune(source, tmp_path / "out", train_file=tmp_path / "train.txt", **QUIET)
    bare = make_checkpoint(tmp_path / "bare", "llama", tokenizer=False)
    with pytest.raises(NSAError, match="has no tokenizer"):
        finetune(bare, tmp_path / "out", train_file=text_file, **QUIET)


def test_command_takes_every_training_argument(tmp_path, capsys, checkpoint, text_file):
    output = tmp_path / "out"
    arguments = [str(checkpoint), "--train-file", str(text_file), "--output-dir", str(output), "--max-length", "96"]
    arguments += ["--max-steps", "2", "--warmup-steps", "1", "--lr-scheduler-type", "cosine", "--weight-decay", "0.1"]
    arguments += ["--adam-beta2", "0.95", "--gradient-accumulation-steps", "2", "--save-strategy", "no", "--use-cpu"]
    arguments += ["--disable-tqdm", "--seed", "5", "--lora", "--lora-target-modules", "q_proj", "o_proj"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "loss by position on held-out text" in printed
    assert f"wrote the merged model to {output} and the adapter alone to {output / 'adapter'}" in printed
    training = json.loads((output / "nsa_finetune.json").read_text())["arguments"]["training"]
    assert (training["adam_beta2"], training["seed"], training["lr_scheduler_type"]) == (0.95, 5, "cosine")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--train-file", "x", "--output-dir", "out"], "a model is required"),
        (["model", "--model", "other", "--train-file", "x", "--output-dir", "out"], "the model was given twice"),
        (["model", "--train-file", "x"], "--output-dir is required"),
        (["model", "--train-file", "x", "--output-dir", "out", "--lr", "1"], "not used.*--lr"),
        (["model", "--train-file", "x", "--output-dir", "out", "--max-steps", "many"], "invalid int value.*--help"),
        (["model", "--train-file", "x", "--output-dir", "out", "--dtype", "int8"], "invalid choice"),
    ],
)
def test_command_refuses_in_one_line(arguments, error):
    with pytest.raises(ValueError, match=error) as raised:
        main(arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, checkpoint, text_file):
    arguments = [str(checkpoint), "--train-file", str(text_file), "--max-length", "96", "--max-steps", "3"]
    arguments += ["--learning-rate", "1e-2", "--optim", "sgd", "--save-strategy", "no", "--disable-tqdm", "--use-cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "conversion"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    two = [*launch, "-m", "nsa_conversion", "finetune", *arguments, "--ddp-backend", "gloo"]
    done = subprocess.run(
        [*two, "--output-dir", str(tmp_path / "two")], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    main([*arguments, "--output-dir", str(tmp_path / "one"), "--per-device-train-batch-size", "2"])
    (left, left_losses), (right, right_losses) = (
        (
            AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict(),
            [entry.get("loss") for entry in json.loads((tmp_path / name / "log_history.json").read_text())[:3]],
        )
        for name in ("one", "two")
    )
    assert left_losses == pytest.approx(right_losses, abs=1e-3)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-5)


def losses_of(path):
    return [entry["loss"] for entry in json.loads((path / "log_history.json").read_text()) if "loss" in entry]


def test_dora_trains_magnitudes_and_merges(tmp_path, checkpoint, text_file):
    from peft import PeftModel

    settings = {**SHORT, "learning_rate": 1e-2, "eval_slices": 0, **QUIET}
    report = finetune(checkpoint, tmp_path / "out", train_file=text_file, lora=True, use_dora=True, **settings)
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().norm(dim=1)
    adapter = PeftModel.from_pretrained(base, report.adapter_dir)
    layer = adapter.base_model.model.model.layers[0].self_attn.q_proj
    assert (layer.lora_magnitude_vector["default"].weight - weight).abs().max() > 1e-3
    ids = torch.arange(3, 83)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        torch.testing.assert_close(merged, adapter(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_trains_over_quantised_weights(tmp_path, text_file, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    networks = []

    class Recorder(finetune_module._Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            networks.append(kwargs["model"])

    source = make_nsa(tmp_path / "nsa", hidden_size=64, head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    settings = {**SHORT, "train_file": text_file, "lora": True, **QUIET}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_module, "_Trainer", Recorder)
        report = finetune(source, tmp_path / "out", **settings, **{f"load_in_{bits}bit": True})
    finetune(source, tmp_path / "plain", **settings)
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    (network,) = networks
    quantised = {name for name, module in network.named_modules() if isinstance(module, kind)}
    assert any("q_proj.base_layer" in name for name in quantised)
    assert any("k_proj_cmp.base_layer" in name for name in quantised)
    assert not any(".gate." in name or "compress" in name or "lm_head" in name for name in quantised)
    # weights of 4 bits change the model, weights of 8 bits hardly, and both train
    assert losses_of(tmp_path / "out") == pytest.approx(losses_of(tmp_path / "plain"), abs=0.7 if bits == 4 else 0.1)
    assert report.after[0].loss < report.before[0].loss
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"use_dora": True}, "--use-dora was given without --lora"),
        ({"load_in_4bit": True}, "--load-in-4bit needs --lora"),
        ({"load_in_8bit": True, "load_in_4bit": True, "lora": True}, "both given; choose one"),
        ({"load_in_8bit": True, "lora": True, "FSDP": True}, "--load-in-8bit does not go with FSDP or DeepSpeed"),
        ({"load_in_4bit": True, "lora": True, "absent": "bitsandbytes"}, "--load-in-4bit needs the bitsandbytes"),
        ({"use_liger_kernel": True, "absent": "liger_kernel"}, "--use-liger-kernel needs the liger-kernel library"),
        ({"use_liger_kernel": True, "stage": "warmup"}, "makes no logits, which --stage warmup needs"),
    ],
)
def test_refuses_settings_that_need_others(tmp_path, monkeypatch, checkpoint, text_file, settings, error):
    absent = settings.pop("absent", None)
    for library in ("bitsandbytes", "liger_kernel"):
        monkeypatch.setattr(finetune_module, f"is_{library}_available", lambda name=library: name != absent)
    if settings.pop("FSDP", False):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(NSAError, match=error):
        finetune(checkpoint, tmp_path / "out", train_file=text_file, **settings, **QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("world_size", "kind", "variable", "error"),
    [
        (1, "NO", None, "2 processes were launched, but .* add --use-cpu"),
        (2, "MULTI_CPU", "ACCELERATE_USE_FSDP", "accelerate shards with FSDP on GPUs only"),
        (2, "MULTI_CPU", "ACCELERATE_USE_DEEPSPEED", "accelerate shards with DeepSpeed on GPUs only"),
    ],
)
def test_refuses_launches_that_would_not_do_what_they_say(monkeypatch, world_size, kind, variable, error):
    args = types.SimpleNamespace(world_size=world_size, distributed_state=types.SimpleNamespace(distributed_type=kind))
    monkeypatch.setenv("WORLD_SIZE", "2")
    if variable is not None:
        monkeypatch.setenv(variable, "true")
    with pytest.raises(NSAError, match=error):
        finetune_module._check_launch(args)
