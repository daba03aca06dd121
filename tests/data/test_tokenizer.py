import hashlib
import json
import re
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxtrain.data.tokenizer import (
    MAX_RUN,
    BPETokenizer,
    ByteTokenizer,
    _cut_runs,
    byte_level_json,
    load_tokenizer,
    parse_spec,
    read_hf,
    train_bpe,
)

TEXTS = ["the cat sat on the mat\n", "the dog sat on the log\n", "a cat and a dog\n"] * 20


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_bpe(TEXTS, 270)


def hf_json(bpe: BPETokenizer, old: str = "<|endoftext|>", new: str = "<|endoftext|>", special: bool = True) -> str:
    data = json.loads(bpe.json_text)
    data["model"]["vocab"] = {new if token == old else token: i for token, i in data["model"]["vocab"].items()}
    for token in data["added_tokens"]:
        token["content"] = token["content"].replace(old, new)
        token["special"] = special
    return json.dumps(data)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_bytes_round_trip(data):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(data)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(data)
    assert tokenizer.decode_bytes(ids) == data


def test_byte_end_of_text_is_spelled_out():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)
    assert tokenizer.decode([256, 104, 105, 256, 256]) == "<|endoftext|>hi<|endoftext|><|endoftext|>"
    assert tokenizer.decode([0xC3]) == "�"
    assert tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match="257 is not in the byte vocabulary"):
        tokenizer.decode([257])


