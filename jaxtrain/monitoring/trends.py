"""Rules about the course of a run: its losses over many steps, its evaluations, sizes and speed.

Numbers in brackets are what healthy runs show; see rules.py.
"""

import math
import statistics

from jaxtrain.monitoring.rule import CLEAR, UNKNOWN, WINDOW, Found, Line, Rule, Verdict, Window


class InitialLoss(Rule):
    """The first loss is far from the loss of a uniform guess."""

    GAP = 0.5  # nats between the first loss and ln V [0.01]

    name = "initial_loss"
    remedy = "An untrained model starts near ln V: check the tokenizer, the labels and the scale of the first weights."

    def check(self, line: Line) -> Verdict:
        known = self.facts.vocab_size and line["tokens"] != 0
        if line["step"] != 1 or not known or self.facts.config.train.init_from:
            return UNKNOWN
        expected = math.log(self.facts.vocab_size)
        if not abs(line["nll"] - expected) > self.GAP:
            return CLEAR
        return Found(f"the first loss is {line['nll']:.4g}, far from ln {self.facts.vocab_size:,} = {expected:.4g}")


class StuckAtUniform(Rule):
    """The loss stays at the loss of a uniform guess."""

    STEPS = 200  # and the warm-up: later, a model that learns has left ln V far behind
    SHARE = 0.03  # of ln V [0.4 at step 200]

    name = "stuck_at_uniform"
    remedy = "Check that gradients reach all parameters, that labels belong to their inputs, and optim.peak_lr."

    def start(self) -> None:
        self._losses = Window()

    def check(self, line: Line) -> Verdict:
        if not self.facts.vocab_size or not math.isfinite(line["nll"]):
            return UNKNOWN
        self._losses.append(line["nll"])
        if not self._losses.full or line["step"] <= self.facts.config.warmup_steps + self.STEPS:
            return UNKNOWN
        loss, uniform = self._losses.median(), math.log(self.facts.vocab_size)
        if abs(loss - uniform) > self.SHARE * uniform:
            return CLEAR
        return Found(f"the loss is {loss:.4g} after {line['step']:,} steps, that of a uniform guess is {uniform:.4g}")


class LabelLeak(Rule):
    """New text is predicted better than any text can be."""

    SHARE, TOKENS = 0.1, 1_000_000  # loss over ln V within the first tokens of the first epoch [0.28]
    STEPS = 10  # of the median: one batch of repeated text is no leak
    COUNTED = 0.5  # of the labels: completions of which few labels count may be easy
    FLOOR_BITS = 0.2  # bits per byte of held-out text; the largest models and compressors need 0.3 and more

    name = "label_leak"
    remedy = (
        "Unless the text repeats itself that much, the model sees its labels: check the shift by one token, the mask, "
        "held-out text among the training data, and whether the same batch comes again."
    )

    def start(self) -> None:
        self._losses = Window(self.STEPS)

    def check(self, line: Line) -> Verdict:
        settings = self.facts.config.train
        tokens = line["step"] * settings.batch_size * settings.seq_len
        # Only in the first epoch is a low loss no memory of the text.
        new = tokens <= min(self.facts.train_tokens or 0, self.TOKENS)
        few = line["tokens"] < self.COUNTED * settings.batch_size * settings.seq_len
        if not self.facts.vocab_size or not new or few:
            return UNKNOWN
        self._losses.append(line["nll"])
        uniform, loss = math.log(self.facts.vocab_size), self._losses.median()
        if not self._losses.full or not loss < self.SHARE * uniform:
            return CLEAR
        return Found(f"the loss fell to {loss:.3g}, {loss / uniform:.1%} of ln V, in {tokens:,} tokens not seen before")

    def check_evaluation(self, event: Line) -> Verdict:
        bits = event.get("bits_per_byte")  # absent if the bytes of the text are not known
        if bits is None or not bits < self.FLOOR_BITS:
            return CLEAR
        return Found(f"{bits:.3g} bits per byte on held-out text; no known model needs fewer than {self.FLOOR_BITS:g}")


