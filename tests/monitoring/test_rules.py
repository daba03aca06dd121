"""Precision and recall of the health rules over a table of synthetic runs, and a rule from outside the package."""

import dataclasses
import math

import numpy as np
import pytest
from synthetic_runs import HEALTHY, SICK, STEPS, healthy, sick

from jaxtrain.config import OptimConfig
from jaxtrain.guard import GRAD_NORM_SPIKE, LOSS_SPIKE, NOT_FINITE
from jaxtrain.monitoring.health import Health, diagnose
from jaxtrain.monitoring.rules import CLEAR, RULES, UNKNOWN, Found, Rule, RunFacts, SkippedSteps
from jaxtrain.monitoring.trends import LabelLeak


@healthy()
def plain(run): ...


@healthy(steps=150)
def short(run): ...


@healthy(steps=300, noise=0.3)
def short_and_noisy(run): ...


@healthy(noise=0.5)
def very_noisy(run): ...


@healthy(vocab_size=50257, floor=3.0)
def large_vocabulary(run): ...


@healthy(warmup_steps=None, warmup_fraction=0.05)
def warmup_as_a_fraction(run): ...


@healthy(vocab_size=50257, floor=3.0, warmup_steps=800)
def long_warmup(run):
    t = run.t
    run.metrics["loss"] = 3.0 + 7.8 * (1 + np.maximum(t - 40, 0) / 300) ** -0.7 + 0.05 * run.rng.normal(size=len(t))
    run.metrics["loss"][0] = math.log(50257)


@healthy(noise=0.02)
def heavy_tails(run):
    run.metrics["loss"] += 0.05 * np.abs(run.rng.standard_t(2, size=STEPS))
    run.metrics["grad_norm"] *= 1 + 0.2 * np.abs(run.rng.standard_t(2, size=STEPS))


@healthy(steps=400)
def short_run_that_clips_every_step(run):
    run.metrics["grad_norm"] = np.full(400, 3.0) * np.exp(0.2 * run.rng.normal(size=400))


@healthy()
def spike_that_recovers(run):
    run.metrics["loss"][700:720] += 3.0 * np.exp(-np.arange(20) / 5)
    run.metrics["grad_norm"][700] *= 30


@healthy(schedule="sgdr", cycles=4)
def restarts(run):
    phase = run.t % 400
    run.metrics["learning_rate"] = 1e-3 * (0.55 + 0.45 * np.cos(np.pi * phase / 400)) + 1e-6
    run.metrics["update_norm"] = 50 * run.metrics["learning_rate"]
    run.metrics["loss"][400:] += 0.15 * np.exp(-phase[400:] / 100)


@healthy()
def memorizes_its_text(run):
    run.metrics["loss"] = np.where(run.t < 100, run.metrics["loss"], 0.02 + 2 * np.exp(-run.t / 200))
    run.metrics["grad_norm"] *= np.exp(-run.t / 400)
    run.evaluations, run.train_tokens = [], 10**5


@healthy()
def converged(run):
    run.metrics["loss"] = np.where(run.t < 200, run.metrics["loss"], 2.0 + 0.1 * run.rng.normal(size=STEPS))


@healthy()
def validation_that_flattens(run):
    run.evaluations = [(step, 2.0 + 0.01 * run.rng.normal()) for step, _ in run.evaluations]


@healthy()
def growing_weights(run):
    run.metrics["param_norm"] = 20 * (1 + run.t / 400)


@healthy()
def batches_of_many_lengths(run):
    run.metrics["tokens"] = np.round(2048 * run.rng.uniform(0.4, 1.0, size=STEPS))


@healthy()
def new_data_that_is_a_little_harder(run):
    run.metrics["loss"][1000:] += 0.08


@sick("loss_rising")
def slowly_rising_loss(run):
    run.metrics["loss"][600:] += 0.0006 * np.arange(1000)


@sick("loss_rising", noise=0.3)
def noisily_rising_loss(run):
    run.metrics["loss"][600:] += 0.002 * np.arange(1000)


@sick("loss_rising")
def jump_that_stays(run):
    run.metrics["loss"][700:] += 0.6


@sick("loss_rising", noise=0.4)
def noisy_jump_that_stays(run):
    run.metrics["loss"][700:] += 1.0


@sick("loss_rising", "stuck_at_uniform")
def back_to_the_uniform_guess(run):
    run.metrics["loss"][700:] = math.log(257) + 0.02 * run.rng.normal(size=900)


@sick("loss_rising", vocab_size=50257, floor=3.0)
def jump_that_heals_slowly(run):
    run.metrics["loss"][500:] += 3.0 * np.exp(-np.arange(1100) / 400)


