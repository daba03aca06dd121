"""Power cuts at every flush, rename and deletion of a run, on a model of a disk that keeps only what was flushed.

`Disk` interposes os.fsync and the calls that change names while a run trains. At each of them it makes the images that
a disk may hold after a power cut; the reading side must find a run that resumes in each image.
"""

import functools
import hashlib
import os
import stat
import threading

import pytest
from runs import QUICK, change, train

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.manifest import Damaged, verify
from jaxtrain.checkpoints.run_config import lost_config
from jaxtrain.checkpoints.save import Saver
from jaxtrain.config import to_dict
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.files import read_json

_CHANGES = ("fsync", "replace", "rename", "unlink", "rmdir")


class Disk:
    """Images of the tree below `root` after a power cut, recorded while the block runs.

    Attributes:
      images: `[(committed, files)]`: step of the newest checkpoint that counted before (None without one), and the
        bytes of each file by its path, relative to `root`; None for a folder. Three images before and after a call:
        strict: a file holds its bytes, and a folder its entries, of its last flush; others are lost.
        empty: every entry survives, but no byte that was not flushed.
        torn: every entry survives, with half of the bytes that were not flushed.
    """

    def __init__(self, root, monkeypatch):
        self.images, self.committed = [], None
        self._root, self._bytes, self._entries = root, {}, {}  # flushed bytes by inode, entries by the folder's
        self._open, self._lock, self._seen = [], threading.RLock(), set()
        self._real = {name: getattr(os, name) for name in _CHANGES}
        self._entries[os.stat(root).st_ino] = {}
        for name in _CHANGES:
            monkeypatch.setattr(os, name, functools.partial(self._call, name))

    def _call(self, name, *arguments, **options):
        with self._lock:
            self._record()
            result = self._real[name](*arguments, **options)
            if name == "fsync":
                self._flush(arguments[0])
            self._record()
        return result

    fsync = functools.partialmethod(_call, "fsync")

    def _flush(self, descriptor):
        status = os.fstat(descriptor)
        self._open.append(os.dup(descriptor))  # so that no other file gets its inode
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if stat.S_ISDIR(status.st_mode):
            self._entries[status.st_ino] = {e.name: (e.inode(), e.is_dir()) for e in os.scandir(path)}
        else:
            with open(path, "rb") as stream:
                self._bytes[status.st_ino] = stream.read()

    def _record(self):
        strict = dict(self._strict("", os.stat(self._root).st_ino))
        empty, torn = {}, {}
        for folder, _, names in os.walk(self._root):
            where = os.path.relpath(folder, self._root)
            if where != ".":
                empty[where] = torn[where] = None
            for name in names:
                path = os.path.normpath(os.path.join(where, name))
                try:
                    inode, size = os.stat(os.path.join(folder, name)).st_ino, os.path.getsize(f"{folder}/{name}")
                except FileNotFoundError:  # deleted by a thread of Orbax
                    continue
                empty[path] = self._bytes.get(inode, b"")
                torn[path] = empty[path] + bytes(max(0, size - len(empty[path])) // 2)
        for image in (strict, empty, torn):
            key = hashlib.sha256(repr((self.committed, sorted(image.items()))).encode()).digest()
            if key not in self._seen:
                self._seen.add(key)
                self.images.append((self.committed, image))

    def _strict(self, where, folder):
        for name, (inode, is_folder) in self._entries.get(folder, {}).items():
            path = os.path.join(where, name)
            yield path, None if is_folder else self._bytes.get(inode, b"")
            yield from self._strict(path, inode)

    def close(self):
        for descriptor in self._open:
            os.close(descriptor)


def write_image(root, image, before):
    """Turns a folder that holds the image `before` into one that holds `image`; returns its run directory."""
    for path in sorted(before.keys() - image.keys(), reverse=True):
        (root / path).rmdir() if before[path] is None else (root / path).unlink()
    for path, data in sorted(image.items()):
        if data is None:
            (root / path).mkdir(exist_ok=True)
        elif data != before.get(path):
            (root / path).write_bytes(data)
    return root / "run"


def whole_steps(run_dir):
    """Steps of the checkpoints that verify."""
    folder, whole = CheckpointFolder(run_dir / "checkpoints"), []
    for step in folder.steps():
        try:
            verify(folder.checkpoint(step))
        except Damaged:
            continue
        whole.append(step)
    return whole


def problem(run_dir, committed, config):
    """Returns why a run could not be resumed where it was, or ""."""
    whole = whole_steps(run_dir)
    if committed and committed not in whole:
        return f"lost the checkpoint of step {committed}, there are {whole}"
    if not whole:
        return ""  # starts anew
    values = read_json(run_dir / "config.json")
    if not isinstance(values, dict):
        values = (lost_config(run_dir) or ({},))[0]
    if values != config:
        return "config.json is lost and in no checkpoint"
    lines = read_metrics(run_dir / "metrics.jsonl")[0] if (run_dir / "metrics.jsonl").exists() else []
    if max((line["step"] for line in lines), default=0) < max(whole):
        return f"the log ends {max(whole) - len(lines)} steps before the checkpoint of step {max(whole)}"
    return ""


@pytest.fixture
def recorded(tiny_config, tmp_path, monkeypatch):
    """A run of 4 steps with two checkpoints, of which one stays; evaluated and scored."""
    config = change(
        tiny_config,
        train={"steps": 4, "log_every": 1, "eval_every": 2, "eval_batches": 1},
        checkpoint={"every": 2, "keep": 1, "keep_best": 1},
    )
    root = tmp_path / "disk"
    root.mkdir()
    with monkeypatch.context() as patched:
        disk = Disk(root, patched)
        folder = CheckpointFolder(root / "run" / "checkpoints")

        def on_stage(stage):
            if stage == "committed":
                disk.committed = folder.latest_step()

        hooks = QUICK._replace(make_saver=functools.partial(Saver, fsync=disk.fsync, on_stage=on_stage))
        train(config, root / "run", hooks=hooks)
    disk.close()
    return config, disk.images


def test_a_power_cut_at_any_moment_leaves_a_run_that_resumes(recorded, tmp_path):
    config, images = recorded
    root, before, expected, problems = tmp_path / "image", {}, None, []
    root.mkdir()
    for committed, image in images:
        run_dir, before = write_image(root, image, before), image
        if expected is None and isinstance(values := read_json(run_dir / "config.json"), dict):
            expected = values
        problems += [found] if (found := problem(run_dir, committed, expected)) else []
    assert expected["train"] == to_dict(config)["train"]
    assert problems == []
    assert len(images) > 50
    image = next(image for committed, image in images if committed)
    run_dir = write_image(root, image, before)
    assert train(config, run_dir)["reason"] == "finished"
    assert read_metrics(run_dir / "metrics.jsonl")[0][-1]["step"] == 4
