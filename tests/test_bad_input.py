"""Bad input of every kind: one or two clear lines, the right exit code, and nothing written, changed or lost."""

import ast
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers import call
from runs import train

from jaxtrain.cli import main
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.runtime.config_files import to_json

ROOT = Path(__file__).parents[1]
WITHIN = "from jaxtrain.config import *\n"
CODE = "import os, sys; from pathlib import Path; Path(sys.argv[0]).exists(); Path('pwned').touch()"


class Bomb:
    """Unpickling it would make a file."""

    def __reduce__(self):
        return (exec, (CODE,))


class World(NamedTuple):
    """Paths that the arguments of a case may name, as `{config}`."""

    tmp: Path  # the working directory, empty but for what the case makes
    config: Path  # a good config, JSON
    store: Path  # a copy of a good store, that a case may damage
    run: Path  # the same of a finished run
    corpus: Path
    out: Path  # does not exist

    def write(self, name, content):
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)

    def json(self, name, **changes):
        """A good config with sections changed; `None` leaves a section out."""
        values = json.loads(self.config.read_text())
        for key, value in changes.items():
            values[key] = values[key] | value if isinstance(value, dict) and key in values else value
        self.write(name, json.dumps({key: value for key, value in values.items() if value is not None}))

    def manifest(self, **changes):
        values = json.loads((self.store / "manifest.json").read_text()) | changes
        values.pop("checksum", None)
        (self.store / "manifest.json").write_text(json.dumps(values))

    def damage(self, name, change):
        path = self.store / name
        path.write_bytes(change(path.read_bytes()))


@pytest.fixture(scope="module")
def good(tiny_config, tmp_path_factory):
    """A finished run and a config."""
    folder = tmp_path_factory.mktemp("good")
    train(tiny_config, folder / "run")
    (folder / "config.json").write_text(to_json(tiny_config))
    return folder


@pytest.fixture
def world(good, store, corpus, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(store, tmp_path / "store")
    shutil.copytree(good / "run", tmp_path / "run")
    config = json.loads((good / "config.json").read_text())
    config["data"]["store"] = str(tmp_path / "store")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(work)
    return World(work, tmp_path / "config.json", tmp_path / "store", tmp_path / "run", corpus, tmp_path / "out")


def snapshot(world):
    paths = [path for path in world.tmp.parent.rglob("*")]
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else path.is_symlink()
        for path in paths
    }


class Bad(NamedTuple):
    arguments: str  # split at blanks; `''` is an empty argument
    message: tuple[str, ...]  # the value and the remedy
    make: object = None  # prepares the world
    code: int = 2
    starts: bool = False  # seen at the first step only: there is a run directory, which may be used again


def bad(arguments, *message, **fields):
    return Bad(arguments, message, **fields)


TRAIN = "train {config} --run-dir {out}"


def py(text):
    return lambda world: world.write("c.py", text)


def raw(text):
    return lambda world: world.write("c.json", text)


def values(**changes):
    return lambda world: world.json("c.json", **changes)


def text(name, content):
    return lambda world: world.write(name, content)


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


def small_store(world):
    """Two documents, shorter than a window."""
    shutil.rmtree(world.store)
    with tempfile.TemporaryDirectory() as folder:
        for name in "bc":  # of a hash that puts one in each split at this fraction
            Path(folder, f"{name}.txt").write_text("eleven byte")
        prepare([folder], world.store, validation_fraction=0.5, progress=False)


def documents(array):
    return lambda world: np.save(world.store / "train-documents.npy", array, allow_pickle=True)


