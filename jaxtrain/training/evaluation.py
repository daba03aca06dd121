"""Evaluation on a split: sums over all tokens, then one division."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxtrain.checks import check_count
from jaxtrain.data.loader import EvalBatches, global_batch, prefetched
from jaxtrain.data.store import Split
from jaxtrain.data.tokenizer import Tokenizer
from jaxtrain.losses import LossSums
from jaxtrain.runtime.mesh import by_rows
from jaxtrain.runtime.processes import compile_together, time_limit
from jaxtrain.runtime.stop import Stop, Stopped
from jaxtrain.runtime.watchdog import Watchdog
from jaxtrain.step import Batch
from jaxtrain.training.batches import documents
from jaxtrain.training.run import Run

_PREFETCH = 2  # batches that are loaded ahead


def evaluate(
    eval_step: Callable[[chex.ArrayTree, Batch], LossSums],
    params: chex.ArrayTree,
    batches: EvalBatches,
    sharding: Sharding,
    *,
    num_batches: int | None = None,
    stop: Stop | None = None,
    watchdog: Watchdog | None = None,
    positions: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Evaluates a model on a split.

    Every token but the first is predicted exactly once; padding does not count. Sums have double precision.

    Args:
      eval_step: `(params, batch) -> LossSums`, jitted; with `positions`, of vectors with a sum for each of them.
      params: parameters, sharded as `eval_step` expects.
      batches: batches of the split.
      sharding: sharding of a batch.
      num_batches: number of batches from the start of the split; None takes all.
      stop: polled while data is awaited, during compilation and between batches.
      watchdog: notified of each batch.
      positions: bounds of ranges of positions in a window, see `position_step`; () makes no table.

    Returns:
      `nll` (nats per token), `perplexity`, `bits_per_token`, `tokens`, and `bits_per_byte` (by the bytes of the
      split) or a `note` why it is absent. With `positions`, `positions` holds `start`, `stop`, `nll` and `tokens`.

    Raises:
      ValueError: no label that counts, as in prompts without their completions.
      Stopped: a stop was requested. A partial result would be misleading.
    """
    if num_batches is not None:
        check_count("num_batches", num_batches, 1)
    last = min(num_batches or batches.num_batches, batches.num_batches)
    sums = np.zeros((2, max(len(positions) - 1, 1)))  # nll and weight
    pending: LossSums | None = None
    fetch = functools.partial(global_batch, batches, sharding=sharding)
    asked_to_stop = stop.asked if stop else lambda: False
    with prefetched(fetch, 0, last, _PREFETCH, time_limit=time_limit(), asked_to_stop=asked_to_stop) as feed:
        for index, batch in enumerate(feed):
            if asked_to_stop():
                raise Stopped
            if index == 0:
                with watchdog.pause() if watchdog else contextlib.nullcontext():
                    compile_together(eval_step, params, batch)
            if watchdog:
                watchdog.beat()
            # The first call compiles. A CPU keeps the memory of what the main thread calls (`keep_freed_memory`).
            following = stop.run(eval_step, params, batch) if stop and index == 0 else eval_step(params, batch)
            if pending is not None:  # read one batch late, while the next batch runs
                sums += _host_sums(pending)
            pending = following
    if asked_to_stop():  # perhaps before the last batch
        raise Stopped
    sums += _host_sums(pending)
    return _result(sums, positions, batches.split, last)


def _result(sums: np.ndarray, positions: tuple[int, ...], split: Split, num_batches: int) -> dict[str, Any]:
    """Returns the result of `evaluate` from the sums of nll and weight `[2, ranges]`."""
    nll, weight = sums.sum(axis=1).tolist()
    if not weight:
        raise ValueError(f"no label counts in {num_batches} batches of {split.name}: raise train.eval_batches")
    loss = _loss_terms(nll / weight)
    result = loss | _bits_per_byte(loss["bits_per_token"], split) | {"tokens": round(weight)}
    table = [
        {"start": start, "stop": stop, "nll": nll / weight, "tokens": round(weight)}
        for start, stop, (nll, weight) in zip(positions, positions[1:], sums.T.tolist(), strict=False)
        if weight
    ]
    return result | ({"positions": table} if positions else {})


def _loss_terms(nll: float) -> dict[str, float]:
    return {"nll": nll, "perplexity": math.exp(min(nll, 700.0)), "bits_per_token": nll / math.log(2)}


