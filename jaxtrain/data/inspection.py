"""Contents of a token store: counts, documents, tokens, duplicates and repetitions, by split and source."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxtrain.data.store import Split, TokenStore

_LONGEST_PERIOD = 32  # longest n-gram, in tokens, whose repetitions are searched
# A document is flagged from 32 repetitions on of an n-gram of up to 13 tokens (OLMo 2, arXiv:2501.00656).
REPEATS, REPEATED_NGRAM = 32, 13
_SPAN = (REPEATS + 1) * REPEATED_NGRAM  # tokens that two neighbouring chunks share: longer than a span of REPEATS
UNSTATED_VOCABULARY = 1 << 31  # for token files that do not state theirs
DUPLICATE_SHARE = 0.05  # of the tokens; more are an alarm
_WINDOW_TOKENS, _WINDOW_CHARACTERS = 64, 300
_TOP, _LONGEST = 10, 5


def inspect_store(store: TokenStore, num_windows: int = 3, *, chunk_tokens: int = 1 << 23) -> dict[str, Any]:
    """Reads all tokens of a store twice, in constant memory beside 24 bytes a document.

    Args:
      store: an open store.
      num_windows: windows of text to show of each split, evenly spread.
      chunk_tokens: tokens in memory at a time, at least 500.

    Returns:
      JSON values: `path`, `vocab_size`, `eot_id`, `splits` by name, and `alarms`, a list of sentences. What is not
      known of token files, such as their documents, is absent.
    """
    splits = {"train": store.train, "validation": store.validation}
    hashes = {name: _hash_documents(split, chunk_tokens) for name, split in splits.items()}
    sizes = (num_windows, chunk_tokens)
    found = {name: _inspect_split(store, name, split, hashes[name], *sizes) for name, split in splits.items()}
    if hashes["train"] is not None and hashes["validation"] is not None:
        found["validation"]["documents_in_train"] = int(np.isin(hashes["validation"], hashes["train"]).sum())
    return {
        "path": str(store.path),
        "vocab_size": store.vocab_size if store.vocab_size < UNSTATED_VOCABULARY else None,
        "eot_id": store.eot_id,
        "fingerprint": store.fingerprint,
        "splits": found,
        "alarms": [alarm for name, split in found.items() for alarm in _alarms(name, split)],
    }


def _inspect_split(
    store: TokenStore, name: str, split: Split, hashes: np.ndarray | None, num_windows: int, chunk_tokens: int
) -> dict[str, Any]:
    counts, repeated = _count_tokens(split, chunk_tokens)
    shares = counts[counts > 0] / split.num_tokens
    top = np.argsort(-counts, kind="stable")[:_TOP]
    text = _reader(store)
    found: dict[str, Any] = {"tokens": split.num_tokens}
    if split.num_bytes is not None:
        found |= {"bytes": split.num_bytes, "bytes_per_token": split.num_bytes / split.num_tokens}
    found |= {
        "distinct_tokens": len(shares),
        "unigram_entropy_bits": float((shares * -np.log2(shares)).sum()) + 0.0,
        "top_tokens": [
            {"id": int(token), "count": int(counts[token]), "text": text(np.array([token]))}
            for token in top.tolist()
            if counts[token]
        ],
        "repetitions": len(repeated),
    }
    starts = split.document_starts
    if starts is not None and hashes is not None:
        lengths = np.diff(starts, append=split.num_tokens)
        flags = np.zeros(len(starts), bool)
        flags[np.searchsorted(starts, repeated, side="right") - 1] = True
        again = np.ones(len(hashes), bool)  # the same tokens as an earlier document
        again[np.unique(hashes, return_index=True)[1]] = False
        longest = np.argsort(-lengths, kind="stable")[:_LONGEST]
        found |= _document_counts(lengths, again, flags) | {
            "document_tokens": {
                "mean": float(lengths.mean()),
                **{key: int(np.quantile(lengths, q)) for key, q in (("median", 0.5), ("p99", 0.99), ("max", 1.0))},
            },
            "longest": [
                {
                    "document": number,
                    "tokens": int(lengths[number]),
                    "text": text(_window(split, int(starts[number]), int(lengths[number]))),
                }
                for number in longest.tolist()
            ],
            "sources": list(_by_source(store, name, lengths, again, flags)),
        }
    places = np.linspace(0, max(split.num_tokens - _WINDOW_TOKENS, 0), num_windows + 1, dtype=np.int64)[:num_windows]
    windows = ((place, _window(split, place, split.num_tokens)) for place in np.unique(places).tolist())
    found["windows"] = [{"position": place, "text": text(window)} for place, window in windows]
    return found


def _document_counts(lengths: np.ndarray, again: np.ndarray, flags: np.ndarray) -> dict[str, Any]:
    return {
        "documents": len(lengths),
        "duplicate_documents": int(again.sum()),
        "duplicate_tokens": float(lengths[again].sum() / max(lengths.sum(), 1)),
        "repetitive_documents": int(flags.sum()),
    }


def _by_source(
    store: TokenStore, name: str, lengths: np.ndarray, again: np.ndarray, flags: np.ndarray
) -> Iterator[dict[str, Any]]:
    first = 0
    for entry in store.manifest.get("splits", {}).get(name, {}).get("sources", ()):
        part = slice(first, first + entry["num_documents"])
        first = part.stop
        counts = _document_counts(lengths[part], again[part], flags[part])
        yield {"source": entry["source"], "tokens": entry["num_tokens"], "bytes": entry["num_bytes"]} | counts


def _hash_documents(split: Split, chunk_tokens: int) -> np.ndarray | None:
    """Returns the 64-bit hash of each document's tokens (uint64); None if the documents are not known."""
    if split.document_starts is None:
        return None
    hashes, first = np.empty(len(split.document_starts), np.uint64), 0
    starts, ends = split.document_starts, np.append(split.document_starts[1:], split.num_tokens)
    for start, stop in _chunks(split.num_tokens, chunk_tokens, 0):
        tokens = split.read(start, stop - start)
        last = int(np.searchsorted(ends, stop, side="right"))  # documents that end here; longer ones are read apart
        for number in range(first, last):
            begin, end = int(starts[number]), int(ends[number])
            part = tokens[begin - start : end - start] if begin >= start else split.read(begin, end - begin)
            hashes[number] = int.from_bytes(hashlib.blake2b(part.tobytes(), digest_size=8).digest(), "little")
        first = last
    return hashes


