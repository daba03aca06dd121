"""Joins the token files of units into the shards of a store."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.data.store import documents_file, shard_file
from jaxtrain.runtime.files import sha256_file, sync

COPY_BYTES = 1 << 24


def write_shards(
    folder: Path, split: str, unit_files: Iterable[Path], itemsize: int, shard_tokens: int
) -> list[dict[str, Any]]:
    """Writes a split's tokens into shards of `shard_tokens` (the last has the rest).

    Args:
      folder: of the store.
      split: its name.
      unit_files: raw token files, in order.
      itemsize: bytes a token.
      shard_tokens: tokens a shard.

    Returns:
      `num_tokens` and `sha256` of each shard, as in the manifest.
    """
    shards = []
    chunks = _chunks(unit_files, shard_tokens * itemsize)
    for number, parts in groupby(chunks, key=lambda chunk: chunk[0]):
        digest, size = hashlib.sha256(), 0
        with open(folder / shard_file(split, number), "wb") as stream:
            for _, data in parts:
                stream.write(data)
                digest.update(data)
                size += len(data)
            sync(stream)
        shards.append({"num_tokens": size // itemsize, "sha256": digest.hexdigest()})
    return shards


def write_documents(folder: Path, split: str, unit_starts: Iterable[tuple[Path, int]]) -> str:
    """Joins units' document starts, each shifted by the tokens before its unit; returns the file's SHA-256."""
    starts = [np.load(file, allow_pickle=False) + offset for file, offset in unit_starts]
    file = folder / documents_file(split)
    with open(file, "wb") as stream:
        np.save(stream, np.concatenate(starts), allow_pickle=False)
        sync(stream)
    return sha256_file(file)


def _chunks(files: Iterable[Path], shard_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yields (shard number, bytes) of files laid end to end; no bytes span two shards."""
    position = 0
    for file in files:
        with open(file, "rb") as stream:
            while data := stream.read(min(COPY_BYTES, shard_bytes - position % shard_bytes)):
                yield position // shard_bytes, data
                position += len(data)
