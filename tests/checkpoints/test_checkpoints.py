"""Checkpoints: what is read is what was written, or an error that names the path."""

import errno
import json
import re
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoints import checkpoints as checkpoint
from jaxtrain.checkpoints.checkpoints import Checkpoints, kept
from jaxtrain.checkpoints.manifest import Damaged, verify
from jaxtrain.config import MeshConfig
from jaxtrain.optim import clipped_adamw
from jaxtrain.runtime import stop
from jaxtrain.runtime.mesh import make_mesh, replicated
from jaxtrain.step import TrainState

RECORD = {"data": "fingerprint", "decay_mask": ["w"]}


def make_state(step=3, **changes):
    params = {"w": jnp.arange(6.0).reshape(2, 3), "layers": {"scale": jnp.ones((2, 4))}} | changes
    optimizer = clipped_adamw(1e-2)
    state = TrainState.create(params, optimizer)
    grads = jax.tree.map(jnp.ones_like, params)
    _, opt_state = optimizer.update(grads, state.opt_state, params)
    return state.replace(step=jnp.int32(step), opt_state=opt_state)


def abstract(state, num_devices=1):
    sharding = replicated(make_mesh(MeshConfig(data=num_devices)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.weak_type == y.weak_type
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(make_state(), RECORD)
        checkpoints.wait()
    return folder


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_new_process_reads_what_was_written_onto_its_devices(folder, num_devices):
    state = make_state()
    with Checkpoints(folder) as checkpoints:
        restored, record = checkpoints.restore(abstract(state, num_devices))
    same(restored, state)
    assert record == RECORD
    assert len(restored.params["w"].sharding.device_set) == num_devices


def test_parameters_alone(folder):
    state = make_state()
    with Checkpoints(folder) as checkpoints:
        params, step = checkpoints.restore_params(abstract(state).params)
    assert step == 3
    same(params, state.params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": jnp.ones(2)}, "extra: missing from the checkpoint"),
        ({"w": jnp.ones((2, 4))}, r"w: float32\[2, 3\] in the checkpoint, float32\[2, 4\] in the run"),
        ({"w": jnp.ones((2, 3), jnp.bfloat16)}, r"w: float32\[2, 3\] in the checkpoint, bfloat16\[2, 3\] in the run"),
        ({"layers": {}}, "layers/scale: in the checkpoint, not in the run"),
    ],
)
def test_restore_is_strict_and_names_the_path(folder, changes, message):
    like = abstract(make_state())
    like = like.replace(params={**like.params, **abstract(changes)})
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(like)
        with pytest.raises(ValueError, match=message):
            checkpoints.restore_params(like.params)


def test_restore_is_strict_about_the_optimizer_too(folder):
    like = abstract(make_state())
    like = like.replace(opt_state=(*like.opt_state, {"more": like.step}))
    with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match="opt_state/4/more: missing"):
        checkpoints.restore(like)


def test_missing_checkpoints_are_named(folder, tmp_path):
    like = abstract(make_state())
    with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match=r"step 7 .* there are \[3\]"):
        checkpoints.restore(like, 7)
    with Checkpoints(tmp_path / "empty") as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(ValueError, match="no checkpoint in"):
            checkpoints.restore(like)


def test_the_newest_are_kept_and_saving_a_step_again_is_harmless(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(make_state(step), RECORD)
        checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_save_is_not_touched_by_the_steps_that_follow_it(tmp_path):
    """The next step takes the memory of the state that is still being written."""
    state = make_state(0, w=jnp.zeros((1000, 1000)))
    expected = jax.tree.map(np.array, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, RECORD)
        for _ in range(5):
            state = step(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(abstract(state))
    same(restored, jax.tree.map(jnp.asarray, expected))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with checkpoints of steps 1, 2 and 3, not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step), RECORD)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def big_file(folder, part):
    return max((folder / part).rglob("d/*"), key=lambda path: path.stat().st_size)


def truncate(folder):
    file = big_file(folder, "params")
    file.write_bytes(file.read_bytes()[:10])
    return rf"{file.name} has 10 bytes, its manifest says \d+"


def flip_a_bit(folder):
    file = big_file(folder, "params")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return f"{file.name} has other bytes than were written"


def lose_a_file(folder):
    file = big_file(folder, "params")
    file.unlink()
    return f"params/.*{file.name} is missing"


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json is missing"


def tear_the_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])
    return "manifest.json is not readable"


def change_the_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("float32", "float64", 1))
    return "manifest.json is not what was written"


def seal_a_strangers(folder):
    """A manifest with a right checksum and without what is read of it; and a file that has no end."""
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]
    if folder.parent.name == "device":
        manifest["files"]["/dev/zero"] = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    else:
        manifest["files"] = list(manifest["files"])
    checksum = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checksum": checksum}))


