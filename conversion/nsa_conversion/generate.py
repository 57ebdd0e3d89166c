# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""A quick look at a model: answer a prompt, or chat, printing tokens as they come."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from .data import read_text
from .errors import NSAError
from .evaluate import default_device
from .parsing import Parser
from .sources import check_token_ids, load_model

__all__ = ["generate", "main"]

CHAT_HELP = "Type a message and press Enter. /clear forgets the conversation; /exit, Ctrl-D or Ctrl-C leave."


class _CountingStreamer(TextStreamer):
    """`TextStreamer` that knows how many tokens came and when the first did."""

    def __init__(self, tokenizer, **kwargs):
        super().__init__(tokenizer, **kwargs)
        self.tokens = 0
        self.first_token_at: float | None = None
        self._prompt_seen = False

    def put(self, value):
        if self._prompt_seen:
            self.tokens += value.numel()
            if self.first_token_at is None:
                self.first_token_at = time.perf_counter()
        self._prompt_seen = True
        super().put(value)


def _check_text(text: str, name: str) -> None:
    """Refuse what Python makes of arguments and input that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NSAError(f"{name} is not UTF-8 text (character {error.start}); set the terminal to UTF-8") from None


def _prompt_ids(tokenizer, prompt: str | list[dict[str, str]], raw: bool) -> torch.Tensor:
    """Token ids [1, T] of a text or a conversation; text becomes a user's message where there is a chat template."""
    if raw or tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise NSAError("the tokenizer has no chat template, so it cannot chat; use --prompt with --raw")
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise NSAError("the prompt is empty; give at least one token")
    return ids


def generate(
    model,
    tokenizer,
    prompt: str | list[dict[str, str]],
    *,
    max_new_tokens: int = 256,
    raw: bool = False,
    stream: bool = True,
    **sampling: Any,
) -> tuple[str, dict[str, float]]:
    """Answer a prompt, streaming the text to standard output.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompt: text, or a conversation of `{"role", "content"}` messages.
        max_new_tokens: most tokens to generate, at least 1.
        raw: continue the text as it is, without the chat template.
        stream: print while generating.
        sampling: passed to `model.generate` (`do_sample`, `temperature`, `top_p`, …).

    Returns:
        (answer, speed): speed holds `tokens`, `seconds` of generation, the prompt included, and `tokens_per_second`
        of decoding after the first token.

    Raises:
        NSAError: an empty prompt, a token that the model has no embedding for, a conversation without a chat
            template, or a bad `max_new_tokens`.
    """
    if max_new_tokens < 1:
        raise NSAError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    ids = _prompt_ids(tokenizer, prompt, raw)
    check_token_ids(model, int(ids.max()))
    ids = ids.to(model.device)
    streamer = _CountingStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if not stream:
        streamer.on_finalized_text = lambda text, stream_end=False: None
    start = time.perf_counter()
    try:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            # whatever the generation config says: what is streamed is one answer, token by token
            **{"num_beams": 1, "num_return_sequences": 1, **sampling},
        )
    except KeyboardInterrupt:
        streamer.end()  # prints what is still held back, and ends the line
        raise
    end = time.perf_counter()
    decoding = end - (streamer.first_token_at or end)
    speed = {
        "tokens": streamer.tokens,
        "seconds": end - start,
        "tokens_per_second": (streamer.tokens - 1) / decoding if streamer.tokens > 1 and decoding > 0 else 0.0,
    }
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True), speed


def _print_speed(speed: dict[str, float]) -> None:
    print(
        f"[{speed['tokens']} tokens in {speed['seconds']:.1f} s, {speed['tokens_per_second']:.1f} tokens/s decoding]",
        file=sys.stderr,
    )


def _chat(model, tokenizer, settings: dict[str, Any]) -> None:
    """Read messages from standard input and answer them until it ends; Ctrl-C stops an answer, or leaves."""
    if tokenizer.chat_template is None:
        raise NSAError("the tokenizer has no chat template, so it cannot chat; use --prompt with --raw")
    print(CHAT_HELP, file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            message = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        except UnicodeDecodeError as error:
            raise NSAError(f"the message is not UTF-8 text (byte {error.start}); set the terminal to UTF-8") from None
        _check_text(message, "the message")
        if message == "/exit":
            return
        if message == "/clear":
            messages = []
            continue
        if not message:
            continue
        try:
            answer, speed = generate(model, tokenizer, [*messages, {"role": "user", "content": message}], **settings)
        except KeyboardInterrupt:
            print("[stopped; this exchange is forgotten]", file=sys.stderr)
            continue
        messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        _print_speed(speed)


def _parser() -> Parser:
    parser = Parser(prog="nsa generate", description="Answer a prompt, or chat, printing tokens as they come.")
    parser.add_argument("model", metavar="MODEL", help="a directory, hub id or GGUF file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the prompt")
    source.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file with the prompt")
    source.add_argument("--chat", action="store_true", help="chat on the terminal")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, help="most tokens to generate (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, help="sample at this temperature; 0: always the likeliest token")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens that hold this probability")
    parser.add_argument("--top-k", type=int, help="sample from this many of the likeliest tokens")
    parser.add_argument("--repetition-penalty", type=float, help="above 1: makes tokens already there less likely")
    parser.add_argument("--seed", type=int, help="seed of the sampling")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the first accelerator, else cpu)")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow code in the checkpoint to run")
    return parser


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `model.generate`; without any flag the model's generation config decides."""
    if args.temperature is not None and args.temperature < 0:
        raise NSAError(f"--temperature must not be negative, got {args.temperature}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise NSAError(f"--top-p must be above 0 and at most 1, got {args.top_p}")
    if args.top_k is not None and args.top_k < 1:
        raise NSAError(f"--top-k must be at least 1, got {args.top_k}")
    if args.repetition_penalty is not None and args.repetition_penalty <= 0:
        raise NSAError(f"--repetition-penalty must be above 0, got {args.repetition_penalty}")
    sampling = {
        name: getattr(args, name)
        for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        if getattr(args, name) is not None
    }
    if args.temperature == 0:
        # The sampling defaults of a generation config would only draw warnings in greedy search.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | {
            name: sampling[name] for name in ("repetition_penalty",) if name in sampling
        }
    if {"temperature", "top_p", "top_k"} & sampling.keys():
        sampling["do_sample"] = True
    return sampling


def main(argv: list[str]) -> int:
    """Command line of `nsa generate`.

    Args:
        argv: arguments after `nsa generate`.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    if args.chat and args.raw:
        raise NSAError("--chat needs the chat template that --raw turns off; give one of them")
    if args.max_new_tokens < 1:
        raise NSAError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    settings = {"max_new_tokens": args.max_new_tokens, **_sampling(args)}
    prompt = args.prompt if args.prompt_file is None else read_text(args.prompt_file)
    if prompt is not None and not prompt.strip():
        raise NSAError("--prompt is empty; give at least one token")
    if prompt is not None:
        _check_text(prompt, "--prompt")
    model, tokenizer = load_model(
        args.model, dtype=args.dtype, device=args.device or default_device(), trust_remote_code=args.trust_remote_code
    )
    if tokenizer is None:
        raise NSAError(f"{Path(args.model)} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    if hasattr(model, "fuse_projections"):
        with contextlib.suppress(ValueError):  # quantised projections stay as they are
            model.fuse_projections()
    if args.seed is not None:
        set_seed(args.seed)
    if args.chat:
        _chat(model, tokenizer, settings)
        return 0
    try:
        _, speed = generate(model, tokenizer, prompt, raw=args.raw, **settings)
    except KeyboardInterrupt:
        return 130
    _print_speed(speed)
    return 0
