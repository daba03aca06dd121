"""Runs a step of a run again from the checkpoint before it, and looks into it: micro-batches, layers, documents."""

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.checkpoints import warm_start
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.checkpoints.manifest import Damaged, verify
from jaxtrain.models.transformer import Transformer, make_loss_fn
from jaxtrain.monitoring.layers import drop_unsampled
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.optim import global_norm
from jaxtrain.precision import Policy
from jaxtrain.runtime.mesh import replicated
from jaxtrain.step import TrainState
from jaxtrain.training.run import NO_HOOKS, Hooks, Run, batch_source, open_run, tokenizer_hash, train_batches

# What a clock or a restart changes; the rest of a step line must come out the same.
_NOT_COMPARED = {"attempt", "tokens_per_second", "step_seconds", "mfu", "time"}
_TEXT_TOKENS = 48  # of a row, to know its text by
_LONGEST_PERIOD = 32  # tokens of an n-gram whose repetitions are looked for


def replay(run_dir: str | Path, step: int, hooks: Hooks = NO_HOOKS) -> dict[str, Any]:
    """Runs a run's train step `step` (counted from 1, as in metrics.jsonl) again, on the batches that the run saw.

    Starts from the newest checkpoint before the step, or where there is none as the run did. Writes nothing. A device
    holds the parameters twice for a moment.

    Returns:
      `step`, `from_step` (0: the start), `metrics` as recomputed, `logged` (None: that step was not logged),
      `compared_steps`, `reproduces` (bit for bit over all of those; None: none was logged), `differences` (each with
      step, metric, logged, replayed), `notes`, and what is in the step: `micro_batches`, `layers` and `rows`, the worst
      first.

    Raises:
      ValueError: no such run, or a step that it has not come to.
    """
    run = open_run(run_dir, hooks)
    lines, events = read_metrics(run.folder / "metrics.jsonl")
    _require_reached(run, step, lines, events)
    state, first = _state_before(run, step, events)
    fetch = batch_source(run)
    train_step = run.program.train_step.lower(state, fetch(first)).compile()
    logged = {line["step"]: line for line in _current(lines, events)}
    every = run.config.train.diagnose_every
    tokens_per_step = run.config.train.batch_size * run.config.train.seq_len
    differences, compared = [], []
    for done in range(first + 1, step + 1):
        batch = fetch(done - 1)
        before = jax.jit(_copy)(state.params) if done == step else None
        state, metrics = train_step(state, batch)
        values = {
            "step": done,
            **drop_unsampled(metrics.unpack(), done, every),
            "tokens_seen": done * tokens_per_step,
        }
        if done in logged:
            compared.append(done)
            differences += _differences(logged[done], values)
    looked = _make_analysis(run)(before, state.params, batch)
    return {
        "step": step,
        "from_step": first,
        "metrics": values,
        "logged": logged.get(step),
        "compared_steps": compared,
        "reproduces": not differences if compared else None,
        "differences": differences,
        "notes": _notes(run, step, events),
        "micro_batches": _micro_batches(jax.device_get(looked["micro_batches"])),
        "layers": _layers(jax.device_get(looked["layers"])),
        "rows": _rows(run, step, jax.device_get(looked["row_nll"])),
    }


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _require_reached(run: Run, step: int, lines: list[dict], events: list[dict]) -> None:
    known = [line["step"] for line in lines] + [event["step"] for event in events if "step" in event]
    # Steps up to the next that is logged may have run before a crash.
    last = min(max(known, default=0) + run.config.train.log_every, run.config.train.steps)
    if not 1 <= step <= last:
        raise ValueError(f"{run.folder} has no step {step} to replay: give --step 1 to {last}, as in its metrics.jsonl")


