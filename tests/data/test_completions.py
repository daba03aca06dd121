"""Stores of prompts with completions and of chat messages: which labels count, checksums, and what is refused."""

import datetime
import json
import re

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from jaxtrain.cli import main
from jaxtrain.data.joined import join_stores
from jaxtrain.data.loader import TrainBatches
from jaxtrain.data.packing import pack_documents
from jaxtrain.data.prepare.completions import prepare_completions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.rows import Documents
from jaxtrain.data.store import STORE_MANIFEST, open_store
from jaxtrain.data.tokenizer import read_hf

PAIRS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(20)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [str(path)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return prepare_completions(write_lines(folder / "a.jsonl", PAIRS), folder / "store", validation_fraction=0.2)


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    """A folder with a byte-level BPE tokenizer, special tokens and a chat template."""
    import tokenizers

    folder = tmp_path_factory.mktemp("chat")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(["hello world, user and assistant say hello"] * 4, trainer)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    return folder


def counted(split):
    """The tokens of a split that count as labels, document by document."""
    tokens, mask = split.read(0, split.num_tokens), split.read_mask(0, split.num_tokens)
    return [
        part[flags == 1].tolist()
        for part, flags in zip(*(np.split(x, split.document_starts[1:]) for x in (tokens, mask)), strict=True)
    ]


def test_prompts_with_completions(pairs):
    """The completion counts, and the end-of-text token that closes it, which begins the next document."""
    texts = set()
    for split in (pairs.train, pairs.validation):
        for labels in counted(split):
            assert labels[0] == pairs.eot_id
            texts.add(bytes(labels[1:]).decode())
    assert texts == {record["completion"] for record in PAIRS}
    assert pairs.train.num_documents + pairs.validation.num_documents == 20
    assert pairs.train.num_labels == sum(map(len, counted(pairs.train))) - 1
    assert pairs.train.num_bytes == sum(len(labels) - 1 for labels in counted(pairs.train))
    packed = pack_documents(pairs.train.document_starts, 0, pairs.train.num_tokens, 16)
    rule = Documents(mask=True, eot_id=pairs.eot_id)
    batch = TrainBatches(pairs.train, 0, packed.count, 16, 257, sources=(packed,), documents=rule).batch(0)
    answers = sorted(batch["labels"][batch["where"]].tolist())
    expected = [label for labels in counted(pairs.train) for label in labels]
    assert answers == sorted(expected)
    plain = TrainBatches(pairs.train, 0, 2, 16, 257).batch(0)
    assert 0 < plain["where"].mean() < 0.8


def test_only_the_assistant_s_messages_count(chat_tokenizer, tmp_path):
    messages = [
        ("system", "Be kind."),
        ("user", "hello"),
        ("assistant", "hello world"),
        ("user", "é?"),
        ("assistant", "ok é"),
    ]
    record = {"messages": [{"role": role, "content": text} for role, text in messages]}
    sources = write_lines(tmp_path / "a.json", [record, {"messages": record["messages"][:3]}])
    store = prepare_completions(sources, tmp_path / "store", tokenizer=f"hf:{chat_tokenizer}")
    tokenizer = read_hf(chat_tokenizer)
    found = {tokenizer.decode(labels) for split in (store.train, store.validation) for labels in counted(split)}
    assert found == {"hello world<|im_end|>\nok é<|im_end|>\n", "hello world<|im_end|>\n"}
    whole = {tokenizer.decode(split.read(0, split.num_tokens)) for split in (store.train, store.validation)}
    assert "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages) in whole
    assert (store.path / "tokenizer_config.json").read_text() == (chat_tokenizer / "tokenizer_config.json").read_text()


def test_messages_of_a_parquet_column_equal_json(chat_tokenizer, tmp_path):
    """A column of structs has null for each field that a message lacks."""
    asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "me"}
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.name is defined %}{{ m.name }}{% endif %}{{ m.content }}\n{% endfor %}"
    )
    records = [{"messages": [asked, answer]}, {"messages": [asked, asked, answer]}]
    write_lines(tmp_path / "a.jsonl", records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(records), tmp_path / "a.feather")
    options = {"tokenizer": f"hf:{chat_tokenizer}", "chat_template": str(tmp_path)}
    stores = [
        prepare_completions([str(tmp_path / name)], tmp_path / f"{name} store", **options)
        for name in ("a.jsonl", "a.parquet", "a.feather")
    ]
    assert stores[0].manifest["splits"] == stores[1].manifest["splits"] == stores[2].manifest["splits"]
    assert stores[0].train.num_tokens > 2


def test_every_format_of_records_gives_the_same_store(pairs, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(PAIRS, indent=1))
    lines = "".join(f"{record['completion']},{record['prompt']}\n" for record in PAIRS)
    (tmp_path / "a.csv").write_text("completion,prompt\n" + lines)
    (tmp_path / "b.csv").write_text("completion;prompt\n" + lines.replace(",", ";"))
    rows = [record | {"when": datetime.datetime(2026, 1, 1)} for record in PAIRS]  # which is no JSON
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", pyarrow.Table.from_pylist(rows).schema) as writer:
        writer.write_table(pyarrow.Table.from_pylist(rows))
    for name in ("a.json", "a.csv", "b.csv", "a.parquet", "a.arrow"):
        store = prepare_completions([str(tmp_path / name)], tmp_path / f"{name}-store", validation_fraction=0.2)
        assert store.fingerprint == pairs.fingerprint
        assert prepare_completions([str(tmp_path / name)], store.path, validation_fraction=0.2).path == store.path
        with pytest.raises(ValueError, match="exists and is not the token store of this request"):
            prepare_completions([str(tmp_path / name)], store.path, validation_fraction=0.3)


