# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The demo on a tiny checkpoint: every step runs, and nothing of the user's is lost."""

import re

import pytest
from tiny import make_checkpoint
from transformers import AutoModelForCausalLM

import modeling_nsa
from nsa_conversion.cli import main
from nsa_conversion.demo import demo
from nsa_conversion.errors import NSAError

SMALL = {"steps": 1, "train_length": 40, "verify_length": 40, "max_new_tokens": 3}


def flags(settings):
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.slow
def test_demo_shows_every_step(tmp_path, capsys):
    source, output = make_checkpoint(tmp_path / "dense"), tmp_path / "out"
    assert main(["demo", "--source", str(source), "--output", str(output), *flags(SMALL)]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^== (\d)\. ", printed, re.MULTILINE) == ["1", "2", "3", "4"]
    assert float(re.search(r"max \|Δlogit\| over \S+ tokens: (\S+)", printed)[1]) < 1e-4
    for command in ("nsa convert", "nsa eval", "nsa finetune", "nsa generate"):
        assert f"{command} " in printed
    assert type(AutoModelForCausalLM.from_pretrained(output / "finetuned")) is modeling_nsa.NSAForCausalLM

    (output / "notes.txt").write_text("the user's")
    with pytest.raises(NSAError, match="earlier run"):
        demo(output, source=source, **SMALL)
    demo(output, source=source, overwrite=True, **SMALL)
    assert (output / "notes.txt").read_text() == "the user's"


@pytest.mark.parametrize("name", SMALL)
def test_demo_refuses_small_numbers(tmp_path, name):
    with pytest.raises(NSAError, match=rf"{name} must be at least \d, got 0"):
        demo(tmp_path / "out", source=tmp_path, **SMALL | {name: 0})
    assert not (tmp_path / "out").exists()


def test_demo_refuses_a_file_as_output(tmp_path):
    file = tmp_path / "out"
    file.write_text("a file")
    with pytest.raises(NSAError, match="is a file"):
        demo(file, source=tmp_path, **SMALL)
