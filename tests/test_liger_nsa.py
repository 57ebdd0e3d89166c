# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Liger's kernels in NSA models: registration, and the fused loss in Triton's interpreter or on a GPU."""

import subprocess
import sys
import types

import pytest
import torch
from tiny_nsa import close, make_ids, make_model

from modeling_nsa.liger_nsa import apply_liger_kernel_to_nsa, register_with_liger

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Liger's norms and MLPs do not run in Triton's interpreter
LOSS_ALONE = {"rms_norm": False, "swiglu": False}


def liger_table():
    return pytest.importorskip("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN


def test_import_leaves_liger_alone_and_registers_when_it_comes(tmp_path):
    package = tmp_path / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "monkey_patch.py").write_text("MODEL_TYPE_TO_APPLY_LIGER_FN = {'llama': None}")
    code = """
import sys, modeling_nsa
assert not any(name.startswith("liger_kernel") for name in sys.modules)
from liger_kernel.transformers import monkey_patch
from modeling_nsa.liger_nsa import _OnImport
assert sorted(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN) == ["llama", "native_sparse_attention"]
assert not any(isinstance(finder, _OnImport) for finder in sys.meta_path)
"""
    code = f"import sys\nsys.path[:0] = {[str(tmp_path), *sys.path]}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_registers_at_once_where_liger_is_there(monkeypatch):
    table = types.SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={})
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", table)
    register_with_liger("some_type")
    assert {"some_type": apply_liger_kernel_to_nsa} == table.MODEL_TYPE_TO_APPLY_LIGER_FN


def test_trainer_says_when_liger_is_absent(tmp_path, monkeypatch):
    from transformers import Trainer, TrainingArguments
    from transformers.integrations import liger

    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    args = TrainingArguments(output_dir=str(tmp_path), use_liger_kernel=True, use_cpu=True, report_to="none")
    trainer = Trainer(model=make_model(), args=args, train_dataset=[{"input_ids": make_ids(9)}])
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        trainer.train()


@pytest.mark.parametrize("variant, packed", [("separate", False), ("separate", True), ("gemma3-like", False)])
def test_fused_loss_and_gradients_equal_the_plain_ones(variant, packed):
    assert liger_table()["native_sparse_attention"] is apply_liger_kernel_to_nsa
    # nor does its softcapping
    changes = {"final_logit_softcapping": None} if DEVICE == "cpu" else {}
    plain, fused = (make_model(variant, **changes).to(DEVICE).train() for _ in range(2))
    apply_liger_kernel_to_nsa(model=fused, **({} if DEVICE == "cuda" else LOSS_ALONE))
    ids = make_ids(1, 60).to(DEVICE)
    labels = ids.clone()
    labels[:, 20:30] = -100
    batch = {"input_ids": ids, "labels": labels, "use_cache": False, "num_items_in_batch": 40}
    if packed:
        batch["position_ids"] = torch.cat((torch.arange(23), torch.arange(37)))[None].to(DEVICE)
    losses = []
    for model in (plain, fused):
        out = model(**batch)
        out.loss.backward()
        losses.append(out.loss.detach())
        assert (out.logits is None) is (model is fused)
    close(*losses)
    expected = dict(plain.named_parameters())
    for name, parameter in fused.named_parameters():
        close(parameter.grad, expected[name].grad)
    fused.eval()
    with torch.no_grad():
        del batch["num_items_in_batch"]
        close(fused(**batch).logits, plain.eval()(**batch).logits)
        out = fused(**batch, skip_logits=True)
    assert out.logits is None
    close(out.loss, losses[0] * 40 / (labels[:, 1:] != -100).sum())


def test_trainer_applies_it(tmp_path):
    liger_table()
    from transformers import Trainer, TrainingArguments

    ids = make_ids(40)
    model = make_model()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        use_liger_kernel=True,
        liger_kernel_config=None if DEVICE == "cuda" else LOSS_ALONE,
        report_to="none",
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": ids, "labels": ids}] * 2)
    with torch.no_grad():
        expected = make_model()(ids[None], labels=ids[None]).loss
    assert trainer.train().training_loss == pytest.approx(expected.item(), abs=1e-4)
    assert model.forward.__name__ == "_fused_forward"


def test_an_adapter_on_the_output_layer_is_not_left_out():
    liger_table()
    peft = pytest.importorskip("peft")
    model = make_model()
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    ids = make_ids(1, 30)
    adapted = peft.get_peft_model(model, config).train()
    before = adapted(ids, labels=ids).loss
    apply_liger_kernel_to_nsa(model=model, **LOSS_ALONE)
    assert torch.equal(adapted(ids, labels=ids).loss, before)


def test_refuses_no_model_and_a_sharded_output_layer():
    liger_table()
    with pytest.raises(ValueError, match="must be a model that has been loaded, got None"):
        apply_liger_kernel_to_nsa()
    model = make_model()
    model._tp_size = 2
    with pytest.raises(ValueError, match="tensor parallelism shards over 2"):
        apply_liger_kernel_to_nsa(model=model)