COMMANDS = {
    "unknown command": bad("tran {config}", "'tran'", "did you mean train"),
    "command in another script": bad("тrain {config}", "'тrain'", "did you mean train?"),
    "no config": bad("train", "give a config first", "configs/quickstart.py"),
    "unknown flag": bad("train {config} --optim.peek-lr 1", "--optim.peek-lr", "did you mean --optim.peak-lr?"),
    "flag without a value": bad("train {config} --train.steps", "--train.steps", "needs a value, N"),
    "a word where a number goes": bad(TRAIN + " --train.steps ten", "'ten'", "expected a whole number"),
    "a fraction where a whole number goes": bad(TRAIN + " --train.steps 1.5", "'1.5'", "expected a whole number"),
    "a number where a choice goes": bad(TRAIN + " --model.norm 3", "3", "rmsnorm"),
    "one argument too many": bad(TRAIN + " more", "more", "--help` lists"),
    "no run directory": bad("train {config} --run-dir ''", "is ''", "give a path"),
    "run directory is a file": bad(
        "train {config} --run-dir f", "f is a file", "another --run-dir", make=text("f", "x")
    ),
    "run directory below a file": bad(
        "train {config} --run-dir f/run", "f/run is a file or lies below one", "another", make=text("f", "x")
    ),
    "run directory of something else": bad(
        "train {config} --run-dir .", "thesis.tex", "another --run-dir", make=text("thesis.tex", "x")
    ),
    "run directory that no user can make": bad("train {config} --run-dir /proc/run", "/proc/run", "path", code=1),
    "run directory with too long a name": bad(
        "train {config} --run-dir " + "n" * 300, "n" * 300, "give a shorter name", code=1
    ),
    "picture below a folder that is not there": bad(
        "schedule {config} --png no/a.png", "no/a.png", "give a path that exists", code=1
    ),
    "picture of an unknown kind": bad("schedule {config} --png a.foo", "'a.foo'", "must end in .png"),
    "a full disk": bad(
        "schedule {config} --png a.png",
        "No space left",
        "free some space",
        make=lambda world: (world.tmp / "a.png").symlink_to("/dev/full"),
        code=1,
    ),
    "eval of no run": bad("eval nowhere", "nowhere is no run directory", "--run-dir of `jaxtrain train`"),
    "eval of a file": bad("eval {config}", "config.json is no run directory", "give the --run-dir"),
    "report of no run": bad("report nowhere", "nowhere is no run directory", "--run-dir of `jaxtrain train`"),
    "report of a run without config.json": bad(  # and no whole checkpoint to take it from
        "report {run}",
        "has lost its config.json",
        "`jaxtrain train CONFIG --run-dir",
        make=lambda world: [path.unlink() for path in (world.run / "config.json", *world.run.rglob("manifest.json"))],
    ),
    **{
        f"a run directory with {char}": bad(
            f"train {{config}} --run-dir below{char}x/run", f"holds {char!r},", "--run-dir"
        )
        for char in "*?["
    },
    "eval of a negative step": bad("eval {run} --step -1", "got -1", "0 or more"),
    "eval of a step that was not saved": bad("eval {run} --step 7", "no checkpoint of step 7", "there are [5, 10, 12]"),
    "eval of no batch": bad("eval {run} --batches 0", "got 0", "above 0"),
    "eval of an unknown split": bad("eval {run} --split test", "test", "validation"),
    "generate nothing": bad("generate {run} --num-tokens 0", "got 0", "above 0"),
    "generate at NaN": bad("generate {run} --temperature nan", "got nan", "0 or more"),
    "generate at infinity": bad("generate {run} --temperature inf", "got inf", "0 or more"),
    "generate from none": bad("generate {run} --top-p 0", "got 0", "(0, 1]"),
    "generate from no token": bad("generate {run} --top-k 0", "got 0", "above 0"),
    "generate with a negative seed": bad("generate {run} --seed -1", "-1", "0"),
    "generate with a huge seed": bad("generate {run} --seed 99999999999999999999", "99999999999999999999", "2^31"),
    "generate from bytes that are no text": bad("generate {run} --prompt \udcff", r"\udcff", "UTF-8"),
    "replay without a step": bad("replay {run}", "--step N is missing", "counted from 1"),
    "replay of step 0": bad("replay {run} --step 0", "no step 0", "give --step 1 to 12"),
    "replay of a step to come": bad("replay {run} --step 13", "no step 13", "give --step 1 to 12"),
    "plan for an unknown chip": bad("plan {config} --chip h9000", "h9000", "v5p"),
    "plan for an unknown topology": bad("plan {config} --topology v5p:2x", "'v5p:2x'", "as v5p:4x4x4"),
    "plan for negative devices": bad("plan {config} --devices -8", "got -8", "above 0"),
    "plan at a price of NaN": bad("plan {config} --chip v5p --price nan", "nan", "0"),
}

