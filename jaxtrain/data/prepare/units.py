"""The passes over one unit of a corpus, `scan_unit` and `encode_unit`, and the join of all units into shards."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.data.prepare.documents import SPLITS, TRAIN, SplitRule, Unit, read_blocks, read_documents
from jaxtrain.data.store import STORE_DTYPES, documents_file, shard_file
from jaxtrain.data.tokenizer import load_tokenizer
from jaxtrain.runtime.files import sha256_file, sync

BATCH_CHARACTERS = 1 << 21
COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class UnitTask:
    """One unit to scan or to encode, with all that a worker needs to know."""

    unit: Unit
    number: int  # of the unit in the corpus
    rule: SplitRule
    text_field: str
    folder: str  # of the unfinished store: has the tokenizer, and `units`, where the unit's files go
    block_characters: int
    offset: int = 0  # UTF-8 bytes of document text before the unit
    dtype: str = "uint16"

    def blocks(self) -> Iterator[tuple[str, bool, str]]:
        """Yields the unit's blocks of text as `read_blocks` does."""
        documents = read_documents(self.unit, self.text_field)
        return read_blocks(documents, self.rule, self.offset, self.block_characters)


def unit_file(folder: Path, number: int, split: str, suffix: str) -> Path:
    """Returns the path of a unit's token file (`bin`) or of its document starts (`npy`)."""
    return folder / f"{number:06d}.{split}.{suffix}"


def token_dtype(vocab_size: int) -> str:
    """Returns the smallest dtype that stores the ids of a vocabulary: uint16 or uint32."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def scan_unit(task: UnitTask) -> dict[str, Any]:
    """Reads a unit once.

    Returns:
      `num_bytes` and `num_documents` of each split, `num_empty` documents, and `sha256` of each file that starts in
      the unit.
    """
    counts = {split: {"num_bytes": 0, "num_documents": 0} for split in SPLITS}
    num_read = 0

    def documents():
        nonlocal num_read
        for document in read_documents(task.unit, task.text_field):
            num_read += 1
            yield document

    for split, first, text in read_blocks(documents(), task.rule, 0, task.block_characters):
        counts[split]["num_bytes"] += len(text.encode("utf-8"))
        counts[split]["num_documents"] += first
    paths = [piece.file.path for piece in task.unit if piece.start == 0]
    num_empty = num_read - sum(count["num_documents"] for count in counts.values())
    return {**counts, "num_empty": num_empty, "sha256": {path: sha256_file(Path(path)) for path in paths}}


def encode_unit(task: UnitTask) -> dict[str, Any]:
    """Writes a unit's tokens and document starts, one file a split; returns `num_tokens`, `num_bytes`, ... of each.

    Each document is the end-of-text token and then its tokens. Starts are in tokens from the unit's first.
    """
    tokenizer, folder = load_tokenizer(task.folder), Path(task.folder, "units")
    counts = {split: {"num_tokens": 0, "num_bytes": 0, "num_documents": 0} for split in SPLITS}
    starts: dict[str, list[int]] = {split: [] for split in SPLITS}
    dtype = STORE_DTYPES[task.dtype]
    boundary = np.array([tokenizer.eot_id], dtype).tobytes()
    files = {split: unit_file(folder, task.number, split, "bin") for split in SPLITS}
    with ExitStack() as stack:
        streams = {split: stack.enter_context(open(file, "wb")) for split, file in files.items()}
        for batch in _batches(task.blocks()):
            for (split, first, text), ids in zip(batch, tokenizer.encode_batch([b[2] for b in batch]), strict=True):
                count = counts[split]
                if first:
                    starts[split].append(count["num_tokens"])
                    streams[split].write(boundary)
                    count["num_tokens"] += 1
                    count["num_documents"] += 1
                streams[split].write(ids.astype(dtype).tobytes())
                count["num_tokens"] += len(ids)
                count["num_bytes"] += len(text.encode("utf-8"))
        for stream in streams.values():
            sync(stream)
    for split in SPLITS:
        with open(unit_file(folder, task.number, split, "npy"), "wb") as stream:
            np.save(stream, np.array(starts[split], np.int64), allow_pickle=False)
            sync(stream)
    return counts


def training_texts(tasks: Iterable[UnitTask], rate: float) -> Iterator[str]:
    """Yields blocks of the training split's text: an evenly spread share `rate` of them."""
    blocks = (text for task in tasks for split, _, text in task.blocks() if split == TRAIN)
    for number, text in enumerate(blocks, 1):
        if int(number * rate) > int((number - 1) * rate):
            yield text


def _batches(blocks: Iterable[tuple[str, bool, str]]) -> Iterator[list[tuple[str, bool, str]]]:
    """Groups blocks into lists of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for block in blocks:
        batch.append(block)
        size += len(block[2])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def join_units(
    folder: Path, split: str, counts: Sequence[dict], dtype: str, shard_tokens: int, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Joins the units' files of a split into shards and one file of document starts.

    Args:
      folder: of the store.
      split: its name.
      counts: results of `encode_unit`, in order.
      dtype: of the tokens.
      shard_tokens: tokens of every shard but the last.
      advance: called with the number of each unit that is copied.

    Returns:
      The split's part of the manifest.
    """
    starts, num_tokens = [], 0
    for number, count in enumerate(counts):
        starts.append(np.load(unit_file(folder / "units", number, split, "npy"), allow_pickle=False) + num_tokens)
        num_tokens += count[split]["num_tokens"]
    if num_tokens == 0:  # the whole text is less than a character each
        raise ValueError(f"the text is too small to split: the {split} split has no document; add text")
    with open(folder / documents_file(split), "wb") as stream:
        np.save(stream, np.concatenate(starts), allow_pickle=False)
        sync(stream)
    return {
        "num_tokens": num_tokens,
        "num_bytes": sum(count[split]["num_bytes"] for count in counts),
        "num_documents": sum(count[split]["num_documents"] for count in counts),
        "shards": _write_shards(folder, split, len(counts), STORE_DTYPES[dtype].itemsize, shard_tokens, advance),
        "documents_sha256": sha256_file(folder / documents_file(split)),
    }


def _write_shards(
    folder: Path, split: str, num_units: int, itemsize: int, shard_tokens: int, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Writes a split's shards; returns `num_tokens` and `sha256` of each."""

    def chunks() -> Iterator[tuple[int, bytes]]:  # shard number, bytes; no bytes span two shards
        position, shard_bytes = 0, shard_tokens * itemsize
        for number in range(num_units):
            with open(unit_file(folder / "units", number, split, "bin"), "rb") as stream:
                while data := stream.read(min(COPY_BYTES, shard_bytes - position % shard_bytes)):
                    yield position // shard_bytes, data
                    position += len(data)
            advance(number)

    shards = []
    for shard, parts in groupby(chunks(), key=lambda chunk: chunk[0]):
        digest, size = hashlib.sha256(), 0
        with open(folder / shard_file(split, shard), "wb") as stream:
            for _, data in parts:
                stream.write(data)
                digest.update(data)
                size += len(data)
            sync(stream)
        shards.append({"num_tokens": size // itemsize, "sha256": digest.hexdigest()})
    return shards
