"""Absent NVIDIA GPUs as compilation targets of XLA: their devices, and the memory and kernels of a program for them."""

import collections
import re
import string
import tomllib
from pathlib import Path
from typing import Any

from jaxtrain.runtime.chips import Chip

CAVEAT = (
    "compiled for a GPU that is not here: matrix products are not autotuned, which on a GPU may choose other kernels "
    "and workspaces; there are no estimates of time"
)


def target_devices(chip: Chip, shape: str) -> list[Any]:
    """Returns GPUs (`4`, or HOSTSxGPUS) to compile for, and makes JAX's checks of attention answer for them.

    For a process that only compiles: JAX asks its own first device for the compute capability of cuDNN's kernels.
    """
    from jax._src.cudnn import fused_attention_stablehlo
    from jax.experimental import topologies

    from jaxtrain.models.kernels import cudnn

    target = target_config(chip, fused_attention_stablehlo.check_cudnn_version())
    hosts, _, count = shape.rpartition("x")
    topology = f"1x{hosts or 1}x{count}"
    devices = topologies.get_topology_desc(platform="cuda", target_config=target, topology=topology).devices
    found = cudnn.capability(devices[0])
    patched: Any = fused_attention_stablehlo
    patched.check_compute_capability = lambda asked: found >= tuple(map(int, asked.split(".")))
    patched.is_cuda_compute_capability_equal = lambda asked: found == tuple(map(int, asked.split(".")))
    cudnn.capability = lambda device: found
    return devices


def target_config(chip: Chip, cudnn_version: int) -> str:
    """Returns XLA's description of a GPU, a text proto; the version of cuDNN is 91002 for 9.10.2."""
    gpu = tomllib.loads(Path(__file__).with_name("gpus.toml").read_text())[chip.name]
    numbers = cudnn_version // 10_000, cudnn_version // 100 % 100, cudnn_version % 100
    parts = dict(zip(("cudnn_major", "cudnn_minor", "cudnn_patch"), numbers, strict=True))
    extension = "ACCELERATED_FEATURES" if gpu["major"] >= 9 else "NONE"  # sm_90a, sm_100a
    target = Path(__file__).with_name("gpu.txtpb").read_text()
    return string.Template(target).substitute(**gpu, **parts, extension=extension)


def kernels(text: str) -> dict[str, int]:
    """Counts the library calls and Triton kernels in the text of a compiled program; those in a loop count once."""
    found = re.findall(r'custom_call_target="(__cu[^"]+)"|"kind":"(__[^"]+)"', text)
    return dict(collections.Counter(call or fusion for call, fusion in found).most_common())
