"""Files that survive a crash: durable writes of small files, folder locks, hashes; the git commit of a folder."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

_LOCK_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def sync(stream: IO) -> None:
    """Flushes an open file to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to the disk, which makes earlier renames and new files in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a small file durably: writes a temporary file, syncs it, renames it and syncs the folder.

    After a crash or a power cut the file holds either its old or its new content.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a crash; it may also be a FIFO or a link
        with open(temporary, "xb") as stream:
            stream.write(data)
            sync(stream)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces a small UTF-8 file as `write_bytes` does; line ends stay as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replaces a small JSON file as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_file(path: str | Path) -> bytes:
    """Reads a file or pipe that a user names. Raises a ValueError for a device, which may never end."""
    if stat.S_ISCHR(os.stat(path).st_mode) or stat.S_ISBLK(os.stat(path).st_mode):
        raise ValueError(f"{path} is a device: give a file")
    return Path(path).read_bytes()


def read_json(path: Path) -> Any:
    """Reads a JSON file; returns None if the file is missing, unreadable, no regular file or not JSON."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None  # a device or a FIFO may have no end
    except (OSError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one if the file holds another value, or where `read_json` returns None."""
    values = read_json(path)
    return values if isinstance(values, dict) else {}


def cache_folder(name: str) -> Path:
    """Returns the path of a folder in the user's cache (XDG_CACHE_HOME, or ~/.cache); it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification ignores relative paths
        base = os.path.expanduser("~/.cache")
    return Path(base) / "jaxtrain" / name


def checksum(values: Mapping[str, Any], default: Callable[[Any], Any] | None = None) -> str:
    """Returns the SHA-256 (hex) of JSON values; the order of keys does not count. `default` converts other values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=default).encode()).hexdigest()


def write_sealed_json(path: Path, values: dict[str, Any]) -> None:
    """Replaces a small JSON file as `write_bytes` does, with the `checksum` of its values beside them."""
    write_json(path, values | {"checksum": checksum(json.loads(json.dumps(values)))})


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def empty_folder(folder: Path) -> None:
    """Deletes everything in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@functools.cache
def git_commit(folder: Path) -> str | None:
    """Returns the commit of the git repository around a folder, marked if tracked files differ; None without one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + (" (modified)" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or a slow file system
        return None


def flock(descriptor: int, folder: Path) -> bool:
    """Locks an open file exclusively, without waiting; returns False if another process holds its lock.

    Raises a ValueError that names `folder` if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _LOCK_UNSUPPORTED:
            raise
        remedy = "choose a folder on another one, or give --no-lock and let no second process use this folder"
        raise ValueError(f"the file system of {folder} has no locks ({error.strerror}): {remedy}") from None
    return True


@contextlib.contextmanager
def locked(folder: Path, *, lock: bool = True) -> Iterator[None]:
    """Holds an exclusive lock on a folder, which is created if it is missing. `lock` False takes no lock.

    Raises a ValueError if another process holds the lock, or if the file system has no locks.
    """
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if lock and not flock(descriptor, folder):
            raise ValueError(f"another process is at work in {folder}: wait for it, or choose another folder")
        yield
    finally:
        os.close(descriptor)
