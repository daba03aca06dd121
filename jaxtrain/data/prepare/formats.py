"""Formats of source files: which reader a file gets, and the readers themselves.

To add a format, write a Python file that fills `FORMATS`, as CONTRIBUTING.md shows, and give it to `jaxtrain prepare
--formats FILE`. Every worker process runs that file before its first task, so the reader needs no pickling. The top of
a config file with `data.sources` may fill `FORMATS` in the same way.
"""

import codecs
import csv
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxtrain.data.prepare.streams import (
    CHUNK_BYTES,
    COMPRESSIONS,
    MAX_RECORD_BYTES,
    JsonReader,
    TextReader,
    is_compressed,
    open_stream,
)
from jaxtrain.data.prepare.tars import tar_samples
from jaxtrain.fields import is_url
from jaxtrain.runtime.extras import import_extra

HEAD_BYTES = 1 << 16  # read to recognize the format
_ROWS = 1024  # of a column, converted at a time


@dataclass(frozen=True)
class Format:
    """Reader of one kind of file.

    Attributes:
      documents: called as `documents(path, start, stop, text_field)`; yields the documents that begin at the bytes
        [start, stop) of the decompressed file, as texts or, above memory's size, as re-iterable sequences of texts. A
        ValueError says what is wrong with the file; its path is prepended.
      splittable: `documents` accepts any byte range; otherwise it is called once with `start` 0 and `stop` None. A
        compressed file is never split.
      file: `__file__` of the Python file that registers the format, for worker processes; None for built-in formats.
    """

    documents: Callable[[str, int, int | None, str], Iterator[str | Iterable[str]]]
    splittable: bool = False
    file: str | None = None


def find_format(path: str) -> str:
    """Returns the key in `FORMATS` of a file's format.

    The longest suffix in `FORMATS` decides, in any case and before the suffixes of a compression, a copy or a part.
    The content distinguishes JSON lines from other JSON. Any other file is one text, unless its content is recognized.

    Raises:
      ValueError: an archive, an image or another file without text.
    """
    name = _TAIL.sub("", os.path.basename(path).lower())
    suffix = max((key for key in FORMATS if name.endswith(key)), key=len)
    if FORMATS[suffix] not in BUILT_IN:
        return suffix
    with open_stream(path) as stream:
        head = stream.read(HEAD_BYTES).removeprefix(codecs.BOM_UTF8)
    if any(matches(head[:10]) for _, matches, _ in COMPRESSIONS.values()):
        raise ValueError("is compressed twice: unpack it once, or leave it out")
    for name_of, magic, offset in ((".parquet", b"PAR1", 0), (".arrow", b"ARROW1", 0), (".tar", b"ustar", 257)):
        if head[offset:].startswith(magic):
            return name_of
    for magics, what, remedy in _FOREIGN:
        if head.startswith(magics):
            raise ValueError(f"is {what}: {remedy}, or leave it out")
    if suffix not in _BINARY and 8 * head.count(0) > 3 * len(head):
        raise ValueError("is binary, or UTF-16 text without a mark: convert it (iconv -f utf-16le) or leave it out")
    first_line = head.lstrip().split(b"\n")[0].strip()
    if FORMATS[suffix].documents is _json_documents:
        return ".json" if first_line.startswith(b"[") or not _is_json(head, first_line) else ".jsonl"
    if FORMATS[suffix].documents is _line_documents:
        return ".json" if first_line.startswith(b"[") or first_line == b"{" else ".jsonl"
    if suffix or "." in name:
        return suffix
    if re.match(rb'\[\s*[{"]', head.lstrip()):
        return ".json"
    return ".jsonl" if first_line.startswith(b"{") and _is_json(head, first_line) else ""


@dataclass(frozen=True)
class _StreamedText:
    """Text of a file too large to hold; every iteration reads the file again."""

    path: str

    def __iter__(self) -> Iterator[str]:
        with open_stream(self.path) as stream:
            reader = TextReader(stream)
            while text := reader.read(CHUNK_BYTES):
                yield text


def _text_documents(path: str, start: int, stop: int | None, text_field: str) -> Iterator[str | Iterable[str]]:
    """Yields the whole file as one document."""
    with open_stream(path) as stream:
        reader = TextReader(stream)
        text = reader.read(CHUNK_BYTES)
        whole = reader.read(1) == ""
    yield text if whole else _StreamedText(path)


def _line_documents(
    path: str, start: int, stop: int | None, text_field: str, limit: int = MAX_RECORD_BYTES
) -> Iterator[str]:
    """Yields the documents of the JSON lines that begin in [start, stop)."""
    with open_stream(path) as stream:
        position = start
        if start > 0:  # a line belongs to the range that has its first byte
            stream.seek(start - 1)
            position -= 1
            while data := stream.readline(CHUNK_BYTES):
                position += len(data)
                if data.endswith(b"\n"):
                    break
        while stop is None or position < stop:
            line = stream.readline(limit + 1)
            if not line:
                return
            if line.strip():
                try:
                    if len(line) > limit:
                        raise ValueError(f"it has more than {limit:,} bytes")
                    yield _record_text(json.loads(line.decode("utf-8-sig")), text_field)
                except (ValueError, RecursionError) as error:
                    number = _count_lines(path, position) + 1
                    raise ValueError(f"line {number} cannot be used: {error}; correct or remove the line") from None
            position += len(line)


