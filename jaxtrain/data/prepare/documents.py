"""Reads documents out of source files, a unit of work at a time, and says which split each belongs to."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jaxtrain.data.prepare.sources import SourceFile

TRAIN, VALIDATION = SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Piece:
    """A file, or the lines of a .jsonl file whose first byte lies in [start, stop)."""

    file: SourceFile
    start: int
    stop: int


Unit = tuple[Piece, ...]


@dataclass(frozen=True)
class SplitRule:
    """Which documents are held out: those whose hash is small, or the corpus's tail."""

    fraction: float  # of the documents, or of the bytes
    tail_start: int | None = None  # UTF-8 bytes of the corpus before its held-out tail; None: split by hash


def plan_units(files: Sequence[SourceFile], unit_bytes: int) -> list[Unit]:
    """Cuts a corpus into units of about `unit_bytes` of input: groups of files, or line ranges of a plain .jsonl."""
    pieces = []
    for file in files:
        step = unit_bytes if file.is_jsonl and not file.is_gzip else max(file.size, 1)
        pieces += [Piece(file, start, min(start + step, file.size)) for start in range(0, file.size, step)]
    units, unit, size = [], [], 0
    for piece in pieces:
        if unit and size + piece.stop - piece.start > unit_bytes:
            units.append(tuple(unit))
            unit, size = [], 0
        unit.append(piece)
        size += piece.stop - piece.start
    return [*units, tuple(unit)] if unit else units


def read_documents(unit: Unit, text_field: str) -> Iterator[tuple[str, str]]:
    """Yields (key, text) of each non-empty document of a unit; the key's hash decides the split.

    Raises:
      ValueError: not UTF-8, a damaged .gz, a line that is not JSON or lacks the field; names file and line.
    """
    for piece in unit:
        for text in _jsonl_texts(piece, text_field) if piece.file.is_jsonl else [_whole_text(piece.file)]:
            if text:
                yield piece.file.key or text, text


def assign_splits(documents: Iterable[tuple[str, str]], rule: SplitRule, offset: int) -> Iterator[tuple[str, str]]:
    """Yields (split, text) for each (key, text).

    Args:
      documents: as `read_documents` yields them.
      rule: by hash, or by position: the document in which the tail starts is then cut in two.
      offset: UTF-8 bytes of document text that come before these in the corpus.
    """
    for key, text in documents:
        if rule.tail_start is None:
            yield (VALIDATION if hash_fraction(key) < rule.fraction else TRAIN), text
            continue
        data = text.encode("utf-8")
        cut = min(max(rule.tail_start - offset, 0), len(data))
        while 0 < cut < len(data) and data[cut] & 0xC0 == 0x80:  # inside a character
            cut -= 1
        offset += len(data)
        if cut > 0:
            yield TRAIN, data[:cut].decode("utf-8")
        if cut < len(data):
            yield VALIDATION, data[cut:].decode("utf-8")


def hash_fraction(key: str) -> float:
    """A number in [0, 1] that is a fixed, evenly spread function of the key: the head of its SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big") / 2**64


def _whole_text(file: SourceFile) -> str:
    with _open(file) as stream:
        try:
            return stream.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file.path} is not UTF-8 text (byte {error.start}): convert it (iconv -t utf-8) or leave it out"
            ) from None
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(file, error) from None


def _jsonl_texts(piece: Piece, text_field: str) -> Iterator[str]:
    file, position = piece.file, piece.start
    with _open(file) as stream:
        try:
            if position > 0:  # a line belongs to the piece that has its first byte
                stream.seek(position - 1)
                position += len(stream.readline()) - 1
            # A .gz is one piece, whose `stop` counts compressed bytes: it is read to its end.
            while file.is_gzip or position < piece.stop:
                line = stream.readline()
                if not line:
                    return
                if line.strip():
                    yield _json_text(file, position, line, text_field)
                position += len(line)
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(file, error) from None


def _json_text(file: SourceFile, position: int, line: bytes, text_field: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
        if not isinstance(record, dict) or text_field not in record:
            fields = ", ".join(record) if isinstance(record, dict) else f"{type(record).__name__}, not an object"
            raise ValueError(f"it has no field {text_field!r} (it has: {fields}); set text_field")
        text = record[text_field]
        if not isinstance(text, str):
            raise ValueError(f"its field {text_field!r} is {type(text).__name__}, not text; set text_field")
        text.encode("utf-8")  # an escaped half of a surrogate pair is JSON, but not text
        return text
    except (ValueError, RecursionError) as error:
        number = _line_number(file, position)
        raise ValueError(f"{file.path} line {number} cannot be used: {error}; correct or remove the line") from None


def _line_number(file: SourceFile, position: int) -> int:
    """Number (from 1) of the line that starts at a byte position of the uncompressed file."""
    number = 1
    with _open(file) as stream:
        while position > 0:
            data = stream.read(min(position, 1 << 20))
            number += data.count(b"\n")
            position -= len(data)
    return number


def _open(file: SourceFile):
    return gzip.open(file.path, "rb") if file.is_gzip else open(file.path, "rb")


def _unreadable(file: SourceFile, error: Exception) -> ValueError:
    return ValueError(f"{file.path} cannot be read: {error}; replace the file or leave it out")
