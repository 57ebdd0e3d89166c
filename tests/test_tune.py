# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""`nsa_kernels.tune`: what it tries, holds to the built-in results, keeps and writes, and what it refuses."""

import json

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime.errors import OutOfResources

from nsa_kernels import tune as tune_module
from nsa_kernels import tuning
from nsa_kernels.tune import KERNELS, main, tune
from nsa_kernels.validation import check_sizes

SIZES = {"compress_block_size": 16, "compress_stride": 8, "select_block_size": 32, "num_selected_blocks": 2}
SIZES |= {"num_initial_blocks": 0, "num_local_blocks": 1, "window_size": 16}
SHAPE = {"heads": 1, "key_value_heads": 1, "head_dim": 16, "dtype": torch.float32, "tokens": 96, **SIZES}
FLAGS = ["--heads", "1", "--key-value-heads", "1", "--head-dim", "16", "--dtype", "float32", "--tokens", "96"]
FLAGS += [part for name, value in SIZES.items() for part in (f"--{name.replace('_', '-')}", str(value))]
GPU = f"Some GPU, Triton {triton.__version__}"
LABEL = "dtype=float32 D=16 DV=16 G=1 select_block_size=32"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The file to write, of a process that has not read it yet."""
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv("NSA_KERNELS_CACHE", str(path))
    monkeypatch.delenv("NSA_KERNELS_TUNING", raising=False)
    tuning.machine.cache_clear()
    tuning.forget()
    yield path
    tuning.machine.cache_clear()
    tuning.forget()


@pytest.fixture
def interpreter(cache, monkeypatch):
    """Kernels run in the interpreter, in place of some GPU.

    Returns:
        A function that takes a kernel's name and its clock: milliseconds by configuration.
    """
    if torch.cuda.is_available():
        pytest.skip("kernels do not run in the interpreter here")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(tune_module, "_device", lambda: torch.device("cpu"))
    clocks = {}

    def milliseconds(run, names):
        (kernel,) = (k for k, how in tune_module._COMPUTED_BY.items() if how == (run.__name__, names))
        (config,) = (x for (device, *_), x in tuning.TUNABLES[kernel].chosen.items() if device == -1)
        return clocks.get(kernel, lambda config: 1.0)(config)

    monkeypatch.setattr(tune_module, "_milliseconds", milliseconds)
    return clocks.__setitem__


def test_the_fastest_configuration_of_every_kernel_is_found_stored_and_used(interpreter, cache):
    for kernel in KERNELS:
        interpreter(kernel, lambda config: config["num_warps"] + config.get("BLOCK_N", 0) / 1000)
    rows = tune(**SHAPE)
    assert [row["kernel"] for row in rows] == list(KERNELS)
    found = json.loads(cache.read_text())[GPU]
    for row in rows:
        assert row["tried"] >= 2
        assert not row["refused"], row
        assert row["best_ms"] <= row["built_in_ms"]
        assert found[row["kernel"]][row["shape"]] == row["best"]
        tunable = tuning.TUNABLES[row["kernel"]]
        shape = next(
            tuple(getattr(torch, value) if name == "dtype" else int(value) for name, value in pairs)
            for pairs in [[part.split("=") for part in row["shape"].split()]]
        )
        assert tunable(0, *shape) == row["best"]
        assert tunable(-1, *shape) == row["built_in"]
    assert any(row["best"] != row["built_in"] for row in rows)
    assert [path.name for path in cache.parent.iterdir()] == ["tuning.json"]


def test_the_command_prints_a_table_and_adds_to_the_file(interpreter, cache, capsys):
    cache.parent.mkdir()
    older = {GPU: {"selected_forward": {"dtype=float16": {}}, "other": {}}, "Another GPU, Triton 3.6.0": {}}
    cache.write_text(json.dumps(older))
    interpreter("selected_forward", lambda config: 0.5 if config["BLOCK_N"] == 16 and config["num_warps"] == 4 else 1.0)
    assert main([*FLAGS, "--kernels", "selected_forward"]) == 0
    out = capsys.readouterr().out
    assert f"{GPU}, 96 tokens" in out
    best = "BLOCK_M=64 BLOCK_N=16 LATE=False num_warps=4 num_stages=1"
    line = f"selected_forward       1.0000   0.5000      3        0  {best}"
    assert line in out.splitlines()
    assert f"wrote {cache}" in out
    best = {"BLOCK_M": 64, "BLOCK_N": 16, "LATE": False, "num_warps": 4, "num_stages": 1}
    older[GPU]["selected_forward"][LABEL] = best
    assert json.loads(cache.read_text()) == older


def test_a_gain_that_noise_could_be_is_not_taken(interpreter, cache):
    tunable = tuning.TUNABLES["selected_forward"]
    built_in = tunable.built_in(torch.float32, 16, 16, 1, 32)
    interpreter("selected_forward", lambda config: 1.0 if config == built_in else 0.995)
    (row,) = tune(**SHAPE, kernels=["selected_forward"])
    assert row["best"] == row["built_in"] == built_in


def test_configurations_with_other_results_are_refused(interpreter, cache, monkeypatch, capsys):
    from nsa_kernels import attention, selected

    forward, built_in = attention.selected_forward, selected._forward_config.built_in(torch.float32, 16, 16, 1, 32)
    calls = []

    def wrong(q, *args):
        config = selected._forward_config(-1, torch.float32, 16, 16, 1, 32)
        calls.append(config)
        o, lse = forward(q, *args)
        if config["BLOCK_N"] != built_in["BLOCK_N"]:
            o[:, 5] = float("nan")
        elif config != built_in:
            raise OutOfResources(2, 1, "shared memory")
        return o, lse

    monkeypatch.setattr(attention, "selected_forward", wrong)
    interpreter("selected_forward", lambda config: 1.0 if config == built_in else 0.1)
    assert main([*FLAGS, "--kernels", "selected_forward"]) == 0
    out = capsys.readouterr().out
    assert "refused: other result: output 0 is off by nan" in out
    assert json.loads(cache.read_text())[GPU]["selected_forward"][LABEL] == built_in
    assert len(calls) > 2


def test_an_error_of_a_launch_stops_the_command_and_leaves_the_file(interpreter, cache, monkeypatch):
    cache.parent.mkdir()
    cache.write_text("{}")

    def fail(*args, **kwargs):
        raise RuntimeError("an illegal memory access was encountered")

    def milliseconds(run, names):
        return fail()

    monkeypatch.setattr(tune_module, "_milliseconds", milliseconds)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune(**SHAPE, kernels=["selected_forward"])
    assert cache.read_text() == "{}"


def test_an_interrupted_write_leaves_the_old_file(cache, monkeypatch):
    cache.parent.mkdir()
    cache.write_text("{}")

    def dump(found, file, **kwargs):
        file.write("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(json, "dump", dump)
    with pytest.raises(OSError, match="No space"):
        tune_module._store(cache, [{"machine": GPU, "kernel": "scores", "shape": "x", "best": {}}])
    assert [(path.name, path.read_text()) for path in cache.parent.iterdir()] == [("tuning.json", "{}")]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 3, "key_value_heads": 2}, "`heads` must be a multiple of key_value_heads = 2, got 3"),
        ({"heads": 0}, "`heads` must be an integer >= 1, got 0"),
        ({"head_dim": 257}, "`head_dim` must be at most 256"),
        ({"value_head_dim": 512}, "`value_head_dim` must be at most 256"),
        ({"dtype": torch.float64}, "`dtype` must be one of"),
        ({"tokens": 95}, r"`tokens` must be at least \(n \+ 1\) · l' = 96, got 95"),
        ({"kernels": ["scores", "nothing"]}, "`kernels` must be among .*, got nothing"),
        ({"kernels": []}, "`kernels` must be among .*, got none"),
        (
            {"kernels": ["scores"], "num_local_blocks": 2},
            "`kernels` must be among .* for these block sizes, got scores",
        ),
        ({"compress_stride": 5}, "`compress_stride`"),
    ],
)
def test_bad_arguments_are_refused_before_work_starts(interpreter, cache, change, message):
    with pytest.raises(ValueError, match=message):
        tune(**{**SHAPE, **change})
    assert not cache.parent.exists()


def test_without_a_gpu_the_command_says_so(cache, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(FLAGS) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "nsa_kernels.tune: error: The kernels cannot be timed: no CUDA device is available."


def test_a_place_that_cannot_be_written_is_refused_before_work_starts(interpreter, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NSA_KERNELS_CACHE", str(tmp_path / "file" / "tuning.json"))
    assert main(FLAGS) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "must go to a file that can be written, got" in line
    monkeypatch.setenv("NSA_KERNELS_CACHE", str(tmp_path))
    assert main(FLAGS) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_another_file_is_not_overwritten(interpreter, cache, capsys):
    cache.parent.mkdir()
    cache.write_text("notes")
    assert main(FLAGS) == 2
    assert "is not a file that `python -m nsa_kernels.tune` wrote" in capsys.readouterr().err
    assert cache.read_text() == "notes"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype, tokens", [(torch.bfloat16, 4096), (torch.float32, 2048)])
def test_on_a_gpu_no_candidate_differs_and_what_is_found_is_used(cache, dtype, tokens):
    import nsa_kernels as nsa

    rows = tune(heads=32, key_value_heads=8, head_dim=128, dtype=dtype, tokens=tokens)
    for row in rows:
        print(row)
        assert not any(reason.startswith("other result") for reason in row["refused"].values()), row
        assert len(row["refused"]) <= 1, row
        assert 0 < row["best_ms"] <= row["built_in_ms"]
    assert tuning.stored(torch.cuda.current_device()).keys() == set(KERNELS)

    def draw(*shape):
        return torch.randn(1, *shape, device="cuda", dtype=dtype).requires_grad_()

    T, C = 2048, 127
    inputs = [draw(T, 32, 128), *(draw(length, 8, 128) for length in (T, T, C, C, T, T)), *(draw(T, 32) for _ in "123")]
    results = []
    for switch in ("0", "1"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NSA_KERNELS_TUNING", switch)
            tuning.forget()
            o = nsa.nsa_attention(*inputs, **check_sizes.__kwdefaults__, backend="triton")[0]
            results.append((o, *torch.autograd.grad(o, inputs, torch.ones_like(o))))
    for built_in, tuned in zip(*results):
        off = (tuned.float() - built_in.float()).norm() / built_in.float().norm()
        assert off < 4 * torch.finfo(dtype).eps + 1e-5
