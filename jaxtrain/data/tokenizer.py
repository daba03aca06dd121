"""Tokenizers: raw bytes, byte-level BPE trained here, or a local Hugging Face `tokenizer.json`.

A document's text never yields the end-of-text token, even where it spells that token out: only `prepare` writes it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from jaxtrain.data.words import WordEncoder
from jaxtrain.runtime.extras import import_extra
from jaxtrain.runtime.files import write_text

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|eot_id|>", "<eos>")
TOKENIZER_FILE = "tokenizer.json"
_EOT_ENTRY = '{"eot": '
_BEGIN = '{"type":"TemplateProcessing","replaces":'  # of the post-processor of `begin_with_eot`
BYTE_FILE_TEXT = '{"type": "byte"}\n'
MIN_BPE_VOCAB = 257  # every byte and the end-of-text token
MAX_RUN = 1024  # characters without a word end: BPE training takes quadratic time in a run's length
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_RUN + 1},}}|(?<!\s)\s{{{MAX_RUN + 1},}}")


class Tokenizer(Protocol):
    """Interface of a tokenizer; `ByteTokenizer` and `BPETokenizer` implement it."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def eot_id(self) -> int:
        """Id of the end-of-text token, which separates documents."""

    json_text: str  # of the file that `save` writes

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the file that `save` writes."""
        return hashlib.sha256(self.json_text.encode()).hexdigest()

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns the token ids (int32, 1-D) of a text."""
        return self.encode_batch([text if isinstance(text, str) else text.decode("utf-8")])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each text."""

    def encode_whole(self, text: str) -> np.ndarray:
        """Returns the token ids of a text with the tokens that the tokenizer adds around it; here none."""
        return self.encode(text)

    def encode_special(self, text: str) -> np.ndarray:
        """Returns the token ids of a text that spells out special tokens, as chat templates do."""
        first, *others = map(self.encode, text.split(END_OF_TEXT))
        return np.concatenate([first, *(np.append(np.int32(self.eot_id), part) for part in others)])

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids."""

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` into a folder."""
        write_text(Path(folder, TOKENIZER_FILE), self.json_text)

    def continuation(self, prompt_ids: Iterable[int], new_ids: Iterable[int]) -> str:
        """Returns the text that `new_ids` add to the text of `prompt_ids`.

        Decoding `new_ids` alone would drop a leading space of many tokenizers and break characters whose bytes begin in
        the prompt.
        """
        prompt = [int(token_id) for token_id in prompt_ids]
        before, whole = self.decode(prompt), self.decode([*prompt, *(int(token_id) for token_id in new_ids)])
        same = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        return whole[same:]


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """One token a byte, ids 0 to 255; 256 is the end-of-text token."""

    vocab_size: ClassVar[int] = 257
    eot_id: ClassVar[int] = 256
    eot_text: ClassVar[str] = END_OF_TEXT
    json_text: str = field(default=BYTE_FILE_TEXT, init=False)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns the token ids (int32 [num_bytes]) of a text's UTF-8 bytes, or of any bytes."""
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of token ids; the end-of-text token is spelled `<|endoftext|>`.

        Raises:
          ValueError: an id below 0 or above 256.
        """
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        bad = array[(array < 0) | (array > self.eot_id)]
        if bad.size:
            raise ValueError(f"token id {bad[0]} is not in the byte vocabulary [0, {self.vocab_size})")
        pieces = np.split(array, np.flatnonzero(array == self.eot_id))
        return END_OF_TEXT.encode().join(
            piece[1 if number else 0 :].astype(np.uint8).tobytes() for number, piece in enumerate(pieces)
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class BPETokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, given as the text of its `tokenizer.json`.

    The text may begin with an `eot` entry, which the library does not know: the end-of-text token's text.
    """

    json_text: str

    @property
    def library_json(self) -> str:
        """Text of a `tokenizer.json` that the library reads."""
        if not self.json_text.startswith(_EOT_ENTRY):
            return self.json_text
        return json.dumps({key: value for key, value in json.loads(self.json_text).items() if key != "eot"})

    @cached_property
    def _library(self) -> Any:
        library = _import_tokenizers().Tokenizer.from_str(self.library_json)
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # special tokens spelled out in a text are encoded as plain text
        return library

    @cached_property
    def _special_library(self) -> Any:
        library = _import_tokenizers().Tokenizer.from_str(self._library.to_str())
        library.encode_special_tokens = False
        return library

    @cached_property
    def _words(self) -> WordEncoder | None:
        try:
            return WordEncoder(self._library)
        except ValueError:
            return None

    @cached_property
    def _ids(self) -> dict[str, int]:
        return self._library.get_vocab(with_added_tokens=True)

    @cached_property
    def vocab_size(self) -> int:
        return max(self._ids.values()) + 1

    @cached_property
    def eot_text(self) -> str:
        """Text of the end-of-text token: the `eot` entry, or the first of the usual names in the vocabulary.

        Raises:
          ValueError: the vocabulary has none of them.
        """
        names = END_OF_TEXT_NAMES
        if self.json_text.startswith(_EOT_ENTRY):
            names = (json.loads(self.json_text)["eot"],)
        for name in names:
            if name in self._ids:
                return name
        added = [token.content for token in self._library.get_added_tokens_decoder().values()]
        raise ValueError(
            f"the tokenizer has no end-of-text token: looked for {', '.join(names)}; name one of its tokens with "
            "--eot TEXT (data.eot in a config, eot in Python), such as one of "
            f"{', '.join(added[:8]) or 'its vocabulary'}"
        )

    @property
    def eot_id(self) -> int:
        """Id of the end-of-text token; a ValueError if there is none."""
        return self._ids[self.eot_text]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each text, without the end-of-text token and tokens added around a text."""
        if self._words is not None:
            found = self._words.encode_batch(texts)
        else:
            encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
            found = [encoding.ids for encoding in encoded]
        ids = [np.array(part, np.int32) for part in found]
        return [
            self._encode_cut(text) if self.eot_id in found else found for text, found in zip(texts, ids, strict=True)
        ]

    def encode_whole(self, text: str) -> np.ndarray:
        """Returns the token ids of a text with the tokens that the tokenizer adds around it, such as a first one."""
        return np.array(self._library.encode(text).ids, np.int32)

    def encode_special(self, text: str) -> np.ndarray:
        """Returns the token ids of a text in which special tokens are spelled out."""
        return np.array(self._special_library.encode(text, add_special_tokens=False).ids, np.int32)

    def _encode_cut(self, text: str) -> np.ndarray:
        """Encodes a text that spells the end-of-text token, cut inside every such spelling."""
        encoding = self._library.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [start + 1 for token_id, (start, stop) in spans if token_id == self.eot_id and stop - start > 1]
        if self.eot_id in encoding.ids and not cuts:
            raise ValueError(f"the text spells the end-of-text token {self.eot_text!r}: name another with --eot TEXT")
        if not cuts:
            return np.array(encoding.ids, np.int32)
        return np.concatenate(
            [self._encode_cut(text[start:stop]) for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids, special tokens spelled out."""
        return self._library.decode([int(token_id) for token_id in ids], skip_special_tokens=False)


def byte_level_json() -> str:
    """Returns the byte tokenizer as a `tokenizer.json`: byte-level BPE without merges, with the same ids."""
    lib = _import_tokenizers()
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in byte-level BPE
    others = [byte for byte in range(256) if byte not in plain]
    characters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    library = lib.Tokenizer(lib.models.BPE({character: byte for byte, character in characters.items()}, []))
    library.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = lib.decoders.ByteLevel()
    library.add_special_tokens([END_OF_TEXT])
    return library.to_str()


def begin_with_eot(tokenizer: BPETokenizer) -> str:
    """Returns the text of a `tokenizer.json` that puts the end-of-text token before each text, as a run does.

    `read_hf` reads it as the tokenizer was: the library ignores the entry `replaces`, which holds its post-processor.
    """
    eot, text = tokenizer.eot_text, tokenizer.library_json
    single = [{"SpecialToken": {"id": eot, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    values = {"single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}]}
    values["special_tokens"] = {eot: {"id": eot, "ids": [tokenizer.eot_id], "tokens": [eot]}}
    found = re.search(r'"post_processor"\s*:\s*(?=null|{)', text)
    assert found is not None  # the library requires it
    end = json.JSONDecoder().raw_decode(text, found.end())[1]
    return f"{text[: found.end()]}{_BEGIN}{text[found.end() : end]},{json.dumps(values)[1:]}{text[end:]}"


def _without_begin(text: str) -> str:
    """Undoes `begin_with_eot`."""
    if (start := text.find(_BEGIN)) < 0:
        return text
    decoder, inner = json.JSONDecoder(), start + len(_BEGIN)
    return text[:start] + text[inner : decoder.raw_decode(text, inner)[1]] + text[decoder.raw_decode(text, start)[1] :]


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Trains byte-level BPE on a stream of texts.

    Args:
      texts: read once; very long ones are best cut into blocks. Runs without a word end are cut every MAX_RUN
        characters.
      vocab_size: tokens, with the 256 bytes and `<|endoftext|>` among them.

    Raises:
      ValueError: fewer than 257 tokens are requested, or the texts have too few repeated pairs for that many.
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
    library.train_from_iterator((piece for text in texts for piece in _cut_runs(text)), trainer=trainer)
    tokenizer = BPETokenizer(library.to_str())
    if tokenizer.vocab_size < vocab_size:
        raise ValueError(
            f"the text is too small for bpe:{vocab_size}: use bpe:{tokenizer.vocab_size} or fewer, or more text"
        )
    return tokenizer


def _cut_runs(text: str) -> Iterator[str]:
    start = 0
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def read_hf(path: str | Path, eot: str | None = None) -> ByteTokenizer | BPETokenizer:
    """Reads a local `tokenizer.json`, or the one in a folder: of the tokenizers library, or of a run.

    Args:
      path: the file or its folder.
      eot: text of the end-of-text token; None looks for the usual names.

    Raises:
      ValueError: not a tokenizer file, or one without a usable end-of-text token.
    """
    path = Path(path).expanduser()
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"no tokenizer file {file}: hf:PATH is a local {TOKENIZER_FILE}, or a folder that holds one; that of a "
            f"model of the Hugging Face Hub is downloaded with `hf download MODEL {TOKENIZER_FILE} --local-dir PATH`"
        )
    tokenizer = _read(file)
    if isinstance(tokenizer, ByteTokenizer) or tokenizer._library.to_str() == byte_level_json():
        if eot not in (None, END_OF_TEXT):
            raise ValueError(f"{file} is a tokenizer of bytes, whose end-of-text token is {END_OF_TEXT}, not {eot}")
        return ByteTokenizer()
    if eot is not None:
        tokenizer = BPETokenizer(json.dumps({"eot": eot} | json.loads(tokenizer.json_text) | {"eot": eot}))
    try:
        tokenizer.encode(f"a{tokenizer.eot_text}b {tokenizer.eot_text}")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} cannot encode every text: {error}; add that token, or give another file") from None
    return tokenizer


def parse_spec(spec: str) -> tuple[str, str]:
    """Splits `byte`, `bpe:VOCAB` or `hf:PATH` into kind and argument; any other spec is a ValueError."""
    kind, _, argument = spec.partition(":")
    number = kind == "bpe" and argument.isascii() and argument.isdigit() and int(argument) >= MIN_BPE_VOCAB
    if spec == "byte" or number or (kind == "hf" and argument):
        return kind, argument
    raise ValueError(
        f"unknown tokenizer {spec!r}: use byte, bpe:VOCAB (train one; VOCAB of {MIN_BPE_VOCAB} or more, such as "
        f"bpe:32000) or hf:PATH (a local {TOKENIZER_FILE}, which `hf download` gets from the Hugging Face Hub)"
    )


def load_tokenizer(folder: str | Path) -> ByteTokenizer | BPETokenizer:
    """Reads the tokenizer that `save` wrote into a folder; a ValueError if it is missing or is not one."""
    file = Path(folder, TOKENIZER_FILE)
    if not file.is_file():
        raise ValueError(f"no tokenizer file {file}: the folder is not a token store, or is damaged")
    return _read(file)


def _read(file: Path) -> ByteTokenizer | BPETokenizer:
    if file.read_bytes() == BYTE_FILE_TEXT.encode():
        return ByteTokenizer()
    try:
        tokenizer = BPETokenizer(_without_begin(file.read_bytes().decode("utf-8")))
        tokenizer._library  # noqa: B018 - parsed here, so that the error can name the file
    except (ImportError, OSError):
        raise
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is not a file of the tokenizers library: {error}; fetch it again") from None
    return tokenizer


def _import_tokenizers() -> Any:
    return import_extra("tokenizers", "bpe", "BPE tokenizers need the tokenizers package")
