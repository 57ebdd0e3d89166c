# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Compressed attention in Triton against the reference: outputs, lse and all gradients."""

import pytest
import torch
from sm90 import MAX_SHARED, compile_all

from nsa_kernels import compressed_cu_seqlens, num_compressed_blocks, reference

compressed = pytest.importorskip("nsa_kernels.compressed", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"compress_block_size": 32, "compress_stride": 16}


@pytest.fixture(autouse=True)
def _poison():
    """Fill uninitialised memory with NaN, so that an element that no program writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(B, T, HQ, H, D, DV, dtype, q_offset=0, sizes=SIZES, blocks=None, factor=1.0, seed=0):
    torch.manual_seed(seed)
    C = num_compressed_blocks(T + q_offset, *sizes.values()) if blocks is None else blocks
    shapes = ((B, T, HQ, D), (B, C, H, D), (B, C, H, DV))
    q, k, v = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in (q * factor, k, v)]


def run(attention, inputs, do, dlse, **where):
    """o, lse and the gradients; rows without a block have no gradient of lse."""
    o, lse = attention(*inputs, **where)
    finite = lse > float("-inf")
    loss = (o * do.to(o.dtype)).sum() + (lse[finite] * dlse[finite].to(lse.dtype)).sum()
    return o, lse, *torch.autograd.grad(loss, inputs)


def naive(q, k, v, *, compress_block_size, compress_stride, scale=None, leftpad=None, q_offset=0):
    """The same in the dtype of the inputs, as plain PyTorch would: the measure of an acceptable error."""
    mask = reference._complete_blocks(
        q, k.shape[1], 0, q.shape[1], compress_block_size, compress_stride, leftpad, q_offset
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4) @ k.permute(0, 2, 3, 1)[:, :, None]
    scores = (scores.float() * scale).masked_fill(~mask, float("-inf"))
    p = torch.softmax(scores, -1).nan_to_num(0.0).to(v.dtype)
    return reference._by_token(p @ v.transpose(1, 2)[:, :, None]), reference._by_token(torch.logsumexp(scores, -1))


def check(inputs, logits=1.0, **where):
    """Kernel errors are at most twice those of plain PyTorch in the same dtype, plus rounding.

    Args:
        logits: Largest of them: rounding it moves a probability by that much more.
    """
    names = ("o", "lse", "dq", "dk_cmp", "dv_cmp")
    where = {**SIZES, **where}
    do = torch.randn(*inputs[0].shape[:-1], inputs[2].shape[-1], device=DEVICE)
    dlse = torch.randn(do.shape[:-1], device=DEVICE)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = run(reference.compressed_attention, exact, do, dlse, **where)
    actual = run(compressed.compressed_attention, inputs, do, dlse, **where)
    plain = run(naive, inputs, do, dlse, **where)
    for name, x, y, z in zip(names, actual, expected, plain, strict=True):
        assert x.shape == y.shape, name
        assert x.dtype == (torch.float32 if name == "lse" else inputs[0].dtype), name
        assert not x.isnan().any(), name
        finite = y > float("-inf")
        assert torch.equal(finite, x > float("-inf")), name
        if not finite.any():
            continue
        x, y, z = x[finite].double(), y[finite], z[finite].double()
        rounding = max(4 * torch.finfo(inputs[0].dtype).eps, 2 * logits * torch.finfo(torch.float32).eps)
        error, allowed = (x - y).abs().max(), 2 * (z - y).abs().max() + rounding * y.abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


CASES = [
    # B, T, HQ, H, D, DV
    (1, 1, 2, 1, 32, 32),
    (1, 63, 3, 3, 64, 64),
    (2, 65, 3, 1, 64, 64),
    (1, 257, 4, 1, 80, 80),
    (1, 66, 16, 1, 32, 32),
    (1, 130, 2, 1, 192, 128),
    (1, 97, 2, 2, 112, 48),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case):
    check(make(*case, torch.float32))


@pytest.mark.parametrize("case", CASES[3:5], ids=str)
def test_matches_reference_in_half_precision(case):
    check(make(*case, torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        (1, 4097, 16, 1, 128, 128),
        (2, 1000, 8, 2, 64, 64),
        (1, 1025, 7, 1, 96, 96),
        (1, 2050, 10, 2, 80, 80),
        (1, 1300, 4, 2, 192, 128),
        (1, 900, 4, 1, 256, 256),
        (1, 3000, 6, 2, 112, 32),
    ],
    ids=str,
)
def test_matches_reference_on_gpu(case, dtype):
    check(make(*case, dtype))


def test_block_sizes():
    sizes = {"compress_block_size": 12, "compress_stride": 4}
    check(make(1, 120, 2, 1, 32, 32, torch.float32, sizes=sizes), **sizes)


def test_left_padding_and_cached_keys():
    leftpad = torch.tensor([0, 70, 129], device=DEVICE)
    check(make(3, 90, 4, 2, 32, 32, torch.float32, q_offset=100), leftpad=leftpad, q_offset=100)


def test_more_blocks_than_are_complete():
    check(make(1, 70, 2, 1, 32, 32, torch.float32, blocks=9))


def test_no_complete_block():
    inputs = make(1, 31, 2, 1, 32, 32, torch.float32, blocks=2)
    o, lse = compressed.compressed_attention(*inputs, **SIZES)
    grads = torch.autograd.grad(o.sum(), inputs)
    assert torch.equal(o, torch.zeros_like(o))
    assert (lse == float("-inf")).all()
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))
    check(make(1, 31, 2, 1, 32, 32, torch.float32, blocks=0))


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_extreme_logits():
    inputs = make(1, 140, 2, 1, 64, 64, torch.float32, factor=80.0)
    largest = (inputs[0][0, :, 0] @ inputs[1][0, :, 0].T / 8).abs().max().item()
    assert largest > 250
    check(inputs, logits=largest)


def test_packed_sequences_equal_single_ones():
    lengths = [1, 63, 0, 150, 31, 65]
    cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    blocks = compressed_cu_seqlens(cu, **SIZES)
    q, k, v = (x.detach()[0].requires_grad_() for x in make(1, cu[-1], 4, 2, 32, 48, torch.float32, blocks=blocks[-1]))
    do, dlse = torch.randn(cu[-1], 4, 48, device=DEVICE), torch.randn(cu[-1], 4, device=DEVICE)
    o, lse, *grads = run(compressed.compressed_attention, (q, k, v), do, dlse, **SIZES, cu_seqlens=cu)
    for i in range(len(lengths)):
        rows, keys = slice(cu[i], cu[i + 1]), slice(blocks[i], blocks[i + 1])
        single = [x.detach()[None, s].requires_grad_() for x, s in ((q, rows), (k, keys), (v, keys))]
        expected = run(compressed.compressed_attention, single, do[None, rows], dlse[None, rows], **SIZES)
        actual = (o[rows], lse[rows], grads[0][rows], grads[1][keys], grads[2][keys])
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x[None], y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2)], ids=str)
def test_strides(order):
    """Any order of the dims in memory, a slice of a wider tensor, and a gradient whose strides are all 0."""
    inputs = [x.detach() for x in make(2, 70, 4, 2, 32, 32, torch.float32)]
    expected = [x.clone().requires_grad_() for x in inputs]
    back = [order.index(i) for i in range(4)]
    strided = [x.permute(order).contiguous().permute(back).requires_grad_() for x in inputs]
    sliced = [torch.cat((x, x), -1)[..., 32:].requires_grad_() for x in inputs]
    o, lse = compressed.compressed_attention(*expected, **SIZES)
    o.backward(torch.ones_like(o))
    for tensors in (strided, sliced):
        assert tensors[0].stride() != inputs[0].stride()
        o_same, lse_same = compressed.compressed_attention(*tensors, **SIZES)
        torch.testing.assert_close((o_same, lse_same), (o, lse), atol=0, rtol=0)
        o_same.sum().backward()
        for x, y in zip(tensors, expected, strict=True):
            torch.testing.assert_close(x.grad, y.grad, atol=0, rtol=0)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits():
    inputs = make(1, 3000, 16, 2, 128, 128, torch.bfloat16)
    do, dlse = torch.randn(1, 3000, 16, 128, device=DEVICE), torch.randn(1, 3000, 16, device=DEVICE)
    first, second = (run(compressed.compressed_attention, inputs, do, dlse, **SIZES) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_refuses_by_name():
    q, k, v = make(1, 40, 2, 1, 32, 32, torch.float32)
    with pytest.raises(NotImplementedError, match="`q_offset`"):
        compressed.compressed_attention(q, k, v, **SIZES, q_offset=torch.tensor(0))
    with pytest.raises(NotImplementedError, match="`scale`"):
        compressed.compressed_attention(q, k, v, **SIZES, scale=-1.0)
    with pytest.raises(NotImplementedError, match="`q`"):
        compressed.compressed_attention(q.double(), k.double(), v.double(), **SIZES)
    with pytest.raises(NotImplementedError, match="`v_cmp`"):
        compressed.compressed_attention(q, k, v.half(), **SIZES)
    with pytest.raises(NotImplementedError, match="head dim"):
        compressed.compressed_attention(*make(1, 40, 2, 1, 288, 32, torch.float32), **SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256)], ids=str)
def test_compiles_for_sm90_without_spills(dims):
    D, DV = dims
    tiles = {"D": compressed.split_head_dim(D), "DV": compressed.split_head_dim(DV)}
    constants = {
        "G": 4, "D": D, "DV": DV, "SIZE": 32, "STRIDE": 16, "PACKED": False, "LEFTPAD": False, "PRECISION": "tf32",
        "map_ptr": None, "cu_ptr": None, "cu_k_ptr": None, "leftpad_ptr": None, "stride_lt": 1,
        **{f"{name}{i + 1}": pair[i] for name, pair in tiles.items() for i in range(2)},
    }  # fmt: skip
    backward = {**constants, "HAS_GATE": True}

    def job(kernel, pointers, statistics, constants, config, described, rows):
        config, constants, descriptors = dict(config), dict(constants), {}
        for name, dim in zip(described, tiles, strict=True):
            for suffix, width in zip(("_desc", "_desc2"), tiles[dim], strict=True):
                if width:
                    descriptors[name + suffix] = f"bf16[1,1,{config[rows]},{width}]"
                else:
                    constants[name + suffix] = None
        return {
            "kernel": kernel,
            "pointers": dict.fromkeys(pointers, "bf16") | dict.fromkeys(statistics, "fp32"),
            "descriptors": descriptors,
            "num_warps": config.pop("num_warps"),
            "num_stages": config.pop("num_stages"),
            "constants": {**constants, **config},
        }

    shape = (torch.bfloat16, D, DV, *(constants[name] for name in ("G", "SIZE", "STRIDE")))
    forward, backward_q = compressed._forward_config.built_in(*shape), compressed._dq_config.built_in(*shape)
    saved = ("lse_ptr", "delta_ptr", "gate_ptr")
    jobs = [
        job("_forward_kernel", ("q_ptr", "o_ptr"), saved[:1], constants, forward, "kv", "BLOCK_N"),
        job("_backward_q_kernel", ("q_ptr", "do_ptr", "dq_ptr"), saved, backward, backward_q, "kv", "BLOCK_N"),
    ]
    config, together = compressed._dkdv_config.built_in(*shape), compressed._held_together(*shape[:3])
    partial = ("dk_ptr", "dv_ptr", *saved)
    for want_dk, want_dv in ((True, True),) if together else ((True, False), (False, True)):
        wanted = {**backward, "WANT_DK": want_dk, "WANT_DV": want_dv}
        jobs.append(job("_backward_kv_kernel", ("k_ptr", "v_ptr"), partial, wanted, config, ("q", "do"), "BLOCK_M"))
    for made, result in zip(jobs, compile_all("nsa_kernels.compressed", jobs), strict=True):
        assert result["spills"] == 0, (made, result)
        assert result["wgmma"], (made, result)
        assert not result["serialized"], (made, result)
        assert result["shared"] <= MAX_SHARED, (made, result)
