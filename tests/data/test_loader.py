import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.data.loader import EvalBatches, TrainBatches, global_batch, prefetched
from jaxtrain.data.order import permute
from jaxtrain.data.rows import Documents, RowReader
from jaxtrain.data.store import Split


def split_of(num_tokens: int, num_shards: int = 1) -> Split:
    """A split whose token i is i."""
    tokens = np.arange(num_tokens, dtype=np.uint16)
    return Split(tuple(np.array_split(tokens, num_shards)), np.zeros(1, np.int64), num_tokens)


def train(num_tokens=100, seed=0, batch_size=4, seq_len=5, vocab_size=1000, num_shards=1) -> TrainBatches:
    split = split_of(num_tokens, num_shards)
    return TrainBatches(split, seed=seed, batch_size=batch_size, seq_len=seq_len, vocab_size=vocab_size)


def assert_same(left, right):
    assert left.keys() == right.keys() == {"inputs", "labels", "where"}
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name])


def test_worked_example():
    # 7 tokens and seq_len 2: windows 0 1 2, 2 3 4 and 4 5 6.
    batches = train(num_tokens=7, batch_size=2, seq_len=2, seed=3)
    assert batches.num_windows == 3
    order = [*permute(np.arange(3), 3, (3, 0)), *permute(np.arange(3), 3, (3, 1))]
    for step in range(3):
        batch = batches.batch(step)
        starts = [2 * window for window in order[2 * step : 2 * step + 2]]
        assert batch["inputs"].tolist() == [[start, start + 1] for start in starts]
        assert batch["labels"].tolist() == [[start + 1, start + 2] for start in starts]
        assert batch["where"].tolist() == [[True, True]] * 2
    assert [batch[name].dtype for name in ("inputs", "labels", "where")] == [np.int32, np.int32, np.bool_]


@pytest.mark.parametrize(
    ("num_tokens", "batch_size", "seq_len"), [(101, 4, 5), (98, 3, 5), (23, 7, 2), (6, 4, 5), (17, 1, 16), (50, 64, 7)]
)
def test_each_window_once_an_epoch(num_tokens, batch_size, seq_len):
    batches = train(num_tokens, batch_size=batch_size, seq_len=seq_len, num_shards=3)
    num_windows = (num_tokens - 1) // seq_len
    assert batches.num_windows == num_windows
    num_epochs = 3
    steps = -(-num_epochs * num_windows // batch_size)
    starts = np.concatenate([batches.batch(step)["inputs"][:, 0] for step in range(steps)])
    for epoch in range(num_epochs):
        seen = starts[epoch * num_windows : (epoch + 1) * num_windows]
        assert sorted(seen.tolist()) == [seq_len * window for window in range(num_windows)]


def test_epochs_and_seeds_have_their_own_order():
    batches = train(num_tokens=501, batch_size=100, seq_len=5)
    first, second = (batches.batch(step)["inputs"][:, 0].tolist() for step in (0, 1))
    other = train(num_tokens=501, batch_size=100, seq_len=5, seed=1).batch(0)["inputs"][:, 0].tolist()
    assert sorted(first) == sorted(second) == sorted(other)
    assert first != second
    assert first != other
    assert second != other


def test_batch_is_a_pure_function_of_seed_and_step():
    batches, again = train(seed=9), train(seed=9)
    order = [5, 0, 10**9, 5, 2]
    batches_in_order = {step: batches.batch(step) for step in order}
    for step in sorted(order):
        assert_same(again.batch(step), batches_in_order[step])


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 8])
def test_rows_of_hosts_make_the_batch(num_hosts):
    evaluation = EvalBatches(split_of(100), batch_size=8, seq_len=5, vocab_size=1000)
    for batches, indices in ((train(batch_size=8), (0, 2, 3)), (evaluation, (0, 2))):
        for index in indices:  # 19 windows: batch 2 crosses an epoch, and is the ragged one of evaluation
            size = 8 // num_hosts
            parts = [batches.rows(index, host * size, (host + 1) * size) for host in range(num_hosts)]
            joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            assert_same(joined, batches.batch(index))


