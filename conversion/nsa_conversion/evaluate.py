# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""`nsa eval`: what a sparse model keeps of the dense one in loss by position and retrieval, and what it selects."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

import modeling_nsa  # noqa: F401 - registers the NSA model type

from .data import Document, builtin_text, encode_documents, read_files, read_text
from .diagnosis import NEIGHBOURS, Diagnosis, diagnose, is_sparse
from .errors import NSAError
from .harness import require_lm_eval, run_lm_eval
from .loss import (
    PositionBucket,
    RecallGroup,
    loss_by_recall,
    losses_by_position,
    position_edges,
    take_texts,
    token_losses,
)
from .parsing import Parser
from .plots import require_matplotlib
from .report import EvaluationReport
from .sources import check_token_ids, find_model, find_tokenizer, load_errors, load_model
from .tasks import TASKS, Material, TaskResult, make_trials, run_task, task_cells

__all__ = ["PARTS", "QUICK", "Settings", "default_device", "environment_of", "evaluate", "main"]

PARTS = ("loss", "tasks", "diagnosis")
BUILTIN = "built-in text (Python help topics)"
# Characters of each text that tokenizers are compared on.
PROBE = 10_000


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        parts: of `PARTS`.
        length: tokens per text of the loss, at least 2.
        slices: texts per file.
        tasks: keys of `TASKS`.
        task_lengths: tokens of the tasks' prompts.
        depths: needle depths of the tasks that have one needle.
        trials: prompts per task, length and depth.
        diagnosis_texts: texts per file that the selection is diagnosed on.
        lm_eval: tasks of lm_eval.
        lm_eval_limit: examples of each, or a share of them if below 1; None takes all.
        batch_size: prompts per forward pass.
        seed: of prompts and intervals.

    Raises:
        NSAError: an unknown part or task, or a number that is too small.
    """

    parts: Sequence[str] = PARTS
    length: int = 4096
    slices: int = 5
    tasks: Sequence[str] = tuple(TASKS)
    task_lengths: Sequence[int] = (1024, 4096)
    depths: int = 5
    trials: int = 20
    diagnosis_texts: int = 2
    lm_eval: Sequence[str] = ()
    lm_eval_limit: float | None = None
    batch_size: int = 1
    seed: int = 0

    def __post_init__(self):
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not (self.parts or self.lm_eval):
            raise NSAError(f"parts must be some of {', '.join(PARTS)}, got {', '.join(unknown) or 'none'}")
        task_cells(self.tasks, self.task_lengths, self.depths)
        if wrong := [length for length in self.task_lengths if length < 1]:
            raise NSAError(f"task_lengths must be at least 1 token, got {wrong[0]}")
        for name, least in {"length": 2, "slices": 1, "depths": 1, "trials": 1, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise NSAError(f"{name} must be at least {least}{' tokens' * (least > 1)}, got {getattr(self, name)}")
        if "diagnosis" in self.parts and self.diagnosis_texts < 1:
            raise NSAError(f"diagnosis_texts must be at least 1, got {self.diagnosis_texts}; leave it out of the parts")


# Every part at a small size; the lengths lie beyond n·l' = 1,024 tokens, so that the selection leaves something out.
QUICK = {
    "length": 2048,
    "slices": 2,
    "task_lengths": (1280,),
    "depths": 3,
    "trials": 2,
    "diagnosis_texts": 1,
}


def default_device() -> torch.device:
    """The first accelerator, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def evaluate(
    models,
    against=None,
    texts: str | Mapping[str, Sequence[Document]] | None = None,
    *,
    tokenizer=None,
    haystack: str | None = None,
    finished: str | Path | None = None,
    resume: bool = True,
    edges: Sequence[int] | None = None,
    chunk_size: int = 1024,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    **settings: Any,
) -> EvaluationReport:
    """Measure models beside a dense one. They are loaded one after the other.

    Args:
        models: one or several of: a directory, hub id or GGUF file, or a loaded model (then `tokenizer` is needed).
        against: the model to compare with, usually the dense source; the same kinds of value.
        texts: name -> documents, held apart; or one text. None takes `nsa_conversion.data.builtin_text()`.
        tokenizer: of all the models; None takes the first one's, which must be like those of the others.
        haystack: text that the tasks hide facts in; None takes the built-in text.
        finished: JSON file of what is already measured, for models that are named: equal parts are taken from there,
            and every new one is added at once. Equal means the same files, texts and settings.
        resume: False takes nothing from `finished`; the first result replaces what it holds.
        edges: bucket edges; None is `position_edges(length)`.
        chunk_size: tokens whose logits are held in fp32 at a time.
        dtype: weights' type for models loaded here; None is the checkpoint's own.
        device: where to load; None is the first accelerator, else the CPU.
        trust_remote_code: allow code from the checkpoints to run.
        progress: show progress bars.
        settings: see `Settings`.

    Returns:
        The report.

    Raises:
        NSAError: a model cannot be loaded, a text is too short, a setting is wrong, or tokenizers differ.
    """
    settings = Settings(**settings)
    if settings.lm_eval:
        require_lm_eval()
    documents = _documents(texts)
    material = Material(builtin_text() if haystack is None else haystack) if "tasks" in settings.parts else None
    models = list(models) if isinstance(models, (list, tuple)) else [models]
    if not models:
        raise NSAError("models is empty; give at least one")
    sources = models if against is None else [against, *models]
    labels = _labels(sources)
    against_label = None if against is None else labels[0]
    # Dense first in tables, but last in time: the first model brings the tokenizer.
    order = sorted(zip(labels, sources), key=lambda pair: pair[0] == against_label)
    own = [_own_tokenizer(source, trust_remote_code) for _, source in order]
    tokenizer = tokenizer or _common_tokenizer([label for label, _ in order], own, documents)
    chosen = _encode(documents, tokenizer, settings, progress)
    highest = max(int(ids.max()) for pieces in chosen.values() for ids in pieces)
    if material is not None:
        # Refuses a length that a task does not fit into.
        cells = [(name, length) for name, length, _ in task_cells(settings.tasks, settings.task_lengths, 1)]
        trials = [make_trials(name, tokenizer, material, length, trials=1)[0] for name, length in cells]
        highest = max(highest, *(trial.highest_id for trial in trials))
    known = _Finished(finished, resume)
    report: EvaluationReport | None = None
    for label, source in order:
        if isinstance(source, (str, Path)):
            place = device or default_device()
            model, _ = load_model(source, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
        else:
            model = source
        check_token_ids(model, highest, label)
        if report is None:
            report = EvaluationReport(
                models=dict(zip(labels, map(_name, sources))),
                model=label,
                against=against_label,
                texts={name: [len(ids) for ids in pieces] for name, pieces in chosen.items()},
                settings=dataclasses.asdict(settings),
                environment=environment_of(model),
            )
        remember = known.of(source, dtype, tokenizer)
        run = _Run(model, label, tokenizer, settings, remember, edges=edges, chunk_size=chunk_size, progress=progress)
        run.measure(chosen, material, report)
        del model, run  # one model in memory at a time
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    report.order(labels)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def _name(source) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def _labels(sources: Sequence) -> list[str]:
    """Short names, made different by a number where they are alike."""
    names = [Path(_name(source)).name.removesuffix(".gguf") or _name(source) for source in sources]
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, start=1)]


