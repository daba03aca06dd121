"""The compile cache of the command line: on by default, harmless when damaged, equal bits."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import call

from jaxtrain.runtime.config_files import to_json

CACHE_VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
PROGRAM = """
import jax, jax.numpy as jnp
from jaxtrain.runtime.compile_cache import compile_cache

def step(x):
    for _ in range(3):
        x = jnp.sin(x @ x)
    return x

with compile_cache():
    print(jax.jit(step)(jnp.arange(16.0).reshape(4, 4)).tobytes().hex())
"""


def run(tmp_path, *command, **variables):
    """Runs Python with an empty home folder; returns its errors and output."""
    environment = {key: value for key, value in os.environ.items() if key not in CACHE_VARIABLES}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "home"), "PYTHONWARNINGS": "default", **variables}
    command = [sys.executable, *map(str, command or ("-c", PROGRAM))]
    done = call(command, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr, done.stdout


def compiled(tmp_path, module="jit_step"):
    return sorted((tmp_path / "home" / "jaxtrain" / "compiled").glob(f"{module}-*"))


def test_a_second_start_reads_the_cache_and_gives_equal_bits(tmp_path):
    errors, first = run(tmp_path)
    assert "cache" not in errors
    (entry,) = compiled(tmp_path)
    assert entry.parent.stat().st_mode & 0o777 == 0o700
    before = {path: path.stat().st_mtime_ns for path in entry.parent.iterdir()}
    errors, second = run(tmp_path, JAX_EXPLAIN_CACHE_MISSES="1", JAX_LOG_COMPILES="1")
    assert "hit for 'jit_step'" in errors
    assert "PERSISTENT COMPILATION CACHE MISS" not in errors
    _, without = run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="0")
    assert first == second == without
    assert {path: path.stat().st_mtime_ns for path in entry.parent.iterdir()} == before


@pytest.mark.slow
def test_a_second_run_reads_the_cache_and_gives_equal_bits(tiny_config, tmp_path):
    (tmp_path / "tiny.json").write_text(to_json(tiny_config))
    lines = []
    for name in ("first", "second"):
        folder = tmp_path / name
        command = ["-m", "jaxtrain.cli", "train", tmp_path / "tiny.json", "--run-dir", folder, "--train.stop-after", 3]
        errors, _ = run(tmp_path, *command, JAX_LOG_COMPILES="1")
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        clocks = {"tokens_per_second", "step_seconds"}
        lines.append([{k: v for k, v in x.items() if k not in clocks} for x in records if "loss" in x])
    assert "hit for 'jit_train_step'" in errors
    assert len(lines[0]) == 3
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_another_learning_rate_and_length_compile_no_step(tiny_config, tmp_path):
    """The quick form is in tests/training/test_program.py."""
    (tmp_path / "tiny.json").write_text(to_json(tiny_config))
    command = ["-m", "jaxtrain.cli", "train", tmp_path / "tiny.json", "--train.stop-after", "1"]
    run(tmp_path, *command, "--run-dir", tmp_path / "first")
    more = ["--optim.peak-lr", "3e-3", "--train.steps", "40", "--optim.clip-norm", "0.5"]
    errors, _ = run(tmp_path, *command, "--run-dir", tmp_path / "second", *more, JAX_LOG_COMPILES="1")
    assert "hit for 'jit_train_step'" in errors


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"x" * len(data)])
def test_a_damaged_entry_is_compiled_again_with_a_warning(tmp_path, damage):
    _, first = run(tmp_path)
    (entry,) = compiled(tmp_path)
    entry.write_bytes(damage(entry.read_bytes()))
    errors, second = run(tmp_path)
    assert "Error reading persistent compilation cache entry for 'jit_step'" in errors
    assert second == first
    (remedy,) = re.findall("to end this warning: (rm .*)", errors)
    others = [entry.parent / name for name in ("jit_steps-0-cache", "jit_step-0", "jit_step-0-atime")]
    for other in others:
        other.touch()
    subprocess.run(remedy, shell=True, check=True)
    assert not entry.exists()
    assert all(other.exists() for other in others)


@pytest.mark.parametrize("trouble", ["a file", "open to others"])
def test_a_folder_that_cannot_be_used_is_reported_and_costs_nothing_else(trouble, tmp_path):
    if trouble == "a file":
        (tmp_path / "home").write_text("")
        expected = "no compile cache: [Errno 20] Not a directory"
    else:
        folder = tmp_path / "home" / "jaxtrain" / "compiled"
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        expected = f"no compile cache: others may write to {folder}"
    errors, output = run(tmp_path)
    assert expected in errors
    assert output
    assert not (tmp_path / "home").is_dir() or not compiled(tmp_path, "*")


def test_the_cache_folder_of_the_user_is_used(tmp_path):
    errors, _ = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert "cache" not in errors
    assert not (tmp_path / "home" / "jaxtrain").exists()
    assert (tmp_path / "mine").is_dir()
