# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The rotary kernel against the reference, bit by bit: values and gradients, on outputs poisoned with NaN."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from sm90_launches import compile_launches
from tiny_nsa import make_ids, make_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from triton_checks import DEVICE, poisoned

import nsa_kernels as nsa
from modeling_nsa import attention_nsa

rotary = pytest.importorskip("nsa_kernels.rotary", reason="needs Triton")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Shape of x, then what `make_inputs` takes.
CASES = [
    ((2, 63, 4, 64), {}),
    ((1, 257, 3, 128), {"embedded": FP32}),  # as under autocast
    ((2, 65, 8, 80), {"rows": 1, "layout": "slice"}),
    ((3, 1, 1, 112), {"layout": "slice"}),
    ((2, 65, 5, 96), {"rows": 1, "layout": "heads first"}),
    ((1, 33, 2, 256), {"layout": "heads first"}),
    ((2, 7, 3, 6), {"layout": "dims first"}),
    ((65, 3, 64), {}),  # packed
    ((2, 0, 3, 64), {}),
]


def make_inputs(shape, dtype, *, rows=None, layout=None, embedded=None, seed=0):
    """x that requires gradients, cos and sin, and the gradient of the output; the halves of cos and sin are unlike."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape, dtype):
        return torch.randn(shape, device=DEVICE, generator=generator).to(dtype)

    def lay(x):
        if layout == "slice":
            return torch.cat((x, x, x), dim=-2).split(x.shape[-2], dim=-2)[1]
        if layout is None:
            return x
        at = -2 if layout == "heads first" else -1
        return x.movedim(at, 1).contiguous().movedim(1, at)

    embedded = embedded or dtype
    batch = shape[:-3] if rows is None else (rows,)
    wide = draw(*batch, shape[-3], 3 * shape[-1], dtype=embedded)
    _, cos, sin = wide.split(shape[-1], dim=-1)  # as `split_ropes` leaves them
    do = draw(*shape, dtype=torch.promote_types(dtype, embedded))
    return lay(draw(*shape, dtype=dtype)).requires_grad_(), cos, sin, lay(do)


def run(backend, x, cos, sin, do):
    with poisoned():
        out = nsa.rotate(x, cos, sin, backend=backend)
        return out.detach(), torch.autograd.grad(out, x, do)[0]


@pytest.mark.parametrize("dtype", [FP32, FP16, pytest.param(BF16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape, rest", CASES)
def test_matches_reference_bitwise(shape, rest, dtype):
    inputs = make_inputs(shape, dtype, **rest)
    (out, dx), (wanted, wanted_dx) = run("triton", *inputs), run("reference", *inputs)
    assert out.is_contiguous()
    assert out.dtype == wanted.dtype
    assert torch.equal(out, wanted)
    assert dx.dtype == dtype
    assert torch.equal(dx, wanted_dx)


def test_reference_is_what_transformers_computes():
    q, cos, sin, _ = make_inputs((2, 17, 3, 16), FP32)
    k = q[:, :, :2]
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for x, want in zip((q, k), expected):
        assert torch.equal(nsa.rotate(x, cos, sin, backend="reference"), want)


def test_gradients_of_the_reference():
    x, cos, sin, _ = make_inputs((2, 5, 2, 6), torch.float64, rows=1)
    leaves = [each.detach().clone().requires_grad_() for each in (x, cos, sin)]
    assert torch.autograd.gradcheck(nsa.rotate, leaves)


def test_a_gradient_has_a_gradient():
    """The operation is linear in x: the second derivative with respect to x and do is the operation itself."""
    x, cos, sin, do = make_inputs((1, 9, 2, 16), FP32)
    do.requires_grad_()
    (dx,) = torch.autograd.grad(nsa.rotate(x, cos, sin, backend="triton"), x, do, create_graph=True)
    (ddo,) = torch.autograd.grad(dx, do, x)
    assert torch.equal(ddo, nsa.rotate(x, cos, sin, backend="reference"))


@pytest.mark.parametrize(
    "shape, rest, message",
    [
        ((1, 5, 2, 16), {"dtype": torch.float64}, "must be bfloat16, float16 or float32, .* got torch.float64"),
        ((1, 5, 2, 7), {}, "must have an even head dim of at most 256 .* got 7"),
        ((1, 5, 2, 258), {}, "must have an even head dim of at most 256 .* got 258"),
        ((1, 5, 2, 16), {"learned": True}, "must not require gradients"),
        ((1, 5, 2, 16), {"unlike": True}, "`cos` and `sin` alike, .* got torch.float32, torch.float32 and torch.float"),
    ],
)
def test_what_has_no_kernel(shape, rest, message):
    """Refused by name; left to choose, the reference computes it."""
    x, cos, sin, _ = make_inputs(shape, rest.get("dtype", FP32))
    cos.requires_grad_("learned" in rest)
    sin = sin.half() if "unlike" in rest else sin
    with pytest.raises(NotImplementedError, match=message):
        nsa.rotate(x, cos, sin, backend="triton")
    assert torch.equal(nsa.rotate(x, cos, sin), nsa.rotate(x, cos, sin, backend="reference"))


def test_what_does_not_fit():
    x, cos, sin, _ = make_inputs((2, 5, 3, 16), FP32)
    with pytest.raises(ValueError, match=r"`x` must be \[B, T, H, D\], got shape \[5, 16\]"):
        nsa.rotate(x[0, :, 0], cos, sin)
    with pytest.raises(ValueError, match=r"`cos` must have shape \[2, 5, 16\], .* or 1 row, got \[2, 4, 16\]"):
        nsa.rotate(x, cos[:, :4], sin)
    with pytest.raises(ValueError, match=r"`sin` must have shape \[2, 5, 16\], .* got \[5, 16\]"):
        nsa.rotate(x=x, cos=cos, sin=sin[0])
    with pytest.raises(ValueError, match="`backend` must be one of"):
        nsa.rotate(x, cos, sin, backend="cuda")


def test_meta():
    x = torch.empty(2, 5, 3, 16, device="meta", dtype=BF16)
    cos = torch.empty(1, 5, 16, device="meta", dtype=FP32)
    for out in (nsa.rotate(x, cos, cos), rotary._rotate(x, cos, cos, False, FP32)):
        assert out.shape == x.shape
        assert out.dtype == FP32


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_opcheck(dtype):
    x, cos, sin, _ = make_inputs((2, 5, 3, 16), dtype, rows=1, layout="slice", embedded=FP32)
    torch.library.opcheck(rotary._rotate, (x, cos, sin, False, FP32))
    torch.library.opcheck(rotary._rotate, (x.float(), cos, sin, True, dtype))


def test_compiles_into_one_graph():
    x, cos, sin, do = make_inputs((2, 9, 3, 16), FP32, rows=1)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"  # Inductor itself is not what is tested
    rotate = torch.compile(lambda *args: nsa.rotate(*args, backend="triton"), fullgraph=True, backend=backend)
    out = rotate(x, cos, sin)
    wanted, wanted_dx = run("reference", x, cos, sin, do)
    assert torch.equal(out, wanted)
    assert torch.equal(torch.autograd.grad(out, x, do)[0], wanted_dx)


@pytest.mark.parametrize("variant", ["separate", "mlp", "pool", "smollm3-like"])
@torch.no_grad()
def test_a_model_rotates_with_it(monkeypatch, variant):
    """All that a sparse layer rotates; logits are those of PyTorch."""
    model, ids = make_model(variant, nsa_backend="reference").to(DEVICE), make_ids(2, 40).to(DEVICE)
    wanted, seen = model(ids).logits, []

    def rotate(x, cos, sin, *, backend):
        seen.append(backend)
        return rotary.rotate(x, cos, sin)

    monkeypatch.setattr(attention_nsa, "rotate", rotate)
    assert torch.equal(model(ids).logits, wanted)
    assert seen
    assert set(seen) == {"reference"}


def test_compiles_for_hopper():
    launches = compile_launches("""
