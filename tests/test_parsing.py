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
