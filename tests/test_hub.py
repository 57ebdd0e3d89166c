# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Uploads, against a hub on this machine: `nsa push`, `push_to_hub`, `nsa finetune --push-to-hub`, and loading them."""

import importlib
import json
import os
import shutil
import socket

import pytest
import torch
from local_hub import use_hub
from test_finetune import QUIET, SHORT, checkpoint, make_nsa, text_file  # noqa: F401 - fixtures
from tiny import make_checkpoint
from tiny_nsa import make_ids, make_model

from modeling_nsa import NSAForCausalLM
from modeling_nsa.hub_nsa import AUTO_MAP, remote_code
from nsa_conversion import cli, finetune, push
from nsa_conversion.errors import NSAError

CODE = set(remote_code())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with use_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, checkpoint):  # noqa: F811
    from peft import LoraConfig, get_peft_model

    path = tmp_path_factory.mktemp("adapter")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    get_peft_model(NSAForCausalLM.from_pretrained(checkpoint), lora).save_pretrained(path)
    return path


def content(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_push_uploads_model_code_card_and_nothing_else(hub, tmp_path):
    model = make_nsa(tmp_path / "model")
    (model / "modeling_nsa.py").write_text("# an older version")
    (model / "data.txt").write_text("private")
    (model / "optimizer.pt").write_bytes(b"0")
    (model / "checkpoint-1").mkdir()
    shutil.copy(model / "config.json", model / "checkpoint-1")
    before = content(model)
    url, sizes = push(model, "tiny", license="mit", base_model="owner/dense", private=True)
    files = hub.repos["me/tiny"]["main"]
    assert url.startswith(f"{hub.endpoint}/me/tiny/commit/")
    assert hub.created == [{"name": "tiny", "organization": None, "visibility": "private"}]
    assert {name: len(content) for name, content in files.items() if name != ".gitattributes"} == sizes
    expected = {"config.json", "generation_config.json", "model.safetensors", "nsa_conversion.json", "README.md"}
    assert set(sizes) == CODE | expected | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert files["modeling_nsa.py"].decode() == remote_code()["modeling_nsa.py"]
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    assert "base_model: owner/dense" in files["README.md"].decode()
    assert "license: mit" in files["README.md"].decode()
    assert content(model) == before


def test_push_without_code_to_a_branch_and_as_pull_request(hub, tmp_path):
    model = make_nsa(tmp_path / "model")
    push(model, "me/tiny", remote_code=False, revision="dev", commit_message="Try")
    assert hub.commits == [("me/tiny", "dev", "Try")]
    files = hub.repos["me/tiny"]["dev"]
    assert not CODE & set(files)
    assert "auto_map" not in json.loads(files["config.json"])
    assert "trust_remote_code" not in files["README.md"].decode()
    url, _ = push(model, "me/tiny", create_pr=True)
    assert url == f"{hub.endpoint}/me/tiny/discussions/1"


def test_a_card_of_ones_own_is_uploaded_unchanged(hub, tmp_path):
    model = make_nsa(tmp_path / "model")
    (model / "README.md").write_text("mine")
    push(model, "me/tiny")
    assert hub.repos["me/tiny"]["main"]["README.md"] == b"mine"


def test_push_an_adapter(hub, adapter):
    with pytest.raises(NSAError, match="is not on the hub"):
        push(adapter, "me/lora")
    assert hub.repos == {}
    push(adapter, "me/lora", base_model="me/tiny")
    files = hub.repos["me/lora"]["main"]
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md", ".gitattributes"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/tiny"


def test_push_a_dense_model(hub, tmp_path):
    push(make_checkpoint(tmp_path / "dense"), "me/dense")
    assert not CODE & set(hub.repos["me/dense"]["main"])


def test_save_pretrained_and_push_to_hub_bring_the_code(hub):
    model = make_model()
    model.push_to_hub("tiny")
    assert set(hub.repos["me/tiny"]["main"]) >= CODE | {"model.safetensors", "README.md"}
    assert "native-sparse-attention" in hub.repos["me/tiny"]["main"]["README.md"].decode()
    model.config.push_to_hub("settings")
    assert set(hub.repos["me/settings"]["main"]) >= CODE | {"config.json"}


@pytest.mark.parametrize("where", ["model", "config"])
def test_save_pretrained_with_push_to_hub(hub, tmp_path, where):
    model = make_model()
    saved = model if where == "model" else model.config
    saved.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/saved")
    assert set(hub.repos["me/saved"]["main"]) >= CODE | {"config.json"}
    assert set(os.listdir(tmp_path / "saved")) >= CODE | {"config.json"}


@pytest.mark.parametrize("strategy", ["every_save", "end", "checkpoint", "all_checkpoints"])
def test_finetune_pushes(hub, tmp_path, checkpoint, text_file, strategy):  # noqa: F811
    settings = {**SHORT, **QUIET, "max_steps": 2, "eval_slices": 0, "save_strategy": "steps", "save_steps": 1}
    if strategy == "checkpoint":
        settings |= {"lora": True}
    output = tmp_path / "trained"
    report = finetune(
        checkpoint,
        output,
        train_file=text_file,
        push_to_hub=True,
        hub_strategy=strategy,
        hub_always_push=True,
        hub_private_repo=True,
        **settings,
    )
    assert report.hub_url.startswith(f"{hub.endpoint}/me/trained/commit/")
    assert hub.created[0]["visibility"] == "private"
    files = hub.repos["me/trained"]["main"]
    assert files["model.safetensors"] == (output / "model.safetensors").read_bytes()
    assert set(files) >= CODE | {"README.md", "nsa_finetune.json", "tokenizer.json"}
    assert "2 steps" in files["README.md"].decode()
    assert "adapter_config.json" not in files  # beside a whole model it would be loaded into it
    folders = {name.split("/")[0] for name in files if "/" in name}
    assert (
        folders
        == {
            "every_save": set(),
            "end": set(),
            "checkpoint": {"adapter", "last-checkpoint"},
            "all_checkpoints": {"checkpoint-1", "checkpoint-2"},
        }[strategy]
    )
    assert len(hub.commits) == {"every_save": 3, "end": 1, "checkpoint": 5, "all_checkpoints": 5}[strategy]


def test_logits_stay_from_adapter_to_merged_to_hub(hub, tmp_path, checkpoint, text_file):  # noqa: F811
    from peft import PeftModel

    output, ids = tmp_path / "trained", make_ids(1, 70)
    settings = {**SHORT, **QUIET, "lora": True, "push_to_hub": True, "hub_strategy": "end"}
    finetune(checkpoint, output, train_file=text_file, **settings)
    base = NSAForCausalLM.from_pretrained(checkpoint)
    loaded = {
        "adapter over the base": PeftModel.from_pretrained(base, output / "adapter"),
        "merged": NSAForCausalLM.from_pretrained(output),
        "pushed": NSAForCausalLM.from_pretrained("me/trained", cache_dir=tmp_path / "cache"),
    }
    with torch.no_grad():
        logits = {name: model.eval()(ids).logits for name, model in loaded.items()}
        plain = NSAForCausalLM.from_pretrained(checkpoint)(ids).logits
    torch.testing.assert_close(logits["adapter over the base"], logits["merged"], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits["merged"], logits["pushed"])
    assert (logits["merged"] - plain).abs().max() > 1e-3


def test_finetune_asks_the_hub_before_it_trains(hub, tmp_path, checkpoint, text_file):  # noqa: F811
    hub.refuse = 403
    with pytest.raises(NSAError, match=r"--push-to-hub: cannot upload to trained: 403.*hf auth login"):
        finetune(checkpoint, tmp_path / "trained", train_file=text_file, push_to_hub=True, **SHORT, **QUIET)
    assert not (tmp_path / "trained").exists()


def test_a_refused_upload_leaves_the_trained_model(hub, tmp_path, checkpoint, text_file, monkeypatch):  # noqa: F811
    module = importlib.import_module("nsa_conversion.finetune")
    original = module._push

    def refused(trainer):
        hub.refuse = 500
        return original(trainer)

    monkeypatch.setattr(module, "_push", refused)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    output = tmp_path / "trained"
    with pytest.raises(NSAError, match=f"upload it with `nsa push {output} me/trained`"):
        finetune(checkpoint, output, train_file=text_file, push_to_hub=True, **SHORT, **QUIET)
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: shutil.rmtree(model), "is not a directory"),
        (lambda model: (model / "config.json").unlink(), "holds no model"),
        (lambda model: (model / "config.json").write_text("{"), "is not valid JSON"),
        (lambda model: (model / "config.json").write_text("[]"), r"config\.json must hold a JSON object, got list"),
        (lambda model: (model / "config.json").write_bytes(b"\xe9"), r"config\.json is not UTF-8 text"),
        (lambda model: (model / "README.md").write_bytes(b"caf\xe9"), r"README\.md is not UTF-8 text \(byte 3\)"),
        (
            lambda model: (model / "model.safetensors.index.json").write_text("{}"),
            r"model\.safetensors\.index\.json has no weight_map",
        ),
        (lambda model: (model / "model.safetensors").unlink(), r"lacks model\.safetensors"),
        (
            lambda model: (model / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "part-1.safetensors"}}'
            ),
            r"lacks part-1\.safetensors",
        ),
    ],
)
def test_what_is_not_a_whole_model_is_refused(hub, tmp_path, change, message):
    model = make_nsa(tmp_path / "model")
    change(model)
    with pytest.raises(NSAError, match=message):
        push(model, "me/tiny")
    assert hub.repos == {}


