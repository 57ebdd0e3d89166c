# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Turn a full-attention checkpoint into an NSA checkpoint whose logits start out equal.

Weights are streamed: one source file is open and at most one output file is in memory. Everything is written into
`DEST.partial-<pid>` and renamed at the end, so DEST is either whole or not there.
"""

import argparse
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nsa_conversion.card import write_card
from nsa_conversion.errors import NSAError, listing
from nsa_conversion.key_map import (
    NEW_PARAMETERS,
    build_key_map,
    check_source_keys,
    config_kwargs,
    parse_layers,
)
from nsa_conversion.parsing import Parser

__all__ = ["CARRIED_FILES", "NSA_SETTINGS", "ConversionReport", "Prepared", "convert", "main", "prepare"]

# name of the NSAConfig field and of the flag: (type, what it is)
NSA_SETTINGS = {
    "compress_block_size": (int, "l: tokens pooled into one compressed key/value"),
    "compress_stride": (int, "d: distance between two compression blocks; divides l and l'"),
    "compress_type": (("mean", "mlp", "residual_mlp", "pool"), "φ: how a block is compressed"),
    "compress_hidden_size": (int, "hidden size of φ's MLP (2·head_dim if not given)"),
    "select_block_size": (int, "l': tokens in one selectable block"),
    "num_selected_blocks": (int, "n: blocks a query attends to, the forced ones included"),
    "num_initial_blocks": (int, "forced blocks at the start of the sequence"),
    "num_local_blocks": (int, "forced blocks at the query's own position"),
    "window_size": (int, "w: tokens of the window branch"),
    "shared_kv": (bool, "one K/V pair for the three branches instead of one each"),
    "gate_hidden_size": (int, "hidden size of the gates' MLP (2·head_dim if not given)"),
    "gate_scale": (bool, "scale the gates so that the start is exact (default); without, all are 1/2 at the start"),
    "nsa_backend": (("auto", "triton", "reference"), "implementation of the sparse layers"),
}
# what a converted model takes over from its source
CARRIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
_PROBE = "The quick brown fox: 3,141.59 – naïve café,\n\tdef f(x):  return x**2  # 你好, мир! 🙂"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Prepared:
    """A conversion that has passed every check that needs no weights to be read.

    Attributes:
        source (nsa_conversion.sources.Source): where the dense checkpoint is.
        config (NSAConfig): of the converted model.
        dtype (str): of the converted model, e.g. `"bfloat16"`.
        cast (bool): `dtype` was asked for; otherwise tensors are copied as stored.
        reader (object | None): of `open_tensors`; None if the weights are not on this machine or need loading first.
        ignored (frozenset[str]): source keys left out by rule.
    """

    source: object
    config: object
    dtype: str
    cast: bool
    reader: object | None = field(repr=False)
    ignored: frozenset[str]


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did.

    Attributes:
        source (str), dest (str): as given, and where the converted model lies.
        plan (nsa_conversion.plan.Plan): parameter counts, cache bytes, FLOPs.
        files (tuple[str, ...]): everything in `dest`.
        total_bytes (int): of the weights.
        tokenizer (bool): the source had a tokenizer; it is in `dest` and gives the same tokens.
        seconds (float): wall time.
    """

    source: str
    dest: str
    plan: object
    files: tuple[str, ...]
    total_bytes: int
    tokenizer: bool
    seconds: float

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self):
        lines = [
            str(self.plan),
            "",
            f"Wrote {self.dest} in {self.seconds:.1f} s ({self.total_bytes / 1e6:,.1f} MB of weights).",
        ]
        if not self.tokenizer:
            lines.append("The source has no tokenizer, so neither has the converted model.")
        return "\n".join(lines)


