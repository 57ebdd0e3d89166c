# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The completion scripts know every command and its flags, and shells can read them."""

import shutil
import subprocess

import pytest

from nsa_conversion import cli

pytest.importorskip("shtab")


def test_bash_script(tmp_path, capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in cli.COMMANDS)
    assert "--num-selected-blocks" in script
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    (tmp_path / "nsa").write_text(script)
    ask = f"source {tmp_path}/nsa; COMP_WORDS=(nsa con); COMP_CWORD=1; _shtab_nsa nsa con nsa; echo ${{COMPREPLY[@]}}"
    found = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["convert"]


def test_zsh_script(capsys):
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef nsa")
