# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The model card: README.md beside a model, written from the records that lie there and from nothing else."""

import json
from collections import Counter
from pathlib import Path

from nsa_conversion.errors import NSAError

__all__ = ["base_model_of", "model_card", "write_card"]

# A card with this line is replaced by the next one; without it, the card is somebody's own text.
MARK = "<!-- Written by nsa from the records beside the model; remove this line to keep your changes. -->"
_PAPER = "[Native Sparse Attention](https://arxiv.org/abs/2502.11089)"
_SETTINGS = {
    "compress_block_size": "l, tokens pooled into one compressed key/value",
    "compress_stride": "d, tokens between two compressed keys",
    "select_block_size": "l', tokens of a selectable block",
    "num_selected_blocks": "n, blocks that a query attends to",
    "num_initial_blocks": "forced blocks at the start",
    "num_local_blocks": "forced blocks at the query",
    "window_size": "w, tokens of the window",
    "compress_type": "φ, how a block is compressed",
    "shared_kv": "one K/V pair for all branches",
}
# class of the model: its task on the hub and its Auto class
_TASKS = {
    "NSAForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "NSAForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "NSAForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "NSAForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "NSAModel": ("feature-extraction", "AutoModel"),
}
# what the card tells of nsa_finetune.json, by group of arguments
_ARGUMENTS = {
    "data": ("max_length", "full_rows", "repeat_share", "fact_share"),
    "lora": ("lora_r", "lora_alpha", "lora_dropout"),
    "stage": (
        "stage",
        "teacher",
        "next_token_weight",
        "distill_weight",
        "hidden_weight",
        "selector_weight",
        "selector_scope",
        "selector_queries",
        "selector_target",
        "new_parameter_lr",
        "anneal_blocks",
    ),
    "training": (
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "optim",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_steps",
        "bf16",
        "fp16",
        "seed",
    ),
}