@pytest.mark.parametrize(("kind", "problem"), [("device", "/dev/zero is missing"), ("form", "is not what was written")])
def test_a_strangers_manifest_is_damaged(three, tmp_path, kind, problem):
    shutil.copytree(three / "3", tmp_path / kind / "3")
    seal_a_strangers(tmp_path / kind / "3")
    with pytest.raises(Damaged, match=problem):
        verify(tmp_path / kind / "3")


def copy_another_step(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "2", folder)
    return "manifest.json is not what was written"


DAMAGE = [truncate, flip_a_bit, lose_a_file, lose_the_manifest, tear_the_manifest, change_the_manifest]


@pytest.mark.parametrize("damage", [*DAMAGE, copy_another_step])
def test_the_newest_that_is_whole_is_read_and_the_damaged_one_is_named(three, damage, tmp_path):
    """R-C5, R-A20."""
    folder, told = tmp_path / "checkpoints", []
    shutil.copytree(three, folder)
    problem = damage(folder / "3")
    like = abstract(make_state())
    with Checkpoints(folder, report=lambda event, text, **fields: told.append((event, text, fields))) as checkpoints:
        with pytest.raises(ValueError, match=rf"3 is damaged: .*{problem}.*try another step: there are \[1, 2\]"):
            checkpoints.restore(like, 3)
        assert checkpoints.restore_params(like.params)[1] == 2
        assert names(folder) == ["1", "2", "3"]  # who only reads moves nothing
        told.clear()
        restored, _ = checkpoints.restore(like, repair=True)
        assert names(folder) == ["1", "2", "3.damaged"]
        ((event, text, fields),) = told
        assert event == "checkpoint_damaged"
        assert (fields["step"], fields["back_to"]) == (3, 2)
        assert re.search(rf"3 is damaged: .*{problem}; going back to step 2", text)
        same(restored, make_state(2))
        checkpoints.save(make_state(3), RECORD)  # its place is free
        checkpoints.wait()
        assert checkpoints.latest_step() == 3
        truncate(folder / "3")
        checkpoints.restore(like, repair=True)
    assert names(folder) == ["1", "2", "3.damaged", "3.damaged.2"]


def test_where_all_are_damaged_nothing_is_started_anew(three, tmp_path):
    """R-C5: an error, and every file where it was."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    for step, damage in zip("123", (truncate, lose_a_file, tear_the_manifest), strict=True):
        damage(folder / step)
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(
            ValueError, match=r"checkpoint 3 is damaged: .*2 is damaged: .*1 is damaged: .* has 10 bytes"
        ):
            checkpoints.restore(abstract(make_state()), repair=True)
        assert checkpoints.steps() == [1, 2, 3]


def test_a_checkpoint_that_does_not_fit_is_no_damage(three):
    like = abstract(make_state(w=jnp.ones(2)))
    told = []
    with Checkpoints(three, report=lambda *text, **fields: told.append(text)) as checkpoints:
        with pytest.raises(ValueError, match=r"3 does not fit this run(.|\n)*params/w: float32\[2, 3\]"):
            checkpoints.restore(like, repair=True)
        assert checkpoints.steps() == [1, 2, 3]
    assert told == []


def test_parameters_alone_need_no_optimizer_state(three, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    big_file(folder / "3", "rest").unlink()
    like = abstract(make_state())
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore_params(like.params)[1] == 3
        assert int(checkpoints.restore(like)[0].step) == 2
    assert "checkpoint 3 is damaged: rest/" in capsys.readouterr().err


def test_the_manifest_says_what_is_there(three):
    manifest = json.loads((three / "2" / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["step"]) == ("jaxtrain-checkpoint", 1, 2)
    assert manifest["leaves"]["params/w"] == {"shape": [2, 3], "dtype": "float32"}
    assert manifest["leaves"]["rest/step"] == {"shape": [], "dtype": "int32"}
    files = {str(path.relative_to(three / "2")): path for path in (three / "2").rglob("*") if path.is_file()}
    assert manifest["files"].keys() == files.keys() - {"manifest.json"}
    assert all(manifest["files"][name]["bytes"] == files[name].stat().st_size for name in manifest["files"])


def test_what_a_dead_process_left_is_not_counted_and_goes(three, tmp_path):
    """R-C4: neither fatal nor read."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    for name in (".4.partial", ".4.partial.orbax-checkpoint-tmp", ".1.deleting"):
        shutil.copytree(three / "1", folder / name)
    (folder / "5.rewound").mkdir()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        checkpoints.clean()
        assert names(folder) == ["1", "2", "3", "5.rewound"]
        checkpoints.save(make_state(4), RECORD)
    assert Checkpoints(folder).latest_step() == 4


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("where", ["params", "opt_state"])
def test_a_state_that_is_not_finite_is_refused(tmp_path, where, value):
    """R-C10: with the leaf's name, and the last good one stays."""
    good, state = make_state(1), make_state(2)
    if where == "params":
        state = state.replace(params={**state.params, "w": state.params["w"].at[1, 2].set(value)})
    else:
        adam = next(part for part in state.opt_state if hasattr(part, "nu"))
        broken = adam._replace(nu={**adam.nu, "w": adam.nu["w"].at[0, 0].set(value)})
        state = state.replace(opt_state=tuple(broken if part is adam else part for part in state.opt_state))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(good, RECORD)
        with pytest.raises(ValueError, match=rf"step 2 is not finite and is not saved: {where}/[\w/]*w; .* of step 1$"):
            checkpoints.save(state, RECORD)
        assert names(tmp_path) == ["1"]
        same(checkpoints.restore(abstract(good))[0], good)