def test_labels_are_the_inputs_shifted():
    rng = np.random.default_rng(0)
    split = Split((rng.integers(0, 50, 400).astype(np.uint16),), np.zeros(1, np.int64), 400)
    batch = TrainBatches(split, seed=1, batch_size=6, seq_len=9, vocab_size=50).batch(4)
    np.testing.assert_array_equal(batch["labels"][:, :-1], batch["inputs"][:, 1:])
    assert not np.array_equal(batch["labels"], batch["inputs"])


def test_whole_windows_equal_the_same_rows_as_pieces():
    """Rows of whole windows are read into one array; any other request reads piece by piece."""
    split = Split((np.arange(41, dtype=np.uint16),), np.zeros(1, np.int64), 40)
    rows = [[(start, 8)] for start in (0, 3, 32, 8)]
    windows = RowReader(split, 8, 41).read(rows)
    pieces = RowReader(split, 8, 41, Documents(restart=True)).read(rows)
    ragged = RowReader(split, 8, 41).read([*rows, [(33, 7)]])  # the last row has no label for its last token
    for name, array in windows.items():
        np.testing.assert_array_equal(array, pieces[name], strict=True)
        np.testing.assert_array_equal(array, ragged[name][:-1], strict=True)
    with pytest.raises(ValueError, match="token id 40 at position 40"):
        RowReader(split, 8, 40).read(rows)


def test_batches_own_their_memory():
    batches = train()
    batches.batch(0)["inputs"][:] = -1
    assert batches.batch(0)["inputs"].min() >= 0
    batch = batches.batch(0)
    assert not np.shares_memory(batch["inputs"], batch["labels"])
    assert all(array.flags.c_contiguous for array in batch.values())  # devices read these without a copy


@pytest.mark.parametrize("num_tokens", [2, 5, 6, 7, 11, 41, 42, 60, 61, 62])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_eval_predicts_each_token_once(num_tokens, batch_size):
    batches = EvalBatches(split_of(num_tokens, 2), batch_size=batch_size, seq_len=5, vocab_size=1000)
    predicted = []
    for index in range(batches.num_batches):
        batch = batches.batch(index)
        assert batch["inputs"].shape == batch["labels"].shape == batch["where"].shape == (batch_size, 5)
        np.testing.assert_array_equal(batch["labels"][batch["where"]], batch["inputs"][batch["where"]] + 1)
        assert not batch["inputs"][~batch["where"]].any()
        assert not batch["labels"][~batch["where"]].any()
        predicted += batch["labels"][batch["where"]].tolist()
    assert predicted == list(range(1, num_tokens))
    assert batch["where"].any()  # no batch is padding only
    with pytest.raises(ValueError, match=f"batch {index + 1} is not among"):
        batches.batch(index + 1)


def test_token_out_of_range_is_named():
    tokens = np.arange(41, dtype=np.uint16) % 7
    tokens[33] = 300
    split = Split((tokens[:20], tokens[20:]), np.zeros(1, np.int64), 41)
    batches = TrainBatches(split, seed=0, batch_size=8, seq_len=5, vocab_size=7)
    with pytest.raises(ValueError, match=r"token id 300 at position 33 of the split is not in \[0, 7\)"):
        batches.batch(0)
    with pytest.raises(ValueError, match="token id 300 at position 33"):
        EvalBatches(split, batch_size=8, seq_len=5, vocab_size=7).batch(0)
    TrainBatches(split, seed=0, batch_size=8, seq_len=5, vocab_size=301).batch(0)


def test_refusals():
    with pytest.raises(ValueError, match="has 5 tokens, fewer than one window of seq_len \\+ 1 = 6"):
        train(num_tokens=5)
    with pytest.raises(ValueError, match="batch_size and seq_len must be 1 or more, got 0 and 5"):
        train(batch_size=0)
    with pytest.raises(ValueError, match=r"rows \[2, 5\) are not in a batch of 4"):
        train().rows(0, 2, 5)
    with pytest.raises(ValueError, match="and a label needs two"):
        EvalBatches(split_of(1), batch_size=1, seq_len=5, vocab_size=9)


