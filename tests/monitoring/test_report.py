"""The HTML report: whole, self-contained, escaped, small; and how it looks to a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxtrain.cli import main
from jaxtrain.config import Config, DataConfig, OptimConfig, TrainConfig
from jaxtrain.monitoring.curves import run_curves
from jaxtrain.monitoring.metrics import JsonLines
from jaxtrain.monitoring.report import write_report
from jaxtrain.monitoring.sentences import sentence
from jaxtrain.runtime.config_files import to_json

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u2028 & 'quoted'"
EVAL = {"nll": 1.25, "perplexity": 3.49, "bits_per_token": 1.803, "bits_per_byte": 1.81, "gzip_bits_per_byte": 2.5}


class Page(HTMLParser):
    """Collects the words, tags and scripts of a page, and checks that tags match."""

    def __init__(self, path):
        super().__init__()
        self.open, self.words, self.tags, self.scripts = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []
        self.data = json.loads(next(text for attributes, text in self.scripts if "id" in attributes))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]
        if tag == "script":
            self.scripts.append([dict(attrs), ""])
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1][1] += data
        else:
            self.words.append(data)

    def cell(self, name):
        return self.words[self.words.index(name) + 1]


def make_run(folder, num_steps=40, every=1, name="a", **optim):
    """A run of two attempts with every kind of record, and text that would like to be markup."""
    folder.mkdir(parents=True)
    data = DataConfig(sources=(HOSTILE.replace("\u2028", ""),))
    config = Config(
        data=data,
        optim=OptimConfig(**{"clip_norm": 0.25, "warmup_steps": 1} | optim),
        train=TrainConfig(steps=2 * num_steps or 2),
    )
    (folder / "config.json").write_text(to_json(config))
    rng = np.random.default_rng(0)
    with JsonLines(folder / "metrics.jsonl") as writer:
        about = {"tokenizer": f"hf:{HOSTILE}", "data": "/stores/books", "parameters": 1_234_567, "commit": "abc123"}
        writer.event("start", "", dict(step=0, attempt=1, devices=8, device="TPU v5e", train_tokens=10**6, **about))
        for step in range(every, num_steps + 1, every):
            if step == num_steps // 2:
                writer.event("resume", "", dict(step=step - every, attempt=2, **about))
                writer.event(
                    "finding",
                    "",
                    dict(name="loss_rising", severity="warning", step=step, evidence=HOSTILE, remedy=HOSTILE),
                )
                writer.event("eval", "", dict(step=step, **{**EVAL, "nll": 0.5}))
            fields = {
                "nll": 5 / step,
                "loss": 5.5 / step,
                "grad_norm": float(np.exp(rng.normal())),
                "learning_rate": 1e-3,
            }
            fields |= {"steps": every, "clipped": every // 2, "skipped": float(step == 3 * every), "grad_norm_max": 9.0}
            fields |= {"update_norm": 0.1, "param_norm": 10.0, "clip_factor": 0.9, "accuracy": 0.5}
            if step % 10 == 0:
                fields |= {"layer_grad_norm": [1.0, 2.0], "layer_update_ratio": [1e-3, float("nan")]}
            timing = {"tokens_per_second": 51234.6, "step_seconds": 0.02, "tokens_seen": 1000 * step}
            writer.step(step, dict(attempt=1 if step < num_steps // 2 else 2, **timing, **fields))
        writer.event("eval", "", dict(step=num_steps, **EVAL))
        writer.event("saved", "", dict(step=num_steps, bytes_hashed=[1500, 500]))
        writer.event("stop", "", dict(step=num_steps, sample="sample.txt", reason=HOSTILE))
    (folder / "sample.txt").write_text(f"if a < b: </pre> & c {HOSTILE}")
    return folder


def test_a_report_shows_the_run(tmp_path):
    run = make_run(tmp_path / "a <i> b")
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    assert page.words.count("a <i> b") == 2
    assert (page.cell("validation loss"), page.cell("parameters")) == ("1.2500", "1,234,567")
    assert page.cell("tokenizer") == f"hf:{HOSTILE}"  # of the run
    assert page.cell("data.tokenizer") == "byte"  # of the sources
    assert page.cell("data") == "/stores/books"
    assert page.cell("steps") == "40 of 80"
    assert page.cell("skipped steps") == "1"
    assert page.cell("commit") == "abc123"
    assert page.cell("gzip bits per byte") == "2.5"
    assert page.cell("optim.clip_norm") == "0.25"
    assert "Saved at step 40: 2.00 kB" in page.words
    (drawn,) = page.data["runs"]
    assert drawn["threshold"] == 0.25
    assert drawn["curves"]["x"]["step"] == list(range(1, 41))
    assert drawn["curves"]["y"]["nll"][:2] == [5, 2.5]
    assert drawn["curves"]["validation"]["nll"] == [0.5, 1.25]
    assert drawn["curves"]["layers"]["layer_update_ratio"]["values"][0] == [0.001, None]
    assert sum(drawn["curves"]["histogram"]["counts"]) == 40
    kinds = {mark["kind"]: mark["step"] for mark in drawn["marks"]}
    assert kinds == {"restart": 19, "stop": 40, "save": 40, "validation": 40, "finding": 20, "skip": 3}


def test_a_token_store_decides_on_the_tokenizer(tmp_path):
    """The config of a run with a store says byte, its default; older runs do not name theirs at the start."""
    run = make_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"] |= {"store": "/stores/books", "sources": []}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace('"tokenizer"', '"other"'))
    for saved, shown in (('{"type": "byte"}', "byte"), ('{"model": {"type": "BPE"}}', "tokenizer.json")):
        (run / "tokenizer.json").write_text(saved)
        page = Page(write_report(run))
        assert page.cell("tokenizer") == shown
        assert "data.tokenizer" not in page.words


def test_text_of_users_is_text(tmp_path):
    """Names, findings, reasons, samples and config values; only our own scripts may run, by their hash."""
    page_file = write_report(make_run(tmp_path / HOSTILE.replace("/", "_")))
    page = Page(page_file)
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert {"link", "iframe", "i", "b"}.isdisjoint(page.tags)
    assert any("</pre> & c" in word for word in page.words)
    policy = re.search('Content-Security-Policy" content="([^"]*)"', page_file.read_text()).group(1)
    assert policy.startswith("default-src 'none'")
    assert policy.count("'sha256-") == 2
    assert "http" not in policy


def test_several_runs_are_compared(tmp_path, capsys):
    folders = [make_run(tmp_path / "runs" / name, peak_lr=rate) for name, rate in (("x", 1e-3), ("y", 2e-3))]
    (tmp_path / "runs/broken").mkdir()
    (tmp_path / "runs/broken/config.json").write_text("{")
    for given in (folders, [tmp_path / "runs"]):
        path = write_report(given)
        assert path == tmp_path / "runs/report.html"
        page = Page(path)
        assert [run["name"] for run in page.data["runs"]] == ["x", "y"]
        assert page.words.count("optim.peak_lr") == 1
        assert "optim.clip_norm" not in page.words  # equal in both
    assert main(["report", str(tmp_path / "runs"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["differences"] == {"optim.peak_lr": [0.001, 0.002]}
    assert printed["runs"][0]["summary"]["best_validation_loss"] == 0.5


def test_open_shows_the_page(tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: not opened.append(address) and len(opened) == 1)
    run = make_run(tmp_path / "run \udcff")  # a name of bytes that are no text
    assert main(["report", str(run), "--open"]) == 0
    assert "no browser" not in capsys.readouterr().out
    assert main(["report", str(run), "--open"]) == 0
    assert opened == [(run / "report.html").as_uri()] * 2
    assert "no browser found" in capsys.readouterr().out


def test_a_long_run_stays_small_and_keeps_its_extremes():
    steps = np.arange(1, 100_001)
    norms = np.ones(len(steps))
    norms[[777, 55_555]] = 1000.0, 0.001
    lines = [{"step": int(s), "grad_norm": float(n), "step_seconds": 0.5} for s, n in zip(steps, norms, strict=True)]
    curves = run_curves(lines, [])
    assert len(json.dumps(curves)) < 500_000
    drawn = curves["y"]["grad_norm"]
    assert len(drawn) == len(curves["x"]["step"]) <= 3000
    assert (min(drawn), max(drawn)) == (0.001, 1000)
    assert curves["mean"]["grad_norm"][0] == 1
    assert (curves["x"]["step"][0], curves["x"]["step"][-1], curves["x"]["seconds"][-1]) == (1, 100_000, 50_000)


def test_lines_of_older_runs_and_odd_numbers():
    """Lines of one step each, ten steps apart; metrics that are absent, text or not finite."""
    lines = [
        {"step": 10, "nll": 3.0, "clip_factor": 0.5, "skipped": 0.0, "grad_norm": 2.0},
        {"step": 20, "nll": float("nan"), "clip_factor": 1.0, "skipped": 0.0, "grad_norm": float("inf"), "note": "x"},
        {"step": 30, "nll": 2.0, "clip_factor": 0.0, "skipped": 1.0},  # a skipped step is not clipped
    ]
    curves = run_curves(lines, [])
    assert curves["y"]["nll"] == [3, None, 2]
    assert "note" not in curves["y"]
    assert curves["clipping"]["share"] == [1, 0, 0]
    assert sum(curves["histogram"]["counts"]) == 10


def test_events_are_sentences():
    assert sentence({"event": "stop", "step": 40, "text": "stopped at step 40"}) == "stopped at step 40"
    assert sentence({"event": "stop", "step": 40, "reason": "finished"}) == "Stop at step 40: reason finished"
    assert sentence({"event": "start", "step": 0, "jax": "0.10.2"}) == "Start at step 0"
    assert sentence({"event": "saved", "step": 40, "bytes_hashed": [10**6, 10**6]}) == "Saved at step 40: 2.00 MB"
    assert sentence({"event": "my_event", "time": "", "step": 3, "big": 2.5}) == "My event at step 3: big 2.5"


def test_a_finished_run_that_was_started_again_shows_one_start(tmp_path):
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()[:-1]
    again = [{"event": "resume", "step": 40, "attempt": 3}, {"event": "eval", "step": 40, **EVAL}]
    stop = {"event": "stop", "step": 40, "reason": "finished"}
    (run / "metrics.jsonl").write_text("\n".join([*lines, *map(json.dumps, (stop, *again, stop))]) + "\n")
    page = Page(write_report(run))
    assert page.cell("starts") == "2"
    assert "finished" in page.words
    assert sum(mark["kind"] == "stop" for mark in page.data["runs"][0]["marks"]) == 1


@pytest.mark.parametrize("odd", [None, "x", [1], {"old": 1}, True, -1.5, 10**30, "NaN"])
def test_records_of_odd_types_hide_nothing(tmp_path, odd):
    """Another program, or a user's sink, may write anything that is JSON."""
    run = make_run(tmp_path / "runs" / "run", 10)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    changed = [{**record, key: odd} for record in records[:6] + records[-3:] for key in record if key != "step"]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*changed, {"step": 11, "nll": 1.0}])))
    assert Page(write_report(run)).cell("steps") == "11 of 20"
    assert main(["runs", str(tmp_path / "runs")]) == 0


