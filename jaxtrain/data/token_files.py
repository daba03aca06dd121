"""Token files of other tools, opened in place: nanoGPT, llm.c, Megatron-LM, numpy, and raw tokens with a description.

A description is a JSON file of the same name (`corpus.json` beside `corpus.bin`) or `tokens.json` in the folder:
`{"dtype": "uint32", "vocab_size": 128256, "eot_id": 128001}`. Only `dtype` is needed, and only for raw tokens.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.data.file_array import FileArray

SUFFIXES = (".bin", ".idx", ".npy")
DESCRIPTION = "tokens.json"
_DTYPES = {name: np.dtype(f"<{kind}") for name, kind in (("uint8", "u1"), ("uint16", "u2"), ("uint32", "u4"))}
_DTYPES |= {name: np.dtype(f"<{kind}") for name, kind in (("int16", "u2"), ("int32", "u4"), ("int64", "u8"))}
_KEYS = {"dtype": str, "vocab_size": int, "eot_id": int}

_LLMC_HEADER = 256  # int32 values: magic, version, number of tokens, zeros
_LLMC_KINDS = {(20240520, 1): ("uint16", 50_257, 50_256), (20240801, 7): ("uint32", 128_256, 128_000)}
_LLMC_YEAR = range(20240101, 20250101)  # magic numbers of llm.c's other files

_MEGATRON_MAGIC, _MEGATRON_OLD = b"MMIDIDX\0\0", b"TNTIDX\0\0"
_MEGATRON_DTYPES = {1: "uint8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

_SCAN_TOKENS = 1 << 24
_NUM_SAMPLES = 64
_FOREIGN = {  # file in a folder: its tool and the remedy
    "shard_ledger.json": ("a Levanter cache (TensorStore)", "run `jaxtrain prepare` on its text"),
    "index.json": ("a litdata or MosaicML dataset", "run `jaxtrain prepare` on its text, or write raw tokens"),
    "state.json": ("a Hugging Face dataset", "run `jaxtrain prepare` on it"),
    "dataset_dict.json": ("a Hugging Face dataset", "run `jaxtrain prepare` on one of its splits"),
}


@dataclass(frozen=True, eq=False)
class TokenFile:
    """One file of tokens."""

    path: Path
    tokens: FileArray  # 1-D, unsigned: a negative id becomes one that no vocabulary has
    vocab_size: int | None = None  # None: not stated
    eot_id: int | None = None
    eot_first: bool | None = None  # True: a document begins with the end-of-text token, False: ends, None: unknown
    document_starts: np.ndarray | None = None  # int64, from an index

    def scan(self, vocab_size: int) -> np.ndarray | None:
        """Reads all tokens; returns the positions of the end-of-text tokens, None if their id is unknown.

        Raises:
          ValueError: a token id that the vocabulary does not have.
        """
        found = []
        for start in range(0, len(self.tokens), _SCAN_TOKENS):
            part = self.tokens[start : start + _SCAN_TOKENS]
            if int(part.max()) >= vocab_size:
                position = int(np.argmax(part >= vocab_size))
                raise ValueError(
                    f"{self.path} has token id {_signed(part[position])} at position {start + position}, not in "
                    f"[0, {vocab_size}): state its vocabulary (see docs/data.md), or replace the file"
                )
            if self.eot_id is not None:
                found.append(np.flatnonzero(part == self.eot_id) + start)
        return None if self.eot_id is None else np.concatenate(found).astype(np.int64)

    def digest(self, sample_bytes: int = 1 << 20) -> tuple[int, str, str]:
        """Returns the number of tokens, their dtype, and their SHA-256 (hex).

        Of a file that is longer than 64 samples of `sample_bytes`, evenly spaced samples are hashed.
        """
        data = self.tokens.as_bytes()
        hashed = hashlib.sha256()
        if len(data) <= _NUM_SAMPLES * sample_bytes:
            hashed.update(data[:])
        else:
            for start in np.linspace(0, len(data) - sample_bytes, _NUM_SAMPLES).astype(np.int64).tolist():
                hashed.update(data[start : start + sample_bytes])
        return len(self.tokens), str(self.tokens.dtype), hashed.hexdigest()


def _signed(token: np.unsignedinteger) -> int:
    value, bits = int(token), 8 * token.dtype.itemsize
    return value - (1 << bits) if value >> (bits - 1) and bits > 16 else value


def find_token_files(path: Path) -> tuple[list[Path], list[Path]] | None:
    """Returns the training and the validation files of a path; None if the path is no token file and has none.

    Args:
      path: a file, the common prefix of Megatron's `.bin` and `.idx`, or a folder whose files have `train` or `val` in
        their names.

    Raises:
      ValueError: a folder of another tool, or a file whose name does not name its split.
    """
    if path.is_file() and path.suffix in SUFFIXES:
        return [path], []
    if (index := Path(f"{path}.idx")).is_file():
        return [index], []
    if not path.is_dir():
        return None
    for name, (tool, remedy) in _FOREIGN.items():
        if (path / name).is_file():
            raise ValueError(f"{path} is {tool}, which is not read in place: {remedy}")
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith("."))
    files = [file for file in files if file.suffix == ".idx" or not file.with_suffix(".idx").is_file()]
    splits: tuple[list[Path], list[Path]] = [], []
    for file in files:
        words = re.findall(r"[a-z]+", file.stem.lower())
        if not {"train", "training", "val", "valid", "validation"} & set(words):
            raise ValueError(f"{file} has neither `train` nor `val` in its name: rename it, move it, or name one file")
        splits[not {"train", "training"} & set(words)].append(file)
    if files and not splits[0]:
        raise ValueError(f"{path} holds no training file: name one with `train` in its name")
    return splits if files else None


def read_token_file(path: Path) -> TokenFile:
    """Opens a token file; reads its header only. Raises a ValueError for an unknown, torn or empty file."""
    stated = _read_description(path)
    if (index := path.with_suffix(".idx")).is_file():
        file = _read_megatron(index)
    elif not path.is_file():
        raise ValueError(f"no token file {path}: check the path")
    elif path.suffix == ".npy":
        file = _read_numpy(path)
    else:
        file = _read_raw(path, stated.get("dtype"))
    if not len(file.tokens):
        raise ValueError(f"{path} holds no tokens: replace the file")
    found = next((name for name, dtype in _DTYPES.items() if dtype == file.tokens.dtype), "")
    if "dtype" in stated and _DTYPES[stated["dtype"]] != file.tokens.dtype:
        raise ValueError(f"{path} holds {found} tokens, its description says {stated['dtype']}: correct one of them")
    values = {key: stated[key] for key in ("vocab_size", "eot_id") if key in stated}
    return replace(file, **values)


def _read_description(path: Path) -> dict[str, Any]:
    for file in (path.with_suffix(".json"), path.parent / DESCRIPTION):
        if not file.is_file():
            continue
        try:
            stated = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error}; correct it") from None
        if not isinstance(stated, dict) or any(type(value) is not _KEYS.get(key) for key, value in stated.items()):
            raise ValueError(
                f'{file} does not describe tokens: write {{"dtype": "uint16", "vocab_size": 50257, "eot_id": 50256}}, '
                "without the keys that you do not know"
            )
        if stated.get("dtype", "uint16") not in _DTYPES:
            raise ValueError(f"{file} states dtype {stated['dtype']!r}: use one of {', '.join(_DTYPES)}")
        if stated.get("vocab_size", 1) < 1 or not 0 <= stated.get("eot_id", 0) < stated.get("vocab_size", 1 << 62):
            raise ValueError(f"{file} states a vocab_size below 1 or an eot_id outside of it: correct it")
        return stated
    return {}


def _open(path: Path, dtype: np.dtype, offset: int = 0, count: int | None = None, why: str = "") -> FileArray:
    """Opens the tokens after `offset` bytes; a ValueError if they are not `count` whole tokens."""
    size = path.stat().st_size - offset
    expected = size // dtype.itemsize * dtype.itemsize if count is None else count * dtype.itemsize
    if size != expected:
        what = f"a whole number of {dtype.itemsize}-byte tokens" if count is None else f"{expected:,}, as {why} says"
        raise ValueError(f"{path} is torn: it has {size:,} bytes of tokens, not {what}; replace the file")
    return FileArray.open(path, dtype, offset)


def _read_raw(path: Path, dtype: str | None) -> TokenFile:
    """Reads llm.c's files by their header; other files hold raw tokens, uint16 as nanoGPT's without a description."""
    with open(path, "rb") as stream:
        header = np.frombuffer(stream.read(4 * _LLMC_HEADER), "<u1")
    header = header[: len(header) // 4 * 4].view("<i4").tolist()
    known = tuple(header[:2]) in _LLMC_KINDS
    if known or (dtype is None and header and header[0] in _LLMC_YEAR):
        if len(header) < _LLMC_HEADER:
            raise ValueError(f"{path} is torn: it ends within its header of 1,024 bytes; replace the file")
        if not known:
            kinds = " and ".join(f"{magic} version {version}" for magic, version in _LLMC_KINDS)
            raise ValueError(
                f"{path} has the header of an llm.c file with magic {header[0]} version {header[1]}; its token files "
                f"have {kinds}"
            )
        name, vocab_size, eot_id = _LLMC_KINDS[header[0], header[1]]
        tokens = _open(path, _DTYPES[name], 4 * _LLMC_HEADER, header[2], "its header")
        return TokenFile(path, tokens, vocab_size, eot_id, eot_first=True)
    return TokenFile(path, _open(path, _DTYPES[dtype or "uint16"]), eot_first=False if dtype is None else None)


def _read_numpy(path: Path) -> TokenFile:
    try:
        found = FileArray.open_numpy(path)
    except ValueError as error:
        raise ValueError(f"{path} is no numpy file of tokens: {error}; replace the file") from None
    if found.dtype.kind not in "iu" or found.dtype.byteorder == ">":
        raise ValueError(f"{path} holds {found.dtype} [{len(found)}]: token files hold little-endian integers")
    return TokenFile(path, replace(found, dtype=np.dtype(f"<u{found.dtype.itemsize}")), eot_first=None)


def _read_megatron(index: Path) -> TokenFile:
    """Reads Megatron's index: the dtype, the lengths of the sequences, and the sequences of each document."""
    data = np.fromfile(index, np.uint8)
    if bytes(data[: len(_MEGATRON_OLD)]) == _MEGATRON_OLD:
        raise ValueError(f"{index} is an index of Megatron's older `cached` kind: convert the dataset to `mmap`")
    if bytes(data[: len(_MEGATRON_MAGIC)]) != _MEGATRON_MAGIC:
        raise ValueError(f"{index} is not an index of Megatron-LM: its first bytes are not MMIDIDX")
    torn = ValueError(f"{index} is torn: its size differs from the size of its contents; replace the file")
    position = len(_MEGATRON_MAGIC)

    def take(dtype: str, count: int) -> np.ndarray:
        nonlocal position
        size = count * np.dtype(dtype).itemsize
        if count < 0 or position + size > len(data):
            raise torn
        position += size
        return data[position - size : position].view(dtype)

    version, code = int(take("<u8", 1)[0]), int(take("u1", 1)[0])
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise ValueError(
            f"{index} has version {version} and dtype code {code}: version 1 and the codes "
            f"{', '.join(f'{number} ({name})' for number, name in _MEGATRON_DTYPES.items())} are read"
        )
    num_sequences, num_documents = take("<i8", 2).tolist()
    lengths, pointers = take("<i4", num_sequences), take("<i8", num_sequences)
    documents = take("<i8", num_documents)
    if len(data) - position not in (0, num_sequences):  # multimodal sets append a mode per sequence
        raise torn
    dtype = _DTYPES[_MEGATRON_DTYPES[code]]
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    in_order = not num_documents or (documents.min() >= 0 and documents.max() <= num_sequences)
    if (lengths < 0).any() or (pointers != ends[:-1] * dtype.itemsize).any() or not in_order:
        raise ValueError(f"{index} is damaged: its sequences do not follow one another; build it again")
    path = index.with_suffix(".bin")
    if not path.is_file():
        raise ValueError(f"{index} is an index without tokens: put {path.name} beside it")
    tokens, starts = _open(path, dtype, 0, int(ends[-1]), index.name), np.unique(ends[documents])
    return TokenFile(path, tokens, document_starts=starts[starts < len(tokens)])


def join_documents(files: Sequence[TokenFile], positions: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Returns the document starts (int64, in tokens) of consecutive files, None if they are not known.

    Args:
      positions: of the end-of-text tokens of each file, as `TokenFile.scan` returns them; a document may span files.
    """
    offsets = np.cumsum([0, *(len(file.tokens) for file in files)])
    if all(file.document_starts is not None for file in files):
        parts = [file.document_starts + offset for file, offset in zip(files, offsets, strict=False)]
        return np.unique(np.concatenate([[0], *parts]))
    if any(found is None for found in positions):
        return None
    first = files[0]
    eot_first = bool(first.tokens[:1] == first.eot_id) if first.eot_first is None else first.eot_first
    found = np.concatenate([part + offset for part, offset in zip(positions, offsets, strict=False)])
    starts = np.unique(np.concatenate([[0], found if eot_first else found + 1]))
    return starts[starts < offsets[-1]]
