import gzip
import io
import json
import os
import string
import sys
import sysconfig

import numpy as np
import pytest

from jaxtrain.data.prepare import passes, units
from jaxtrain.data.prepare import prepare as prepare_module
from jaxtrain.data.prepare.documents import hash_fraction, plan_units, read_documents
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.prepare.progress import progress_bar
from jaxtrain.data.prepare.sources import find_sources
from jaxtrain.data.store import Split, open_store
from jaxtrain.data.tokenizer import train_bpe
from jaxtrain.runtime.files import locked

DOCUMENTS = [f"document {number}: " + "the quick brown fox, é and 漢字\n" * (number % 7 + 1) for number in range(60)]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in texts))
    return str(path)


def documents_of(split: Split) -> list[list[int]]:
    """Tokens of each document, its end-of-text token first."""
    ends = [*split.document_starts[1:].tolist(), split.num_tokens]
    return [split.read(start, end - start).tolist() for start, end in zip(split.document_starts, ends, strict=True)]


def texts_of(store, split: Split) -> list[str]:
    documents = documents_of(split)
    assert all(document[0] == store.eot_id and store.eot_id not in document[1:] for document in documents)
    texts = [store.tokenizer.decode(document[1:]) for document in documents]
    assert split.num_bytes == sum(len(text.encode()) for text in texts)
    assert split.num_documents == len(texts)
    return texts


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def small_units(monkeypatch, unit_bytes=700, shard_tokens=1 << 29):
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", shard_tokens)


def test_single_text_is_split_as_nanogpt_splits_it(tmp_path):
    text = "".join(chr(97 + number % 26) for number in range(1237))
    (tmp_path / "input.txt").write_text(text)
    store = prepare([str(tmp_path / "input.txt")], tmp_path / "store", validation_fraction=0.1)
    assert store.manifest["split"] == "tail"
    assert documents_of(store.train) == [[256, *text[: int(len(text) * 0.9)].encode()]]
    assert documents_of(store.validation) == [[256, *text[int(len(text) * 0.9) :].encode()]]
    assert store.train.num_bytes + store.validation.num_bytes == 1237


def test_tail_is_cut_between_characters(tmp_path):
    text = "漢" * 50
    (tmp_path / "input.txt").write_text(text)
    for number, fraction in enumerate((0.1, 0.11, 0.12, 0.13)):
        store = prepare([str(tmp_path / "input.txt")], tmp_path / str(number), validation_fraction=fraction)
        train, validation = texts_of(store, store.train), texts_of(store, store.validation)
        assert "".join(train + validation) == text
        assert 0 <= 150 * (1 - fraction) - store.train.num_bytes < 4


@pytest.mark.parametrize("unit_bytes", [1, 100, 1 << 25])
def test_tail_of_several_documents(tmp_path, monkeypatch, unit_bytes):
    small_units(monkeypatch, unit_bytes)
    names = [letter for letter in string.ascii_letters if hash_fraction(letter * 100) > 0.35][:4]  # none is held out
    for name in names:
        (tmp_path / name).write_text(name * 100)
    sources = [str(tmp_path / name) for name in names]
    store = prepare(sources, tmp_path / "store", validation_fraction=0.3025, num_workers=1)
    assert store.manifest["split"] == "tail"
    a, b, c, d = names
    assert texts_of(store, store.train) == [a * 100, b * 100, c * 79]
    assert texts_of(store, store.validation) == [c * 21, d * 100]


def test_documents_are_split_by_hash(tmp_path):
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS + DOCUMENTS[::-1])
    store = prepare([source], tmp_path / "store", validation_fraction=0.2)
    train, validation = texts_of(store, store.train), texts_of(store, store.validation)
    assert store.manifest["split"] == "documents"
    both = DOCUMENTS + DOCUMENTS[::-1]
    assert validation == [text for text in both if hash_fraction(text) < 0.2]
    assert train == [text for text in both if hash_fraction(text) >= 0.2]
    assert len(validation) > 4
    assert not set(train) & set(validation)