def prepare(
    source,
    *,
    full_attention_layers: str | int | Iterable[int] | None = None,
    convert_sliding: bool = False,
    dtype=None,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    weights: bool = True,
    **nsa_settings,
) -> Prepared:
    """Check everything that can be checked before weights are copied.

    Args:
        source, full_attention_layers, convert_sliding, dtype, revision, allow_pickle, trust_remote_code, nsa_settings:
            as for `convert`.
        weights (bool): False neither downloads weights nor dequantises a GGUF file.

    Returns:
        Prepared: what `convert` continues from.

    Raises:
        NSAError: whatever is wrong with the request or the source.
    """
    from huggingface_hub.errors import StrictDataclassError

    from modeling_nsa import NSAConfig
    from nsa_conversion.sources import open_tensors, parse_dtype, resolve

    _check_names(nsa_settings)
    nsa_settings = {name: value for name, value in nsa_settings.items() if value is not None}
    if full_attention_layers is not None:
        several = isinstance(full_attention_layers, Iterable) and not isinstance(full_attention_layers, str)
        given = full_attention_layers if several else [full_attention_layers]
        full_attention_layers = parse_layers(",".join(map(str, given)))
    if dtype is not None:
        dtype = str(parse_dtype(dtype)).removeprefix("torch.")

    def build(source_config, **changes):
        backbone = config_kwargs(
            source_config, full_attention_layers=full_attention_layers or (), convert_sliding=convert_sliding
        )
        try:
            config = NSAConfig(**backbone | changes, **{"gate_scale": True} | nsa_settings)
        except (ValueError, StrictDataclassError) as error:  # the latter wraps the error that says what is wrong
            raise NSAError(str(error.__cause__ or error)) from error
        _check_known(config)
        return config

    found = resolve(
        source,
        revision=revision,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        weights=weights,
        accept=build,
    )
    config = build(found.config)
    reader, ignored = None, set()
    if found.kind == "gguf":
        ignored = check_source_keys(found.gguf_tensors, build_key_map(config), tied=config.tie_word_embeddings)
    if found.weight_files and (weights or found.kind != "gguf"):
        reader = open_tensors(found)
        if config.tie_word_embeddings and _stores_another_head(reader):
            # As transformers does on loading: two different stored tensors are not tied.
            config = build(found.config, tie_word_embeddings=False)
        ignored = check_source_keys(reader.specs, build_key_map(config), tied=config.tie_word_embeddings)
        _check_shapes(reader.specs, config, ignored)
    stored = found.config.dtype
    if stored is None:
        stored = reader.specs["model.embed_tokens.weight"].dtype if reader is not None else "float32"
    chosen = dtype or ("float32" if found.kind == "gguf" else str(stored).removeprefix("torch."))
    config.dtype = chosen
    return Prepared(found, config, chosen, dtype is not None, reader, frozenset(ignored))


def _check_names(nsa_settings):
    if unknown := sorted(set(nsa_settings) - set(NSA_SETTINGS)):
        raise NSAError(f"unknown settings {listing(unknown)}; the NSA settings are {', '.join(NSA_SETTINGS)}.")


