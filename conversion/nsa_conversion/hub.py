# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Upload a model or an adapter to the Hugging Face hub: weights, tokenizer, code, card and records, in one commit."""

import contextlib
import json
import re
from pathlib import Path

from nsa_conversion.card import MARK, base_model_of, model_card
from nsa_conversion.convert import CARRIED_FILES
from nsa_conversion.errors import NSAError, listing
from nsa_conversion.parsing import Parser

__all__ = ["hub_errors", "main", "push"]

MODEL_TYPE = "native_sparse_attention"
# Whatever else lies in the directory (checkpoints, optimizer states, data) stays where it is.
MODEL_FILES = (
    "config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenization_*.py",
    *CARRIED_FILES,
)
_OTHER_FILES = (
    "adapter/adapter_config.json",
    "adapter/*.safetensors",
    "nsa_conversion.json",
    "nsa_finetune.json",
    "log_history.json",
    "eval.json",
    "eval.html",
    "*.png",
    "README.md",
)
_REPO_ID = re.compile(r"([\w][\w.\-]*/)?[\w][\w.\-]*")


def push(
    directory: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    remote_code: bool = True,
    dry_run: bool = False,
) -> tuple[str | None, dict[str, int]]:
    """Upload a saved model, native sparse or dense, or a PEFT adapter to a hub repository.

    `directory` stays as it is: the model's code (this installation's) and a card with what the records say are made for
    the upload. A card that somebody wrote is uploaded unchanged.

    Args:
        directory: what `save_pretrained`, `nsa convert` or `nsa finetune` wrote.
        repo_id: `owner/name`, or `name` in one's own namespace; made if it does not exist.
        base_model: hub id of the model it was made from; default: what the records say. An adapter must have one.
        license: of the weights; default: the base model's, where the conversion recorded it.
        private: make the repository private if it is new.
        revision: branch to commit to, made if it does not exist; default: main.
        create_pr: open a pull request instead of committing.
        commit_message: default: "Upload model" or "Upload adapter".
        token: access token; default: the stored one.
        remote_code: False leaves the model's code out.
        dry_run: only tell what would be uploaded.

    Returns:
        Address of the commit or pull request (None for a dry run), and the size in bytes of every file.

    Raises:
        NSAError: nothing to upload, an incomplete model, an adapter whose base is not on the hub, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    directory = Path(directory).expanduser()
    if not _REPO_ID.fullmatch(repo_id):
        raise NSAError(f"the repository must be a hub id (owner/name), got {repo_id!r}")
    files = _find_files(directory)
    if "config.json" in files:
        files |= _model_files(directory, files, remote_code)
    else:
        files |= _adapter_files(directory, base_model)
    if "README.md" not in files or MARK in _text(files["README.md"]):
        card = model_card(directory, repo_id=repo_id, base_model=base_model, license=license, code=remote_code)
        files["README.md"] = card.content.encode()
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    if dry_run:
        return None, sizes
    kind = "model" if "config.json" in files else "adapter"
    with hub_errors(f"cannot upload to {repo_id}"):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()],
            commit_message=commit_message or f"Upload {kind}",
            revision=revision,
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url, sizes


def _find_files(directory):
    """Name in the repository -> path of every file that belongs to a model."""
    if not directory.is_dir():
        raise NSAError(f"{directory} is not a directory; give one that holds a saved model or adapter")
    paths = {path for pattern in (*MODEL_FILES, *_OTHER_FILES) for path in directory.glob(pattern) if path.is_file()}
    files = {path.relative_to(directory).as_posix(): path for path in sorted(paths)}
    if not {"config.json", "adapter_config.json"} & files.keys():
        raise NSAError(f"{directory} holds no model: neither config.json nor adapter_config.json is there")
    return files


def _text(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise NSAError(f"{path} is not UTF-8 text (byte {error.start}); re-encode it") from error


def _json(path):
    try:
        record = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise NSAError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise NSAError(f"{path} must hold a JSON object, got {type(record).__name__}")
    return record


def _model_files(directory, files, remote_code):
    """The configuration and the code as they go to the hub; checks that the weights are whole."""
    from modeling_nsa.hub_nsa import AUTO_MAP
    from modeling_nsa.hub_nsa import remote_code as code_files

    config = _json(files["config.json"])
    index = "model.safetensors.index.json"
    wanted = {"model.safetensors"}
    if index in files:
        weight_map = _json(files[index]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise NSAError(f"{files[index]} has no weight_map; save the model again")
        wanted = set(map(str, weight_map.values()))
    if missing := sorted(wanted - files.keys()):
        raise NSAError(f"{directory} lacks {listing(missing)}: the model is not complete")
    if config.get("model_type") != MODEL_TYPE:
        return {}
    if not remote_code:
        config.pop("auto_map", None)
        return {"config.json": _dump(config | {"save_remote_code": False})}
    code = {name: text.encode() for name, text in code_files().items()}
    return {"config.json": _dump(config | {"auto_map": AUTO_MAP, "save_remote_code": True}), **code}


def _dump(config):
    return f"{json.dumps(config, indent=2)}\n".encode()


def _adapter_files(directory, base_model):
    """The adapter's configuration, with a base model that others can load too."""
    base = base_model or base_model_of(directory)
    config = _json(directory / "adapter_config.json")
    if not (directory / "adapter_model.safetensors").is_file():
        raise NSAError(f"{directory} lacks adapter_model.safetensors: the adapter is not complete")
    if base is None:
        raise NSAError(
            f"the adapter's base model {config.get('base_model_name_or_path')!r} is not on the hub, so nobody else can "
            "load it. Upload that first and name it with --base-model OWNER/NAME"
        )
    return {"adapter_config.json": f"{json.dumps(config | {'base_model_name_or_path': base}, indent=2)}\n".encode()}


