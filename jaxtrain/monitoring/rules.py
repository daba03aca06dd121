"""The health rules of a run, and those about single steps: gradients, skips, clipping, updates and layers.

Plain Python on plain numbers, beside every step. Constants leave room around what healthy runs show, which is given in
brackets: the quickstart, and 400 steps of the tests' tiny model, which end far into overfitting.
"""

import math
import statistics

from jaxtrain.guard import GRAD_NORM_SPIKE, LOSS_SPIKE, NOT_FINITE
from jaxtrain.monitoring import trends
from jaxtrain.monitoring.rule import CLEAR, UNKNOWN, WINDOW, Found, Line, Rule, RunFacts, Verdict, Window

__all__ = ["CLEAR", "RULES", "UNKNOWN", "WINDOW", "Found", "Line", "Rule", "RunFacts", "Verdict", "Window"]

_SKIP_REASONS = {
    NOT_FINITE: "its loss or gradient was not finite",
    LOSS_SPIKE: "its loss stood out",
    GRAD_NORM_SPIKE: "its gradient norm stood out",
}


def _skip_reason(line: Line) -> str:
    return _SKIP_REASONS.get(line["skip_reason"], "the optimizer refused it")


def _add(window: Window, line: Line, value: float, *, others: float) -> None:
    """Adds a value of each step that a line covers: `others`, and `value` for its last step."""
    for _ in range(min(line.get("steps", 1) - 1, window.maxlen)):
        window.append(others)
    window.append(value)


class NonFinite(Rule):
    """A non-finite loss or gradient reached the parameters."""

    name, severity = "non_finite", "error"
    remedy = (
        "The parameters are lost. Go back to a checkpoint before this step (--rewind STEP) and leave the batch out "
        "(--data.skip), or lower optim.peak_lr or lengthen the warm-up from there (--allow-change)."
    )

    def check(self, line: Line) -> Verdict:
        if "loss" not in line or self.facts.config.train.precision == "float16":
            return UNKNOWN  # float16_overflow knows more
        wrong = [f"{k} is {line[k]}" for k in ("loss", "grad_norm") if not math.isfinite(line.get(k, 0.0))]
        return Found(" and ".join(wrong) + ", and the step was applied") if wrong and line["skipped"] != 1 else CLEAR


class Float16Overflow(Rule):
    """The numbers of the run exceed float16."""

    NORM = 1e6  # of a gradient; float16 ends at 65,504
    OVERFLOWS = 20  # of WINDOW steps: loss scaling overflows a few times at its start, then once in 2,000

    name, severity = "float16_overflow", "error"
    remedy = "float16 ends at 65,504: use --train.precision bfloat16 if the device has it, or lower optim.peak_lr."

    def start(self) -> None:
        self._overflows = Window()

    def check(self, line: Line) -> Verdict:
        if self.facts.config.train.precision != "float16":
            return UNKNOWN
        norm, scaled = line["grad_norm"], "loss_scale" in line
        _add(self._overflows, line, line["skipped"] == 1 and line["skip_reason"] == NOT_FINITE, others=False)
        if not math.isfinite(line.get("loss", 0.0)):
            return Found(f"the loss is {line['loss']}, grad_norm {norm:.3g}")
        if self.NORM < norm < math.inf or (not scaled and not math.isfinite(norm)):
            return Found(f"grad_norm is {norm:.3g}, loss {line['loss']:.4g}")
        if (count := sum(self._overflows)) < self.OVERFLOWS:
            return CLEAR
        return Found(f"{count} of the last {len(self._overflows)} steps overflowed; loss scale {line['loss_scale']:g}")


class SkippedSteps(Rule):
    """Steps are skipped too often, or one because of a NaN."""

    SKIPS = 3  # of WINDOW steps; one or two are spikes, which happen
    NORM_SKIPS = 5  # if the norm stood out: gradients of small batches have heavy tails [3]

    name = "skipped_steps"
    remedy = "Look at the batches of those steps; if they are fine, lower optim.peak_lr or lengthen the warm-up."

    def start(self) -> None:
        self._skips = Window()

    def check(self, line: Line) -> Verdict:
        skipped, not_finite = line["skipped"] == 1, line["skip_reason"] == NOT_FINITE
        routine = not_finite and self.facts.config.train.precision == "float16"  # under loss scaling
        _add(self._skips, line, skipped and not routine, others=False)
        count, limit = sum(self._skips), self.NORM_SKIPS if line["skip_reason"] == GRAD_NORM_SPIKE else self.SKIPS
        if not skipped or routine or (count < limit and not not_finite):
            return CLEAR
        return Found(f"{count} of the last {len(self._skips)} steps skipped, this one because {_skip_reason(line)}")