def test_files_to_validate_on(tmp_path):
    sources, held_out = (
        write_lines(tmp_path / name, part) for name, part in (("a.jsonl", PAIRS[:5]), ("b.jsonl", PAIRS[5:]))
    )
    store = prepare_completions(sources, tmp_path / "store", validation=held_out)
    assert (store.train.num_documents, store.validation.num_documents) == (5, 15)


def test_a_damaged_mask_is_found_and_is_part_of_the_fingerprint(tmp_path):
    store = prepare_completions(write_lines(tmp_path / "a.jsonl", PAIRS), tmp_path / "store")
    mask = store.path / "train-00000.mask"
    before = mask.read_bytes()
    mask.write_bytes(bytes([1 - before[0]]) + before[1:])
    with pytest.raises(ValueError, match=r"the checksum of train-00000\.mask is not the manifest's"):
        open_store(store.path)
    mask.write_bytes(before[:-1])
    with pytest.raises(ValueError, match=r"train-00000\.mask has .* bytes"):
        open_store(store.path, verify=False)
    mask.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.mask is missing"):
        open_store(store.path, verify=False)
    manifest = json.loads((store.path / STORE_MANIFEST).read_text())
    assert manifest["version"] == 2
    del manifest["checksum"]  # as in older stores
    manifest["splits"]["train"]["shards"][0]["mask_sha256"] = "0" * 64
    mask.write_bytes(before)
    (store.path / STORE_MANIFEST).write_text(json.dumps(manifest))
    assert open_store(store.path, verify=False).fingerprint != store.fingerprint


def test_a_mixture_with_plain_text(pairs, store):
    joined = join_stores({"pairs": pairs, "text": open_store(store)})
    assert joined.train.num_labels == pairs.train.num_labels + open_store(store).train.num_tokens
    tail = joined.train.read_mask(pairs.train.num_tokens, 10)
    assert tail.tolist() == [1] * 10


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"prompt": "a"}, PAIRS[0]],
            "record 1 cannot be used: it has neither messages nor prompt and compl",
        ),
        ([PAIRS[0], {"prompt": "a", "completion": ""}], "record 2 cannot be used: it has no completion"),
        ([PAIRS[0], ["a"]], "record 2 cannot be used: it is list, not an object"),
        ([CHAT, CHAT], "it holds chat messages, and the tokenizer has no chat template: name a folder with one"),
        ([PAIRS[0]], "fewer than two records"),
        ([PAIRS[0], {"prompt": 1, "completion": "a"}], "record 2 cannot be used: it has neither"),
    ],
)
def test_records_that_cannot_be_used(records, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_completions(write_lines(tmp_path / "a.jsonl", records), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_damaged_files_of_records(tmp_path):
    for name, text, message in (
        ("cut.json", json.dumps(PAIRS)[:-1], "no ',' or ']' after record"),
        ("quote.csv", 'prompt,completion\na,b\na,"b\n' + "c,d\n" * 9, "line 12 cannot be used: unexpected end"),
        ("short.tsv", "prompt\tcompletion\na\n", "line 2 has 1 columns, the header 2"),
        ("twice.psv", "prompt|prompt|completion\na|b|c\n", "has 2 columns 'prompt'"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)):
            prepare_completions([str(tmp_path / name)], tmp_path / "store")


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([{"role": "user", "content": "a"}], CHATML, "it has no completion"),
        ("hello", CHATML, "messages is 'hello', not a list"),
        (CHAT["messages"], "{{ messages[-1].content }}", "does not render message 2 after the text of"),
        (CHAT["messages"], "{{ 1 / 0 }}", "the chat template rejects the messages: ZeroDivisionError"),
        (CHAT["messages"], "{{ ''.__class__.__mro__ }}", "the chat template rejects the messages: SecurityError"),
    ],
)
def test_conversations_that_cannot_be_used(messages, template, message, chat_tokenizer, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(template)
    sources = write_lines(tmp_path / "a.jsonl", [{"messages": messages}] * 2)
    options = {"tokenizer": f"hf:{chat_tokenizer}", "chat_template": str(tmp_path)}
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_completions(sources, tmp_path / "store", **options)


def test_the_command(tmp_path, capsys):
    (source,) = write_lines(tmp_path / "a.jsonl", PAIRS)
    assert main(["prepare", source, "--completions", "--out", str(tmp_path / "store")]) == 0
    assert "tokens to train on" in capsys.readouterr().out
    refused = {
        ("--completions", "--text-field", "body"): "--text-field goes without --completions",
        ("--chat-template", str(tmp_path)): "--chat-template goes with --completions",
        ("--completions", "--tokenizer", "bpe:300"): "completions are tokenized as the model's text was",
    }
    for flags, message in refused.items():
        assert main(["prepare", source, "--out", str(tmp_path / "other"), *flags]) == 2
        assert message in capsys.readouterr().err


def test_text_stores_keep_their_version_and_fingerprint(tmp_path):
    """A store without masks is as older versions wrote and read it."""
    (tmp_path / "a.txt").write_text("some text, not much of it\n" * 8)
    store = prepare([str(tmp_path / "a.txt")], tmp_path / "store", validation_fraction=0.3, progress=False)
    assert store.manifest["version"] == 1
    assert store.train.masks is None
    assert store.train.num_labels == store.train.num_tokens - 1
