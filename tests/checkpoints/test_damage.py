"""Every file of a checkpoint, damaged in every way: the damage is found and the next whole checkpoint is chosen."""

import hashlib
import json
import os
import shutil
import stat

import pytest
from checkpoint_helpers import Events, abstract, make_state, names

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.manifest import FINGERPRINT, Damaged, hash_files, verify
from jaxtrain.checkpoints.restore import choose, find_fingerprint, restore_params


def other_file(file, content):
    """Another file of the same checkpoint, with other bytes."""
    checkpoint = next(parent for parent in file.parents if parent.name == "3")
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path != file]
    return next(path for path in files if path.read_bytes() != content)


def swap(file, content):
    other = other_file(file, content)
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def flip(file, content):
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b"\1")


def replace(file, make):
    file.unlink()
    make(file)


DAMAGES = {
    "truncate": lambda file, content: file.write_bytes(content[: len(content) // 2]),
    "one byte less": lambda file, content: file.write_bytes(content[:-1]),
    "one byte more": lambda file, content: file.write_bytes(content + b"\0"),
    "flip": flip,
    "delete": lambda file, content: file.unlink(),
    "empty": lambda file, content: file.write_bytes(b""),
    "zeros": lambda file, content: file.write_bytes(bytes(len(content))),
    "swap": swap,
    "symlink": lambda file, content: replace(file, lambda path: path.symlink_to(other_file(file, content))),
    "dangling symlink": lambda file, content: replace(file, lambda path: path.symlink_to("nowhere")),
    "symlink to itself": lambda file, content: replace(file, lambda path: path.symlink_to(path.name)),
    "FIFO": lambda file, content: replace(file, os.mkfifo),
    "folder": lambda file, content: replace(file, lambda path: path.mkdir()),
    "socket": lambda file, content: replace(file, lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)),
    "chmod 0": lambda file, content: file.chmod(0),
}


def is_whole(file, content):
    """True if a reader can't tell: no change at all, a manifest without its last newline, root reads without a mode."""
    if not file.is_file() or not os.access(file, os.R_OK):
        return False
    return file.read_bytes() == content or (file.name == "manifest.json" and file.read_bytes() + b"\n" == content)


def undo(checkpoint, file, content, everything):
    if everything:
        shutil.rmtree(checkpoint)
        return
    shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
    file.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found(three, tmp_path, damage):
    """Damage in record/ counts too; a reader of the parameters alone ignores damage in rest/."""
    path, like = tmp_path / "checkpoints", abstract(make_state())
    whole = {"params": like.params, "rest": like.replace(params=None)}
    shutil.copytree(three / "2", path / "2")
    for name in sorted(str(file.relative_to(three / "3")) for file in (three / "3").rglob("*") if file.is_file()):
        if damage == "swap" or not (path / "3").exists():
            shutil.copytree(three / "3", path / "3")
        file, events = path / "3" / name, Events()
        content = file.read_bytes()
        DAMAGES[damage](file, content)
        harmless = is_whole(file, content)
        folder = CheckpointFolder(path, report=events)
        assert choose(folder, whole) == (3 if harmless else 2), name
        if name.startswith("rest/"):
            assert choose(folder, {"params": like.params}) == (2 if damage == "swap" else 3), name
        if not harmless and damage != "swap":
            assert events[0][1].startswith(f"checkpoint 3 is damaged: {name} "), (name, events)
        if name.startswith("record/") and not harmless:
            assert find_fingerprint(folder)[1] == 2
        undo(path / "3", file, content, everything=damage == "swap")


def seal_again(checkpoint, **changes):
    """Changes entries of a manifest and corrects its checksum."""
    manifest = json.loads((checkpoint / "manifest.json").read_text()) | changes
    del manifest["checksum"]
    checksum = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"checksum": checksum}))


