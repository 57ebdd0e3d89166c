# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The operations as a kernel of the hub: its files are what the `kernels` library asks for, and it loads."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import nsa_kernels

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "kernels" / "build_kernel.py"
BLOCKS = {"compress_block_size": 8, "compress_stride": 4}
SIZES = {**BLOCKS, "select_block_size": 8, "num_selected_blocks": 4, "window_size": 8, "backend": "reference"}
# The folder of this repository is found under that name as well.
INSTALLED = any(distribution.name == "kernels" for distribution in importlib.metadata.distributions())


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernel") / "repository"
    done = subprocess.run([sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, check=True)
    assert str(path) in done.stdout
    return path


def load(folder):
    """As `kernels.get_local_kernel`: the folder becomes a package named by the id in its metadata."""
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def same(kernel):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 48, 4, 16), torch.randn(1, 48, 2, 16), torch.randn(1, 48, 2, 16)
    gates = torch.rand(3, 1, 48, 4).unbind()
    k_cmp, v_cmp = (kernel.compress_mean(x, **BLOCKS) for x in (k, v))
    found = kernel.nsa_attention(q, k, v, k_cmp, v_cmp, k, v, *gates, **SIZES)
    expected = nsa_kernels.nsa_attention(q, k, v, k_cmp, v_cmp, k, v, *gates, **SIZES)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_build_toml_and_metadata(repository):
    config = tomllib.loads((repository / "build.toml").read_text())
    assert set(config) == {"general", "torch-noarch"}
    assert set(config["general"]) == {"name", "version", "edition", "license", "backends"}
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", config["general"]["name"])
    assert (repository / "torch-ext" / config["general"]["name"].replace("-", "_") / "__init__.py").is_file()
    variants = {path.name for path in (repository / "build").iterdir()}
    assert variants == {f"torch-{backend}" for backend in config["general"]["backends"]}
    for variant in variants:
        metadata = json.loads((repository / "build" / variant / "metadata.json").read_text())
        assert metadata["name"] == config["general"]["name"]
        assert metadata["version"] == config["general"]["version"]
        assert metadata["backend"] == {"type": variant.removeprefix("torch-")}
        assert metadata["id"].isidentifier()


def test_variants_load_beside_the_package_and_each_other(repository):
    modules = [load(repository / "build" / variant) for variant in ("torch-cuda", "torch-cpu")]
    assert modules[0].__name__ != modules[1].__name__
    for module in modules:
        assert set(module.__all__) == set(nsa_kernels.__all__)
        same(module)


@pytest.mark.skipif(not INSTALLED, reason="needs the kernels library")
def test_the_kernels_library_loads_it(repository):
    import kernels

    for variant in ("torch-cuda", "torch-cpu"):
        kernels.Metadata.read_from_file(repository / "build" / variant / "metadata.json")
    same(kernels.get_local_kernel(repository))


def test_a_directory_with_files_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "must be a directory that is new or empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
