"""Byte-level BPE word by word: words that occur again are looked up. Some three times as fast as the library."""

import json
import re
from collections.abc import Sequence
from typing import Any

# The words of GPT-2, as `ByteLevel` of the tokenizers library has them, with the classes of Python: \p{L} is [^\W\d_],
# \p{N} is \d. Texts with a character for which that is not so, such as a fraction, are left to the library.
_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
_MAX_WORDS = 1 << 18  # in the cache, some 50 MB
_MAX_CHARACTERS = 64  # of a cached word


class WordEncoder:
    """Encodes texts as a tokenizer of the library does, which encodes each new word."""

    def __init__(self, library: Any):
        """Wraps a `tokenizers.Tokenizer`; a ValueError if it does not split words as GPT-2 does."""
        layout = json.loads(library.to_str())
        before, model = layout["pre_tokenizer"] or {}, layout["model"]
        plain = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before["add_prefix_space"]
        whole = model["type"] != "BPE" or model.get("dropout") or layout["normalizer"]
        if not plain or whole or not all(token["special"] for token in layout["added_tokens"]):
            raise ValueError("the tokenizer does not encode the words of GPT-2 one by one")
        self._library = library
        self._ids: dict[str, list[int]] = {}
        self._same: dict[str, bool] = {}  # character: Python and the library put it in the same class

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if len(self._ids) > _MAX_WORDS:
            self._ids.clear()
        words = [_WORDS.findall(text) if self._is_plain(text) else [text] for text in texts]
        new = list({word for found in words for word in found if word not in self._ids})
        encoded = self._library.encode_batch_fast(new, add_special_tokens=False)
        ids = {word: encoding.ids for word, encoding in zip(new, encoded, strict=True)}
        found = [self._join(part, ids) for part in words]
        self._ids.update((word, part) for word, part in ids.items() if len(word) <= _MAX_CHARACTERS)
        return found

    def _join(self, words: Sequence[str], new: dict[str, list[int]]) -> list[int]:
        joined: list[int] = []
        for word in words:
            part = self._ids.get(word)
            joined += new[word] if part is None else part
        return joined

    def _is_plain(self, text: str) -> bool:
        """Returns True if Python splits the text into the library's words.

        The two know different versions of Unicode, and Python's \\s has \\x1c, so each character is compared once.
        """
        characters = set(text)
        for character in characters - self._same.keys():
            probe = f"a{character}b 1{character}2 !{character}? {character}"
            spans = [span for _, span in self._library.pre_tokenizer.pre_tokenize_str(probe)]
            self._same[character] = spans == [match.span() for match in _WORDS.finditer(probe)]
        return all(map(self._same.__getitem__, characters))
