# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import SMALL_NSA, make_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from nsa_conversion import cli
from nsa_conversion.card import model_card
from nsa_conversion.data import builtin_text
from nsa_conversion.errors import NSAError
from nsa_conversion.finetune import check_settings, read_settings
from nsa_conversion.recipe import Recipe, load_yaml, run_recipe
from nsa_conversion.rope import scale_rope

finetune_module = importlib.import_module("nsa_conversion.finetune")
SCRIPTS = Path(__file__).parents[1] / "conversion"
SETTINGS = {"max_length": 128, "eval_slices": 0, "eval_fraction": 0, "disable_tqdm": True, "use_cpu": True}
SETTINGS |= {"save_steps": 1, "selector_queries": 32}
RECIPE = {
    "convert": SMALL_NSA,
    "settings": SETTINGS,
    "stages": [
        {"name": "warm", "stage": "warmup", "max_steps": 2},
        {"name": "adapted", "stage": "adapt", "teacher": "source", "max_steps": 3},
    ],
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipe")
    (root / "text.txt").write_text(builtin_text()[:2000], encoding="utf-8")
    return make_checkpoint(root / "dense")


def test_an_interrupted_recipe_goes_on_where_it_was(dense, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    command = ["finetune", str(dense), "--recipe", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "out")]
    command += ["--train-file", str(dense.parent / "text.txt"), "--learning-rate", "1e-4"]
    save = finetune_module._StageTrainer._save_checkpoint

    def interrupted(trainer, *args, **kwargs):
        save(trainer, *args, **kwargs)
        if trainer.stage.stage == "adapt":
            raise KeyboardInterrupt

    monkeypatch.setattr(finetune_module._StageTrainer, "_save_checkpoint", interrupted)
    assert cli.main(command[:-2]) == 130
    monkeypatch.undo()
    warm = (tmp_path / "out" / "warm" / "model.safetensors").stat().st_mtime_ns
    assert cli.main(command[:-2]) == 0
    assert (tmp_path / "out" / "warm" / "model.safetensors").stat().st_mtime_ns == warm
    history = json.loads((tmp_path / "out" / "adapted" / "log_history.json").read_text())
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3]
    assert "distill_loss" in history[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "adapted")
    assert cli.main(command[:-2]) == 0  # nothing is left to do
    assert capsys.readouterr().out.count("recipe: adapted") == 2
    assert cli.main(command) == 2  # a rate that was not given before
    assert "was run with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("step", [1, 2])
def test_a_recipe_killed_while_it_writes_a_checkpoint_goes_on(dense, tmp_path, monkeypatch, step):
    recipe = Recipe({**RECIPE, "stages": RECIPE["stages"][:1]})
    arguments = (dense, tmp_path / "out", recipe)
    save = finetune_module._StageTrainer._save_optimizer_and_scheduler

    def killed(trainer, *args, **kwargs):
        if trainer.state.global_step == step:
            raise KeyboardInterrupt
        save(trainer, *args, **kwargs)

    monkeypatch.setattr(finetune_module._StageTrainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(*arguments, train_file=[str(dense.parent / "text.txt")])
    monkeypatch.undo()
    assert (tmp_path / "out" / "warm" / f"checkpoint-{step}").is_dir()
    warm = run_recipe(*arguments, train_file=[str(dense.parent / "text.txt")])
    history = json.loads((warm / "log_history.json").read_text())
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]


