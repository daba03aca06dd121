"""Logical axes of the transformer's parameters. `jaxtrain.runtime.mesh` maps logical axes to mesh axes."""

from typing import Any

import jax

from jaxtrain.models.parallel import gather

# Inputs and outputs of each kernel. `embed` is d_model, `heads` the query or key-value heads, `hidden` d_ff.
_KERNELS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("query", "key", "value"), ("embed", "heads")),
    "out": ("heads", "embed"),
    **dict.fromkeys(("up", "gate"), ("embed", "hidden")),
    "down": ("hidden", "embed"),
}
# Keyed by the end of a parameter's path.
_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "positions": (None, None),
    "router/kernel": ("embed", None),
}
for _name, (_inputs, _outputs) in _KERNELS.items():
    _AXES[f"{_name}/kernel"] = (_inputs, _outputs)
    _AXES[f"{_name}/bias"] = (None if _name in ("out", "down") else _outputs,)  # those are added after the all-reduce
    _AXES |= {f"{_name}_lora/a": (_inputs, None), f"{_name}_lora/b": (None, _outputs)}
    _AXES[f"experts/{_name}"] = (None, _inputs, _outputs)
_NORMS = ("attention_norm", "attention_post_norm", "feed_forward_norm", "feed_forward_post_norm")
for _name in (*_NORMS, "query_norm", "key_norm", "final_norm"):
    _AXES |= dict.fromkeys((f"{_name}/scale", f"{_name}/bias"), (None,))


def logical_axes(params: Any) -> Any:
    """Returns a tree like `params` of tuples: the logical axis of each dimension, or None.

    Raises:
      ValueError: a parameter is missing from the table or has another rank.
    """

    def axes_of(path, leaf) -> tuple[str | None, ...]:
        names = [str(key.key) for key in path]
        axes = _AXES.get("/".join(names[-2:])) or _AXES.get(names[-1])
        stacked = ("layers",) if names[0] == "layers" else ()
        if axes is None or len(stacked) + len(axes) != len(leaf.shape):
            raise ValueError(f"{'/'.join(names)} {leaf.shape} has no known logical axes: add it to models/layout.py")
        return stacked + axes

    return jax.tree_util.tree_map_with_path(axes_of, params)


def gather_layer(variables: Any, num_devices: int) -> Any:
    """All-gathers one layer's parameters along `embed`."""

    def unshard(path, leaf):
        axes = _AXES["/".join(str(key.key) for key in path[-2:])]
        return gather(leaf, axes.index("embed"), num_devices) if "embed" in axes else leaf

    return jax.tree_util.tree_map_with_path(unshard, variables)