class TooManyBadSteps(Rule):
    """The guard gives up."""

    name, severity = "too_many_bad_steps", "error"
    remedy = (
        "The run ends here, with its last good parameters. Go back (--rewind STEP) and leave those batches out "
        "(--data.skip) or lower optim.peak_lr (--allow-change)."
    )

    def check(self, line: Line) -> Verdict:
        if line["give_up"] != 1:
            return CLEAR
        return Found(f"too many of the last steps were skipped, this one because {_skip_reason(line)}")


class ClippingSaturated(Rule):
    """Nearly every step is clipped, hard or for long."""

    SHARE = 0.9  # of clipped steps [0.76]
    HARD, LONG = 0.1, 5 * WINDOW  # median factor after WINDOW steps [0.3], or steps: at 1.0 many short runs clip all
    TINY, TINY_STEPS = 0.01, 50  # factors below it in a row [0.095, once]: gradients near Adam's eps

    name = "clipping_saturated"
    remedy = "Lower optim.peak_lr or look for bad data; if the loss falls well, raise optim.clip_norm."

    def start(self) -> None:
        self._factors, self._shares, self._norms, self._tiny = Window(self.LONG), Window(self.LONG), Window(), 0

    def check(self, line: Line) -> Verdict:
        factor, norm = line["clip_factor"], line["grad_norm"]
        if math.isnan(factor) or line["skipped"] == 1:
            return UNKNOWN
        self._tiny = self._tiny + 1 if factor < self.TINY else 0
        if self._tiny > self.TINY_STEPS:
            now = f"now {factor:.2g}, grad_norm {norm:.3g}"
            return Found(f"{self._tiny} steps in a row were scaled by less than {self.TINY:g} ({now}), near Adam's eps")
        if self.facts.config.optim.clipping == "adaptive":
            return CLEAR  # a share of the units is clipped in nearly every step
        if self.after_warmup(line):
            share = line.get("clipped", factor < 1) / line.get("steps", 1)
            for window, value in ((self._factors, factor), (self._shares, share), (self._norms, norm)):
                _add(window, line, value, others=value)
        if not self._norms.full or not factor < 1:  # a saturated run shows it in its next step
            return CLEAR
        count = WINDOW if self._factors.median(-WINDOW) < self.HARD else self.LONG
        clipped = sum(list(self._shares)[-count:])
        if clipped <= self.SHARE * count:
            return CLEAR
        middle = self._norms.median()
        return Found(f"{clipped:.0f} of the last {count} steps were clipped, median grad_norm {middle:.3g}")


class SpikesCaught(Rule):
    """A single spike was clipped or skipped."""

    TIMES = 10.0  # grad_norm over its median [4.1]; below that clipping is routine
    quiet = 10 * WINDOW

    name, severity = "spikes_caught", "info"
    remedy = "A spike now and then is fine, and this is what clipping and skipping are for: nothing to do."

    def start(self) -> None:
        self._norms = Window()

    def check(self, line: Line) -> Verdict:
        norm, skipped, factor = line.get("grad_norm_max", line["grad_norm"]), line["skipped"] == 1, line["clip_factor"]
        if skipped and line["skip_reason"] in (LOSS_SPIKE, GRAD_NORM_SPIKE):
            return Found(f"a step was skipped because {_skip_reason(line)} (grad_norm {norm:.3g})")
        if skipped or not math.isfinite(norm):
            return UNKNOWN
        middle = self._norms.median() if self._norms.full else math.inf
        self._norms.append(line["grad_norm"])
        if norm <= self.TIMES * middle or not factor < 1:
            return CLEAR
        factor = f" by a factor {factor:.2g}" if line.get("steps", 1) == 1 else ""
        return Found(f"grad_norm {norm:.3g}, {norm / middle:.0f} x its median, was clipped{factor}")


class UpdateNormRising(Rule):
    """The updates grow before the loss does."""

    TIMES, RECENT = 2.0, 5  # median of RECENT update norms over the median of WINDOW before [1.3]
    SAME_LOSS = 1.1  # a loss that is up by less than this has not risen

    name = "update_norm_rising"
    remedy = "This often comes before a loss spike: keep a checkpoint from before, lower optim.peak_lr or optim.b2."

    def start(self) -> None:
        self._updates, self._scaled, self._losses = (Window(WINDOW + self.RECENT) for _ in range(3))

    def check(self, line: Line) -> Verdict:
        update, rate, loss = line["update_norm"], line.get("learning_rate", 1.0), line["loss"]
        usable = line["skipped"] != 1 and rate > 0 and math.isfinite(update) and math.isfinite(loss)
        if not usable or not self.after_warmup(line):
            return UNKNOWN
        # A schedule that rises again takes the norm with it; one that falls hides a rise. Both must have doubled.
        for window, value in ((self._updates, update), (self._scaled, update / rate), (self._losses, loss)):
            window.append(value)
        if not self._losses.full:
            return UNKNOWN
        update, update_now = (self._updates.median(*part) for part in ((0, WINDOW), (WINDOW, None)))
        if not update_now > self.TIMES * update > 0:
            return CLEAR
        (scaled, scaled_now), (loss, loss_now) = (
            [window.median(*part) for part in ((0, WINDOW), (WINDOW, None))] for window in (self._scaled, self._losses)
        )
        if not scaled_now > self.TIMES * scaled > 0 or loss_now > self.SAME_LOSS * loss:
            return CLEAR
        rise = f"{update_now / update:.1f} x its median of {WINDOW} steps"
        return Found(f"update_norm {update_now:.3g}, {rise}; the loss, {loss_now:.4g}, has not risen yet")


