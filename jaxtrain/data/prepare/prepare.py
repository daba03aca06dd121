"""Makes a token store from text. An interrupted run is resumed; a store appears whole or not at all."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from jaxtrain.data.prepare.formats import FORMATS
from jaxtrain.data.prepare.passes import DEFAULT_LIMITS, Corpus, Limits, units_folder, write_store
from jaxtrain.data.prepare.progress import Stages, show_progress
from jaxtrain.data.prepare.sources import PYTHON_STDLIB, SourceFile, content_hash, describe_left_out, find_sources
from jaxtrain.data.prepare.streams import CHUNK_BYTES
from jaxtrain.data.prepare.tasks import run_format_file
from jaxtrain.data.store import STORE_FORMAT, STORE_MANIFEST, TokenStore, open_store, partial_folder
from jaxtrain.data.tokenizer import parse_spec, read_hf
from jaxtrain.fields import is_url, require_local
from jaxtrain.runtime.files import empty_folder, locked, read_json, sha256_file, sync_folder
from jaxtrain.runtime.terminal import echo

STDIN = "-"
CODE_VERSION = 3  # raise when the tokens made from the same request change


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str = "byte",
    eot: str | None = None,
    validation: Sequence[str] = (),
    validation_fraction: float = 0.02,
    text_field: str = "text",
    formats: str | Path | None = None,
    num_workers: int | None = None,
    lock: bool = True,
    progress: bool | Stages = True,
    limits: Limits = DEFAULT_LIMITS,
) -> TokenStore:
    """Tokenizes text into a new token store and opens it.

    Args:
      sources: files, folders, globs, URLs, `python-stdlib`, or `-` for standard input. Each file is read by its format,
        see docs/data.md.
      out: folder of the store. A finished store of the same bytes and options is opened.
      tokenizer: `byte`, `bpe:VOCAB` (trained on the training split) or `hf:PATH`.
      eot: text of the end-of-text token of an `hf:PATH` tokenizer; None looks for the usual names.
      validation: sources of the validation split, which then is no share of `sources`.
      validation_fraction: share of the documents, chosen by hash, or of the end of the text if a split would be empty.
      text_field: field or column that holds the text of a record.
      formats: Python file that adds to `formats.FORMATS`; None adds none.
      num_workers: processes; None is one a core. The store is the same for any number.
      lock: False takes no lock on the unfinished store, for a file system that has none.
      progress: show progress on stderr, or a function that starts a stage, see `progress.Stages`.
      limits: sizes of the work.

    Raises:
      ValueError: sources that cannot be read or are too small, a bad option, or another folder at `out`.
    """
    _check_options(out, tokenizer, validation_fraction, num_workers)
    if formats is not None:
        if not (file := Path(formats).expanduser()).is_file():
            raise ValueError(f"no file {file}: formats is a Python file that adds to FORMATS")
        run_format_file(str(file))
    out = Path(os.path.abspath(Path(out).expanduser()))
    with _spooled_input(sources, out) as (names, spooled):
        files, left_out = find_sources(names, validation)
        files = [replace(file, source=STDIN) if file.source == spooled else file for file in files]
        corpus = Corpus((*sources, *validation), files, left_out)
        _refuse_inside_source([*names, *validation], out)
        options = {"validation_fraction": validation_fraction, "text_field": text_field}
        request = _make_request(corpus.files, {**_tokenizer_request(tokenizer, eot), **options}, limits)
        shown = show_progress(progress) if isinstance(progress, bool) else nullcontext(progress)
        with shown as stages:
            if os.path.lexists(out):
                return _open_existing(out, request, stages)
            with unfinished_store(out, lock=lock) as partial:
                _fill(partial, corpus, request, limits=limits, num_workers=num_workers, stages=stages)
    store = open_store(out, verify=False)
    if line := describe_left_out(store.manifest.get("left_out", {}), left_out):
        echo(line, file=sys.stderr)
    return store


def _fill(partial: Path, corpus: Corpus, request: dict[str, Any], **options: Any) -> None:
    _discard_other_work(partial, request)
    if not (partial / STORE_MANIFEST).exists():
        try:
            write_store(partial, corpus, request, **options)
        except ValueError:  # the request itself is at fault, and no other can use the work
            shutil.rmtree(partial)
            raise
    shutil.rmtree(units_folder(partial, request), ignore_errors=True)


@contextmanager
def unfinished_store(out: Path, *, lock: bool) -> Iterator[Path]:
    """Yields the locked folder of an unfinished store, which gets the name of the store at the end of the block."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_folder(out)
    with locked(partial, lock=lock):
        yield partial
        os.rename(partial, out)
        sync_folder(out.parent)


