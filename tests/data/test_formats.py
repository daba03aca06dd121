"""Formats of source files: every usual name and shape of the same documents, damaged files, and files left out."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import signal
import socket
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import pytest
from helpers import LIMIT, start, wait_until

from jaxtrain.cli import main
from jaxtrain.data.prepare.documents import plan_units, read_documents
from jaxtrain.data.prepare.formats import FORMATS, Format, find_format
from jaxtrain.data.prepare.passes import Limits
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.prepare.sources import find_sources
from jaxtrain.data.store import open_store

TEXTS = ["one", "two words\n" * 30, "é 漢字 👍", "", 'a "quoted", text', "line\r\nends\n", "\ufeffinner mark", "last"]
RECORDS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
JSON_LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
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
}
COMPRESSIONS = {".gz": gzip.compress, ".GZ": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}


def read(path: Path, text_field: str = "text", unit_bytes: int = 1 << 25) -> list[str]:
    units = plan_units(find_sources([str(path)])[0], unit_bytes)
    documents = [document for unit in units for _, document in read_documents(unit, text_field)]
    return [document if isinstance(document, str) else "".join(document) for document in documents]


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
    for name, compress in (("a.txt", gzip.compress), ("b.jsonl", lzma.compress), ("c", bz2.compress)):
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
    "short_row.csv": (b"id,text\n1,a\n2\n", "line 3 has 1 columns, the header 2: correct the line"),
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
    "a.tar.gz": (gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar\0" + bytes(249)), "is a tar archive: unpack it"),
    "a.sqlite": (b"SQLite format 3\0", "is an SQLite database"),
    "empty.txt": (b"", "hold no text"),
    "mark.txt": (BOM, "hold no text"),
    "empty.csv": (b"", "hold no text"),
    "empty_array.json": (b"[]", "hold no text"),
    "empty.gz": (gzip.compress(b""), "hold no text"),
    "blank.jsonl": (b'\n{"text": ""}\n', "hold no text"),
    "tiny.txt": (b"a", "1 bytes of text are too few to hold out 0.02"),
    "character.txt": ("漢".encode(), "the train split has no document; add text"),
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
    with pytest.raises(ImportError, match=rf"{name} {message}, or convert it"):
        prepare([str(tmp_path / name)], tmp_path / "store")
    assert main(["prepare", str(tmp_path / name), "--out", str(tmp_path / "store")]) == 1


class ParquetFile:
    """Stand-in of `pyarrow.parquet.ParquetFile`: two row groups of the texts, which begin at bytes 4 and 60."""

    schema_arrow = types.SimpleNamespace(names=["id", "text"])
    num_row_groups = 2

    def __init__(self, path):
        assert Path(path).read_bytes().startswith(b"PAR1")
        offsets = types.SimpleNamespace
        groups = [offsets(column=lambda _, start=start: offsets(data_page_offset=start)) for start in (4, 60)]
        self.metadata = offsets(row_group=lambda number: groups[number])

    def iter_batches(self, size, row_groups, columns):
        assert columns == ["text"]
        texts = {0: [*TEXTS[:3], None], 1: TEXTS[4:]}[row_groups[0]]
        yield types.SimpleNamespace(column=lambda _: types.SimpleNamespace(to_pylist=lambda: texts))


def test_parquet_is_read_by_row_groups(tmp_path, monkeypatch):
    module = types.ModuleType("pyarrow.parquet")
    module.ParquetFile = ParquetFile
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    for name in ("a.parquet", "a.bin"):
        (tmp_path / name).write_bytes(b"PAR1" + bytes(96))
        assert find_format(str(tmp_path / name)) == ".parquet"
        for unit_bytes in (1000, 50, 7):
            assert read(tmp_path / name, unit_bytes=unit_bytes) == TEXTS
        with pytest.raises(ValueError, match=r"has no column 'body' \(it has: id, text\)"):
            read(tmp_path / name, "body")


class ZstandardFrame:
    """Stand-in of `zstandard.ZstdDecompressor().decompressobj()`: a frame is magic, one length byte, content."""

    def __init__(self):
        self._data, self.eof, self.unused_data = b"", False, b""

    def decompressobj(self):
        return self

    def decompress(self, data):
        assert not self.eof
        self._data += data
        if not b"\x28\xb5\x2f\xfd".startswith(self._data[:4]):
            raise KeyError("zstd decompressor error")
        if len(self._data) < 5 or len(self._data) < 5 + self._data[4]:
            return b""
        end, self.eof = 5 + self._data[4], True
        self.unused_data = self._data[end:]
        return self._data[5:end]


def test_all_frames_of_a_zstandard_file_are_read(tmp_path, monkeypatch):
    module = types.ModuleType("zstandard")
    module.ZstdDecompressor, module.ZstdError = ZstandardFrame, KeyError
    monkeypatch.setitem(sys.modules, "zstandard", module)
    data = JSON_LINES.encode()
    frames = b"".join(
        b"\x28\xb5\x2f\xfd" + bytes([len(data[i : i + 200])]) + data[i : i + 200] for i in range(0, len(data), 200)
    )
    for name in ("a.jsonl.zst", "a.ndjson"):
        (tmp_path / name).write_bytes(frames)
        assert read(tmp_path / name) == TEXTS
    (tmp_path / "cut.txt").write_bytes(frames[:-1])
    with pytest.raises(ValueError, match=r"cut\.txt cannot be read: it ends within a frame"):
        read(tmp_path / "cut.txt")
    (tmp_path / "damaged.txt").write_bytes(frames + b"more")
    with pytest.raises(ValueError, match=r"damaged\.txt cannot be read: .*zstd decompressor error"):
        read(tmp_path / "damaged.txt")


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


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_a_text_of_any_size_takes_bounded_memory(suffix, tmp_path):
    size, path = 48 << 20, tmp_path / f"text.txt{suffix}"
    with {"": open, ".gz": gzip.open, ".xz": lzma.open}[suffix](path, "wb") as stream:
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


def test_a_folder_and_its_glob_have_the_same_files(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep" / "er").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt", "deep/er/c.txt"):
        (folder / name).write_text(name)
    (folder / "deep" / ".hidden").write_text("x")
    expected = [str(folder / name) for name in ("a.txt", "deep/b.txt", "deep/er/c.txt")]
    for sources in (["{}"], ["{}/*"], ["{}/**"], ["{}/", "{}/deep"], ["{}/**/*.txt"], ["{}/../folder"]):
        files, left_out = find_sources([source.format(folder) for source in sources])
        assert [file.path for file in files] == expected, sources
        if sources in (["{}"], ["{}/*"]):
            assert left_out == {"hidden": [str(folder / "deep" / ".hidden")]}


def test_links_are_followed_and_counted_once(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (elsewhere / "sub").mkdir(parents=True)
    data.mkdir()
    (elsewhere / "sub" / "x.txt").write_text("x")
    (tmp_path / "y.txt").write_text("y")
    (data / "folder").symlink_to(elsewhere)
    (data / "again").symlink_to(elsewhere)
    (data / "y.txt").symlink_to(tmp_path / "y.txt")
    (data / "y2.txt").symlink_to(tmp_path / "y.txt")
    (elsewhere / "up").symlink_to(data)
    (elsewhere / "sub" / "round").symlink_to(elsewhere / "sub")
    files, _ = find_sources([str(data)])
    assert sorted(Path(file.path).read_text() for file in files) == ["x", "y"]
    assert sorted(Path(file.path).read_text() for file in find_sources([f"{data}/**"])[0]) == ["x", "y"]


def test_left_out_files_are_counted_and_named(tmp_path, capfd):
    folder = tmp_path / "folder"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("x")
    (folder / ".env").write_text("x")
    (folder / "empty.txt").write_text("")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    (folder / "a.jsonl").write_text(JSON_LINES)
    store = prepare([str(folder)], tmp_path / "store", num_workers=1)
    line = "left out: 2 not regular (pipe, socket), 2 hidden (.env, .git), 1 empty (empty.txt), 1 empty documents\n"
    assert sorted(capfd.readouterr().err.split(", ")) == sorted(line.split(", "))
    assert store.manifest["left_out"] == {"hidden": 2, "not regular": 2, "empty": 1, "empty documents": 1}


@pytest.mark.parametrize("kind", ["broken link", "round link", "unreadable folder", "unreadable file"])
def test_unreadable_input_fails(kind, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text("a" * 100)
    if kind == "broken link":
        (folder / "b.txt").symlink_to(tmp_path / "missing")
        message = r"b\.txt is a link to .*missing, which cannot be opened: fetch the file or remove the link"
    elif kind == "round link":
        (folder / "b.txt").symlink_to(folder / "b.txt")
        message = r"b\.txt is a link to .*b\.txt, which cannot be opened"
    else:
        name = "inner" if kind == "unreadable folder" else "a.txt"
        message = rf"{name} cannot be read: .*Permission denied"
        target, function = (os, "scandir") if name == "inner" else ("builtins", "open")
        real = os.scandir if name == "inner" else open

        def refuse(path, *arguments, **options):  # the test may run as root, who may read everything
            if str(path).endswith(name):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(target if name == "inner" else __import__(target), function, refuse)
    for source in (str(folder), f"{folder}/*"):
        with pytest.raises(ValueError, match=message):
            prepare([source], tmp_path / "store")
    assert not (tmp_path / "store").exists()


PLUGIN = """
from helper_of_the_plugin import SEPARATOR
from jaxtrain.data.prepare.formats import FORMATS, Format
from jaxtrain.data.prepare.streams import open_stream