@given(st.text(max_size=100))
@settings(deadline=None, max_examples=50)
def test_bpe_round_trips_any_text(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.encode(text.encode()).tolist() == bpe.encode(text).tolist()


def library_ids(bpe, texts):
    return [encoding.ids for encoding in bpe._library.encode_batch(texts, add_special_tokens=False)]


NASTY = [
    *(
        "",
        " ",
        "  ",
        "\n",
        " \n \t x",
        "a  b",
        "a   ",
        "don't  we'll I'D 's's ''s !'s",
        "_x_ __y1_2 _",
        "1²½Ⅷ 2 ٣४ x1y2",
    ),
    *(
        "\x1ca\x1f b\x85c\xa0d\u2003e\u2028f",
        "e\u0301 ñ Ω ж 漢字一二 ｶﾞ 한글 ไทย",
        "👩‍👩‍👧 👍🏽 \U0001f9ff",
        "<|endoftext|> <|end",
    ),
    *("\u1c89\ua7dc\u0897\u2ffc\U00016d40 x", "\x00\x01\x7f \ud7ff\ue000\uffff", "x" * 200 + " " * 200 + "1" * 200),
]


def test_words_are_encoded_as_the_library_encodes_texts(bpe):
    """Also the tokenizers that cannot be encoded word by word; a word of the cache and a new one are the same."""
    texts = [*NASTY, *TEXTS, *(a + b for a in NASTY for b in NASTY)]
    assert bpe._words is not None
    for _ in range(2):
        found = bpe._words.encode_batch(texts)
        assert found == library_ids(bpe, texts)
    assert bpe._words.encode_batch(texts[::-1]) == found[::-1]
    for change in ({"use_regex": False}, {"add_prefix_space": True}, {"type": "Whitespace"}):
        data = json.loads(bpe.json_text)
        data["pre_tokenizer"] |= change
        other = BPETokenizer(json.dumps(data))
        assert other._words is None, change
        assert [ids.tolist() for ids in other.encode_batch(TEXTS)] == library_ids(other, TEXTS)


@given(st.lists(st.text(max_size=30), max_size=5))
def test_words_of_any_text(bpe, texts):
    assert bpe._words.encode_batch(texts) == library_ids(bpe, texts)


def test_bpe_learns_merges_and_is_deterministic(bpe):
    assert bpe.vocab_size == 270
    assert len(bpe.encode("the cat sat")) < len("the cat sat")
    assert bpe.decode([bpe.eot_id, *bpe.encode("a dog")]) == "<|endoftext|>a dog"
    assert train_bpe(TEXTS, 270).fingerprint == bpe.fingerprint
    batch = bpe.encode_batch(TEXTS[:3])
    assert [ids.tolist() for ids in batch] == [bpe.encode(text).tolist() for text in TEXTS[:3]]


def test_documents_cannot_forge_the_end_of_text(bpe):
    text = "a<|endoftext|>b"
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.eot_id not in ids
        assert tokenizer.decode(ids) == text
    trained_on_it = train_bpe(["<|endoftext|> <|endoftext|>"] * 50, 268)
    assert trained_on_it.eot_id not in trained_on_it.encode("<|endoftext|>")


def test_bpe_vocabulary_out_of_reach():
    with pytest.raises(ValueError, match="below 257"):
        train_bpe(TEXTS, 256)
    with pytest.raises(ValueError, match=r"too small for bpe:5000: use bpe:\d+ or fewer"):
        train_bpe(TEXTS, 5000)


def test_save_and_load(bpe, tmp_path):
    for tokenizer in (bpe, ByteTokenizer()):
        tokenizer.save(tmp_path)
        saved = (tmp_path / "tokenizer.json").read_bytes()
        assert tokenizer.fingerprint == hashlib.sha256(saved).hexdigest()
        loaded = load_tokenizer(tmp_path)
        assert loaded == tokenizer
        assert (loaded.vocab_size, loaded.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
        assert loaded.encode("<|endoftext|>cat").tolist() == tokenizer.encode("<|endoftext|>cat").tolist()


@pytest.mark.parametrize("text", ["not json", "[]", '{"type": "other"}', '{"model": {"type": "Nonsense"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer file"):
        load_tokenizer(tmp_path / "missing")


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<|end_of_text|>", "<|eot_id|>", "<eos>"])
def test_hf_finds_the_end_of_text(bpe, name, tmp_path):
    (tmp_path / "tokenizer.json").write_text(hf_json(bpe, new=name))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = read_hf(path)
        assert tokenizer.eot_id == 0
        assert tokenizer.encode("the cat").tolist() == bpe.encode("the cat").tolist()


def test_hf_adds_no_tokens_and_does_not_truncate(bpe, tmp_path):
    data = json.loads(bpe.json_text)
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert read_hf(tmp_path).encode("zebra quest").tolist() == bpe.encode("zebra quest").tolist()


def test_the_tokenizers_library_reads_the_byte_tokenizer(tmp_path):
    """As a run saves it, and as an export writes it."""
    for text in ('{"type": "byte"}\n', byte_level_json()):
        (tmp_path / "tokenizer.json").write_text(text)
        assert read_hf(tmp_path) == read_hf(tmp_path / "tokenizer.json", "<|endoftext|>") == ByteTokenizer()
        with pytest.raises(ValueError, match=r"a tokenizer of bytes, .* is <\|endoftext\|>, not </s>"):
            read_hf(tmp_path, "</s>")


def test_hf_refusals(bpe, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer file .*`hf download MODEL tokenizer\.json"):
        read_hf(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(hf_json(bpe, new="<end>"))
    with pytest.raises(
        ValueError,
        match=r"looked for <\|endoftext\|>, </s>, <\|end_of_text\|>, <\|eot_id\|>, <eos>; .*--eot TEXT .* one of <end>",
    ):
        read_hf(file)
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match=r"words\.json cannot encode every text: .*; add that token, or"):
        read_hf(tmp_path / "words.json")
    with pytest.raises(ValueError, match=r"looked for <fin>; .*--eot TEXT"):
        read_hf(file, "<fin>")
    with pytest.raises(ValueError, match=r"spells the end-of-text token 'a': name another with --eot TEXT"):
        read_hf(file, "a")
    assert read_hf(file, "<end>").eot_id == 0


def trained(kind: str) -> tokenizers.Tokenizer:
    """A tiny tokenizer as other projects make them, with its end-of-text token."""
    if kind == "wordpiece":
        library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=special, show_progress=False)
    else:
        library = tokenizers.Tokenizer(models.Unigram())
        library.normalizer = normalizers.NFKC()
        scheme = "always" if kind == "unigram" else "first"
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        library.decoder = decoders.Metaspace(prepend_scheme=scheme)
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=["<unk>", "</s>", "<0>"], unk_token="<unk>", show_progress=False
        )
    library.train_from_iterator(TEXTS, trainer)
    return library


@pytest.mark.parametrize(
    ("kind", "eot"), [("unigram", None), ("unigram", "<0>"), ("metaspace", "</s>"), ("wordpiece", "[SEP]")]
)
def test_hf_tokenizers_of_other_kinds(kind, eot, tmp_path):
    library = trained(kind)
    library.save(str(tmp_path / "tokenizer.json"))
    if kind == "wordpiece":
        with pytest.raises(ValueError, match=r"name one of its tokens with --eot TEXT .*\[SEP\]"):
            read_hf(tmp_path)
    tokenizer = read_hf(tmp_path, eot)
    name = eot or "</s>"
    assert tokenizer.eot_id == library.token_to_id(name)
    assert tokenizer.encode("the cat sat").tolist() == library.encode("the cat sat", add_special_tokens=False).ids
    # A document cannot forge the token, in no spelling that the normalizer turns into it.
    for text in (name, f"a{name}b", f"{name}{name} {name}", "a\uff1c/s\uff1eb", f"the{name}cat " * 50):
        assert tokenizer.eot_id not in tokenizer.encode(text)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again, again.eot_id, again.fingerprint) == (tokenizer, tokenizer.eot_id, tokenizer.fingerprint)


@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram", "metaspace", "wordpiece"])
def test_a_continuation_excludes_the_prompt(kind, bpe, tmp_path):
    if kind in ("byte", "bpe"):
        tokenizer = ByteTokenizer() if kind == "byte" else bpe
    else:
        trained(kind).save(str(tmp_path / "tokenizer.json"))
        tokenizer = read_hf(tmp_path, "[SEP]" if kind == "wordpiece" else None)
    ids = tokenizer.encode("the cat sat on the mat")
    for cut in range(len(ids) + 1):
        text = tokenizer.decode(ids[:cut]) + tokenizer.continuation(ids[:cut], ids[cut:])
        assert text == "the cat sat on the mat"
    assert tokenizer.continuation(ids, []) == ""
    assert tokenizer.continuation([], ids) == "the cat sat on the mat"


@pytest.mark.parametrize("text", ["漢字", "é", "a👍b"])
def test_a_continuation_completes_a_character_of_the_prompt(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    for cut in range(len(ids)):
        whole = len(ids[:cut].astype(np.uint8).tobytes().decode(errors="ignore"))
        assert tokenizer.continuation(ids[:cut], ids[cut:]) == text[whole:]


def test_a_vocabulary_may_have_holes(bpe):
    data = json.loads(bpe.json_text)
    data["model"]["vocab"][max(data["model"]["vocab"], key=data["model"]["vocab"].get)] = 299
    assert BPETokenizer(json.dumps(data)).vocab_size == 300


RUNS = {
    "letters": "ab" * 10_000,
    "no spaces": "".join(chr(97 + n * n % 26) for n in range(20_000)),
    "ideographs": "".join(chr(0x4E00 + n * n % 2000) for n in range(20_000)),
    "digits": "31415" * 4_000,
    "punctuation": "-=" * 10_000,
    "white space": " \t" * 10_000,
    "base64": "".join(chr(65 + n * 7 % 57) for n in range(20_000)),
    "in between": "a word " + "x" * 20_000 + " and more",
}


@pytest.mark.parametrize("name", RUNS)
def test_bpe_learns_from_runs_in_pieces_of_bounded_size(name):
    pieces = list(_cut_runs(RUNS[name]))
    assert "".join(pieces) == RUNS[name]
    assert max(len(run) for piece in pieces for run in re.findall(r"\S+|\s+", piece)) <= MAX_RUN
    train_bpe([RUNS[name]], 258)


def test_ordinary_text_is_one_piece():
    text = "".join(f"word{n} " for n in range(9_000))
    assert list(_cut_runs(text)) == [text]
    assert list(_cut_runs("x" * MAX_RUN)) == ["x" * MAX_RUN]


def test_specs():
    assert parse_spec("byte") == ("byte", "")
    assert parse_spec("bpe:32000") == ("bpe", "32000")
    assert parse_spec("hf:C:/models/x") == ("hf", "C:/models/x")
    for spec in ("", "bytes", "byte:1", "bpe", "bpe:", "bpe:x", "bpe:-5", "bpe:256", "hf:", "gpt2"):
        with pytest.raises(ValueError, match=r"use byte, bpe:VOCAB .* or hf:PATH"):
            parse_spec(spec)


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"jaxtrain\[bpe\]"):
        train_bpe(TEXTS, 270)
