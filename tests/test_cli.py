"""The command line in process: what each command prints, `--help`, and one clear line for every mistake."""

import io
import json
import os
import sys

import pytest
from helpers import ROOT, call
from runs import change, train

from jaxtrain.cli import COMMANDS, main
from jaxtrain.runtime import cluster
from jaxtrain.runtime.config_files import to_json
from jaxtrain.runtime.flags import list_flags, parse_config
from jaxtrain.version import __version__


@pytest.fixture(scope="module")
def run_dir(tiny_config, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    train(tiny_config, folder, report=True)
    return folder


@pytest.fixture
def config_file(tiny_config, tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(to_json(tiny_config))
    return str(file)


def test_train_takes_every_field_as_a_flag_and_resumes_its_run(config_file, tmp_path, capsys):
    arguments = ["train", config_file, "--run-dir", str(tmp_path / "run"), "--train.steps", "6"]
    arguments += ["--optim.peak-lr=0.02", "--train.batch_size", "4", "--train.accumulate", "1", "--seed", "7"]
    assert main([*arguments, "--train.stop-after", "2"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train"]["batch_size"] == 4
    assert config["optim"]["peak_lr"] == 0.02
    assert config["seed"] == 7
    assert "stopped at step 2: stop_after" in capsys.readouterr().out
    assert main([*arguments, "--train.stop-after", "none"]) == 0
    printed = capsys.readouterr().out
    assert "resumed from step 2" in printed
    assert "stopped at step 6: finished" in printed


def test_train_prints_its_plan_first(tiny_config, tmp_path, capsys):
    train(change(tiny_config, train={"stop_after": 1}), tmp_path / "run")
    printed = capsys.readouterr().out
    for part in (
        "2 layers, d_model 16, 2 heads, 257 tokens",
        "parameters",
        "optimizer",
        "1 x cpu",
        "128 = 8 sequences x 16, in 2 micro-batches",
        "3 steps up to 0.01, cosine",
        "0.001 at step 12",
        "layers/attention_norm/scale",
        "numbers decay",
        "step 1/12 8.3%",
        "tokens/s",
        "grad_norm",
        "left",
    ):
        assert part in printed


def test_eval_prints_the_numbers_that_training_recorded(run_dir, capsys):
    assert main(["eval", str(run_dir), "--json", "--compare"]) == 0
    result = json.loads(capsys.readouterr().out)
    recorded = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    expected = [line for line in recorded if line.get("event") == "eval"][-1]
    assert result["nll"] == pytest.approx(expected["nll"], rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
    assert result["xz_bits_per_byte"] == expected["xz_bits_per_byte"]
    assert result["step"] == 12
    assert main(["eval", str(run_dir), "--split", "train", "--step", "10"]) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "train" in printed


def test_generate_continues_the_prompt(run_dir, capsys):
    arguments = ["generate", str(run_dir), "--prompt", "3 + 4", "--num-tokens", "30", "--seed", "1"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("3 + 4")
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments, "--temperature", "0"]) == 0
    assert capsys.readouterr().out != first


def test_prepare_makes_a_store_that_training_takes(corpus, config_file, tmp_path, capsys):
    out = tmp_path / "store"
    arguments = ["prepare", str(corpus), "--out", str(out), "--validation-fraction", "0.3"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "train: " in printed
    assert "validation: " in printed
    assert "257 tokens in the vocabulary" in printed
    flags = ["--data.store", str(out), "--run-dir", str(tmp_path / "run"), "--train.stop-after", "1"]
    assert main(["train", config_file, *flags]) == 0


def test_schedule_draws_the_curve(config_file, tmp_path, capsys):
    png = tmp_path / "schedule.png"
    assert main(["schedule", config_file, "--optim.schedule", "linear", "--png", str(png)]) == 0
    printed = capsys.readouterr().out
    assert "3 steps up to 0.01, linear decay, 0.001 at step 12" in printed
    assert png.read_bytes().startswith(b"\x89PNG")


FLAGS = [
    (["--train.eval-every", "none"], "train.eval_every", None),
    (["--train.eval-every=none"], "train.eval_every", None),
    (["--train.eval_every", "7"], "train.eval_every", 7),
    (["--model.remat", "none"], "model.remat", "none"),
    (["--model.scan-unroll", "all"], "model.scan_unroll", "all"),
    (["--model.scan-unroll", "3"], "model.scan_unroll", 3),
    (["--data.no-verify"], "data.verify", False),
    (["--data.no-verify", "--data.verify"], "data.verify", True),
    (["--data.verify=false"], "data.verify", False),
    (["--data.verify", "False", "--seed", "2"], "data.verify", False),
    (["--data.skip", "3:4", "7:9", "--seed", "2"], "data.skip", ("3:4", "7:9")),
    (["--data.skip", "none"], "data.skip", ()),
    (["--mesh.data", "-1"], "mesh.data", -1),
    (["--optim.peak-lr", "1e-2", "--optim.peak-lr", "2e-2"], "optim.peak_lr", 0.02),
    (["--optim.clip-norm", "2"], "optim.clip_norm", 2.0),
    (["--train.sample-prompt", ""], "train.sample_prompt", ""),
    (["--train.sample-prompt=--x"], "train.sample_prompt", "--x"),
    (["--seed", "5"], "seed", 5),
    (["--data.store=~/tok"], "data.store", os.path.expanduser("~/tok")),
    (["--data.tokenizer=hf:~/tok.json"], "data.tokenizer", "hf:" + os.path.expanduser("~/tok.json")),
]


@pytest.mark.parametrize(("words", "path", "expected"), FLAGS, ids=[" ".join(row[0]) for row in FLAGS])
def test_flags_set_fields(words, path, expected, config_file):
    value = parse_config([config_file, *words])
    for name in path.split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name, columns, monkeypatch, capsys):
    """Description, example, metavars, every flag with a text, rarely used sections last; without a CONFIG or RUN."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith(f"usage: jaxtrain {name} {'CONFIG' if 'config' in lines[0].lower() else ''}")
    assert lines[2][0].isupper()
    example = lines[lines.index("example:") + 1]
    assert example.startswith(f"  jaxtrain {name} ")
    assert max(map(len, lines)) <= columns
    for flag in list_flags(COMMANDS[name].options, None):
        assert f"  {flag.name}" in printed
        assert flag.help, flag
    positional = {"prepare": "SOURCE...", "train": "CONFIG", "plan": "CONFIG", "schedule": "CONFIG"}
    positional |= {"report": "RUN...", "runs": "[DIR]"}
    positional = (positional | {"inspect": "STORE|RUN", "import": "HF_FOLDER"}).get(name, "RUN")
    assert f"jaxtrain {name} {positional} " in lines[0]
    assert f"  {positional} " in printed
    if positional == "CONFIG":
        assert printed.index("\ntrain: ") < printed.index("\nguard: ") < printed.index("\nloss_scale: ")


def test_help_with_a_config_shows_its_values(config_file, capsys):
    assert main(["train", config_file, "--help"]) == 0
    assert "sequences per optimizer step, over all devices" in " ".join(capsys.readouterr().out.split())
    for words in (["train", config_file, "-h"], ["help", "train", config_file], ["--help", "train", config_file]):
        assert main(words) == 0
        assert "(default: 12)" in capsys.readouterr().out
    assert main(["train", "nowhere.py", "--help"]) == 0
    assert "(default: 1000)" in capsys.readouterr().out


def test_overview_and_version(capsys):
    for arguments in (["--help"], ["-h"], []):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert all(f"  {name} " in printed for name in COMMANDS)
        assert max(map(len, printed.splitlines())) <= 100
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxtrain {__version__}\n"


def test_help_imports_no_jax():
    code = (
        "import sys\nfrom jaxtrain.cli import COMMANDS, main\nfor name in COMMANDS: main([name, '--help'])\nmain([])\n"
    )
    code += "main(['--version'])\nassert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = call([sys.executable, "-c", code], env=environment)
    assert done.returncode == 0, done.stderr


MISTAKES = [
    (["trian"], "unknown command 'trian': did you mean train?"),
    (["zzzzzz"], "known: train, plan"),
    (["train"], "give a config first: jaxtrain train CONFIG"),
    (["train", "--run-dir", "x"], "give a config first"),
    (["train", "nowhere.py"], "no config file nowhere.py"),
    (["train", "CONFIG", "more"], "unexpected argument 'more'"),
    (["train", "CONFIG", "--train.step", "3"], "unknown flag --train.step: did you mean --train.steps?"),
    (["train", "CONFIG", "--zzzzzz", "3"], "lists the flags"),
    (["train", "CONFIG", "-x"], "unknown flag -x"),
    (["train", "CONFIG", "--train.steps"], "--train.steps needs a value, N"),
    (["train", "CONFIG", "--train.steps", "--seed", "3"], "--train.steps needs a value, N"),
    (["train", "CONFIG", "--train.steps", "x"], "train.steps: expected a whole number, got 'x'"),
    (["train", "CONFIG", "--train.steps", "none"], "train.steps: expected a whole number, got 'none'"),
    (["train", "CONFIG", "--train.eval-every", "x"], "train.eval_every: expected a whole number or none, got 'x'"),
    (["train", "CONFIG", "--optim.eps", "x"], "optim.eps: expected a number, got 'x'"),
    (["train", "CONFIG", "--data.verify=maybe"], "data.verify: expected true or false, got 'maybe'"),
    (["train", "CONFIG", "--train.steps", "-4"], "must be above 0, got -4"),
    (["train", "CONFIG", "--train.eval-every", "0"], "train.eval_every must be above 0, got 0"),
    (["train", "CONFIG", "--optim.b2", "nan"], "b2 must be in [0, 1), got nan"),
    (["train", "CONFIG", "--optim.schedule", "cosin"], "did you mean cosine?"),
    (["train", "CONFIG", "--optim.schedule", "trapezoid"], "did you mean wsd?"),
    (["train", "CONFIG", "--train.precision", "fp32"], "did you mean float32?"),
    (["train", "CONFIG", "train.steps=3"], "unexpected argument 'train.steps=3'; did you mean --train.steps?"),
    (["train", "CONFIG", "\u2014train.steps", "3"], "did you mean --train.steps?"),
    (["train", "CONFIG", "--no-data.verify"], "did you mean --data.no-verify?"),
    (["plan", "CONFIG", "--chip", "h1000"], "did you mean h100?"),
    (["plan", "CONFIG", "--topology", "h1000:8"], "as h100:8"),
    (["schedule", "CONFIG", "--out", "x.png"], "did you mean --png?"),
    (["sample", "RUN"], "unknown command 'sample': did you mean generate?"),
    (["--verison"], "did you mean --version?"),
    (["train", "CONFIG", "--model.scan-unroll", "al"], "'al' is none of auto, all; did you mean all?"),
    (["train", "CONFIG", "--model.norm", "rmsnrm"], "did you mean rmsnorm?"),
    (["train", "CONFIG", "--data.store", "/nowhere"], "no token store at /nowhere"),
    (["train", "CONFIG", "--mesh.data", "99"], "takes 99 devices, and there are 8"),
    (["train", "CONFIG", "--rewind", "-1"], "--rewind must be above 0, got -1"),
    (["train", "CONFIG", "--run-dir", "OUT", "--train.init-from", "RUN/nowhere"], "it has no checkpoint"),
    (["eval"], "RUN is missing: jaxtrain eval RUN"),
    (["eval", "nowhere"], "nowhere is no run directory"),
    (["eval", "RUN", "--step", "7"], "no checkpoint of step 7"),
    (["eval", "RUN", "--split", "validtion"], "did you mean validation?"),
    (["eval", "RUN", "--split", "val"], "did you mean validation?"),
    (["generate", "RUN", "--top-p", "2"], "--top-p must be in (0, 1], got 2.0"),
    (["generate", "RUN", "--num-tokens", "0"], "--num-tokens must be above 0, got 0"),
    (["generate", "RUN", "--promt", "x"], "unknown flag --promt: did you mean --prompt?"),
    (["prepare", "/nowhere", "--out", "OUT"], "/nowhere"),
    (["prepare", "--out", "OUT"], "SOURCE... is missing"),
    (["prepare", "CORPUS"], "--out DIR is missing"),
    (["prepare", "CORPUS", "--out", "OUT", "--tokenizer", "word"], "word"),
]
NAMES = [
    *(("lr", "optim.peak-lr"), ("learning-rate", "optim.peak-lr"), ("learning_rate", "optim.peak-lr")),
    *(("batch-size", "train.batch-size"), ("bs", "train.batch-size"), ("steps", "train.steps")),
    *(("epochs", "train.steps"), ("max-steps", "train.steps"), ("wd", "optim.weight-decay")),
    *(("weight-decay", "optim.weight-decay"), ("optim.lr", "optim.peak-lr"), ("train.lr", "optim.peak-lr")),
    *(("beta2", "optim.b2"), ("grad-clip", "optim.clip-norm"), ("warmup", "optim.warmup-steps")),
    *(("n-layer", "model.num-layers"), ("dtype", "train.precision"), ("out-dir", "run-dir"), ("resume", "run-dir")),
    *(("block-size", "train.seq-len"), ("save-every", "checkpoint.every"), ("optim.peek-lr", "optim.peak-lr")),
    *(("optim.lrr", "optim.peak-lr"), ("mesh.tp", "mesh.tensor")),
    *(("eval", "train.eval-every"), ("allow", "allow-change")),
    *(("zzz", None), ("rundir", "run-dir"), ("sigmas", "guard.sigmas"), ("min-lr", "optim.floor")),
]
MISTAKES += [
    (
        ["train", "CONFIG", f"--{name}", "1"],
        f"unknown flag --{name}: did you mean --{flag}?" if flag else "lists the flags",
    )
    for name, flag in NAMES
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES])
def test_mistakes(arguments, message, config_file, run_dir, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"CONFIG": config_file, "RUN": str(run_dir), "CORPUS": str(corpus), "OUT": str(tmp_path / "out")}
    assert main([names.get(argument, argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="no config file"):
        main(["train", str(tmp_path / "x.py"), "--debug"])


class ClosedPipe(io.TextIOWrapper):
    """Standard output whose reader has gone; ASCII alone."""

    def __init__(self):
        reader, self.writer = os.pipe()
        os.close(reader)
        super().__init__(os.fdopen(self.writer, "wb", buffering=0), encoding="ascii", write_through=True)


OUTPUTS = {
    "help": ["--help"],
    "version": ["--version"],
    "train help": ["train", "--help"],
    "train": ["train", "CONFIG", "--run-dir", "OUT", "--train.stop-after", "1"],
    "report": ["report", "RUN"],
    "eval": ["eval", "RUN", "--batches", "1"],
    "generate": ["generate", "RUN", "--prompt", "é → 3 + 4", "--num-tokens", "2"],
    "replay": ["replay", "RUN", "--step", "2"],
    "prepare": ["prepare", "CORPUS", "--out", "OUT"],
    "plan": ["plan", "CONFIG"],
    "schedule": ["schedule", "CONFIG"],
}


ALL = ["closed", "absent", "ascii", "latin-1"]
COMPILING = {
    "train": ["closed", "ascii"],
    "replay": ["closed"],
    "eval": ["closed", "ascii"],
    "generate": ["absent", "ascii"],
}


@pytest.mark.parametrize(
    ("name", "output"), [(name, output) for name in OUTPUTS for output in COMPILING.get(name, ALL)]
)
def test_output_that_is_closed_or_not_utf_8_never_raises(
    name, output, config_file, run_dir, corpus, tmp_path, monkeypatch, capsys
):
    names = {"CONFIG": config_file, "RUN": str(run_dir), "CORPUS": str(corpus), "OUT": str(tmp_path / "out")}
    written = io.BytesIO()
    stream = {"closed": ClosedPipe, "absent": lambda: None}.get(output)
    stdout = stream() if stream else io.TextIOWrapper(written, encoding=output)
    monkeypatch.setattr(sys, "stdout", stdout)
    code = main([names.get(word, word) for word in OUTPUTS[name]])
    assert code == (128 + 13 if output == "closed" and name != "train" else 0)
    assert "rror" not in capsys.readouterr().err
    if output in ("ascii", "latin-1"):
        assert written.getvalue().decode(output)
    if output == "closed":
        stdout.close()
    if name == "train":
        assert (tmp_path / "out" / "checkpoints" / "1").is_dir()


def run_program(arguments, stdin=None, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = f"{sys.executable} -m jaxtrain.cli {arguments}"
    return call(["bash", "-o", "pipefail", "-c", command], env=environment)


@pytest.mark.parametrize(
    ("arguments", "codes"),
    [
        ("train --help | head -n 1", (0, 141)),
        ("train --help | true", (141,)),
        ("--help >&-", (0,)),
        ("--help > /dev/full", (1,)),
    ],
)
def test_the_interpreter_exits_in_silence(arguments, codes):
    done = run_program(arguments)
    assert done.returncode in codes
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize(
    "platforms", ["cpu,", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cuda", "tpu")), "banana"]
)
def test_an_absent_backend_is_one_line(platforms, config_file):
    done = run_program(f"schedule {config_file}", JAX_PLATFORMS=platforms)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: JAX_PLATFORMS={platforms} names a backend that is not installed")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("vocab_size", "large"), [("257", False), ("50304", True)])
def test_training_says_before_jax_starts_whether_it_multiplies_large_matrices(vocab_size, large, monkeypatch, capsys):
    def session(report, large_matrices):
        raise ValueError(f"large: {large_matrices}")

    monkeypatch.setattr(cluster, "session", session)
    assert main(["train", str(ROOT / "configs/gpt2_124m.py"), "--model.vocab-size", vocab_size]) == 2
    assert f"large: {large}" in capsys.readouterr().err
