# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of decoding without a GPU: what it reads, its check, its pictures."""

import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels" / "benchmarks"))

import benchmark_decode

import nsa_kernels as nsa

MACHINE = {"dtype": "bfloat16", "gpu": "made up", "torch": "2", "triton": "3", "commit": "abc", "date": "2026-01-01"}


def test_the_floor_counts_what_a_step_reads():
    sparse, dense = benchmark_decode.bytes_read("HQ64-H4-D128", 16, 65536, 2)
    assert dense == 16 * 65536 * 4 * 256 * 2
    assert sparse == 16 * (4095 + 1024 + 512) * 4 * 256 * 2
    assert benchmark_decode.bytes_read("HQ64-H4-D128", 1, 10, 2)[0] == 20 * 4 * 256 * 2


@pytest.mark.parametrize("queries", [1, 3])
def test_the_check_sees_an_error(monkeypatch, queries):
    monkeypatch.setitem(benchmark_decode.SHAPES, "tiny", (2, 1, 16))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"context": 1300, "device": device}
    assert benchmark_decode.check("tiny", queries, torch.float32, **settings) < 1e-5
    for name, broken in (("nsa_attention", "v"), ("append_tokens", "q")):
        with monkeypatch.context() as patch:
            patch.setattr(nsa, name, negated(getattr(nsa, name), broken))
            with pytest.raises(SystemExit, match=r"off by .*: not timed"):
                benchmark_decode.check("tiny", queries, torch.float32, **settings)


def negated(operation, name):
    """The operation on the negative of an argument, where it is to use the kernels."""

    def wrong(*args, backend, **settings):
        arguments = inspect.signature(operation).bind(*args, **settings).arguments
        if backend == "triton":
            arguments[name] = -arguments[name]
        return operation(**arguments, backend="reference")

    return wrong


def test_pictures(tmp_path):
    rows = []
    for name, slope in (("nsa", 0.3), ("nsa, eager", 0.2), ("sdpa-flash", 1.0)):
        for batch in (1, 16):
            for tokens in (4096, 16384, 65536):
                row = {"implementation": name, "shape": "HQ64-H4-D128", "batch": batch, "tokens": tokens, "queries": 1}
                rows.append(row | {"median_ms": (tokens / 4096) ** slope, "floor_ms": 0.1} | MACHINE)
    pictures = benchmark_decode.plot(rows, tmp_path / "decode.csv")
    assert [path.name for path in pictures] == ["decode_HQ64-H4-D128.png", "decode_speedup.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    only = [row for row in rows if row["implementation"] == "nsa"]
    assert len(benchmark_decode.plot(only, tmp_path / "nsa.csv")) == 1
