# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""`nsa env` says what is there, and which implementation runs and why."""

import json
import types

import torch

from nsa_conversion import cli
from nsa_conversion.env import environment


def test_env_prints_what_it_finds(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"transformers          {environment()['packages']['transformers']}" in out
    assert "sparse layers on cpu" in out
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == environment()


def test_env_says_why_the_reference_runs(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend = environment()["backends"]["cpu"]
    assert backend["auto"] == "reference"
    assert "CUDA" in backend["triton"] or "Triton is not installed" in backend["triton"]


def test_env_describes_devices(monkeypatch, capsys):
    device = types.SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr("nsa_kernels.interface.resolve_backend", lambda backend, q: "triton")
    monkeypatch.setattr("nsa_kernels.availability.triton_error", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    found = {}
    monkeypatch.setattr("nsa_kernels.tuning.stored", lambda index: found)
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert "Some GPU, compute capability 9.0, 80.0 GiB" in out
    assert "triton; the kernels can run" in out
    assert "configurations: built in\n" in out
    monkeypatch.setenv("NSA_KERNELS_CACHE", "/some/file.json")
    found |= {"scores": {"one shape": {}, "another": {}}, "decode": {"one shape": {}}}
    assert cli.main(["env"]) == 0
    assert "configurations: 3 measured, in /some/file.json; else built in" in capsys.readouterr().out


def test_env_tells_a_wrong_switch(monkeypatch):
    from nsa_conversion.env import _configurations
    from nsa_kernels import tuning

    monkeypatch.setattr(tuning, "machine", lambda index: "Some GPU, Triton 3.6.0")
    monkeypatch.setenv("NSA_KERNELS_TUNING", "off")
    tuning.forget()
    assert "NSA_KERNELS_TUNING must be 0" in _configurations(0)
    tuning.forget()
