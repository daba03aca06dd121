#!/usr/bin/env python
"""Overhead of the loop of `jaxtrain train` beside the bare train step: the same program over the same batches.

The real loop runs, with prefetching, metrics read one step late, health rules, console, polled saves and the guard.
After every chunk of steps it pauses while the bare compiled step runs as many steps on a copy of the state and on
batches in memory, so that a busy machine slows both alike. The ratio is the median over pairs of chunks.

  python scripts/bench_loop.py configs/quickstart.py --chunks 30 --json loop.json
"""

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from benchmark import Table, parser, report, start_jax

from jaxtrain.config import CheckpointConfig, Config, DataConfig
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.store import open_store
from jaxtrain.runtime.config_files import load_config
from jaxtrain.training.batches import batch_source
from jaxtrain.training.run import Hooks, assemble
from jaxtrain.training.train import train


class Terminal(io.StringIO):
    """A terminal in memory, on which the console draws its panel."""

    def isatty(self) -> bool:
        return True


class Interleaved:
    """Compiled train step that pauses every `chunk` calls to time as many calls without the loop."""

    def __init__(self, train_step: Callable, batches: list[Any]):
        self._train_step, self._batches, self._calls, self._begin = train_step, batches, 0, 0.0
        self.loop_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.loop_cpu_seconds: list[float] = []

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
        if self._calls % len(self._batches) == 0:
            jax.block_until_ready(state)
            if self._calls:
                self.loop_seconds.append(time.perf_counter() - self._begin)
                self.loop_cpu_seconds.append(time.thread_time() - self._cpu)
            self._bare(jax.tree.map(jnp.copy, state))
            self._begin, self._cpu = time.perf_counter(), time.thread_time()
        self._calls += 1
        return self._train_step(state, batch)

    def _bare(self, state: Any) -> None:
        jax.block_until_ready(state)
        begin = time.perf_counter()
        for batch in self._batches:
            state, _ = self._train_step(state, batch)
        jax.block_until_ready(state)
        self.bare_seconds.append(time.perf_counter() - begin)


def run_loop(config: Config, chunk: int, chunks: int, folder: Path, output: io.StringIO) -> Interleaved:
    """Trains for `chunks` + 2 chunks; the first warms up. The run prints to `output`."""
    steps = chunk * (chunks + 2)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train, eval_every=None, sample_tokens=None, stop_after=steps, steps=max(steps, config.train.steps)
        ),
        checkpoint=CheckpointConfig(every=10**9),
    )
    made = []

    def interleave(train_step: Callable) -> Interleaved:
        run = assemble(config, folder, open_store(config.data.store))
        fetch = batch_source(run)
        made.append(Interleaved(train_step, [fetch(i) for i in range(chunk)]))
        return made[0]

    with contextlib.redirect_stdout(output):
        train(config, folder / "run", hooks=Hooks(wrap_step=interleave))
    return made[0]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("config", nargs="?", default="configs/quickstart.py")
    arguments.add_argument("--store", help="token store; default: that of the config, or of its sources")
    arguments.add_argument("--chunk", type=int, default=10, help="steps per chunk")
    arguments.add_argument("--chunks", type=int, default=20)
    arguments.add_argument("--terminal", action="store_true", help="draw the live panel")
    arguments.add_argument("--log-every", type=int, help="steps; default: as in the config")
    options = arguments.parse_args()
    start_jax()
    config = load_config(Path(options.config))
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or config.data.store
        if not store:
            store = str(Path(folder) / "store")
            prepare(config.data.sources, store, progress=False)
        settings = dataclasses.replace(config.train, log_every=options.log_every or config.train.log_every)
        config = dataclasses.replace(config, data=DataConfig(store=store), train=settings)
        output = Terminal() if options.terminal else io.StringIO()
        timed = run_loop(config, options.chunk, options.chunks, Path(folder), output)
    table = Table(
        f"The loop of {options.config} against its bare step, {options.chunk} steps at a time",
        {"form": "", "ms a step": ".2f", "time / bare": ".3f", "main thread's CPU ms": ".3f"},
        notes=[f"Medians of {options.chunks} interleaved pairs; the ratio is the median of the pairs' ratios."],
    )
    bare, loop = timed.bare_seconds[1:-1], timed.loop_seconds[1:]
    ratio = statistics.median(b / a for a, b in zip(bare, loop, strict=True))
    cpu = 1e3 * statistics.median(timed.loop_cpu_seconds[1:]) / options.chunk
    table.rows.append(["bare step", 1e3 * statistics.median(bare) / options.chunk, 1.0, None])
    table.rows.append(["jaxtrain train", 1e3 * statistics.median(loop) / options.chunk, ratio, cpu])
    report(options, [table], bare_seconds=bare, loop_seconds=loop)


if __name__ == "__main__":
    main()
