"""Data that a run leaves out: absolute ranges of batches, START:STOP without STOP, counted from 0.

What a step reads is a function of the config alone: restarts, the number of hosts and the prefetch depth have no part
in it, and a range that is given again does nothing more.
"""

from collections.abc import Sequence

Ranges = tuple[tuple[int, int], ...]


def parse_ranges(texts: Sequence[str]) -> Ranges:
    """Reads `START:STOP` texts.

    Returns:
      The same batches as ranges [START, STOP) in ascending order, with gaps between them.

    Raises:
      ValueError: not two whole numbers, or an empty range.
    """
    ranges = []
    for text in texts:
        parts = text.split(":")
        if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts):
            raise ValueError(f"data.skip {text!r} is no range of batches: write START:STOP, such as 12000:12200")
        start, stop = (int(part) for part in parts)
        if start >= stop:
            raise ValueError(f"data.skip {text!r} is empty: batches START to STOP - 1 are left out, so STOP is larger")
        ranges.append((start, stop))
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return tuple(merged)


def skip_to(index: int, ranges: Ranges) -> int:
    """The batch that step `index` reads: number `index` (from 0) of those that no range leaves out."""
    for start, stop in ranges:
        if index < start:
            break
        index += stop - start
    return index


def check_past(old: Sequence[str], new: Sequence[str], step: int) -> None:
    """Checks that other ranges leave a run's first `step` steps as they were.

    Raises:
      ValueError: they would have read other batches.
    """
    before, after = parse_ranges(old), parse_ranges(new)
    end = skip_to(step - 1, before) + 1 if step else 0  # of what was read
    if _until(before, end) == _until(after, end):
        return
    raise ValueError(
        f"data.skip {_show(old)} -> {_show(new)} changes what the first {step} steps have read: only batches from "
        f"{skip_to(step, before)} on can be left out now; for others go back first, with --rewind STEP"
    )


def _until(ranges: Ranges, end: int) -> Ranges:
    return tuple((start, min(stop, end)) for start, stop in ranges if start < end)


def _show(texts: Sequence[str]) -> str:
    return " ".join(texts) or "(nothing)"
