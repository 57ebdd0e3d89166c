# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The Triton operations as `torch.library` sees them: schemas, shapes without data, gradients, compiled models."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from test_triton_attention import SIZES, make_inputs
from tiny_nsa import make_ids, make_model
from triton_checks import DEVICE, packed

from nsa_kernels import attention, compressed, selected, selection, window

BLOCKS = tuple(SIZES[name] for name in ("compress_block_size", "compress_stride", "select_block_size"))
FORCED = (SIZES["num_selected_blocks"], 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, layout",
    [
        ("attention", "left-padded"),
        ("inference", "packed"),
        ("compressed", "packed"),
        ("selection", "packed"),
        ("selected", "packed"),
        ("window", "left-padded"),
    ],
)
def test_opcheck(name, layout):
    cu_seqlens = packed([9, 13]) if layout == "packed" else None
    leftpad = torch.tensor([0, 5], device=DEVICE) if layout == "left-padded" else None
    where = (leftpad, 0, cu_seqlens)
    padding = {"leftpad": leftpad, "cu_seqlens": cu_seqlens}
    inputs = make_inputs(22, 1, 2, 16, 32, SIZES, dtype=torch.float32, **padding)
    q, k, v, k_cmp, v_cmp, k_win, v_win, *_ = inputs
    if name == "attention":
        arguments = (attention._operation, (*inputs, *BLOCKS, *FORCED, SIZES["window_size"], 0.2, *where))
    elif name == "inference":
        inputs = [x.detach() for x in inputs]
        arguments = (attention._inference, (*inputs, *BLOCKS, *FORCED, SIZES["window_size"], 0.2, *where))
    elif name == "compressed":
        arguments = (compressed._attention, (q, k_cmp, v_cmp, *BLOCKS[:2], 0.2, *where))
    elif name == "selection":
        lse = torch.zeros(q.shape[:-1], device=DEVICE)
        arguments = (selection._operation, (q.detach(), k_cmp.detach(), lse, 2, *BLOCKS, *FORCED, 0.2, *where))
    elif name == "selected":
        chosen = torch.zeros(*q.shape[:-2], 1, 2, dtype=torch.int32, device=DEVICE)
        arguments = (selected._attention, (q, k, v, chosen, BLOCKS[2], 0.2, *where))
    else:
        arguments = (window._attention, (q, k_win, v_win, SIZES["window_size"], 0.2, *where))
    torch.library.opcheck(*arguments)


def run(compiled=False, checkpointed=False):
    """Loss and gradients of a tiny model."""
    changes = {"nsa_backend": "triton", "head_dim": 16, "select_block_size": 16, "num_hidden_layers": 1}
    model, ids = make_model(**changes).to(DEVICE).train(), make_ids(1, 40).to(DEVICE)
    if checkpointed:
        model.gradient_checkpointing_enable()
    if compiled:
        torch.compiler.reset()
        backend = "inductor" if DEVICE == "cuda" else "aot_eager"  # Inductor itself is not what is tested
        loss = torch.compile(model, fullgraph=True, backend=backend)(ids, labels=ids).loss
    else:
        loss = model(ids, labels=ids).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def plain():
    return run()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_a_model_learns_the_same(plain, how):
    loss, grads = run(**{how: True})
    torch.testing.assert_close(loss, plain[0])
    for name, grad in plain[1].items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
