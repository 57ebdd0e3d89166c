# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""A real checkpoint: SmolLM2-135M-Instruct converted at the paper's sizes, all 30 layers sparse, before any training.

The `full` tests measure the same claims at full size: `pytest -m full tests/test_smollm2.py`.
"""

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


def check_loss(models, slices, tolerance):
    dense, sparse, ids = models
    edges = [0, REACH, 2 * REACH, 4 * REACH]
    rows = take_slices(ids, 4 * REACH, slices)
    pairs = list(zip(loss_by_position(dense, rows, edges), loss_by_position(sparse, rows, edges), strict=True))
    gaps = [nsa.loss - full.loss for full, nsa in pairs]
    assert abs(gaps[0]) < 1e-4
    for gap in gaps[1:]:
        assert 1e-3 < gap <= tolerance, gaps  # selection is at work, and costs little
    return gaps


def test_greedy_continuation_is_the_same(models):
    check_greedy(models, 1)


def test_loss_beyond_reach_is_close_but_not_equal(models):
    check_loss(models, 1, 0.05)


@pytest.mark.full
def test_greedy_continuations_of_ten_prompts_are_the_same(models):
    check_greedy(models, 10)


@pytest.mark.full
def test_mean_loss_of_six_slices_is_within_three_hundredths(models):
    """Six slices spread evenly over the whole text."""
    print("NSA - dense, by bucket:", check_loss(models, 6, 0.03))


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
