"""Detection of a cluster from the environment."""

import pytest

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


def test_an_address_that_is_none_is_an_error_that_shows_it(cluster):
    hosts = ("", "..", "h" * 300)
    for address in ("host", "host:", "host:0", "host:65536", "host:\u00b2", "host:\u0663", *(f"{h}:1" for h in hosts)):
        with pytest.raises(ValueError, match=r"address must be host:port, got '|got JAX_COORDINATOR"):
            cluster(**dict(zip(VARIABLES, (address, "2", "0"), strict=True)))
