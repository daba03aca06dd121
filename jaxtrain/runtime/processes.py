"""Coordination of the processes of a run: agreement on values, work on the lead process, a common stop.

Messages go through the key-value store of JAX's coordinator, which runs in process 0, the lead. Unlike a collective on
devices the store has time-outs, so a missing process can be named. In a single process every function is trivial.
"""

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from jaxtrain.runtime import peers
from jaxtrain.runtime.rendezvous import name_processes

T = TypeVar("T")

LONG_SECONDS = 6 * 3600.0  # limit for work on the lead alone, such as preparing the data
_POLL_SECONDS = 1.0  # delay until the failure of another process is noticed
_FAILURE_SECONDS = 5.0  # how long a failing process waits for the others to fail too
# Signs in an error of JAX that another process is gone.
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "ABORTED", "oordination", "heartbeat")
_counter = itertools.count()  # numbers the messages; equal on all processes, which send them in the same order


def new_key(name: str) -> str:
    """Returns a name of messages that was not used before. Every process calls this in the same order."""
    return f"{name}/{next(_counter)}"


def time_limit(default: float = 300.0) -> float:
    """Returns the seconds to wait for other processes: JAXTRAIN_TIMEOUT, or the default."""
    text = os.environ.get("JAXTRAIN_TIMEOUT", str(default))
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ValueError(f"JAXTRAIN_TIMEOUT must be a number of seconds above 0, got {text!r}")


def is_lead() -> bool:
    """Returns True on process 0, which writes the records, and on a single process."""
    return _state().process_id == 0


def is_alone() -> bool:
    """Returns True if no other process belongs to the run."""
    return _state().client is None or _state().num_processes == 1


def agree(subject: str, values: Mapping[str, Any], *, remedy: str = "", timeout: float | None = None) -> None:
    """Compares values between all processes.

    Args:
      subject: noun that the error names: "the processes disagree on `subject`".
      values: JSON values; nested mappings are compared key by key.
      timeout: seconds to wait for the other processes. None means `time_limit()`.

    Raises:
      ValueError: on every process, if the values differ or a process is missing.
    """
    if is_alone():
        return
    task, key = f"agree on {subject}", new_key("agree")
    timeout = time_limit() if timeout is None else timeout

    def gather() -> list | None:
        return gather_on_lead(task, _flatten(values), key=key, timeout=timeout)

    if not is_lead():
        gather()
    run_on_lead(task, lambda: _require_equal(subject, gather() or [], remedy), key=key, timeout=timeout)


def run_on_lead(
    task: str, function: Callable[[], T], *, key: str | None = None, timeout: float = LONG_SECONDS
) -> T | None:
    """Runs `function` on the lead process while the others wait. Returns its result there and None elsewhere.

    Args:
      task: verb phrase that the error names, such as "prepare the data".
      function: its exception becomes the error of every process.
      key: name of the message, used once. None numbers the message, which only the main thread may do.
      timeout: seconds that the other processes wait.

    Raises:
      ValueError: on the other processes, if `function` raised on the lead or took longer than `timeout`.
    """
    return _from_lead(task, function, lambda result: None, key, timeout)


def broadcast_from_lead(task: str, function: Callable[[], T], *, key: str | None = None) -> T:
    """Runs `function` on the lead process and returns its result, a JSON value, everywhere. See `run_on_lead`."""
    return _from_lead(task, function, lambda result: result, key, LONG_SECONDS)


def _from_lead(
    task: str, function: Callable[[], T], shared: Callable[[T], Any], key: str | None, timeout: float
) -> T | Any:
    """Runs `function` on the lead; the other processes return what `shared` makes of its result."""
    if is_alone():
        return function()
    state, key = _state(), f"jaxtrain/lead/{key or new_key('unnamed')}"
    if state.process_id == 0:
        try:
            result = function()
            message = json.dumps(["", shared(result)])
        except Exception as error:
            state.client.key_value_set(key, json.dumps([str(error) or type(error).__name__, None]))
            raise
        state.client.key_value_set(key, message)
        return result
    text = wait_for(state.client, key, time.monotonic() + timeout + _FAILURE_SECONDS)  # the lead may wait as long
    problem, value = (_missing([0], task, timeout), None) if text is None else json.loads(text)
    if problem:
        raise ValueError(problem)
    return value


def gather_on_lead(task: str, value: Any, *, key: str | None = None, timeout: float = LONG_SECONDS) -> list | None:
    """Returns the JSON values of all processes, in their order, on the lead and None elsewhere; see `run_on_lead`.

    Raises a ValueError on the lead if a process is missing.
    """
    if is_alone():
        return [value]
    state = _state()
    key = f"jaxtrain/gather/{key or new_key('unnamed')}"
    state.client.key_value_set(f"{key}/{state.process_id}", json.dumps(value))
    if state.process_id != 0:
        return None
    deadline = time.monotonic() + timeout
    texts = [wait_for(state.client, f"{key}/{process}", deadline) for process in range(state.num_processes)]
    if missing := [process for process, text in enumerate(texts) if text is None]:
        raise ValueError(_missing(missing, task, timeout))
    return [json.loads(text) for text in texts]


def is_lost(error: BaseException | None) -> bool:
    """Returns True if a collective or the coordinator has failed because another process is gone."""
    known = isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in _LOST)
    return known and not is_alone()


