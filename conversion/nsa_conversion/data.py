# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Text for training and evaluation: reading, tokenising, holding out and packing without cross-document attention.

A *document* is a string or a chat (a list of `{"role", "content"}` messages). Documents become one-dimensional int32
token arrays; `pack` lays them side by side in rows of at most `max_length` tokens, and `PackedRowsCollator` hands the
rows of a batch to the model as one padding-free sequence whose positions restart at every document.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DataCollatorWithFlattening

from .errors import NSAError

__all__ = [
    "PackedRows",
    "PackedRowsCollator",
    "builtin_text",
    "encode_documents",
    "hold_out",
    "pack",
    "practise_retrieval",
    "read_dataset",
    "read_files",
    "read_text",
    "repeat_passage",
    "state_facts",
]

Document = str | list[dict[str, Any]]

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_COLUMN = "text"
MESSAGES_COLUMN = "messages"
# A document of one token has no next token to predict.
MIN_DOCUMENT_TOKENS = 2
ENCODE_BATCH = 256
# Made-up facts: how many a document is given, how they are stated, and how they are used further on.
MIN_FACTS, MAX_FACTS = 8, 40
FACT_KEYS = ("code", "port", "value", "id", "colour", "size", "weight", "address", "price", "label", "date", "level")
FACTS_STATED = (
    " The {key} of {name} is {value}.",
    " {name} has {key} {value}.",
    " {key} ({name}): {value}",
    " For {name}, {value} was chosen as the {key}.",
    " Note that the {name} {key} is {value}.",
    "\n{name}: {value} ({key})\n",
)
FACTS_USED = (
    " As said above, the {key} of {name} is {value}.",
    " Remember that {name} has {key} {value}.",
    " What is the {key} of {name}? It is {value}.",
    "\nQuestion: which {key} does {name} have?\nAnswer: the {name} {key} is: {value}\n",
    " The text gives the {key} of {name} as {value}.",
)


def builtin_text() -> str:
    """Long English technical text that needs no download: the topics of Python's `help()`, joined in sorted order.

    Returns:
        One string of nearly half a million characters; its exact length depends on the Python version.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path) -> str:
    """Read one UTF-8 text file, with or without a byte order mark.

    Args:
        path: the file.

    Raises:
        NSAError: the file is missing, is a directory, is not UTF-8, or holds nothing but white space.
    """
    path = Path(path)
    if path.is_dir():
        raise NSAError(f"{path} is a directory, not a file; give a datasets directory with --dataset instead")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise NSAError(f"text file {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise NSAError(
            f"{path} is not UTF-8 text (byte {error.start}); re-encode it, or load other formats with --dataset"
        ) from None
    if not text.strip():
        raise NSAError(f"{path} is empty: a text file must hold at least {MIN_DOCUMENT_TOKENS} tokens")
    return text


def _as_document(value: Any, kind: str, where: str) -> Document:
    """Check one value of a text or messages column; `where` names its place in error messages."""
    if kind == "text":
        if not isinstance(value, str):
            raise NSAError(f"{where}: the text must be a string, got {type(value).__name__}")
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise NSAError(f"{where}: the messages must be a non-empty list, got {value!r:.80}")
    for message in value:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise NSAError(f"{where}: every message must be an object with 'role' and 'content', got {message!r:.80}")
    return list(value)


def _choose_column(
    columns: Sequence[str], text_column: str | None, messages_column: str | None, where: str
) -> tuple[str, str]:
    """Return (column, "text" | "messages"): the column asked for, or `messages`, or `text`."""
    for asked, kind in ((messages_column, "messages"), (text_column, "text")):
        if asked is not None:
            if asked not in columns:
                raise NSAError(f"{where}: no column {asked!r}; it has {sorted(columns)}")
            return asked, kind
    if MESSAGES_COLUMN in columns:
        return MESSAGES_COLUMN, "messages"
    if TEXT_COLUMN in columns:
        return TEXT_COLUMN, "text"
    raise NSAError(
        f"{where}: needs a {TEXT_COLUMN!r} or a {MESSAGES_COLUMN!r} column, it has {sorted(columns)}; "
        "name yours with --text-column or --messages-column"
    )


def _read_json_lines(path: Path, text_column: str | None, messages_column: str | None) -> list[Document]:
    documents: list[Document] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise NSAError(f"{where}: not valid JSON ({error}); the file must hold one JSON object per line") from None
        if not isinstance(entry, dict):
            raise NSAError(f"{where}: one JSON object per line is needed, got {type(entry).__name__}")
        column, kind = _choose_column(list(entry), text_column, messages_column, where)
        if "\\u" in line:
            _refuse_half_characters(entry[column], where)
        documents.append(_as_document(entry[column], kind, where))
    return documents


def _refuse_half_characters(value: Any, where: str) -> None:
    """JSON can name half of a surrogate pair, which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise NSAError(f"{where}: {half} is half of a character and cannot be encoded; take it out") from None


