"""Models, schedules and optimizers of a user's own, each added by a config file outside the package."""

import json
import textwrap

import jax
import numpy as np
import pytest
from runs import assert_same_bits, change, numbers, state_of, train

from jaxtrain.cli import main
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.optim import OPTIMIZERS
from jaxtrain.runtime.config_files import load_config
from jaxtrain.schedules import SCHEDULES

HEADER = """
import dataclasses

import jax
import jax.numpy as jnp

from jaxtrain.config import CheckpointConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, llama
from jaxtrain.losses import cross_entropy


def run(model, **optim):
    return Config(
        data=DataConfig(store={store!r}),
        model=model,
        optim=OptimConfig(**{{"peak_lr": 1e-2, "warmup_steps": 3, **optim}}),
        train=TrainConfig(
            steps=12, batch_size=8, seq_len=16, accumulate=2, log_every=1, eval_every=6, eval_batches=2
        ),
        mesh=MeshConfig(data=2, tensor=2),
        checkpoint=CheckpointConfig(every=5),
    )
"""

LINEN = """
from flax import linen as nn


class Network(nn.Module):
    dropout: float

    @nn.compact
    def __call__(self, tokens, rng):
        x = nn.Embed(257, 16)(tokens)
        x = x + nn.Dense(16)(nn.gelu(nn.Dense(32)(x)))
        x = nn.Dropout(self.dropout, deterministic=rng is None)(x, rng=rng)
        return nn.Dense(257)(x)


@dataclasses.dataclass(frozen=True)
class Tiny:
    dropout: float = 0.1

    def init(self, key):
        return Network(self.dropout).init(key, jnp.zeros((1, 1), jnp.int32), None)["params"]

    def loss(self, params, batch, rng):
        logits = Network(self.dropout).apply({{"params": params}}, batch["inputs"], rng)
        sums = cross_entropy(logits, batch["labels"], where=batch["where"])
        right = (logits.argmax(-1) == batch["labels"]) & batch["where"]
        return sums, {{"accuracy": right.sum().astype(jnp.float32)}}

    def axes(self, params):
        axes = jax.tree.map(lambda leaf: (None,) * leaf.ndim, params)
        axes["Dense_1"]["kernel"] = ("hidden", None)
        return axes


def config():
    return run(Tiny())
"""

NNX = """
from flax import nnx


class Network(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(257, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.out = nnx.Linear(16, 257, rngs=rngs)

    def __call__(self, tokens):
        return self.out(self.norm(self.embed(tokens)))


class Bigram:
    def init(self, key):
        return nnx.state(Network(nnx.Rngs(key)))

    def loss(self, params, batch):
        graph = nnx.graphdef(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))
        logits = nnx.merge(graph, params)(batch["inputs"])
        return cross_entropy(logits, batch["labels"], where=batch["where"])


def config():
    return run(Bigram())
"""


def write_config(folder, store, text):
    file = folder / "own.py"
    file.write_text(textwrap.dedent(HEADER.format(store=str(store)) + text.replace("{{", "{").replace("}}", "}")))
    return str(file)


DROPOUT = """
class Dropout:
    vocab_size = 257

    def init(self, key):
        return {{"table": jnp.zeros((257, 257))}}

    def loss(self, params, batch, rng):
        logits = params["{name}"][batch["inputs"]]
        logits = logits * jax.random.bernoulli(rng, 0.9, logits.shape)
        return cross_entropy(logits, batch["labels"], where=batch["where"])


def config():
    return run(Dropout())
"""


@pytest.fixture(autouse=True)
def default_promotion():
    """Flax and optax are not written for the strict modes of the tests."""
    modes = {"jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}
    strict = {name: getattr(jax.config, name) for name in modes}
    for name, value in modes.items():
        jax.config.update(name, value)  # for all threads: the step is compiled on one of its own
    yield
    for name, value in strict.items():
        jax.config.update(name, value)


def jaxtrain(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def train_whole_and_in_parts(file, folder):
    """Trains runs whole and parts, which stops after step 7; all with one program."""
    config = load_config(file)
    train(config, folder / "whole", report=True)
    train(change(config, train={"stop_after": 7}), folder / "parts")
    train(config, folder / "parts")


def test_an_nnx_model_of_the_users_own_is_trained_and_evaluated(store, tmp_path, capsys):
    file = write_config(tmp_path, store, NNX)
    jaxtrain("train", file, "--run-dir", tmp_path / "run", "--train.stop-after", 7)
    jaxtrain("train", file, "--run-dir", tmp_path / "run")
    lines, events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["nll"] < lines[0]["nll"] - 0.5
    capsys.readouterr()
    jaxtrain("eval", tmp_path / "run", "--config", file, "--json")
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    np.testing.assert_allclose(measured["nll"], [e for e in events if e["event"] == "eval"][-1]["nll"], rtol=1e-6)


def test_a_model_of_the_users_own_is_trained_and_resumed_bit_for_bit(store, tmp_path, capsys):
    """On a mesh of four devices, with the guard, checkpoints, evaluations and the report."""
    file = write_config(tmp_path, store, LINEN)
    train_whole_and_in_parts(file, tmp_path)
    lines, events = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert lines[-1]["nll"] < lines[0]["nll"] - 0.5
    assert {"skipped", "clip_factor", "learning_rate", "layer_grad_norm"} - lines[-1].keys() <= {"layer_grad_norm"}
    assert [event["step"] for event in events if event["event"] == "eval"] == [6, 12]
    assert (tmp_path / "whole" / "report.html").exists()
    assert sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()) == ["10", "12", "5"]
    assert 0 < lines[-1]["accuracy"] < 1
    stored = json.loads((tmp_path / "whole" / "config.json").read_text())["model"]
    assert stored == {"custom": "Tiny", "fields": {"dropout": 0.1}}
    capsys.readouterr()
    jaxtrain("eval", tmp_path / "whole", "--config", file, "--json")
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    np.testing.assert_allclose(measured["nll"], [e for e in events if e["event"] == "eval"][-1]["nll"], rtol=1e-6)
    jaxtrain("replay", tmp_path / "whole", "--config", file, "--step", "6", "--json")
    replayed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert replayed["reproduces"] is True
    assert [len(replayed[part]) for part in ("micro_batches", "rows")] == [2, 8]
    assert replayed["layers"]
    assert main(["generate", str(tmp_path / "whole"), "--config", file]) == 2
    assert "generates no text without decode and max_seq_len" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "whole")]) == 2
    assert "--config" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "whole" / "config.json"), "--run-dir", str(tmp_path / "other")]) == 2
    assert "CONFIG.py" in capsys.readouterr().err