class LossRising(Rule):
    """The loss is higher than it was, and stays there."""

    RISE, SHARE = 0.1, 0.03  # nats, and of the best loss, over the best median of WINDOW steps [0.02]
    NOISE = 6.0  # standard errors of a median: the best of many blocks is compared with the last
    RESTART = 3.0  # times as much under a schedule that restarts
    quiet = 3  # blocks of WINDOW steps

    name = "loss_rising"
    remedy = (
        "If the data does not change there, go back to a checkpoint before the rise (--rewind STEP), and lower "
        "optim.peak_lr or leave the batches at its start out (--data.skip)."
    )

    def start(self) -> None:
        self._losses = Window()
        self._best, self._best_step = math.inf, 0

    def check(self, line: Line) -> Verdict:
        if not math.isfinite(line["loss"]) or line["skipped"] == 1:
            return UNKNOWN
        self._losses.append(line["loss"])
        if not self._losses.full:
            return UNKNOWN
        values = list(self._losses)
        self._losses.clear()  # blocks that do not overlap: their medians are independent
        loss = statistics.median(values)
        spread = 1.4826 * statistics.median(abs(value - loss) for value in values)
        limit = max(self.RISE + self.SHARE * self._best, self.NOISE * 1.25 * spread / math.sqrt(WINDOW))
        if self.facts.config.optim.schedule == "sgdr":
            limit *= self.RESTART
        if loss < self._best:
            self._best, self._best_step = loss, int(line["step"])
        if loss <= self._best + limit:
            return CLEAR
        best = f"{self._best:.4g} at step {self._best_step:,}"
        return Found(f"the median loss of the last {WINDOW} steps is {loss:.4g}; it was {best}")


class ValidationRising(Rule):
    """The validation loss rises while the training loss falls."""

    RISE, SHARE = 0.03, 0.01  # nats, and of the best validation loss, in EVALUATIONS in a row
    EVALUATIONS = 2
    quiet = 3

    name = "validation_rising"
    remedy = "Stop, train on more text, or raise optim.weight_decay; checkpoint.keep_best keeps the best checkpoint."

    def start(self) -> None:
        self._losses, self._best, self._best_step, self._count = Window(), math.inf, 0, 0
        self._train_at_best = math.inf

    def check(self, line: Line) -> Verdict:
        if math.isfinite(line["nll"]) and line["skipped"] != 1:
            self._losses.append(line["nll"])
        return UNKNOWN

    def check_evaluation(self, event: Line) -> Verdict:
        loss, train = event["nll"], self._losses.median(-20) if len(self._losses) else math.nan
        if not math.isfinite(loss):
            return UNKNOWN
        if loss < self._best:
            self._best, self._best_step, self._train_at_best = loss, int(event["step"]), train
        risen = loss > self._best * (1 + self.SHARE) + self.RISE and not train > self._train_at_best
        self._count = self._count + 1 if risen else 0
        if self._count < self.EVALUATIONS:
            return CLEAR
        text = f"the validation loss is {loss:.4g}, it was {self._best:.4g} at step {self._best_step:,}; "
        text += f"the training loss fell from {self._train_at_best:.4g} to {train:.4g}"
        if self.facts.config.data.packing == "best_fit":
            text += "; validation windows cut documents, and rows of best-fit packing do not"
        return Found(text)


class GradientVanished(Rule):
    """The gradient is next to nothing although there is a loss."""

    NORM, LOSS, STEPS = 1e-6, 0.1, 10  # median grad_norm [0.01], loss in nats, steps

    name = "gradient_vanished"
    remedy = (
        "Look for a stop_gradient, saturated activations or logits, or a loss that is scaled down; go back to a "
        "checkpoint before it with --rewind STEP."
    )

    def start(self) -> None:
        self._norms = Window(self.STEPS)

    def check(self, line: Line) -> Verdict:
        norm = line["grad_norm"]
        if not math.isfinite(norm) or line["tokens"] == 0:
            return UNKNOWN
        self._norms.append(norm)
        if not self._norms.full or self._norms.median() >= self.NORM or not line["loss"] > self.LOSS:
            return CLEAR
        return Found(f"grad_norm is {norm:.2g} in {self.STEPS} steps, the loss {line['loss']:.4g}")


class ParametersGrowing(Rule):
    """The parameters grow without end."""

    DOUBLED, TIMES = 2.0, 10.0  # within WINDOW steps after as many [1.1]; over the first norm [4]

    name = "parameters_growing"
    remedy = "Lower optim.peak_lr or raise optim.weight_decay: growing weights end in a divergence."
    quiet = 10 * WINDOW

    def start(self) -> None:
        self._norms, self._first, self._count = Window(), math.nan, 0

    def check(self, line: Line) -> Verdict:
        norm = line["param_norm"]
        if not math.isfinite(norm):
            return UNKNOWN
        if math.isnan(self._first):
            self._first = norm or math.inf  # a model may start from zeros
        before = next(iter(self._norms), math.nan)
        self._norms.append(norm)
        self._count += 1
        doubled = self._count > 2 * WINDOW and self.after_warmup(line) and norm > self.DOUBLED * before
        if not doubled and not norm > self.TIMES * self._first:
            return CLEAR
        earlier = f"{before:.4g} {WINDOW} steps before" if doubled else f"{self._first:.4g} at first"
        return Found(f"param_norm is {norm:.4g}; it was {earlier}")


