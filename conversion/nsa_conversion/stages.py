# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The stages of `nsa finetune`: the selector's warm-up, sparse adaptation with a dense teacher, and plain training.

warmup: the backbone runs dense and frozen; φ_K learns which blocks dense attention reads, φ_V what lies outside the
window, with the projections of their own branch. adapt: everything trains on the next token, the teacher's logits and
the selector's loss.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from .distill import (
    SELECTOR_TARGETS,
    choose_queries,
    dense_forward,
    hidden_state_loss,
    layer_inputs,
    logit_losses,
    selector_losses,
    selector_modules,
    sparse_layers,
)
from .errors import NSAError

__all__ = ["STAGES", "StageArguments", "StageTrainerMixin", "annealed_blocks", "check_sparse", "prepare_stage"]

STAGES = ("warmup", "adapt", "sft")
SELECTOR_SCOPES = ("keys", "model")
# Trained at a rate of their own: nothing in a dense model does their work. The gate scales do not: their step of 64 is
# rate enough.
NEW_PARAMETERS = tuple(
    f".self_attn.{name}." for name in ("compress_k", "compress_v", "gate", "k_proj_cmp", "v_proj_cmp", "k_norm_cmp")
)

# Documents of a batch that the selector of a layer learns from: each costs many small operations.
_SELECTOR_DOCUMENTS = 1


