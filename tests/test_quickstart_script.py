"""`scripts/quickstart` with options: what it prints is about the run directory that was trained in."""

import os

import pytest
from helpers import ROOT, call

SCRIPT = ROOT / "scripts/quickstart"


@pytest.mark.parametrize("form", [["--run-dir", "{run}"], ["--run-dir={run}"]], ids=["word", "equals"])
@pytest.mark.parametrize("sample", [True, False])
def test_another_run_directory_is_shown(form, sample, tmp_path):
    """Stand-ins for `jaxtrain` and an installed environment; a run that stops early has no sample."""
    run, scripts = tmp_path / "other", tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "quickstart").write_text(SCRIPT.read_text())
    (scripts / "venv").write_text("")
    files = "report.html sample.txt" if sample else "report.html"
    (tmp_path / "jaxtrain").write_text(f"#!/bin/bash\nmkdir {run}\nfor f in {files}; do echo of-$f > {run}/$f; done\n")
    (tmp_path / "jaxtrain").chmod(0o755)
    words = [word.format(run=run) for word in form]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = call(["bash", scripts / "quickstart", *words], env=environment)
    assert done.returncode == 0, done.stderr
    lines = [f"run:    {run}", f"report: {run}/report.html"]
    lines += [f"sample: {run}/sample.txt", "", "of-sample.txt"] if sample else []
    assert done.stdout.strip().splitlines() == lines
