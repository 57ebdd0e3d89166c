# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import gzip
import importlib
import json
import sys
import tarfile
from pathlib import Path

import pytest
from tiny import make_checkpoint

from nsa_conversion.errors import NSAError

SCRIPTS = Path(__file__).parents[1] / "conversion"


@pytest.fixture
def corpus(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("build_corpus")
    sys.modules.pop("build_corpus", None)


def words(start, count):
    return " ".join(f"word{number}" for number in range(start, start + count))


@pytest.fixture
def packages(corpus, tmp_path):
    """A cache of unpacked packages, as downloads leave it."""

    def package(name, files):
        folder = tmp_path / "cache" / name
        for path, content in {**files, "package.json": json.dumps({"package": name, "version": "1"})}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    pages = {f"doc/{i}.html": f"<nav>menu</nav><p>{words(1000 * i, 150)}</p>" for i in range(8)}
    pages["doc/copy.html"] = pages["doc/3.html"]
    pages["doc/index.html"] = f"<p>{words(90_000, 300)}</p>"
    package("manual", pages)
    package("library", {f"lib/{i}/x.py.gz": gzip.compress(words(1000 * i + 500, 150).encode()) for i in range(30, 38)})
    talks = {
        str(i): {"messages": [[{"sender": s, "text": f"{s} {words(i * 1000, 40)}"}] for s in "ab"]} for i in (70, 71)
    }
    package("talks", {"dataset.json": json.dumps(talks)})
    return [
        corpus.Source("prose", "deb", "manual", ("*.html",), "MIT"),
        corpus.Source("code", "deb", "library", ("*.py.gz",), "MIT"),
        corpus.Source("chat", "pip", "talks", ("*.json",), "MIT"),
    ]


def build(corpus, packages, tmp_path, name="out", **settings):
    settings = {"held_out": 1, "held_out_tokens": 300, "bundle_tokens": 3000, "progress": False} | settings
    model = make_checkpoint(tmp_path / "dense") if not (tmp_path / "dense").exists() else tmp_path / "dense"
    corpus_ = corpus.build(tmp_path / name, cache=tmp_path / "cache", sources=packages, model=model, **settings)
    return corpus_, tmp_path / name


def test_documents_are_divided_without_overlap_and_always_alike(corpus, packages, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "JOINED_CHARACTERS", 1000)
    manifest, output = build(corpus, packages, tmp_path)
    read = {path.stem: [json.loads(line) for line in path.open()] for path in output.glob("*.jsonl")}
    assert [len(read[f"heldout-{domain}"]) for domain in ("prose", "code", "chat")] == [1, 1, 2]
    train = " ".join(entry["text"] for entry in read["train"])
    for domain in ("prose", "code"):
        (entry,) = read[f"heldout-{domain}"]
        assert len(entry["text"]) >= 300
        assert entry["domain"] == domain
        assert not set(entry["text"].split()[5:-5]) & set(train.split())
    assert "menu" not in train
    assert "word90010" not in train
    assert train.count("word3010 ") + read["heldout-prose"][0]["text"].count("word3010 ") <= 1  # the copied page
    assert read["heldout-chat"][0]["messages"][1]["role"] == "assistant"
    assert manifest["train_tokens"]["prose"] > 0
    assert manifest["packages"][0]["license"] == "MIT"
    with tarfile.open(output / "bundle.tar.xz") as archive:
        assert sorted(archive.getnames()) == sorted(path.name for path in output.glob("*.jsonl"))
    again, other = build(corpus, packages, tmp_path, "again")
    assert again == manifest
    assert (other / "bundle.tar.xz").read_bytes() == (output / "bundle.tar.xz").read_bytes()


def test_the_bundle_is_balanced_by_whole_rows(corpus):
    lengths = [("code", 25), ("code", 9), ("prose", 19), ("code", 31), ("prose", 40), ("chat", 12), ("code", 70)]
    train = [corpus.Document(domain, "p", str(length), "") for domain, length in lengths]
    tokens = {name: int(name) for _, _, name, _ in train}
    chosen = corpus._balanced(train, tokens, 50, 0.1, 10)
    assert [each.name for each in chosen] == ["25", "19", "31", "40", "12"]


def test_a_training_document_that_shares_passages_is_left_out(corpus):
    def document(name, text):
        return corpus.Document("prose", "p", name, text)

    held_words = words(0, 400)
    copied = words(150, 200) + " and " + words(5000, 50)
    documents = [document("a", held_words), document("b", copied), document("c", words(9000, 300))]
    documents.append(corpus.Document("code", "q", "d", words(20_000, 400)))

    def encode(texts):
        return [[(i, i + 1) for i in range(len(text))] for text in texts]

    train, held, counts = corpus.assemble(documents, encode, held_out=1, held_out_tokens=1000)
    names = {each.name for each in train} | {each.name for each in held["prose"]}
    assert counts["left_out_for_shared_passages"] in ({"prose": 1}, {})
    assert "c" in names
    if "a" in {each.name for each in held["prose"]}:
        assert "b" not in {each.name for each in train}
    with pytest.raises(NSAError, match="lower --held-out"):
        corpus.assemble(documents, encode, held_out=3, held_out_tokens=1000)


def test_formats(corpus, tmp_path):
    (tmp_path / "a.html").write_text(
        "<head><title>t</title></head><p>one\n two</p><pre>x\n  y</pre><div class=toc><p>n</p></div>z"
    )
    assert corpus._read(tmp_path / "a.html").split("\n\n") == ["one two", "x\n  y", "z"]
    (tmp_path / "a.pod").write_text("=head1 NAME\n\nB<bold I<both>> C<< a > b >>")
    assert corpus._read(tmp_path / "a.pod") == "NAME\n\nbold both a > b"
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    assert corpus._read(tmp_path / "a.txt") == ""


def test_mistakes_of_the_command_line(corpus, tmp_path, monkeypatch, capsys):
    assert corpus.main([str(tmp_path)]) == 2
    assert "choose a new folder" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NSAError, match="apt-get is needed"):
        corpus._fetch(corpus.Source("prose", "deb", "manual", ("*",), "MIT"), tmp_path / "cache")
