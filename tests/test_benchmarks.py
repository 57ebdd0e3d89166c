# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks without a GPU: command lines, drawn inputs, tables and pictures."""

import csv
import sys
from pathlib import Path

import pytest
import torch

import nsa_kernels as nsa
from nsa_kernels import reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels" / "benchmarks"))

import benchmark_attention
import benchmark_context
import benchmark_decode
import benchmark_generate
import benchmark_parts
import benchmark_selected
import benchmark_training
import common
import sanitize

SCRIPTS = (
    benchmark_attention, benchmark_context, benchmark_decode, benchmark_generate, benchmark_parts, benchmark_selected,
    benchmark_training, sanitize,
)  # fmt: skip
MACHINE = {"dtype": "bfloat16", "gpu": "made up", "torch": "2", "triton": "3", "commit": "abc", "date": "2026-01-01"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_refusal_without_a_gpu(script, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse(["--help"])
    assert stop.value.code == 0
    assert "options:" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = [] if script is sanitize else ["--output", str(tmp_path / "out.csv")]
    monkeypatch.setattr(sys, "argv", ["benchmark", *output])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == "This benchmark needs a CUDA device, and torch finds none."
    assert not list(tmp_path.iterdir())


def sampled_unions(T, HQ, H, kind="local", windows=96):
    """`common.unions` of the reference's choice for 16 queries each at places all over the text."""
    q, _, _, k_cmp, *_ = (x.detach() for x in common.make_inputs(kind, T, HQ, H, 128, torch.float32, device="cpu"))
    chosen = []
    for start in torch.linspace(1024, T - 16, windows).long().div(16, rounding_mode="floor").mul(16).tolist():
        blocks = nsa.num_compressed_blocks(start + 16, *common.COMPRESSION.values())
        where = {**common.COMPRESSION, "q_offset": start, "backend": "reference"}
        some = q[:, start : start + 16], k_cmp[:, :blocks]
        _, lse = nsa.compressed_attention(*some, some[1], **where)
        sizes = {name: common.SIZES[name] for name in ("select_block_size", "num_selected_blocks")}
        chosen.append(nsa.select_blocks(*some, lse, num_blocks=-(-(start + 16) // 64), **sizes, **where)[0])
    return common.unions(torch.cat(chosen))


@pytest.mark.parametrize("T, groups", [(4096, 16), (16384, 4), (65536, 2)])
def test_local_inputs_share_blocks_like_a_model_at_every_length(T, groups):
    got = sampled_unions(T, groups, 1)
    for width, wanted in zip((2, 4, 8, 16), (18.0, 20.2, 22.6, 25.3)):
        assert got[f"union_{width}"] == pytest.approx(wanted, rel=0.06), got


def test_random_inputs_share_few_blocks():
    assert sampled_unions(4096, 4, 1, kind="random", windows=16)["union_8"] > 35


def test_unions_are_counted():
    indices = torch.arange(3).expand(32, 1, 3).clone()
    indices[1, 0, 2] = 7
    assert common.unions(indices) == {"union_2": 3 + 1 / 16, "union_4": 3.125, "union_8": 3.25, "union_16": 3.5}
    indices[:16, 0, 2] = -1  # queries that see fewer blocks are left out
    assert common.unions(indices)["union_16"] == 3


def test_results_are_on_disk_after_every_row(tmp_path):
    results = common.Results(tmp_path / "new" / "out.csv", MACHINE)
    for row in ({"tokens": 1, "ms": 0.5}, {"tokens": 2, "note": "out of memory"}):
        results.add(**row)
        with results.path.open(newline="") as file:
            assert len(list(csv.DictReader(file))) == len(results.rows)
        assert [path.name for path in results.path.parent.iterdir()] == ["out.csv"]
    assert common.numbers(results.rows, "ms") == [(1, 0.5)]
    with results.path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {"tokens": "2", "ms": "", "note": "out of memory", **MACHINE}


def assert_png(path):
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_attention_pictures(tmp_path):
    rows = []
    for name, kind, slope in (("nsa", "local", 1.0), ("nsa", "random", 1.3), ("sdpa-flash", "local", 2.0)):
        for shape in ("HQ64-H4-D128", "HQ32-H8-D128"):
            for tokens in (4096, 16384):
                for direction in ("forward", "backward"):
                    row = {"implementation": name, "shape": shape, "input": kind, "tokens": tokens, "pass": direction}
                    rows.append(row | {"median_ms": (tokens / 4096) ** slope} | MACHINE)
    pictures = benchmark_attention.plot(rows, tmp_path / "attention.csv")
    names = ["attention_HQ64-H4-D128.png", "attention_HQ32-H8-D128.png", "attention_speedup.png"]
    assert [path.name for path in pictures] == names
    for path in pictures:
        assert_png(path)
    only = [row for row in rows if row["implementation"] == "nsa"]
    assert len(benchmark_attention.plot(only, tmp_path / "nsa.csv")) == 2


def made_up_trace():
    """Three repetitions of both passes; in the second, which is of median length, the kernels take 1, 2, 4, … µs."""
    events, correlation = [], 0

    def event(category, name, start, length, **args):
        events.append({"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "args": args})

    names = {
        "forward": ("compressed_forward:_forward_kernel", "chosen_blocks:_score_kernel", ":other kernel"),
        "backward": ("compressed_backward:_backward_q_kernel", "compressed_backward:reduce"),
    }
    for repetition, factor in enumerate((50, 1, 0.5)):
        for i, direction in enumerate(names):
            host, device = 10_000 * repetition + 1000 * i, 10_000 * repetition + 1000 * i + 500
            event("user_annotation", f"nsa {direction}", host, 900)
            event("gpu_user_annotation", f"nsa {direction}", device, 400)
            for j, (launcher, name) in enumerate(x.split(":") for x in names[direction]):
                correlation += 1
                if launcher:
                    event("user_annotation", launcher, host + 10 * j + 1, 8)
                event("cuda_driver", "cuLaunchKernelEx", host + 10 * j + 2, 3, correlation=correlation)
                event("kernel", name, device + 10 * j, factor * 2**j, correlation=correlation)
        event("kernel", "between the passes", 10_000 * repetition + 5000, 7, correlation=-1)
    return {"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}


def test_kernels_and_gaps_of_a_profile_add_up_to_the_pass():
    kernels = benchmark_parts.read_kernels(made_up_trace())
    span, parts = benchmark_parts.split_pass(kernels, "forward")
    assert span == pytest.approx(0.024)
    assert parts == pytest.approx({"compressed": 0.001, "scores": 0.002, "other": 0.004, "gaps": 0.017})
    span, parts = benchmark_parts.split_pass(kernels, "backward")
    assert parts == pytest.approx({"compressed dq": 0.001, "compressed dk, dv": 0.002, "gaps": 0.009})
    assert sum(parts.values()) == pytest.approx(span)
    with pytest.raises(SystemExit, match="saw no kernel of the other pass"):
        benchmark_parts.split_pass(kernels, "other")


def test_kernels_without_a_recorded_launch_are_placed_by_the_device_ranges():
    trace = made_up_trace()
    trace["traceEvents"] = [event for event in trace["traceEvents"] if event.get("cat") != "cuda_driver"]
    _, parts = benchmark_parts.split_pass(benchmark_parts.read_kernels(trace), "forward")
    assert parts["other"] == pytest.approx(0.007)


def test_floors_count_what_is_visible():
    T = 1500
    q, k = torch.zeros(1, T, 1, 1), torch.zeros(1, nsa.num_compressed_blocks(T, 32, 16), 1, 1)
    chosen = nsa.select_blocks(
        q, k, torch.zeros(1, T, 1), num_blocks=24, **common.COMPRESSION, select_block_size=64, num_selected_blocks=16
    )
    masks = {
        "compressed": reference._complete_blocks(q, k.shape[1], 0, T, 32, 16, None, 0),
        "selected": reference._chosen_tokens(q, T, 0, T, chosen, 64, None, 0),
        "window, gated sum": reference._window_tokens(q, q, 0, T, 0, T, 512, None, 0),
    }
    floors = benchmark_parts.floors(T, 6, 2, 32)
    for part, mask in masks.items():
        assert floors["forward", part][0] == 4 * 6 * 32 * mask.sum().item()
    assert floors["backward", "selected dk, dv"][0] == 2 * floors["forward", "selected"][0]


def test_launchers_are_labelled(monkeypatch, capsys):
    from nsa_kernels import attention

    for name in {launcher for launcher, _, _ in benchmark_parts.PARTS}:
        monkeypatch.setattr(attention, name, lambda *args: args)
    benchmark_parts.label_launchers()
    assert attention.window_forward(1, 2) == (1, 2)
    assert capsys.readouterr().out == ""
    monkeypatch.delattr(attention, "chosen_blocks")
    benchmark_parts.label_launchers()
    assert capsys.readouterr().out.startswith("nsa_kernels.attention has no chosen_blocks")


def test_parts_table_and_picture(tmp_path, capsys):
    results = common.Results(tmp_path / "parts.csv", MACHINE)
    about = {"shape": "HQ64-H4-D128", "input": "local", "tokens": 4096}
    kernels = benchmark_parts.read_kernels(made_up_trace())
    benchmark_parts.add_rows(results, about, 4096, (64, 4, 128), kernels, (8e11, 4e9))
    rows = {(row["pass"], row["part"]): row for row in results.rows}
    compressed = rows["forward", "compressed"]
    assert compressed["floor_ms"] == pytest.approx(max(compressed["tflop"] / 0.8, compressed["gbyte"] / 4), rel=0.01)
    assert compressed["fraction"] == pytest.approx(compressed["floor_ms"] / compressed["median_ms"], rel=0.01)
    assert rows["forward", "whole"]["floor_ms"] > compressed["floor_ms"]
    assert "compressed dk, dv" in capsys.readouterr().out
    assert_png(benchmark_parts.plot(results.rows, results.path))


TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name", ["nsa", "sdpa-flash"])
def test_a_training_step(name, monkeypatch):
    monkeypatch.setattr(benchmark_training, "LOSS_CHUNK", 16)
    model = benchmark_training.build(name, TINY, device="cpu", dtype=torch.float32)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    ids = benchmark_training.make_text("random", 41, 50, device="cpu")
    with torch.no_grad():
        expected = model(ids, labels=ids).loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [benchmark_training.step(model, optimizer, ids) for _ in range(3)]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[2] < losses[1] < losses[0]


def test_text_of_runs():
    ids = benchmark_training.make_text("runs", 4000, 10**6, device="cpu")
    assert ids.shape == (1, 4000)
    assert (ids[0, 1:] == ids[0, :-1]).float().mean().item() == pytest.approx(0.9, abs=0.03)


def test_compression_is_timed_beside_the_attention_it_serves(monkeypatch):
    model = benchmark_training.build("nsa", TINY, device="cpu", dtype=torch.float32)
    ids = benchmark_training.make_text("random", 70, 50, device="cpu")
    needed = benchmark_training.model_unions(model, benchmark_training.make_text("random", 1100, 50, device="cpu"))
    assert 16 <= needed["union_2"] <= needed["union_16"] <= 18
    calls = benchmark_training.capture_layer(model, ids)
    assert calls.keys() == {"compress_k", "compress_v", "gate", "attention"}

    def made_up(run):
        run()
        return [{"start": 1.0, "stop": 7.0}]

    monkeypatch.setattr(benchmark_training, "record_kernels", made_up)
    measured = benchmark_training.measure_compression(model, ids)
    assert measured == {"phi_gates_ms": 6.0, "attention_ms": 2.0, "phi_gates_share": 3.0}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_selected_picture(tmp_path):
    rows = [
        {"implementation": name, "shape": "HQ64-H4-D128", "input": kind, "tokens": 16384, "pass": direction,
         "median_ms": ms, **MACHINE}
        for name, ms in ((benchmark_selected.AS_IT_IS, 3.0), (benchmark_selected.ONE_QUERY, 3.1))
        for kind in common.INPUTS
        for direction in ("forward", "backward")
    ]  # fmt: skip
    assert_png(benchmark_selected.plot(rows, tmp_path / "selected.csv"))


def test_one_query_is_for_a_while():
    before = benchmark_selected.selected._LONG
    with benchmark_selected.one_query():
        assert benchmark_selected.selected._LONG == 0
    assert benchmark_selected.selected._LONG == before > 0


def test_training_picture(tmp_path):
    rows = [
        {"implementation": name, "text": "random", "tokens": tokens, "tokens_per_s": 1e4, "peak_gib": 9.0, **MACHINE}
        for name in ("nsa", "sdpa-flash")
        for tokens in (8192, 32768)
    ]
    rows.append({"implementation": "sdpa-cudnn", "text": "random", "tokens": 8192, "note": "out of memory", **MACHINE})
    assert_png(benchmark_training.plot(rows, tmp_path / "training.csv"))


@pytest.mark.parametrize("case", sanitize.CASES)
def test_what_the_sanitizer_watches_is_valid(case):
    if case != "lists that are split":  # the same call as another, on a longer text
        sanitize.run(**sanitize.CASES[case], device="cpu", backend="reference")
    if "decoding" in case:
        sanitize.append(**sanitize.CASES[case], device="cpu", backend="reference")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "script, arguments",
    [
        (benchmark_attention, "--shapes HQ9-H3-D64 --lengths 4096 --repeats 10"),
        (benchmark_parts, "--shapes HQ9-H3-D64 --lengths 4096 --repeats 3 --alone-ms 10"),
        (benchmark_training, "--layers 1 --lengths 4096 --steps 1"),
    ],
)
def test_runs_on_a_gpu(script, arguments, tmp_path, monkeypatch):
    path = tmp_path / "out.csv"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--output", str(path), *arguments.split()])
    script.main()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["median_ms"]) >= 0 for row in rows)
    assert list(tmp_path.glob("*.png"))
    if script is benchmark_parts:
        found = {(row["pass"], row["part"]): float(row["median_ms"]) for row in rows}
        assert {("forward", part) for _, _, part in benchmark_parts.PARTS[:6]} <= found.keys()
        for direction in benchmark_parts.PASSES:
            parts = sum(ms for (d, part), ms in found.items() if d == direction and "alone" not in part)
            assert parts == pytest.approx(2 * found[direction, "whole"], rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("case", sanitize.CASES)
def test_what_the_sanitizer_watches_runs_on_a_gpu(case):
    o, want = (sanitize.run(**sanitize.CASES[case], backend=backend).float() for backend in ("triton", "reference"))
    assert (o - want).norm() <= 0.1 * want.norm()  # near-equal blocks may be swapped
    if "decoding" in case:
        o, want = (sanitize.append(**sanitize.CASES[case], backend=x).float() for x in ("triton", "reference"))
        assert (o - want).norm() <= 0.01 * want.norm()
