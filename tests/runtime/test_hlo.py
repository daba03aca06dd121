"""The parser of HLO text on hand-made programs, on one with known traffic, and on the real train step."""

import importlib.util
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, gpt2, llama
from jaxtrain.plan.compiler import compile_step
from jaxtrain.plan.formulas import make_plan
from jaxtrain.runtime.hlo import collectives, summarize_collectives
from jaxtrain.runtime.mesh import make_mesh
from jaxtrain.training.program import make_program

SHAPE = {"data": 2, "fsdp": 2, "tensor": 2}


def entry(*lines):
    return "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def all_reduce(groups, shape="f32[8]{0}"):
    return f"%sum = {shape} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("{{0,1,2,3,4,5,6,7}}", ("data", "fsdp", "tensor")),
        ("{}", ("data", "fsdp", "tensor")),
        ("{{0,3},{1,2},{4,7},{5,6}}", ("?",)),
        ("{{0,1},{2,4},{3,5},{6,7}}", ("?",)),
        ("[4,2]<=[8]", ("tensor",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "tensor")),
        ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}", ("fsdp",)),
        ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','fsdp'}", ("data", "fsdp")),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", ("tensor",)),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}", ("fsdp",)),
        ("mesh['x'=8] {'x':(2)2}", ("fsdp",)),
    ],
)
def test_all_notations_of_groups_name_the_axes(groups, axes):
    (one,) = collectives(entry(all_reduce(groups)), SHAPE)
    assert one.axes == axes
    assert (one.kind, one.dtype, one.shape, one.count, one.num_bytes) == ("all-reduce", "f32", (8,), 1, 32)


def test_groups_of_one_device_are_no_traffic():
    assert collectives(entry(all_reduce("{{0},{1},{2},{3},{4},{5},{6},{7}}")), SHAPE) == []


def test_bytes_count_the_whole_array():
    found = collectives(
        entry(
            "%a = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups=[4,2]<=[8], dimensions={0}",
            "%b = bf16[8,4]{1,0} reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={1}, to_apply=%add",
            "%c = (f32[2]{0}, s32[3]{0}) all-reduce(%p, %q), replica_groups=[4,2]<=[8], to_apply=%add",
            "%d = (f32[2]{0}, f32[2]{0}) all-to-all(%p, %q), replica_groups=[4,2]<=[8]",
            "%e = (f32[3]{0}, f32[6]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}",
            "%f = (f32[5]{0}, f32[5]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), "
            "source_target_pairs={{0,2},{2,0},{4,6},{6,4}}",
            "%g = f32[5]{0} collective-permute-done(%f)",
        ),
        SHAPE,
    )
    assert [(one.kind, one.dtype, one.shape, one.num_bytes) for one in found] == [
        ("all-gather", "bf16", (8, 4), 64),
        ("reduce-scatter", "bf16", (8, 8), 128),
        ("all-reduce", "f32", (2,), 8),
        ("all-reduce", "s32", (3,), 12),
        ("all-to-all", "f32", (2,), 8),
        ("all-to-all", "f32", (2,), 8),
        ("all-gather", "f32", (6,), 24),
        ("collective-permute", "f32", (5,), 20),
    ]
    assert found[-1].axes == ("fsdp",)


CONDITION = """
%condition (t: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(7)
  %t = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=DIRECTION
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %sum = f32[8]{0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add
}
"""
LOOP = [
    "%first = s32[] constant(FIRST)",
    "%copied = s32[] copy(%first)",
    "%state = (s32[], f32[8]) tuple(%copied, %p)",
    "%loop = (s32[], f32[8]) while(%state), condition=%condition, body=%body",
]


@pytest.mark.parametrize(("first", "noted", "count"), [(0, "", 7), (2, "", 5), (0, '"known_trip_count":{"n":"3"}', 3)])
def test_loops_multiply(first, noted, count):
    lines = [line.replace("FIRST", str(first)) for line in LOOP]
    lines[-1] += f", backend_config={{{noted}}}" if noted else ""
    (one,) = collectives(CONDITION.replace("DIRECTION", "LT") + entry(*lines), SHAPE)
    assert (one.count, one.num_bytes) == (count, 32 * count)


def test_a_loop_of_unknown_length_is_an_error():
    lines = [line.replace("FIRST", "0") for line in LOOP]
    with pytest.raises(ValueError, match="condition of loop %loop has no readable trip count"):
        collectives(CONDITION.replace("DIRECTION", "NE") + entry(*lines), SHAPE)


