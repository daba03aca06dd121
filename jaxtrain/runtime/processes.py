"""Several processes as one run: they find each other, agree before anything is made, and none waits for ever.

What they tell each other here goes through the key-value store of JAX's coordinator, in process 0: unlike a collective
on devices it has time-outs, so that whoever is missing can be named. In one process everything here does nothing.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from jaxtrain.runtime.host_memory import keep_freed_memory
from jaxtrain.runtime.rendezvous import meet, name_processes

T = TypeVar("T")

_LONG_SECONDS = 6 * 3600.0  # for work that one process does for all, such as preparing the data
_POLL_SECONDS = 1.0  # how soon the failure of another process is noticed
_PARTING_SECONDS = 5.0  # for the others to fail too, before it is taken that they have not
_turns = itertools.count()  # every process comes to the same agreements in the same order


class _Cluster(NamedTuple):
    address: str  # host:port of process 0
    num_processes: int
    process_id: int
    method: str | None  # for jax.distributed.initialize: how it finds the devices of this process


def time_limit() -> float:
    """Seconds to wait for other processes: JAXTRAIN_TIMEOUT, or 300."""
    text = os.environ.get("JAXTRAIN_TIMEOUT", "300")
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ValueError(f"JAXTRAIN_TIMEOUT must be a number of seconds above 0, got {text!r}")


def _state() -> Any:
    # Private, and only here: the public API has neither the key-value store nor a process number that can be asked for
    # before the backend starts, which itself waits for all processes.
    from jax._src import distributed

    return distributed.global_state


def is_lead() -> bool:
    """Whether this is process 0, which writes the records; so is the only process."""
    return _state().process_id == 0


def _alone() -> bool:
    return _state().client is None or _state().num_processes == 1


@contextlib.contextmanager
def session(report: Callable[[BaseException], int]) -> Iterator[None]:
    """Joins the processes of a cluster, if there is one, for what happens inside; before JAX is used.

    On CPUs the process then keeps the memory that it frees (`hostmem`).

    A cluster is asked for with JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID,
    or found as JAX finds it (Slurm, Open MPI, a TPU slice, an indexed Kubernetes job) if it has several processes.

    Args:
      report: shows an error and returns the exit code. Called where one process fails and others do not: it then exits
        at once, because they may wait for it where only its end can tell them.

    Raises:
      ValueError: half an address, or a process that did not come.
    """
    _initialize()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    if _alone():
        yield
        return
    try:
        yield
        agree("the end of the run", {}, timeout=_LONG_SECONDS)
    except BaseException as error:
        if not _part(error):
            code = report(error)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        raise


def _initialize() -> None:
    if jax.distributed.is_initialized():
        return
    timeout = time_limit()
    address, num_processes, process_id, method = _asked_for() or _detected(timeout)
    if num_processes < 2:
        return
    meet(address, num_processes, process_id, timeout)
    # A stop is agreed on here (StopVote). JAX's own way counts steps by calls that Orbax makes too, late and from a
    # thread, and then waits for a step that has gone by.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        num_processes,
        process_id,
        cluster_detection_method=method,
        initialization_timeout=math.ceil(timeout),
        heartbeat_timeout_seconds=max(10, min(100, math.ceil(timeout))),
    )


def _asked_for() -> _Cluster | None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = (os.environ.get(name, "") for name in names)
    if not any(numbers):
        return None  # an address alone overrides that of a cluster which is detected
    # "deactivate": under Slurm JAX would otherwise leave this process the GPU of its local number only.
    if numbers[0] == "1":
        return _Cluster(address, 1, 0, "deactivate")
    if not address or not all(number.isdigit() for number in numbers):
        got = ", ".join(f"{name}={os.environ.get(name, '')!r}" for name in names)
        raise ValueError(f"several processes need an address host:port and two numbers, got {got}")
    return _Cluster(address, int(numbers[0]), int(numbers[1]), "deactivate")


def _detected(timeout: float) -> _Cluster:
    """The cluster that JAX would find; of one process if there is none."""
    from jax._src.clusters import ClusterEnv  # private: what initialize() asks, but that needs a cluster to be there

    names = {"ompi", "slurm", "gketpu", "gcetpu"}
    if "JOB_COMPLETION_INDEX" in os.environ:  # any other pod is one process, about which JAX would complain
        names.add("k8s")
    found = (env for env in ClusterEnv._cluster_types if env.name in names and env.is_env_present())
    try:
        env = next(found, None)
        num_processes = env.get_process_count() if env else 1
        if num_processes < 2:
            return _Cluster("", 1, 0, None)
        address = os.environ.get("JAX_COORDINATOR_ADDRESS") or env.get_coordinator_address(
            timeout_secs=math.ceil(timeout), override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
        )
        return _Cluster(address, num_processes, env.get_process_id(), None)
    except (OSError, RuntimeError) as error:  # a TPU VM's metadata server, a host name, Kubernetes
        raise ValueError(
            f"cannot find out which processes belong to this cluster ({error}): set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES (1: only this one) and JAX_PROCESS_ID"
        ) from None


def agree(what: str, values: Mapping[str, Any], *, remedy: str = "", timeout: float | None = None) -> None:
    """Compares values between all processes.

    Args:
      what: what they must agree on, for the error: a noun.
      values: JSON values; nested mappings are compared key by key.
      remedy: what to do where they differ.
      timeout: seconds to wait for the others; None: JAXTRAIN_TIMEOUT, or 300.

    Raises:
      ValueError: on every process, with who says what; or that a process did not come.
    """
    if _alone():
        return
    state, key = _state(), f"jaxtrain/agree/{next(_turns)}"
    timeout = time_limit() if timeout is None else timeout
    deadline = time.monotonic() + timeout
    state.client.key_value_set(f"{key}/{state.process_id}", json.dumps(_flat(values)))
    if state.process_id == 0:
        said = {process: _get(f"{key}/{process}", deadline) for process in range(state.num_processes)}
        if missing := [process for process, text in said.items() if text is None]:
            verdict = _missing(missing, f"agree on {what}", timeout)
        else:
            verdict = _compare(what, {process: json.loads(text) for process, text in said.items()}, remedy)
        state.client.key_value_set(f"{key}/verdict", verdict)
    else:
        verdict = _get(f"{key}/verdict", deadline + _PARTING_SECONDS)
        verdict = _missing([0], f"agree on {what}", timeout) if verdict is None else verdict
    if verdict:
        raise ValueError(verdict)


def first(what: str, function: Callable[[], T], *, timeout: float = _LONG_SECONDS) -> T | None:
    """Process 0 calls a function while the others wait; the result there, None elsewhere.

    Args:
      what: what it does, for the error: a verb.
      function: raises what is every process's error.
      timeout: seconds that the others wait.

    Raises:
      ValueError: on the others, what the function raised on process 0, or that it took longer than `timeout` seconds.
    """
    if _alone():
        return function()
    state, key = _state(), f"jaxtrain/first/{next(_turns)}"
    if state.process_id == 0:
        try:
            result = function()
        except Exception as error:
            state.client.key_value_set(key, f"{error}" or type(error).__name__)
            raise
        state.client.key_value_set(key, "")
        return result
    problem = _get(key, time.monotonic() + timeout)
    if problem is None:
        problem = _missing([0], what, timeout)
    if problem:
        raise ValueError(problem)
    return None


def tell(what: str, function: Callable[[], T]) -> T:
    """Process 0 calls a function and tells the others its result, a JSON value. Arguments and errors as for `first`."""
    result = first(what, function)
    if _alone():
        return result
    state, key = _state(), f"jaxtrain/tell/{next(_turns)}"
    if state.process_id == 0:
        state.client.key_value_set(key, json.dumps(result))
        return result
    text = _get(key, time.monotonic() + time_limit())
    if text is None:
        raise ValueError(_missing([0], what, time_limit()))
    return json.loads(text)


class StopVote:
    """Lets all processes stop after the same step when any of them is asked to.

    Each asks after every step k, when it has read the metrics of step k - 1, for which every process had to launch
    that. So when one is asked to stop after launching k, the others have asked about k + 1 at most: it names k + 2, and
    nobody passes that without having seen it.
    """

    def __init__(self):
        self._key = f"jaxtrain/stop/{next(_turns)}"

    def reason(self, asked: str | None, done: int) -> str | None:
        """Why to stop now, the same on every process.

        Args:
          asked: what this process was asked for (a signal's name), None if it was not.
          done: number of steps launched.
        """
        if _alone():
            return asked
        client = _state().client
        votes = client.key_value_dir_get(self._key)
        if asked and not votes:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was quicker
                client.key_value_set(f"{self._key}/first", json.dumps([done + 2, asked]))
            votes = client.key_value_dir_get(self._key)
        if not votes:
            return None
        step, reason = json.loads(votes[0][1])
        return reason if done >= step else None


def _get(key: str, deadline: float) -> str | None:
    """Waits for a key of the store; None if it does not come in time.

    Raises:
      ValueError: meanwhile another process has failed.
    """
    client = _state().client
    while True:
        failed = client.key_value_dir_get("jaxtrain/failed")
        left = min(deadline - time.monotonic(), _POLL_SECONDS)
        try:
            if failed or left <= 0:  # what is there counts: a wait of no length can end before the answer is back
                return client.key_value_try_get(key)
            return client.blocking_key_value_get(key, max(1, int(1000 * left)))
        except jax.errors.JaxRuntimeError as error:
            if not any(code in str(error) for code in ("DEADLINE_EXCEEDED", "NOT_FOUND")):
                raise
        if failed:
            raise ValueError("; ".join(text for _, text in failed))
        if left <= 0:
            return None


def _part(error: BaseException) -> bool:
    """Tells the others of an error; True if they all have failed too and the connection was closed in good order."""
    state = _state()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        text = f"process {state.process_id} failed: {error or type(error).__name__}"
        state.client.key_value_set(f"jaxtrain/failed/{state.process_id}", text)
        state.client.wait_at_barrier("jaxtrain/failed", int(1000 * _PARTING_SECONDS))
        jax.distributed.shutdown()
        return True
    return False


def _missing(processes: list[int], what: str, timeout: float) -> str:
    return (
        f"{name_processes(processes)} did not {what} within {timeout:g} s: see the log, or give more time "
        "with JAXTRAIN_TIMEOUT"
    )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(dict(values), is_leaf=lambda value: not isinstance(value, dict))
    return {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in leaves}


def _compare(what: str, said: dict[int, dict[str, Any]], remedy: str) -> str:
    """What differs, a line a key; empty if nothing does."""
    lines = []
    for key in dict.fromkeys(key for values in said.values() for key in values):
        by_value: dict[str, list[int]] = {}
        for process, values in said.items():
            by_value.setdefault(json.dumps(values.get(key)), []).append(process)
        if len(by_value) > 1:
            parts = (f"{name_processes(who)} {'says' if len(who) == 1 else 'say'} {v}" for v, who in by_value.items())
            lines.append(f"{key}: {', '.join(parts)}")
    return f"the processes disagree on {what}: {remedy}\n  " + "\n  ".join(lines) if lines else ""
