# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Tile maps of packed sequences, head dim tiles, availability."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from nsa_kernels.availability import triton_error
from nsa_kernels.triton_common import check_inputs, split_head_dim, tile_map

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("lengths", [(1,), (5,), (4, 4), (1, 1, 1), (7, 1, 300, 64, 63, 65), (0, 3, 0, 0, 9, 0)])
@pytest.mark.parametrize("tile", [1, 3, 4, 64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tile_map_covers_every_token_once(lengths, tile, dtype):
    total = sum(lengths)
    cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(dtype)
    tiles = tile_map(cu, tile, total)
    assert tiles.shape == (total // tile + len(lengths), 2)
    covered = []
    for seq, start in tiles.tolist():
        assert start >= 0
        assert start % tile == 0
        covered += [(seq, i) for i in range(start, min(start + tile, lengths[seq]))]
    assert covered == [(s, i) for s, length in enumerate(lengths) for i in range(length)]


def test_tile_map_of_many_sequences():
    lengths = torch.randint(0, 9, (700,), generator=torch.Generator().manual_seed(0))
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int().to(DEVICE)
    tiles = tile_map(cu, 4, int(lengths.sum()))
    used = tiles[tiles[:, 1] < lengths.to(DEVICE)[tiles[:, 0].long()]]
    assert len(used) == int(((lengths + 3) // 4).sum())
    assert len(torch.unique(used, dim=0)) == len(used)


@pytest.mark.parametrize(
    "size, tiles",
    [(8, (16, 0)), (16, (16, 0)), (32, (32, 0)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (112, (128, 0)),
     (128, (128, 0)), (160, (128, 32)), (192, (128, 64)), (200, (256, 0)), (256, (256, 0))],
)  # fmt: skip
def test_head_dim_tiles(size, tiles):
    assert split_head_dim(size) == tiles


def test_q_offset_tensor_is_refused():
    q = torch.zeros(1, 1, 1, 16, device=DEVICE)
    with pytest.raises(NotImplementedError, match="q_offset"):
        check_inputs(q, None, torch.tensor(3))


def test_triton_error_names_the_reason(monkeypatch):
    assert triton_error(DEVICE) is None
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if DEVICE == "cpu":
        assert "no CUDA device" in triton_error()
    else:
        assert "inputs are on cpu" in triton_error("cpu")
    monkeypatch.setattr("nsa_kernels.availability._INSTALLED", False)
    assert "not installed" in triton_error()
