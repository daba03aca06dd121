#!/usr/bin/env python
"""Time that a save blocks the loop, synchronous and asynchronous, and the time of a restore.

The state is that of AdamW: parameters and two moments, a third each. A save copies, writes, flushes and hashes the
arrays and renames the directory; a synchronous save waits for all of it. `Orbax, synchronous` is a plain save of the
same tree without the manifest. A restore verifies every byte first.

  python scripts/bench_checkpoint.py --gigabytes 1 --json checkpoint.json
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from benchmark import Table, parser, report

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.restore import restore
from jaxtrain.checkpoints.save import Saver
from jaxtrain.step import TrainState

_LEAF = 2**24  # float32 numbers of a leaf: 64 MiB


def make_state(gigabytes: float) -> TrainState:
    """Makes an incompressible state of about this size."""
    count = max(1, round(gigabytes * 1e9 / (3 * 4 * _LEAF)))
    keys = jax.random.split(jax.random.key(0), count)
    params = {f"layer_{i}": jax.random.normal(key, (_LEAF // 4096, 4096)) for i, key in enumerate(keys)}
    state = TrainState.create(params, optax.adam(1e-3))
    noise = jax.tree.map(lambda x: x + 1.5 if x.ndim else x, state.opt_state)
    return jax.block_until_ready(state.replace(opt_state=noise))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gigabytes", type=float, default=1.0)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--folder", type=Path, help="folder on the disk to measure; default: the temporary folder")
    options = arguments.parse_args()
    state = make_state(options.gigabytes)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], object]) -> None:
        begin = time.perf_counter()
        function()
        seconds.setdefault(name, []).append(time.perf_counter() - begin)

    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        Saver(CheckpointFolder(Path(folder) / "ours", keep=1)) as saver,
        ocp.Checkpointer(ocp.StandardCheckpointHandler()) as plain,
    ):
        for step in range(0, 2 * options.repeats + 2, 2):  # the first round warms up
            first, second = (state.replace(step=jnp.int32(step + i)) for i in (0, 1))

            def save(state: TrainState) -> None:
                saver.begin(state, {})

            def save_and_wait(state: TrainState = first) -> None:
                save(state)
                saver.wait()

            timed("save, synchronous", save_and_wait)
            timed("save, asynchronous: loop blocked", lambda state=second: save(state))
            timed("  until durable", saver.wait)
            timed("Orbax, synchronous", lambda: plain.save(Path(folder) / "plain", state, force=True))
            timed("restore", lambda: jax.block_until_ready(restore(CheckpointFolder(Path(folder) / "ours"), like)[0]))
    waited = statistics.median(seconds["save, synchronous"][1:])
    table = Table(
        f"Checkpoints of {num_bytes / 1e9:.2f} GB",
        {"what": "", "seconds": ".3f", "GB/s": ".2f", "/ save, synchronous": ".3f"},
        notes=[f"Medians of {options.repeats} interleaved rounds."],
    )
    for name, values in seconds.items():
        median = statistics.median(values[1:])
        table.rows.append([name, median, num_bytes / 1e9 / median, median / waited])
    report(options, [table], all_seconds=seconds)


if __name__ == "__main__":
    main()
