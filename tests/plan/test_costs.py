"""The reader of a compiled program's costs, on a hand-made program and on the train step of a small model."""

import dataclasses
import importlib.util

import pytest

from jaxtrain.plan.compiler import compile_step
from jaxtrain.plan.costs import part_costs


def op(name, scope="", cycles=None):
    """Returns the attributes that the TPU compiler gives to an operation."""
    found = f', metadata={{op_name="jit(train_step)/{scope}"}}' if scope else ""
    return found + (f', backend_config={{"estimated_cycles":"{cycles}"}}' if cycles is not None else "") + name


LAYER = "shard_map/jvp(Transformer)/while/body/Block/mlp/dot_general"
PROGRAM = f"""HloModule m

%sliced (stack: bf16[4,8,8], i: s32[]) -> bf16[8,8] {{
  %stack = bf16[4,8,8]{{2,1,0}} parameter(0)
  %i = s32[] parameter(1)
  %slice = bf16[1,8,8]{{2,1,0}} dynamic-slice(%stack, %i)
  ROOT %one = bf16[8,8]{{1,0}} bitcast(%slice)
}}

%nested (stack: bf16[4,8,8], i: s32[]) -> bf16[8,8] {{
  %stack = bf16[4,8,8]{{2,1,0}} parameter(0)
  %i = s32[] parameter(1)
  %layer = bf16[8,8]{{1,0}} fusion(%stack, %i), kind=kLoop, calls=%sliced
  ROOT %twice = bf16[8,8]{{1,0}} add(%layer, %layer)
}}

%updated (stack: f32[4,8], row: f32[8], i: s32[]) -> f32[4,8] {{
  %stack = f32[4,8]{{1,0}} parameter(0)
  %row = f32[8]{{0}} parameter(1)
  %i = s32[] parameter(2)
  %wide = f32[1,8]{{1,0}} bitcast(%row)
  ROOT %new = f32[4,8]{{1,0}} dynamic-update-slice(%stack, %wide, %i)
}}

%condition (t: (s32[])) -> pred[] {{
  %t = (s32[]) parameter(0)
}}

%body (t: (s32[], bf16[4,8,8], f32[4,8], f32[8])) -> (s32[], bf16[4,8,8], f32[4,8], f32[8]) {{
  %t = (s32[], bf16[4,8,8], f32[4,8], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %stack = bf16[4,8,8]{{2,1,0}} get-tuple-element(%t), index=1
  %rows = f32[4,8]{{1,0}} get-tuple-element(%t), index=2
  %row = f32[8]{{0}} get-tuple-element(%t), index=3
  %w = bf16[8,8]{{1,0}} fusion(%stack, %i), kind=kLoop, calls=%nested{op("", LAYER, 100)}
  %near = bf16[8,8]{{1,0:T(8,128)S(1)}} copy-start(%w)
  %back = bf16[8,8]{{0,1}} copy(%w){op("", LAYER, 7)}
  %new = f32[4,8]{{1,0}} fusion(%rows, %row, %i), kind=kLoop, calls=%updated{op("", "", 10)}
  %sum = f32[8]{{0}} all-reduce(%row), to_apply=%add{op("", LAYER)}
  %kernel = f32[8]{{0}} custom-call(%row){op("", LAYER, 2**63 - 1)}
  %remat = f32[8]{{0}} exponential(%row){op("", LAYER.replace("Block", "rematted_computation"), 1)}
  %grad = f32[8]{{0}} negate(%row){op("", LAYER.replace("jvp(Transformer)", "transpose(jvp(Transformer))"), 2)}
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %loop = (s32[]) while(%p), condition=%condition, body=%body, \
backend_config={{"known_trip_count":{{"n":"4"}}}}{op("", "shard_map/jvp(Transformer)/while")}
  %head = f32[8]{{0}} negate(%p){op("", "shard_map/jvp(head)/while/body/mul", 20)}
  %embed = f32[8]{{0}} negate(%p){op("", "transpose(jvp(Transformer))/embed/mul", 30)}
  %adam = f32[8]{{0}} negate(%p){op("", "optimizer/mul", 40)}
  %norm = f32[8]{{0}} negate(%p){op("", "reduce_sum", 2)}
  ROOT %other = f32[8]{{0}} negate(%p){op("", "", 3)}
}}
"""


def test_costs_are_summed_by_part_with_loops_multiplied_out():
    """Slices count instead of stacks, also in nested fusions; on-chip memory not at all; what is added, to its loop."""
    costs = {row.pop("part"): row for row in part_costs(PROGRAM)}
    matrix, row = 8 * 8 * 2, 8 * 4
    # The slice read and written, the prefetch, the kernel, and the row written into the stack, with two counters.
    forward = 2 * matrix + 4 + matrix + 2 * row + (2 * row + 4)
    assert costs == {
        "layers, forward": {"cycles": 4 * 110, "bytes": 4 * forward},
        "layers, backward": {"cycles": 4 * 2, "bytes": 4 * 2 * row},
        "layers, rematerialized": {"cycles": 4 * 1, "bytes": 4 * 2 * row},
        "head": {"cycles": 20, "bytes": 2 * row},
        "embedding": {"cycles": 30, "bytes": 2 * row},
        "optimizer": {"cycles": 42, "bytes": 4 * row},
        "copies": {"cycles": 4 * 7, "bytes": 4 * 2 * matrix},
        "collectives": {"cycles": 0, "bytes": 4 * 2 * row},
        "rest": {"cycles": 3, "bytes": 2 * row},
    }


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler: pip install jaxtrain[plan]")
def test_costs_of_a_tpu_program_grow_with_its_layers(tiny_config):
    sizes = {"d_model": 256, "d_ff": 512, "remat": "full"}

    def costs(num_layers):
        model = dataclasses.replace(tiny_config.model, num_layers=num_layers, scan_unroll=1, **sizes)
        found = compile_step(dataclasses.replace(tiny_config, model=model), 257, "v5e:1x1", timeout=600)["costs"]
        return {row["part"]: row for row in found}

    two, four = costs(2), costs(4)
    for part in ("layers, forward", "layers, backward", "layers, rematerialized"):
        assert two[part]["cycles"] > 0
        assert four[part]["cycles"] == pytest.approx(2 * two[part]["cycles"], rel=0.15)
    assert four["head"]["bytes"] == pytest.approx(two["head"]["bytes"], rel=0.15)
