"""The rules of a run's health: each looks at one step line after another and says whether its case is there.

Plain Python on plain numbers: they run beside every step.
"""

import math
import statistics
from collections import deque
from typing import ClassVar, Literal, NamedTuple

from jaxtrain.config import Config

Severity = Literal["info", "warning", "error"]

# Constants were set with room around what healthy runs show (the quickstart; 400 steps of the tests' tiny model, which
# end far into overfitting): the figures of those are in brackets.
WINDOW = 100  # steps that shares and medians are over: long against noise, short against a run
SATURATED = 0.9  # share of clipped steps [0.76]
TINY_FACTOR, TINY_STEPS = 0.01, 50  # clip factors below it in a row [0.095, once]: gradients near Adam's eps
SPIKE = 10.0  # grad_norm over its median [4.1]; below that clipping is routine
UPDATE_RISE = 2.0  # median update norm of RECENT steps over that of WINDOW before [1.3]
RECENT = 5
SAME_LOSS = 1.1  # a loss that is up by less than this has not risen
FROZEN = 0.5  # share of numbers that Adam's eps holds back [0.0]
START_GAP = 0.5  # nats between the first loss and ln V [0.01]: weights of a scale that is not too large start there
FLOAT16_NORM = 1e6  # of a gradient; float16 ends at 65,504
OVERFLOWS = 20  # of WINDOW steps: loss scaling that works overflows a few times at its start, then one in 2,000
SKIPS = 3  # of WINDOW steps; one or two are spikes, which happen
FAST_SHARE, FAST_TOKENS = 0.1, 1_000_000  # below a tenth of ln V so soon, on text not seen before [0.28 at the end]
FLOOR_BITS = 0.2  # bits per byte of text not seen before; the largest models and compressors need 0.3 and more
LOSS_WINDOW = 10  # steps: one batch of repeated text is no leak
STILL_STEPS = 10  # equal losses, to the last bit, in a row
ZERO_STEPS = 3  # learning rates of 0 in a row
SLOW, SLOW_SECONDS, SLOW_LINES = 0.7, 120.0, 10  # of the best stretch; two minutes: shorter lulls are nobody's trouble
DEAD, EXPLODING = 1e-3, 100.0  # a layer's grad_norm over the median of the others' [0.1, 7]
LARGE_UPDATE = 0.1  # of a layer's own norm, in one step, after the warm-up [0.023]; 1e-3 is usual in large models

_SKIP_REASONS = {  # of jaxtrain.guard
    1: "its loss or gradient was not finite",
    2: "its loss stood out",
    3: "its gradient norm stood out",
}


class RunFacts(NamedTuple):
    """What the rules need beside the metrics; 0: not known.

    `vocab_size` is that of the model, `train_tokens` the number of tokens in the training split.
    """

    config: Config
    vocab_size: int = 0
    train_tokens: int = 0


class Line(dict):
    """A step line whose absent numbers are NaN: no comparison with them holds."""

    def __missing__(self, key: str) -> float:
        return math.nan


class Rule:
    """One case. `check` returns the evidence where it is there, False where it is not, None where nothing is known."""

    name: ClassVar[str]
    severity: ClassVar[Severity] = "warning"
    remedy: ClassVar[str]
    quiet: ClassVar[int] = WINDOW  # times that the case was not there after which it may be reported anew

    def __init__(self, facts: RunFacts):
        self.facts = facts
        self._calm = self.quiet

    def check(self, line: Line) -> str | bool | None:
        """Judges a step."""

    def check_evaluation(self, event: Line) -> str | bool | None:
        """Judges an evaluation."""

    def begins(self, verdict: str | bool | None) -> bool:
        """Whether this verdict is news."""
        if verdict is None:
            return False
        new = bool(verdict) and self._calm >= self.quiet
        self._calm = 0 if verdict else self._calm + 1
        return new


