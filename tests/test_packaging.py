# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The layout, the wheel and the import rules that users and other libraries rely on."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "modeling_nsa": ROOT / "modeling_nsa",
    "nsa_kernels": ROOT / "kernels" / "nsa_kernels",
    "nsa_conversion": ROOT / "conversion" / "nsa_conversion",
}
# Who may not import whom: nsa_conversion -> modeling_nsa -> nsa_kernels -> torch / triton.
FORBIDDEN = {
    "nsa_kernels": {"transformers", "modeling_nsa", "nsa_conversion"},
    "modeling_nsa": {"triton", "nsa_conversion"},
    "nsa_conversion": {"triton"},
}
COMMANDS = ("convert", "finetune", "eval", "generate", "serve", "push", "inspect", "env", "completion", "demo")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# `python some/script.py --flags` of this repository, as against the flags of `nsa`.
SCRIPT_CALL = r"python (\S+\.py)([^`\n]*)"


def python_files(folder: Path = ROOT) -> list[Path]:
    """Every .py file below `folder`, without environments, builds and hidden folders."""
    skipped = {"build", "dist"}
    files = []
    for path in folder.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if not any(part.startswith(".") or part in skipped or "venv" in part for part in parts):
            files.append(path)
    return sorted(files)


def imported_names(path: Path) -> set[str]:
    """The top-level names of all absolute imports of a file, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def missing_flags(text: str, offered: str) -> set[str]:
    """The flags that `text` names and the help text `offered` does not."""
    return {flag for flag in re.findall(r"--[a-z][a-z0-9-]+", text) if not re.search(rf"{flag}\b", offered)}


def environment(**extra: str) -> dict[str, str]:
    """The process environment without whatever would let the checkout be imported."""
    kept = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "PYTHONWARNINGS"}}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", **extra}


def run(python: Path | str, *arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [str(python), *arguments], cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{arguments} failed:\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in PACKAGES.values():
        target = source / folder.relative_to(ROOT)
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__"))
    dist = tmp_path_factory.mktemp("dist")
    pip_wheel = ("-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, *pip_wheel, "--wheel-dir", str(dist), ".", cwd=source)
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that holds the wheel alone; torch and transformers come through a .pth file."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    python = folder / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = folder / "lib" / version / "site-packages"
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # Lines of a .pth file are put on sys.path as they are: an editable install of the checkout is not followed.
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n", encoding="utf-8")
    pip_install = ("-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index")
    run(sys.executable, *pip_install, "--ignore-installed", str(wheel), cwd=folder)
    return python


def test_source_folders_are_not_packages():
    for folder in ("kernels", "conversion"):
        assert (ROOT / folder).is_dir()
        assert not (ROOT / folder / "__init__.py").exists(), (
            f"{folder}/__init__.py would make `import {folder}` find this folder in place of an installed library"
        )


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_licence_header(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == [
        "# Copyright 2026 The NSA for Transformers authors",
        "# SPDX-License-Identifier: Apache-2.0",
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_import_arrows(package):
    for path in python_files(PACKAGES[package]):
        wrong = imported_names(path) & FORBIDDEN[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}, which {package} must not"


def test_ci_calls_the_commands_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^make test$", script.read_text(encoding="utf-8"), re.MULTILINE)
    for command in ("make demo", "make test"):
        assert re.search(rf"^{command}$", README, re.MULTILINE)
        assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_readme_tree_matches_the_files():
    (tree,) = re.findall(r"^```text\n(.*?)^```", README.split("## Files", 1)[1], re.MULTILINE | re.DOTALL)
    named, folder = set(), Path()
    for row in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", row).groups()
        if name.endswith("/"):
            folder = Path(name)
        else:
            named.add(folder / name if indent else Path(name))
    for path in named:
        assert (ROOT / path).exists(), f"the README tree names {path}, which does not exist"
    for package in PACKAGES.values():
        for path in python_files(package):
            assert path.relative_to(ROOT) in named, f"the README tree does not name {path.relative_to(ROOT)}"


def test_wheel_contents(wheel):
    expected = {
        str(Path(name) / path.relative_to(folder)) for name, folder in PACKAGES.items() for path in python_files(folder)
    }
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert {n for n in names if ".dist-info/" not in n} == expected
    assert any(n.endswith("/LICENSE") for n in names)
    for extra in ("train", "eval", "gguf", "serving", "completion", "notebooks", "test", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "Requires-Python: >=3.11" in metadata
    # Its own requirements compile llama.cpp: it is installed with --no-deps, never by an extra.
    assert not re.search(r"^Requires-Dist: llm.smollm2", metadata, re.MULTILINE)


def test_makefile_and_metadata_agree_on_torch():
    from packaging.requirements import Requirement

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    required = {r.name: r for r in map(Requirement, setup["options"]["install_requires"].split("\n")[1:])}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pinned = re.search(r"^TORCH \?= torch==(\S+)$", makefile, re.MULTILINE).group(1)
    assert required["torch"].specifier.contains(pinned)


@pytest.mark.slow
def test_wheel_alone_imports_quietly(installed, tmp_path):
    code = """
