"""File format of `jaxtrain compress`.

4 bytes   JXZ and the version of the format
4 bytes   length of the header, little-endian
header    JSON, compressed by zlib: see Header
4 bytes   CRC-32 of everything else in the file
streams   one after the other
"""

import dataclasses
import itertools
import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

MAGIC = b"JXZ\x01"
_PREFIX = struct.Struct("<4sI")
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Stream:
    """Coded part of the original."""

    num_bytes: int  # bytes of the original
    num_tokens: int  # coded tokens; 0 if the bytes are stored uncompressed
    first: int  # token that the first one follows
    size: int  # bytes in the file


@dataclass(frozen=True)
class Header:
    """Facts that decoding needs and checks."""

    num_bytes: int  # bytes of the original
    crc: int  # CRC-32 of the original
    window: int  # tokens after which the context is cleared
    # parameters, tokenizer: SHA-256 (hex, 32 digits) of the model's parameters and of the tokenizer
    parameters: str
    tokenizer: str
    software: str  # versions of jax, jaxlib and jaxtrain, and the kind of device
    probe: str  # digest (hex, 16 digits) of probabilities of the encoder for fixed tokens
    streams: tuple[Stream, ...]  # the streams in the order of the original


def pack_file(header: Header, payloads: list[bytes]) -> bytes:
    """Returns the file of a header and the bytes of its streams."""
    fields = dataclasses.asdict(header) | {"streams": [dataclasses.astuple(stream) for stream in header.streams]}
    text = zlib.compress(json.dumps(fields, separators=(",", ":")).encode(), 9)
    head, body = _PREFIX.pack(MAGIC, len(text)) + text, b"".join(payloads)
    return head + _CRC.pack(zlib.crc32(body, zlib.crc32(head))) + body


def unpack_file(data: bytes) -> tuple[Header, list[bytes]]:
    """Reads a file. Returns its header and the bytes of its streams.

    Raises:
      ValueError: not a .jxz file, another version of the format, or a damaged or incomplete file.
    """
    if data[:3] != MAGIC[:3] or len(data) < _PREFIX.size:
        raise ValueError("not a .jxz file of jaxtrain compress")
    if data[3] != MAGIC[3]:
        raise ValueError(f"version {data[3]} of the .jxz format, and this jaxtrain reads version {MAGIC[3]}")
    start = _PREFIX.size + _PREFIX.unpack_from(data)[1]
    body = data[start + _CRC.size :]
    if len(data) < start + _CRC.size or _CRC.unpack_from(data, start)[0] != zlib.crc32(body, zlib.crc32(data[:start])):
        raise ValueError("the .jxz file is damaged or incomplete: its checksum differs")
    try:
        fields: dict[str, Any] = json.loads(zlib.decompress(data[_PREFIX.size : start]))
        header = Header(**fields | {"streams": tuple(Stream(*stream) for stream in fields["streams"])})
        ends = list(itertools.accumulate((stream.size for stream in header.streams), initial=0))
        if ends[-1] != len(body) or sum(stream.num_bytes for stream in header.streams) != header.num_bytes:
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError, zlib.error):
        raise ValueError("the header of the .jxz file is malformed") from None
    return header, [body[start:stop] for start, stop in itertools.pairwise(ends)]
