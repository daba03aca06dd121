"""Accelerators that a run can be planned for: memory, peak speed, and the notation of topologies."""

import math
import re
from typing import NamedTuple

from jaxtrain.fields import check_choice, nearest

# Dense (no 2:4 sparsity) bfloat16 FLOP/s of one jax device, by `device_kind`. NVIDIA: data sheets and architecture
# white papers of A100, H100, H200, GH200 and B200; figures with sparsity are halved. TPU: figures per chip in the Cloud
# TPU documentation of v4, v5e, v5p and v6e, where a jax device is a whole chip. Names are compared in full, because a
# MIG slice of a GPU has a longer name and a fraction of the speed.
_PEAK_BFLOAT16 = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


class Chip(NamedTuple):
    """One accelerator."""

    name: str  # name on the command line
    device_kind: str  # `jax.Device.device_kind`
    # memory available to a program. TPU: as the TPU compiler reports it (of 16, 95 and 32 GB in the Cloud TPU
    # documentation); NVIDIA: from the data sheets, and what the commands reserve (`memory`).
    hbm_bytes: int
    slice_dims: int = 0  # number of dimensions of a TPU slice's shape; 0 for GPUs
    capability: tuple[int, int] | None = None  # CUDA compute capability; None for TPUs

    @property
    def platform(self) -> str:
        return "tpu" if self.slice_dims else "gpu"

    @property
    def compiler(self) -> str:
        """Name of its compiler, for messages."""
        return f"{self.platform.upper()} compiler"

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return peak_flops(self.device_kind, "bfloat16")


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", int(15.75 * 2**30), 2),
        Chip("v5p", "TPU v5", int(95.73 * 2**30), 3),
        Chip("v6e", "TPU v6 lite", int(31.24 * 2**30), 2),
        Chip("a100", "NVIDIA A100-SXM4-80GB", 80 * 10**9, capability=(8, 0)),
        Chip("h100", "NVIDIA H100 80GB HBM3", 80 * 10**9, capability=(9, 0)),
        Chip("h200", "NVIDIA H200", 141 * 10**9, capability=(9, 0)),
        Chip("b200", "NVIDIA B200", 180 * 10**9, capability=(10, 0)),
    )
}


def find_chip(name: str) -> Chip:
    """Returns the chip of a name. Raises a ValueError that lists the known chips and suggests one."""
    return CHIPS[check_choice(name, CHIPS, "unknown chip")]


def parse_topology(topology: str) -> tuple[Chip, int]:
    """Parses a TPU slice (`v5p:2x2x2`, `v6e:4x4`) or GPUs (`h100:8`, `h100:4x8` for hosts x GPUs).

    Returns the chip and the number of chips. Raises a ValueError for another form, chip, or number of dimensions.
    """
    name, _, shape = topology.partition(":")
    near, example = nearest(name, CHIPS), "v5p:2x2x2 or h100:8"
    if near:
        dims, count = CHIPS[near].slice_dims, shape.count("x") + 1
        fits = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) and (count == dims if dims else count <= 2)
        if fits and name == near:
            return CHIPS[near], math.prod(map(int, shape.split("x")))
        example = f"{near}:{'x'.join(['4'] * dims) or '8'}"
    known = f"with a chip of {', '.join(CHIPS)}; of GPUs their number, or hosts x GPUs"
    raise ValueError(f"unknown topology {topology!r}: give CHIP:SHAPE, as {example}, {known}")


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak of dense matrix products on one device, FLOP/s.

    None for CPUs, unknown devices, and dtypes other than "bfloat16".
    """
    return _PEAK_BFLOAT16.get(device_kind) if dtype == "bfloat16" else None
