"""Fills the folder of a new token store: scan, choose the split, make the tokenizer, encode, join, manifest."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtrain.data.prepare.documents import SPLITS, TRAIN, SplitRule, plan_units
from jaxtrain.data.prepare.progress import Bar
from jaxtrain.data.prepare.shards import write_documents, write_shards
from jaxtrain.data.prepare.sources import SourceFile
from jaxtrain.data.prepare.tasks import run_tasks, worker_pool
from jaxtrain.data.prepare.units import (
    EncodeTask,
    ScanTask,
    encode_unit,
    scan_unit,
    token_dtype,
    training_texts,
    unit_file,
)
from jaxtrain.data.store import DTYPES, FORMAT, MANIFEST, VERSION
from jaxtrain.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from jaxtrain.data.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer, parse_spec, read_hf, train_bpe
from jaxtrain.runtime.files import sync, sync_folder, write_json

UNIT_BYTES = 1 << 25  # of input, for one worker at a time
SHARD_TOKENS = 1 << 29  # 1 or 2 GiB a shard
BPE_SAMPLE_BYTES = 200_000_000  # of text that a BPE tokenizer is trained on


def build_store(
    folder: Path,
    sources: Sequence[str],
    files: Sequence[SourceFile],
    request: dict[str, Any],
    num_workers: int | None,
    bar: Bar,
) -> None:
    """Makes the store of a request in `folder`, which has a folder `units` with whatever is done already.

    Args:
      folder: of the unfinished store.
      sources: as the user named them, for the manifest.
      files: what they stand for.
      request: made by `prepare`; kept in the manifest.
      num_workers: processes; None starts one per core.
      bar: see `progress.progress_bar`.

    Raises:
      ValueError: sources that cannot be read, are too small to split, or changed meanwhile.
    """
    units = plan_units(files, request["unit_bytes"])
    sizes = [sum(piece.stop - piece.start for piece in unit) for unit in units]
    results = [folder / "units" / f"{number:06d}" for number in range(len(units))]
    rule = SplitRule(request["validation_fraction"])
    with worker_pool(num_workers, len(units)) as pool:
        scan_tasks = [ScanTask(unit, rule, request["text_field"]) for unit in units]
        scan_results = [path.with_suffix(".scan.json") for path in results]
        scans = run_tasks(scan_unit, scan_tasks, scan_results, pool, bar("reading", sizes))
        rule = _choose_split(rule, scans)
        tasks, offset = [], 0
        for number, (unit, scan) in enumerate(zip(units, scans, strict=True)):
            tasks.append(EncodeTask(unit, number, offset, rule, request["text_field"], str(folder)))
            offset += _scanned_bytes([scan])
        train_bytes = _scanned_bytes(scans, (TRAIN,)) if rule.tail_start is None else rule.tail_start
        tokenizer = _make_tokenizer(folder, request["tokenizer"], tasks, train_bytes, bar)
        tasks = [replace(task, dtype=token_dtype(tokenizer.vocab_size)) for task in tasks]
        encode_results = [path.with_suffix(".json") for path in results]
        counts = run_tasks(encode_unit, tasks, encode_results, pool, bar("tokenizing", sizes))
    _refuse_changed(files)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "split": "documents" if rule.tail_start is None else "tail",
        "dtype": token_dtype(tokenizer.vocab_size),
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "tokenizer": {"spec": request["tokenizer"], "sha256": tokenizer.fingerprint},
        "splits": {split: _join(folder, split, counts, request["shard_tokens"], tasks[0].dtype) for split in SPLITS},
        "sources": list(sources),
        "source_sha256": {path: digest for scan in scans for path, digest in scan["sha256"].items()},
        "request": request,
    }
    write_json(folder / MANIFEST, manifest)


def _scanned_bytes(scans: Sequence[dict], splits: Sequence[str] = SPLITS) -> int:
    return sum(scan[split]["num_bytes"] for scan in scans for split in splits)


def _choose_split(rule: SplitRule, scans: Sequence[dict]) -> SplitRule:
    """By hash if that gives both splits documents, otherwise the tail."""
    num_bytes = _scanned_bytes(scans)
    if num_bytes == 0:
        raise ValueError("the sources hold no text: every file or document in them is empty")
    if all(_scanned_bytes(scans, (split,)) for split in SPLITS):
        return rule
    tail_start = int(num_bytes * (1 - rule.fraction))
    if not 0 < tail_start < num_bytes:
        raise _too_small(num_bytes, rule)
    return replace(rule, tail_start=tail_start)


def _too_small(num_bytes: int, rule: SplitRule) -> ValueError:
    return ValueError(
        f"{num_bytes} bytes of text are too few to hold out {rule.fraction:g} of them for validation: "
        "add text or change validation_fraction"
    )


def _make_tokenizer(
    folder: Path, spec: str, tasks: Sequence[EncodeTask], train_bytes: int, bar: Bar
) -> ByteTokenizer | BPETokenizer:
    """The tokenizer of the store: as an earlier try left it, or made now from the training split."""
    if (folder / TOKENIZER_FILE).exists():
        return load_tokenizer(folder)
    kind, argument = parse_spec(spec)
    if kind == "byte":
        tokenizer = ByteTokenizer()
    elif kind == "hf":
        tokenizer = read_hf(argument)
    else:
        advance = bar(f"training {spec}", [1])
        texts = training_texts(tasks, min(1.0, BPE_SAMPLE_BYTES / train_bytes))
        tokenizer = train_bpe(texts, int(argument))
        advance(0)
    tokenizer.save(folder / "units")
    with open(folder / "units" / TOKENIZER_FILE, "rb+") as stream:
        sync(stream)
    os.replace(folder / "units" / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    sync_folder(folder)
    return tokenizer


def _join(folder: Path, split: str, counts: Sequence[dict], shard_tokens: int, dtype: str) -> dict[str, Any]:
    """Writes a split's shards and document starts; returns its part of the manifest."""
    num_units, starts, num_tokens = len(counts), [], 0
    for number, count in enumerate(counts):
        starts.append((unit_file(folder / "units", number, split, "npy"), num_tokens))
        num_tokens += count[split]["num_tokens"]
    if num_tokens == 0:  # the whole text is less than a character each
        raise ValueError(f"the text is too small to split: the {split} split has no document; add text")
    unit_files = [unit_file(folder / "units", number, split, "bin") for number in range(num_units)]
    return {
        "num_tokens": num_tokens,
        "num_bytes": sum(count[split]["num_bytes"] for count in counts),
        "num_documents": sum(count[split]["num_documents"] for count in counts),
        "shards": write_shards(folder, split, unit_files, DTYPES[dtype].itemsize, shard_tokens),
        "documents_sha256": write_documents(folder, split, starts),
    }


def _refuse_changed(files: Sequence[SourceFile]) -> None:
    for file in files:
        status = os.stat(file.path)
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise ValueError(f"{file.path} changed while it was being read: run prepare again when it is complete")
