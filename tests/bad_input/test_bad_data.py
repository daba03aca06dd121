"""Bad sources of a preparation, and damaged token stores."""

import gzip
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from bad_helpers import TRAIN, Bomb, bad, check, text

from jaxtrain.data.prepare.prepare import prepare


def small_store(world):
    """Two documents, shorter than a window."""
    shutil.rmtree(world.store)
    with tempfile.TemporaryDirectory() as folder:
        for name in "bc":  # of a hash that puts one in each split at this fraction
            Path(folder, f"{name}.txt").write_text("eleven byte")
        prepare([folder], world.store, validation_fraction=0.5, progress=False)


def documents(array):
    return lambda world: np.save(world.store / "train-documents.npy", array, allow_pickle=True)


PREPARE = "prepare {corpus} --out {out}"


DATA = {
    "no source": bad("prepare --out {out}", "SOURCE... is missing", "jaxtrain prepare SOURCE"),
    "no folder to make": bad("prepare {corpus}", "--out DIR is missing", "folder"),
    "an absent source": bad("prepare no.txt --out {out}", "no.txt", "check the path"),
    "a glob without a match": bad("prepare *.nope --out {out}", "'*.nope'", "check it"),
    "an empty folder": bad("prepare {tmp} --out {out}", "work", "name one with text"),
    "an empty file": bad("prepare a.txt --out {out}", "hold no text", "empty", make=text("a.txt", "")),
    "one byte": bad("prepare a.txt --out {out}", "1 bytes", "add text", make=text("a.txt", "x")),
    "a device": bad("prepare /dev/zero --out {out}", "/dev/zero", "write the text to a file"),
    "not UTF-8": bad("prepare a.txt --out {out}", "a.txt", "iconv", make=text("a.txt", b"\xff\xfe" * 50)),
    "a truncated .gz": bad(
        "prepare a.txt.gz --out {out}", "a.txt.gz", "replace", make=text("a.txt.gz", gzip.compress(b"text " * 99)[:-9])
    ),
    "a .gz that is none": bad("prepare a.txt.gz --out {out}", "a.txt.gz", "replace", make=text("a.txt.gz", b"text")),
    "a line that is no JSON": bad(
        "prepare a.jsonl --out {out}", "line 2", "correct or remove", make=text("a.jsonl", '{"text": "a"}\n{"text\n')
    ),
    "a line without the field": bad(
        "prepare a.jsonl --out {out}", "line 1", "it has: body", make=text("a.jsonl", '{"body": "a"}\n')
    ),
    "a line with a number": bad(
        "prepare a.jsonl --out {out}", "is int, not text", "correct", make=text("a.jsonl", '{"text": 3}\n')
    ),
    "a folder that is taken": bad(
        "prepare {corpus} --out {run}", "exists and is not the token store", "choose another folder"
    ),
    "a folder that is a file": bad(
        "prepare {corpus} --out f", "f exists and is not", "choose another folder", make=text("f", "x")
    ),
    "a folder below a file": bad(
        "prepare {corpus} --out f/s", "work/f", "give another path", make=text("f", "x"), code=1
    ),
    "a folder without a name": bad("prepare {corpus} --out ''", "is ''", "give a path"),
    "a folder among its sources": bad(
        "prepare {tmp} --out {tmp}/s",
        "work/s would lie in the source folder",
        "give another --out",
        make=text("a.txt", "text"),
    ),
    "an unknown tokenizer": bad(PREPARE + " --tokenizer words", "'words'", "use byte, bpe:VOCAB"),
    "a vocabulary too small": bad(PREPARE + " --tokenizer bpe:10", "'bpe:10'", "257 or more"),
    "a vocabulary too large for the text": bad(PREPARE + " --tokenizer bpe:90000", "bpe:90000", "or fewer"),
    "a tokenizer that is not there": bad(PREPARE + " --tokenizer hf:no.json", "no.json", "a local tokenizer.json"),
    "a tokenizer that is none": bad(
        PREPARE + " --tokenizer hf:t.json", "t.json is not a file of the tokenizers library", make=text("t.json", "{}")
    ),
    "a tokenizer of a pickle": bad(
        PREPARE + " --tokenizer hf:t.json",
        "t.json is not a file of the tokenizers library",
        make=text("t.json", pickle.dumps(Bomb())),
    ),
    "all for validation": bad(PREPARE + " --validation-fraction 1", "got 1.0", "between 0 and 1"),
    "NaN for validation": bad(PREPARE + " --validation-fraction nan", "got nan", "between 0 and 1"),
    "negative workers": bad(PREPARE + " --num-workers -2", "got -2", "above 0"),
}


