# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Context parallelism in `nsa finetune`: groups of processes that share every row of text."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from modeling_nsa import shard_inputs

from .errors import NSAError

__all__ = ["ContextArguments", "ContextTrainerMixin"]


@dataclass
class ContextArguments:
    """Rows that are too long for one device."""

    _argument_group_name = "context parallelism"

    context_parallel_size: int = field(
        default=1,
        metadata={"help": "Processes that share each row, every one holding its part of the tokens (default: 1)."},
    )
    context_parallel_heads: int | None = field(
        default=None,
        metadata={
            "help": "Key/value heads of a sparse layer that are gathered at a time: less memory for very long rows, "
            "but attention is computed once more in the backward pass (default: all)."
        },
    )

    def check(self, args, stage: str) -> None:
        """Refuse what cannot work.

        Args:
            args: the `TrainingArguments`.
            stage: of `nsa finetune`.

        Raises:
            NSAError: a value out of range, a number of processes that does not fit, or an option that cannot be
                combined.
        """
        size = self.context_parallel_size
        if size < 1:
            raise NSAError(f"--context-parallel-size must be at least 1, got {size}")
        if self.context_parallel_heads is not None:
            if size == 1:
                raise NSAError("--context-parallel-heads was given without --context-parallel-size")
            if self.context_parallel_heads < 1:
                raise NSAError(f"--context-parallel-heads must be at least 1, got {self.context_parallel_heads}")
        if size == 1:
            return
        if args.world_size % size:
            raise NSAError(
                f"--context-parallel-size {size} must divide the number of processes, got {args.world_size}; start "
                f"with `accelerate launch --num_processes {size} -m nsa_conversion finetune …`"
            )
        others = {
            f"--stage {stage}": stage != "sft",
            f"--label-smoothing-factor {args.label_smoothing_factor}": args.label_smoothing_factor != 0,
            "--torch-compile": args.torch_compile,
            "--use-liger-kernel": args.use_liger_kernel,
            "--deepspeed": args.deepspeed is not None,
            "--parallelism-config": args.parallelism_config is not None,
        }
        if refused := [name for name, given in others.items() if given]:
            raise NSAError(f"--context-parallel-size {size} cannot be combined with {', '.join(refused)}")


class ContextTrainerMixin:
    """What context parallelism adds to a `Trainer`: processes in groups of `context_parallel_size` share their rows.

    DDP and FSDP average gradients over all processes as without it; the loss counts every label once.

    Args:
        context: checked arguments.
    """

    def __init__(self, *args, context: ContextArguments, **kwargs):
        self.context = context
        super().__init__(*args, **kwargs)
        # the launcher may bring them along
        if self.is_deepspeed_enabled or self.accelerator.parallelism_config is not None:
            raise NSAError(
                "--context-parallel-size cannot be combined with DeepSpeed or a parallelism configuration of "
                "accelerate; use DDP or FSDP"
            )
        size = context.context_parallel_size
        shape, names = (self.args.world_size // size, size), ("dp_replicate", "cp")
        self.mesh = init_device_mesh(self.args.device.type, shape, mesh_dim_names=names)
        self.config = self.model.config
        self._checked = False

    def get_cp_size(self) -> int:
        """As in Trainer, whose count of rows per step goes by it."""
        return self.context.context_parallel_size

    def get_train_dataloader(self):
        """As in Trainer, with the same rows for all processes of a group."""
        with self._shared_rows():
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        """As in Trainer, with the same rows for all processes of a group."""
        with self._shared_rows():
            return super().get_eval_dataloader(eval_dataset)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in Trainer, with labels per process: not every version counts those of shared rows once."""
        samples, labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        if labels is not None:
            labels = sum((batch["labels"][..., 1:] != -100).sum() for batch in samples).to(device)
            if self.args.average_tokens_across_devices:
                labels = self.accelerator.gather(labels).sum()
            labels = labels / self.get_cp_size()
        return samples, labels

    @contextlib.contextmanager
    def _shared_rows(self):
        """Let accelerate deal out rows by the mesh; its own context parallelism stays off."""
        state = self.accelerator.state
        before, state.device_mesh = state.device_mesh, self.mesh
        try:
            yield
        finally:
            state.device_mesh = before

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "context_shard" not in inputs:
            self._check_rows(inputs["input_ids"])
            heads = self.context.context_parallel_heads
            inputs = shard_inputs(inputs, self.mesh["cp"], self.config, heads)
        return super()._prepare_inputs(inputs)

    def _check_rows(self, ids: torch.Tensor) -> None:
        """Once: processes that hold different rows would train on nonsense."""
        if self._checked:
            return
        weights = torch.arange(1, ids.numel() + 1, device=ids.device) % 1009
        mark = torch.stack([(ids.flatten() * weights).sum(), ids.new_tensor(ids.numel())]).to(self.args.device)
        lowest, highest = mark.clone(), mark
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self.mesh["cp"].get_group())
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.mesh["cp"].get_group())
        if not torch.equal(lowest, highest):
            raise NSAError(
                "the processes of a context-parallel group got different rows; leave `use_seedable_sampler` of "
                "--accelerator-config at true, and give all processes the same --seed and files"
            )
        self._checked = True

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The mean loss of a row over the labels of all its processes; logits stay where they are."""
        inputs = self._prepare_inputs(inputs)
        labels = (inputs["shift_labels"] != -100).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            total = model(**{**inputs, "num_items_in_batch": 1}).loss.detach().float()
        sums = torch.stack((total, labels.to(total)))
        dist.all_reduce(sums, group=self.mesh["cp"].get_group())
        return sums[0] / sums[1], None, None

    def evaluation_loop(self, *args, **kwargs):
        """As in Trainer, every row counting once."""
        self.gather_function = self._gather_rows
        return super().evaluation_loop(*args, **kwargs)

    def _gather_rows(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses of one process per group, without the rows that fill up the last batch."""
        groups = self.accelerator.gather(losses).view(self.args.world_size, -1)[:: self.get_cp_size()].flatten()
        state = self.accelerator.gradient_state
        return groups[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else groups
