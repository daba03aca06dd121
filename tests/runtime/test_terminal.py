"""Terminal controls in names and texts are escaped in every printed line."""

import ast
import io
import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import jaxtrain
from jaxtrain import cli
from jaxtrain.data.prepare.progress import show_progress
from jaxtrain.monitoring.console import Console
from jaxtrain.monitoring.health import Finding
from jaxtrain.monitoring.tables import format_table
from jaxtrain.runtime.terminal import echo, report_error

# Clear the screen, set the title, overwrite the line, backspace, bell, 8-bit CSI, delete, right-to-left override.
HOSTILE = ["\x1b[2J", "\x1b]0;owned\x07", "\rsafe", "a\x08b", "\x07", "\x9b31m", "\x7f", "\u202egnp.exe", "\x00"]
PRINTERS = {"runtime/terminal.py", "monitoring/console.py"}  # they escape what they print


class Terminal(io.StringIO):
    def isatty(self):
        return True


# A line of its own, after every separator that `str.splitlines` knows.
BREAKS = [f"x{separator}error: forged" for separator in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"] + ["x\r\nerror: forged"]


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


def test_a_line_break_in_a_name_or_value_forges_no_line(tiny_config, tmp_path, capsys):
    """In a file, a run, a flag, a config, a table and a finding."""
    quickstart, store = str(ROOT / "configs" / "quickstart.py"), str(tmp_path / "store")
    for i, name in enumerate(BREAKS):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / f"{name}.jsonl").write_text("{")
        (folder / "config.json").write_text(json.dumps({name: 1}))
        for arguments in (
            ["train", quickstart, "--run-dir", name],
            ["train", quickstart, "--optim.schedule", name],
            ["train", quickstart, f"--{name}", "1"],
            ["train", quickstart, f"--{name}=1"],
            ["train", f"{name}.py"],
            ["train", str(folder / "config.json")],
            ["report", name],
            ["report", f"gs://{name}"],
            ["prepare", name, "--out", store],
            ["prepare", f"{folder}/*.jsonl", "--out", store, "--num-workers", "1"],
            [name],
        )[:: 1 if i in (0, 8) else 3]:
            assert cli.main(arguments) == 2, arguments
        with pytest.raises(ValueError, match="holds a line break"):
            jaxtrain.train(tiny_config, tmp_path / name)
        echo(Finding(name, "error", 3, name, name))
        echo(format_table([name], [[name]]))
        Console(3, sys.stdout).table("title", [("name", name)])
    printed = capsys.readouterr()
    assert "forged" in printed.out
    assert "forged" in printed.err
    lines = (printed.out + printed.err).splitlines()
    assert not [line for line in lines if line.startswith("error: forged")]


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
