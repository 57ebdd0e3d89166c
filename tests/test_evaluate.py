# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import SMALL_NSA, make_checkpoint, make_model, make_tokenizer

from nsa_conversion import convert, smollm2_gguf
from nsa_conversion.errors import NSAError
from nsa_conversion.evaluate import QUICK, Settings, evaluate, main

evaluate_module = importlib.import_module("nsa_conversion.evaluate")

TEXT = "The quick brown fox jumps over the lazy dog. " * 20
LOSS = {"parts": ("loss",), "device": "cpu", "progress": False}
# 32 tokens are read whole; prompts of 700 characters hold the shortest tasks
SMALL = {
    "length": 100,
    "slices": 2,
    "task_lengths": (700,),
    "depths": 2,
    "trials": 1,
    "tasks": ("passkey", "frequent_words"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("dense") / "model-a", "llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("other") / "model-b", "llama", seed=1)


@pytest.fixture(scope="module")
def sparse_checkpoint(tmp_path_factory, checkpoint):
    path = tmp_path_factory.mktemp("sparse") / "sparse"
    convert(str(checkpoint), str(path), **SMALL_NSA)
    return path


def swap_tokens(path, one, other):
    """Give two tokens of a saved tokenizer each other's ids."""
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    file.write_text(json.dumps(tokenizer))


def test_evaluate_compares_two_checkpoints(checkpoint, other_checkpoint):
    report = evaluate(str(checkpoint), str(other_checkpoint), TEXT, length=300, slices=2, **LOSS)
    assert report.texts == {"given text": [300, 300]}
    positions = report.positions["given text"]
    assert list(positions) == ["model-b", "model-a"]
    assert (report.against, report.model) == ("model-b", "model-a")
    assert [bucket.start for bucket in positions["model-a"]] == [0, 256]
    assert report.to_dict()["loss"] != report.to_dict()["against_loss"]
    same = evaluate(str(checkpoint), str(checkpoint), TEXT, length=300, slices=2, **LOSS)
    assert list(same.models) == ["model-a (1)", "model-a (2)"]
    first, second = same.positions["given text"].values()
    assert first == second == positions["model-a"]


def test_evaluate_takes_several_models_and_texts(checkpoint, other_checkpoint, sparse_checkpoint):
    models = [str(sparse_checkpoint), str(other_checkpoint)]
    texts = {"a": [TEXT, TEXT[5:300]], "b": [TEXT]}
    report = evaluate(models, str(checkpoint), texts, length=200, slices=3, **LOSS)
    assert report.texts == {"a": [200, 200], "b": [200, 200, 200]}
    assert list(report.positions) == list(report.recall) == ["a", "b"]
    assert list(report.positions["b"]) == list(report.models) == ["model-a", "sparse", "model-b"]
    assert report.model == "sparse"
    alone = evaluate(str(other_checkpoint), None, texts, length=200, slices=3, **LOSS)
    assert alone.positions["b"] == {"model-b": report.positions["b"]["model-b"]}
    assert alone.recall["a"] == {"model-b": report.recall["a"]["model-b"]}
    assert alone.against is None


def test_labels_are_short_and_different():
    labels = evaluate_module._labels(["runs/a/model.gguf", Path("runs/b/model"), "owner/other", make_model("llama")])
    assert labels == ["model (1)", "model (2)", "other", "LlamaForCausalLM"]


def test_evaluate_takes_loaded_models_and_the_builtin_text(tmp_path):
    model, tokenizer = make_model("llama"), make_tokenizer(tmp_path)
    report = evaluate(model, tokenizer=tokenizer, length=64, slices=1, **LOSS)
    (name,) = report.texts
    assert name.startswith("built-in")
    assert sum(bucket.count for bucket in report.positions[name]["LlamaForCausalLM"]) == 63
    with pytest.raises(NSAError, match="brings no tokenizer"):
        evaluate(model, texts=TEXT, **LOSS)


def test_evaluate_refuses_other_tokenizers_before_work_starts(tmp_path, checkpoint, monkeypatch):
    other = make_checkpoint(tmp_path / "other", "llama")
    swap_tokens(other, "Ġ", "e")
    monkeypatch.setattr(evaluate_module, "load_model", lambda *args, **kwargs: pytest.fail("was loaded"))
    with pytest.raises(NSAError, match="tokenizers of model-a and other make different tokens of the texts"):
        evaluate(str(checkpoint), str(other), TEXT, length=64, slices=1, **LOSS)


def test_a_process_of_its_own_reads_the_tokenizer_of_a_sparse_model(sparse_checkpoint):
    # Nothing else has registered the model type there.
    script = "import sys; from nsa_conversion.sources import find_tokenizer; print(find_tokenizer(sys.argv[1])('a'))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(sparse_checkpoint)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "input_ids" in done.stdout, done.stderr


def test_evaluate_takes_padded_vocabularies_and_refuses_ids_without_a_row(tmp_path, checkpoint):
    settings = {"length": 64, "slices": 1, **LOSS}
    wider = make_checkpoint(tmp_path / "wider", "llama", vocab_size=300)
    assert len(evaluate(str(checkpoint), str(wider), TEXT, **settings).positions["given text"]) == 2
    narrow = make_checkpoint(tmp_path / "narrow", "llama", vocab_size=100)
    with pytest.raises(NSAError, match=r"gives token id \d+, but the embedding of narrow has 100 rows"):
        evaluate(str(narrow), None, TEXT, **settings)


def test_evaluate_refuses_empty_text_and_what_is_no_model(tmp_path, checkpoint, sparse_checkpoint, monkeypatch):
    with pytest.raises(NSAError, match="text 'given text' is empty"):
        evaluate(str(checkpoint), texts="  ", **LOSS)
    with pytest.raises(NSAError, match="models is empty"):
        evaluate([], str(checkpoint), **LOSS)
    monkeypatch.setattr(evaluate_module, "load_model", lambda *args, **kwargs: pytest.fail("was loaded"))
    config = sparse_checkpoint / "config.json"
    broken = shutil.copytree(sparse_checkpoint, tmp_path / "broken") / "config.json"
    broken.write_text(config.read_text().replace('"hidden_act": "silu"', '"hidden_act": 5'))
    with pytest.raises(NSAError, match=r"broken' cannot be loaded: .*hidden_act"):
        evaluate([str(checkpoint), str(broken.parent)], texts=TEXT, **LOSS)
    with pytest.raises(NSAError, match="model 'no-such-directory' cannot be loaded"):  # it could be a hub id
        evaluate([str(checkpoint), "no-such-directory"], texts=TEXT, **LOSS)


def test_sparse_equals_dense_where_everything_is_selected(checkpoint, sparse_checkpoint):
    settings = {"length": 200, "slices": 2, "edges": [0, 32, 200], **LOSS}
    report = evaluate(str(sparse_checkpoint), str(checkpoint), TEXT, **settings)
    (dense_near, dense_far), (near, far) = report.positions["given text"].values()
    assert near.loss == pytest.approx(dense_near.loss, rel=1e-5)
    assert abs(far.loss - dense_far.loss) > 1e-4


def test_every_part_runs_and_the_diagnosis_agrees_with_the_loss(checkpoint, sparse_checkpoint):
    report = evaluate(str(sparse_checkpoint), str(checkpoint), TEXT, device="cpu", progress=False, **SMALL)
    assert [len(results) for results in report.tasks.values()] == [3, 3]
    assert [(row.task, row.depth) for row in report.tasks["sparse"]] == [
        ("passkey", 0.0),
        ("passkey", 1.0),
        ("frequent_words", None),
    ]
    assert list(report.retention) == ["sparse"]
    assert {text: list(by_label) for text, by_label in report.diagnosis.items()} == {"given text": ["sparse"]}
    assert report.diagnosis["given text"]["sparse"].losses["own"] == report.positions["given text"]["sparse"]


def test_the_diagnosis_needs_long_texts(checkpoint, sparse_checkpoint):
    with pytest.raises(NSAError, match="the diagnosis of sparse needs a text of 48 tokens"):
        evaluate(
            str(sparse_checkpoint), texts=TEXT, length=47, device="cpu", progress=False, parts=["loss", "diagnosis"]
        )
    texts = {"short": [TEXT[:40]], "long": [TEXT]}
    settings = {"length": 60, "slices": 3, "diagnosis_texts": 2, "parts": ["diagnosis"]}
    report = evaluate(str(sparse_checkpoint), texts=texts, device="cpu", progress=False, **settings)
    assert list(report.diagnosis) == ["long"]
    assert report.diagnosis["long"]["sparse"].tokens == 2 * (60 - 32)


def test_finished_parts_are_not_measured_again(tmp_path, checkpoint, sparse_checkpoint, monkeypatch):
    finished = tmp_path / "finished.json"
    settings = {"device": "cpu", "progress": False, "finished": finished, **SMALL}
    arguments = (str(sparse_checkpoint), str(checkpoint), TEXT)
    report = evaluate(*arguments, **settings)
    with monkeypatch.context() as patched:
        for name in ("token_losses", "run_task", "diagnose"):
            patched.setattr(evaluate_module, name, None)
        again = evaluate(*arguments, **settings)
        assert json.dumps(again.to_dict()) == json.dumps(report.to_dict())
        with pytest.raises(TypeError):  # other prompts
            evaluate(*arguments, **settings | {"seed": 1})
    config = sparse_checkpoint / "config.json"
    config.write_text(config.read_text() + "\n")  # another checkpoint under the same name
    monkeypatch.setattr(evaluate_module, "token_losses", None)
    with pytest.raises(TypeError):
        evaluate(*arguments, **settings)
    finished.write_text("{")
    with pytest.raises(NSAError, match=r"finished\.json does not hold finished results"):
        evaluate(*arguments, **settings)


def test_without_resume_the_record_starts_anew_at_the_first_result(tmp_path, checkpoint, other_checkpoint):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    finished = tmp_path / "out" / "finished.json"
    arguments = ["--text-file", str(tmp_path / "text.txt"), "--parts", "loss", "--length", "64", "--device", "cpu"]
    arguments += ["--output", str(finished.parent)]
    assert main([str(checkpoint), *arguments]) == 0
    before = finished.read_text()
    for mistake in (["--text-file", "missing.txt"], ["--against", "./no-such-directory"]):
        with pytest.raises(NSAError, match="does not exist"):
            main([str(checkpoint), *arguments, *mistake])
        assert finished.read_text() == before
    assert main([str(other_checkpoint), *arguments]) == 0
    assert not json.loads(before).keys() & json.loads(finished.read_text()).keys()


@pytest.mark.parametrize("settings", [["--quick"], ["--tasks", "passkey", "multikey", "--task-lengths", "400"]])
def test_a_task_that_does_not_fit_is_found_before_anything_is_measured(checkpoint, monkeypatch, settings):
    monkeypatch.setattr(evaluate_module, "load_model", lambda *args, **kwargs: pytest.fail("was loaded"))
    with pytest.raises(NSAError, match=r"task '\w+' needs at least \d+ tokens of this tokenizer, got a task length of"):
        main([str(checkpoint), *settings, "--device", "cpu"])


def test_suites_are_run_by_name(checkpoint, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluate_module, "require_lm_eval", lambda: None)
    monkeypatch.setattr(
        evaluate_module,
        "run_lm_eval",
        lambda model, tokenizer, tasks, **how: calls.append((tasks, how)) or {"arc": {"acc,none": 0.5}},
    )
    settings = {"parts": (), "lm_eval": ["arc"], "lm_eval_limit": 3, "batch_size": 2}
    report = evaluate(str(checkpoint), texts=TEXT, device="cpu", progress=False, **settings)
    assert report.suites == {"model-a": {"arc": {"acc,none": 0.5}}}
    assert calls == [(["arc"], {"batch_size": 2, "limit": 3})]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"parts": ("loss", "speed")}, "parts must be some of loss, tasks, diagnosis, got speed"),
        ({"parts": ()}, "parts must be some of loss, tasks, diagnosis, got none"),
        ({"tasks": ("pass",)}, "task 'pass' is unknown"),
        ({"task_lengths": (700, 0)}, "task_lengths must be at least 1 token, got 0"),
        ({"length": 1}, "length must be at least 2 tokens, got 1"),
        ({"slices": 0}, "slices must be at least 1, got 0"),
        ({"depths": 0}, "depths must be at least 1, got 0"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"diagnosis_texts": 0}, "diagnosis_texts must be at least 1, got 0"),
    ],
)
def test_settings_refused(settings, error):
    with pytest.raises(NSAError, match=error):
        Settings(**settings)


