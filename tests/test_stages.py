# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import functools
import importlib
import json
import shutil

import pytest
import torch
from tiny import SMALL_NSA, make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_conversion import convert, finetune, stages
from nsa_conversion.data import PackedRows, builtin_text
from nsa_conversion.distill import dense_forward
from nsa_conversion.errors import NSAError
from nsa_conversion.stages import StageArguments, annealed_blocks

finetune_module = importlib.import_module("nsa_conversion.finetune")
RUN = {"max_length": 128, "eval_slices": 0, "eval_fraction": 0, "disable_tqdm": True, "use_cpu": True}
RUN |= {"save_strategy": "no", "lr_scheduler_type": "constant", "selector_queries": 96}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("stages")
    dense = make_checkpoint(root / "dense")
    convert(dense, root / "nsa", progress=False, **SMALL_NSA)
    convert(dense, root / "mean", progress=False, **SMALL_NSA, compress_type="mean")
    (root / "text.txt").write_text(builtin_text()[:3000], encoding="utf-8")
    (root / "row.txt").write_text(builtin_text()[:127], encoding="utf-8")
    return root


@pytest.fixture
def run(places, tmp_path):
    """Train the converted model; returns the history, one entry per step, and the state before and after."""

    def train(name, text="text.txt", **settings):
        output = tmp_path / name
        finetune(places / "nsa", output, train_file=places / text, **RUN | settings)
        history = [entry for entry in json.loads((output / "log_history.json").read_text()) if "loss" in entry]
        before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (places / "nsa", output))
        return history, before, after

    return train


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def selector(names):
    """Parameters of φ and of the projections of its branch."""
    return {name for name in names if "compress_" in name or "_proj_cmp" in name}


def test_warmup_teaches_phi_and_what_it_reads(run, tmp_path):
    history, before, after = run("out", "row.txt", stage="warmup", max_steps=15, new_parameter_lr=1e-2)
    assert changed(before, after) == selector(before)
    for term in ("selector_loss", "value_loss"):
        assert history[-1][term] < 0.9 * history[0][term], term
    for entry in history:
        assert entry["loss"] == pytest.approx(entry["selector_loss"] + entry["value_loss"], abs=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "φ and its projections, 15 steps" in card
    assert "| `new_parameter_lr` | 0.01 |" in card
    assert "`teacher`" not in card


def test_warmup_teaches_a_pooling_phi_with_repeated_passages(places, tmp_path, monkeypatch):
    epochs, read = [], PackedRows.__getitem__
    monkeypatch.setattr(PackedRows, "__getitem__", lambda rows, index: epochs.append(rows.epoch) or read(rows, index))
    convert(places / "dense", tmp_path / "nsa", progress=False, **SMALL_NSA, compress_type="pool")
    settings = {"stage": "warmup", "max_steps": 12, "new_parameter_lr": 1e-2, "selector_target": "mass"}
    settings |= {"train_file": places / "row.txt", "repeat_share": 1.0, "fact_share": 1.0}
    finetune(tmp_path / "nsa", tmp_path / "out", **RUN | settings)
    assert len(set(epochs)) > 1  # practice is drawn anew in each
    assert sorted(set(epochs)) == list(range(max(epochs) + 1))
    history = [entry for entry in json.loads((tmp_path / "out" / "log_history.json").read_text()) if "loss" in entry]
    for term in ("selector_loss", "value_loss"):
        assert history[-1][term] < 0.95 * history[0][term], term
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("nsa", "out"))
    assert changed(before, after) == selector(before)


def test_adapt_comes_closer_to_the_teacher(run, places):
    history, before, after = run(
        "out",
        "row.txt",
        stage="adapt",
        teacher=str(places / "dense"),
        max_steps=12,
        learning_rate=1e-3,
        distill_weight=20.0,
    )
    assert history[-1]["distill_loss"] < 0.9 * history[0]["distill_loss"]
    assert history[-1]["selector_loss"] < history[0]["selector_loss"]
    assert changed(before, after) == set(before)
    for entry in history:
        expected = entry["next_token_loss"] + 20 * entry["distill_loss"] + entry["selector_loss"]
        assert entry["loss"] == pytest.approx(expected, abs=1e-3)
        assert "value_loss" not in entry


