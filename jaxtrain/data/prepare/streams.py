"""Byte and text streams of source files: decompression by content, UTF-8 in pieces, JSON values one at a time."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from jaxtrain.data import remote
from jaxtrain.fields import is_url
from jaxtrain.runtime.extras import import_extra
from jaxtrain.runtime.terminal import one_line

MAX_RECORD_BYTES = 1 << 27  # of one line, JSON value or table row: a record is held in memory
CHUNK_BYTES = 1 << 22  # of text read at a time


def open_stream(path: str) -> BinaryIO:
    """Opens a file or URL for reading; decompresses gzip, bzip2, xz and Zstandard, which are recognised by content.

    Raises:
      ValueError: the name promises a compression that the content does not have.
      ImportError: Zstandard without its extra.
    """
    with open_binary(path) as stream:
        head = stream.read(10)
    for suffix, (name, matches, opener) in COMPRESSIONS.items():
        if matches(head):
            return _Decompressed(opener, open_binary(path))
        if head and path.lower().endswith(suffix):
            raise ValueError(f"is not a {name} file, as its name says: rename it or replace it")
    return open_binary(path)


class _Decompressed(io.BufferedReader):
    """Decompressed stream that closes the file below it."""

    def __init__(self, opener: Callable[[BinaryIO], Any], file: BinaryIO):
        self._file = file
        try:
            super().__init__(opener(file))
        except ImportError:
            file.close()
            raise

    def close(self) -> None:
        super().close()
        self._file.close()


def open_binary(path: str) -> BinaryIO:
    """Opens a file or URL for reading, without decompression."""
    return remote.open_file(path) if is_url(path) else open(path, "rb")


def is_compressed(path: str) -> bool:
    """Returns True if `open_stream` decompresses the file."""
    with open_binary(path) as stream:
        head = stream.read(10)
    return any(matches(head) for _, matches, _ in COMPRESSIONS.values())


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Puts the file's path in front of errors about its content."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{one_line(path)} {error}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, UnicodeDecodeError) as error:
        raise ValueError(f"{one_line(path)} cannot be read: {error}; replace the file or leave it out") from None
    except Exception as error:
        if type(error).__module__.startswith("pyarrow"):  # of several base classes
            raise ValueError(f"{one_line(path)} cannot be read: {error}; replace the file or leave it out") from None
        if not isinstance(error, ValueError):
            raise
        raise ValueError(f"{one_line(path)} {error}") from None


class TextReader:
    """Decodes a file's UTF-8 piece by piece and drops a byte order mark at its start."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._position = stream, 0
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def read(self, num_bytes: int) -> str:
        """Returns the text of about the next `num_bytes` bytes; "" at the end of the file."""
        text = ""
        while not text:
            data = self._stream.read(num_bytes)
            start = self._position - len(self._decoder.getstate()[0])
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"is not UTF-8 text (byte {start + error.start}): convert it (iconv -t utf-8) or leave it out"
                ) from None
            self._position += len(data)
            if not data:
                break
        return text


class JsonReader:
    """Parses JSON values out of a stream and holds one value at a time."""

    def __init__(self, stream: BinaryIO, limit: int):
        self._reader, self._text, self._position, self._limit = TextReader(stream), "", 0, limit
        self.number = 0  # of values so far

    def peek(self) -> str:
        """Skips white space and returns the next character; "" at the end."""
        while True:
            while self._position < len(self._text):
                if self._text[self._position] not in " \t\r\n":
                    return self._text[self._position]
                self._position += 1
            if not self._fill():
                return ""

    def take(self, character: str) -> bool:
        """Skips the next character if it is `character`; returns True if so."""
        found = self.peek() == character
        self._position += found
        return found

    def value(self) -> Any:
        """Parses the next value; a ValueError if it is not JSON or too large."""
        self.peek()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._position)
                if end < len(self._text) or not self._fill():  # a number may continue in the next chunk
                    self._position, self.number = end, self.number + 1
                    return value
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._fill():
                    raise ValueError(f"is not JSON after record {self.number}: {error}; correct the file") from None

    def _fill(self) -> bool:
        """Drops the parsed text and reads on; returns False at the end; a ValueError if the value is too large."""
        left = self._text[self._position :]
        if len(left) > self._limit:
            raise ValueError(f"record {self.number + 1} has more than {self._limit:,} characters: cut it")
        more = self._reader.read(max(CHUNK_BYTES, len(left)))
        if more:
            self._text, self._position = left + more, 0
        return bool(more)


class _ZstandardFile(io.RawIOBase):
    """Decompressed bytes of all frames of a Zstandard file; an EOFError if the last frame is cut."""

    def __init__(self, library: Any, stream: BinaryIO):
        self._library, self._stream = library, stream
        self._frame, self._left, self._ready = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._left or self._stream.read(1 << 12)  # may inflate to 80 MB
            if not data and self._frame is None:
                return 0
            if not data:
                raise EOFError("it ends within a frame")
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready, self._left = self._frame.decompress(data), b""
            except self._library.ZstdError as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._frame, self._left = None, self._frame.unused_data
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


def _open_zstandard(stream: BinaryIO) -> BinaryIO:
    library = import_extra("zstandard", "zstd", "is a Zstandard file")
    return io.BufferedReader(_ZstandardFile(library, stream), 1 << 16)


# Suffix: name, test of a file's first 10 bytes, opener.
COMPRESSIONS: dict[str, tuple[str, Callable[[bytes], bool], Callable[[Any], Any]]] = {
    ".gz": ("gzip", lambda head: head[:2] == b"\x1f\x8b", gzip.open),
    ".bz2": ("bzip2", lambda head: head[:3] == b"BZh" and head[4:] in (b"1AY&SY", b"\x17rE8P\x90"), bz2.open),
    ".xz": ("xz", lambda head: head[:6] == b"\xfd7zXZ\0", lzma.open),
    ".zst": ("Zstandard", lambda head: head[:4] == b"\x28\xb5\x2f\xfd", _open_zstandard),
    ".lzma": ("lzma", lambda head: head[:3] == b"]\0\0", lzma.open),
}
COMPRESSIONS |= {long: COMPRESSIONS[short] for long, short in ((".gzip", ".gz"), (".bgz", ".gz"), (".zstd", ".zst"))}
