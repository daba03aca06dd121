"""Absent NVIDIA GPUs as compilation targets of XLA: their devices, and the memory and kernels of a program for them."""

import collections
import re
import tomllib
from pathlib import Path
from typing import Any

from jaxtrain.runtime.chips import Chip

CAVEAT = (
    "compiled for a GPU that is not here: matrix products are not autotuned, which on a GPU may choose other kernels "
    "and workspaces; there are no estimates of time"
)

# The limits are equal for compute capabilities 8.0 to 10.0. cuDNN's version is that of the installed library.
_TARGET = """
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} feature_extension: {extension} }}
  core_count: {core_count}
  fpus_per_core: {fpus_per_core}
  memory_bandwidth: {memory_bandwidth}
  l2_cache_size: {l2_cache_size}
  clock_rate_ghz: {clock_rate_ghz}
  device_memory_size: {device_memory_size}
  shared_memory_per_core: {shared_memory_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_memory_per_block_optin}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "{cudnn_major}.{cudnn_minor}.{cudnn_patch}"
  device_interconnect_info {{ active_links: {active_links} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn_major} minor: {cudnn_minor} patch: {cudnn_patch} }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


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
    return _TARGET.format(**gpu, **parts, extension=extension)


def kernels(text: str) -> dict[str, int]:
    """Counts the library calls and Triton kernels in the text of a compiled program; those in a loop count once."""
    found = re.findall(r'custom_call_target="(__cu[^"]+)"|"kind":"(__[^"]+)"', text)
    return dict(collections.Counter(call or fusion for call, fusion in found).most_common())