CONFIGS = {
    "without its suffix": bad("train mine", "no config file mine", "did you mean mine.py?", make=text("mine.py", "")),
    "misspelt": bad("train mien.py", "no config file mien.py", "did you mean mine.py?", make=text("mine.py", "")),
    "absent": bad("train no.py", "no config file no.py", "give a .py file"),
    "a folder": bad("train .", "no config file .", "give a .py file"),
    "another kind of file": bad("train c.yaml", "c.yaml", ".py or .json", make=text("c.yaml", "a: 1")),
    "py: empty": bad("train c.py", "c.py", "config() that returns a Config", make=py("")),
    "py: a syntax error": bad("train c.py", "c.py line 2: SyntaxError", "correct", make=py("x = 1\ndef config(:\n")),
    "py: an unknown name": bad("train c.py", "c.py line 2: NameError: name 'nope'", "correct", make=py("\nnope\n")),
    "py: an error inside": bad(
        "train c.py", "c.py line 3: ZeroDivisionError", "correct", make=py("\ndef config():\n    return 1 / 0\n")
    ),
    "py: a missing module": bad("train c.py", "c.py line 1", "'torch_xyz'", make=py("import torch_xyz\n")),
    "py: it exits": bad("train c.py", "c.py line 1: SystemExit: 3", "correct", make=py("raise SystemExit(3)\n")),
    "py: it returns another thing": bad(
        "train c.py", "config() returned dict, not a Config", "correct", make=py("def config():\n    return {}\n")
    ),
    "py: config is no function": bad("train c.py", "config()", "returns a Config", make=py("config = 3\n")),
    "py: it wants arguments": bad(
        "train c.py", "TypeError", "correct", make=py("def config(size):\n    return size\n")
    ),
    "py: a wrong type": bad(
        "train c.py",
        "c.py line 3",
        "train.steps: expected int, got '10'",
        make=py(WITHIN + "def config():\n    return Config(DataConfig('s'), train=TrainConfig(steps='10'))\n"),
    ),
    "py: a wrong section": bad(
        "train c.py",
        "train: expected a TrainConfig, got 3",
        "correct",
        make=py(WITHIN + "def config():\n    return Config(DataConfig('s'), train=3)\n"),
    ),
    "py: not UTF-8": bad("train c.py", "c.py", "correct", make=text("c.py", b"x = '\xff\xfe'\n")),
    "py: NUL bytes": bad("train c.py", "c.py", "correct", make=text("c.py", b"x = 1\0\n")),
    "json: empty": bad("train c.json", "c.json", "not valid JSON", make=raw("")),
    "json: truncated": bad("train c.json", "c.json", "not valid JSON", make=raw('{"data": {"store": "s"')),
    "json: a list": bad("train c.json", "c.json", "expected an object, got []", make=raw("[]")),
    "json: not UTF-8": bad("train c.json", "c.json", "correct", make=raw(b'{"seed": "\xff"}')),
    "json: too deep": bad("train c.json", "c.json", "correct", make=raw("[" * 100_000)),
    "json: nothing": bad("train c.json", "c.json", "data", make=raw("{}")),
    "json: an unknown key": bad(
        "train c.json", "optim.peek_lr", "did you mean optim.peak_lr?", make=values(optim={"peek_lr": 1})
    ),
    "json: null": bad(
        "train c.json", "train.steps: expected int, got None", "correct", make=values(train={"steps": None})
    ),
    "json: a bool for a number": bad("train c.json", "seed: expected int, got True", "correct", make=values(seed=True)),
    "json: text for a list": bad(
        "train c.json",
        "data.sources: expected a list of strings, got 'a'",
        "correct",
        make=values(data={"sources": "a"}),
    ),
    "json: NaN": bad("train c.json", "optim.peak_lr must be above 0", "nan", make=values(optim={"peak_lr": np.nan})),
    "json: infinity": bad("train c.json", "above 0 and finite", "inf", make=values(optim={"peak_lr": np.inf})),
    "json: huge": bad("train c.json", "train.steps: 1000000", "too large", make=values(train={"steps": 10**30})),
    "json: huge for a float": bad("train c.json", "optim.eps: 1000", "too large", make=values(optim={"eps": 10**400})),
    "json: half a character": bad(
        "train c.json", "no token store at", "\\ud800: if it was moved", make=raw('{"data": {"store": "\\ud800"}}')
    ),
    "json: a seed above 2^31": bad("train c.json", "seed", "2^31", make=values(seed=2**31)),
    "negative steps": bad(TRAIN + " --train.steps -4", "got -4", "above 0"),
    "a learning rate of 0": bad(TRAIN + " --optim.peak-lr 0", "got 0.0", "above 0"),
    "a learning rate of NaN": bad(TRAIN + " --optim.peak-lr nan", "got nan", "above 0"),
    "a clip norm of infinity": bad(TRAIN + " --optim.clip-norm inf", "got inf", "finite"),
    "b2 of 1": bad(TRAIN + " --optim.b2 1", "got 1.0", "[0, 1)"),
    "heads that do not divide": bad(TRAIN + " --model.num-heads 3", "d_model 16", "change one of them"),
    "a longer window than the context": bad(TRAIN + " --train.seq-len 17", "seq_len 17", "model.max_seq_len 16"),
    "micro-batches that do not divide": bad(TRAIN + " --train.accumulate 3", "batch_size 8", "accumulate 3"),
    "a warm-up without end": bad(TRAIN + " --optim.warmup-steps 12", "warmup_steps 12", "shorten the warm-up"),
    "a vocabulary below the data's": bad(TRAIN + " --model.vocab-size 100", "100", "set it to None"),
    "a batch for more memory than there is": bad(
        TRAIN + " --train.batch-size 2000000000", "out of memory", "lower train.batch_size", code=1, starts=True
    ),
    "skip: no range": bad(TRAIN + " --data.skip 12000", "'12000'", "write START:STOP"),
    "skip: backwards": bad(TRAIN + " --data.skip 9:3", "'9:3'", "STOP must be larger"),
    "skip: negative": bad(TRAIN + " --data.skip=-3:4", "'-3:4'", "write START:STOP"),
    "mesh: more devices than there are": bad(TRAIN + " --mesh.data 99", "takes 99 devices", "there are 8"),
    "mesh: 0": bad(TRAIN + " --mesh.fsdp 0", "got 0", "above 0"),
    "mesh: two axes of -1": bad(TRAIN + " --mesh.data -1 --mesh.fsdp -1", "mesh.data and mesh.fsdp", "only one axis"),
    "mesh: it does not divide the devices": bad(TRAIN + " --mesh.data -1 --mesh.fsdp 3", "fsdp 3", "8 devices"),
    "mesh: the batch does not divide": bad(TRAIN + " --mesh.data 8", "batch_size 8", "change one of them"),
    "mesh: heads do not divide": bad(TRAIN + " --mesh.tensor 2", "num_kv_heads 1", "change one of them"),
}

