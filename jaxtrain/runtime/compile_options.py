"""Compiler options by chip, each with the measurement that earned it, and compilation that survives a refused one.

`train.tune_compiler` disables them. To measure: `scripts/bench_compiled.py CONFIG --topology T --form
"--train.no-tune-compiler"`; `jaxtrain plan CONFIG --topology T` shows which collectives block.
"""

from collections.abc import Callable
from typing import Any

import jax

_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"


def _offloaded(gather: str) -> dict[str, bool]:
    # Not `all_reduce`: axlearn (axlearn/common/compiler_options.py) reports worse models with it.
    return {_OFFLOAD + name: True for name in ("all_gather", gather, "reduce_scatter", "nd_reduce_scatter")}


# Options for several chips, by `jax.Device.device_kind`. The sparse cores move weights and gradients beside the matrix
# products. `jaxtrain plan configs/llama2_7b.py --topology v5p:2x2x2 --train.batch-size 16 --model.num-layers 4`: 3.5 GB
# of gathers and 1.9 GB of gradients all block without the options; with them none blocks, and the gradients are
# reduce-scattered instead of all-reduced. On v6e:8x8 a layer's gathers and reduce-scatters behave alike.
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "TPU v5": _offloaded("3d_all_gather"),
    "TPU v5p": _offloaded("3d_all_gather"),
    "TPU v6 lite": _offloaded("2d_all_gather"),
    "TPU v6e": _offloaded("2d_all_gather"),
}


# Options for a program that a profiler will trace, by platform. A CUDA graph starts many kernels at once, and a trace
# of it does not say to which instruction a kernel belongs.
TRACE_OPTIONS: dict[str, dict[str, Any]] = {"gpu": {"xla_gpu_enable_command_buffer": ""}}


def compile_for_chip(
    lowered: jax.stages.Lowered, devices: Any, *, tune: bool, report: Callable[[str], None], traced: bool = False
) -> jax.stages.Compiled:
    """Compiles a program with the options of its chips.

    Args:
      devices: array of the devices of its mesh. One device has no collectives, and gets no options.
      tune: False uses the compiler's defaults.
      report: receives a line for each option that the compiler refuses; the program is compiled without it.
      traced: a profiler will trace the program.
    """
    first = devices.flat[0]
    options = COMPILE_OPTIONS.get(first.device_kind, {}) if tune and devices.size > 1 else {}
    if traced:
        options = options | TRACE_OPTIONS.get(first.platform, {})
    while True:
        try:
            return lowered.compile(compiler_options=options or None)
        except jax.errors.JaxRuntimeError as error:
            refused = {name for name in options if name in str(error)}
            if not refused:
                raise
            report(f"this compiler refuses {', '.join(sorted(refused))}: compiling without")
            options = {name: value for name, value in options.items() if name not in refused}
