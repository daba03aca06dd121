"""Run directories behind URLs, on fsspec's memory file system: uploads that fail, leases, hosts that take turns."""

import dataclasses
import hashlib
import json
import posixpath
import shutil
import threading
import time

import fsspec
import pytest
from helpers import LIMIT, wait_until

import jaxtrain
from jaxtrain.checkpoints import mirror as mirrors
from jaxtrain.checkpoints import warm_start
from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.manifest import Damaged, seal, verify
from jaxtrain.checkpoints.mirror import Mirror, working_folder
from jaxtrain.cli import main
from jaxtrain.config import DataConfig
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime import lease as leases
from jaxtrain.runtime.files import checksum
from jaxtrain.runtime.lease import Lease, LeaseLost
from jaxtrain.runtime.remote import local_run
from jaxtrain.training.train import train

URL = "memory://bucket/run"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Empty memory file system; `host` is where the cache of the current machine is."""
    monkeypatch.setattr(leases, "_SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(mirrors, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return system


def write_checkpoint(run, step, text):
    folder = run / "checkpoints" / str(step)
    for name in ("params/a", "rest/b", "record/metadata"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps({name: f"of {step}: {text}"}))
    seal(folder, step, {}, {})


def steps_at_url():
    """Verifies the checkpoints as a machine without any would; returns their steps."""
    run = local_run(URL)
    steps = CheckpointFolder(run / "checkpoints").steps()
    for step in steps:
        assert verify(run / "checkpoints" / str(step))[1]
    return steps


@pytest.fixture
def held(bucket):
    lease = Lease(URL)
    lease.acquire()
    yield lease
    lease.release()


def test_a_kill_at_any_write_leaves_a_whole_checkpoint(bucket, held, tmp_path, monkeypatch):
    """The process dies at the n-th change of the bucket, for every n: a new checkpoint, an old one, a rewound one."""
    run = tmp_path / "run"
    write_checkpoint(run, 5, "first")
    write_checkpoint(run, 10, "first")
    (run / "config.json").write_text("{}")
    Mirror(URL, run, held).close()
    assert steps_at_url() == [5, 10]
    before = dict(bucket.store)
    shutil.rmtree(run / "checkpoints" / "10")
    write_checkpoint(run, 10, "second")
    write_checkpoint(run, 15, "second")
    shutil.rmtree(run / "checkpoints" / "5")
    budget, seen = [0], []

    def dying(change):
        def changed(self, *args, **options):
            budget[0] -= 1
            if budget[0] < 0:
                raise ConnectionError("killed")
            return change(self, *args, **options)

        return changed

    for name in ("put_file", "pipe_file", "rm_file"):
        monkeypatch.setattr(type(bucket), name, dying(getattr(type(bucket), name)))
    by_file = lambda self, path, recursive: [self.rm_file(name) for name in sorted(self.find(path), reverse=True)]  # noqa: E731
    monkeypatch.setattr(type(bucket), "rm", by_file)
    for deaths in range(100):
        bucket.store.clear()
        bucket.store.update(before)
        mirror, budget[0] = Mirror(URL, run, held), deaths
        mirror._try_upload()
        budget[0] = 1000
        seen.append((steps_at_url(), mirror._error is None))
        if mirror._error is None:
            break
        mirror.close()  # the process had lived: the next upload completes this one
        assert steps_at_url() == [10, 15]
    assert seen[-1] == ([10, 15], True)
    assert {tuple(steps) for steps, _ in seen} >= {(5, 10), (5, 10, 15), (5, 15), (10, 15)}
    assert {path for path in bucket.store if "/checkpoints/5/" in path} == set()


def test_of_two_candidates_for_a_lease_the_slower_one_loses(bucket):
    """It does not overwrite the lease of the other, however late it writes."""
    first = Lease(URL)

    class Slow(Lease):
        def require_free(self, **options):
            found = super().require_free(**options)
            if not bucket.store:
                first.acquire()
            return found

    with pytest.raises(ValueError, match="is being trained in by process"):
        Slow(URL).acquire()
    first.require()
    first.release()


def test_failures_are_reported_once_and_slow_uploads_block_nothing(bucket, held, tmp_path, monkeypatch):
    run, events, go = tmp_path / "run", [], threading.Event()
    folder = CheckpointFolder(
        run / "checkpoints", keep=1, report=lambda event, text, **more: events.append((event, text))
    )
    mirror, put_file = Mirror(URL, run, held), type(bucket).put_file

    def save(step):
        write_checkpoint(run, step, "x")
        folder.prune()
        mirror.poll(folder)
        wait_until(lambda: not (mirror._thread and mirror._thread.is_alive()))

    def fail(self, *_, **__):
        raise PermissionError("read-only bucket")

    def slow(self, *args, **options):
        assert go.wait(LIMIT)
        put_file(self, *args, **options)

    monkeypatch.setattr(type(bucket), "put_file", fail)
    for step in (1, 2, 3):
        save(step)
    text = f"the upload to {URL} failed: PermissionError: read-only bucket; the next save is the retry"
    assert events == [("upload_failed", text)]
    monkeypatch.setattr(type(bucket), "put_file", put_file)
    save(4)
    monkeypatch.setattr(type(bucket), "put_file", slow)
    write_checkpoint(run, 5, "x")
    mirror.poll(folder)
    begin = time.monotonic()
    for step in (6, 7):
        write_checkpoint(run, step, "x")
        folder.prune()
        mirror.poll(folder)
    assert time.monotonic() - begin < LIMIT / 2
    there = folder.steps()
    go.set()
    assert there == [5, 7]  # that which is uploaded stays, beyond keep
    mirror._thread.join(LIMIT)
    assert steps_at_url() == [5]
    mirror.poll(folder)
    mirror._thread.join(LIMIT)
    assert steps_at_url()[-1] == 7
    mirror.poll(folder)
    folder.prune()
    (run / "config.json").write_text("{}")
    mirror.close()
    assert steps_at_url() == folder.steps() == [7]
    monkeypatch.setattr(type(bucket), "pipe_file", fail)
    (run / "config.json").write_text("{} ")
    with pytest.raises(
        OSError, match=rf"the upload to {URL} failed: Perm.*; the run is whole in .*run: start it again"
    ):
        mirror.close()


def read_lease(bucket):
    return json.loads(bucket.cat_file(max(path for path in bucket.store if ".lease." in path)))


def rewrite_lease(bucket, **values):
    path = max(path for path in bucket.store if ".lease." in path)
    bucket.pipe_file(path, json.dumps(read_lease(bucket) | values).encode())


def test_one_process_holds_the_lease(bucket):
    first, refusal = Lease(URL), rf"{URL} is being trained in by process \d+ on \S+, seen \d+ s ago: wait for it"
    assert first.acquire() is None
    for others in ((), ("0" * 32,)):
        with pytest.raises(ValueError, match=refusal) as caught:
            Lease(URL).acquire(own=others)
        assert "\n" not in str(caught.value)
    killed = Lease(URL)
    assert killed.acquire(own=(first.token,)) == first.token  # the folder's lock tells that its process is gone
    with pytest.raises(LeaseLost, match=rf"{URL} was taken over by process"):
        first.require()
    first.release()  # takes nothing from the holder
    rewrite_lease(bucket, host="elsewhere")
    with pytest.raises(ValueError, match="on elsewhere, seen"):
        Lease(URL).acquire(own=(killed.token,))
    rewrite_lease(bucket, time=time.time() - 121)
    third = Lease(URL, seconds=4.0)  # renewed every second
    assert third.acquire() == killed.token
    rewrite_lease(bucket, time=1.0)
    wait_until(lambda: read_lease(bucket)["time"] > 1.0)
    with pytest.raises(ValueError, match=refusal):
        Lease(URL).acquire()
    third.release()
    assert [path for path in bucket.store if ".lease." in path] == ["/bucket/run/.lease.3.json"]
    won, start = [], threading.Barrier(6)

    def compete():
        lease = Lease(URL)
        start.wait(LIMIT)
        try:
            lease.acquire()
        except (ValueError, OSError):
            return
        won.append(lease)

    threads = [threading.Thread(target=compete) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert len(won) == 1
    won[0].require()
    won[0].release()


def test_a_run_that_lost_its_lease_uploads_no_checkpoint(bucket, tmp_path):
    run, lease = tmp_path / "run", Lease(URL, seconds=0.2)
    lease.acquire()
    mirror, folder = Mirror(URL, run, lease), CheckpointFolder(run / "checkpoints")
    rewrite_lease(bucket, time=0)
    other = Lease(URL)
    other.acquire(own=(lease.token,))
    write_checkpoint(run, 5, "x")
    (run / "config.json").write_text("{}")
    wait_until(lambda: lease._lost)
    for action in (lambda: mirror.poll(folder), mirror.close):
        with pytest.raises(
            LeaseLost, match=r"was taken over by process .* this process ends, and uploads nothing more"
        ):
            action()
    assert not [path for path in bucket.store if "checkpoints" in path]
    other.release()


def test_a_manifest_names_no_file_outside_of_its_checkpoint(bucket, held, tmp_path):
    run = tmp_path / "run"
    write_checkpoint(run, 5, "x")
    (run / "config.json").write_text("{}")
    Mirror(URL, run, held).close()
    path = "/bucket/run/checkpoints/5/manifest.json"
    manifest = json.loads(bucket.cat_file(path))
    del manifest["checksum"]
    for name in ("../../../stolen", str(tmp_path / "stolen")):
        bucket.pipe_file(posixpath.join("/bucket/run/checkpoints/5", name), b"x")
        forged = manifest | {
            "files": {name: {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}} | manifest["files"]
        }
        bucket.pipe_file(path, json.dumps(forged | {"checksum": checksum(forged)}).encode())
        with pytest.raises(Damaged, match="stolen is missing"):
            verify(local_run(URL) / "checkpoints" / "5")
    assert not list(tmp_path.rglob("stolen"))


def test_hosts_take_turns_in_a_run(bucket, corpus, tiny_config, tmp_path, monkeypatch, capfd):
    """Two machines train in turns to the bits of a run that stays; a third reads; damage of one copy is repaired."""

    def on(host):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / host))

    config = dataclasses.replace(tiny_config, data=DataConfig(sources=(str(corpus),), validation_fraction=0.2))
    train(config, tmp_path / "stays")
    until = lambda step: dataclasses.replace(config, train=dataclasses.replace(config.train, stop_after=step))  # noqa: E731
    train(until(4), URL)
    on("b")
    train(until(7), URL)
    on("a")
    with working_folder(URL):
        on("b")
        with pytest.raises(ValueError, match="is being trained in by"):
            train(config, URL)
    on("a")
    assert train(config, URL)["reason"] == "finished"
    on("c")
    copy = local_run(URL)
    losses = [
        [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl")[0]]
        for run in (copy, tmp_path / "stays")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12
    assert jaxtrain.load(URL).step == 12
    arrays = [path for path in (copy / "checkpoints" / "12").rglob("*") if path.is_file() and path.suffix != ".json"]
    assert {path.relative_to(copy).parts[2] for path in arrays} == {
        "params",
        "record",
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
    }
    for path in arrays:
        path.write_bytes(b"damaged")
    verify(copy / "checkpoints" / "12")
    assert main(["runs", "memory://bucket"]) == 0
    assert "finished" in capfd.readouterr().out
    assert main(["report", URL]) == 0
    assert warm_start.find(f"{URL}/checkpoints/10", tmp_path / "warm") == (copy, 10)
    for url in ("memory://bucket/none", "memory://bucket/run/config.json"):
        assert main(["eval", url]) == 2
        assert f"no file or folder {url}: check the URL" in capfd.readouterr().err