PREPARE = "prepare {corpus} --out {out}"

DATA = {
    "no source": bad("prepare --out {out}", "SOURCE... is missing", "jaxtrain prepare SOURCE"),
    "no folder to make": bad("prepare {corpus}", "--out DIR is missing", "folder"),
    "an absent source": bad("prepare no.txt --out {out}", "no.txt", "check the path"),
    "a glob without a match": bad("prepare *.nope --out {out}", "'*.nope'", "check it"),
    "an empty folder": bad("prepare {tmp} --out {out}", "work", "name a folder with text"),
    "an empty file": bad("prepare a.txt --out {out}", "hold no text", "empty", make=text("a.txt", "")),
    "one byte": bad("prepare a.txt --out {out}", "1 bytes", "add text", make=text("a.txt", "x")),
    "a device": bad("prepare /dev/zero --out {out}", "/dev/zero", "write the text to a file"),
    "not UTF-8": bad("prepare a.txt --out {out}", "a.txt", "iconv", make=text("a.txt", b"\xff\xfe" * 50)),
    "a truncated .gz": bad(
        "prepare a.txt.gz --out {out}", "a.txt.gz", "replace", make=text("a.txt.gz", gzip.compress(b"text " * 99)[:-9])
    ),
    "a .gz that is none": bad("prepare a.txt.gz --out {out}", "a.txt.gz", "replace", make=text("a.txt.gz", b"text")),
    "a line that is no JSON": bad(
        "prepare a.jsonl --out {out}", "line 2", "correct or remove", make=text("a.jsonl", '{"text": "a"}\n{"text\n')
    ),
    "a line without the field": bad(
        "prepare a.jsonl --out {out}", "line 1", "it has: body", make=text("a.jsonl", '{"body": "a"}\n')
    ),
    "a line with a number": bad(
        "prepare a.jsonl --out {out}", "is int, not text", "correct", make=text("a.jsonl", '{"text": 3}\n')
    ),
    "a folder that is taken": bad(
        "prepare {corpus} --out {run}", "exists and is not the token store", "choose another folder"
    ),
    "a folder that is a file": bad(
        "prepare {corpus} --out f", "f exists and is not", "choose another folder", make=text("f", "x")
    ),
    "a folder below a file": bad(
        "prepare {corpus} --out f/s", "work/f", "give another path", make=text("f", "x"), code=1
    ),
    "a folder without a name": bad("prepare {corpus} --out ''", "is ''", "give a path"),
    "a folder among its sources": bad(
        "prepare {tmp} --out {tmp}/s", "work/s would lie in its own source", "elsewhere", make=text("a.txt", "text")
    ),
    "an unknown tokenizer": bad(PREPARE + " --tokenizer words", "'words'", "use byte, bpe:VOCAB"),
    "a vocabulary too small": bad(PREPARE + " --tokenizer bpe:10", "'bpe:10'", "257 or more"),
    "a vocabulary too large for the text": bad(PREPARE + " --tokenizer bpe:90000", "bpe:90000", "or fewer"),
    "a tokenizer that is not there": bad(PREPARE + " --tokenizer hf:no.json", "no.json", "a local tokenizer.json"),
    "a tokenizer that is none": bad(
        PREPARE + " --tokenizer hf:t.json", "t.json is not a file of the tokenizers library", make=text("t.json", "{}")
    ),
    "a tokenizer of a pickle": bad(
        PREPARE + " --tokenizer hf:t.json",
        "t.json is not a file of the tokenizers library",
        make=text("t.json", pickle.dumps(Bomb())),
    ),
    "all for validation": bad(PREPARE + " --validation-fraction 1", "got 1.0", "between 0 and 1"),
    "NaN for validation": bad(PREPARE + " --validation-fraction nan", "got nan", "between 0 and 1"),
    "negative workers": bad(PREPARE + " --num-workers -2", "got -2", "above 0"),
}

