# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Launch configurations: what a launch looks up, and what it ignores."""

import json
import warnings

import pytest
import torch

pytest.importorskip("triton")

import triton

from nsa_kernels import decode, tuning  # noqa: F401 - all kernels register their configurations

SHAPE = (torch.bfloat16, 128, 128, 16, 64)
LABEL = "dtype=bfloat16 D=128 DV=128 G=16 select_block_size=64"
FOUND = {"BLOCK_M": 64, "BLOCK_N": 32, "LATE": False, "num_warps": 4, "num_stages": 4}
GPU = f"Some GPU, Triton {triton.__version__}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The file of measured configurations, of a process that has not read it yet, on a machine with some GPU."""
    import nsa_kernels.selected  # noqa: F401

    path = tmp_path / "cache" / "tuning.json"
    path.parent.mkdir()
    monkeypatch.setenv("NSA_KERNELS_CACHE", str(path))
    monkeypatch.delenv("NSA_KERNELS_TUNING", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    tuning.machine.cache_clear()
    tuning.forget()
    yield path
    tuning.machine.cache_clear()
    tuning.forget()


def write(path, config=FOUND, *, machine=GPU, kernel="selected_forward", label=LABEL):
    path.write_text(json.dumps({machine: {kernel: {label: config}}}))


def forward():
    return tuning.TUNABLES["selected_forward"]


def test_a_measured_configuration_is_used_for_its_shape_alone(cache):
    write(cache)
    assert forward()(0, *SHAPE) == FOUND
    assert forward()(0, *SHAPE) is forward()(0, *SHAPE)
    for other in (
        (torch.float16, *SHAPE[1:]),
        (torch.bfloat16, 64, *SHAPE[2:]),
        (*SHAPE[:3], 4, 64),
        (*SHAPE[:4], 128),
    ):
        assert forward()(0, *other) == forward().built_in(*other)
    other = tuning.TUNABLES["selected_dq"]
    assert other(0, *SHAPE) == other.built_in(*SHAPE)


def test_a_cpu_takes_the_built_in_configuration(cache):
    write(cache)
    assert forward()(-1, *SHAPE) == forward().built_in(*SHAPE) != FOUND


def test_without_a_file_the_built_in_configuration_is_used_quietly(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert forward()(0, *SHAPE) == forward().built_in(*SHAPE)


@pytest.mark.parametrize("machine", ["Some GPU, Triton 2.0.0", f"Another GPU, Triton {triton.__version__}"])
def test_what_another_gpu_or_triton_measured_is_ignored(cache, machine):
    write(cache, machine=machine)
    assert forward()(0, *SHAPE) == forward().built_in(*SHAPE)


@pytest.mark.parametrize("config", [{**FOUND, "num_warps": 3}, {"BLOCK_M": 64}, {**FOUND, "BLOCK_N": 128}, {}])
def test_what_is_not_a_candidate_any_more_is_ignored(cache, config):
    write(cache, config)
    assert forward()(0, *SHAPE) == forward().built_in(*SHAPE)


def test_numbers_of_another_type_do_not_reach_a_kernel(cache):
    write(cache, {name: float(value) for name, value in FOUND.items()})
    assert all(isinstance(value, int) for value in forward()(0, *SHAPE).values())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": {"b": {"c": []}}}', "\udcff"])
def test_a_damaged_file_is_ignored_with_one_warning(cache, text):
    cache.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match=r"built-in configurations.*tuning.json"):
        found = forward()(0, *SHAPE)
    assert found == forward().built_in(*SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.TUNABLES["selected_dq"](0, *SHAPE)
        assert tuning.stored(0) == {}


def test_an_unreadable_file_is_ignored_with_a_warning(cache):
    cache.mkdir()
    with pytest.warns(UserWarning, match="built-in configurations"):
        assert forward()(0, *SHAPE) == forward().built_in(*SHAPE)


def test_the_switch_keeps_to_the_built_in_configurations(cache, monkeypatch):
    write(cache)
    monkeypatch.setenv("NSA_KERNELS_TUNING", "0")
    assert forward()(0, *SHAPE) == forward().built_in(*SHAPE)
    monkeypatch.setenv("NSA_KERNELS_TUNING", "1")  # read once
    assert forward()(0, *SHAPE) == forward().built_in(*SHAPE)
    tuning.forget()
    assert forward()(0, *SHAPE) == FOUND


def test_another_value_of_the_switch_is_refused(cache, monkeypatch):
    monkeypatch.setenv("NSA_KERNELS_TUNING", "yes")
    with pytest.raises(ValueError, match=r"NSA_KERNELS_TUNING must be 0 .* or 1 .*'yes'"):
        forward()(0, *SHAPE)


def test_the_cache_lies_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.delenv("NSA_KERNELS_CACHE", raising=False)
    assert str(tuning.cache_path()) == "/somewhere/.cache/nsa_kernels/tuning.json"


def test_no_shape_holds_a_number_of_tokens():
    known = {"dtype", "D", "DV", "G", "BLOCK_M", "compress_block_size", "compress_stride", "select_block_size"}
    from nsa_kernels.tune import KERNELS

    assert set(tuning.TUNABLES) == set(KERNELS)
    assert all(known >= set(found.names) for found in tuning.TUNABLES.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (192, 128), (256, 256)])
def test_few_candidates_are_left_that_fit(dims, dtype):
    given = {"dtype": dtype, "D": dims[0], "DV": dims[1], "G": 4, "BLOCK_M": 16}
    given |= {"compress_block_size": 32, "compress_stride": 16, "select_block_size": 64}
    for found in tuning.TUNABLES.values():
        shape = tuple(given[name] for name in found.names)
        fitting = found.fitting(shape, 232448)
        assert fitting[0] == found.built_in(*shape)
        assert 2 <= len(fitting) <= 10, found.name
        assert all(config in found.listed(shape) for config in fitting)
        assert found.fitting(shape, 0) == fitting[:1]


def test_candidates_that_do_not_fit_are_not_tried():
    forward, dkdv = (tuning.TUNABLES[f"compressed_{name}"] for name in ("forward", "dkdv"))
    shape = (torch.bfloat16, 256, 256, 4, 32, 16)
    assert all(config["num_warps"] == 8 for config in dkdv.fitting(shape, 232448) if config["BLOCK_N"] == 64)
    stages = [max(x["num_stages"] for x in forward.fitting(shape, size)) for size in (65536, 166912, 232448)]
    assert stages == [2, 3, 4]
    small = tuning.TUNABLES["selected_forward"].listed((torch.bfloat16, 64, 64, 4, 32))
    assert {config["BLOCK_N"] for config in small} == {16, 32}  # a tile is a part of a block


def test_a_lookup_costs_a_launch_next_to_nothing(cache):
    import timeit

    find = forward()
    find(0, *SHAPE)
    assert min(timeit.repeat(lambda: find(0, *SHAPE), number=1000, repeat=5)) < 5e-3  # 5 µs each, on slow machines too
