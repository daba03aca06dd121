"""The mesh and its shardings: sizes, slices, the table of axes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxtrain.config import MeshConfig, family, gpt2, llama
from jaxtrain.models.layout import logical_axes
from jaxtrain.models.model import TransformerModel
from jaxtrain.runtime.mesh import AXES, LOGICAL_AXES, check_batch, make_mesh, num_row_shards, partition_spec


class FakeDevice:
    """Stands for a device of one of many slices or processes."""

    platform = device_kind = "fake"

    def __init__(self, number, slice_index=0, process_index=0):
        self.id, self.slice_index, self.process_index = number, slice_index, process_index


def slices_of(mesh):
    return [[[device.slice_index for device in row] for row in plane] for plane in mesh.devices]


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=4, tensor=-1), (1, 4, 2)),
        (MeshConfig(data=8, fsdp=1, tensor=-1), (8, 1, 1)),
        (MeshConfig(data=1, fsdp=3, tensor=1), (1, 3, 1)),
    ],
    ids=str,
)
def test_minus_one_takes_the_devices_that_are_left(config, shape):
    mesh = make_mesh(config)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert [device.id for device in mesh.devices.flat] == list(range(mesh.size))
    assert num_row_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=-1, fsdp=3), "data -1 x fsdp 3 x tensor 1 cannot be made of 8 devices: 3 does not divide it"),
        (MeshConfig(data=2, fsdp=-1, tensor=3), "2 x fsdp -1 x tensor 3 cannot be made of 8 devices: 6 does not"),
        (MeshConfig(data=2, fsdp=2, tensor=4), "data 2 x fsdp 2 x tensor 4 takes 16 devices, and there are 8"),
        (MeshConfig(data=9, fsdp=-1), "data 9 x fsdp -1 x tensor 1 takes 9 devices, and there are 8"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_errors_with_the_arithmetic(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mesh(config)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1}, "only one axis of the mesh can be -1, got mesh.data and mesh.fsdp"),
        ({"fsdp": -1, "tensor": -1}, "got mesh.data and mesh.fsdp and mesh.tensor"),
        ({"fsdp": 0}, "mesh.fsdp must be"),
        ({"tensor": -2}, "mesh.tensor must be above 0"),
    ],
    ids=str,
)
def test_sizes_that_mean_nothing_never_become_a_config(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MeshConfig(**sizes)


def test_no_process_is_left_without_a_device():
    devices = [FakeDevice(i, process_index=i // 2) for i in range(8)]
    assert make_mesh(MeshConfig(data=2), devices[:2]).size == 2
    with pytest.raises(
        ValueError, match=r"data 4 x fsdp 1 x tensor 1 leaves 2 processes without a device, of 8 devices"
    ):
        make_mesh(MeshConfig(data=4), devices)


def test_slices_lie_along_data():
    """A network joins slices: only gradients, once a step, may cross it."""
    devices = [FakeDevice(i, slice_index=i % 2) for i in range(8)]
    assert slices_of(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)) == [[[0, 0]] * 2, [[1, 1]] * 2]
    assert slices_of(make_mesh(MeshConfig(data=-1, fsdp=2), devices)) == [[[0], [0]]] * 2 + [[[1], [1]]] * 2
    assert slices_of(make_mesh(MeshConfig(), devices)) == [[[0]]] * 4 + [[[1]]] * 4


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (3, 2, 1)], ids=str)
def test_other_axes_do_not_reach_over_slices(sizes):
    devices = [FakeDevice(i, slice_index=i // 4) for i in range(8)]
    with pytest.raises(ValueError, match=rf"mesh\.data {sizes[0]} is not divisible by the number of slices, 2"):
        make_mesh(MeshConfig(*sizes), devices)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("vocab", "embed"), P("tensor", "fsdp")),
        (("layers", "embed", "heads"), P(None, "fsdp", "tensor")),
        (("layers", "hidden", "embed"), P(None, "tensor", "fsdp")),
        (("rows", None, "hidden"), P(("data", "fsdp"), None, "tensor")),
        (("layers", None), P(None, None)),
        ((), P()),
    ],
    ids=str,
)
def test_the_table_maps_logical_axes_to_mesh_axes(axes, spec):
    assert partition_spec(axes) == spec


def test_the_table_names_axes_of_the_mesh_only():
    used = {name for rule in LOGICAL_AXES.values() for name in ([rule] if isinstance(rule, str) else rule)}
    assert used == set(AXES)


@pytest.mark.parametrize("axes", [("heads", "hidden"), ("embed", "embed"), ("rows", "embed")], ids=str)
def test_two_dimensions_over_one_mesh_axis_are_an_error(axes):
    with pytest.raises(ValueError, match=r"logical axes .* a mesh axis can shard one dimension only"):
        partition_spec(axes)


GEMMA = family("gemma3", num_layers=2, num_heads=4, d_model=32, d_ff=48, max_seq_len=16, vocab_size=29)
STYLES = {
    "gemma": GEMMA,
    "gpt2": gpt2(2, 4, 32, 16, vocab_size=29),
    "llama": llama(2, 4, 32, 48, 16, num_kv_heads=2, vocab_size=29),
}
STACKED = {"query/kernel": ("embed", "heads"), "key/kernel": ("embed", "heads"), "value/kernel": ("embed", "heads")}
STACKED |= {"out/kernel": ("heads", "embed"), "up/kernel": ("embed", "hidden"), "gate/kernel": ("embed", "hidden")}
STACKED |= {"down/kernel": ("hidden", "embed"), "query/bias": ("heads",), "key/bias": ("heads",)}
STACKED |= {"value/bias": ("heads",), "up/bias": ("hidden",), "gate/bias": ("hidden",)}
WHOLE = {"embedding": ("vocab", "embed"), "head": ("embed", "vocab"), "positions": (None, None)}


@pytest.mark.parametrize(("qk_norm", "tied", "bias"), [(False, True, False), (True, False, True)])
@pytest.mark.parametrize("style", STYLES)
def test_every_parameter_has_logical_axes(style, qk_norm, tied, bias):
    """Matrices are sharded over both axes of the mesh; vectors over one or none."""
    config = dataclasses.replace(STYLES[style], qk_norm=qk_norm, tie_embeddings=tied, use_bias=bias)
    params = jax.eval_shape(TransformerModel(config).init, jax.random.key(0))
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(logical_axes(params), is_leaf=is_axes)
    assert len(leaves) == len(jax.tree.leaves(params))
    for path, axes in leaves:
        names = [key.key for key in path]
        if names[0] == "layers":
            assert axes == ("layers", *STACKED.get("/".join(names[-2:]), (None,))), names
        else:
            assert axes == WHOLE.get(names[0], (None,)), names
    partition = jax.tree.map(partition_spec, logical_axes(params), is_leaf=is_axes)
    assert partition["embedding"] == P("tensor", "fsdp")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layers": {"attention": {"gadget": {"kernel": jnp.zeros((2, 3, 4))}}}}, "layers/attention/gadget/kernel"),
        ({"extra": jnp.zeros(3)}, r"extra \(3,\)"),
        ({"head": jnp.zeros((3, 4, 5))}, r"head \(3, 4, 5\)"),
        ({"layers": {"attention": {"query": {"kernel": jnp.zeros((3, 4))}}}}, r"query/kernel \(3, 4\)"),
    ],
)
def test_a_parameter_without_logical_axes_is_an_error(params, message):
    with pytest.raises(ValueError, match=rf"{message}.* has no known logical axes: add it to models/layout\.py"):
        logical_axes(params)


def test_a_batch_divides_over_micro_batches_and_rows():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    check_batch(24, 3, mesh)  # 3 micro-batches x 4; tensor shares no rows
    with pytest.raises(ValueError, match=r"batch_size 20 is not divisible by train\.accumulate 3 x 4 .* = 12: change"):
        check_batch(20, 3, mesh)
