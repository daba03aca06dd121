"""scripts/test and .ci/run with stand-ins for the tools: what they run, and that every failure counts."""

import os
import shutil
import sys

import pytest
from helpers import ROOT, call


@pytest.fixture
def shell(tmp_path):
    """Runs a copy of the repository's scripts; stand-ins log their calls and fail if FAIL matches them."""
    for name in ("scripts/venv", "scripts/test", ".ci/run"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "tests/core").mkdir(parents=True)
    (tmp_path / "tests/test_cli.py").touch()
    log = tmp_path / "log"

    def stand_in(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        call = f'"{path.name} $*"'
        path.write_text(f"#!/bin/sh\necho {call} >>{log}\ncase {call} in ${{FAIL:-nothing}}) exit 1;; esac\n")
        path.chmod(0o755)

    def run(*command, stand_ins=(), **environment):
        log.write_text("")
        for name in stand_ins:
            stand_in(tmp_path / "bin" / name)
        kept = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path)}
        done = call(command, cwd=tmp_path, env=kept | environment)
        return done.returncode, log.read_text().splitlines(), done.stderr

    return run


TOOLS = ("python", "uv", "ruff", "mypy")


def test_scripts_test_installs_once_and_checks_everything(shell, tmp_path):
    (tmp_path / "venv").mkdir()
    code, calls, _ = shell("scripts/test", stand_ins=TOOLS, VIRTUAL_ENV=str(tmp_path / "venv"))
    assert code == 0
    parts = [call.split()[:2] for call in calls]
    assert parts[:3] == [["uv", "pip"], ["ruff", "check"], ["ruff", "format"]]
    assert sorted(parts[3:]) == [["mypy"], ["python", "-m"]]  # beside each other
    code, calls, _ = shell("scripts/test", "tests/core", VIRTUAL_ENV=str(tmp_path / "venv"))
    assert code == 0
    assert calls == ["python -m pytest -n 2 --dist worksteal tests/core"]
    _, calls, _ = shell("scripts/test", "tests/test_cli.py::test_name", "-x", VIRTUAL_ENV=str(tmp_path / "venv"))
    assert calls == ["python -m pytest tests/test_cli.py::test_name -x"]


@pytest.mark.parametrize("failing", ["*pip install*", "ruff check*", "ruff format*", "mypy*", "python -m pytest*"])
def test_scripts_test_fails_with_each_of_its_parts(failing, shell, tmp_path):
    (tmp_path / "venv").mkdir()
    code, _, _ = shell("scripts/test", stand_ins=TOOLS, VIRTUAL_ENV=str(tmp_path / "venv"), FAIL=failing)
    assert code != 0


@pytest.fixture
def stubbed(shell, tmp_path):
    """Runs .ci/run with stand-ins for scripts/test and scripts/venv; `bad` are the environments whose tests fail."""

    def run(*, pythons=("python3.11", "python3.12"), bad="none", install="true"):
        (tmp_path / "scripts/test").write_text(f'#!/bin/sh\necho "$VENV $*"\n[ "$VENV" != {bad} ]\n')
        (tmp_path / "scripts/venv").write_text(f"{install}\n")
        for version in ("3.11", "3.12", "3.13"):  # hides the real ones
            hidden = tmp_path / "bin" / f"python{version}"
            hidden.parent.mkdir(exist_ok=True)
            hidden.write_text(f"#!/bin/sh\nexit {int(f'python{version}' not in pythons)}\n")
            hidden.chmod(0o755)
        return shell(".ci/run", stand_ins=("python",))  # the real one would import torch

    return run


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, 0),
        ({"pythons": ("python3.11", "python3.13")}, 0),
        ({"bad": ".venv-main"}, 1),
        ({"bad": ".venv-other"}, 1),
        ({"install": "false"}, 1),
        ({"pythons": ("python3.12",)}, 1),
        ({"pythons": ("python3.11",)}, 1),
    ],
)
def test_ci_fails_with_each_of_its_parts(options, code, stubbed):
    assert stubbed(**options)[0] == code


def test_a_test_that_hangs_is_one_named_failure_with_its_stack(tmp_path):
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "test_two.py").write_text("import threading\n\n\ndef test_ends():\n    pass\n\n\n")
    with (tmp_path / "test_two.py").open("a") as file:
        file.write("def test_hangs():\n    threading.Event().wait()\n")
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "pytest_timeout", "-n", "1", "-o", "timeout=1"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = call(command, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert "FAILED test_two.py::test_hangs" in done.stdout
    assert "1 failed, 1 passed" in done.stdout
    assert 'test_two.py", line 9 in test_hangs' in done.stderr
