"""The first thing a user runs, for real: what it reaches is what the README and the config's header say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOLERANCE = 0.08  # bits per byte: the standard library differs from one Python to the next


def stated(name, text):
    return float(re.search(rf"{name}\D*(\d+\.\d+)", text).group(1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run's folder, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_NUMPY") and k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "jaxtrain.cli", "train", "configs/quickstart.py", "--run-dir", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_reaches_the_stated_loss(finished):
    folder, _ = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluation = [line for line in lines if line.get("event") == "eval"][-1]
    header = (ROOT / "configs" / "quickstart.py").read_text()
    readme = (ROOT / "README.md").read_text()
    for text in (header, readme):
        assert abs(evaluation["bits_per_byte"] - stated("bits per byte", text)) < TOLERANCE
        assert abs(evaluation["nll"] - stated("validation nll", text)) < TOLERANCE
        assert abs(evaluation["gzip_bits_per_byte"] - stated("gzip -9", text)) < TOLERANCE
        assert abs(evaluation["xz_bits_per_byte"] - stated("xz -9", text)) < TOLERANCE


def test_the_sample_looks_like_python(finished):
    folder, _ = finished
    sample = (folder / "sample.txt").read_text()
    assert len(re.findall(r"\b(?:def|self|return|if|import|for|not|None)\b", sample)) >= 5
    assert re.search(r"\n {4}\S", sample)


def test_the_curve_was_drawn(finished):
    folder, printed = finished
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "report.html") in printed
