"""Logical axes of the transformer's parameters. `jaxtrain.runtime.mesh` maps logical axes to mesh axes."""

from typing import Any

import jax

from jaxtrain.models.parallel import gather

# Keyed by the end of a parameter's path. `embed` is d_model, `heads` the query or key-value heads, `hidden` d_ff.
_AXES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "positions": (None, None),
    "query/kernel": ("embed", "heads"),
    "key/kernel": ("embed", "heads"),
    "value/kernel": ("embed", "heads"),
    "out/kernel": ("heads", "embed"),
    "up/kernel": ("embed", "hidden"),
    "gate/kernel": ("embed", "hidden"),
    "down/kernel": ("hidden", "embed"),
    "query/bias": ("heads",),
    "key/bias": ("heads",),
    "value/bias": ("heads",),
    "up/bias": ("hidden",),
    "gate/bias": ("hidden",),
}
_LORA = [path.split("/")[0] for path in _AXES if path.endswith("/kernel")]
_AXES |= {f"{name}_lora/a": (_AXES[f"{name}/kernel"][0], None) for name in _LORA}
_AXES |= {f"{name}_lora/b": (None, _AXES[f"{name}/kernel"][1]) for name in _LORA}
_AXES |= {f"experts/{name}": (None, *_AXES[f"{name}/kernel"]) for name in ("up", "gate", "down")}
_AXES["router/kernel"] = ("embed", None)
_NORMS = ("attention_norm", "attention_post_norm", "feed_forward_norm", "feed_forward_post_norm")
_NORMS += ("query_norm", "key_norm", "final_norm")
_AXES |= {f"{norm}/{leaf}": (None,) for norm in _NORMS for leaf in ("scale", "bias")}
_AXES |= {"out/bias": (None,), "down/bias": (None,)}  # added after the all-reduce


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
