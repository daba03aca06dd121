#!/usr/bin/env python
"""Speed of the loader beside a bare numpy gather from the same tokens in a memory map, and the effect of prefetching.

The gather reads as many windows at precomputed random positions and copies them into `inputs` and `labels`. The loader
also shuffles, checks every token and, in the third form, places the batch on the device. In the second table a
consumer sleeps for `--step-ms`, as if an accelerator were busy, and then measures its wait for the next batch.

  python scripts/bench_data.py --shapes 8x128 64x1024 512x2048 --json data.json
"""

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from benchmark import Table, interleave, parser, report

from jaxtrain.config import MeshConfig
from jaxtrain.data.file_array import FileArray
from jaxtrain.data.loader import TrainBatches, global_batch, prefetched
from jaxtrain.data.store import Split
from jaxtrain.runtime.mesh import by_rows, make_mesh

_VOCAB = 50_257


def make_split(folder: Path, num_tokens: int) -> Split:
    """Writes random tokens to a file, as in a token store."""
    file = folder / "tokens.bin"
    np.random.default_rng(0).integers(0, _VOCAB, num_tokens, np.uint16).tofile(file)
    return Split((FileArray.open(file, np.dtype("<u2")),), np.zeros(1, np.int64), 4 * num_tokens)


def forms_of(split: Split, batch_size: int, seq_len: int, num_batches: int) -> tuple[dict, functools.partial]:
    """Returns functions that make `num_batches` batches in each form, and the loader as a function of an index."""
    batches = TrainBatches(split, seed=0, batch_size=batch_size, seq_len=seq_len, vocab_size=_VOCAB)
    tokens = np.memmap(split.shards[0].path, np.uint16, "r").view(np.ndarray)
    int(tokens.max())  # reads the file, so that every form finds it in memory
    starts = np.random.default_rng(1).integers(0, len(tokens) - seq_len - 1, (num_batches, batch_size))
    offsets = np.arange(seq_len + 1)

    def gather() -> None:
        for batch_starts in starts:
            windows = tokens[batch_starts[:, None] + offsets].astype(np.int32)
            windows[:, :-1].copy(), windows[:, 1:].copy()

    def loader() -> None:
        for index in range(num_batches):
            batches.batch(index)

    placed = functools.partial(global_batch, batches, sharding=by_rows(make_mesh(MeshConfig(data=1))))

    def on_device() -> None:
        for index in range(num_batches):
            jax.block_until_ready(placed(index))

    return {"numpy gather": gather, "loader": loader, "loader, on the device": on_device}, placed


def wait_seconds(placed: functools.partial, step_seconds: float, steps: int) -> list[float]:
    """Measures the wait of each step for its batch; drops the first two, which find the queue empty."""
    waits = []
    with prefetched(placed, 0, steps + 2, 2) as feed:
        for _ in range(steps + 2):
            begin = time.perf_counter()
            next(feed)
            waits.append(time.perf_counter() - begin)
            time.sleep(step_seconds)
    return waits[2:]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--shapes",
        nargs="+",
        default=["8x128", "64x1024", "512x2048"],
        metavar="ROWSxTOKENS",
        help="shapes of the batch",
    )
    arguments.add_argument("--tokens", type=int, default=100_000_000, help="tokens in the store")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--step-ms", type=float, default=100.0)
    arguments.add_argument("--steps", type=int, default=20, help="steps of the consumer")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tables = bench(make_split(Path(folder), options.tokens), options)
    report(options, tables)


def bench(split: Split, options: argparse.Namespace) -> list[Table]:
    """Measures every shape."""
    rates = Table(
        f"Batches from {split.num_tokens:,} tokens",
        {"batch": "", "form": "", "batches/s": ",.1f", "million tokens/s": ",.2f", "time / gather": ".2f"},
        notes=[f"Medians of {options.repeats} interleaved runs; the ratio is of these."],
    )
    waits = Table(
        f"Waiting for a batch, with steps of {options.step_ms:g} ms",
        {"batch": "", "median wait, ms": ".3f", "longest, ms": ".3f", "share of the step": ".2%", "hidden": ""},
        notes=["Hidden: the median wait is below 1% of the step."],
    )
    for shape in options.shapes:
        batch_size, seq_len = (int(part) for part in shape.split("x"))
        num_batches = max(1, 2**20 // (batch_size * seq_len))
        forms, placed = forms_of(split, batch_size, seq_len, num_batches)
        for function in forms.values():
            function()
        seconds = {name: statistics.median(all_) for name, all_ in interleave(forms, options.repeats).items()}
        for name, median in seconds.items():
            rate = num_batches / median
            ratio = median / seconds["numpy gather"]
            rates.rows.append([shape, name, rate, rate * batch_size * seq_len / 1e6, ratio])
        waited = wait_seconds(placed, options.step_ms / 1e3, options.steps)
        median = statistics.median(waited)
        share = 1e3 * median / options.step_ms
        waits.rows.append([shape, 1e3 * median, 1e3 * max(waited), share, "yes" if share < 0.01 else "no"])
    return [rates, waits]


if __name__ == "__main__":
    main()
