"""Token files of other tools: layouts as their writers make them, torn files, and a run on each without a copy."""

import json
import struct

import numpy as np
import pytest

from jaxtrain.cli import main
from jaxtrain.data.file_array import FileArray
from jaxtrain.data.store import open_store
from jaxtrain.data.token_files import read_token_file
from jaxtrain.data.tokenizer import ByteTokenizer

EOT = 50_256
LENGTHS = [3, 1, 5, 4, 2, 6] * 6
DOCUMENTS = [np.arange(7 * n, 7 * n + length) % 900 for n, length in enumerate(LENGTHS)]


def gpt2_documents(eot_first: bool) -> np.ndarray:
    """Tokens as nanoGPT (end-of-text last) or llm.c (first) concatenates documents."""
    ends = [[EOT], []] if eot_first else [[], [EOT]]
    return np.concatenate([np.concatenate([ends[0], doc, ends[1]]) for doc in DOCUMENTS]).astype(np.int64)


def write_nanogpt(path, tokens):
    tokens.astype("<u2").tofile(path)


def write_llmc(path, tokens, magic=20240520, version=1, dtype="<u2"):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(dtype).tobytes())


def write_megatron(prefix, documents, dtype="<u2", code=8, split=False):
    """Writes `.bin` and `.idx` as Megatron's IndexedDatasetBuilder; `split` makes two sequences of each document."""
    halves = [[doc[:1], doc[1:]] if split else [doc] for doc in documents]
    sequences = [half for doc in halves for half in doc]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype="<i8")]) * np.dtype(dtype).itemsize
    ends = np.cumsum([0, *(len(doc) for doc in halves)]).astype("<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(ends))
    prefix.with_suffix(".idx").write_bytes(head + lengths.tobytes() + pointers.astype("<i8").tobytes() + ends.tobytes())
    np.concatenate(sequences).astype(dtype).tofile(prefix.with_suffix(".bin"))


def describe(path, **values):
    path.write_text(json.dumps(values))


def starts_of(documents) -> list[int]:
    return np.cumsum([0, *(len(doc) for doc in documents[:-1])]).tolist()


def test_layouts_and_their_documents(tmp_path):
    first, last, plain = gpt2_documents(True), gpt2_documents(False), np.concatenate(DOCUMENTS)
    with_eot, cases = [np.append(doc, EOT) for doc in DOCUMENTS], {}

    def case(name, path, tokens, size, starts, **options):
        cases[name] = (path, tokens, size, starts, options)

    def folder(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    nano = folder("nano")
    write_nanogpt(nano / "train.bin", last)
    write_nanogpt(nano / "val.bin", last[:40])
    case("nanoGPT", nano, last, 50_304, None, vocab_size=50_304)
    described = folder("described")
    write_nanogpt(described / "train.bin", last)
    describe(described / "tokens.json", vocab_size=50_257, eot_id=EOT)
    case("nanoGPT with its end of text", described / "train.bin", last, 50_257, starts_of(with_eot))
    llmc = folder("llmc")
    for name, part in (("fineweb_val_000000", first[:30]), ("fineweb_train_000001", first[:101])):
        write_llmc(llmc / f"{name}.bin", part)
    write_llmc(llmc / "fineweb_train_000002.bin", first[101:])  # a document spans the files
    case("llm.c", llmc, first, 50_257, starts_of(with_eot))
    write_llmc(tmp_path / "llama_train.bin", plain, 20240801, 7, "<u4")
    write_llmc(tmp_path / "known_train.bin", first)
    describe(tmp_path / "known_train.json", dtype="uint16", vocab_size=50_304)
    case("llm.c, described", tmp_path / "known_train.bin", first, 50_304, starts_of(with_eot))
    case("llm.c of Llama 3", tmp_path / "llama_train.bin", plain, 128_256, [0])
    for code, dtype in ((1, "u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")):
        prefix = tmp_path / f"corpus.{code}_document"
        documents = [doc % 200 for doc in DOCUMENTS]
        write_megatron(prefix.with_name(prefix.name + ".x"), documents, dtype, code, split=code == 4)
        case(f"Megatron {code}", prefix, np.concatenate(documents), 1000, starts_of(documents), vocab_size=1000)
    numpy_file = tmp_path / "edu_train_1.npy"
    np.save(numpy_file, first.astype(np.uint16))
    describe(numpy_file.with_suffix(".json"), eot_id=EOT, vocab_size=50_257)
    case("numpy", numpy_file, first, 50_257, starts_of(with_eot))
    raw = tmp_path / "raw.bin"
    first.astype("<u4").tofile(raw)
    describe(raw.with_suffix(".json"), dtype="uint32", vocab_size=60_000, eot_id=EOT)
    case("raw", raw, first, 60_000, starts_of(with_eot))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name, (path, tokens, vocab_size, starts, options) in cases.items():
        store = open_store(path, **options)
        split = store.train
        if not path.is_dir():  # the tail is held out
            tokens, num_train = tokens[: split.num_tokens], int(len(tokens) * 0.98)
            assert (split.num_tokens == num_train) if "Megatron" not in name else (split.num_tokens in starts), name
            starts = starts and [start for start in starts if start < split.num_tokens]
        assert split.read(0, split.num_tokens).tolist() == tokens.tolist(), name
        assert store.vocab_size == vocab_size, name
        assert (split.document_starts if starts is None else split.document_starts.tolist()) == starts, name
        assert (split.num_bytes, store.tokenizer_file) == (None, None)
        assert all(isinstance(shard, FileArray) for shard in split.shards)  # read in place, not copied
        assert open_store(path, verify=False, **options).fingerprint == store.fingerprint
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert open_store(nano, vocab_size=50_304).validation.num_tokens == 40
    own = open_store(nano / "train.bin", vocab_size=50_304, validation=[tmp_path / "llmc" / "fineweb_val_000000.bin"])
    assert (own.train.num_tokens, own.validation.num_tokens) == (len(last), 30)


BAD = {
    "odd": (
        lambda f: f.write_bytes(b"\1\0\2"),
        {"vocab_size": 9},
        r"a.bin is torn: it has 3 bytes of tokens, not a whole",
    ),
    "empty": (lambda f: f.write_bytes(b""), {"vocab_size": 9}, r"a.bin holds no tokens"),
    "no vocabulary": (
        lambda f: write_nanogpt(f, np.arange(9)),
        {},
        r"does not state its vocabulary: set model.vocab_size",
    ),
    "no vocabulary, but a pickle": (
        lambda f: (write_nanogpt(f, np.arange(9)), f.with_name("meta.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")),
        {},
        r"convert meta.pkl to tokenizer.json as docs/data.md shows: no pickle is read here",
    ),
    "range": (
        lambda f: write_nanogpt(f, np.array([1, 2, 9, 1])),
        {"vocab_size": 9},
        r"a.bin has token id 9 at position 2, not in \[0, 9\)",
    ),
    "llm.c cut": (
        lambda f: write_llmc(f, np.arange(9)) or f.write_bytes(f.read_bytes()[:-1]),
        {},
        "torn: it has 17 .*not 18",
    ),
    "llm.c head": (lambda f: f.write_bytes(struct.pack("<iii", 20240520, 1, 0)), {}, "torn: it ends within its header"),
    "llm.c model": (
        lambda f: write_llmc(f, np.arange(9), 20240326, 3),
        {},
        "magic 20240326 version 3; its token files",
    ),
    "llm.c version": (lambda f: write_llmc(f, np.arange(9), version=2), {}, "magic 20240520 version 2"),
    "description": (
        lambda f: write_nanogpt(f, np.arange(9)) or describe(f.with_suffix(".json"), dtyp="x"),
        {},
        "a.json does not describe tokens",
    ),
    "described dtype": (
        lambda f: write_nanogpt(f, np.arange(9)) or describe(f.with_suffix(".json"), dtype="float32"),
        {},
        "states dtype 'float32': use one of uint8",
    ),
    "described eot": (
        lambda f: write_nanogpt(f, np.arange(9)) or describe(f.with_suffix(".json"), vocab_size=9, eot_id=9),
        {},
        "an eot_id outside",
    ),
    "described llm.c": (
        lambda f: write_llmc(f, np.arange(9)) or describe(f.with_suffix(".json"), dtype="uint32"),
        {},
        "a.bin holds uint16 tokens, its description says uint32",
    ),
    "Megatron code": (lambda f: write_megatron(f, DOCUMENTS, code=7), {}, "a.idx has version 1 and dtype code 7"),
    "Megatron bin": (
        lambda f: write_megatron(f, DOCUMENTS) or f.write_bytes(f.read_bytes()[:-2]),
        {},
        "a.bin is torn: .*as a.idx says",
    ),
    "Megatron no bin": (
        lambda f: write_megatron(f, DOCUMENTS) or f.unlink(),
        {},
        "a.idx is an index without tokens: put a.bin",
    ),
    "Megatron head": (lambda f: write_megatron(f, DOCUMENTS) or cut(f.with_suffix(".idx"), 20), {}, "a.idx is torn"),
    "Megatron idx": (lambda f: write_megatron(f, DOCUMENTS) or cut(f.with_suffix(".idx"), -8), {}, "a.idx is torn"),
    "Megatron old": (lambda f: f.with_suffix(".idx").write_bytes(b"TNTIDX\0\0" + bytes(90)), {}, "older `cached` kind"),
    "Megatron other": (lambda f: f.with_suffix(".idx").write_bytes(b"something"), {}, "first bytes are not MMIDIDX"),
    "Megatron order": (
        lambda f: write_megatron(f, DOCUMENTS) or swap(f.with_suffix(".idx"), 34, 38),
        {},
        "its sequences do not follow one another",
    ),
    "Megatron negative": (
        lambda f: write_megatron(f, [np.array([3, -1])], "<i4", 4),
        {"vocab_size": 9},
        r"token id -1 at position 1",
    ),
    "one token": (lambda f: write_nanogpt(f, np.arange(1)), {"vocab_size": 9}, "too few tokens to hold out 0.02"),
}


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def swap(path, a, b):
    data = bytearray(path.read_bytes())
    data[a], data[b] = data[b], data[a]
    path.write_bytes(data)


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_named(name, tmp_path):
    make, options, message = BAD[name]
    make(tmp_path / "a.bin")
    path = tmp_path / "a.bin" if (tmp_path / "a.bin").exists() else tmp_path / "a.idx"
    with pytest.raises(ValueError, match=message) as caught:
        open_store(path, **options)
    assert "\n" not in str(caught.value)


def test_folders_of_other_tools_and_of_no_split_are_refused(tmp_path):
    for name, message in (("index.json", "litdata"), ("shard_ledger.json", "Levanter"), ("state.json", "Hugging Face")):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=f"{message}.*not read in place: run `jaxtrain prepare`"):
            open_store(tmp_path)
        (tmp_path / name).unlink()
    write_nanogpt(tmp_path / "val.bin", np.arange(9))
    with pytest.raises(ValueError, match="holds no training file"):
        open_store(tmp_path, vocab_size=9)
    write_nanogpt(tmp_path / "other.bin", np.arange(9))
    with pytest.raises(ValueError, match=r"other.bin has neither `train` nor `val` in its name"):
        open_store(tmp_path, vocab_size=9)


def test_a_large_file_is_identified_by_samples(tmp_path):
    write_nanogpt(tmp_path / "a.bin", np.arange(20_000) % 1000)
    digest = read_token_file(tmp_path / "a.bin").digest(sample_bytes=16)
    data = bytearray((tmp_path / "a.bin").read_bytes())
    for position in (0, len(data) - 1):
        changed = data.copy()
        changed[position] ^= 1
        (tmp_path / "b.bin").write_bytes(changed)
        assert read_token_file(tmp_path / "b.bin").digest(sample_bytes=16) != digest
    write_nanogpt(tmp_path / "b.bin", np.arange(20_001) % 1000)
    assert read_token_file(tmp_path / "b.bin").digest(sample_bytes=16) != digest


def test_a_run_on_token_files(tmp_path, capfd, tiny_config):
    """Trains and evaluates without a tokenizer, then with one; nothing is written beside the tokens."""
    from jaxtrain.training.run_folder import write_config

    tokens = ByteTokenizer().encode("so much depends upon a red wheel barrow " * 9)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.bin", "val.bin"):
        write_nanogpt(data / name, tokens)
    (tmp_path / "start").mkdir()
    write_config(tmp_path / "start", tiny_config)
    flags = ["--data.store", str(data), "--model.vocab-size", "257", "--train.stop-after", "1"]
    command = ["train", str(tmp_path / "start" / "config.json"), *flags, "--run-dir"]
    assert main([*command, str(tmp_path / "run"), "--train.sample-tokens", "5"]) == 2
    assert "train.sample_tokens 5 needs a tokenizer" in capfd.readouterr().err
    assert main([*command, str(tmp_path / "run")]) == 0
    assert "360 tokens in" in capfd.readouterr().out
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert "bits_per_byte" not in result
    assert result["note"] == f"no bits per byte: {data / 'val.bin'} does not store the bytes of its text"
    assert sorted(path.name for path in data.iterdir()) == ["train.bin", "val.bin"]
    ByteTokenizer().save(data)
    write_nanogpt(data / "train.bin", tokens[::-1])
    assert main([*command, str(tmp_path / "run")]) == 2
    assert "was made with other data" in capfd.readouterr().err
    assert open_store(data).tokenizer == ByteTokenizer()