STORES = {
    "less text than a window": bad(
        TRAIN, "has 12 tokens, fewer than one window of seq_len + 1 = 17", "add text", make=small_store
    ),
    "absent": bad(TRAIN + " --data.store no", "no token store at", "work/no", "--data.store"),
    "a file": bad(TRAIN + " --data.store {config}", "config.json is not a folder", "`jaxtrain prepare`"),
    "another folder": bad(TRAIN + " --data.store {corpus}", "no manifest.json", "`jaxtrain prepare`"),
    "no manifest": bad(
        TRAIN, "no manifest.json", "`jaxtrain prepare`", make=lambda w: (w.store / "manifest.json").unlink()
    ),
    "a truncated manifest": bad(
        TRAIN,
        "manifest.json is not JSON",
        "run `jaxtrain prepare` again",
        make=lambda w: w.damage("manifest.json", lambda b: b[:99]),
    ),
    "another format": bad(TRAIN, "'tokens'", "make the store again", make=lambda w: w.manifest(format="tokens")),
    "a later version": bad(TRAIN, "version 99", "make the store again", make=lambda w: w.manifest(version=99)),
    "an odd dtype": bad(TRAIN, "object", "prepare` again", make=lambda w: w.manifest(dtype="object")),
    "a manifest without splits": bad(
        TRAIN, "holds a wrong value", "prepare` again", make=lambda w: w.manifest(splits=None)
    ),
    "a vocabulary of text": bad(TRAIN, "vocab_size", "prepare` again", make=lambda w: w.manifest(vocab_size="257")),
    "a negative vocabulary": bad(TRAIN, "-257", "prepare` again", make=lambda w: w.manifest(vocab_size=-257)),
    "a truncated shard": bad(
        TRAIN, "train-00000.bin has", "prepare` again", make=lambda w: w.damage("train-00000.bin", lambda b: b[:-2])
    ),
    "a flipped bit": bad(
        TRAIN,
        "the checksum of train-00000.bin",
        "prepare` again",
        make=lambda w: w.damage("train-00000.bin", lambda b: bytes([b[0] ^ 1]) + b[1:]),
    ),
    "a missing shard": bad(
        TRAIN, "train-00000.bin is missing", "prepare` again", make=lambda w: (w.store / "train-00000.bin").unlink()
    ),
    "another tokenizer": bad(
        TRAIN,
        "tokenizer.json is missing or is not",
        "prepare` again",
        make=lambda w: w.damage("tokenizer.json", lambda b: b + b" "),
    ),
    "documents of a pickle": bad(
        TRAIN, "train-documents.npy cannot be read", "prepare` again", make=documents(np.array([Bomb()], object))
    ),
    "documents of fractions": bad(TRAIN, "is not int64", "prepare` again", make=documents(np.zeros(3))),
    "tokens of another vocabulary": bad(
        TRAIN + " --data.no-verify",
        "token id 65535",
        "verify it, or make it again",
        starts=True,
        make=lambda w: w.damage("train-00000.bin", lambda b: b"\xff" * len(b)),
    ),
}


TABLE = {f"data: {name}": row for name, row in DATA.items()} | {f"stores: {name}": row for name, row in STORES.items()}


@pytest.mark.parametrize("name", TABLE)
def test_bad_data_is_refused(name, world, capsys):
    check(TABLE[name], world, capsys)