def test_refusals_are_one_line(hub, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    model = str(make_nsa(tmp_path / "model"))
    assert cli.main(["push", model, "not/a/repo"]) == 2
    assert "must be a hub id (owner/name), got 'not/a/repo'" in capsys.readouterr().err
    hub.refuse = 403
    assert cli.main(["push", model, "me/tiny"]) == 2
    assert "log in with `hf auth login`" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["push", model, "me/tiny"]) == 2
    assert "unset HF_HUB_OFFLINE" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert cli.main(["push", model, "me/tiny"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("nsa push: error: cannot upload to me/tiny: ")


def test_push_from_the_command_line(hub, tmp_path, capsys):
    model = str(make_nsa(tmp_path / "model"))
    assert cli.main(["push", model, "me/tiny", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "model.safetensors" in out
    assert "would upload" in out
    assert hub.repos == {}
    assert cli.main(["push", model, "me/tiny", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["url"].startswith(hub.endpoint)
    assert set(report["files"]) >= CODE
    assert cli.main(["push", model, "me/tiny"]) == 0
    assert "uploaded" in capsys.readouterr().out


def test_a_pushed_model_loads_from_the_hub(hub, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    push(tmp_path / "model", "me/tiny")
    loaded = NSAForCausalLM.from_pretrained("me/tiny", cache_dir=tmp_path / "cache")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
