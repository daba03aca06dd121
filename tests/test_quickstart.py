"""The first thing a user runs, for real: what it reaches is what the README and the config's header say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Bits per byte, nats: another processor rounds otherwise, and 900 steps make much of it.
TOLERANCE = 0.08


# As the program prints them, and as prose says them.
PATTERNS = {
    "README.md": {
        "nll": r"validation at step \d+: nll ([\d.]+)",
        "bits_per_byte": r"validation at step .* ([\d.]+) bits per byte",
        "gzip_bits_per_byte": r"gzip -9 ([\d.]+)",
        "xz_bits_per_byte": r"xz -9 ([\d.]+) bits",
    },
    "configs/quickstart.py": {
        "nll": r"validation nll ([\d.]+)",
        "bits_per_byte": r"bits per byte ([\d.]+)",
        "gzip_bits_per_byte": r"gzip -9 ([\d.]+)",
        "xz_bits_per_byte": r"xz -9 ([\d.]+)",
    },
}


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
    for name, patterns in PATTERNS.items():
        text = (ROOT / name).read_text()
        stated = {key: float(re.search(pattern, text).group(1).rstrip(".")) for key, pattern in patterns.items()}
        # The standard library differs from one Python to the next: how hard it is, gzip says.
        hardness = evaluation["gzip_bits_per_byte"] / stated["gzip_bits_per_byte"]
        assert abs(hardness - 1) < 0.03
        for key, value in stated.items():
            assert abs(evaluation[key] - hardness * value) < TOLERANCE, f"{name} says {key} {value}: {evaluation[key]}"


def test_the_sample_looks_like_python(finished):
    """In 4,600 characters: a sample of 600 may lie in a docstring. Seen: 70 such words, 37 to 59 indents."""
    folder, _ = finished
    samples = [(folder / "sample.txt").read_text()]
    for seed in range(1, 5):
        command = [sys.executable, "-m", "jaxtrain.cli", "generate", str(folder), "--prompt", "def "]
        command += ["--num-tokens", "1000", "--seed", str(seed)]
        samples.append(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    text = "\n".join(samples)
    assert len(re.findall(r"\b(?:def|self|return|if|import|for|not|None)\b", text)) >= 30
    indents = [len(spaces) for spaces in re.findall(r"^( +)\S", text, re.MULTILINE)]
    assert sum(indent in (4, 8, 12, 16, 20, 24) for indent in indents) >= 15


def test_the_curve_was_drawn(finished):
    folder, printed = finished
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "report.html") in printed