@contextlib.contextmanager
def hub_errors(what: str):
    """Turn a refusal by the hub, or no answer from it, into an NSAError of one line that starts with `what`."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    http_error = HfHubHTTPError.__bases__[0]  # of whatever HTTP library this version uses
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise NSAError(f"{what}: offline mode is on; unset HF_HUB_OFFLINE") from error
    except (http_error, HFValidationError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "; log in with `hf auth login` or use a token that may write there" if status in (401, 403) else ""
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise NSAError(f"{what}: {reason}{hint}") from error


def _parser():
    parser = Parser(prog="nsa push", description="Upload a model or an adapter to the Hugging Face hub.")
    add = parser.add_argument
    add("directory", metavar="DIR", help="what nsa convert, nsa finetune or save_pretrained wrote")
    add("repo_id", metavar="REPO", help="owner/name, or name in your own namespace; made if it does not exist")
    add("--base-model", metavar="ID", help="hub id of the model it was made from (default: what the records say)")
    add("--license", metavar="NAME", help="licence of the weights (default: the base model's, where it is recorded)")
    add("--private", action="store_true", default=None, help="make the repository private if it is new")
    add("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    add("--create-pr", action="store_true", help="open a pull request instead of committing")
    add("--commit-message", metavar="TEXT", help="default: Upload model, or Upload adapter")
    add("--token", help="access token (default: the stored one)")
    add("--no-remote-code", action="store_true", help="leave out the model's code, which trust_remote_code=True needs")
    add("--dry-run", action="store_true", help="list what would be uploaded and stop")
    add("--json", action="store_true", help="print the address and the files as JSON")
    return parser


def main(argv: list[str]) -> int:
    """Command line of `nsa push`.

    Args:
        argv: arguments after `nsa push`.

    Returns:
        The exit code.
    """
    args = vars(_parser().parse_args(argv))
    as_json, no_code = args.pop("json"), args.pop("no_remote_code")
    url, sizes = push(**args, remote_code=not no_code)
    if as_json:
        print(json.dumps({"url": url, "files": sizes}, indent=2))
        return 0
    if args["dry_run"]:
        width = max(map(len, sizes))
        print("\n".join(f"{name:<{width}}  {size:>15,} bytes" for name, size in sizes.items()))
    total = f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB"
    print(f"would upload {total} to {args['repo_id']}" if url is None else f"uploaded {total}: {url}")
    return 0
