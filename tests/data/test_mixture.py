"""Mixtures: exact counts at every length, one batch for any number of hosts, and resuming with other later stages."""

import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest
from runs import assert_same_bits, change, numbers, state_of, train

from jaxtrain.config import DataConfig
from jaxtrain.data.joined import join_stores
from jaxtrain.data.loader import TrainBatches, Windows
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.store import Split, open_store
from jaxtrain.mixture import check_epochs, make_mixture, parse_mixture, parse_stores
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.training.batches import train_batches
from jaxtrain.training.evaluation import evaluate_split
from jaxtrain.training.run import open_run

TEXT = "web:0.7 code:0.3 until 0.6, then web:1/3 code:2/3 until 9, then math:1x web:0.25 code:0.75"
WINDOWS = {"web": 100, "code": 31, "math": 5}


def test_counts_are_exact_at_every_length():
    mixture = make_mixture(TEXT, WINDOWS, 10, 8)
    stages = [(0, 48, (0.7, 0.3, 0)), (48, 72, (1 / 3, 2 / 3, 0)), (72, 80, (0.375 * 0.25, 0.375 * 0.75, 0.625))]
    chosen = mixture.sources(0, 80)
    for begin, end, shares in stages:
        for stop in range(begin, end + 1):
            count = np.bincount(chosen[begin:stop], minlength=3)
            assert np.abs(count - (stop - begin) * np.array(shares)).max() < 2
    assert [mixture.counts(n) for n in range(81)] == [np.bincount(chosen[:n], minlength=3).tolist() for n in range(81)]
    assert mixture.counts(80) == [33 + 8 + 0, 15 + 16 + 3, 5]  # the last stage is one pass over math and 3 sequences
    assert mixture.counts(800)[2] > 5  # past the end of the run the last stage goes on


@pytest.mark.parametrize("seed", range(3))
def test_random_mixtures_add_up(seed):
    rng = np.random.default_rng(seed)
    cuts = [0, *sorted(rng.choice(np.arange(1, 1000), 6, replace=False).tolist()), 1000]
    shares = [f"s{i}:{(b - a) / 1000:.3f}" for i, (a, b) in enumerate(itertools.pairwise(cuts))]
    mixture = make_mixture(" ".join(shares), {f"s{i}": 10 for i in range(7)}, 10**6, 16)
    begin = int(rng.integers(10**7))
    before, after = np.array(mixture.counts(begin)), np.array(mixture.counts(begin + 500))
    assert before.sum() == begin
    assert np.bincount(mixture.sources(begin, begin + 500), minlength=7).tolist() == (after - before).tolist()
    assert mixture.counts(16 * 10**6) == [16 * (b - a) * 1000 for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("web:0.7 code:0.2", "the shares of stage 1 sum to 0.9, and must sum to 1"),
        ("web:0.33 code:0.66", "sum to 0.99, and must sum to 1, a third as 1/3"),
        ("web:7 code:3", "sum to 10"),
        ("web:0.5 cod:0.5", "names 'cod': the stores are web, code, math"),
        ("web", "'web' is no NAME:SHARE or NAME:PASSESx"),
        ("web:lots", "'lots' of 'web:lots' is no number"),
        ("web:-1 code:2", "'-1' of 'web:-1' is no number"),
        ("web:0 code:1", "the amount of 'web:0' must be above 0"),
        ("web:0.5 web:0.5", "names web twice"),
        ("", "a stage without sources"),
        ("web:1, then", "a stage without sources"),
        ("web:1 until 0.5", "stage 1 is the last and has an `until`"),
        ("web:1, then code:1", "stage 1 has no `until`"),
        ("web:1 until 1.5, then code:1", "`until 1.5` is neither a share of the steps"),
        ("web:1 until, then code:1", "'' of 'until' is no number"),
        ("web:1 until 10, then code:1", "stage 1 would be steps 1 to 10 of 10"),
        ("web:1 until 6, then code:1 until 0.5, then web:1", "stage 2 would be steps 7 to 5 of 10"),
        ("code:3x web:1", "the passes of stage 1 read 93 sequences, and its 10 steps only 80: write fewer passes, or"),
        ("code:2x", "read 62 sequences, and its 10 steps 80: they run out after 7 steps"),
        ("web:1x", "read 100 sequences, and its 10 steps only 80: write fewer passes, or give it 13 steps"),
    ],
)
def test_a_mixture_that_does_not_work_is_refused(text, message):
    with pytest.raises(ValueError, match=r"data\.mixture") as error:
        make_mixture(text, WINDOWS, 10, 8)
    assert message in str(error.value)


