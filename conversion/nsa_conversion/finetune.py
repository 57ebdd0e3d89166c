# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a converted model, all weights or LoRA, with transformers' `Trainer` on packed text.

`nsa finetune MODEL --train-file FILE --output-dir OUTPUT` takes every flag of `TrainingArguments`. OUTPUT ends up as a
directory that `AutoModelForCausalLM.from_pretrained` loads; checkpoints, logs and pictures lie beside the model in it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi
from transformers import (
    BitsAndBytesConfig,
    HfArgumentParser,
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.hf_argparser import string_to_bool
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import (
    PushInProgress,
    cached_file,
    is_accelerate_available,
    is_bitsandbytes_available,
    is_liger_kernel_available,
    is_peft_available,
)

from .card import write_card
from .context import ContextArguments, ContextTrainerMixin
from .data import (
    MAX_FACTS,
    MIN_FACTS,
    PackedRows,
    PackedRowsCollator,
    encode_documents,
    hold_out,
    pack,
    practise_retrieval,
    read_dataset,
    read_files,
)
from .errors import NSAError
from .hub import MODEL_FILES, hub_errors, push
from .loss import PositionBucket, format_position_table, loss_by_position, mean_loss, position_edges
from .parsing import HelpFormatter
from .plots import plot_loss_curve, plot_position_loss, require_matplotlib
from .recipe import Recipe, run_recipe
from .sources import find_model, load_model, read_card, resolve
from .stages import StageArguments, StageTrainerMixin, check_sparse, prepare_stage

__all__ = [
    "DataArguments",
    "FinetuneArguments",
    "FinetuneReport",
    "LoraArguments",
    "ModelArguments",
    "check_settings",
    "finetune",
    "last_whole_checkpoint",
    "main",
    "read_settings",
    "register_lora_targets",
    "setting_names",
]

logger = logging.getLogger(__name__)

MODEL_TYPE = "native_sparse_attention"
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_BRANCH_TARGETS = ["k_proj_cmp", "v_proj_cmp", "k_proj_win", "v_proj_win"]
# Modules that a dense checkpoint does not have are trained whole. The parent's name keeps `gate` from meaning any other
# module whose name ends in it, such as the router of a mixture of experts.
NEW_MODULES = ["self_attn.compress_k", "self_attn.compress_v", "self_attn.gate", "self_attn.gate_scale"]

GATES = ".*self_attn.gate"
SHARDING_VARIABLES = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}

CONVERSION_RECORD = "nsa_conversion.json"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
STAGING_DIR = ".final"
ADAPTER_DIR = "adapter"
# Settings that name files.
PATHS = ("model", "train_file", "eval_file", "dataset", "teacher", "resume_from_checkpoint")
# What an evaluation measures, by which the best checkpoint can be told.
EVALUATED = ("loss", "runtime", "samples_per_second", "steps_per_second")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """Which model, and in which types it is trained and saved."""

    _argument_group_name = "model"

    model: str | None = field(
        default=None, metadata={"help": "The model: a directory, hub id or GGUF file; also the first argument."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the weights while training. Keep float32 and add --bf16 for speed: small steps on "
            "bfloat16 weights are rounded away.",
            "choices": DTYPES,
        },
    )
    save_dtype: str | None = field(
        default=None, metadata={"help": "Type of the saved weights (default: the model's own).", "choices": DTYPES}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code in the checkpoint to run."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the frozen weights of --lora in 4 bits (QLoRA); needs bitsandbytes."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Hold the frozen weights of --lora in 8 bits; needs bitsandbytes."}
    )


@dataclass
class DataArguments:
    """Where text comes from and how it is cut."""

    _argument_group_name = "data"

    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Text files, or JSON lines with a 'text' string or a 'messages' list per line."},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "A directory saved by the datasets library, or a hub id; instead of files."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text, when it is not 'text'."})
    messages_column: str | None = field(
        default=None, metadata={"help": "Column of the chat messages, when it is not 'messages'."}
    )
    max_length: int = field(
        default=4096,
        metadata={"help": "Tokens per packed row. Must be more than n * l' of the model to exercise its selection."},
    )
    full_rows: bool = field(
        default=False,
        metadata={
            "help": "Train on parts of exactly --max-length tokens alone, and leave out what is shorter: each is a row "
            "of its own, so that all steps have the same shapes."
        },
    )
    repeat_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the long training documents in which a passage is written a second time further on, "
            "drawn anew in every epoch: practice for a selection that has to find it again."
        },
    )
    fact_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the long training documents into which made-up facts are written, each stated once and "
            "used once further on, drawn anew in every epoch: practice for retrieval."
        },
    )
    max_facts: int = field(
        default=MAX_FACTS, metadata={"help": f"Facts that --fact-share writes into a document, {MIN_FACTS} or more."}
    )
    eval_file: list[str] | None = field(default=None, metadata={"help": "Files to evaluate on; same formats."})
    eval_fraction: float = field(
        default=0.05, metadata={"help": "Share of the training tokens held out for evaluation without --eval-file."}
    )
    eval_slices: int = field(
        default=4,
        metadata={
            "help": "Held-out texts, the longest first, measured by position before and after training; 0: none."
        },
    )