class Counting:
    """Batches that record the requested rows."""

    def __init__(self, batches):
        self.batches, self.batch_size, self.seq_len, self.asked = batches, batches.batch_size, batches.seq_len, []

    def rows(self, index, start, stop):
        self.asked.append((start, stop))
        return self.batches.rows(index, start, stop)


@pytest.mark.parametrize(
    ("shape", "spec", "row_ranges"),
    [
        ((8,), P("data"), [(row, row + 1) for row in range(8)]),
        ((4,), P("data"), [(0, 2), (2, 4), (4, 6), (6, 8)]),
        ((4, 2), P("data"), [(0, 2), (2, 4), (4, 6), (6, 8)]),
        ((4, 2), P("data", "sequence"), [(0, 2), (2, 4), (4, 6), (6, 8)]),
        ((8,), P(), [(0, 8)]),
    ],
)
def test_global_batch(shape, spec, row_ranges):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    sharding = NamedSharding(Mesh(devices, ("data", "sequence")[: len(shape)]), spec)
    batches = Counting(train(num_tokens=400, batch_size=8, seq_len=6))
    placed = global_batch(batches, 3, sharding)
    assert sorted(set(batches.asked) - {(0, 0)}) == row_ranges
    assert all(array.sharding == sharding for array in placed.values())
    assert_same({name: np.asarray(array) for name, array in placed.items()}, batches.batches.batch(3))


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_prefetching_keeps_the_order(depth):
    batches = train()
    with prefetched(batches.batch, 3, 9, depth) as feed:
        found = list(feed)
    assert len(found) == 6
    for step, batch in zip(range(3, 9), found, strict=True):
        assert_same(batch, batches.batch(step))


def test_prefetching_runs_ahead_by_depth_at_most():
    called = []
    third = threading.Event()

    def function(index):
        called.append(index)
        if len(called) == 3:
            third.set()
        return index

    with prefetched(function, 0, 100, 3) as feed:
        assert third.wait(60)  # it does run ahead
        time.sleep(0.05)
        assert called == [0, 1, 2]
        for taken in range(1, 6):
            next(feed)
            time.sleep(0.02)
            assert len(called) <= taken + 3


def test_prefetching_raises_at_the_item():
    def function(index):
        if index == 2:
            raise KeyError("broken item")
        return index

    with prefetched(function, 0, 5, 2) as feed:
        assert [next(feed), next(feed)] == [0, 1]
        with pytest.raises(KeyError, match="broken item"):
            next(feed)
        assert list(feed) == []


def test_prefetching_stops_when_left_early():
    before = threading.active_count()
    called = []
    with prefetched(called.append, 0, 10**9, 2) as feed:
        next(feed)
    assert threading.active_count() == before  # it did not take the time after which it is left behind
    assert len(called) <= 3
    assert list(feed) == []


def test_prefetching_edges():
    with prefetched(int, 4, 4, 1) as feed:
        assert list(feed) == []
    with pytest.raises(ValueError, match="depth must be 1 or more, got 0"):
        prefetched(int, 0, 3, 0).__enter__()


def test_a_data_thread_that_hangs_is_named_and_abandoned():
    go = threading.Event()

    def on_a_dead_disk(index):
        if index == 8:
            go.wait(60)
        return index

    began = time.monotonic()
    with prefetched(on_a_dead_disk, 6, 10, 2, time_limit=1.0, join_seconds=0.1) as feed:
        assert [next(feed), next(feed)] == [6, 7]
        with pytest.raises(TimeoutError, match=r"8 did not come within 1 s: .* is at .*\.py:\d+ .*JAXTRAIN_TIMEOUT"):
            next(feed)
    assert time.monotonic() - began < 50
    go.set()


def test_a_stop_ends_the_wait_for_a_batch():
    go, asked = threading.Event(), threading.Event()

    def slow(index):
        if index == 2:
            go.wait(60)
        return index

    found = []
    with prefetched(slow, 0, 5, 1, asked_to_stop=asked.is_set) as feed:
        threading.Timer(0.3, asked.set).start()
        found += feed  # finished items are still returned
        assert asked.is_set()
        go.set()
    assert found == [0, 1]
