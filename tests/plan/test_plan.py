"""The plan: formulas against known models, the command, and every failure of the compiler."""

import dataclasses
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest

from jaxtrain.cli import main
from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig, llama
from jaxtrain.plan import compiler as aot
from jaxtrain.plan.compiler import CompilerMissing, compile_step, search_batch
from jaxtrain.plan.formulas import has_large_matrix, make_plan, plan_vocab
from jaxtrain.plan.traffic import replaced_gathers
from jaxtrain.runtime.chips import CHIPS, find_chip, parse_topology
from jaxtrain.runtime.config_files import load_config, to_json

CONFIGS = Path(__file__).parents[2] / "configs"
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None


def change(config, section, **fields):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


def plan_of(name, num_devices, **settings):
    config = load_config(CONFIGS / f"{name}.py")
    return make_plan(config, plan_vocab(config), num_devices, **settings)


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("gpt2_124m", 124_439_808 + 47 * 768),  # 47 rows of padding
        ("llama_1b", 1_345_423_360),
        ("llama2_7b", 6_738_415_616),
        ("llama3_8b", 8_030_261_248),
        ("llama2_70b", 68_976_648_192),
        ("olmoe_1b_7b", 6_919_161_856),
    ],
)
def test_ready_configs_are_the_models_they_say(name, num_params):
    plan = plan_of(name, 16)
    assert plan.num_params == num_params
    assert plan.num_active == {"olmoe_1b_7b": 1_282_017_280}.get(name, num_params)


def test_the_state_of_70b_is_12_bytes_a_parameter_over_all_chips():
    plan = plan_of("llama2_70b", 128)
    assert plan.mesh == {"data": 1, "fsdp": 128, "tensor": 1}
    assert plan.memory.state * 128 == pytest.approx(12 * plan.num_params, rel=0.003)
    assert plan.memory.parameters * 128 == pytest.approx(276e9, rel=0.01)
    assert plan.memory.gradients == plan.memory.parameters // 2  # bfloat16, and no second copy of the parameters
    assert plan.memory.compute_copy == 0
    assert plan.memory.optimizer == 2 * plan.memory.parameters
    assert plan.memory.peak == sum(plan.memory)


def test_gradients_that_are_summed_are_float32():
    """Over replicas or micro-batches; micro-batches hold a gradient of their own in bfloat16 beside the sum."""
    config = load_config(CONFIGS / "llama2_7b.py")
    for changed, share in (
        (change(config, "mesh", data=2, fsdp=-1), 1.0),
        (change(config, "train", accumulate=2), 1.5),
    ):
        memory = make_plan(changed, 32_000, 64).memory
        assert memory.gradients == share * memory.parameters


