"""Opens token stores: folders that `prepare` writes, and token files of other tools, see `token_files`.

All files are checked, and no pickle is ever loaded. A folder of `prepare` holds:

manifest.json              sizes and SHA-256 of the files, the request that made them, and a checksum of all this
tokenizer.json
train-00000.bin ...        tokens, raw little-endian uint16 or uint32
train-00000.mask ...       uint8 per token, 1 for the labels that count; only in stores of completions
train-documents.npy        int64: first token of each document
validation-...             the same
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.data.file_array import FileArray
from jaxtrain.data.remote import fetch_store
from jaxtrain.data.token_files import find_token_files, join_documents, read_token_file
from jaxtrain.data.tokenizer import TOKENIZER_FILE, BPETokenizer, ByteTokenizer, load_tokenizer
from jaxtrain.fields import is_url
from jaxtrain.runtime.files import checksum, sha256_file

STORE_FORMAT = "jaxtrain-tokens"
STORE_VERSION = 1
MASKED_VERSION = 2  # of stores with masks, which readers of version 1 would ignore
STORE_MANIFEST = "manifest.json"
STORE_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True, eq=False)
class Split:
    """Tokens of one split, in the order of its documents.

    Each document of `prepare` begins with the end-of-text token; other tools may end it there.
    """

    shards: tuple[np.ndarray | FileArray, ...]  # 1-D, unsigned
    documents: np.ndarray | FileArray | None  # see `document_starts`
    num_bytes: int | None  # UTF-8 bytes of the documents' text; None for token files
    name: str = "the split"  # of the file or folder, for errors
    masks: tuple[np.ndarray | FileArray, ...] | None = None  # uint8, like `shards`: 1 for the labels that count

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens, the end-of-text tokens included."""
        return sum(len(shard) for shard in self.shards)

    @property
    def num_documents(self) -> int | None:
        """Number of documents; None if it is not known."""
        return None if self.documents is None else len(self.documents)

    @cached_property
    def document_starts(self) -> np.ndarray | None:
        """First token of each document, int64 `[num_documents]`; None if a token file does not mark them."""
        return None if self.documents is None else self.documents[:]

    @cached_property
    def _shard_starts(self) -> np.ndarray:
        return np.cumsum([0, *(len(shard) for shard in self.shards)])

    @cached_property
    def num_labels(self) -> int:
        """Number of labels that count in one pass: all tokens but the first, or those in `masks`."""
        if self.masks is None:
            return self.num_tokens - 1
        return sum(int(np.count_nonzero(mask[:])) for mask in self.masks) - int(self.masks[0][:1].sum())

    def read(self, start: int, length: int) -> np.ndarray:
        """Returns a copy of tokens [start, start + length), in the store's dtype; a ValueError beyond the split."""
        return self._read(self.shards, start, length)

    def read_mask(self, start: int, length: int) -> np.ndarray:
        """Returns a copy of the mask of tokens [start, start + length), uint8; the split must have `masks`."""
        assert self.masks is not None
        return self._read(self.masks, start, length)

    def _read(self, arrays: Sequence[np.ndarray | FileArray], start: int, length: int) -> np.ndarray:
        stop = start + length
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens [{start}, {stop}) are not in a split of {self.num_tokens} tokens")
        first = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        pieces = []
        for begin, array in zip(self._shard_starts[first:].tolist(), arrays[first:], strict=False):
            if begin >= stop:
                break
            pieces.append(array[max(start - begin, 0) : stop - begin])
        return np.concatenate(pieces) if pieces else np.empty(0, arrays[0].dtype)


@dataclass(frozen=True, eq=False)
class TokenStore:
    """An open token store. Its identity is the fingerprint; the path may change."""

    path: Path
    vocab_size: int
    eot_id: int | None  # None if it is not known, as in token files without a description
    fingerprint: str  # SHA-256 (hex) of the tokens, their dtype and the tokenizer
    train: Split
    validation: Split
    manifest: dict[str, Any]  # as read; empty for token files
    tokenizer_file: Path | None = None  # None for token files without a tokenizer.json beside them
    sources: Mapping[str, "TokenStore"] = field(default_factory=dict)  # stores that this one joins, see `join_stores`

    @cached_property
    def tokenizer(self) -> ByteTokenizer | BPETokenizer:
        """The tokenizer of the tokens; a ValueError if the store has none."""
        if self.tokenizer_file is None:
            raise ValueError(f"{self.path} has no tokenizer: put its {TOKENIZER_FILE} beside the token files")
        return load_tokenizer(self.tokenizer_file.parent)


