"""Run directories that are damaged or do not fit, and URLs."""

import json
import shutil

import pytest
from bad_helpers import TRAIN, bad, check, values

from jaxtrain.cli import main


def without_checkpoints(change):
    """Changes config.json of the run, which no checkpoint can restore."""

    def make(world):
        shutil.rmtree(world.run / "checkpoints")
        change(world.run / "config.json")

    return make


def in_run(change):
    """Changes the config of the run."""

    def make(world):
        config = json.loads((world.run / "config.json").read_text())
        change(config)
        (world.run / "config.json").write_text(json.dumps(config))

    return make


RUNS = {
    "no checkpoints": bad(
        "eval {run}", "no checkpoint in", "train first", make=lambda w: shutil.rmtree(w.run / "checkpoints")
    ),
    "no config": bad(
        "eval {run}", "no config.json", "give the --run-dir", make=without_checkpoints(lambda file: file.unlink())
    ),
    "a truncated config": bad(
        "eval {run}",
        "config.json",
        "not valid JSON",
        make=without_checkpoints(lambda file: file.write_text('{"data": ')),
    ),
    "another model": bad(
        "eval {run}",
        "does not fit this run",
        "give its config",
        make=in_run(lambda c: c["model"].update(d_ff=64)),
    ),
    "resuming with another learning rate": bad(
        "train {config} --run-dir {run} --optim.peak-lr 0.5",
        "optim.peak_lr: 0.01 -> 0.5",
        "--allow-change",
        "--train.init-from",
    ),
    "resuming with another seed": bad("train {config} --run-dir {run} --seed 1", "seed: 0 -> 1", "another --run-dir"),
    "resuming without a part of the past": bad(
        "train {config} --run-dir {run} --data.skip 3:4", "3:4", "--rewind STEP"
    ),
    "rewinding without a part of the past": bad(
        "train {config} --run-dir {run} --data.skip 1:2 --rewind 5", "1:2", "--rewind STEP"
    ),
    "resuming with other initial weights": bad(
        "train {config} --run-dir {run} --train.init-from other",
        "train.init_from: None -> ",
        "repeat its config, or give another --run-dir",
    ),
    "its store is gone": bad(
        "eval {run}",
        "no token store at",
        "store: if it was moved",
        "--data.store",
        make=lambda w: shutil.rmtree(w.store),
    ),
    "replay of metrics that are gone": bad(
        "replay {run} --step 3",
        "metrics.jsonl",
        "give a run directory",
        make=lambda w: (w.run / "metrics.jsonl").unlink(),
    ),
}


REMOTE = (
    {
        f"{url}: {name}": bad(words.replace("URL", url), url, "no local path", "mount it", **fields)
        for url in ("gs://bucket/x", "memory://x")
        for name, words, fields in (
            ("tokenizer", TRAIN + " --data.tokenizer hf:URL", {}),
            ("config of a run", "eval {run} --config URL", {}),
            ("new store", "prepare {corpus} --out URL", {}),
            ("picture", "schedule {config} --png URL.png", {}),
        )
    }
    | {
        f"{url}: {name}": bad(words.replace("URL", url), f"{url}{reason}", code=code, **fields)
        for url, reason, code in (
            ("memory://bucket/none", ": check the URL", 2),
            ("s3://bucket/x", " needs fsspec and its package for this scheme: Install s3fs", 1),
            ("none://bucket/x", " cannot be read: ValueError: Protocol not known: none", 2),
        )
        for name, words, fields in (
            ("store", TRAIN + " --data.store URL", {}),
            ("run", "eval URL", {}),
            ("weights", TRAIN + " --train.init-from URL", {}),
            ("moved store", "eval {run} --data.store URL", {}),
            ("validation", "prepare {corpus} --validation URL --out {out}", {}),
            ("in a config", "train c.json", {"make": values(data={"store": url})}),
        )
    }
    | {
        f"{url}: run directory": bad(f"train {{config}} --run-dir {url}", f"{url}{reason}", code=code)
        for url, reason, code in (
            ("s3://bucket/x", " needs fsspec and its package for this scheme: Install s3fs", 1),
            ("none://bucket/x", " cannot be read: ValueError: Protocol not known: none", 2),
        )
    }
)


TABLE = {f"runs: {name}": row for name, row in RUNS.items()} | {f"remote: {name}": row for name, row in REMOTE.items()}


@pytest.mark.parametrize("name", TABLE)
def test_a_bad_run_is_refused(name, world, capsys):
    check(TABLE[name], world, capsys)


def test_a_run_that_failed_at_its_first_step_may_be_mended_in_place(world):
    base = ["train", str(world.config), "--run-dir", str(world.out)]
    assert main([*base, "--train.batch-size", "2000000000"]) == 1
    assert main([*base, "--train.stop-after", "1"]) == 0
