"""Documents of a row kept apart: segments, labels, positions, best-fit packing, and runs with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_same_bits, change, numbers, state_of, train

from jaxtrain.config import DataConfig, llama
from jaxtrain.data.loader import EvalBatches, TrainBatches
from jaxtrain.data.packing import best_fit, pack_documents
from jaxtrain.data.rows import Documents, RowReader
from jaxtrain.data.store import Split
from jaxtrain.models.kernels.attention import attend
from jaxtrain.models.model import TransformerModel
from jaxtrain.training.batches import train_batches
from jaxtrain.training.run import open_run

EOT = 9
APART = Documents(mask=True, restart=True, eot_id=EOT)


def split_of(*documents, lead=True):
    """A split of documents of one repeated token each; the end-of-text token leads, or ends, each."""
    parts = [[EOT, *tokens] if lead else [*tokens, EOT] for tokens in documents]
    starts = np.cumsum([0, *(len(part) for part in parts)])[:-1]
    return Split((np.array([token for part in parts for token in part], np.uint16),), starts, 100)


def test_worked_example():
    """Three documents in a window of 8: the end-of-text token stays a label, what follows it in the row does not."""
    split = split_of([1, 1], [2, 2, 2], [3, 3])  # 9 1 1 9 2 2 2 9 3 3
    batch = RowReader(split, 8, 10, APART).read([[(1, 8)], [(2, 3)]])
    assert batch["inputs"].tolist() == [[1, 1, 9, 2, 2, 2, 9, 3], [1, 9, 2, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[1, 9, 2, 2, 2, 9, 3, 3], [9, 2, 2, 0, 0, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 2, 2, 2, 3, 3], [1, 2, 2, 0, 0, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 0, 1, 2, 3, 0, 1], [0, 0, 1, 0, 0, 0, 0, 0]]
    assert batch["where"].tolist() == [[True] * 8, [True] * 3 + [False] * 5]


def test_a_label_of_the_next_document_does_not_count():
    """Stores whose documents end with the token: the label after it is the next document's text."""
    split = split_of([1, 1], [2, 2, 2], lead=False)  # 1 1 9 2 2 2 9
    batch = RowReader(split, 6, 10, APART).read([[(0, 6)]])
    assert batch["labels"].tolist() == [[1, 9, 2, 2, 2, 9]]
    assert batch["where"].tolist() == [[True, True, False, True, True, True]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 2]]
    packed = pack_documents(split.document_starts, 0, 7, 6)
    read = RowReader(split, 6, 10, APART).read([packed.pieces(i) for i in range(packed.count)])
    assert sorted(read["labels"][read["where"]].tolist()) == [1, 2, 2, 9, 9]


