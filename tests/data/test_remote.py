"""Sources and token stores behind fsspec URLs, on its memory and local file systems."""

import dataclasses
import gzip
import json
import sys

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxtrain.cli import main
from jaxtrain.data import remote
from jaxtrain.data.prepare.passes import Limits
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.store import open_store
from jaxtrain.training.run import open_data
from jaxtrain.training.run_folder import absolute_paths

TEXTS = [f"document {number} " + "with words " * (number % 9) for number in range(80)]
LINES = [json.dumps({"text": text}) + "\n" for text in TEXTS]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Empty memory file system, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return system


def write_sources(folder):
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(LINES[:30]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(LINES[30:50]).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[50:70]}), folder / "c.parquet")
    (folder / "d.txt").write_text(TEXTS[70])
    (folder / ".hidden").write_text("x")


def test_remote_sources_make_the_store_of_local_ones(tmp_path, bucket, capfd):
    write_sources(tmp_path / "text")
    limits = Limits(unit_bytes=300)
    local = prepare([str(tmp_path / "text")], tmp_path / "local", limits=limits, num_workers=1)
    bucket.put(str(tmp_path / "text"), "/bucket/text", recursive=True)
    urls = {
        "memory": "memory://bucket/text",
        "glob": "memory://bucket/text/*.*",
        "file": f"file://{tmp_path}/text",
    }
    for name, url in urls.items():
        workers = 2 if name == "file" else 1  # other processes have another memory file system
        store = prepare([url], tmp_path / name, limits=limits, num_workers=workers)
        assert store.fingerprint == local.fingerprint, name
        assert store.manifest["sources"] == [url]
    assert "left out: 1 hidden (.hidden)" in capfd.readouterr().err
    assert prepare([urls["memory"]], tmp_path / "memory", limits=limits).fingerprint == local.fingerprint
    bucket.pipe("/bucket/text/d.txt", TEXTS[70].upper().encode())
    with pytest.raises(ValueError, match="is not the token store of this request"):
        prepare([urls["memory"]], tmp_path / "memory", limits=limits)
    own = prepare([urls["memory"]], tmp_path / "own", validation=["memory://bucket/text/d.txt"], num_workers=1)
    assert own.validation.num_documents == 1


def test_sources_that_cannot_be_read(tmp_path, bucket, monkeypatch, capfd):
    bucket.pipe("/bucket/latin.txt", b"caf\xe9")
    cases = [
        ("memory://bucket/missing.txt", ValueError, "no file or folder memory://bucket/missing.txt: check the URL"),
        ("memory://bucket/*.json", ValueError, r"no file or folder memory://bucket/\*.json"),
        ("memory://bucket/latin.txt", ValueError, "memory://bucket/latin.txt is not UTF-8 text"),
        ("nonsense://bucket/a", ValueError, "nonsense://bucket/a cannot be read: ValueError: Protocol not known"),
        ("s3://bucket/a", ImportError, "s3://bucket/a needs fsspec and its package for this scheme: .*s3fs"),
    ]
    for url, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            prepare([url], tmp_path / "store")
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert main(["prepare", "gs://bucket/a", "--out", str(tmp_path / "store")]) == 1
    assert "gs://bucket/a needs fsspec and its package for this scheme: pip install 'jaxtrain[remote]'" in (
        capfd.readouterr().err
    )
    assert not (tmp_path / "store").exists()


def test_remote_stores_are_cached(tmp_path, bucket, monkeypatch, store, tiny_config):
    bucket.put(str(store), "/bucket/store", recursive=True)
    url, local = "memory://bucket/store", open_store(store)
    fetched = []
    get_file = type(bucket).get_file
    monkeypatch.setattr(type(bucket), "get_file", lambda self, *a, **k: (fetched.append(a[0]), get_file(self, *a, **k)))
    first = open_store(url)
    assert first.fingerprint == local.fingerprint
    assert first.tokenizer == local.tokenizer
    assert len(fetched) == len(list(store.iterdir()))
    fetched.clear()
    for verify in (True, False):
        assert open_store(url, verify=verify).fingerprint == local.fingerprint
    assert not fetched
    shard = first.path / "train-00000.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-2] + b"\0\0")
    assert open_store(url).train.read(0, 9).tolist() == local.train.read(0, 9).tolist()
    assert [name.rpartition("/")[2] for name in fetched] == ["train-00000.bin"]
    config = dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, store=url))
    config = absolute_paths(config, tmp_path / "run")
    assert config.data.store == url
    assert open_data(config, tmp_path / "run").fingerprint == local.fingerprint
    bucket.pipe("/bucket/store/train-00000.bin", data[:-2])  # torn on the remote side
    with pytest.raises(ValueError, match=r"train-00000\.bin has \d+ bytes, its manifest says"):
        open_store(url)


def test_remote_token_files(tmp_path, bucket):
    tokens = np.arange(1000) % 500
    bucket.pipe("/bucket/nano/train.bin", tokens.astype("<u2").tobytes())
    bucket.pipe("/bucket/nano/val.bin", tokens[:90].astype("<u2").tobytes())
    bucket.pipe("/bucket/nano/train.json", json.dumps({"vocab_size": 501, "eot_id": 499}).encode())
    folder = open_store("memory://bucket/nano")
    assert (folder.vocab_size, folder.validation.num_tokens, folder.train.num_documents) == (501, 90, 2)
    alone = open_store("memory://bucket/nano/train.bin")
    assert (alone.train.num_tokens, alone.validation.num_tokens) == (980, 20)
    own = open_store("memory://bucket/nano/train.bin", validation=["memory://bucket/nano/val.bin"])
    assert own.fingerprint == folder.fingerprint
    bucket.mkdir("/bucket/empty")
    for url in ("memory://bucket/none", "memory://bucket/empty", "memory://bucket/nano/none.bin"):
        with pytest.raises(ValueError, match=f"no file or folder {url}: check the URL"):
            open_store(url)


def test_a_download_that_stops_is_resumed(tmp_path, bucket, monkeypatch, store):
    bucket.put(str(store), "/bucket/store", recursive=True)
    names, get_file = [], type(bucket).get_file

    def fail_at_third(self, source, target, **options):
        names.append(source)
        if len(names) == 3:
            raise TimeoutError("the network is gone")
        get_file(self, source, target, **options)

    monkeypatch.setattr(type(bucket), "get_file", fail_at_third)
    with pytest.raises(ValueError, match="memory://bucket/store cannot be read: TimeoutError: the network is gone"):
        remote.fetch_store("memory://bucket/store")
    assert open_store("memory://bucket/store").fingerprint == open_store(store).fingerprint
    assert len(names) == len(list(store.iterdir())) + 1
