"""Feed-forward part of a layer: one block, or a mixture of experts with a router.

The mixture drops no token (arXiv:2211.15841): the tokens are sorted by expert, and grouped products take each expert's
tokens through its matrices. On a mesh every device computes all experts for its rows: `fsdp` shards the channels of
their matrices, which are gathered layer by layer, and `tensor` shards the hidden channels of each expert. So the work
per device does not depend on the router.

Shape suffixes: B batch, T tokens, N tokens of all rows, D d_model, F d_ff, E experts, K experts per token, S = N * K,
L layers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.config import ModelConfig
from jaxtrain.models.kernels.grouped import grouped_matmul
from jaxtrain.models.kernels.linear import Weights, add_bias, linear
from jaxtrain.models.kernels.pointwise import gelu, swiglu
from jaxtrain.models.lora import add_lora
from jaxtrain.models.parallel import Parallel, enter_tensor, free_early, leave_tensor, sum_rows
from jaxtrain.models.remat import checkpoint_name

INIT_STD = 0.02  # Radford et al., 2019


def residual_std(config: ModelConfig) -> float:
    """Returns the standard deviation of the initial matrices that write to the residual stream."""
    # The residual stream adds up 2 L branches; this scale keeps its variance (Radford et al., 2019).
    return INIT_STD / math.sqrt(2 * config.num_layers)


class FeedForward(nn.Module):
    """GELU (arXiv:1606.08415, tanh form), or SwiGLU or GeGLU (arXiv:2002.05202). F counts this device's channels."""

    config: ModelConfig
    parallel: Parallel

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, shards = self.config, self.parallel.tensor
        x_BTD = enter_tensor(x_BTD, shards)

        def project(name):
            kernel, bias = Weights(c.d_ff // shards, INIT_STD, c.use_bias, name=name)(x_BTD.shape[-1])
            y_BTF = add_lora(c, name, x_BTD, linear(x_BTD, (kernel, None)), shards, row=False)
            return checkpoint_name(y_BTF, name), bias

        hidden_BTF = _activate(c, project)
        down = Weights(c.d_model, residual_std(c), c.use_bias, name="down")(hidden_BTF.shape[-1])
        down_BTD = linear(*free_early(hidden_BTF, down), shards)
        return add_lora(c, "down", hidden_BTF, down_BTD, shards, row=True)


def _activate(c: ModelConfig, project: Callable[[str], tuple[jax.Array, jax.Array | None]]) -> jax.Array:
    """Returns the hidden channels; `project` multiplies by the matrix `up` or `gate`, and returns its bias beside."""
    if not c.gated:
        return gelu(*project("up"))
    hidden = add_bias(*project("up"))
    return swiglu(hidden, add_bias(*project("gate"))) if c.feed_forward == "swiglu" else hidden * gelu(*project("gate"))


class RouterSums(NamedTuple):
    """Weighted sums over tokens of a router's decisions, float32; `[L, ...]` for all layers."""

    load_E: jax.Array  # choices of each expert
    probability_E: jax.Array  # probability of each expert
    square: jax.Array  # squared logarithm of the normalizer of the probabilities


class Experts(nn.Module):
    """Mixture of feed-forward blocks: the `experts_per_token` likeliest, weighted by their probabilities.

    F counts this device's channels of an expert. The router computes in float32.
    """

    config: ModelConfig
    parallel: Parallel

    @nn.compact
    def __call__(self, x_BTD: jax.Array, weight_BT: jax.Array | None) -> tuple[jax.Array, RouterSums | None]:
        """Returns the output `[B, T, D]`, and the sums if `weight_BT` is given."""
        c, shards = self.config, self.parallel.tensor
        x_ND = x_BTD.reshape(-1, c.d_model)
        router_DE, _ = Weights(c.num_experts, INIT_STD, use_bias=False, name="router")(c.d_model)
        experts = self.param("experts", lambda key: _init_experts(c, shards, key))
        if self.is_initializing():
            return x_BTD, None
        # Saved for the backward pass: computed again, a near tie could fall out differently and permute saved rows.
        logits_NE = checkpoint_name(jnp.matmul(x_ND, router_DE, preferred_element_type=jnp.float32), "router")
        probability_NE = jax.nn.softmax(logits_NE)
        share_NK, expert_NK = jax.lax.top_k(probability_NE, c.experts_per_token)
        if c.norm_router:
            share_NK /= jnp.sum(share_NK, axis=-1, keepdims=True)
        expert_S = expert_NK.reshape(-1)
        order_S = jnp.argsort(expert_S)  # stable
        row_NK = jnp.argsort(order_S).reshape(expert_NK.shape)
        sizes_E = jnp.bincount(expert_S, length=c.num_experts)
        x_SD = _spread(enter_tensor(x_ND, shards), order_S, row_NK)

        def project(name):
            return checkpoint_name(grouped_matmul(x_SD, experts[name], sizes_E), name), None

        hidden_SF = _activate(c, project)
        # Scaled before the last product, whose result then need not be saved for the gradient of the shares.
        share_S1 = enter_tensor(share_NK, shards).reshape(-1, 1)[order_S]
        hidden_SF = (hidden_SF.astype(jnp.float32) * share_S1).astype(hidden_SF.dtype)
        y_ND = _collect(grouped_matmul(hidden_SF, experts["down"], sizes_E), order_S, row_NK)
        sums = None if weight_BT is None else _sum_decisions(logits_NE, probability_NE, expert_NK, weight_BT)
        return leave_tensor(y_ND, shards).reshape(x_BTD.shape), sums


def _init_experts(c: ModelConfig, shards: int, key: jax.Array) -> dict[str, jax.Array]:
    stds = {"up": INIT_STD, "down": residual_std(c)} | ({"gate": INIT_STD} if c.gated else {})
    shape = (c.num_experts, c.d_model, c.d_ff // shards)
    return {
        name: nn.initializers.normal(std)(key, shape[:1] + shape[:0:-1] if name == "down" else shape)
        for (name, std), key in zip(stds.items(), jax.random.split(key, len(stds)), strict=True)
    }


@jax.custom_vjp
def _spread(x_ND: jax.Array, order_S: jax.Array, row_NK: jax.Array) -> jax.Array:
    """Copies each token once per choice, sorted by expert: `[S, D]`.

    Args:
      order_S: the choice, token * K + k, of each row.
      row_NK: the row of each choice, the inverse of `order_S`.
    """
    return x_ND[order_S // row_NK.shape[1]]


@jax.custom_vjp
def _collect(y_SD: jax.Array, order_S: jax.Array, row_NK: jax.Array) -> jax.Array:
    """Adds the rows of each token, in float32; the transpose of `_spread`. Gathers only: a scatter is slow."""
    return jnp.sum(y_SD[row_NK], axis=1, dtype=jnp.float32).astype(y_SD.dtype)


for _function, _transpose in ((_spread, _collect), (_collect, _spread)):
    _function.defvjp(
        lambda x, *places, function=_function: (function(x, *places), places),
        lambda places, gradient, transpose=_transpose: (transpose(gradient, *places), None, None),
    )


def _sum_decisions(
    logits_NE: jax.Array, probability_NE: jax.Array, expert_NK: jax.Array, weight_BT: jax.Array
) -> RouterSums:
    weight_N = weight_BT.reshape(-1).astype(jnp.float32)
    chosen_NE = jnp.sum(jax.nn.one_hot(expert_NK, logits_NE.shape[-1]), axis=1)
    square_N = jnp.square(jax.nn.logsumexp(logits_NE, axis=-1))
    return RouterSums(weight_N @ chosen_NE, weight_N @ probability_NE, weight_N @ square_N)


def router_losses(sums: RouterSums, parallel: Parallel) -> dict[str, jax.Array]:
    """Returns the auxiliary losses of the routers, means over layers, summed over this device's tokens.

    `balance_loss` is E * sum of (share of choices * mean probability) over experts (arXiv:2101.03961): 1 per token if
    the load is balanced, E / K if all tokens choose the same experts. The shares are those of the whole (micro-)batch,
    on all devices. `router_z_loss` is the square of the logarithm of the router's normalizer (arXiv:2202.08906).
    """
    load_LE = sum_rows(sums.load_E, parallel)
    share_LE = load_LE / jnp.maximum(jnp.sum(load_LE, axis=-1, keepdims=True), 1.0)
    num_layers, num_experts = load_LE.shape
    balance = num_experts / num_layers * jnp.sum(share_LE * sums.probability_E)
    return {"balance_loss": balance, "router_z_loss": jnp.mean(sums.square)}
