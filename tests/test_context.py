# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""`nsa finetune --context-parallel-size`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_finetune import make_nsa
from tiny import make_checkpoint
from transformers import AutoModelForCausalLM

from nsa_conversion import finetune
from nsa_conversion.context import ContextArguments, ContextTrainerMixin
from nsa_conversion.data import builtin_text
from nsa_conversion.errors import NSAError
from nsa_conversion.finetune import FinetuneArguments, main

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_processes_share_rows_and_train_as_one(tmp_path):
    (tmp_path / "train.txt").write_text(builtin_text()[:6000], encoding="utf-8")
    make_nsa(tmp_path / "model", layer_types=["native_sparse_attention", "full_attention"])
    arguments = [str(tmp_path / "model"), "--train-file", str(tmp_path / "train.txt"), "--max-length", "160"]
    arguments += ["--max-steps", "2", "--gradient-accumulation-steps", "2", "--learning-rate", "1e-3", "--optim", "sgd"]
    arguments += ["--max-grad-norm", "100", "--eval-strategy", "steps", "--eval-steps", "2", "--eval-slices", "0"]
    arguments += ["--save-strategy", "no", "--disable-tqdm", "--use-cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "conversion"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    two = [*launch, "-m", "nsa_conversion", "finetune", *arguments, "--ddp-backend", "gloo", "--gradient-checkpointing"]
    two += ["--context-parallel-size", "2", "--context-parallel-heads", "1", "--output-dir", str(tmp_path / "two")]
    done = subprocess.run(two, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    main([*arguments, "--output-dir", str(tmp_path / "one")])

    one, two = (json.loads((tmp_path / name / "log_history.json").read_text()) for name in ("one", "two"))
    for name in ("loss", "grad_norm", "eval_loss"):
        values = [[entry[name] for entry in history if name in entry] for history in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-5)
        assert len(values[0]) == (1 if name == "eval_loss" else 2)
    left, right = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-6)
    record = json.loads((tmp_path / "two" / "nsa_finetune.json").read_text())["arguments"]["context"]
    assert record == {"context_parallel_size": 2, "context_parallel_heads": 1}


def test_every_row_of_an_evaluation_counts_once():
    class Accelerator:
        class gradient_state:
            end_of_dataloader, remainder = True, 3

        def gather(self, losses):
            return torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0])  # two rows each of four processes

    class Trainer(ContextTrainerMixin):
        def __init__(self):
            self.accelerator, self.context = Accelerator(), ContextArguments(context_parallel_size=2)
            self.args = type("Arguments", (), {"world_size": 4})

    assert Trainer()._gather_rows(torch.zeros(2)).tolist() == [1, 1, 2]
    Accelerator.gradient_state.remainder = -1
    assert Trainer()._gather_rows(torch.zeros(2)).tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"context_parallel_size": 0}, "--context-parallel-size must be at least 1, got 0"),
        ({"context_parallel_heads": 1}, "--context-parallel-heads was given without --context-parallel-size"),
        (
            {"context_parallel_size": 2, "context_parallel_heads": 0},
            "--context-parallel-heads must be at least 1, got 0",
        ),
        ({"context_parallel_size": 2}, "must divide the number of processes, got 1; start with `accelerate launch"),
    ],
)
def test_refuses_before_training(tmp_path, settings, error):
    (tmp_path / "train.txt").write_text("text " * 100)
    with pytest.raises(NSAError, match=error):
        finetune("model", tmp_path / "out", train_file=tmp_path / "train.txt", use_cpu=True, **settings)
    assert not (tmp_path / "out").exists()


def test_refuses_what_cannot_be_combined(tmp_path, monkeypatch):
    monkeypatch.setattr(FinetuneArguments, "world_size", 2)
    args = FinetuneArguments(output_dir=str(tmp_path / "out"), use_cpu=True, label_smoothing_factor=0.1)
    error = "2 cannot be combined with --stage adapt, --label-smoothing-factor 0.1"
    with pytest.raises(NSAError, match=error):
        ContextArguments(context_parallel_size=2).check(args, "adapt")
    source = make_checkpoint(tmp_path / "dense")
    (tmp_path / "train.txt").write_text("text " * 100)
    settings = {"train_file": tmp_path / "train.txt", "use_cpu": True, "context_parallel_size": 2}
    with pytest.raises(NSAError, match="needs a model of type native_sparse_attention, got 'llama'; convert it"):
        finetune(source, tmp_path / "out", **settings)


def test_refuses_what_a_launcher_brings_along(tmp_path):
    class Trainer:
        def __init__(self):
            self.is_deepspeed_enabled = True

    class ContextTrainer(ContextTrainerMixin, Trainer):
        pass

    with pytest.raises(NSAError, match="cannot be combined with DeepSpeed or a parallelism configuration"):
        ContextTrainer(context=ContextArguments(context_parallel_size=2))


def test_refuses_different_rows(monkeypatch):
    class Trainer(ContextTrainerMixin):
        def __init__(self):
            self._checked, self.args = False, type("Arguments", (), {"device": "cpu"})
            self.mesh = {"cp": type("Mesh", (), {"get_group": lambda self: None})()}

    def of_two_processes(other):
        def all_reduce(x, operation, group):
            x.copy_(torch.minimum(x, other) if operation == dist.ReduceOp.MIN else torch.maximum(x, other))

        return all_reduce

    ids = torch.tensor([[5, 6, 7]])
    monkeypatch.setattr(dist, "all_reduce", of_two_processes(torch.tensor([5 + 12 + 21, 3])))
    Trainer()._check_rows(ids)
    with pytest.raises(NSAError, match="a context-parallel group got different rows"):
        Trainer()._check_rows(ids.flip(1))
