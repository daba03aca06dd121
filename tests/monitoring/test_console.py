"""The console: plain lines off a terminal, a panel redrawn in place on one."""

import io
import re
import sys
import threading
from contextlib import closing

import pytest

from jaxtrain.monitoring.console import Console
from jaxtrain.monitoring.panel import Panel, Sparkline

FIELDS = {
    "step": 20,
    "loss": 3.14159,
    "grad_norm": 0.98765,
    "learning_rate": 0.000123456,
    "tokens_per_second": 1234567.8,
    "step_seconds": 2.0,
}
LINE = "step 20/2000 1.0%  1,234,568 tokens/s  loss 3.1416  grad_norm 0.988  lr 1.23e-04  1h06m left"


def show(console, fields=FIELDS):
    console.step(fields["step"], fields)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    return Terminal()


def test_plain_lines():
    stream = io.StringIO()
    with closing(Console(2000, stream)) as console:
        console.table("run", [("model", "llama [bold]4[/bold]"), ("steps", "2000")])
        show(console)
        console.print("eval [x]")
        show(console, {**FIELDS, "step": 2000, "grad_norm": 1.5, "clip_factor": 2 / 3})
    assert stream.getvalue().splitlines() == [
        "run",
        "  model  llama [bold]4[/bold]",
        "  steps  2000",
        LINE,
        "eval [x]",
        "step 2000/2000 100.0%  1,234,568 tokens/s  loss 3.1416  grad_norm 1.5 clipped  lr 1.23e-04  0s left",
    ]


def test_the_share_of_the_peak_is_shown_where_it_is_known():
    stream = io.StringIO()
    with closing(Console(2000, stream)) as console:
        show(console, FIELDS | {"mfu": 0.4123})
    assert stream.getvalue() == LINE.replace("tokens/s", "tokens/s  41.2% MFU") + "\n"


