# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Saved models bring their own code: what is written, and that it runs where this project is not installed."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers
from local_hub import LocalHub
from tiny_nsa import make_ids, make_model
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import modeling_nsa
from modeling_nsa import NSAConfig, NSAForCausalLM, NSAForSequenceClassification, hub_nsa
from nsa_kernels import interface

ROOT = Path(__file__).resolve().parents[1]
# An interpreter that sees installed libraries, but no .pth file: this project may be installed in editable form.
WITHOUT_PROJECT = f"import sys; sys.path += {sorted({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')})}\n"


def code_files(directory):
    return {path.name: path.read_text(encoding="utf-8") for path in Path(directory).glob("*.py")}


def run_remote(folder):
    """Run `use_remote_code.py` on `folder` without this project; returns what it did."""
    script = str(ROOT / "tests" / "use_remote_code.py")
    code = f"{WITHOUT_PROJECT}import runpy; sys.argv = [{script!r}, {str(folder)!r}]\n"
    hub = LocalHub()
    hub.repos = {"me/causal": {"main": {path.name: path.read_bytes() for path in (folder / "causal").iterdir()}}}
    triton = {"TRITON_INTERPRET": "1"} if importlib.util.find_spec("triton") and not torch.cuda.is_available() else {}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    with hub:
        result = subprocess.run(
            [sys.executable, "-I", "-S", "-c", f"{code}runpy.run_path({script!r}, run_name='__main__')"],
            env=environment | triton | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home")},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return json.loads(result.stdout.splitlines()[-1])


@torch.no_grad()
def record(model, folder, name, **more):
    """Save a model and what it computes as `folder/name` and `folder/name.pt`."""
    ids = make_ids(2, 61)
    torch.save({"ids": ids, "logits": model(ids).logits, **more}, folder / f"{name}.pt")
    model.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `use_remote_code.py` needs: models of every kind, and what they compute."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("saved")
    model = make_model("qwen3-like", layer_types=["full_attention", "native_sparse_attention"])
    prompt = make_ids(1, 40, seed=1)
    generated = model.generate(prompt, max_new_tokens=12, do_sample=False)
    record(model, folder, "causal", prompt=prompt, generated=generated)
    model = make_model("gemma3 sliding", tie_word_embeddings=True)
    record(model, folder, "gemma3", prompt=prompt, generated=model.generate(prompt, max_new_tokens=12, do_sample=False))
    config = NSAConfig(**{**model.config.to_dict(), "num_labels": 3, "pad_token_id": 0})
    record(NSAForSequenceClassification(config).eval(), folder, "classifier")
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj_cmp"], modules_to_save=["self_attn.gate"], r=2
    )
    adapted = get_peft_model(NSAForCausalLM.from_pretrained(folder / "causal"), lora).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    record(adapted, folder, "adapter")
    return folder


def test_every_file_is_reached_from_both_entry_points(tmp_path):
    hub_nsa.write_remote_code(tmp_path)
    files = {str(path) for path in tmp_path.glob("*.py")}
    for entry in ("configuration_nsa.py", "modeling_nsa.py"):
        assert {*get_relative_import_files(tmp_path / entry), str(tmp_path / entry)} == files
    for file in files:
        assert not {"nsa_kernels", "modeling_nsa", "triton"} & set(get_imports(file))
    names = {Path(file).name for file in files}
    assert names >= {path.name for path in (ROOT / "modeling_nsa").glob("[!_]*.py")}
    triton = {interface._triton(operation).__module__ for operation in interface._TRITON_OPERATIONS}
    assert names >= {f"{module.replace('.', '_')}.py" for module in triton}


def test_flat_code_stays_as_it_is(tmp_path, monkeypatch):
    hub_nsa.write_remote_code(tmp_path)
    code = code_files(tmp_path)
    monkeypatch.setattr(hub_nsa, "__file__", str(tmp_path / "hub_nsa.py"))
    assert hub_nsa.remote_code.__wrapped__() == code


def test_only_imports_change():
    for path in (ROOT / "modeling_nsa" / "cache_nsa.py", ROOT / "kernels" / "nsa_kernels" / "window.py"):
        old = path.read_text(encoding="utf-8").splitlines()
        new = hub_nsa.remote_code()[f"{hub_nsa._flat(path)}.py"].splitlines()
        added = [line for line in new if line not in old]
        assert added
        assert all(line.split()[0] in ("from", "import", "try:", "except", "raise") for line in added), added


