"""The first command that a user runs: it learns, resumes, reports no finding, and reaches the stated figures."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run
from runs import change
from runs import train as train_here

from jaxtrain.cli import main
from jaxtrain.runtime.config_files import load_config

CLI = [sys.executable, "-m", "jaxtrain.cli"]
# The figures in bits per byte and nats, as the program prints them and as the config's header states them.
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
TOLERANCE = 0.08  # rounding differs between processors, and 900 steps amplify it


def train(folder, *flags):
    """Trains the quickstart's config into a folder; returns the output."""
    return run([*CLI, "train", "configs/quickstart.py", "--run-dir", folder, *flags], cwd=ROOT, timeout=1800)


def records(folder):
    """Returns the step lines and the events of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line], [line for line in lines if "event" in line]


def check_is_healthy(folder):
    steps, events = records(folder)
    assert [event for event in events if event["event"] == "finding"] == []
    assert sum(step["skipped"] for step in steps) == 0


def check_is_complete(folder, printed):
    """Checks for a curve, a report and a sample."""
    assert b"uPlot" in (folder / "report.html").read_bytes()
    assert str(folder / "report.html") in printed
    assert (folder / "sample.txt").read_text().startswith("def ")


@pytest.fixture(scope="module")
def source_code(tmp_path_factory):
    """Token store of a twentieth of the standard library, which prepares and evaluates in a second."""
    folder = tmp_path_factory.mktemp("quickstart") / "store"
    library = Path(os.__file__).parent
    sources = [library / package / "*.py" for package in ("json", "email", "logging", "unittest")]
    assert main(["prepare", *map(str, sources), "--out", str(folder), "--validation-fraction", "0.1"]) == 0
    return folder


def test_a_short_quickstart_learns_resumes_and_is_healthy(source_code, tmp_path, capsys):
    """Quick sibling: the quickstart's own model and optimizer for 24 steps, stopped after 12, in this process."""
    folder = tmp_path / "run"
    fields = {"steps": 24, "eval_every": 12, "log_every": 1, "sample_tokens": 50, "batch_size": 4, "eval_batches": 16}
    config = load_config(ROOT / "configs/quickstart.py")
    config = change(config, data={"store": str(source_code)}, train=fields, mesh={"data": 1})
    train_here(change(config, train={"stop_after": 12}), folder, report=True)
    train_here(config, folder, report=True)
    printed = capsys.readouterr().out
    steps, events = records(folder)
    assert [step["step"] for step in steps] == list(range(1, 25))
    assert "resume" in {event["event"] for event in events}
    losses = [event["nll"] for event in events if event["event"] == "eval"]
    assert steps[0]["loss"] > 5.4  # ln 257 is 5.55
    assert losses[-1] < min(3.4, losses[0])
    check_is_healthy(folder)
    check_is_complete(folder, printed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and output of the real quickstart."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return folder, train(folder)


@pytest.mark.slow
def test_reaches_the_stated_loss(finished):
    folder, printed = finished
    evaluation = [event for event in records(folder)[1] if event["event"] == "eval"][-1]
    for name, patterns in PATTERNS.items():
        text = (ROOT / name).read_text()
        stated = {key: float(re.search(pattern, text).group(1).rstrip(".")) for key, pattern in patterns.items()}
        # The standard library differs between Pythons; gzip's figure tells how hard this one is.
        hardness = evaluation["gzip_bits_per_byte"] / stated["gzip_bits_per_byte"]
        assert abs(hardness - 1) < 0.03
        for key, value in stated.items():
            assert abs(evaluation[key] - hardness * value) < TOLERANCE, f"{name} says {key} {value}: {evaluation[key]}"
    check_is_complete(folder, printed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_whole_quickstart_is_healthy(seed, finished, tmp_path):
    """No finding and no skipped step over 900 steps."""
    folder = finished[0] if seed == 0 else tmp_path / "run"
    if seed:
        train(folder, "--seed", str(seed))
    check_is_healthy(folder)


@pytest.mark.slow
def test_the_sample_looks_like_python(finished):
    """Over 4,600 characters, because one sample may lie in a docstring. Measured: 70 keywords, 37 to 59 indents."""
    folder, _ = finished
    samples = [(folder / "sample.txt").read_text()]
    for seed in range(1, 5):
        flags = ["--prompt", "def ", "--num-tokens", "1000", "--seed", str(seed)]
        samples.append(run([*CLI, "generate", folder, *flags], cwd=ROOT))
    text = "\n".join(samples)
    assert len(re.findall(r"\b(?:def|self|return|if|import|for|not|None)\b", text)) >= 30
    indents = [len(spaces) for spaces in re.findall(r"^( +)\S", text, re.MULTILINE)]
    assert sum(indent in (4, 8, 12, 16, 20, 24) for indent in indents) >= 15
