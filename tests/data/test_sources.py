"""Sources of a corpus: folders, globs, links, standard input, validation files, and what is left out."""

import gzip
import io
import json
import os
import socket
import sys
import types
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from format_helpers import JSON_LINES, RECORDS, TEXTS, read

from jaxtrain.cli import main
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.prepare.sources import find_sources
from jaxtrain.data.store import open_store


def write_dataset(folder, parts, prefix="data"):
    """Writes a folder as `datasets.Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"{prefix}-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, texts in zip(names, parts, strict=True):
        rows = pyarrow.table({"text": texts})
        with pyarrow.ipc.new_stream(str(folder / name), rows.schema) as stream:
            stream.write_table(rows)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "1", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))
    (folder / "cache-1234.arrow").write_bytes((folder / names[0]).read_bytes())


def test_hugging_face_dataset_folders(tmp_path):
    folder = tmp_path / "saved"
    write_dataset(folder / "train", [TEXTS[:5], TEXTS[5:]])
    write_dataset(folder / "test", [["other"]])
    assert read(folder / "train") == TEXTS
    assert find_sources([str(folder / "train")])[1] == {
        "beside the records of a dataset": [
            str(folder / "train" / name) for name in ("cache-1234.arrow", "dataset_info.json", "state.json")
        ]
    }
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(ValueError, match="is a dataset with the splits train, test: name one of their folders"):
        find_sources([str(folder)])
    (folder / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"is damaged: it lacks data-00001-of-00002\.arrow"):
        find_sources([str(folder / "train")])
    for damaged in ("[1]", '"x"', "{", '{"_data_files": 5, "splits": 5}', '{"_data_files": [5], "splits": [5]}'):
        (folder / "train" / "state.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"is damaged: it lacks data files in state\.json"):
            find_sources([str(folder / "train")])
        (folder / "dataset_dict.json").write_text(damaged)
        with pytest.raises(ValueError, match="is a dataset with the splits SPLIT: name one of their folders"):
            find_sources([str(folder)])


def test_standard_input(tmp_path, monkeypatch, capfd):
    shapes = {
        "lines": JSON_LINES.encode(),
        "array": json.dumps(RECORDS).encode(),
        "packed": gzip.compress(JSON_LINES.encode()),
        "text": "".join(TEXTS).encode(),
    }
    for name, data in shapes.items():
        for _ in range(2):  # the same input is the same store
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
            assert main(["prepare", "-", "--out", str(tmp_path / name), "--validation-fraction", "0.3"]) == 0
        store = open_store(tmp_path / name)
        total = sum(len(text.encode()) for text in TEXTS)
        assert store.train.num_bytes + store.validation.num_bytes == total, name
        assert store.manifest["sources"] == ["-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(shapes)
    terminal = types.SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(ValueError, match="which is a terminal: pipe text into it"):
        prepare(["-"], tmp_path / "more")


def test_validation_files(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train", "val"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(f"{name} {n}") + "\n" for n in range(50)))
    store = prepare([str(folder)], tmp_path / "store", validation=[str(folder / "val.jsonl")], num_workers=1)
    assert (store.manifest["split"], store.manifest["left_out"]) == ("files", {"in the validation files": 1})
    for name, split in (("train", store.train), ("val", store.validation)):
        text = store.tokenizer.decode(split.read(0, split.num_tokens)).split("<|endoftext|>")[1:]
        assert text == [f"{name} {n}" for n in range(50)]
    (source,) = store.manifest["splits"]["validation"]["sources"]
    assert source == {"source": str(folder / "val.jsonl"), "num_tokens": 340, "num_bytes": 290, "num_documents": 50}
    for options in ({}, {"validation": [str(folder / "train.jsonl")]}):
        with pytest.raises(ValueError, match="is not the token store of this request"):
            prepare([str(folder)], tmp_path / "store", **options)


def test_a_folder_and_its_glob_have_the_same_files(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep" / "er").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt", "deep/er/c.txt"):
        (folder / name).write_text(name)
    (folder / "deep" / ".hidden").write_text("x")
    expected = [str(folder / name) for name in ("a.txt", "deep/b.txt", "deep/er/c.txt")]
    for sources in (["{}"], ["{}/*"], ["{}/**"], ["{}/", "{}/deep"], ["{}/**/*.txt"], ["{}/../folder"]):
        files, left_out = find_sources([source.format(folder) for source in sources])
        assert [file.path for file in files] == expected, sources
        if sources in (["{}"], ["{}/*"]):
            assert left_out == {"hidden": [str(folder / "deep" / ".hidden")]}


def test_links_are_followed_and_counted_once(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (elsewhere / "sub").mkdir(parents=True)
    data.mkdir()
    (elsewhere / "sub" / "x.txt").write_text("x")
    (tmp_path / "y.txt").write_text("y")
    (data / "folder").symlink_to(elsewhere)
    (data / "again").symlink_to(elsewhere)
    (data / "y.txt").symlink_to(tmp_path / "y.txt")
    (data / "y2.txt").symlink_to(tmp_path / "y.txt")
    (elsewhere / "up").symlink_to(data)
    (elsewhere / "sub" / "round").symlink_to(elsewhere / "sub")
    (data / "z.txt").write_text("z")
    for name in ("z2.txt", "folder/z3.txt"):
        (data / name).hardlink_to(data / "z.txt")
    (data / "z4.txt").symlink_to(data / "z2.txt")
    files, left_out = find_sources([str(data)])
    assert sorted(Path(file.path).read_text() for file in files) == ["x", "y", "z"]
    names = {Path(path).name for path in left_out["under another name already"]}
    kept = [
        {"again", "folder"} - names,
        {"y.txt", "y2.txt"} - names,
        {"z.txt", *(f"z{i}.txt" for i in (2, 3, 4))} - names,
    ]
    assert [len(each) for each in kept] == [1, 1, 1]
    assert names.isdisjoint({"data", "elsewhere", "sub", "x.txt"})
    assert names >= {"up", "round"}
    assert sorted(Path(file.path).read_text() for file in find_sources([f"{data}/**"])[0]) == ["x", "y", "z"]
    files, left_out = find_sources([str(data / "z.txt"), str(data / "y.txt")], [str(data / "z2.txt")])
    assert [(Path(file.path).name, file.split) for file in files] == [("y.txt", "train"), ("z2.txt", "validation")]
    assert left_out == {"in the validation files": [str(data / "z.txt")]}


def test_left_out_files_are_counted_and_named(tmp_path, capfd):
    folder = tmp_path / "folder"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("x")
    (folder / ".env").write_text("x")
    (folder / "empty.txt").write_text("")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    (folder / "a.jsonl").write_text(JSON_LINES)
    store = prepare([str(folder)], tmp_path / "store", num_workers=1)
    line = "left out: 2 not regular (pipe, socket), 2 hidden (.env, .git), 1 empty (empty.txt), 1 empty documents\n"
    assert sorted(capfd.readouterr().err.split(", ")) == sorted(line.split(", "))
    assert store.manifest["left_out"] == {"hidden": 2, "not regular": 2, "empty": 1, "empty documents": 1}


@pytest.mark.parametrize("kind", ["broken link", "round link", "unreadable folder", "unreadable file"])
def test_unreadable_input_fails(kind, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text("a" * 100)
    if kind == "broken link":
        (folder / "b.txt").symlink_to(tmp_path / "missing")
        message = r"b\.txt is a link to .*missing, which cannot be opened: fetch the file or remove the link"
    elif kind == "round link":
        (folder / "b.txt").symlink_to(folder / "b.txt")
        message = r"b\.txt is a link to .*b\.txt, which cannot be opened"
    else:
        name = "inner" if kind == "unreadable folder" else "a.txt"
        message = rf"{name} cannot be read: .*Permission denied"
        target, function = (os, "scandir") if name == "inner" else ("builtins", "open")
        real = os.scandir if name == "inner" else open

        def refuse(path, *arguments, **options):  # the test may run as root, who may read everything
            if str(path).endswith(name):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(target if name == "inner" else __import__(target), function, refuse)
    for source in (str(folder), f"{folder}/*"):
        with pytest.raises(ValueError, match=message):
            prepare([source], tmp_path / "store")
    assert not (tmp_path / "store").exists()