def test_text_that_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="not an HLO module"):
        collectives("nothing", SHAPE)


def test_fused_collectives_of_a_tpu_count_once():
    """A gather spread over three fusions; an all-reduce and a slice fused; an operation wrapped as asynchronous."""
    gather = 'all-gather(%p), replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}'
    text = f"""
%start (p: f32[4]) -> f32[8] {{
  %g1 = f32[8]{{0}} {gather}
}}

%hidden (p: f32[4]) -> f32[8] {{
  %g2 = f32[8]{{0}} {gather}
}}

%all-reduce-scatter.1 (p: f32[8]) -> f32[4] {{
  %r = f32[8]{{0}} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add
}}

%wrapped (p: f32[8]) -> f32[8] {{
  %w = f32[8]{{0}} all-to-all(%p), replica_groups=[4,2]<=[8]
}}

""" + entry(
        "%f1 = f32[8]{0} fusion(%p), kind=kCustom, calls=%start",
        "%f2 = f32[8]{0} fusion(%p), kind=kOutput, calls=%hidden",
        "%f3 = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1",
        "%s = ((f32[8]), f32[8], s32[]) async-start(%p), calls=%wrapped",
        "%d = f32[8]{0} async-done(%s), calls=%wrapped",
    )
    found = collectives(text, SHAPE)
    assert [one.kind for one in found] == ["all-gather", "reduce-scatter", "all-to-all"]
    assert {one.num_bytes for one in found} == {32}
    assert [one.blocking for one in found] == [False, True, False]


GROUPS = "replica_groups=[4,2]<=[8]"


@pytest.mark.parametrize(
    ("line", "kind", "shapes"),
    [
        (f"((f32[8,4]), f32[4,4]) reduce-scatter-start(%p), {GROUPS}, dimensions={{0}}", "reduce-scatter", [(8, 4)]),
        (
            f"((f32[8,4], f32[6]), (f32[4,4], f32[3])) reduce-scatter-start(%p, %q), {GROUPS}, dimensions={{0}}",
            "reduce-scatter",
            [(8, 4), (6,)],
        ),
        (f"((f32[4], f32[2]), (f32[8], f32[4])) all-gather-start(%p, %q), {GROUPS}", "all-gather", [(8,), (4,)]),
        (f"((f32[8]), f32[8], u32[]) all-to-all-start(%p), {GROUPS}", "all-to-all", [(8,)]),
        (f"f32[8] all-reduce-start(%p), {GROUPS}", "all-reduce", [(8,)]),
        (f"(f32[8], f32[4]) all-reduce-start(%p, %q), {GROUPS}", "all-reduce", [(8,), (4,)]),
    ],
)
def test_asynchronous_collectives_count_once(line, kind, shapes):
    found = collectives(entry(f"%a = {line}"), SHAPE)
    assert [(one.kind, one.shape, one.blocking) for one in found] == [(kind, shape, False) for shape in shapes]


def test_a_collective_of_a_sparse_core_runs_beside_the_others():
    text = f"""
%called (p: f32[8]) -> f32[4] {{
  %r = f32[4]{{0}} reduce-scatter(%p), {GROUPS}, dimensions={{0}}, to_apply=%add
}}, execution_thread="sparsecore"

""" + entry(
        '%s = ((), (), (s32[1])) call-start(), async_execution_thread="sparsecore", to_apply=%called',
        "%u = ((), (), (s32[1])) call-update(%s)",
        "%d = f32[4]{0} call-done(%u), to_apply=%called",
    )
    (one,) = collectives(text, SHAPE)
    assert (one.kind, one.num_bytes, one.blocking) == ("reduce-scatter", 32, False)


def test_traffic_of_a_program_that_can_be_counted():
    """A scan of 5: each gathers a row of weights over fsdp and adds activations over tensor; then one sum over all."""
    mesh = make_mesh(MeshConfig(2, 2, 2))

    def body(x, weights):
        def layer(x, w):
            return jax.lax.psum(x @ jax.lax.all_gather(w, "fsdp", axis=0, tiled=True), "tensor"), None

        return jax.lax.psum(jnp.sum(jax.lax.scan(layer, x, weights)[0]), ("data", "fsdp"))

    specs = (P(("data", "fsdp")), P(None, "fsdp"))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip([(8, 16), (5, 16, 16)], specs, strict=True)
    ]
    found = collectives(jax.jit(mapped).lower(*arguments).compile().as_text(), mesh.shape)
    assert summarize_collectives(found) == [
        {
            "kind": "all-gather",
            "axes": ["fsdp"],
            "dtype": "f32",
            "count": 5,
            "bytes": 5 * 16 * 16 * 4,
            "blocking_bytes": 5 * 16 * 16 * 4,
        },
        {
            "kind": "all-reduce",
            "axes": ["tensor"],
            "dtype": "f32",
            "count": 5,
            "bytes": 5 * 2 * 16 * 4,
            "blocking_bytes": 5 * 2 * 16 * 4,
        },
        {"kind": "all-reduce", "axes": ["data", "fsdp"], "dtype": "f32", "count": 1, "bytes": 4, "blocking_bytes": 4},
    ]