@pytest.mark.parametrize(
    ("section", "fields", "trained"),
    [
        ("optim", {"frozen": ("!head",)}, 4096 * 32_000 // 8),
        ("model", {"lora_rank": 8}, 32 * 2 * 8 * (4096 // 8 + 4096)),  # fsdp shards the first of each two
    ],
)
def test_frozen_parameters_have_no_moments(section, fields, trained):
    config = change(load_config(CONFIGS / "llama2_7b.py"), section, **fields)
    plan = make_plan(config, plan_vocab(config), 8)
    assert plan.memory.optimizer == 8 * trained
    assert plan.memory.parameters * 8 == pytest.approx(4 * plan.num_params, rel=1e-2)


def test_time_and_cost_follow_from_flops_and_mfu():
    plan = plan_of("llama2_7b", 64, chip=find_chip("v5p"), mfu=0.5, price=4.0)
    # Six FLOPs a matrix parameter and token, twelve a channel of attention and token, over half the keys.
    matrices = 6_738_415_616 - 32_000 * 4096 - 65 * 4096
    flops = 4096 * 1024 * (6 * matrices + 12 * 32 * 4096 * 4097 / 2)
    assert plan.flops_per_step == pytest.approx(flops, rel=1e-9)
    seconds = flops / (64 * 459e12 * 0.5)
    assert plan.cost.step_seconds == pytest.approx(seconds)
    assert plan.cost.tokens_per_second == pytest.approx(4096 * 1024 / seconds)
    assert plan.cost.days == pytest.approx(476_837 * seconds / 86_400)
    assert plan.cost.price == pytest.approx(4.0 * 64 * 24 * plan.cost.days)


def test_attention_scores_take_memory_without_a_blockwise_kernel():
    """Scores and weights in float32: on a CPU, and on a GPU with what cuDNN cannot do."""
    config = load_config(CONFIGS / "llama2_7b.py")

    def layer(chip, precision="bfloat16", **fields):
        changed = change(change(config, "model", **fields), "train", precision=precision)
        return make_plan(changed, 32_000, 64, chip and find_chip(chip)).memory.layer

    scores = 8 * (config.train.batch_size // 64) * 4096**2 * 32
    assert layer(None) - layer("v5p") == scores
    assert layer("h100") == layer("v5p", attention_softcap=30.0) == layer("v5p")
    assert layer("h100", attention_softcap=30.0) == layer(None)
    assert layer("h100", precision="float32") - layer("v5p", precision="float32") == scores
    assert layer("a100", head_dim=256) - layer("h100", head_dim=256) == scores


def test_a_window_skips_hidden_blocks():
    config = load_config(CONFIGS / "llama2_7b.py")
    whole, window = (
        make_plan(change(config, "model", attention_window=size), 32_000, 64).flops_per_step for size in (None, 1024)
    )
    keys = 4097 / 2 - (1024 * 1025 / 2 + 3072 * 1024) / 4096
    assert whole - window == pytest.approx(4096 * config.train.batch_size * 12 * 32 * 4096 * keys, rel=1e-9)


def test_a_chip_without_a_known_peak_has_no_cost():
    config = change(load_config(CONFIGS / "llama2_7b.py"), "train", precision="float32")
    assert make_plan(config, 32_000, 64, find_chip("v5p")).cost is None
    assert plan_of("llama2_7b", 64).cost is None


def test_remat_policies_keep_less_and_less():
    config = change(load_config(CONFIGS / "llama2_7b.py"), "mesh", data=-1, fsdp=1)
    kept = {}
    for remat in ("none", "minimal", "full", "offload"):
        kept[remat] = make_plan(change(config, "model", remat=remat), 32_000, 64).memory.activations
    assert kept["none"] > kept["minimal"] > kept["full"] > kept["offload"] == 0
    # 4096 channels of the residual stream, bfloat16, for each of 16 x 4096 tokens and 32 layers.
    assert kept["full"] == 16 * 4096 * 32 * 4096 * 2


def test_tensor_parallelism_divides_the_sharded_dimensions():
    config = change(change(load_config(CONFIGS / "llama2_7b.py"), "train", batch_size=64), "mesh", data=1, fsdp=-1)
    one, two = (make_plan(change(config, "mesh", tensor=size), 32_000, 64).memory for size in (1, 2))
    assert two.logits == one.logits // 2
    assert two.activations == 2 * one.activations  # twice the rows on a device, and full remat keeps them whole
    assert two.parameters == pytest.approx(one.parameters, rel=0.01)


@pytest.mark.parametrize("name", list(CHIPS))
def test_every_chip_has_a_peak_and_memory(name):
    assert 1e14 < find_chip(name).peak_flops < 1e16
    assert 15e9 < find_chip(name).hbm_bytes < 200e9


def test_gathers_that_became_all_reduces_are_a_warning():
    config = load_config(CONFIGS / "llama2_7b.py")
    plan, alone = (make_plan(change(config, "mesh", data=1, fsdp=size), 32_000, size) for size in (64, 1))
    rows = [{"kind": one.kind, "axes": list(one.axes), "bytes": one.num_bytes} for one in plan.traffic]
    assert replaced_gathers(plan.traffic, rows, plan.mesh) is None
    replaced = [row | {"kind": row["kind"].replace("all-gather", "all-reduce")} for row in rows]
    text = replaced_gathers(plan.traffic, replaced, plan.mesh)
    assert "26.2 GB of all-gathers over fsdp 64" in text
    assert "--mesh.data 8 --mesh.fsdp 8" in text
    assert replaced_gathers(alone.traffic, [], alone.mesh) is None


def test_topologies():
    assert parse_topology("v5p:2x2x2") == (CHIPS["v5p"], 8)
    assert parse_topology("v6e:16x16") == (CHIPS["v6e"], 256)
    assert parse_topology("h100:8") == (CHIPS["h100"], 8)
    assert parse_topology("b200:4x8") == (CHIPS["b200"], 32)


@pytest.mark.parametrize(
    "topology", ["v5p", "v5p:", "v5p:2x2", "v6e:2x2x2", "h100:2x2x2", "h100:", "v9:2x2", "v6e:0x4", "v6e:ax4"]
)
def test_unknown_topologies_are_one_line_with_the_known_ones(topology, capsys):
    assert main(["plan", str(CONFIGS / "llama2_7b.py"), "--topology", topology]) == 2
    error = capsys.readouterr().err
    assert topology in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v5p:2x2x2", "--mesh.fsdp", "16"], "takes 16 devices, and there are 8"),
        (["--topology", "v5p:2x2x2", "--mesh.fsdp", "1", "--mesh.tensor", "3"], "cannot be made of 8 devices"),
        (["--topology", "v5p:2x2x2", "--train.batch-size", "12"], "train.batch_size 12 is not divisible"),
        (["--topology", "v5p:2x2x2", "--devices", "8"], "leave out --devices and --chip"),
        (["--devices", "8", "--chip", "v7"], "unknown chip: 'v7'"),
        (["--max-batch"], "give a --topology"),
        (["--mfu", "40"], "--mfu must be in (0, 1]"),
        (["--price", "-1"], "--price must be"),
        (["--topologie", "v5p:2x2x2"], "did you mean --topology?"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys):
    assert main(["plan", str(CONFIGS / "llama2_7b.py"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_vocabulary_comes_from_config_store_or_byte_tokenizer(store, tmp_path):
    assert plan_vocab(Config(data=DataConfig(store=str(store)))) == 257
    assert plan_vocab(Config(data=DataConfig(sources=("x",)))) == 257
    assert plan_vocab(Config(data=DataConfig(sources=("x",)), model=ModelConfig(vocab_size=300))) == 300
    for data in (DataConfig(store=str(tmp_path / "none")), DataConfig(sources=("x",), tokenizer="bpe:300")):
        with pytest.raises(ValueError, match=r"--model\.vocab-size"):
            plan_vocab(Config(data=data))


@pytest.mark.parametrize(
    ("vocab_size", "d_model", "large"),
    [(50_304, 384, True), (50_304, 256, False), (257, 768, False), (None, 64, False)],
)
def test_a_matrix_is_large_if_an_arena_of_malloc_cannot_hold_it(vocab_size, d_model, large):
    """The vocabulary may be known only when the text is tokenized."""
    model = ModelConfig(vocab_size=vocab_size, d_model=d_model)
    assert has_large_matrix(Config(data=DataConfig(sources=("x",), tokenizer="bpe:300"), model=model)) is large


@pytest.fixture
def config():
    """Config of a byte-level model that compiles in seconds."""
    return Config(
        data=DataConfig(sources=("python-stdlib",)),
        model=llama(num_layers=2, num_heads=2, d_model=16, d_ff=32, max_seq_len=16, num_kv_heads=1),
        train=TrainConfig(steps=200, batch_size=8, seq_len=16, accumulate=2),
    )


@pytest.fixture
def config_file(config, tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(to_json(config))
    return str(file)


def test_the_command_prints_tables(config_file, capsys):
    assert main(["plan", config_file, "--devices", "2", "--chip", "v5e", "--train.precision", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    for part in ("2 devices (v5e): data 2 x fsdp 1", "both moments", "at 40% MFU", "fits v5e", "all-reduce"):
        assert part in printed
    assert "--topology" in printed


def test_json_has_its_keys_without_a_compiler(config_file, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", config_file, "--topology", "v5e:2x2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["compiled"] is False
    assert "jaxtrain[plan]" in result["note"]
    assert result["fits"] is True
    assert result["argument_bytes_per_device"] == 12 * result["num_params"]
    assert result["temporary_bytes_per_device"] > 0
    assert [row["kind"] for row in result["collectives"]] == ["all-reduce"] * len(result["collectives"]) != []


def test_gpus_without_a_compiler_are_planned_by_formula(config_file, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", config_file, "--topology", "h100:2", "--train.precision", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert 'the GPU compiler is not installed: pip install "jaxtrain[plan-gpu]"' in printed
    assert "fits h100" in printed


def pretend(monkeypatch, tmp_path, answer):
    """Replaces the child by a shell script that writes or runs `answer`."""
    script = tmp_path / "python"
    body = answer if isinstance(answer, str) else f"printf '%s' '{json.dumps(answer)}' > \"$4\""
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ({"error": "JaxRuntimeError", "message": "ABORTED: libtpu multi-process lockfile"}, 1, "libtpu's lock"),
        (
            {"error": "JaxRuntimeError", "message": "Invalid TPU external name: TPU v5p"},
            2,
            "knows no topology 'v5e:2x2'",
        ),
        ({"error": "JaxRuntimeError", "message": "INTERNAL: it broke"}, 1, "it broke"),
        ({"error": "ValueError", "message": "does not divide"}, 2, "does not divide"),
        ("echo it crashed >&2; exit 3", 1, "exit code 3"),
    ],
)
def test_errors_of_the_child_are_reported(answer, code, said, config_file, monkeypatch, tmp_path, capsys):
    pretend(monkeypatch, tmp_path, answer)
    assert main(["plan", config_file, "--topology", "v5e:2x2"]) == code
    assert said in capsys.readouterr().err


def test_a_child_that_takes_too_long_is_killed(config_file, monkeypatch, tmp_path, capsys):
    pretend(monkeypatch, tmp_path, "exec sleep 600")
    start = time.monotonic()
    assert main(["plan", config_file, "--topology", "v5e:2x2", "--timeout", "1"]) == 1
    assert "raise --timeout" in capsys.readouterr().err
    assert time.monotonic() - start < 300


def test_a_program_that_does_not_fit_is_an_answer(config_file, monkeypatch, tmp_path, capsys):
    answer = {"fits": False, "needed_bytes_per_device": 20 * 10**9, "message": "Ran out", "compile_seconds": 1.0}
    pretend(monkeypatch, tmp_path, answer)
    assert main(["plan", config_file, "--topology", "v5e:2x2"]) == 0
    assert "does not fit v5e: 20.00 GB of 16.91 GB" in capsys.readouterr().out


def test_the_compilers_numbers_replace_the_formulas(config_file, monkeypatch, tmp_path, capsys):
    row = {
        "kind": "all-gather",
        "axes": ["fsdp"],
        "dtype": "bf16",
        "count": 7,
        "bytes": 5 * 10**9,
        "blocking_bytes": 3 * 10**9,
    }
    names = ("argument", "temporary", "temporary_sum", "output", "alias", "code", "peak", "host")
    answer = {f"{name}_bytes_per_device": (i + 1) * 10**9 for i, name in enumerate(names)}
    costs = [{"part": "head", "cycles": 2_500_000, "bytes": 10**9}, {"part": "copies", "cycles": 0, "bytes": 10**9}]
    answer |= {"fits": True, "compile_seconds": 1.0, "collectives": [row], "costs": costs, "estimated_seconds": 0.25}
    pretend(monkeypatch, tmp_path, answer)
    assert main(["plan", config_file, "--topology", "v5e:2x2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {name: result[name] for name in answer} == answer
    assert main(["plan", config_file, "--topology", "v5e:2x2"]) == 0
    printed = capsys.readouterr().out
    assert "fits v5e: 7.00 GB of 16.91 GB" in printed  # the peak
    assert [line for line in printed.splitlines() if "all-gather" in line and "5.00 GB" in line and "3.00 GB" in line]
    assert [line for line in printed.splitlines() if "total" in line and "2.5 million" in line and "2.00 GB" in line]


@pytest.mark.parametrize("largest", [0, 1, 4, 5, 6, 13])
def test_the_search_finds_the_largest_batch(largest, config):
    tried = []

    def compile_config(config):
        tried.append(config.train.batch_size)
        return {"fits": config.train.batch_size <= 4 * largest}

    answers = list(search_batch(config, 4, compile_config))
    fitting = [one["batch_size"] for one in answers if one["fits"]]
    assert max(fitting, default=0) == 4 * largest
    assert len(set(tried)) == len(tried) <= 8
    assert all(size % 4 == 0 for size in tried)


def test_max_batch_is_reported(config_file, monkeypatch, tmp_path, capsys):
    sizes = ("argument", "temporary", "output", "alias", "code", "host", "peak")
    fits = {f"{name}_bytes_per_device": 10**8 for name in sizes} | {"collectives": [], "costs": []}
    answers = {"yes": fits | {"fits": True}, "no": {"fits": False, "needed_bytes_per_device": None, "message": "no"}}
    for name, answer in answers.items():
        (tmp_path / name).write_text(json.dumps(answer | {"compile_seconds": 1.0, "hbm_bytes": 16 * 10**9}))
    rows = "rows=$(grep -o 'batch_size[^0-9]*[0-9]*' \"$3\" | grep -o '[0-9]*$')"
    script = f'{rows}; [ "$rows" -le 48 ] && answer=yes || answer=no; cp "{tmp_path}/$answer" "$4"'
    pretend(monkeypatch, tmp_path, script)
    assert main(["plan", config_file, "--topology", "v5e:2x2", "--max-batch", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["max_batch"] == result["batch_size"] == 48
    assert result["tokens_per_step"] == 48 * 16
    assert "batch 64: does not fit, more of 16.00 GB" in err
    assert [one["fits"] for one in result["tries"]].count(False) >= 1


def test_needed_bytes_are_read_from_the_refusal():
    new = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (120.50G) exceeds available HBM (15.75G)."
    old = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 200.25M of 15.75G hbm."
    assert aot._needed(new) == int(120.5 * 2**30)
    assert aot._needed(old) == int(200.25 * 2**20)
    assert aot._needed("RESOURCE_EXHAUSTED: something") is None


@pytest.mark.skipif(HAS_COMPILER, reason="there is a TPU compiler here")
def test_without_a_compiler_compiling_says_so(config):
    with pytest.raises(CompilerMissing, match="jaxtrain\\[plan\\]"):
        compile_step(config, 257, "v5e:2x2", 60)


@pytest.mark.skipif(not HAS_COMPILER, reason="no TPU compiler: pip install jaxtrain[plan]")
def test_the_real_compiler_answers_and_leaks_nothing(config_file, capsys):
    before = dict(os.environ)
    arguments = ["plan", config_file, "--topology", "v5e:2x2", "--train.batch-size", "32", "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert dict(os.environ) == before
    assert "libtpu.so" not in Path("/proc/self/maps").read_text()
    assert result["compiled"] is True
    assert result["fits"] is True
    assert result["argument_bytes_per_device"] >= 12 * result["num_params"]
    assert [(row["kind"], row["axes"]) for row in result["collectives"]] == [("all-reduce", ["data"])]
    assert result["peak_bytes_per_device"] < result["hbm_bytes"]


@pytest.mark.skipif(not HAS_COMPILER, reason="no TPU compiler: pip install jaxtrain[plan]")
def test_the_real_compiler_rejects_a_program_that_does_not_fit():
    config = change(load_config(CONFIGS / "llama_1b.py"), "model", num_layers=2, vocab_size=4_000_000)
    config = dataclasses.replace(change(config, "train", batch_size=8, accumulate=1), mesh=MeshConfig(1, 1, 1))
    found = compile_step(config, 4_000_000, "v5e:1x1", 900)
    assert found["fits"] is False
    assert found["needed_bytes_per_device"] > CHIPS["v5e"].hbm_bytes
