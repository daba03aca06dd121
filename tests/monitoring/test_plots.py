"""Figures and text curves, read back from the figure; no text overlaps another."""

import itertools
import math
import sys

import numpy as np
import pytest
from helpers import run_python

from jaxtrain import schedules
from jaxtrain.monitoring import plots
from jaxtrain.monitoring.metrics import JsonLines
from jaxtrain.monitoring.plots import draw_curve, metrics_figure, plot_metrics, plot_schedule, schedule_figure

PNG = b"\x89PNG\r\n\x1a\n"


def records(num_steps, grad_norms=(0.5, 2.0, 3.0), clip_norm=1.0, skipped=()):
    """Step lines of a run that clips by the global norm; `skipped` are indices."""
    lines = []
    for index in range(num_steps):
        norm = grad_norms[index % len(grad_norms)]
        line = {"step": 10 * index + 10, "nll": 5 - index / 100, "grad_norm": norm, "learning_rate": 1e-3}
        factor = min(1.0, clip_norm / norm) if norm else 1.0
        lines.append(line | {"clip_factor": factor, "skipped": float(index in skipped)})
    return lines


EVALS = [{"event": "eval", "step": step, "nll": nll} for step, nll in ((500, 4.5), (1005, 4.0))]


def test_the_figure_of_a_run():
    loss, rate, norm = metrics_figure(records(100), [{"event": "start"}, *EVALS], 1.0).axes
    train, smoothed, validation = loss.get_lines()
    np.testing.assert_allclose(train.get_xdata(), np.arange(10, 1001, 10))
    np.testing.assert_allclose(train.get_ydata(), 5 - np.arange(100) / 100)
    np.testing.assert_allclose(smoothed.get_ydata(), train.get_ydata())  # a mean around each point keeps a line
    np.testing.assert_allclose(validation.get_xydata(), [(500, 4.5), (1005, 4.0)])
    assert rate.get_lines()[0].get_ydata()[0] == 1e-3
    assert norm.get_yscale() == "log"
    threshold = norm.get_lines()[1]
    assert (threshold.get_ydata()[0], threshold.get_linestyle()) == (1.0, "--")
    assert norm.get_title(loc="left") == "66.0% of 100 logged steps clipped"
    assert "nats per token" in loss.get_ylabel()
    assert loss.get_xlim() == norm.get_xlim()


def test_clipped_is_judged_by_the_factor_and_a_skipped_step_is_not_clipped():
    """Under zclip the threshold follows the norms: 2.0 passes, 0.5 is clipped. Two more steps are skipped."""
    lines = records(12, (0.5, 2.0), skipped=(2, 3))
    for line in lines:
        line["clip_factor"] = 0.9 if line["grad_norm"] == 0.5 else 1.0
    lines[3]["grad_norm"] = math.nan
    axes = metrics_figure(lines, [], None).axes[2]
    assert axes.get_title(loc="left") == "41.7% of 12 logged steps clipped, 2 skipped"
    line, marks = axes.get_lines()
    assert np.isnan(line.get_ydata()[[2, 3]]).all()
    np.testing.assert_allclose(marks.get_xydata(), [(30, 0.5), (40, 0.5)])  # NaN is drawn at the lower edge


def test_plot_metrics_writes_a_png(tmp_path):
    with JsonLines(tmp_path / "metrics.jsonl") as writer:
        for line in records(3):
            writer.step(line["step"], line)
    path = plot_metrics(tmp_path, clip_norm=1.0)
    assert path == tmp_path / "report.png"
    assert path.read_bytes().startswith(PNG)


def test_smoothing_ignores_values_that_are_not_finite():
    values = np.array([1.0, 2.0, math.nan, 4.0, 5.0, 6.0])
    np.testing.assert_allclose(plots._smooth(values, 3), [1, 1.5, 3, 4.5, 5, 6])
    np.testing.assert_allclose(plots._smooth(np.full(3, math.nan), 3), [math.nan] * 3)


@pytest.mark.parametrize("grad_norms", [(0.5,), (math.nan,), (0.0,), (math.inf, 1e-9, 1e9)])
@pytest.mark.parametrize("num_steps", [1, 30])
def test_one_step_odd_norms_and_nothing_but_skips(tmp_path, grad_norms, num_steps):
    for skipped in ((), range(30)):
        figure = metrics_figure(records(num_steps, grad_norms, skipped=skipped), [], 1.0)
        assert figure.axes[0].get_lines()[0].get_marker() == ("o" if num_steps == 1 else "")
        figure.savefig(tmp_path / "figure.png")


