"""The command line, in process: what each command prints, and that every mistake gets one clear line and its code."""

import dataclasses
import json

import pytest
from runs import train

from jaxtrain.cli import main
from jaxtrain.config import to_json


@pytest.fixture(scope="module")
def run_dir(tiny_config, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    train(tiny_config, folder)
    return folder


@pytest.fixture
def config_file(tiny_config, tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(to_json(tiny_config))
    return str(file)


def test_train_takes_every_field_as_a_flag_and_goes_on_with_its_run(config_file, tmp_path, capsys):
    arguments = [
        "train",
        config_file,
        "--run-dir",
        str(tmp_path / "run"),
        "--train.steps",
        "6",
        "--optim.peak-lr",
        "0.02",
    ]
    arguments += ["--train.batch-size", "4", "--train.accumulate", "1", "--seed", "7"]
    assert main([*arguments, "--train.stop-after", "2"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train"]["batch_size"] == 4
    assert config["optim"]["peak_lr"] == 0.02
    assert config["seed"] == 7
    assert "stopped at step 2: stop_after" in capsys.readouterr().out
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "resumed from step 2" in printed
    assert "stopped at step 6: finished" in printed


def test_train_prints_what_it_is_about_to_do(run_dir, tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    train(dataclasses.replace(tiny_config, train=dataclasses.replace(tiny_config.train, stop_after=1)), folder)
    printed = capsys.readouterr().out
    for part in (
        "2 layers, d_model 16, 2 heads, 257 tokens",
        "parameters",
        "optimizer",
        "1 x cpu",
        "128 = 8 sequences x 16, in 2 micro-batches",
        "3 steps up to 0.01, cosine, 0.001 at step 12",
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
    assert result["nll"] == expected["nll"]
    assert result["bits_per_byte"] == expected["bits_per_byte"]
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


def test_help_names_the_commands_and_every_field(config_file, capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in ("train", "eval", "generate", "prepare", "schedule"))
    with pytest.raises(SystemExit) as exit_info:
        main(["train", config_file, "--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "--train.accumulate" in printed
    assert "optimizer steps of the final decay" in printed


MISTAKES = [
    ([], 0, "usage"),
    (["trian"], 2, "unknown command 'trian'"),
    (["train"], 2, "give a config first"),
    (["train", "--run-dir", "x"], 2, "give a config first"),
    (["train", "nowhere.py"], 2, "no config file nowhere.py"),
    (["train", "CONFIG", "--train.step", "3"], 2, "unknown flag --train.step: did you mean --train.steps?"),
    (["train", "CONFIG", "--steps", "3"], 2, "unknown flag --steps"),
    (["train", "CONFIG", "--zzzzzz", "3"], 2, "lists the flags"),
    (["train", "CONFIG", "--train.steps", "x"], 2, "invalid literal for int"),
    (["train", "CONFIG", "--train.steps", "-4"], 2, "must be above 0, got -4"),
    (["train", "CONFIG", "--optim.b2", "nan"], 2, "b2 must be in [0, 1), got nan"),
    (["train", "CONFIG", "--optim.schedule", "cos"], 2, "cos"),
    (["train", "CONFIG", "--data.store", "/nowhere"], 2, "/nowhere is not a folder"),
    (["train", "CONFIG", "--mesh.data", "99"], 2, "takes 99 devices, and there are 8"),
    (["train", "CONFIG", "--rewind", "-1"], 2, "--rewind must be the step of a checkpoint, got -1"),
    (["train", "CONFIG", "--run-dir", "OUT", "--train.init-from", "RUN/nowhere"], 2, "it has no checkpoint"),
    (["eval", "nowhere"], 2, "nowhere is no run directory"),
    (["eval", "RUN", "--step", "7"], 2, "no checkpoint of step 7"),
    (["eval", "RUN", "--split", "test"], 2, "test"),
    (["generate", "RUN", "--top-p", "2"], 2, "top_p must be in (0, 1], got 2.0"),
    (["generate", "RUN", "--num-tokens", "0"], 2, "num_tokens must be at least 1, got 0"),
    (["generate", "RUN", "--promt", "x"], 2, "unknown flag --promt: did you mean --prompt?"),
    (["prepare", "/nowhere", "--out", "OUT"], 2, "/nowhere"),
    (["prepare", "--out", "OUT"], 2, ""),
    (["prepare", "CORPUS", "--out", "OUT", "--tokenizer", "word"], 2, "word"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES])
def test_mistakes(arguments, code, message, config_file, run_dir, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"CONFIG": config_file, "RUN": str(run_dir), "CORPUS": str(corpus), "OUT": str(tmp_path / "out")}
    try:
        actual = main([names.get(argument, argument) for argument in arguments])
    except SystemExit as exit_info:
        actual = exit_info.code
    captured = capsys.readouterr()
    text = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert actual == code
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="no config file"):
        main(["train", str(tmp_path / "x.py"), "--debug"])