def test_without_the_next_token_only_the_teacher_is_followed(run, places):
    """Packed documents, whose teacher reads each alone; with all blocks selected the model is its teacher."""
    settings = {"stage": "adapt", "teacher": str(places / "dense"), "per_device_train_batch_size": 2}
    settings |= {"next_token_weight": 0.0, "learning_rate": 1e-3, "max_steps": 12}
    (first,), _, _ = run("exact", **settings | {"max_steps": 1, "anneal_blocks": 1.0})
    assert first["distill_loss"] == pytest.approx(0, abs=1e-5)
    history, before, after = run("out", "row.txt", **settings)
    assert history[-1]["distill_loss"] < 0.9 * history[0]["distill_loss"]
    assert changed(before, after) == set(before)
    for entry in history:
        assert entry["loss"] == pytest.approx(entry["distill_loss"] + entry["selector_loss"], abs=1e-3)


@pytest.mark.parametrize(("stage", "scope"), [("warmup", None), ("adapt", "keys"), ("adapt", "model")])
def test_gradient_checkpointing_and_accumulation_train_the_same(run, places, stage, scope, monkeypatch):
    """Both run twice over the same rows: with recomputation; and each batch of two rows in two parts."""
    monkeypatch.setattr(stages, "_SELECTOR_DOCUMENTS", None)
    settings = {"stage": stage, "max_steps": 2, "selector_queries": 1000, "selector_scope": scope}
    if stage == "adapt":
        settings |= {"teacher": str(places / "dense"), "anneal_blocks": 1.0, "learning_rate": 1e-2}
    settings |= {"optim": "sgd", "new_parameter_lr": 1e-1, "per_device_train_batch_size": 2}
    plain, before, after = run("plain", **settings)
    assert changed(before, after)
    assert all(entry["selector_loss"] > 0.01 for entry in plain)  # while all blocks are selected too
    for name, extra in (
        ("recomputed", {"gradient_checkpointing": True}),
        ("reentrant", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ):
        history, _, same = run(name, **settings, **extra)
        assert [entry["selector_loss"] for entry in history] == [entry["selector_loss"] for entry in plain]
        for key in after:
            torch.testing.assert_close(same[key], after[key], rtol=0, atol=1e-6)
    if stage == "warmup":
        in_parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        history, _, same = run("parts", **settings | in_parts)
        assert history[0]["selector_loss"] == pytest.approx(plain[0]["selector_loss"], rel=1e-5)
        assert history[0]["loss"] == pytest.approx(history[0]["selector_loss"] + history[0]["value_loss"], abs=1e-3)
        for key in (key for key in after if "compress_k" in key):
            torch.testing.assert_close(same[key], after[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scope", ["keys", "model"])
def test_compiled_layers_train_the_same(run, places, scope, monkeypatch):
    """Rows of one length: one compilation serves all layers and steps."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    settings = {"stage": "adapt", "teacher": str(places / "dense"), "hidden_weight": 1.0, "max_steps": 3}
    settings |= {"full_rows": True, "per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 1e-1}
    settings |= {"selector_scope": scope}
    plain, before, after = run("plain", **settings)
    assert changed(before, after)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled, _, same = run("compiled", **settings, compile_layers=True)
    assert counters["stats"]["unique_graphs"] == 5  # a layer, both sides of the selector, logits, hidden states
    for term in ("next_token_loss", "distill_loss", "hidden_loss", "selector_loss"):
        expected = pytest.approx([entry[term] for entry in plain], rel=1e-4)
        assert [entry[term] for entry in compiled] == expected
    for key in after:
        torch.testing.assert_close(same[key], after[key], rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_layers_compile_whole_on_a_gpu(run, places):
    """Nothing in a layer makes the compiler break it into parts, each of which would wait for Python."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    settings = {"stage": "adapt", "teacher": str(places / "dense"), "full_rows": True, "compile_layers": True}
    run("out", **settings, max_steps=2, use_cpu=False, bf16=True)
    assert not counters["graph_break"]


def test_hidden_states_come_closer_to_the_teachers(run, places):
    """Packed documents too, whose teacher reads each alone; with all blocks selected the model is its teacher."""
    settings = {"stage": "adapt", "teacher": str(places / "dense"), "per_device_train_batch_size": 2}
    settings |= {"next_token_weight": 0.0, "distill_weight": 1.0, "selector_weight": 0.0, "hidden_weight": 5.0}
    (first,), _, _ = run("exact", **settings | {"max_steps": 1, "anneal_blocks": 1.0})
    assert first["hidden_loss"] == pytest.approx(0, abs=1e-6)
    history, _, _ = run("out", "row.txt", **settings | {"max_steps": 12, "learning_rate": 1e-3})
    assert history[-1]["hidden_loss"] < 0.9 * history[0]["hidden_loss"]
    assert history[-1]["loss"] == pytest.approx(history[-1]["distill_loss"] + 5 * history[-1]["hidden_loss"], abs=1e-3)


def test_a_dense_model_is_trained_by_the_same_loss(places, tmp_path, monkeypatch):
    """The yardstick of an adapted model: at first it is its own teacher."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    settings = RUN | {"stage": "adapt", "teacher": str(places / "dense"), "max_steps": 3, "selector_queries": None}
    settings |= {"full_rows": True, "learning_rate": 1e-2, "selector_weight": 0.0, "train_file": places / "text.txt"}
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for name, extra in (("plain", {}), ("compiled", {"compile_layers": True})):
        finetune(places / "dense", tmp_path / name, **settings, **extra)
        first, *_, last = json.loads((tmp_path / name / "log_history.json").read_text())[:3]
        assert first["distill_loss"] == pytest.approx(0, abs=1e-6)
        assert last["distill_loss"] > 1e-3
        assert "selector_loss" not in last
    assert counters["stats"]["unique_graphs"] == 3  # a layer with and without gradients, logits
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("plain", "compiled")]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-4)
    with pytest.raises(NSAError, match="set selector_weight, hidden_weight, anneal_blocks to 0"):
        finetune(places / "dense", tmp_path / "no", **settings | {"hidden_weight": 1.0})


def test_a_resumed_stage_goes_on_as_if_never_stopped(places, tmp_path):
    output, whole = tmp_path / "out", tmp_path / "whole"
    settings = {**RUN, "stage": "adapt", "teacher": str(places / "dense"), "selector_queries": 16, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 2, "train_file": places / "text.txt"}
    finetune(places / "nsa", output, **settings)
    shutil.copytree(output, whole)
    shutil.rmtree(output / "checkpoint-4")
    finetune(places / "nsa", output, **settings, resume_from_checkpoint="true")
    left, right = (json.loads((path / "log_history.json").read_text()) for path in (whole, output))
    for term in ("loss", "next_token_loss", "distill_loss", "selector_loss"):
        assert [entry[term] for entry in left if "loss" in entry] == [entry[term] for entry in right if "loss" in entry]
    left, right = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (whole, output))
    assert not changed(left, right)


def test_mixed_precision_gives_the_terms_of_full_precision(run, places):
    """With all blocks selected, so that rounding changes no choice; the model is its teacher then."""
    settings = {"stage": "adapt", "teacher": str(places / "dense"), "max_steps": 1, "anneal_blocks": 1.0}
    (full,), _, _ = run("full", "row.txt", **settings)
    (mixed,), _, _ = run("mixed", "row.txt", **settings, bf16=True)
    assert full["distill_loss"] == pytest.approx(0, abs=1e-5)
    assert mixed["distill_loss"] == pytest.approx(0, abs=1e-2)
    assert mixed["next_token_loss"] == pytest.approx(full["next_token_loss"], rel=0.01)
    assert mixed["selector_loss"] == pytest.approx(full["selector_loss"], rel=0.02)
    (full,), _, _ = run("full_warmup", "row.txt", stage="warmup", max_steps=1)
    (mixed,), before, after = run("mixed_warmup", "row.txt", stage="warmup", max_steps=1, bf16=True)
    for term in ("selector_loss", "value_loss"):
        assert mixed[term] == pytest.approx(full[term], rel=0.02), term
    assert changed(before, after)


@pytest.mark.gpu
def test_a_gpu_gives_the_terms_of_the_cpu(run, places):
    """With all blocks selected, so that rounding changes no choice."""
    adapt = {"stage": "adapt", "teacher": str(places / "dense"), "anneal_blocks": 1.0}
    for name, settings in (("adapt", adapt), ("warmup", {"stage": "warmup"})):
        (cpu,), _, _ = run(f"{name}_cpu", "row.txt", **settings, max_steps=1)
        settings |= {"use_cpu": False, "bf16": True, "gradient_checkpointing": True}
        (gpu,), before, after = run(f"{name}_gpu", "row.txt", **settings, max_steps=1)
        for term in {"next_token_loss", "selector_loss", "value_loss"} & cpu.keys():
            assert gpu[term] == pytest.approx(cpu[term], rel=0.02), (name, term)
        assert changed(before, after)


def test_lora_adapts_the_backbone_and_trains_the_new_parts_whole(run, places, tmp_path):
    _, before, after = run("out", stage="adapt", lora=True, lora_r=2, max_steps=3, learning_rate=1e-2)
    moved = changed(before, after)
    for part in ("compress_k", "compress_v", "gate.", "gate_scale", "q_proj", "k_proj_cmp", "down_proj"):
        assert any(part in name for name in moved), part
    assert not any("norm" in name or "embed_tokens" in name for name in moved)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def trainer_of(model, tmp_path, **settings):
    stage = StageArguments(stage="adapt", **settings)
    stage.check(lora=False)
    args = finetune_module.FinetuneArguments(
        output_dir=str(tmp_path), learning_rate=1e-5, weight_decay=0.1, use_cpu=True, report_to="none"
    )
    return finetune_module._StageTrainer(model=model, args=args, stage=stage, max_length=128)


@pytest.mark.parametrize("lora", [False, True])
def test_parameter_groups_hold_rates_and_decay(places, tmp_path, lora):
    model = AutoModelForCausalLM.from_pretrained(places / "nsa")
    if lora:
        model = finetune_module._add_lora(model, finetune_module.LoraArguments(lora=True))
    optimizer = trainer_of(model, tmp_path, new_parameter_lr=3e-4).create_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert parameter not in seen
            seen[parameter] = (group["lr"], group["weight_decay"])
    assert set(seen) == {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter, (lr, decay) in seen.items():
        name = names[parameter]
        new = any(f"self_attn.{part}." in name for part in ("compress_k", "compress_v", "gate"))
        new |= "_proj_cmp" in name
        assert lr == (3e-4 if new else 1e-5), name
        assert (decay > 0) == (not ("bias" in name or "norm" in name)), name
    scales = [name for parameter, name in names.items() if "gate_scale" in name and parameter in seen]
    assert len(scales) == 2


def test_the_number_of_blocks_falls_and_is_back_after_every_step(places, tmp_path, monkeypatch):
    assert [annealed_blocks(i / 4, 16, 4) for i in range(6)] == [16, 16, 8, 8, 4, 4]
    assert annealed_blocks(0.0, 15, 4) == 15
    assert annealed_blocks(0.0, 3, 4) == 4
    model = AutoModelForCausalLM.from_pretrained(places / "nsa")
    trainer = trainer_of(model, tmp_path, anneal_blocks=0.5)
    trainer.state.max_steps = 8
    seen = []
    monkeypatch.setattr(
        finetune_module.Trainer, "training_step", lambda *args: seen.append(model.config.num_selected_blocks)
    )
    for step in range(6):
        trainer.state.global_step = step
        trainer.training_step(model, {})
        assert model.config.num_selected_blocks == 4
    assert seen == [16, 16, 8, 8, 4, 4]


def test_evaluation_is_of_the_sparse_model(run, places, tmp_path):
    run("out", stage="warmup", max_steps=1, eval_strategy="steps", eval_steps=1, eval_file=str(places / "row.txt"))
    history = json.loads((tmp_path / "out" / "log_history.json").read_text())
    (measured,) = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    model, tokenizer = (each.from_pretrained(tmp_path / "out") for each in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer((places / "row.txt").read_text() + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert measured == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-4)
        with dense_forward(model):
            assert abs(measured - model(ids, labels=ids).loss.item()) > 1e-3


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"stage": "distil"}, "--stage must be one of warmup, adapt, sft, got 'distil'"),
        ({"stage": "warmup", "lora": True}, "--lora does nothing in --stage warmup"),
        ({"stage": "warmup", "teacher": "x"}, "--teacher belongs to --stage adapt, got --stage warmup"),
        ({"selector_queries": 5}, "--selector-queries belongs to --stage warmup or adapt, got --stage sft"),
        (
            {"stage": "warmup", "learning_rate": 1e-3},
            "--stage warmup trains new parts alone: set their rate with --new-parameter-lr",
        ),
        ({"stage": "adapt", "distill_weight": 1.0}, "--distill-weight needs --teacher"),
        ({"stage": "adapt", "next_token_weight": 0.0}, "--next-token-weight 0 leaves all weights to --teacher"),
        ({"stage": "adapt", "selector_weight": -1.0}, "--selector-weight must not be negative, got -1.0"),
        ({"stage": "adapt", "selector_queries": 0}, "--selector-queries must be at least 1, got 0"),
        (
            {"stage": "warmup", "selector_scope": "model"},
            "--selector-scope belongs to --stage adapt, got --stage warmup",
        ),
        (
            {"stage": "adapt", "selector_scope": "model", "selector_weight": 0.0},
            "and --selector-weight 0 is none",
        ),
        (
            {"stage": "adapt", "selector_scope": "all"},
            "--selector-scope must be one of keys, model, got 'all'",
        ),
        (
            {"stage": "adapt", "selector_target": "max"},
            "--selector-target must be one of output, mass, got 'max'",
        ),
        ({"stage": "adapt", "new_parameter_lr": 0.0}, "--new-parameter-lr must be more than 0, got 0.0"),
        ({"stage": "adapt", "anneal_blocks": 2.0}, "--anneal-blocks must be a share of the steps, 0 to 1, got 2.0"),
        ({"stage": "adapt", "teacher": "/nowhere"}, "model '/nowhere' does not exist"),
        (
            {"stage": "warmup", "max_length": 32},
            r"beyond max\(n \* l', w\) = 32 of a document, and the longest.*has 32",
        ),
        ({"stage": "warmup", "model": "dense"}, "--stage warmup needs sparse layers"),
        ({"stage": "adapt", "model": "mean"}, "compress_type 'mean' has no parameters.*--selector-weight 0"),
    ],
)
def test_refuses_before_training(places, tmp_path, monkeypatch, settings, error):
    monkeypatch.setattr(finetune_module.Trainer, "train", None)
    model = places / settings.pop("model", "nsa")
    settings = {key: value for key, value in RUN.items() if key != "selector_queries"} | settings
    with pytest.raises(NSAError, match=error):
        finetune(model, tmp_path / "out", train_file=places / "text.txt", **settings)
    assert not (tmp_path / "out").exists()


def test_refuses_a_teacher_of_another_vocabulary(places, tmp_path):
    other = make_checkpoint(tmp_path / "other", vocab_size=300)
    with pytest.raises(NSAError, match=r"must have the model's vocabulary of 272 tokens.*has 300"):
        finetune(
            places / "nsa", tmp_path / "out", train_file=places / "text.txt", stage="adapt", teacher=str(other), **RUN
        )
