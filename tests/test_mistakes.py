# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Mistakes on the command line: each gives one clear line and an exit code, and leaves nothing behind."""

import errno
import importlib
import json
import shutil
import socket
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SMALL_NSA, make_checkpoint

from nsa_conversion import cli, convert
from nsa_conversion.data import builtin_text

TRAIN = "finetune {nsa} --output-dir {work}/out --max-length 96 --max-steps 1 --eval-slices 0 --use-cpu"
TRAIN_TEXT = f"{TRAIN} --train-file {{text}}"


def missing(name):
    """A set-up after which `import name` fails, as where it is not installed."""

    def change(monkeypatch):
        monkeypatch.setitem(sys.modules, name, None)

    return change


def without_accelerate(monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_accelerate_available", lambda *args: False)


def without_peft(monkeypatch):
    monkeypatch.setattr(importlib.import_module("nsa_conversion.finetune"), "is_peft_available", lambda: False)


def without_server(monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)


def full_disk(monkeypatch):
    def save(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", save)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save)


def interrupted(monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", stop)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", stop)


def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def no_answer(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


# (arguments of nsa; what the line says; what is changed beforehand)
MISTAKES = [
    # the command itself
    ("covert {dense} {work}/out", "unknown command 'covert'", None),
    ("--jsn", "unknown command '--jsn'", None),
    ("completion fish", "invalid choice: 'fish'", None),
    ("completion bash", "pip install 'nsa-transformers[completion]'", missing("shtab")),
    ("env --jsn", "unrecognized arguments: --jsn", None),
    # convert
    ("convert", "required: SOURCE", None),
    ("convert {dense}", "DEST is required", None),
    ("convert {work}/nothing {work}/out", "does not exist", None),
    ("convert {text} {work}/out", "neither a directory nor a .gguf file", None),
    ("convert {work}/nothing.gguf {work}/out", "nothing.gguf' does not exist", None),
    ("convert {dense} {dense}/out", "lies inside the source", None),
    ("convert {dense} {nsa}", "exists and is not empty", None),
    ("convert {dense} {text}", "is not a directory", None),
    ("convert {dense} {work}/out --compress-stride 5", "compress_stride", None),
    ("convert {dense} {work}/out --window-size 0", "window_size", None),
    ("convert {dense} {work}/out --window-size many", "invalid int value: 'many'", None),
    ("convert {dense} {work}/out --num-selected-blocks 1", "num_selected_blocks", None),
    ("convert {dense} {work}/out --compress-type max", "invalid choice: 'max'", None),
    ("convert {dense} {work}/out --wrong-flag 1", "unrecognized arguments: --wrong-flag", None),
    ("convert {dense} {work}/out --full-attention-layers 0,9", "full_attention_layers", None),
    ("convert {dense} {work}/out --dtype float8", "dtype must be one of", None),
    ("convert {dense} {work}/out --max-shard-size big", "max_shard_size must be", None),
    ("convert {dense} {work}/out --revision main", "needs a hub id", None),
    ("convert {dense} {work}/out --verify --verify-text {work}/nothing", "--verify-text must be", None),
    ("convert {dense} {work}/out --verify --verify-text {binary}", "is not UTF-8 text", None),
    ("convert {dense} {work}/out --verify --verify-text {empty}", "is empty", None),
    ("convert {dense} {work}/out --verify --verify-length 1", "--verify-length must be at least 2", None),
    ("convert {nsa} {work}/out", "native_sparse_attention", None),
    ("convert {adapter} {work}/out", "It is a PEFT adapter", None),
    ("convert {truncated} {work}/out --no-progress", "is not a complete safetensors file", None),
    ("convert {no_weights} {work}/out", "has no model.safetensors", None),
    ("convert {bad_config} {work}/out", "config.json is not valid JSON", None),
    ("convert {gpt2} {work}/out", "gpt2", None),
    ("convert {code} {work}/out", "--trust-remote-code", None),
    ("convert {pickle} {work}/out", "--allow-pickle", None),
    ("convert {not_gguf} {work}/out", "is not a complete GGUF file", None),
    ("convert {not_gguf} {work}/out", "needs the packages gguf and accelerate", missing("gguf")),
    ("convert owner/name {work}/out", "could not be fetched from the hub", offline),
    ("convert owner/name {work}/out", "could not be fetched from the hub", no_answer),
    ("convert {dense} {work}/out --no-progress", "no space left", full_disk),
    ("convert {dense} {work}/out --no-progress", "interrupted", interrupted),
    # finetune
    ("finetune", "--output-dir is required", None),
    (TRAIN, "--train-file or --dataset", None),
    (f"{TRAIN} --train-file {{work}}/nothing.txt", "does not exist", None),
    (f"{TRAIN} --train-file {{binary}}", "UTF-8", None),
    (f"{TRAIN} --train-file {{bad_jsonl}}", "not valid JSON", None),
    (f"{TRAIN} --dataset {{work}}/nothing", "cannot be loaded", None),
    (f"{TRAIN} --train-file {{text}} --learning-rat 1", "--learning-rat", None),
    (f"{TRAIN_TEXT} --learning-rate fast", "invalid float value: 'fast'", None),
    (f"{TRAIN_TEXT} --max-length 1", "--max-length must be at least 2", None),
    (f"{TRAIN_TEXT} --eval-fraction 2", "--eval-fraction must be", None),
    (f"{TRAIN_TEXT} --lora --lora-target-modules nothing", "match no linear layer", None),
    (f"{TRAIN_TEXT} --lora", "pip install 'nsa-transformers[train]'", without_peft),
    (TRAIN_TEXT, "pip install 'nsa-transformers[train]'", without_accelerate),
    (TRAIN_TEXT, "matplotlib", missing("matplotlib")),
    (TRAIN_TEXT.replace("{work}/out", "{nsa}"), "is the model itself", None),
    (TRAIN_TEXT.replace("{work}/out", "{dense}"), "is not empty", None),
    (f"{TRAIN_TEXT} --resume-from-checkpoint", "there is no checkpoint", None),
    (f"{TRAIN_TEXT} --stage distil", "invalid choice: 'distil'", None),
    (f"{TRAIN_TEXT} --stage warmup --learning-rate 1e-3", "set their rate with --new-parameter-lr", None),
    (f"{TRAIN_TEXT} --stage adapt --teacher {{work}}/nothing", "does not exist", None),
    (f"{TRAIN_TEXT.replace('{nsa}', '{dense}')} --stage warmup", "needs sparse layers", None),
    (f"{TRAIN_TEXT} --push-to-hub", "cannot upload to out", offline),
    (TRAIN_TEXT.replace("{nsa}", "{truncated}"), "cannot be loaded", None),
    (TRAIN_TEXT.replace("{nsa}", "{work}/nothing"), "does not exist", None),
    # eval
    ("eval", "required: MODEL", None),
    ("eval {work}/nothing --parts loss", "does not exist", None),
    ("eval {nsa} --parts loss --text-file {work}/nothing", "does not exist", None),
    ("eval {nsa} --parts loss --length 0", "length", None),
    ("eval {nsa} --parts loss --against {work}/nothing", "does not exist", None),
    ("eval {nsa} --parts loss --against {work}/nothing.gguf", "does not exist", None),
    ("eval {nsa} --parts loss --output {text}", "is a file; choose a directory", None),
    ("eval {nsa} --parts speed", "invalid choice: 'speed'", None),
    ("eval {nsa} --parts loss --resume", "--resume needs the --output DIR", None),
    ("eval {nsa} --parts loss --length 64 --lm-eval hellaswag", "lm_eval", missing("lm_eval")),
    ("eval {nsa} --parts loss --length 64 --device cuda:7", "device", None),
    # generate
    ("generate {nsa}", "--prompt --prompt-file --chat is required", None),
    ("generate {work}/nothing --prompt x", "does not exist", None),
    ("generate {adapter} --prompt x", "It is a PEFT adapter", None),
    ("generate {nsa} --prompt-file {work}/nothing", "does not exist", None),
    ("generate {nsa} --prompt x --max-new-tokens 0", "--max-new-tokens must be at least 1", None),
    ("generate {nsa} --prompt x --temperature=-1", "--temperature must not be negative", None),
    ("generate {nsa} --prompt x --top-p 7", "--top-p must be above 0 and at most 1", None),
    ("generate {nsa} --prompt x --top-k 0", "--top-k must be at least 1", None),
    ("generate {nsa} --prompt x --repetition-penalty 0", "--repetition-penalty must be above 0", None),
    ("generate {nsa} --prompt x --device cuda:7", "device", None),
    ("generate {nsa} --prompt x --device gpu", "device", None),
    ("generate {nsa} --prompt x --dtype int3", "dtype must be one of", None),
    ("generate {triton} --prompt x", "backend='triton' cannot run", no_interpreter),
    ("generate owner/name --prompt x", "cannot be loaded", offline),
    ("generate owner/name --prompt x", "cannot be loaded", no_answer),
    # serve
    ("serve", "required: MODEL", None),
    ("serve {work}/nothing", "does not exist", None),
    ("serve {adapter}", "It is a PEFT adapter", None),
    ("serve {not_gguf}", "nsa convert makes a directory of it", None),
    ("serve {no_tokenizer}", "has no tokenizer", None),
    ("serve {at}", "rename the directory", None),
    ("serve {truncated} --port {port}", "cannot be loaded", None),
    ("serve {classifier} --port {port}", "no causal language model", None),
    ("serve owner/name --port {port}", "cannot be loaded", offline),
    ("serve {nsa} --port 0", "--port must be between 1 and 65535", None),
    ("serve {nsa} --port {taken}", "in use; choose another", None),
    ("serve {nsa} --host nowhere.invalid", "cannot listen on --host nowhere.invalid", None),
    ("serve {nsa} --device cuda:7", "device 'cuda:7' cannot be used", None),
    ("serve {nsa} --dtype int3", "dtype must be one of", None),
    ("serve {nsa} --chat-template-kwargs [1]", "must be a JSON object", None),
    ("serve {nsa} --continuous-batching", "unrecognized arguments: --continuous-batching", None),
    ("serve {nsa}", "pip install 'nsa-transformers[serving]'", without_server),
    # inspect
    ("inspect {nsa} --text {work}/nothing --output {work}/page.html", "does not exist", None),
    ("inspect {nsa} --output {text}", "exists; choose another file", None),
    ("inspect {nsa} --overwrite --output {nsa}", "is a directory; name a file in it", None),
    ("inspect {nsa} --output {work}/nothing/page.html", "does not exist", None),
    ("inspect {dense} --output {work}/page.html --length 64", "has no layers of native sparse attention", None),
    # push
    ("push {nsa}", "required: REPO", None),
    ("push {work}/nothing me/name", "is not a directory", None),
    ("push {work} me/name", "holds no model", None),
    ("push {nsa} me/your/name", "must be a hub id", None),
    ("push {no_weights} me/name", "lacks model.safetensors", None),
    ("push {adapter} me/name", "is not on the hub", None),
    ("push {nsa} me/name", "unset HF_HUB_OFFLINE", offline),
    ("push {nsa} me/name", "cannot upload to me/name", no_answer),
    # demo
    ("demo --output {text}", "is a file; choose a directory", None),
    ("demo --output {work}/out --steps none", "invalid int value", None),
    ("demo --output {work}/out --source {work}/nothing", "does not exist", None),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Everything that the mistakes are made with, by name; `work` is added for each test."""
    root = tmp_path_factory.mktemp("places")
    dense = make_checkpoint(root / "dense")
    convert(dense, root / "nsa", progress=False, **SMALL_NSA)
    (root / "text.txt").write_text(builtin_text()[:4000], encoding="utf-8")
    (root / "empty.txt").write_text(" ")
    (root / "binary.txt").write_bytes(bytes(range(256)))
    (root / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (root / "file.gguf").write_bytes(b"GGUF and then nothing")
    (root / "adapter").mkdir()
    adapter = {"base_model_name_or_path": str(root / "nsa"), "peft_type": "LORA"}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({"a": torch.zeros(1)}, root / "adapter" / "adapter_model.safetensors")

    def damaged(name, damage):
        directory = shutil.copytree(dense, root / name)
        damage(directory)
        return directory

    def edit(directory, **changes):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    def pickle(directory):
        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()

    damaged("truncated", lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-99]))
    damaged("no_weights", lambda d: (d / "model.safetensors").unlink())
    damaged("bad_config", lambda d: (d / "config.json").write_text('{"model_type": '))
    damaged("gpt2", lambda d: edit(d, model_type="gpt2"))
    damaged("code", lambda d: edit(d, auto_map={"AutoModel": "modeling_x.X"}))
    damaged("pickle", pickle)
    damaged("no_tokenizer", lambda d: [file.unlink() for file in d.glob("tokenizer*")])
    damaged("at", lambda d: None).rename(root / "me@home")
    damaged("classifier", lambda d: edit(d, architectures=["NSAForTokenClassification"]))
    shutil.copytree(root / "nsa", root / "triton")
    edit(root / "triton", nsa_backend="triton")
    places = {path.stem: path for path in root.iterdir()}
    return places | {"bad_jsonl": root / "bad.jsonl", "not_gguf": root / "file.gguf", "at": root / "me@home"}


@pytest.fixture(scope="module")
def ports():
    """A port that somebody listens on, and one that is free."""
    with socket.create_server(("localhost", 0)) as listening, socket.socket() as free:
        free.bind(("localhost", 0))
        number = free.getsockname()[1]
        free.close()
        yield {"taken": listening.getsockname()[1], "port": number}


def written(places):
    """When each file and directory changed last."""
    return {path: path.stat().st_mtime_ns for place in places.values() for path in [place, *place.rglob("*")]}


def test_there_are_enough_of_them():
    assert len(MISTAKES) >= 60
    assert len({(arguments, change) for arguments, _, change in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize("arguments, message, change", MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_mistake(places, ports, tmp_path, monkeypatch, capfd, arguments, message, change):
    if "generate {triton}" in arguments and torch.cuda.is_available():
        pytest.skip("the kernels can run here")
    if "cuda:7" in arguments and torch.cuda.device_count() > 7:
        pytest.skip("there is such a device")
    if arguments.startswith("serve "):
        pytest.importorskip("fastapi")
        pytest.importorskip("openai")
    monkeypatch.delenv("NSA_DEBUG", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.chdir(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    before = written(places)
    if change is not None:
        change(monkeypatch)
    code = cli.main(arguments.format(**places, **ports, work=work).split())
    monkeypatch.undo()
    out, err = capfd.readouterr()
    assert code == (130 if "interrupted" in message else 2), err
    assert "Traceback" not in out + err
    (line,) = [line for line in err.splitlines() if line.startswith("nsa")]
    assert message in line
    assert len(line) < 700
    assert list(work.iterdir()) == [], "something was left behind"
    assert written(places) == before