def test_plot_metrics_without_a_logged_step(tmp_path):
    with JsonLines(tmp_path / "metrics.jsonl") as writer:
        writer.event("eval", "", {"step": 1, "nll": 1.0})
    with pytest.raises(ValueError, match="no logged step"):
        plot_metrics(tmp_path, clip_norm=1.0)


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxtrain\[plot\]'"):
        metrics_figure(records(2), [], 1.0)


def test_no_pyplot_is_loaded():
    code = (
        "import sys\nfrom jaxtrain.monitoring.plots import metrics_figure\nassert 'matplotlib' not in sys.modules\n"
        "metrics_figure([{'step': 1, 'grad_norm': 1.0}], [], 1.0)\nassert 'matplotlib.pyplot' not in sys.modules"
    )
    run_python(code)


SCHEDULES = {
    "cosine": (schedules.warmup_cosine(1e-3, 1000, 100), ["first", "peak", "last"]),
    "no warm-up, high floor": (schedules.warmup_cosine(1e-3, 1000, 0, 0.95), ["first, peak", "last"]),
    "late peak": (schedules.warmup_cosine(1e-3, 1000, 990, 0.97), ["first", "peak", "last"]),
    "peak in the middle": (schedules.warmup_linear(1e-3, 1000, 500, 0.0), ["first", "peak", "last"]),
    "warm-up only": (schedules.warmup_constant(1e-3, 1000), ["first", "peak, last"]),
    "trapezoid": (schedules.warmup_stable_decay(3e-4, 1000, 50, 200), ["first", "peak", "last"]),
    "restarts": (schedules.sgdr(1e-3, 100, 2, 10, 0.7), ["first", "peak", "last"]),
    "constant": (schedules.warmup_constant(1e-3, 0), ["first, peak", "last"]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_texts_do_not_overlap(name):
    schedule, names = SCHEDULES[name]
    figure = schedule_figure(schedule, 1000)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert [text.get_text().split(":")[0] for text in axes.texts] == names
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    inside = axes.bbox
    for text, box in zip(axes.texts, boxes, strict=True):
        assert inside.x0 <= box.x0
        assert inside.y0 <= box.y0
        assert box.x1 <= inside.x1
        assert box.y1 <= inside.y1
        point = axes.transData.transform(text.xy)[1]
        assert box.y0 > point if "peak" in text.get_text() else box.y1 < point
    curve = axes.get_lines()[0]
    np.testing.assert_array_equal(curve.get_ydata(), np.asarray(schedule(np.arange(1000))))
    assert (curve.get_xdata()[0], curve.get_xdata()[-1]) == (1, 1000)
    assert f"{curve.get_ydata()[-1]:.3g} at step 1000" in axes.texts[-1].get_text()


def test_schedule_of_one_step_and_of_none(tmp_path):
    constant = schedules.warmup_constant(1e-3, 0)
    (text,) = schedule_figure(constant, 1).axes[0].texts
    assert text.get_text() == "first, peak, last: 0.001 at step 1"
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        plot_schedule(constant, 0, tmp_path / "s.png")
    assert plot_schedule(constant, 9, tmp_path / "s.png").read_bytes().startswith(PNG)


def test_draw_curve_of_a_ramp():
    eighths = "".join(map(chr, range(0x2581, 0x2589)))
    assert draw_curve(range(16), width=20, height=2, label="ramp").splitlines() == [
        "ramp",
        "15 |" + " " * 8 + eighths,
        " 0 |" + eighths + "\u2588" * 8,
        "    1" + " " * 13 + "16",
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 50, 71, 1000])
@pytest.mark.parametrize(("width", "height"), [(72, 12), (40, 5)])
def test_draw_curve_keeps_to_its_size(count, width, height):
    lines = draw_curve(np.sin(np.arange(count)) * 1e-5, width=width, height=height).splitlines()
    assert len(lines) == height + 1
    assert max(map(len, lines)) <= width
    assert lines[-1].split()[-1] == str(count)


def test_draw_curve_shows_means_gaps_and_constants():
    lines = draw_curve([0.0, 4.0] * 500, width=30, height=3).splitlines()
    assert lines[0] == "4 |"  # every column is the mean, 2
    assert set(lines[1][3:]) == {"\u2585"}
    assert (
        draw_curve([1, math.nan, math.inf, 2], width=15, height=2).splitlines()[1]
        == "1 |\u2581\u2581\u2581      \u2588\u2588\u2588"
    )
    assert draw_curve([5, 5], width=15, height=2).splitlines()[:2] == ["5 |" + "\u2588" * 12, "  |" + "\u2588" * 12]


def test_draw_curve_errors():
    for values in ([], [math.nan]):
        with pytest.raises(ValueError, match="needs a finite value"):
            draw_curve(values)
    for size in ({"width": 5}, {"height": 1}):
        with pytest.raises(ValueError, match="too small"):
            draw_curve([1.0, 2.0], **size)
