"""Evaluation: sums over the whole split, for any batch size and a ragged end."""

import gzip
import lzma
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import MeshConfig
from jaxtrain.data.compressors import compressor_bits_per_byte
from jaxtrain.data.loader import EvalBatches
from jaxtrain.data.store import Split, open_store
from jaxtrain.losses import LossSums
from jaxtrain.runtime.mesh import by_rows, make_mesh
from jaxtrain.runtime.stop import Stop, Stopped
from jaxtrain.training import evaluation
from jaxtrain.training.evaluation import evaluate, position_step, split_text

TOKENS = np.random.default_rng(0).integers(0, 50, 103).astype(np.uint16)
SPLIT = Split((TOKENS,), np.zeros(3, np.int64), num_bytes=100)


@jax.jit
def eval_step(scale, batch):
    """Eval step in which each label costs a tenth of its id, so that the total is known."""
    where = batch["where"].astype(jnp.float32)
    nll = scale * jnp.sum(where * batch["labels"].astype(jnp.float32))
    return LossSums(nll, jnp.float32(0), jnp.float32(0), jnp.sum(where))


def run(batch_size, seq_len, devices=1, step=eval_step, **options):
    batches = EvalBatches(SPLIT, batch_size=batch_size, seq_len=seq_len, vocab_size=50)
    return evaluate(step, jnp.float32(0.1), batches, by_rows(make_mesh(MeshConfig(data=devices))), **options)


@pytest.mark.parametrize(("batch_size", "seq_len", "devices"), [(1, 7, 1), (4, 7, 1), (8, 16, 4), (8, 200, 8)])
def test_every_token_counts_once_whatever_the_batch(batch_size, seq_len, devices):
    result = run(batch_size, seq_len, devices)
    nll = 0.1 * TOKENS[1:].astype(float).mean()
    assert result["tokens"] == 102
    np.testing.assert_allclose(result["nll"], nll, rtol=1e-6)
    np.testing.assert_allclose(result["perplexity"], math.exp(nll), rtol=1e-5)
    np.testing.assert_allclose(result["bits_per_token"], nll / math.log(2), rtol=1e-6)
    np.testing.assert_allclose(result["bits_per_byte"], nll / math.log(2) * 102 / 100, rtol=1e-6)


def test_loss_by_position_in_the_window():
    step, bounds = position_step(eval_step, 8)
    assert bounds == (0, 1, 2, 4, 8)
    batches = EvalBatches(SPLIT, batch_size=4, seq_len=8, vocab_size=50)
    mesh = make_mesh(MeshConfig(data=4))
    result = evaluate(step, jnp.float32(0.1), batches, by_rows(mesh), positions=bounds)
    whole = run(4, 8)
    for key in ("nll", "tokens"):
        np.testing.assert_allclose(result[key], whole[key], rtol=1e-6)
    for row in result["positions"]:
        position = np.arange(102) % 8
        labels = TOKENS[1:][(position >= row["start"]) & (position < row["stop"])]
        assert row["tokens"] == len(labels)
        np.testing.assert_allclose(row["nll"], 0.1 * labels.astype(float).mean(), rtol=1e-6)


def test_a_part_of_the_split():
    result = run(4, 7, num_batches=2)
    assert result["tokens"] == 56
    np.testing.assert_allclose(result["nll"], 0.1 * TOKENS[1:57].astype(float).mean(), rtol=1e-6)


def test_compressors_see_exactly_the_held_out_text(store):
    opened = open_store(store)
    text = split_text(opened.validation, opened.tokenizer)
    assert len(text) == opened.validation.num_bytes
    result = compressor_bits_per_byte(text)
    np.testing.assert_allclose(result["gzip"], 8 * len(gzip.compress(text, 9)) / len(text), atol=0.01)
    assert lzma.decompress(lzma.compress(text, preset=9)) == text
    assert 0 < result["xz"] < 8


class StopAfter(Stop):
    """Is asked from the given poll on."""

    def __init__(self, polls):
        super().__init__()
        self.polls = polls

    def asked(self):
        self.polls -= 1
        return self.polls < 0


@pytest.mark.parametrize("polls", [0, 1, 3, 4])
def test_a_stop_leaves_no_result_of_a_part(polls):
    with pytest.raises(Stopped):
        run(1, 7, num_batches=3, stop=StopAfter(polls))


def test_a_stop_abandons_compilation_and_a_wait_for_data(monkeypatch):
    """Both can take minutes. Other batches run on the calling thread, whose memory a CPU keeps."""
    threads, hangs, released = [], [False], threading.Event()

    def step(scale, batch):
        threads.append(threading.current_thread() is threading.main_thread())
        if hangs[0]:
            released.wait()
        return eval_step(scale, batch)

    def soon():
        stop = Stop()
        threading.Timer(0.2, setattr, (stop, "reason", "SIGTERM")).start()
        return stop

    assert run(4, 7, step=step, stop=Stop())["tokens"] == 102
    assert threads == [False, True, True, True]
    hangs[0] = True
    with pytest.raises(Stopped):
        run(4, 7, step=step, stop=soon())
    released.set()

    def fetch(*_, **__):
        time.sleep(1)
        raise OSError  # nobody waits for it any more

    monkeypatch.setattr(evaluation, "global_batch", fetch)
    with pytest.raises(Stopped):
        run(4, 7, stop=soon())