def naive_best_fit(lengths, capacity):
    """Returns the free tokens of each row, piece by piece."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        best = min((room for room in rooms if room >= length), default=None)
        if best is None:
            rooms.append(capacity - length)
        else:
            rooms[rooms.index(best)] -= length
    return sorted(rooms)


def test_best_fit_fills_rows_as_the_plain_algorithm_does():
    rng = np.random.default_rng(0)
    for _ in range(100):
        capacity = int(rng.integers(1, 60))
        lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 120)))
        fill = np.bincount(best_fit(lengths, capacity), weights=lengths).astype(int)
        assert sorted((capacity - fill).tolist()) == naive_best_fit(lengths.tolist(), capacity)


@pytest.mark.parametrize("seq_len", [3, 16, 64])
def test_packing_keeps_every_token_and_every_label(seq_len):
    """Each token of each document is an input once an epoch, each but the first of a document a label once."""
    rng = np.random.default_rng(seq_len)
    split = split_of(*(rng.integers(0, EOT, n).tolist() for n in rng.integers(0, 90, 60)))
    packed = pack_documents(split.document_starts, 0, split.num_tokens, seq_len)
    tokens = sorted(t for i in range(packed.count) for start, n in packed.pieces(i) for t in range(start, start + n))
    assert tokens == list(range(split.num_tokens))
    batches = TrainBatches(split, 5, packed.count, seq_len, 10, sources=(packed,), documents=APART)
    batch = batches.batch(1)
    np.testing.assert_array_equal(np.bincount(batch["inputs"][batch["segment_ids"] > 0]), np.bincount(split.shards[0]))
    np.testing.assert_array_equal(batch["where"], batch["segment_ids"] > 0)
    np.testing.assert_array_equal(np.bincount(batch["labels"][batch["where"]]), np.bincount(split.shards[0]))
    np.testing.assert_allclose(batches.padding_share(1, 2), 1 - split.num_tokens / batch["inputs"].size)
    np.testing.assert_allclose(batches.padding_share(0, 3), packed.padding)
    halves = [batches.rows(1, 0, packed.count // 2), batches.rows(1, packed.count // 2, packed.count)]
    for name in batch:
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), batch[name])
    for row in range(packed.count):  # a document that begins in a row is one segment of it, from position 0
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            places = batch["positions"][row][batch["segment_ids"][row] == segment]
            assert places.tolist() == list(range(len(places)))


def test_evaluation_counts_each_token_once_and_knows_its_document():
    split = split_of([1] * 7, [2] * 4, [3] * 9)
    plain, apart = (EvalBatches(split, 2, 5, 10, documents=rule) for rule in (Documents(), APART))
    for index in range(plain.num_batches):
        expected, batch = plain.batch(index), apart.batch(index)
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name])
        boundary = (batch["inputs"] == EOT) & (np.arange(5) > 0)
        jumps = np.diff(batch["segment_ids"], prepend=1, axis=1)
        np.testing.assert_array_equal(jumps == 1, boundary & batch["where"])


@pytest.mark.parametrize(
    "fields", [{"positions": "learned"}, {"attention_window": 5}, {"attention_softcap": 2.0, "num_kv_heads": 1}]
)
def test_logits_of_a_document_do_not_depend_on_its_neighbours(fields):
    """To the bit, forward and in the gradient, with each position encoding and each mask."""
    config = llama(num_layers=2, num_heads=2, d_model=16, d_ff=32, max_seq_len=32, vocab_size=11, **fields)
    model = TransformerModel(config)
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, (1, 24))
    ids = np.repeat([[1, 2, 3]], [9, 8, 7], axis=1)
    where = ids == 2

    @jax.jit
    @jax.value_and_grad
    def differentiate(params, inputs):
        batch = {"inputs": inputs, "labels": jnp.asarray(tokens), "where": jnp.asarray(where)}
        batch |= {"segment_ids": jnp.asarray(ids), "positions": jnp.asarray(np.arange(24)[None] % 9)}
        return model.loss(params, batch).total()

    changed = np.where(where, tokens, (tokens + 1 + rng.integers(0, 9, (1, 24))) % 11)
    both = [differentiate(params, jnp.asarray(inputs)) for inputs in (tokens, changed)]
    assert_same_bits(both[0][0], both[1][0])
    embedding = [np.asarray(grads.pop("embedding")) for _, grads in both]
    assert_same_bits(both[0][1]["layers"], both[1][1]["layers"])
    assert np.isfinite(embedding[0]).all()
    without = jax.jit(model.loss)(
        params, {"inputs": tokens, "labels": jnp.asarray(tokens), "where": jnp.asarray(where)}
    )
    assert float(without.total()) != float(both[0][0])


def test_positions_restart_for_learned_positions_alone():
    """A document alone in a row equals the same document later in a row whose positions restart."""
    for positions, same in (("learned", 0.0), ("rope", 1e-5)):
        config = llama(1, 2, 16, 32, 32, vocab_size=11, positions=positions)
        model = TransformerModel(config)
        params = jax.jit(model.init)(jax.random.key(0))
        tokens = np.random.default_rng(1).integers(0, 11, (1, 16))
        alone = {"inputs": tokens[:, 8:], "labels": tokens[:, 8:], "where": np.ones((1, 8), bool)}
        ids = np.repeat([[1, 2]], 8, axis=1)
        later = {"inputs": tokens, "labels": tokens, "where": ids == 2, "segment_ids": ids}
        restarted = later | {"positions": np.arange(16)[None] % 8}
        loss = jax.jit(model.loss)
        expected, moved, fresh = (float(loss(params, batch).total()) for batch in (alone, later, restarted))
        np.testing.assert_allclose(fresh, expected, rtol=1e-6)
        assert abs(moved - expected) <= same * expected or positions == "learned"
        assert (moved != expected) or positions == "rope"


def test_gradients_of_the_blockwise_kernel_with_segments():
    """Over several blocks of queries, against the mask of the plain kernel."""
    rng = np.random.default_rng(0)
    query, key, value, cotangent = rng.normal(size=(4, 1, 300, 2, 4)).astype(np.float32)
    ids = np.repeat([4, 2, 8], [100, 171, 29])[None]

    @functools.partial(jax.jit, static_argnums=0)
    def both(window):
        output, pullback = jax.vjp(lambda *qkv: attend(*qkv, segment_ids=ids, window=window), query, key, value)
        return output, *pullback(cotangent)

    for actual, expected in zip(both(None), both(299), strict=True):  # a window selects the other kernel
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def apart(tiny_config):
    return change(tiny_config, data={"mask_documents": True, "restart_positions": True, "packing": "best_fit"})


def test_a_packed_run(apart, tmp_path):
    """Padding in the records, and exact resume. test_finetuning.py has a packed run on four devices."""
    train(apart, tmp_path / "whole")
    steps = numbers(tmp_path / "whole")
    run = open_run(tmp_path / "whole")
    batches = train_batches(run)
    for line in steps:
        batch = batches.batch(line["step"] - 1)
        assert line["tokens"] == batch["where"].sum()
        assert line["padding_share"] == 1 - (batch["segment_ids"] > 0).mean()
    train(change(apart, train={"stop_after": 5}), tmp_path / "parts")
    train(apart, tmp_path / "parts")
    assert_same_bits(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"data\.packing: 'best_fit' -> 'concatenate'"):
        train(change(apart, data={"packing": "concatenate"}), tmp_path / "parts")


def test_fields_that_do_not_fit(apart):
    with pytest.raises(ValueError, match=r"data\.packing best_fit keeps documents apart: set data\.mask_documents"):
        DataConfig(store="a", packing="best_fit")
    with pytest.raises(ValueError, match=r"data\.restart_positions keeps documents apart"):
        DataConfig(store="a", restart_positions=True)
    with pytest.raises(ValueError, match="'bestfit' is none of concatenate, best_fit"):
        DataConfig(store="a", packing="bestfit", mask_documents=True)
