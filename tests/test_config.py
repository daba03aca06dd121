"""The config: every field is checked, a JSON round trip is exact, and JSON executes nothing."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from jaxtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GuardConfig,
    ModelConfig,
    OptimConfig,
    SavedModel,
    TrainConfig,
    gpt2,
    llama,
)
from jaxtrain.runtime.config_files import differences, from_json, load_config, to_json
from jaxtrain.runtime.flags import parse_config

DATA = DataConfig(sources=("python-stdlib",))
CONFIG = Config(data=DATA, model=gpt2(num_layers=2), optim=OptimConfig(schedule="wsd", decay_steps=9), seed=3)


def test_a_round_trip_through_json_keeps_everything():
    assert from_json(to_json(CONFIG)) == CONFIG


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent / "configs_of_older_runs").glob("*.json")), ids=lambda f: f.stem
)
def test_a_config_of_an_older_run_equals_the_same_config_today(file):
    """0, "" and -1 stood for an absent option; these files were written then."""
    today = Config(
        data=DataConfig(sources=("python-stdlib",)),
        model=gpt2(num_layers=2, scan_unroll="all" if file.stem == "given" else "auto"),
        train=TrainConfig(diagnose_every=None if file.stem == "given" else 100),
        guard=GuardConfig(sigmas=None if file.stem == "given" else 6.0),
    )
    old = load_config(file)
    assert differences(old, today) == []


def test_loads_python_and_json(tmp_path):
    (tmp_path / "run.py").write_text(
        "from jaxtrain.config import Config, DataConfig\n"
        "def config():\n    return Config(data=DataConfig(sources=('python-stdlib',)), seed=5)\n"
    )
    assert load_config(tmp_path / "run.py").seed == 5
    (tmp_path / "config.json").write_text(to_json(CONFIG))
    assert load_config(tmp_path / "config.json") == CONFIG


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.py", None, "no config file"),
        ("run.txt", "", r"must end in \.py or \.json"),
        ("run.py", "x = 1\n", r"no function config\(\)"),
        ("run.py", "def config():\n    return 3\n", "returned int, not a Config"),
        ("run.json", "{", "not valid JSON"),
    ],
)
def test_files_that_are_no_config(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "unknown config key sed; did you mean seed?"),
        ({"train": {"step": 3}}, r"unknown config key train\.step; did you mean train\.steps\?"),
        ({"train": {"zzz": 3}}, r"unknown config key train\.zzz; known: steps"),
        ({"train": {"steps": "3"}}, r"train\.steps: expected int, got '3'"),
        ({"train": {"steps": True}}, r"train\.steps: expected int, got True"),
        ({"train": {"steps": 2.5}}, r"train\.steps: expected int, got 2\.5"),
        ({"train": 3}, "train.*expected an object, got 3"),
        ({"optim": {"schedule": "cos"}}, r"optim\.schedule: 'cos' is none of"),
        ({"optim": {"peak_lr": None}}, r"optim\.peak_lr: expected float, got None"),
        ({"data": {"sources": "python-stdlib"}}, r"data\.sources: expected a list of strings"),
    ],
)
def test_json_with_wrong_keys_or_types_names_them(change, message):
    values = json.loads(to_json(CONFIG))
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        from_json(json.dumps(values))


def test_a_whole_number_serves_as_a_float():
    values = json.loads(to_json(CONFIG))
    values["optim"]["clip_norm"] = 2
    assert type(from_json(json.dumps(values)).optim.clip_norm) is float


NAN = float("nan")


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (ModelConfig, {"num_layers": 0}, "model.num_layers must be above 0, got 0"),
        (ModelConfig, {"d_model": 100, "num_heads": 3}, "d_model 100 is not divisible by model.num_heads 3"),
        (ModelConfig, {"num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not divisible by model.num_kv_heads 3"),
        (ModelConfig, {"d_model": 12, "num_heads": 4}, "even head dimension, got 3"),
        (ModelConfig, {"logit_softcap": -1.0}, "logit_softcap"),
        (ModelConfig, {"attention_window": 0}, "model.attention_window must be above 0, got 0"),
        (ModelConfig, {"attention_softcap": NAN}, "attention_softcap must be above 0 and finite, got nan"),
        (ModelConfig, {"attention": "flash"}, "model.attention: 'flash' is none of auto, xla, splash, cudnn"),
        (ModelConfig, {"rope_theta": NAN}, "rope_theta"),
        (DataConfig, {}, "data needs data.store"),
        (DataConfig, {"store": "a", "validation_fraction": 1.0}, "validation_fraction"),
        (DataConfig, {"store": "a", "prefetch": 0}, "prefetch"),
        (OptimConfig, {"peak_lr": 0.0}, "peak_lr"),
        (OptimConfig, {"peak_lr": NAN}, "peak_lr"),
        (OptimConfig, {"b2": 1.0}, r"b2 must be in \[0, 1\)"),
        (OptimConfig, {"b1": NAN}, "b1"),
        (OptimConfig, {"clip_norm": -1.0}, "clip_norm"),
        (OptimConfig, {"weight_decay": -0.1}, "weight_decay"),
        (OptimConfig, {"floor": 1.5}, "floor"),
        (GuardConfig, {"window": 1}, r"guard\.window must be 2 or more, got 1"),
        (GuardConfig, {"max_share": 1.1}, r"guard\.max_share must be in \(0, 1\], got 1\.1"),
        (TrainConfig, {"steps": 0}, "steps"),
        (TrainConfig, {"steps": 2**31}, r"train\.steps: 2147483648 is too large"),
        (TrainConfig, {"batch_size": 6, "accumulate": 4}, "batch_size 6 is not divisible by train.accumulate 4"),
        (TrainConfig, {"label_smoothing": 1.0}, "label_smoothing"),
        (TrainConfig, {"z_loss": -1.0}, "z_loss"),
        (TrainConfig, {"log_every": 0}, "log_every"),
        (CheckpointConfig, {"every": 0}, "every"),
        (CheckpointConfig, {"keep": 0}, "keep"),
        (CheckpointConfig, {"keep_every": 0}, "keep_every must be above 0"),
        (CheckpointConfig, {"keep_best": 0}, "keep_best must be above 0"),
        (
            CheckpointConfig,
            {"every": 50, "keep_every": 120},
            "keep_every 120 is not divisible by checkpoint.every 50",
        ),
    ],
)
def test_values_out_of_range(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**fields)


def test_values_at_their_bounds_are_allowed():
    assert GuardConfig(window=2, max_share=1.0).window == 2
    assert TrainConfig(steps=2**31 - 1, label_smoothing=0.0).steps == 2**31 - 1
    assert OptimConfig(b1=0.0, floor=1.0, weight_decay=0.0).floor == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"optim": OptimConfig(schedule="wsd")}, "needs optim.decay_steps"),
        ({"train": TrainConfig(seq_len=512)}, "seq_len 512 exceeds model.max_seq_len 256"),
        ({"optim": OptimConfig(warmup_steps=1000)}, "warmup_steps 1000 leaves no room to decay in train.steps 1000"),
        ({"optim": OptimConfig(warmup_steps=900, schedule="wsd", decay_steps=101)}, "leaves no room"),
        (
            {"checkpoint": CheckpointConfig(keep_best=2)},
            "keep_best .*eval_every None must be a multiple",
        ),
        (
            {"checkpoint": CheckpointConfig(every=40, keep_best=1), "train": TrainConfig(eval_every=100)},
            "eval_every 100 must be a multiple of checkpoint.every 40",
        ),
        ({"optim": OptimConfig(schedule="sgdr", cycles=3)}, "cycles 3 must divide train.steps 1000"),
        ({"optim": OptimConfig(schedule="sgdr", cycles=10, warmup_steps=100)}, "longer than optim.warmup_steps 100"),
    ],
)
def test_incompatible_values(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(data=DATA, **fields)


def test_warm_up_may_fill_the_run_where_nothing_decays():
    config = Config(data=DATA, optim=OptimConfig(schedule="constant", warmup_steps=1000))
    assert config.optim.warmup_steps == config.train.steps


def test_differences_name_every_field_that_differs():
    other = dataclasses.replace(CONFIG, seed=4, model=llama(2, 4, 64, 128, 256))
    lines = differences(CONFIG, other)
    assert "seed: 3 -> 4" in lines
    assert "model.positions: 'learned' -> 'rope'" in lines
    assert differences(CONFIG, CONFIG) == []


def test_a_json_config_runs_no_code(tmp_path):
    values = json.loads(to_json(CONFIG))
    values["data"]["sources"] = ["__import__('os').system('touch /tmp/x')"]
    assert from_json(json.dumps(values)).data.sources == tuple(values["data"]["sources"])


def test_a_config_imports_its_neighbours_and_leaves_none_behind(tmp_path):
    """Two folders with modules of one name, loaded one after the other in one process."""
    for name, seed in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        (folder / "parts").mkdir(parents=True)
        (folder / "base_of_ours.py").write_text(
            "from jaxtrain.config import Config, DataConfig\n"
            f"def config():\n    return Config(data=DataConfig(sources=('python-stdlib',)), seed={seed})\n"
        )
        (folder / "parts" / "__init__.py").write_text("")
        (folder / "parts" / "longer.py").write_text(f"STEPS = {100 + 10 * seed}\n")
        (folder / "run.py").write_text(
            "import dataclasses\nfrom base_of_ours import config as base\nfrom jaxtrain.config import TrainConfig\n"
            "from parts.longer import STEPS\n"
            "def config():\n    return dataclasses.replace(base(), train=TrainConfig(steps=STEPS))\n"
        )
    path = list(sys.path)
    for name, seed in (("one", 1), ("two", 2), ("one", 1)):
        config = load_config(tmp_path / name / "run.py")
        assert (config.seed, config.train.steps) == (seed, 100 + 10 * seed)
        assert sys.path == path
        assert not {"base_of_ours", "parts", "parts.longer"} & set(sys.modules)


def test_a_config_in_a_package_imports_its_relatives(tmp_path, monkeypatch):
    """A library of a virtual environment in the same folder stays imported."""
    (tmp_path / "ours" / "runs").mkdir(parents=True)
    (tmp_path / ".venv").mkdir()
    for name in ("ours/__init__.py", "ours/runs/__init__.py", ".venv/library_there.py"):
        (tmp_path / name).touch()
    (tmp_path / "ours" / "base.py").write_text(
        "import library_there\nfrom jaxtrain.config import Config, DataConfig\n"
        "def config():\n    return Config(data=DataConfig(sources=('python-stdlib',)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path / ".venv")
    before, path = set(sys.modules), list(sys.path)
    for line in ("from ..base import config", "from ours.base import config"):
        (tmp_path / "ours" / "runs" / "run.py").write_text(f"{line}\n")
        assert load_config(tmp_path / "ours" / "runs" / "run.py")
        assert set(sys.modules) - before == {"library_there"}
        assert sys.path == path
    (tmp_path / "ours" / "runs" / "run.py").write_text("\nfrom ..nothing import config\n")
    with pytest.raises(ValueError, match=r"run\.py line 2: ModuleNotFoundError"):
        load_config(tmp_path / "ours" / "runs" / "run.py")
    del sys.modules["library_there"]


def test_a_config_that_fails_leaves_the_path_as_it_was(tmp_path):
    path = list(sys.path)
    (tmp_path / "run.py").write_text("import no_such_neighbour\n")
    with pytest.raises(ValueError, match=r"run\.py line 1: ModuleNotFoundError"):
        load_config(tmp_path / "run.py")
    assert sys.path == path


@pytest.mark.parametrize(
    ("cls", "name", "near"),
    [
        (OptimConfig, "lr", "peak_lr"),
        (OptimConfig, "learning_rate", "peak_lr"),
        (OptimConfig, "peek_lr", "peak_lr"),
        (TrainConfig, "epochs", "steps"),
        (TrainConfig, "batchsize", "batch_size"),
        (ModelConfig, "n_layer", "num_layers"),
        (Config, "optimizer", "optim"),
    ],
)
def test_python_suggests_a_field_as_json_does(cls, name, near):
    with pytest.raises(TypeError, match=f"{cls.__name__} has no field '{name}'; did you mean {near}\\?"):
        cls(**{name: 1})


@pytest.mark.parametrize(
    ("optim", "steps", "expected"),
    [
        ({}, 1000, 100),
        ({"warmup_steps": 7}, 1000, 7),
        ({"warmup_fraction": 1 / 18}, 900, 50),
        ({"warmup_fraction": 1 / 18}, 30, 2),
        ({"warmup_fraction": 1 / 18}, 1, 0),
        ({"warmup_fraction": 0.5, "warmup_steps": 3}, 10, 3),
    ],
)
def test_the_warm_up_is_a_number_of_steps_or_a_share(optim, steps, expected):
    config = Config(data=DATA, optim=OptimConfig(**optim), train=TrainConfig(steps=steps))
    assert config.warmup_steps == config.resolved_optim.warmup_steps == expected


def test_differences_compare_the_warm_up_in_steps():
    share, steps = (
        Config(data=DATA, optim=OptimConfig(**optim)) for optim in ({"warmup_fraction": 0.25}, {"warmup_steps": 250})
    )
    assert differences(share, steps) == []


def test_removed_fields_of_older_versions_are_ignored():
    values = json.loads(to_json(CONFIG)) | {"faults": {"nan_loss_step": 0, "spike_factor": 10.0}}
    values["checkpoint"]["retries"] = 3
    assert from_json(json.dumps(values)) == CONFIG


@dataclasses.dataclass(frozen=True)
class Custom:
    """Custom model whose methods are not called here."""

    width: int = 8
    rate: float = 0.5
    activation: object = print  # no JSON

    def init(self, key):
        raise NotImplementedError

    def loss(self, params, batch):
        raise NotImplementedError


def test_a_custom_model_is_compared_and_stored_by_name_and_fields():
    config = Config(data=DATA, model=Custom(width=16))
    text = to_json(config)
    assert json.loads(text)["model"] == {"custom": "Custom", "fields": {"width": 16, "rate": 0.5}}
    saved = from_json(text)
    assert saved.model == SavedModel("Custom", {"width": 16, "rate": 0.5})
    assert saved == config
    assert to_json(saved) == text
    assert differences(saved, config) == []
    assert differences(saved, Config(data=DATA, model=Custom())) == ["model.fields.width: 16 -> 8"]
    assert Config(data=DATA, model=Custom(width=16)) == config
    assert hash(Config(data=DATA, model=Custom(width=16))) == hash(config)
    assert config != Config(data=DATA)


def test_something_that_is_no_model_is_rejected():
    with pytest.raises(ValueError, match="expected a ModelConfig or an object with init and loss, got 3"):
        Config(data=DATA, model=3)


MODEL_FILE = """
import dataclasses
from jaxtrain.config import Config, DataConfig
{decorator}
class Mine:
    width: int = 8
    def init(self, key): ...
    def loss(self, params, batch): ...
def config():
    return Config(data=DataConfig(sources=("python-stdlib",)), model=Mine())
"""


def test_flags_address_the_fields_of_a_frozen_dataclass_model(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MODEL_FILE.format(decorator="@dataclasses.dataclass(frozen=True)"))
    assert parse_config([str(file), "--model.width", "32"]).model.width == 32
    with pytest.raises(ValueError, match=r"model\.width: expected a whole number, got 'x'"):
        parse_config([str(file), "--model.width", "x"])
    with pytest.raises(ValueError, match=r"unknown flag --model\.widht: did you mean --model\.width\?"):
        parse_config([str(file), "--model.widht", "3"])
    file.write_text(MODEL_FILE.format(decorator=""))
    with pytest.raises(ValueError, match=r"unknown flag --model\.width: only the fields of a frozen dataclass"):
        parse_config([str(file), "--model.width", "3"])