@dataclass
class LoraArguments:
    """LoRA instead of training all weights."""

    _argument_group_name = "LoRA"

    lora: bool = field(default=False, metadata={"help": "Train low-rank adapters, and the new NSA modules whole."})
    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: float = field(default=32, metadata={"help": "Scale; the update is multiplied by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    use_dora: bool = field(
        default=False, metadata={"help": "Decompose the adapted weights into magnitude and direction (DoRA)."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Linear layers to adapt (default: those of {LORA_TARGETS + LORA_BRANCH_TARGETS} there are)."
        },
    )


@dataclass
class FinetuneArguments(TrainingArguments):
    """`TrainingArguments` with defaults for packed long rows: one row holds what is usually a batch."""

    _argument_group_name = "training"

    per_device_train_batch_size: int = field(default=1, metadata={"help": "Packed rows per device and step."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Packed rows per device in evaluation."})
    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate for the optimizer."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Total number of training epochs to perform."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two points of the loss curve."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the model and checkpoints of an earlier run in --output-dir."}
    )

    def __post_init__(self):
        if not self.output_dir:
            raise NSAError("--output-dir is required: the directory for the trained model")
        super().__post_init__()


ARGUMENT_CLASSES = (
    ModelArguments,
    DataArguments,
    LoraArguments,
    StageArguments,
    ContextArguments,
    FinetuneArguments,
)


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did.

    Attributes:
        output_dir: the directory with the final model.
        adapter_dir: the LoRA adapter alone, or None.
        steps: optimizer steps of the whole training, resumed ones included.
        train_loss: mean training loss.
        train_rows: packed rows in an epoch.
        train_tokens: tokens in an epoch.
        before: loss by position on held-out text before training, or None.
        after: the same after training.
        hub_url: address of the upload, or None.
    """

    output_dir: Path
    adapter_dir: Path | None
    steps: int
    train_loss: float
    train_rows: int
    train_tokens: int
    before: list[PositionBucket] | None
    after: list[PositionBucket] | None
    hub_url: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; losses in nats per token."""
        report = dataclasses.asdict(self)
        report["output_dir"] = str(self.output_dir)
        report["adapter_dir"] = str(self.adapter_dir) if self.adapter_dir else None
        for key in ("before", "after"):
            if report[key] is not None:
                report[key] = [bucket._asdict() for bucket in getattr(self, key)]
        return report


def register_lora_targets() -> None:
    """Tell peft which layers of a native-sparse-attention model LoRA adapts when `target_modules` is not given."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[MODEL_TYPE] = [*LORA_TARGETS, *LORA_BRANCH_TARGETS]


if is_peft_available():
    register_lora_targets()


def _is_whole(checkpoint: Path) -> bool:
    """Whether Trainer came to the end of writing a checkpoint: its state is the last file, and weights are there."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(any(checkpoint.glob(weights)) for weights in ("*model*", "global_step*"))


def last_whole_checkpoint(output: str | Path) -> Path | None:
    """The newest checkpoint in a directory; None where there is none that was written to its end.

    Args:
        output: the directory of a run.
    """
    paths = [path for path in Path(output).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return max(filter(_is_whole, paths), key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _continues(args: FinetuneArguments) -> bool:
    """Whether the run goes on with what is in its own output directory."""
    resume = args.resume_from_checkpoint
    return resume is not None and Path(resume).resolve().parent == Path(args.output_dir).resolve()


def _check_output(model: str, args: FinetuneArguments) -> None:
    """Refuse an output directory that would lose or mix somebody's files; resolve the checkpoint to resume from."""
    output = Path(args.output_dir)
    if output.resolve() == Path(model).resolve():
        raise NSAError(f"--output-dir {output} is the model itself; choose another directory")
    if output.exists() and not output.is_dir():
        raise NSAError(f"--output-dir {output} is a file; choose a directory")
    resume = args.resume_from_checkpoint
    if resume is not None and str(resume).lower() != "false":
        if str(resume).lower() == "true":
            resume = last_whole_checkpoint(output)
            if resume is None:
                raise NSAError(
                    f"--resume-from-checkpoint: there is no checkpoint in {output} that was written to its end; start "
                    "again without it"
                )
        elif not Path(resume).is_dir():
            raise NSAError(f"--resume-from-checkpoint: {resume} is not a directory; give a checkpoint-… directory")
        elif not _is_whole(Path(resume)):
            raise NSAError(
                f"--resume-from-checkpoint: {resume} was not written to its end, it lacks weights or "
                f"{TRAINER_STATE_NAME}; give an earlier checkpoint"
            )
        args.resume_from_checkpoint = str(resume)
    else:
        args.resume_from_checkpoint = None
    if output.is_dir() and any(output.iterdir()) and not args.overwrite and not _continues(args):
        raise NSAError(
            f"--output-dir {output} is not empty; choose a new directory, continue the run in it with "
            "--resume-from-checkpoint, or replace it with --overwrite"
        )


def _check_overwrite(
    model: ModelArguments, data: DataArguments, stage: StageArguments, args: FinetuneArguments
) -> None:
    """Refuse to replace an earlier run that this one needs."""
    output = Path(args.output_dir)
    named = [("the model", model.model), ("--teacher", stage.teacher), ("--dataset", data.dataset)]
    named += [("--train-file", each) for each in data.train_file or []]
    named += [("--eval-file", each) for each in data.eval_file or []]
    named += [("--resume-from-checkpoint", args.resume_from_checkpoint)]
    removed = {path.resolve() for path in _earlier_run(output)}
    for name, value in named:
        if value is None:
            continue
        place = Path(value).resolve()
        if place == output.resolve() or removed & {place, *place.parents}:
            raise NSAError(f"--overwrite would delete {name} {value} in --output-dir {output}; choose another one")


def _check_arguments(
    model: ModelArguments,
    data: DataArguments,
    lora: LoraArguments,
    stage: StageArguments,
    context: ContextArguments,
    args: FinetuneArguments,
) -> None:
    """Refuse what cannot work before anything is loaded."""
    if not model.model:
        raise NSAError("a model is required: nsa finetune MODEL …")
    for name in ("dtype", "save_dtype"):
        if getattr(model, name) not in (*DTYPES, None) or (name == "dtype" and model.dtype is None):
            raise NSAError(f"{name} must be one of {', '.join(DTYPES)}, got {getattr(model, name)!r}")
    if bool(data.train_file) == bool(data.dataset):
        got = "both" if data.train_file else "neither"
        raise NSAError(f"give the training text with --train-file or --dataset, one of them; got {got}")
    if data.max_length < 2:
        raise NSAError(f"--max-length must be at least 2 tokens, got {data.max_length}")
    if not 0 <= data.eval_fraction < 1:
        raise NSAError(f"--eval-fraction must be at least 0 and less than 1, got {data.eval_fraction}")
    for name in ("repeat_share", "fact_share"):
        if not 0 <= getattr(data, name) <= 1:
            flag = f"--{name.replace('_', '-')}"
            raise NSAError(f"{flag} must be at least 0 and at most 1, got {getattr(data, name)}")
    if data.max_facts < MIN_FACTS:
        raise NSAError(f"--max-facts must be at least {MIN_FACTS}, got {data.max_facts}")
    if data.eval_slices < 0:
        raise NSAError(f"--eval-slices must not be negative, got {data.eval_slices}")
    if lora.lora:
        if not is_peft_available():
            raise NSAError("--lora needs the peft library: pip install 'nsa-transformers[train]'")
        if lora.lora_r < 1:
            raise NSAError(f"--lora-r must be at least 1, got {lora.lora_r}")
        if not 0 <= lora.lora_dropout < 1:
            raise NSAError(f"--lora-dropout must be at least 0 and less than 1, got {lora.lora_dropout}")
    elif lora.lora_target_modules or lora.use_dora:
        raise NSAError(f"{'--use-dora' if lora.use_dora else '--lora-target-modules'} was given without --lora")
    if model.load_in_4bit or model.load_in_8bit:
        _check_quantized(model, lora)
    stage.check(lora.lora)
    context.check(args, stage.stage)
    if args.use_liger_kernel:
        if not is_liger_kernel_available():
            raise NSAError("--use-liger-kernel needs the liger-kernel library: pip install 'nsa-transformers[liger]'")
        if stage.stage != "sft":
            raise NSAError(f"--use-liger-kernel makes no logits, which --stage {stage.stage} needs; leave it out")
    if stage.hidden_weight and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise NSAError("--hidden-weight gets no gradient through use_reentrant; leave it out of the checkpointing")
    if stage.stage == "warmup" and args.learning_rate != FinetuneArguments.learning_rate:
        raise NSAError(
            f"--stage warmup trains new parts alone: set their rate with --new-parameter-lr, not --learning-rate "
            f"{args.learning_rate}"
        )
    _check_training(args)
    for name in (*(data.train_file or []), *(data.eval_file or [])):
        if not Path(name).exists():
            raise NSAError(f"text file {name} does not exist")
    if stage.teacher is not None and not stage.teacher.endswith(".gguf"):
        find_model(stage.teacher)
    require_matplotlib()


def _check_training(args: FinetuneArguments) -> None:
    """Refuse what Trainer would fail at once everything is loaded."""
    for name in ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(args, name) < 1:
            raise NSAError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise NSAError(f"--report-to must be all, none or some of {known}, got {name!r}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise NSAError(f"--report-to {name}: {error}") from error
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in EVALUATED:
        raise NSAError(f"--metric-for-best-model must be one of {', '.join(EVALUATED)}, got {metric!r}")
    if args.deepspeed is None:  # its configuration may bring a schedule of its own
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
        given = {"num_warmup_steps": 0, "num_training_steps": 9, "scheduler_specific_kwargs": args.lr_scheduler_kwargs}
        try:
            get_scheduler(args.lr_scheduler_type, optimizer, **given)
        except (TypeError, ValueError) as error:
            raise NSAError(
                f"--lr-scheduler-kwargs {args.lr_scheduler_kwargs} do not suit --lr-scheduler-type "
                f"{args.lr_scheduler_type.value}: {error}"
            ) from error


def _check_quantized(model: ModelArguments, lora: LoraArguments) -> None:
    flag = "--load-in-4bit" if model.load_in_4bit else "--load-in-8bit"
    if model.load_in_4bit and model.load_in_8bit:
        raise NSAError("--load-in-4bit and --load-in-8bit were both given; choose one")
    if not lora.lora:
        raise NSAError(f"{flag} needs --lora: quantised weights cannot be trained")
    if str(model.model).endswith(".gguf"):
        raise NSAError(f"{flag} cannot read a GGUF file; convert it with nsa convert first")
    if not is_bitsandbytes_available():
        raise NSAError(f"{flag} needs the bitsandbytes library: pip install 'nsa-transformers[quantize]'")
    if any(os.environ.get(name, "").lower() == "true" for name in SHARDING_VARIABLES.values()):
        raise NSAError(f"{flag} does not go with FSDP or DeepSpeed; launch with examples/accelerate/ddp.yaml")


def _quantization(model: ModelArguments, args: FinetuneArguments) -> dict[str, Any]:
    """Arguments of `load_model` that quantise the model where it is trained; the gates stay as they are, as φ does."""
    if not (model.load_in_4bit or model.load_in_8bit):
        return {"device": "cpu"}
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else getattr(torch, model.dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=model.load_in_4bit,
        load_in_8bit=model.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["lm_head", GATES],
    )
    return {"device_map": {"": args.device}, "quantization_config": config}


def _lora_modules(model, asked: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return (target_modules, modules_to_save) for LoRA on `model`.

    Raises:
        NSAError: a name asked for, or every default name, matches no linear layer.
    """
    named = list(model.named_modules())

    def matches(target: str) -> bool:
        return any(
            isinstance(module, torch.nn.Linear) and (name == target or name.endswith(f".{target}"))
            for name, module in named
        )

    linear = sorted({name.rpartition(".")[2] for name, module in named if isinstance(module, torch.nn.Linear)})
    if asked:
        missing = [target for target in asked if not matches(target)]
        if missing:
            raise NSAError(f"--lora-target-modules: {missing} match no linear layer of the model; it has {linear}")
        targets = list(asked)
    else:
        targets = [target for target in LORA_TARGETS + LORA_BRANCH_TARGETS if matches(target)]
        if not targets:
            raise NSAError(f"no default LoRA target is in the model; name some of {linear} with --lora-target-modules")
    saved = [
        new
        for new in NEW_MODULES
        if any(name.endswith(f".{new}") and any(True for _ in module.parameters()) for name, module in named)
    ]
    return targets, saved


def _add_lora(model, lora: LoraArguments):
    """Wrap `model` with trainable adapters; the new NSA modules train whole."""
    from peft import LoraConfig, get_peft_model

    targets, saved = _lora_modules(model, lora.lora_target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_dora=lora.use_dora,
        target_modules=targets,
        modules_to_save=saved or None,
    )
    return get_peft_model(model, config)


def _warn_about_length(config, max_length: int) -> None:
    """Say when rows are too short for the selection, or longer than the model's positions."""
    if getattr(config, "model_type", None) == MODEL_TYPE:
        dense = config.num_selected_blocks * config.select_block_size
        if max_length <= dense:
            logger.warning(
                "max_length %d is not more than n * l' = %d * %d = %d tokens: at this length every block is selected, "
                "attention is full, and the selection is never exercised. Use a --max-length above %d.",
                max_length,
                config.num_selected_blocks,
                config.select_block_size,
                dense,
                dense,
            )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        logger.warning(
            "max_length %d is more than the model's %d positions: it was never trained on tokens that far",
            max_length,
            positions,
        )


def _check_tokens(name: str, network, documents: Sequence[np.ndarray]) -> None:
    """Refuse tokens that the embedding does not have: on a GPU they end the process without saying why."""
    highest, rows = int(max(map(np.max, documents))), network.get_input_embeddings().num_embeddings
    if highest >= rows:
        raise NSAError(
            f"the tokenizer of {name} gives token {highest}, and the model's embedding ends at {rows - 1}; put the "
            "tokenizer there that the model was trained with, or resize_token_embeddings() and save the model"
        )


class _Trainer(Trainer):
    """Uploads checkpoints from their own directories: the output directory holds no model before training has ended.

    Takes no step beyond the last: Trainer looks only after a step whether it was one.
    """

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args = self.args
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        strategy = HubStrategy(args.hub_strategy)
        if not self.is_world_process_zero() or strategy == HubStrategy.END or (busy and not args.hub_always_push):
            return
        where = {"repo_id": self.hub_model_id, "folder_path": checkpoint_folder, "revision": args.hub_revision}
        where |= {"commit_message": f"Training in progress, step {self.state.global_step}", "run_as_future": True}
        adapter = (Path(checkpoint_folder) / "adapter_config.json").is_file()
        api = HfApi(token=args.hub_token)
        jobs = [
            api.upload_folder(
                **where, path_in_repo=ADAPTER_DIR if adapter else None, allow_patterns=[*MODEL_FILES, "*.py"]
            )
        ]
        if strategy != HubStrategy.EVERY_SAVE:
            last = strategy == HubStrategy.CHECKPOINT
            folder = "last-checkpoint" if last else Path(checkpoint_folder).name
            jobs.append(api.upload_folder(**where, path_in_repo=folder))
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else []), *jobs])


class _StageTrainer(StageTrainerMixin, _Trainer):
    """The trainer of the stages warmup and adapt."""


class _ContextTrainer(ContextTrainerMixin, _Trainer):
    """The trainer of rows that several processes share."""


class _DrawAnew(TrainerCallback):
    """Tells the training rows which epoch begins: accelerate does so in one process only."""

    def __init__(self, rows: PackedRows):
        self.rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.rows.set_epoch(int(state.epoch + 1e-6))


class _BeforeTraining(TrainerCallback):
    """Measures a sharded model before its first step: only when training begins is it on its devices."""

    def __init__(self, measure):
        self.measure = measure
        self.result: list[PositionBucket] | None = None

    def run(self) -> None:
        self.result = self.measure()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.run()
        elif state.is_world_process_zero:
            logger.warning("the loss before training is not measured: the sharded model starts from a checkpoint")


def _load_teacher(stage: StageArguments, model: ModelArguments, config: PreTrainedConfig, device: torch.device):
    """The frozen teacher, in bfloat16 on accelerators, or None."""
    if stage.teacher is None:
        return None
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    teacher, _ = load_model(stage.teacher, dtype=dtype, device=device, trust_remote_code=model.trust_remote_code)
    if teacher.config.vocab_size != config.vocab_size:
        raise NSAError(
            f"--teacher {stage.teacher} must have the model's vocabulary of {config.vocab_size} tokens to compare "
            f"logits, it has {teacher.config.vocab_size}; give the model that was converted"
        )
    if stage.hidden_weight:
        for name in ("hidden_size", "num_hidden_layers"):
            own, theirs = getattr(config, name), getattr(teacher.config, name)
            if own != theirs:
                raise NSAError(
                    f"--hidden-weight compares layer by layer: --teacher {stage.teacher} must have the model's {name} "
                    f"of {own}, it has {theirs}; leave --hidden-weight out"
                )
    return teacher.requires_grad_(False)


def _evaluation_texts(documents: Sequence[np.ndarray], max_length: int, slices: int) -> list[torch.Tensor]:
    """The `slices` longest held-out pieces of at most `max_length` tokens."""
    pieces = [document[i : i + max_length] for document in documents for i in range(0, len(document), max_length)]
    pieces = sorted((piece for piece in pieces if len(piece) > 1), key=len, reverse=True)[:slices]
    return [torch.from_numpy(piece.astype(np.int64)) for piece in pieces]


def _earlier_run(output: Path) -> list[Path]:
    """Directories that an earlier run of this command wrote, and its weights."""
    checkpoints = [path for path in output.glob("checkpoint-*") if path.is_dir()]
    return [*checkpoints, output / STAGING_DIR, output / ADAPTER_DIR, *_weights(output)]


def _remove_earlier_run(output: Path) -> None:
    """Delete what an earlier run of this command wrote, and nothing else."""
    for path in _earlier_run(output):
        if path.is_dir():
            shutil.rmtree(path)
    _remove_weights(output)


def _weights(output: Path) -> list[Path]:
    """The model in `output`, config.json first: without it nothing loads what is left by mistake."""
    return [output / "config.json", *output.glob("model*.safetensors"), output / "model.safetensors.index.json"]


def _remove_weights(output: Path) -> None:
    for path in _weights(output):
        path.unlink(missing_ok=True)


def _move_into_place(staging: Path, output: Path) -> None:
    """Move a finished model from `staging` to its parent; config.json last, since it makes the directory loadable."""
    _remove_weights(output)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    staging.rmdir()


@dataclass(frozen=True)
class _SourceSettings:
    """What training changes in a loaded model and the saved one must have back."""

    config: dict[str, Any]
    generation_config: Any
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, network) -> _SourceSettings:
        config = {key: getattr(network.config, key) for key in ("use_cache", *SPECIAL_TOKENS)}
        return cls(config, copy.deepcopy(network.generation_config), _checkpoint_dtype(name, network))

    def restore(self, network) -> None:
        for key, value in self.config.items():
            setattr(network.config, key, value)
        network.generation_config = self.generation_config


def _checkpoint_dtype(name: str, network) -> torch.dtype:
    """The type of a checkpoint's weights on disk; of the loaded weights where it is not recorded (GGUF files)."""
    if str(name).endswith(".gguf"):
        return network.dtype
    saved, _ = PreTrainedConfig.get_config_dict(name)
    dtype = saved.get("dtype", saved.get("torch_dtype"))
    return getattr(torch, dtype) if isinstance(dtype, str) and hasattr(torch, dtype) else network.dtype


def _file_of(name: str, file: str) -> Path | None:
    """A small file of a model in a directory or on the hub; None where it has none or cannot be asked."""
    if str(name).endswith(".gguf"):
        return None
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(name, file, **missing)
    return None if found is None else Path(found)


def _carry_record(name: str, directory: Path) -> None:
    """Copy the record of the conversion, where the model has one."""
    record = _file_of(name, CONVERSION_RECORD)
    if record is not None:
        shutil.copyfile(record, directory / CONVERSION_RECORD)


def _origin(name: str) -> dict[str, str | None]:
    """Licence and base model that the card of a model names, or the metadata of a GGUF file."""
    if str(name).endswith(".gguf"):
        source = resolve(name, weights=False)
        return {"license": source.license, "base_model": source.base_model}
    path = _file_of(name, "README.md")
    card = {} if path is None else read_card(path.parent)
    return {"license": card.get("license"), "base_model": card.get("base_model")}


def _save_final(trainer: Trainer, tokenizer, model: ModelArguments, source: _SourceSettings) -> Path | None:
    """Write the final model beside its place and move it in; with LoRA the merged model, and the adapter in `adapter/`.

    Returns:
        The adapter's directory, or None.
    """
    output = Path(trainer.args.output_dir)
    staging = output / STAGING_DIR
    accelerator = trainer.accelerator
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    trained = accelerator.unwrap_model(trainer.model_wrapped)
    state = accelerator.get_state_dict(trainer.model_wrapped) if sharded else None  # collective: every process calls it
    adapter = output / ADAPTER_DIR if hasattr(trained, "peft_config") else None
    if trainer.is_world_process_zero():
        save_dtype = getattr(torch, model.save_dtype) if model.save_dtype else source.dtype
        shutil.rmtree(staging, ignore_errors=True)
        try:
            if adapter is not None:
                from peft import PeftModel

                trained.save_pretrained(staging / ADAPTER_DIR, state_dict=state)
                unset_hf_deepspeed_config()  # or ZeRO-3 would shard the base model too
                base, _ = load_model(
                    model.model, dtype=model.dtype, device="cpu", trust_remote_code=model.trust_remote_code
                )
                trained = PeftModel.from_pretrained(base, staging / ADAPTER_DIR).merge_and_unload()
                state = None
            source.restore(trained)
            if state is None:
                trained.to(save_dtype)
                trained.save_pretrained(staging)
            else:
                state = {
                    key: value.to(save_dtype) if value.is_floating_point() else value for key, value in state.items()
                }
                trained.save_pretrained(staging, state_dict=state)
                trained.config.dtype = save_dtype  # the sharded model's own was written
                trained.config.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            _carry_record(model.model, staging)
            _move_into_place(staging, output)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    accelerator.wait_for_everyone()
    return adapter


def _write_results(
    trainer: Trainer,
    report: FinetuneReport,
    model: ModelArguments,
    data: DataArguments,
    lora: LoraArguments,
    stage: StageArguments,
    context: ContextArguments,
    origin: dict[str, str | None],
) -> None:
    """Write logs, record and pictures beside the model; `origin` is of `_origin`."""
    output = report.output_dir

    def write(name: str, content: Any) -> None:
        (output / name).write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")

    write("log_history.json", trainer.state.log_history)
    plot_loss_curve(trainer.state.log_history, output / "loss_curve.png")
    if report.before is not None:
        plot_position_loss(
            {"before training": report.before, "after training": report.after},
            output / "loss_by_position.png",
            "Loss by position on held-out text",
        )
    arguments = {
        "model": dataclasses.asdict(model),
        "data": dataclasses.asdict(data),
        "lora": dataclasses.asdict(lora),
        "stage": dataclasses.asdict(stage),
        "context": dataclasses.asdict(context),
        "training": trainer.args.to_dict(),
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    record = {"report": report.to_dict(), "arguments": arguments, "versions": versions, "origin": origin}
    write("nsa_finetune.json", record)
    write_card(output, repo_id=trainer.hub_model_id)


def _check_launch(args: FinetuneArguments) -> None:
    """Refuse launches that accelerate would run as something else on a CPU."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and args.world_size == 1:
        raise NSAError(
            f"{processes} processes were launched, but without a GPU each would train alone: add --use-cpu, with "
            "examples/accelerate/ddp.yaml, to let them share the work"
        )
    if args.distributed_state is not None and args.distributed_state.distributed_type == "MULTI_CPU":
        for library, variable in SHARDING_VARIABLES.items():
            if os.environ.get(variable, "").lower() == "true":
                raise NSAError(
                    f"accelerate shards with {library} on GPUs only, --use-cpu would leave it out; launch with "
                    "examples/accelerate/ddp.yaml instead"
                )


def _expand_home(groups: Sequence[Any]) -> None:
    """Replace a leading ~ that no shell replaced; Trainer does so for the output directory."""
    for group, name in itertools.product(groups, PATHS):
        value = getattr(group, name, None)
        if isinstance(value, list):
            setattr(group, name, [os.path.expanduser(each) for each in value])
        elif value is not None:
            setattr(group, name, os.path.expanduser(str(value)))


def _make_repository(args: FinetuneArguments) -> None:
    """Make the repository that --push-to-hub fills: after all other checks, before the training."""
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    with hub_errors(f"--push-to-hub: cannot upload to {name}"):
        api = HfApi(token=args.hub_token)
        args.hub_model_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        if args.hub_revision is not None:
            api.create_branch(args.hub_model_id, branch=args.hub_revision, exist_ok=True)


def _push(trainer: Trainer) -> str:
    """Upload the finished model; returns its address."""
    args = trainer.args
    trainer._finish_current_push()
    where = {"token": args.hub_token, "revision": args.hub_revision}
    try:
        url, _ = push(args.output_dir, trainer.hub_model_id, **where)
    except NSAError as error:
        raise NSAError(
            f"{error}. The trained model is in {args.output_dir}: upload it with `nsa push {args.output_dir} "
            f"{trainer.hub_model_id}`"
        ) from error
    return url


def _run(
    model: ModelArguments,
    data: DataArguments,
    lora: LoraArguments,
    stage: StageArguments,
    context: ContextArguments,
    args: FinetuneArguments,
) -> FinetuneReport:
    """Train as the argument groups say; see `finetune`."""
    _expand_home((model, data, stage, args))
    _check_arguments(model, data, lora, stage, context, args)
    _check_output(model.model, args)
    if args.overwrite and not _continues(args):
        _check_overwrite(model, data, stage, args)
    if not is_accelerate_available():
        raise NSAError("training needs the accelerate library: pip install 'nsa-transformers[train]'")
    _check_launch(args)
    if args.n_gpu > 1:
        logger.warning(
            "%d devices are visible, one is used; `accelerate launch -m nsa_conversion finetune …` uses all",
            args.n_gpu,
        )
        args._n_gpu = 1  # nn.DataParallel would split the one packed sequence of a batch
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # it would only warn
    main_process = args.process_index == 0
    columns = {"text_column": data.text_column, "messages_column": data.messages_column}
    if data.train_file:
        documents = read_files(data.train_file, **columns)
    else:
        documents = read_dataset(data.dataset, data.dataset_config, data.dataset_split, **columns)
    eval_documents = read_files(data.eval_file, **columns) if data.eval_file else []

    network, tokenizer = load_model(
        model.model, dtype=model.dtype, trust_remote_code=model.trust_remote_code, **_quantization(model, args)
    )
    if tokenizer is None:
        raise NSAError(f"{model.model} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    if context.context_parallel_size > 1 and network.config.model_type != MODEL_TYPE:
        raise NSAError(
            f"--context-parallel-size needs a model of type {MODEL_TYPE}, got {network.config.model_type!r}; convert "
            "it with `nsa convert`"
        )
    source = _SourceSettings.of(model.model, network)
    teacher = _load_teacher(stage, model, network.config, args.device)
    if main_process:
        _warn_about_length(network.config, data.max_length)

    progress = main_process and not args.disable_tqdm
    encoded = encode_documents(documents, tokenizer, progress)
    if eval_documents:
        held_out = encode_documents(eval_documents, tokenizer, progress)
    else:
        encoded, held_out = hold_out(encoded, data.eval_fraction, args.seed)
    _check_tokens(model.model, network, [*encoded, *held_out])
    rows = pack(encoded, data.max_length, data.full_rows)
    if data.repeat_share or data.fact_share:
        shares = (data.repeat_share, data.fact_share)
        rows = practise_retrieval(rows, *shares, data.max_length // 2, tokenizer, args.seed, data.max_facts)
    eval_rows: PackedRows | None = pack(held_out, data.max_length) if held_out else None
    texts = _evaluation_texts(held_out, data.max_length, data.eval_slices)

    prepare_stage(network, stage, max(len(piece) for row in rows.rows for piece in row))

    set_seed(args.seed)
    if lora.lora:
        network = _add_lora(network, lora)
    if main_process:
        trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        everything = sum(parameter.numel() for parameter in network.parameters())
        print(
            f"training {trainable:,} of {everything:,} parameters on {rows.num_tokens:,} tokens in {len(rows):,} rows "
            f"of up to {data.max_length:,}; {eval_rows.num_tokens if eval_rows else 0:,} tokens held out",
            flush=True,
        )

    if args.push_to_hub and main_process:
        _make_repository(args)
    settings = {
        "model": network,
        "args": args,
        "train_dataset": rows,
        "eval_dataset": eval_rows,
        "data_collator": PackedRowsCollator(data.full_rows),
        "processing_class": tokenizer,
    }
    if args.ddp_find_unused_parameters is None and (context.context_parallel_size > 1 or stage.stage != "sft"):
        # all are used; and φ's losses are computed behind the forward pass
        args.ddp_find_unused_parameters = False
    if context.context_parallel_size > 1:
        trainer = _ContextTrainer(**settings, context=context)
    elif stage.stage == "sft":
        trainer = _Trainer(**settings)
    else:
        trainer = _StageTrainer(**settings, stage=stage, teacher=teacher, max_length=data.max_length)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise NSAError(
                f"--stage {stage.stage} reads weights outside the forward pass: use neither FSDP nor DeepSpeed"
            )

    trainer.add_callback(_DrawAnew(rows))
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled

    def measure(description: str) -> list[PositionBucket] | None:
        if not texts:
            return None
        with trainer.accelerator.autocast():
            return loss_by_position(
                trainer.model_wrapped if sharded else trainer.model,
                texts,
                position_edges(max(map(len, texts))),
                sharded=sharded,
                progress=progress,
                description=description,
            )

    first = _BeforeTraining(lambda: measure("Evaluating before training"))
    if sharded:
        trainer.add_callback(first)
    else:
        first.run()
    origin = _origin(model.model)  # now: the training may outlast its files and the network
    if main_process and args.overwrite and not _continues(args):
        _remove_earlier_run(Path(args.output_dir))
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = measure("Evaluating after training")
    adapter = _save_final(trainer, tokenizer, model, source)
    report = FinetuneReport(
        output_dir=Path(args.output_dir),
        adapter_dir=adapter,
        steps=result.global_step,
        train_loss=result.training_loss,
        train_rows=len(rows),
        train_tokens=rows.num_tokens,
        before=first.result,
        after=after,
    )
    if main_process:
        _write_results(trainer, report, model, data, lora, stage, context, origin)
        if args.push_to_hub:
            report = dataclasses.replace(report, hub_url=_push(trainer))
    return report


def finetune(model: str | Path, output_dir: str | Path, **settings: Any) -> FinetuneReport:
    """Fine-tune a causal language model on packed text and save a directory `from_pretrained` loads.

    Args:
        model: a directory, hub id or GGUF file.
        output_dir: the directory for the trained model, checkpoints, logs and pictures; new or empty unless
            `overwrite` or `resume_from_checkpoint` is given.
        settings: fields of `ModelArguments`, `DataArguments` (`train_file` or `dataset` is required),
            `LoraArguments`, `StageArguments`, `ContextArguments` and `FinetuneArguments` (all of `TrainingArguments`),
            as on the command line.

    Returns:
        The report. With LoRA, `output_dir` holds the merged model and `output_dir/adapter` the adapter.

    Raises:
        NSAError: an unknown setting, unusable data, a LoRA target that matches nothing, an output that exists.
    """
    for key in ("train_file", "eval_file"):
        if isinstance(settings.get(key), (str, Path)):
            settings[key] = [str(settings[key])]
    unknown = sorted(set(settings) - setting_names())
    if unknown:
        raise NSAError(f"unknown settings {unknown}; see nsa finetune --help for all of them")
    settings |= {"model": str(model), "output_dir": str(output_dir)}
    if settings.get("dataset") is not None:
        settings["dataset"] = str(settings["dataset"])
    return _run(*_groups(settings))


def _groups(settings: dict[str, Any]) -> tuple[Any, ...]:
    """The settings as objects of `ARGUMENT_CLASSES`."""
    return HfArgumentParser(ARGUMENT_CLASSES).parse_dict(settings)


def setting_names() -> set[str]:
    """What `finetune` takes beside the model and the output directory."""
    return {entry.name for group in ARGUMENT_CLASSES for entry in dataclasses.fields(group) if entry.init}


def read_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file, each of the type that the command line gives it; None leaves the default.

    Args:
        settings: of `finetune`.

    Raises:
        NSAError: an unknown setting, or a value of the wrong type.
    """
    parser = _given_parser()
    actions = {action.dest: action for action in reversed(parser._actions)}  # --name, not the --no-name behind it
    words, read = [], {}
    for name, value in settings.items():
        kind = actions[name].type if name in actions else None
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, (list, tuple)) and name in actions and actions[name].nargs == "+":
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, (Mapping, list, tuple)) and kind not in (int, float, string_to_bool):
            read[name] = value
        elif value is not None:
            words.append(f"--{name}={value}")
    return {**read, **vars(parser.parse_args(words))}


