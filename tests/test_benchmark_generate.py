# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of `generate` without a GPU: every mode continues the prompt alike, and the pictures."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels" / "benchmarks"))

import benchmark_generate
from tiny_nsa import BASE

MACHINE = {"dtype": "bfloat16", "gpu": "made up", "torch": "2", "triton": "3", "commit": "abc", "date": "2026-01-01"}
SIZES = {**BASE, "hidden_size": 48}  # a multiple of the heads, as Llama's
DENSE = {name: value for name, value in SIZES.items() if name not in benchmark_generate.SIZES}


@pytest.mark.parametrize("name", benchmark_generate.NAMES)
def test_every_mode_continues_the_prompt(monkeypatch, capsys, name):
    model = benchmark_generate.build(name, DENSE if name == "dense" else SIZES, device="cpu", dtype=torch.float32)
    rows, tokens = {}, []
    decode = benchmark_generate.decode

    def keep(*args, **kwargs):
        out, measured = decode(*args, **kwargs)
        tokens.append(out)
        return out, measured

    monkeypatch.setattr(benchmark_generate, "decode", keep)

    def record_kernels(run):
        run()
        return [{"name": "some kernel", "start": 1.0, "stop": 1.5}] * 16

    monkeypatch.setattr(benchmark_generate, "record_kernels", record_kernels)
    benchmark_generate.measure(
        rows.__setitem__, model, name, batch=2, context=50, steps=6, chunk=20, modes=benchmark_generate.MODES,
        device="cpu", kernels=True,
    )  # fmt: skip
    assert capsys.readouterr().out.count("1000.0 us     2.0 x some kernel") == 3
    assert list(rows)[1:] == list(benchmark_generate.MODES)
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    expected = model.generate(
        tokens[0][:, :51], attention_mask=torch.ones(2, 51), max_new_tokens=tokens[-1].shape[1] - 51, do_sample=False,
        eos_token_id=None, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    assert torch.equal(tokens[-1], expected)


def test_pictures(tmp_path):
    rows = [{"model": "8B", "implementation": "nsa", "batch": 1, "tokens": 8192, "mode": "prompt", "prompt_s": 1.0}]
    for name, slope in zip(benchmark_generate.NAMES, (0.1, 0.1, 0.8)):
        for mode in benchmark_generate.MODES:
            for tokens in (8192, 65536):
                row = {"model": "8B", "implementation": name, "batch": 1, "tokens": tokens, "mode": mode}
                rows.append(row | {"median_ms": (tokens / 8192) ** slope})
    (picture,) = benchmark_generate.plot([row | MACHINE for row in rows], tmp_path / "generate.csv")
    assert picture.read_bytes().startswith(b"\x89PNG")
