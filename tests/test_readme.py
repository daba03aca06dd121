"""The README is true: its code runs, its commands run, its tree is what lies on the disk."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def run(arguments, **options):
    # As a user would have it: no strict modes, one device.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_NUMPY") and k != "XLA_FLAGS"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_block_is_of_a_kind_that_a_test_looks_at():
    assert {name for name, _ in BLOCKS} <= {"python", "bash", "sh", "text"}


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block):
    run([sys.executable, "-W", "error", "-c", block])


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_run(block, tmp_path):
    for name in ("README.md", "configs", "jaxtrain"):
        (tmp_path / name).symlink_to(ROOT / name)
    for line in block.splitlines():
        assert line.startswith("jaxtrain ")
    run(["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path)


def test_set_up_commands_name_scripts_configs_and_extras_that_exist():
    """Blocks marked `sh` need a network, an accelerator or minutes: what they name is checked instead."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    for line in lines:
        for extra in re.findall(r"\.\[(\w+)\]", line):
            assert extra in extras
        for path in re.findall(r"\b(?:scripts|configs)/\S+", line):
            assert (ROOT / path).exists()
    assert any("scripts/quickstart" in line for line in lines)
    assert any("scripts/test" in line for line in lines)


def test_the_file_tree_is_the_one_on_the_disk():
    (tree,) = [text for text in blocks("text") if "losses.py" in text]
    listed, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            folder = f"jaxtrain/{name}" if line.startswith(" ") else name
        else:
            assert len(line.split()) > 1, f"{name} has no phrase"
            listed.add(f"{folder}{name}")
    on_disk = {
        str(path.relative_to(ROOT))
        for pattern in ("jaxtrain/**/*.py", "configs/*.py", "scripts/*")
        for path in ROOT.glob(pattern)
        if path.name != "__init__.py" and path.is_file()
    }
    assert listed == on_disk