def read_files(
    paths: Iterable[str | Path], text_column: str | None = None, messages_column: str | None = None
) -> list[Document]:
    """Read documents from files.

    `.jsonl`, `.ndjson` and `.json` files hold one JSON object per line, with a `text` string or a `messages` list
    (`messages` wins when both are there). Any other file is plain UTF-8 text and makes one document.

    Args:
        paths: the files.
        text_column: the key of the text, when it is not `text`.
        messages_column: the key of the chat messages, when it is not `messages`.

    Returns:
        The documents, in order.

    Raises:
        NSAError: a file is missing, empty, not UTF-8, or a line is not what it should be (named `file:line`).
    """
    documents: list[Document] = []
    for path in map(Path, paths):
        if path.suffix.lower() in JSON_LINES_SUFFIXES:
            documents += _read_json_lines(path, text_column, messages_column)
        else:
            documents.append(read_text(path))
    return documents


def read_dataset(
    name: str,
    config: str | None = None,
    split: str = "train",
    text_column: str | None = None,
    messages_column: str | None = None,
) -> list[Document]:
    """Read documents with the `datasets` library.

    Args:
        name: a directory written by `save_to_disk`, a directory of data files, or a hub id.
        config: the hub dataset's configuration name.
        split: the split to read.
        text_column: the column of the text, when it is not `text`.
        messages_column: the column of the chat messages, when it is not `messages`.

    Raises:
        NSAError: `datasets` is missing, the data cannot be loaded, has no such split or column, or has no rows.
    """
    try:
        import datasets
    except ImportError:
        raise NSAError("reading a dataset needs the datasets library: pip install 'nsa-transformers[train]'") from None
    try:
        if (Path(name) / "dataset_dict.json").exists() or (Path(name) / "state.json").exists():
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, config)
    except IndexError:  # what load_from_disk raises for a dataset saved without rows
        raise NSAError(f"dataset {name!r} has no rows") from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise NSAError(f"dataset {name!r} cannot be loaded: {error}") from error
    if isinstance(data, dict):
        if split not in data:
            raise NSAError(
                f"dataset {name!r} has no split {split!r}; it has {sorted(data)}; choose with --dataset-split"
            )
        data = data[split]
    if len(data) == 0:
        raise NSAError(f"dataset {name!r} (split {split!r}) has no rows")
    column, kind = _choose_column(data.column_names, text_column, messages_column, f"dataset {name!r}")
    return [_as_document(value, kind, f"dataset {name!r}, row {row}") for row, value in enumerate(data[column])]


def _render_chat(messages: list[dict[str, Any]], tokenizer, where: str) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise NSAError(
            f"{where} is a chat, but the tokenizer has no chat template; give the text as {{'text': ...}}, "
            "or set tokenizer.chat_template and save the tokenizer"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, KeyError) as error:
        raise NSAError(f"{where}: the tokenizer's chat template refused it: {error}") from error


