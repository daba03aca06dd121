"""The README is true: its code runs, its commands run, its tree is what lies on the disk."""

import re
import tomllib

import pytest
from helpers import ROOT, run, run_python

PACKAGE = ROOT / "jaxtrain"
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def test_every_block_is_of_a_kind_that_a_test_looks_at():
    assert {name for name, _ in BLOCKS} <= {"python", "bash", "sh", "text"}


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block):
    run_python(block)


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


def test_the_layout_lists_the_wings_on_the_disk():
    """Every folder at the top, and every module and wing of the package, each with a phrase."""
    (tree,) = [text for text in blocks("text") if "losses.py" in text]
    listed = {("jaxtrain/" if line.startswith(" ") else "") + line.split()[0] for line in tree.splitlines()}
    assert all(len(line.split()) > 1 or line == "jaxtrain/" for line in tree.splitlines())
    assert len(tree.splitlines()) <= 24
    on_disk = {
        f"{path.relative_to(ROOT)}{'/' if path.is_dir() else ''}"
        for path in [*(ROOT / name for name in ("configs", "docs", "scripts", "tests", "jaxtrain")), *PACKAGE.iterdir()]
        if path.is_dir() or path.suffix == ".py"
    }
    assert listed == on_disk - {"jaxtrain/__init__.py", "jaxtrain/__pycache__/"}