def _count_lines(path: str, position: int) -> int:
    """Returns the number of line ends before a byte position."""
    number = 0
    with open_stream(path) as stream:
        while data := stream.read(min(position, CHUNK_BYTES)):
            number += data.count(b"\n")
            position -= len(data)
    return number


def _json_documents(
    path: str, start: int, stop: int | None, text_field: str, limit: int = MAX_RECORD_BYTES
) -> Iterator[str]:
    """Yields the documents of the values of `json_values`."""
    for number, value in enumerate(json_values(path, limit), 1):
        try:
            yield _record_text(value, text_field)
        except ValueError as error:
            raise ValueError(f"record {number} cannot be used: {error}; correct or remove the record") from None


def json_values(path: str, limit: int = MAX_RECORD_BYTES) -> Iterator[Any]:
    """Yields the elements of a JSON array, or JSON values one after another, whatever their line breaks."""
    with open_stream(path) as stream:
        reader = JsonReader(stream, limit)
        if reader.take("["):
            while not reader.take("]"):
                yield reader.value()
                if not reader.take(",") and reader.peek() != "]":
                    raise ValueError(f"is not JSON: no ',' or ']' after record {reader.number}; correct the file")
            if reader.peek():
                raise ValueError("is not JSON: text after the array; correct the file")
        while reader.peek():
            yield reader.value()


def _record_text(record: Any, text_field: str) -> str:
    """Returns the text of a parsed record: the record itself if it is a string, else its field; null is empty text."""
    text = record
    if not isinstance(record, str):
        if not isinstance(record, dict) or text_field not in record:
            fields = ", ".join(record) if isinstance(record, dict) else f"{type(record).__name__}, not an object"
            raise ValueError(f"it has no field {text_field!r} (it has: {fields}); set text_field")
        text = record[text_field]
        if text is None:
            return ""
        if isinstance(text, bytes):  # a binary column, as Spark writes text
            return text.decode("utf-8")
        if not isinstance(text, str):
            raise ValueError(f"its field {text_field!r} is {type(text).__name__}, not text; set text_field")
    text.encode("utf-8")  # an escaped half of a surrogate pair is JSON, but not text
    return text


def _table_documents(
    delimiter: str, path: str, start: int, stop: int | None, text_field: str, limit: int = MAX_RECORD_BYTES
) -> Iterator[str]:
    """Yields one column of a table."""
    rows = table_rows(path, delimiter, text_field, limit)
    header = next(rows, [])
    require_columns(header, [text_field])
    column = header.index(text_field)
    yield from (row[column] for row in rows)


def table_rows(
    path: str, delimiter: str, text_field: str | None = None, limit: int = MAX_RECORD_BYTES
) -> Iterator[list[str]]:
    """Yields the header and the rows of a table with a header line, quoted as in RFC 4180; no blank ones."""
    csv.field_size_limit(limit)
    with open_stream(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        lines = _table_lines(text, limit)
        first = next(lines, "")
        delimiter = _find_delimiter(first, delimiter, text_field)
        rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            yield header
            for row in filter(None, rows):
                if len(row) != len(header):
                    raise ValueError(f"line {rows.line_num} has {len(row)} columns, the header {len(header)}: fix it")
                yield row
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num} cannot be used: {error}; correct the line") from None


def _find_delimiter(header: str, delimiter: str, text_field: str | None) -> str:
    """Returns another delimiter if the usual one leaves the header whole; spreadsheets of many languages use `;`."""
    columns = next(csv.reader([header], delimiter=delimiter), [])
    if len(columns) > 1 or columns == [text_field]:
        return delimiter
    return next((other for other in ",;\t|" if other in header), delimiter)


def _table_lines(text: io.TextIOWrapper, limit: int) -> Iterator[str]:
    number = 1
    try:
        while line := text.readline(limit + 1):
            if len(line) > limit:
                raise ValueError(f"line {number} has more than {limit:,} characters: cut it")
            yield line
            number += 1
    except UnicodeDecodeError:
        raise ValueError(f"is not UTF-8 text (line {number} or later): convert it (iconv -t utf-8)") from None


def _column_documents(
    read: Callable[..., Iterator[dict[str, Any]]], path: str, start: int, stop: int | None, text_field: str
) -> Iterator[str]:
    """Yields one column of a Parquet or Arrow file."""
    for row in read(path, lambda names: require_columns(names, [text_field]), start, stop):
        yield _record_text(row, text_field)


