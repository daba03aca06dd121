"""The command line's compile cache: used by default, never in the way, and the same bits come out of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.config import to_json
from jaxtrain.runtime.compile_cache import _Trouble

CACHE_VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture
def start(tiny_config, tmp_path):
    """Trains three steps in a process of its own; returns its errors, and the bits of its parameters."""
    file = tmp_path / "tiny.json"
    file.write_text(to_json(tiny_config))

    def start(name, **variables):
        environment = {key: value for key, value in os.environ.items() if key not in CACHE_VARIABLES}
        environment |= {"XDG_CACHE_HOME": str(tmp_path / "home"), "PYTHONWARNINGS": "default", **variables}
        run = tmp_path / name
        command = [sys.executable, "-m", "jaxtrain.cli", "train", str(file), "--run-dir", str(run)]
        done = subprocess.run(
            [*command, "--train.stop-after", "3"], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        clocks = {"tokens_per_second", "step_seconds"}
        return done.stderr, [{k: v for k, v in x.items() if k not in clocks} for x in lines if "loss" in x]

    return start


def compiled(tmp_path, module="jit_train_step"):
    return sorted((tmp_path / "home" / "jaxtrain" / "compiled").glob(f"{module}-*"))


def test_a_second_start_takes_what_the_first_compiled_and_has_its_bits(start, tmp_path):
    errors, first = start("first")
    assert "cache" not in errors
    (entry,) = compiled(tmp_path)
    assert entry.parent.stat().st_mode & 0o777 == 0o700
    before = {path: path.stat().st_mtime_ns for path in entry.parent.iterdir()}
    errors, second = start("second", JAX_EXPLAIN_CACHE_MISSES="1", JAX_LOG_COMPILES="1")
    assert "hit for 'jit_train_step'" in errors
    assert "PERSISTENT COMPILATION CACHE MISS" not in errors
    assert {path: path.stat().st_mtime_ns for path in entry.parent.iterdir()} == before
    assert len(first) == 3
    assert second == first
    _, without = start("without", JAX_ENABLE_COMPILATION_CACHE="0")
    assert without == first
    assert {path: path.stat().st_mtime_ns for path in entry.parent.iterdir()} == before


def test_a_damaged_entry_is_said_and_made_anew(start, tmp_path):
    _, first = start("first")
    (entry,) = compiled(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])  # as a process that was killed leaves it
    errors, second = start("second")
    assert "compile cache: jit_train_step was damaged and is made anew" in errors
    assert "warnings.warn" not in errors
    assert second == first
    assert len(entry.read_bytes()) > len(whole) // 2
    assert "compile cache" not in start("third")[0]


@pytest.mark.parametrize("trouble", ["a file", "open to others"])
def test_a_folder_that_cannot_be_used_is_said_and_costs_nothing_else(trouble, start, tmp_path):
    if trouble == "a file":
        (tmp_path / "home").write_text("")
        said = "no compile cache: [Errno 20] Not a directory"
    else:
        folder = tmp_path / "home" / "jaxtrain" / "compiled"
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        said = f"no compile cache: others may write to {folder}"
    errors, lines = start("run")
    assert said in errors
    assert len(lines) == 3
    assert not (tmp_path / "home").is_dir() or not compiled(tmp_path, "*")


def test_what_the_user_has_set_stays(start, tmp_path):
    errors, _ = start("run", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert "cache" not in errors
    assert not (tmp_path / "home" / "jaxtrain").exists()
    assert (tmp_path / "mine").is_dir()


def test_trouble_with_writing_is_said_once_and_leaves_no_torn_entry(tmp_path, capsys):
    for name in ("jit_a-1-cache", "jit_a-2-cache", "jit_ab-1-cache"):
        (tmp_path / name).write_text("x")
    passed = []
    show = _Trouble(tmp_path, lambda *arguments: passed.append(arguments))
    text = "Error writing persistent compilation cache entry for 'jit_a': OSError: [Errno 28] No space left on device"
    for _ in range(2):
        show(UserWarning(text), UserWarning, "compiler.py", 1)
    show(UserWarning("something else"), UserWarning, "other.py", 2)
    captured = capsys.readouterr().err
    assert captured == "compile cache: jit_a could not be kept: OSError: [Errno 28] No space left on device\n"
    assert [str(arguments[0]) for arguments in passed] == ["something else"]
    assert [path.name for path in Path(tmp_path).iterdir()] == ["jit_ab-1-cache"]