def _documents(texts) -> dict[str, Sequence[Document]]:
    if texts is None:
        return {BUILTIN: [builtin_text()]}
    if isinstance(texts, str):
        texts = {"given text": [texts]}
    for name, documents in texts.items():
        if not any(documents) or all(isinstance(each, str) and not each.strip() for each in documents):
            raise NSAError(f"text {name!r} is empty; give at least two tokens of it, or None for the built-in text")
    return dict(texts)


def _own_tokenizer(source, trust_remote_code: bool):
    """The tokenizer that a model to be loaded brings, or None; refuses what is no model."""
    if not isinstance(source, (str, Path)):
        return None
    if not str(source).endswith(".gguf"):
        where = find_model(source) or str(source)
        with load_errors(source):
            AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    return find_tokenizer(source, trust_remote_code=trust_remote_code)


def _common_tokenizer(labels: Sequence[str], own: Sequence, documents):
    """The first model's tokenizer; others that bring one must make the same tokens of the texts."""
    if own[0] is None:
        raise NSAError(f"{labels[0]} brings no tokenizer, and evaluation on text needs one; pass tokenizer=…")
    texts = [str(each[0])[:PROBE] for each in documents.values()]
    expected, *others = (
        None if tokenizer is None else tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for tokenizer in own
    )
    for label, ids in zip(labels[1:], others):
        if ids not in (None, expected):
            raise NSAError(
                f"the tokenizers of {labels[0]} and {label} make different tokens of the texts; losses per token can "
                "only be compared between models with the same tokenizer, so evaluate each alone"
            )
    return own[0]


