"""Tokens of one unit of a corpus, text to train a tokenizer on, and the join of all units into shards."""

import functools
import hashlib
import os
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxtrain.data.prepare.documents import SPLITS, TRAIN, SplitRule, TextBlock, Unit, read_blocks, read_documents
from jaxtrain.data.prepare.sources import content_hash
from jaxtrain.data.store import STORE_DTYPES, STORE_FORMAT, STORE_MANIFEST, documents_file, shard_file
from jaxtrain.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from jaxtrain.runtime.files import sha256_file, sync, write_sealed_json

BATCH_CHARACTERS = 1 << 21
COPY_BYTES = 1 << 24
COUNTS = ("num_tokens", "num_bytes", "num_documents")


@dataclass(frozen=True)
class UnitTask:
    """One unit to encode, with all that a worker needs to know."""

    unit: Unit
    number: int  # of the unit in the corpus
    rule: SplitRule
    text_field: str
    folder: str  # of the unfinished store, which has the tokenizer
    units: str  # folder of the units' files
    block_characters: int
    offset: int = 0  # UTF-8 bytes of document text before the unit, for a split by position
    dtype: str = "uint16"


def unit_file(folder: Path, number: int, split: str, suffix: str) -> Path:
    """Returns the path of a unit's token file (`bin`) or of its document starts (`npy`)."""
    return folder / f"{number:06d}.{split}.{suffix}"


def token_dtype(vocab_size: int) -> str:
    """Returns the smallest dtype that stores the ids of a vocabulary: uint16 or uint32."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_manifest(
    folder: Path, version: int, tokenizer: Tokenizer, splits: dict[str, Any], more: dict[str, Any]
) -> None:
    """Writes the manifest, which completes a store; `more` are its further values."""
    values = {"format": STORE_FORMAT, "version": version, "dtype": token_dtype(tokenizer.vocab_size)}
    values |= {"vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id}
    values |= {"tokenizer": {"sha256": tokenizer.fingerprint}, "splits": splits}
    write_sealed_json(folder / STORE_MANIFEST, values | more)


def encode_unit(task: UnitTask) -> dict[str, Any]:
    """Writes a unit's tokens and document starts, one file a split.

    Each document is the end-of-text token and then its tokens. Starts are in tokens from the unit's first.

    Returns:
      For each split, COUNTS by source; `num_empty` documents; `sha256` of each file that starts in the unit.
    """
    changed = os.stat(Path(task.folder, TOKENIZER_FILE)).st_mtime_ns
    tokenizer, units = _load_once(task.folder, changed), Path(task.units)
    counts: dict[str, dict[str, list[int]]] = {split: defaultdict(lambda: [0, 0, 0]) for split in SPLITS}
    starts = {split: array("q") for split in SPLITS}
    num_tokens, num_read, num_used, last = dict.fromkeys(SPLITS, 0), 0, 0, -1
    dtype = STORE_DTYPES[task.dtype]
    boundary = np.array([tokenizer.eot_id], dtype).tobytes()

    def documents():
        nonlocal num_read
        for document in read_documents(task.unit, task.text_field):
            num_read += 1
            yield document

    with ExitStack() as stack:
        streams = {
            split: stack.enter_context(_replace(unit_file(units, task.number, split, "bin"))) for split in SPLITS
        }
        blocks = read_blocks(documents(), task.rule, task.offset, task.block_characters)
        for batch in _batches(blocks):
            for block, ids in zip(batch, tokenizer.encode_batch([block.text for block in batch]), strict=True):
                split, stream = block.split, streams[block.split]
                if block.first:
                    starts[split].append(num_tokens[split])
                    stream.write(boundary)
                stream.write(ids.astype(dtype).tobytes())
                size = len(ids) + block.first
                num_tokens[split] += size
                count = counts[split][block.file.source]
                count[0] += size
                count[1] += len(block.text.encode("utf-8"))
                count[2] += block.first
                num_used, last = num_used + (block.document != last), block.document
    for split in SPLITS:
        with _replace(unit_file(units, task.number, split, "npy")) as stream:
            np.save(stream, np.frombuffer(starts[split], np.int64), allow_pickle=False)
    paths = [piece.file.path for piece in task.unit if piece.start == 0]
    found = {split: dict(counts[split]) for split in SPLITS}
    return {**found, "num_empty": num_read - num_used, "sha256": {path: content_hash(path) for path in paths}}


@functools.lru_cache(maxsize=1)
def _load_once(folder: str, changed: int) -> Tokenizer:
    """Loads the tokenizer for all units of a process, which then knows the words of the earlier ones."""
    return load_tokenizer(folder)


@contextmanager
def _replace(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears whole: a worker that outlives its parent may write the same one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with open(partial, "wb") as stream:
        yield stream
        sync(stream)
    os.replace(partial, path)


def training_texts(tasks: Sequence[UnitTask], max_bytes: int) -> Iterator[str]:
    """Yields about `max_bytes` of the training split's text in blocks: an equal share from the start of each unit."""
    total = sum(piece.size for task in tasks for piece in task.unit)
    for task in tasks:
        left = max_bytes * sum(piece.size for piece in task.unit) / total
        documents = read_documents(task.unit, task.text_field)
        for block in read_blocks(documents, task.rule, task.offset, task.block_characters):
            if block.split == TRAIN:
                if left <= 0:
                    break
                yield block.text
                left -= len(block.text)


