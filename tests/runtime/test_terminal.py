"""Terminal controls in names and texts are escaped in every printed line."""

import ast
import io
import sys
from pathlib import Path

import pytest

import jaxtrain
from jaxtrain import cli
from jaxtrain.data.prepare.progress import show_progress
from jaxtrain.monitoring.console import Console
from jaxtrain.runtime.terminal import echo, report_error

# Clear the screen, set the title, overwrite the line, backspace, bell, 8-bit CSI, delete, right-to-left override.
HOSTILE = ["\x1b[2J", "\x1b]0;owned\x07", "\rsafe", "a\x08b", "\x07", "\x9b31m", "\x7f", "\u202egnp.exe", "\x00"]
PRINTERS = {"runtime/terminal.py", "monitoring/console.py"}  # they escape what they print


class Terminal(io.StringIO):
    def isatty(self):
        return True


def is_clean(text):
    return all(c.isprintable() or c in "\n\t" for c in text)


def direct_prints(tree):
    """Yields the lines that name `print`, or `write` of a standard stream."""
    for node in ast.walk(tree):
        is_write = isinstance(node, ast.Attribute) and ast.unparse(node).endswith(("stdout.write", "stderr.write"))
        if is_write or (isinstance(node, ast.Name) and node.id == "print"):
            yield node.lineno


def test_the_package_prints_through_one_function():
    root = Path(jaxtrain.__file__).parent
    found = {
        str(file.relative_to(root)): lines
        for file in root.rglob("*.py")
        if (lines := list(direct_prints(ast.parse(file.read_text()))))
    }
    assert found.keys() == PRINTERS, found
    assert list(direct_prints(ast.parse("print(1)\nimport sys\nsys.stderr.write('')"))) == [1, 3]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_are_escaped_by_every_printer(name, capsys):
    for stream in (io.StringIO(), Terminal()):
        echo(name, file=stream)
        report_error(OSError(2, "No such file", name))
        assert is_clean(stream.getvalue())
    screen = Terminal()
    echo(name, file=screen, verbatim=True)
    console = Console(3, stream := io.StringIO())
    console.print(name)
    console.table(name, [(name, name)])
    with show_progress(True, stream, line_seconds=0.01) as stages:
        stages(name, None)
        while "s\n" not in stream.getvalue().rpartition(":")[2]:
            pass
    assert all(map(is_clean, (screen.getvalue(), stream.getvalue(), *capsys.readouterr())))
    echo(Path(name))  # any object
    echo(OSError(name), file=sys.stderr)
    assert all(map(is_clean, capsys.readouterr()))
    echo(name, verbatim=True)
    assert capsys.readouterr().out == f"{name}\n"  # a pipe gets a sample as it is


def test_hostile_file_names_are_escaped_by_the_commands(tmp_path, capsys):
    name = "".join(HOSTILE).replace("\0", "")
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.txt").write_text("some text to read\n" * 50)
    (folder / f"{name}.bin").write_bytes(b"\0\1")
    (folder / "config.json").write_text("{")
    (folder / f"{name}.py").write_text("config = 3\n")
    for words in (
        ["prepare", str(folder), "--out", str(tmp_path / "out"), "--num-workers", "1"],
        ["prepare", str(folder / f"{name}.txt"), "--out", str(folder)],
        *(["train", str(folder / file)] for file in (f"{name}.py", "config.json", "none.py", name)),
        *([command, str(folder)] for command in ("eval", "generate", "report")),
        ["replay", str(folder), "--step", name],
        ["train", "configs/quickstart.py", f"--{name}", name],
        [name],
    ):
        cli.main(words)
        for text in capsys.readouterr():
            assert is_clean(text), (words, text)
