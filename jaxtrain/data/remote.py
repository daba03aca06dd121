"""Data behind URLs (`gs://`, `s3://`, any fsspec URL): sources to read, token stores to copy into a local cache."""

import glob
import hashlib
import io
import json
import posixpath
from pathlib import Path
from typing import Any, BinaryIO

from jaxtrain.runtime.files import cache_folder, read_object, sha256_file, write_json
from jaxtrain.runtime.remote import exclusive, fetch_file, open_filesystem, reaching

_BUFFER_BYTES = 1 << 20
_SUMS = "checksums.json"
_BESIDE = (".bin", ".idx", ".json")  # suffixes of the files that go with a token file
_SHARED = ("tokens.json", "tokenizer.json")

Version = tuple[int, str]  # bytes, and a text that changes with the content


def open_file(url: str) -> BinaryIO:
    """Opens a URL for reading; the stream can seek."""
    with reaching(url):
        system, path = open_filesystem(url)
        return io.BufferedReader(system.open(path, "rb"), _BUFFER_BYTES)


def url_version(url: str) -> Version:
    """Returns the size of a URL in bytes, and a text that changes with its content."""
    with reaching(url):
        return _version(*open_filesystem(url))


def _version(system: Any, path: str) -> Version:
    found = system.info(path)
    if found.get("size") is None:
        raise OSError("the server does not state its size")
    return found["size"], f"{system.ukey(path)} {found.get('ETag', '')}".strip()  # ukey alone is the name over HTTP


def find_files(url: str, left_out: dict[str, list[str]]) -> list[str]:
    """Returns the URLs of a file, of the files below a folder, or of those that a glob matches, sorted.

    Args:
      url: the URL.
      left_out: gets the hidden files below folders, under "hidden".

    Raises:
      ValueError: no such file.
    """
    with reaching(url):
        system, path = open_filesystem(url)
        is_glob = glob.has_magic(path) and not url.startswith("http")  # there, `?` begins a query
        entries = sorted(system.glob(path)) if is_glob else [path]
        found = []
        for entry in entries:
            names = sorted(system.find(entry)) if system.info(entry)["type"] == "directory" else [entry]
            for name in names:
                inside = posixpath.relpath(name, entry if name != entry else posixpath.dirname(entry)).split("/")
                hidden = name != path and any(part.startswith(".") for part in inside)
                full = url if name == path else system.unstrip_protocol(name)
                (left_out.setdefault("hidden", []) if hidden else found).append(full)
        if not found:
            raise FileNotFoundError
        return found


def fetch_store(url: str, *, verify: bool = True) -> Path:
    """Copies a token store, a token file or a folder of token files into the local cache; returns its path there.

    A file that was copied before is not copied again while the URL has the same files in the same versions. Copies of
    older versions stay until they are deleted.

    Args:
      url: the store.
      verify: compares the cached files with the checksums of their download.

    Raises:
      ValueError: the URL does not exist, or a download has another size than the URL.
    """
    with reaching(url):
        system, path = open_filesystem(url)
        folder, files = _store_files(system, path.rstrip("/"))
        key = hashlib.sha256(json.dumps([url, sorted(files.items())]).encode()).hexdigest()[:32]
        local = cache_folder("stores") / key
        with exclusive(local):
            sums = read_object(local / _SUMS)
            for name, (size, _) in files.items():
                target = local / name
                intact = name in sums and target.is_file() and target.stat().st_size == size
                if intact and (not verify or sha256_file(target) == sums[name]):
                    continue
                fetch_file(system, posixpath.join(folder, name), target)
                if target.stat().st_size != size:
                    raise OSError(f"{name} has {target.stat().st_size} bytes after the download, not {size}")
                sums[name] = sha256_file(target)
                write_json(local / _SUMS, sums)
    name = posixpath.relpath(path, folder)
    return local if name == "." else local / name


def _store_files(system: Any, path: str) -> tuple[str, dict[str, Version]]:
    """Returns the folder of a store and the version of each of its files, by name."""
    folder = path if system.isdir(path) else posixpath.dirname(path)
    entries = system.ls(folder, detail=True)
    names = [posixpath.basename(entry["name"]) for entry in entries if entry["type"] == "file"]
    names = [name for name in names if not name.startswith(".")]
    if folder != path:
        base, suffix = posixpath.splitext(posixpath.basename(path))
        stem = base if suffix in _BESIDE else base + suffix
        wanted = {posixpath.basename(path), *(stem + suffix for suffix in _BESIDE), *_SHARED}
        names = [name for name in names if name in wanted]
    if not set(names) - set(_SHARED):
        raise FileNotFoundError
    return folder, {name: _version(system, posixpath.join(folder, name)) for name in names}
