"""`jaxtrain inspect`: its figures beside a plain count of the same documents, and what it shows."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from jaxtrain.cli import main
from jaxtrain.config import DataConfig
from jaxtrain.data import inspection
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.store import open_store
from jaxtrain.training.run_folder import write_config

WEB = [f"page {number} {'word ' * (number % 11)}" for number in range(120)] + ["page 7 " + "word " * 7] * 3
CODE = [f"\x1b[31mx{number} = {'[0, 1], ' * (40 if number % 10 == 3 else 4)}" for number in range(50)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    for name, texts in (("web", WEB), ("code", CODE), ("held_out", [*WEB[:2], "new", "new"])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    sources = [str(folder / f"{name}.jsonl") for name in ("web", "code")]
    prepare(sources, folder / "store", validation=[str(folder / "held_out.jsonl")], num_workers=1)
    return folder


def test_figures_equal_a_plain_count(made):
    store = open_store(made / "store")
    found = inspection.inspect_store(store)
    train, validation = found["splits"]["train"], found["splits"]["validation"]
    texts = WEB + CODE
    counts = Counter(byte for text in texts for byte in text.encode()) + Counter({256: len(texts)})
    total = sum(counts.values())
    assert (train["tokens"], train["documents"], train["distinct_tokens"]) == (total, len(texts), len(counts))
    entropy = -sum(count / total * np.log2(count / total) for count in counts.values())
    assert train["unigram_entropy_bits"] == pytest.approx(entropy)
    assert {row["id"]: row["count"] for row in train["top_tokens"]} == dict(counts.most_common(10))
    assert train["duplicate_documents"] == 3
    assert train["duplicate_tokens"] == pytest.approx(3 * (1 + len(WEB[7])) / total)
    assert [row["source"].rpartition("/")[2] for row in train["sources"]] == ["web.jsonl", "code.jsonl"]
    assert [row["documents"] for row in train["sources"]] == [len(WEB), len(CODE)]
    assert [row["duplicate_documents"] for row in train["sources"]] == [3, 0]
    assert [row["repetitive_documents"] for row in train["sources"]] == [0, 5]  # 40 times "[0, 1], "
    longest = max(range(len(texts)), key=lambda number: len(texts[number]))
    assert train["longest"][0]["document"] == longest
    assert train["longest"][0]["tokens"] == 1 + len(texts[longest])
    assert train["longest"][0]["text"].startswith("<|endoftext|>\x1b[31mx")
    assert (validation["documents_in_train"], validation["duplicate_documents"]) == (2, 1)
    assert len(found["alarms"]) == 3
    assert found["alarms"][0].startswith("5 train documents repeat an n-gram 32 times or more")
    assert "2 of 4 validation documents are also in the training split" in found["alarms"][1]
    again = inspection.inspect_store(store, chunk_tokens=500)  # spans and documents cross the chunks
    for result in (found, again):
        for split in result["splits"].values():
            del split["repetitions"]  # a span that crosses a chunk counts twice
    assert again == found


def test_output_of_the_command(made, tmp_path, capfd, tiny_config, store):
    assert main(["inspect", str(made / "store")]) == 0
    out = capfd.readouterr().out
    for part in (
        "173 documents: median",
        "code.jsonl",
        "alarm: 5 train documents",
        r"\x1b[31m",
        "window at token 0: <|e",
    ):
        assert part in out
    assert not [character for character in out if not character.isprintable() and character != "\n"]
    assert main(["inspect", str(made / "store"), "--json", "--windows", "0"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["splits"]["train"]["windows"] == []
    write_config(tmp_path, tiny_config)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["path"] == str(store)
    (np.arange(3000) % 70).astype("<u2").tofile(tmp_path / "tokens.bin")
    assert main(["inspect", str(tmp_path / "tokens.bin")]) == 0
    out = capfd.readouterr().out
    assert "vocabulary not stated" in out
    assert "no alarms" in out
    assert "window at token 0: 0 1 2 3" in out
    np.full(3000, 7, "<u2").tofile(tmp_path / "tokens.bin")
    assert main(["inspect", str(tmp_path / "tokens.bin"), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert "documents" not in result["splits"]["train"]
    assert result["alarms"][0].startswith("1 places of the train split repeat an n-gram")
    assert main(["inspect", str(tmp_path / "missing")]) == 2


def test_the_mixture_of_a_run(made, store, tmp_path, capfd, tiny_config):
    data = DataConfig(stores=(f"sums={store}", f"other={made / 'store'}"), mixture="sums:0.75 other:0.25")
    write_config(tmp_path, dataclasses.replace(tiny_config, data=data))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert list(result["stores"]) == ["sums", "other"]
    assert result["mixture"]["shares"] == "sums 75%, other 25%"
    tokens = open_store(store).train.num_tokens
    sequences = (tokens - 1) // 16
    read = 12 * 8 * 3 // 4
    row = {"tokens": tokens, "sequences": sequences, "sequences_read": read, "passes": round(read / sequences, 3)}
    assert result["mixture"]["sources"]["sums"] == row
    assert main(["inspect", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "mixture: sums 75%, other 25%" in out
    assert f"other: {made / 'store'} (257 tokens" in out