class AdamFrozen(Rule):
    """Adam's eps dominates its denominator."""

    SHARE = 0.5  # of the parameters [0.0]
    quiet = 10

    name = "adam_frozen"
    remedy = "They hardly move: lower optim.eps, or raise optim.clip_norm if clipping makes gradients so small."

    def check(self, line: Line) -> Verdict:
        share = line.get("adam_frozen_share", math.nan)
        if math.isnan(share):
            return UNKNOWN
        if share <= self.SHARE:
            return CLEAR
        eps = self.facts.config.optim.eps
        return Found(f"sqrt(v) is below 10 eps (eps {eps:g}) for {share:.0%} of the parameters")


class DeadLayer(Rule):
    """A layer gets next to no gradient."""

    SHARE = 1e-3  # of the median of the other layers' grad_norm [0.1]
    quiet = 10

    name = "dead_layer"
    remedy = "It learns nothing: check its initialization and norms, and that the residual stream is not far too large."

    def check(self, line: Line) -> Verdict:
        norms = _layers(line, "layer_grad_norm")
        if norms is None or not line["grad_norm"] > 0:
            return UNKNOWN
        if self.facts.config.frozen and not any(norms):
            return CLEAR  # the layers are frozen
        others = [_median_of_others(norms, i) for i in range(len(norms))]
        dead = [i for i, norm in enumerate(norms) if norm == 0 or norm < self.SHARE * others[i]]
        texts = [f"layer {i}: grad_norm {norms[i]:.2g}, others {others[i]:.2g}" for i in dead]
        return Found("; ".join(texts[:4])) if texts else CLEAR


class ExplodingLayer(Rule):
    """One layer's gradient or update is far larger than the others'."""

    TIMES = 100.0  # the median of the other layers' grad_norm [7]
    UPDATE = 0.1  # of a layer's own norm, in one step, after the warm-up [0.023]; 1e-3 is usual in large models
    quiet = 10

    name = "exploding_layer"
    remedy = "Lower optim.peak_lr (or its product with optim.weight_decay), lengthen the warm-up, or set model.qk_norm."

    def check(self, line: Line) -> Verdict:
        norms, ratios = _layers(line, "layer_grad_norm"), _layers(line, "layer_update_ratio")
        if norms is None or ratios is None:
            return UNKNOWN
        texts = []
        for i, norm in enumerate(norms if len(norms) > 2 else []):  # of two, neither is the odd one
            others = _median_of_others(norms, i)
            if norm > self.TIMES * others > 0:
                texts.append(f"layer {i}: grad_norm {norm:.2g}, others {others:.2g}")
        if self.after_warmup(line):  # small first weights move far
            texts += [f"layer {i}: a step of {r:.0%} of its norm" for i, r in enumerate(ratios) if r > self.UPDATE]
        return Found("; ".join(texts[:4])) if texts else CLEAR


def _layers(line: Line, key: str) -> list[float] | None:
    values = line.get(key, [])
    return values if values and all(map(math.isfinite, values)) else None


def _median_of_others(norms: list[float], index: int) -> float:
    return statistics.median(norms[:index] + norms[index + 1 :]) if len(norms) > 1 else 0.0


RULES: list[type[Rule]] = [
    NonFinite,
    Float16Overflow,
    SkippedSteps,
    TooManyBadSteps,
    ClippingSaturated,
    SpikesCaught,
    UpdateNormRising,
    AdamFrozen,
    DeadLayer,
    ExplodingLayer,
    trends.InitialLoss,
    trends.StuckAtUniform,
    trends.LabelLeak,
    trends.LossRising,
    trends.ValidationRising,
    trends.GradientVanished,
    trends.ParametersGrowing,
    trends.TokensCollapsed,
    trends.LearningRateZero,
    trends.NoProgress,
    trends.ThroughputDropping,
]
