"""Runs the code blocks of pages in one process, as a reader would: python run_blocks.py BLOCKS.json RESULTS.json ROOT.

The blocks of a page share a working directory; a Python block has a namespace of its own. A Python block that starts
with a comment such as `# mine.py` is written to that file instead of being run. Each line of a bash block is a
jaxtrain command.
"""

import contextlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path


def run_python(text, name):
    if file := re.match(r"# (\S+\.py)\n", text):
        Path(file.group(1)).write_text(text)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(text, name, "exec"), {"__name__": "__main__"})


def run_commands(text, name):
    from jaxtrain.cli import main

    for line in text.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "jaxtrain", f"{name}: mark a block with other commands as sh: {line}"
        assert main(arguments) == 0, f"{name}: {line}"


def run_block(block):
    """Returns "" or the output and the traceback; prints the seconds, for `pytest -s`."""
    start = time.perf_counter()
    name = f"{block['page']}:{block['line']}"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            {"python": run_python, "bash": run_commands}[block["language"]](block["text"], name)
    except BaseException:
        return f"{printed.getvalue()}\n{traceback.format_exc()}"
    print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    return ""


def main():
    blocks, results, root = (Path(argument) for argument in sys.argv[1:])
    outcomes, folders = [], {}
    for block in json.loads(blocks.read_text()):
        if block["page"] not in folders:
            folder = folders[block["page"]] = tempfile.mkdtemp()
            for name in ("README.md", "configs", "jaxtrain"):
                (Path(folder) / name).symlink_to(root / name)
        os.chdir(folders[block["page"]])
        outcomes.append(run_block(block))
        results.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
