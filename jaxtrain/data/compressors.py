"""General compressors, which the bits per byte of a model are compared with."""

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterable

from jaxtrain.runtime.extras import import_extra


def _zstd(text: bytes) -> bytes:
    zstandard = import_extra("zstandard", "zstd", "zstd needs the zstandard package")
    return zstandard.ZstdCompressor(level=19).compress(text)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda text: gzip.compress(text, 9, mtime=0),
    "bzip2": lambda text: bz2.compress(text, 9),
    "xz": lambda text: lzma.compress(text, preset=9),
    "zstd": _zstd,
}


def compressor_bits_per_byte(text: bytes, names: Iterable[str] = ("gzip", "xz")) -> dict[str, float]:
    """Compresses a text as one file with each compressor at its strongest level (gzip, bzip2 and xz 9, zstd 19).

    Unlike a model, a compressor learns from these bytes alone, in one pass.

    Returns:
      Bits per byte by name.

    Raises:
      ImportError: zstd without the zstandard package.
    """
    return {name: 8 * len(COMPRESSORS[name](text)) / len(text) for name in names}
