# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""What the parsers of all commands share."""

import argparse
import copy
from typing import NoReturn

from nsa_conversion.errors import NSAError

__all__ = ["HelpFormatter", "Parser"]

# names of types -> what stands for a value
_METAVARS = {"int": "N", "float": "X", "string_to_bool": "BOOL"}


class HelpFormatter(argparse.HelpFormatter):
    """Shows every flag once, with dashes; what a number is; and a default where there is one and the text is silent."""

    def _format_action_invocation(self, action):
        return super()._format_action_invocation(_dashed(action))

    def _get_default_metavar_for_optional(self, action):
        name = getattr(action.type, "__name__", None)
        return _METAVARS.get(name) or super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action):
        text = action.help or ""
        if action.option_strings and action.nargs != 0 and "default" not in text:
            # 0 is worth saying, False is not
            nothing = action.default is None or action.default is False
            if not nothing and action.default not in ("", [], argparse.SUPPRESS):
                text += " (default: %(default)s)"
        return text


def _dashed(action):
    """The action without the flags that only repeat another with underscores."""
    if not any("_" in flag for flag in action.option_strings):
        return action
    action = copy.copy(action)
    dashed = [flag for flag in action.option_strings if "_" not in flag]
    action.option_strings = dashed or [_dashes(flag) for flag in action.option_strings]
    return action


class Parser(argparse.ArgumentParser):
    """Takes flags with dashes or underscores, never shortened; reports a mistake in one line instead of the usage."""

    def __init__(self, **settings):
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter, **settings})

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