def _count_tokens(split: Split, chunk_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the count of each token id, and the positions where spans of REPEATS equal n-grams begin."""
    counts, places = np.zeros(0, np.int64), []
    for start, stop in _chunks(split.num_tokens, chunk_tokens, _SPAN):
        tokens = split.read(start, stop - start)
        new = tokens if start == 0 else tokens[_SPAN:]
        found = np.bincount(new)
        counts = np.pad(counts, (0, max(len(found) - len(counts), 0)))
        counts[: len(found)] += found
        for period in range(1, REPEATED_NGRAM + 1):
            begins, lengths = _runs(tokens, period)
            places.append(begins[lengths >= (REPEATS - 1) * period] + start)
    return counts, np.unique(np.concatenate(places))


def _runs(tokens: np.ndarray, period: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns start and length of each stretch in which a token equals the one `period` tokens on."""
    same = np.concatenate([[False], tokens[period:] == tokens[:-period], [False]])
    edges = np.flatnonzero(same[1:] != same[:-1])
    return edges[::2], edges[1::2] - edges[::2]


def _chunks(size: int, chunk: int, overlap: int) -> Iterator[tuple[int, int]]:
    for stop in [*range(chunk, size, chunk), size]:
        yield max((stop - 1) // chunk * chunk - overlap, 0), stop


def longest_repetition(tokens: np.ndarray) -> tuple[int, int]:
    """Finds the longest stretch that repeats one n-gram, n up to 32. Returns its number of tokens and n, or (0, 0).

    Such documents cause gradient spikes (arXiv:2501.00656).
    """
    best = (0, 0)
    for period in range(1, min(_LONGEST_PERIOD, len(tokens) - 1) + 1):
        longest = int(_runs(tokens, period)[1].max(initial=0))
        if longest >= period and longest + period > best[0]:
            best = (longest + period, period)
    return best


def escape(text: str) -> str:
    """Escapes the control characters of a text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _window(split: Split, position: int, length: int) -> np.ndarray:
    return split.read(position, min(_WINDOW_TOKENS, length))


def _reader(store: TokenStore) -> Callable[[np.ndarray], str]:
    """Returns a function from tokens to text; without a tokenizer, to the numbers of the tokens."""
    if store.tokenizer_file is None:
        return lambda tokens: " ".join(map(str, tokens.tolist()))
    size = store.tokenizer.vocab_size
    return lambda tokens: store.tokenizer.decode(tokens[tokens < size])[:_WINDOW_CHARACTERS]


def _alarms(name: str, found: dict[str, Any]) -> Iterator[str]:
    if leaked := found.get("documents_in_train"):
        yield f"{leaked:,} of {found['documents']:,} validation documents are also in the training split: remove them"
    if (share := found.get("duplicate_tokens", 0)) > DUPLICATE_SHARE:
        yield f"{share:.1%} of the {name} tokens are exact copies of earlier documents: deduplicate the text"
    if found["repetitions"]:
        count = found.get("repetitive_documents")
        where = f"{count:,} {name} documents" if count else f"{found['repetitions']:,} places of the {name} split"
        yield f"{where} repeat an n-gram {REPEATS} times or more, which causes loss spikes: filter them out"
