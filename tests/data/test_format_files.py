"""Formats of the user's own, in this process and in workers, and the end of the workers."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from format_helpers import JSON_LINES
from helpers import LIMIT, start, wait_until

from jaxtrain.cli import main
from jaxtrain.data.prepare.formats import FORMATS, Format
from jaxtrain.data.prepare.passes import Limits
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.prepare.tasks import run_tasks
from jaxtrain.data.store import open_store
from jaxtrain.runtime.terminal import report_error

PLUGIN = """
from helper_of_the_plugin import SEPARATOR
from jaxtrain.data.prepare.formats import FORMATS, Format
from jaxtrain.data.prepare.streams import open_stream

def pages(path, start, stop, text_field):
    with open_stream(path) as stream:
        yield from stream.read(4096).rstrip(b"\\0").decode().split(SEPARATOR)

FORMATS[".pages"] = Format(pages, file=__file__)
"""


def test_a_format_from_outside_reaches_the_command_and_its_workers(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(FORMATS, ".pages", FORMATS[""])  # restored after the test
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "helper_of_the_plugin.py").write_text('SEPARATOR = "\\f"\n')
    pages = [f"page {number} " + "of words " * (number % 5) for number in range(40)]
    for number in range(4):
        data = "\f".join(pages[number * 10 : number * 10 + 10]).encode()
        (tmp_path / f"{number}.pages").write_bytes(data)
        os.truncate(tmp_path / f"{number}.pages", 1 << 25)  # a unit each
    command = ["prepare", str(tmp_path / "*.pages"), "--out", str(tmp_path / "store"), "--validation-fraction", "0.2"]
    formats = ["--formats", str(tmp_path / "plugin.py")]
    assert main([*command, *formats, "--num-workers", "2"]) == 0
    store = open_store(tmp_path / "store")
    assert store.train.num_documents + store.validation.num_documents == 40
    assert store.train.num_bytes + store.validation.num_bytes == sum(map(len, pages))
    assert main([*command, *formats]) == 0  # the same request
    (tmp_path / "plugin.py").write_text(PLUGIN + "# changed\n")
    capfd.readouterr()
    assert main([*command, *formats]) == 2
    assert "is not the token store of this request" in capfd.readouterr().err
    assert main([*command, "--formats", "missing.py"]) == 2


def test_a_format_without_its_file_needs_one_process(tmp_path, monkeypatch):
    monkeypatch.setitem(
        FORMATS, ".rows", Format(lambda *arguments: FORMATS[".jsonl"].documents(*arguments), splittable=True)
    )
    (tmp_path / "a.rows").write_bytes(JSON_LINES.encode() * 3)
    options = {"limits": Limits(unit_bytes=100)}
    with pytest.raises(ValueError, match=r"format '\.rows' does not say .*pass Format\(file=__file__\)"):
        prepare([str(tmp_path / "a.rows")], tmp_path / "store", **options)
    prepare([str(tmp_path / "a.rows")], tmp_path / "store", num_workers=1, **options)


@pytest.mark.parametrize(("document", "kind"), [({"text": "a"}, "dict"), (b"a", "bytes"), (None, "NoneType")])
def test_a_reader_that_yields_no_text_is_an_error(document, kind, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, ".rows", Format(lambda *arguments: iter([document]), file=__file__))
    (tmp_path / "a.rows").write_text("a")
    with pytest.raises(ValueError, match=f"a.rows its reader .* yields a {kind}: yield each document as a str"):
        prepare([str(tmp_path / "a.rows")], tmp_path / "store", num_workers=1)


SLEEPER = """
import multiprocessing, os, time
from jaxtrain.data.prepare.formats import FORMATS, Format

def sleep(path, start, stop, text_field):
    if multiprocessing.parent_process() is None:  # the split is chosen there
        yield from map(str, range(1000))
        return
    open(f"{path}.{os.getpid()}.worker", "w").close()
    time.sleep(120)
    yield "x"

FORMATS[".sleep"] = Format(sleep, file=__file__)
"""


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_dead_worker_is_an_error_in_one_line(tmp_path, capsys):
    def die(task):
        raise BrokenProcessPool

    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="a worker process died") as error:
        run_tasks(die, [0], [tmp_path / "0.json"], pool, lambda index: None)
    assert report_error(error.value) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (15, 2))])
def test_workers_end_with_a_killed_prepare(number, tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    for name in "ab":
        with open(tmp_path / f"{name}.sleep", "wb") as stream:
            stream.truncate(1 << 25)
    command = [sys.executable, "-m", "jaxtrain.cli", "prepare", str(tmp_path / "*.sleep"), "--num-workers", "2"]
    command += ["--out", str(tmp_path / "store"), "--formats", str(tmp_path / "sleeper.py")]
    process = start(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: len(list(tmp_path.glob("*.worker"))) == 2, process)
    workers = [int(path.name.split(".")[-2]) for path in tmp_path.glob("*.worker")]
    process.send_signal(number)
    error = process.communicate(timeout=LIMIT)[1]
    wait_until(lambda: not any(map(is_alive, workers)))
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert error == "interrupted\n"