def parquet_rows(
    path: str, choose: Callable[[list[str]], list[str]], start: int = 0, stop: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the rows of the row groups whose first byte lies in [start, stop); `choose` gets all names of columns."""
    library = import_extra("pyarrow.parquet", "parquet", "is a Parquet file")
    with open_seekable(path) as stream, library.ParquetFile(stream) as file:
        columns = choose(file.schema_arrow.names)
        for group in range(file.num_row_groups):
            first = file.metadata.row_group(group).column(0).data_page_offset
            if start <= first and (stop is None or first < stop):
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
                    yield from batch.to_pylist()


def arrow_rows(path: str, choose: Callable[[list[str]], list[str]], *_: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of an Arrow IPC file (also Feather) or stream, as Hugging Face datasets are stored."""
    library = import_extra("pyarrow", "parquet", "is an Arrow file")
    with open_seekable(path) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        with (library.ipc.open_file if is_file else library.ipc.open_stream)(stream) as reader:
            columns = choose(reader.schema.names)
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
                for first in range(0, len(batch), _ROWS):
                    yield from batch.select(columns).slice(first, _ROWS).to_pylist()


def open_seekable(path: str) -> Any:
    """Opens a file for pyarrow, not memory-mapped: a file that is cut short meanwhile would end the process."""
    library = import_extra("pyarrow", "parquet", "is an Arrow or Parquet file")
    if is_url(path) or is_compressed(path):
        return library.PythonFile(open_stream(path), mode="r")
    return library.OSFile(path)


def require_columns(names: list[str], wanted: list[str]) -> list[str]:
    """Returns the wanted columns of a table; raises a ValueError if one is missing or there are two of its name."""
    for name in wanted:
        if names.count(name) > 1:
            raise ValueError(f"has {names.count(name)} columns {name!r}: rename all but one")
        if name not in names:
            raise ValueError(f"has no column {name!r} (it has: {', '.join(names)}); set text_field")
    return wanted


def _tar_documents(path: str, start: int, stop: int | None, text_field: str) -> Iterator[str]:
    """Yields the text of each sample of a WebDataset tar.

    The text is the file with the suffix `text_field`, txt, text or md, or else that field of a JSON file.
    """
    suffixes = (text_field, "txt", "text", "md")
    with open_stream(path) as stream:
        for key, sample in tar_samples(stream, {*suffixes, "json"}):
            found = next((suffix for suffix in suffixes if suffix in sample), None)
            try:
                if found is None and "json" not in sample:
                    has = ", ".join(sample)
                    raise ValueError(f"it has no file {text_field}, txt, text, md or json (it has: {has})")
                yield _record_text(json.loads(sample["json"]), text_field) if found is None else sample[found].decode()
            except (ValueError, RecursionError) as error:
                raise ValueError(f"sample {key!r} cannot be used: {error}; correct or remove it") from None


def _is_json(head: bytes, first_line: bytes) -> bool:
    """Returns True if a file's first line is JSON, or longer than the file's head."""
    if len(head) == HEAD_BYTES and b"\n" not in head.lstrip():
        return True
    try:
        json.loads(first_line)
        return True
    except (ValueError, RecursionError):
        return False


_UNPACK, _EXTRACT = "unpack it", "extract its text"
# Magic bytes, description, remedy.
_FOREIGN: list[tuple[Any, str, str]] = [
    ((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32 text", "convert it (iconv -f utf-32 -t utf-8)"),
    ((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16 text", "convert it (iconv -f utf-16 -t utf-8)"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file (git lfs pull)"),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a", "a rar archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "a lz4 archive", _UNPACK),
    (b"\x1f\x9d", "a compress archive", _UNPACK),
    (b"%PDF-", "a PDF", _EXTRACT),
    (b"{\\rtf", "an RTF document", _EXTRACT),
    (b"\xd0\xcf\x11\xe0", "an Office document", _EXTRACT),
    (b"WARC/", "a WARC archive", _EXTRACT),
    (b"SQLite format 3\0", "an SQLite database", _EXTRACT),
    (b"\x89HDF", "an HDF5 file", _EXTRACT),
    (b"FEA1", "a Feather file of version 1", _EXTRACT),
    (b"\x93NUMPY", "a numpy file", _EXTRACT),
    (b"Obj\x01", "an Avro file", _EXTRACT),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), "an image", _EXTRACT),
    (b"\x7fELF", "a program", _EXTRACT),
]

FORMATS: dict[str, Format] = {
    "": Format(_text_documents),  # one document
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".jl"), Format(_line_documents, splittable=True)),
    ".json": Format(_json_documents),
    ".csv": Format(functools.partial(_table_documents, ",")),
    **dict.fromkeys((".tsv", ".tab"), Format(functools.partial(_table_documents, "\t"))),
    ".psv": Format(functools.partial(_table_documents, "|")),
    ".parquet": Format(functools.partial(_column_documents, parquet_rows), splittable=True),
    **dict.fromkeys((".arrow", ".feather"), Format(functools.partial(_column_documents, arrow_rows))),
    ".tar": Format(_tar_documents),
}
BUILT_IN = frozenset(FORMATS.values())
_BINARY = (".parquet", ".arrow", ".feather", ".tar")
# Suffixes of compressions, copies and parts after the suffix of the format.
_TAIL = re.compile(rf"(~|\.(bak|old|orig|tmp|[0-9]+|{'|'.join(suffix[1:] for suffix in COMPRESSIONS)}))+$")