def _check_known(config):
    """Refuse names that no model can be built with."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = config.rope_parameters.get("rope_type", "default")
    for name, value, known in (
        ("hidden_act", config.hidden_act, list(ACT2FN)),
        ("rope_type", rope_type, ["default", *ROPE_INIT_FUNCTIONS]),
    ):
        if value not in known:
            raise NSAError(
                f"the source's configuration has {name} {value!r}, which transformers does not know; it must be one of "
                f"{listing(known, 40)}."
            )


def _stores_another_head(reader):
    import torch

    names = ("model.embed_tokens.weight", "lm_head.weight")
    return all(name in reader.specs for name in names) and not torch.equal(*map(reader.get, names))


def _check_shapes(specs, config, ignored):
    """Every stored tensor has the shape of the parameters it goes to, and every parameter has a rule."""
    from nsa_conversion.plan import parameter_shapes

    shapes, key_map = parameter_shapes(config), build_key_map(config)
    wrong = [
        f"{key} has {list(spec.shape)} instead of {list(shapes[name])}"
        for key, spec in specs.items()
        if key not in ignored
        for name in key_map[key][:1]
        if tuple(shapes[name]) != spec.shape
    ]
    if wrong:
        raise NSAError(f"the source's tensors do not fit its configuration: {listing(wrong, 6)}.")
    filled = {name for names in key_map.values() for name in names}
    unfilled = sorted(name for name in set(shapes) - filled if not _is_new(name))
    assert not unfilled, f"no rule fills {unfilled}"
    assert filled <= set(shapes), f"the model lacks {filled - set(shapes)}"


def _is_new(name):
    match = re.fullmatch(r"model\.layers\.\d+\.self_attn\.(.+)", name)
    return match is not None and match[1].startswith(NEW_PARAMETERS)


def convert(
    source,
    dest,
    *,
    full_attention_layers: str | int | Iterable[int] | None = None,
    convert_sliding: bool = False,
    dtype=None,
    seed: int = 0,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    max_shard_size: int | str = "2GB",
    remote_code: bool = True,
    progress: bool = True,
    **nsa_settings,
) -> ConversionReport:
    """Convert a dense checkpoint; up to n·l' tokens the converted model computes the source's logits.

    Args:
        source (str | Path): a directory, a hub id or a .gguf file of a Llama, Mistral, Qwen2, Qwen3, SmolLM3 or Gemma 3
            text model.
        dest (str | Path): directory to create; must not exist or be empty, nor be the working directory.
        full_attention_layers (str | int | Iterable[int] | None): dense layers, e.g. `"0,5,20-23"`; default none.
        convert_sliding (bool): make the source's sliding-window layers native sparse; otherwise they stay as they are.
        dtype (str | torch.dtype | None): of the weights; the source's by default, float32 for a GGUF file.
        seed (int): for the new parameters that do not start at zero.
        revision (str | None): branch, tag or commit of a hub id.
        allow_pickle (bool): read `pytorch_model.bin` (with `weights_only=True`) where there are no safetensors.
        trust_remote_code (bool): accept a source that brings its own Python code.
        max_shard_size (int | str): largest weight file, in bytes or like `"2GB"`; also bounds the memory used.
        remote_code (bool): put the model's code beside the weights, for `trust_remote_code=True` elsewhere.
        progress (bool): show a progress bar on stderr.
        **nsa_settings: `NSAConfig` fields: the keys of `NSA_SETTINGS`.

    Returns:
        ConversionReport: what was written.

    Raises:
        NSAError: whatever is wrong with source, dest or settings; the disk is full. Nothing is left behind.
        OSError: anything else the file system refuses.
    """
    start = time.perf_counter()
    _check_names(nsa_settings)
    dest = _place(source, dest)
    limit = _parse_size(max_shard_size)
    prepared = prepare(
        source,
        full_attention_layers=full_attention_layers,
        convert_sliding=convert_sliding,
        dtype=dtype,
        revision=revision,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        **nsa_settings,
    )
    writer = _Writer(prepared, seed, limit)
    partial = dest.with_name(f"{dest.name}.partial-{os.getpid()}")
    new_parents = [parent for parent in partial.parents if not parent.exists()]
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process that had the same number
        partial.mkdir(parents=True)
        if (free := shutil.disk_usage(partial).free) < writer.total_bytes:
            raise OSError(errno.ENOSPC, f"{free / 1e9:.2f} GB are free")
        prepared.config.architectures = ["NSAForCausalLM"]
        prepared.config.save_remote_code = remote_code
        prepared.config.save_pretrained(partial)
        tokenizer = _carry_over(prepared.source, partial)
        writer.write(partial, progress)
        _write_json(partial / "nsa_conversion.json", _provenance(prepared, seed, writer))
        write_card(partial, repo_id=dest.name)
        files = tuple(sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()))
        if dest.exists():  # empty, checked above
            dest.rmdir()
        os.replace(partial, dest)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if _is_disk_full(error):
            raise NSAError(
                f"no space left for {str(dest)!r}: the converted weights need {writer.total_bytes / 1e9:.2f} GB. "
                "Free some space or choose another place; nothing was left behind."
            ) from error
        raise
    from nsa_conversion.plan import plan_for

    return ConversionReport(
        source=str(source),
        dest=str(dest),
        plan=plan_for(prepared.source, prepared.config, prepared.dtype),
        files=files,
        total_bytes=writer.total_bytes,
        tokenizer=tokenizer,
        seconds=time.perf_counter() - start,
    )


def check_dest(dest):
    """Refuse a place that is a file or a directory with something in it."""
    if dest.exists() and not dest.is_dir():
        raise NSAError(f"dest {str(dest)!r} exists and is not a directory.")
    if dest.is_dir() and any(dest.iterdir()):
        raise NSAError(f"dest {str(dest)!r} exists and is not empty; choose another place or empty it first.")


def _place(source, dest):
    """Where to write, links followed; refuses what cannot become a directory of its own."""
    dest, source = Path(dest).expanduser().resolve(), Path(source).expanduser().resolve()
    check_dest(dest)
    if dest == Path.cwd():
        raise NSAError(f"dest {str(dest)!r} is the working directory, which cannot be replaced; name one to create.")
    if source.is_dir() and dest.is_relative_to(source):
        raise NSAError(f"dest {str(dest)!r} lies inside the source {str(source)!r}; choose another place.")
    return dest


def _parse_size(size):
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", size.upper())
        number = int(float(match[1]) * _UNITS.get(match[2], 1)) if match else 0
    else:
        number = int(size)
    if number <= 0:
        raise NSAError(f"max_shard_size must be a positive number of bytes or like '2GB', got {size!r}.")
    return number


def _is_disk_full(error):
    # safetensors reports the operating system's error as text only.
    return getattr(error, "errno", None) == errno.ENOSPC or (
        type(error).__name__ == "SafetensorError" and f"os error {errno.ENOSPC})" in str(error)
    )


class _Writer:
    """Streams the tensors of a prepared conversion into safetensors files of bounded size."""

    def __init__(self, prepared, seed, limit):
        from nsa_conversion.plan import parameter_shapes

        self.prepared, self.seed = prepared, seed
        self.config, self.reader = prepared.config, prepared.reader
        self.key_map = build_key_map(self.config)
        shapes = parameter_shapes(self.config)
        self.new_names = {}
        for name in filter(_is_new, shapes):
            self.new_names.setdefault(int(name.split(".")[2]), []).append(name)
        # Which file each tensor goes to is known from shapes alone, so the file names can carry the file count.
        self.shard_of, sizes = {}, [0]
        for name, key in self._order():
            dtype = self._dtype(key)
            size = shapes[name].numel() * dtype.itemsize
            if sizes[-1] and sizes[-1] + size > limit:
                sizes.append(0)
            sizes[-1] += size
            self.shard_of[name] = len(sizes) - 1
        assert set(self.shard_of) == set(shapes), "every parameter is written exactly once"
        self.total_bytes, self.shards = sum(sizes), len(sizes)
        self.total_parameters = sum(shape.numel() for shape in shapes.values())

    def _dtype(self, key):
        from nsa_conversion.sources import parse_dtype

        if key is None or self.prepared.cast:
            return parse_dtype(self.prepared.dtype)
        return parse_dtype(self.reader.specs[key].dtype)

    def _order(self) -> Iterator[tuple[str, str | None]]:
        """`(parameter, source key or None)` in the order of writing: a layer's new parameters follow its q_proj."""
        for key in self.reader.specs:
            if key in self.prepared.ignored:
                continue
            for name in self.key_map[key]:
                yield name, key
            if key.endswith(".self_attn.q_proj.weight"):
                for name in self.new_names.get(int(key.split(".")[2]), ()):
                    yield name, None

    def file_name(self, shard):
        return "model.safetensors" if self.shards == 1 else f"model-{shard + 1:05d}-of-{self.shards:05d}.safetensors"

    def write(self, directory, progress):
        from tqdm.auto import tqdm

        buffer, current = {}, 0
        with tqdm(total=self.total_bytes, unit="B", unit_scale=True, desc="Converting", disable=not progress) as bar:
            for name, tensor in self._tensors():
                if self.shard_of[name] != current:
                    self._flush(directory, current, buffer)
                    current = self.shard_of[name]
                buffer[name] = tensor
                bar.update(tensor.nbytes)
            self._flush(directory, current, buffer)
        if self.shards > 1:
            index = {
                "metadata": {"total_size": self.total_bytes, "total_parameters": self.total_parameters},
                "weight_map": {name: self.file_name(shard) for name, shard in sorted(self.shard_of.items())},
            }
            _write_json(directory / "model.safetensors.index.json", index)

    def _flush(self, directory, shard, buffer):
        from safetensors.torch import save_file

        path = directory / self.file_name(shard)
        save_file(buffer, path, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", path)  # safetensors makes files that only their owner can read
        buffer.clear()

    def _tensors(self):
        import torch

        for key, tensor in self.reader.tensors():
            if key in self.prepared.ignored:
                continue
            dtype = self._dtype(key)
            for name in self.key_map[key]:
                # A fresh tensor each time: a file may not hold views of one storage.
                copy = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
                if dtype == torch.float16 != tensor.dtype and not torch.isfinite(copy).all():
                    raise NSAError(f"{key} has values too large for float16; use --dtype bfloat16 or float32.")
                yield name, copy
            if key.endswith(".self_attn.q_proj.weight") and (layer := int(key.split(".")[2])) in self.new_names:
                yield from self._new_parameters(layer)

    def _new_parameters(self, layer):
        """The stated rule of `init_nsa_parameters`, with a seed of its own for each layer."""
        import torch

        from modeling_nsa.attention_nsa import NSAAttention, init_nsa_parameters

        dtype = self._dtype(None)
        with torch.device("meta"):
            attention = NSAAttention(self.config, layer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 100_003 + layer)
            for child in NEW_PARAMETERS:  # only these are allocated; the copied projections stay on meta
                module = getattr(attention, child.rstrip("."))
                if module is None:  # no gate scales
                    continue
                module = module.to_empty(device="cpu")
                for parameter in module.parameters():
                    torch.nn.init.constant_(parameter, float("nan"))
                init_nsa_parameters(module, self.config.initializer_range)
        state = attention.state_dict()
        for name in self.new_names[layer]:
            tensor = state[name.split(".self_attn.", 1)[1]]
            assert tensor.isfinite().all(), f"no initialisation rule covers {name}"
            yield name, tensor.to(dtype, copy=True)


def _carry_over(source, directory) -> bool:
    """Copy tokenizer, chat template and generation config; True if there is a tokenizer."""
    from nsa_conversion.sources import load_tokenizer

    tokenizer = load_tokenizer(source)
    if source.kind == "gguf":
        from transformers import GenerationConfig

        GenerationConfig.from_model_config(source.config).save_pretrained(directory)
    else:
        patterns = (*CARRIED_FILES, "tokenization_*.py") if source.trust_remote_code else CARRIED_FILES
        found = {path for pattern in patterns for path in source.directory.glob(pattern) if path.is_file()}
        for path in sorted(found):
            target = directory / path.relative_to(source.directory)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    if tokenizer is None:
        return False
    # AutoTokenizer may choose by model type; where the copied files alone read differently, save what was read.
    if source.kind == "gguf" or not _same_tokens(tokenizer, directory, source):
        tokenizer.save_pretrained(directory)
        if not _same_tokens(tokenizer, directory, source):
            raise NSAError(f"the tokenizer of {source.name!r} gives other tokens once it is saved beside an NSA model.")
    return True


def _same_tokens(tokenizer, directory, source):
    from transformers import AutoTokenizer

    try:
        copy = AutoTokenizer.from_pretrained(directory, trust_remote_code=source.trust_remote_code)
    except Exception:  # whatever the reason, the copied files do not stand alone
        return False
    return copy(_PROBE)["input_ids"] == tokenizer(_PROBE)["input_ids"] and copy.chat_template == tokenizer.chat_template


def _provenance(prepared, seed, writer):
    source, config = prepared.source, prepared.config
    versions = {}
    for package in ("nsa-transformers", "transformers", "torch", "safetensors", "huggingface_hub"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "source": {
            "name": source.name,
            "format": source.kind,
            "model_type": source.config.model_type,
            "revision": source.revision,
            "license": source.license,
            "base_model": source.base_model,
            "sha256": source.sha256(),
            "keys_left_out": sorted(prepared.ignored),
        },
        "nsa": {name: getattr(config, name) for name in NSA_SETTINGS},
        "layer_types": list(config.layer_types),
        "dtype": prepared.dtype,
        "seed": seed,
        "total_size": writer.total_bytes,
        "versions": {"python": sys.version.split()[0], **versions},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _write_json(path, data):
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _parser():
    parser = Parser(
        prog="nsa convert",
        description="Turn a full-attention checkpoint into an NSA model with equal logits up to n·l' tokens.",
        epilog="Flags may be written with dashes or underscores.",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a directory, a hub id (owner/name) or a .gguf file")
    add("dest", metavar="DEST", nargs="?", help="directory to create (not needed with --dry-run)")
    sizes = parser.add_argument_group("NSA settings (the paper's sizes by default)")
    for name, (kind, text) in NSA_SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            sizes.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(kind, tuple):
            sizes.add_argument(flag, choices=kind, help=text)
        else:
            sizes.add_argument(flag, type=kind, metavar="N", help=text)
    add("--full-attention-layers", metavar="LIST", help="layers that stay dense, e.g. 0,5,20-23 (default: none)")
    add("--convert-sliding", action="store_true", help="make sliding-window layers native sparse too")
    add("--dtype", help="float32, bfloat16 or float16 (default: the source's; float32 for GGUF)")
    add("--seed", type=int, default=0, help="for the new parameters that do not start at zero")
    add("--max-shard-size", default="2GB", help="largest weight file (default 2GB); bounds the memory used")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--allow-pickle", action="store_true", help="read pytorch_model.bin (weights_only) if there is nothing else")
    add("--trust-remote-code", action="store_true", help="accept a source that brings its own Python code")
    add("--no-remote-code", action="store_true", help="leave out the model's code, which trust_remote_code=True needs")
    add("--dry-run", action="store_true", help="print the plan (parameters, KV cache, FLOPs) and stop")
    add("--json", action="store_true", help="print the plan or report as JSON")
    add("--verify", action="store_true", help="load both models, compare logits and loss by position")
    add("--verify-text", metavar="FILE", help="text for --verify (default: built-in English)")
    add("--verify-length", type=int, metavar="T", help="tokens of the loss comparison (default 4·n·l')")
    add("--no-progress", action="store_true", help="no progress bar")
    return parser


@contextlib.contextmanager
def _terminate_as_interrupt():
    """A polite kill cleans up as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: list[str]) -> int:
    """Run `nsa convert`.

    Args:
        argv (list[str]): the arguments after `nsa convert`.

    Returns:
        int: 0; 1 if --verify finds logits that are not equal where they should be (see `VerifyReport.exact`).

    Raises:
        NSAError, OSError: as `convert` and `verify`.
    """
    args = _parser().parse_args(argv)
    settings = {name: getattr(args, name) for name in NSA_SETTINGS}
    for name in (
        "full_attention_layers",
        "convert_sliding",
        "dtype",
        "revision",
        "allow_pickle",
        "trust_remote_code",
    ):
        settings[name] = getattr(args, name)
    if args.dest is None and not args.dry_run:
        raise NSAError("DEST is required (only --dry-run can do without).")
    if args.verify_text is not None and not Path(args.verify_text).is_file():
        raise NSAError(f"--verify-text must be an existing text file, got {args.verify_text!r}.")
    text = None
    if args.verify_text is not None:
        from nsa_conversion.data import read_text

        text = read_text(args.verify_text)
    if args.verify_length is not None and args.verify_length < 2:
        raise NSAError(f"--verify-length must be at least 2 tokens, got {args.verify_length}.")
    if args.dest is not None:
        _place(args.source, args.dest)
    if args.dry_run:
        from nsa_conversion.plan import plan

        result = plan(args.source, **settings)
        print(json.dumps(result.to_dict(), indent=2) if args.json else result)
        return 0
    with _terminate_as_interrupt():
        report = convert(
            args.source,
            args.dest,
            seed=args.seed,
            max_shard_size=args.max_shard_size,
            remote_code=not args.no_remote_code,
            progress=not args.no_progress,
            **settings,
        )
    output = report.to_dict()
    if not args.json:
        print(report)
    exact = True
    if args.verify:
        from nsa_conversion.verify import verify

        check = verify(
            args.source,
            report.dest,
            text=text,
            length=args.verify_length,
            revision=args.revision,
            allow_pickle=args.allow_pickle,
            trust_remote_code=args.trust_remote_code,
            progress=not args.no_progress,
        )
        exact = check.exact
        output["verify"] = check.to_dict()
        if not args.json:
            print(f"\n{check}")
    if args.json:
        print(json.dumps(output, indent=2))
    return 1 if exact is False else 0
