"""The docs: code and commands run, named files exist, and the layout block matches the disk."""

import json
import re
import shlex
import sys
import tomllib

import pytest
from helpers import QUICK_XLA, ROOT, run, user_environment

from jaxtrain import cli

PACKAGE = ROOT / "jaxtrain"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_LINES = {"README.md": 200, "CONTRIBUTING.md": 250, "docs/benchmarks.md": 1000}  # a guide fits on two screens


# The README trains the quickstart; its blocks run here with a smaller model.
QUICKSTART = "jaxtrain train configs/quickstart.py"
SMALLER = " --model.num-layers 1 --model.d-model 32 --model.d-ff 64"


def blocks():
    """Returns every code block with its page, the line that it starts at, and its language."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            place = {"page": str(page.relative_to(ROOT)), "line": line}
            found.append(place | {"language": match.group(1), "text": match.group(2)})
    return found


BLOCKS = blocks()
CODE = [block for block in BLOCKS if block["language"] in ("python", "bash")]


def identifier(block):
    return f"{block['page']}:{block['line']}"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Runs all blocks in one process, on one device and without strict modes, as users have it."""
    folder = tmp_path_factory.mktemp("blocks")
    smaller = [block | {"text": block["text"].replace(QUICKSTART, QUICKSTART + SMALLER)} for block in CODE]
    assert smaller != CODE
    (folder / "blocks.json").write_text(json.dumps(smaller))
    command = [sys.executable, ROOT / "tests/run_blocks.py", folder / "blocks.json", folder / "results.json", ROOT]
    environment = user_environment(JAX_PLATFORMS="cpu", TMPDIR=str(folder), XLA_FLAGS=QUICK_XLA, PYTHONPATH=str(ROOT))
    print(run(command, environment=environment, timeout=1200))
    results = json.loads((folder / "results.json").read_text())
    return {identifier(block): result for block, result in zip(CODE, results, strict=True)}


@pytest.mark.timeout(1300)
@pytest.mark.parametrize("block", CODE, ids=identifier)
def test_code_runs(block, outcomes):
    assert outcomes[identifier(block)] == ""


def test_every_block_has_a_language_that_a_test_checks():
    assert {block["language"] for block in BLOCKS} <= {"python", "bash", "sh", "text"}


def test_sh_blocks_name_existing_files_extras_and_commands(capsys):
    """Checks the files, extras and commands in `sh` blocks, which need a network, an accelerator or minutes."""
    cli.main(["--help"])
    commands = re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for block in BLOCKS if block["language"] == "sh" for line in block["text"].splitlines()]
    for line in lines:
        for extra in re.findall(r"\.\[(\w+)\]", line):
            assert extra in extras, line
        for path in re.findall(r"\b(?:scripts|configs|tests|docs)/[\w./]+", line):
            assert (ROOT / path.split("::")[0]).exists(), line
        words = shlex.split(line, comments=True)
        if words[:1] == ["jaxtrain"]:
            assert words[1] in commands, line
    assert any("scripts/quickstart" in line for line in lines)
    assert any("scripts/test" in line for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_short(page):
    name = str(page.relative_to(ROOT))
    assert len(page.read_text().splitlines()) <= MAX_LINES.get(name, 140)


def test_every_guide_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"({page.relative_to(ROOT)})" not in readme] == []


def test_the_layout_lists_the_wings_on_the_disk():
    """Every folder at the top, every wing and every module beside the wings."""
    (tree,) = [block["text"] for block in BLOCKS if block["language"] == "text" and "losses.py" in block["text"]]
    lines = tree.splitlines()
    assert all(len(line.split()) > 1 or line == "jaxtrain/" for line in lines)
    listed = {("jaxtrain/" if line.startswith(" ") else "") + line.split()[0] for line in lines}
    folders = {name for name in listed if name.endswith("/")}
    wings = {f"jaxtrain/{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {"configs/", "docs/", "scripts/", "tests/", "jaxtrain/"} | wings
    modules = {name for name in listed - folders if (ROOT / name).is_file()}
    assert modules == listed - folders
    assert modules == {f"jaxtrain/{path.name}" for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
