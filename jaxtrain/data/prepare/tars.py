"""Samples of WebDataset tars, read in order; a damaged header is an error, not the end of the archive."""

import io
import posixpath
import tarfile
from collections.abc import Iterator, Set
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

from jaxtrain.data.prepare.streams import COMPRESSIONS, MAX_RECORD_BYTES


def tar_samples(stream: BinaryIO, suffixes: Set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields (key, content by suffix) of each sample: the files in a row that share a name up to its first dot.

    Args:
      suffixes: of the files to read, which may be compressed (`txt.gz` is `txt`); the content of the others is empty.

    Raises:
      ValueError: two files of a sample have the same suffix, or a member is too large, no file, or no compressed one
        despite its name.
      tarfile.TarError: a damaged archive.
    """
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member, ignore_zeros=True) as archive:
        for key, members in groupby(_read_files(archive, suffixes), key=itemgetter(0)):
            files = [(suffix, data) for _, suffix, data in members]
            if len(dict(files)) < len(files):
                raise ValueError(f"sample {key!r} cannot be used: two of its files have the same suffix")
            yield key, dict(files)


def _read_files(archive: tarfile.TarFile, suffixes: Set[str]) -> Iterator[tuple[str, str, bytes]]:
    """Yields (key, suffix, content) of each file."""
    for member in archive:
        archive.members.clear()  # it would grow with the archive
        folder, name = posixpath.split(posixpath.normpath(member.name))
        if member.isdir() or name.startswith("._"):  # macOS adds `._name` with attributes
            continue
        stream = archive.extractfile(member) if member.isreg() else None
        if stream is None:
            raise ValueError(f"has the member {member.name!r}, which is neither a file nor a folder: remove it")
        base, _, suffix = name.partition(".")
        plain = next((suffix.removesuffix(end) for end in COMPRESSIONS if suffix.endswith(end)), suffix)
        data = b""
        if plain in suffixes:
            data = _read(member, stream, suffix.removeprefix(plain))
            if len(data) > MAX_RECORD_BYTES:
                raise ValueError(f"has the member {member.name!r} of more than {MAX_RECORD_BYTES:,} bytes: cut it")
        yield posixpath.join(folder, base), plain if plain in suffixes else suffix, data


def _read(member: tarfile.TarInfo, stream: Any, compression: str) -> bytes:
    """Returns the content of a member, decompressed, or the first `MAX_RECORD_BYTES` + 1 bytes of it."""
    if not compression:
        return stream.read(MAX_RECORD_BYTES + 1)
    name, matches, opener = COMPRESSIONS[compression]
    data = stream.read(MAX_RECORD_BYTES)
    if not matches(data[:10]):
        raise ValueError(f"has the member {member.name!r}, which is not a {name} file, as its name says: rename it")
    return opener(io.BytesIO(data)).read(MAX_RECORD_BYTES + 1)


class _Member(tarfile.TarInfo):
    """Member whose damaged header is an error; tarfile takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> Any:
        """Reads the next header; a ReadError if it is damaged, or if the file ends before the end of the tar."""
        try:
            member = super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):
                tarfile_.ended = True
            elif not (isinstance(error, tarfile.EmptyHeaderError) and tarfile_.ended):
                raise tarfile.ReadError(f"{error} at byte {tarfile_.offset}") from None
            raise
        tarfile_.ended = False
        return member
