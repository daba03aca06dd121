"""Cross-entropy over a vocabulary: exact, stable, and without holding all logits at once.

Both functions return sums (`LossSums`), to be divided once by the global weight. The arithmetic is float32 for any
input dtype.

Per token with logits x, label y and weight w:

  lse       = max(x) + log sum exp(x - max(x))
  nll       = lse - x[y]                               gradient softmax(x) - onehot(y)
  z_loss    = coefficient * lse^2                      gradient 2 * coefficient * lse * softmax(x)
  smoothing = smoothing * ((lse - mean(x)) - nll)      gradient smoothing * (onehot(y) - 1 / V)
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain import trees
from jaxtrain.checks import check_count, check_number, python_number
from jaxtrain.loss_head import Terms, cut, linear_sums, softcap, sum_terms, vary_alike

# Tokens of a chunk, by platform. The head's gradient [D, V] is read and written once per chunk, 8 bytes for 6 * C
# flops: long chunks hide that behind the matrix products, short ones hold few logits. scripts/bench_loss.py measures
# the lengths: on a CPU, with V 50,304, chunks of 2,048 take the time of dense logits, and a sixth of their memory. On
# a GPU, with 4,096, the head of GPT-2 moves 35.9 instead of 46.9 GB per 32,768 tokens (`jaxtrain plan
# configs/gpt2_124m.py --topology h100:1 --train.batch-size 32 --train.accumulate 1`).
_CHUNKS = {"cpu": 2048, "gpu": 4096}
_DEFAULT_CHUNK = 1024

# Bytes of a head's float32 gradient above which it is formed a block of the vocabulary at a time, for all tokens at
# once: nothing is carried from chunk to chunk, at the cost of one more product with the vocabulary.
CARRY_LIMIT = 2**30
_DEFAULT_BLOCK = 8192


@trees.dataclass
class LossSums:
    """Sums over tokens, float32 scalars: a pytree that adds, so that micro-batches and devices can be summed exactly.

    Attributes:
      nll: negative log-likelihood of the labels in nats, without z-loss and smoothing.
      z_loss: z-loss in nats.
      smoothing: contribution of label smoothing in nats, and of the losses of the routers of experts.
      weight: sum of the weights; the number of tokens if `where` is a mask.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtrain.losses import LossSums
      >>> zero = jnp.float32(0)
      >>> sums = LossSums(nll=jnp.float32(6), z_loss=zero, smoothing=zero, weight=jnp.float32(2))
      >>> print((sums + sums).mean())
      3.0
    """

    nll: jax.Array
    z_loss: jax.Array
    smoothing: jax.Array
    weight: jax.Array

    def __add__(self, other: "LossSums") -> "LossSums":
        return jax.tree.map(jnp.add, self, other)

    def total(self) -> jax.Array:
        """Returns the summed training loss: nll + z_loss + smoothing."""
        return self.nll + self.z_loss + self.smoothing

    def divisor(self) -> jax.Array:
        """Returns the weight, or 1 where it is not above 0."""
        return jnp.where(self.weight > 0, self.weight, jnp.ones_like(self.weight))

    def mean(self) -> jax.Array:
        """Returns the training loss in nats per token; 0 if every token is masked."""
        return self.total() / self.divisor()

    def mean_nll(self) -> jax.Array:
        """Returns the negative log-likelihood in nats per token."""
        return self.nll / self.divisor()

    def perplexity(self) -> jax.Array:
        """Returns exp of the mean nll, without z-loss and smoothing."""
        return jnp.exp(self.mean_nll())

    def bits_per_token(self) -> jax.Array:
        """Returns the mean nll in bits."""
        return self.mean_nll() / math.log(2)

    def bits_per_byte(self, num_bytes: float | jax.Array) -> jax.Array:
        """Returns the bits of the labels per byte of the encoded text, which is comparable across tokenizers."""
        return self.nll / math.log(2) / num_bytes


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    where: jax.Array | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    logit_softcap: float | None = None,
) -> LossSums:
    """Sums the cross-entropy of dense logits.

    The code is plainly differentiable, also in forward mode and twice. `linear_cross_entropy` returns the same numbers
    in a fraction of the memory.

    Args:
      logits: `[..., V]`, any float dtype; a class at -inf has probability and gradient 0.
      labels: `[...]`, integers in `[0, V)` where `where` is not 0, any integer elsewhere. For labels with an ignore
        index such as -100, give `where=labels != -100`.
      where: `[...]` bool or float weights, constants to the gradient. A position of weight 0 adds exactly 0 to the loss
        and the gradient, even if its logits are NaN.
      z_loss: coefficient of log^2 Z, the z-loss of PaLM (arXiv:2204.02311); 1e-4 there.
      label_smoothing: share of the target spread evenly over the vocabulary (arXiv:1512.00567).
      logit_softcap: logits become cap * tanh(logits / cap) (arXiv:2408.00118); None or 0 disables it.

    Returns:
      LossSums in nats. A label outside `[0, V)` at a position of weight above 0 makes loss and gradient NaN; under
      `checkify.checkify` it is an error that names the label.

    Raises:
      ValueError: shapes or dtypes that do not fit, a coefficient out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtrain.losses import cross_entropy
      >>> labels = jnp.array([1, 0, -100])
      >>> sums = cross_entropy(jnp.zeros((3, 4)), labels, where=labels != -100)
      >>> print(f"{sums.mean():.4f} nats, {sums.weight:.0f} tokens, perplexity {sums.perplexity():.1f}")
      1.3863 nats, 2 tokens, perplexity 4.0
    """
    logits, labels, where = _as_arrays(logits, labels, where)
    if not (logits.ndim and logits.shape[-1]) or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floats [..., V], V above 0, got {logits.dtype} {logits.shape}")
    terms = _make_terms(z_loss, label_smoothing, logit_softcap, logits.shape[-1])
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {logits.shape} must be [..., V] for labels [...] {labels.shape}")

    def sums_over(logits, labels, where):
        labels, weights, weight = _check_labels(labels, where, terms.num_classes)
        logits = jnp.where((weights != 0)[..., None], logits.astype(jnp.float32), 0.0)
        sums, _ = sum_terms(softcap(logits, terms.logit_softcap), labels, weights, terms)
        return LossSums(*sums, weight=weight)

    return _on_auto_axes(sums_over, logits, labels, where)


def linear_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    *,
    where: jax.Array | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
    num_classes: int | None = None,
    vocab_axis: str | None = None,
    gather_axis: str | None = None,
    vocab_block: int | None = None,
    check_labels: bool = True,
) -> LossSums:
    """Sums the cross-entropy of `hidden @ kernel` without holding more than one chunk of the logits.

    Scans over chunks of tokens, each with the whole vocabulary. Under differentiation, in reverse mode, the same pass
    forms the gradients from the same float32 logits and stores them summed (as Liger Kernel, arXiv:2410.10989). The
    gradient of a kernel above 2^28 elements comes from a second pass over blocks of columns: never whole in float32.

    Args:
      hidden: `[..., D]`, float32, bfloat16 or float16.
      kernel: `[D, V]`, same dtype; products accumulate in float32.
      labels, where, z_loss, label_smoothing, logit_softcap: as for `cross_entropy`. NaN with weight 0 adds 0.
      chunk_size: largest number of tokens of a chunk, over all devices; None: `default_chunk`.
      num_classes: number of classes; columns after them are padding, without loss and gradient. None: all columns.
      vocab_axis: name of the mapped axis (of `jax.shard_map`, with `check_vma=False`) that shards the kernel's columns
        equally and in order. Hidden states, labels, sums and the gradient of the hidden states are replicated over it.
      gather_axis: name of the mapped axis that shards the kernel's rows equally and in order, like `vocab_axis` for its
        columns. The kernel is gathered here, and its gradient reduce-scattered: in the second pass block by block.
      vocab_block: columns of a block of the second pass; 0 disables it. None: by the kernel's size and dtype.
      check_labels: emits the check by which `checkify` names a wrong label. A call then takes a millisecond more.

    Returns:
      LossSums in nats, equal to `cross_entropy(hidden @ kernel, ...)`.

    Raises:
      ValueError: shapes or dtypes that do not fit, a coefficient out of range, a chunk size below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxtrain.losses import linear_cross_entropy
      >>> hidden, labels = jnp.ones((6, 2)), jnp.array([0, 1, 2, 0, 1, 2])
      >>> loss = lambda kernel: linear_cross_entropy(hidden, kernel, labels, chunk_size=4).mean()
      >>> value, gradient = jax.value_and_grad(loss)(jnp.zeros((2, 3)))
      >>> print(f"{value:.4f}", gradient.shape)
      1.0986 (2, 3)
    """
    hidden, kernel, labels, where = _head_arrays(hidden, kernel, labels, where)
    columns = kernel.shape[-1] * (jax.lax.axis_size(vocab_axis) if vocab_axis else 1)
    rows = kernel.shape[0] * (jax.lax.axis_size(gather_axis) if gather_axis else 1)
    vocab_block = _default_block(rows * kernel.shape[-1], kernel.dtype) if vocab_block is None else vocab_block
    _check_sizes(chunk_size, num_classes, vocab_block, columns)
    _check_head(hidden, kernel, labels, rows)
    more = num_classes or columns, vocab_axis, gather_axis, vocab_block
    terms = _make_terms(z_loss, label_smoothing, logit_softcap, *more)
    sums_over = functools.partial(_chunked_sums, terms, chunk_size or default_chunk(), check_labels)
    return _on_auto_axes(sums_over, hidden, kernel, labels, where)


def default_chunk(platform: str | None = None) -> int:
    """Returns the number of tokens of a chunk on "cpu", "gpu" or "tpu"; None takes JAX's default backend."""
    return _CHUNKS.get(platform or jax.default_backend(), _DEFAULT_CHUNK)