def test_a_sample_stays_inside_the_run(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "secret.txt").write_text("elsewhere")
    with JsonLines(run / "metrics.jsonl") as writer:
        writer.event("stop", "", dict(sample="../secret.txt"))
    assert "elsewhere" not in write_report(run).read_text()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no logged step"):
        write_report(make_run(tmp_path / "run", 0))
    with pytest.raises(ValueError, match=r"config\.json"):
        write_report([tmp_path / "run", tmp_path / "nowhere"])


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("size", ["1280,900", "500,844"])  # Chromium has no window below 500
@pytest.mark.parametrize("theme", ["0", "1"])  # dark, light
def test_a_browser_draws_every_chart_without_an_error(tmp_path, size, theme):
    one = make_run(tmp_path / "runs" / "one")
    other = make_run(tmp_path / "runs" / "other", peak_lr=2e-3)
    lonely = make_run(tmp_path / "lonely", 1)
    for path, charts in ((write_report(one), 13), (write_report([one, other]), 10), (write_report(lonely), 11)):
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={size}"]
        flags += [f"--blink-settings=preferredColorScheme={theme}", "--virtual-time-budget=3000", "--dump-dom"]
        done = subprocess.run(
            [CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        assert done.stdout.count("<canvas") == charts
        wide = re.findall(r'<canvas width="(\d+)"', done.stdout)
        assert max(map(int, wide)) <= int(size.split(",")[0])
