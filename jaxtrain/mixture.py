"""Mixtures of token stores: their text form, and which source gives each sequence of a run.

  web:0.7 code:0.3 until 0.8, then web:0.2 code:0.8

A stage lists its sources: `code:0.3` is a share of the sequences, `books:2x` exactly two passes over the source. The
shares of a stage sum to 1 and divide what its passes leave. Each stage but the last ends at a share of train.steps
(`until 0.8`) or after a step (`until 800`).
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

_NAME = re.compile(r"[\w.+-]+")
_EXAMPLE = "write such as 'web:0.7 code:0.3 until 0.8, then web:0.2 code:0.8'"


class Stage(NamedTuple):
    """Stage of a mixture as written: shares and passes of its sources, and its end (None: the end of the run)."""

    shares: dict[str, Fraction]
    passes: dict[str, Fraction]
    until: Fraction | None  # below 1: share of the steps; else the stage's last step


def parse_mixture(text: str) -> list[Stage]:
    """Reads the text of a mixture. Raises a ValueError if it is none, or if the shares of a stage do not sum to 1."""
    stages = [_parse_stage(part.split()) for part in re.split(r"(?:,\s*|\s+)then(?=\s|$)|,", text.strip())]
    for number, stage in enumerate(stages, 1):
        if (stage.until is None) != (number == len(stages)):
            problem = "has no `until`" if stage.until is None else "is the last and has an `until`"
            raise ValueError(f"data.mixture: stage {number} {problem}; every stage but the last needs one: {_EXAMPLE}")
        total = float(sum(stage.shares.values()))
        if stage.shares and total != 1:
            thirds = ", a third as 1/3" if abs(total - 1) < 0.02 else ""
            raise ValueError(f"data.mixture: the shares of stage {number} sum to {total:g}, and must sum to 1{thirds}")
    return stages


def _parse_stage(words: Sequence[str]) -> Stage:
    stage = Stage({}, {}, None)
    if "until" in words:
        words, end = words[: words.index("until")], words[words.index("until") + 1 :]
        text = " ".join(end[1:] if end[:1] == ["step"] else end)
        until = _number(text, "until")
        if not (0 < until < 1 or (until >= 1 and until.denominator == 1)):
            raise ValueError(f"data.mixture: `until {text}` is neither a share of the steps (0.8) nor a step (800)")
        stage = stage._replace(until=until)
    for word in words:
        name, colon, amount = word.rpartition(":")
        if not colon or not _NAME.fullmatch(name):
            raise ValueError(f"data.mixture: {word!r} is no NAME:SHARE or NAME:PASSESx; {_EXAMPLE}")
        if name in stage.shares | stage.passes:
            raise ValueError(f"data.mixture: a stage names {name} twice: add its amounts up")
        into = stage.passes if amount.endswith("x") else stage.shares
        into[name] = _number(amount.removesuffix("x"), word)
        if into[name] <= 0:
            raise ValueError(f"data.mixture: the amount of {word!r} must be above 0; leave the source out instead")
    if not words:
        raise ValueError(f"data.mixture: a stage without sources; {_EXAMPLE}")
    return stage


def _number(text: str, what: str) -> Fraction:
    """Reads a decimal or a fraction exactly."""
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?|\.[0-9]{1,12}|[0-9]{1,12}/[1-9][0-9]{0,11}", text):
        raise ValueError(f"data.mixture: {text!r} of {what!r} is no number such as 0.3, 1/3 or 2x; {_EXAMPLE}")
    return Fraction(text)


def parse_stores(stores: Sequence[str]) -> dict[str, str]:
    """Reads the entries of `data.stores`, `NAME=DIR` or `DIR`, which is named after its folder.

    Raises a ValueError for a name that a mixture cannot spell, or that two stores have.
    """
    found: dict[str, str] = {}
    for entry in stores:
        name, equals, path = entry.partition("=")
        if not equals:
            name, path = entry.rstrip("/").rpartition("/")[2], entry
        if not path or not _NAME.fullmatch(name) or name in ("then", "until"):
            raise ValueError(f"data.stores: {entry!r} has no usable name: write NAME=DIR, such as web=stores/web-2024")
        if name in found:
            raise ValueError(f"data.stores: {found[name]} and {path} are both named {name}: write NAME=DIR")
        found[name] = path
    return found


@dataclass(frozen=True)
class Mixture:
    """Assignment of sequences to sources: a pure function of their number, exact at every length.

    Sequences count from 0 over the whole run, `batch_size` to a batch. After any number of sequences of a stage, a
    source has given its share of them to within 1 for each source listed before it, and 1 for itself.
    """

    names: tuple[str, ...]  # the sources
    # first batch of each stage, with its sources as (index in `names`, share) in the order that deals them out
    stages: tuple[tuple[int, tuple[tuple[int, Fraction], ...]], ...]
    batch_size: int  # sequences per batch

    def counts(self, num_sequences: int) -> list[int]:
        """Returns how many of the first `num_sequences` each source gives."""
        totals = [0] * len(self.names)
        bounds = [*(start * self.batch_size for start, _ in self.stages), num_sequences]
        for deal, (begin, end) in zip(self._deals, itertools.pairwise(bounds), strict=True):
            for index, count in _deal(deal, max(min(end, num_sequences) - begin, 0)):
                totals[index] += count
        return totals

    def sources(self, start: int, stop: int) -> list[int]:
        """Returns the index of the source of each of the sequences [start, stop)."""
        chosen = []
        for sequence in range(start, stop):
            stage = max(i for i, (first, _) in enumerate(self.stages) if first * self.batch_size <= sequence)
            done = sequence - self.stages[stage][0] * self.batch_size
            deal = self._deals[stage]
            pairs = zip(_deal(deal, done), _deal(deal, done + 1), strict=True)
            chosen.append(next(index for (index, before), (_, after) in pairs if after > before))
        return chosen

    @cached_property
    def _deals(self) -> list[list[tuple[int, int, int]]]:
        """Each stage's sources with their part of what the sources before them leave, as numerator and denominator."""
        deals = []
        for _, shares in self.stages:
            left, deal = Fraction(1), []
            for index, share in shares:
                deal.append((index, *(share / left).as_integer_ratio()))
                left -= share
            deals.append(deal)
        return deals