def test_a_mistake_does_not_block_the_output_of_a_recipe(dense, tmp_path, monkeypatch):
    text = dense.parent / "text.txt"
    recipe = Recipe({**RECIPE, "stages": RECIPE["stages"][:1]})
    monkeypatch.chdir(dense.parent)
    monkeypatch.setenv("HOME", str(dense.parent))
    with pytest.raises(NSAError, match="does not exist"):
        run_recipe("nothing/at/all", tmp_path / "out", recipe, train_file=[str(text)])
    assert not (tmp_path / "out").exists()
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(NSAError, match="the longest in a row"):
        run_recipe(dense, tmp_path / "out", recipe, train_file=[str(tmp_path / "short.txt")])
    converted = (tmp_path / "out" / "converted" / "model.safetensors").stat().st_mtime_ns
    warm = run_recipe(dense, tmp_path / "out", recipe, train_file=["text.txt"])
    model = (warm / "model.safetensors").stat().st_mtime_ns
    for source in ("dense", "./dense", "dense/", "~/dense"):  # however it is written
        assert run_recipe(source, tmp_path / "out", recipe, train_file=[str(text)]) == warm
    assert (warm / "model.safetensors").stat().st_mtime_ns == model
    assert (tmp_path / "out" / "converted" / "model.safetensors").stat().st_mtime_ns == converted
    with pytest.raises(NSAError, match=r"step 'converted' .* was run with other settings"):
        run_recipe(dense, tmp_path / "out", Recipe({**RECIPE, "convert": {**SMALL_NSA, "seed": 3}}))
    with pytest.raises(NSAError, match=r"step 'warm' .* was run with other settings"):
        run_recipe(dense, tmp_path / "out", recipe, train_file=["text.txt"], seed=3)