def pages(path, start, stop, text_field):
    with open_stream(path) as stream:
        yield from stream.read(4096).rstrip(b"\\0").decode().split(SEPARATOR)

FORMATS[".pages"] = Format(pages, file=__file__)
"""


def test_a_format_from_outside_reaches_the_command_and_its_workers(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(FORMATS, ".pages", FORMATS[""])  # restored after the test
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "helper_of_the_plugin.py").write_text('SEPARATOR = "\\f"\n')
    pages = [f"page {number} " + "of words " * (number % 5) for number in range(40)]
    for number in range(4):
        data = "\f".join(pages[number * 10 : number * 10 + 10]).encode()
        (tmp_path / f"{number}.pages").write_bytes(data)
        os.truncate(tmp_path / f"{number}.pages", 1 << 25)  # a unit each
    command = ["prepare", str(tmp_path / "*.pages"), "--out", str(tmp_path / "store"), "--validation-fraction", "0.2"]
    formats = ["--formats", str(tmp_path / "plugin.py")]
    assert main([*command, *formats, "--num-workers", "2"]) == 0
    store = open_store(tmp_path / "store")
    assert store.train.num_documents + store.validation.num_documents == 40
    assert store.train.num_bytes + store.validation.num_bytes == sum(map(len, pages))
    assert main([*command, *formats]) == 0  # the same request
    (tmp_path / "plugin.py").write_text(PLUGIN + "# changed\n")
    capfd.readouterr()
    assert main([*command, *formats]) == 2
    assert "is not the token store of this request" in capfd.readouterr().err
    assert main([*command, "--formats", "missing.py"]) == 2


def test_a_format_without_its_file_needs_one_process(tmp_path, monkeypatch):
    monkeypatch.setitem(
        FORMATS, ".rows", Format(lambda *arguments: FORMATS[".jsonl"].documents(*arguments), splittable=True)
    )
    (tmp_path / "a.rows").write_bytes(JSON_LINES.encode() * 3)
    options = {"limits": Limits(unit_bytes=100)}
    with pytest.raises(ValueError, match=r"format '\.rows' does not say .*pass Format\(file=__file__\)"):
        prepare([str(tmp_path / "a.rows")], tmp_path / "store", **options)
    prepare([str(tmp_path / "a.rows")], tmp_path / "store", num_workers=1, **options)


SLEEPER = """
import os, time
from jaxtrain.data.prepare.formats import FORMATS, Format

def sleep(path, start, stop, text_field):
    open(f"{path}.{os.getpid()}.worker", "w").close()
    time.sleep(120)
    yield "x"

FORMATS[".sleep"] = Format(sleep, file=__file__)
"""


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (15, 2))])
def test_workers_end_with_a_killed_prepare(number, tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    for name in "ab":
        with open(tmp_path / f"{name}.sleep", "wb") as stream:
            stream.truncate(1 << 25)
    command = [sys.executable, "-m", "jaxtrain.cli", "prepare", str(tmp_path / "*.sleep"), "--num-workers", "2"]
    command += ["--out", str(tmp_path / "store"), "--formats", str(tmp_path / "sleeper.py")]
    process = start(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: len(list(tmp_path.glob("*.worker"))) == 2, process)
    workers = [int(path.name.split(".")[-2]) for path in tmp_path.glob("*.worker")]
    process.send_signal(number)
    error = process.communicate(timeout=LIMIT)[1]
    wait_until(lambda: not any(map(is_alive, workers)))
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert error == "interrupted\n"
