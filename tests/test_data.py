# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import SMALL_NSA, make_model, make_tokenizer

from nsa_conversion.data import (
    FACT_KEYS,
    FACTS_STATED,
    FACTS_USED,
    MIN_FACTS,
    PackedRows,
    PackedRowsCollator,
    builtin_text,
    encode_documents,
    hold_out,
    pack,
    practise_retrieval,
    read_dataset,
    read_files,
    read_text,
    repeat_passage,
    state_facts,
)
from nsa_conversion.errors import NSAError

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def documents_of(*lengths):
    """Token arrays of these lengths; every token is used once, so that a packed row tells where it came from."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.int32) for end, length in zip(ends, lengths)]


def write_lines(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_builtin_text_is_long_and_stable():
    text = builtin_text()
    assert text == builtin_text()
    assert len(text) > 200_000
    assert "lambda" in text


def test_read_files_takes_text_and_both_kinds_of_lines(tmp_path):
    (tmp_path / "book.txt").write_text("one\ntwo\n", encoding="utf-8")
    lines = write_lines(tmp_path / "lines.jsonl", {"text": "three"}, {"messages": CHAT, "text": "ignored"})
    assert read_files([tmp_path / "book.txt", lines]) == ["one\ntwo\n", "three", CHAT]


def test_read_files_takes_byte_order_marks_and_whole_surrogate_pairs(tmp_path):
    (tmp_path / "book.txt").write_text("one", encoding="utf-8-sig")
    (tmp_path / "lines.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n', encoding="utf-8-sig")
    assert read_files([tmp_path / "book.txt", tmp_path / "lines.jsonl"]) == ["one", "\U0001f600"]


def test_read_files_takes_named_columns(tmp_path):
    path = write_lines(tmp_path / "lines.jsonl", {"body": "a text", "turns": CHAT, "text": "other"})
    assert read_files([path], text_column="body") == ["a text"]
    assert read_files([path], messages_column="turns") == [CHAT]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", " \n\t\n", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"text": "ok"}\n{"text": \n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", '["text"]\n', r"a.jsonl:1: one JSON object per line is needed, got list"),
        ("a.jsonl", '{"body": "x"}\n', r"needs a 'text' or a 'messages' column, it has \['body'\].*--text-column"),
        ("a.jsonl", '{"text": 3}\n', "the text must be a string, got int"),
        ("a.jsonl", '{"messages": []}\n', "must be a non-empty list"),
        ("a.jsonl", '{"text": "ok"}\n{"text": "abc \\ud800"}\n', r"a.jsonl:2: \\ud800 is half of a character"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "\\uDC00"}]}\n', r"a.jsonl:1: \\udc00 is half of"),
        ("a.jsonl", '{"messages": [{"content": "x"}]}\n', "every message must be an object with 'role' and 'content'"),
    ],
)
def test_read_files_names_what_is_wrong(tmp_path, name, content, error):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(NSAError, match=error):
        read_files([tmp_path / name])


def test_read_text_refuses_missing_directories_and_binary(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(NSAError, match="does not exist"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(NSAError, match=r"is a directory.*--dataset"):
        read_text(tmp_path)
    with pytest.raises(NSAError, match=r"not UTF-8 text \(byte 3\)"):
        read_text(tmp_path / "binary.txt")


def test_read_files_refuses_an_unknown_column(tmp_path):
    path = write_lines(tmp_path / "lines.jsonl", {"text": "a"})
    with pytest.raises(NSAError, match=r"no column 'body'; it has \['text'\]"):
        read_files([path], text_column="body")


def test_read_dataset_from_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["one", "two"]})
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "dev": data.select([1])}).save_to_disk(tmp_path / "dict")
    datasets.Dataset.from_dict({"messages": [CHAT]}).save_to_disk(tmp_path / "chat")
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "empty")
    assert read_dataset(str(tmp_path / "plain")) == ["one", "two"]
    assert read_dataset(str(tmp_path / "dict"), split="dev") == ["two"]
    assert read_dataset(str(tmp_path / "chat")) == [CHAT]
    with pytest.raises(NSAError, match=r"no split 'test'; it has \['dev', 'train'\]"):
        read_dataset(str(tmp_path / "dict"), split="test")
    with pytest.raises(NSAError, match="no column 'body'"):
        read_dataset(str(tmp_path / "plain"), text_column="body")
    with pytest.raises(NSAError, match="has no rows"):
        read_dataset(str(tmp_path / "empty"))
    with pytest.raises(NSAError, match="cannot be loaded"):
        read_dataset(str(tmp_path / "nothing" / "here"))


def test_encode_ends_documents_and_leaves_out_empty_ones(tokenizer):
    documents = ["ab", "", "  \n", CHAT, "c"]
    encoded = encode_documents(documents, tokenizer, progress=False)
    assert [tokenizer.decode(ids) for ids in encoded] == [
        "ab</s>",
        "<|user|>Hello?</s><|assistant|>Hi.</s>",
        "c</s>",
    ]
    assert all(ids.dtype == np.int32 for ids in encoded)


def test_encode_keeps_order_over_batches(tokenizer):
    documents = [str(i) for i in range(700)]
    encoded = encode_documents(documents, tokenizer, progress=False)
    assert [tokenizer.decode(ids[:-1]) for ids in encoded] == documents


@pytest.mark.parametrize("documents", [[], [""], ["  ", "\n"]])
def test_encode_refuses_data_without_tokens(tokenizer, documents):
    with pytest.raises(NSAError, match=r"holds 0 token\(s\).*at least one document of 2 tokens"):
        encode_documents(documents, tokenizer, progress=False)


def test_encode_refuses_data_of_one_token(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.eos_token = None
    with pytest.raises(NSAError, match=r"holds 1 token\(s\) in 1 document"):
        encode_documents(["a"], tokenizer, progress=False)


def test_encode_refuses_a_chat_without_template(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = None
    with pytest.raises(NSAError, match="no chat template"):
        encode_documents([CHAT], tokenizer, progress=False)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(NSAError, match="document 0: the tokenizer's chat template refused it: roles must alternate"):
        encode_documents([CHAT], tokenizer, progress=False)


@pytest.mark.parametrize("lengths", [(10,) * 40, (1000,), (500, 30, 2)])
def test_hold_out_splits_without_loss_or_overlap(lengths):
    documents = documents_of(*lengths)
    train, held_out = hold_out(documents, 0.1, seed=1)
    tokens = np.concatenate([*train, *held_out])
    assert sorted(tokens) == list(range(sum(lengths)))
    assert 2 <= sum(map(len, held_out)) <= 0.1 * sum(lengths)
    assert [a.tolist() for a in hold_out(documents, 0.1, seed=1)[1]] == [a.tolist() for a in held_out]


def test_hold_out_takes_nothing_when_asked_or_when_too_little():
    documents = documents_of(12, 7)
    assert hold_out(documents, 0.0)[1] == []
    assert hold_out(documents, 0.1)[1] == []
    with pytest.raises(NSAError, match=r"at least 0 and less than 1, got 1.0"):
        hold_out(documents, 1.0)


def test_pack_uses_every_token_once_and_cuts_only_long_documents():
    lengths = (5, 30, 9, 2, 16, 16, 7, 3, 11)
    rows = pack(documents_of(*lengths), 16)
    pieces = sorted((row[0], len(row)) for pieces in rows.rows for row in pieces)
    starts = np.cumsum((0, *lengths[:-1]))
    expected = [(s, n) for s, n in zip(starts, lengths) if n <= 16] + [(5, 16), (21, 14)]
    assert pieces == sorted(expected)
    assert all(len(row["input_ids"]) <= 16 for row in rows)
    assert rows.num_tokens == sum(lengths)
    assert len(rows) == -(-sum(lengths) // 16)  # best fit leaves no more room than rounding up here


def test_full_rows_are_parts_of_one_length_in_the_order_of_the_documents():
    documents = [np.arange(n, dtype=np.int32) + 100 * n for n in (25, 9, 10, 31)]
    rows = pack(documents, 10, full_rows=True)
    assert [row[0].tolist() for row in rows.rows] == [
        list(range(start, start + 10)) for start in (2500, 2510, 1000, 3100, 3110, 3120)
    ]
    with pytest.raises(NSAError, match="no document has 40 tokens"):
        pack(documents, 40, full_rows=True)
    batch = PackedRowsCollator(full_rows=True)([rows[0], rows[2]])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [list(range(2500, 2510)), list(range(1000, 1010))]
    assert batch["labels"][:, 0].tolist() == [-100, -100]
    mixed = PackedRowsCollator(full_rows=True)([rows[0], *pack(documents[1:2], 10)])
    assert mixed["cu_seq_lens_q"].tolist() == [0, 10, 19]


def test_pack_resets_positions_and_hides_the_first_label():
    rows = pack(documents_of(3, 4), 8)
    assert len(rows) == 1
    row = rows[0]
    assert row["input_ids"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert row["labels"].tolist() == [-100, 1, 2, -100, 4, 5, 6]
    assert all(tensor.dtype == torch.int64 for tensor in row.values())


def test_pack_drops_pieces_of_one_token_and_refuses_nothing():
    assert pack(documents_of(9), 4).num_tokens == 8
    with pytest.raises(NSAError, match="nothing to train on"):
        pack(documents_of(1, 1), 4)
    with pytest.raises(NSAError, match="max_length must be at least 2 tokens, got 1"):
        pack(documents_of(9), 1)


def read(rows):
    return [rows[index]["input_ids"].numpy() for index in range(len(rows))]


def test_passages_are_repeated_inside_long_documents():
    plain = pack([np.arange(100), np.arange(200, 400), np.arange(500, 700)], 200)
    rows, same = (practise_retrieval(plain, 1.0, 0.0, 150, None) for _ in range(2))
    before, after = read(plain), read(rows)
    assert [len(piece) for piece in after] == [len(piece) for piece in before]
    for old, new in zip(before, after):
        other = np.flatnonzero(old != new)
        if len(old) < 150:
            assert not len(other)
            continue
        assert 25 <= len(other) <= 66
        assert (np.diff(other) == 1).all()  # one passage
        source = int(new[other[0]]) - int(old[0])
        assert (old[source : source + len(other)] == new[other]).all()
        assert source + len(other) <= other[0]
    torch.manual_seed(7)  # of no influence
    assert all((a == b).all() for a, b in zip(after, read(same)))
    assert all((a == b).all() for a, b in zip(after, read(rows)))
    rows.set_epoch(1)
    for other in (read(rows), read(practise_retrieval(plain, 1.0, 0.0, 150, None, seed=1))):
        assert any((a != b).any() for a, b in zip(after, other))
    assert all((a == b).all() for a, b in zip(before, read(practise_retrieval(plain, 0.0, 0.0, 150, None))))


def test_workers_that_stay_draw_anew_too():
    lines = np.arange(100), np.arange(200, 400)
    rows = PackedRows([[line] for line in lines], repeat_passage)
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        rows.set_epoch(epoch)
        for expected, found in zip(read(rows), loader, strict=True):
            assert (expected == found["input_ids"].numpy()).all()


def test_facts_are_stated_once_and_used_once_further_on(tokenizer):
    words = " ".join(a + b + c + d for a in "bdfgk" for b in "aeiou" for c in "lmnrt" for d in "aeiou")
    (long,) = encode_documents([" ".join([words] * 4)], tokenizer, progress=False)
    rows = practise_retrieval(pack([long], len(long)), 0.0, 1.0, 1000, tokenizer)
    (first,) = read(rows)
    rows.set_epoch(1)
    (second,) = read(rows)
    assert len(first) == len(second) == len(long)
    drawn = []
    for tokens in (first, second):
        numbers = Counter(re.findall(r"\d{3,}", tokenizer.decode(tokens)))
        assert len(numbers) >= MIN_FACTS // 2
        assert set(numbers.values()) == {2}
        drawn.append(set(numbers))
    assert drawn[0] != drawn[1]
    assert max(map(len, drawn)) > MIN_FACTS
    rows = practise_retrieval(pack([long] * 4, len(long)), 0.0, 1.0, 1000, tokenizer, max_facts=MIN_FACTS)
    assert all(len(set(re.findall(r"\d{3,}", tokenizer.decode(tokens)))) <= MIN_FACTS for tokens in read(rows))


def test_facts_leave_half_of_a_text(tokenizer):
    (document,) = encode_documents([builtin_text()[:1500]], tokenizer, progress=False)
    changed = state_facts(document, random.Random(0), tokenizer)
    assert len(changed) == len(document)
    assert (changed != document).any()
    kept = tokenizer.decode(document[: len(document) // 2])
    pieces = iter(tokenizer.decode(changed))
    assert all(letter in pieces for letter in kept)  # in order, with facts between


def test_practice_does_not_know_the_tasks():
    asked = ("magic", "pass key", "number", "mentioned")
    assert not [form for form in (*FACTS_STATED, *FACTS_USED, *FACT_KEYS) if any(word in form for word in asked)]


def test_a_document_of_few_words_is_given_no_facts(tokenizer):
    (document,) = encode_documents(["12 " * 2000], tokenizer, progress=False)
    assert (state_facts(document, random.Random(0), tokenizer) == document).all()


def test_collator_joins_rows_into_one_sequence_of_documents():
    rows = pack(documents_of(6, 5, 2, 4), 8)
    batch = PackedRowsCollator()([rows[0], rows[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape
    assert batch["input_ids"].shape[0] == 1
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert batch["cu_seq_lens_q"].tolist() == [*starts, batch["input_ids"].shape[1]]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 6


def dense_model():
    return make_model("llama")


def sparse_model():
    from modeling_nsa import NSAConfig, NSAForCausalLM

    torch.manual_seed(0)
    config = NSAConfig(
        vocab_size=272,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        **SMALL_NSA,
    )
    return NSAForCausalLM(config).eval()


@pytest.mark.parametrize("make", [dense_model, sparse_model])
def test_packed_loss_is_the_loss_of_the_documents_one_by_one(make):
    model = make()
    model.config.use_cache = False  # as Trainer does
    generator = np.random.default_rng(0)
    documents = [generator.integers(3, 272, length).astype(np.int32) for length in (90, 50, 41, 5, 2, 33, 70)]
    rows = pack(documents, 100)
    batch = PackedRowsCollator()([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        packed = model(**batch).loss
        losses, counts = [], []
        for document in documents:
            ids = torch.from_numpy(document.astype(np.int64))[None]
            losses.append(model(input_ids=ids, labels=ids).loss * (len(document) - 1))
            counts.append(len(document) - 1)
    torch.testing.assert_close(packed, sum(losses) / sum(counts), rtol=1e-5, atol=1e-5)