class FullLog(io.StringIO):
    """A log on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_run_continues_without_output(monkeypatch, is_terminal):
    monkeypatch.setenv("TERM", "xterm")
    stream = FullLog()
    stream.isatty = lambda: is_terminal
    with closing(Console(2000, stream)) as console:
        console.table("run", [("steps", "2000")])
        show(console)
        console.print("eval")
        show(console)


def test_standard_output_is_looked_up_when_made(capsys):
    show(Console(2000))
    assert capsys.readouterr().out == LINE + "\n"


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with closing(Console(2000, terminal, redraw_seconds=0)) as console:
        show(console)
    assert terminal.getvalue() == LINE + "\n"


def plain(text):
    """Text without the escapes of a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_terminal_redraws_a_panel(terminal):
    with closing(Console(2000, terminal, redraw_seconds=0)) as console:
        show(console)
        start = len(terminal.getvalue())
        console.event("eval", "", {"step": 30, "nll": 2.5})
        console.event("saved", "", {"step": 30})
        show(console, {**FIELDS, "step": 40, "clip_factor": 0.5, "loss": 2.0, "mfu": 0.41, "skipped": 1.0})
        redraw = terminal.getvalue()[start:]
    assert redraw.startswith("\r\x1b[2K" + "\x1b[1A\x1b[2K" * 3)  # back over four lines, and erase them
    lines = plain(redraw).strip().splitlines()
    assert re.fullmatch(r"step 40/2,000 2.0% +\u2501+  0s elapsed, 1h05m left", lines[0])
    assert re.fullmatch(r"loss +2.0000 +\u2588\u2581 +validation 2.5000 at step 30", lines[1])
    assert re.fullmatch(r"grad_norm +0.988 +\u2581\u2581 +50% clipped, 1 skipped", lines[2])
    assert lines[3] == "lr 1.23e-04   1,234,568 tokens/s   MFU 41.0%   saved step 30"
    assert "\x1b[?25l" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K" + "\x1b[1A\x1b[2K" * 3)  # cursor back, panel gone


def test_panel_is_drawn_at_most_every_two_seconds(terminal):
    """Drawing takes a millisecond or two: under 0.2 % of the loop."""
    now = [100.0]
    with closing(Console(2000, terminal, clock=lambda: now[0])) as console:
        for step in range(1, 101):
            now[0] += 0.1  # ten seconds in all
            show(console, {**FIELDS, "step": step})
    assert terminal.getvalue().count("elapsed") <= 6


@pytest.mark.parametrize("columns", [10, 50, 80, 200])
def test_panel_fits_the_terminal(columns):
    panel = Panel(2000)
    for step in range(1, 400):
        panel.step(step, {**FIELDS, "loss": 5 / step})
    lines = panel.render(columns).plain.splitlines()
    assert len(lines) == 4
    assert all(len(line) <= columns for line in lines)


def test_panel_follows_the_size_of_the_terminal(terminal):
    with closing(Console(2000, terminal, redraw_seconds=0)) as console:
        for columns in (120, 70):
            console._terminal.width = columns
            show(console)
    bars = [line.count("\u2501") for line in plain(terminal.getvalue()).splitlines() if "elapsed" in line]
    assert (bars[0], bars[-1]) == (48, 8)


def test_findings_are_colored_unless_no_color_is_set(terminal, monkeypatch):
    for value, colored in (("1", False), (None, True)):
        monkeypatch.setenv("NO_COLOR", value) if value else monkeypatch.delenv("NO_COLOR")
        monkeypatch.setenv("TERM", "xterm-256color")
        stream = Terminal()
        with closing(Console(2000, stream)) as console:
            console.event("finding", "error: the loss is NaN", {"severity": "error"})
            show(console)
        assert ("\x1b[1;31merror" in stream.getvalue()) == colored
        assert ("\x1b[34m" in stream.getvalue()) == colored


def test_a_sparkline_shows_the_whole_run():
    curve = Sparkline()
    for value in [float("nan"), *range(10_000)]:
        curve.add(float(value))
    assert curve.draw(8) == "".join(map(chr, range(0x2581, 0x2589)))
    assert len(curve.draw(48)) == 48
    assert curve.draw(0) == Sparkline().draw(8) == ""


def test_terminal_gets_its_cursor_back_after_an_error(terminal):
    def interrupted_run():
        with closing(Console(2000, terminal, redraw_seconds=0)) as console:
            show(console)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert "\x1b[?25h" in terminal.getvalue()[-60:]
    assert sys.stdout is not terminal


def test_terminal_prints_text_as_it_is(terminal):
    with closing(Console(2000, terminal, redraw_seconds=0)) as console:
        console.table("[red]run", [("path", "/a" * 100), ("steps", "[x]")])
        console.print("[bold]" + "w " * 100)
        show(console)
        console.print("above :smile:")
    text = terminal.getvalue()
    assert "[red]run" in text
    assert "[x]" in text
    assert text.count("/a") == 100  # folded, not cut
    assert "[bold]" in text
    assert text.count("w ") + text.count("w\n") == 100
    assert text.rindex("step 20/2,000") > text.rindex("above :smile:")


def test_a_terminal_wraps_long_text_at_words_and_keeps_its_indentation(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a" * 30  # longer than a line: whole, so that it can be copied
    with closing(Console(2000, terminal, redraw_seconds=0)) as console:
        console.print(f"warning: the loss of the last hundred steps rose\n  lower optim.peak_lr or look at {path} now")
    assert terminal.getvalue().replace("\r", "").splitlines() == [
        "warning: the loss of the last hundred",
        "steps rose",
        "  lower optim.peak_lr or look at",
        f"  {path}",
        "  now",
    ]


class Watched(Terminal):
    """Stream that signals when a text has been written to it."""

    def __init__(self, text, is_terminal):
        super().__init__()
        self.text, self.is_terminal, self.seen = text, is_terminal, threading.Event()

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        super().write(text)
        if self.text in self.getvalue():
            self.seen.set()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_long_activity_shows_that_it_is_running(terminal, is_terminal):
    stream = Watched("compiling ... 0 s", is_terminal)
    with closing(Console(2000, stream)) as console:
        with console.busy("compiling", first=0.01):
            assert stream.seen.wait(30)
        with console.busy("evaluating"):  # short: not shown
            pass
        show(console)
        with console.busy("sampling", first=0.0):
            console.print("above")
    assert "evaluating" not in stream.getvalue()
    if is_terminal:
        assert stream.getvalue().endswith("\x1b[2K")
    else:
        assert stream.getvalue().splitlines()[:2] == ["compiling ... 0 s", LINE]


def test_time_left_is_from_recent_steps():
    stream = io.StringIO()
    console = Console(100, stream)
    for step in range(1, 51):
        show(console, {**FIELDS, "step": step, "step_seconds": 1000.0 if step < 40 or step == 45 else 0.1})
    assert stream.getvalue().splitlines()[0].endswith("1d03h left")
    assert stream.getvalue().splitlines()[-1].endswith("  5s left")


CONTROL = "\x1b[2J\x07\x9b31m\r\u202e"
ESCAPED = r"\x1b[2J\x07\x9b31m\r\u202e"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_control_characters_never_reach_the_terminal(terminal, is_terminal):
    terminal.isatty = lambda: is_terminal
    with closing(Console(2000, terminal, redraw_seconds=0)) as console:
        before = terminal.getvalue()
        console.print(f"sample {CONTROL}")
        console.event("finding", f"finding {CONTROL}", {})
        console.table(f"title {CONTROL}", [(f"name {CONTROL}", f"value {CONTROL}")])
        text = terminal.getvalue().removeprefix(before)
    assert CONTROL not in text
    assert "\x1b[2J" not in text
    for name in ("sample", "finding", "title", "name", "value"):
        assert f"{name} {ESCAPED}" in text


def test_a_stream_that_is_not_utf8_gets_escapes():
    raw = io.BytesIO()
    console = Console(2000, io.TextIOWrapper(raw, encoding="ascii"))
    console.print("\u20ac 5")
    assert raw.getvalue() == b"\\u20ac 5\n"
