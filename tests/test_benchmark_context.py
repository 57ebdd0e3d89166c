# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of sequences over several GPUs: steps, comparison and table in one process."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels" / "benchmarks"))

import benchmark_context
import benchmark_training
from test_benchmarks import MACHINE, TINY, assert_png

SMALL = {**TINY, "num_selected_blocks": 4}


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_step_over_gpus_is_a_training_step(group, monkeypatch):
    monkeypatch.setattr(benchmark_training, "LOSS_CHUNK", 300)
    ids, losses = benchmark_training.make_text("random", 1101, 50, device="cpu"), []
    for step in (benchmark_training.step, lambda *args: benchmark_context.step(*args, group)):
        model = benchmark_training.build("nsa", SMALL, device="cpu", dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses.append([step(model, optimizer, ids) for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("fixed", [False, True])
def test_comparison(group, fixed):
    ids = benchmark_training.make_text("random", 1101, 50, device="cpu")
    row = benchmark_context.compare(SMALL, torch.float32, fixed, ids, group, device="cpu")
    assert abs(row["loss_difference"]) < 1e-5
    assert row["gradient_error"] < 1e-4
    assert row["worst_error"] < 1e-2
    assert row["flipped"] == 0


def test_layers_read_the_blocks_that_are_fixed(group):
    model = benchmark_training.build("nsa", SMALL, device="cpu", dtype=torch.float32)
    ids = benchmark_training.make_text("random", 1101, 50, device="cpu")
    tokens = 2 * benchmark_context.shard_inputs({"input_ids": ids}, group, model.config)["context_shard"].chunk_length
    choices = [torch.full((1, tokens, 1, 4), -1, dtype=torch.int32) for _ in range(2)]
    for layer, x in enumerate(choices):
        x[..., 0] = torch.arange(tokens)[None, :, None] // 64 // (layer + 1)
    with benchmark_context.fixed_choice(model, choices):
        loss, outputs = benchmark_context.forward(model, ids, group, output_block_indices=True)
        benchmark_context.backward(model, loss, group)
    assert all(torch.equal(a, b) for a, b in zip(choices, outputs.block_indices))
    loss, outputs = benchmark_context.forward(model, ids, group, output_block_indices=True)
    assert not torch.equal(choices[0], outputs.block_indices[0])


def test_efficiencies_and_picture(tmp_path):
    def row(gpus, tokens, speed):
        return {"mode": "step", "gpus": gpus, "tokens": tokens, "tokens_per_s": speed, "peak_gib": 9.0, **MACHINE}

    rows = [row(1, 100, 10.0), row(1, 200, 8.0), {**row(1, 400, 0), "note": "out of memory"}, row(2, 200, 12.0)]
    del rows[2]["tokens_per_s"]
    assert benchmark_context.efficiencies(rows, rows[3]) == {"efficiency": 0.75, "weak_efficiency": 0.6}
    assert benchmark_context.efficiencies(rows, row(2, 400, 12.0)) == {"weak_efficiency": 0.75}
    check = {"mode": "check", "gpus": 2, "tokens": 100, **MACHINE}
    assert_png(benchmark_context.plot([check, *rows], tmp_path / "context.csv"))


def test_needs_torchrun(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_context, "require_cuda", lambda: None)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--output", str(tmp_path / "out.csv")])
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node N"):
        benchmark_context.main()


@pytest.mark.gpu
def test_runs_on_two_gpus(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    path = tmp_path / "out.csv"
    arguments = ["--layers", "2", "--lengths", "8192", "--steps", "1", "--check-tokens", "8192"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        benchmark_context.__file__,
    ]
    subprocess.run([*command, "--output", str(path), *arguments], check=True, timeout=500)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mode"] for row in rows] == ["check"] * 3 + ["step"] * 2
    assert 0.2 < float(rows[-1]["efficiency"]) < 1.2
