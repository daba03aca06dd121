"""Formats of source files: every usual name and shape of the same documents, damaged files, and files left out."""

import bz2
import codecs
import csv
import functools
import gzip
import io
import json
import lzma
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from format_helpers import JSON_LINES, RECORDS, TEXTS, read

from jaxtrain.cli import main
from jaxtrain.data.prepare.documents import plan_units, read_documents
from jaxtrain.data.prepare.formats import FORMATS
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.prepare.sources import find_sources

BOM = codecs.BOM_UTF8


def table(delimiter: str) -> bytes:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows([["id", "text"], *enumerate(TEXTS)])
    return stream.getvalue().encode()


SHAPES = {
    "lines.jsonl": JSON_LINES.encode(),
    "lines.JSONL": JSON_LINES.encode(),
    "lines.ndjson": JSON_LINES.encode(),
    "lines.jsonlines": JSON_LINES.encode(),
    "lines.jl": JSON_LINES.encode(),
    "lines.json": JSON_LINES.encode(),
    "lines": JSON_LINES.encode(),
    "no_end.jsonl": JSON_LINES.rstrip().encode(),
    "crlf.jsonl": JSON_LINES.replace("\n", "\r\n").encode(),
    "blank_lines.jsonl": b"\n \n" + JSON_LINES.replace("\n", "\n\n").encode(),
    "strings.jsonl": "".join(json.dumps(text) + "\n" for text in TEXTS).encode(),
    "mark.jsonl": BOM + JSON_LINES.encode(),
    "mark.json": BOM + json.dumps(RECORDS).encode(),
    "mark.csv": BOM + table(","),
    "semicolons.csv": table(";"),
    "nulls.jsonl": JSON_LINES.replace('"text": ""', '"text": null').encode(),
    "nulls.json": json.dumps(RECORDS).replace('"text": ""', '"text": null').encode(),
    "array.json": json.dumps(RECORDS).encode(),
    "array.jsonl": json.dumps(RECORDS).encode(),
    "array.Json": b" \n" + json.dumps(RECORDS).encode() + b"\n ",
    "indented.json": json.dumps(RECORDS, indent=2).encode(),
    "strings.json": json.dumps(TEXTS).encode(),
    "values.json": "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode(),
    "values.jsonl": "".join(json.dumps(record, indent=2) for record in RECORDS).encode(),
    "table.csv": table(","),
    "table.CSV": table(","),
    "table.tsv": table("\t"),
    "table.tab": table("\t"),
    "table.psv": table("|"),
    "tabs.csv": table("\t"),
    "rotated.jsonl.1": JSON_LINES.encode(),
    "copy.csv.bak~": table(","),
}


COMPRESSIONS = {".gz": gzip.compress, ".GZ": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}


@pytest.mark.parametrize("name", SHAPES)
def test_usual_names_and_shapes_of_records(name, tmp_path):
    for suffix, compress in COMPRESSIONS.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(compress(SHAPES[name]))
        assert read(path) == TEXTS, suffix
    assert read(path, unit_bytes=50) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a", "a.unknown", "a.csv.txt", "a.jsonl.txt"])
def test_other_files_are_one_document(name, tmp_path):
    for data in ("plain\r\ntext é".encode(), b'{"text": "not a record here"} at all', b"[1] a list\n", b"a\0b"):
        path = tmp_path / name
        for suffix, compress in COMPRESSIONS.items():
            for mark in (b"", BOM):
                Path(f"{path}{suffix}").write_bytes(compress(mark + data))
                assert read(Path(f"{path}{suffix}")) == [data.decode()]


def test_compression_goes_by_content(tmp_path):
    lzma_alone, zstd = functools.partial(lzma.compress, format=lzma.FORMAT_ALONE), zstandard.compress
    named = (("a.jsonl.gzip", gzip.compress), ("a.jsonl.gz.2", bz2.compress), ("a.JSONL.lzma", lzma_alone))
    named += (("a.txt", gzip.compress), ("b.jsonl", lzma.compress), ("c", bz2.compress), ("a.jl.zstd", zstd))
    for name, compress in named:
        (tmp_path / name).write_bytes(compress(JSON_LINES.encode()))
        assert read(tmp_path / name) == ([JSON_LINES] if name == "a.txt" else TEXTS)
    two = gzip.compress(b"one ") + gzip.compress(b"two")
    (tmp_path / "two.txt.gz").write_bytes(two)
    assert read(tmp_path / "two.txt.gz") == ["one two"]


GZIP = gzip.compress(JSON_LINES.encode() * 9)


