"""Progress of a preparation: bars on a terminal, lines elsewhere."""

import io
import os
import threading

from prepare_helpers import DOCUMENTS, SMALL, SMALL_BYTES, write_jsonl

from jaxtrain.data.prepare.documents import plan_units
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.prepare.progress import show_progress
from jaxtrain.data.prepare.sources import find_sources


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal():
    stream = Terminal()
    with show_progress(True, stream) as stages:
        stages("tokenizing", [30, 10])(0)
        stages("training bpe:290", None)(0)
    assert "tokenizing" in stream.getvalue()
    assert "75%" in stream.getvalue()
    assert "training bpe:290" in stream.getvalue()


def test_progress_is_lines_off_a_terminal(tmp_path, capfd):
    class Lines(io.StringIO):
        def write(self, text):
            written.set()
            return super().write(text)

    written, stream = threading.Event(), Lines()
    with show_progress(True, stream, line_seconds=0.01) as stages:
        for sizes in ([30, 10], None):
            written.clear()
            advance = stages("tokenizing" if sizes else "training bpe:290", sizes)
            advance(0)
            assert written.wait(60)
            written.clear()
            assert written.wait(60)
    assert "tokenizing: 75%, 0 s" in stream.getvalue()
    assert "training bpe:290: 100%, 0 s" in stream.getvalue()
    written.clear()
    assert not written.wait(0.1)  # it ends with the block
    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    prepare([source], tmp_path / "store", tokenizer="bpe:290")
    assert capfd.readouterr() == ("", "")  # short stages print nothing


def test_every_stage_shows_progress(tmp_path):
    done: dict[str, list[int]] = {}

    def stages(description, sizes):
        return done.setdefault(description, []).append

    source = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    prepare([source], tmp_path / "store", tokenizer="bpe:290", num_workers=1, limits=SMALL, progress=stages)
    units = list(range(len(plan_units(find_sources([source])[0], SMALL_BYTES))))
    assert list(done) == [
        "choosing the split",
        "training bpe:290",
        "tokenizing",
        "writing train",
        "writing validation",
    ]
    assert list(done.values()) == [[0], [0], units, units, units]
    done.clear()
    os.utime(source, ns=(0, 0))
    prepare([source], tmp_path / "store", tokenizer="bpe:290", limits=SMALL, progress=stages)
    assert done == {"comparing the sources": [0]}