@contextmanager
def _spooled_input(sources: Sequence[str], out: Path) -> Iterator[tuple[Sequence[str], str]]:
    """Copies standard input, if `-` is a source, to a file beside the store, for the block.

    The file is named after its content: after an interruption the same input resumes.

    Yields:
      The sources with the file in place of `-`, and its path.
    """
    if isinstance(sources, str) or STDIN not in sources:
        yield sources, ""
        return
    if sys.stdin.isatty():
        raise ValueError("the source - is standard input, which is a terminal: pipe text into it, or name files")
    folder = out.parent / f".{out.name}.stdin"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        digest = hashlib.sha256()
        with open(folder / "partial", "wb") as stream:
            while data := sys.stdin.buffer.read(CHUNK_BYTES):
                digest.update(data)
                stream.write(data)
        path = folder / digest.hexdigest()
        os.rename(folder / "partial", path)
        os.utime(path, ns=(0, 0))
        yield [str(path) if source == STDIN else source for source in sources], str(path)
    finally:
        shutil.rmtree(folder)


def _check_options(out: str | Path, tokenizer: str, validation_fraction: float, num_workers: int | None) -> None:
    require_local(out, "out")
    require_local(tokenizer, "tokenizer")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers must be 1 or more, or None for one a core; got {num_workers}")


def _make_request(files: Sequence[SourceFile], options: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Returns all that determines the store's tokens, as JSON holds it."""
    request = {
        **options,
        "code_version": CODE_VERSION,
        "unit_bytes": limits.unit_bytes,
        "shard_tokens": limits.shard_tokens,
        "files": [astuple(file) for file in files],
    }
    if custom := {FORMATS[file.format].file for file in files} - {None}:
        request["format_files"] = sorted(sha256_file(Path(file)) for file in custom)
    return json.loads(json.dumps(request))


def _tokenizer_request(spec: str, eot: str | None) -> dict[str, Any]:
    """Returns the part of a request that determines the tokenizer."""
    kind, argument = parse_spec(spec)
    if kind != "hf":
        if eot is not None:
            raise ValueError(f"eot names the end-of-text token of an hf:PATH tokenizer, not of {spec}: leave it out")
        return {"tokenizer": spec, "hf_sha256": None}
    fingerprint = read_hf(argument, eot).fingerprint
    path = f"hf:{Path(argument).expanduser().absolute()}"
    return {"tokenizer": path, "hf_sha256": fingerprint, **({"eot": eot} if eot else {})}


def _refuse_inside_source(sources: Sequence[str], out: Path) -> None:
    for source in sources:
        folder = Path(os.path.abspath(Path(source).expanduser()))
        if source != PYTHON_STDLIB and not is_url(source) and folder.is_dir() and out.is_relative_to(folder):
            raise ValueError(f"the store {out} would lie in the source folder {folder}: give another --out")


def _open_existing(out: Path, request: dict[str, Any], stages: Stages) -> TokenStore:
    manifest = read_json(out / STORE_MANIFEST)
    is_store = isinstance(manifest, dict) and manifest.get("format") == STORE_FORMAT
    if is_store and _is_same_request(manifest, request, stages):
        return open_store(out, verify=False)
    raise ValueError(
        f"{out} exists and is not the token store of this request (same text, tokenizer and options): "
        "choose another folder, or delete it"
    )


def _is_same_request(manifest: dict[str, Any], request: dict[str, Any], stages: Stages) -> bool:
    """Compares bytes and options; where the sources and the tokenizer lie, and the dates of files, are free."""
    free = {"code_version", "files"} | ({"tokenizer"} if request["hf_sha256"] else set())
    try:
        recorded = manifest["request"]
        if any(recorded.get(name) != request.get(name) for name in (recorded.keys() | request.keys()) - free):
            return False
        old_files, new_files = ([f for f in files if f[2] > 0] for files in (recorded["files"], request["files"]))
        advance = stages("comparing the sources", [file[2] for file in new_files])
        for number, (old, new) in enumerate(zip(old_files, new_files, strict=True)):
            same = old[1:3] == new[1:3] and (old[6:] or [""]) == new[6:]
            if not same or (old[:4] != new[:4] and manifest["source_sha256"][old[0]] != content_hash(new[0])):
                return False
            advance(number)
        return True
    except (AttributeError, LookupError, TypeError, ValueError):  # not a manifest that `prepare` wrote
        return False


def _discard_other_work(partial: Path, request: dict[str, Any]) -> None:
    """Empties the partial folder unless its work is on this request."""
    manifest, units = read_json(partial / STORE_MANIFEST), units_folder(partial, request)
    finished = isinstance(manifest, dict) and manifest.get("request") == request
    if finished or units.is_dir():
        return
    if any(partial.iterdir()):
        if manifest is None and not any(partial.glob("units-*")):
            raise ValueError(f"{partial} is in the way and was not made by prepare: move it or delete it")
        echo(f"discarding {partial}: unfinished work on a different request", file=sys.stderr)
    empty_folder(partial)
    units.mkdir()