def shard_file(split: str, number: int, suffix: str = "bin") -> str:
    """Returns the file name of a shard, or with the suffix `mask` of its mask."""
    return f"{split}-{number:05d}.{suffix}"


def documents_file(split: str) -> str:
    """Returns the file name of a split's document starts."""
    return f"{split}-documents.npy"


def partial_folder(path: Path) -> Path:
    """Returns the folder of the unfinished store."""
    return path.parent / f".{path.name}.partial"


def open_store(
    path: str | Path,
    *,
    verify: bool = True,
    vocab_size: int | None = None,
    validation: Sequence[str | Path] = (),
    validation_fraction: float = 0.02,
) -> TokenStore:
    """Opens a token store.

    Args:
      path: a folder that `prepare` wrote; or a token file of another tool, the prefix of Megatron's, or their folder.
        An fsspec URL of one of them is copied into the local cache.
      verify: compares the SHA-256 of every shard with the manifest, or checks every token of token files and finds
        their documents, at about a gigabyte per second. Sizes, headers and the tokenizer are always checked.
      vocab_size: for token files that do not state theirs.
      validation: token files to validate on, in place of those beside the training files.
      validation_fraction: share of the tokens, from the end, of token files without any validation file.

    Raises:
      ValueError: the path is no finished store, or a damaged one.
    """
    path = _local_path(path, verify)
    prepared = any((path / name).exists() for name in (STORE_MANIFEST, documents_file("train")))
    if not prepared and (found := find_token_files(path)):
        files = found[0], [each for file in validation for each in _token_files(_local_path(file, verify))]
        return _open_token_files(path, files[0], files[1] or found[1], verify, vocab_size, validation_fraction)
    if validation:
        raise ValueError(f"{path} has a validation split: leave out data.validation")
    return _open_prepared(path, verify)


def _local_path(path: str | Path, verify: bool) -> Path:
    return fetch_store(str(path), verify=verify) if is_url(path) else Path(path).expanduser().absolute()


def _token_files(path: Path) -> list[Path]:
    found = find_token_files(path)
    if found is None:
        raise ValueError(f"{path} is no token file, as data.store is: name one with the suffix .bin, .idx or .npy")
    return [*found[0], *found[1]]


def _open_token_files(
    path: Path,
    train_paths: Sequence[Path],
    validation_paths: Sequence[Path],
    verify: bool,
    vocab_size: int | None,
    validation_fraction: float,
) -> TokenStore:
    train, validation = ([read_token_file(file) for file in files] for files in (train_paths, validation_paths))
    files = [*train, *validation]
    tokenizer_file = files[0].path.parent / TOKENIZER_FILE
    has_tokenizer = tokenizer_file.is_file()
    known = load_tokenizer(tokenizer_file.parent).vocab_size if has_tokenizer else vocab_size
    vocab_size = files[0].vocab_size or known
    if vocab_size is None:
        pickled = tokenizer_file.with_name("meta.pkl").is_file()
        raise ValueError(
            f"{path} does not state its vocabulary: set model.vocab_size (GPT-2 has 50257), or describe the tokens in "
            f'{files[0].path.with_suffix(".json").name}: {{"vocab_size": 50257}}'
            + (f", or convert meta.pkl to {TOKENIZER_FILE} as docs/data.md shows: no pickle is read here" * pickled)
        )
    eot_ids = {file.eot_id: file.path for file in files if file.eot_id is not None}
    if len(eot_ids) > 1:
        raise ValueError(f"{' and '.join(map(str, eot_ids.values()))} differ in the end-of-text token: use one of them")
    splits = []
    for part in (train, validation):
        positions = [file.scan(vocab_size) if verify else None for file in part]
        name = str(part[0].path) if len(part) == 1 else str(path)
        if part:
            splits.append(Split(tuple(file.tokens for file in part), join_documents(part, positions), None, name))
    if not validation:
        indexed = join_documents(train, [None] * len(train))
        splits = _cut_tail(splits[0], [file.tokens for file in train], indexed, validation_fraction)
    content = [[file.digest() for file in part] for part in (train, validation)] + [splits[0].num_tokens]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    tokenizer = tokenizer_file if has_tokenizer else None
    return TokenStore(path, vocab_size, next(iter(eot_ids), None), fingerprint, *splits, {}, tokenizer)


