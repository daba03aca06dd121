"""Makes a token store for fine-tuning from prompts with completions or chat messages: completions alone are labels.

A record is `{"prompt": ..., "completion": ...}`, two texts, or `{"messages": [{"role": ..., "content": ...}, ...]}`.
The former becomes the end-of-text token and both texts, as `generate` continues a prompt; the latter is rendered by the
chat template, as `generate --chat` renders it, and every assistant message counts, with the tokens that end it.
"""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.data.chat import TEMPLATE_FILES, ChatTemplate, read_template
from jaxtrain.data.prepare.documents import SPLITS, TRAIN, VALIDATION, hash_document
from jaxtrain.data.prepare.formats import (
    arrow_rows,
    find_format,
    json_values,
    parquet_rows,
    require_columns,
    table_rows,
)
from jaxtrain.data.prepare.prepare import unfinished_store
from jaxtrain.data.prepare.sources import content_hash, find_sources
from jaxtrain.data.prepare.streams import naming
from jaxtrain.data.prepare.units import token_dtype, write_manifest
from jaxtrain.data.store import (
    MASKED_VERSION,
    STORE_DTYPES,
    STORE_MANIFEST,
    TokenStore,
    documents_file,
    open_store,
    shard_file,
)
from jaxtrain.data.tokenizer import ByteTokenizer, Tokenizer, parse_spec, read_hf
from jaxtrain.runtime.files import empty_folder, read_json, sha256_file

Record = Mapping[str, Any]
Sample = tuple[np.ndarray, np.ndarray, int]  # tokens, mask of the labels that count, bytes of the completions


def prepare_completions(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str = "byte",
    eot: str | None = None,
    validation: Sequence[str] = (),
    validation_fraction: float = 0.02,
    chat_template: str | None = None,
    lock: bool = True,
) -> TokenStore:
    """Tokenizes prompts and completions into a new token store and opens it. Holds all tokens in memory.

    Args:
      sources: files, folders or globs of JSON, JSON lines, CSV, TSV, Parquet or Arrow, compressed or not.
      out: folder of the store. A finished store of the same files and options is opened.
      tokenizer: `byte` or `hf:PATH`; PATH may be a run directory, for the tokenizer of its model.
      validation: sources of the validation split, which then is no share of `sources`.
      validation_fraction: share of the records, chosen by hash, at least one.
      chat_template: folder with a chat template; None takes the template of the tokenizer.

    Raises:
      ValueError: records that cannot be used, fewer than two of them, a bad option, or another folder at `out`.
    """
    kind, path = parse_spec(tokenizer)
    if kind == "bpe":
        raise ValueError(f"completions are tokenized as the model's text was: {tokenizer!r} trains one; use hf:PATH")
    library = ByteTokenizer() if kind == "byte" else read_hf(path, eot)
    folder = chat_template or (os.path.expanduser(path) if kind == "hf" and os.path.isdir(path) else None)
    files = [file for file in find_sources(sources, validation)[0] if file.size]
    request = {"completions": True, "files": sorted([file.split, content_hash(file.path)] for file in files)}
    request["tokenizer"] = library.fingerprint
    request |= {"validation_fraction": validation_fraction, "chat_template": _template_hash(folder)}
    out = Path(os.path.abspath(Path(out).expanduser()))
    if os.path.lexists(out):
        manifest = read_json(out / STORE_MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("request") != request:
            raise ValueError(f"{out} exists and is not the token store of this request: choose another folder")
        return open_store(out, verify=False)
    template = functools.cache(functools.partial(_template, folder))
    splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for file in files:
        with naming(file.path):
            for number, record in enumerate(_records(file.path), 1):
                try:
                    sample = _encode(record, library, template)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"record {number} cannot be used: {error}") from None
                fraction, _ = hash_document("", json.dumps(record, sort_keys=True))
                splits[file.split or (VALIDATION if fraction < validation_fraction else TRAIN)].append(sample)
    if sum(map(len, splits.values())) < 2:
        raise ValueError("fewer than two records: one trains, one validates")
    for empty, other in ((TRAIN, VALIDATION), (VALIDATION, TRAIN)):
        if not splits[empty]:
            splits[empty].append(splits[other].pop())
    with unfinished_store(out, lock=lock) as partial:
        _write(partial, splits, library, folder, {"sources": list(sources), "request": request})
    return open_store(out, verify=False)


def _records(path: str) -> Iterator[Record]:
    """Yields the records of a file."""
    match find_format(path):
        case ".json" | ".jsonl":
            yield from json_values(path)
        case ".csv" | ".tsv" | ".tab" | ".psv" as suffix:
            rows = table_rows(path, "," if suffix == ".csv" else "\t")
            header = next(rows, [])
            _record_columns(header)
            yield from (dict(zip(header, row, strict=True)) for row in rows)
        case ".parquet":
            yield from map(_without_nulls, parquet_rows(path, _record_columns))
        case ".arrow" | ".feather":
            yield from map(_without_nulls, arrow_rows(path, _record_columns))
        case _:
            raise ValueError("is no file of records: give JSON, JSON lines, CSV, TSV, Parquet or Arrow")


