# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Serving: `nsa serve` as the openai client sees it, pipelines, and the refusal of continuous batching."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tiny import SMALL_NSA, make_checkpoint
from tiny_nsa import make_ids, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import modeling_nsa  # noqa: F401
from nsa_conversion import convert

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "conversion"))}
CHAT = [{"role": "user", "content": "What do you read when the text is longer than the selection?"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    convert(make_checkpoint(folder / "dense"), folder / "nsa", progress=False, **SMALL_NSA)
    return folder / "nsa"


@pytest.fixture(scope="module")
def expected(directory):
    """Greedy continuation of `CHAT` by `generate` in this process."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = inputs["input_ids"].shape[1]
    assert length > SMALL_NSA["num_selected_blocks"] * SMALL_NSA["select_block_size"]
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, length:], skip_special_tokens=True)


@contextlib.contextmanager
def running(model, **popen):
    """`nsa serve model` in a process of its own: (process, port), once it answers."""
    with socket.create_server(("localhost", 0)) as found:
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "nsa_conversion", "serve", model, "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen) as process:
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health").close()
                    break
                except OSError:
                    assert process.poll() is None, process.stdout.read()
                    time.sleep(0.5)
            yield process, port
        finally:
            process.kill()


@pytest.mark.slow
def test_openai_client(directory, expected):
    pytest.importorskip("fastapi")
    openai = pytest.importorskip("openai")
    name = "./nsa/"  # requests name it as it is written
    # One server for all of it: to start one takes most of the time.
    with running(name, cwd=directory.parent, env=ENV) as (process, port):
        with openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0) as client:
            settings = {"max_tokens": 12, "temperature": 0}
            answer = client.chat.completions.create(model=name, messages=CHAT, **settings)
            assert answer.choices[0].message.content == expected
            assert answer.usage.completion_tokens == 12

            with client.chat.completions.create(model=name, messages=CHAT, stream=True, **settings) as stream:
                chunks = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
            chunks = [chunk for chunk in chunks if chunk]
            assert len(chunks) > 1
            # half a character at the end is held back
            assert "".join(chunks).rstrip("\ufffd") == expected.rstrip("\ufffd")

            answer = client.completions.create(model=name, prompt="Once upon a time", **settings)
            assert answer.usage.completion_tokens == 12

            assert [model.id for model in client.models.list()] == [name]
            with pytest.raises(openai.BadRequestError) as refusal:
                client.chat.completions.create(model="other", messages=CHAT)
            assert f"pinned to '{name}'" in refusal.value.response.text

        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert f'http://localhost:{port}/v1, model="{name}"' in printed
    assert printed.endswith("stopped.\n")
    assert "Traceback" not in printed


@pytest.mark.parametrize("prompts", ["a word " * 9, ["a word " * 9, "b"]])
def test_pipeline(directory, prompts, monkeypatch):
    monkeypatch.setattr("transformers.pipelines.base.logger.error", pytest.fail)  # "The model … is not supported"
    generator = pipeline("text-generation", model=str(directory), device="cpu")
    many = isinstance(prompts, list)
    answers = generator(prompts, batch_size=2, max_new_tokens=4, do_sample=False, return_full_text=False)
    assert len(answers) == (2 if many else 1)
    # a padded batch gives what each prompt gives alone
    for prompt, answer in zip(prompts if many else [prompts], answers):
        alone = generator(prompt, max_new_tokens=4, do_sample=False, return_full_text=False)
        assert (answer if many else answers) == alone


def test_pipeline_chats(directory, expected):
    generator = pipeline("text-generation", model=str(directory), device="cpu")
    (answer,) = generator(CHAT, max_new_tokens=12, do_sample=False)
    assert answer["generated_text"][-1] == {"role": "assistant", "content": expected}


@pytest.mark.parametrize("variant", ["separate", "hybrid"])
def test_continuous_batching_is_refused(variant):
    model = make_model(variant)
    prompts = make_ids(2, 9).tolist()
    with pytest.raises(NotImplementedError, match=r"Use generate\(\) on a padded batch"):
        model.generate_batch(prompts)
    with pytest.raises(NotImplementedError, match="compressed keys"), model.continuous_batching_context_manager():
        pass


def test_continuous_batching_of_dense_layers_is_left_to_transformers():
    model = make_model(layer_types=["full_attention"] * 2, eos_token_id=1)
    assert model.init_continuous_batching() is not None