STORES = {
    "less text than a window": bad(
        TRAIN, "has 12 tokens, fewer than one window of seq_len + 1 = 17", "add text", make=small_store
    ),
    "absent": bad(TRAIN + " --data.store no", "no token store at", "work/no", "--data.store"),
    "a file": bad(TRAIN + " --data.store {config}", "config.json is not a folder", "`jaxtrain prepare`"),
    "another folder": bad(TRAIN + " --data.store {corpus}", "no manifest.json", "`jaxtrain prepare`"),
    "no manifest": bad(
        TRAIN, "no manifest.json", "`jaxtrain prepare`", make=lambda w: (w.store / "manifest.json").unlink()
    ),
    "a truncated manifest": bad(
        TRAIN,
        "manifest.json is not JSON",
        "run `jaxtrain prepare` again",
        make=lambda w: w.damage("manifest.json", lambda b: b[:99]),
    ),
    "another format": bad(TRAIN, "'tokens'", "make the store again", make=lambda w: w.manifest(format="tokens")),
    "a later version": bad(TRAIN, "version 99", "make the store again", make=lambda w: w.manifest(version=99)),
    "an odd dtype": bad(TRAIN, "object", "prepare` again", make=lambda w: w.manifest(dtype="object")),
    "a manifest without splits": bad(
        TRAIN, "holds a wrong value", "prepare` again", make=lambda w: w.manifest(splits=None)
    ),
    "a vocabulary of text": bad(TRAIN, "vocab_size", "prepare` again", make=lambda w: w.manifest(vocab_size="257")),
    "a negative vocabulary": bad(TRAIN, "-257", "prepare` again", make=lambda w: w.manifest(vocab_size=-257)),
    "a truncated shard": bad(
        TRAIN, "train-00000.bin has", "prepare` again", make=lambda w: w.damage("train-00000.bin", lambda b: b[:-2])
    ),
    "a flipped bit": bad(
        TRAIN,
        "the checksum of train-00000.bin",
        "prepare` again",
        make=lambda w: w.damage("train-00000.bin", lambda b: bytes([b[0] ^ 1]) + b[1:]),
    ),
    "a missing shard": bad(
        TRAIN, "train-00000.bin is missing", "prepare` again", make=lambda w: (w.store / "train-00000.bin").unlink()
    ),
    "another tokenizer": bad(
        TRAIN,
        "tokenizer.json is missing or is not",
        "prepare` again",
        make=lambda w: w.damage("tokenizer.json", lambda b: b + b" "),
    ),
    "documents of a pickle": bad(
        TRAIN, "train-documents.npy cannot be read", "prepare` again", make=documents(np.array([Bomb()], object))
    ),
    "documents of fractions": bad(TRAIN, "is not int64", "prepare` again", make=documents(np.zeros(3))),
    "tokens of another vocabulary": bad(
        TRAIN + " --data.no-verify",
        "token id 65535",
        "verify it, or make it again",
        starts=True,
        make=lambda w: w.damage("train-00000.bin", lambda b: b"\xff" * len(b)),
    ),
}

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
        "restore it with the config that wrote it",
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
        "repeat train.init_from, or give another --run-dir",
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