def _record_columns(names: list[str]) -> list[str]:
    """Returns the columns that a record may have, as others may be of types that are no JSON; all if it has none.

    Raises:
      ValueError: two columns of one name.
    """
    return require_columns(names, [name for name in names if name in ("messages", "prompt", "completion")] or names)


def _without_nulls(value: Any) -> Any:
    """Drops the fields of structs that are null, as a record of JSON lacks them; `content` stays."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: _without_nulls(item) for name, item in value.items() if item is not None or name == "content"}


def _encode(record: Record, tokenizer: Tokenizer, template: Callable[[], ChatTemplate]) -> Sample:
    """Returns the tokens of a record, the mask of those that count as labels, and the bytes of the completions."""
    if not isinstance(record, Mapping):
        raise ValueError(f"it is {type(record).__name__}, not an object")
    if record.get("messages") is not None:
        text, spans = _render(record["messages"], template())
        tokens, encode, first = tokenizer.encode_special(text), tokenizer.encode_special, 0
    else:
        parts = [record.get(name) for name in ("prompt", "completion")]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"it has neither messages nor prompt and completion (it has: {', '.join(record)})")
        text, spans = "".join(parts), [(len(parts[0]), len(parts[0]) + len(parts[1]))]
        tokens, encode, first = tokenizer.encode(text), tokenizer.encode, 1
    if not any(stop > start for start, stop in spans):
        raise ValueError("it has no completion: nothing to train on")
    mask = np.zeros(len(tokens), np.uint8)
    for start, stop in spans:
        # A token across the edge counts: the prompt alone, as in generation, would be tokenized without it.
        begin, end = (_common(tokens, encode(text[:edge])) for edge in (start, stop))
        mask[begin : end if stop < len(text) else None] = 1
    if first:  # the token that begins a document closes the one before it
        tokens, mask = np.append(np.int32(tokenizer.eot_id), tokens), np.append(np.uint8(1), mask)
    return tokens, mask, sum(len(text[start:stop].encode()) for start, stop in spans)


def _common(whole: np.ndarray, part: np.ndarray) -> int:
    """Returns the length of the common prefix."""
    length = min(len(whole), len(part))
    differing = np.flatnonzero(whole[:length] != part[:length])
    return int(differing[0]) if differing.size else length


def _render(messages: Any, template: ChatTemplate) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text of a conversation and the range of characters of each assistant message."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages is {messages!r:.60}, not a list of messages")
    text, spans = template.render(messages), []
    for number, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            before = template.render(messages[:number], add_generation_prompt=True)
            whole = template.render(messages[: number + 1])
            if not (whole.startswith(before) and text.startswith(whole)):
                raise ValueError(
                    f"the chat template does not render message {number + 1} after the text of the earlier ones, as "
                    "generation does: leave out the turns before the last, or give another template"
                )
            spans.append((len(before), len(whole)))
    return text, spans


def _template(folder: str | None) -> ChatTemplate:
    if folder is None:
        raise ValueError("it holds chat messages, and the tokenizer has no chat template: name a folder with one")
    return read_template(folder)


def _template_hash(folder: str | None) -> str | None:
    if folder is None:
        return None
    files = [Path(folder, name) for name in TEMPLATE_FILES]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def _write(
    folder: Path, splits: dict[str, list[Sample]], tokenizer: Tokenizer, template: str | None, more: dict[str, Any]
) -> None:
    """Writes all files of the store into its unfinished folder."""
    empty_folder(folder)
    dtype, entries = token_dtype(tokenizer.vocab_size), {}
    for split, samples in splits.items():
        sizes = [len(tokens) for tokens, _, _ in samples]
        tokens, mask = (np.concatenate([sample[i] for sample in samples]) for i in range(2))
        names = shard_file(split, 0), shard_file(split, 0, "mask"), documents_file(split)
        shard, masks, documents = (folder / name for name in names)
        shard.write_bytes(tokens.astype(STORE_DTYPES[dtype]).tobytes())
        masks.write_bytes(mask.tobytes())
        np.save(documents, np.cumsum([0, *sizes[:-1]]), allow_pickle=False)
        entries[split] = {
            "num_tokens": len(tokens),
            "num_bytes": sum(num_bytes for _, _, num_bytes in samples),  # of the completions
            "num_documents": len(samples),
            "shards": [{"num_tokens": len(tokens), "sha256": sha256_file(shard), "mask_sha256": sha256_file(masks)}],
            "documents_sha256": sha256_file(documents),
        }
    tokenizer.save(folder)
    for name in TEMPLATE_FILES if template else ():
        if Path(template, name).is_file():
            shutil.copyfile(Path(template, name), folder / name)
    write_manifest(folder, MASKED_VERSION, tokenizer, entries, more)