def _host_sums(sums: LossSums) -> np.ndarray:
    return np.stack([np.asarray(leaf, np.float64).reshape(-1) for leaf in (sums.nll, sums.weight)])


def position_step(eval_step: Callable, seq_len: int) -> tuple[Callable, tuple[int, ...]]:
    """Returns an eval step with a sum for each range of positions, and the bounds of the ranges.

    The last range is half a window, the one before it a quarter, and so on. The step runs the model once: only `where`
    differs between the ranges.
    """
    positions = tuple(sorted({0, *(seq_len >> halvings for halvings in range(6))}))
    start, stop = (jnp.array(bounds)[:, None, None] for bounds in (positions[:-1], positions[1:]))

    def step(params: chex.ArrayTree, batch: Batch) -> LossSums:
        position = jnp.arange(seq_len)[None, None]
        where = batch["where"][None] & (position >= start) & (position < stop)
        return jax.vmap(lambda where: eval_step(params, {**batch, "where": where}))(where)

    return jax.jit(step), positions


def _bits_per_byte(bits_per_token: float, split: Split) -> dict[str, Any]:
    if split.masks is not None:  # completions may be sure, as no text is
        return {"note": "no bits per byte: the labels are completions, not a text"}
    if split.num_bytes is None:
        return {"note": f"no bits per byte: {split.name} does not store the bytes of its text"}
    return {"bits_per_byte": bits_per_token * (split.num_tokens - 1) / split.num_bytes}


def evaluate_split(
    run: Run, params: chex.ArrayTree, split: Split, *, by_position: bool = False, **options: Any
) -> dict[str, Any]:
    """Evaluates a run's model on a split, with the batch size of the run and the options of `evaluate`."""
    config, step = run.config.train, run.program.eval_step
    if by_position:
        step, options["positions"] = position_step(step, config.seq_len)
    batches = EvalBatches(split, config.batch_size, config.seq_len, run.program.vocab_size, documents(run))
    return evaluate(step, params, batches, by_rows(run.program.mesh), **options)


def evaluate_sources(
    run: Run, params: chex.ArrayTree, split: str | Mapping[str, Split], **options: Any
) -> dict[str, Any]:
    """Evaluates a run's model on the "train" or "validation" split of all its data, or on splits by name.

    Takes the options of `evaluate_split`; `num_batches` counts the batches of each source. Returns the results of
    `evaluate` over all tokens and, for several sources, each one's as `nll/NAME` and so on.
    """
    sources, named = split, False
    if isinstance(split, str):
        named = bool(run.store.sources)
        sources = {name: getattr(store, split) for name, store in (run.store.sources or {"": run.store}).items()}
    results = {name: evaluate_split(run, params, source, **options) for name, source in sources.items()}
    if len(results) == 1 and not named:
        return next(iter(results.values()))
    tables = [result.pop("positions", []) for result in results.values()]
    tokens, nll = _merge(results.values())
    whole = _loss_terms(nll)
    if all("bits_per_byte" in result for result in results.values()):
        labels = sum(source.num_tokens - 1 for source in sources.values())
        num_bytes = sum(source.num_bytes for source in sources.values())
        whole["bits_per_byte"] = whole["bits_per_token"] * labels / num_bytes
    each = {f"{key}/{name}": value for name, result in results.items() for key, value in result.items()}
    rows = [row for table in tables for row in table]
    positions = [
        {"start": start, "stop": stop, "nll": nll, "tokens": tokens}
        for start, stop in sorted({(row["start"], row["stop"]) for row in rows})
        for tokens, nll in [_merge([row for row in rows if row["start"] == start])]
    ]
    return whole | {"tokens": tokens} | ({"positions": positions} if positions else {}) | each


def _merge(results: Iterable[dict[str, Any]]) -> tuple[int, float]:
    """Returns the tokens of all results, and their mean nll."""
    results = list(results)
    tokens = sum(result["tokens"] for result in results)
    return tokens, sum(result["nll"] * result["tokens"] for result in results) / tokens


def split_text(split: Split, tokenizer: Tokenizer) -> bytes:
    """Returns the text of a split's documents, concatenated, as UTF-8."""
    tokens = split.read(0, split.num_tokens)
    return tokenizer.decode(tokens[tokens != tokenizer.eot_id]).encode()
