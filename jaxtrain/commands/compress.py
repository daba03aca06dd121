"""Commands that compress: compress, decompress, bpb."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from jaxtrain.commands.model import Checkpoint, RunOptions, model_of
from jaxtrain.fields import LocalPath, Positive
from jaxtrain.runtime.files import read_file, write_bytes
from jaxtrain.runtime.flags import Command
from jaxtrain.runtime.terminal import echo

SUFFIX = ".jxz"
File = Annotated[str, LocalPath("FILE")]


@dataclass(frozen=True, kw_only=True)
class CompressOptions(RunOptions):
    """Options of `jaxtrain compress`."""

    positional = "run file"
    file: File  # file to compress, of any bytes
    out: File | None = None  # compressed file; none takes FILE.jxz; also -o
    step: Checkpoint | None = None  # checkpoint; best has the lowest validation loss; none takes the newest
    # parts that are coded side by side: more are faster and make the file a little larger; none takes up to 64
    streams: Positive[int] | None = None


def run_compress(options: CompressOptions) -> int:
    """Compresses a file with the probabilities of a trained model, without loss."""
    from jaxtrain.inference.compress import compress

    data = read_file(options.file)
    out = _new_file(options.out or options.file + SUFFIX)
    work = lambda model, progress: compress(model, data, num_streams=options.streams, progress=progress)  # noqa: E731
    seconds, made = _timed(options, work, "compressing")
    write_bytes(out, made)
    rate = f", {8 * len(made) / len(data):.4f} bits per byte" if data else ""
    echo(f"{len(data):,} bytes to {len(made):,}{rate}, {len(data) / seconds / 1e3:.3g} kB/s")
    echo(f"compressed: {out}")
    return 0


@dataclass(frozen=True, kw_only=True)
class DecompressOptions(RunOptions):
    """Options of `jaxtrain decompress`."""

    positional = "run file"
    file: File  # file that `jaxtrain compress` made with this run
    out: File | None = None  # file for the original; none takes FILE without .jxz; also -o
    step: Checkpoint | None = None  # checkpoint that compressed it; none takes the newest


def run_decompress(options: DecompressOptions) -> int:
    """Restores the original of a compressed file, with the model that compressed it."""
    from jaxtrain.inference.compress import decompress
    from jaxtrain.inference.jxz import unpack_file

    if options.out is None and not options.file.endswith(SUFFIX):
        raise ValueError(f"{options.file} does not end in {SUFFIX}: name the new file with --out")
    out = _new_file(options.out or options.file.removesuffix(SUFFIX))
    data = read_file(options.file)
    try:
        unpack_file(data)  # a damaged file is an error before the model is read
        work = lambda model, progress: decompress(model, data, progress=progress)  # noqa: E731
        seconds, made = _timed(options, work, "decompressing")
    except ValueError as error:
        raise ValueError(f"{options.file}: {error}") from None
    write_bytes(out, made)
    echo(f"{len(data):,} bytes to {len(made):,}, {len(made) / seconds / 1e3:.3g} kB/s")
    echo(f"decompressed: {out}")
    return 0


@dataclass(frozen=True, kw_only=True)
class BpbOptions(RunOptions):
    """Options of `jaxtrain bpb`."""

    positional = "run files"
    files: tuple[File, ...]  # files that the model was not trained on
    step: Checkpoint | None = None  # checkpoint; best has the lowest validation loss; none takes the newest
    json: bool = False  # print one JSON object


def run_bpb(options: BpbOptions) -> int:
    """Compares the bits per byte of a model, gzip, bzip2, xz and zstd on the same files."""
    from jaxtrain.inference.bits import compare_files
    from jaxtrain.monitoring.tables import format_table

    texts = {file: read_file(file) for file in options.files}
    if empty := [file for file, text in texts.items() if not text]:
        raise ValueError(f"{empty[0]} is empty, and has no bits per byte: leave it out")
    _, rows = _timed(options, lambda model, progress: compare_files(model, texts), "")
    if options.json:
        echo(json.dumps(rows), verbatim=True)
        return 0
    columns = list(next(iter(rows.values())))
    cells = [[file, *(_cell(row[name]) for name in columns)] for file, row in rows.items()]
    echo(format_table(("bits per byte", *columns), cells))
    echo("model + itself: with the model's parameters, float32, counted as a part of the file")
    return 0


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _timed(options: Any, work: Any, title: str) -> tuple[float, Any]:
    """Loads the model and runs `work(model, progress)`. Returns its seconds, without the loading, and its result."""
    from rich.console import Console
    from rich.progress import Progress

    from jaxtrain.inference.load import load
    from jaxtrain.runtime.compile_cache import compile_cache

    with compile_cache():
        model = load(options.run, options.step, model=model_of(options), store=options.data_store)
        console = Console(file=sys.stderr)
        with Progress(console=console, transient=True, disable=not (title and console.is_terminal)) as bar:
            task = bar.add_task(title, total=None)
            begin = time.perf_counter()
            result = work(model, lambda done, total: bar.update(task, completed=done, total=total))
            return time.perf_counter() - begin, result


def _new_file(name: str) -> Path:
    path = Path(name)
    if path.exists():
        raise ValueError(f"{name} exists: give another file with --out")
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent}: create it, or give another file with --out")
    return path


COMMANDS = [
    Command("compress", CompressOptions, run_compress, "compress runs/first notes.txt -o notes.jxz"),
    Command("decompress", DecompressOptions, run_decompress, "decompress runs/first notes.jxz -o notes.txt"),
    Command("bpb", BpbOptions, run_bpb, "bpb runs/first chapter.txt"),
]
