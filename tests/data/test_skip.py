"""data.skip: the batch of each step, restarts, and ranges that would change the past."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import train

from jaxtrain.data.loader import TrainBatches
from jaxtrain.data.order import skip_to
from jaxtrain.data.store import Split
from jaxtrain.fields import parse_ranges
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.config_files import from_json, to_json
from jaxtrain.training.run_folder import check_skip

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=5)


def texts(ranges):
    return tuple(f"{start}:{start + length}" for start, length in ranges)


def skipping(config, *ranges, **fields):
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, skip=ranges),
        train=dataclasses.replace(config.train, **fields),
    )


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")[0]]


@given(RANGES)
def test_steps_read_the_remaining_batches_in_order(ranges):
    """Ranges are absolute, in any order; they may overlap or repeat."""
    left_out = {index for start, length in ranges for index in range(start, start + length)}
    left = [index for index in range(200) if index not in left_out][:60]
    parsed = parse_ranges(texts(ranges))
    assert [skip_to(step, parsed) for step in range(60)] == left
    assert parse_ranges(texts(ranges) + texts(ranges)) == parsed


@given(RANGES, RANGES, st.integers(0, 30))
def test_a_change_is_allowed_exactly_if_the_past_reads_the_same(old, new, step):
    before, after = parse_ranges(texts(old)), parse_ranges(texts(new))
    same = all(skip_to(index, before) == skip_to(index, after) for index in range(step))
    try:
        check_skip(texts(old), texts(new), step)
        allowed = True
    except ValueError:
        allowed = False
    assert allowed == same


@pytest.mark.parametrize(
    "text", ["5", "5:", ":5", "a:b", "-1:4", "1.5:2", "5:5", "6:5", "1:2:3", "", "²:³", f"0:{'9' * 30}"]
)
def test_a_text_that_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match=r"data\.skip .*(START:STOP, such as|START to STOP)"):
        parse_ranges([text])


def test_batches_leave_the_range_out_whichever_rows_are_asked_for():
    split = Split((np.arange(2000, dtype=np.uint16),), np.zeros(1, np.int64), 2000)
    every = TrainBatches(split, seed=3, batch_size=4, seq_len=16, vocab_size=2000)
    some = dataclasses.replace(every, skip=((2, 5), (7, 8)))
    for step, index in enumerate([0, 1, 5, 6, 8, 9]):
        for rows in ((0, 4), (1, 3)):
            np.testing.assert_array_equal(some.rows(step, *rows)["inputs"], every.rows(index, *rows)["inputs"])
            assert some.pieces(step, *rows) == every.pieces(index, *rows)


def test_a_run_that_skips_from_the_start_or_from_a_stop_on_gives_the_same_numbers(tiny_config, tmp_path):
    """Ranges are recorded, hold over restarts, and leave earlier steps as they were."""
    whole = skipping(tiny_config, "6:9")
    train(whole, tmp_path / "whole")
    train(skipping(tiny_config, stop_after=4), tmp_path / "parts")
    train(skipping(tiny_config, "6:9", stop_after=8), tmp_path / "parts")
    train(skipping(tiny_config, "6:9"), tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    train(tiny_config, tmp_path / "plain")
    assert losses(tmp_path / "plain")[:6] == losses(tmp_path / "whole")[:6]
    assert losses(tmp_path / "plain")[6:] != losses(tmp_path / "whole")[6:]
    assert from_json((tmp_path / "parts" / "config.json").read_text()).data.skip == ("6:9",)
    starts = [event for event in read_metrics(tmp_path / "parts" / "metrics.jsonl")[1] if "attempt" in event]
    assert [event.get("skip") for event in starts] == [None, ["6:9"], ["6:9"]]


def test_a_range_that_would_change_the_past_is_refused_and_changes_nothing(tiny_config, tmp_path):
    folder = tmp_path / "run"
    train(skipping(tiny_config, "6:9", stop_after=8), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for ranges in (("6:9", "2:3"), (), ("6:9", "10:12")):
        with pytest.raises(ValueError, match=r"data\.skip .* only batches from 11 on .* --rewind STEP"):
            train(skipping(tiny_config, *ranges), folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after == before
    train(skipping(tiny_config, "6:9", "11:400", stop_after=9), folder)
    assert json.loads((folder / "config.json").read_text())["data"]["skip"] == ["6:9", "11:400"]


def test_ranges_are_flags(tiny_config, tmp_path, capsys):
    from jaxtrain.cli import main

    file = tmp_path / "tiny.json"
    file.write_text(to_json(tiny_config))
    flags = ["--run-dir", str(tmp_path / "run"), "--train.stop-after", "1", "--data.skip", "2:4", "8:9"]
    assert main(["train", str(file), *flags]) == 0
    assert "2:4 8:9" in capsys.readouterr().out
