"""Bad config files and values."""

import numpy as np
import pytest
from bad_helpers import TRAIN, bad, check, text, values

WITHIN = "from jaxtrain.config import *\n"


def py(text):
    return lambda world: world.write("c.py", text)


def raw(text):
    return lambda world: world.write("c.json", text)


CONFIGS = {
    "without its suffix": bad("train mine", "no config file mine", "did you mean mine.py?", make=text("mine.py", "")),
    "misspelt": bad("train mien.py", "no config file mien.py", "did you mean mine.py?", make=text("mine.py", "")),
    "absent": bad("train no.py", "no config file no.py", "give a .py file"),
    "a folder": bad("train .", "no config file .", "give a .py file"),
    "a run": bad("train {run}", "that is a run", "/config.json --run-dir"),
    "a URL": bad("train gs://bucket/run", "gs://bucket/run' is no local path", "copy it"),
    "no name": bad("train ''", "the config file is ''", "give a path"),
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
        "train: expected TrainConfig, got 3",
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


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_config_is_refused(name, world, capsys):
    check(CONFIGS[name], world, capsys)