def _state_before(run: Run, step: int, events: list[dict[str, Any]]) -> tuple[TrainState, int]:
    """The newest state before a step, and how many steps it has done; damaged checkpoints are passed over."""
    with Checkpoints(run.folder / "checkpoints") as checkpoints:
        for saved in reversed([saved for saved in checkpoints.steps() if saved < step]):
            try:
                verify(checkpoints.folder / str(saved))
            except Damaged as problem:
                print(f"checkpoint {saved} is damaged: {problem}; going back further", file=sys.stderr)
                continue
            return checkpoints.restore(run.program.abstract_state, saved)[0], saved
    state, source = run.program.init_state(), run.config.train.init_from
    if source:
        begun = [event for event in events if event["event"] == "init_from"][-1]
        path, _ = warm_start.find(source, run.folder)
        path = path / "checkpoints" / str(begun["source_step"])  # the newest may be another one now
        like = run.program.abstract_state.params
        state = state.replace(params=warm_start.read(str(path), run.folder, like, tokenizer_hash(run.store))[0])
    return state, 0


def _current(lines: list[dict], events: list[dict]) -> list[dict]:
    """The step lines without those of an attempt that a later one went back behind."""
    begun = [(event["attempt"], event["step"]) for event in events if event["event"] in ("start", "resume")]
    return [
        line
        for line in lines
        if not any(attempt > line["attempt"] and first < line["step"] for attempt, first in begun)
    ]


def _differences(logged: dict[str, Any], values: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for key in logged.keys() & values.keys() - _NOT_COMPARED:
        before, now = (np.asarray(value, np.float64) for value in (logged[key], values[key]))
        if before.shape != now.shape or not np.array_equal(before, now, equal_nan=True):
            found.append({"step": logged["step"], "metric": key, "logged": before.tolist(), "replayed": now.tolist()})
    return sorted(found, key=lambda difference: difference["metric"])


def _notes(run: Run, step: int, events: list[dict]) -> list[str]:
    """What lets the numbers differ without any fault."""
    begun = [event for event in events if event["event"] in ("start", "resume") and event["step"] < step]
    if not begun:
        return []
    now = {
        "jax": jax.__version__,
        "processes": jax.process_count(),
        "devices": run.program.mesh.size,
        "device": run.program.mesh.devices.flat[0].device_kind,
    }
    return [
        f"the run had {name} {begun[-1][name]} and here it is {value}: expect the same numbers to rounding only"
        for name, value in now.items()
        if begun[-1].get(name, value) != value
    ]


def _make_analysis(run: Run) -> Any:
    """`(params before, params after, batch) -> arrays`: the step taken apart, to rounding what the train step did."""
    config = run.config.train
    # No kernel of one device only: here the compiler itself spreads the work over the mesh.
    model = Transformer(dataclasses.replace(run.program.model.config, attention="xla"))
    loss_fn = make_loss_fn(
        model,
        z_loss=config.z_loss,
        label_smoothing=config.label_smoothing,
        chunk_size=config.loss_chunk,
    )
    if run.hooks.wrap_loss is not None:
        loss_fn = run.hooks.wrap_loss(loss_fn)
    # Without its loss scale the gradients of float16 would vanish.
    policy = Policy(compute="float32" if config.precision == "float16" else config.precision)

    def total(params: Any, batch: Any):
        sums = loss_fn(params, batch)
        return sums.total(), sums

    def analysis(before: Any, after: Any, batch: Any) -> dict[str, Any]:
        params = policy.cast_to_compute(before)

        def micro_step(added: Any, micro_batch: Any):
            (_, sums), grads = jax.value_and_grad(total, has_aux=True)(params, micro_batch)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            weight = jnp.maximum(sums.weight, 1.0)
            one = {"loss": sums.mean(), "nll": sums.mean_nll(), "tokens": sums.weight}
            one["grad_norm"] = global_norm(jax.tree.map(lambda g: g / weight, grads))
            rows = jax.lax.map(
                lambda row: loss_fn(params, jax.tree.map(lambda x: x[None], row)).mean_nll(), micro_batch
            )
            return (jax.tree.map(jnp.add, added[0], grads), added[1] + sums.weight), (one, rows)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), before)
        split = jax.tree.map(lambda x: _split_rows(x, config.accumulate), batch)
        (grads, weight), (micro_batches, rows) = jax.lax.scan(micro_step, (zeros, jnp.float32(0)), split)
        grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), grads)
        updates = jax.tree.map(jnp.subtract, after, before)
        layers = {
            "grad_norm": _norms(grads),
            "update_norm": _norms(updates),
            "param_norm": _norms(before),
        }
        return {"micro_batches": micro_batches, "layers": layers, "row_nll": rows.swapaxes(0, 1).reshape(-1)}

    return jax.jit(analysis, out_shardings=replicated(run.program.mesh))