def check_settings(model: str | Path, output_dir: str | Path, settings: Mapping[str, Any], config=None) -> None:
    """Refuse what `finetune` would refuse before it loads anything, whatever `output_dir` holds.

    Args:
        model, output_dir, settings: as for `finetune`.
        config (NSAConfig | None): of a model that is not converted yet; its φ and the length of rows are checked too.

    Raises:
        NSAError: as `finetune`.
    """
    environment = dict(os.environ)
    try:
        groups = _groups({**settings, "model": str(model), "output_dir": str(output_dir)})
        _expand_home(groups)
        _check_arguments(*groups)
        if config is not None:
            _, data, _, stage, *_ = groups
            check_sparse(config, stage, data.max_length)
    finally:  # TrainingArguments sets variables that the next one would read
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


class _Parser(HfArgumentParser):
    """Reports a mistake in one line: the usage of all TrainingArguments fills several screens."""

    def error(self, message: str) -> NoReturn:
        raise NSAError(f"{message}; see nsa finetune --help")


def _parser() -> _Parser:
    parser = _Parser(
        ARGUMENT_CLASSES,
        prog="nsa finetune",
        usage="nsa finetune MODEL --train-file FILE [FILE …] --output-dir DIR [--max-length N] [--lora] [options]",
        description="Train a model on packed text with transformers' Trainer; every TrainingArguments flag works.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("positional_model", metavar="MODEL", nargs="?", help="a directory, hub id or GGUF file")
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        help="a YAML file of conversion and stages, each run into a folder of --output-dir; other flags hold for all "
        "stages; the same command again goes on where it stopped",
    )
    for action in parser._actions:
        if action.dest == "resume_from_checkpoint":  # without a value: the latest in the output directory
            action.nargs, action.const = "?", "true"
        elif action.type is string_to_bool:  # optional booleans such as --disable-tqdm would need a value
            action.nargs, action.const = "?", True
    return parser