def _encode(documents, tokenizer, settings: Settings, progress: bool) -> dict[str, list[torch.Tensor]]:
    chosen = {}
    for name, each in documents.items():
        encoded = [
            torch.from_numpy(ids).long() for ids in encode_documents(each, tokenizer, progress and len(each) > 1)
        ]
        chosen[name] = take_texts(encoded, settings.length, settings.slices)
    return chosen


def environment_of(model) -> dict[str, str]:
    """What a model is measured with: device, dtype, versions, date."""
    device = next(model.parameters()).device
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {platform.machine()}",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# One model
# ---------------------------------------------------------------------------------------------------------------------


class _Finished:
    """Results by what was measured, kept in a JSON file where one is given."""

    def __init__(self, path: str | Path | None, resume: bool):
        self.path = None if path is None else Path(path)
        self.values: dict[str, Any] = {}
        if resume and self.path is not None and self.path.exists():
            try:
                self.values = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise NSAError(f"{self.path} does not hold finished results ({error}); remove it") from None

    def of(self, source, dtype, tokenizer) -> Callable[[list, Callable[[], Any]], Any]:
        """A function (what, how) that gives the result known for `what`, or works it out."""
        what_model = [_fingerprint(source), str(dtype), _digest(str(tokenizer.chat_template))]

        def result(what: list, make: Callable[[], Any]):
            if self.path is None or not isinstance(source, (str, Path)):
                return make()
            key = json.dumps([what_model, what])
            if key not in self.values:
                self.values[key] = make()
                self.path.parent.mkdir(parents=True, exist_ok=True)
                beside = self.path.with_suffix(".tmp")
                beside.write_text(json.dumps(self.values), encoding="utf-8")
                os.replace(beside, self.path)
            return self.values[key]

        return result


