# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Shell completion: prints a script that completes commands and flags of `nsa`."""

import importlib

from nsa_conversion.cli import COMMANDS
from nsa_conversion.errors import NSAError
from nsa_conversion.parsing import Parser

__all__ = ["main"]

SHELLS = ("bash", "zsh", "tcsh")


def main(argv: list[str]) -> int:
    """Command line of `nsa completion`.

    Args:
        argv: arguments after `nsa completion`.

    Returns:
        The exit code.

    Raises:
        NSAError: the shtab library is not installed.
    """
    args = _parser().parse_args(argv)
    try:
        import shtab
    except ImportError as error:
        raise NSAError("completion needs the shtab library: pip install 'nsa-transformers[completion]'") from error
    root = Parser(prog="nsa")
    commands = root.add_subparsers()
    for name, (module, about) in COMMANDS.items():
        parser = importlib.import_module(module)._parser()
        commands.add_parser(name, parents=[parser], add_help=False, help=about)
    print(shtab.complete(root, args.shell))
    return 0


def _parser():
    parser = Parser(
        prog="nsa completion",
        description="Print a completion script; for bash: nsa completion bash > ~/.local/share/bash-completion/"
        "completions/nsa",
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell")
    return parser