def encode_documents(documents: Sequence[Document], tokenizer, progress: bool = True) -> list[np.ndarray]:
    """Tokenise documents; texts end with the tokenizer's end-of-sequence token, chats with what their template writes.

    Args:
        documents: strings and chats.
        tokenizer: a transformers tokenizer.
        progress: show a progress bar.

    Returns:
        int32 arrays, one per document of at least two tokens; empty and shorter documents are left out.

    Raises:
        NSAError: no document has two tokens, or a chat cannot be rendered.
    """
    encoded: list[np.ndarray] = []
    eos = tokenizer.eos_token_id
    total = 0
    with tqdm(total=len(documents), desc="Tokenising", unit=" documents", disable=not progress) as bar:
        for start in range(0, len(documents), ENCODE_BATCH):
            batch = documents[start : start + ENCODE_BATCH]
            is_text = [isinstance(document, str) for document in batch]
            texts = [
                document if text else _render_chat(document, tokenizer, f"document {start + offset}")
                for offset, (document, text) in enumerate(zip(batch, is_text))
            ]
            for special in (True, False):  # chat templates write their own special tokens
                chosen = [index for index, text in enumerate(is_text) if text is special and texts[index].strip()]
                if not chosen:
                    continue
                ids = tokenizer([texts[index] for index in chosen], add_special_tokens=special, verbose=False)[
                    "input_ids"
                ]
                for index, tokens in zip(chosen, ids):
                    total += len(tokens)
                    if special and eos is not None and tokens and tokens[-1] != eos:
                        tokens = [*tokens, eos]
                    texts[index] = np.asarray(tokens, dtype=np.int32)
            encoded += [
                tokens for tokens in texts if not isinstance(tokens, str) and len(tokens) >= MIN_DOCUMENT_TOKENS
            ]
            bar.update(len(batch))
    if not encoded:
        raise NSAError(
            f"the data holds {total} token(s) in {len(documents)} document(s); "
            f"at least one document of {MIN_DOCUMENT_TOKENS} tokens is needed"
        )
    return encoded