class NonFinite(Rule):
    """A loss or gradient that is no number reached the parameters."""

    name, severity = "non_finite", "error"
    remedy = (
        "What follows is lost. Go back to a checkpoint before it with --rewind STEP and leave the batch out with "
        "--data.skip, or start another run from there (--train.init-from RUN/checkpoints/STEP) with a lower "
        "optim.peak_lr or a longer warm-up."
    )

    def check(self, line: Line) -> str | bool | None:
        if "loss" not in line or self.facts.config.train.precision == "float16":
            return None  # float16_overflow knows more
        wrong = [f"{k} is {line[k]}" for k in ("loss", "grad_norm") if not math.isfinite(line.get(k, 0.0))]
        return bool(wrong) and line["skipped"] != 1 and " and ".join(wrong) + ", and the step was applied"


class Float16Overflow(Rule):
    """float16 is too narrow for this run."""

    name, severity = "float16_overflow", "error"
    remedy = (
        "float16 ends at 65,504: use --train.precision bfloat16 where the device has it, else loss scaling with a "
        "lower optim.peak_lr."
    )

    def __init__(self, facts: RunFacts):
        super().__init__(facts)
        self._overflows: deque[bool] = deque(maxlen=WINDOW)

    def check(self, line: Line) -> str | bool | None:
        if self.facts.config.train.precision != "float16":
            return None
        norm, scaled = line["grad_norm"], "loss_scale" in line
        self._overflows.append(line["skipped"] == 1 and line["skip_reason"] == 1)
        if not math.isfinite(line.get("loss", 0.0)):
            return f"the loss is {line['loss']}, grad_norm {norm:.3g}"
        if FLOAT16_NORM < norm < math.inf or (not scaled and not math.isfinite(norm)):
            return f"grad_norm is {norm:.3g}, loss {line['loss']:.4g}"
        count = sum(self._overflows)
        if count < OVERFLOWS:
            return False
        return f"{count} of the last {len(self._overflows)} steps overflowed; loss scale {line['loss_scale']:g}"


class SkippedSteps(Rule):
    """Steps are skipped too often, or one because of a NaN."""

    name = "skipped_steps"
    remedy = (
        "Nothing of them was applied. Look at the batches of those steps; if they are fine, lower optim.peak_lr or "
        "lengthen the warm-up."
    )

    def __init__(self, facts: RunFacts):
        super().__init__(facts)
        self._skips: deque[bool] = deque(maxlen=WINDOW)

    def check(self, line: Line) -> str | bool | None:
        skipped, reason = line["skipped"] == 1, line["skip_reason"]
        overflow = reason == 1 and self.facts.config.train.precision == "float16"  # routine under loss scaling
        self._skips.append(skipped and not overflow)
        count = sum(self._skips)
        if not self._skips[-1] or (count < SKIPS and reason != 1):
            return False
        why = _SKIP_REASONS.get(reason, "the optimizer refused it")
        return f"{count} of the last {len(self._skips)} steps skipped, this one because {why}"


class TooManyBadSteps(Rule):
    """The guard gives up."""

    name, severity = "too_many_bad_steps", "error"
    remedy = (
        "The run ends here, with its last good parameters: skipping more would only hide the cause. Go back with "
        "--rewind STEP and leave those batches out with --data.skip, or start another run from an earlier checkpoint "
        "(--train.init-from RUN/checkpoints/STEP) with a lower optim.peak_lr."
    )

    def check(self, line: Line) -> str | bool | None:
        why = _SKIP_REASONS.get(line["skip_reason"], "the optimizer refused it")
        return line.get("give_up") == 1 and f"too many of the last steps were skipped, this one because {why}"


