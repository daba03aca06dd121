"""Reads the documents of a unit of work block by block, each block with the split of its document."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

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
    """Choice of the held-out documents: by hash, or the tail of the corpus. Files with a fixed split keep it."""

    fraction: float  # of the documents, or of the bytes
    tail_start: int | None = None  # UTF-8 bytes of the corpus before its held-out tail; None: split by hash


class TextBlock(NamedTuple):
    """Consecutive text of one document in one split."""

    document: int  # number of the document among those that were read together
    file: SourceFile
    split: str
    first: bool  # True if the document starts here in this split
    text: str


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


def read_documents(unit: Unit, text_field: str) -> Iterator[tuple[SourceFile, Document]]:
    """Yields (file, document) of each document of a unit.

    Raises:
      ValueError: a file that its format cannot read; names the file, and the line where there are lines.
    """
    for piece in unit:
        with naming(piece.file.path):
            reader = FORMATS[piece.file.format].documents
            for document in reader(piece.file.path, piece.start, piece.stop, text_field):
                if isinstance(document, bytes | Mapping) or not isinstance(document, str | Iterable):
                    reads = f"its reader {reader.__name__} yields a {type(document).__name__}"
                    raise ValueError(f"{reads}: yield each document as a str, or as an iterable of strs")
                yield piece.file, document


def read_blocks(
    documents: Iterable[tuple[SourceFile, Document]], rule: SplitRule, offset: int, size: int
) -> Iterator[TextBlock]:
    """Yields blocks of about `size` characters; an empty document has none.

    Args:
      rule: by hash, or by position; the document in which the tail starts is cut in two.
      offset: UTF-8 bytes of document text that come before these documents in the corpus.
    """
    for number, (file, document) in enumerate(documents):
        if file.split or rule.tail_start is None:
            split = file.split or (VALIDATION if hash_document(file.key, document)[0] < rule.fraction else TRAIN)
            parts: Iterable[tuple[str, str]] = ((split, text) for text in _parts(document))
        else:
            parts = _cut_at(document, rule.tail_start - offset)
            offset += hash_document(file.key, document)[1]
        for split, group in groupby(parts, key=itemgetter(0)):
            for index, text in enumerate(split_blocks((text for _, text in group), size)):
                yield TextBlock(number, file, split, index == 0, text)


def choose_split(units: Sequence[Unit], text_field: str, fraction: float) -> tuple[SplitRule, list[int]]:
    """Returns a split by hash if that gives both splits documents, otherwise one by position.

    Reads documents only until both splits have one. Files with a fixed split are not read.

    Returns:
      The rule and, for a split by position, the UTF-8 bytes of document text in each unit.

    Raises:
      ValueError: too little text for two splits.
    """
    sizes, splits = [], set()
    if any(piece.file.split for unit in units for piece in unit):
        return SplitRule(fraction), []
    for unit in units:
        sizes.append(0)
        for file, document in read_documents(unit, text_field):
            hashed, num_bytes = hash_document(file.key, document)
            sizes[-1] += num_bytes
            if num_bytes:
                splits.add(hashed < fraction)
            if len(splits) == 2:
                return SplitRule(fraction), []
    num_bytes = sum(sizes)
    if num_bytes == 0:
        raise ValueError("the sources hold no text: every file or document in them is empty")
    tail_start = int(num_bytes * (1 - fraction))
    if not 0 < tail_start < num_bytes:
        raise ValueError(f"{num_bytes} bytes are too few to hold out {fraction:g}: add text, or hold out more")
    return SplitRule(fraction, tail_start), sizes


def _parts(document: Document) -> Iterable[str]:
    return (document,) if isinstance(document, str) else document


def _cut_at(document: Document, position: int) -> Iterator[tuple[str, str]]:
    """Yields (split, text) of a document's parts, cut at a position in UTF-8 bytes or the start of its character."""
    for text in _parts(document):
        data = text.encode("utf-8")
        cut = min(max(position, 0), len(data))
        while 0 < cut < len(data) and data[cut] & 0xC0 == 0x80:  # inside a character
            cut -= 1
        position -= len(data)
        if cut > 0:
            yield TRAIN, data[:cut].decode("utf-8")
        if cut < len(data):
            yield VALIDATION, data[cut:].decode("utf-8")


def hash_document(key: str, document: Document) -> tuple[float, int]:
    """Returns a number in [0, 1], the head of the SHA-256 of the key or else of the text, and the text's bytes."""
    digest, num_bytes = hashlib.sha256(key.encode("utf-8")), 0
    for part in _parts(document):
        data = part.encode("utf-8")
        num_bytes += len(data)
        if not key:
            digest.update(data)
    return int.from_bytes(digest.digest()[:8], "big") / 2**64, num_bytes


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
