"""`jaxtrain.load`: what it reads, which checkpoint, and that it brings no training with it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import ROOT, run_python, user_environment

import jaxtrain

SCRIPT = """
import sys
import jaxtrain
model = jaxtrain.load("elsewhere/run")
texts = model.generate(["1 + 2", "3"], 5, seed=3)
assert [len(text) > 0 for text in texts] == [True, True], texts
assert model.generate("3", 5, seed=3) == texts[1]
tokens = model.tokenizer.encode("1 + 2 = 3")
assert model.logits([tokens]).shape == (1, 9, 257)
loaded = {".".join(name.split(".")[:2]) for name in sys.modules if name.startswith("jaxtrain.")}
wrong = loaded & {"jaxtrain.training", "jaxtrain.plan", "jaxtrain.step", "jaxtrain.optim", "jaxtrain.cli"}
assert not wrong and "optax" not in sys.modules, wrong
"""


def test_load_works_from_any_folder_and_imports_nothing_of_the_training(run_dir, tmp_path):
    (tmp_path / "elsewhere").symlink_to(run_dir.parent)
    run_python(SCRIPT, cwd=tmp_path, environment=user_environment(PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu"))


def test_which_checkpoint(run_dir):
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {event["step"]: event["nll"] for event in events if event.get("event") == "eval"}
    best = jaxtrain.load(run_dir, "best")
    assert (best.step, losses[best.step]) == (12, min(losses.values()))
    five, ten, last = (jaxtrain.load(run_dir, step) for step in (5, 10, None))
    assert (five.step, ten.step, last.step) == (5, 10, 12)
    mean = jaxtrain.load(run_dir, average=3)
    expected = jax.tree.map(lambda *leaves: sum(map(np.asarray, leaves)) / 3, five.params, ten.params, last.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), mean.params, expected)
    for arguments, message in (((7,), "no checkpoint of step 7"), ((None, 4), "has 3"), ((None, 0), "1 or more")):
        with pytest.raises(ValueError, match=message):
            jaxtrain.load(run_dir, arguments[0], average=(*arguments, 1)[1])


class NoText:
    """Custom model that can be trained only."""

    def init(self, key):
        return {}

    def loss(self, params, batch):
        return None


def test_a_custom_model_without_logits_says_so(run_dir):
    model = jaxtrain.load(run_dir)
    lacking = dataclasses.replace(model, model=NoText())
    with pytest.raises(ValueError, match="NoText has neither logits nor decode"):
        lacking.logits([[1]])
    with pytest.raises(ValueError, match="NoText generates no text without decode"):
        lacking.generate("x")
