"""Batches of tokens: a pure function of (seed, step), so that a resumed run needs only its step number.

A batch is a dict of numpy arrays [batch_size, seq_len]: `inputs` int32, `labels` int32 (the token after each input) and
`where` bool (True for the labels that count).
"""

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import jax
import numpy as np

from jaxtrain.config import Ranges
from jaxtrain.data.order import permute, skip_to
from jaxtrain.data.store import Split

T = TypeVar("T")

_POLL_SECONDS = 0.2  # between polls for a stop while a batch is awaited

TokenBatch = dict[str, np.ndarray]


class Batches(Protocol):
    """Interface that `global_batch` reads from; `TrainBatches` and `EvalBatches` implement it."""

    @property
    def batch_size(self) -> int:
        """Sequences per batch."""

    def rows(self, index: int, start: int, stop: int) -> TokenBatch:
        """Returns rows [start, stop) of batch `index`."""


@dataclass(frozen=True, eq=False)
class TrainBatches:
    """Endless shuffled training batches; every epoch covers each window of the split once, in a new order."""

    split: Split
    seed: int
    batch_size: int  # sequences
    seq_len: int  # tokens
    vocab_size: int
    skip: Ranges = ()  # batches left out, see `config.data.skip`

    def __post_init__(self):
        _require_sizes(self.batch_size, self.seq_len)
        if self.num_windows < 1:
            raise ValueError(
                f"the training split has {self.split.num_tokens} tokens, fewer than one window of seq_len + 1 = "
                f"{self.seq_len + 1}: lower seq_len or add text"
            )

    @property
    def num_windows(self) -> int:
        """Windows per epoch: seq_len tokens apart, each with the token that follows it."""
        return (self.split.num_tokens - 1) // self.seq_len

    def rows(self, step: int, start: int, stop: int) -> TokenBatch:
        """Returns rows [start, stop) of a step's batch, `where` all True; a ValueError if a token is out of range."""
        windows = np.empty((stop - start, self.seq_len + 1), np.int32)
        for row, position in enumerate(self.positions(step, start, stop).tolist()):
            windows[row] = _read(self.split, position, self.seq_len + 1, self.vocab_size)
        return _batch(windows, np.ones((stop - start, self.seq_len), bool))

    def positions(self, step: int, start: int, stop: int) -> np.ndarray:
        """Returns the first token of rows [start, stop) of a step's batch: int64 positions in the split.

        Steps count from 0 here: 0 is the step that users see as 1.
        """
        _require_rows(start, stop, self.batch_size)
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        first = skip_to(step, self.skip) * self.batch_size
        windows = np.empty(stop - start, np.int64)
        position = first + start
        while position < first + stop:  # one pass per epoch
            epoch, offset = divmod(position, self.num_windows)
            count = min(first + stop - position, self.num_windows - offset)
            order = permute(np.arange(offset, offset + count), self.num_windows, (self.seed, epoch))
            windows[position - first - start :][:count] = order
            position += count
        return windows * self.seq_len

    def batch(self, step: int) -> TokenBatch:
        """Returns the batch of a step."""
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

    def __post_init__(self):
        _require_sizes(self.batch_size, self.seq_len)
        if self.split.num_tokens < 2:
            raise ValueError(f"the split has {self.split.num_tokens} tokens, and a label needs two: add text")

    @property
    def num_batches(self) -> int:
        """Number of batches, the last one padded."""
        return -(-self._num_windows // self.batch_size)

    @property
    def _num_windows(self) -> int:
        return -(-(self.split.num_tokens - 1) // self.seq_len)

    def rows(self, index: int, start: int, stop: int) -> TokenBatch:
        """Returns rows [start, stop) of a batch; inputs and labels are 0 where `where` is False."""
        _require_rows(start, stop, self.batch_size)
        if not 0 <= index < self.num_batches:
            raise ValueError(f"batch {index} is not among the {self.num_batches} of the split")
        windows = np.zeros((stop - start, self.seq_len + 1), np.int32)
        lengths = np.zeros(stop - start, np.int64)  # labels per row
        first = index * self.batch_size + start
        for row, window in enumerate(range(first, min(first + stop - start, self._num_windows))):
            begin = window * self.seq_len
            length = min(self.seq_len + 1, self.split.num_tokens - begin)
            windows[row, :length] = _read(self.split, begin, length, self.vocab_size)
            lengths[row] = length - 1
        where = np.arange(self.seq_len)[None, :] < lengths[:, None]
        batch = _batch(windows, where)
        # The last token of a ragged window has no label: as an input it would be padding with a value.
        return {**batch, "inputs": np.where(where, batch["inputs"], 0)}

    def batch(self, index: int) -> TokenBatch:
        """Returns a whole batch."""
        return self.rows(index, 0, self.batch_size)


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


class Prefetcher(Generic[T]):
    """Iterator over function(start), ..., function(stop - 1), computed in order on a thread.

    Use it as a context manager; leaving the block stops the thread. An exception of `function` is raised at its item.

    Args:
      function: returns the item of a number.
      start, stop: range of the numbers.
      depth: largest number of items computed ahead.
      time_limit: seconds to wait for an item before a TimeoutError that says where the thread hangs.
      asked_to_stop: polled while waiting; True ends the iteration.
      join_seconds: time for the thread to finish its item when the block is left; a thread that hangs is abandoned.
    """

    def __init__(
        self,
        function: Callable[[int], T],
        start: int,
        stop: int,
        depth: int,
        *,
        time_limit: float = 300.0,
        asked_to_stop: Callable[[], bool] = lambda: False,
        join_seconds: float = 10.0,
    ):
        if depth < 1:
            raise ValueError(f"prefetch depth must be 1 or more, got {depth}")
        self._time_limit, self._asked_to_stop, self._stop = time_limit, asked_to_stop, stop
        self._join_seconds = join_seconds
        self._function, self._indices, self._left = function, range(start, stop), max(stop - start, 0)
        self._room = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._room.release()
        self._thread.join(self._join_seconds)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._thread.ident is None or self._stopping.is_set():
            raise RuntimeError("a Prefetcher gives items inside its `with` block only")
        if self._left == 0:
            raise StopIteration
        ready = self._wait()
        if ready is None:
            raise StopIteration
        item, error = ready
        self._left -= 1
        if error is not None:
            self._left = 0
            raise error
        self._room.release()
        return item

    def _wait(self) -> tuple[T | None, BaseException | None] | None:
        """Waits for the next item or error; returns None if a stop was requested first."""
        deadline = time.monotonic() + self._time_limit
        while True:
            try:
                return self._ready.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if self._asked_to_stop():
                    return None
            if time.monotonic() >= deadline:
                frame = sys._current_frames().get(self._thread.ident)
                where = (
                    "ended"
                    if frame is None
                    else "is at {0.filename}:{0.lineno} ({0.name})".format(traceback.extract_stack(frame)[-1])
                )
                raise TimeoutError(
                    f"batch {self._stop - self._left} did not come within {self._time_limit:g} s: the thread that "
                    f"reads the data {where}; see whether its disk answers, or give more time with JAXTRAIN_TIMEOUT"
                )

    def _work(self) -> None:
        for index in self._indices:
            self._room.acquire()
            if self._stopping.is_set():
                return
            try:
                self._ready.put((self._function(index), None))
            except BaseException as error:
                self._ready.put((None, error))
                return


def _read(split: Split, start: int, length: int, vocab_size: int) -> np.ndarray:
    tokens = split.read(start, length)
    if tokens.max() >= vocab_size:  # shards are unsigned
        position = int(np.argmax(tokens >= vocab_size))
        raise ValueError(
            f"token id {tokens[position]} at position {start + position} of {split.name} is not in [0, {vocab_size}): "
            "the store is damaged or belongs to another vocabulary; verify it, or make it again"
        )
    return tokens


def _batch(windows: np.ndarray, where: np.ndarray) -> TokenBatch:
    return {"inputs": windows[:, :-1].copy(), "labels": windows[:, 1:].copy(), "where": where}


def _require_sizes(batch_size: int, seq_len: int) -> None:
    if batch_size < 1 or seq_len < 1:
        raise ValueError(f"batch_size and seq_len must be 1 or more, got {batch_size} and {seq_len}")


def _require_rows(start: int, stop: int, batch_size: int) -> None:
    if not 0 <= start <= stop <= batch_size:
        raise ValueError(f"rows [{start}, {stop}) are not in a batch of {batch_size}")
