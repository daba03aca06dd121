import json
import os
import pickle
import shutil

import numpy as np
import pytest

from jaxtrain.data.prepare.passes import Limits
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.store import Split, manifest_fingerprint, open_store
from jaxtrain.runtime.files import sha256_file

TEXT = "".join(f"line {number}\n" for number in range(400))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "input.txt").write_text(TEXT)
    limits = Limits(shard_tokens=1000)
    prepare([str(folder / "input.txt")], folder / "store", validation_fraction=0.1, limits=limits)
    return folder / "store"


@pytest.fixture
def store(made, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "store")


def change(store, **values):
    """Changes the manifest, which loses its checksum as those of older stores have none."""
    manifest = json.loads((store / "manifest.json").read_text())
    manifest.pop("checksum", None)
    (store / "manifest.json").write_text(json.dumps({**manifest, **values}))


def test_open(store):
    opened = open_store(store)
    cut = int(len(TEXT) * 0.9)
    assert (opened.path, opened.vocab_size, opened.eot_id) == (store, 257, 256)
    assert opened.tokenizer.decode(opened.train.read(1, cut)) == TEXT[:cut]
    assert (opened.train.num_tokens, opened.train.num_bytes, opened.train.num_documents) == (cut + 1, cut, 1)
    assert opened.validation.num_bytes == len(TEXT) - cut
    assert opened.train.document_starts.tolist() == [0]
    assert [len(shard) for shard in opened.train.shards[:2]] == [1000, 1000]
    assert opened.fingerprint == open_store(str(store), verify=False).fingerprint


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1, 1, 10], [4, 4, 4]])
def test_read_across_shards(sizes):
    tokens = np.arange(12, dtype=np.uint32)
    split = Split(tuple(np.split(tokens, np.cumsum(sizes)[:-1])), np.array([0, 5]), 10)
    assert (split.num_tokens, split.num_documents) == (12, 2)
    for start in range(13):
        for length in range(13 - start):
            found = split.read(start, length)
            assert found.tolist() == list(range(start, start + length))
            assert found.dtype == np.uint32
            assert not np.shares_memory(found, tokens)
    for start, length in ((0, 13), (-1, 2), (12, 1), (5, -1)):
        with pytest.raises(ValueError, match="are not in a split of 12 tokens"):
            split.read(start, length)


def test_a_file_that_changes_while_it_is_read_is_an_error(store, tmp_path, monkeypatch):
    """The shards, masks and documents of a store, and token files in place: a memory map would end the process."""
    np.save(tmp_path / "train.npy", np.arange(100, dtype=np.uint16))
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")

    def cut(path, size):
        os.truncate(path, size)
        return rf"{path} was cut short while in use: byte {size:,} is needed, and the file has {size:,} bytes; restore"

    for name in ("train.npy", "train.bin"):
        split = open_store(tmp_path / name, vocab_size=100).train
        assert split.read(0, 98).tolist() == list(range(98))
        size = (tmp_path / name).stat().st_size - 2 * 12
        message = cut(tmp_path / name, size)
        assert split.read(0, 88).tolist() == list(range(88))  # of what is left
        with pytest.raises(OSError, match=message):
            split.read(80, 10)
    opened = open_store(store)
    expected = opened.train.read(900, 900)
    (store / "train-00000.bin").unlink()  # an open file stays until it is closed
    assert (opened.train.read(900, 900) == expected).all()
    with pytest.raises(OSError, match=cut(store / "train-00001.bin", 0)):
        opened.train.read(900, 900)
    with pytest.raises(OSError, match=cut(store / "validation-documents.npy", 128)):
        opened.validation.document_starts  # noqa: B018
    monkeypatch.setattr(os, "preadv", lambda *_: os.stat(tmp_path / "gone"))
    with pytest.raises(OSError, match=r"train-00000.bin cannot be read any more: No such file .*; restore the file"):
        opened.train.read(0, 10)


