"""Losses of four small runs against recorded ones, bit for bit: a refactoring changes no number."""

import json
import sys
from pathlib import Path

import numpy as np
from helpers import call

GOLDEN = Path(__file__).parent / "golden"


def numbers(variants):
    return {
        (variant, metric): [float.fromhex(text) for text in values]
        for variant, metrics in variants.items()
        for metric, values in metrics.items()
    }


def test_losses_equal_the_golden_record():
    """An unrecorded jax or processor rounds differently: there the numbers must be close."""
    command = [sys.executable, str(GOLDEN / "record.py")]
    done = call(command)
    assert done.returncode == 0, done.stderr
    now = json.loads(done.stdout)
    file = GOLDEN / f"jax-{now['jax']}-{now['processor']}.json"
    if file.exists():
        assert now == json.loads(file.read_text())
        return
    recorded = [json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*.json"))]
    assert recorded
    expected = numbers(recorded[-1]["variants"])
    for key, values in numbers(now["variants"]).items():
        rtol = 2e-2 if key[0] == "bfloat16" else 1e-3
        np.testing.assert_allclose(values, expected[key], rtol=rtol, err_msg=str(key))