def _batches(blocks: Iterable[TextBlock]) -> Iterator[list[TextBlock]]:
    """Groups blocks into lists of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for block in blocks:
        batch.append(block)
        size += len(block.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def join_units(
    folder: Path,
    units: Path,
    split: str,
    counts: Sequence[dict],
    dtype: str,
    shard_tokens: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Joins the units' files of a split into shards of `shard_tokens` and one file of document starts.

    `counts` are the results of `encode_unit`, in order. Returns the split's part of the manifest.
    """
    totals: dict[str, list[int]] = {}
    for count in counts:
        for source, values in count[split].items():
            totals[source] = [sum(pair) for pair in zip(totals.get(source, (0, 0, 0)), values, strict=True)]
    if not totals:  # the whole text is less than a character each
        raise ValueError(f"the {split} split has no document: add text")
    sums = dict(zip(COUNTS, (sum(column) for column in zip(*totals.values(), strict=True)), strict=True))
    with open(folder / documents_file(split), "wb") as stream:
        header = {"descr": "<i8", "fortran_order": False, "shape": (sums["num_documents"],)}
        np.lib.format.write_array_header_1_0(stream, header)
        first = 0
        for number, count in enumerate(counts):
            starts = np.load(unit_file(units, number, split, "npy"), allow_pickle=False)
            stream.write((starts + first).astype("<i8").tobytes())
            first += sum(values[0] for values in count[split].values())
        sync(stream)
    itemsize, shards = STORE_DTYPES[dtype].itemsize, []
    chunks = _chunks(units, split, len(counts), shard_tokens * itemsize, advance)
    for shard, parts in groupby(chunks, key=itemgetter(0)):
        digest, size = hashlib.sha256(), 0
        with open(folder / shard_file(split, shard), "wb") as stream:
            for _, data in parts:
                stream.write(data)
                digest.update(data)
                size += len(data)
            sync(stream)
        shards.append({"num_tokens": size // itemsize, "sha256": digest.hexdigest()})
    return {
        **sums,
        "sources": [{"source": source, **dict(zip(COUNTS, values, strict=True))} for source, values in totals.items()],
        "shards": shards,
        "documents_sha256": sha256_file(folder / documents_file(split)),
    }


def _chunks(
    units: Path, split: str, num_units: int, shard_bytes: int, advance: Callable[[int], None]
) -> Iterator[tuple[int, bytes]]:
    """Yields (number of the shard, bytes) of a split's tokens; no bytes span two shards."""
    position = 0
    for number in range(num_units):
        with open(unit_file(units, number, split, "bin"), "rb") as stream:
            while data := stream.read(min(COPY_BYTES, shard_bytes - position % shard_bytes)):
                yield position // shard_bytes, data
                position += len(data)
        advance(number)
