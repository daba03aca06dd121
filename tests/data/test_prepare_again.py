"""Preparation that was interrupted, repeated or finds a folder in its way."""

import json
import os
import subprocess
import sys
import time

import pytest
from prepare_helpers import DOCUMENTS, SMALL, SMALL_BYTES, contents, hash_fraction, texts_of, write_jsonl

from jaxtrain.data.prepare import formats
from jaxtrain.data.prepare.documents import plan_units
from jaxtrain.data.prepare.passes import Limits
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.prepare.sources import find_sources
from jaxtrain.data.store import open_store
from jaxtrain.data.tokenizer import train_bpe
from jaxtrain.runtime.files import locked


class Interrupted(Exception):
    pass


class CountedLines:
    """Format of files `*.counted`: JSON lines; counts the units that are read and raises after `limit` of them."""

    def __init__(self, monkeypatch):
        self.calls, self.limit, self.before = 0, 10**9, lambda: None
        monkeypatch.setitem(formats.FORMATS, ".counted", formats.Format(self.documents, splittable=True))

    def documents(self, path, start, stop, text_field):
        if self.calls == self.limit:
            raise Interrupted
        self.calls += 1
        self.before()
        yield from formats.FORMATS[".jsonl"].documents(path, start, stop, text_field)


@pytest.fixture
def counted(monkeypatch):
    return CountedLines(monkeypatch)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:290"])
@pytest.mark.parametrize("stage", ["choosing", "tokenizing"])
def test_interrupted_work_is_resumed(tmp_path, counted, tokenizer, stage):
    source = write_jsonl(tmp_path / "corpus.counted", DOCUMENTS)
    options = {"tokenizer": tokenizer, "validation_fraction": 0.2, "num_workers": 1, "limits": SMALL}
    prepare([source], tmp_path / "whole", **options)
    num_units = len(plan_units(find_sources([source])[0], SMALL_BYTES))
    num_before = 1 if tokenizer == "byte" else 1 + num_units  # choosing the split, and BPE training
    assert counted.calls == num_before + num_units
    counted.calls, counted.limit = 0, 0 if stage == "choosing" else num_before + 3
    out = tmp_path / "store"
    with pytest.raises(Interrupted):
        prepare([source], out, **options)
    assert not out.exists()
    with pytest.raises(ValueError, match="is unfinished: run `jaxtrain prepare` again"):
        open_store(out)
    left = num_before + num_units - counted.limit
    counted.calls, counted.limit = 0, 10**9
    prepare([source], out, **options)
    assert counted.calls == left
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / ".store.partial").exists()


def test_a_killed_prepare_resumes_after_the_units_that_are_done(tmp_path, monkeypatch):
    """SIGKILL among two workers: no document is lost or doubled, and no finished unit is read again."""
    texts = [f"{number} {text}" for number in range(400) for text in DOCUMENTS]
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", texts)
    script = tmp_path / "script.py"
    script.write_text(
        "from jaxtrain.data.prepare.passes import Limits\nfrom jaxtrain.data.prepare.prepare import prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare(['corpus.jsonl'], 'store', num_workers=2, progress=False, limits=Limits(unit_bytes=100_000))\n"
    )
    partial = tmp_path / ".store.partial"
    with subprocess.Popen([sys.executable, script], cwd=tmp_path) as process:
        deadline = time.monotonic() + 100
        while len(list(partial.glob("*/0*.json"))) < 3 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    done = {path: path.stat().st_mtime_ns for path in partial.glob("*/0*.json")}
    assert 3 <= len(done) < 50
    seen = {}

    def stages(description, sizes):
        seen.update({path: path.stat().st_mtime_ns for path in done} if description == "writing train" else {})
        return lambda index: None

    options = {"num_workers": 1, "limits": Limits(unit_bytes=100_000), "progress": stages}
    store = prepare(["corpus.jsonl"], tmp_path / "store", **options)
    assert seen == done
    found = texts_of(store, store.train) + texts_of(store, store.validation)
    assert sorted(found) == sorted(texts)


