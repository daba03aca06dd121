"""The HTML report: whole, self-contained, escaped."""

import base64
from html.parser import HTMLParser

import pytest

from jaxtrain.config import Config, DataConfig, OptimConfig, TrainConfig
from jaxtrain.monitoring.metrics import JsonLines
from jaxtrain.monitoring.report import norm_threshold, write_report
from jaxtrain.runtime.config_files import to_json

EVAL = {
    "nll": 1.25,
    "perplexity": 3.49,
    "bits_per_token": 1.803,
    "bits_per_byte": 1.81,
    "gzip_bits_per_byte": 2.5,
    "tokens": 12345,
}


class Page(HTMLParser):
    """Collects the text and the images, and checks that tags match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.images, self.tags = [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def cell(self, name):
        return self.words[self.words.index(name) + 1]


def make_run(folder, num_steps):
    folder.mkdir()
    data = DataConfig(sources=("<script>alert(1)</script>",))
    config = Config(data=data, optim=OptimConfig(clip_norm=0.25, b2=0.9), train=TrainConfig(steps=2000))
    (folder / "config.json").write_text(to_json(config))
    with JsonLines(folder / "metrics.jsonl") as writer:
        for step in range(1, num_steps + 1):
            fields = {"nll": 5 / step, "loss": 5.5 / step, "grad_norm": 0.5, "learning_rate": 1e-3}
            writer.step(step, dict(attempt=2, tokens_seen=1000 * step, tokens_per_second=51234.6, **fields))
    return folder


def test_report_has_the_run_in_one_file(tmp_path):
    run = make_run(tmp_path / "a <i> b", 20)
    (run / "sample.txt").write_text("if a < b: </pre> & c")
    with JsonLines(run / "metrics.jsonl") as writer:
        writer.event("eval", "", dict(step=10, **{**EVAL, "nll": 9.0}))
        writer.event("eval", "", dict(step=20, **EVAL))
        writer.event("stop", "", dict(step=20, sample="sample.txt", reason="<b>", seconds=3801.0))
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.tags.isdisjoint({"link", "b", "i"})
    (image,) = page.images
    assert base64.b64decode(image.removeprefix("data:image/png;base64,")) == (run / "report.png").read_bytes()
    last_step, last_eval = (page.words.index(title) for title in ("Last step", "Last evaluation"))
    shown = dict(zip(page.words, page.words[1:], strict=False))
    assert page.words.count("a <i> b") == 2
    assert last_step < page.words.index("0.25") < last_eval  # nll 5 / 20
    assert page.words.index("1.25") > last_eval
    assert shown["step"] == "20"
    assert page.cell("tokens per second") == "51,235"
    assert page.cell("perplexity") == "3.49"
    assert page.cell("bits per byte") == "1.81"
    assert page.cell("gzip bits per byte") == "2.5"
    assert page.cell("tokens") == "12,345"
    assert "if a < b: </pre> & c" in page.words
    assert "step=20, sample=sample.txt, reason=<b>, seconds=1h03m" in page.words
    assert any("clip_norm=0.25" in word and "b2=0.9" in word for word in page.words)
    assert any("<script>alert(1)</script>" in word for word in page.words)


def test_report_of_one_step_without_events(tmp_path):
    page = Page(write_report(make_run(tmp_path / "run", 1)).read_text())
    assert page.cell("step") == "1 of 2,000"
    assert page.cell("nll (nats per token)") == "5"
    assert {"Last evaluation", "Events", "Sample"}.isdisjoint(page.words)
    assert len(page.images) == 1


@pytest.mark.parametrize(("clipping", "threshold"), [("global_norm", 0.25), ("zclip", 0.25), ("adaptive", None)])
def test_the_threshold_comes_from_the_config(clipping, threshold):
    config = Config(data=DataConfig(store="any"), optim=OptimConfig(clip_norm=0.25, clipping=clipping))
    assert norm_threshold(config) == threshold


def test_skipped_steps_are_counted(tmp_path):
    run = make_run(tmp_path / "run", 3)
    assert "skipped steps" not in Page(write_report(run).read_text()).words
    with JsonLines(run / "metrics.jsonl") as writer:
        for step in (4, 5):
            writer.step(step, {"nll": 1.0, "grad_norm": 1e3, "learning_rate": 1e-3, "skipped": 1.0})
    assert Page(write_report(run).read_text()).cell("skipped steps") == "2"


def test_a_sample_stays_inside_the_run(tmp_path):
    run = make_run(tmp_path / "run", 1)
    (tmp_path / "secret.txt").write_text("elsewhere")
    with JsonLines(run / "metrics.jsonl") as writer:
        writer.event("stop", "", dict(sample="../secret.txt"))
    assert "elsewhere" not in write_report(run).read_text()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no logged step"):
        write_report(make_run(tmp_path / "run", 0))
