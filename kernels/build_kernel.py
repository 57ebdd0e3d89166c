# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Lay the operations out as a kernel of the Hugging Face hub: `python kernels/build_kernel.py DIR`.

DIR becomes a kernel repository: kernel-builder reads `build.toml` and `torch-ext/`, the `kernels` library loads
`build/torch-<backend>/`. Nothing is compiled: Triton does that at the first call.

    kernels.get_local_kernel(Path("DIR")).nsa_attention(...)
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

__all__ = ["BACKENDS", "build"]

HERE = Path(__file__).resolve().parent
NAME, VERSION, LICENSE = "nsa-kernels", 1, "Apache-2.0"
# The Triton kernels run on CUDA devices, the reference everywhere.
BACKENDS = ("cuda", "cpu")
_BUILD_TOML = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{backends}]

[torch-noarch]
"""


def build(output: str | Path) -> list[Path]:
    """Write the kernel repository.

    Args:
        output: directory to create; must not exist or be empty.

    Returns:
        Every file written.

    Raises:
        ValueError: `output` is not empty.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} must be a directory that is new or empty; choose another one.")
    sources = sorted((HERE / "nsa_kernels").glob("*.py"))
    digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources)).hexdigest()[:8]
    module = NAME.replace("-", "_")
    for folder in (output / "torch-ext" / module, *(output / "build" / f"torch-{backend}" for backend in BACKENDS)):
        folder.mkdir(parents=True)
        for path in sources:
            shutil.copyfile(path, folder / path.name)
    for backend in BACKENDS:
        metadata = {
            "name": NAME,
            # the name of the module once it is loaded: other content, other name
            "id": f"_{module}_{backend}_{digest}",
            "version": VERSION,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": backend},
        }
        path = output / "build" / f"torch-{backend}" / "metadata.json"
        path.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    text = _BUILD_TOML.format(name=NAME, version=VERSION, license=LICENSE, backends=backends)
    (output / "build.toml").write_text(text, encoding="utf-8")
    shutil.copyfile(HERE.parent / "LICENSE", output / "LICENSE")
    return sorted(path for path in output.rglob("*") if path.is_file())


def main() -> int:
    """Command line of this script; returns the exit code."""
    parser = argparse.ArgumentParser(description="Lay the operations out as a kernel of the Hugging Face hub.")
    parser.add_argument("output", metavar="DIR", help="directory to create")
    args = parser.parse_args()
    try:
        files = build(args.output)
    except (ValueError, OSError) as error:
        print(f"build_kernel.py: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {len(files)} files to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
