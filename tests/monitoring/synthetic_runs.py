"""Synthetic runs, healthy and sick, and the tables that test_rules.py fills with them."""

import math

import numpy as np

from jaxtrain.config import Config, DataConfig, OptimConfig, TrainConfig
from jaxtrain.monitoring.health import Health
from jaxtrain.monitoring.rules import RunFacts

STEPS = 1600


class SyntheticRun:
    """Metrics of a run that learns well, as arrays over steps; a case of the table changes them.

    Attributes:
      t: step numbers, from 1.
      rng: random numbers of the case.
      metrics: arrays by name.
      evaluations: (step, nll) of the validation split.
      config: config of the run.
      vocab_size, train_tokens: of the model and of the training split.
    """

    def __init__(self, seed, steps=STEPS, vocab_size=257, noise=0.05, floor=1.5, **optim):
        self.rng, self.vocab_size = np.random.default_rng(seed), vocab_size
        self.train_tokens = 10**9
        self.t = t = np.arange(1, steps + 1, dtype=np.float64)
        optim = {"warmup_steps": 50, "floor": 0.1} | optim
        self.config = Config(
            data=DataConfig(store="any"), optim=OptimConfig(**optim), train=TrainConfig(steps=steps, seq_len=128)
        )
        start = math.log(vocab_size)
        smooth = floor + (start - floor) * (1 + (t - 1) / 30) ** -0.7
        loss = smooth + noise * self.rng.normal(size=steps)
        loss[0] = start
        norm = (0.4 + 2 * (1 + t / 40) ** -0.5) * np.exp(0.2 * self.rng.normal(size=steps))
        rate = 1e-3 * np.minimum(t / 50, 0.55 + 0.45 * np.cos(np.pi * t / steps))
        self.metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "update_norm": 50 * rate,
            "param_norm": 20 * (1 + t / steps),
            "tokens": np.full(steps, 2048.0),
            "skipped": np.zeros(steps),
            "skip_reason": np.zeros(steps),
            "give_up": np.zeros(steps),
            "tokens_per_second": 1e5 * np.exp(0.05 * self.rng.normal(size=steps)),
            "step_seconds": np.full(steps, 0.5),
        }
        self.evaluations = [
            (step, smooth[step - 1] + 0.05 + 0.01 * self.rng.normal()) for step in range(200, steps + 1, 200)
        ]

    def findings(self):
        """Names of the warnings and errors of the run."""
        m = self.metrics
        m.setdefault("nll", m["loss"])
        m.setdefault("clip_factor", np.minimum(1.0, 1.0 / np.maximum(m["grad_norm"], 1e-30)))
        health, evaluations = Health(RunFacts(self.config, self.vocab_size, self.train_tokens)), dict(self.evaluations)
        found = []
        for i, step in enumerate(range(1, len(self.t) + 1)):
            found += health.observe({"step": step, "attempt": 1} | {k: float(v[i]) for k, v in m.items()})
            if step in evaluations:
                found += health.observe_evaluation({"step": step, "nll": evaluations[step]})
        return {finding.name for finding in found if finding.severity != "info"}


HEALTHY, SICK = {}, {}


def healthy(**settings):
    """Adds a function that changes a healthy run, but keeps it healthy, to the table."""

    def add(change):
        HEALTHY[change.__name__] = lambda seed: (SyntheticRun(seed, **settings), change)
        return change

    return add


def sick(*names, **settings):
    """Adds a function that makes a run sick to the table; `names` are the rules that may find it, the first must."""

    def add(change):
        SICK[change.__name__] = (lambda seed: (SyntheticRun(seed, **settings), change)), names
        return change

    return add