NOTHING = hashlib.sha256().hexdigest()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"files": {"/dev/zero": {"bytes": 0, "sha256": NOTHING}}}, "/dev/zero is not a regular file"),
        ({"files": {"params": {"bytes": 0, "sha256": NOTHING}}}, "params is not a regular file"),
        ({"files": {"a\0b": {"bytes": 0, "sha256": NOTHING}}}, "cannot be read"),
        ({"files": {"a" * 5000: {"bytes": 0, "sha256": NOTHING}}}, "cannot be read"),
        ({"files": {}}, "record/metadata is not listed"),
        ({"files": []}, "is not what was written"),
        ({"files": {"params": None}}, "is not what was written"),
        ({"files": {"params": {"bytes": "0", "sha256": NOTHING}}}, "is not what was written"),
        ({"leaves": None}, "is not what was written"),
        ({"leaves": {"params/w": {"shape": 3, "dtype": "float32"}}}, "is not what was written"),
        ({"step": 2}, "is not what was written"),
        ({"step": None}, "is not what was written"),
        ({"version": 2}, "is not of format jaxtrain-checkpoint, version 1"),
    ],
)
def test_a_crafted_manifest_is_damage(three, tmp_path, changes, problem):
    """A malformed manifest is damage even if its checksum is valid."""
    shutil.copytree(three / "3", tmp_path / "3")
    seal_again(tmp_path / "3", **changes)
    with pytest.raises(Damaged, match=problem):
        verify(tmp_path / "3")


@pytest.mark.parametrize(
    "values", [[], None, {"config": []}, {"data": 3}, {"tokenizer": {}}, {"decay_mask": "w"}], ids=str
)
def test_a_crafted_fingerprint_is_damage(three, tmp_path, values):
    shutil.copytree(three / "3", tmp_path / "3")
    (tmp_path / "3" / FINGERPRINT).write_text(json.dumps(values))
    files = json.loads((tmp_path / "3" / "manifest.json").read_text())["files"]
    seal_again(tmp_path / "3", files=files | hash_files(tmp_path / "3", [FINGERPRINT]))
    with pytest.raises(Damaged, match="record/metadata is not what was written"):
        verify(tmp_path / "3")


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "[]", "3", "null", "\0\0\0", '{"step": ' + "9" * 5000 + "}", '"\\ud800"']
)
def test_a_manifest_that_is_something_else_is_damage(three, tmp_path, text):
    shutil.copytree(three / "3", tmp_path / "3")
    (tmp_path / "3" / "manifest.json").write_text(text)
    with pytest.raises(Damaged, match=r"^manifest\.json "):
        verify(tmp_path / "3")


@pytest.mark.parametrize("kind", ["another step", "empty folder", "file", "FIFO", "symlink to nothing"])
def test_a_checkpoint_that_is_something_else_is_renamed(three, tmp_path, kind):
    path, like = shutil.copytree(three, tmp_path / "checkpoints"), abstract(make_state())
    shutil.rmtree(path / "3")
    make = {
        "another step": lambda: shutil.copytree(path / "2", path / "3"),
        "empty folder": (path / "3").mkdir,
        "file": (path / "3").touch,
        "FIFO": lambda: os.mkfifo(path / "3"),
        "symlink to nothing": lambda: (path / "3").symlink_to("nowhere"),
    }
    make[kind]()
    folder = CheckpointFolder(path, report=Events())
    assert choose(folder, {"params": like.params}, repair=True) == 2
    assert names(path) == ["1", "2", "3.damaged"]


def test_links_to_the_bytes_that_were_written_are_whole(three, tmp_path):
    """Tools for large files replace files by links."""
    path, like = shutil.copytree(three, tmp_path / "checkpoints"), abstract(make_state())
    for number, file in enumerate(sorted(file for file in (path / "3").rglob("*") if file.is_file())):
        shutil.move(file, tmp_path / str(number))
        file.symlink_to(tmp_path / str(number))
    assert restore_params(CheckpointFolder(path), like.params)[-1] == 3