def compile_together(function: Any, *arguments: Any) -> None:
    """Compiles a jitted function for its arguments on every process before one of them calls it.

    Gloo times out 30 s after a process begins to connect to the others, in their first collective. The times of
    compilation may differ by more. A single process compiles when it calls.
    """
    if not is_alone():
        function.lower(*arguments).compile()  # jax reuses the result in the call
        agree("the end of compilation", {}, timeout=LONG_SECONDS)


class Board:
    """A text of each process, which the others read; any thread may use it. Without other processes it is empty."""

    def __init__(self, name: str):
        """Every process constructs its boards in the same order."""
        self._key = f"jaxtrain/{new_key(name)}"

    def write(self, text: str) -> None:
        if not is_alone():
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone
                _state().client.key_value_set(f"{self._key}/{_state().process_id}", text, allow_overwrite=True)

    def read(self) -> dict[int, str]:
        """Returns the texts, by process; empty if the coordinator is gone."""
        if not is_alone():
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                texts = _state().client.key_value_dir_get(self._key)
                return {int(key.rpartition("/")[2]): text for key, text in texts}
        return {}


def wait_to_leave(name: str, seconds: float) -> None:
    """Waits for all processes, so that they end at one time; the lead, which serves the store, is the last.

    A scheduler may kill the others once one has ended, and then it sees the exit code of the kill.
    """
    if not is_alone():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _state().client.wait_at_barrier(f"jaxtrain/{name}", int(1000 * seconds))
        peers.announce(0)
        time.sleep(1.0 if is_lead() else 0.0)


class StopVote:
    """Stop of all processes after the same step, as soon as one of them receives a signal.

    Every process votes after each step k, once it has read the metrics of step k - 1. Those metrics exist only after
    every process has launched step k - 1, so no other process has voted beyond step k + 1. The vote therefore names
    step k + 2, and no process can pass that step without having seen the vote.
    """

    def __init__(self):
        self._key = f"jaxtrain/{new_key('stop')}"

    def reason(self, signal_name: str | None, step: int) -> str | None:
        """Returns why to stop after `step` launched steps, the same on every process, or None.

        `signal_name` is the signal that this process received, or None.
        """
        if is_alone():
            return signal_name
        client = _state().client
        votes = client.key_value_dir_get(self._key)
        if signal_name and not votes:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was faster
                client.key_value_set(f"{self._key}/first", json.dumps([step + 2, signal_name]))
            votes = client.key_value_dir_get(self._key)
        if not votes:
            return None
        last_step, reason = json.loads(votes[0][1])
        return reason if step >= last_step else None


def announce_failure(error: BaseException) -> bool:
    """Publishes this process's error and waits up to 5 s for the other processes to fail.

    Returns True if every process failed and the coordinator shut down cleanly.
    """
    state = _state()
    text = f"process {state.process_id} failed: {error or type(error).__name__}"
    peers.announce(2 if isinstance(error, ValueError) else 1, text)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        state.client.key_value_set(f"jaxtrain/failed/{state.process_id}", text)
        state.client.wait_at_barrier("jaxtrain/failed", int(1000 * _FAILURE_SECONDS))
        jax.distributed.shutdown()
        return True
    return False


def wait_for(client: Any, key: str, deadline: float) -> str | None:
    """Returns the value of a key of the store as soon as it is set, or None at the deadline.

    Raises a ValueError if another process fails in the meantime.
    """
    while True:
        failed = client.key_value_dir_get("jaxtrain/failed")
        left = min(deadline - time.monotonic(), _POLL_SECONDS)
        try:
            if failed or left <= 0:  # a wait of length zero can end before the answer arrives
                return client.key_value_try_get(key)
            return client.blocking_key_value_get(key, max(1, int(1000 * left)))
        except jax.errors.JaxRuntimeError as error:
            if not any(code in str(error) for code in ("DEADLINE_EXCEEDED", "NOT_FOUND")):
                raise
        if failed:
            raise ValueError("; ".join(text for _, text in failed))
        if left <= 0:
            return None


def _state() -> Any:
    # Private, used only here. The public API has neither the key-value store nor a process index that can be read
    # before the backend starts, and starting the backend waits for all processes.
    from jax._src import distributed

    return distributed.global_state


def _missing(processes: list[int], task: str, timeout: float) -> str:
    remedy = "see the log, or allow more time with JAXTRAIN_TIMEOUT"
    return f"{name_processes(processes)} did not {task} within {timeout:g} s: {remedy}"


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(dict(values), is_leaf=lambda value: not isinstance(value, dict))
    return {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in leaves}


def _require_equal(subject: str, by_process: list[dict[str, Any]], remedy: str) -> None:
    """Raises a ValueError with one line per key whose values differ."""
    lines = []
    for key in dict.fromkeys(key for values in by_process for key in values):
        by_value: dict[str, list[int]] = {}
        for process, values in enumerate(by_process):
            by_value.setdefault(json.dumps(values.get(key)), []).append(process)
        if len(by_value) > 1:
            parts = (f"{name_processes(who)} {'says' if len(who) == 1 else 'say'} {v}" for v, who in by_value.items())
            lines.append(f"{key}: {', '.join(parts)}")
    if lines:
        raise ValueError(f"the processes disagree on {subject}: {remedy}\n  " + "\n  ".join(lines))