def test_hash_fraction_is_pinned_and_even():
    assert hash_fraction("") == 0xE3B0C44298FC1C14 / 2**64  # the head of SHA-256 of nothing
    fractions = [hash_fraction(str(number)) for number in range(4000)]
    assert np.histogram(fractions, 4, (0, 1))[0].tolist() == pytest.approx([1000] * 4, abs=110)


def test_kinds_of_sources(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b.txt").write_text("plain b\r\n")
    (folder / "a.md").write_text("plain a")
    (folder / "empty.txt").write_text("")
    (folder / "deep" / "z.txt.gz").write_bytes(gzip.compress(b"packed z"))
    (folder / ".hidden" / "x.txt").write_text("hidden")
    (folder / ".dot").write_bytes(b"\xff")
    write_jsonl(folder / "c.jsonl", ["line 1", "", "line 3"])
    with gzip.open(folder / "d.jsonl.gz", "wt") as stream:
        stream.write('\ufeff{"text": "packed line"}\n\n  \n{"text": "no line end"}')
    in_folder = ["plain a", "plain b\r\n", "line 1", "line 3", "packed line", "no line end", "packed z"]
    for number, (sources, expected) in enumerate(
        [
            ([str(folder)], in_folder),
            ([str(folder / "*.txt"), str(folder)], ["plain b\r\n", *[t for t in in_folder if t != "plain b\r\n"]]),
            ([str(folder / "**" / "*.gz")], ["packed line", "no line end", "packed z"]),
            ([str(folder / "c.jsonl"), str(folder / "a.md")], ["line 1", "line 3", "plain a"]),
        ]
    ):
        store = prepare(sources, tmp_path / str(number), validation_fraction=0.5)
        train, validation = texts_of(store, store.train), texts_of(store, store.validation)
        if store.manifest["split"] == "tail":
            assert "".join(train + validation) == "".join(expected)
        else:
            assert train == [text for text in expected if text in train]
            assert sorted(train + validation) == sorted(expected)


@pytest.mark.parametrize("unit_bytes", [1, 2, 7, 64, 200, 10_000])
@pytest.mark.parametrize("end", ["", "\n", "\r\n\n\n"])
def test_line_ranges_have_each_line_once(tmp_path, unit_bytes, end):
    file = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": text}) for text in ("one", "two" * 30, "é", "four", "five" * 9)]
    file.write_text("\n\n".join(lines) + end)
    planned = plan_units(find_sources([str(file)]), unit_bytes)
    texts = [text for unit in planned for _, text in read_documents(unit, "text")]
    assert texts == ["one", "two" * 30, "é", "four", "five" * 9]
    assert len(planned) == -(-file.stat().st_size // unit_bytes)


def test_small_files_share_units(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("x" * 30)
    planned = plan_units(find_sources([str(tmp_path)]), 100)
    assert [len(unit) for unit in planned] == [3, 3, 3, 1]
    assert [len(unit) for unit in plan_units(find_sources([str(tmp_path)]), 10)] == [1] * 10


BAD = {
    "latin.txt": (b"caf\xe9", r"latin\.txt is not UTF-8 text \(byte 3\): convert it"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"latin\.jsonl line 2 cannot be used: .*utf-8"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": \n', r"broken\.jsonl line 3 cannot be used: .*remove the line"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b", "id": 1}\n', r"line 2 .*no field 'text' \(it has: body, id\)"),
    "list.jsonl": (b'["text"]\n', r"line 1 .*no field 'text' \(it has: list, not an object\)"),
    "number.jsonl": (b'{"text": 7}\n', r"line 1 .*field 'text' is int, not text"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', r"line 1 .*surrogate"),
    "damaged.txt.gz": (gzip.compress(b"hello" * 100)[:-9], r"damaged\.txt\.gz cannot be read: .*replace the file"),
    "damaged.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 9)[:-9], r"damaged\.jsonl\.gz cannot be read"),
    "plain.gz": (b"not packed", r"plain\.gz cannot be read: Not a gzipped file"),
    "empty.txt": (b"", "hold no text"),
    "blank.jsonl": (b'\n{"text": ""}\n', "hold no text"),
    "tiny.txt": (b"a", "1 bytes of text are too few to hold out 0.02"),
    "character.txt": ("漢".encode(), "the train split has no document; add text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_named(tmp_path, name):
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prepare([str(tmp_path / name)], tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing is left behind


def test_line_number_in_a_later_unit(tmp_path, monkeypatch):
    small_units(monkeypatch, 50)
    (tmp_path / "x.jsonl").write_text('{"text": "abcdefg"}\n' * 30 + "oops\n")
    with pytest.raises(ValueError, match=r"x\.jsonl line 31 cannot be used"):
        prepare([str(tmp_path / "x.jsonl")], tmp_path / "store", num_workers=1)


def test_bad_requests(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("text " * 100)
    (tmp_path / "none").mkdir()
    cases = [
        ([str(tmp_path / "missing.txt")], {}, r"no file or folder .*missing\.txt"),
        ([str(tmp_path / "*.csv")], {}, r"glob '.*\*\.csv' matches no file"),
        ([str(tmp_path / "none")], {}, "holds no files"),
        ([], {}, "sources must be a list"),
        (str(file), {}, "sources must be a list"),
        ([str(file)], {"tokenizer": "words"}, "unknown tokenizer 'words'"),
        ([str(file)], {"tokenizer": "bpe:9000"}, "too small for bpe:9000"),
        ([str(file)], {"validation_fraction": 0.0}, "between 0 and 1, got 0.0"),
        ([str(file)], {"validation_fraction": 1.0}, "between 0 and 1, got 1.0"),
        ([str(file)], {"num_workers": -1}, "num_workers must be 0"),
        ([str(tmp_path)], {}, "would lie in its own source folder"),
    ]
    for sources, options, message in cases:
        with pytest.raises(ValueError, match=message):
            prepare(sources, tmp_path / "store", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "none"]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:290"])
def test_store_is_the_same_for_any_number_of_workers(tmp_path, monkeypatch, tokenizer):
    small_units(monkeypatch, 1500)
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    stores = [
        prepare([source], tmp_path / f"store{number}", tokenizer=tokenizer, validation_fraction=0.2, num_workers=number)
        for number in (1, 2)
    ]
    assert contents(tmp_path / "store1") == contents(tmp_path / "store2")
    assert stores[0].fingerprint == stores[1].fingerprint
    assert texts_of(stores[1], stores[1].train) == [text for text in DOCUMENTS if hash_fraction(text) >= 0.2]


def test_small_corpora_start_no_pool(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtrain.data.prepare.tasks.ProcessPoolExecutor", None)
    prepare([write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)], tmp_path / "store", num_workers=8)


def test_units_and_shards_do_not_change_the_tokens(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    whole = prepare([source], tmp_path / "whole")
    small_units(monkeypatch, 700, shard_tokens=501)
    cut = prepare([source], tmp_path / "cut", num_workers=1)
    assert len(cut.train.shards) > 5
    assert {len(shard) for shard in cut.train.shards[:-1]} == {501}
    for split in ("train", "validation"):
        assert documents_of(getattr(cut, split)) == documents_of(getattr(whole, split))


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, name, num_calls):
    """Makes the given function of `build` raise after some calls; returns the list of its calls."""
    function, calls = getattr(units, name), []

    def counted(task):
        if len(calls) == num_calls:
            raise Interrupted
        calls.append(task)
        return function(task)

    monkeypatch.setattr(passes, name, counted)
    return calls


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:290"])
def test_interrupted_work_is_taken_up(tmp_path, monkeypatch, tokenizer):
    small_units(monkeypatch)
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    options = {"tokenizer": tokenizer, "validation_fraction": 0.2, "num_workers": 1}
    prepare([source], tmp_path / "whole", **options)
    num_units = len(plan_units(find_sources([source]), 700))
    for name in ("scan_unit", "encode_unit"):
        out = tmp_path / name
        interrupt_after(monkeypatch, name, 3)
        with pytest.raises(Interrupted):
            prepare([source], out, **options)
        assert not out.exists()
        with pytest.raises(ValueError, match="is unfinished: run `jaxtrain prepare` again"):
            open_store(out)
        calls = interrupt_after(monkeypatch, name, 10**9)
        with monkeypatch.context() as patch:
            if name == "encode_unit":  # the tokenizer is there already
                patch.setattr(passes, "train_bpe", None)
            prepare([source], out, **options)
        assert len(calls) == num_units - 3
        assert contents(out) == contents(tmp_path / "whole")
        assert not (tmp_path / f".{name}.partial").exists()


def test_finished_store_only_has_to_be_renamed(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            prepare([source], tmp_path / "store")
    with pytest.raises(ValueError, match="unfinished"):
        open_store(tmp_path / ".store.partial")
    for name in ("scan_unit", "encode_unit"):
        interrupt_after(monkeypatch, name, 0)
    assert prepare([source], tmp_path / "store").train.num_documents > 50


def test_unfinished_work_on_another_request_is_discarded(tmp_path, monkeypatch, capfd):
    small_units(monkeypatch)
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    interrupt_after(monkeypatch, "encode_unit", 3)
    with pytest.raises(Interrupted):
        prepare([source], tmp_path / "store", num_workers=1)
    assert capfd.readouterr().err == ""
    calls = interrupt_after(monkeypatch, "encode_unit", 10**9)
    store = prepare([source], tmp_path / "store", validation_fraction=0.3, num_workers=1)
    assert len(calls) == len(plan_units(find_sources([source]), 700))
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "discarding" in error
    assert texts_of(store, store.validation) == [text for text in DOCUMENTS if hash_fraction(text) < 0.3]


def test_changed_source_is_another_request(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    prepare([source], tmp_path / "store")
    os.utime(source, ns=(0, 0))
    with pytest.raises(ValueError, match="exists and is not the token store of this request"):
        prepare([source], tmp_path / "store")
    encode = units.encode_unit

    def changing(task):
        write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS[:-1])
        return encode(task)

    monkeypatch.setattr(passes, "encode_unit", changing)
    with pytest.raises(ValueError, match=r"corpus\.jsonl changed while it was being read"):
        prepare([source], tmp_path / "other")


def test_existing_folder_is_left_alone(tmp_path, monkeypatch):
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


def test_bpe_is_trained_on_the_training_split_only(tmp_path, monkeypatch):
    texts = [f"shared words {number} " + f"only{number}here " * 20 for number in range(40)]
    source = write_jsonl(tmp_path / "corpus.jsonl", texts)
    store = prepare([source], tmp_path / "store", tokenizer="bpe:278", validation_fraction=0.3)
    train = [text for text in texts if hash_fraction(text) >= 0.3]
    assert store.tokenizer == train_bpe(train, 278)
    assert store.tokenizer != train_bpe(texts, 278)
    assert [store.tokenizer.encode(text).tolist() for text in train] == [d[1:] for d in documents_of(store.train)]
    # A sample is spread over the whole split.
    monkeypatch.setattr(passes, "BPE_SAMPLE_BYTES", store.train.num_bytes // 2)
    sampled = prepare([source], tmp_path / "sampled", tokenizer="bpe:278", validation_fraction=0.3)
    half = [text for number, text in enumerate(train) if int((number + 1) * 0.4999) > int(number * 0.4999)]
    assert sampled.tokenizer == train_bpe(half, 278)


def test_long_documents_are_encoded_in_blocks(tmp_path, monkeypatch):
    text = "".join(f"word{number % 89} isn't, {number}:\n" + " \n\t x" * (number % 5) for number in range(900))
    (tmp_path / "long.txt").write_text(text)
    tokenizer = train_bpe([text], 370)
    tokenizer.save(tmp_path)
    whole = tokenizer.encode(text[: int(len(text) * 0.9)]).tolist()
    for size in (1, 37, 1000):
        monkeypatch.setattr(units, "BLOCK_CHARACTERS", size)
        blocks = list(units.split_blocks(text, size))
        assert "".join(blocks) == text
        assert len(blocks) > 10
        store = prepare(
            [str(tmp_path / "long.txt")], tmp_path / str(size), tokenizer=f"hf:{tmp_path}", validation_fraction=0.1
        )
        assert documents_of(store.train) == [[tokenizer.eot_id, *whole]]
    assert list(units.split_blocks("nospacesatall" * 9, 5)) == ["nospacesatall" * 9]


def test_large_vocabulary_is_stored_in_uint32(tmp_path):
    (tmp_path / "input.txt").write_text("hello world " * 50)
    data = json.loads(train_bpe(["hello world"] * 9, 257).json_text)
    vocabulary = data["model"]["vocab"]
    largest = max(vocabulary, key=vocabulary.get)
    vocabulary[largest] = 69_999
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    source, spec = [str(tmp_path / "input.txt")], f"hf:{tmp_path / 'tokenizer.json'}"
    store = prepare(source, tmp_path / "store", tokenizer=spec, validation_fraction=0.5)
    assert (store.vocab_size, store.manifest["dtype"], store.train.shards[0].dtype) == (70_000, "uint32", np.uint32)
    assert texts_of(store, store.train) + texts_of(store, store.validation) == ["hello world " * 25] * 2
    assert [units.token_dtype(size) for size in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def test_manifest_says_where_the_tokens_came_from(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 100)
    store = prepare([str(tmp_path / "a.txt")], tmp_path / "store")
    path = str(tmp_path / "a.txt")
    assert store.manifest["sources"] == [path]
    assert store.manifest["source_sha256"] == {path: "d9f5aeb06abebb3be3f38adec9a2e3b94228d52193be923eb4e24c9b56ee0930"}
    assert store.manifest["request"]["files"] == [[path, "", 300, (tmp_path / "a.txt").stat().st_mtime_ns]]


def test_python_stdlib(tmp_path):
    store = prepare(["python-stdlib"], tmp_path / "store", validation_fraction=0.05)
    paths = [file[1] for file in store.manifest["request"]["files"]]
    assert store.manifest["split"] == "documents"
    assert paths == sorted(paths)
    assert {"json/decoder.py", "os.py"} < set(paths)
    assert store.train.num_bytes + store.validation.num_bytes > 5_000_000
    held_out = [path for path in paths if hash_fraction(path) < 0.05]
    assert store.validation.num_documents == len(held_out)
    library = sysconfig.get_path("stdlib")
    with open(os.path.join(library, held_out[0]), encoding="utf-8", newline="") as stream:
        assert texts_of(store, store.validation)[0] == stream.read()


def test_python_stdlib_leaves_out_tests_and_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    kept = ["a.py", "json/tool.py", "lib2to3/main.py", "testing.py"]
    skipped = [
        "copy_of_a.py",
        "empty.py",
        "latin.py",
        "x.txt",
        "test/t.py",
        "json/tests/t.py",
        "idlelib/idle_test/t.py",
    ]
    skipped += ["lib2to3/tests/t.py", "site-packages/p.py", "dist-packages/p.py", "__pycache__/c.py"]
    skipped += ["ensurepip/_bundled/b.py"]
    for name in kept + skipped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "copy_of_a.py").write_text("# a.py\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    assert [file.key for file in find_sources(["python-stdlib"])] == kept
    for name in kept:
        (tmp_path / name).unlink()
    (tmp_path / "copy_of_a.py").unlink()
    with pytest.raises(ValueError, match=r"no \.py files under .*use another Python"):
        find_sources(["python-stdlib"])


def test_progress_is_drawn_on_a_terminal_only(tmp_path, monkeypatch, capfd):
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    prepare([source], tmp_path / "store", tokenizer="bpe:290")
    assert capfd.readouterr() == ("", "")
    for terminal, shown in ((True, True), (False, False)):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            with progress_bar(True) as bar:
                advance = bar("tokenizing", [30, 10])
                advance(0)
        assert ("tokenizing" in stream.getvalue() and "75%" in stream.getvalue()) == shown
