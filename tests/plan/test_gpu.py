"""Compilation for GPUs that are not here: their description, the kernels of a program, and the real compiler."""

import dataclasses
import importlib.util
import json
import re

import pytest

from jaxtrain.cli import main
from jaxtrain.plan.gpu import kernels, target_config
from jaxtrain.runtime.chips import CHIPS
from jaxtrain.runtime.config_files import to_json

GPUS = [chip for chip in CHIPS.values() if chip.platform == "gpu"]
HAS_COMPILER = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


@pytest.mark.parametrize("chip", GPUS, ids=lambda chip: chip.name)
def test_every_gpu_is_described(chip):
    text = target_config(chip, 91002)
    assert f'name: "{chip.device_kind}"' in text
    assert f"cuda_compute_capability {{ major: {chip.capability[0]} " in text
    assert "dnn_version_info { major: 9 minor: 10 patch: 2 }" in text
    memory = int(re.search(r"device_memory_size: (\d+)", text).group(1))
    assert memory == pytest.approx(chip.hbm_bytes, rel=0.08)  # data sheets give the nominal size
    assert text.count("{") == text.count("}")


def test_kernels_are_counted_by_name():
    text = """
      %a = bf16[8] custom-call(%p), custom_call_target="__cudnn$fmhaSoftmax"
      %b = bf16[8] fusion(%p), backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
      %c = bf16[8] fusion(%p), backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
      %d = bf16[8] custom-call(%p), custom_call_target="AllocateBuffer"
    """
    assert kernels(text) == {"__triton_gemm": 2, "__cudnn$fmhaSoftmax": 1}


@pytest.mark.skipif(not HAS_COMPILER, reason="no GPU compiler: pip install jaxtrain[plan-gpu]")
@pytest.mark.parametrize("topology", ["h100:2", "a100:2", "b200:2x1"])
def test_the_real_compiler_answers(topology, tiny_config, tmp_path, capsys):
    model = dataclasses.replace(tiny_config.model, d_model=256, num_heads=4, num_kv_heads=2, max_seq_len=128)
    train = dataclasses.replace(tiny_config.train, precision="bfloat16", seq_len=128)
    mesh = dataclasses.replace(tiny_config.mesh, data=1, fsdp=2)
    file = tmp_path / "tiny.json"
    file.write_text(to_json(dataclasses.replace(tiny_config, model=model, train=train, mesh=mesh)))
    assert main(["plan", str(file), "--topology", topology, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["compiled"] is True
    assert result["fits"] is True
    assert any("fmha" in name for name in result["kernels"])
    assert result["estimated_seconds"] is None
    rows = {(row["kind"], row["dtype"]): row["bytes"] for row in result["collectives"]}
    assert {kind for kind, _ in rows} >= {"all-gather", "reduce-scatter"}