class ClippingSaturated(Rule):
    """Nearly every step is clipped (R-D9)."""

    name = "clipping_saturated"
    remedy = (
        "The threshold now sets the step size: lower optim.peak_lr or look for bad data; if the loss falls well, raise "
        "optim.clip_norm."
    )

    def __init__(self, facts: RunFacts):
        super().__init__(facts)
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._tiny = 0

    def check(self, line: Line) -> str | bool | None:
        factor = line.get("clip_factor", math.nan)
        if math.isnan(factor) or line["skipped"] == 1:
            return None
        self._tiny = self._tiny + 1 if factor < TINY_FACTOR else 0
        if line["step"] > self.facts.config.optim.warmup_steps:  # gradients are large before it ends
            self._recent.append((factor, line["grad_norm"]))
        if self._tiny > TINY_STEPS:
            return (
                f"{self._tiny} steps in a row were scaled by less than {TINY_FACTOR:g} (now {factor:.2g}, grad_norm "
                f"{line['grad_norm']:.3g}): such gradients come near Adam's eps"
            )
        count = sum(factor < 1 for factor, _ in self._recent)
        routine = self.facts.config.optim.clipping == "adaptive"  # a share of the units, in nearly every step
        if routine or len(self._recent) < WINDOW or count <= SATURATED * WINDOW:
            return False
        middle = statistics.median(norm for _, norm in self._recent)
        return f"{count} of the last {WINDOW} steps were clipped, median grad_norm {middle:.3g}"


class SpikesCaught(Rule):
    """A single spike, dealt with."""

    name, severity = "spikes_caught", "info"
    remedy = "A spike now and then is fine, and this is what clipping and skipping are for: nothing to do."
    quiet = 10 * WINDOW

    def __init__(self, facts: RunFacts):
        super().__init__(facts)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def check(self, line: Line) -> str | bool | None:
        norm, skipped, factor = line["grad_norm"], line["skipped"] == 1, line.get("clip_factor", math.nan)
        if skipped and line["skip_reason"] in (2, 3):
            return f"a step was skipped because {_SKIP_REASONS[line['skip_reason']]} (grad_norm {norm:.3g})"
        if skipped or not math.isfinite(norm):
            return None
        middle = statistics.median(self._norms) if len(self._norms) == WINDOW else math.inf
        self._norms.append(norm)
        if norm <= SPIKE * middle or not factor < 1:
            return False
        return f"grad_norm {norm:.3g}, {norm / middle:.0f} x its median, was clipped by a factor {factor:.2g}"


class UpdateNormRising(Rule):
    """The updates grow before the loss does (R-D9)."""

    name = "update_norm_rising"
    remedy = "This often comes before a loss spike: keep a checkpoint from before, lower optim.peak_lr or optim.b2."

    def __init__(self, facts: RunFacts):
        super().__init__(facts)
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=WINDOW + RECENT)

    def check(self, line: Line) -> str | bool | None:
        update, rate, loss = line["update_norm"], line.get("learning_rate", 1.0), line["loss"]
        usable = line["skipped"] != 1 and rate > 0 and math.isfinite(update) and math.isfinite(loss)
        if not usable or line["step"] <= self.facts.config.optim.warmup_steps:
            return None
        # A schedule that rises again takes the norm with it; one that falls hides a rise. Both must have doubled.
        self._recent.append((update, update / rate, loss))
        if len(self._recent) < WINDOW + RECENT:
            return None
        columns = [list(column) for column in zip(*self._recent, strict=True)]
        before = [statistics.median(column[:WINDOW]) for column in columns]
        now = [statistics.median(column[WINDOW:]) for column in columns]
        risen = all(now[i] > UPDATE_RISE * before[i] > 0 for i in (0, 1))
        if not risen or now[2] > SAME_LOSS * before[2]:
            return False
        return (
            f"update_norm {now[0]:.3g}, {now[0] / before[0]:.1f} x its median of {WINDOW} steps; the loss, "
            f"{now[2]:.4g}, has not risen yet"
        )


class AdamFrozen(Rule):
    """Adam's eps rules its denominator (R-B13b)."""

    name = "adam_frozen"
    remedy = (
        "Those numbers hardly move: lower optim.eps, or raise optim.clip_norm if clipping makes gradients so small."
    )
    quiet = 10

    def check(self, line: Line) -> str | bool | None:
        share = line["adam_frozen_share"]
        if math.isnan(share):
            return None
        return share > FROZEN and (
            f"sqrt(v) is below 10 eps (eps {self.facts.config.optim.eps:g}) for {share:.0%} of the parameters"
        )