def test_a_recipe_says_what_is_wrong_with_it(dense, tmp_path, capsys):
    stage = {"name": "a", "stage": "warmup"}
    for content, message in (
        ([], "a list of stages"),
        ({"stages": [stage], "steps": 1}, "unknown keys"),
        ({"stages": [{"stage": "warmup"}]}, "needs a name"),
        ({"stages": [stage, stage]}, "the name 'a' is taken"),
        ({"stages": [{**stage, "learning_rte": 1}]}, "learning_rte"),
        ({"stages": [{**stage, "output_dir": "x"}]}, "output_dir"),
        ({"stages": [stage], "convert": {"size": 3}}, "convert has unknown settings"),
        ({"stages": [stage], "convert": True}, "must be a mapping of settings"),
        ({"stages": [stage], "yarn_factor": 1}, "YaRN factor must be a number above 1, got 1"),
        ({"stages": [{**stage, "name": "scaled"}]}, "the name 'scaled' is taken"),
        ({"stages": [{**stage, "name": "source"}]}, "the name 'source' is taken"),
        ({"stages": [{**stage, "name": "converted"}]}, "the name 'converted' is taken"),
        ({"stages": [stage, {"convert": {}}], "convert": {}}, "the name 'converted' is taken"),
        ({"stages": [stage, {"convert": {"size": 3}}]}, "convert has unknown settings"),
        ({"stages": [{**stage, "teacher": "b"}, {**stage, "name": "b"}]}, "teacher 'b', which is not a step before it"),
        ({"stages": [stage], True: 1}, "unknown keys .'True'"),
        ({"stages": [{**stage, True: 1, "rate": 1}]}, "unknown settings .'True', 'rate'"),
        ({"stages": [stage], "convert": {True: 1, "size": 3}}, "unknown settings .'True', 'size'"),
    ):
        with pytest.raises(NSAError, match=message):
            Recipe(content)
    with pytest.raises(NSAError, match="is the model itself"):
        run_recipe(dense, dense, Recipe(RECIPE))
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(NSAError, match="is not YAML"):
        load_yaml(tmp_path / "bad.yaml")
    assert cli.main(["finetune", str(dense), "--recipe", str(tmp_path / "none.yaml"), "--output-dir", "x"]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": "8k"}, "invalid int value: '8k'"),
        ({"max_length": 96.5}, "invalid int value: '96.5'"),
        ({"max_steps": "many"}, "invalid int value: 'many'"),
        ({"max_steps": {"a": 1}}, "invalid int value"),
        ({"learning_rate": "fast"}, "invalid float value: 'fast'"),
        ({"full_rows": "maybe"}, "Truthy value expected"),
        ({"selector_target": "size"}, "invalid choice: 'size'"),
        ({"eval_fraction": 1.5}, "--eval-fraction must be"),
        ({"selector_weight": -1}, "--selector-weight must not be negative"),
        ({"train_file": ["nothing.txt"]}, "nothing.txt does not exist"),
        ({"teacher": "nothing/at/all"}, "'nothing/at/all' does not exist"),
        ({"max_length": 32}, "the selector learns from tokens beyond .* a --max-length above 32"),
        ({"save_strategy": "sometimes"}, "invalid choice: 'sometimes'"),
    ],
)
def test_a_mistake_in_the_last_stage_is_found_before_the_first_step(dense, tmp_path, settings, message):
    warm, adapted = RECIPE["stages"]
    common = {**SETTINGS, "train_file": str(dense.parent / "text.txt")}
    recipe = Recipe({**RECIPE, "settings": common, "stages": [warm, {**adapted, **settings}]})
    with pytest.raises(NSAError, match=f"stage 'adapted': .*{message}"):
        run_recipe(dense, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_one_layer_of_a_recipe_stays_dense(dense, tmp_path):
    for number, (layers, message) in enumerate(((0, None), (7, "must be in 0 …"), ([0, "x"], "must look like"))):
        convert = {**SMALL_NSA, "full_attention_layers": layers}
        recipe, out = Recipe({"convert": convert}, stages_needed=False), tmp_path / str(number)
        if message is None:
            config = AutoConfig.from_pretrained(run_recipe(dense, out, recipe))
            assert config.layer_types[:2] == ["full_attention", "native_sparse_attention"]
        else:
            with pytest.raises(NSAError, match=message):
                run_recipe(dense, out, recipe)


def test_settings_are_read_like_those_of_the_command_line(dense, tmp_path):
    given = {"max_steps": 1.0, "max_length": 96.0, "learning_rate": "1e-4", "eval_fraction": "0.1", "seed": None}
    given |= {"train_file": "a.txt", "lora_target_modules": ["q_proj", "k_proj"], "bf16": "no", "save_strategy": "no"}
    given |= {"lr_scheduler_kwargs": {"min_lr": 1e-5}, "load_best_model_at_end": False, "report_to": ["none"]}
    read = read_settings(given)
    wanted = {**given, "max_steps": 1, "max_length": 96, "learning_rate": 1e-4, "eval_fraction": 0.1, "bf16": False}
    wanted |= {"train_file": ["a.txt"]}
    del wanted["seed"]
    assert read == wanted
    assert {name: type(value) for name, value in read.items()} == {name: type(value) for name, value in wanted.items()}


def test_a_check_leaves_the_environment_alone(dense, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    settings = {"train_file": [str(dense.parent / "text.txt")], "torch_compile": True, "use_cpu": True}
    check_settings(dense, tmp_path / "out", settings)
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ


def test_two_processes_convert_once_and_train_together(dense, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    root = Path(__file__).parents[1]
    paths = [str(root), str(root / "kernels"), str(root / "conversion"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "nsa_conversion", "finetune", str(dense), "--recipe", str(tmp_path / "recipe.yaml")]
    command += ["--train-file", str(dense.parent / "text.txt"), "--output-dir", str(tmp_path / "out")]
    for steps in (["recipe: converted", "recipe: warm", "recipe: adapted"], []):  # the second time all is done
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        assert [line for line in done.stdout.splitlines() if line.startswith("recipe: ")] == steps
        assert done.stdout.count("wrote the last step's model") == 1
    record = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert all(step["finished"] for step in record.values())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "adapted")


def test_a_recipe_scales_rope_first(dense, tmp_path):
    dense, text = shutil.copytree(dense, tmp_path / "source"), dense.parent / "text.txt"
    (dense / "README.md").write_text("---\nlicense: mit\nbase_model: owner/dense\n---\n", encoding="utf-8")
    stage = {"name": "adapted", "stage": "adapt", "teacher": "source", "max_steps": 1, "save_strategy": "no"}
    recipe = Recipe({**RECIPE, "yarn_factor": 2, "stages": [stage]})
    out = run_recipe(dense, tmp_path / "out", recipe, train_file=[str(text)])
    source = AutoModelForCausalLM.from_pretrained(dense)
    scaled, adapted = (AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name) for name in ("scaled", out.name))
    length = source.config.max_position_embeddings
    for model in (scaled, adapted):
        assert model.config.max_position_embeddings == 2 * length
        wanted = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": length}
        assert wanted.items() <= model.config.rope_parameters.items()
    for name, weight in source.state_dict().items():
        assert torch.equal(weight, scaled.state_dict()[name])
    record = json.loads((out / "nsa_finetune.json").read_text())
    assert record["arguments"]["stage"]["teacher"] == str(tmp_path / "out" / "scaled")
    card = model_card(out)
    assert (card.data.base_model, card.data.license) == ("owner/dense", "mit")
    ids = torch.arange(3, 200)[None] % source.config.vocab_size
    assert not torch.allclose(scaled(ids).logits, source(ids).logits, atol=1e-3)
    with pytest.raises(NSAError, match="is scaled already"):
        scale_rope(tmp_path / "out" / "scaled", tmp_path / "again", 2)
    with pytest.raises(NSAError, match="not empty"):
        scale_rope(dense, tmp_path / "out", 2)
    assert not (tmp_path / "again").exists()


def test_the_dense_yardsticks_are_trained_like_the_sparse_models():
    names = ("smollm2", "smollm2_dense", "smollm2_one_training")
    two, dense, one = (Recipe.read(SCRIPTS / "recipes" / f"{name}.yaml") for name in names)
    assert two.steps == ["scaled", "trained", "converted", "adapted"]
    assert dense.steps == ["scaled", "trained", "trained_on"]
    assert one.steps == ["scaled", "converted", "adapted"]
    assert two.yarn_factor == dense.yarn_factor == one.yarn_factor
    assert two.convert == one.convert
    trained, adapted = two.stages["trained"], two.stages["adapted"]
    assert dense.stages["trained"] == trained
    assert dense.stages["trained_on"] == {**trained, "teacher": "trained"}
    assert {**one.stages["adapted"], "teacher": "trained", "selector_scope": "model"} == adapted
    of_sparse_layers = ("selector_weight", "new_parameter_lr", "selector_queries", "selector_scope")
    apart = [
        {k: v for k, v in each.items() if k not in of_sparse_layers} for each in (adapted, dense.stages["trained_on"])
    ]
    assert apart[0] == apart[1]


def test_a_dense_model_is_trained_then_converted_and_teaches(dense, tmp_path):
    """Interrupted after the first stage, it goes on with the conversion; the card says what all came from."""
    (dense / "README.md").write_text("---\nlicense: mit\nbase_model: owner/dense\n---\n", encoding="utf-8")
    trained = {"name": "trained", "stage": "adapt", "teacher": "source", "selector_weight": 0, "selector_queries": None}
    trained |= {"max_steps": 2, "learning_rate": 1e-3}
    adapted = {"name": "adapted", "stage": "adapt", "teacher": "trained", "max_steps": 1}
    content = {"settings": SETTINGS, "stages": [trained, {"convert": SMALL_NSA}, adapted]}
    text = {"train_file": [str(dense.parent / "text.txt")]}
    first = Recipe({**content, "stages": content["stages"][:1]})
    out = tmp_path / "out"
    assert run_recipe(dense, out, first, **text) == out / "trained"
    written = (out / "trained" / "model.safetensors").stat().st_mtime_ns
    assert Recipe(content).steps == ["trained", "converted", "adapted"]
    assert run_recipe(dense, out, Recipe(content), **text) == out / "adapted"
    assert (out / "trained" / "model.safetensors").stat().st_mtime_ns == written
    source, trained = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (dense, out / "trained"))
    converted = AutoModelForCausalLM.from_pretrained(out / "converted").state_dict()
    assert all(torch.equal(weight, converted[name]) for name, weight in trained.items())
    assert not all(torch.equal(weight, source[name]) for name, weight in trained.items())
    record = json.loads((out / "adapted" / "nsa_finetune.json").read_text())
    assert record["arguments"]["stage"]["teacher"] == str(out / "trained")
    for name in ("trained", "adapted"):
        card = model_card(out / name)
        assert (card.data.base_model, card.data.license) == ("owner/dense", "mit")


@pytest.mark.parametrize(
    ("convert", "settings", "message"),
    [
        ({"full_attention_layers": 7}, {}, "must be in 0 …"),
        ({"num_selected_blocks": 1}, {}, "num_selected_blocks"),
        ({"compress_type": "mean"}, {}, "stage 'adapted': .* compress_type 'mean' has no parameters"),
        ({}, {"max_length": 32}, "stage 'adapted': .* a --max-length above 32"),
    ],
)
def test_what_cannot_follow_a_training_is_found_before_it(dense, tmp_path, convert, settings, message):
    trained = {"name": "trained", "stage": "adapt", "teacher": "source", "selector_weight": 0, "selector_queries": None}
    adapted = {"name": "adapted", "stage": "adapt", "teacher": "trained", **settings}
    content = {"settings": SETTINGS, "stages": [trained, {"convert": {**SMALL_NSA, **convert}}, adapted]}
    with pytest.raises(NSAError, match=message):
        run_recipe(dense, tmp_path / "out", Recipe(content), train_file=[str(dense.parent / "text.txt")])
    assert not (tmp_path / "out").exists()


def test_numbers_without_a_point(tmp_path):
    (tmp_path / "numbers.yaml").write_text("{rate: 1e-3, steps: 5, name: e3}", encoding="utf-8")
    assert load_yaml(tmp_path / "numbers.yaml") == {"rate": 1e-3, "steps": 5, "name": "e3"}


@pytest.fixture
def run_experiments(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("run_experiments")
    sys.modules.pop("run_experiments", None)


def test_experiments_in_one_command(run_experiments, dense, tmp_path, capsys, monkeypatch):
    text = builtin_text()
    for name, pieces in {
        "train": [text[:3000]],
        "heldout-prose": [text[4000:4200], text[5000:5200]],
        "heldout-code": [text[6000:6200], text[7000:7200]],
        "heldout-chat": [text[8000:8060]],  # too short for the last positions
    }.items():
        lines = "".join(json.dumps({"text": piece}) + "\n" for piece in pieces)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    recipe = {"common": {key: RECIPE[key] for key in ("convert", "settings")}, "untrained": {}}
    recipe |= {"warm": {"stages": RECIPE["stages"][:1]}, "both": {"stages": RECIPE["stages"]}}
    (tmp_path / "experiments.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [str(tmp_path / "out"), "--data", str(tmp_path), "--experiments", str(tmp_path / "experiments.yaml")]
    command += ["--source", str(dense), "--length", "96", "--documents", "2", "--tasks", "--no-diagnosis"]
    assert run_experiments.main([*command, "--only", "untrained", "warm", "--keep", "warm"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == ["dense", "untrained", "warm"]
    assert results["warm"]["training_tokens"] == 2 * 128
    assert (tmp_path / "out" / "warm" / "warm" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "untrained").exists()
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert {row["device"] for row in rows} == {"CPU"}
    assert (tmp_path / "out" / "results.png").stat().st_size > 10_000
    differences = [row for row in rows if row["measure"].startswith("loss - dense") and row["experiment"] == "warm"]
    assert {row["text"] for row in differences} == {"prose", "code", "chat"}
    several = [row for row in differences if row["text"] != "chat"]
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in several)

    assert run_experiments.main([*command, "--minutes", "0"]) == 0  # what is done is not done again, nothing starts
    assert "both: not started" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())) == list(results)

    def out_of_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run_experiments, "run_recipe", out_of_memory)
    assert run_experiments.main([*command, "--minutes", "9"]) == 2
    assert "these experiments failed, as said above: both" in capsys.readouterr().err
    assert run_experiments.main([*command, "--only", "none"]) == 2
    assert "there are no experiments" in capsys.readouterr().err
