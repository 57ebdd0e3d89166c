# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The model's own code as files beside the weights, for `trust_remote_code=True` where this package is not installed.

transformers copies only modules that lie side by side and import each other by `from .name import …`. So the modules of
this package and of `nsa_kernels` become flat: `nsa_kernels/window.py` is `nsa_kernels_window.py`, and imports follow.
Flat modules stay as they are: what was loaded from such a directory is saved again by the same function.
"""

import ast
import functools
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # never run: by these names transformers finds every file from each class that it loads
    from .modeling_nsa import NSAModel  # noqa: F401

__all__ = ["AUTO_MAP", "remote_code", "write_remote_code"]

# where transformers finds the class of each Auto class
AUTO_MAP = {
    "AutoConfig": "configuration_nsa.NSAConfig",
    "AutoModel": "modeling_nsa.NSAModel",
    "AutoModelForCausalLM": "modeling_nsa.NSAForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_nsa.NSAForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_nsa.NSAForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_nsa.NSAForTokenClassification",
}
_KERNELS = "nsa_kernels"
_COMPUTED = ("import_module", "__import__")
# transformers refuses to load code whose imports are missing, unless they are inside `try`
_OPTIONAL = {"triton", "liger_kernel"}
_INSTALLED = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}


def write_remote_code(directory: str | Path) -> None:
    """Write the files of `remote_code` into `directory`, which is made if it is not there."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in remote_code().items():
        (directory / name).write_text(text, encoding="utf-8")


@functools.cache
def remote_code() -> dict[str, str]:
    """The model's code as flat modules.

    Returns:
        Text by file name; `modeling_nsa.py` and each module that it needs.

    Raises:
        NotImplementedError: A module imports in a way that cannot be made flat.
    """
    code, named, waiting = {}, set(), [Path(__file__).with_name("modeling_nsa.py")]
    while waiting:
        path = waiting.pop()
        name = f"{_flat(path)}.py"
        if name not in code:
            code[name], followed, bare = _flatten(path)
            named |= bare
            waiting += followed
    if missing := sorted({f"{_flat(path)}.py" for path in named} - set(code)):
        raise NotImplementedError(
            f"{', '.join(missing)} would not be copied: transformers follows only `from .name import …`; add one."
        )
    return dict(sorted(code.items()))


def _flat(path):
    """Name of the flat module that `path` becomes."""
    if path.parent == Path(__file__).parent:
        return path.stem
    return path.parent.name if path.stem == "__init__" else f"{path.parent.name}_{path.stem}"


def _flatten(path):
    """`(text, modules it imports from, modules it imports whole)` of one file; only import statements change."""
    source = path.read_text(encoding="utf-8")
    lines, followed, bare, optional = source.splitlines(keepends=True), [], set(), []
    tree = ast.parse(source)
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in _COMPUTED:
            _refuse(path, node, "an import that is computed cannot be followed")
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == _KERNELS):
            if node.level > 1 or (node.level and "." in (node.module or "")):
                _refuse(path, node, "only modules of the same folder become flat")
            elif node.module is None:
                bare |= _rewrite_whole(path, lines, node)
            else:
                followed.append(_rewrite_from(path, lines, node))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            roots = {name.split(".")[0] for name in names}
            if roots <= _OPTIONAL:
                optional += [node] if id(node) not in guarded else []
            elif not roots <= _INSTALLED:
                _refuse(path, node, "transformers and torch do not bring this module")
    _guard(lines, optional)
    return "".join(lines), followed, bare


def _refuse(path, node, reason):
    raise NotImplementedError(f"{path.name}, line {node.lineno}: {ast.unparse(node)}: {reason}.")


def _rewrite_from(path, lines, node):
    """Point `from .name import …` or `from nsa_kernels.name import …` at the flat module; returns its file."""
    module = path.with_name(f"{node.module}.py") if node.level else _kernel_file(node.module)
    if not module.is_file():
        _refuse(path, node, "there is no such module")
    if module.stem == "__init__" and any(module.with_name(f"{alias.name}.py").is_file() for alias in node.names):
        _refuse(path, node, "a module cannot be imported from its package")
    old, line = f"from {'.' * node.level}{node.module} import", lines[node.lineno - 1]
    if not line.lstrip().startswith(old):
        _refuse(path, node, f"the statement must start with `{old}`")
    lines[node.lineno - 1] = line.replace(old, f"from .{_flat(module)} import", 1)
    return module


def _rewrite_whole(path, lines, node):
    """Point `from . import name` at the flat module; returns the modules' files."""
    modules = {alias.name: path.with_name(f"{alias.name}.py") for alias in node.names}
    if absent := [name for name, file in modules.items() if not file.is_file()]:
        _refuse(path, node, f"{', '.join(absent)} is not a module of the same folder")
    if any(_flat(file) != name for name, file in modules.items()):
        aliases = (f"{_flat(modules[alias.name])} as {alias.asname or alias.name}" for alias in node.names)
        _replace(lines, node, f"from . import {', '.join(aliases)}")
    return set(modules.values())


def _kernel_file(module):
    spec = importlib.util.find_spec(module)
    return Path(spec.origin if spec else module)


def _replace(lines, node, statement):
    """Put `statement` in the place of `node`; line numbers stay valid."""
    lines[node.lineno - 1] = " " * node.col_offset + statement + "\n"
    for number in range(node.lineno, node.end_lineno):
        lines[number] = ""


def _guard(lines, nodes):
    """Put each run of import statements inside `try`; a missing package still raises when the module is imported."""
    taken = {number for node in nodes for number in range(node.lineno - 1, node.end_lineno)}
    for node in nodes:
        indent = " " * node.col_offset
        first, last = node.lineno - 1, node.end_lineno - 1
        end = "" if last + 1 in taken else f"{indent}except ImportError:\n{indent}    raise\n"
        start = "" if first - 1 in taken else f"{indent}try:\n"
        for number in range(first, last + 1):
            lines[number] = f"    {lines[number]}"
        lines[first] = start + lines[first]
        lines[last] += end
