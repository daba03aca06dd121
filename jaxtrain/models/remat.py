"""What the backward pass of a layer finds kept, and what it computes again (arXiv:1604.06174).

Policies go by the names that `jax.ad_checkpoint.checkpoint_name` gives to values in the model:

  none      everything is kept; with gathered weights: as `minimal`, so that the gathered weights are not
  minimal   results of matrix products and of attention are kept; norms, activations and weights are computed again
  full      nothing but the layer's input is kept
  offload   as `full`, and the input waits in the host's memory
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name as checkpoint_name

from jaxtrain.config import Remat

BLOCK_INPUT = "block_input"
ATTENTION = "attention"  # what the attention kernel needs of its forward pass
# The results of cuDNN's kernel, mixture and logsumexp, are those of a primitive that nobody can name from outside.
_CUDNN = "dot_product_attention_fwd_wrapper"
PRODUCTS = ("query", "key", "value", ATTENTION, "attention_out", "up", "gate")


def rematerialize(layer: Callable, remat: Remat, *, gathered: bool, looped: bool) -> Callable:
    """Wraps a layer's function in the policy.

    Args:
      layer: the function.
      remat: name of the policy.
      gathered: whether it gathers its weights over devices.
      looped: whether a loop calls it; otherwise the compiler must be kept from merging both computations into one.
    """
    if remat == "none" and not gathered:
        return layer
    return jax.checkpoint(layer, prevent_cse=not looped, policy=_policy(remat))


def _policy(remat: Remat) -> Callable | None:
    policies = jax.checkpoint_policies
    match remat:
        case "none" | "minimal":
            return policies.save_from_both_policies(
                policies.save_only_these_names(*PRODUCTS), lambda primitive, *_, **__: primitive.name == _CUDNN
            )
        case "full":
            return policies.nothing_saveable
        case "offload":
            return policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[BLOCK_INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            )
