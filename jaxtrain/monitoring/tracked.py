"""A run as experiment trackers see it: the same id on resume, and each step once.

A tracker that is killed with the run loses its queue, and a run that resumes repeats the steps since its checkpoint. So
RUN/trackers/NAME.json holds what the tracker has received, and metrics.jsonl fills the gap. After a rewind, or a change
of the config that alters steps which the tracker has, the run continues under a new id with its whole history; the old
id keeps the abandoned steps.
"""

import json
import math
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.monitoring.trackers import TRACKERS, TrackedRun, Tracker
from jaxtrain.runtime.files import read_json, write_json

Fields = Mapping[str, Any]

# Fields of a line that are no curve.
_LEFT_OUT = {"step", "steps", "attempt", "skip_reason", "give_up"}


class Tracked:
    """Sink that passes a run to a tracker; runs on the thread of a `BackgroundSink`."""

    def __init__(
        self, name: str, folder: Path, config: dict[str, Any], lines: Iterable[Fields], events: Iterable[Fields]
    ):
        """Opens nothing yet; `lines` and `events` are earlier records, as `read_metrics` returns them."""
        self._name, self._folder, self._config = name, folder, config
        self._earlier = [(line, "train") for line in lines]
        self._earlier += [(event, "validation") for event in events if event["event"] == "eval"]
        self._file = folder / "trackers" / f"{name}.json"
        self._tracker: Tracker | None = None
        self._begun: Fields = {"step": 0}
        self._altered = self._opened = False
        self._have: dict[str, Any] = {}  # id, number, and the last step of each kind that the tracker has

    def step(self, step: int, fields: Fields) -> None:
        """Passes a logged step on, unless the tracker has it."""
        self._open()
        self._log("train", step, fields)

    def event(self, name: str, text: str, fields: Fields) -> None:
        if name in ("start", "resume"):
            self._begun = fields
        elif name in ("rewind", "config_change"):
            self._altered = True
        elif name == "eval":
            self._open()
            self._log("validation", fields["step"], fields)
        elif name in ("finding", "stop") and self._tracker:
            self._tracker.note(fields.get("step", self._begun["step"]), name, text)

    def close(self) -> None:
        if self._tracker:
            self._tracker.close()

    def _open(self) -> None:
        """Opens the tracker before the first record of this attempt, when it is known where the attempt began."""
        if self._opened:
            return
        self._opened = True  # a tracker that cannot open is not asked again
        have, begin = read_json(self._file), self._begun["step"]
        have = have if isinstance(have, dict) and "id" in have else {"id": uuid.uuid4().hex[:12]}
        newest, number = max(have.get("train", 0), have.get("validation", 0)), have.get("number", 1)
        if newest > begin and self._altered:
            newest, number, have = 0, number + 1, {"id": uuid.uuid4().hex[:12]}
        self._have = have | {"number": number}
        self._file.parent.mkdir(exist_ok=True)
        write_json(self._file, self._have)
        title = self._folder.resolve().name + (f"-{number}" if number > 1 else "")
        run = TrackedRun(self._folder, title, have["id"], not newest, self._config, self._begun.get("commit"))
        self._tracker = TRACKERS[self._name][1](run)
        for fields, kind in sorted(self._earlier, key=lambda record: (record[0]["step"], record[1])):
            if fields["step"] <= begin:
                self._log(kind, fields["step"], fields)
        self._earlier = []

    def _log(self, kind: str, step: int, fields: Fields) -> None:
        if self._tracker is None or step <= self._have.get(kind, 0):
            return
        is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)  # noqa: E731
        numbers = {name: float(value) for name, value in fields.items() if name not in _LEFT_OUT and is_number(value)}
        values = {f"{kind}/{name}": value for name, value in numbers.items() if math.isfinite(value)}
        self._tracker.log(step, values)
        self._have[kind] = step
        # Replaced as a whole, without a sync: after a power cut, a repeated step is better than a slow tracker always.
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self._have))
        partial.replace(self._file)
