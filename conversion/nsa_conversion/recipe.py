# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Recipes: the steps from a dense checkpoint to a trained NSA model in one YAML file, run in order and resumed.

    convert: {compress_type: residual_mlp}     # settings of `convert`; left out for an NSA model
    settings: {max_length: 8192, bf16: true}   # of `finetune`, for every stage
    stages:
      - {name: warmup, stage: warmup, max_steps: 300}
      - {name: adapted, stage: adapt, teacher: source, max_steps: 1000}

`teacher: source` is the model that the recipe was given, any other name the model of a step before. A stage
`{convert: {…}}` converts what those before it made, which then train the dense model. Every step writes a folder of
its own; a step that is finished is left as it is, one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import NSAError
from .rope import check_yarn_factor, scale_rope
from .sources import find_model, resolve

__all__ = ["Recipe", "load_yaml", "run_recipe"]

# What steps and teachers may be called without a stage of that name.
SOURCE, SCALED, CONVERTED = "source", "scaled", "converted"
RECORD = "recipe.json"
# Given once for all stages, or not by a recipe.
RESERVED = ("model", "output_dir", "overwrite", "resume_from_checkpoint", "push_to_hub", "recipe")


class Recipe:
    """A recipe that is checked.

    Args:
        content: what the file holds.
        name: for error messages.
        stages_needed: refuse a recipe without stages.

    Attributes:
        yarn_factor: how far the source's RoPE is scaled before all else, or None.
        convert: settings of `convert`, or None.
        stages: name -> settings of `finetune`, those for all stages included.
        steps: the names of all steps, in order.

    Raises:
        NSAError: an unknown key or setting, a stage without a name of its own, or two conversions.
    """

    def __init__(self, content: Any, name: str = "the recipe", stages_needed: bool = True):
        if not isinstance(content, Mapping) or (stages_needed and not content.get("stages")):
            raise NSAError(f"{name} must be a mapping with a list of stages, got {content!r:.80}")
        unknown = sorted(map(str, set(content) - {"yarn_factor", "convert", "settings", "stages"}))
        if unknown:
            raise NSAError(f"{name}: unknown keys {unknown}; a recipe has yarn_factor, convert, settings and stages")
        self.yarn_factor = content.get("yarn_factor")
        if self.yarn_factor is not None:
            check_yarn_factor(self.yarn_factor)
        self.convert = content.get("convert")
        common, given = content.get("settings") or {}, content.get("stages") or []
        if not isinstance(common, Mapping) or not isinstance(given, list):
            raise NSAError(f"{name}: settings must be a mapping and stages a list")
        self.stages: dict[str, dict[str, Any]] = {}
        self.steps = [SCALED] * (self.yarn_factor is not None) + [CONVERTED] * (self.convert is not None)
        for stage in given:
            converts = isinstance(stage, Mapping) and set(stage) == {"convert"}
            stage_name = CONVERTED if converts else stage.get("name") if isinstance(stage, Mapping) else None
            if not isinstance(stage_name, str) or not re.fullmatch(r"[\w-]+", stage_name):
                raise NSAError(f"{name}: every stage needs a name of letters, digits, - and _, got {stage!r:.80}")
            if stage_name in (*self.steps, SOURCE, SCALED) or (stage_name == CONVERTED and not converts):
                raise NSAError(f"{name}: the name {stage_name!r} is taken; give every stage a name of its own")
            self.steps.append(stage_name)
            if converts:
                self.convert = stage["convert"]
            else:
                self.stages[stage_name] = {**common, **{key: value for key, value in stage.items() if key != "name"}}
        if self.convert is not None and not isinstance(self.convert, Mapping):
            raise NSAError(f"{name}: convert must be a mapping of settings ({{}} for none), got {self.convert!r:.80}")
        self._check(name)

    def _check(self, name: str) -> None:
        from .convert import NSA_SETTINGS, convert
        from .finetune import setting_names

        known = setting_names() - set(RESERVED)
        for stage, settings in self.stages.items():
            taught = settings.get("teacher")
            if taught in self.steps[self.steps.index(stage) :]:
                raise NSAError(f"{name}: stage {stage!r} has the teacher {taught!r}, which is not a step before it")
            unknown = sorted(map(str, set(settings) - known))
            if unknown:
                raise NSAError(f"{name}: stage {stage!r} has unknown settings {unknown}; see nsa finetune --help")
        if self.convert:
            known = {*inspect.signature(convert).parameters, *NSA_SETTINGS} - {"source", "dest", "progress", "settings"}
            unknown = sorted(map(str, set(self.convert) - known))
            if unknown:
                raise NSAError(f"{name}: convert has unknown settings {unknown}; see nsa convert --help")

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a YAML file."""
        return cls(load_yaml(path), str(path))


def load_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        NSAError: it is missing, or not YAML.
    """
    import yaml

    try:
        return _numbers(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise NSAError(f"there is no file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise NSAError(f"{path} is not YAML ({' '.join(str(error).split())})") from None


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3, without a point, as a string."""
    if isinstance(value, Mapping):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) else value


def run_recipe(model: str | Path, output_dir: str | Path, recipe: Recipe, **settings: Any) -> Path:
    """Run the steps of a recipe, or what an earlier call left to do.

    Args:
        model: the checkpoint to start from: dense where the recipe converts.
        output_dir: holds one folder per step.
        recipe: of `Recipe`.
        settings: of `finetune`, for all stages; they win over the recipe's.

    Returns:
        The folder of the last step's model.

    Raises:
        NSAError: a step was run with other settings before, or whatever `convert` and `finetune` refuse.
    """
    from .convert import convert
    from .finetune import PATHS, check_settings, finetune, last_whole_checkpoint, read_settings

    output, source = Path(output_dir).expanduser(), os.path.expanduser(str(model))
    if output.resolve() == Path(source).resolve():
        raise NSAError(f"--output-dir {output} is the model itself; choose another directory")
    stages = {}
    for name, each in recipe.stages.items():
        with _stage_named(name):
            stages[name] = read_settings({**each, **settings})
    teachers = {SOURCE: source if recipe.yarn_factor is None else str(output / SCALED)}
    teachers |= {name: str(output / name) for name in recipe.steps}
    main, wait = _processes(any(each.get("use_cpu") for each in stages.values()))
    given = {SCALED: {"factor": recipe.yarn_factor}, CONVERTED: dict(recipe.convert or {}), **stages}
    steps = [(name, given[name]) for name in recipe.steps]
    wanted, digest = {}, hashlib.sha256(_resolved(source).encode())
    for name, each in steps:
        named = {
            key: _resolved(value) if key in PATHS and not (key == "teacher" and value in teachers) else value
            for key, value in each.items()
        }
        digest.update(json.dumps([name, named], sort_keys=True, default=str).encode())
        wanted[name] = digest.hexdigest()[:16]
    begun, refused = _read_record(output / RECORD), []
    for name in wanted:
        if name in begun and begun[name]["settings"] != wanted[name]:
            if begun[name]["finished"] or last_whole_checkpoint(output / name):
                raise NSAError(
                    f"step {name!r} in {output} was run with other settings, data or steps before it; choose another "
                    f"--output-dir, or remove {output / name} and the steps behind it, and their entries in {RECORD}"
                )
            refused.append(name)  # nothing is lost with it
        if name not in begun and (output / name).exists():
            raise NSAError(f"{output / name} exists and is not of this recipe; choose another --output-dir")
    finished = [name for name, _ in steps if begun.get(name, {}).get("finished")]
    if steps and not finished:
        _check_source(source, *steps[0])
    config = None
    for name, each in steps:
        if name in finished:
            continue
        if name == CONVERTED:  # what comes of it is trained by the stages behind it
            config = _converted_config(str(output / finished[-1]) if finished else source, each)
        elif name in stages:
            taught = each.get("teacher")
            if taught in teachers or (taught and output.resolve() in Path(taught).resolve().parents):
                taught = source  # a step of this recipe may not be there yet
            with _stage_named(name):
                check_settings(source, output / name, {**each, "teacher": taught}, config)
    before_training = {SCALED: scale_rope, CONVERTED: convert}
    wait()  # all processes have seen the same state
    for name in refused:
        del begun[name]
        if main:
            shutil.rmtree(output / name, ignore_errors=True)
    if main:
        output.mkdir(parents=True, exist_ok=True)
    for name, each in steps:
        place = output / name
        if begun.get(name, {}).get("finished"):
            source = str(place)
            continue
        began = name in begun
        resumable = began and last_whole_checkpoint(place) is not None
        begun[name] = {"settings": wanted[name], "finished": False}
        wait()
        if main:
            _write_record(output / RECORD, begun)
            print(f"recipe: {name}", flush=True)
            if name in before_training:  # they leave all or nothing
                if not (place / "config.json").exists():
                    before_training[name](source, place, **each)
            elif began and not resumable:
                shutil.rmtree(place, ignore_errors=True)
        wait()
        if name not in before_training:
            if each.get("teacher") in teachers:
                each = {**each, "teacher": teachers[each["teacher"]]}
            finetune(source, place, **each, **({"resume_from_checkpoint": "true"} if resumable else {}))
        begun[name]["finished"] = True
        if main:
            _write_record(output / RECORD, begun)
        source = str(place)
    if main:
        print(f"wrote the last step's model to {source}", flush=True)
    return Path(source)


@contextlib.contextmanager
def _stage_named(name: str) -> Iterator[None]:
    """Say in which stage a mistake is."""
    try:
        yield
    except ValueError as error:  # TrainingArguments raises others than NSAError
        raise NSAError(f"stage {name!r}: {error}") from error


def _resolved(value: Any) -> Any:
    """A path, or a list of them, the same however it is written; whatever else is named stays."""
    if isinstance(value, list):
        return [_resolved(each) for each in value]
    if not isinstance(value, (str, Path)):
        return value
    path = Path(value).expanduser()
    return str(path.resolve() if path.exists() else value)


def _check_source(source: str, step: str, settings: Mapping[str, Any]) -> None:
    """Refuse what the first step cannot begin with, before anything is written."""
    if step in (SCALED, CONVERTED) or source.endswith(".gguf"):
        names = ("revision", "allow_pickle", "trust_remote_code")
        resolve(source, weights=False, **{name: settings[name] for name in names if name in settings})
    else:
        find_model(source)


def _converted_config(source: str, settings: Mapping[str, Any]):
    """Of the model that a conversion will make; raises what the conversion would."""
    from .convert import prepare

    of_files = ("seed", "max_shard_size", "remote_code")
    return prepare(source, weights=False, **{k: v for k, v in settings.items() if k not in of_files}).config


def _processes(use_cpu: bool) -> tuple[bool, Callable[[], None]]:
    """Whether this process writes, and a function that waits for the others; one process waits for none."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True, lambda: None
    from accelerate import PartialState

    state = PartialState(cpu=use_cpu)
    return state.is_main_process, state.wait_for_everyone


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NSAError(f"{path} does not hold the state of a recipe ({error}); remove it and the steps") from None


def _write_record(path: Path, content: Mapping[str, Any]) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)
