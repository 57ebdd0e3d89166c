# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: several processes together compute what one does."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_worker import CASES, make_case, run
from tiny_nsa import BASE, close, make_ids, make_model

from modeling_nsa import shard_inputs
from modeling_nsa.parallel_nsa import ContextShard, _block_starts, _chunk_blocks, _segments
from nsa_kernels import compress_mean, nsa_attention, num_compressed_blocks

ROOT = Path(__file__).parents[1]
SIZE = 2


def run_processes(folder, device):
    """What each of two processes computes of every case."""
    paths = [ROOT, ROOT / "kernels", ROOT / "conversion", ROOT / "tests"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, str(ROOT / "tests" / "parallel_worker.py"), str(folder / "store")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(SIZE), str(folder / f"{rank}.pt"), device],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for rank in range(SIZE)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors.decode()[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]


def join(parts, tokens):
    """The row `[1, T, …]` from the chunks r and 2N - 1 - r of every process."""
    chunks = [part.chunk(2, dim=1) for part in parts]
    return torch.cat([chunk[0] for chunk in chunks] + [chunk[1] for chunk in reversed(chunks)], dim=1)[:, :tokens]


@pytest.mark.slow
def test_processes_compute_what_one_does(tmp_path, subtests):
    shares = run_processes(tmp_path, "cpu")
    for name in CASES:
        with subtests.test(name):
            model, batch, _ = make_case(name)
            compare(run(model, batch), [share[name] for share in shares], batch["input_ids"].numel())