def hold_out(
    documents: Sequence[np.ndarray], fraction: float, seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Split documents into training and evaluation parts.

    Whole documents are held out, chosen at random, until they hold `fraction` of the tokens. When one document alone
    is more than that (a single long text file), the end of the longest document is cut off and held out instead.

    Args:
        documents: int32 token arrays.
        fraction: share of the tokens to hold out, 0 <= fraction < 1.
        seed: seed of the choice.

    Returns:
        (training documents, evaluation documents). The second is empty when `fraction` is 0 or less than two tokens.

    Raises:
        NSAError: `fraction` is out of range.
    """
    if not 0 <= fraction < 1:
        raise NSAError(f"eval_fraction must be at least 0 and less than 1, got {fraction}")
    budget = int(fraction * sum(map(len, documents)))
    if budget < MIN_DOCUMENT_TOKENS:
        return list(documents), []
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    held = 0
    for index in order[:-1]:
        if held + len(documents[index]) <= budget:
            chosen.add(index)
            held += len(documents[index])
    if chosen:
        return (
            [document for index, document in enumerate(documents) if index not in chosen],
            [document for index, document in enumerate(documents) if index in chosen],
        )
    longest = max(range(len(documents)), key=lambda index: len(documents[index]))
    cut = min(budget, len(documents[longest]) - MIN_DOCUMENT_TOKENS)
    if cut < MIN_DOCUMENT_TOKENS:
        return list(documents), []
    train = list(documents)
    train[longest] = documents[longest][:-cut]
    return train, [documents[longest][-cut:]]


class PackedRows(torch.utils.data.Dataset):
    """Rows of packed documents, a map-style dataset.

    Item i is `{"input_ids", "labels", "position_ids"}`, int64 tensors `[t]` with t <= max_length. `position_ids`
    restart at 0 and `labels` are -100 at the first token of every document.

    Args:
        rows: for every row, the documents in it (int32 arrays).
        change: called with a document and random numbers whenever its row is read; returns what to read instead, of
            the same length.
        seed: of the random numbers, which differ between rows and epochs.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[np.ndarray]],
        change: Callable[[np.ndarray, random.Random], np.ndarray] | None = None,
        seed: int = 0,
    ):
        self.rows, self.change, self.seed = rows, change, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay see it change
        self.num_tokens = sum(len(piece) for row in rows for piece in row)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epoch(self) -> int:
        """Whose random numbers are drawn."""
        return self._epoch.item()

    def set_epoch(self, epoch: int) -> None:
        """What is drawn from now on is that epoch's, in this process and the workers of its loaders."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pieces = self.rows[index]
        if self.change is not None:
            # nothing of torch's: models that are trained beside each other are to read the same
            rng = random.Random(f"{self.seed} {index} {self.epoch}")
            pieces = [self.change(piece, rng) for piece in pieces]
        input_ids = torch.from_numpy(np.concatenate(pieces).astype(np.int64))
        labels = input_ids.clone()
        labels[np.cumsum([0, *map(len, pieces[:-1])])] = -100
        position_ids = torch.cat([torch.arange(len(piece)) for piece in pieces])
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def pack(documents: Iterable[np.ndarray], max_length: int, full_rows: bool = False) -> PackedRows:
    """Lay documents in as few rows of at most `max_length` tokens as best-fit-decreasing finds.

    Only documents longer than `max_length` are cut; each part then counts as a document of its own. Rows are not
    padded, so some are a little shorter than `max_length`.

    Args:
        documents: int32 token arrays.
        max_length: tokens in a row, at least 2.
        full_rows: keep parts of exactly `max_length` tokens alone, in the order of the documents.

    Raises:
        NSAError: `max_length` is too small, or nothing is left to pack.
    """
    if max_length < MIN_DOCUMENT_TOKENS:
        raise NSAError(f"max_length must be at least {MIN_DOCUMENT_TOKENS} tokens, got {max_length}")
    pieces = [document[i : i + max_length] for document in documents for i in range(0, len(document), max_length)]
    shortest = max_length if full_rows else MIN_DOCUMENT_TOKENS
    pieces = [piece for piece in pieces if len(piece) >= shortest]
    if not pieces:
        raise NSAError(f"no document has {shortest} tokens: nothing to train on")
    if full_rows:
        return PackedRows([[piece] for piece in pieces])

    rows: list[list[int]] = []
    rows_by_space: list[list[int]] = [[] for _ in range(max_length + 1)]
    spaces = 0  # bit s is set while a row with s free tokens is open, so the best fit is one shift away
    for index in sorted(range(len(pieces)), key=lambda index: -len(pieces[index])):
        size = len(pieces[index])
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, row = max_length, len(rows)
            rows.append([])
        rows[row].append(index)
        if space - size >= MIN_DOCUMENT_TOKENS:
            rows_by_space[space - size].append(row)
            spaces |= 1 << (space - size)
    return PackedRows([[pieces[index] for index in sorted(row)] for row in sorted(rows, key=min)])


def repeat_passage(tokens: np.ndarray, rng: random.Random) -> np.ndarray:
    """Copy a passage of an eighth to a third of a document over a later part of it; the length stays."""
    length = rng.randint(len(tokens) // 8, len(tokens) // 3)
    start = rng.randint(0, len(tokens) - 2 * length)
    again = rng.randint(start + length, len(tokens) - length)
    changed = tokens.copy()
    changed[again : again + length] = tokens[start : start + length]
    return changed


def state_facts(tokens: np.ndarray, rng: random.Random, tokenizer, most: int = MAX_FACTS) -> np.ndarray:
    """Write made-up facts into a document, each once, and once more further on: what is not found is not known.

    There are MIN_FACTS to `most` of them. Names are two words of the document, values numbers or other words. Facts are
    stated anywhere in its first nine tenths; half of them are used somewhere behind, the others one after the other at
    its end. The length stays: the end of the text gives way, and at least half of it stays. A document of too few words
    is left as it is.
    """
    words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", tokenizer.decode(tokens))))
    count = min(rng.randint(MIN_FACTS, most), len(words) // 4)
    names, others = (rng.sample(words, 2 * count) for _ in range(2))
    sentences, places = [], []
    for fact in range(count):
        value = rng.randrange(100, 1_000_000) if rng.random() < 0.7 else " ".join(others[2 * fact : 2 * fact + 2])
        given = {"key": rng.choice(FACT_KEYS), "name": " ".join(names[2 * fact : 2 * fact + 2]), "value": value}
        sentences += [rng.choice(forms).format(**given) for forms in (FACTS_STATED, FACTS_USED)]
        stated = rng.uniform(0, 0.9)
        places += [stated, rng.uniform(stated, 1) if rng.random() < 0.5 else 1 + rng.random()]
    if not sentences:
        return tokens
    pieces = tokenizer(sentences, add_special_tokens=False)["input_ids"]
    taken = itertools.accumulate(len(stated) + len(used) for stated, used in zip(pieces[::2], pieces[1::2]))
    pieces = pieces[: 2 * sum(size <= len(tokens) // 2 for size in taken)]
    text = tokens[: len(tokens) - sum(map(len, pieces))]
    order = sorted(range(len(pieces)), key=places.__getitem__)
    parts = np.split(text, [min(int(places[each] * len(text)), len(text)) for each in order])
    mixed = [parts[0]]
    for each, part in zip(order, parts[1:]):
        mixed += [np.asarray(pieces[each], dtype=tokens.dtype), part]
    return np.concatenate(mixed)


def practise_retrieval(
    rows: PackedRows,
    repeat_share: float,
    fact_share: float,
    shortest: int,
    tokenizer,
    seed: int = 0,
    max_facts: int = MAX_FACTS,
) -> PackedRows:
    """Rows in which some documents are changed by `repeat_passage` and `state_facts`, drawn anew in every epoch.

    Args:
        rows: packed documents.
        repeat_share, fact_share: of the documents of at least `shortest` tokens, 0 to 1; one may be changed by both.
        shortest: tokens.
        tokenizer: of the tokens.
        seed: of what is drawn.
        max_facts: in a document.
    """

    def change(tokens, rng):
        if len(tokens) >= shortest and rng.random() < repeat_share:
            tokens = repeat_passage(tokens, rng)
        if len(tokens) >= shortest and rng.random() < fact_share:
            tokens = state_facts(tokens, rng, tokenizer, max_facts)
        return tokens

    return PackedRows(rows.rows, change, seed)


class PackedRowsCollator:
    """Join the rows of a batch into one padding-free sequence `[1, tokens]` with every document on its own.

    A batch of `per_device_train_batch_size` rows becomes `input_ids`, `labels`, `position_ids` and the sequence
    boundaries `cu_seq_lens_q/k`, `max_length_q/k` of transformers' `DataCollatorWithFlattening`, which does the work.

    Args:
        full_rows: rows that are one document each, all of one length, stay rows `[rows, tokens]`.
    """

    def __init__(self, full_rows: bool = False):
        self.flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        self.full_rows = full_rows

    def __call__(self, rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        if self.full_rows and all(
            torch.equal(row["position_ids"], torch.arange(len(rows[0]["labels"]))) for row in rows
        ):
            return {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
        documents = []
        for row in rows:
            starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], len(row["position_ids"])]):
                documents.append({key: row[key][start:end].tolist() for key in ("input_ids", "labels")})
        return self.flatten(documents, return_tensors="pt")
