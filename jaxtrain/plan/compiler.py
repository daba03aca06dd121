"""Ahead-of-time compilation of a config's train step for absent TPUs or GPUs, with their compilers.

libtpu locks itself to one process and writes to standard error. `compile_step` therefore runs
`python -m jaxtrain.plan.compiler` and reads the answer from a file; the caller's process never loads a compiler.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtrain.config import Config
from jaxtrain.runtime.chips import Chip, parse_topology
from jaxtrain.runtime.config_files import from_json, to_json

# The child runs JAX on the CPU. The TPU compiler asks no metadata server and tolerates other processes with libtpu,
# because it touches no TPU.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


# Modules of which one must be installed, and the extra that installs one, by platform.
_COMPILERS = {"tpu": (("libtpu",), "plan"), "gpu": (("jax_cuda13_plugin", "jax_cuda12_plugin"), "plan-gpu")}


class CompilerMissing(ImportError):
    """The compiler of a platform is not installed."""


def compile_step(config: Config, vocab_size: int, topology: str, timeout: float) -> dict[str, Any]:
    """Compiles the train step.

    Args:
      config: the run. Its mesh must fit the slice.

    Returns:
      A dict with `fits`, `hbm_bytes` of a chip, `compile_seconds` and `versions`. For a program that fits also:
      `argument_bytes_per_device`; `peak_bytes_per_device`; `temporary_bytes_per_device`, the peak minus the arguments;
      `temporary_sum_bytes_per_device`, the compiler's `temp_size_in_bytes`, which on TPUs counts temporaries that share
      memory; `output_bytes_per_device`; `alias_bytes_per_device`, outputs in the memory of donated arguments;
      `code_bytes_per_device`; `host_bytes_per_device`, temporaries in host memory; `collectives` (see runtime/hlo.py);
      `costs` (`costs.part_costs`); `refused_options`, lines; `estimated_seconds`, the compiler's estimate or None. For
      a program that does not fit: `needed_bytes_per_device`, or None if the compiler does not report it, and the
      compiler's `message`.

      For GPUs also `kernels` (`gpu.kernels`) and `caveat`, a sentence; memory in use is not compared with that of the
      chip by the compiler, but here, by the sum of arguments, temporaries, code and outputs without a donated argument.

    Raises:
      CompilerMissing: the compiler is not installed.
      ValueError: an unknown topology, or a mesh, batch or model that does not fit it.
      OSError: another process locks the compiler, or the compiler fails or takes too long.
    """
    chip, _ = parse_topology(topology)
    modules, extra = _COMPILERS[chip.platform]
    if not any(importlib.util.find_spec(module) for module in modules):
        raise CompilerMissing(f'the {chip.compiler} is not installed: pip install "jaxtrain[{extra}]"')
    with tempfile.TemporaryDirectory(prefix="jaxtrain-plan-") as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        request.write_text(json.dumps({"config": to_json(config), "vocab_size": vocab_size, "topology": topology}))
        command = [sys.executable, "-m", "jaxtrain.plan.compiler", str(request), str(answer)]
        options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "timeout": timeout}
        try:
            child = subprocess.run(command, env=_environment(), **options)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"compiling for {topology} took more than {timeout:g} s: raise --timeout") from None
        if not answer.exists():
            last = "\n".join(child.stderr.strip().splitlines()[-15:])
            raise OSError(f"the {chip.compiler} ended with exit code {child.returncode} and no answer:\n{last}")
        found = json.loads(answer.read_text())
    if "error" in found:
        _raise(found["error"], found["message"], topology, chip)
    return {"hbm_bytes": chip.hbm_bytes} | found


def search_batch(
    config: Config, unit: int, compile_config: Callable[[Config], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Searches the largest batch that fits: doubles until one does not fit, then bisects.

    `unit` is the granularity in sequences: number of row shards x micro-batches. `compile_config` is `compile_step` of
    a config. Yields the answer to each try with its `batch_size`.
    """
    fits, too_large, tried = 0, None, max(config.train.batch_size // unit, 1)
    while too_large is None or too_large - fits > 1:
        train = dataclasses.replace(config.train, batch_size=tried * unit)
        found = compile_config(dataclasses.replace(config, train=train))
        yield {"batch_size": tried * unit} | found
        fits, too_large = (tried, too_large) if found["fits"] else (fits, tried)
        tried = 2 * fits if too_large is None else (fits + too_large) // 2


def _environment() -> dict[str, str]:
    # The user's setting of the lock wins: ALLOW_MULTIPLE_LIBTPU_LOAD=0 makes a second process fail.
    lock = os.environ.get("ALLOW_MULTIPLE_LIBTPU_LOAD", ENVIRONMENT["ALLOW_MULTIPLE_LIBTPU_LOAD"])
    paths = filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    own = {"ALLOW_MULTIPLE_LIBTPU_LOAD": lock, "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **ENVIRONMENT, **own}


def _raise(kind: str, message: str, topology: str, chip: Chip) -> None:
    if kind == "ValueError":
        raise ValueError(message)
    if "lockfile" in message:
        remedy = "wait for it to end, or unset ALLOW_MULTIPLE_LIBTPU_LOAD"
        raise BlockingIOError(f"another process holds libtpu's lock, /tmp/libtpu_lockfile: {remedy}")
    if "topology" in message.lower() or "Invalid TPU" in message:
        raise ValueError(f"the {chip.compiler} knows no topology {topology!r}: {message.splitlines()[0]}")
    if kind == "ImportError" or "not installed" in message:
        extra = _COMPILERS[chip.platform][1]
        raise CompilerMissing(f'the {chip.compiler} does not load: pip install "jaxtrain[{extra}]"\n{message}')
    raise OSError(f"the {chip.compiler} failed for {topology}: {message}")


def _child(request: str, answer: str) -> None:
    """Compiles in the child process and writes the answer."""
    asked = json.loads(Path(request).read_text())
    try:
        found = _compile(from_json(asked["config"]), asked["vocab_size"], asked["topology"])
    except Exception as error:  # the parent shows it
        kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
        found = {"error": kind, "message": str(error)[:2000]}
    Path(answer).write_text(json.dumps(found))


def _compile(config: Config, vocab_size: int, topology: str) -> dict[str, Any]:
    import jax
    import jaxlib

    from jaxtrain.runtime.mesh import make_mesh
    from jaxtrain.training.program import make_program

    chip, _ = parse_topology(topology)
    mesh = make_mesh(config.mesh, _devices(chip, topology))
    program = make_program(config, mesh, vocab_size)
    start, refused = time.perf_counter(), list[str]()
    try:
        compiled = program.compile(program.abstract_state, program.abstract_batch, refused.append)
        found = analyze(compiled.executable, dict(mesh.shape), chip) | {"refused_options": refused}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = {"fits": False, "needed_bytes_per_device": _needed(str(error)), "message": str(error).splitlines()[0]}
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    if chip.platform == "tpu":
        versions["libtpu"] = importlib.metadata.version("libtpu")
    return found | {"compile_seconds": time.perf_counter() - start, "versions": versions}


def _devices(chip: Chip, topology: str) -> list[Any]:
    """Returns the absent devices to compile for."""
    from jax.experimental import topologies

    from jaxtrain.plan.gpu import target_devices

    if chip.platform == "gpu":
        return target_devices(chip, topology.partition(":")[2])
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def analyze(compiled: Any, mesh_shape: dict[str, int], chip: Chip) -> dict[str, Any]:
    """Returns the memory, collectives and costs of a compiled program, as `compile_step` reports them."""
    from jaxtrain.plan.costs import part_costs
    from jaxtrain.plan.gpu import CAVEAT, kernels
    from jaxtrain.runtime.hlo import collectives, summarize_collectives

    memory, text = compiled.memory_analysis(), compiled.as_text()
    arguments, temporary_sum = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs, alias, code = memory.output_size_in_bytes, memory.alias_size_in_bytes, memory.generated_code_size_in_bytes
    is_tpu = chip.platform == "tpu"
    # A GPU's compiler reports no peak that counts everything, and accepts any program.
    peak = memory.peak_memory_in_bytes if is_tpu else arguments + temporary_sum + code + outputs - alias
    found = {
        "fits": peak <= chip.hbm_bytes or is_tpu,  # the TPU compiler rejects a program that does not
        "argument_bytes_per_device": arguments,
        "temporary_bytes_per_device": peak - arguments if is_tpu else temporary_sum,
        "temporary_sum_bytes_per_device": temporary_sum,
        "output_bytes_per_device": outputs,
        "alias_bytes_per_device": alias,
        "code_bytes_per_device": code,
        "host_bytes_per_device": memory.host_temp_size_in_bytes,
        "peak_bytes_per_device": peak,
        "collectives": summarize_collectives(collectives(text, mesh_shape)),
        "costs": part_costs(text),
        "estimated_seconds": _estimate(compiled, text) if is_tpu else None,
    }
    if not found["fits"]:
        found |= {"needed_bytes_per_device": peak, "message": "memory analysis: more than the chip has"}
    return found if is_tpu else found | {"kernels": kernels(text), "caveat": CAVEAT}


def _estimate(compiled: Any, text: str) -> float | None:
    """Returns the compiler's estimate of a step, or None for a program with loops, whose bodies it counts once."""
    seconds = compiled.cost_analysis().get("optimal_seconds", 0)
    return seconds if seconds > 0 and not re.search(r" while\(", text) else None


def _needed(message: str) -> int | None:
    """Parses the bytes of HBM that a program needs from the error: `(120.00G)` or `Used 120.00G of`."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", message)
    if not found:
        return None
    number, unit = (part for part in found.groups() if part)
    return int(float(number) * 1024 ** (" KMGT".index(unit)))


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2])