def _deal(deal: Sequence[tuple[int, int, int]], count: int) -> list[tuple[int, int]]:
    """Splits `count` sequences over the sources. No source's part shrinks as the count grows."""
    parts = []
    for index, numerator, denominator in deal:
        part = count * numerator // denominator
        parts.append((index, part))
        count -= part
    return parts


def make_mixture(text: str | None, windows: Mapping[str, int], steps: int, batch_size: int) -> Mixture:
    """Makes the mixture of a run.

    Args:
      text: see `parse_mixture`; None reads every source in proportion to its size.
      windows: sequences in one pass over each source.

    Raises:
      ValueError: an unknown source, stages that do not lie in the run, or passes that do not fill or fit their stage.
    """
    names, total = tuple(windows), sum(windows.values())
    if text is None:
        shares = tuple((i, Fraction(windows[name], total)) for i, name in enumerate(names) if windows[name])
        return Mixture(names, ((0, shares),), batch_size)
    stages, start = [], 0
    written = parse_mixture(text)
    for number, stage in enumerate(written, 1):
        if unknown := [name for name in stage.shares | stage.passes if name not in windows]:
            raise ValueError(f"data.mixture names {unknown[0]!r}: the stores are {', '.join(names)} (data.stores)")
        if empty := [name for name in stage.shares | stage.passes if not windows[name]]:
            raise ValueError(f"data.mixture names {empty[0]!r}, whose text is shorter than train.seq_len + 1 tokens")
        until = steps if stage.until is None else stage.until
        stop = round(until * steps) if until < 1 else int(until)
        if not start < stop <= steps or (stop == steps and number < len(written)):
            problem = f"stage {number} would be steps {start + 1} to {stop} of {steps} (train.steps)"
            raise ValueError(f"data.mixture: {problem}: let each stage end after the one before, and before the run")
        stages.append((start, _shares(stage, number, windows, stop - start, batch_size)))
        start = stop
    return Mixture(names, tuple(stages), batch_size)


def _shares(
    stage: Stage, number: int, windows: Mapping[str, int], steps: int, batch_size: int
) -> tuple[tuple[int, Fraction], ...]:
    """Returns index and share of a stage's sources; those with passes come first, so that their number is exact."""
    sequences, names = steps * batch_size, list(windows)
    needed = {name: passes * windows[name] for name, passes in stage.passes.items()}
    total = sum(needed.values(), Fraction(0))
    has = f"data.mixture: the passes of stage {number} read {float(total):g} sequences, and its {steps} steps"
    if total >= sequences if stage.shares else total // batch_size > steps:
        raise ValueError(f"{has} only {sequences}: write fewer passes, or give it {-(-total // batch_size)} steps")
    if not stage.shares and total // batch_size < steps:
        remedy = "end the stage there, or give a source a share instead"
        raise ValueError(f"{has} {sequences}: they run out after {total // batch_size} steps; {remedy}")
    scale = total if not stage.shares else Fraction(sequences)
    rest = 1 - total / scale
    shares = [(name, count / scale) for name, count in needed.items()]
    shares += [(name, share * rest) for name, share in stage.shares.items()]
    return tuple((names.index(name), share) for name, share in shares)


def check_epochs(mixture: Mixture, windows: Mapping[str, int], steps: int, limit: float) -> None:
    """Raises a ValueError if a run reads a source more than `limit` times."""
    counts = mixture.counts(steps * mixture.batch_size)
    for name, count in zip(mixture.names, counts, strict=True):
        if windows[name] and count > limit * windows[name]:
            what, times = f"the source {name}" if name else "the data", f"{count / windows[name]:.2f} times"
            remedy = "lower train.steps or its share in data.mixture, or raise the limit"
            raise ValueError(f"data.max_epochs {limit:g}: {steps} steps read {what} {times}; {remedy}")


def past_of(
    mixture: Mixture, identity: Mapping[str, str], batches: int
) -> list[tuple[int, list[tuple[str, Fraction]]]]:
    """Returns what decides the first batches of a run: start, and identity and share of the sources, of each stage."""
    return [
        (start, [(identity[mixture.names[index]], share) for index, share in shares])
        for start, shares in mixture.stages
        if start < batches
    ]


def describe_mixture(mixture: Mixture) -> str:
    """Returns one line, such as `web 70%, code 30%; from step 801: code 100%`."""
    lines = []
    for start, shares in mixture.stages:
        shown = ", ".join(f"{mixture.names[index]} {float(100 * share):.4g}%" for index, share in shares)
        lines.append(f"from step {start + 1}: {shown}" if start else shown)
    return "; ".join(lines)
