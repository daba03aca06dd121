"""The two passes over one unit of a corpus: `scan_unit` counts and checks it, `encode_unit` writes its tokens."""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.data.prepare.documents import SPLITS, TRAIN, SplitRule, Unit, assign_splits, read_documents
from jaxtrain.data.store import DTYPES
from jaxtrain.data.tokenizer import load_tokenizer
from jaxtrain.runtime.files import sha256_file, sync

# The tokenizers library needs some 100 bytes of memory a byte of text: long documents are encoded block by block.
BLOCK_CHARACTERS = 1 << 18
BATCH_CHARACTERS = 1 << 21
# Between two words: after a lone line end, or before a lone space. Byte-level BPE never merges across either.
_WORD_END = re.compile(r"(?<=\S)(?:\n(?=\S)|(?= \S))")


@dataclass(frozen=True)
class EncodeTask:
    """One unit to encode, and all that a worker needs to know for it."""

    unit: Unit
    number: int  # of the unit in the corpus
    offset: int  # UTF-8 bytes of document text before the unit
    rule: SplitRule
    text_field: str
    folder: str  # of the unfinished store: has the tokenizer, and `units`, where the unit's files go
    dtype: str = "uint16"


@dataclass(frozen=True)
class ScanTask:
    """One unit to scan."""

    unit: Unit
    rule: SplitRule
    text_field: str


def unit_file(folder: Path, number: int, split: str, suffix: str) -> Path:
    """Path of a unit's token file (`bin`) or of its document starts (`npy`)."""
    return folder / f"{number:06d}.{split}.{suffix}"


def token_dtype(vocab_size: int) -> str:
    """Name of the smallest dtype that stores the ids of a vocabulary: uint16 or uint32."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def scan_unit(task: ScanTask) -> dict[str, Any]:
    """Reads a unit once: `num_bytes` and `num_documents` of each split, and `sha256` of each file that starts in it."""
    counts = {split: {"num_bytes": 0, "num_documents": 0} for split in SPLITS}
    for split, text in assign_splits(read_documents(task.unit, task.text_field), task.rule, 0):
        counts[split]["num_bytes"] += len(text.encode("utf-8"))
        counts[split]["num_documents"] += 1
    paths = [piece.file.path for piece in task.unit if piece.start == 0]
    return {**counts, "sha256": {path: sha256_file(Path(path)) for path in paths}}


def encode_unit(task: EncodeTask) -> dict[str, Any]:
    """Writes a unit's tokens and document starts, one file a split; returns `num_tokens`, `num_bytes`, ... of each.

    Each document is the end-of-text token and then its tokens. Starts are in tokens from the unit's first.
    """
    tokenizer, folder = load_tokenizer(task.folder), Path(task.folder, "units")
    counts = {split: {"num_tokens": 0, "num_bytes": 0, "num_documents": 0} for split in SPLITS}
    starts: dict[str, list[int]] = {split: [] for split in SPLITS}
    dtype = DTYPES[task.dtype]
    boundary = np.array([tokenizer.eot_id], dtype).tobytes()
    documents = assign_splits(read_documents(task.unit, task.text_field), task.rule, task.offset)
    files = {split: unit_file(folder, task.number, split, "bin") for split in SPLITS}
    with ExitStack() as stack:
        streams = {split: stack.enter_context(open(file, "wb")) for split, file in files.items()}
        for batch in _batches(documents):
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


def training_texts(tasks: Iterable[EncodeTask], rate: float) -> Iterator[str]:
    """Yields blocks of the training split's text: an evenly spread share `rate` of them."""
    number = 0
    for task in tasks:
        for split, text in assign_splits(read_documents(task.unit, task.text_field), task.rule, task.offset):
            for block in split_blocks(text, BLOCK_CHARACTERS) if split == TRAIN else ():
                number += 1
                if int(number * rate) > int((number - 1) * rate):
                    yield block


def split_blocks(text: str, size: int) -> Iterator[str]:
    """Cuts a text into blocks of `size` characters or a little more, each ending between two words; at least one.

    Byte-level BPE as `train_bpe` makes it gives the blocks the ids it gives the whole text; a tokenizer whose tokens
    span words may differ by a token at a cut.
    """
    start = 0
    while len(text) - start > size:
        end = _WORD_END.search(text, start + size)
        if end is None:
            break
        yield text[start : end.end()]
        start = end.end()
    yield text[start:]


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, bool, str]]]:
    """Groups (split, text) into lists of (split, whether a document starts here, block of text)."""
    batch, size = [], 0
    for split, text in documents:
        for number, block in enumerate(split_blocks(text, BLOCK_CHARACTERS)):
            batch.append((split, number == 0, block))
            size += len(block)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
