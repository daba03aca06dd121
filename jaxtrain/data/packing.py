"""Best-fit packing: whole documents in rows of one length (arXiv:2404.10830)."""

import bisect
from dataclasses import dataclass

import numpy as np

from jaxtrain.data.rows import Piece


@dataclass(frozen=True, eq=False)
class PackedWindows:
    """Rows of a source, each with the pieces that best-fit packing puts there."""

    # starts, lengths: of the pieces, in tokens, int64 `[P]`, sorted by row
    starts: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray  # number of pieces up to the end of each row, int64 `[N]`
    seq_len: int  # tokens of a row

    @property
    def count(self) -> int:
        """Number of rows in one epoch."""
        return len(self.ends)

    @property
    def padding(self) -> float:
        """Share of the rows' tokens that are padding."""
        return 1 - int(self.lengths.sum()) / (self.count * self.seq_len)

    def pieces(self, window: int) -> list[Piece]:
        part = slice(self.ends[window - 1] if window else 0, self.ends[window])
        return list(zip(self.starts[part].tolist(), self.lengths[part].tolist(), strict=True))


def pack_documents(document_starts: np.ndarray, start: int, stop: int, seq_len: int) -> PackedWindows:
    """Packs the documents of the tokens [start, stop) of a split.

    A document longer than a row is cut: all its pieces but the last fill a row. Takes 40 bytes of memory per document,
    and a second for some millions of them.

    Args:
      document_starts: first token of each document, int64, ascending.
      start, stop: range of the tokens, of whole documents.
    """
    inside = document_starts[(document_starts > start) & (document_starts < stop)]
    starts = np.unique(np.concatenate([[start], inside]))
    sizes = np.diff(starts, append=stop)
    counts = -(-sizes // seq_len)  # pieces of each document
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece in its document
    piece_starts = np.repeat(starts, counts) + number * seq_len
    lengths = np.minimum(np.repeat(starts + sizes, counts) - piece_starts, seq_len)
    rows = best_fit(lengths, seq_len)
    order = np.argsort(rows, kind="stable")
    return PackedWindows(piece_starts[order], lengths[order], np.cumsum(np.bincount(rows)), seq_len)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row of each piece: the longest first, each into the fullest row that still has room for it.

    Pieces of one length are placed together, so that the time grows with the capacity rather than with their number.

    Args:
      lengths: int `[P]`, from 1 to the capacity.
      capacity: of a row.
    """
    by_length = np.argsort(-lengths, kind="stable")
    rows = np.empty(len(lengths), np.int64)
    free: dict[int, np.ndarray] = {}  # room: the rows that have it, in the order they got it
    rooms: list[int] = []  # ascending
    num_rows = position = 0

    def put_back(room: int, some: np.ndarray) -> None:
        if room and len(some):
            if room not in free:
                bisect.insort(rooms, room)
            free[room] = np.concatenate([free[room], some]) if room in free else some

    sizes, counts = np.unique(lengths, return_counts=True)
    for length, left in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            place = bisect.bisect_left(rooms, length)
            room = rooms.pop(place) if place < len(rooms) else capacity
            each = room // length  # pieces that a row takes before it is too full
            needed = -(-left // each)
            if room in free:
                some = free.pop(room)
                put_back(room, some[needed:])
                some = some[:needed]
            else:
                some = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            placed = min(left, each * len(some))
            rows[by_length[position : position + placed]] = np.repeat(some, each)[:placed]
            whole = placed // each
            put_back(room - each * length, some[:whole])
            put_back(room - (placed - whole * each) * length, some[whole:])
            position, left = position + placed, left - placed
    return rows
