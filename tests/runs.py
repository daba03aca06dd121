"""Short runs for tests: programs shared by all tests of a process, deliberate faults, and what a run has written."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.restore import restore
from jaxtrain.config import CheckpointConfig, DataConfig, OptimConfig, TrainConfig
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.monitoring.report import write_report
from jaxtrain.runtime.mesh import replicated
from jaxtrain.training import components, program
from jaxtrain.training import train as loop
from jaxtrain.training.run import Hooks, open_run

CLOCKS = {"attempt", "tokens_per_second", "step_seconds", "mfu", "time"}
# Fields of a config that its program does not depend on.
_LOOP = ("log_every", "eval_every", "eval_batches", "stop_after", "replay_check", "init_from", "sample_tokens")
_LOOP += ("sample_prompt", "diagnose_every", "stall_minutes")
# Fields behind the scalars, which are arguments of the compiled step.
_SCALARS = ("peak_lr", "schedule", "warmup_steps", "warmup_fraction", "decay_steps", "cycles", "cycle_decay", "floor")
_SCALARS += ("weight_decay", "clip_norm")


@functools.lru_cache(maxsize=64)
def _make_program(config, mesh, vocab_size, **options):
    return program.make_program(config, mesh, vocab_size, **options)


def shared_program(config, mesh, vocab_size, **options):
    """Returns one program for all configs that compile alike: tracing it is most of the time of a short run."""
    alike = dataclasses.replace(config, data=DataConfig(store="any"), checkpoint=CheckpointConfig())
    alike = change(alike, train={name: getattr(TrainConfig(), name) for name in _LOOP})
    if config.optim.name != "adamw" or options.keys() - {"wrap_loss"}:
        return _make_program(alike, mesh, vocab_size, **options)
    components.make_optimizer(config)  # raises what its own program would raise
    rates = {name: getattr(OptimConfig(), name) for name in _SCALARS}
    alike = change(alike, train={"steps": TrainConfig().steps}, optim=rates)
    scalars = jax.jit(functools.partial(components.make_scalars, config), out_shardings=replicated(mesh))
    return _make_program(alike, mesh, vocab_size, **options)._replace(scalars=scalars)


QUICK = Hooks(make_program=shared_program, write_report=lambda folder: "not drawn")


def with_faults(faults, hooks=QUICK) -> Hooks:
    """Returns hooks that inject faults."""
    return hooks._replace(wrap_loss=inject, wrap_batches=functools.partial(FaultyBatches, faults=faults))


def train(config, run_dir, *, faults=None, report=False, hooks=QUICK, **options) -> dict[str, Any]:
    """Trains with shared programs; without the report, which takes a second, unless `report` asks for it."""
    if faults is not None:
        hooks = with_faults(faults, hooks)
    if report:
        hooks = hooks._replace(write_report=write_report)
    return loop.train(config, run_dir, hooks=hooks, **options)


def change(config, **sections):
    """Returns a config with other fields: `change(config, train={"steps": 5})`."""
    parts = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **parts)


def numbers(run_dir) -> list[dict[str, Any]]:
    """Reads the step lines of a run, without what a clock or a restart changes."""
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(run_dir / "metrics.jsonl")[0]]


def state_of(run_dir, step=None):
    """Restores the state of a checkpoint of a run; None takes the newest."""
    run = open_run(run_dir, QUICK)
    return restore(CheckpointFolder(run_dir / "checkpoints"), run.program.abstract_state, step)[0]


def assert_same_bits(a, b) -> None:
    """Fails unless two trees are equal to the bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@dataclasses.dataclass(frozen=True)
class Faults:
    """Deliberate faults, each at one train step, counted from 1; 0 is never."""

    nan_loss_step: int = 0  # the loss is NaN
    nan_micro_batch_step: int = 0  # the loss of the first row of the batch is NaN
    gradient_step: int = 0  # the gradient is multiplied by gradient_factor
    gradient_factor: float = 1e4
    inf_step: int = 0  # one number of the gradient of the first parameter is infinite
    spike_step: int = 0  # loss and gradient are multiplied by spike_factor, for spike_steps steps
    spike_steps: int = 50
    spike_factor: float = 10.0


_KEYS = ("loss_factor", "gradient_factor", "gradient_offset")  # each float32 [B]


@dataclasses.dataclass(frozen=True, eq=False)
class FaultyBatches:
    """Batches that carry the faults of their step: one number per row reaches the row's micro-batch and device."""

    batches: Any
    faults: Faults

    @property
    def batch_size(self) -> int:
        return self.batches.batch_size

    def rows(self, index: int, start: int, stop: int) -> dict[str, np.ndarray]:
        step, faults = index + 1, self.faults
        loss_factor, gradient_factor, gradient_offset = np.ones((3, stop - start), np.float32)
        gradient_offset[:] = np.inf if step == faults.inf_step else 0.0
        if step == faults.nan_loss_step:
            loss_factor[:] = np.nan
        if step == faults.nan_micro_batch_step and start == 0:
            loss_factor[:1] = np.nan
        if faults.spike_step and faults.spike_step <= step < faults.spike_step + faults.spike_steps:
            loss_factor *= faults.spike_factor
        if step == faults.gradient_step:
            gradient_factor[:] = faults.gradient_factor
        rows = dict(zip(_KEYS, (loss_factor, gradient_factor, gradient_offset), strict=True))
        return self.batches.rows(index, start, stop) | rows


def inject(loss_fn: Callable) -> Callable:
    """Wraps a loss function to apply the faults that its batch carries."""

    def faulty(params, batch):
        loss_factor, gradient_factor, offset = (jnp.mean(batch[key]) for key in _KEYS)
        leaves, structure = jax.tree.flatten(params)
        sums = loss_fn(
            jax.tree.unflatten(structure, [_poison(leaves[0], offset), *leaves[1:]]),
            {key: value for key, value in batch.items() if key not in _KEYS},
        )

        def apply(total):
            total = total * loss_factor
            return total + (gradient_factor - 1) * (total - jax.lax.stop_gradient(total))  # keeps the value

        return sums.replace(nll=apply(sums.nll), z_loss=apply(sums.z_loss), smoothing=apply(sums.smoothing))

    return faulty


@jax.custom_vjp
def _poison(leaf, offset):
    """Identity on `leaf`; adds `offset` to the first number of its gradient."""
    del offset
    return leaf


def _poison_backward(offset, gradient):
    flat = gradient.reshape(-1)
    return flat.at[0].add(offset.astype(flat.dtype)).reshape(gradient.shape), None


_poison.defvjp(lambda leaf, offset: (leaf, offset), _poison_backward)


def corrupt_second_run(step: int) -> Callable:
    """Makes a `Hooks.wrap_step` that flips one bit of the first parameter when `step` runs for the second time."""

    def wrap(train_step):
        times = 0

        def wrapped(state, batch):
            nonlocal times
            if int(state.step) + 1 == step:
                times += 1
                state = _flip_bit(state) if times == 2 else state
            return train_step(state, batch)

        return wrapped

    return wrap


def _flip_bit(state):
    """Flips the highest bit of the mantissa: too large a change to be rounded away."""
    leaves, structure = jax.tree.flatten(state.params)

    def flip(leaf):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).reshape(-1)
        bits = bits.at[0].set(bits[0] ^ jnp.uint32(1 << 22))
        return jax.lax.bitcast_convert_type(bits.reshape(leaf.shape), leaf.dtype)

    leaves[0] = jax.jit(flip, out_shardings=leaves[0].sharding)(leaves[0])
    return state.replace(params=jax.tree.unflatten(structure, leaves))
