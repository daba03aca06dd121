"""Rematerialization policies: which activations a layer saves and which it recomputes (arXiv:1604.06174).

none      saves everything. With gathered weights it equals `minimal`, so that gathered weights are not saved
minimal   saves the results of matrix products and of attention; recomputes norms, activations and weights
full      saves the layer's input only
offload   as `full`, with the input in the host's memory
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name as checkpoint_name

from jaxtrain.model_config import Remat

BLOCK_INPUT = "block_input"
ATTENTION = "attention"  # residuals of the attention kernel
PRODUCTS = ("query", "key", "value", ATTENTION, "attention_out", "router", "up", "gate")
# Results of cuDNN's kernel (mixture and logsumexp) belong to a primitive and cannot be named from outside.
_CUDNN = "dot_product_attention_fwd_wrapper"


def rematerialize(layer: Callable, remat: Remat, *, gathered: bool, looped: bool) -> Callable:
    """Wraps the function of a layer in a rematerialization policy.

    Args:
      gathered: True if the layer gathers its weights over devices.
      looped: True if a loop calls the layer. Otherwise the compiler must not merge the recomputation with
        the forward pass.
    """
    if remat == "none" and not gathered:
        return layer
    policies = jax.checkpoint_policies
    products = policies.save_from_both_policies(
        policies.save_only_these_names(*PRODUCTS), lambda primitive, *_, **__: primitive.name == _CUDNN
    )
    offload = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )
    policy = {"none": products, "minimal": products, "full": policies.nothing_saveable, "offload": offload}[remat]
    return jax.checkpoint(layer, prevent_cse=not looped, policy=policy)
