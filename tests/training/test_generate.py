"""A continuation is what the new tokens add to the decoded prompt."""

from jaxtrain.data.tokenizer import ByteTokenizer
from jaxtrain.training.generate import decode_continuation


class Words:
    """Joins words by spaces, as SentencePiece-like tokenizers decode."""

    def decode(self, ids):
        return " ".join("abc"[i] for i in ids)


def test_the_space_before_the_first_new_word_is_kept():
    assert decode_continuation(Words(), [0], [1, 2]) == " b c"
    assert decode_continuation(Words(), [], [1, 2]) == "b c"
    assert decode_continuation(Words(), [1], []) == ""


def test_a_character_that_the_prompt_begins_is_completed():
    euro = list("\u20ac".encode())
    assert decode_continuation(ByteTokenizer(), euro[:2], [*euro[2:], 33]) == "\u20ac!"
    assert decode_continuation(ByteTokenizer(), [65, 66], [67]) == "C"
