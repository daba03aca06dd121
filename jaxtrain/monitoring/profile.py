"""Traces some steps of a run for TensorBoard, xprof or Perfetto: `jaxtrain train CONFIG --profile 10:13`.

They are written to RUN/profile/plugins/profile/steps_10-12/, where TensorBoard looks for them, by each process its own:

  process0.xplane.pb       for TensorBoard and xprof
  process0.trace.json.gz   for ui.perfetto.dev
  process0.scopes.json     which scope each instruction of the program comes from, for `jaxtrain report`
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxtrain.config import TrainConfig
from jaxtrain.monitoring.recorder import Recorder
from jaxtrain.monitoring.trace import scopes_of


def parse_profile(text: str | None, config: TrainConfig) -> range:
    """Reads `--profile START:STOP`: steps START to STOP - 1, counted from 1; None is an empty range.

    Raises:
      ValueError: not two whole numbers, an empty range, or steps that the run does not make.
    """
    if text is None:
        return range(0)
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts):
        raise ValueError(f"--profile {text!r} is no range of steps: write START:STOP, such as 10:13")
    steps = range(int(parts[0]), int(parts[1]))
    if not steps or steps.start < 1:
        raise ValueError(
            f"--profile {text!r} has no step or one before the first: it traces steps START to STOP - 1, from 1"
        )
    last, name = min((config.steps, "train.steps"), (config.stop_after or config.steps, "train.stop_after"))
    if steps[-1] > last:
        raise ValueError(f"--profile {text} ends after the last step {last} ({name}): give a range up to {last + 1}")
    return steps


def steps_left(steps: range, first: int, say: Callable[[str], None]) -> range:
    """What a run that goes on after step `first` still can trace: all of the range or, which is said, nothing."""
    if steps and steps.start <= first:
        say(f"no profile: the run goes on after step {first}, and --profile begins with step {steps.start}")
        return range(0)
    return steps


@contextlib.contextmanager
def named_as_now(steps: range) -> Iterator[None]:
    """Compiles without what the cache has of a program that differs in its names alone, if steps are to be traced."""
    if not steps:
        yield
        return
    flag = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        yield
    finally:
        jax.config.update(flag, before)


class Profiler:
    """Traces the steps of a range while the loop runs; a context manager.

    Nothing that goes wrong with it ends the run: it is said, and training goes on.

    Args:
      steps: which; an empty range traces nothing.
      folder: of the run.
      program: the compiled train step.
      recorder: waits for a step to be done, and is told of the trace.
    """

    def __init__(self, steps: range, folder: Path, program: jax.stages.Compiled, recorder: Recorder):
        self._steps, self._program, self._recorder = steps, program, recorder
        self._folder = folder / "profile"
        self._first = self._last = 0  # traced so far; first is 0 unless it is tracing
        self._partial = self._folder / f".process{jax.process_index()}.partial"

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if self._first and error is None:
            self._recorder.flush()
        self._stop()

    @contextlib.contextmanager
    def step(self, done: int) -> Iterator[None]:
        """Goes around step `done`, counted from 1."""
        if done not in self._steps:
            yield
            return
        if done == self._steps[0]:
            self._recorder.flush()  # the step before is not to be in it
            self._attempt(lambda: self._start(done))
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            yield
        self._last = done
        if done == self._steps[-1]:
            self._recorder.flush()
            self._stop()

    def _start(self, done: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of every function: slow, and then hard to read
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        jax.profiler.start_trace(self._partial, create_perfetto_trace=True, profiler_options=options)
        self._first = done

    def _stop(self) -> None:
        first, self._first = self._first, 0
        if first:
            self._attempt(jax.profiler.stop_trace)
            if self._last >= first:
                self._attempt(lambda: self._keep(first))
            shutil.rmtree(self._partial, ignore_errors=True)

    def _keep(self, first: int) -> None:
        """Gives the files of steps `first` to `_last` their names, and adds the scopes."""
        (for_xprof,) = self._partial.rglob("*.xplane.pb")
        (for_perfetto,) = self._partial.rglob("perfetto_trace.json.gz")
        hlo = self._program.as_text()
        module = re.match(r"HloModule ([\w.~-]+)", hlo)
        about = {"first": first, "last": self._last, "module": module and module[1], "scopes": scopes_of(hlo)}
        folder, name = self._folder / "plugins/profile" / f"steps_{first}-{self._last}", self._partial.stem[1:]
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(for_xprof, folder / f"{name}.xplane.pb")
        os.replace(for_perfetto, folder / f"{name}.trace.json.gz")
        (folder / f"{name}.scopes.json").write_text(json.dumps(about))
        text = f"profiled steps {first} to {self._last}: {folder}"
        self._recorder.event("profile", text, first=first, last=self._last)

    def _attempt(self, function: Callable[[], None]) -> None:
        """Calls a function outside of the steps' time; what goes wrong is said."""
        with self._recorder.pause():
            try:
                function()
            except (OSError, RuntimeError, ValueError) as error:  # a full disk, another profiler that is at work
                self._recorder.say(f"no profile: {error}")
