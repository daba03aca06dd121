"""Bad command lines, interruptions and exit codes."""

import ast
import io
import os
import sys
from pathlib import Path

import pytest
from bad_helpers import CODE, TRAIN, bad, check, snapshot, text
from helpers import call

from jaxtrain.cli import main

ROOT = Path(__file__).parents[2]


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
            f"train {{config}} --run-dir below{char}x/run", f"with {char!r}:", "--run-dir"
        )
        for char in "*?["
    },
    **{
        f"eval of a run in a folder renamed to {name!r}": bad(
            f"eval {name}",
            f"with {name[1]!r}: rename the folder",
            make=lambda world, name=name: world.run.rename(world.tmp / name),
        )
        for name in ("r\\w", "r\udcff")
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


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_command_is_refused(name, world, capsys):
    check(COMMANDS[name], world, capsys)


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