@dataclass
class StageArguments:
    """Which stage of the recipe this run is; the other options belong to warmup and adapt."""

    _argument_group_name = "stage"

    stage: str = field(
        default="sft",
        metadata={
            "help": "warmup: φ and the projections that only it reads learn from the dense attention of the frozen "
            "model; adapt: all weights learn from the next token, the logits of --teacher and the dense choice of "
            "blocks; sft: from the next token.",
            "choices": STAGES,
        },
    )
    teacher: str | None = field(
        default=None, metadata={"help": "adapt: the dense source, whose logits are matched; a directory or hub id."}
    )
    next_token_weight: float | None = field(
        default=None,
        metadata={"help": "adapt: factor of the next token's loss; 0 leaves all to the other terms (default: 1)."},
    )
    distill_weight: float | None = field(
        default=None, metadata={"help": "adapt: factor of the KL to the teacher's logits (default: 1)."}
    )
    hidden_weight: float | None = field(
        default=None,
        metadata={
            "help": "adapt: factor of the relative squared distance to the teacher's hidden states, layer by layer "
            "(default: 0)."
        },
    )
    selector_weight: float | None = field(
        default=None, metadata={"help": "adapt: factor of the selector's KL; 0 leaves it out (default: 1)."}
    )
    selector_scope: str | None = field(
        default=None,
        metadata={
            "help": "adapt: what the selector's loss trains: keys, φ and the projections that only it reads; or model, "
            "the queries and the layers below too (default: keys).",
            "choices": SELECTOR_SCOPES,
        },
    )
    selector_queries: int | None = field(
        default=None,
        metadata={"help": "warmup, adapt: queries drawn per step and layer for the selector's loss (default: 1024)."},
    )
    selector_target: str | None = field(
        default=None,
        metadata={
            "help": "warmup, adapt: what a block is worth to a query: output, the squared norm of what dense attention "
            "takes from it; or mass, its attention alone (default: output).",
            "choices": SELECTOR_TARGETS,
        },
    )
    new_parameter_lr: float | None = field(
        default=None,
        metadata={
            "help": "warmup, adapt: learning rate of φ, the projections that only it reads, and the gates; all else "
            "uses --learning-rate (default: 1e-3)."
        },
    )
    anneal_blocks: float | None = field(
        default=None,
        metadata={
            "help": "adapt: share of the steps over which the number of selected blocks falls, by halves, from all "
            "blocks of a row to its final value (default: 0)."
        },
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "adapt: compile every decoder layer, the teacher's too, and what the losses compute. The first "
            "steps take minutes, the others less; give --full-rows too, so that shapes never change."
        },
    )

    def check(self, lora: bool) -> None:
        """Refuse what cannot work, and set what was not given.

        Raises:
            NSAError: a value out of range, or an option that the stage does not use.
        """
        if self.stage not in STAGES:
            raise NSAError(f"--stage must be one of {', '.join(STAGES)}, got {self.stage!r}")
        if self.compile_layers and self.stage != "adapt":
            raise NSAError(f"--compile-layers belongs to --stage adapt, got --stage {self.stage}")
        if self.stage == "warmup" and lora:
            raise NSAError("--lora does nothing in --stage warmup, which trains new parts alone; leave it out")
        defaults = {
            "teacher": (("adapt",), None),
            "next_token_weight": (("adapt",), 1.0),
            "distill_weight": (("adapt",), 1.0),
            "hidden_weight": (("adapt",), 0.0),
            "selector_weight": (("adapt",), 1.0),
            "anneal_blocks": (("adapt",), 0.0),
            "selector_scope": (("adapt",), "keys"),
            "selector_queries": (("warmup", "adapt"), 1024),
            "selector_target": (("warmup", "adapt"), "output"),
            "new_parameter_lr": (("warmup", "adapt"), 1e-3),
        }
        for name, matched in (("distill_weight", "logits"), ("hidden_weight", "hidden states")):
            if getattr(self, name) is not None and self.teacher is None:
                flag = f"--{name.replace('_', '-')}"
                raise NSAError(f"{flag} needs --teacher, the dense model whose {matched} are matched")
        for name, (stages, default) in defaults.items():
            flag = f"--{name.replace('_', '-')}"
            if getattr(self, name) is None:
                setattr(self, name, default if self.stage in stages else None)
            elif self.stage not in stages:
                raise NSAError(f"{flag} belongs to --stage {' or '.join(stages)}, got --stage {self.stage}")
        if self.stage == "sft":
            return
        for name in ("next_token_weight", "distill_weight", "hidden_weight", "selector_weight"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise NSAError(f"--{name.replace('_', '-')} must not be negative, got {value}")
        if self.stage == "adapt" and not self.next_token_weight and not (self.teacher and self.distill_weight):
            raise NSAError("--next-token-weight 0 leaves all weights to --teacher, which is not given or not weighed")
        if self.selector_queries < 1:
            raise NSAError(f"--selector-queries must be at least 1, got {self.selector_queries}")
        if self.selector_target not in SELECTOR_TARGETS:
            raise NSAError(
                f"--selector-target must be one of {', '.join(SELECTOR_TARGETS)}, got {self.selector_target!r}"
            )
        if self.selector_scope is not None and self.selector_scope not in SELECTOR_SCOPES:
            raise NSAError(f"--selector-scope must be one of {', '.join(SELECTOR_SCOPES)}, got {self.selector_scope!r}")
        if self.selector_scope == "model" and not self.selector_weight:
            raise NSAError(
                "--selector-scope model says what the selector's loss trains, and --selector-weight 0 is none"
            )
        if self.new_parameter_lr <= 0:
            raise NSAError(f"--new-parameter-lr must be more than 0, got {self.new_parameter_lr}")
        if self.anneal_blocks is not None and not 0 <= self.anneal_blocks <= 1:
            raise NSAError(f"--anneal-blocks must be a share of the steps, 0 to 1, got {self.anneal_blocks}")


def prepare_stage(network, stage: StageArguments, longest: int) -> None:
    """Check that a model and its data suit a stage, and freeze what the stage does not train.

    Args:
        network: the model, before LoRA.
        stage: checked arguments.
        longest: tokens of the longest document part in the training rows.

    Raises:
        NSAError: a dense model where the stage is about sparse layers, a φ without parameters, or rows in which
            nothing is left out.
    """
    if stage.stage == "sft":
        return
    layers = sparse_layers(network)
    sparse = {name: getattr(stage, name) for name in ("selector_weight", "hidden_weight", "anneal_blocks")}
    if not layers and (stage.stage == "warmup" or any(sparse.values())):
        remedy = "" if stage.stage == "warmup" else f"; set {', '.join(sparse)} to 0 to train a dense model by the rest"
        raise NSAError(f"--stage {stage.stage} needs sparse layers, and this {type(network).__name__} has none{remedy}")
    if not layers:
        return
    check_sparse(layers[0].config, stage, longest)
    if stage.stage == "warmup":
        network.requires_grad_(False)
        for module in (each for attention in layers for group in selector_modules(attention) for each in group):
            module.requires_grad_(True)


def check_sparse(config, stage: StageArguments, longest: int) -> None:
    """Refuse a sparse model or rows from which the selector cannot learn.

    Args:
        config (NSAConfig): of the model.
        stage: checked arguments.
        longest: tokens of the longest document part in the training rows, or what it cannot be longer than.

    Raises:
        NSAError: a φ without parameters, or rows in which nothing is left out.
    """
    if stage.stage == "sft" or (stage.stage == "adapt" and not stage.selector_weight):
        return
    if config.compress_type == "mean":
        without = "" if stage.stage == "warmup" else ", or leave the selector's loss out with --selector-weight 0"
        raise NSAError(
            f"--stage {stage.stage} trains φ, and compress_type 'mean' has no parameters; convert with "
            f"--compress-type residual_mlp{without}"
        )
    first = _first_query(config)
    if longest <= first:
        raise NSAError(
            f"the selector learns from tokens beyond max(n * l', w) = {first} of a document, and the longest in a row "
            f"has {longest}; give longer documents and a --max-length above {first}"
        )


def _first_query(config) -> int:
    """Position from which on the selection leaves blocks out and tokens lie outside the window."""
    return max(config.num_selected_blocks * config.select_block_size, config.window_size)


def annealed_blocks(progress: float, first: int, last: int) -> int:
    """n at a share `progress` of the annealing: from `first` down to `last`, twice `last`, four times … on the way."""
    if progress >= 1 or first <= last:
        return last
    return min(first, last * 2 ** math.ceil((1 - progress) * math.log2(first / last)))


class StageTrainerMixin:
    """What warmup and adapt add to a `Trainer`.

    Args:
        stage: checked arguments.
        teacher: the dense model, or None.
        max_length: tokens of a row.
    """

    def __init__(self, *args, stage: StageArguments, teacher=None, max_length: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.stage, self.teacher, self.max_length = stage, teacher, max_length
        layers = sparse_layers(self.model)
        self.config = layers[0].config if layers else None  # a dense model, trained like a sparse one to compare them
        if layers:  # of the model as it is meant to be: annealing changes its configuration
            self.num_blocks, self.first_query = self.config.num_selected_blocks, _first_query(self.config)
        self._terms: dict[str, list] = {}
        self._wrap = functools.cache(torch.compile) if stage.compile_layers else lambda function: function
        if stage.compile_layers:
            # one layer does not fill the buckets of DistributedDataParallel, by which this splits graphs
            torch._dynamo.config.optimize_ddp = False

    def create_optimizer(self, model=None):
        """As in Trainer; φ and the gates are moved to groups of their own learning rate."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not made:
            return optimizer
        named = (self.model if model is None else model).named_parameters()
        new = {parameter for name, parameter in named if any(part in name for part in NEW_PARAMETERS)}
        for group in list(optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if parameter in new]
            group["params"] = [parameter for parameter in group["params"] if parameter not in new]
            if moved:
                optimizer.add_param_group({**group, "params": moved, "lr": self.stage.new_parameter_lr})
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in Trainer, at the present number of blocks: the backward pass may compute the forward pass again."""
        with self._annealed(), self._compiled():
            return super().training_step(model, inputs, num_items_in_batch)

    @contextlib.contextmanager
    def _compiled(self) -> Iterator[None]:
        """One compilation for all layers, unlike --torch-compile; the hooks of `layer_inputs` stay outside."""
        compiled = [self.model] if self.stage.compile_layers else []
        if compiled and self.teacher is not None and not self.stage.hidden_weight:
            compiled.append(self.teacher)  # not where its hidden states are captured, inside of its layers
        modules = itertools.chain.from_iterable(network.modules() for network in compiled)
        layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
        own = [layer.__dict__.get("forward") for layer in layers]  # None: that of the class
        for layer in layers:
            layer.forward = self._wrap(layer.forward)
        try:
            yield
        finally:
            for layer, forward in zip(layers, own):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    @contextlib.contextmanager
    def _annealed(self) -> Iterator[None]:
        if self.stage.anneal_blocks:
            progress = self.state.global_step / (self.stage.anneal_blocks * self.state.max_steps)
            first = -(-self.max_length // self.config.select_block_size)
            self.config.num_selected_blocks = annealed_blocks(progress, first, self.num_blocks)
        try:
            yield
        finally:
            if self.stage.anneal_blocks:
                self.config.num_selected_blocks = self.num_blocks

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The stage's loss in training, the next token's in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        # a loss that is summed over tokens holds its share of the accumulated batch, the others are means
        summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        parts = self.current_gradient_accumulation_steps if summed else 1
        if self.stage.stage == "warmup":
            backbone = {name: value for name, value in inputs.items() if name != "labels"}
            with dense_forward(model), layer_inputs(model) as layers:
                outputs = model(**backbone, use_cache=False, logits_to_keep=1)
            selector, value = self._selector(layers, values=True)
            terms, total = {"selector_loss": selector, "value_loss": value}, (selector + value) / parts
        else:
            kept = self.stage.selector_weight or self.stage.hidden_weight
            attached = self.stage.selector_scope == "model"
            collect = layer_inputs(model, attached) if kept else contextlib.nullcontext([])
            with collect as layers:
                if self.teacher is None:
                    loss, outputs = super().compute_loss(model, {**inputs}, True, num_items_in_batch=num_items_in_batch)
                    terms = {"next_token_loss": loss * parts}
                else:  # both losses of the logits in one pass over them
                    given = {name: value for name, value in inputs.items() if name != "labels"}
                    outputs = model(**given, use_cache=False)
                    terms = self._distill(inputs, outputs.logits, layers if self.stage.hidden_weight else [])
            if self.stage.selector_weight:
                terms["selector_loss"], _ = self._selector(layers, values=False)
            total = sum(getattr(self.stage, name.replace("loss", "weight")) / parts * terms[name] for name in terms)
        for name, term in terms.items():
            self._terms.setdefault(name, []).append(term.detach())
        return (total, outputs) if return_outputs else total

    def _selector(self, layers, values):
        """Means of both losses over the sparse layers."""
        losses = []
        for layer in layers:
            queries = choose_queries(layer, self.first_query, self.stage.selector_queries, _SELECTOR_DOCUMENTS)
            losses.append(selector_losses(layer, queries, self.stage.selector_target, values, self._wrap))
        return tuple(sum(each) / len(layers) for each in zip(*losses))

    def _distill(self, inputs, logits, layers):
        """Means over labelled tokens; document by document, since not every attention of a teacher knows packing."""
        labels, sums, count = inputs["labels"], {}, 0
        bounds = inputs["cu_seq_lens_q"].tolist() if "cu_seq_lens_q" in inputs else [0, labels.shape[1]]
        for document in itertools.starmap(slice, itertools.pairwise(bounds)):
            own = labels[:, document]
            with torch.no_grad():
                taught = self.teacher(
                    input_ids=inputs["input_ids"][:, document], use_cache=False, output_hidden_states=bool(layers)
                )
            losses = logit_losses(logits[:, document], taught.logits, own, self._wrap)
            terms = dict(zip(("distill_loss", "next_token_loss"), losses))
            if layers:
                states = [layer.residual[:, document] for layer in layers]
                targets = [taught.hidden_states[layer.attention.layer_idx] for layer in layers]
                terms["hidden_loss"] = hidden_state_loss(states, targets, self._wrap)
            labelled = (own[:, 1:] != -100).sum()
            count = count + labelled
            sums = {name: sums.get(name, 0.0) + labelled * term for name, term in terms.items()}
        return {name: total / count.clamp(min=1) for name, total in sums.items()}

    def log(self, logs, start_time=None):
        """As in Trainer, with the mean of every term since the last time, over all processes."""
        if "loss" in logs and self._terms:
            means = {name: sum(terms) / len(terms) for name, terms in self._terms.items()}
            logs |= {name: self.accelerator.reduce(mean, "mean").item() for name, mean in means.items()}
            self._terms.clear()
        super().log(logs, start_time)
