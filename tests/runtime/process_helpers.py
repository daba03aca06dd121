"""Real processes of one run on this machine."""

import os
import socket
import subprocess
import sys

from helpers import LIMIT, start


def free_address():
    with socket.create_server(("localhost", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"


class Processes:
    """Some processes of one run, each with two devices; `arguments` go to Python, per process.

    Where nobody is missing the time-out is long: a machine with too much to do may need half a minute for an answer.
    """

    def __init__(self, *arguments, count=2, timeout=200, ranks=None):
        address = free_address()
        self.processes = []
        for rank, words in zip(ranks or range(count), arguments, strict=True):
            environment = {
                **os.environ,
                "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
                "PYTHONWARNINGS": "default",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(rank),
                "JAXTRAIN_TIMEOUT": str(timeout),
            }
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            self.processes.append(start([sys.executable, *words], env=environment, **pipes))

    def wait(self):
        """The exit codes, outputs and errors."""
        ends = [process.communicate(timeout=LIMIT) for process in self.processes]
        return [process.returncode for process in self.processes], *zip(*ends, strict=True)