@sick("stuck_at_uniform", "gradient_vanished")
def stuck_from_the_start(run):
    run.metrics["loss"] = math.log(257) + 0.01 * run.rng.normal(size=STEPS)


@sick("stuck_at_uniform", vocab_size=50257, steps=400)
def stuck_with_a_large_vocabulary(run):
    run.metrics["loss"] = math.log(50257) + 0.02 * run.rng.normal(size=400)


@sick("stuck_at_uniform", noise=0.0)
def hardly_below_uniform(run):
    run.metrics["loss"] = math.log(257) - 0.1 * run.t / STEPS + 0.05 * run.rng.normal(size=STEPS)


@sick("validation_rising")
def validation_leaves_training(run):
    run.evaluations = [(step, 2.0 + 0.5 * abs(step / 1600 - 0.5)) for step, _ in run.evaluations]


@sick("validation_rising")
def validation_leaves_training_fast(run):
    run.evaluations = [(step, 1.8 + 0.002 * max(step - 400, 0)) for step, _ in run.evaluations]


@sick("validation_rising", noise=0.2)
def validation_leaves_training_noisily(run):
    run.evaluations = [
        (step, 2.0 + 0.6 * max(step / 1600 - 0.4, 0) + 0.01 * run.rng.normal()) for step, _ in run.evaluations
    ]


@sick("gradient_vanished")
def gradient_dies_slowly(run):
    run.metrics["grad_norm"] *= 10.0 ** (-9 * run.t / STEPS)


@sick("gradient_vanished")
def gradient_dies_at_once(run):
    run.metrics["grad_norm"][900:] = 1e-9


@sick("gradient_vanished", "stuck_at_uniform", "no_progress")
def gradient_that_never_was(run):
    run.metrics["grad_norm"][:] = 1e-9
    run.metrics["loss"] = math.log(257) + 0.01 * run.rng.normal(size=STEPS)


@sick("parameters_growing")
def parameters_explode(run):
    run.metrics["param_norm"][600:] *= np.exp(np.arange(1000) / 100)


@sick("parameters_growing")
def parameters_grow_steadily(run):
    run.metrics["param_norm"] = 20 * (1 + run.t / 50)


@healthy()
def parameters_start_from_zeros(run):
    run.metrics["param_norm"] = 20 * np.minimum((run.t - run.t[0]) / 150, 1.0)


@sick("tokens_collapsed")
def tokens_collapse(run):
    run.metrics["tokens"][800:] *= 0.3


@sick("tokens_collapsed")
def tokens_collapse_amid_batches_of_many_lengths(run):
    run.metrics["tokens"] = np.round(2048 * run.rng.uniform(0.7, 1.0, size=STEPS))
    run.metrics["tokens"][800:] *= 0.3


@sick("clipping_saturated")
def clipped_hard(run):
    run.metrics["grad_norm"] *= 100


@sick("clipping_saturated")
def clipped_for_long(run):
    run.metrics["grad_norm"] = np.full(STEPS, 3.0)


@sick("learning_rate_zero")
def schedule_that_ended(run):
    run.metrics["learning_rate"][900:] = 0.0


@sick("throughput_dropping")
def slower_machine(run):
    run.metrics["tokens_per_second"][800:] *= 0.5
    run.metrics["step_seconds"][800:] *= 2


def score(seeds):
    """Judges every run of the table; returns precision, recall and the mistakes."""
    right = wrong = missed = 0
    mistakes = []
    table = [(make, ()) for make in HEALTHY.values()] + list(SICK.values())
    for make, names in table:
        for seed in seeds:
            run, change = make(seed)
            change(run)
            found = run.findings()
            right += bool(names) and names[0] in found
            missed += bool(names) and names[0] not in found
            wrong += len(found - set(names))
            if found - set(names) or not set(names[:1]) <= found:
                mistakes.append((change.__name__, seed, sorted(found)))
    return right / (right + wrong), right / (right + missed), mistakes


@pytest.mark.parametrize(("reason", "limit"), [(LOSS_SPIKE, 3), (GRAD_NORM_SPIKE, 5), (NOT_FINITE, 1)])
def test_more_skips_for_the_gradient_norm_than_for_the_loss_are_routine(tiny_config, reason, limit):
    """Gradients of small batches have heavy tails; a NaN is never routine."""
    health = Health(RunFacts(tiny_config), [SkippedSteps])
    lines = [{"step": step, "skipped": float(step % 10 == 0), "skip_reason": reason} for step in range(1, 100)]
    found = [finding.step for line in lines for finding in health.observe(line)]
    assert found[:1] == [10 * limit]