class TokensCollapsed(Rule):
    """Far fewer tokens of a batch count than before."""

    SHARE, STEPS = 0.5, 20  # of the largest median of as many steps [1.0]

    name = "tokens_collapsed"
    remedy = "Look at the data from there on: padding, documents of one token, or a mixture that ran out."

    def start(self) -> None:
        self._tokens, self._most = Window(self.STEPS), 0.0

    def check(self, line: Line) -> Verdict:
        if not line["tokens"] >= 0:
            return UNKNOWN
        self._tokens.append(line["tokens"])
        if not self._tokens.full:
            return UNKNOWN
        tokens = self._tokens.median()
        self._most = max(self._most, tokens)
        if tokens >= self.SHARE * self._most:
            return CLEAR
        return Found(f"{tokens:,.0f} tokens a step count, {tokens / self._most:.0%} of {self._most:,.0f} before")


class LearningRateZero(Rule):
    """The learning rate is 0 before the end."""

    STEPS = 3  # in a row

    name = "learning_rate_zero"
    remedy = "Nothing is learned: check optim.peak_lr, optim.floor and where the schedule ends (`jaxtrain schedule`)."

    def start(self) -> None:
        self._zeros = 0

    def check(self, line: Line) -> Verdict:
        settings = self.facts.config
        cycle = settings.train.steps // (settings.optim.cycles if settings.optim.schedule == "sgdr" else 1)
        if "learning_rate" not in line or line["step"] % cycle == 0:
            return UNKNOWN  # the last step of a schedule may be at 0
        self._zeros = self._zeros + 1 if line["learning_rate"] == 0 else 0
        if self._zeros < self.STEPS:
            return CLEAR
        return Found(f"0 in {self._zeros} steps, with {settings.train.steps - line['step']:,} to go")


class NoProgress(Rule):
    """Steps change nothing."""

    STEPS = 10  # of equal losses, to the last bit
    EMPTY = 3  # batches in a row without a token that counts; long prompts may fill one

    name = "no_progress"
    remedy = "The steps change nothing: check that batches hold tokens that count, and that gradients reach the model."

    def start(self) -> None:
        self._loss, self._equal, self._empty = math.nan, 0, 0

    def check(self, line: Line) -> Verdict:
        self._empty = self._empty + 1 if line["tokens"] == 0 else 0
        if self._empty >= self.EMPTY:
            return Found(f"{self._empty} batches in a row have no token that counts")
        if self._empty or line["skipped"] == 1 or line["learning_rate"] == 0:
            return UNKNOWN
        self._equal = self._equal + 1 if line["loss"] == self._loss else 1
        self._loss = line["loss"]
        if self._equal < self.STEPS:
            return CLEAR
        return Found(f"the loss is {self._loss:.6g}, bit for bit, in {self._equal} steps")


class ThroughputDropping(Rule):
    """Steps take longer than before."""

    SHARE = 0.7  # of the best stretch
    SECONDS, LINES = 120.0, 10  # of a stretch: shorter lulls need no attention
    quiet = 10

    name = "throughput_dropping"
    remedy = "Look for another process on the machine, a hot or failing device or host, or slow storage under the data."

    def start(self) -> None:
        self._attempt, self._step, self._best = math.nan, 0, 0.0
        self._speeds: list[float] = []
        self._seconds = 0.0

    def check(self, line: Line) -> Verdict:
        speed = line["tokens_per_second"]
        if not speed > 0:
            return UNKNOWN
        if line["attempt"] != self._attempt:  # perhaps on another machine
            self._attempt, self._step, self._best = line["attempt"], line["step"], 0.0
            self._speeds, self._seconds = [], 0.0
        self._speeds.append(speed)
        self._seconds += line["step_seconds"] * (line["step"] - self._step)
        self._step = line["step"]
        if self._seconds < self.SECONDS or len(self._speeds) < self.LINES:
            return UNKNOWN
        recent, best = statistics.median(self._speeds), self._best
        self._best, self._speeds, self._seconds = max(recent, best), [], 0.0
        if recent >= self.SHARE * best:
            return CLEAR
        return Found(f"{recent:,.0f} tokens/s over {self.SECONDS:.0f} s, {recent / best:.0%} of {best:,.0f} before")
