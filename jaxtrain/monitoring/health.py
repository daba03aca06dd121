"""Health of a run: from its numbers to findings, each with its evidence and a remedy.

Reads no clock, file or device. The cases are in rules.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jaxtrain.config import Config
from jaxtrain.monitoring.rule import UNKNOWN, Found, Line, Rule, RunFacts, Severity, Verdict
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
        """Starts the rules; None takes `rules.RULES`. Of two rules with one name, the later replaces the other."""
        named = {rule.name: rule for rule in (RULES if rules is None else rules)}
        self._rules = [rule(facts) for rule in named.values()]

    def observe(self, line: Mapping[str, Any]) -> list[Finding]:
        """Judges a step line (numbers, arrays or lists); returns the cases that begin with it."""
        plain = Line((k, v.tolist() if hasattr(v, "tolist") else v) for k, v in line.items())
        return self._judge(plain["step"], lambda rule: rule.check(plain))

    def observe_evaluation(self, event: Mapping[str, Any]) -> list[Finding]:
        """Judges the fields of an `eval` event; returns the cases that begin with it."""
        return self._judge(event["step"], lambda rule: rule.check_evaluation(Line(event)))

    def restore(self, lines: Iterable[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]]) -> None:
        """Replays earlier records, so that a resumed run does not repeat findings."""
        for record, observe in _in_order(lines, evaluations):
            (self.observe_evaluation if observe else self.observe)(record)

    def _judge(self, step: int, check: Callable[[Rule], Verdict]) -> list[Finding]:
        findings = []
        for rule in list(self._rules):
            try:
                verdict = check(rule)
                news = rule.is_news(verdict)
            except Exception as error:  # a rule of a user's own
                self._rules.remove(rule)
                verdict, news = UNKNOWN, False
                evidence = f"{rule.name} raised {type(error).__name__}: {error}"
                findings.append(
                    Finding("broken_rule", "warning", int(step), evidence, "Correct it; the other rules continue.")
                )
            if news and isinstance(verdict, Found):
                findings.append(Finding(rule.name, rule.severity, int(step), verdict.text, rule.remedy))
        return findings


def _in_order(
    lines: Iterable[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], bool]]:
    """Merges steps and evaluations by step; an evaluation follows its step."""
    records = [(line, False) for line in lines] + [(event, True) for event in evaluations]
    return sorted(records, key=lambda record: (record[0]["step"], record[1]))


def diagnose(lines: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], config: Config) -> list[Finding]:
    """Returns the findings of a run from its records, as `read_metrics` returns them, by step.

    The `finding` events of the run judged every step. Findings of other names from the logged steps complete them.
    """
    own = {}  # steps that ran twice, because of a crash, have the same finding twice
    for event in events:
        if event["event"] == "finding":
            own[event["name"], event["step"]] = Finding(*(event[field.name] for field in fields(Finding)))
    begins = [event for event in events if event["event"] in ("start", "resume")]
    known = {key: begins[-1].get(key) for key in ("vocab_size", "train_tokens")} if begins else {}
    health = Health(RunFacts(config, **known))
    found = []
    for record, is_evaluation in _in_order(lines, [event for event in events if event["event"] == "eval"]):
        found += health.observe_evaluation(record) if is_evaluation else health.observe(record)
    names = {name for name, _ in own}
    return sorted([*own.values(), *(f for f in found if f.name not in names)], key=lambda f: f.step)