def test_command_prints_tables_and_writes_files(tmp_path, capsys, checkpoint, sparse_checkpoint):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": TEXT}) + "\n" + json.dumps({"text": TEXT[3:]}) + "\n")
    files = [str(tmp_path / name) for name in ("text.txt", "more.jsonl")]
    arguments = [str(sparse_checkpoint), "--against", str(checkpoint), "--text-file", *files, "--device", "cpu"]
    arguments += ["--length", "300", "--slices", "2", "--tasks", "frequent_words", "--task-lengths", "700"]
    arguments += ["--trials", "2", "--batch-size", "2", "--diagnosis-texts", "1", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "sparse: 4,400 tokens to read (loss 1,200, tasks 1,400, diagnosis 1,800)" in printed.err
    for text in ("sparse - model-a", "95 % interval", "256-299", "frequent_words", "block recall", files[1]):
        assert text in printed.out
    saved = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert saved["positions"][1]["start"] == 256
    assert len(saved["positions"][1]["by_text"]) == 2
    assert [low <= high for low, high in saved["difference_95"]] == [True, True]
    assert list(saved["positions_by_text"]) == files
    assert (tmp_path / "out" / "eval.html").read_text().startswith("<!DOCTYPE html>")
    assert main([*arguments, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == saved


def test_command_says_when_the_text_is_short(tmp_path, capsys, checkpoint):
    (tmp_path / "text.txt").write_text("just a few words", encoding="utf-8")
    arguments = ["--text-file", str(tmp_path / "text.txt"), "--device", "cpu", "--parts", "loss"]
    assert main([str(checkpoint), *arguments]) == 0
    error = capsys.readouterr().err
    assert "text.txt holds only 17 tokens" in error  # with the token that ends it
    assert "text.txt holds only 1 text(s)" in error


def test_quick_sets_what_other_flags_do_not(checkpoint, monkeypatch):
    seen = {}

    def stop(*args, **settings):
        seen.update(settings)
        raise NSAError("stop")

    monkeypatch.setattr(evaluate_module, "evaluate", stop)
    with pytest.raises(NSAError, match="stop"):
        main([str(checkpoint), "--quick", "--trials", "7", "--lm-eval", "arc_easy,piqa"])
    assert {name: seen[name] for name in QUICK} == QUICK | {"trials": 7}
    assert seen["lm_eval"] == ["arc_easy", "piqa"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["no-such-directory"], "no-such-directory"),
        (["MODEL", "--text-file", "missing.txt"], "missing.txt does not exist"),
        (["MODEL", "--haystack", "missing.txt"], "missing.txt does not exist"),
        (["MODEL", "--length", "1"], "length must be at least 2"),
        (["MODEL", "--slices", "0"], "slices must be at least 1"),
        (["MODEL", "--parts", "loss", "--dtype", "float3"], "dtype"),
        (["MODEL", "--resume"], "--resume needs the --output DIR"),
        (["MODEL", "--task-lengths", "20", "--parts", "tasks", "--device", "cpu"], "needs at least"),
    ],
)
def test_command_refuses(checkpoint, arguments, error):
    with pytest.raises(NSAError, match=error):
        main([str(checkpoint) if argument == "MODEL" else argument for argument in arguments])


def test_help_says_every_default_in_words(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "separated by commas (default: none)" in shown
    assert "default: (" not in shown


def test_command_refuses_unknown_choices(checkpoint):
    for flag, value in (("--tasks", "pass"), ("--parts", "speed")):
        with pytest.raises(NSAError, match=f"invalid choice: '{value}'"):
            main([str(checkpoint), flag, value])


@pytest.mark.full
def test_quick_takes_ten_minutes_and_the_dense_model_can_do_most_tasks(tmp_path, capsys):
    convert(smollm2_gguf(), tmp_path / "nsa")
    started = time.perf_counter()
    main([str(tmp_path / "nsa"), "--against", str(smollm2_gguf()), "--quick", "--output", str(tmp_path / "out")])
    seconds = time.perf_counter() - started
    report = json.loads((tmp_path / "out" / "eval.json").read_text())
    with capsys.disabled():
        print(f"\n{seconds:.0f} s")
    assert seconds < 600
    dense = next(iter(report["models"]))
    means = {}
    for row in report["tasks"][dense]:
        means.setdefault(row["task"], []).append(row["mean"])
    able = [task for task, scores in means.items() if sum(scores) / len(scores) >= 0.5]
    assert len(able) >= 4, means
    assert all(
        kept["low"] <= kept["value"] <= kept["high"] for kept in report["retention"] if kept["value"] is not None
    )