def _cut_tail(split: Split, files: Sequence[FileArray], indexed: np.ndarray | None, fraction: float) -> list[Split]:
    """Cuts a split in two, at the start of a document if an index tells the documents (`indexed`, in tokens)."""
    cut = int(split.num_tokens * (1 - fraction))
    if indexed is not None and len(indexed) > 1:
        cut = int(indexed[min(max(int(np.searchsorted(indexed, cut)), 1), len(indexed) - 1)])
    starts = split.document_starts
    if not 0 < cut < split.num_tokens:
        raise ValueError(f"{split.name} has too few tokens to hold out {fraction:g} of them: name validation files")
    parts = []
    for begin, end in ((0, cut), (cut, split.num_tokens)):
        offsets = split._shard_starts.tolist()
        shards = (
            shard.part(max(begin - at, 0), end - at) for at, shard in zip(offsets, files, strict=False) if at < end
        )
        within = None if starts is None else np.union1d([begin], starts[(starts >= begin) & (starts < end)]) - begin
        parts.append(Split(tuple(shard for shard in shards if len(shard)), within, None, split.name))
    return parts


def _open_prepared(path: Path, verify: bool) -> TokenStore:
    manifest = _read_manifest(path)
    try:
        found = (manifest["format"], manifest["version"])
    except (KeyError, TypeError):
        raise _damaged(path, f"{STORE_MANIFEST} does not name its format") from None
    if found not in ((STORE_FORMAT, STORE_VERSION), (STORE_FORMAT, MASKED_VERSION)):
        raise ValueError(
            f"{path} has format {found[0]!r} version {found[1]!r}; this jaxtrain reads {STORE_FORMAT!r} versions "
            f"{STORE_VERSION} and {MASKED_VERSION}: make the store again with `jaxtrain prepare`"
        )
    try:
        dtype = STORE_DTYPES[manifest["dtype"]]
        vocab_size, eot_id = _number(manifest, "vocab_size"), _number(manifest, "eot_id")
        if not 0 <= eot_id < vocab_size:
            raise TypeError(f"eot_id {eot_id} is no token of a vocabulary of {vocab_size}")
        tokenizer_sha256 = manifest["tokenizer"]["sha256"]
        fingerprint = manifest_fingerprint(manifest)
        train, validation = (
            _open_split(path, name, manifest["splits"][name], dtype, verify, found[1] == MASKED_VERSION)
            for name in ("train", "validation")
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{STORE_MANIFEST} lacks a key or holds a wrong value: {error!r}") from None
    if not (path / TOKENIZER_FILE).is_file() or sha256_file(path / TOKENIZER_FILE) != tokenizer_sha256:
        raise _damaged(path, f"{TOKENIZER_FILE} is missing or is not the tokenizer of the tokens")
    return TokenStore(path, vocab_size, eot_id, fingerprint, train, validation, manifest, path / TOKENIZER_FILE)


def manifest_fingerprint(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 (hex) of a manifest's entries about the tokens; a KeyError if one is missing."""
    splits = {
        name: [[_shard_content(shard) for shard in split["shards"]], split["documents_sha256"]]
        for name, split in sorted(manifest["splits"].items())
    }
    keys = ("format", "version", "dtype", "vocab_size", "eot_id")
    content = [*(manifest[key] for key in keys), manifest["tokenizer"]["sha256"], splits]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _shard_content(shard: dict[str, Any]) -> list[Any]:
    return [shard["num_tokens"], shard["sha256"], *([shard["mask_sha256"]] if "mask_sha256" in shard else [])]


def _read_manifest(path: Path) -> Any:
    if path.name.startswith(".") and path.name.endswith(".partial"):
        raise ValueError(f"{path} is an unfinished token store: run `jaxtrain prepare` again to finish it")
    if not path.is_dir():
        if partial_folder(path).is_dir():
            raise ValueError(f"the token store {path} is unfinished: run `jaxtrain prepare` again to finish it")
        raise ValueError(f"{path} is not a folder: make a token store there with `jaxtrain prepare`")
    if not (path / STORE_MANIFEST).is_file():
        raise ValueError(f"{path} is not a token store: it has no {STORE_MANIFEST}; make one with `jaxtrain prepare`")
    try:
        manifest = json.loads((path / STORE_MANIFEST).read_bytes())
        written = manifest.pop("checksum", None) if isinstance(manifest, dict) else None  # older stores have none
        changed = written is not None and written != checksum(manifest)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{STORE_MANIFEST} is not JSON: {error}") from None
    except OSError as error:
        raise _damaged(path, f"{STORE_MANIFEST} cannot be read: {error}") from None
    if changed:
        raise _damaged(path, f"{STORE_MANIFEST} is not what was written")
    return manifest


def _open_array(file: Path, length: int, dtype: np.dtype, digest: str, verify: bool) -> FileArray:
    size = length * dtype.itemsize
    if not file.is_file():
        raise _damaged(file.parent, f"{file.name} is missing")
    if file.stat().st_size != size or size == 0:
        raise _damaged(file.parent, f"{file.name} has {file.stat().st_size} bytes, its manifest says {size}")
    if verify and sha256_file(file) != digest:
        raise _damaged(file.parent, f"the checksum of {file.name} is not the manifest's")
    return FileArray.open(file, dtype)


def _open_split(path: Path, name: str, entry: dict[str, Any], dtype: np.dtype, verify: bool, masked: bool) -> Split:
    shards, masks = [], []
    for number, shard in enumerate(entry["shards"]):
        length = _number(shard, "num_tokens")
        shards.append(_open_array(path / shard_file(name, number), length, dtype, shard["sha256"], verify))
        if masked:
            masks.append(
                _open_array(
                    path / shard_file(name, number, "mask"), length, np.dtype(np.uint8), shard["mask_sha256"], verify
                )
            )
    file = path / documents_file(name)
    try:
        starts = FileArray.open_numpy(file)
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{file.name} cannot be read: {error}") from None
    if starts.dtype != np.int64 or len(starts) != entry["num_documents"]:
        raise _damaged(path, f"{file.name} is not int64 [{entry['num_documents']}]")
    if verify and sha256_file(file) != entry["documents_sha256"]:
        raise _damaged(path, f"the checksum of {file.name} is not the manifest's")
    for source in entry.get("sources", ()):
        if not isinstance(source["source"], str):
            raise TypeError(f"source is {source['source']!r}, not a name")
        for key in ("num_tokens", "num_bytes", "num_documents"):
            _number(source, key)
    place = f"the {name} split of {path}"
    split = Split(tuple(shards), starts, _number(entry, "num_bytes", 1), place, tuple(masks) if masked else None)
    if not shards or split.num_tokens != entry["num_tokens"]:
        raise _damaged(path, f"the shards of {name} have {split.num_tokens} tokens, not {entry['num_tokens']}")
    known = starts[:] if verify or len(starts) < 2 else np.concatenate([starts[:1], starts[-1:]])
    if not len(known) or known[0] != 0 or known[-1] >= split.num_tokens or not (known[1:] > known[:-1]).all():
        raise _damaged(path, f"{file.name} does not rise from 0 to below {split.num_tokens}")
    return split


def _number(entry: dict[str, Any], key: str, least: int = 0) -> int:
    if type(entry[key]) is not int or not least <= entry[key] < 2**63:
        raise TypeError(f"{key} is {entry[key]!r:.80}, not a whole number from {least} on")
    return entry[key]


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"the token store {path} is damaged: {why}; delete it and run `jaxtrain prepare` again")
