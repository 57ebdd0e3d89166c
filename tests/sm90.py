# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Compile a Triton kernel for compute capability 9.0 without a GPU, and read what ptxas made of it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["MAX_SHARED", "compile_all"]

MAX_SHARED = 232448  # bytes a program may use: 227 KB
_ROOT = Path(__file__).parents[1]


def compile_all(module: str, jobs: list[dict], timeout: int = 300) -> list[dict]:
    """Compile kernels in a process of its own, because the interpreter's setting is read when Triton is imported.

    Args:
        module: Name of the module that holds the kernels, e.g. "nsa_kernels.compressed".
        jobs: For each kernel {"kernel": its name, "pointers": {argument: "bf16", ...}, "constants": {argument: value},
            "num_warps": int, "num_stages": int} and, if it takes any, "descriptors": {argument: "bf16[64,128]", ...}.
            Every other argument is an int32, or fp32 if its name is "scale".

    Returns:
        For each job {"registers", "spills" (bytes of local memory), "shared" (bytes), "wgmma" (whether it is used),
        "serialized" (whether every wgmma waits for the one before)}.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT / "kernels"), *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, module]
    run = subprocess.run(
        command, input=json.dumps(jobs), env=environment, capture_output=True, text=True, timeout=timeout
    )
    if run.returncode:
        raise RuntimeError(f"{module} does not compile for sm_90:\n{run.stderr[-4000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def _compile(module, kernel, pointers, constants, num_warps, num_stages, descriptors=None):
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = getattr(module, kernel)
    names = kernel.arg_names
    descriptors = descriptors or {}
    unknown = (pointers.keys() | constants.keys() | descriptors.keys()) - set(names)
    assert not unknown, f"{kernel.__name__} has no arguments {sorted(unknown)}"
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in descriptors:
            signature[name] = f"tensordesc<{descriptors[name]}>"
        elif name in pointers:
            signature[name] = "*" + pointers[name]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
            if name.startswith("stride"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {
        **_resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
    }


def _resources(cubin):
    """What `compile_all` returns, read from the machine code."""
    from triton.backends.nvidia import __file__ as backend

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(backend).parent / "bin" / "cuobjdump"

        def dump(what):
            return subprocess.run([tool, what, path], check=True, capture_output=True, text=True).stdout

        words, code = dump("--dump-resource-usage").replace(":", " ").split(), dump("--dump-sass")
    products = code.count("HGMMA")
    return {
        "registers": int(words[words.index("REG") + 1]),
        "spills": int(words[words.index("STACK") + 1]),
        "wgmma": products > 0,
        # ptxas lets products that it cannot keep under way together wait for each other, with a word to nobody
        "serialized": 0 < products <= code.count("WARPGROUP.ARRIVE"),
    }


if __name__ == "__main__":
    import importlib

    kernels = importlib.import_module(sys.argv[1])
    print(json.dumps([_compile(kernels, **job) for job in json.load(sys.stdin)]))