def tiny(mesh, style=llama, precision="float32", seq_len=32, **fields):
    """A train step whose weights, activations, logits and token ids all have different sizes."""
    sizes = {"num_layers": 2, "num_heads": 4, "d_model": 64, "max_seq_len": seq_len, "vocab_size": 250}
    sizes |= {"vocab_multiple": 16, "d_ff": 160}
    return Config(
        data=DataConfig(store="-"),
        model=style(**{**sizes, **fields}),
        optim=OptimConfig(warmup_steps=5),
        train=TrainConfig(batch_size=16, seq_len=seq_len, steps=100, precision=precision),
        mesh=mesh,
    )


SMALL = 8000  # bytes of all scalars a step: norms, whether leaves are finite, what is measured of each layer


def check_traffic(found, config, kinds=None):
    """Compares the traffic of a program (kind, axes, bytes) with the formula; `kinds` renames the formula's."""
    expected, measured = Counter(), Counter()
    for one in make_plan(config, 250, 8).traffic:
        expected[(kinds or {}).get(one.kind, one.kind), one.axes] += one.num_bytes
    for row in found:
        measured[row["kind"], tuple(row["axes"])] += row["bytes"]
    small = {key: size for key, size in measured.items() if key not in expected}
    assert sum(small.values()) < SMALL, f"the layout does not call for {small}"
    for key, size in expected.items():
        assert measured[key] == pytest.approx(size, rel=0.1, abs=SMALL), key


@pytest.mark.parametrize(
    ("mesh", "fields"),
    [
        (MeshConfig(1, 8, 1), {"remat": "full", "num_kv_heads": 2}),
        pytest.param(MeshConfig(2, 2, 2), {"style": gpt2}, marks=pytest.mark.slow),
        pytest.param(MeshConfig(2, 2, 2), {"num_experts": 4}, marks=pytest.mark.slow),
    ],
    ids=["fsdp", "all axes", "experts"],
)
def test_the_traffic_of_the_train_step_follows_the_layout(mesh, fields):
    config = tiny(mesh, **fields)
    mesh = make_mesh(config.mesh)
    program = make_program(config, mesh, 250)
    compiled = program.train_step.lower(program.abstract_state, program.abstract_batch).compile()
    found = collectives(compiled.as_text(), mesh.shape)
    check_traffic(summarize_collectives(found), config)
    matrices = {leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(program.abstract_state.params["layers"])}
    tables = {64 * 256}
    tokens = 16 * 32 // mesh.shape["data"]
    router = 64 * (config.model.num_experts or 0)  # which `tensor` does not shard
    parts = {(size // mesh.shape["tensor"]) for size in matrices | tables} | {router}
    for one in found:
        if one.kind == "all-gather":
            size = one.num_bytes // one.count // 4
            assert size in (parts if one.dtype == "f32" else {tokens}), f"gathers what is no weight: {one}"
    state = make_plan(config, 250, 8).memory.state
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(state, rel=0.02)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler: pip install jaxtrain[plan]")
def test_the_traffic_of_a_tpu_program_follows_the_layout():
    config = tiny(MeshConfig(1, -1, 1), remat="full", precision="bfloat16", seq_len=128, d_model=512, d_ff=2048)
    found = compile_step(config, 250, "v5e:2x4", timeout=900)
    assert found["fits"]
    assert {row["dtype"] for row in found["collectives"] if row["bytes"] > 10**6} == {"bf16"}
    # A reduce-scatter over two dimensions of the slice becomes an all-reduce and a slice: the compiler's choice.
    rows = [row | {"kind": row["kind"].replace("all-reduce", "reduce-scatter")} for row in found["collectives"]]
    check_traffic(rows, config, kinds={"all-reduce": "reduce-scatter"})
