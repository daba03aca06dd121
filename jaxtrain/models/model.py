"""The model protocol: the interface between a model and the training loop, and the built-in transformer.

A model of your own is any object with `init` and `loss`, as `Config.model` of your config file: see CONTRIBUTING.md.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxtrain.config import ModelConfig
from jaxtrain.losses import LossSums, linear_cross_entropy
from jaxtrain.models import size
from jaxtrain.models.block import Cache
from jaxtrain.models.feed_forward import router_losses
from jaxtrain.models.layout import logical_axes
from jaxtrain.models.masters import WithMasters
from jaxtrain.models.parallel import Parallel, barrier_gradients
from jaxtrain.models.transformer import Params, Transformer, head_kernel, logits


@runtime_checkable
class Model(Protocol):
    """Interface of a model for the training loop.

    These members are optional:

    - `axes(params)`: a tree like `params` of tuples, the logical axis of each dimension or None; see
      `runtime.mesh.LOGICAL_AXES`. Without it every parameter is replicated.
    - `flops_per_token(seq_len)`: FLOPs to train on one token. Without it no FLOP utilization is shown.
    - `vocab_size`: number of token ids. It must not be below the vocabulary size of the data.
    - `decode(params, tokens, cache, num_cached)`, with `max_seq_len`: see `TransformerModel.decode`. Without
      it the model generates no text. The cache is None, with `num_cached` 0, or as `decode` returned it; `num_cached`
      is a scalar.
    - `init_cache(params, batch_size, length)`: allocates a cache. With it, `num_cached` is None or `[B]`.
    - `logits(params, tokens)`: float32 logits `[B, T, V]`, for `jaxtrain.load`; without it `decode` gives them.
    """

    def init(self, key: jax.Array) -> Any:
        """Returns the initial parameters, a pytree of float32 arrays."""
        ...

    def loss(self, params: Any, batch: dict[str, jax.Array]) -> LossSums:
        """Returns the loss, summed over tokens.

        Args:
          params: parameters in the compute dtype (`train.precision`).
          batch: `inputs` and `labels` int32 `[B, T]`, and `where` bool `[B, T]`, False at padding. `loss` may take a
            third argument: a PRNG key, which is a function of seed, step and micro-batch. The key is None in
            evaluation, where dropout is off.

        Returns:
          Sums over the tokens, or `(sums, {"name": float32 sum over tokens})` with further metrics.
        """
        ...


@dataclass(frozen=True)
class TransformerModel:
    """Built-in decoder-only transformer.

    Attributes:
      config: sizes, with `vocab_size` and the automatic choices (`attention`, `scan_unroll`) filled in.
      parallel: shards of the parameters, for `loss` inside `jax.shard_map`, which then gets one device's shard of the
        parameters and the batch, and returns that shard's sums. The other methods work on whole arrays.
      z_loss, label_smoothing, chunk_size: see `linear_cross_entropy`.
      balance_loss, router_z_loss: coefficients of the `router_losses` of a mixture of experts. If one is not 0, `loss`
        returns `(LossSums, router losses)`, with both products in `smoothing`.
    """

    config: ModelConfig
    parallel: Parallel = field(default_factory=Parallel)
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk_size: int | None = None
    balance_loss: float = 0.0
    router_z_loss: float = 0.0

    @property
    def vocab_size(self) -> int:
        assert self.config.vocab_size is not None
        return self.config.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.config.max_seq_len

    def init(self, key: jax.Array) -> Params:
        """Returns the initial parameters, float32 and unsharded. Raises a ValueError if `vocab_size` is not set."""
        if self.config.vocab_size is None:
            raise ValueError("model.vocab_size is None: set it to the size of the tokenizer's vocabulary")
        # One token suffices for the shapes, but not for an attention kernel that works in blocks.
        unsharded = Transformer(dataclasses.replace(self.config, attention="xla"))
        return unsharded.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def loss(self, params: Params, batch: dict[str, jax.Array]) -> LossSums | tuple[LossSums, dict[str, jax.Array]]:
        """Returns the next-token loss, summed over the tokens.

        Args:
          params: parameters, or `WithMasters`.
          batch: `inputs` and `labels` int32 `[B, T]`, `where` bool `[B, T]`, and optionally `segment_ids` and
            `positions` int32 `[B, T]`; see `Transformer`.
        """
        c, p = self.config, self.parallel
        auxiliary = {"balance_loss": self.balance_loss, "router_z_loss": self.router_z_loss} if c.num_experts else {}
        params, masters = params if isinstance(params, WithMasters) else (params, None)
        variables = {"params": params} | ({"masters": {"layers": masters["layers"]}} if masters else {})
        options: dict[str, Any] = {name: batch.get(name) for name in ("segment_ids", "positions")}
        if any(auxiliary.values()):
            options["router_weight"] = batch["where"]
        (hidden_BTD, _), router = Transformer(c, p).apply(variables, batch["inputs"], **options, mutable=["router"])
        with jax.named_scope("head"):
            hidden_BTD, kernel_DV = barrier_gradients(hidden_BTD, head_kernel(params))
            sums: Any = linear_cross_entropy(
                hidden_BTD,
                kernel_DV,
                batch["labels"],
                where=batch["where"],
                z_loss=self.z_loss,
                label_smoothing=self.label_smoothing,
                logit_softcap=c.logit_softcap,
                chunk_size=self.chunk_size,
                num_classes=c.vocab_size,
                vocab_axis="tensor" if p.tensor > 1 else None,
                gather_axis="fsdp" if p.fsdp > 1 else None,
                check_labels=False,  # the loader checks them; here the check would slow down the dispatch of each step
            )
        if "router_weight" not in options:
            return sums
        losses = router_losses(router["router"]["sums"], p)
        extra = sum(factor * losses[name] for name, factor in auxiliary.items())
        return sums.replace(smoothing=sums.smoothing + extra), losses

    def axes(self, params: Params) -> Any:
        """Returns the logical axes of each parameter."""
        return logical_axes(params)

    def flops_per_token(self, seq_len: int) -> float:
        """Returns the FLOPs to train on one token; see `size.flops_per_token`."""
        return size.flops_per_token(self.config, seq_len)

    def init_cache(self, params: Params, batch_size: int, length: int) -> tuple[Cache, ...]:
        """Allocates an empty cache for `length` tokens a row, in the dtype of the parameters."""
        c, dtype = self.config, jax.tree.leaves(params)[0].dtype
        shape = (batch_size, c.kv_heads, length, c.channels_per_head)
        return tuple(Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(c.num_layers))

    def decode(
        self,
        params: Params,
        tokens_BT: jax.Array,
        cache: tuple[Cache, ...] | None,
        num_cached: jax.typing.ArrayLike | None,
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Returns the logits of the next token after each token, and the extended cache.

        Args:
          params: parameters; they compute in their own dtype.
          tokens_BT: token ids `[B, T]`, T at most `max_seq_len`.
          cache: keys and values of the tokens before these. None allocates an empty cache of `max_seq_len` tokens.
          num_cached: number of valid tokens in the cache, or `[B]` one a row; the new tokens are written after them.
            None: the cache is empty, so that the new tokens attend to each other alone.

        Returns:
          Float32 logits `[B, T, V]` and a cache of constant shapes and dtypes.
        """
        if cache is None:
            cache, num_cached = self.init_cache(params, tokens_BT.shape[0], self.max_seq_len), None
        module = Transformer(self.config)
        extended: Any
        start = None if num_cached is None else jnp.asarray(num_cached, jnp.int32)
        hidden_BTD, extended = module.apply({"params": params}, tokens_BT, cache, start)
        return logits(module, params, hidden_BTD), extended

    def logits(self, params: Params, tokens_BT: jax.Array) -> jax.Array:
        """Returns the float32 logits `[B, T, V]` of the token after each token, in the dtype of the parameters."""
        module = Transformer(self.config)
        hidden_BTD, _ = module.apply({"params": params}, tokens_BT)
        return logits(module, params, hidden_BTD)


def axes_of(model: Model, params: Any) -> Any:
    """Returns the logical axes of a model's parameters; without `model.axes`, None for each dimension.

    Raises:
      ValueError: `model.axes` returns another tree, or a tuple whose length is not the rank of the parameter.
    """
    if not hasattr(model, "axes"):
        return jax.tree.map(lambda leaf: (None,) * len(leaf.shape), params)
    name = type(model).__name__
    leaves: list[tuple[Any, Any]]
    structure: Any
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    try:
        axes = structure.flatten_up_to(model.axes(params))
    except ValueError as error:
        raise ValueError(f"{name}.axes must return a tree like the parameters: {error}") from None
    for (path, leaf), entry in zip(leaves, axes, strict=True):
        if not isinstance(entry, tuple) or len(entry) != len(leaf.shape):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name}.axes gives {entry!r} for {where} {leaf.shape}: give a tuple with one entry, the name of a "
                "logical axis or None, for each dimension"
            )
    return jax.tree.unflatten(structure, axes)