class InitialLoss(Rule):
    """The first loss is not that of a uniform guess."""

    name = "initial_loss"
    remedy = "A model that knows nothing starts at ln V: check vocabulary and tokenizer, labels, and initialization."

    def check(self, line: Line) -> str | bool | None:
        warm = self.facts.config.train.init_from
        if line["step"] != 1 or not self.facts.vocab_size or warm:
            return None
        expected = math.log(self.facts.vocab_size)
        if not abs(line["nll"] - expected) > START_GAP:
            return False
        return f"the first loss is {line['nll']:.4g}, far from ln {self.facts.vocab_size:,} = {expected:.4g}"


class LabelLeak(Rule):
    """New text is predicted better than text can be."""

    name = "label_leak"
    remedy = (
        "Unless the text repeats itself that much, the model sees its labels: check the shift by one token, the causal "
        "mask, held-out text among the training data, and whether the same batch comes again."
    )

    def __init__(self, facts: RunFacts):
        super().__init__(facts)
        self._losses: deque[float] = deque(maxlen=LOSS_WINDOW)

    def check(self, line: Line) -> str | bool | None:
        settings = self.facts.config.train
        tokens = line["step"] * settings.batch_size * settings.seq_len
        # Only in the first epoch is a low loss no memory of the text.
        if not self.facts.vocab_size or tokens > min(self.facts.train_tokens, FAST_TOKENS):
            return None
        self._losses.append(line["nll"])
        uniform, loss = math.log(self.facts.vocab_size), statistics.median(self._losses)
        if len(self._losses) < LOSS_WINDOW or not loss < FAST_SHARE * uniform:
            return False
        return f"the loss fell to {loss:.3g}, {loss / uniform:.1%} of ln V, within {tokens:,} tokens not seen before"

    def check_evaluation(self, event: Line) -> str | bool | None:
        bits = event["bits_per_byte"]
        if not bits < FLOOR_BITS:
            return False
        return f"{bits:.3g} bits per byte on held-out text; no model is known to need fewer than {FLOOR_BITS:g}"


class LearningRateZero(Rule):
    """The learning rate is 0 before the end."""

    name = "learning_rate_zero"
    remedy = "Nothing is learned: check optim.peak_lr, optim.floor and where the schedule ends (`jaxtrain schedule`)."

    def __init__(self, facts: RunFacts):
        super().__init__(facts)
        self._zeros = 0

    def check(self, line: Line) -> str | bool | None:
        settings = self.facts.config
        cycle = settings.train.steps // (settings.optim.cycles if settings.optim.schedule == "sgdr" else 1)
        if "learning_rate" not in line or line["step"] % cycle == 0:
            return None  # the last step of a schedule may be at 0
        self._zeros = self._zeros + 1 if line["learning_rate"] == 0 else 0
        if self._zeros < ZERO_STEPS:
            return False
        return f"0 in {self._zeros} steps, with {settings.train.steps - line['step']:,} to go"


class NoProgress(Rule):
    """Steps that change nothing."""

    name = "no_progress"
    remedy = "The steps change nothing: check that batches hold tokens that count, and that gradients reach the model."

    def __init__(self, facts: RunFacts):
        super().__init__(facts)
        self._loss, self._equal = math.nan, 0

    def check(self, line: Line) -> str | bool | None:
        if line["tokens"] == 0:
            return "the batch has no token that counts"
        if line["skipped"] == 1 or line.get("learning_rate") == 0:
            return None
        self._equal = self._equal + 1 if line["loss"] == self._loss else 1
        self._loss = line["loss"]
        return self._equal >= STILL_STEPS and f"the loss is {self._loss:.6g}, bit for bit, in {self._equal} steps"