def test_a_loss_that_needs_its_key_is_an_error_before_the_training(store, tmp_path, capsys):
    """Evaluation passes None; without the check, the run would fail after its last step."""
    path = tmp_path / "mine.py"
    path.write_text(HEADER.format(store=str(store)) + DROPOUT.format(name="table"))
    assert main(["train", str(path), "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "Dropout.loss fails where its key is None, as in evaluation: TypeError: " in error
    assert error.endswith("leave out dropout if the key is None\n")
    assert not (tmp_path / "run").exists()
    path.write_text(HEADER.format(store=str(store)) + DROPOUT.format(name="tabel"))
    assert main(["train", str(path), "--run-dir", str(tmp_path / "run")]) == 1
    assert "KeyError: 'tabel'" in capsys.readouterr().err  # its own error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.z-loss", "1e-4"], "train.z_loss has no effect on Tiny, which computes its own loss: leave it out"),
        (["--mesh.data", "1", "--mesh.tensor", "3", "--train.batch-size", "6"], "Tiny.axes shards Dense_1/kernel"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_errors(flags, message, store, tmp_path, capsys):
    file = write_config(tmp_path, store, LINEN)
    assert main(["train", file, "--run-dir", str(tmp_path / "run"), *flags]) == 2
    assert message in capsys.readouterr().err


TABLES = """
import optax

from jaxtrain.optim import OPTIMIZERS, OptimizerEntry
from jaxtrain.schedules import SCHEDULES, ScheduleEntry


def split(optim, learning_rate, clip):
    def labels(params):
        return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 2 else "other", params)

    parts = {"matrix": optax.adafactor(learning_rate, min_dim_size_to_factor=8), "other": optax.lion(learning_rate)}
    return optax.chain(clip, optax.partition(parts, labels))


def halved(optim, steps):
    return optax.piecewise_constant_schedule(optim.peak_lr, {steps // 2: 0.5})


SCHEDULES["halved"] = ScheduleEntry(halved, "constant, halved after half of the steps")
OPTIMIZERS["split"] = OptimizerEntry(split, "Adafactor for matrices, Lion for the rest")


def config():
    model = llama(num_layers=2, num_heads=2, d_model=16, d_ff=32, max_seq_len=16, vocab_multiple=2)
    config = run(model, schedule="halved", name="split", peak_lr=3e-3)
    return dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=2, tensor=2))
"""


def test_a_schedule_and_an_optimizer_of_the_users_own(store, tmp_path, monkeypatch, capsys):
    """A partitioned optimizer on a sharded transformer, resumed bit for bit; later commands take `--config`."""
    tables = {"optim.schedule": (SCHEDULES, "halved"), "optim.name": (OPTIMIZERS, "split")}
    for table, name in tables.values():
        monkeypatch.setitem(table, name, None)  # so that the entries are gone after the test
    file = write_config(tmp_path, store, TABLES)
    train_whole_and_in_parts(file, tmp_path)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert_same_bits(*(state_of(tmp_path / name) for name in ("parts", "whole")))
    lines, _ = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert lines[-1]["nll"] < lines[0]["nll"] - 0.1
    commands = ("eval --batches 1", "generate --num-tokens 1", "replay --step 6", "report")
    for command, *flags in map(str.split, commands):
        jaxtrain(command, tmp_path / "whole", "--config", file, *flags)
    assert "reproduces bit for bit: step 6" in capsys.readouterr().out
    for field, (table, name) in tables.items():
        entry = table.pop(name)
        refused = [commands[0], commands[2], *([commands[3]] if field == "optim.schedule" else [])]
        for command, *flags in map(str.split, refused):  # generation needs neither of them
            assert main([command, str(tmp_path / "whole"), *flags]) == 2
            message = capsys.readouterr().err
            assert f"{field}: {name!r} is none of" in message
            assert "--config CONFIG.py" in message
        table[name] = entry


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [("name", "adamv", "did you mean adamw?"), ("name", "zzz", "OPTIMIZERS"), ("schedule", "cosin", "cosine")],
)
def test_a_name_that_is_in_no_table_is_an_error_before_anything_is_written(
    field, value, remedy, store, tmp_path, capsys
):
    file = write_config(tmp_path, store, f"def config():\n    return run(llama(2, 2, 16, 32, 16), {field}={value!r})\n")
    assert main(["train", file, "--run-dir", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert value in message
    assert remedy in message
    assert not (tmp_path / "run").exists()