@pytest.mark.parametrize(("share", "leaks"), [(1.0, True), (0.51, True), (0.49, False), (0.0, False)])
def test_a_low_loss_of_few_labels_is_no_leak(tiny_config, share, leaks):
    """Completions of which few labels count may be easy."""
    health, tokens = Health(RunFacts(tiny_config, vocab_size=257, train_tokens=10_000), [LabelLeak]), 8 * 16
    lines = [{"step": step, "nll": 0.01, "tokens": share * tokens} for step in range(1, 20)]
    assert any(health.observe(line) for line in lines) == leaks


def test_a_report_knows_the_vocabulary_from_the_newest_start(tiny_config):
    events = [{"event": "start", "step": 0, "vocab_size": 10**9}, {"event": "resume", "step": 0, "vocab_size": 257}]
    for loss, names in ((math.log(257), []), (20.0, ["initial_loss"])):
        line = {"step": 1, "loss": loss, "nll": loss, "tokens": 128.0}
        assert [finding.name for finding in diagnose([line], events, tiny_config)] == names


def test_the_table_is_large_enough():
    assert len(HEALTHY) >= 15
    assert len(SICK) >= 20


def test_precision_and_recall_on_runs_that_no_constant_was_set_on():
    """Constants were set on seeds 0 to 9 and 101; the table is judged on others."""
    precision, recall, mistakes = score([202])
    assert (precision, recall) == (1.0, 1.0), mistakes


# A rule from outside the package.

OWN_RULE = """
from jaxtrain.monitoring.rules import CLEAR, UNKNOWN, Found, Rule


class LossTooRound(Rule):
    name = "loss_too_round"
    remedy = "Look at train.precision."
    DIGITS = 1

    def check(self, line):
        if "loss" not in line:
            return UNKNOWN
        return Found(f"the loss is {line['loss']}") if line["loss"] == round(line["loss"], self.DIGITS) else CLEAR
"""


@pytest.fixture
def facts(tiny_config):
    return RunFacts(tiny_config)


def test_a_rule_from_a_file_of_the_users(tmp_path, facts, monkeypatch):
    (tmp_path / "own_rules.py").write_text(OWN_RULE)
    monkeypatch.syspath_prepend(tmp_path)
    import own_rules

    health = Health(facts, [*RULES, own_rules.LossTooRound])
    assert health.observe({"step": 1, "loss": 2.53}) == []
    (finding,) = health.observe({"step": 2, "loss": 2.5})
    assert str(finding) == "warning: loss_too_round at step 2: the loss is 2.5\n  Look at train.precision."


@pytest.mark.parametrize("verdict", [lambda: Found(1 / 0), lambda: "too large", lambda: None])
def test_a_broken_rule_is_reported_once_and_the_others_continue(verdict, facts):
    class Broken(Rule):
        name, remedy = "broken", ""

        def check(self, line):
            return verdict()

    class Always(Rule):
        name, remedy, quiet = "always", "", 1

        def check(self, line):
            return Found("yes") if line["step"] % 2 else CLEAR

    health = Health(facts, [Broken, Always])
    names = [finding.name for step in range(1, 6) for finding in health.observe({"step": step})]
    assert names == ["broken_rule", "always", "always"]  # a third time after ten times as many quiet steps


def test_a_case_is_reported_again_only_after_a_quiet_time(facts):
    verdicts = [Found("a"), Found("b"), CLEAR, Found("c"), CLEAR, UNKNOWN, CLEAR, Found("d")]
    verdicts += [*[CLEAR] * 19, Found("e"), *[CLEAR] * 20, Found("f"), *[CLEAR] * 199, Found("g"), *[CLEAR] * 200]
    verdicts += [Found("h")]

    class Scripted(Rule):
        name, remedy, quiet = "scripted", "", 2

        def check(self, line):
            return verdicts[line["step"]]

    health = Health(facts, [Scripted])
    texts = [finding.evidence for step in range(len(verdicts)) for finding in health.observe({"step": step})]
    assert texts == ["a", "d", "f", "h"]


def test_facts_are_optional(tiny_config):
    line = dict.fromkeys(("loss", "nll", "grad_norm", "clip_factor", "learning_rate", "tokens"), 1.0)
    for config in (tiny_config, dataclasses.replace(tiny_config, optim=OptimConfig(clipping="zclip", warmup_steps=0))):
        assert Health(RunFacts(config)).observe({"step": 1} | line) == []
        assert Health(RunFacts(config)).observe({"step": 1}) == []
