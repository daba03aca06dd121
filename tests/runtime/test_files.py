import errno
import fcntl
import os
from pathlib import Path

import pytest

from jaxtrain.runtime.files import locked, read_json, sha256_file, write_bytes, write_json, write_text
from jaxtrain.training.run_folder import run_lock

WRITERS = {
    "bytes": (write_bytes, b"\xff\r\n", b"\xff\r\n"),
    "text": (write_text, "é\r\n", "é\r\n".encode()),
    "json": (write_json, {"é": [1]}, b'{\n "\\u00e9": [\n  1\n ]\n}\n'),
}


@pytest.mark.parametrize("name", WRITERS)
def test_small_files_are_synced_before_and_after_the_rename(name, tmp_path, monkeypatch):
    write, value, data = WRITERS[name]
    path, calls = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor):
        calls.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def logged_replace(source, target):
        calls.append(("replace", os.stat(source).st_ino, os.path.getsize(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    path.write_text("old")
    write(path, value)
    assert path.read_bytes() == data
    inode = path.stat().st_ino
    assert calls == [("fsync", inode), ("replace", inode, len(data)), ("fsync", tmp_path.stat().st_ino)]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(call, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    write_text(path, "old")
    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\0" * 64, b"\xff\xfe", b"[" * 200_000, b"1" * 5_000, b'{"a": 1}}'], ids=lambda data: data[:4]
)
def test_invalid_json_reads_as_none(data, tmp_path):
    (tmp_path / "x.json").write_bytes(data)
    assert read_json(tmp_path / "x.json") is None
    assert read_json(tmp_path / "missing.json") is None
    assert read_json(tmp_path) is None


def test_files_that_are_none_are_not_waited_for(tmp_path):
    """Opening a FIFO waits for its other end, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("fifo", "zero"):
        assert read_json(tmp_path / name) is None
        (tmp_path / name).rename(tmp_path / "x.json.tmp")
        write_json(tmp_path / "x.json", {"a": 1})
        assert read_json(tmp_path / "x.json") == {"a": 1}
        assert not (tmp_path / "x.json").is_symlink()


def test_parts_of_a_run_that_are_something_else_are_named(tmp_path):
    for name, kind in (("checkpoints", "folder"), ("metrics.jsonl", "regular file"), ("lock", "regular file")):
        for make in (os.mkfifo, lambda path: path.symlink_to("nowhere"), Path.touch, Path.mkdir):
            if make is (Path.mkdir if kind == "folder" else Path.touch):
                continue
            path = tmp_path / name
            make(path)
            with pytest.raises(ValueError, match=f"{name} is no {kind}: move it away"), run_lock(tmp_path):
                pass
            path.rmdir() if path.is_dir() else path.unlink()


def test_json_round_trips_and_hashes(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, None, "é"]})
    assert read_json(tmp_path / "x.json") == {"a": [1, None, "é"]}
    write_text(tmp_path / "empty", "")
    assert sha256_file(tmp_path / "empty")[:8] == "e3b0c442"


def test_locked_folder(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    with locked(folder), pytest.raises(ValueError, match="another process is at work in"), locked(folder):
        pass
    with locked(folder):  # the lock was released
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP])
@pytest.mark.parametrize("lock_of", [locked, run_lock])
def test_a_file_system_without_locks(number, lock_of, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    folder = tmp_path / "folder"
    expected = r"folder has no locks \(.*\): choose .* another one, or give --no-lock"
    with pytest.raises(ValueError, match=expected) as error, lock_of(folder):
        pass
    assert "\n" not in str(error.value)
    if lock_of is run_lock:
        assert not folder.exists()
    with lock_of(folder, lock=False):
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("lock_of", [locked, run_lock])
def test_another_error_of_a_lock_passes(lock_of, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"), lock_of(tmp_path / "folder"):
        pass
