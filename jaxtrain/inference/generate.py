"""Text from a model: prompts from files, in batches, stop strings, streaming."""

import collections
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import chex

from jaxtrain.data.tokenizer import Tokenizer
from jaxtrain.models.decode import Sampling, Timing, generate
from jaxtrain.runtime.files import read_file

_FORMS = '{"prompt": "..."}, {"messages": [...]} or "..."'
UNFINISHED = "\ufffd"  # how an incomplete character is decoded


@dataclass(frozen=True)
class Completion:
    """Generated text."""

    text: str  # the new text only, without the stop string or the end-of-text token that ended it
    num_tokens: int  # number of generated tokens
    # "length" after `num_tokens` tokens, "stop" at a stop string, "end" at the end-of-text token
    finish: Literal["length", "stop", "end"]


def complete(
    model: Any,
    params: chex.ArrayTree,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    num_tokens: int,
    *,
    batch_size: int = 8,
    seed: int = 0,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    timing: Timing | None = None,
) -> Iterator[Completion]:
    """Continues texts, each as the beginning of a document; yields the completions in the order of the prompts.

    A completion depends on the seed and the prompt alone, not on the batch, up to rounding. Copies of a prompt differ.

    Args:
      model, params, tokenizer: the model; one device per process computes.
      prompts: texts, which follow the end-of-text token, or token ids, which are used unchanged.
      num_tokens, batch_size: tokens to add to each prompt; prompts per batch.
      seed, sampling, timing: see `decode.generate`.
      stop: strings that end a completion, also where they span tokens.
      stop_ids: ids that end a completion. None takes the end-of-text token; () never stops at a token.
      on_text: called with the number of a prompt and its further text while it is generated.

    Raises:
      ValueError: an empty stop string, or an argument that `decode.generate` rejects.
    """
    if not all(stop):
        raise ValueError("a stop string is '': leave it out, or give at least one character")
    ends = (tokenizer.eot_id,) if stop_ids is None else tuple(stop_ids)
    rows = [[tokenizer.eot_id, *tokenizer.encode(p).tolist()] if isinstance(p, str) else list(p) for p in prompts]
    streams = _number_copies(rows)
    for start in range(0, len(rows), batch_size):
        texts = [_Text(tokenizer, row, tuple(stop), ends) for row in rows[start : start + batch_size]]

        def on_tokens(row: int, tokens: list[int], start: int = start, texts: list[_Text] = texts) -> bool:
            ended = texts[row].update(tokens)
            if on_text is not None and (more := texts[row].take(ended or len(tokens) == num_tokens)):
                on_text(start + row, more)
            return ended

        new = generate(
            model,
            params,
            rows[start : start + batch_size],
            num_tokens,
            seed=seed,
            streams=streams[start : start + batch_size],
            sampling=sampling,
            vocab_size=tokenizer.vocab_size,
            stop_ids=ends,
            on_tokens=on_tokens if stop or on_text else None,
            every=1 if on_text else 16,
            timing=timing,
        )
        yield from (text.completion(tokens.tolist()) for text, tokens in zip(texts, new, strict=True))


def _number_copies(rows: list[list[int]]) -> list[int]:
    """Returns for each row the number of equal rows before it."""
    seen: collections.Counter = collections.Counter()
    numbers = []
    for row in map(tuple, rows):
        numbers.append(seen[row])
        seen[row] += 1
    return numbers


@dataclass
class _Text:
    """Text of a row while its tokens arrive."""

    tokenizer: Tokenizer
    prompt: list[int]
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    text: str = ""
    finish: Literal["length", "stop", "end"] = "length"
    _taken: int = 0  # characters that `take` has returned

    def update(self, tokens: list[int]) -> bool:
        """Decodes all new tokens; returns True if the text has ended."""
        ended = bool(tokens) and tokens[-1] in self.stop_ids
        self.text = self.tokenizer.continuation(self.prompt, tokens[:-1] if ended else tokens)
        found = [place for string in self.stop if (place := self.text.find(string)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        self.finish = "stop" if found else "end" if ended else "length"
        return self.finish != "length"

    def take(self, ended: bool) -> str:
        """Returns the text since the last call; holds back what may be half a character or half a stop string."""
        safe = len(self.text)
        if not ended:
            whole = self.text.rstrip(UNFINISHED)
            halves = (string[:n] for string in self.stop for n in range(1, len(string)))
            safe = len(whole) - max([0, *(len(half) for half in halves if whole.endswith(half))])
        more, self._taken = self.text[self._taken : safe], max(safe, self._taken)
        return more

    def completion(self, tokens: list[int]) -> Completion:
        """Returns the whole text of the new tokens."""
        self.update(tokens)
        return Completion(self.text, len(tokens), self.finish)


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Reads a file of prompts; `-` is standard input. Blank lines are skipped.

    Returns:
      A record for each line, with `prompt` (a text) or `messages` (a list), and its further fields.

    Raises:
      ValueError: no file, no prompt, a file that is not UTF-8, or a line that is not as the first one.
    """
    try:
        text = sys.stdin.read() if path == "-" else read_file(Path(path).expanduser()).decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"no file {path}: give a file with a prompt on each line, or - for standard input") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it (iconv -t utf-8)") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt: write one on each line")
    if not _is_record(lines[0][1]):
        return [{"prompt": line.removesuffix("\r")} for _, line in lines]
    records = []
    for number, line in lines:
        if not _is_record(line):
            raise ValueError(f"{path} line {number} is not {_FORMS}, as line {lines[0][0]}: correct it")
        record = json.loads(line)
        records.append(record if isinstance(record, dict) else {"prompt": record})
    return records


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if isinstance(record, dict):
        return isinstance(record.get("prompt"), str) or isinstance(record.get("messages"), list)
    return isinstance(record, str)
