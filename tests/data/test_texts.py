"""Files of text as a split: all bytes of the text are those of the labels, for every tokenizer."""

import json

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from jaxtrain.data.texts import open_split, tokenize
from jaxtrain.data.tokenizer import BPETokenizer, ByteTokenizer, train_bpe

WORDS = ["the cat sat on the mat \n with 12 other cats " * 20]


def lossy():
    """A tokenizer that lowers, strips and knows few words, as older models of transformers have."""
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2, "</s>": 3}, "[UNK]"))
    library.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKD(), tokenizers.normalizers.Lowercase(), tokenizers.normalizers.StripAccents()]
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return BPETokenizer(library.to_str())


TOKENIZERS = {"byte": ByteTokenizer(), "bpe": train_bpe(WORDS, 270), "lossy": lossy()}
ODD = ["", "\x00\x01\ufeff", "Grüße 世界 🙂🏽‍🚀", "a<|endoftext|>b</s>", "e\u0301 \u00a0\u2028\n\r\n\t", "\x7f" * 9]


@pytest.mark.parametrize("name", TOKENIZERS)
@hypothesis.given(texts=st.lists(st.text() | st.sampled_from(ODD), min_size=1, max_size=4))
@hypothesis.settings(max_examples=60)
def test_the_bytes_of_a_split_count_its_text(name, texts):
    tokenizer = TOKENIZERS[name]
    hypothesis.assume(sum(len(tokenizer.encode(text)) for text in texts if text) > 0)
    split = tokenize(texts, tokenizer)
    tokens = split.read(0, split.num_tokens)
    assert split.num_bytes == len("".join(texts).encode())
    assert tokens[0] == tokenizer.eot_id  # the only token that is no label
    assert split.num_documents == sum(1 for text in texts if text) == (tokens == tokenizer.eot_id).sum()
    if name != "lossy":  # the labels spell the text
        assert tokenizer.decode(tokens[tokens != tokenizer.eot_id]) == "".join(texts)


def test_files_stores_and_records(store, tmp_path):
    (tmp_path / "a.txt").write_text("Grüße", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "ab"}) + "\n" + json.dumps({"text": "🙂"}) + "\n")
    whole = open_split(str(tmp_path), "validation", ByteTokenizer())
    assert (whole.num_documents, whole.num_bytes) == (3, 7 + 2 + 4)
    np.testing.assert_array_equal(whole.read(0, 2), [256, ord("G")])
    assert open_split(str(store), "validation", ByteTokenizer()).num_bytes > 100
    with pytest.raises(ValueError, match="tokenized with another tokenizer"):
        open_split(str(store), "validation", TOKENIZERS["bpe"])


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "is empty"), (b"\n", None), (b"\xff\xfe\x00", "UTF-16"), (b"a\xffb", "UTF-8"), (None, "no file or folder")],
)
def test_files_that_cannot_be_evaluated(data, message, tmp_path):
    file = tmp_path / "text.txt"
    if data is not None:
        file.write_bytes(data)
    if message is None:
        assert open_split(str(file), "validation", ByteTokenizer()).num_tokens == 2
        message = "is no token to the tokenizer"
        with pytest.raises(ValueError, match=message):
            open_split(str(file), "validation", TOKENIZERS["lossy"])
        return
    with pytest.raises(ValueError, match=message):
        open_split(str(file), "validation", ByteTokenizer())
