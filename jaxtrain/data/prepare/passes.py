"""Fills the folder of a new token store: choose the split, make the tokenizer, encode, join, manifest."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

from jaxtrain.data.prepare.documents import SPLITS, SplitRule, Unit, choose_split, plan_units
from jaxtrain.data.prepare.formats import BUILT_IN, FORMATS
from jaxtrain.data.prepare.progress import Stages
from jaxtrain.data.prepare.sources import LeftOut, SourceFile, file_version
from jaxtrain.data.prepare.tasks import run_tasks, worker_pool
from jaxtrain.data.prepare.units import UnitTask, encode_unit, join_units, token_dtype, training_texts, write_manifest
from jaxtrain.data.store import STORE_VERSION
from jaxtrain.data.tokenizer import (
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    parse_spec,
    read_hf,
    train_bpe,
)
from jaxtrain.runtime.files import read_json, write_json
from jaxtrain.runtime.terminal import one_line


@dataclass(frozen=True)
class Limits:
    """Sizes of the work. The first two are part of a store's request; none changes the documents."""

    unit_bytes: int = 1 << 25  # of input, for one worker at a time
    shard_tokens: int = 1 << 29  # 1 or 2 GiB a shard
    # The tokenizers library needs some 100 bytes of memory a byte of text: documents are encoded block by block.
    block_characters: int = 1 << 18
    bpe_sample_bytes: int = 50_000_000  # of text that a BPE tokenizer is trained on


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Corpus:
    """Input of a store: the sources as the user named them, their files, and the paths that are no part of it."""

    sources: tuple[str, ...]
    files: Sequence[SourceFile]
    left_out: LeftOut


def units_folder(folder: Path, request: dict[str, Any]) -> Path:
    """Returns the folder of a request's units: a worker that outlives its parent writes to no other request's."""
    return folder / f"units-{hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]}"


def write_store(
    folder: Path,
    corpus: Corpus,
    request: dict[str, Any],
    *,
    limits: Limits,
    num_workers: int | None,
    stages: Stages,
) -> None:
    """Writes the store of a request into `folder`, whose `units_folder` holds the results of an earlier try.

    Raises:
      ValueError: sources that cannot be read, are too small to split, or changed meanwhile.
    """
    units = plan_units(corpus.files, limits.unit_bytes)
    sizes = [sum(piece.size for piece in unit) for unit in units]
    parts = units_folder(folder, request)
    chosen = parts / "split.json"
    if (found := read_json(chosen)) is None:
        advance = stages("choosing the split", None)
        rule, unit_texts = choose_split(units, request["text_field"], request["validation_fraction"])
        advance(0)
        found = [rule.tail_start, unit_texts]
        write_json(chosen, found)
    rule, offsets = SplitRule(request["validation_fraction"], found[0]), [0, *accumulate(found[1])]
    tasks = [
        UnitTask(unit, number, rule, request["text_field"], str(folder), str(parts), limits.block_characters, offset)
        for number, (unit, offset) in enumerate(zip_longest(units, offsets[: len(units)], fillvalue=0))
    ]
    tokenizer = _make_tokenizer(folder, request, tasks, limits.bpe_sample_bytes, stages)
    dtype = token_dtype(tokenizer.vocab_size)
    tasks = [replace(task, dtype=dtype) for task in tasks]
    results = [parts / f"{number:06d}.json" for number in range(len(units))]
    with worker_pool(num_workers, len(units), _format_files(units, num_workers)) as pool:
        counts = run_tasks(encode_unit, tasks, results, pool, stages("tokenizing", sizes))
    for file in corpus.files:
        if file_version(file.path) != (file.size, file.version):
            raise ValueError(f"{one_line(file.path)} changed while it was read: run prepare again when it is complete")
    splits = {
        split: join_units(folder, parts, split, counts, dtype, limits.shard_tokens, stages(f"writing {split}", sizes))
        for split in SPLITS
    }
    more = _describe(corpus, request, rule, counts)
    more["tokenizer"] = {"spec": request["tokenizer"], "sha256": tokenizer.fingerprint}
    write_manifest(folder, STORE_VERSION, tokenizer, splits, more)


def _describe(corpus: Corpus, request: dict[str, Any], rule: SplitRule, counts: Sequence[dict]) -> dict[str, Any]:
    """Returns the values of the manifest that record how the store was made."""
    left_out = {reason: len(paths) for reason, paths in corpus.left_out.items()}
    if num_empty := sum(count["num_empty"] for count in counts):
        left_out["empty documents"] = num_empty
    split = "documents" if rule.tail_start is None else "tail"
    return {
        "split": "files" if any(file.split for file in corpus.files) else split,
        "sources": list(corpus.sources),
        "source_sha256": {path: digest for count in counts for path, digest in count["sha256"].items()},
        "left_out": left_out,
        "request": request,
    }


def _format_files(units: Sequence[Unit], num_workers: int | None) -> list[str]:
    """Returns the Python files that register the formats of the units, for the worker processes."""
    names = {piece.file.format for unit in units for piece in unit}
    custom = {name: FORMATS[name].file for name in names if FORMATS[name] not in BUILT_IN}
    if num_workers != 1 and len(units) > 1 and None in custom.values():
        name = next(name for name, file in custom.items() if file is None)
        raise ValueError(f"the format {name!r} does not say which file registers it: pass Format(file=__file__)")
    return sorted(file for file in custom.values() if file)


def _make_tokenizer(
    folder: Path, request: dict[str, Any], tasks: Sequence[UnitTask], sample_bytes: int, stages: Stages
) -> Tokenizer:
    """Loads the tokenizer of an earlier try, or makes it; BPE learns from `sample_bytes` of the training split."""
    if (folder / TOKENIZER_FILE).exists():
        return load_tokenizer(folder)
    kind, argument = parse_spec(request["tokenizer"])
    tokenizer: Tokenizer = ByteTokenizer()
    if kind == "hf":
        tokenizer = read_hf(argument, request.get("eot"))
    elif kind == "bpe":
        advance = stages(f"training {request['tokenizer']}", None)
        tokenizer = train_bpe(training_texts(tasks, sample_bytes), int(argument))
        advance(0)
    tokenizer.save(folder)
    return tokenizer
