"""From the numbers of a run to what is wrong with it: findings, each with its evidence and a remedy.

Pure judgement: nothing here reads a clock, a file or a device. What counts as wrong is in `rules.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jaxtrain.config import Config
from jaxtrain.monitoring.rules import RULES, Line, Rule, RunFacts, Severity


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run, or worth knowing: what, since which step, by which numbers, what to do."""

    name: str
    severity: Severity
    step: int
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.name} at step {self.step}: {self.evidence}\n  {self.remedy}"


class Health:
    """Watches one run; small plain state, no files. Feed it every step, in order."""

    def __init__(self, facts: RunFacts):
        self._rules = [rule(facts) for rule in RULES]

    def observe(self, line: Mapping[str, Any]) -> list[Finding]:
        """Takes a step's metrics (numbers, arrays or lists, named as in a step line); returns what begins with it."""
        plain = Line((k, v.tolist() if hasattr(v, "tolist") else v) for k, v in line.items())
        return self._findings(plain["step"], ((rule, rule.check(plain)) for rule in self._rules))

    def observe_evaluation(self, event: Mapping[str, Any]) -> list[Finding]:
        """Takes the fields of an `eval` event."""
        return self._findings(event["step"], ((rule, rule.check_evaluation(Line(event))) for rule in self._rules))

    def restore(self, lines: Iterable[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]]) -> None:
        """Takes what the run did before it went on; what was found then is not found again."""
        for line in lines:
            self.observe(line)
        for event in evaluations:
            self.observe_evaluation(event)

    @staticmethod
    def _findings(step: int, verdicts: Iterable[tuple[Rule, str | bool | None]]) -> list[Finding]:
        begun = [(rule, verdict) for rule, verdict in verdicts if rule.begins(verdict)]
        return [Finding(rule.name, rule.severity, int(step), str(evidence), rule.remedy) for rule, evidence in begun]


def diagnose(lines: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], config: Config) -> list[Finding]:
    """Findings of a run from its records, as `read_metrics` returns them, by step.

    What the run found itself is in its events: it saw every step. Under other names comes what the lines alone show.
    """
    told = {}  # steps that ran twice, because of a crash, found the same twice
    for event in events:
        if event["event"] == "finding":
            told[event["name"], event["step"]] = Finding(*(event[field.name] for field in fields(Finding)))
    begins = [event for event in events if event["event"] in ("start", "resume")]
    known = {key: begins[-1].get(key, 0) for key in ("vocab_size", "train_tokens")} if begins else {}
    health = Health(RunFacts(config, **known))
    seen = [finding for line in lines for finding in health.observe(line)]
    for event in events:
        if event["event"] == "eval":
            seen += health.observe_evaluation(event)
    names = {name for name, _ in told}
    return sorted([*told.values(), *(f for f in seen if f.name not in names)], key=lambda f: f.step)
