"""Tables, bytes, durations and escapes."""

import doctest
import math

import pytest

from jaxtrain.monitoring import tables
from jaxtrain.monitoring.tables import format_seconds, format_table
from jaxtrain.runtime import terminal
from jaxtrain.runtime.terminal import printable, report_error


def test_the_examples_are_right():
    for module, number in ((tables, 3), (terminal, 1)):
        result = doctest.testmod(module)
        assert result.attempted >= number
        assert result.failed == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (3599.6, "1h00m"), (86400, "1d00h"), (math.nan, "?"), (math.inf, "?")],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_a_wide_table_wraps_or_cuts_its_cells():
    lines = format_table(("name", "text"), [("a", "x" * 300)], cut=("text",)).splitlines()
    assert [len(line) for line in lines[1:]] == [120, 120]
    assert lines[2].endswith("x\u2026")
    assert format_table(("name", "text"), [("a", "x" * 300)]).count("x") == 301  # and one in the head


def test_cells_are_printed_as_they_are_and_escaped():
    text = format_table(("name",), [("[bold]x[/bold]",), ("\x1b[31m",)])
    assert "[bold]x[/bold]" in text
    assert r"\x1b[31m" in text


@pytest.mark.parametrize("character", ["\x1b", "\x07", "\x00", "\r", "\x7f", "\x9b", "\u202e", "\u2028", "\ud800"])
def test_terminal_controls_are_escaped(character):
    assert character not in printable(f"a{character}b")
    assert printable("a\n\tb \u20ac \u5b57") == "a\n\tb \u20ac \u5b57"
    assert printable("\u20ac", encoding="ascii") == r"\u20ac"


def test_an_error_is_escaped(capsys):
    assert report_error(ValueError("no config file \x1b[2J\x07.py")) == 2
    assert capsys.readouterr().err == "error: no config file \\x1b[2J\\x07.py\n"