@pytest.mark.parametrize(
    "statement, reason",
    [
        ("import numpy", "do not bring"),
        ("from ..package import name", "same folder"),
        ("from .package.module import name", "same folder"),
        ("from .nothing import name", "no such module"),
        ("from . import nothing", "not a module"),
        ("from nsa_kernels.nothing import name", "no such module"),
        ("from nsa_kernels import window", "from its package"),
        ("from  nsa_kernels import nsa_attention", "must start with"),
        ("import nsa_kernels", "do not bring"),
        ("def f(name):\n    import importlib\n    return importlib.import_module(name)", "cannot be followed"),
        ("from . import alone", "would not be copied"),
    ],
)
def test_code_that_cannot_be_flat_is_refused(tmp_path, monkeypatch, statement, reason):
    (tmp_path / "modeling_nsa.py").write_text(f"{statement}\n")
    (tmp_path / "alone.py").write_text("")
    monkeypatch.setattr(hub_nsa, "__file__", str(tmp_path / "hub_nsa.py"))
    with pytest.raises(NotImplementedError, match=reason):
        hub_nsa.remote_code.__wrapped__()


def test_imports_of_triton_are_inside_try(tmp_path, monkeypatch):
    (tmp_path / "modeling_nsa.py").write_text(
        "import torch\nimport triton\nimport triton.language as tl\n\ndef f():\n    from triton.tools import (\n"
        "        tensor_descriptor,\n    )\n    return tensor_descriptor\n"
    )
    monkeypatch.setattr(hub_nsa, "__file__", str(tmp_path / "hub_nsa.py"))
    (text,) = hub_nsa.remote_code.__wrapped__().values()
    assert text == (
        "import torch\ntry:\n    import triton\n    import triton.language as tl\nexcept ImportError:\n    raise\n\n"
        "def f():\n    try:\n        from triton.tools import (\n            tensor_descriptor,\n        )\n"
        "    except ImportError:\n        raise\n    return tensor_descriptor\n"
    )


def test_auto_map_names_the_registered_classes():
    for name, reference in hub_nsa.AUTO_MAP.items():
        module, cls = reference.split(".")
        registered = (
            transformers.CONFIG_MAPPING["native_sparse_attention"]
            if name == "AutoConfig"
            else getattr(transformers, name)._model_mapping[NSAConfig]
        )
        assert registered is getattr(modeling_nsa, cls)
        assert registered.__module__ == f"modeling_nsa.{module}"


def test_the_code_can_be_left_out(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "with")
    assert json.loads((tmp_path / "with" / "config.json").read_text())["auto_map"] == hub_nsa.AUTO_MAP
    model.config.save_remote_code = False
    model.save_pretrained(tmp_path / "without")
    assert code_files(tmp_path / "without") == {}
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    # It is a setting of the model: a copy that is loaded and saved leaves its code out as well.
    NSAForCausalLM.from_pretrained(tmp_path / "without").save_pretrained(tmp_path / "copy")
    assert code_files(tmp_path / "copy") == {}


def test_with_the_package_imported_its_own_classes_are_used(tmp_path):
    make_model().save_pretrained(tmp_path)
    for trust_remote_code in (None, False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust_remote_code)
        assert type(model) is NSAForCausalLM


@pytest.mark.slow
def test_saved_models_run_without_the_project(folder):
    done = run_remote(folder)["done"]
    assert done == ["logits", "generate", "heads", "save again", "hub", "kernels", "train", "adapter"]
    # What was saved there loads here, and is the same model.
    causal = torch.load(folder / "causal.pt")
    with torch.no_grad():
        assert torch.equal(NSAForCausalLM.from_pretrained(folder / "again")(causal["ids"]).logits, causal["logits"])
        adapter = torch.load(folder / "adapter.pt")
        merged = NSAForCausalLM.from_pretrained(folder / "merged")(adapter["ids"]).logits
    torch.testing.assert_close(merged, adapter["logits"], rtol=1e-4, atol=1e-4)
    assert code_files(folder / "merged") == code_files(folder / "causal")