def _chunked_sums(terms: Terms, chunk_size: int, check_labels: bool, hidden, kernel, labels, where) -> LossSums:
    labels, weights, weight = _check_labels(labels, where, terms.num_classes, check_labels)
    hidden, kernel, labels, weights = vary_alike(hidden, kernel, labels, weights)
    nll, z_loss, smoothing = linear_sums(cut(hidden, labels, weights, chunk_size), kernel, terms)
    return LossSums(nll, z_loss, smoothing, weight)


def _default_block(size: int, dtype: jax.typing.DTypeLike) -> int:
    # The second pass leaves sums over all tokens in the kernel's dtype, before loss scaling: float16 overflows.
    fits = 4 * size <= CARRY_LIMIT or dtype == jnp.float16
    return 0 if fits else _DEFAULT_BLOCK


def _as_arrays(*values: Any) -> Any:
    """Converts lists and the arrays of other libraries; None stays."""
    return (None if value is None else jnp.asarray(value) for value in values)


def _head_arrays(*values: Any) -> Any:
    """Returns hidden states, kernel, labels and weights as arrays; raises unless the first two are floats."""
    hidden, kernel, *_ = arrays = tuple(_as_arrays(*values))
    floats = all(jnp.issubdtype(array.dtype, jnp.floating) for array in (hidden, kernel))
    if not floats or hidden.ndim < 1 or kernel.ndim != 2 or not kernel.size:
        raise ValueError(
            f"hidden must be floats [..., D] and kernel [D, V], got {hidden.dtype} {hidden.shape} and "
            f"{kernel.dtype} {kernel.shape}"
        )
    return arrays


