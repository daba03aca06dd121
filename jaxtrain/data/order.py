"""Order of the training data: a keyed permutation of range(size) without a table or a state."""

import numpy as np

from jaxtrain.fields import Ranges

NUM_ROUNDS = 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, as in splitmix64


def permute(index: np.ndarray | int, size: int, key: tuple[int, int]) -> np.ndarray:
    """Maps indices through a keyed bijection of range(size), in constant time per index.

    A Feistel network permutes the smallest range(2^(2k)) that holds `size`. Results outside range(size) pass through it
    again (cycle walking), at most 4 times on average, so the map stays a bijection. All arithmetic is on 64-bit
    integers: the order is the same on every machine and with every version of numpy.

    Args:
      index: integers in range(size), any shape.
      size: at least 1, at most 2^62.
      key: two integers, modulo 2^64.

    Returns:
      int64 of the shape of `index`.
    """
    array = np.asarray(index)
    if not 1 <= size <= 1 << 62:
        raise ValueError(f"size must be from 1 to 2^62, got {size}")
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"indices must be integers, got {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() < size):
        raise ValueError(f"indices must lie in [0, {size}), got {array.min()} to {array.max()}")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = _round_keys(key)
    flat = _feistel(array.astype(np.uint64).reshape(-1), half_bits, round_keys)
    while (outside := np.flatnonzero(flat >= size)).size:
        flat[outside] = _feistel(flat[outside], half_bits, round_keys)
    return flat.astype(np.int64).reshape(array.shape)


def _feistel(values: np.ndarray, half_bits: int, round_keys: list[int]) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        # The high bits of the mix depend on all of its input; the low ones are weaker.
        left, right = right, left ^ (_mix(right ^ np.uint64(round_key)) >> np.uint64(64 - half_bits))
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Returns the output function of splitmix64 (Steele et al., 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_keys(key: tuple[int, int]) -> list[int]:
    """Derives one 64-bit number per round from both numbers of the key."""
    first, second = (np.array([number & _MASK], np.uint64) for number in key)
    state = int(_mix(_mix(first + np.uint64(_GOLDEN)) ^ second)[0])
    states = np.array([(state + (number + 1) * _GOLDEN) & _MASK for number in range(NUM_ROUNDS)], np.uint64)
    return _mix(states).tolist()


def skip_to(index: int, ranges: Ranges) -> int:
    """Returns the batch that step `index` reads: the one at `index` (from 0) among the batches outside the ranges."""
    for start, stop in ranges:
        if index < start:
            break
        index += stop - start
    return index
