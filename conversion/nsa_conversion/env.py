# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What is installed, what hardware there is, and which implementation of the sparse layers will run, and why."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from nsa_conversion.parsing import Parser

__all__ = ["environment", "main"]

PACKAGES = (
    "nsa-transformers",
    "torch",
    "transformers",
    "triton",
    "huggingface_hub",
    "safetensors",
    "accelerate",
    "peft",
    "datasets",
    "gguf",
    "matplotlib",
)


def environment() -> dict:
    """Describe this machine.

    Returns:
        `python`, `platform`, `packages` (name -> version or None), `devices` (name, compute capability and GiB of each
        CUDA device), `cuda` (version that torch was built for, or None) and `backends`: device -> `{"auto": what
        nsa_backend="auto" runs, "triton": why the kernels cannot run, or None, "configurations": how they are launched,
        or None}`.
    """
    import torch

    from nsa_kernels.availability import triton_error
    from nsa_kernels.interface import resolve_backend

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = round(properties.total_memory / 2**30, 1)
        devices.append({"name": properties.name, "capability": capability, "memory_gib": memory})
    names = ["cpu", *(f"cuda:{index}" for index in range(len(devices)))]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "devices": devices,
        "backends": {
            name: {
                "auto": resolve_backend("auto", torch.empty(1, 1, 1, 1, device=name)),
                "triton": (error := triton_error(name)),
                "configurations": None if error or name == "cpu" else _configurations(int(name.partition(":")[2])),
            }
            for name in names
        },
    }


def _configurations(device):
    """Whether launch configurations are built in or measured on this kind of GPU."""
    from nsa_kernels import tuning

    try:
        count = sum(map(len, tuning.stored(device).values()))
    except ValueError as error:
        return f"error: {error}"
    return f"{count} measured, in {tuning.cache_path()}; else built in" if count else "built in"


def _text(found):
    rows = {"python": f"{found['python']} ({sys.executable})", "platform": found["platform"]}
    rows |= {name: number or "not installed" for name, number in found["packages"].items()}
    rows["CUDA of torch"] = found["cuda"] or "none, a CPU build"
    for index, device in enumerate(found["devices"]):
        rows[f"cuda:{index}"] = (
            f"{device['name']}, compute capability {device['capability']}, {device['memory_gib']} GiB"
        )
    for name, backend in found["backends"].items():
        reason = f"; kernels: {backend['triton']}" if backend["triton"] else "; the kernels can run"
        rows[f"sparse layers on {name}"] = f"{backend['auto']}{reason}"
        if backend["configurations"]:
            rows[f"kernels on {name}"] = f"configurations: {backend['configurations']}"
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def main(argv: list[str]) -> int:
    """Command line of `nsa env`.

    Args:
        argv: arguments after `nsa env`.

    Returns:
        The exit code.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    found = environment()
    print(json.dumps(found, indent=2) if args.json else _text(found))
    return 0


def _parser():
    parser = Parser(prog="nsa env", description="Versions, devices, and which implementation of NSA will run and why.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
