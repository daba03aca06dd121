"""`jaxtrain.load`: what it reads, which checkpoint, and that it brings no training with it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import QUICK_XLA, ROOT, run_python, user_environment

import jaxtrain
from jaxtrain.cli import main

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
    more = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_XLA}
    run_python(SCRIPT, cwd=tmp_path, environment=user_environment(**more))


def test_choice_of_the_checkpoint(run_dir):
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {event["step"]: event["nll"] for event in events if event.get("event") == "eval"}
    best = jaxtrain.load(run_dir, "best")
    assert (best.step, losses[best.step]) == (12, min(losses.values()))
    five, ten, last = (jaxtrain.load(run_dir, step) for step in (5, 10, None))
    assert (five.step, ten.step, last.step) == (5, 10, 12)
    for newest in ([ten, last], [five, ten, last]):
        mean, trees = jaxtrain.load(run_dir, average=len(newest)), [model.params for model in newest]
        expected = jax.tree.map(lambda *leaves: sum(map(np.asarray, leaves)) / len(leaves), *trees)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), mean.params, expected)
    for arguments, message in (((7,), "no checkpoint of step 7"), ((None, 4), "not 3"), ((None, 0), "1 or more")):
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


def test_eval_of_files_stores_and_the_runs_own_data(run_dir, store, tmp_path, capsys):
    texts = {"a.txt": "1 + 2 = 3\n" * 5, "b.txt": "Grüße 🙂"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    paths = [str(tmp_path / name) for name in texts]
    model = jaxtrain.load(run_dir)
    assert main(["eval", str(run_dir), "--data", *paths, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    expected = {}
    for path, text in zip(paths, texts.values(), strict=True):
        ids = np.concatenate([[256], model.tokenizer.encode(text)])
        nll = 0.0
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17]
            logits = jax.nn.log_softmax(model.logits([np.pad(window[:-1], (0, 17 - len(window)))]))[0]
            nll -= float(sum(logits[i, token] for i, token in enumerate(window[1:])))
        expected[path] = nll
        np.testing.assert_allclose(result[f"nll/{path}"], nll / (len(ids) - 1), rtol=1e-4)
        bits = nll / np.log(2) / len(text.encode())
        np.testing.assert_allclose(result[f"bits_per_byte/{path}"], bits, rtol=1e-4)
    num_bytes = sum(len(text.encode()) for text in texts.values())
    assert result["bytes"] == num_bytes
    np.testing.assert_allclose(result["bits_per_byte"], sum(expected.values()) / np.log(2) / num_bytes, rtol=1e-4)
    assert [(row["start"], row["stop"]) for row in result["positions"]] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)]
    assert sum(row["tokens"] for row in result["positions"]) == result["tokens"]
    assert main(["eval", str(run_dir), "--data", str(store)]) == 0
    assert main(["eval", str(run_dir)]) == 0
    first, second = capsys.readouterr().out.split("split ")
    assert next(line for line in first.splitlines() if "nll" in line) in second
    (tmp_path / "empty.txt").write_text("")
    assert main(["eval", str(run_dir), "--data", str(tmp_path / "empty.txt")]) == 2
    assert "empty.txt is empty: give text" in capsys.readouterr().err
