"""Batches of tokens: a pure function of (seed, step), so that a resumed run needs only its step number.

A batch is a dict of numpy arrays [batch_size, seq_len]: `inputs` int32, `labels` int32 (the token after each input),
`where` bool (True for the labels that count), and segments and positions if `rows.Documents` says so.
"""

import contextlib
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from jaxtrain.data.order import permute, skip_to
from jaxtrain.data.packing import PackedWindows
from jaxtrain.data.rows import PLAIN, Documents, Piece, RowReader, TokenBatch
from jaxtrain.data.store import Split
from jaxtrain.fields import Ranges
from jaxtrain.mixture import Mixture

T = TypeVar("T")

_POLL_SECONDS = 0.2  # between polls for a stop while a batch is awaited
_WORDS_PER_ROW = 32  # of 8 bytes, for the places that a row is read from


class Batches(Protocol):
    """Interface that `global_batch` reads from; `TrainBatches` and `EvalBatches` implement it."""

    @property
    def batch_size(self) -> int:
        """Sequences per batch."""

    def rows(self, index: int, start: int, stop: int) -> TokenBatch:
        """Returns rows [start, stop) of batch `index`."""


class Windows(NamedTuple):
    """Windows of seq_len tokens that cover a range of a split, each with the token that follows it."""

    start: int  # first token
    num_tokens: int
    seq_len: int

    @property
    def count(self) -> int:
        """Number of windows in one epoch."""
        return max((self.num_tokens - 1) // self.seq_len, 0)

    def pieces(self, window: int) -> list[Piece]:
        return [(self.start + window * self.seq_len, self.seq_len)]


@dataclass(frozen=True, eq=False)
class TrainBatches:
    """Endless shuffled training batches; every epoch covers each window of a source once, in a new order."""

    split: Split
    seed: int
    batch_size: int  # sequences
    seq_len: int  # tokens
    vocab_size: int
    skip: Ranges = ()  # batches left out, see `config.data.skip`
    mixture: Mixture | None = None  # of `sources`; None: the split is one source
    sources: tuple[Windows | PackedWindows, ...] = ()  # of the mixture, or of the split; (): all its plain windows
    documents: Documents = PLAIN

    def __post_init__(self):
        _require_sizes(self.batch_size, self.seq_len)
        if self.num_windows < 1:
            raise ValueError(
                f"the training split has {self.split.num_tokens} tokens, fewer than one window of seq_len + 1 = "
                f"{self.seq_len + 1}: lower seq_len or add text"
            )

    @property
    def num_windows(self) -> int:
        """Windows of one pass over all sources."""
        return sum(source.count for source in self._sources)

    @cached_property
    def _sources(self) -> tuple[Windows | PackedWindows, ...]:
        return self.sources or (Windows(0, self.split.num_tokens, self.seq_len),)

    def rows(self, step: int, start: int, stop: int) -> TokenBatch:
        """Returns rows [start, stop) of a step's batch, `where` all True; a ValueError if a token is out of range."""
        _require_memory(start, stop, self.seq_len)
        reader = RowReader(self.split, self.seq_len, self.vocab_size, self.documents)
        return reader.read(self.pieces(step, start, stop))

    def pieces(self, step: int, start: int, stop: int) -> list[list[Piece]]:
        """Returns the pieces of the split in rows [start, stop) of a step's batch.

        Steps count from 0 here: 0 is the step that users see as 1.
        """
        _require_rows(start, stop, self.batch_size)
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        first = skip_to(step, self.skip) * self.batch_size
        if self.mixture is None:
            return self._shuffled(0, first + start, first + stop)
        chosen = self.mixture.sources(first + start, first + stop)
        before = self.mixture.counts(first + start)
        read = [
            iter(self._shuffled(source, count, count + chosen.count(source))) for source, count in enumerate(before)
        ]
        return [next(read[source]) for source in chosen]

    def _shuffled(self, source: int, start: int, stop: int) -> list[list[Piece]]:
        """Returns the pieces of the sequences [start, stop) of a source, counted over all its epochs."""
        windows, rows = self._sources[source], []
        while start < stop:  # one pass per epoch
            epoch, offset = divmod(start, windows.count)
            end = offset + min(stop - start, windows.count - offset)
            order = permute(np.arange(offset, end), windows.count, (self.seed, epoch))
            rows += [windows.pieces(window) for window in order.tolist()]
            start += end - offset
        return rows

    def tokens_seen(self, steps: int) -> dict[str, int]:
        """Returns the tokens that the first `steps` steps read of each source of a mixture; `{}` without one."""
        if self.mixture is None:
            return {}
        end = skip_to(steps - 1, self.skip) + 1 if steps else 0
        counts = np.array(self.mixture.counts(end * self.batch_size), np.int64)
        for start, stop in self.skip:
            if start < end:
                skipped = (self.mixture.counts(batch * self.batch_size) for batch in (start, stop))
                counts += np.subtract(*skipped)
        return dict(zip(self.mixture.names, (counts * self.seq_len).tolist(), strict=True))

    @property
    def is_packed(self) -> bool:
        """True if rows hold pieces of documents and padding."""
        return any(isinstance(source, PackedWindows) for source in self._sources)

    def padding_share(self, start: int, stop: int) -> float:
        """Returns the share of the tokens of steps [start, stop), counted from 0, that are padding."""
        rows = (row for step in range(start, stop) for row in self.pieces(step, 0, self.batch_size))
        filled = sum(length for row in rows for _, length in row)
        return 1 - filled / ((stop - start) * self.batch_size * self.seq_len)

    def batch(self, step: int) -> TokenBatch:
        return self.rows(step, 0, self.batch_size)


@dataclass(frozen=True, eq=False)
class EvalBatches:
    """Covers a split once, in order.

    Every token but the first is a label exactly once; padding has `where` False.
    """

    split: Split
    batch_size: int  # sequences
    seq_len: int  # tokens
    vocab_size: int
    documents: Documents = PLAIN

    def __post_init__(self):
        _require_sizes(self.batch_size, self.seq_len)
        if self.split.num_tokens < 2:
            raise ValueError(f"the split has {self.split.num_tokens} tokens, and a label needs two: add text")

    @property
    def num_batches(self) -> int:
        """Number of batches, the last one padded."""
        windows = -(-(self.split.num_tokens - 1) // self.seq_len)
        return -(-windows // self.batch_size)

    def rows(self, index: int, start: int, stop: int) -> TokenBatch:
        """Returns rows [start, stop) of a batch; inputs and labels are 0 where `where` is False."""
        _require_rows(start, stop, self.batch_size)
        if not 0 <= index < self.num_batches:
            raise ValueError(f"batch {index} is not among the {self.num_batches} of the split")
        first, num_labels = (index * self.batch_size + start) * self.seq_len, self.split.num_tokens - 1
        begins = range(first, first + (stop - start) * self.seq_len, self.seq_len)
        rows = [[(begin, min(self.seq_len, num_labels - begin))] if begin < num_labels else [] for begin in begins]
        return RowReader(self.split, self.seq_len, self.vocab_size, self.documents).read(rows)

    def batch(self, index: int) -> TokenBatch:
        return self.rows(index, 0, self.batch_size)


def _require_memory(start: int, stop: int, seq_len: int) -> None:
    """Raises a MemoryError, before any work, if rows [start, stop) take more memory than the machine has."""
    needed = 8 * (stop - start) * (_WORDS_PER_ROW + seq_len)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise MemoryError(f"{stop - start:,} rows of {seq_len:,} tokens need {needed:,} bytes of the {memory:,} here")


def global_batch(batches: Batches, index: int, sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Returns a batch as global arrays [batch_size, seq_len] with a sharding.

    Each process reads only the rows of its own devices, and each range of rows once.
    """
    built: dict[tuple[int, int], TokenBatch] = {}

    def part(name: str, where: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = where[0].indices(batches.batch_size)
        if (start, stop) not in built:
            built[start, stop] = batches.rows(index, start, stop)
        return built[start, stop][name][:, *where[1:]]

    return {
        name: jax.make_array_from_callback(
            (batches.batch_size, *like.shape[1:]), sharding, lambda where, name=name: part(name, where)
        )
        for name, like in batches.rows(index, 0, 0).items()
    }


@contextlib.contextmanager
def prefetched(
    function: Callable[[int], T],
    start: int,
    stop: int,
    depth: int,
    *,
    time_limit: float = 300.0,
    asked_to_stop: Callable[[], bool] = lambda: False,
    join_seconds: float = 10.0,
) -> Iterator[Iterator[T]]:
    """Yields an iterator over function(start), ..., function(stop - 1), computed in order on a thread.

    Leaving the block stops the thread. An exception of `function` is raised at its item.

    Args:
      function: returns the item of a number.
      start, stop: range of the numbers.
      depth: largest number of items computed ahead.
      time_limit: seconds to wait for an item before a TimeoutError that says where the thread hangs.
      asked_to_stop: polled while waiting; True ends the iteration.
      join_seconds: time for the thread to finish its item when the block is left; a thread that hangs is abandoned.
    """
    if depth < 1:
        raise ValueError(f"prefetch depth must be 1 or more, got {depth}")
    room, stopping = threading.Semaphore(depth), threading.Event()
    ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        for index in range(start, stop):
            room.acquire()
            if stopping.is_set():
                return
            try:
                ready.put((function(index), None))
            except BaseException as error:
                ready.put((None, error))
                return

    def items() -> Iterator[T]:
        for index in range(start, stop):
            if (found := _wait(ready, thread, index, time_limit, asked_to_stop)) is None:
                return
            item, error = found
            if error is not None:
                raise error
            room.release()
            yield item

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    feed = items()
    try:
        yield feed
    finally:
        stopping.set()
        room.release()
        thread.join(join_seconds)
        feed.close()


def _wait(
    ready: queue.SimpleQueue[T], thread: threading.Thread, index: int, limit: float, asked_to_stop: Callable[[], bool]
) -> T | None:
    """Waits for the next item of a queue; returns None if a stop was requested first."""
    deadline = time.monotonic() + limit
    while True:
        try:
            return ready.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            if asked_to_stop():
                return None
        if time.monotonic() >= deadline:
            where, frame = "ended", sys._current_frames().get(thread.ident)
            if frame is not None:
                where = "is at {0.filename}:{0.lineno} ({0.name})".format(traceback.extract_stack(frame)[-1])
            raise TimeoutError(
                f"batch {index} did not come within {limit:g} s: the thread that reads the data {where}; see whether "
                "its disk answers, or give more time with JAXTRAIN_TIMEOUT"
            )


def _require_sizes(batch_size: int, seq_len: int) -> None:
    if batch_size < 1 or seq_len < 1:
        raise ValueError(f"batch_size and seq_len must be 1 or more, got {batch_size} and {seq_len}")


def _require_rows(start: int, stop: int, batch_size: int) -> None:
    if not 0 <= start <= stop <= batch_size:
        raise ValueError(f"rows [{start}, {stop}) are not in a batch of {batch_size}")