import sys, warnings
import torch, transformers
from transformers import GenerationMixin, PreTrainedModel, Trainer
warnings.simplefilter("error")
import nsa_kernels, modeling_nsa, nsa_conversion
for module in (nsa_kernels, modeling_nsa, nsa_conversion):
    assert module.__file__.startswith(sys.prefix), module.__file__
    assert all(hasattr(module, name) for name in module.__all__), module.__name__
assert not torch.cuda.is_initialized()
config = transformers.AutoConfig.for_model("native_sparse_attention")
assert type(config) is modeling_nsa.NSAConfig
"""
    result = run(installed, "-c", code, cwd=tmp_path)
    assert result.stdout == ""
    assert result.stderr == ""


@pytest.mark.slow
def test_wheel_command_line_help(installed, tmp_path):
    overview = run(installed.with_name("nsa"), "--help", cwd=tmp_path).stdout
    assert all(f"  {command} " in overview for command in COMMANDS)
    # One process for all: each would import torch anew.
    code = f"""
import contextlib
from nsa_conversion.cli import main
from nsa_kernels import tune
for command in {COMMANDS}:
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
with contextlib.suppress(SystemExit):
    tune.main(["--help"])
"""
    offered = run(installed, "-c", code, cwd=tmp_path).stdout
    assert all(f"usage: nsa {command} " in offered for command in COMMANDS)
    missing = missing_flags(re.sub(SCRIPT_CALL, "", README), offered)
    assert not missing, f"the README names {missing}, which no command has"


@pytest.mark.parametrize("script", sorted({call[1] for call in re.finditer(SCRIPT_CALL, README)}))
def test_script_flags_in_the_readme_exist(script):
    offered = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True
    ).stdout
    for call in re.finditer(SCRIPT_CALL, README):
        if call[1] == script:
            missing = missing_flags(call[2], offered)
            assert not missing, f"the README names {missing}, which {script} does not have"


def test_kernels_import_without_transformers_and_triton(installed, tmp_path):
    code = "import sys, nsa_kernels; print(sorted({'transformers', 'triton'} & set(sys.modules)))"
    assert run(installed, "-c", code, cwd=tmp_path).stdout.strip() == "[]"


@pytest.mark.slow
def test_model_runs_where_triton_is_not_installed(installed, tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import torch, modeling_nsa
config = modeling_nsa.NSAConfig(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, compress_block_size=8, compress_stride=4, select_block_size=8,
    num_selected_blocks=4, window_size=8,
)
logits = modeling_nsa.NSAForCausalLM(config)(torch.arange(24)[None]).logits
assert logits.shape == (1, 24, 32) and logits.isfinite().all()
"""
    run(installed, "-c", code, cwd=tmp_path)
