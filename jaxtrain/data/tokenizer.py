"""Tokenizers: raw bytes, byte-level BPE trained here, or a local Hugging Face `tokenizer.json`.

A document's text never yields the end-of-text token, even where it spells that token out: only `prepare` writes it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|eot_id|>", "<eos>")
FILE_NAME = "tokenizer.json"
BYTE_FILE = '{"type": "byte"}\n'
MIN_BPE_VOCAB = 257  # every byte and the end-of-text token


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer; `ByteTokenizer` and `BPETokenizer` have it."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def eot_id(self) -> int:
        """Id of the end-of-text token, which separates documents."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the file `save` writes."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (int32, 1-D) of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids."""

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` into a folder."""


@dataclass(frozen=True)
class ByteTokenizer:
    """One token a byte, ids 0 to 255; 256 is the end-of-text token."""

    vocab_size: ClassVar[int] = 257
    eot_id: ClassVar[int] = 256

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the file `save` writes."""
        return _sha256(BYTE_FILE)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (int32 [num_bytes]) of a text (its UTF-8 bytes) or of any bytes."""
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of token ids; the end-of-text token is spelled `<|endoftext|>`. An id above 256 is a ValueError."""
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        bad = array[(array < 0) | (array > self.eot_id)]
        if bad.size:
            raise ValueError(f"token id {bad[0]} is not in the byte vocabulary [0, {self.vocab_size})")
        pieces = np.split(array, np.flatnonzero(array == self.eot_id))
        return END_OF_TEXT.encode().join(
            piece[1 if number else 0 :].astype(np.uint8).tobytes() for number, piece in enumerate(pieces)
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` into a folder."""
        Path(folder, FILE_NAME).write_bytes(BYTE_FILE.encode())


@dataclass(frozen=True)
class BPETokenizer:
    """A tokenizer of the `tokenizers` library, given as the text of its `tokenizer.json`."""

    json_text: str

    @cached_property
    def _library(self) -> Any:
        library = _import_tokenizers().Tokenizer.from_str(self.json_text)
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # special tokens spelled out in a text are encoded as plain text
        return library

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._library.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def eot_id(self) -> int:
        """Id of the first of the usual end-of-text names that the vocabulary has; a ValueError if it has none."""
        for name in END_OF_TEXT_NAMES:
            token_id = self._library.token_to_id(name)
            if token_id is not None:
                return token_id
        raise ValueError(f"the tokenizer has no end-of-text token: looked for {', '.join(END_OF_TEXT_NAMES)}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the file `save` writes."""
        return _sha256(self.json_text)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (int32, 1-D) of a text or of its UTF-8 bytes, without any token the tokenizer adds around it."""
        return self.encode_batch([text if isinstance(text, str) else text.decode("utf-8")])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, on the library's threads."""
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens spelled out."""
        return self._library.decode([int(token_id) for token_id in ids], skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` into a folder."""
        Path(folder, FILE_NAME).write_bytes(self.json_text.encode())


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Trains byte-level BPE on a stream of texts.

    Args:
      texts: read once; very long ones are best cut into blocks.
      vocab_size: tokens, with the 256 bytes and `<|endoftext|>` among them.

    Raises:
      ValueError: fewer than 257 tokens asked for, or the texts have too few repeated pairs for that many.
    """
    if vocab_size < MIN_BPE_VOCAB:
        raise ValueError(f"a BPE vocabulary of {vocab_size} is below {MIN_BPE_VOCAB}: 256 bytes and {END_OF_TEXT}")
    lib = _import_tokenizers()
    library = lib.Tokenizer(lib.models.BPE())
    library.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once says nothing about other text
        special_tokens=[END_OF_TEXT],
        initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer=trainer)
    tokenizer = BPETokenizer(library.to_str())
    if tokenizer.vocab_size < vocab_size:
        raise ValueError(
            f"the training text is too small for bpe:{vocab_size}: it has pairs for {tokenizer.vocab_size} tokens; "
            f"use bpe:{tokenizer.vocab_size} or fewer, or more text"
        )
    return tokenizer


def read_hf(path: str | Path) -> BPETokenizer:
    """Reads a local `tokenizer.json`, or the one in a folder; a ValueError if it cannot serve."""
    path = Path(path).expanduser()
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no tokenizer file {file}: hf:PATH is a local {FILE_NAME}, or a folder that holds one")
    tokenizer = _bpe_from_file(file)
    try:
        eot_id = tokenizer.eot_id
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    name = next(name for name in END_OF_TEXT_NAMES if tokenizer._library.token_to_id(name) == eot_id)
    if eot_id in tokenizer.encode(name):
        raise ValueError(
            f"{file}: text that spells {name} out encodes to the end-of-text token {eot_id}, so a document could "
            f'forge it: list {name} under "added_tokens" with "special": true'
        )
    return tokenizer


def parse_spec(spec: str) -> tuple[str, str]:
    """Splits a tokenizer spec into its kind and argument: `byte`, `bpe:VOCAB` or `hf:PATH`; else a ValueError."""
    kind, _, argument = spec.partition(":")
    number = kind == "bpe" and argument.isascii() and argument.isdigit() and int(argument) >= MIN_BPE_VOCAB
    if spec == "byte" or number or (kind == "hf" and argument):
        return kind, argument
    raise ValueError(
        f"unknown tokenizer {spec!r}: use byte, bpe:VOCAB (train one; VOCAB of {MIN_BPE_VOCAB} or more, such as "
        f"bpe:32000) or hf:PATH (a local {FILE_NAME})"
    )


def load_tokenizer(folder: str | Path) -> ByteTokenizer | BPETokenizer:
    """Reads the tokenizer that `save` wrote into a folder; a ValueError if it is missing or is not one."""
    file = Path(folder, FILE_NAME)
    if not file.is_file():
        raise ValueError(f"no tokenizer file {file}: the folder is not a token store, or is damaged")
    return ByteTokenizer() if file.read_bytes() == BYTE_FILE.encode() else _bpe_from_file(file)


def _bpe_from_file(file: Path) -> BPETokenizer:
    try:
        tokenizer = BPETokenizer(file.read_bytes().decode("utf-8"))
        tokenizer._library  # noqa: B018 - parsed here, so that the error can name the file
    except (ImportError, OSError):
        raise
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is not a file of the tokenizers library: {error}") from None
    return tokenizer


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("BPE tokenizers need the tokenizers package: pip install 'jaxtrain[bpe]'") from error
    return tokenizers


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
