# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The `nsa` command: one line of dispatch per subcommand, one line of text per user's mistake."""

import importlib
import os
import sys

__all__ = ["COMMANDS", "main"]

# name: (module with `main(argv) -> int`, what it does)
COMMANDS = {
    "convert": ("nsa_conversion.convert", "turn a full-attention checkpoint into an NSA model"),
    "finetune": ("nsa_conversion.finetune", "train a converted model, fully or with LoRA"),
    "eval": ("nsa_conversion.evaluate", "loss, retrieval and selection, side by side with the dense model"),
    "generate": ("nsa_conversion.generate", "answer a prompt or chat, with streaming"),
    "serve": ("nsa_conversion.serve", "serve a model over HTTP with an OpenAI-compatible API"),
    "push": ("nsa_conversion.hub", "upload a model or an adapter to the Hugging Face hub"),
    "inspect": ("nsa_conversion.inspect", "draw what the sparse layers read in a text"),
    "env": ("nsa_conversion.env", "versions, devices, and which implementation will run and why"),
    "completion": ("nsa_conversion.completion", "print a script that completes commands and flags in a shell"),
    "demo": ("nsa_conversion.demo", "convert, compare, fine-tune and run SmolLM2-135M from start to finish"),
}
# extra of this project: packages that it brings
EXTRAS = {"train": ("accelerate", "datasets", "peft"), "gguf": ("gguf",), "eval": ("matplotlib",)}


def _usage():
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: nsa COMMAND [ARGUMENTS]",
            "",
            "Native Sparse Attention models from full-attention checkpoints.",
            "",
            "commands:",
            *lines,
            "",
            "`nsa COMMAND --help` lists the arguments of a command. `nsa --version` prints versions.",
            "Exit codes: 0 done, 1 a comparison failed, 2 a mistake, said in one line, 130 interrupted, 141 output not "
            "read to its end.",
            "Set NSA_DEBUG=1 for the full stack trace of an error.",
        ]
    )


def _versions():
    from importlib.metadata import PackageNotFoundError, version

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return f"nsa {installed('nsa-transformers')} (transformers {installed('transformers')}, torch {installed('torch')})"


def _fail(command, message):
    text = " ".join(str(message).split()) or "failed without a message; set NSA_DEBUG=1 to see where."
    print(f"nsa {command}: error: {text}" if command else f"nsa: error: {text}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Run `nsa COMMAND …`.

    Args:
        argv (list[str] | None): the arguments after `nsa`; `sys.argv[1:]` by default.

    Returns:
        int: exit code; 0 on success, 2 for a user's mistake, 130 after Ctrl-C, 141 where the reader of the output, such
        as `head`, has left.
    """
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # at exit it could not be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 141


def _run(argv):
    if argv[:1] == ["help"] and len(argv) > 1:
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(_versions())
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        return _fail("", f"unknown command {command!r}; the commands are {', '.join(COMMANDS)}.")
    debug = os.environ.get("NSA_DEBUG") == "1"
    try:
        return importlib.import_module(COMMANDS[command][0]).main(rest) or 0
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"nsa {command}: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except ImportError as error:
        # An optional dependency that is absent is the user's to install; a broken import of our own is not.
        if debug or (error.name or "").startswith(("nsa_", "modeling_nsa")):
            raise
        # libraries raise ImportErrors of their own, which name a package in the text alone
        text = error.name or str(error)
        extra = next((extra for extra, names in EXTRAS.items() if any(name in text for name in names)), None)
        how = f": pip install 'nsa-transformers[{extra}]'" if extra else " with pip."
        return _fail(command, f"{str(error).strip(' .')}. Install the missing package{how}")
    except (ValueError, NotImplementedError, OSError) as error:  # NSAError is a ValueError
        if debug:
            raise
        return _fail(command, error)
    except Exception as error:
        # torch's, which is not imported here
        if debug or type(error).__name__ != "OutOfMemoryError":
            raise
        hint = "Shorten the texts, take smaller batches, or try --dtype bfloat16."
        return _fail(command, f"the device has not enough memory. {hint} {error}")
