# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole suite: no network, one thread per worker, GPU tests only where there is a GPU."""

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    # Read when triton is first imported: kernel tests run in its interpreter on a CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def leave_memory_to_others():
    """Workers share a GPU: what a test has freed is the others' too."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture
def half_a_gpu():
    """Waits for 40 GiB, one test at a time; without them in ten minutes, the test runs out of memory and says so."""
    with FileLock(Path(tempfile.gettempdir()) / "nsa-half-a-gpu.lock"):
        start = time.monotonic()
        while torch.cuda.mem_get_info()[0] < 40 * 2**30 and time.monotonic() - start < 600:
            time.sleep(1)
        yield