def compare(one, many, tokens):
    assert sum(each["loss"] for each in many) / SIZE == pytest.approx(one["loss"], abs=5e-6)
    close(join([each["logits"] for each in many], tokens), one["logits"].flatten(0, 1)[None])
    for i, blocks in enumerate(one["block_indices"]):
        assert torch.equal(join([each["block_indices"][i] for each in many], tokens), blocks.flatten(0, 1)[None])
    for parameter, gradient in one["gradients"].items():
        # without a block, one process leaves φ out of the graph, and the others give zeros
        expected = torch.zeros(()) if gradient is None else gradient
        mean = sum(each["gradients"][parameter] for each in many) / SIZE
        torch.testing.assert_close(mean, expected.expand_as(mean), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_gpus_compute_what_one_does(tmp_path):
    if torch.cuda.device_count() < SIZE:
        pytest.skip(f"needs {SIZE} CUDA devices")
    shares = run_processes(tmp_path, "cuda")
    for name in CASES:
        model, batch, _ = make_case(name, "cuda")
        one, many = run(model, batch), [share[name] for share in shares]
        assert sum(each["loss"] for each in many) / SIZE == pytest.approx(one["loss"], abs=1e-3), name
        for parameter, gradient in one["gradients"].items():
            mean = sum(each["gradients"][parameter] for each in many) / SIZE
            error = (mean - (0 if gradient is None else gradient)).norm()
            assert error <= 1e-3 * (1 if gradient is None else 1 + gradient.norm()), (name, parameter)


@pytest.mark.parametrize("lengths", [[96], [5, 50, 1, 23, 17], [31, 1, 32, 32], [7] * 13 + [5], [90, 3, 3]])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_query_and_every_block_belongs_to_one_process(lengths, size):
    block_size, stride, T = 8, 4, 96
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    queries, starts = torch.zeros(T), []
    chunk_length = T // (2 * size)
    for rank in range(size):
        shard = ContextShard(None, rank, size, chunk_length, cu, torch.tensor(0))
        for segment in _segments(shard, block_size, stride, "cpu"):
            start = shard.chunks[segment.slot] * chunk_length
            first, last = (start + x for x in segment.queries)
            queries[first:last] += 1
            begin = first - segment.offset
            assert segment.keys == (begin, last)
            assert begin in cu
            assert segment.bounds == [0, *(x - first for x in cu if first < x < last), last - first]
            blocks = [num_compressed_blocks(b - a, block_size, stride) for a, b in itertools.pairwise(cu)]
            assert segment.blocks[0] == sum(blocks[: cu.index(begin)])
            seen = [min(b, last) - a for a, b in itertools.pairwise(cu) if begin <= a < last]
            count = sum(num_compressed_blocks(x, block_size, stride) for x in seen)
            assert segment.blocks[1] - segment.blocks[0] == count
    for chunk in range(2 * size):
        blocks = _chunk_blocks(shard, chunk, block_size, stride)
        own = _block_starts(blocks, block_size, stride)
        assert len(own) == blocks.count
        assert (own < chunk_length).all()
        starts += (own + chunk * chunk_length).tolist()
    assert (queries == 1).all()
    assert starts == [i for a, b in itertools.pairwise(cu) for i in range(a, b - block_size + 1, stride)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_chunks_of_a_sequence_equal_the_whole(backend):
    T, sizes = 61, {key: BASE[key] for key in ("compress_block_size", "compress_stride", "select_block_size")}
    sizes |= {"num_selected_blocks": 3, "window_size": 10}
    results, device = [], "cuda" if torch.cuda.is_available() else "cpu"
    for chunks in ([(0, T)], [(0, 26), (26, T)]):
        generator = torch.Generator().manual_seed(0)
        q, k, v, k_win, v_win = (torch.randn(1, T, heads, 16, generator=generator) for heads in (4, 2, 2, 2, 2))
        gates = [torch.randn(1, T, 4, generator=generator) for _ in range(3)]
        k_cmp, v_cmp = (compress_mean(x, compress_block_size=8, compress_stride=4) for x in (k, v))
        inputs = [x.to(device).requires_grad_() for x in (q, k, v, k_cmp, v_cmp, k_win, v_win, *gates)]
        q, k, v, k_cmp, v_cmp, k_win, v_win, *gates = inputs
        parts = []
        for first, last in chunks:  # the window's keys are no more than its edge and the chunk's own
            blocks, edge = num_compressed_blocks(last, 8, 4), max(0, first - 9)
            tensors = (q[:, first:last], k[:, :last], v[:, :last], k_cmp[:, :blocks], v_cmp[:, :blocks])
            tensors += (k_win[:, edge:last], v_win[:, edge:last], *(x[:, first:last] for x in gates))
            implementation = backend if len(chunks) > 1 else "reference"
            parts.append(nsa_attention(*tensors, **sizes, q_offset=first, backend=implementation)[0])
        o = torch.cat(parts, dim=1)
        results.append((o, *torch.autograd.grad(o.square().sum(), inputs)))
    for whole, joined in zip(*results):
        torch.testing.assert_close(joined, whole, rtol=1e-4, atol=1e-4)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_shard_holds_shifted_labels_and_counts_them(alone):
    model, ids = make_model(), make_ids(2, 21)
    inputs = shard_inputs({"input_ids": ids, "labels": ids}, alone, model.config)
    assert inputs["context_shard"].cu_seqlens == [0, 21, 42]
    expected = torch.cat([torch.cat((row[1:], torch.tensor([-100]))) for row in ids])[None]
    assert torch.equal(inputs["shift_labels"], expected)
    assert inputs["num_items_in_batch"] == 40
    cached = model(**inputs, use_cache=True)
    assert cached.past_key_values is None
    close(cached.loss, model(ids, labels=ids, use_cache=False).loss)


def test_refusals(alone):
    model, ids = make_model("hybrid"), make_ids(1, 40)
    config = model.config
    with pytest.raises(ValueError, match=r"takes the inputs .* got inputs_embeds"):
        shard_inputs({"inputs_embeds": ids}, alone, config)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match=r"must be 2-D and hold only ones.*Pack the sequences"):
        shard_inputs({"input_ids": ids, "attention_mask": mask}, alone, config)
    with pytest.raises(ValueError, match="`heads_at_once` must be at least 1 or None, got 0"):
        shard_inputs({"input_ids": ids}, alone, config, heads_at_once=0)
    inputs = shard_inputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, alone, config)
    with pytest.raises(ValueError, match="needs `attention_mask=None`, got Tensor"):
        model(**inputs, attention_mask=mask)
    with pytest.raises(
        ValueError, match=r"belongs to input_ids and position_ids \[1, 40\], got \[1, 39\] and \[1, 40\]"
    ):
        model(**{**inputs, "input_ids": ids[:, 1:]})
    with pytest.raises(ValueError, match="chunks of 20 tokens, shorter than the window"):
        make_model(window_size=30)(**inputs)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="must be 'sdpa' where full_attention layers run"):
        model(**inputs)