REMOTE = {
    f"{url}: {name}": bad(words.replace("URL", url), url, "no local path", "mount it", **fields)
    for url in ("gs://bucket/x", "memory://x")
    for name, words, fields in (
        ("run directory", "train {config} --run-dir URL", {}),
        ("run", "eval URL", {}),
        ("tokenizer", TRAIN + " --data.tokenizer hf:URL", {}),
        ("weights", TRAIN + " --train.init-from URL", {}),
        ("config of a run", "eval {run} --config URL", {}),
        ("new store", "prepare {corpus} --out URL", {}),
        ("picture", "schedule {config} --png URL.png", {}),
    )
} | {
    f"{url}: {name}": bad(words.replace("URL", url), f"{url}{reason}", code=code, **fields)
    for url, reason, code in (
        ("memory://bucket/none", ": check the URL", 2),
        ("s3://bucket/x", " needs fsspec and its package for this scheme: Install s3fs", 1),
        ("none://bucket/x", " cannot be read: ValueError: Protocol not known: none", 2),
    )
    for name, words, fields in (
        ("store", TRAIN + " --data.store URL", {}),
        ("moved store", "eval {run} --data.store URL", {}),
        ("validation", "prepare {corpus} --validation URL --out {out}", {}),
        ("in a config", "train c.json", {"make": values(data={"store": url})}),
    )
}

TABLE = {
    f"{kind}: {name}": row
    for kind, rows in (
        ("command", COMMANDS),
        ("config", CONFIGS),
        ("data", DATA),
        ("store", STORES),
        ("run", RUNS),
        ("remote", REMOTE),
    )
    for name, row in rows.items()
}


def arguments_of(row, world):
    return [word.format(**world._asdict()).replace("''", "") for word in row.arguments.split()]


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name, world, capsys):
    row = TABLE[name]
    if row.make:
        row.make(world)
    before = snapshot(world)
    code = main(arguments_of(row, world))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert code == row.code, captured.err
    lines = captured.err.splitlines()
    missing = [part for part in row.message if part not in captured.err]
    assert not missing, captured.err
    assert lines[0].startswith("error: ")
    after = snapshot(world)
    if row.starts:
        after = {path: value for path, value in after.items() if not path.startswith(str(world.out))}
    assert after == before
    assert len(lines) <= 2 or lines[1].startswith("  "), captured.err  # or a list of what differs


