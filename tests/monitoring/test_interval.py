"""Means over the steps of one line, and what reads them: the recorder, the rules and replay."""

import math

import numpy as np
import pytest
from test_rules import HEALTHY, SICK

from jaxtrain.config import TrainConfig
from jaxtrain.monitoring.health import Health
from jaxtrain.monitoring.interval import summarize
from jaxtrain.monitoring.metrics import pack
from jaxtrain.monitoring.recorder import Recorder
from jaxtrain.monitoring.rule import RunFacts

NAN = math.nan
BASE = {"loss": 2.0, "tokens": 4.0, "grad_norm": 1.0, "clip_factor": 1.0, "learning_rate": 0.1, "skipped": 0.0}


def line(**fields):
    return BASE | fields


TABLE = {
    "weighted by tokens": ([line(loss=1.0, tokens=3.0), line(loss=5.0, tokens=1.0)], {"loss": 2.0, "tokens": 2.0}),
    "no tokens at all": ([line(loss=1.0, tokens=0.0), line(loss=5.0, tokens=0.0)], {"loss": 3.0, "tokens": 0.0}),
    "no count of tokens": ([{"loss": 1.0}, {"loss": 2.0}], {"loss": 1.5}),
    "norm by step": (
        [line(grad_norm=1.0, tokens=9.0), line(grad_norm=3.0, clip_factor=0.5)],
        {"grad_norm": 2.0, "grad_norm_max": 3.0, "clip_factor": 0.75, "clipped": 1, "steps": 2},
    ),
    "state of the last step": ([line(), line(learning_rate=0.3)], {"learning_rate": 0.3}),
    "skipped steps do not count": (
        [line(loss=1.0), line(loss=NAN, grad_norm=math.inf, clip_factor=0.0, skipped=1.0)],
        {"loss": 1.0, "grad_norm": 1.0, "grad_norm_max": math.inf, "clipped": 0, "skipped": 1.0},
    ),
    "only skipped steps": ([line(loss=NAN, skipped=1.0)] * 2, {"loss": NAN, "skipped": 2.0, "clipped": 0}),
    "a NaN that was applied": ([line(grad_norm=NAN), line()], {"grad_norm": NAN, "grad_norm_max": NAN}),
    "vectors": ([line(v=[1.0, 2.0]), line(v=[3.0, 4.0])], {"v": [2.0, 3.0]}),
    "vectors of the last step only": ([line(), line(v=[3.0, 4.0])], {"v": [3.0, 4.0]}),
    "another metric in the first": ([line(v=1.0), line()], {"loss": 2.0}),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_line_holds_the_means_of_its_steps(name):
    steps, expected = TABLE[name]
    fields = summarize(steps)
    for key, value in expected.items():
        np.testing.assert_array_equal(fields[key], value, err_msg=key)
    assert fields.keys() - steps[-1].keys() <= {"steps", "clipped", "skipped", "grad_norm_max"}


def test_one_step_keeps_every_bit():
    values = {"loss": float(np.float32(0.1)), "tokens": 3.0, "x": [float(np.float32(0.7))], "skipped": 0.0}
    assert summarize([values]) == values | {"steps": 1}


def test_the_recorder_leaves_no_step_out():
    """A line ends at log_every, at a skipped step, and wherever the loop flushes: before saves and at the end."""

    class Collect(list):
        def step(self, step, fields):
            self.append((step, fields["steps"], fields["loss"], fields["skipped"]))

        def close(self):
            pass

    sink = Collect()
    config = TrainConfig(steps=40, batch_size=4, seq_len=8, log_every=10, diagnose_every=None)
    with Recorder(config, [sink]) as recorder:
        for step in range(1, 24):
            values = {"loss": float(step), "tokens": 1.0, "skipped": float(step == 13)}
            recorder.step(step, pack({name: np.float32(value) for name, value in values.items()}))
            if step == 22:
                recorder.flush()
        recorder.flush()
        recorder.flush()
    assert sink == [(10, 10, 5.5, 0), (13, 3, 11.5, 1), (20, 7, 17, 0), (22, 2, 21.5, 0), (23, 1, 23, 0)]


def findings(make, every):
    """Names of the findings in the interval means of a run of test_rules."""
    run, change_run = make(0)
    change_run(run)
    m = run.metrics
    m |= {"nll": m["loss"], "clip_factor": np.minimum(1.0, 1.0 / np.maximum(m["grad_norm"], 1e-30))}
    health, found = Health(RunFacts(run.config, run.vocab_size, run.train_tokens)), []
    steps = [{k: float(v[i]) for k, v in m.items()} for i in range(len(run.t))]
    for start in range(0, len(steps), every):
        fields = summarize(steps[start : start + every])
        found += health.observe({"step": start + fields["steps"], "attempt": 1} | fields)
    return {finding.name for finding in found if finding.severity != "info"}


def test_rules_judge_means_of_intervals():
    for name in ("plain", "very_noisy"):
        assert findings(HEALTHY[name], 4) == set(), name
    for name in ("clipped_for_long", "gradient_dies_at_once"):
        make, names = SICK[name]
        assert names[0] in findings(make, 2), name
