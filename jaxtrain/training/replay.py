"""Replays a train step from the checkpoint before it, and reports its micro-batches, layers and rows."""

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
from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.manifest import Damaged
from jaxtrain.checkpoints.restore import restore
from jaxtrain.data.inspection import escape, longest_repetition
from jaxtrain.gradients import takes_key
from jaxtrain.losses import LossSums
from jaxtrain.models.model import TransformerModel
from jaxtrain.monitoring.interval import summarize
from jaxtrain.monitoring.layers import drop_unsampled, part_norms
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.monitoring.sentences import sentence
from jaxtrain.precision import Policy
from jaxtrain.runtime.mesh import replicated
from jaxtrain.runtime.processes import LONG_SECONDS, agree, compile_together
from jaxtrain.runtime.terminal import echo
from jaxtrain.step import TrainState
from jaxtrain.training.batches import batch_source, train_batches
from jaxtrain.training.run import NO_HOOKS, Hooks, Run, environment_changes, init_state, open_run, read_weights

# Fields of a step line that depend on the clock or on restarts.
_NOT_COMPARED = {"attempt", "tokens_per_second", "step_seconds", "mfu", "time"}
_TEXT_TOKENS = 48  # tokens of a row that are shown as text


def replay(run_dir: str | Path, step: int, hooks: Hooks = NO_HOOKS, **options: Any) -> dict[str, Any]:
    """Runs a train step of a run again, on the batches that the run saw. Writes nothing.

    Starts from the newest checkpoint before the step (counted from 1, as in metrics.jsonl) or, without one, from the
    start of the run. The devices hold the state twice for one step. Takes the hooks and options of `open_run`. Raises a
    ValueError if there is no such run, or if it has not reached the step.

    Returns:
      `step`; `from_step` (0 is the start of the run); `metrics` as recomputed; `logged`, the step's line or None;
      `compared_steps`, those whose lines cover only steps since `from_step`; `reproduces`, True if these lines are
      equal to the bit, None if there are none; `differences` (step, metric, logged, replayed); `notes`; and
      `micro_batches`, `layers` and `rows` of the step. Rows come in order of falling loss.
    """
    run = open_run(run_dir, hooks, **options)
    lines, events = read_metrics(run.folder / "metrics.jsonl")
    reached = max((record["step"] for record in [*lines, *events] if "step" in record), default=0)
    last = min(reached + run.config.train.log_every, run.config.train.steps)  # a crash may lose the last lines
    if not 1 <= step <= last:
        raise ValueError(f"{run.folder} has no step {step} to replay: give --step 1 to {last}, as in its metrics.jsonl")
    state, first = _state_before(run, step, events)
    fetch = batch_source(run)
    train_step = run.program.compile(state, fetch(first), functools.partial(echo, file=sys.stderr))
    agree("the end of compilation", {}, timeout=LONG_SECONDS)
    logged = {line["step"]: line for line in lines}
    settings = run.config.train
    differences, compared, replayed = [], [], []
    for done in range(first + 1, step + 1):
        batch = fetch(done - 1)
        before = jax.jit(lambda state: jax.tree.map(jnp.copy, state))(state) if done == step else None
        state, metrics = train_step(state, batch)
        metrics = drop_unsampled(metrics.unpack(), done, settings.diagnose_every)
        values = {"step": done, **metrics, "tokens_seen": done * settings.batch_size * settings.seq_len}
        replayed.append({name: value.tolist() for name, value in metrics.items()})
        covered = logged.get(done, {}).get("steps", 1)  # older lines hold the metrics of one step
        if done in logged and covered <= len(replayed):
            compared.append(done)
            differences += _differences(logged[done], values | summarize(replayed[-covered:]))
    row_nll, diagnosed_step = _row_nll(run), _diagnosed_step(run)
    compile_together(row_nll, before.params, batch)
    nll = row_nll(before.params, batch)
    compile_together(diagnosed_step, before, batch)
    terms = diagnosed_step(before, batch)[1].unpack()
    return {
        "step": step,
        "from_step": first,
        "metrics": values,
        "logged": logged.get(step),
        "compared_steps": compared,
        "reproduces": not differences if compared else None,
        "differences": differences,
        "notes": _notes(run, events, first, step),
        "micro_batches": _micro_batches(terms),
        "layers": _layers(terms),
        "rows": _rows(run, step, jax.device_get(nll)),
    }


def _state_before(run: Run, step: int, events: list[dict[str, Any]]) -> tuple[TrainState, int]:
    """Returns the newest state before a step and its number of steps. Skips damaged checkpoints."""
    checkpoints = CheckpointFolder(run.folder / "checkpoints")
    if any(saved < step for saved in checkpoints.steps()):
        try:
            state, _ = restore(checkpoints, run.program.abstract_state, last=step - 1)
            return state, int(state.step)
        except Damaged as problem:
            checkpoints.report("checkpoint_damaged", f"{problem}; going back to the start of the run")
    state, source = init_state(run), run.config.train.init_from
    if source:
        begun = [event for event in events if "source_step" in event][-1]
        path, _ = warm_start.find(source, run.folder)
        path = path / "checkpoints" / str(begun["source_step"])  # the source may have newer checkpoints by now
        state, _ = read_weights(run, state, str(path))
    return state, 0


