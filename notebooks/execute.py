# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Execute notebooks and store their outputs, without anything that changes from run to run.

    python notebooks/execute.py [NAME.ipynb …]

Needs `pip install -e ".[notebooks]"`. What the notebooks write goes to a temporary directory.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

__all__ = ["clean", "execute", "read", "write"]

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook."""
    return nbformat.read(path, as_version=4)


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Store a notebook; the old one stays until the new one is whole."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    beside.replace(path)


def execute(
    notebook: nbformat.NotebookNode, folder: Path, parameters: dict | None = None, timeout: int = 3600, **env: str
) -> nbformat.NotebookNode:
    """Run all cells with the packages of this checkout; an exception in a cell is raised.

    Args:
        notebook: changed in place.
        folder: working directory.
        parameters: values assigned after the cell with the tag `parameters`.
        timeout: seconds for one cell.
        env: environment variables of the kernel.

    Returns:
        The notebook.
    """
    if parameters:
        (where,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
        lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        notebook.cells.insert(where + 1, nbformat.v4.new_code_cell(lines))
    paths = [str(ROOT / part) for part in ("", "kernels", "conversion")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "NSA_CHECKOUT": str(ROOT), **env}
    client = NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}})
    return client.execute(env=env)


def clean(notebook: nbformat.NotebookNode, places: Sequence[str] = ()) -> nbformat.NotebookNode:
    """Drop counts, versions, progress bars and directories, so that only sources and results are left to compare.

    Args:
        notebook: changed in place.
        places: directories of this machine, cut off the paths in printed text.

    Returns:
        The notebook.
    """
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        outputs = []
        for output in cell.outputs:
            if WIDGET in output.get("data", {}):  # a widget has no state in a file
                continue
            if "execution_count" in output:
                output.execution_count = None
            if outputs and output.get("name") and output.get("name") == outputs[-1].get("name"):
                outputs[-1].text += output.text  # how a stream comes in pieces is chance
            else:
                outputs.append(output)
        for output in outputs:
            for place in places:
                if "text" in output:
                    output.text = output.text.replace(f"{place}{os.sep}", "")
        cell.outputs = outputs
    return notebook


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")), metavar="NAME.ipynb")
    for path in parser.parse_args().notebooks:
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(read(path), Path(folder), HF_HUB_OFFLINE="1")
        write(clean(notebook, [folder, *(place for place in sys.path if place.endswith("site-packages"))]), path)
        print(f"executed {path.name}", flush=True)


if __name__ == "__main__":
    main()
