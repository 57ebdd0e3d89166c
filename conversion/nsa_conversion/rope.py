# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""A dense checkpoint whose RoPE is scaled, to convert from: for contexts that the source does not reach, or hardly."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .errors import NSAError

__all__ = ["check_yarn_factor", "scale_rope"]


def check_yarn_factor(factor: float) -> float:
    """The factor, if it is one.

    Raises:
        NSAError: not a number above 1.
    """
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not factor > 1:
        raise NSAError(f"the YaRN factor must be a number above 1, got {factor!r}")
    return float(factor)


def scale_rope(source: str | Path, dest: str | Path, factor: float, *, trust_remote_code: bool = False) -> Path:
    """Write a dense model with RoPE scaled by YaRN (arXiv 2309.00071) to `factor` times the positions of the source.

    The weights are the source's. `convert` takes the scaling over, and a scaled model is the teacher and the yardstick
    for what is converted from it.

    Args:
        source: a directory, a hub id or a .gguf file.
        dest: directory to create; it is either whole or not there.
        factor: above 1.
        trust_remote_code: allow the checkpoint's own Python code.

    Returns:
        `dest`.

    Raises:
        NSAError: a factor of 1 or less, a `dest` that is not empty, a model without RoPE, with a RoPE that is scaled
            already or differs between layers, or whatever `load_model` refuses.
    """
    from huggingface_hub import ModelCardData

    from .convert import check_dest
    from .sources import load_model, resolve

    factor, dest = check_yarn_factor(factor), Path(dest)
    check_dest(dest)
    found = resolve(source, trust_remote_code=trust_remote_code, weights=False)
    model, tokenizer = load_model(source, trust_remote_code=trust_remote_code)
    config = model.config
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        kind = "a RoPE per kind of layer" if isinstance(rope, dict) and rope else "no RoPE"
        raise NSAError(f"{source} has {kind} (rope_parameters {rope!r}); only a single one can be scaled")
    if rope.get("rope_type", "default") != "default":
        raise NSAError(f"the RoPE of {source} is scaled already ({rope['rope_type']}); give the model before that")
    length = config.max_position_embeddings
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    config.rope_parameters = {**rope, **scaling}
    config.max_position_embeddings = int(length * factor)
    partial = dest.with_name(f"{dest.name}.partial-{os.getpid()}")
    try:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.model_max_length = max(tokenizer.model_max_length, config.max_position_embeddings)
            tokenizer.save_pretrained(partial)
        about = ModelCardData(license=found.license, base_model=found.name if found.revision else found.base_model)
        text = f"RoPE scaled by YaRN, factor {factor:g}, from {length:,} positions; the weights are as they were."
        (partial / "README.md").write_text(f"---\n{about.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")
        if dest.is_dir():
            dest.rmdir()
        partial.rename(dest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return dest
