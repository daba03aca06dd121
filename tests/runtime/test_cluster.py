"""Detection of a cluster from the environment."""

import os

import jax
import pytest

from jaxtrain.runtime import cluster as cluster_module
from jaxtrain.runtime.cluster import find_cluster

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "node[007-010]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def cluster(monkeypatch):
    """Sets the environment; returns what `session` would have joined."""

    def look(**environment):
        for name in (*VARIABLES, *SLURM, "JAX_COORDINATOR_PORT", "OMPI_MCA_orte_hnp_uri"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return find_cluster(1.0)

    return look


def test_a_laptop_and_a_cluster_of_one_are_one_process(cluster):
    assert cluster().num_processes == 1
    assert cluster(**SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).num_processes == 1
    assert cluster(**SLURM | {"JAX_NUM_PROCESSES": "1"}).num_processes == 1
    assert cluster(KUBERNETES_SERVICE_HOST="10.0.0.1").num_processes == 1  # any pod, without a word


def test_a_cluster_is_found_or_asked_for(cluster):
    port = 4242 % 4096 + 65535 - 4096 + 1  # JAX's choice, from the job's number
    assert cluster(**SLURM) == (f"node007:{port}", 8, 5, None)  # JAX then gives each its local GPU
    assert cluster(**SLURM, JAX_COORDINATOR_PORT="77").address == "node007:77"
    asked = dict(zip(VARIABLES, ("host:1", "2", "1"), strict=True))
    assert cluster(**asked) == ("host:1", 2, 1, "deactivate")
    assert cluster(**SLURM, **asked) == ("host:1", 2, 1, "deactivate")


WRONG = [("", "2", "1"), ("host:1", "2", ""), ("host:1", "", "0"), ("host:1", "0", "0"), ("host:1", "-1", "0")]
WRONG += [("host:1", text, "0") for text in ("two", "\u00b2", "\u0662", "1000000000", "9" * 5000)]


@pytest.mark.parametrize("given", WRONG, ids=lambda given: given[1][:20])
def test_half_an_address_is_an_error_that_shows_it(cluster, given):
    with pytest.raises(ValueError, match=f"got .*JAX_NUM_PROCESSES='{given[1][:150]}"):
        cluster(**dict(zip(VARIABLES, given, strict=True)))


HOSTS = "http://h h:5 ::1 fd00::1 [::1 ::1] [h] [] [::1]:5 u@h h/ h,i h;i * $H [127.0.0.1] tcp://[::1] .."
PORTS = "0 -1 +5 05 65536 70000 5.0 five \u00b2 \u0663 5/x *"


def test_an_address_is_a_host_and_a_port_or_an_error_that_shows_it(cluster):
    wrong = [
        *(f"{host}:1" for host in HOSTS.split()),
        *(f"h:{port}" for port in PORTS.split()),
        "h",
        ":",
        ":5",
        "h:",
        " h:1",
        "h :1",
    ]
    for address in (*wrong, "h\n:1", "\t:1", "h:5 ", "h: 5", "h:5\n", f"{'h' * 300}:1"):
        with pytest.raises(ValueError, match=r"address must be host:port, such as .*, got '") as raised:
            cluster(**dict(zip(VARIABLES, (address, "2", "0"), strict=True)))
        assert repr(address)[:150] in str(raised.value)
    for address in ("h:5", "n-1.a_b:65535", "10.0.0.1:1", "[::1]:5", "[fd00::1]:5", "[fe80::1%eth0]:5", "k\u00f6ln:5"):
        assert cluster(**dict(zip(VARIABLES, (address, "2", "0"), strict=True))).address == address


def test_a_session_reserves_gpu_memory_and_leaves_a_silent_process_to_the_watchdog(monkeypatch):
    """JAX would end the others in C++, after its heartbeat's time-out, whichever time-out the user has chosen."""
    asked, was = {}, jax.config.jax_enable_preemption_service
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    for name, value in zip(VARIABLES, ("host:1", "2", "0"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAXTRAIN_TIMEOUT", "5")
    monkeypatch.setattr(cluster_module, "meet", lambda *_: {})
    monkeypatch.setattr(cluster_module, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(cluster_module.peers, "watch", lambda connections: None)
    memory = lambda: {"memory": os.environ.get("XLA_CLIENT_MEM_FRACTION")}  # noqa: E731
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: asked.update(options | memory()))
    with cluster_module.session(lambda error: 1):
        pass
    jax.config.update("jax_enable_preemption_service", was)
    assert asked["memory"] == "0.94"  # set before JAX starts
    assert asked["heartbeat_timeout_seconds"] > 24 * 3600
    assert asked["initialization_timeout"] == 5
