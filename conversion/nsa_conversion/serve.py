# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible HTTP server for one model: transformers' own server, told of the NSA model type."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from .errors import NSAError
from .parsing import Parser
from .sources import find_model, load_errors, parse_dtype

__all__ = ["main", "serve"]

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
QUANTIZATION = ("bnb-4bit", "bnb-8bit")


def serve(
    model: str | Path,
    *,
    host: str = "localhost",
    port: int = 8000,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    quantization: str | None = None,
    compile: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    enable_cors: bool = False,
    log_level: str = "warning",
    seed: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Load a model and answer requests on `/v1/chat/completions`, `/v1/completions` and `/v1/responses` until stopped.

    Args:
        model: a directory or hub id, native sparse or dense. Requests name it by this very text.
        host: address to listen on.
        port: port to listen on, 1 to 65535.
        dtype: float32, bfloat16, float16, or "auto" for the checkpoint's.
        device: as `device_map` of `from_pretrained`: "auto", "cpu", "cuda:1", …
        attn_implementation: of full-attention layers.
        quantization: "bnb-4bit" or "bnb-8bit"; needs bitsandbytes.
        compile: compile the decoding step, with a static cache.
        chat_template_kwargs: passed to the chat template of every request.
        enable_cors: answer browser pages of any origin.
        log_level: of transformers: debug, info, warning, error or critical.
        seed: of the sampling.
        trust_remote_code: allow code in the checkpoint to run.

    Raises:
        NSAError: a package is missing, the model cannot be loaded or has no tokenizer, or the port is taken.
    """
    _check_packages()
    _check_port(host, port)
    name = os.path.expanduser(str(model))  # no Path: requests name the model as it is written, ./ and / included
    _check_model(name)
    _check_device(device)
    dtype = dtype if dtype == "auto" else str(parse_dtype(dtype)).removeprefix("torch.")
    import transformers
    from transformers.cli.serve import Serve

    import modeling_nsa

    # The server looks the class of a checkpoint up by its name in the library itself.
    transformers.NSAForCausalLM = modeling_nsa.NSAForCausalLM

    class Server(Serve):
        def start_server(self):
            """Leaves the start to the caller, who has the main thread and its signals."""

    try:
        with load_errors(name):
            server = Server(
                force_model=name,
                host=host,
                port=port,
                dtype=dtype,
                device=str(device),
                attn_implementation=attn_implementation,
                quantization=quantization,
                compile=compile,
                chat_template_kwargs=chat_template_kwargs and json.dumps(chat_template_kwargs),
                enable_cors=enable_cors,
                log_level=log_level,
                default_seed=seed,
                trust_remote_code=trust_remote_code,
                non_blocking=True,
            )
    except AttributeError as error:
        raise NSAError(f"model {name!r} cannot be served, it is no causal language model: {error}") from error
    entry = {"id": name, "object": "model", "created": 0, "owned_by": ""}
    server._model_manager.get_gen_models = lambda: [entry]  # else it lists whatever is in the hub's cache
    print(f'serving at http://{host}:{port}/v1, model="{name}"; Ctrl-C stops', file=sys.stderr, flush=True)
    server.server.run()


def _check_packages():
    from transformers.utils import is_accelerate_available
    from transformers.utils.import_utils import is_serve_available

    if not (is_serve_available() and is_accelerate_available()):
        raise NSAError(
            "serving needs fastapi, uvicorn, openai, pydantic and accelerate: pip install 'nsa-transformers[serving]'"
        )


def _check_port(host, port):
    if not 1 <= port <= 65535:
        raise NSAError(f"--port must be between 1 and 65535, got {port}")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, _, _, _, address in addresses:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
                try:
                    probe.bind(address)
                except OSError as error:
                    # localhost may name an address of a protocol that is off
                    if error.errno != errno.EADDRNOTAVAIL or len(addresses) == 1:
                        raise
    except OSError as error:
        reason = error.strerror or error
        raise NSAError(f"cannot listen on --host {host} --port {port}: {reason}; choose another") from error


def _check_model(name):
    if name.endswith(".gguf"):
        raise NSAError(f"{name!r} is a GGUF file; nsa convert makes a directory of it, which can be served")
    directory = find_model(name)
    if directory is not None:
        if "@" in str(directory):
            raise NSAError(f"{name!r} holds an @, which the server takes for a revision; rename the directory")
        if not any((directory / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
            raise NSAError(f"{name} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")


def _check_device(device):
    import torch

    try:
        torch.empty(0, device="cpu" if device == "auto" else device)
    except (RuntimeError, AssertionError) as error:
        raise NSAError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error


def _json_object(text):
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object such as \'{{"date": "today"}}\', got {text!r}')
    return value


def _parser() -> Parser:
    parser = Parser(
        prog="nsa serve",
        description="Serve a model over HTTP with an OpenAI-compatible API: transformers' own server, which then knows "
        "NSA models.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a directory or hub id; requests name it as it is written here")
    add("--host", default="localhost", help="address to listen on; 0.0.0.0: all (default: %(default)s)")
    add("--port", type=int, default=8000, metavar="N", help="port to listen on (default: %(default)s)")
    add("--dtype", default="auto", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 … (default: the accelerators there are, else cpu)")
    add("--attn-implementation", choices=ATTENTION, help="of full-attention layers")
    add("--quantization", choices=QUANTIZATION, help="load in 4 or 8 bit; needs bitsandbytes")
    add("--compile", action="store_true", help="compile the decoding step, with a static cache")
    add("--chat-template-kwargs", type=_json_object, metavar="JSON", help="for the chat template of every request")
    add("--enable-cors", action="store_true", help="answer browser pages of any origin")
    add("--log-level", choices=LOG_LEVELS, default="warning", help="(default: %(default)s)")
    add("--seed", type=int, metavar="N", help="seed of the sampling")
    add("--trust-remote-code", action="store_true", help="allow code in the checkpoint to run")
    return parser


def main(argv: list[str]) -> int:
    """Command line of `nsa serve`.

    Args:
        argv: arguments after `nsa serve`.

    Returns:
        The exit code: 0 also after Ctrl-C, which is how a server is stopped.
    """
    args = vars(_parser().parse_args(argv))
    with contextlib.suppress(KeyboardInterrupt):
        serve(args.pop("model"), **args)  # which may also return when it is stopped
    print("stopped.", file=sys.stderr)
    return 0
