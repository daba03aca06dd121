"""Reads the documents of a unit of work block by block, each block with the split of its document."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from jaxtrain.data.prepare.formats import FORMATS
from jaxtrain.data.prepare.sources import SourceFile
from jaxtrain.data.prepare.streams import is_compressed, naming

TRAIN, VALIDATION = SPLITS = ("train", "validation")
# Between two words: after a lone line end, or before a lone space. Byte-level BPE never merges across either.
_WORD_END = re.compile(r"(?<=\S)(?:\n(?=\S)|(?= \S))")

Document = str | Iterable[str]  # a text, or the consecutive parts of a text too large to hold


@dataclass(frozen=True)
class Piece:
    """A file, or the documents of a splittable file that begin at the bytes [start, stop)."""

    file: SourceFile
    start: int
    stop: int | None  # None: the end of the file
    size: int  # bytes on disk


Unit = tuple[Piece, ...]


@dataclass(frozen=True)
class SplitRule:
    """Choice of the held-out documents: by hash, or the tail of the corpus."""

    fraction: float  # of the documents, or of the bytes
    tail_start: int | None = None  # UTF-8 bytes of the corpus before its held-out tail; None: split by hash


def plan_units(files: Sequence[SourceFile], unit_bytes: int) -> list[Unit]:
    """Cuts a corpus into units of about `unit_bytes` of input: groups of files, or ranges of a splittable file."""
    units, unit, size = [], [], 0
    for piece in (piece for file in files if file.size > 0 for piece in _cut_file(file, unit_bytes)):
        if unit and size + piece.size > unit_bytes:
            units.append(tuple(unit))
            unit, size = [], 0
        unit.append(piece)
        size += piece.size
    return [*units, tuple(unit)] if unit else units


def _cut_file(file: SourceFile, unit_bytes: int) -> list[Piece]:
    with naming(file.path):
        if file.size <= unit_bytes or not FORMATS[file.format].splittable or is_compressed(file.path):
            return [Piece(file, 0, None, file.size)]
    stops = [*range(unit_bytes, file.size, unit_bytes), file.size]
    return [Piece(file, start, stop, stop - start) for start, stop in zip([0, *stops], stops, strict=False)]


def read_documents(unit: Unit, text_field: str) -> Iterator[tuple[str, Document]]:
    """Yields (key, document) of each document of a unit; the hash of the key, or of the text, decides the split.

    Raises:
      ValueError: a file that its format cannot read; names the file, and the line where there are lines.
    """
    for piece in unit:
        with naming(piece.file.path):
            reader = FORMATS[piece.file.format].documents
            for document in reader(piece.file.path, piece.start, piece.stop, text_field):
                yield piece.file.key, document


def read_blocks(
    documents: Iterable[tuple[str, Document]], rule: SplitRule, offset: int, size: int
) -> Iterator[tuple[str, bool, str]]:
    """Yields (split, True if a document starts here, text) of blocks of about `size` characters.

    Args:
      documents: as `read_documents` yields them.
      rule: by hash, or by position; the document in which the tail starts is cut in two.
      offset: UTF-8 bytes of document text that come before these documents in the corpus.
      size: characters a block.
    """
    for (_, split), parts in groupby(_assign_splits(documents, rule, offset), key=itemgetter(0, 1)):
        for number, block in enumerate(split_blocks((text for _, _, text in parts), size)):
            yield split, number == 0, block


def _assign_splits(
    documents: Iterable[tuple[str, Document]], rule: SplitRule, offset: int
) -> Iterator[tuple[int, str, str]]:
    """Yields (document's number, split, text) of the parts of documents."""
    for number, (key, document) in enumerate(documents):
        parts = (document,) if isinstance(document, str) else document
        if rule.tail_start is None:
            split = VALIDATION if hash_fraction((key,) if key else parts) < rule.fraction else TRAIN
            yield from ((number, split, text) for text in parts)
            continue
        for text in parts:
            data = text.encode("utf-8")
            cut = min(max(rule.tail_start - offset, 0), len(data))
            while 0 < cut < len(data) and data[cut] & 0xC0 == 0x80:  # inside a character
                cut -= 1
            offset += len(data)
            if cut > 0:
                yield number, TRAIN, data[:cut].decode("utf-8")
            if cut < len(data):
                yield number, VALIDATION, data[cut:].decode("utf-8")


def hash_fraction(parts: Iterable[str]) -> float:
    """Returns a number in [0, 1], a fixed and evenly spread function of a text: the head of its SHA-256."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8"))
    return int.from_bytes(digest.digest()[:8], "big") / 2**64


def split_blocks(parts: Iterable[str], size: int) -> Iterator[str]:
    """Cuts a text, given in parts, into blocks of `size` to 2 `size` + 1 characters, each ending between two words.

    Byte-level BPE as `train_bpe` makes it gives the blocks the ids that it gives the whole text. A tokenizer whose
    tokens span words may differ by a token at a cut, as may any tokenizer where no word ends for `size` characters.
    """
    text, start = "", 0
    for part in parts:
        text, start = text[start:] + part, 0
        while len(text) - start > 2 * size + 1:
            found = _WORD_END.search(text, start + size, start + 2 * size + 1)
            end = found.end() if found else start + 2 * size
            yield text[start:end]
            start = end
    while len(text) - start > size and (found := _WORD_END.search(text, start + size)):
        yield text[start : found.end()]
        start = found.end()
    if start < len(text):
        yield text[start:]