def test_a_run_that_failed_at_its_first_step_may_be_mended_in_place(world):
    base = ["train", str(world.config), "--run-dir", str(world.out)]
    assert main([*base, "--train.batch-size", "2000000000"]) == 1
    assert main([*base, "--train.stop-after", "1"]) == 0


class Interrupting(io.StringIO):
    """Standard output during whose first write the user presses Ctrl-C."""

    def write(self, text):
        raise KeyboardInterrupt


INTERRUPTED = {
    "train": "train {config} --run-dir {out}",
    "eval": "eval {run} --batches 1",
    "generate": "generate {run} --num-tokens 1",
    "replay": "replay {run} --step 3",
    "prepare": "prepare {corpus} --out {out}",
    "plan": "plan {config}",
    "schedule": "schedule {config}",
    "report": "report {run}",
}


@pytest.mark.parametrize("command", INTERRUPTED)
def test_ctrl_c_is_one_line(command, world, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Interrupting())
    assert main([word.format(**world._asdict()) for word in INTERRUPTED[command].split()]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_exit_codes_and_tracebacks_of_the_real_command(world):
    """The process exits with the result of `main`; only --debug shows a traceback."""
    # A job in a shell's background ignores the signal: the handler is set as it is elsewhere.
    handler = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    world.write("interrupt.py", f"import os, signal\n{handler}\nos.kill(os.getpid(), signal.SIGINT)\n")
    world.write("broken.py", "def config():\n    return 1 / 0\n")

    def run(*arguments):
        command = [sys.executable, "-m", "jaxtrain.cli", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return call(command, env=environment)

    interrupted = run("train", "interrupt.py")
    assert (interrupted.returncode, interrupted.stderr) == (130, "interrupted\n")
    broken = run("train", "broken.py")
    assert broken.returncode == 2
    assert broken.stderr == "error: broken.py line 2: ZeroDivisionError: division by zero; correct the config\n"
    shown = run("train", "broken.py", "--debug")
    assert shown.returncode != 0
    assert "Traceback" in shown.stderr
    assert "return 1 / 0" in shown.stderr


def test_a_config_from_a_run_is_read_and_not_executed(world):
    """Text that would be code elsewhere stays text, and a config.py beside the JSON is left alone."""
    world.json("config.json", data={"text_field": f"__import__('builtins').exec({CODE!r})"})
    world.write("config.py", CODE)
    before = snapshot(world)
    assert main(["schedule", "config.json"]) == 0
    assert snapshot(world) == before


def test_nothing_in_the_package_loads_a_pickle_or_executes_text():
    """Read from the source: only `config_files.load` and `prepare --formats` execute a file, the user's own .py."""
    found = []
    for path in sorted((ROOT / "jaxtrain").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            found += [(path.name, what) for what in _dangers(node)]
    assert found == [("tasks.py", "runpy"), ("config_files.py", "runpy")]
    everything = "import pickle, yaml\nfrom shelve import open\neval('1')\nnp.load(f)\nx.load(f, allow_pickle=True)"
    assert len([what for node in ast.walk(ast.parse(everything)) for what in _dangers(node)]) == 6


def _dangers(node):
    modules = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml", "runpy", "torch"}
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in modules)
    elif isinstance(node, ast.ImportFrom):
        yield from (name for name in [node.module or ""] if name.split(".")[0] in modules)
    elif isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if isinstance(node.func, ast.Name) and name in ("eval", "exec", "compile", "__import__"):
            yield name
        safe = [word for word in node.keywords if word.arg == "allow_pickle" and word.value.value is False]
        numpy_load = name == "load" and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "np"
        if (numpy_load or any(word.arg == "allow_pickle" for word in node.keywords)) and not safe:
            yield f"{name} with pickles"