def test_finished_store_only_has_to_be_renamed(tmp_path, counted, monkeypatch):
    source = write_jsonl(tmp_path / "corpus.counted", DOCUMENTS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            prepare([source], tmp_path / "store", num_workers=1)
    with pytest.raises(ValueError, match="unfinished"):
        open_store(tmp_path / ".store.partial")
    counted.limit = counted.calls
    assert prepare([source], tmp_path / "store", num_workers=1).train.num_documents > 50


def test_unfinished_work_on_another_request_is_discarded(tmp_path, counted, capfd):
    source = write_jsonl(tmp_path / "corpus.counted", DOCUMENTS)
    num_units = len(plan_units(find_sources([source])[0], SMALL_BYTES))
    counted.limit = 4
    with pytest.raises(Interrupted):
        prepare([source], tmp_path / "store", num_workers=1, limits=SMALL)
    assert capfd.readouterr().err == ""
    counted.calls, counted.limit = 0, 10**9
    store = prepare([source], tmp_path / "store", validation_fraction=0.3, num_workers=1, limits=SMALL)
    assert counted.calls == 1 + num_units
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "discarding" in error
    assert texts_of(store, store.validation) == [text for text in DOCUMENTS if hash_fraction(text) < 0.3]


def test_sources_that_change_while_they_are_read(tmp_path, counted):
    source = write_jsonl(tmp_path / "corpus.counted", DOCUMENTS)

    def change():
        if counted.calls > 1:  # after the split was chosen
            write_jsonl(tmp_path / "corpus.counted", [*DOCUMENTS[:-1], DOCUMENTS[-1].upper()])

    counted.before = change
    with pytest.raises(ValueError, match=r"corpus\.counted changed while it was read"):
        prepare([source], tmp_path / "changed", num_workers=1)


def test_a_store_depends_on_the_bytes_of_its_sources_alone(tmp_path):
    tokenizer = train_bpe(DOCUMENTS, 280)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "corpus.jsonl", DOCUMENTS)
        tokenizer.save(tmp_path / name)
    options = {"tokenizer": f"hf:{tmp_path / 'here'}"}
    first = prepare([str(tmp_path / "here" / "*.jsonl")], tmp_path / "store", **options)
    os.utime(tmp_path / "here" / "corpus.jsonl", ns=(0, 0))
    again = {"tokenizer": f"hf:{tmp_path / 'there'}"}
    for source in ("here", "there"):
        store = prepare([str(tmp_path / source / "corpus.jsonl")], tmp_path / "store", **again)
        assert store.fingerprint == first.fingerprint
    (tmp_path / "store").rename(tmp_path / "moved")
    assert open_store(tmp_path / "moved").fingerprint == first.fingerprint
    assert open_store(tmp_path / "moved").tokenizer == tokenizer
    write_jsonl(tmp_path / "there" / "corpus.jsonl", [*DOCUMENTS[:-1], DOCUMENTS[-1].upper()])
    train_bpe(DOCUMENTS, 279).save(tmp_path / "here")
    for source, spec in (("there", again), ("here", options)):
        with pytest.raises(ValueError, match="exists and is not the token store of this request"):
            prepare([str(tmp_path / source / "corpus.jsonl")], tmp_path / "moved", **spec)


def test_a_store_made_by_an_older_version_is_opened(tmp_path):
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    prepare([source], tmp_path / "store")
    file = tmp_path / "store" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["left_out"], manifest["checksum"]
    manifest["request"] |= {"code_version": 1, "files": [entry[:4] for entry in manifest["request"]["files"]]}
    file.write_text(json.dumps(manifest))
    assert prepare([source], tmp_path / "store").train.num_documents > 50
    same = manifest["request"]
    for request in (None, [], {}, {"files": 3}, same | {"files": [[1]]}, same | {"files": []}, same | {"files": None}):
        file.write_text(json.dumps(manifest | {"request": request}))
        with pytest.raises(ValueError, match="exists and is not the token store of this request"):
            prepare([source], tmp_path / "store")


def test_an_existing_folder_is_not_changed(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    first = prepare([source], tmp_path / "store")
    before = contents(tmp_path / "store")
    dates = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    monkeypatch.chdir(tmp_path)
    again = prepare(["corpus.jsonl"], "store")  # the same request by other names
    assert again.fingerprint == first.fingerprint
    for options in ({"tokenizer": "bpe:290"}, {"validation_fraction": 0.5}, {"text_field": "id"}):
        with pytest.raises(ValueError, match="choose another folder, or delete it"):
            prepare([source], tmp_path / "store", **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for name in ("mine", "corpus.jsonl"):
        with pytest.raises(ValueError, match="exists and is not the token store"):
            prepare([source], tmp_path / name)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert contents(tmp_path / "store") == before
    assert dates == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}


def test_partial_folder_of_someone_else(tmp_path):
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    partial = tmp_path / ".store.partial"
    with locked(partial), pytest.raises(ValueError, match="another process is at work"):
        prepare([source], tmp_path / "store")
    (partial / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="is in the way and was not made by prepare"):
        prepare([source], tmp_path / "store")
    assert (partial / "notes.txt").read_text() == "keep"
