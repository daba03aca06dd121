"""Start-up of several processes as one run: detection of the cluster, rendezvous, and an orderly end."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from jaxtrain.runtime import peers
from jaxtrain.runtime.memory import execute_inline, keep_freed_memory, reserve_gpu_memory, share_arena
from jaxtrain.runtime.processes import LONG_SECONDS, agree, announce_failure, is_alone, is_lost, time_limit
from jaxtrain.runtime.relay import relay
from jaxtrain.runtime.rendezvous import meet, split_address
from jaxtrain.runtime.stop import RESTART, leave

_START_SECONDS = 1800.0  # for all processes of a cluster to start: nodes boot and pull images at different times
# JAX ends the others in C++ (134) when a process is silent for so long. `peers` notices a dead one, and the watchdog,
# whose time-out is the user's, one that is suspended or hangs.
_HEARTBEAT_SECONDS = 30 * 24 * 3600


class Cluster(NamedTuple):
    """Processes of a run."""

    address: str  # `host:port` of process 0
    num_processes: int
    process_id: int
    detection: str | None  # `cluster_detection_method` of `jax.distributed.initialize`, which assigns local devices


_NUMBER = re.compile("[0-9]{1,6}")


@contextlib.contextmanager
def session(report: Callable[[BaseException], int], *, large_matrices: bool = False) -> Iterator[None]:
    """Joins the processes of a cluster, if there is one, for the duration of the block. Enter it before JAX is used.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID define a cluster. Without
    them JAX's detection is used (Slurm, Open MPI, a TPU slice, an indexed Kubernetes job). On CPUs the process keeps
    freed memory, and on GPUs it reserves nearly all (`memory`).

    Args:
      report: prints an error and returns the exit code. It is called if this process fails and others do not; the
        process then exits immediately, because only its exit releases processes that wait in a collective.
      large_matrices: True if programs multiply matrices of over `memory.ARENA_BYTES`, for which CPUs `share_arena`.

    Raises:
      ValueError: an incomplete address, or a missing process.
    """
    reserve_gpu_memory()
    execute_inline()
    if large_matrices:
        share_arena()
    _initialize()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    if is_alone():
        yield
        return
    try:
        yield
        agree("the end of the run", {}, timeout=LONG_SECONDS)
        peers.announce(0)
    except BaseException as error:
        if is_lost(error):
            peers.wait_for_loss()
            lost = "the connection to another process is lost, which has failed or was killed: see the other logs"
            report(ConnectionError(f"{lost}; the same command resumes the run ({str(error).splitlines()[0]})"))
            leave(RESTART)
        if not announce_failure(error):
            leave(report(error))
        raise


def find_cluster(timeout: float) -> Cluster:
    """Returns the cluster that the environment defines or JAX detects; without one, a cluster of one process."""
    return _from_environment() or _detect(timeout)


def _initialize() -> None:
    timeout = time_limit(_START_SECONDS)
    if jax.distributed.is_initialized() or (cluster := find_cluster(timeout)).num_processes < 2:
        return
    peers.watch(meet(cluster.address, cluster.num_processes, cluster.process_id, timeout))
    # StopVote decides when to stop. JAX's preemption service counts calls of a function that Orbax calls too, late and
    # from a thread, and can wait for a step that has already passed.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        cluster.address if cluster.process_id == 0 else relay(*split_address(cluster.address)),
        cluster.num_processes,
        cluster.process_id,
        cluster_detection_method=cluster.detection,
        initialization_timeout=math.ceil(timeout),
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )


def _from_environment() -> Cluster | None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = (os.environ.get(name, "") for name in names)
    if not any(numbers):
        return None  # an address alone overrides the address of a detected cluster
    # "deactivate": under Slurm, JAX would otherwise restrict this process to the GPU of its local index.
    if numbers[0] == "1":
        return Cluster(address, 1, 0, "deactivate")
    if not address or not all(_NUMBER.fullmatch(number) for number in numbers) or int(numbers[0]) < 1:
        got = ", ".join(f"{name}={os.environ.get(name, '')!r:.200}" for name in names)
        raise ValueError(f"several processes need an address host:port and two numbers, got {got}")
    split_address(address)
    return Cluster(address, int(numbers[0]), int(numbers[1]), "deactivate")


def _detect(timeout: float) -> Cluster:
    # Private: `initialize` uses it too, but fails where there is no cluster.
    from jax._src.clusters import ClusterEnv

    names = {"ompi", "slurm", "gketpu", "gcetpu"}
    if "JOB_COMPLETION_INDEX" in os.environ:  # any other pod is a single process, and JAX would reject it
        names.add("k8s")
    found = (env for env in ClusterEnv._cluster_types if env.name in names and env.is_env_present())
    try:
        env = next(found, None)
        num_processes = env.get_process_count() if env else 1
        if num_processes < 2:
            return Cluster("", 1, 0, None)
        address = os.environ.get("JAX_COORDINATOR_ADDRESS") or env.get_coordinator_address(
            timeout_secs=math.ceil(timeout), override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
        )
        return Cluster(address, num_processes, env.get_process_id(), None)
    except (OSError, RuntimeError) as error:  # a TPU VM's metadata server, a host name, Kubernetes
        names = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES (1 for this process alone) and JAX_PROCESS_ID"
        raise ValueError(f"cannot detect the processes of this cluster ({error}): set {names}") from None