def _notes(run: Run, events: list[dict[str, Any]], first: int, step: int) -> list[str]:
    """Returns the changes of environment and config that let numbers of steps after `first` differ without a fault."""
    environment = [
        f"{name} was {before} in the run and is {now} here: expect equal numbers up to rounding only"
        for name, (before, now) in environment_changes(run, events, step).items()
    ]
    changes = [event for event in events if event["event"] == "config_change" and event["step"] > first]
    return environment + [f"steps up to {event['step']} do not reproduce: {sentence(event)}" for event in changes]


def _differences(logged: dict[str, Any], values: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for key in logged.keys() & values.keys() - _NOT_COMPARED:
        before, now = (np.asarray(value, np.float64) for value in (logged[key], values[key]))
        if before.shape != now.shape or not np.array_equal(before, now, equal_nan=True):
            found.append({"step": logged["step"], "metric": key, "logged": before.tolist(), "replayed": now.tolist()})
    return sorted(found, key=lambda difference: difference["metric"])


def _diagnosed_step(run: Run) -> Any:
    """Returns the run's train step with the terms of each micro-batch and layer in its metrics.

    A second program: more results change the fusions around the gradients, and with them the last bits.
    """
    options = {"wrap_loss": run.hooks.wrap_loss, "diagnose": _layer_norms, "micro_batch_terms": True}
    return run.hooks.make_program(run.config, run.program.mesh, run.store.vocab_size, **options).train_step


def _layer_norms(params: Any, grads: Any, updates: Any, opt_state: Any) -> dict[str, jax.Array]:
    """Returns the norms of the parts of the parameters, gradients and updates; see `part_norms`."""
    del opt_state
    trees = {"grad_norm": grads, "param_norm": params, "update_norm": updates}
    return {f"{kind}/{name}": norm for kind, tree in trees.items() for name, norm in part_norms(tree).items()}


def _row_nll(run: Run) -> Any:
    """Returns `(params, batch) -> mean loss [B]` of each row, sharded by XLA over the mesh."""
    model, loss_fn = run.program.model, run.program.model.loss
    if isinstance(model, TransformerModel):  # the other attention kernels run on one device each
        loss_fn = dataclasses.replace(model, config=dataclasses.replace(model.config, attention="xla")).loss
    key = [None] if takes_key(model.loss) else []
    if run.hooks.wrap_loss is not None:
        loss_fn = run.hooks.wrap_loss(loss_fn)
    policy = Policy(compute=run.config.train.precision)

    def row_nll(params: Any, batch: Any) -> jax.Array:
        params = policy.cast_to_compute(params)

        def mean_nll(row: Any) -> jax.Array:
            result = loss_fn(params, jax.tree.map(lambda x: x[None], row), *key)
            sums: LossSums = result[0] if isinstance(result, tuple) else result
            return sums.mean_nll()

        return jax.lax.map(mean_nll, batch)

    return jax.jit(row_nll, out_shardings=replicated(run.program.mesh))


def _micro_batches(terms: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    names = ("loss", "nll", "tokens", "grad_norm")
    columns = [terms[f"micro_batch_{name}"].tolist() for name in names]
    return [{"micro_batch": i} | dict(zip(names, row, strict=True)) for i, row in enumerate(zip(*columns, strict=True))]


def _layers(terms: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    rows = []
    for part in [name.partition("/")[2] for name in terms if name.startswith("param_norm/")]:
        norms = {kind: np.atleast_1d(terms[f"{kind}/{part}"]) for kind in ("grad_norm", "param_norm", "update_norm")}
        is_one = terms[f"param_norm/{part}"].ndim == 0
        for number in range(len(norms["param_norm"])):
            row = {kind: float(values[number]) for kind, values in norms.items()}
            ratio = row["update_norm"] / row["param_norm"] if row["param_norm"] else math.nan
            name = part if is_one else f"{part.removesuffix('s')} {number}"
            rows.append({"name": name, **row, "update_ratio": ratio})
    return rows


def _rows(run: Run, step: int, row_nll: np.ndarray) -> list[dict[str, Any]]:
    """Returns the rows of the batch with their documents, in order of falling loss. NaN comes first."""
    batches, split = train_batches(run), run.store.train
    starts = np.zeros(1) if split.document_starts is None else split.document_starts
    rows = []
    for row, pieces in enumerate(batches.pieces(step - 1, 0, batches.batch_size)):
        ends = [min(start + length + 1, split.num_tokens) for start, length in pieces]  # each with its last label
        tokens = np.concatenate([split.read(piece[0], end - piece[0]) for piece, end in zip(pieces, ends, strict=True)])
        begin, end = min(pieces)[0], max(ends)
        documents = np.searchsorted(starts, [begin, end - 1], side="right") - 1
        repeated, period = longest_repetition(tokens)
        rows.append(
            {
                "row": row,
                "micro_batch": row % run.config.train.accumulate,
                "nll": float(row_nll[row]),
                "tokens": [begin, end],
                "documents": [int(document) for document in documents],
                "repeated_tokens": repeated,
                "repeated_period": period,
                "text": escape(_text(run, tokens[:_TEXT_TOKENS])),
            }
        )
    return sorted(rows, key=lambda row: -math.inf if math.isnan(row["nll"]) else -row["nll"])


def _text(run: Run, tokens: np.ndarray) -> str:
    return run.tokenizer.decode(tokens) if run.store.tokenizer_file else f"token ids {' '.join(map(str, tokens))}"
