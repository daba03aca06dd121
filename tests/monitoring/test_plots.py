"""Figures and text curves, read back from the figure; no text overlaps another."""

import itertools
import math
import sys

import numpy as np
import pytest
from helpers import run_python

from jaxtrain import schedules
from jaxtrain.monitoring.plots import draw_curve, plot_schedule, schedule_figure

PNG = b"\x89PNG\r\n\x1a\n"


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxtrain\[plot\]'"):
        schedule_figure(schedules.warmup_constant(1e-3, 0), 2)


def test_no_pyplot_is_loaded():
    code = (
        "import sys\nfrom jaxtrain.monitoring.plots import schedule_figure\nassert 'matplotlib' not in sys.modules\n"
        "schedule_figure(lambda step: step, 2)\nassert 'matplotlib.pyplot' not in sys.modules"
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
