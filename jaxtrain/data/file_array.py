"""One-dimensional arrays in files, such as the shards of a token store."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np


class _Descriptor:
    """Open file, which is closed with the last array that reads it."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


@dataclass(frozen=True, eq=False)
class FileArray:
    """One-dimensional array in a file. A slice of it is a numpy array that is read then; threads may share it.

    The file is not memory-mapped: where a map reads past the end of a file that was cut short, or from a disk that
    fails, the kernel ends the process (SIGBUS). Here it is an OSError that names the file.
    """

    path: Path
    dtype: np.dtype
    offset: int  # bytes before the first element
    length: int  # elements
    _file: _Descriptor

    @classmethod
    def open(cls, path: Path, dtype: np.dtype, offset: int = 0) -> Self:
        """Opens the whole elements after `offset` bytes."""
        file = _Descriptor(path)
        return cls(path, dtype, offset, (os.fstat(file.number).st_size - offset) // dtype.itemsize, file)

    @classmethod
    def open_numpy(cls, path: Path) -> Self:
        """Opens a `.npy` file of one dimension. Raises a ValueError for another file; no pickle is loaded."""
        with open(path, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            offset = stream.tell()
        if len(shape) != 1 or dtype.hasobject:
            raise ValueError(f"it holds {dtype} {list(shape)}, not numbers in one dimension")
        array = cls.open(path, dtype, offset)
        if len(array) != shape[0]:
            raise ValueError(f"it is torn: it has {len(array):,} numbers, its header says {shape[0]:,}")
        return array

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(self.length)
        array = np.empty(max(stop - start, 0), self.dtype)
        data, position, done = array.view(np.uint8), self.offset + start * self.dtype.itemsize, 0
        while done < len(data):  # one call reads at most 2 GiB
            try:
                count = os.preadv(self._file.number, [data[done:]], position + done)
            except OSError as error:
                raise OSError(f"{self.path} cannot be read any more: {error.strerror}; {_REMEDY}") from error
            if not count:
                raise OSError(
                    f"{self.path} was cut short while in use: byte {position + done:,} is needed, and the file has "
                    f"{os.fstat(self._file.number).st_size:,} bytes; {_REMEDY}"
                )
            done += count
        return array

    def part(self, start: int, stop: int) -> Self:
        """Returns the array of the elements [start, stop), without reading them."""
        start, stop, _ = slice(start, stop).indices(self.length)
        return replace(self, offset=self.offset + start * self.dtype.itemsize, length=max(stop - start, 0))

    def as_bytes(self) -> Self:
        """Returns the array of the same bytes, uint8."""
        return replace(self, dtype=np.dtype(np.uint8), length=self.length * self.dtype.itemsize)


_REMEDY = "restore the file, then give the command again, which resumes a run"