BAD = {
    "latin.txt": (b"caf\xe9", r"is not UTF-8 text \(byte 3\): convert it"),
    "cut.txt": ("漢".encode()[:2], r"is not UTF-8 text \(byte 0\)"),
    "latin.txt.gz": (gzip.compress(b"caf\xe9"), r"is not UTF-8 text \(byte 3\): convert it"),
    "latin.csv": (b"text\ncaf\xe9\n", r"is not UTF-8 text \(line 1 or later\)"),
    "latin.json": (b'[{"text":\n "\xe9"}]', r"is not UTF-8 text \(byte 12\)"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"line 2 cannot be used: .*utf-8"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": \n', r"line 3 cannot be used: .*remove the line"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b", "id": 1}\n', r"line 2 .*no field 'text' \(it has: body, id\)"),
    "field.json": (b'[{"text": "a"}, {"body": "b"}]', r"record 2 .*no field 'text' \(it has: body\); set text_field"),
    "field.csv": (b"id,body\n1,a\n", r"has no column 'text' \(it has: id, body\); set text_field"),
    "list.jsonl": (b'{"text": "a"}\n["text"]\n', r"line 2 .*no field 'text' \(it has: list, not an object\)"),
    "list.json": (b"[[1]]", r"record 1 .*\(it has: list, not an object\)"),
    "object.json": (b'{"name": "x"}', r"line 1 .*no field 'text' \(it has: name\)"),
    "number.jsonl": (b'{"text": 7}\n', r"line 1 .*field 'text' is int, not text"),
    "digits.jsonl": (b'{"text": "a", "n": ' + b"9" * 5_000 + b"}\n", "line 1 cannot be used"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', r"line 1 .*surrogate"),
    "surrogate.json": (b'["\\ud800"]\n', r"record 1 .*surrogate"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", "line 1 cannot be used"),
    "deep.json": (b"[" * 100_000, "is not JSON after record 0"),
    "cut.json": (json.dumps(RECORDS).encode()[:-1], r"is not JSON: no ',' or ']' after record 8"),
    "cut_string.json": (b'["a", "b', "is not JSON after record 1: Unterminated string"),
    "comma.json": (b'["a",, "b"]', "is not JSON after record 1"),
    "no_comma.json": (b'["a" "b"]', r"is not JSON: no ',' or ']' after record 1"),
    "after.json": (b'["a"] "b"', "is not JSON: text after the array"),
    "words.json": (b"these are words", "is not JSON after record 0"),
    "short_row.csv": (b"id,text\n1,a\n2\n", "line 3 has 1 columns, the header 2: fix it"),
    "quote.csv": (b'text\n"a', r"line 2 cannot be used: .*correct the line"),
    "damaged.txt.gz": (gzip.compress(b"hello" * 100)[:-9], r"cannot be read: .*replace the file"),
    "damaged.jsonl.gz": (GZIP[:-9], "cannot be read"),
    "flipped.jsonl.gz": (GZIP[:60] + bytes([GZIP[60] ^ 255]) + GZIP[61:], "cannot be read|cannot be used"),
    "damaged.txt.xz": (lzma.compress(b"hello" * 100)[:-9], "cannot be read"),
    "damaged.txt.bz2": (bz2.compress(b"hello" * 100)[:-9], "cannot be read"),
    "plain.gz": (b"not packed", "is not a gzip file, as its name says: rename it or replace it"),
    "plain.txt.xz": (b"not packed", "is not a xz file"),
    "plain.bz2": (b"BZhello", "is not a bzip2 file"),
    "plain.zst": (b"not packed", "is not a Zstandard file"),
    "utf16.txt": ("text".encode("utf-16"), r"is UTF-16 text: convert it \(iconv -f utf-16 -t utf-8\)"),
    "utf16.csv": ("text\na".encode("utf-16"), "is UTF-16 text"),
    "utf32.txt": (codecs.BOM_UTF32_LE + "text".encode("utf-32-le"), "is UTF-32 text"),
    "a.zip": (b"PK\x03\x04\x14\x00", "is a zip archive: unpack it, or leave it out"),
    "a.docx": (b"PK\x03\x04\x14\x00", "is a zip archive"),
    "a.pdf": (b"%PDF-1.7\n", "is a PDF: extract its text"),
    "a.png": (b"\x89PNG\r\n", "is an image"),
    "a.npy": (b"\x93NUMPY\x01", "is a numpy file"),
    "a.sqlite": (b"SQLite format 3\0", "is an SQLite database"),
    "empty.txt": (b"", "hold no text"),
    "mark.txt": (BOM, "hold no text"),
    "empty.csv": (b"", "hold no text"),
    "empty_array.json": (b"[]", "hold no text"),
    "empty.gz": (gzip.compress(b""), "hold no text"),
    "two_columns.csv": (b"text,text\na,b\n", "has 2 columns 'text': rename all but one"),
    "twice.jsonl.gz": (gzip.compress(GZIP), "is compressed twice: unpack it once, or leave it out"),
    "pointer.txt": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is a pointer of Git LFS: fetch the file",
    ),
    "no_mark.txt": ("text".encode("utf-16-le"), r"is binary, or UTF-16 text without a mark: convert it \(iconv"),
    "tokens.bin": (bytes([7, 0]) * 50, "is binary"),
    "page.parquet": (b"<!DOCTYPE html>", "cannot be read: .*; replace the file or leave it out"),
    "crawl.warc": (b"WARC/1.0\r\n", "is a WARC archive: extract its text"),
    "blank.jsonl": (b'\n{"text": ""}\n', "hold no text"),
    "tiny.txt": (b"a", "1 bytes are too few to hold out 0.02"),
    "character.txt": ("漢".encode(), "the train split has no document: add text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, name):
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    named = "" if "hold no text" in message or "too few" in message or "split has no" in message else f"{name} "
    with pytest.raises(ValueError, match=named.replace(".", r"\.") + f"({message})"):
        prepare([str(tmp_path / name)], tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing is left behind


@pytest.mark.parametrize(
    ("name", "data", "module", "message"),
    [
        ("a.parquet", b"PAR1....", "pyarrow.parquet", r"is a Parquet file: pip install 'jaxtrain\[parquet\]'"),
        ("a.bin", b"PAR1....", "pyarrow.parquet", r"is a Parquet file: pip install 'jaxtrain\[parquet\]'"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd..", "zstandard", r"is a Zstandard file: pip install 'jaxtrain\[zstd\]'"),
        ("a.txt", b"\x28\xb5\x2f\xfd..", "zstandard", r"is a Zstandard file: pip install 'jaxtrain\[zstd\]'"),
    ],
)
def test_a_missing_extra_is_named(name, data, module, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImportError, match=rf"{name} {message}"):
        prepare([str(tmp_path / name)], tmp_path / "store")
    assert main(["prepare", str(tmp_path / name), "--out", str(tmp_path / "store")]) == 1


def test_columns_of_parquet_and_arrow_files(tmp_path):
    """Every container and string type, by name or content, compressed or in row groups; nulls are empty documents."""
    strings = (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    for kind in (*strings, pyarrow.binary()):
        columns = {"id": list(range(len(TEXTS))), "text": pyarrow.array([*TEXTS[:3], None, *TEXTS[4:]]).cast(kind)}
        rows = pyarrow.table(columns)
        pyarrow.parquet.write_table(rows, tmp_path / "a.parquet", row_group_size=3)
        pyarrow.feather.write_feather(rows, tmp_path / "a.feather", chunksize=3)
        for name, writer in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
            with writer(str(tmp_path / name), rows.schema) as stream:
                stream.write_table(rows, 3)
        for name in ("a.parquet", "a.feather", "file.arrow", "stream.arrow"):
            data = (tmp_path / name).read_bytes()
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
            (tmp_path / "renamed.bin").write_bytes(data)
            for path in (name, f"{name}.gz", *(["renamed.bin"] if name != "stream.arrow" else [])):
                for unit_bytes in (100_000, 50):
                    assert read(tmp_path / path, unit_bytes=unit_bytes) == TEXTS, path
            for field, message in (("body", r"no column 'body' \(it has: id, text\)"), ("id", "'id' is int, not text")):
                with pytest.raises(ValueError, match=f"{name} .*{message}; set text_field"):
                    read(tmp_path / name, field)
            (tmp_path / name).write_bytes(data[: len(data) // 2])
            with pytest.raises(ValueError, match=f"{name} cannot be read: .*; replace the file or leave it out"):
                read(tmp_path / name)


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def test_tars_of_text(tmp_path):
    members = {}
    for number, text in enumerate(TEXTS):
        base = f"./part/{number:04d}"
        members |= {f"{base}.cls": b"\xff", f"{base}.json": json.dumps({"text": text, "id": 1}).encode()}
        if number % 2:
            members |= {f"{base}.txt": text.encode(), f"{base}.json": b"{}", f"{base}.seg.png": b"\x89PNG"}
    members["._0001.txt"] = b"\0\5"
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz"), ("shard", "w")):
        write_tar(tmp_path / name, members, mode)
        assert read(tmp_path / name) == TEXTS, name
    members = {"1.txt.gz": gzip.compress(b"one"), "2.text.xz": lzma.compress(b"two"), "3.txt": b"three"}
    members |= {"4.json.bz2": bz2.compress(b'{"text": "four"}'), "5.txt.zst": zstandard.compress(b"five")}
    write_tar(tmp_path / "a.tar", members | {"5.png.gz": b"no gzip"})
    assert read(tmp_path / "a.tar") == ["one", "two", "three", "four", "five"]
    write_tar(tmp_path / "a.tar", {"1.body": b"mine", "1.txt": b"not mine"})
    assert read(tmp_path / "a.tar", "body") == ["mine"]
    cases = [
        (
            {"x/1.jpg": b"", "x/1.cls": b""},
            r"sample 'x/1' cannot be used: it has no file text, txt, .* \(it has: jpg, cls\)",
        ),
        ({"1.json": b'{"body": "a"}'}, r"sample '1' cannot be used: it has no field 'text'"),
        ({"1.txt": b"\xe9"}, "sample '1' cannot be used: .*utf-8"),
        ({"1.txt": b"a", "./1.txt": b"b"}, "sample '1' cannot be used: two of its files have the same suffix"),
        ({"1.txt": b"a", "1.txt.gz": gzip.compress(b"b")}, "sample '1' cannot be used: two of its files have the same"),
        ({"1.txt.gz": b"a"}, "has the member '1.txt.gz', which is not a gzip file, as its name says: rename it"),
        ({"1.txt.gz": gzip.compress(b"a")[:-9]}, "cannot be read: "),
    ]
    for members, message in cases:
        write_tar(tmp_path / "bad.tar", members)
        with pytest.raises(ValueError, match=rf"bad\.tar {message}"):
            read(tmp_path / "bad.tar")
    write_tar(tmp_path / "a.tar", {"1.txt": b"one"})
    data = (tmp_path / "a.tar").read_bytes()
    write_tar(tmp_path / "b.tar", {"2.txt": b"two"})
    (tmp_path / "two.tar").write_bytes(data + (tmp_path / "b.tar").read_bytes())
    assert read(tmp_path / "two.tar") == ["one", "two"]
    (tmp_path / "cut.tar").write_bytes(data[:1024] + data[:200])
    (tmp_path / "end.tar").write_bytes(data[:1024])
    (tmp_path / "body.tar").write_bytes(data[:600])
    (tmp_path / "damaged.tar").write_bytes(data[:1024] + b"\1" * 512 + data)
    (tmp_path / "words.tar").write_bytes(b"words " * 200)
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        link = tarfile.TarInfo("1.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    for name, message in (
        ("cut", "cannot be read"),
        ("words", "cannot be read"),
        ("link", "neither a file nor a fold"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.tar .*{message}"):
            read(tmp_path / f"{name}.tar")


def test_all_frames_of_a_zstandard_file_are_read(tmp_path):
    data = JSON_LINES.encode()
    frames = b"".join(zstandard.compress(data[i : i + 200]) for i in range(0, len(data), 200))
    for name in ("a.jsonl.zst", "a.ndjson"):
        (tmp_path / name).write_bytes(frames)
        assert read(tmp_path / name) == TEXTS
    for bad, message in ((frames[:-1], "it ends within a frame"), (frames + b"more", "Unknown frame descriptor")):
        (tmp_path / "bad.txt").write_bytes(bad)
        with pytest.raises(ValueError, match=rf"bad\.txt cannot be read: .*{message}"):
            read(tmp_path / "bad.txt")


def test_records_of_any_size_across_reads(tmp_path):
    texts = ["x" * size for size in (1, (1 << 22) - 30, 1 << 22, 9_000_000, 2)]
    (tmp_path / "a.json").write_text(json.dumps(texts))
    assert read(tmp_path / "a.json") == texts


def peak_megabytes(call) -> float:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_a_text_of_any_size_takes_bounded_memory(suffix, tmp_path):
    size, path = 48 << 20, tmp_path / f"text.txt{suffix}"
    with {"": open, ".xz": lzma.open}[suffix](path, "wb") as stream:
        for _ in range(size >> 20):
            stream.write(b"x" * (1 << 20))

    def call():
        ((_, document),) = read_documents(plan_units(find_sources([str(path)])[0], 1 << 25)[0], "text")
        assert [sum(map(len, document)) for _ in range(2)] == [size, size]

    assert peak_megabytes(call) < 30


@pytest.mark.parametrize(
    ("name", "start", "message"),
    [
        (".jsonl", b'{"text": "', "line 1 cannot be used: it has more than 1,000,000 bytes"),
        (".json", b'["', "record 1 has more than 1,000,000 characters"),
        (".csv", b"text\n", "line 2 has more than 1,000,000 characters"),
        (".tsv", b'text\n"' + b"line\n" * 300_000, "field larger than field limit"),
    ],
)
def test_a_record_that_is_too_large_is_refused_in_bounded_memory(name, start, message, tmp_path):
    path = tmp_path / f"a{name}.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(start)
        for _ in range(40):
            stream.write(b"x" * (1 << 20))

    def call():
        with pytest.raises(ValueError, match=message):
            list(FORMATS[name].documents(str(path), 0, None, "text", limit=1_000_000))

    assert peak_megabytes(call) < 45