def _check_head(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, rows: int) -> None:
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != rows:
        raise ValueError(
            f"hidden {hidden.shape}, kernel {kernel.shape} and labels {labels.shape} must be [..., D], [D, V] and [...]"
        )
    if hidden.dtype != kernel.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and kernel is {kernel.dtype}: cast one of them")


def _on_auto_axes(function: Callable[..., LossSums], *arrays: jax.Array | None) -> LossSums:
    """Runs `function` with explicit mesh axes switched to automatic, so that XLA shards the intermediates.

    The result is replicated. On explicit axes, the default of `jax.make_mesh`, JAX would ask for every sharding.
    """
    meshes = [jax.typeof(array).sharding.mesh for array in arrays if array is not None]
    explicit = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if explicit is None:
        return function(*arrays)
    replicated = NamedSharding(explicit, PartitionSpec())
    return jax.sharding.auto_axes(function, axes=explicit.explicit_axes, out_sharding=replicated)(*arrays)


def _check_sizes(chunk_size: int | None, num_classes: int | None, vocab_block: int, columns: int) -> None:
    if chunk_size is not None:
        check_count("chunk_size", chunk_size, 1)
    check_count("vocab_block", vocab_block)
    if num_classes is not None:
        check_count("num_classes", num_classes, 1)
        if num_classes > columns:
            raise ValueError(f"num_classes {num_classes} must be at most the {columns} columns of the kernel")


def _make_terms(z_loss: float, label_smoothing: float, logit_softcap: float | None, *sizes: Any) -> Terms:
    z_loss, label_smoothing = python_number("z_loss", z_loss), python_number("label_smoothing", label_smoothing)
    check_number("z_loss", z_loss, "[0, inf)")
    check_number("label_smoothing", label_smoothing, "[0, 1)")
    if logit_softcap is not None:
        logit_softcap = python_number("logit_softcap", logit_softcap)
        check_number("logit_softcap", logit_softcap, "[0, inf)", "or None for no cap")
    return Terms(float(z_loss), float(label_smoothing), float(logit_softcap) if logit_softcap else None, *sizes)


def _check_labels(
    labels: jax.Array, where: jax.Array | None, num_classes: int, check: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns labels safe to look up, float32 weights (NaN at a wrong label), and the sum of `where`."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if where is None:
        where = jnp.ones(labels.shape, jnp.float32)
    if jnp.issubdtype(where.dtype, jnp.complexfloating):
        raise ValueError(f"where must be bool or numbers, got {where.dtype}")
    if where.shape != labels.shape:
        raise ValueError(f"where {where.shape} must have the shape of labels {labels.shape}")
    # Narrow integers may not be able to count the classes: 65,536 does not fit in uint16.
    labels = jnp.asarray(labels, jnp.int32 if labels.dtype.itemsize < 4 else None)
    weights = jax.lax.stop_gradient(where.astype(jnp.float32))
    wrong = (weights != 0) & ((labels < 0) | (labels >= num_classes))
    if check:
        # Imported here because it would take most of the import time of the core.
        from jax.experimental import checkify

        checkify.debug_check(
            ~jnp.any(wrong),
            "label {label} at a position that counts is outside [0, {num_classes})",
            label=labels.reshape(-1)[jnp.argmax(wrong)] if labels.size else jnp.int32(0),
            num_classes=jnp.int32(num_classes),
        )
    safe = jnp.where(wrong | (weights == 0), 0, labels).astype(jnp.int32)
    return safe, jnp.where(wrong, jnp.nan, weights), jnp.sum(weights)
