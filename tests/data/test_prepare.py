"""Preparation of a token store: its documents, splits, shards, tokenizers and sources."""

import gzip
import json
import os
import string
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from helpers import call
from prepare_helpers import DOCUMENTS, contents, documents_of, hash_fraction, texts_of, write_jsonl

from jaxtrain.data.prepare.documents import plan_units, read_documents, split_blocks
from jaxtrain.data.prepare.passes import Limits
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.prepare.sources import find_sources
from jaxtrain.data.prepare.tasks import worker_pool
from jaxtrain.data.prepare.units import token_dtype
from jaxtrain.data.tokenizer import train_bpe


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
def test_tail_of_several_documents(tmp_path, unit_bytes):
    names = [letter for letter in string.ascii_letters if hash_fraction(letter * 100) > 0.35][:4]  # none is held out
    for name in names:
        (tmp_path / name).write_text(name * 100)
    sources = [str(tmp_path / name) for name in names]
    store = prepare(sources, tmp_path / "store", validation_fraction=0.3025, num_workers=1, limits=Limits(unit_bytes))
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
    planned = plan_units(find_sources([str(file)])[0], unit_bytes)
    texts = [text for unit in planned for _, text in read_documents(unit, "text")]
    assert texts == ["one", "two" * 30, "é", "four", "five" * 9]
    assert len(planned) == -(-file.stat().st_size // unit_bytes)


def test_small_files_share_units(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("x" * 30)
    planned = plan_units(find_sources([str(tmp_path)])[0], 100)
    assert [len(unit) for unit in planned] == [3, 3, 3, 1]
    assert [len(unit) for unit in plan_units(find_sources([str(tmp_path)])[0], 10)] == [1] * 10


def test_line_number_in_a_later_unit(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "abcdefg"}\n' * 30 + "oops\n")
    with pytest.raises(ValueError, match=r"x\.jsonl line 31 cannot be used"):
        prepare([str(tmp_path / "x.jsonl")], tmp_path / "store", num_workers=1, limits=Limits(unit_bytes=50))


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
        ([str(file)], {"num_workers": -1}, "num_workers must be 1 or more"),
        ([str(tmp_path)], {}, "would lie in the source folder"),
    ]
    for sources, options, message in cases:
        with pytest.raises(ValueError, match=message):
            prepare(sources, tmp_path / "store", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "none"]


def test_store_is_the_same_for_any_number_of_workers(tmp_path):
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    options = {"tokenizer": "bpe:290", "validation_fraction": 0.2, "limits": Limits(unit_bytes=1500)}
    stores = [prepare([source], tmp_path / f"store{number}", num_workers=number, **options) for number in (1, 2)]
    assert contents(tmp_path / "store1") == contents(tmp_path / "store2")
    assert stores[0].fingerprint == stores[1].fingerprint
    assert texts_of(stores[1], stores[1].train) == [text for text in DOCUMENTS if hash_fraction(text) >= 0.2]


def test_small_corpora_start_no_pool():
    for num_workers, num_tasks in ((8, 1), (1, 8), (None, 1)):
        with worker_pool(num_workers, num_tasks) as pool:
            assert pool is None


def test_units_and_shards_do_not_change_the_tokens(tmp_path):
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    whole = prepare([source], tmp_path / "whole")
    cut = prepare([source], tmp_path / "cut", num_workers=1, limits=Limits(unit_bytes=700, shard_tokens=501))
    assert len(cut.train.shards) > 5
    assert {len(shard) for shard in cut.train.shards[:-1]} == {501}
    for split in ("train", "validation"):
        assert documents_of(getattr(cut, split)) == documents_of(getattr(whole, split))


def test_remote_outputs_and_tokenizers_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.txt"
    file.write_text("text " * 100)
    for scheme in ("s3", "gs", "hf", "https", "file", "hdfs"):
        url = f"{scheme}://bucket/text"
        for out, options in ((url, {}), (Path(url), {}), ("store", {"tokenizer": f"hf:{url}"})):
            with pytest.raises(ValueError, match="is no local path: copy it to a local disk or mount it"):
                prepare([str(file)], out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


MEMORY = """
import json, resource, sys
from jaxtrain.data.prepare.passes import Limits
from jaxtrain.data.prepare.prepare import prepare

line = json.dumps({"text": "the quick brown fox and the lazy dog " * 60}) + "\\n"
peaks = []
for number, megabytes in enumerate((6, 48)):
    with open(f"{number}.jsonl", "w") as stream:
        for index in range(megabytes * 10**6 // len(line)):
            stream.write(line.replace("quick", str(index)))
    prepare([f"{number}.jsonl"], f"store{number}", num_workers=1, limits=Limits(unit_bytes=1 << 21), progress=False)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000)
print(*peaks)
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Its slow sibling is scripts/bench_prepare.py --gigabytes 4."""
    done = call([sys.executable, "-c", MEMORY], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())  # megabytes
    assert large - small < 12, (small, large)


def test_bpe_is_trained_on_the_training_split_only(tmp_path):
    texts = [f"shared words {number} " + f"only{number}here " * 20 for number in range(40)]
    source = write_jsonl(tmp_path / "corpus.jsonl", texts)
    store = prepare([source], tmp_path / "store", tokenizer="bpe:278", validation_fraction=0.3)
    train = [text for text in texts if hash_fraction(text) >= 0.3]
    assert store.tokenizer == train_bpe(train, 278)
    assert store.tokenizer != train_bpe(texts, 278)
    assert [store.tokenizer.encode(text).tolist() for text in train] == [d[1:] for d in documents_of(store.train)]
    # A sample is the same share of each unit.
    limits = Limits(bpe_sample_bytes=store.train.num_bytes // 2)
    sampled = prepare([source], tmp_path / "sampled", tokenizer="bpe:278", validation_fraction=0.3, limits=limits)
    lengths = np.cumsum([0, *map(len, train)])
    half = [text for text, before in zip(train, lengths, strict=False) if before < store.train.num_bytes // 2]
    assert sampled.tokenizer == train_bpe(half, 278)


def test_long_documents_are_encoded_in_blocks(tmp_path):
    text = "".join(f"word{number % 89} isn't, {number}:\n" + " \n\t x" * (number % 5) for number in range(900))
    (tmp_path / "long.txt").write_text(text)
    tokenizer = train_bpe([text], 370)
    tokenizer.save(tmp_path)
    whole = tokenizer.encode(text[: int(len(text) * 0.9)]).tolist()
    options = {"tokenizer": f"hf:{tmp_path}", "validation_fraction": 0.1}
    for size in (40, 1000):
        blocks = list(split_blocks([text], size))
        assert "".join(blocks) == text
        assert len(blocks) > 5
        assert max(map(len, blocks)) <= 2 * size + 1
        for parts in (1, 7, 300, 5000):
            assert list(split_blocks((text[i : i + parts] for i in range(0, len(text), parts)), size)) == blocks
        limits = Limits(block_characters=size)
        store = prepare([str(tmp_path / "long.txt")], tmp_path / str(size), limits=limits, **options)
        assert documents_of(store.train) == [[tokenizer.eot_id, *whole]]


@pytest.mark.parametrize("text", ["nospacesatall" * 90, " " * 900, "漢" * 900, "\n" * 900, "a " * 450])
def test_blocks_are_bounded_in_any_text(text):
    blocks = list(split_blocks([text], 50))
    assert "".join(blocks) == text
    assert max(map(len, blocks)) <= 101
    assert list(split_blocks([], 50)) == list(split_blocks([""], 50)) == []


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
    assert [token_dtype(size) for size in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def test_manifest_says_where_the_tokens_came_from(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 100)
    store = prepare([str(tmp_path / "a.txt")], tmp_path / "store")
    path = str(tmp_path / "a.txt")
    assert store.manifest["sources"] == [path]
    assert store.manifest["source_sha256"] == {path: "d9f5aeb06abebb3be3f38adec9a2e3b94228d52193be923eb4e24c9b56ee0930"}
    assert store.manifest["request"]["files"] == [
        [path, "", 300, str((tmp_path / "a.txt").stat().st_mtime_ns), "", path, ""]
    ]


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
    assert [file.key for file in find_sources(["python-stdlib"])[0]] == kept
    for name in kept:
        (tmp_path / name).unlink()
    (tmp_path / "copy_of_a.py").unlink()
    with pytest.raises(ValueError, match=r"no \.py files under .*use a Python with sources"):
        find_sources(["python-stdlib"])
