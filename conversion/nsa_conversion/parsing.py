# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What the parsers of all commands share."""

import argparse
from typing import NoReturn

from nsa_conversion.errors import NSAError

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """Takes flags with dashes or underscores, never shortened; reports a mistake in one line instead of the usage."""

    def __init__(self, **settings):
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(None if args is None else list(map(_dashes, args)), namespace)

    def error(self, message: str) -> NoReturn:
        raise NSAError(f"{message}; see {self.prog} --help")


def _dashes(argument):
    """`--window_size=8` → `--window-size=8`; values keep their underscores."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value
