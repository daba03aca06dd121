"""Rows of a batch from pieces of a split's tokens: labels, weights, segments and positions.

A row is a list of pieces, each a range of the split's tokens. Plain rows are one window; packed rows hold pieces of
several documents and padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxtrain.data.store import Split

TokenBatch = dict[str, np.ndarray]
Piece = tuple[int, int]  # first token, number of tokens


@dataclass(frozen=True)
class Documents:
    """Treatment of the documents in a row."""

    # adds `segment_ids`, and takes the weight of labels that belong to another document than their input. The
    # end-of-text token that follows a document stays its last label: without it a model would learn no end.
    mask: bool = False
    restart: bool = False  # adds `positions`, which restart at each document
    eot_id: int | None = None  # the end-of-text token; None if the data has none


PLAIN = Documents()


@dataclass(frozen=True, eq=False)
class RowReader:
    """Reads rows of `seq_len` tokens of a split."""

    split: Split
    seq_len: int
    vocab_size: int
    documents: Documents = PLAIN

    def read(self, rows: Sequence[Sequence[Piece]]) -> TokenBatch:
        """Returns the batch of some rows.

        Args:
          rows: the pieces of each row, at most `seq_len` tokens in all.

        Returns:
          `inputs` and `labels` int32 `[B, T]`, 0 in padding; `where` bool `[B, T]`, True for the labels that count;
          and, as `documents` says, `segment_ids` int32 `[B, T]`, 0 in padding and from 1 in each row, and `positions`.
        """
        shape = (len(rows), self.seq_len)
        batch = {"inputs": np.zeros(shape, np.int32), "labels": np.zeros(shape, np.int32)}
        batch["where"] = np.zeros(shape, bool)
        if self.documents.mask:
            batch["segment_ids"] = np.zeros(shape, np.int32)
        if self.documents.restart:
            batch["positions"] = np.zeros(shape, np.int32)
        for row, pieces in enumerate(rows):
            offset = segments = 0
            for start, length in pieces:
                parts = {name: array[row, offset : offset + length] for name, array in batch.items()}
                segments = self._fill(parts, start, length, segments)
                offset += length
        return batch

    def _fill(self, parts: TokenBatch, start: int, length: int, segments: int) -> int:
        """Writes a piece into its part of the row; returns the number of segments in the row so far."""
        split, eot_id = self.split, self.documents.eot_id
        stop = min(start + length + 1, split.num_tokens)
        tokens = self._tokens(start, stop - start)
        parts["inputs"][:] = tokens[:length]
        parts["labels"][: stop - start - 1] = tokens[1:]
        counts = True if split.masks is None else split.read_mask(start + 1, stop - start - 1)
        parts["where"][: stop - start - 1] = counts
        if not self.documents.mask:
            return segments
        first, last = np.searchsorted(split.document_starts, [start + 1, start + length + 1])
        begins = split.document_starts[first:last] - start  # of the later documents, and of the one after the piece
        is_first = np.zeros(length + 1, np.int32)
        is_first[begins] = 1
        is_first[0] = 1
        if start + length == split.num_tokens and self._eot_first:  # no document follows the last one
            parts["labels"][-1], parts["where"][-1] = eot_id, True
        parts["where"][is_first[1:] == 1] &= (parts["labels"] == eot_id)[is_first[1:] == 1]
        parts["segment_ids"][:] = segments + np.cumsum(is_first[:length])
        if "positions" in parts:
            place = np.arange(length)
            parts["positions"][:] = place - np.maximum.accumulate(np.where(is_first[:length] == 1, place, 0))
        return int(parts["segment_ids"][-1])

    @cached_property
    def _eot_first(self) -> bool:
        return self.split.read(int(self.split.document_starts[0]), 1)[0] == self.documents.eot_id

    def _tokens(self, start: int, length: int) -> np.ndarray:
        tokens = self.split.read(start, length)
        if tokens.max() >= self.vocab_size:  # shards are unsigned
            position = int(np.argmax(tokens >= self.vocab_size))
            raise ValueError(
                f"token id {tokens[position]} at position {start + position} of {self.split.name} is not in "
                f"[0, {self.vocab_size}): the store is damaged or belongs to another vocabulary; verify it, or make it "
                "again"
            )
        return tokens