@pytest.mark.parametrize(
    ("rule", "stay"),
    [
        ((1, 0, 0), {60}),
        ((2, 0, 0), {50, 60}),
        ((9, 0, 0), {10, 20, 30, 40, 50, 60}),
        ((1, 30, 0), {30, 60}),
        ((1, 20, 0), {20, 40, 60}),
        ((1, 0, 1), {20, 60}),
        ((2, 40, 2), {20, 30, 40, 50, 60}),
        ((1, 0, 9), {20, 30, 50, 60}),  # NaN has no rank; what was not measured has none either
    ],
)
def test_three_sets_are_kept_apart(rule, stay):
    """R-A19: the newest stays although it is the worst."""
    scores = {20: 1.0, 30: 2.0, 40: float("nan"), 50: 2.5, 60: 9.0, 70: 0.1}
    assert kept([10, 20, 30, 40, 50, 60], scores, *rule) == stay


def test_scores_outlive_the_process(tmp_path):
    for step, nll in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0), (5, 4.0)):
        with Checkpoints(tmp_path, keep=1, keep_best=2) as checkpoints:  # a new process each
            checkpoints.score(step, nll)
            checkpoints.save(make_state(step), RECORD)
    assert Checkpoints(tmp_path).steps() == [2, 3, 5]


def test_a_rewind_sets_later_ones_aside(three, tmp_path):
    """R-C15."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    for _ in range(2):
        with Checkpoints(folder, keep_best=1) as checkpoints:
            for step in (1, 3):
                checkpoints.score(step, 4.0 - step)
            assert checkpoints.rewind(2) == [3]
            assert checkpoints.rewind(2) == []
            assert json.loads((folder / "scores.json").read_text()) == {"1": 3.0}
            checkpoints.save(make_state(3), RECORD)
    assert names(folder) == ["1", "2", "3", "3.rewound", "3.rewound.2", "scores.json"]
    truncate(folder / "2")
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(ValueError, match=r"2 is damaged: .* has 10 bytes"):
            checkpoints.rewind(2)
        with pytest.raises(ValueError, match=r"no checkpoint of step 7 .* there are \[1, 2, 3\]"):
            checkpoints.rewind(7)
        assert checkpoints.steps() == [1, 2, 3]


# Orbax's own writers find their event loop closed by the failure of another one.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_takes_no_more_is_noticed_and_leaves_no_litter(tmp_path):
    """R-C6: a real limit on the size of files stands for the full disk."""
    key = jax.random.key(0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), RECORD)
        checkpoints.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(Exception, match=r"(?i)too large"):  # noqa: PT012 (either may raise it)
                checkpoints.save(make_state(2, w=jax.random.normal(key, (300, 300))), RECORD)
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names(tmp_path) == ["1"]
        assert checkpoints.failure() is None  # told once
        checkpoints.save(make_state(2), RECORD)
    assert names(tmp_path) == ["1", "2"]


def test_a_failure_is_seen_without_waiting(tmp_path, monkeypatch):
    """R-C6."""
    begun, goes_on = threading.Event(), threading.Event()

    def full(*arguments):
        begun.set()
        goes_on.wait(60)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "seal", full)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), RECORD)
        assert begun.wait(60)
        assert checkpoints.busy()
        assert checkpoints.failure() is None
        goes_on.set()
        checkpoints._thread.join(60)
        assert "No space left" in str(checkpoints.failure())
    assert names(tmp_path) == []


def test_a_save_that_hangs_is_given_up_and_named(tmp_path, monkeypatch):
    """R-C7."""
    goes_on, told = threading.Event(), []
    monkeypatch.setenv("JAXTRAIN_TIMEOUT", "0.5")
    monkeypatch.setattr(checkpoint, "_NOTICE_SECONDS", 0.5)
    monkeypatch.setattr(checkpoint, "seal", lambda *arguments: goes_on.wait(60))
    checkpoints = Checkpoints(tmp_path, report=lambda event, text, **fields: told.append(text))
    checkpoints.save(make_state(1), RECORD)
    with pytest.raises(TimeoutError, match=r"step 1 has not got on for 2 s: see whether .* JAXTRAIN_TIMEOUT"):
        checkpoints.wait()
    assert "waiting for the checkpoint of step 1" in told[0]
    assert stop.is_stuck()
    goes_on.set()
    checkpoints._thread.join()
    assert not stop.is_stuck()
