"""Fills the folder of a new token store: scan, choose the split, make the tokenizer, encode, join, manifest."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from jaxtrain.data.prepare.documents import SPLITS, TRAIN, SplitRule, Unit, plan_units
from jaxtrain.data.prepare.formats import BUILT_IN, FORMATS
from jaxtrain.data.prepare.progress import Stages
from jaxtrain.data.prepare.sources import LeftOut, SourceFile
from jaxtrain.data.prepare.tasks import run_tasks, worker_pool
from jaxtrain.data.prepare.units import UnitTask, encode_unit, join_units, scan_unit, token_dtype, training_texts
from jaxtrain.data.store import STORE_FORMAT, STORE_MANIFEST, STORE_VERSION
from jaxtrain.data.tokenizer import (
    TOKENIZER_FILE,
    BPETokenizer,
    ByteTokenizer,
    load_tokenizer,
    parse_spec,
    read_hf,
    train_bpe,
)
from jaxtrain.runtime.files import sha256_file, write_json


@dataclass(frozen=True)
class Limits:
    """Sizes of the work. The first two are part of a store's request; none changes the documents."""

    unit_bytes: int = 1 << 25  # of input, for one worker at a time
    shard_tokens: int = 1 << 29  # 1 or 2 GiB a shard
    # The tokenizers library needs some 100 bytes of memory a byte of text: documents are encoded block by block.
    block_characters: int = 1 << 18
    bpe_sample_bytes: int = 200_000_000  # of text that a BPE tokenizer is trained on


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Corpus:
    """Input of a store: the sources as the user named them, their files, and the paths that are no part of it."""

    sources: tuple[str, ...]
    files: Sequence[SourceFile]
    left_out: LeftOut


def write_store(
    folder: Path,
    corpus: Corpus,
    request: dict[str, Any],
    *,
    limits: Limits,
    num_workers: int | None,
    stages: Stages,
) -> None:
    """Writes the store of a request into `folder`, whose subfolder `units` holds the results of an earlier try.

    Args:
      folder: of the unfinished store.
      corpus: the input.
      request: made by `prepare`; stored in the manifest.
      limits: sizes of the work.
      num_workers: processes; None is one a core.
      stages: shows progress, see `progress.show_progress`.

    Raises:
      ValueError: sources that cannot be read, are too small to split, or changed meanwhile.
    """
    units = plan_units(corpus.files, limits.unit_bytes)
    sizes = [sum(piece.size for piece in unit) for unit in units]
    rule = SplitRule(request["validation_fraction"])
    tasks = [
        UnitTask(unit, number, rule, request["text_field"], str(folder), limits.block_characters)
        for number, unit in enumerate(units)
    ]
    results = [folder / "units" / f"{number:06d}" for number in range(len(units))]
    with worker_pool(num_workers, len(units), _format_files(units, num_workers)) as pool:
        scan_results = [path.with_suffix(".scan.json") for path in results]
        scans = run_tasks(scan_unit, tasks, scan_results, pool, stages("reading", sizes))
        rule = _choose_split(rule, scans)
        offsets = accumulate((_scanned_bytes([scan]) for scan in scans), initial=0)
        tasks = [replace(task, rule=rule, offset=offset) for task, offset in zip(tasks, offsets, strict=False)]
        train_bytes = _scanned_bytes(scans, (TRAIN,)) if rule.tail_start is None else rule.tail_start
        rate = min(1.0, limits.bpe_sample_bytes / train_bytes)
        tokenizer = _make_tokenizer(folder, request, tasks, rate, stages)
        dtype = token_dtype(tokenizer.vocab_size)
        tasks = [replace(task, dtype=dtype) for task in tasks]
        encode_results = [path.with_suffix(".json") for path in results]
        counts = run_tasks(encode_unit, tasks, encode_results, pool, stages("tokenizing", sizes))
    hashes = {path: digest for scan in scans for path, digest in scan["sha256"].items()}
    _refuse_changed(corpus.files, hashes)
    splits = {
        split: join_units(folder, split, counts, dtype, limits.shard_tokens, stages(f"writing {split}", sizes))
        for split in SPLITS
    }
    write_json(folder / STORE_MANIFEST, _make_manifest(corpus, request, rule, tokenizer, splits, scans, hashes))


def _make_manifest(
    corpus: Corpus,
    request: dict[str, Any],
    rule: SplitRule,
    tokenizer: ByteTokenizer | BPETokenizer,
    splits: dict[str, Any],
    scans: Sequence[dict],
    hashes: dict[str, str],
) -> dict[str, Any]:
    left_out = {reason: len(paths) for reason, paths in corpus.left_out.items()}
    if num_empty := sum(scan["num_empty"] for scan in scans):
        left_out["empty documents"] = num_empty
    return {
        "format": STORE_FORMAT,
        "version": STORE_VERSION,
        "split": "documents" if rule.tail_start is None else "tail",
        "dtype": token_dtype(tokenizer.vocab_size),
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "tokenizer": {"spec": request["tokenizer"], "sha256": tokenizer.fingerprint},
        "splits": splits,
        "sources": list(corpus.sources),
        "source_sha256": hashes,
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


def _scanned_bytes(scans: Sequence[dict], splits: Sequence[str] = SPLITS) -> int:
    return sum(scan[split]["num_bytes"] for scan in scans for split in splits)


def _choose_split(rule: SplitRule, scans: Sequence[dict]) -> SplitRule:
    """Returns a split by hash if that gives both splits documents, otherwise a split by position."""
    num_bytes = _scanned_bytes(scans)
    if num_bytes == 0:
        raise ValueError("the sources hold no text: every file or document in them is empty")
    if all(_scanned_bytes(scans, (split,)) for split in SPLITS):
        return rule
    tail_start = int(num_bytes * (1 - rule.fraction))
    if not 0 < tail_start < num_bytes:
        raise ValueError(
            f"{num_bytes} bytes of text are too few to hold out {rule.fraction:g} of them for validation: "
            "add text or change validation_fraction"
        )
    return replace(rule, tail_start=tail_start)


def _make_tokenizer(
    folder: Path, request: dict[str, Any], tasks: Sequence[UnitTask], rate: float, stages: Stages
) -> ByteTokenizer | BPETokenizer:
    """Loads the tokenizer of an earlier try, or makes it; BPE learns from a share `rate` of the training split."""
    if (folder / TOKENIZER_FILE).exists():
        return load_tokenizer(folder)
    kind, argument = parse_spec(request["tokenizer"])
    if kind == "byte":
        tokenizer = ByteTokenizer()
    elif kind == "hf":
        tokenizer = read_hf(argument, request.get("eot"))
    else:
        advance = stages(f"training {request['tokenizer']}", None)
        tokenizer = train_bpe(training_texts(tasks, rate), int(argument))
        advance(0)
    tokenizer.save(folder)
    return tokenizer


def _refuse_changed(files: Sequence[SourceFile], hashes: dict[str, str]) -> None:
    for file in files:
        status = os.stat(file.path)
        touched = (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns)
        if touched and (status.st_size != file.size or hashes.get(file.path) != sha256_file(Path(file.path))):
            raise ValueError(f"{file.path} changed while it was being read: run prepare again when it is complete")
