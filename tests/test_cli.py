# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The `nsa` command: dispatch, exit codes, one clear line per error; and the lazy package."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from nsa_conversion import cli
from nsa_conversion.errors import NSAError, listing

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "conversion"))}
NSA_FLAGS = [part for name, value in tiny.SMALL_NSA.items() for part in (f"--{name.replace('_', '-')}", str(value))]

convert_module = importlib.import_module("nsa_conversion.convert")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.make_checkpoint(tmp_path_factory.mktemp("source") / "llama", "llama")


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in cli.COMMANDS)
    assert cli.main([]) == 2
    capsys.readouterr()
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nsa ")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_help_of_a_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["help", "env"])
    assert capsys.readouterr().out.startswith("usage: nsa env")


def test_unknown_command(capsys):
    assert cli.main(["covert"]) == 2
    err = capsys.readouterr().err
    assert "unknown command 'covert'" in err
    assert "convert" in err


@pytest.mark.parametrize(
    "error, code, text",
    [
        (NSAError("this\n  is wrong"), 2, "nsa convert: error: this is wrong"),
        (ValueError("bad size"), 2, "nsa convert: error: bad size"),
        (NotImplementedError("no such path"), 2, "nsa convert: error: no such path"),
        (OSError("unreadable"), 2, "nsa convert: error: unreadable"),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), 2, "not enough memory. Shorten the texts"),
        (KeyboardInterrupt(), 130, "nsa convert: interrupted."),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 2, "pip install 'nsa-transformers[train]'"),
        (ImportError("x needs the deepspeed library."), 2, "deepspeed library. Install the missing package with pip."),
    ],
)
def test_errors_become_one_line(monkeypatch, capsys, error, code, text):
    def fail(argv):
        raise error

    monkeypatch.setattr(convert_module, "main", fail)
    monkeypatch.delenv("NSA_DEBUG", raising=False)
    assert cli.main(["convert"]) == code
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    monkeypatch.setenv("NSA_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["convert"])


def test_a_defect_is_not_dressed_up_as_a_mistake(monkeypatch):
    def fail(argv):
        raise ModuleNotFoundError("No module named 'nsa_kernels'", name="nsa_kernels")

    monkeypatch.setattr(convert_module, "main", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["convert"])


def test_convert_from_the_command_line(tmp_path, llama, capsys):
    dest = tmp_path / "nsa"
    # Dashes or underscores, a value apart or after an equals sign.
    flags = [*NSA_FLAGS, "--shared_kv", "--full_attention_layers=1", "--dtype", "bfloat16", "--no-progress"]
    assert cli.main(["convert", str(llama), str(dest), *flags]) == 0
    out = capsys.readouterr().out
    assert f"Wrote {dest}" in out
    assert "8k tokens" in out
    config = json.loads((dest / "config.json").read_text())
    assert config["shared_kv"] is True
    assert config["layer_types"] == ["native_sparse_attention", "full_attention"]
    assert config["dtype"] == "bfloat16"
    assert {name: config[name] for name in tiny.SMALL_NSA} == tiny.SMALL_NSA

    assert cli.main(["convert", str(llama), str(dest)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_dry_run_writes_nothing(tmp_path, llama, capsys):
    assert cli.main(["convert", str(llama), "--dry-run"]) == 0
    assert "KV cache, converted" in capsys.readouterr().out
    assert cli.main(["convert", str(llama), str(tmp_path / "nsa"), "--dry-run", "--json", *NSA_FLAGS]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["nsa"]["window_size"] == 12
    for dest, message in ((llama / "nsa", "lies inside the source"), (llama, "is not empty")):
        assert cli.main(["convert", str(llama), str(dest), "--dry-run"]) == 2
        assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_verify_from_the_command_line(tmp_path, llama, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Seven wizards boxed quickly. " * 10)
    command = ["convert", str(llama), str(tmp_path / "nsa"), *NSA_FLAGS, "--no-progress", "--json"]
    assert cli.main([*command, "--verify", "--verify-text", str(text), "--verify-length", "96"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verify"]["exact"] is True
    assert report["verify"]["length"] == 96


def test_verify_reads_what_was_written_through_a_link(tmp_path, llama, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("elsewhere")
    command = ["convert", str(llama), "link", *NSA_FLAGS, "--no-progress", "--verify", "--verify-length", "40"]
    assert cli.main(command) == 0
    assert f"Wrote {tmp_path / 'elsewhere'}" in capsys.readouterr().out


def test_verify_of_rounded_weights_is_no_failure(tmp_path, llama, capsys):
    command = ["convert", str(llama), str(tmp_path / "nsa"), *NSA_FLAGS, "--no-progress", "--dtype", "bfloat16"]
    assert cli.main([*command, "--verify", "--verify-length", "40"]) == 0
    assert "were rounded to another dtype" in capsys.readouterr().out


def test_verify_that_fails_has_its_own_exit_code(tmp_path, llama, monkeypatch, capsys):
    verify_module = importlib.import_module("nsa_conversion.verify")
    monkeypatch.setattr(verify_module, "TOLERANCE", -1.0)
    command = ["convert", str(llama), str(tmp_path / "nsa"), *NSA_FLAGS, "--no-progress", "--verify"]
    assert cli.main([*command, "--verify-length", "40"]) == 1
    assert "NOT equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{source}"], "DEST is required"),
        (["{tmp}/nothing", "{tmp}/nsa"], "does not exist"),
        (["{source}", "{tmp}/nsa", "--compress-stride", "5"], "compress_stride"),
        (["{source}", "{tmp}/nsa", "--full-attention-layers", "x"], "full_attention_layers must look like"),
        (["{source}", "{tmp}/nsa", "--verify", "--verify-text", "{tmp}/none"], "--verify-text must be"),
        (["{source}", "{tmp}/nsa", "--revision", "main"], "needs a hub id"),
    ],
)
def test_bad_requests(tmp_path, llama, capsys, arguments, message):
    arguments = [part.format(source=llama, tmp=tmp_path) for part in arguments]
    assert cli.main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_progress_bar_is_on_stderr(tmp_path, llama, capfd):
    assert cli.main(["convert", str(llama), str(tmp_path / "nsa"), *NSA_FLAGS]) == 0
    out, err = capfd.readouterr()
    assert "Converting" in err
    assert "Converting" not in out


def test_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "nsa_conversion", "--version"], env=ENV, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("nsa ")


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "{model}", "--prompt", "x", "--device", "cpu"]])
def test_a_reader_that_leaves_is_no_mistake(llama, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "nsa_conversion", *(part.format(model=llama) for part in arguments)]
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(command, env=ENV, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 141
    assert "Broken" not in done.stderr


def test_package_is_lazy_and_its_names_are_functions():
    code = (
        "import sys, nsa_conversion\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'\n"
        "import importlib\n"
        "module = importlib.import_module('nsa_conversion.convert')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'\n"
        "assert nsa_conversion.convert is module.convert\n"
        "from nsa_conversion import NSAError, convert\n"
        "assert convert is module.convert\n"
        "assert set(nsa_conversion.__all__) <= set(dir(nsa_conversion))\n"
    )
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True)


def test_every_public_name_exists():
    import nsa_conversion

    assert all(getattr(nsa_conversion, name) is not None for name in nsa_conversion.__all__)
    assert callable(nsa_conversion.finetune)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nsa_conversion.nothing


def test_listing_is_bounded():
    assert listing(["a", 1]) == "a, 1"
    assert listing(range(5), limit=3) == "0, 1, 2 and 2 more"
