# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import builtins
import io

import pytest
import torch
from tiny import make_checkpoint, make_model

from modeling_nsa import NSAForCausalLM
from nsa_conversion import convert, sources
from nsa_conversion.errors import NSAError
from nsa_conversion.generate import generate, main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return sources.load_model(str(checkpoint))


def greedy(model, ids, count):
    """[1, T] -> the next `count` token ids, without generate."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -count:]


@pytest.mark.parametrize("raw", [True, False])
def test_streams_the_greedy_answer(capsys, loaded, raw):
    model, tokenizer = loaded
    text = "Hello" if raw else "<|user|>Hello</s><|assistant|>"
    expected = greedy(model, tokenizer(text, add_special_tokens=raw, return_tensors="pt")["input_ids"], 12)
    answer, speed = generate(model, tokenizer, "Hello", raw=raw, max_new_tokens=12, do_sample=False)
    kept = expected[: (expected == tokenizer.eos_token_id).nonzero()[0, 0]] if 2 in expected else expected
    assert answer == tokenizer.decode(kept, skip_special_tokens=True)
    assert capsys.readouterr().out.rstrip("\n") == answer.rstrip("\n")
    assert 1 <= speed["tokens"] <= 12
    assert speed["seconds"] > 0


def test_a_generation_config_with_beams_and_several_answers_is_streamed_as_one(tmp_path, capsys, loaded):
    model, tokenizer = sources.load_model(str(make_checkpoint(tmp_path / "model", "llama")))
    model.generation_config.update(num_beams=2, num_return_sequences=2)
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert generate(model, tokenizer, "Hello", **settings)[0] == generate(*loaded, "Hello", **settings)[0]


def test_can_stay_silent(capsys, loaded):
    generate(*loaded, "Hello", max_new_tokens=3, stream=False)
    assert capsys.readouterr().out == ""


def test_takes_a_conversation(loaded):
    messages = [{"role": "user", "content": "Hello"}]
    settings = {"max_new_tokens": 5, "do_sample": False, "stream": False}
    assert generate(*loaded, messages, **settings)[0] == generate(*loaded, "Hello", **settings)[0]
    with pytest.raises(NSAError, match="cannot chat"):
        generate(*loaded, messages, raw=True, **settings)


def test_refuses_tokens_without_an_embedding(loaded):
    model = make_model("llama", vocab_size=60)
    with pytest.raises(NSAError, match=r"gives token id \d+, but the embedding of the model has 60 rows"):
        generate(model, loaded[1], "Hello", max_new_tokens=3)


def test_command_prints_answer_and_speed(tmp_path, capsys, checkpoint):
    (tmp_path / "prompt.txt").write_text("Hello", encoding="utf-8")
    arguments = [str(checkpoint), "--max-new-tokens", "5", "--temperature", "0", "--device", "cpu"]
    assert main([*arguments, "--prompt", "Hello"]) == 0
    first = capsys.readouterr()
    assert "tokens/s" in first.err
    assert main([*arguments, "--prompt-file", str(tmp_path / "prompt.txt")]) == 0
    assert capsys.readouterr().out == first.out


def test_command_fuses_projections_where_it_can(monkeypatch, tmp_path, capsys, checkpoint):
    convert(checkpoint, tmp_path / "nsa", progress=False)
    fused, fuse = [], NSAForCausalLM.fuse_projections
    arguments = [str(tmp_path / "nsa"), "--prompt", "Hello", "--max-new-tokens", "5", "--temperature", "0"]

    def refuse(model):
        raise ValueError

    for replacement in (lambda model: fused.append(fuse(model)), refuse):
        monkeypatch.setattr(NSAForCausalLM, "fuse_projections", replacement)
        assert main([*arguments, "--device", "cpu"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(fused) == 1
    assert answers[0] == answers[1]


def test_sampling_is_repeatable_with_a_seed(capsys, checkpoint):
    arguments = [str(checkpoint), "--prompt", "Hello", "--max-new-tokens", "12", "--device", "cpu"]
    answers = []
    for seed in ("1", "1", "2"):
        main([*arguments, "--temperature", "2.0", "--top-p", "0.99", "--seed", seed])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_chat_remembers_until_cleared(monkeypatch, capsys, checkpoint):
    seen = []
    lines = iter(["one", "", "two", "/clear", "three"])

    def answer(model, tokenizer, prompt, **settings):
        seen.append([message["content"] for message in prompt])
        return f"answer {len(seen)}", {"tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0}

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setitem(main.__globals__, "generate", answer)
    monkeypatch.setattr(builtins, "input", read)
    assert main([str(checkpoint), "--chat", "--device", "cpu"]) == 0
    assert seen == [["one"], ["one", "answer 1", "two"], ["three"]]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # which of them depends on the locale
def test_chat_refuses_what_is_not_utf8(monkeypatch, checkpoint, errors):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
    with pytest.raises(NSAError, match="the message is not UTF-8 text"):
        main([str(checkpoint), "--chat", "--device", "cpu"])


def test_ctrl_c_ends_the_line_and_says_so_by_the_exit_code(monkeypatch, capsys, checkpoint):
    from transformers import GenerationMixin

    def interrupted(self, ids, streamer, **settings):
        streamer.put(ids)
        streamer.put(torch.tensor([80]))
        raise KeyboardInterrupt

    monkeypatch.setattr(GenerationMixin, "generate", interrupted)
    assert main([str(checkpoint), "--prompt", "Hello", "--device", "cpu"]) == 130
    out = capsys.readouterr().out
    assert len(out) > 1
    assert out.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["MODEL", "--prompt", "  "], "--prompt is empty"),
        (["MODEL", "--prompt", "caf\udce9"], r"--prompt is not UTF-8 text \(character 3\)"),
        (["MODEL", "--prompt-file", "missing.txt"], "missing.txt does not exist"),
        (["MODEL", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["MODEL", "--prompt", "x", "--temperature", "-1"], "--temperature must not be negative"),
        (["MODEL", "--chat", "--raw"], "--chat needs the chat template"),
        (["no/such/directory", "--prompt", "x"], "no/such/directory"),
    ],
)
def test_command_refuses(checkpoint, arguments, error):
    with pytest.raises(NSAError, match=error):
        main([str(checkpoint) if argument == "MODEL" else argument for argument in arguments])


def test_command_needs_one_kind_of_prompt(checkpoint):
    for extra in ([], ["--prompt", "x", "--chat"]):
        with pytest.raises(NSAError, match="--prompt"):
            main([str(checkpoint), *extra])


def test_chat_needs_a_template(tmp_path):
    path = make_checkpoint(tmp_path / "model", "llama")
    (path / "chat_template.jinja").unlink()
    with pytest.raises(NSAError, match="no chat template"):
        main([str(path), "--chat", "--device", "cpu"])
    path = make_checkpoint(tmp_path / "bare", "llama", tokenizer=False)
    with pytest.raises(NSAError, match="has no tokenizer"):
        main([str(path), "--prompt", "x", "--device", "cpu"])
