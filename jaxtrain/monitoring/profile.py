"""Profiler of training steps, for TensorBoard, xprof and Perfetto: `jaxtrain train CONFIG --profile 10:13`.

Each process writes its trace to RUN/profile/plugins/profile/steps_10-12/, where TensorBoard expects it:

  process0.xplane.pb       for TensorBoard and xprof
  process0.trace.json.gz   for ui.perfetto.dev
  process0.scopes.json     scope of each instruction of the program, for `jaxtrain report`
"""

import contextlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxtrain.config import TrainConfig
from jaxtrain.fields import parse_range
from jaxtrain.monitoring.recorder import Recorder
from jaxtrain.monitoring.trace import SCOPES
from jaxtrain.runtime.compile_cache import jax_settings
from jaxtrain.runtime.files import write_json
from jaxtrain.runtime.hlo import HloModule


def parse_profile(text: str | None, config: TrainConfig) -> range:
    """Reads `--profile START:STOP`: steps START to STOP - 1, counted from 1; None is an empty range.

    Raises a ValueError for steps outside the run, and as `parse_range` does.
    """
    if text is None:
        return range(0)
    steps = parse_range(text, "--profile")
    if steps.start < 1:
        raise ValueError(f"--profile {text!r} starts before step 1: steps are counted from 1")
    last, name = min((config.steps, "train.steps"), (config.stop_after or config.steps, "train.stop_after"))
    if steps[-1] > last:
        raise ValueError(f"--profile {text} ends after the last step {last} ({name}): give a range up to {last + 1}")
    return steps


def steps_left(steps: range, first: int, say: Callable[[str], None]) -> range:
    """Returns the steps that a run resumed at step `first` can trace: all, or none with a message."""
    if steps and steps.start <= first:
        say(f"no profile: the run resumes after step {first}, and --profile begins with step {steps.start}")
        return range(0)
    return steps


def named_as_now(steps: range) -> contextlib.AbstractContextManager[None]:
    """Adds the names in a program to its key in the compilation cache, if steps are to be traced.

    Otherwise a cached program with older names would be loaded, and the trace could not be mapped to scopes.
    """
    return jax_settings({"jax_compilation_cache_include_metadata_in_key": True} if steps else {})


def scopes_of(text: str) -> dict[str, str]:
    """Maps the instructions of a compiled program (`compiled.as_text()`) to their scopes."""
    computations = HloModule(text).computations
    own = {name: [scope for line in lines if (scope := _scope(line.source))] for name, lines in computations.items()}
    scopes = {}
    for line in (line for lines in computations.values() for line in lines):
        inside = [scope for name in line.called for scope in own.get(name, ())]  # of a fusion without a source
        if scope := _scope(line.source) or (Counter(inside).most_common(1)[0][0] if inside else ""):
            scopes[line.name] = scope
    return scopes


def _scope(source: str) -> str:
    """Returns the innermost scope of a path such as `jit(train_step)/transpose(jvp(head))/while/body/dot_general`."""
    names = [part.rstrip(")").rpartition("(")[2] for part in source.split("/")]
    return next((name for name in reversed(names) if name in SCOPES), "")


class Profiler:
    """Profiles a range of steps while the loop runs; a context manager.

    A failure of the profiler is reported, and training continues.
    """

    def __init__(self, steps: range, folder: Path, program: jax.stages.Compiled, recorder: Recorder):
        """`recorder` is flushed before and after the traced steps, and receives the event."""
        self._steps, self._program, self._recorder = steps, program, recorder
        self._folder = folder / "profile"
        self._first = self._last = 0  # traced steps so far; first is 0 while no trace is running
        self._partial = self._folder / f".process{jax.process_index()}.partial"

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if self._first and error is None:
            self._recorder.flush()
        self._stop()

    @contextlib.contextmanager
    def step(self, done: int) -> Iterator[None]:
        """Surrounds the step number `done`, counted from 1."""
        if done not in self._steps:
            yield
            return
        if done == self._steps[0]:
            self._recorder.flush()  # keeps the step before out of the trace
            self._attempt(lambda: self._start(done))
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            yield
        self._last = done
        if done == self._steps[-1]:
            self._recorder.flush()
            self._stop()

    def _start(self, done: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would record every function call: slow, and hard to read
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        jax.profiler.start_trace(self._partial, create_perfetto_trace=True, profiler_options=options)
        self._first = done

    def _stop(self) -> None:
        first, self._first = self._first, 0
        if first:
            self._attempt(jax.profiler.stop_trace)
            if self._last >= first:
                self._attempt(lambda: self._store(first))
            shutil.rmtree(self._partial, ignore_errors=True)

    def _store(self, first: int) -> None:
        """Moves the files of steps `first` to `_last` to their place, and writes the scopes."""
        (for_xprof,) = self._partial.rglob("*.xplane.pb")
        (for_perfetto,) = self._partial.rglob("perfetto_trace.json.gz")
        hlo = self._program.as_text()
        module = re.match(r"HloModule ([\w.~-]+)", hlo)
        about = {"first": first, "last": self._last, "module": module and module[1], "scopes": scopes_of(hlo)}
        folder, name = self._folder / "plugins/profile" / f"steps_{first}-{self._last}", self._partial.stem[1:]
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(for_xprof, folder / f"{name}.xplane.pb")
        os.replace(for_perfetto, folder / f"{name}.trace.json.gz")
        write_json(folder / f"{name}.scopes.json", about)
        text = f"profiled steps {first} to {self._last}: {folder}"
        self._recorder.event("profile", text, first=first, last=self._last)

    def _attempt(self, function: Callable[[], None]) -> None:
        """Calls a function outside the steps' time, and reports its failure."""
        with self._recorder.pause():
            try:
                function()
            except (OSError, RuntimeError, ValueError) as error:  # a full disk, another profiler that is running
                self._recorder.say(f"no profile: {error}")
