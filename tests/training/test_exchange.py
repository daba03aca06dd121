"""Import and export of models: run directories, folders of transformers, and folders that are damaged."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors
import tokenizers
from runs import assert_same_bits, change, train

import jaxtrain
from jaxtrain.cli import main
from jaxtrain.config import family
from jaxtrain.models.hf.config_json import to_hf_config
from jaxtrain.models.hf.read import PretrainedFolder, abstract_params
from jaxtrain.training.exchange import export_model
from jaxtrain.training.run import open_run

MODEL = {"num_kv_heads": 2, "qk_norm": True}


@pytest.fixture(scope="module")
def run_dir(tiny_config, tmp_path_factory):
    """A run of two checkpoints, on four devices."""
    folder = tmp_path_factory.mktemp("exchange") / "run"
    config = change(tiny_config, train={"steps": 4}, checkpoint={"every": 2}, mesh={"data": 1, "fsdp": 2, "tensor": 2})
    train(change(config, model=MODEL | {"vocab_multiple": 8}), folder)
    return folder


@pytest.fixture(scope="module")
def exported(run_dir):
    folder = run_dir.parent / "hf"
    assert export_model(open_run(run_dir, data=False), folder, shard_bytes=6000) == 4
    return folder


@pytest.fixture(scope="module")
def imported(exported):
    folder = exported.parent / "imported"
    assert main(["import", str(exported), "--out", str(folder)]) == 0
    return folder


def test_export_then_import_gives_the_same_bits(run_dir, exported, imported):
    assert len(list(exported.glob("model-*.safetensors"))) > 2
    ours, again = jaxtrain.load(run_dir), jaxtrain.load(imported)
    assert again.step == 0
    assert again.tokenizer == ours.tokenizer
    trained = dict(ours.params, embedding=ours.params["embedding"][:257], head=ours.params["head"][:, :257])
    assert_same_bits(again.params, trained)
    assert again.encode_prompt("1 + 2") == ours.encode_prompt("1 + 2") == [256, *b"1 + 2"]
    assert again.generate("1 + 2", 5, seed=3) == ours.generate("1 + 2", 5, seed=3)
    assert jaxtrain.load(exported).encode_prompt("1 + 2") == ours.encode_prompt("1 + 2")
    library = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert library.encode("1 + 2").ids == ours.encode_prompt("1 + 2")  # as transformers begins it
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == 256
    assert not list(exported.parent.glob(".*"))


def test_an_imported_run_is_evaluated_and_trained_further(imported, tiny_config, store, tmp_path, capsys):
    """The store's tokenizer is that of the run, which came and went as a file of the tokenizers library."""
    assert main(["eval", str(imported), "--data.store", str(store), "--json"]) == 0
    nll = json.loads(capsys.readouterr().out)["nll"]
    config = change(tiny_config, model=MODEL, train={"steps": 4, "init_from": str(imported)})
    outcome = train(config, tmp_path / "run")
    assert outcome["evaluation"]["nll"] < nll
    with pytest.raises(ValueError, match="no token store at"):
        open_run(imported)


def test_checkpoints_are_chosen_averaged_and_cast(run_dir, tmp_path):
    run = open_run(run_dir, data=False)
    assert export_model(run, tmp_path / "mean", average=2, dtype="bfloat16") == 4
    assert export_model(run, tmp_path / "first", step=2) == 2
    assert PretrainedFolder(tmp_path / "mean").dtype == "bfloat16"
    whole = jaxtrain.load(run_dir, average=2).params["final_norm"]["scale"]
    cast = jaxtrain.load(tmp_path / "mean").params["final_norm"]["scale"]
    np.testing.assert_array_equal(cast, whole.astype("bfloat16").astype("float32"))


FIRST, INDEX = "model-00001-of-00008.safetensors", "model.safetensors.index.json"
TENSOR = "model.layers.0.self_attn.q_proj.weight"


