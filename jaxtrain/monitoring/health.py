"""Health of a run: from its numbers to findings, each with its evidence and a remedy.

Reads no clock, file or device. The cases are in rules.py.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jaxtrain.config import Config
from jaxtrain.monitoring.rule import Found, Line, Rule, RunFacts, Severity, Verdict
from jaxtrain.monitoring.rules import RULES
from jaxtrain.runtime.terminal import one_line


@dataclass(frozen=True)
class Finding:
    """One case that is present in a run: its name, the step it began at, the evidence and advice."""

    name: str
    severity: Severity
    step: int
    evidence: str
    remedy: str

    def __post_init__(self):
        for name in ("name", "evidence", "remedy"):  # also of a rule of a user's own, or of a log that was edited
            object.__setattr__(self, name, one_line(str(getattr(self, name))))

    def __str__(self) -> str:
        return f"{self.severity}: {self.name} at step {self.step}: {self.evidence}\n  {self.remedy}"


class Health:
    """Judges one run by the rules. Feed it every step, in order."""

    def __init__(self, facts: RunFacts, rules: Sequence[type[Rule]] | None = None):
        """Starts the rules; None takes `rules.RULES`. Of two rules with one name, the later replaces the other.

        Raises a ValueError for a rule without a name or a remedy.
        """
        rules = RULES if rules is None else rules
        for rule, name in itertools.product(rules, ("name", "remedy")):
            if not isinstance(getattr(rule, name, None), str):
                raise ValueError(f"the rule {rule.__name__} has no {name}: add `{name} = ...` to its class")
        named = {rule.name: rule for rule in rules}
        self._rules = [rule(facts) for rule in named.values()]

    def observe(self, line: Mapping[str, Any]) -> list[Finding]:
        """Judges a step line (numbers, arrays or lists); returns the cases that begin with it."""
        plain = Line((k, v.tolist() if hasattr(v, "tolist") else v) for k, v in line.items())
        return self._judge(plain["step"], lambda rule: rule.check(plain))

    def observe_evaluation(self, event: Mapping[str, Any]) -> list[Finding]:
        """Judges the fields of an `eval` event; returns the cases that begin with it."""
        return self._judge(event["step"], lambda rule: rule.check_evaluation(Line(event)))

    def replay(self, lines: Iterable[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]]) -> Iterator[Finding]:
        """Judges earlier records in the order of their steps; an evaluation follows its step."""
        records = [(line, self.observe) for line in lines] + [(event, self.observe_evaluation) for event in evaluations]
        for record, observe in sorted(records, key=lambda pair: pair[0]["step"]):
            yield from observe(record)

    def _judge(self, step: int, check: Callable[[Rule], Verdict]) -> list[Finding]:
        findings = []
        for rule in list(self._rules):
            try:
                verdict = check(rule)
                if not isinstance(verdict, Verdict):
                    raise TypeError(f"a check must return Found(text), CLEAR or UNKNOWN, not {verdict!r}")
                if rule.is_news(verdict) and isinstance(verdict, Found):
                    findings.append(Finding(rule.name, rule.severity, int(step), verdict.text, rule.remedy))
            except Exception as error:  # a rule of a user's own
                self._rules.remove(rule)
                evidence, remedy = f"{rule.name} raised {type(error).__name__}: {error}", "Correct it; others continue."
                findings.append(Finding("broken_rule", "warning", int(step), evidence, remedy))
        return findings


def diagnose(lines: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], config: Config) -> list[Finding]:
    """Returns the findings of a run from its records, as `read_metrics` returns them, by step.

    The `finding` events of the run judged every step. Findings of other names from the logged steps complete them.
    """
    own = {}  # steps that ran twice, because of a crash, have the same finding twice
    for event in events:
        if event["event"] == "finding":
            own[event["name"], event["step"]] = Finding(*(event[field.name] for field in fields(Finding)))
    begun = next((event for event in reversed(events) if event["event"] in ("start", "resume")), {})
    health = Health(RunFacts(config, begun.get("vocab_size"), begun.get("train_tokens")))
    found = health.replay(lines, [event for event in events if event["event"] == "eval"])
    names = {name for name, _ in own}
    return sorted([*own.values(), *(f for f in found if f.name not in names)], key=lambda f: f.step)
