"""Starts that are refused: with text that is still to be tokenized, nothing is left of them, no token store either."""

import contextlib

import pytest
from bad_helpers import bad, check, values

from jaxtrain.training import start, train


def from_text(message, remedy, tokenizer="byte", code=2, **sections):
    """A config with text instead of a store, and sections changed."""

    def make(world):
        fill = lambda value: value.format(**world._asdict()) if isinstance(value, str) else value  # noqa: E731
        changes = {key: {name: fill(value) for name, value in section.items()} for key, section in sections.items()}
        values(data={"store": None, "sources": [str(world.corpus)], "tokenizer": tokenizer}, **changes)(world)

    return bad("train c.json --run-dir {out}", message, remedy, make=make, code=code)


STARTS = {
    "a mesh that the batch does not divide": from_text("batch_size 8", "change one of them", mesh={"data": 8}),
    "a mesh that the heads do not divide": from_text("num_kv_heads 1", "change one of them", mesh={"tensor": 2}),
    "a mesh without its devices": from_text("takes 99 devices", "there are 8", mesh={"data": 99}),
    "a frozen name without a parameter": from_text("'embeding'", "did you mean", optim={"frozen": ["embeding"]}),
    "all frozen": from_text("matches every parameter", "leave one to train", optim={"frozen": ["*"]}),
    "a vocabulary below that of bytes": from_text("100", "set it to None", model={"vocab_size": 100}),
    "a vocabulary below that of bpe": from_text("257", "set it to None", "bpe:258", model={"vocab_size": 257}),
    "a tokenizer without its file": from_text("no tokenizer file", "hf download", "hf:nowhere.json"),
    "weights of another width": from_text(
        "does not fit", "[257, 16]", model={"d_model": 32}, train={"init_from": "{run}"}
    ),
    "weights of no run": from_text("no such checkpoint", "RUN/checkpoints", train={"init_from": "{store}"}),
    "additions to nothing": from_text("model.lora_rank", "train.init_from RUN", model={"lora_rank": 2}),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_refused_start_leaves_nothing(name, world, capsys):
    check(STARTS[name], world, capsys)


def test_the_check_detects_every_leftover(world, capsys, monkeypatch):
    """The assertions above fail where the check before the data, or the rollback of the config, is missing."""
    row = STARTS["a mesh that the heads do not divide"]
    with monkeypatch.context() as patch:
        patch.setattr(start, "check_before_data", lambda *_: None)
        with pytest.raises(AssertionError, match=r"out/data/manifest\.json"):
            check(row, world, capsys)
    monkeypatch.setattr(train, "rollback_refused", contextlib.nullcontext)
    with pytest.raises(AssertionError, match=r"out/config\.json"):
        check(row._replace(arguments=f"{row.arguments} --data.store {{store}}"), world, capsys)
