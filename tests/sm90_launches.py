# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Compile for compute capability 9.0, without a GPU, exactly the kernels that a piece of code would launch."""

import json
import os
import subprocess
import sys

__all__ = ["compile_launches"]


def compile_launches(code: str, timeout: int = 300) -> list[dict]:
    """Run code in a process of its own, where every kernel launch only compiles.

    Args:
        code: Python source; tensors lie on the CPU and nothing is computed.

    Returns:
        For each launch {"kernel", "warps", "shared" (bytes)} and what `sm90._resources` reads.
    """
    from sm90 import _ROOT

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT / "kernels"), *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, __file__], input=code, env=environment, capture_output=True, text=True, timeout=timeout
    )
    if run.returncode:
        raise RuntimeError(f"the kernels do not compile for sm_90:\n{run.stderr[-4000:]}")
    return json.loads(run.stdout.splitlines()[-1])


class _Driver:
    """Stands in for a GPU of compute capability 9.0."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def _main():
    from sm90 import _resources
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Driver())
    results = []

    def compile_only(kernel, grid):
        def launch(*args, **kwargs):
            compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            compiled = compiled.result() if hasattr(compiled, "result") else compiled
            resources = _resources(compiled.asm["cubin"])
            facts = {"warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared}
            results.append({"kernel": kernel.__name__, **resources, **facts})

        return launch

    JITFunction.__getitem__ = compile_only
    exec(sys.stdin.read(), {})
    print(json.dumps(results))


if __name__ == "__main__":
    _main()