def test_forms_of_a_mixture():
    assert parse_mixture("a:1/3 b:2/3 until step 800 then b:1")[0].until == 800
    for text in ("a:1 until 0.5,then b:1", "a:1 until 0.5\n then b:1", "a:1 until 0.5, b:1"):
        assert [stage.shares for stage in parse_mixture(text)] == [{"a": 1}, {"b": 1}]
    assert parse_mixture("a:.5 b:0.50") == parse_mixture(" a:0.5   b:1/2 ")
    assert make_mixture("code:2x", WINDOWS, 7, 8).counts(56) == [0, 56, 0]  # 62 is no whole number of batches
    whole = make_mixture(None, WINDOWS, 17, 8)
    assert whole.counts(136) == [100, 31, 5]
    assert sum(share for _, share in whole.stages[0][1]) == Fraction(1)
    assert parse_stores(["stores/web", "code=/tmp/a b"]) == {"web": "stores/web", "code": "/tmp/a b"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stores": ("a/x", "b/x")}, "a/x and b/x are both named x: write NAME=DIR"),
        ({"stores": ("a/my store",)}, "'a/my store' has no usable name"),
        ({"stores": ("then=a",)}, "'then=a' has no usable name"),
        ({"stores": ("a",), "store": "b"}, "data.stores replaces data.store"),
        ({"store": "b", "mixture": "b:1"}, "data.mixture mixes data.stores, and there are none"),
        ({"stores": ("a",), "mixture": "a:0.5"}, "sum to 0.5"),
        ({"stores": ("a",), "max_epochs": 0.0}, "data.max_epochs must be above 0"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match="data") as error:
        DataConfig(**fields)
    assert message in str(error.value)


def mixed(num_hosts=1, skip=()):
    """Batches of two sources of 60 and 41 tokens, whose token i is i: 11 and 8 windows."""
    split = Split((np.arange(101, dtype=np.uint16),), np.array([0, 60]), 101)
    sources = (Windows(0, 60, 5), Windows(60, 41, 5))
    assert [source.count for source in sources] == [11, 8]
    mixture = make_mixture("a:0.25 b:0.75 until 5, then a:0.75 b:0.25", {"a": 11, "b": 8}, 12, 8)
    return TrainBatches(
        split, seed=3, batch_size=8, seq_len=5, vocab_size=200, skip=skip, mixture=mixture, sources=sources
    )


def test_sources_are_read_epoch_by_epoch_on_any_number_of_hosts():
    batches = mixed()
    starts = np.concatenate([batches.batch(step)["inputs"][:, 0] for step in range(12)])
    for begin, size in ((0, 11), (60, 8)):
        own = [start for start in starts.tolist() if begin <= start < begin + 60 and (start < 60) == (begin == 0)]
        for epoch in range(len(own) // size):
            windows = own[epoch * size : (epoch + 1) * size]
            assert sorted(windows) == [begin + 5 * i for i in range(size)]
    for step in (0, 4, 5, 11):
        parts = [batches.rows(step, 4 * host, 4 * host + 4)["inputs"] for host in range(2)]
        np.testing.assert_array_equal(np.concatenate(parts), batches.batch(step)["inputs"])
    assert batches.tokens_seen(0) == {"a": 0, "b": 0}
    assert batches.tokens_seen(5) == {"a": 50, "b": 150}
    assert batches.tokens_seen(12) == {"a": 50 + 210, "b": 150 + 70}
    later = mixed(skip=((2, 4), (8, 9)))
    assert later.tokens_seen(2) == {"a": 20, "b": 60}
    read = np.concatenate([later.batch(step)["inputs"][:, 0] for step in range(7)])
    assert later.tokens_seen(7) == {"a": 5 * int((read < 60).sum()), "b": 5 * int((read >= 60).sum())}


def test_one_source_equals_a_single_store(store, tiny_config):
    joined = join_stores({"web": open_store(store)})
    assert joined.train.num_tokens == open_store(store).train.num_tokens
    single = TrainBatches(joined.train, seed=0, batch_size=8, seq_len=16, vocab_size=257)
    windows = (Windows(0, joined.train.num_tokens, 16),)
    mixture = make_mixture("web:1", {"web": windows[0].count}, 100, 8)
    same = dataclasses.replace(single, mixture=mixture, sources=windows)
    for step in (0, 50, 99):
        np.testing.assert_array_equal(single.batch(step)["inputs"], same.batch(step)["inputs"])


@pytest.fixture(scope="module")
def stores(store, tmp_path_factory):
    """Folders of three stores: that of the corpus, one of letters, and one of letters under another tokenizer."""
    folder = tmp_path_factory.mktemp("mixture")
    for i in range(20):
        (folder / f"{i}.md").write_text(f"abc{i} def{i}\n" * 20)
    sources = [str(folder / "*.md")]
    prepare(sources, folder / "code", validation_fraction=0.3, progress=False)
    prepare(sources, folder / "bpe", tokenizer="bpe:260", validation_fraction=0.3, progress=False)
    return {"web": str(store), "code": str(folder / "code"), "bpe": str(folder / "bpe")}


def with_mixture(config, stores, text, **fields):
    entries = tuple(f"{name}={stores[name]}" for name in ("web", "code"))
    return change(config, data={"store": None, "stores": entries, "mixture": text} | fields)


def test_a_run_of_a_mixture(tiny_config, stores, tmp_path):
    """Counts in the records, validation loss of each source, exact resume, and other stages from a later step on."""
    first = "web:0.7 code:0.3 until 0.5, then code:1"
    config = with_mixture(tiny_config, stores, first)
    config = change(config, train={"eval_every": 6}, mesh={"data": 2})
    train(config, tmp_path / "whole")
    steps = numbers(tmp_path / "whole")
    assert [line["tokens_seen/web"] for line in steps] == [16 * (8 * s * 7 // 10) for s in range(1, 7)] + [16 * 33] * 6
    assert all(line["tokens_seen/web"] + line["tokens_seen/code"] == line["tokens_seen"] for line in steps)
    evaluation = [e for e in read_metrics(tmp_path / "whole" / "metrics.jsonl")[1] if e["event"] == "eval"][-1]
    run = open_run(tmp_path / "whole")
    params = state_of(tmp_path / "whole").params
    total = 0.0
    for name in ("web", "code"):
        alone = evaluate_split(run, params, open_store(stores[name]).validation)
        assert evaluation[f"nll/{name}"] == alone["nll"]
        assert evaluation[f"bits_per_byte/{name}"] == alone["bits_per_byte"]
        total += alone["nll"] * alone["tokens"]
    np.testing.assert_allclose(evaluation["nll"], total / evaluation["tokens"], rtol=1e-12)

    parts = change(config, data={"sources": ("nowhere",)})  # as in a config whose data flags replace
    train(change(parts, train={"stop_after": 7}), tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert numbers(tmp_path / "parts") == steps
    assert_same_bits(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))

    train(change(config, train={"stop_after": 8}), tmp_path / "changed")
    later = with_mixture(config, stores, "web:0.7 code:0.3 until 6, then code:1 until 8, then web:0.5 code:0.5")
    with pytest.raises(ValueError, match=r"(?s)--allow-change.*data\.mixture"):
        train(later, tmp_path / "changed")
    past = with_mixture(config, stores, "web:0.7 code:0.3 until 7, then web:1")
    with pytest.raises(ValueError, match=r"data\.mixture changes what the first 8 steps have read"):
        train(past, tmp_path / "changed", allow_change=True)
    moved = dict(reversed(stores.items()))
    train(with_mixture(later, moved, later.data.mixture), tmp_path / "changed", allow_change=True)
    assert numbers(tmp_path / "changed")[:8] == steps[:8]
    assert numbers(tmp_path / "changed")[-1]["tokens_seen/web"] == 16 * (33 + 16)


def test_a_run_adds_a_source(tiny_config, stores, tmp_path):
    train(change(tiny_config, train={"stop_after": 6}), tmp_path / "run")
    lines = numbers(tmp_path / "run")
    config = with_mixture(tiny_config, stores, "web:1 until 6, then web:0.5 code:0.5")
    with pytest.raises(ValueError, match=r"--allow-change"):
        train(config, tmp_path / "run")
    early = with_mixture(tiny_config, stores, "web:1 until 5, then web:0.5 code:0.5")
    with pytest.raises(ValueError, match="changes what the first 6 steps have read"):
        train(early, tmp_path / "run", allow_change=True)
    train(config, tmp_path / "run", allow_change=True)
    assert numbers(tmp_path / "run")[:6] == lines
    assert numbers(tmp_path / "run")[-1]["tokens_seen/code"] == 16 * 24
    swapped = {**stores, "web": stores["code"]}
    with pytest.raises(ValueError, match="made with other data"):
        train(with_mixture(config, swapped, config.data.mixture), tmp_path / "run")


def test_a_limit_of_passes_may_be_reached_and_not_exceeded():
    mixture = make_mixture(None, {"": 4}, 3, 2)
    check_epochs(mixture, {"": 4}, 2, 1.0)  # four sequences, one pass
    with pytest.raises(ValueError, match=r"data\.max_epochs 1: 3 steps read the data 1\.50 times"):
        check_epochs(mixture, {"": 4}, 3, 1.0)


def test_stores_that_do_not_fit_and_limits(tiny_config, stores, tmp_path):
    with pytest.raises(ValueError, match="web has vocab_size 257, bpe 260"):
        join_stores({name: open_store(stores[name]) for name in ("web", "bpe")})
    other = open_store(stores["bpe"])
    other = dataclasses.replace(other, tokenizer_file=other.path / "manifest.json")
    with pytest.raises(ValueError, match="a and b have different tokenizers"):
        join_stores({"a": open_store(stores["bpe"]), "b": other})
    limited = with_mixture(tiny_config, stores, "web:0.5 code:0.5", max_epochs=0.01)
    with pytest.raises(ValueError, match=r"data\.max_epochs 0\.01: 12 steps read the source web .* times"):
        train(limited, tmp_path / "run")
    alone = change(tiny_config, data={"max_epochs": 0.01})
    with pytest.raises(ValueError, match=r"data\.max_epochs 0\.01: 12 steps read the data .* times"):
        train(alone, tmp_path / "run")
    train(change(alone, data={"max_epochs": 4.0}, train={"stop_after": 1}), tmp_path / "run")
    assert train_batches(open_run(tmp_path / "run")).mixture is None
