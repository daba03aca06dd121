"""Formulas for the collectives of a train step: kinds, mesh axes, bytes.

tests/runtime/test_hlo.py checks that the compiled program has these collectives and otherwise scalars only. Bytes count
the unsharded array on one device, as in `runtime.hlo`. A TPU compiler may turn a reduce-scatter over several torus
dimensions into an all-reduce and a slice; the counted bytes are equal.
"""

import math
from typing import NamedTuple

from jax.sharding import AbstractMesh

from jaxtrain.config import Config, ModelConfig
from jaxtrain.models.size import matrices_per_layer


class Traffic(NamedTuple):
    """Bytes per step of one kind of collective over some axes, with a description of the arrays."""

    kind: str
    axes: tuple[str, ...]
    num_bytes: int
    what: str


def expected_traffic(config: Config, model: ModelConfig, mesh: AbstractMesh, num_local: int) -> list[Traffic]:
    """Lists all traffic except scalars. The model has its `vocab_size`; a device holds `num_local` parameters."""
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    settings, passes = config.train, config.train.accumulate
    width = 2 if settings.precision == "bfloat16" else 4
    tokens = settings.batch_size * settings.seq_len // (data * fsdp)  # on one device, over all micro-batches
    hidden = width * tokens * model.d_model
    layers = width * passes * model.num_layers * matrices_per_layer(model, tensor=tensor)
    head = width * passes * model.d_model * model.vocab_rows // tensor
    vectors = _replicated(model, num_local, fsdp, tensor)
    found = []
    if fsdp > 1:
        found += [
            Traffic("all-gather", ("fsdp",), 2 * layers + head, "weights, forward and backward; the head once"),
            Traffic("all-gather", ("fsdp",), 4 * tokens * fsdp, "token ids, for the embedding"),
            Traffic("all-to-all", ("fsdp",), 2 * hidden, "rows of the embedding and their gradients"),
            Traffic("reduce-scatter", ("fsdp",), layers + head, "gradients of the weights"),
        ]
    rows = tuple(axis for axis in ("data", "fsdp") if mesh.shape[axis] > 1)
    if rows and model.num_experts and (settings.balance_loss or settings.router_z_loss):
        load = 4 * passes * model.num_layers * model.num_experts
        found.append(Traffic("all-reduce", rows, load, "load of the experts, for the loss that balances it"))
    if data > 1:
        found.append(Traffic("all-reduce", ("data",), 4 * (num_local - vectors), "gradients, float32"))
    if rows:
        found.append(Traffic("all-reduce", rows, 4 * vectors, "gradients of replicated parameters"))
    if tensor > 1:
        # Entering and leaving both halves of a layer; full recomputation leaves the first half once more.
        per_layer = 4 if model.remat in ("none", "minimal") else 5
        found += [
            Traffic("all-reduce", ("tensor",), per_layer * model.num_layers * hidden, "partial sums of the layers"),
            Traffic("all-reduce", ("tensor",), 2 * hidden, "rows of the embedding; gradient of the last hidden states"),
            Traffic("all-reduce", ("tensor",), 12 * tokens, "maximum, sum and label of the logits"),
        ]
    return [one for one in found if one.num_bytes]


def replaced_gathers(expected: list[Traffic], collectives: list[dict], mesh: dict[str, int]) -> str | None:
    """Returns a warning if the compiler gathers weights by all-reduces of whole arrays, which move twice the bytes.

    `collectives` come from the compiled program, see `hlo.summarize_collectives`.
    """

    def gathered(rows):
        return sum(size for kind, axes, size in rows if kind == "all-gather" and tuple(axes) == ("fsdp",))

    wanted = gathered((one.kind, one.axes, one.num_bytes) for one in expected)
    missing = wanted - gathered((row["kind"], row["axes"], row["bytes"]) for row in collectives)
    if missing < wanted / 2 or not wanted:
        return None
    smaller = max(size for size in range(1, mesh["fsdp"]) if mesh["fsdp"] % size == 0 and size <= mesh["fsdp"] ** 0.5)
    return (
        f"the compiler replaces {missing / 1e9:.1f} GB of all-gathers over fsdp {mesh['fsdp']} by all-reduces, which "
        f"move about twice as much: compare --mesh.data {mesh['data'] * mesh['fsdp'] // smaller} --mesh.fsdp {smaller}"
    )


def _replicated(model: ModelConfig, num_local: int, fsdp: int, tensor: int) -> int:
    """Returns the number of parameters that are replicated over `data` and `fsdp`: all except matrices."""
    matrices = model.num_layers * matrices_per_layer(model, tensor=tensor)
    tables = model.vocab_rows * model.d_model * (1 if model.tie_embeddings else 2)
    return num_local - math.ceil((matrices + tables / tensor) / fsdp)
