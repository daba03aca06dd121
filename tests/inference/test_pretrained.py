"""Models of transformers with their tokenizers. The folders here are our own exports: no transformers needed."""

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers

import jaxtrain
from jaxtrain.cli import main
from jaxtrain.config import family
from jaxtrain.data.tokenizer import BPETokenizer, begin_with_eot, byte_level_json, read_hf, train_bpe
from jaxtrain.models.hf.write import write_model
from jaxtrain.models.model import TransformerModel

SIZES = {"num_layers": 2, "num_heads": 2, "d_model": 16, "d_ff": 24, "max_seq_len": 32, "vocab_size": 300}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a small Llama and a tokenizer of 270 tokens."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = family("llama", **SIZES)
    write_model(folder, config, jax.jit(TransformerModel(config).init)(jax.random.key(0)), more={"eos_token_id": 0})
    train_bpe(["the cat sat on the mat with the other cat " * 40], 270).save(folder)
    return folder


def test_a_folder_gives_the_model_and_its_tokenizer(source):
    pretrained = jaxtrain.load(source)
    expected = jax.jit(TransformerModel(family("llama", **SIZES)).init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, pretrained.params, expected)
    tokens = pretrained.tokenizer.encode("the cat")
    assert pretrained.tokenizer.decode(tokens) == "the cat"
    assert pretrained.logits(tokens[None]).shape == (1, len(tokens), 300)


def test_load_and_the_command_take_a_folder_of_transformers(source, capsys):
    model = jaxtrain.load(source)
    assert (model.step, model.config.model.max_seq_len, model.stop_ids) == (0, 32, (0,))
    text = model.generate("the cat", 5, temperature=0)
    assert main(["generate", str(source), "--prompt", "the cat", "--num-tokens", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == f"the cat{text}\n"
    with pytest.raises(ValueError, match="is no run"):
        jaxtrain.load(source, 5)


def renamed(tokenizer, text, number):
    """Returns the values of a tokenizer.json with another added token."""
    token = dict(tokenizer["added_tokens"][0], id=number, content=text)
    return tokenizer | {"added_tokens": [*tokenizer["added_tokens"], token]}


SINGLE = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
FIRST = {"type": "TemplateProcessing", "single": SINGLE, "pair": [*SINGLE, {"Sequence": {"id": "B", "type_id": 1}}]}
FIRST["special_tokens"] = {"<s>": {"id": "<s>", "ids": [270], "tokens": ["<s>"]}}


def test_an_imported_run_begins_texts_as_its_folder_does(source, tmp_path, capsys):
    """With the first token that the tokenizer adds, not with our end-of-text token."""
    folder, run = tmp_path / "folder", tmp_path / "run"
    shutil.copytree(source, folder)
    values = renamed(json.loads((folder / "tokenizer.json").read_text()), "<s>", 270)
    values["post_processor"] = FIRST
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert main(["import", str(folder), "--out", str(run)]) == 0
    first, second = jaxtrain.load(folder), jaxtrain.load(run)
    assert first.encode_prompt("the cat") == second.encode_prompt("the cat")
    assert second.encode_prompt("the cat")[0] == 270
    assert first.generate("the cat", 5, temperature=0) == second.generate("the cat", 5, temperature=0)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["bytes", "bpe", "byte level", "first token"])
def test_a_tokenizer_that_begins_with_end_of_text_is_read_as_it_was(source, tmp_path, name, indent):
    values = json.loads(byte_level_json() if name == "bytes" else (source / "tokenizer.json").read_text())
    if name == "byte level":
        values["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
        values["post_processor"]["use_regex"] = True
    if name == "first token":
        values = renamed(values, "<s>", 270) | {"post_processor": FIRST}
    (tmp_path / "before.json").write_text(json.dumps(values, indent=indent))
    (tmp_path / "after.json").write_text(begin_with_eot(BPETokenizer((tmp_path / "before.json").read_text())))
    before, after = read_hf(tmp_path / "before.json"), read_hf(tmp_path / "after.json")
    assert (before == after, before.fingerprint) == (True, after.fingerprint)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "after.json"))
    assert library.encode("the cat").ids == [before.eot_id, *before.encode("the cat")]


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        ({}, {}, "<|endoftext|>"),
        ({"eos_token": "<end>"}, {}, "<end>"),
        ({"eos_token": {"content": "<end>"}}, {}, "<end>"),
        ({}, {"eos_token_id": [270, 3]}, "<end>"),
        ({}, {"eos_token_id": 270}, "<end>"),
    ],
)
def test_the_end_of_text_token_is_the_one_that_the_folder_names(source, tmp_path, names, values, expected):
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for name, change in (("tokenizer.json", lambda v: renamed(v, "<end>", 270)), ("config.json", lambda v: v | values)):
        changed = change(json.loads((source / name).read_text()))
        (tmp_path / name).unlink()
        (tmp_path / name).write_text(json.dumps(changed))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    assert jaxtrain.load(tmp_path).tokenizer.eot_text == expected


def test_tokens_beyond_the_model_are_left_out(source, tmp_path):
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    values = json.loads((source / "tokenizer.json").read_text())
    for number in range(270, 303):
        values = renamed(values, f"<image {number}>", number)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = jaxtrain.load(tmp_path).tokenizer
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode([299]) == "<image 299>"