class ThroughputDropping(Rule):
    """Steps take longer than they did."""

    name = "throughput_dropping"
    remedy = (
        "Look for another process on the machine, a hot or failing device, or slow storage under the data; a run of "
        "several hosts is as fast as the slowest."
    )
    quiet = 10

    def __init__(self, facts: RunFacts):
        super().__init__(facts)
        self._attempt, self._step, self._best = math.nan, 0, 0.0
        self._speeds: list[float] = []
        self._seconds = 0.0

    def check(self, line: Line) -> str | bool | None:
        speed = line["tokens_per_second"]
        if not speed > 0:
            return None
        if line["attempt"] != self._attempt:  # perhaps on another machine
            self._attempt, self._step, self._best = line["attempt"], line["step"], 0.0
            self._speeds, self._seconds = [], 0.0
        self._speeds.append(speed)
        self._seconds += line["step_seconds"] * (line["step"] - self._step)
        self._step = line["step"]
        if self._seconds < SLOW_SECONDS or len(self._speeds) < SLOW_LINES:
            return None
        recent, best = statistics.median(self._speeds), self._best
        self._best, self._speeds, self._seconds = max(recent, best), [], 0.0
        if recent >= SLOW * best:
            return False
        return f"{recent:,.0f} tokens/s over {SLOW_SECONDS:.0f} s and more, {recent / best:.0%} of {best:,.0f} before"


class DeadLayer(Rule):
    """A layer gets next to no gradient."""

    name = "dead_layer"
    remedy = "It learns nothing: check its initialization and norms, and that the residual stream is not far too large."
    quiet = 10

    def check(self, line: Line) -> str | bool | None:
        norms = _sampled(line, "layer_grad_norm")
        if norms is None or not line["grad_norm"] > 0:
            return None
        dead = [i for i, norm in enumerate(norms) if norm == 0 or norm < DEAD * _median_of_others(norms, i)]
        return bool(dead) and "; ".join(
            f"layer {i}: grad_norm {norms[i]:.2g}, others {_median_of_others(norms, i):.2g}" for i in dead[:4]
        )


class ExplodingLayer(Rule):
    """A layer gets far more gradient, or moves far more, than is well."""

    name = "exploding_layer"
    remedy = "Lower optim.peak_lr (or its product with optim.weight_decay), lengthen the warm-up, or set model.qk_norm."
    quiet = 10

    def check(self, line: Line) -> str | bool | None:
        norms, ratios = _sampled(line, "layer_grad_norm"), _sampled(line, "layer_update_ratio")
        if norms is None or ratios is None:
            return None
        texts = []
        for i, norm in enumerate(norms if len(norms) > 2 else []):  # of two, nobody can say which one is odd
            others = _median_of_others(norms, i)
            if norm > EXPLODING * others > 0:
                texts.append(f"layer {i}: grad_norm {norm:.2g}, others {others:.2g}")
        if line["step"] > self.facts.config.optim.warmup_steps:  # small first weights move far
            large = [f"layer {i}: a step of {ratio:.0%} of its norm" for i, ratio in enumerate(ratios)]
            texts += [text for text, ratio in zip(large, ratios, strict=True) if ratio > LARGE_UPDATE]
        return bool(texts) and "; ".join(texts[:4])


def _sampled(line: Line, key: str) -> list[float] | None:
    values = line.get(key, [])
    return values if values and all(map(math.isfinite, values)) else None


def _median_of_others(norms: list[float], index: int) -> float:
    return statistics.median(norms[:index] + norms[index + 1 :]) if len(norms) > 1 else 0.0


RULES: tuple[type[Rule], ...] = (
    NonFinite,
    Float16Overflow,
    SkippedSteps,
    TooManyBadSteps,
    ClippingSaturated,
    SpikesCaught,
    UpdateNormRising,
    AdamFrozen,
    InitialLoss,
    LabelLeak,
    LearningRateZero,
    NoProgress,
    ThroughputDropping,
    DeadLayer,
    ExplodingLayer,
)
