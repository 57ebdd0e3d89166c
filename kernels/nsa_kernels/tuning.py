# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of the Triton kernels: built in, or what `nsa_kernels.tune` measured on this kind of GPU.

Every kernel has a function beside it that gives its built-in configuration by shape, and a short list of others to try
(`tunable`). Nothing is measured at a launch. The first launch of a process reads the file that `nsa_kernels.tune`
writes, `NSA_KERNELS_CACHE` or `~/.cache/nsa_kernels/tuning.json`, and takes from it what was found for this GPU, this
version of Triton and this shape; `NSA_KERNELS_TUNING=0` in the environment keeps to the built-in configurations.
"""

import functools
import inspect
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["TUNABLES", "Tunable", "cache_path", "forget", "machine", "read_cache", "stored", "tunable"]

# Configurations of every kernel that has been imported, by name.
TUNABLES: dict[str, "Tunable"] = {}
# fp32 values of its accumulators that a thread can hold beside addresses and operands, of 255 registers.
_MAX_HELD = 200


class Tunable:
    """The configurations of one kernel; called with a device's index and a shape, it gives the one to launch with.

    Args:
        built_in: Gives the built-in configuration; its arguments are the shape, without the number of tokens.
        name: Name in the cache.
        candidates: Others to try, values in the order of the built-in configuration's.
        held, streamed, accumulated: Tiles that a program keeps, loads ahead in its loop, and sums up in fp32; names in
            one string: q and o have BLOCK_M rows, k and v BLOCK_N, and s is BLOCK_M times BLOCK_N.
        valid: Whether a configuration is right for a shape; called with it and the shape's arguments by name.
    """

    def __init__(self, built_in, name, candidates, held, streamed, accumulated, valid=None):
        self.built_in, self.name, self.candidates = built_in, name, candidates
        self.tiles = tuple(x.split() for x in (held, streamed, accumulated))
        self.valid = valid
        self.names = tuple(inspect.signature(built_in).parameters)
        self.chosen = {}
        functools.update_wrapper(self, built_in)

    def __call__(self, device: int, *shape) -> dict:
        """Configuration for the CUDA device of this index, -1 for a CPU; not to be changed by the caller."""
        config = self.chosen.get((device, *shape))
        return self._choose(device, shape) if config is None else config

    def _choose(self, device, shape):
        config = self.built_in(*shape)
        if device >= 0 and (found := stored(device).get(self.name, {}).get(self.label(shape))) is not None:
            config = next((x for x in self.listed(shape) if x == found), config)  # lists change between versions
        self.chosen[(device, *shape)] = config
        return config

    def label(self, shape: tuple) -> str:
        """A shape as the cache's key."""
        return " ".join(f"{name}={str(x).removeprefix('torch.')}" for name, x in zip(self.names, shape, strict=True))

    def listed(self, shape: tuple) -> list[dict]:
        """The built-in configuration and the candidates that are valid for a shape."""
        built_in, named = self.built_in(*shape), dict(zip(self.names, shape, strict=True))
        configs = [built_in]
        for values in self.candidates:
            config = dict(zip(built_in, values, strict=True))
            if config not in configs and (self.valid is None or self.valid(config, **named)):
                configs.append(config)
        return configs

    def fitting(self, shape: tuple, max_shared: int) -> list[dict]:
        """Those of `listed` that are worth a try and fit into registers and `max_shared` bytes of shared memory.

        Returns:
            The built-in configuration, then the others.
        """
        built_in, *others = self.listed(shape)
        return [built_in, *(config for config in others if self._fits(config, shape, max_shared))]

    def _fits(self, config, shape, max_shared):
        from .triton_common import split_head_dim

        named = {"DV": 0, **dict(zip(self.names, shape, strict=True)), **config}
        # fp32 products take far longer than the loads of their operands
        if (config["num_stages"] == 1) != (named["dtype"] == torch.float32):
            return False
        rows, keys = named["BLOCK_M"], named.get("BLOCK_N", 128)
        width, v_width = (sum(split_head_dim(named[name])) if named[name] else 0 for name in ("D", "DV"))
        sizes = {"q": rows * width, "o": rows * v_width, "k": keys * width, "v": keys * v_width, "s": rows * keys}
        held, streamed, accumulated = (sum(sizes[tile] for tile in tiles) for tiles in self.tiles)
        # the last stage of a loop may be in registers
        shared = (held + streamed * max(1, config["num_stages"] - 1)) * named["dtype"].itemsize
        return shared <= max_shared and accumulated <= _MAX_HELD * 32 * config["num_warps"]


def tunable(name: str, *candidates: tuple, **about) -> Callable:
    """Decorate a function that gives a kernel's built-in configuration by shape; see `Tunable`."""

    def decorate(built_in):
        TUNABLES[name] = Tunable(built_in, name, candidates, **about)
        return TUNABLES[name]

    return decorate


def cache_path() -> Path:
    """The file of measured configurations."""
    return Path(os.environ.get("NSA_KERNELS_CACHE") or "~/.cache/nsa_kernels/tuning.json").expanduser()


@functools.cache
def machine(device: int) -> str:
    """What measured configurations hold for: the GPU and the version of Triton."""
    import triton

    return f"{torch.cuda.get_device_name(device)}, Triton {triton.__version__}"


def stored(device: int) -> dict[str, dict[str, dict]]:
    """Measured configurations for a device, by kernel and shape; none where the environment switches them off."""
    return _read_once().get(machine(device), {})


def forget() -> None:
    """Read environment and file again at the next launch."""
    _read_once.cache_clear()
    for found in TUNABLES.values():
        found.chosen.clear()


@functools.cache
def _read_once():
    switch = os.environ.get("NSA_KERNELS_TUNING") or "1"
    if switch not in ("0", "1"):
        raise ValueError(
            "NSA_KERNELS_TUNING must be 0 (built-in configurations of the kernels) or 1 (measured ones where there are "
            f"any, the default), got {switch!r}."
        )
    try:
        return read_cache(cache_path()) if switch == "1" else {}
    except (OSError, ValueError) as error:
        warnings.warn(f"Kernels use their built-in configurations: {error}", stacklevel=2)
        return {}


def read_cache(path: Path) -> dict[str, dict[str, dict[str, dict]]]:
    """Measured configurations by machine, kernel and shape; none if there is no such file.

    Raises:
        ValueError: The file holds something else.
        OSError: It cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:  # no text, or no JSON
        found = None
    if not _nested(found, 4):
        raise ValueError(
            f"{path} is not a file that `python -m nsa_kernels.tune` wrote; remove it, or let NSA_KERNELS_CACHE name "
            "another one."
        )
    return found


def _nested(found, depth):
    """Whether `found` is made of dicts, so many deep."""
    return isinstance(found, dict) and (depth == 1 or all(_nested(x, depth - 1) for x in found.values()))