import torch
from nsa_kernels import rotary
for B, T, H, D, dtype, embedded in (
    (1, 8192, 32, 128, torch.bfloat16, torch.bfloat16),
    (2, 4097, 8, 128, torch.bfloat16, torch.bfloat16),
    (2, 1, 4, 80, torch.float16, torch.float16),
    (1, 65, 1, 256, torch.float32, torch.float32),
    (1, 65, 5, 112, torch.bfloat16, torch.float32),
    (1, 65, 3, 6, torch.float32, torch.bfloat16),
):
    x, cos = torch.empty(B, T, H, D, dtype=dtype), torch.empty(1, T, D, dtype=embedded)
    out = rotary.rotate(x, cos, cos)
    rotary._rotate(out, cos, cos, True, dtype)
""")
    assert [launch["kernel"] for launch in launches] == ["_rotate_kernel"] * 12
    for i, launch in enumerate(launches):
        assert launch["spills"] == 0, launch
        # where all are of one dtype no tile changes its layout
        assert launch["shared"] <= (0 if i < 8 else 8192), launch


@pytest.mark.gpu
def test_more_elements_than_int32_counts():
    shape = (1, 2**20 + 3, 17, 128)
    x = torch.randn(1, 2**20 + 3, 1, 128, device=DEVICE, dtype=BF16).expand(shape).contiguous()
    cos, sin = (torch.randn(1, shape[1], 128, device=DEVICE, dtype=BF16) for _ in range(2))
    out = nsa.rotate(x, cos, sin, backend="triton")
    for part in (slice(0, 5), slice(-5, None)):
        wanted = nsa.rotate(x[:, part], cos[:, part], sin[:, part], backend="reference")
        assert torch.equal(out[:, part], wanted)
