# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import pytest

from nsa_conversion.errors import NSAError
from nsa_conversion.parsing import Parser


@pytest.fixture
def parser():
    parser = Parser(prog="nsa try")
    parser.add_argument("--window-size", type=int)
    parser.add_argument("--text")
    return parser


@pytest.mark.parametrize("arguments", [["--window-size", "8"], ["--window_size", "8"], ["--window_size=8"]])
def test_dashes_and_underscores(parser, arguments):
    assert parser.parse_args(arguments).window_size == 8


def test_values_keep_their_underscores(parser):
    assert parser.parse_args(["--text=--a_b"]).text == "--a_b"
    assert parser.parse_args(["--text", "a_b"]).text == "a_b"


@pytest.mark.parametrize("arguments", [["--window", "8"], ["--window-size", "x"], ["more"]])
def test_a_mistake_is_one_line_that_names_the_help(parser, arguments, capsys):
    with pytest.raises(NSAError, match=r"; see nsa try --help$"):
        parser.parse_args(arguments)
    assert capsys.readouterr().err == ""


def test_help_shows_a_flag_once_its_kind_and_its_default():
    parser = Parser(prog="nsa try")
    parser.add_argument("--window_size", "--window-size", type=int, default=8, help="tokens")
    parser.add_argument("--rate", type=float, help="steps (default: the model's)")
    parser.add_argument("--name", default="x", help="default: x")
    parser.add_argument("--seed", type=int, default=0, help="of it all")
    parser.add_argument("--fast", action="store_true", help="hurry")
    shown = " ".join(parser.format_help().split())
    assert "--window-size N tokens (default: 8)" in shown
    assert "--window_size N," not in shown
    assert "--rate X steps (default: the model's)" in shown
    assert shown.endswith("--name NAME default: x --seed N of it all (default: 0) --fast hurry")