def edit(name, function):
    """Returns a change of a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps(function(json.loads((folder / name).read_text()))))


def config(**values):
    return edit("config.json", lambda old: {k: v for k, v in (old | values).items() if v is not ...})


def torn(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def head(function):
    """Returns a change of the head of the first safetensors file."""

    def change(folder):
        data = (folder / FIRST).read_bytes()
        size = int.from_bytes(data[:8], "little")
        text = json.dumps(function(json.loads(data[8 : 8 + size]))).encode()
        (folder / FIRST).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return change


def empty_tensor(head):
    end = max(entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__")
    return head | {"model.sinks": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}}


def as_file(folder):
    shutil.rmtree(folder)
    folder.write_bytes(b"GGUF")


def as_cache(folder):
    """Moves the model to where the cache of the Hub has it."""
    (folder / "snapshots" / "b1").mkdir(parents=True)
    (folder / "config.json").rename(folder / "snapshots" / "b1" / "config.json")


YARN = {"rope_type": "yarn", "factor": 4.0}
DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: missing, or not a JSON object"),
    "torn config": (torn("config.json", 40), "config.json: missing, or not a JSON object"),
    "a list": (edit("config.json", lambda old: [old]), "config.json: missing, or not a JSON object"),
    "no folder": (shutil.rmtree, "config.json: missing; a model of the .* Hub is downloaded with `hf download"),
    "a file": (as_file, "config.json: missing, as HF_FOLDER is a file"),
    "adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "config.json: missing, as HF_FOLDER holds an adapter: .*merge_and_unload",
    ),
    "cache": (as_cache, r"config.json: missing; give the folder of a snapshot: .*/cache/snapshots/b1\n"),
    "pointer": (
        lambda folder: (folder / FIRST).write_text("version https://git-lfs.github.com/spec/v1\n"),
        f"{FIRST} is a pointer of git LFS: run `git lfs pull`",
    ),
    "unknown architecture": (config(architectures=["BertModel"]), "config.json: architecture 'BertModel' is not known"),
    "sinks": (config(architectures=["GptOssForCausalLM"]), "config.json: .* needs attention sinks, which"),
    "images": (config(architectures=["Gemma3ForConditionalGeneration"]), "config.json: .* needs a tower for images"),
    "odd architecture": (config(architectures=[{}]), r"config.json: architecture \{\} is not known"),
    "yarn": (config(rope_scaling=YARN), "config.json: the rotary positions are of type 'yarn', and the decoder has"),
    "part of a type": (config(rope_scaling={"rope_type": "llama3"}), "config.json: .* of type llama3 have no factor"),
    "odd rope": (config(rope_parameters=[1]), "config.json: "),
    "odd factor": (config(rope_scaling={"type": "linear", "factor": "x"}), "config.json: "),
    "part of the channels": (config(partial_rotary_factor=0.5), "config.json: partial_rotary_factor is 0.5, and"),
    "another activation": (
        config(hidden_act="gelu"),
        "config.json: hidden_act is 'gelu', and the decoder computes 'silu'",
    ),
    "biases": (config(attention_bias=True), "config.json: attention_bias is True"),
    "quantized": (config(quantization_config={"bits": 4}), "config.json: quantization_config is"),
    "no size": (config(hidden_size=...), "config.json: hidden_size is missing"),
    "text as a size": (config(hidden_size="16"), "config.json: model.d_model: expected int, got '16'"),
    "other sizes": (config(intermediate_size=40), "safetensors: .* has shape .*, and config.json makes it"),
    "more layers": (config(num_hidden_layers=3), rf"{INDEX} has no tensor model.layers.2.* which a Qwen3ForCausalLM"),
    "huge": (config(vocab_size=2**40), "config.json: model.vocab_size: .* too large"),
    "missing file": (lambda folder: (folder / FIRST).unlink(), f"{FIRST} is missing"),
    "torn file": (torn(FIRST, 3000), f"{FIRST} is damaged"),
    "empty file": (torn(FIRST, 0), f"{FIRST} is damaged"),
    "torn index": (torn(INDEX, 100), f"{INDEX} is damaged"),
    "index elsewhere": (edit(INDEX, lambda old: {"weight_map": {TENSOR: "../x"}}), f"{INDEX} is damaged"),
    "index of another": (
        edit(INDEX, lambda old: {"weight_map": old["weight_map"] | {"more": FIRST}}),
        f"{FIRST} has no tensor more, which {INDEX} places there",
    ),
    "no files": (lambda folder: [file.unlink() for file in folder.glob("model*")], "has neither model.safetensors nor"),
    "dtype": (
        head(lambda old: old | {TENSOR: old[TENSOR] | {"dtype": "I32"}}),
        f"{FIRST}: {TENSOR} has dtype I32",
    ),
    "extra": (head(empty_tensor), f"{FIRST}: tensor model.sinks is not part of a Qwen3ForCausalLM"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "torn tokenizer": (torn("tokenizer.json", 500), "tokenizer.json is not a file of the tokenizers library"),
    "endless layers": (config(num_hidden_layers=10**9), "config.json: num_hidden_layers is 1000000000, and at most"),
}


def test_a_damaged_folder_is_one_line_that_names_the_file(exported, tmp_path, capsys):
    for case, (harm, message) in DAMAGE.items():
        folder = tmp_path / case
        shutil.copytree(exported, folder)
        harm(folder)
        assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 2, case
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1, (case, error)
        assert re.search(message, error), (case, error)
        assert not (tmp_path / "run").exists(), case


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(exported, tmp_path, monkeypatch):
    """The library's memory map of it would end the process."""
    model = PretrainedFolder(shutil.copytree(exported, tmp_path / "model"))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_params(model.config)
    )
    opened = {file: safetensors.safe_open(file, framework="np") for file in model.path.glob("*.safetensors")}
    monkeypatch.setattr(safetensors, "safe_open", lambda file, framework: opened[file])
    for file in opened:
        torn(file.name, -4)(model.path)
    with pytest.raises(ValueError, match=r"safetensors changed while it was read: it has [\d,]+ bytes, not [\d,]+$"):
        model.read_params(like)


def test_folders_that_hold_something_and_models_without_an_architecture_are_refused(
    exported, run_dir, tmp_path, capsys
):
    for arguments in (["import", str(exported)], ["export", str(run_dir)]):
        assert main([*arguments, "--out", str(exported)]) == 2
        assert "holds something: give another folder" in capsys.readouterr().err
    sizes = {"num_layers": 2, "num_heads": 2, "d_model": 16, "d_ff": 32, "max_seq_len": 16, "vocab_size": 257}
    for fields, message in (
        ({"logit_softcap": 5.0}, r"LlamaForCausalLM differs by model.logit_softcap 5.0 \(it has None\)"),
        ({"norm": "layernorm"}, "LlamaForCausalLM differs by model.norm 'layernorm'"),
        ({"qkv_bias": True, "qk_norm": True}, "differs by model.qk"),
    ):
        with pytest.raises(ValueError, match=f"no architecture of transformers computes this model; .*{message}"):
            to_hf_config(family("llama", **sizes, **fields))
