# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Whether the Triton kernels can run here; imports nothing of Triton's."""

import importlib.util
import os

import torch

__all__ = ["triton_error"]

# searched for once: torch.compile cannot trace the search
_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_error(device: torch.device | str | None = None) -> str | None:
    """Reason why the Triton kernels cannot run, or None if they can.

    They need Triton and either a CUDA device of compute capability 8.0 or newer, or Triton's interpreter, which runs on
    the CPU and is chosen by `TRITON_INTERPRET=1` in the environment before Triton is first imported.

    Args:
        device: Where the inputs lie; default: the current CUDA device.

    Returns:
        A sentence for an error message, or None.
    """
    if not _INSTALLED:
        return "Triton is not installed; install it with `pip install triton`."
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return (
            "no CUDA device is available; on a CPU the kernels run only in Triton's interpreter (TRITON_INTERPRET=1)."
        )
    if device is not None and torch.device(device).type != "cuda":
        return f"the inputs are on {torch.device(device)}, and the kernels run on CUDA devices."
    found = torch.cuda.get_device_properties(device)  # which torch.compile takes for a constant
    if found.major < 8:
        return f"the kernels need compute capability 8.0 or newer, and this device has {found.major}.{found.minor}."
    return None