def _given_parser() -> _Parser:
    """A parser that returns only what was given, without defaults."""
    parser = _parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


def _parse(
    argv: list[str],
) -> tuple[ModelArguments, DataArguments, LoraArguments, StageArguments, ContextArguments, FinetuneArguments]:
    *groups, rest = _parser().parse_args_into_dataclasses(argv, look_for_args_file=False)
    if rest.positional_model is not None:
        if groups[0].model is not None:
            raise NSAError(f"the model was given twice: {rest.positional_model} and --model {groups[0].model}")
        groups[0].model = rest.positional_model
    return tuple(groups)


def _main_recipe(argv: list[str]) -> int:
    given = vars(_given_parser().parse_args(argv))  # only what is given wins over the recipe
    recipe, output = Recipe.read(given.pop("recipe")), given.pop("output_dir", None)
    models = [given.pop(name) for name in ("positional_model", "model") if name in given]
    if len(models) != 1 or output is None:
        raise NSAError("--recipe needs one MODEL and --output-dir: nsa finetune MODEL --recipe FILE --output-dir DIR")
    for name in ("overwrite", "resume_from_checkpoint", "push_to_hub", "teacher"):
        if name in given:
            raise NSAError(f"--{name.replace('_', '-')} does not go with --recipe, which is resumed by itself")
    run_recipe(models[0], output, recipe, **given)
    return 0


def main(argv: list[str]) -> int:
    """Command line of `nsa finetune`.

    Args:
        argv: arguments after `nsa finetune`.

    Returns:
        The exit code.
    """
    if any(word == "--recipe" or word.startswith("--recipe=") for word in argv):
        return _main_recipe(argv)
    *groups, args = _parse(argv)
    report = _run(*groups, args)
    if torch.distributed.is_initialized():
        # together: a process that ends early would be taken for a failure, and the others be stopped
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if args.process_index == 0:
        if report.before is not None:
            series = {"before": report.before, "after": report.after}
            print(
                f"\nloss by position on held-out text (nats per token)\n\n{format_position_table(series, 'change')}\n"
            )
            print(
                f"mean loss {mean_loss(report.before):.4f} -> {mean_loss(report.after):.4f} after {report.steps} steps"
            )
        if report.adapter_dir is not None:
            print(f"wrote the merged model to {report.output_dir} and the adapter alone to {report.adapter_dir}")
        else:
            print(f"wrote the model to {report.output_dir}")
        if report.hub_url is not None:
            print(f"uploaded it to {report.hub_url}")
        sys.stdout.flush()
    return 0
