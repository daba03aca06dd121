"""Makes a token store from text. A run that is cut off is taken up where it stopped; a store appears whole or not."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from jaxtrain.data.prepare.passes import SHARD_TOKENS, UNIT_BYTES, build_store
from jaxtrain.data.prepare.progress import progress_bar
from jaxtrain.data.prepare.sources import PYTHON_STDLIB, SourceFile, find_sources
from jaxtrain.data.store import FORMAT, MANIFEST, TokenStore, open_store, partial_folder
from jaxtrain.data.tokenizer import parse_spec, read_hf
from jaxtrain.runtime.files import locked, read_json, sync_folder, write_json

CODE_VERSION = 1  # raise when the tokens made from the same request change


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str = "byte",
    validation_fraction: float = 0.02,
    text_field: str = "text",
    num_workers: int | None = None,
    progress: bool = True,
) -> TokenStore:
    """Tokenizes text into a new token store and opens it.

    A text file is one document and is held in memory whole, at up to 10 bytes a byte: give larger ones as .jsonl.

    Args:
      sources: files, folders, globs (text or .jsonl, also .gz), or `python-stdlib`.
      out: folder to make. One that the same call made before is left as it is and opened.
      tokenizer: `byte`, `bpe:VOCAB` (trained on the training split) or `hf:PATH`.
      validation_fraction: of the documents, chosen by hash; if that leaves a split empty, the last such fraction of
        the text.
      text_field: key of the document in a .jsonl line.
      num_workers: processes; None starts one per core. The store is the same for any number.
      progress: show a bar where stderr is a terminal.

    Raises:
      ValueError: sources that cannot be read or are too small, a bad option, or `out` taken; says what to do.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers must be above 0, or None for one per core; got {num_workers}")
    out = Path(os.path.abspath(Path(out).expanduser()))
    files = find_sources(sources)
    _refuse_inside_source(sources, out)
    request = _request(files, tokenizer, validation_fraction, text_field)
    if os.path.lexists(out):
        return _existing(out, request)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_folder(out)
    with locked(partial):
        _claim(partial, request)
        if not (partial / MANIFEST).exists():
            try:
                with progress_bar(progress) as bar:
                    build_store(partial, list(sources), files, request, num_workers, bar)
            except ValueError:  # the request itself is at fault: nothing here can serve another
                shutil.rmtree(partial)
                raise
        shutil.rmtree(partial / "units", ignore_errors=True)
        os.rename(partial, out)
        sync_folder(out.parent)
    return open_store(out, verify=False)


def _request(files: list[SourceFile], tokenizer: str, fraction: float, text_field: str) -> dict[str, Any]:
    """All that determines the store's tokens, as JSON holds it."""
    kind, argument = parse_spec(tokenizer)
    request = {
        "code_version": CODE_VERSION,
        "tokenizer": f"hf:{Path(argument).expanduser().absolute()}" if kind == "hf" else tokenizer,
        "hf_sha256": read_hf(argument).fingerprint if kind == "hf" else None,
        "validation_fraction": fraction,
        "text_field": text_field,
        "unit_bytes": UNIT_BYTES,
        "shard_tokens": SHARD_TOKENS,
        "files": [astuple(file) for file in files],
    }
    return json.loads(json.dumps(request))


def _refuse_inside_source(sources: Sequence[str], out: Path) -> None:
    for source in sources:
        folder = Path(os.path.abspath(Path(source).expanduser()))
        if source != PYTHON_STDLIB and folder.is_dir() and out.is_relative_to(folder):
            raise ValueError(f"the store {out} would lie in its own source folder {folder}: put it elsewhere")


def _existing(out: Path, request: dict[str, Any]) -> TokenStore:
    manifest = read_json(out / MANIFEST)
    if isinstance(manifest, dict) and manifest.get("format") == FORMAT and manifest.get("request") == request:
        return open_store(out, verify=False)
    raise ValueError(
        f"{out} exists and is not the token store of this request (same sources, tokenizer and options): "
        "choose another folder, or delete it"
    )


def _claim(partial: Path, request: dict[str, Any]) -> None:
    """Leaves the partial folder with work on this request only."""
    manifest = read_json(partial / MANIFEST)
    recorded = manifest.get("request") if isinstance(manifest, dict) else read_json(partial / "units" / "request.json")
    if recorded == request:
        return
    if recorded is None and any(path.name != "units" for path in partial.iterdir()):
        raise ValueError(f"{partial} is in the way and was not made by prepare: move it or delete it")
    if recorded is not None:
        print(f"discarding {partial}: unfinished work on a different request", file=sys.stderr)
    for path in partial.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (partial / "units").mkdir()
    write_json(partial / "units" / "request.json", request)