def _fingerprint(source) -> list:
    """The name of a checkpoint, with size and time of its files where they are local."""
    path = Path(_name(source)).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("config.json"))
    return [_name(source), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


class _Run:
    """Measures one loaded model."""

    def __init__(self, model, label, tokenizer, settings: Settings, known, *, edges, chunk_size: int, progress: bool):
        self.model, self.label, self.tokenizer, self.settings, self.known = model, label, tokenizer, settings, known
        self.given_edges = edges
        self.bars = {"chunk_size": chunk_size, "progress": progress}

    def measure(
        self, texts: Mapping[str, Sequence[torch.Tensor]], material: Material | None, report: EvaluationReport
    ) -> None:
        """Add everything that the settings ask for to the report."""
        self.check(texts)
        if "loss" in self.settings.parts:
            for name, pieces in texts.items():
                buckets, groups = self.losses(name, pieces)
                report.positions.setdefault(name, {})[self.label] = buckets
                report.recall.setdefault(name, {})[self.label] = groups
        if material is not None:
            report.tasks[self.label] = self.tasks(material)
        if "diagnosis" in self.settings.parts and is_sparse(self.model):
            for name, pieces in self.long_enough(texts).items():
                report.diagnosis.setdefault(name, {})[self.label] = self.diagnosis(name, pieces)
        if self.settings.lm_eval:
            report.suites[self.label] = self.suites()

    def check(self, texts: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Refuse what cannot be measured, and say how many tokens this model will read."""
        parts, counts = self.settings.parts, {}
        if "loss" in parts:
            counts["loss"] = sum(len(ids) for pieces in texts.values() for ids in pieces)
        if "tasks" in parts:
            counts["tasks"] = self.settings.trials * sum(length for _, length, _ in self._cells())
        if "diagnosis" in parts and is_sparse(self.model):
            long = self.long_enough(texts).values()
            counts["diagnosis"] = 3 * sum(len(ids) for pieces in long for ids in pieces)
        listed = ", ".join(f"{part} {count:,}" for part, count in counts.items())
        if self.bars["progress"]:
            print(f"{self.label}: {sum(counts.values()):,} tokens to read ({listed})", file=sys.stderr)

    def losses(self, name: str, texts: Sequence[torch.Tensor]) -> tuple[list[PositionBucket], list[RecallGroup]]:
        """Loss by position and of recalled n-grams."""
        edges = self._edges(texts)

        def make():
            losses = token_losses(self.model, texts, description=f"{self.label}, loss on {name}", **self.bars)
            buckets, groups = losses_by_position(losses, edges), loss_by_recall(texts, losses)
            return [[bucket._asdict() for bucket in buckets], [group._asdict() for group in groups]]

        buckets, groups = self.known(["loss", self._digest_of(texts), edges], make)
        return [PositionBucket(**each) for each in buckets], [RecallGroup(**each) for each in groups]

    def tasks(self, material: Material) -> list[TaskResult]:
        """Scores of all tasks."""
        cells = self._cells()
        about = [self.settings.trials, self.settings.seed, _digest(*material.sentences)]
        results = []
        for place, (name, length, depth) in enumerate(cells, start=1):

            def make(name=name, length=length, depth=depth, place=place):
                at = "" if depth is None else f" at {depth:.0%}"
                result = run_task(
                    self.model, self.tokenizer, material, name, length, depth,
                    trials=self.settings.trials, batch_size=self.settings.batch_size, seed=self.settings.seed,
                    progress=self.bars["progress"],
                    description=f"{self.label}, {name} {length:,}{at} ({place} of {len(cells)})",
                )  # fmt: skip
                return result._asdict()

            result = self.known(["task", name, length, depth, *about], make)
            results.append(TaskResult(**result | {"scores": tuple(result["scores"])}))
        return results

    def long_enough(self, texts: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
        """Texts that a selection leaves something out of."""
        least = self.model.config.num_selected_blocks * self.model.config.select_block_size + max(NEIGHBOURS)
        long = {name: [ids for ids in pieces if len(ids) >= least] for name, pieces in texts.items()}
        if not any(long.values()):
            raise NSAError(
                f"the diagnosis of {self.label} needs a text of {least:,} tokens: up to n·l' nothing is left out. "
                "Give a longer text and length, or leave diagnosis out of the parts"
            )
        return {name: pieces[: self.settings.diagnosis_texts] for name, pieces in long.items() if pieces}

    def diagnosis(self, name: str, texts: Sequence[torch.Tensor]) -> Diagnosis:
        """What the selection finds."""
        edges = self._edges(texts)

        def make():
            found = diagnose(self.model, texts, edges, description=f"{self.label}, {name}", **self.bars)
            return found.to_dict()

        return Diagnosis.from_dict(self.known(["diagnosis", self._digest_of(texts), edges], make))

    def suites(self) -> dict[str, dict[str, Any]]:
        """Metrics of lm_eval."""
        settings = self.settings
        how = {"batch_size": settings.batch_size, "limit": settings.lm_eval_limit}
        return self.known(
            ["lm_eval", list(settings.lm_eval), settings.lm_eval_limit],
            lambda: run_lm_eval(self.model, self.tokenizer, settings.lm_eval, **how),
        )

    def _cells(self) -> list[tuple[str, int, float | None]]:
        return task_cells(self.settings.tasks, self.settings.task_lengths, self.settings.depths)

    def _edges(self, texts: Sequence[torch.Tensor]) -> list[int]:
        return list(self.given_edges or position_edges(max(map(len, texts))))

    def _digest_of(self, texts: Sequence[torch.Tensor]) -> str:
        return _digest(*(ids.numpy().tobytes() for ids in texts))


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(
        prog="nsa eval",
        description="Loss by position, retrieval tasks and the selection itself, side by side with the dense model. "
        "On a CPU start with --quick.",
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="directories, hub ids or GGUF files")
    parser.add_argument("--against", metavar="DENSE", help="the model to compare with, usually the dense source")
    parser.add_argument("--quick", action="store_true", help="every part at a small size; other flags still count")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="what to measure (default: all)")

    loss = parser.add_argument_group("loss and diagnosis")
    loss.add_argument(
        "--text-file",
        metavar="FILE",
        nargs="+",
        help="UTF-8 texts or JSON Lines of documents, every file reported apart (default: a built-in technical text)",
    )
    loss.add_argument("--length", type=int, help="tokens per text (default: %(default)s)")
    loss.add_argument("--slices", type=int, help="texts per file: slices of one, or documents (default: %(default)s)")
    loss.add_argument("--diagnosis-texts", type=int, help="of these for the diagnosis (default: %(default)s)")

    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)"
    )
    tasks.add_argument(
        "--task-lengths", type=int, nargs="+", metavar="N", help="tokens of a prompt (default: 1024 4096)"
    )
    tasks.add_argument("--depths", type=int, help="depths in tasks of one needle (default: %(default)s)")
    tasks.add_argument("--trials", type=int, help="prompts per task, length and depth (default: %(default)s)")
    tasks.add_argument("--haystack", metavar="FILE", help="text that facts are hidden in (default: the built-in text)")
    tasks.add_argument("--batch-size", type=int, help="prompts per forward pass (default: %(default)s)")
    tasks.add_argument("--seed", type=int, help="of prompts and intervals (default: %(default)s)")

    suites = parser.add_argument_group("standard suites (need lm_eval)")
    suites.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm_eval, separated by commas (default: none)")
    suites.add_argument("--lm-eval-limit", type=float, metavar="N", help="examples of each, or a share if below 1")

    parser.add_argument("--output", metavar="DIR", help="write eval.json and eval.html here")
    parser.add_argument("--resume", action="store_true", help="take what an earlier run into --output has finished")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the first accelerator, else cpu)")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow code in the checkpoints to run")
    parser.set_defaults(**dataclasses.asdict(Settings()))
    return parser


def main(argv: list[str]) -> int:
    """Command line of `nsa eval`.

    Args:
        argv: arguments after `nsa eval`.

    Returns:
        The exit code.
    """
    parser = _parser()
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    if args.output is not None:
        require_matplotlib()
        if Path(args.output).exists() and not Path(args.output).is_dir():
            raise NSAError(f"--output {args.output} is a file; choose a directory")
    elif args.resume:
        raise NSAError("--resume needs the --output DIR of the run to go on with")
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    settings["lm_eval"] = args.lm_eval.split(",") if args.lm_eval else ()
    report = evaluate(
        args.models,
        args.against,
        None if args.text_file is None else {name: read_files([name]) for name in args.text_file},
        haystack=None if args.haystack is None else read_text(args.haystack),
        finished=None if args.output is None else Path(args.output) / "finished.json",
        resume=args.resume,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        **settings,
    )
    for name, lengths in report.texts.items():
        if max(lengths) < args.length:
            print(f"{name} holds only {max(lengths):,} tokens", file=sys.stderr)
        if len(lengths) < args.slices:
            print(f"{name} holds only {len(lengths)} text(s) of {max(lengths):,} tokens", file=sys.stderr)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report.text())
    if args.output is not None:
        print("wrote {} and {}".format(*report.save(args.output)), file=sys.stderr)
    return 0
