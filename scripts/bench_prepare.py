#!/usr/bin/env python
"""Speed and memory of `jaxtrain prepare` on a synthetic corpus of JSON lines, and whether a document was lost.

The corpus draws words of Python's documentation and source code by Zipf's law. `prepare` runs as a command; its peak
memory is the largest sum over its processes. Every document of the store is compared with the corpus by a checksum.

  python scripts/bench_prepare.py --gigabytes 4 --tokenizers byte bpe:8192 --json prepare.json
"""

import json
import os
import pydoc_data.topics
import re
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from benchmark import Table, parser, report

from jaxtrain.data.store import Split, open_store
from jaxtrain.data.tokenizer import ByteTokenizer

_POLL_SECONDS = 0.2
_DOCUMENT_WORDS = (20, 1000)


def write_corpus(file: Path, num_bytes: int) -> tuple[int, int, int]:
    """Writes the corpus; returns the number of documents, their UTF-8 bytes, and the sum of their CRC-32."""
    texts = [*pydoc_data.topics.topics.values(), *(path.read_text() for path in Path(os.__file__).parent.glob("*.py"))]
    words = np.array(sorted({f"{word} " for text in texts for word in re.findall(r"\S+", text)}), object)
    rng = np.random.default_rng(0)
    words = rng.permutation(words)
    documents = size = checksum = 0
    with open(file, "w") as stream:
        while size < num_bytes:
            drawn = words[(len(words) ** rng.random(1 << 17)).astype(np.int64) - 1]  # density 1 / rank
            for part in np.split(drawn, np.cumsum(rng.integers(*_DOCUMENT_WORDS, 250))):
                text = f"{documents}: {''.join(part)}"
                stream.write(json.dumps({"text": text}) + "\n")
                data = text.encode()
                documents, size, checksum = documents + 1, size + len(data), checksum + zlib.crc32(data)
    return documents, size, checksum


def measure(command: list[str]) -> tuple[float, float, float]:
    """Runs a command; returns its seconds, CPU seconds, and the peak memory (bytes) of all its processes together."""
    begin, peak, used = time.perf_counter(), 0.0, _cpu_seconds()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, sum(_resident(number) for number in _family(process.pid)))
        time.sleep(_POLL_SECONDS)
    if process.returncode:
        sys.exit(f"error: prepare ended with exit code {process.returncode}")
    return time.perf_counter() - begin, _cpu_seconds() - used, peak


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _family(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(number for child in children for number in _family(int(child)))]


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def checksum_of(split: Split) -> int:
    """Returns the sum of the CRC-32 of a byte-level split's documents."""
    ends = np.append(split.document_starts[1:], split.num_tokens).tolist()
    total = 0
    for start, end in zip(split.document_starts.tolist(), ends, strict=True):
        total += zlib.crc32(split.read(start + 1, end - start - 1).astype(np.uint8))
    return total


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gigabytes", type=float, default=1.0, help="UTF-8 text of the corpus")
    arguments.add_argument("--tokenizers", nargs="+", default=["byte", "bpe:8192"], metavar="SPEC")
    arguments.add_argument("--folder", type=Path, help="folder for the corpus and the stores; None: a temporary one")
    options = arguments.parse_args()
    table = Table(
        "Text to token store",
        {"tokenizer": "", "text GB": ".2f", "seconds": ".1f", "MB/s": ".1f"}
        | {"MB/CPU s": ".1f", "peak GB": ".2f", "lost": ",", "same": ""},
        notes=[
            "With the training of the tokenizer. Same (bytes only): the documents have the checksums of the corpus."
        ],
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        corpus = Path(folder, "corpus.jsonl")
        documents, size, checksum = write_corpus(corpus, int(options.gigabytes * 1e9))
        for number, spec in enumerate(options.tokenizers):
            out = Path(folder, f"store{number}")
            command = [sys.executable, "-m", "jaxtrain.cli", "prepare", str(corpus), "--out", str(out)]
            seconds, cpu_seconds, peak = measure([*command, "--tokenizer", spec])
            store = open_store(out)
            splits = (store.train, store.validation)
            lost = documents - sum(split.num_documents for split in splits)
            same = "-"
            if isinstance(store.tokenizer, ByteTokenizer):
                same = "yes" if sum(map(checksum_of, splits)) == checksum else "no"
            rates = (size / 1e6 / seconds, size / 1e6 / cpu_seconds)
            table.rows.append([spec, size / 1e9, seconds, *rates, peak / 1e9, lost, same])
            print(table.text(), flush=True)
    report(options, [table])


if __name__ == "__main__":
    main()