class _Records:
    """The JSON files beside a model; None where one is not there or is not what this package writes."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.config = self._read("config.json")
        self.sparse = (self.config or {}).get("model_type") == "native_sparse_attention"
        self.adapter = self._read("adapter_config.json") if self.config is None else None
        self.conversion = self._read("nsa_conversion.json", "source", "versions")
        self.training = self._read("nsa_finetune.json", "report", "arguments")
        self.evaluation = self._read("eval.json")
        if self.config is None and self.adapter is None:
            raise NSAError(f"{self.directory} holds no model: neither config.json nor adapter_config.json is there")

    def _read(self, name, *keys):
        path = self.directory / name
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise NSAError(f"{path} is not valid JSON: {error}") from error
        known = isinstance(record, dict) and all(isinstance(record.get(key), dict) for key in keys)
        return record if known else None  # a file of another program or version

    def _origin(self):
        """What the model that was trained says of itself."""
        return (self.training or {}).get("origin") or {}

    def license(self):
        """That of the base model, where a record names it."""
        return (self.conversion or {"source": {}})["source"].get("license") or self._origin().get("license")

    def base_model(self):
        """Hub id of what the model was made from; the nearest one that a record names."""
        names = []
        if self.adapter:
            names.append(self.adapter.get("base_model_name_or_path"))
        if self.training:
            names.append(self.training["arguments"]["model"]["model"])
        if self.conversion:
            source = self.conversion["source"]
            names.append(source["name"] if source["revision"] else source.get("base_model"))  # only the hub has commits
        names.append(self._origin().get("base_model"))
        return next((found for name in names if name and (found := _hub_id(name))), None)


def _hub_id(name):
    """`owner/name` of a hub repository or of a file in one; None for a path of this machine."""
    parts = str(name).split("/")
    if str(name).startswith((".", "~")) or len(parts) not in (2, 3) or not all(parts) or Path(name).exists():
        return None
    return "/".join(parts[:2])


def _link(hub_id):
    return f"[{hub_id}](https://huggingface.co/{hub_id})"


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _range(bucket):
    return f"{bucket['start']:,}-{bucket['end'] - 1:,}"


def _introduction(records, base):
    if records.adapter:
        return f"A LoRA adapter for {_link(base) if base else 'a Native Sparse Attention model'}."
    config = records.config
    if not records.sparse:
        return f"A {config.get('model_type')} model{f', made from {_link(base)}' if base else ''}."
    return (
        f"A {_PAPER} model: every query reads compressed blocks of the whole past, the {config['num_selected_blocks']} "
        f"blocks of {config['select_block_size']} tokens that score best, and the last {config['window_size']} tokens."
    )


def _usage(records, where, auto_class, code):
    if records.adapter:
        lines = [
            "from peft import AutoPeftModelForCausalLM",
            "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{where}", trust_remote_code=True)',
        ]
        about = "`trust_remote_code=True` runs the Python files of the base model's repository."
    else:
        trusted = records.sparse and (bool(records.config.get("auto_map")) if code is None else code)
        lines = [
            *(["import modeling_nsa  # registers the model type"] if records.sparse and not trusted else []),
            f"from transformers import {auto_class}, AutoTokenizer",
            "",
            f'model = {auto_class}.from_pretrained("{where}"{", trust_remote_code=True" if trusted else ""})',
            f'tokenizer = AutoTokenizer.from_pretrained("{where}"{", trust_remote_code=True" if trusted else ""})',
        ]
        if auto_class == "AutoModelForCausalLM":
            lines += [
                'inputs = tokenizer("Once upon a time", return_tensors="pt")',
                "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
            ]
        about = (
            "`trust_remote_code=True` runs the Python files of this repository, which need torch and transformers. "
            "Where the package `nsa-transformers` is installed, `import modeling_nsa` first and leave it out."
            if trusted
            else "The code is not in this repository: it is the package `nsa-transformers`."
        )
    return (
        "\n".join(["```python", *lines, "```"])
        + f"\n\n{about} On a CUDA device of compute capability 8.0 or newer the "
        "sparse layers run Triton kernels; elsewhere they run a slower PyTorch reference."
    )


def _attention(records):
    if not records.sparse:
        return None
    config = records.config
    rows = [[f"`{name}`", config[name], meaning] for name, meaning in _SETTINGS.items() if name in config]
    kinds = ", ".join(f"{count} × {kind}" for kind, count in Counter(config["layer_types"]).items())
    return _table(["setting", "value", "meaning"], [*rows, ["`layer_types`", kinds, ""]])


def _conversion(records):
    if not records.conversion:
        return None
    source, versions = records.conversion["source"], records.conversion["versions"]
    hub_id = _hub_id(source["name"]) if source["revision"] else None
    name = f"{_link(hub_id)} at commit {source['revision']}" if hub_id else f"`{Path(source['name']).name}`"
    used = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    hashes = [[file, f"`{digest}`"] for file, digest in source["sha256"].items()]
    return (
        f"Converted from {name} ({source['model_type']}, {source['format']}) on {records.conversion['date'][:10]} with "
        f"{used}.\n\n{_table(['file of the source', 'sha256'], hashes)}"
    )


def _training(records):
    if not records.training:
        return None
    report, groups = records.training["report"], records.training["arguments"]
    lora = groups["lora"]["lora"]
    stage = {name: value for name, value in groups.get("stage", {}).items() if value is not None}
    if "teacher" in stage:
        place = Path(stage["teacher"]).expanduser()
        stage["teacher"] = place.name if place.is_absolute() or place.exists() else stage["teacher"]
    groups = {**groups, "stage": stage}
    trained = "φ and its projections" if stage.get("stage") == "warmup" else "LoRA" if lora else "All weights"
    rows = [
        [f"`{name}`", groups[group][name]]
        for group, names in _ARGUMENTS.items()
        for name in names
        if name in groups[group] and (group != "lora" or lora)
    ]
    text = (
        f"{trained}, {report['steps']} steps; {report['train_tokens']:,} tokens in "
        f"{report['train_rows']:,} packed rows. Mean training loss {report['train_loss']:.4f}.\n\n"
        f"{_table(['argument', 'value'], rows)}"
    )
    if report["before"] and report["after"]:
        pairs = zip(report["before"], report["after"])
        rows = [[_range(before), f"{before['loss']:.4f}", f"{after['loss']:.4f}"] for before, after in pairs]
        text += f"\n\nLoss on held-out text, nats per token:\n\n{_table(['position', 'before', 'after'], rows)}"
    return text


def _evaluation(records):
    report = records.evaluation
    if not report:
        return None
    parts = []
    if report.get("positions"):
        dense = report.get("against_positions") or []
        rows = [[_range(bucket), f"{bucket['loss']:.4f}"] for bucket in report["positions"]]
        for row, bucket, other in zip(rows, report["positions"], dense):
            row += [f"{other['loss']:.4f}", f"{bucket['loss'] - other['loss']:+.4f}"]
        header = ["position", "this model", *(["dense model", "difference"] if dense else [])]
        parts.append(f"Loss by position, nats per token, {_text_of(report)}:\n\n{_table(header, rows)}")
    if report.get("retention"):
        rows = [
            [row["name"], _shown(row["length"], ","), _shown(row["dense"]), _shown(row["score"]), _kept(row)]
            for row in report["retention"]
        ]
        header = ["task", "tokens", "dense model", "this model", "kept (95 % interval)"]
        parts.append(f"Retrieval beside the dense model:\n\n{_table(header, rows)}")
    return "\n\n".join(parts) or None


def _text_of(report):
    return f"{report['slices']} × {report['length']:,} tokens of {Path(str(report['text'])).name}"


def _shown(value, form=".3f"):
    return "" if value is None else format(value, form)


def _kept(row):
    if row["value"] is None:
        return "not compared: the dense model is near chance"
    return f"{row['value']:.1%} ({row['low']:.1%} … {row['high']:.1%})"


def _eval_results(report, task):
    """Entries of the card's `model-index`."""
    from huggingface_hub import EvalResult

    def entry(dataset, kind, name, value):
        return EvalResult(
            task_type=task,
            dataset_type="text",
            dataset_name=dataset,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )

    text = Path(str(report.get("text"))).name
    results = [
        entry(text, "loss", f"Loss at positions {_range(bucket)}, nats per token", bucket["loss"])
        for bucket in report.get("positions") or []
    ]
    for row in report.get("retention") or []:
        if row["value"] is not None:
            name = row["name"] if row["length"] is None else f"{row['name']}, {row['length']:,} tokens"
            results.append(entry(name, "retention", "Share of the dense model's score that is kept", row["value"]))
    return results