def test_fingerprint_follows_the_tokens_only(store, tmp_path):
    manifest = json.loads((store / "manifest.json").read_text())
    fingerprint = manifest_fingerprint(manifest)
    assert manifest_fingerprint({**manifest, "sources": ["elsewhere"], "request": {}}) == fingerprint
    for key, value in (("eot_id", 3), ("vocab_size", 300), ("tokenizer", {"sha256": "0"})):
        assert manifest_fingerprint({**manifest, key: value}) != fingerprint
    (tmp_path / "moved.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT.replace("line 7\n", "line_7\n"))
    stores = [
        prepare([str(tmp_path / name)], tmp_path / name[:3], validation_fraction=0.1, limits=Limits(shard_tokens=1000))
        for name in ("moved.txt", "other.txt")
    ]
    assert [opened.fingerprint == fingerprint for opened in stores] == [True, False]


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a folder: make a token store"):
        open_store(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder"):
        open_store(tmp_path / "file")
    with pytest.raises(ValueError, match=r"it has no manifest\.json"):
        open_store(tmp_path)


def test_refuses_unfinished(store, tmp_path):
    store.rename(tmp_path / ".store.partial")
    for name in ("store", ".store.partial"):
        with pytest.raises(ValueError, match="unfinished"):
            open_store(tmp_path / name)


def test_refuses_foreign_formats(store):
    change(store, version=99)
    with pytest.raises(ValueError, match="'jaxtrain-tokens' version 99; this jaxtrain reads 'jaxtrain-tokens' version"):
        open_store(store)
    change(store, format="other", version=1)
    with pytest.raises(ValueError, match="format 'other' version 1"):
        open_store(store)
    for text in ("{", "[]", "{}", "3", "[" * 100_000, '{"format": "jaxtrain-tokens", "version": 1}'):
        (store / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"is damaged: manifest\.json"):
            open_store(store)


@pytest.mark.parametrize("key", ["dtype", "vocab_size", "eot_id", "tokenizer", "splits"])
@pytest.mark.parametrize("value", [None, "x", [], {}])
def test_refuses_wrong_values(store, key, value):
    change(store, **{key: value})
    with pytest.raises(ValueError, match=r"damaged: manifest\.json lacks a key or holds a wrong value"):
        open_store(store)


def test_every_change_of_the_manifest_is_found(store):
    """Every entry is covered, those that nothing reads too; without the checksum, an older store opens."""
    file = store / "manifest.json"
    text = file.read_text()
    fingerprint = open_store(store).fingerprint
    for i, char in enumerate(text[: text.index('"checksum"')]):
        if char.isalnum() and i % 7 == 0:
            file.write_text(text[:i] + ("1" if char == "0" else "0") + text[i + 1 :])
            with pytest.raises(ValueError, match=r"is damaged: manifest\.json is not "):
                open_store(store, verify=False)
    for cut in (0, 1, len(text) // 2, len(text) - 3):
        file.write_text(text[:cut])
        with pytest.raises(ValueError, match=r"is damaged: manifest\.json"):
            open_store(store)
    file.write_text(text)
    change(store)
    assert open_store(store).fingerprint == fingerprint
    assert "checksum" not in open_store(store).manifest


def test_refuses_damage(store):
    shard = store / "train-00001.bin"
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00001\.bin is missing; delete it and run"):
        open_store(store)
    shard.write_bytes(data[:-2])
    with pytest.raises(ValueError, match=r"train-00001\.bin has 1998 bytes, its manifest says 2000"):
        open_store(store)
    shard.write_bytes(data[:-2] + b"\x00\x00")
    with pytest.raises(ValueError, match=r"the checksum of train-00001\.bin"):
        open_store(store)
    open_store(store, verify=False)  # as asked: sizes only
    shard.write_bytes(data)
    open_store(store)
    (store / "tokenizer.json").write_text('{"type": "byte"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing or is not the tokenizer"):
        open_store(store, verify=False)


def test_refuses_shards_that_do_not_add_up(store):
    splits = json.loads((store / "manifest.json").read_text())["splits"]
    splits["validation"]["num_tokens"] += 1
    change(store, splits=splits)
    with pytest.raises(ValueError, match="the shards of validation have"):
        open_store(store)


def test_refuses_numbers_that_cannot_be(store):
    """Sizes and names of sources with which a command would fail later; a checksum is easily made."""
    file = store / "manifest.json"
    whole = json.loads(file.read_text())["splits"]
    source = whole["train"]["sources"][0]
    cases = [("num_bytes", value) for value in (-5, 0, 2**64, 1.5, True, "9", None)]
    cases += [("sources", value) for value in ("x", None, [1], [{}], [source | {"source": 3}])]
    cases += [("sources", [source | {key: value}]) for key in source for value in (-1, 10**400, None)]
    for key, value in cases:
        change(store, splits=whole | {"train": whole["train"] | {key: value}})
        with pytest.raises(ValueError, match=r"manifest\.json lacks a key or holds a wrong value"):
            open_store(store)


@pytest.mark.parametrize("starts", [[], [1], [0, 5, 5], [0, 9, 7], [0, -2, 3], [0, 10**12], [-(2**63), 2**63 - 1]])
def test_refuses_starts_of_documents_that_do_not_rise(store, starts):
    file, splits = store / "train-documents.npy", json.loads((store / "manifest.json").read_text())["splits"]
    np.save(file, np.array(starts, np.int64))
    splits["train"] |= {"num_documents": len(starts), "documents_sha256": sha256_file(file)}
    change(store, splits=splits)
    with pytest.raises(ValueError, match=r"train-documents\.npy does not rise from 0 to below"):
        open_store(store)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_document_starts_are_checked_and_never_unpickled(store):
    file = store / "train-documents.npy"
    np.save(file, np.array([5]))
    with pytest.raises(ValueError, match=r"checksum of train-documents\.npy"):
        open_store(store)
    np.save(file, np.array([0, 5]))
    with pytest.raises(ValueError, match=r"train-documents\.npy is not int64 \[1\]"):
        open_store(store)
    np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"train-documents\.npy cannot be read"):
        open_store(store, verify=False)
    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"train-documents\.npy cannot be read"):
        open_store(store, verify=False)
    file.unlink()
    with pytest.raises(ValueError, match=r"train-documents\.npy cannot be read"):
        open_store(store)
