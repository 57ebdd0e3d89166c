# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The hook for lm_eval, against stand-ins of the two names that it calls, and against lm_eval where it is installed."""

import sys
import types

import pytest
from tiny import make_model, make_tokenizer

from nsa_conversion.errors import NSAError
from nsa_conversion.harness import require_lm_eval, run_lm_eval


@pytest.fixture
def lm_eval(monkeypatch):
    """A package whose `simple_evaluate` answers with its arguments."""
    package, models, huggingface = (
        types.ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    )
    huggingface.HFLM = lambda **wrapped: wrapped
    package.simple_evaluate = lambda **call: {"results": {"arc": {"acc,none": 0.5, "alias": "arc", "call": call}}}
    for module in (package, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


def test_the_loaded_model_is_handed_over(lm_eval):
    calls = []

    def simple_evaluate(**call):
        calls.append(call)
        return {"results": {"arc": {"acc,none": 0.5, "alias": "arc", "samples": [1]}}, "configs": {}}

    lm_eval.simple_evaluate = simple_evaluate
    assert run_lm_eval("model", "tokenizer", ("arc",), batch_size=4, limit=10) == {
        "arc": {"acc,none": 0.5, "alias": "arc"}
    }
    wrapped = {"pretrained": "model", "backend": "causal", "tokenizer": "tokenizer", "batch_size": 4}
    assert calls == [{"model": wrapped, "tasks": ["arc"], "limit": 10, "log_samples": False}]


def test_what_it_refuses_is_a_users_mistake(lm_eval):
    def simple_evaluate(**call):
        raise KeyError("no such task")

    lm_eval.simple_evaluate = simple_evaluate
    with pytest.raises(NSAError, match="lm_eval cannot run arc: 'no such task'"):
        run_lm_eval("model", "tokenizer", ["arc"])


def test_without_it_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(NSAError, match=r"standard suites need lm_eval: pip install 'lm_eval\[hf\]'"):
        require_lm_eval()


def test_lm_eval_itself_scores_a_model(tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "questions.jsonl").write_text('{"q": "The sky is", "choices": ["blue", "soup"], "right": 0}\n')
    task = {
        "task": "sky",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}],
    }
    found = run_lm_eval(make_model("llama"), make_tokenizer(tmp_path), [task])
    assert found["sky"]["acc,none"] in (0.0, 1.0)
    with pytest.raises(NSAError, match="lm_eval cannot run no_such_task"):
        run_lm_eval(make_model("llama"), make_tokenizer(tmp_path), ["no_such_task"])