def base_model_of(directory: str | Path) -> str | None:
    """Hub id of the model that the one in `directory` was made from; None where the records name none."""
    return _Records(directory).base_model()


def model_card(
    directory: str | Path,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    code: bool | None = None,
):
    """The card of the model or adapter in `directory`.

    It tells what config.json, adapter_config.json, nsa_conversion.json, nsa_finetune.json and eval.json say.

    Args:
        directory: a saved model, native sparse or dense, or a PEFT adapter.
        repo_id: where the model will be on the hub; default: the name of the directory.
        base_model: hub id of the model it was made from; default: what the records say.
        license: default: that of the base model, where a record names it.
        code: the repository holds the model's code; default: what config.json says.

    Returns:
        huggingface_hub.ModelCard: `data` holds the metadata, `content` the whole text.

    Raises:
        NSAError: there is no model, or a record is not valid JSON.
    """
    from huggingface_hub import ModelCard, ModelCardData

    records = _Records(directory)
    base = base_model or records.base_model()
    own_license = license
    license = license or records.license()
    where = repo_id or records.directory.resolve().name
    architecture = ((records.config or {}).get("architectures") or ["NSAForCausalLM"])[0]
    task, auto_class = _TASKS.get(architecture, _TASKS["NSAForCausalLM"])
    data = ModelCardData(
        base_model=base,
        license=license,
        library_name="peft" if records.adapter else "transformers",
        pipeline_tag=task,
        tags=["native-sparse-attention", "long-context"] if records.sparse else None,
        model_name=where.split("/")[-1],
        eval_results=_eval_results(records.evaluation or {}, task) or None,
    )
    if license is None:
        terms = "Not recorded; what was taken from the base model stays under its licence."
    else:
        terms = f"{license}{'' if own_license else ', as the base model'}."
    sections = {
        "Use": _usage(records, where, auto_class, code),
        "Attention": _attention(records),
        "Conversion": _conversion(records),
        "Training": _training(records),
        "Evaluation": _evaluation(records),
        "Licence": f"{terms} The Python files are Apache-2.0." if records.sparse else terms,
    }
    parts = [f"---\n{data.to_yaml()}\n---", MARK, f"# {where.split('/')[-1]}", _introduction(records, base)]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return ModelCard("\n\n".join(parts) + "\n")


def write_card(directory: str | Path, **settings) -> Path | None:
    """Write README.md into `directory`; `settings` are those of `model_card`.

    Returns:
        The path, or None where a card that somebody wrote was left alone.
    """
    path = Path(directory) / "README.md"
    if path.is_file() and MARK.encode() not in path.read_bytes():  # in whatever encoding
        return None
    path.write_text(model_card(directory, **settings).content, encoding="utf-8")
    return path
