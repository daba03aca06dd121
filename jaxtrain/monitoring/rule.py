"""Interface of a health rule: a class with constants, `check` and `remedy`.

To add a rule, subclass `Rule` and append it to `jaxtrain.monitoring.rules.RULES`, for example in a config file.
"""

import enum
import math
import statistics
from collections import deque
from typing import ClassVar, Literal, NamedTuple

from jaxtrain.config import Config

Severity = Literal["info", "warning", "error"]
WINDOW = 100  # steps of a share or a median: long against noise, short against a run


class Found(NamedTuple):
    """The case of a rule is present."""

    text: str  # the evidence, with numbers


class _Absent(enum.Enum):
    CLEAR = "clear"
    UNKNOWN = "unknown"


CLEAR = _Absent.CLEAR  # the case is not present
UNKNOWN = _Absent.UNKNOWN  # the step decides neither way
Verdict = Found | _Absent


class RunFacts(NamedTuple):
    """Facts of a run that rules need besides the metrics; None is unknown."""

    config: Config
    vocab_size: int | None = None  # tokens in the vocabulary of the model
    train_tokens: int | None = None  # tokens in the training split


class Line(dict):
    """Step line in which `line[name]` of an absent metric is NaN, which no comparison accepts."""

    def __missing__(self, key: str) -> float:
        return math.nan


class Window(deque):
    """The last `size` values."""

    def __init__(self, size: int = WINDOW):
        super().__init__(maxlen=size)

    @property
    def full(self) -> bool:
        return len(self) == self.maxlen

    def median(self, start: int | None = None, stop: int | None = None) -> float:
        """Returns the median, of the values `[start:stop]` if given."""
        return statistics.median(list(self)[start:stop])


class Rule:
    """One case that may be wrong with a run. An instance watches one run, step by step."""

    name: ClassVar[str]  # of the finding
    severity: ClassVar[Severity] = "warning"
    remedy: ClassVar[str]  # advice for the user
    # CLEAR verdicts until the case is reported again; after each report ten times as many
    quiet: ClassVar[int] = WINDOW

    def __init__(self, facts: RunFacts):
        self.facts = facts
        self._calm = self._needed = self._next = self.quiet
        self.start()

    def start(self) -> None:
        """Prepares what the rule remembers from step to step."""

    def check(self, line: Line) -> Verdict:
        """Judges a step."""
        return UNKNOWN

    def check_evaluation(self, event: Line) -> Verdict:
        """Judges an evaluation."""
        return UNKNOWN

    def is_news(self, verdict: Verdict) -> bool:
        """Returns True if the verdict begins a case, and counts the quiet time between two cases."""
        if verdict is UNKNOWN:
            return False
        found = isinstance(verdict, Found)
        news = found and self._calm >= self._needed
        if news:
            self._needed, self._next = self._next, 10 * self._next
        self._calm = 0 if found else self._calm + 1
        return news

    def after_warmup(self, line: Line) -> bool:
        """Returns True for a step after the learning-rate warm-up, in which gradients and updates are large."""
        return line["step"] > self.facts.config.warmup_steps