def _split_rows(leaf: jax.Array, accumulate: int) -> jax.Array:
    """`[B, ...]` to `[accumulate, B / accumulate, ...]`, as the train step does: row i goes to i % accumulate."""
    return leaf.reshape((-1, accumulate, *leaf.shape[1:])).swapaxes(0, 1)


def _norms(tree: dict[str, Any]) -> dict[str, jax.Array]:
    """Norm of each top part of a parameter tree; of the stacked layers one a layer, `[L]`."""

    def norm(part: Any, stacked: bool) -> jax.Array:
        leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(part)]
        squares = [jnp.sum(jnp.square(leaf), axis=tuple(range(int(stacked), leaf.ndim))) for leaf in leaves]
        return jnp.sqrt(functools.reduce(jnp.add, squares))

    return {name: norm(part, name == "layers") for name, part in tree.items()}


def _micro_batches(values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    count = len(values["loss"])
    return [{"micro_batch": i, **{name: float(value[i]) for name, value in values.items()}} for i in range(count)]


def _layers(norms: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    rows = []
    for name in norms["param_norm"]:
        parts = {kind: np.atleast_1d(values[name]) for kind, values in norms.items()}
        for number in range(len(parts["param_norm"])):
            row = {kind: float(values[number]) for kind, values in parts.items()}
            ratio = row["update_norm"] / row["param_norm"] if row["param_norm"] else math.nan
            rows.append({"name": f"layer {number}" if name == "layers" else name, **row, "update_ratio": ratio})
    return rows


def _rows(run: Run, step: int, row_nll: np.ndarray) -> list[dict[str, Any]]:
    """The rows of the batch with the documents they come from, the worst first; NaN is worst."""
    batches, split, tokenizer = train_batches(run), run.store.train, run.store.tokenizer
    length = batches.seq_len + 1
    rows = []
    for row, begin in enumerate(batches.positions(step - 1, 0, batches.batch_size).tolist()):
        tokens = split.read(begin, length)
        documents = np.searchsorted(split.document_starts, [begin, begin + length - 1], side="right") - 1
        repeated, period = longest_repetition(tokens)
        rows.append(
            {
                "row": row,
                "micro_batch": row % run.config.train.accumulate,
                "nll": float(row_nll[row]),
                "tokens": [begin, begin + length],
                "documents": [int(document) for document in documents],
                "repeated_tokens": repeated,
                "repeated_period": period,
                "text": _escape(tokenizer.decode(tokens[:_TEXT_TOKENS])),
            }
        )
    return sorted(rows, key=lambda row: -math.inf if math.isnan(row["nll"]) else -row["nll"])


def longest_repetition(tokens: np.ndarray) -> tuple[int, int]:
    """The longest stretch that repeats one n-gram: its number of tokens and n; (0, 0) if nothing follows itself.

    Documents that do so make gradients spike (arXiv:2501.00656). n goes up to 32.
    """
    best = (0, 0)
    for period in range(1, min(_LONGEST_PERIOD, len(tokens) - 1) + 1):
        same = np.concatenate([[False], tokens[period:] == tokens[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        longest = int((edges[1::2] - edges[::2]).max(initial=0))
        if longest >= period and longest + period > best[0]:
            best = (longest + period, period)
    return best


def _escape(text: str) -> str:
    """A text without what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
