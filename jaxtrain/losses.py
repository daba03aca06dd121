"""Cross-entropy over a vocabulary: exact, stable, and without ever holding all the logits.

Both functions return sums (`LossSums`), to be divided once by the global weight. Everything is float32 inside, whatever
comes in. Shape suffixes: N tokens, C tokens of a chunk, D hidden channels, V vocabulary.

Per token with logits x, label y and weight w:

  lse       = max(x) + log sum exp(x - max(x))
  nll       = lse - x[y]                               gradient softmax(x) - onehot(y)
  z_loss    = coefficient * lse^2                      gradient 2 * coefficient * lse * softmax(x)
  smoothing = smoothing * ((lse - mean(x)) - nll)      gradient smoothing * (onehot(y) - 1 / V)
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain import trees

# The head's gradient [D, V] is read and written once a chunk, 8 bytes for 6 * C flops: long chunks hide that behind the
# matrix products, short ones keep the logits of a chunk small. scripts/bench_loss.py prints what a length costs.
DEFAULT_CHUNK = 1024

# A head whose float32 gradient has more bytes than this forms it a block of the vocabulary at a time, for all tokens at
# once: nothing is carried from chunk to chunk, for one more product with the vocabulary.
CARRY_LIMIT = 2**30
_DEFAULT_BLOCK = 8192


@trees.dataclass
class LossSums:
    """Sums over tokens, float32 scalars: a pytree that adds, so that micro-batches and devices can be summed exactly.

    Attributes:
      nll: negative log-likelihood of the labels, nats; pure, whatever else is in the loss.
      z_loss: z-loss, nats.
      smoothing: what label smoothing adds, nats.
      weight: sum of the weights: the number of tokens, if `where` is a mask.
    """

    nll: jax.Array
    z_loss: jax.Array
    smoothing: jax.Array
    weight: jax.Array

    def __add__(self, other: "LossSums") -> "LossSums":
        return jax.tree.map(jnp.add, self, other)

    def total(self) -> jax.Array:
        """What training minimises, summed: nll + z_loss + smoothing."""
        return self.nll + self.z_loss + self.smoothing

    def mean(self) -> jax.Array:
        """What training minimises, nats a token; 0 where every token is masked."""
        return self.total() / jnp.maximum(self.weight, 1.0)

    def mean_nll(self) -> jax.Array:
        """Negative log-likelihood, nats a token."""
        return self.nll / jnp.maximum(self.weight, 1.0)

    def perplexity(self) -> jax.Array:
        """exp of the mean nll; z-loss and smoothing are no part of it."""
        return jnp.exp(self.mean_nll())

    def bits_per_token(self) -> jax.Array:
        """Mean nll in bits."""
        return self.mean_nll() / math.log(2)

    def bits_per_byte(self, num_bytes: float | jax.Array) -> jax.Array:
        """Bits that the labels cost, per byte of the text they encode (comparable across tokenizers)."""
        return self.nll / math.log(2) / num_bytes


class _Terms(NamedTuple):
    """What shapes the loss; hashable, so that it can be a static argument."""

    z_loss: float
    label_smoothing: float
    logit_softcap: float | None
    num_classes: int
    vocab_axis: str | None = None
    vocab_block: int = 0


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

    Plain differentiable code, so it also serves forward mode and second derivatives; `linear_cross_entropy` gives the
    same numbers in a fraction of the memory.

    Args:
      logits: `[..., V]`, any float dtype; a class at -inf has probability and gradient 0.
      labels: `[...]`, integers in `[0, V)` wherever `where` is not 0; anything elsewhere.
      where: `[...]` bool or float weights, constants to the gradient. A place of weight 0 adds exactly 0 to the loss
        and the gradient, even if its logits are NaN.
      z_loss: coefficient of log^2 Z, the z-loss of PaLM (arXiv:2204.02311); 1e-4 there.
      label_smoothing: share of the target spread evenly over the vocabulary (arXiv:1512.00567).
      logit_softcap: logits become cap * tanh(logits / cap) (arXiv:2408.00118); None or 0: off.

    Returns:
      LossSums in nats. A label outside `[0, V)` at a place that counts makes loss and gradient NaN rather than reading
      another class; under `checkify.checkify` it is an error that names the label.

    Raises:
      ValueError: shapes or dtypes that do not fit, a coefficient out of range.
    """
    if logits.ndim < 1 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floats [..., V], got {logits.dtype} {logits.shape}")
    terms = _check_terms(z_loss, label_smoothing, logit_softcap, logits.shape[-1])
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {logits.shape} must be [..., V] for labels [...] {labels.shape}")

    def sums_over(logits, labels, where):
        labels, weights, weight = _check_labels(labels, where, terms.num_classes)
        logits = jnp.where((weights != 0)[..., None], logits.astype(jnp.float32), 0.0)
        sums, _ = _sum_terms(_softcap(logits, terms.logit_softcap), labels, weights, terms)
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
    vocab_block: int | None = None,
    check_labels: bool = True,
) -> LossSums:
    """Sums the cross-entropy of `hidden @ kernel` without holding more than one chunk of the logits.

    Scans over chunks of tokens, each with the whole vocabulary. Under differentiation the gradients are formed in the
    same pass from the same float32 logits and stored summed, so there is no second product with the vocabulary and no
    `[tokens, V]` array (the scheme of Liger Kernel, arXiv:2410.10989). A kernel of more than 2^28 elements gets its
    gradient in a second pass, over blocks of the vocabulary, which never holds it in float32. Without differentiation
    nothing but the sums is computed. Reverse mode only, once.

    Args:
      hidden: `[..., D]`, float32, bfloat16 or float16.
      kernel: `[D, V]`, same dtype; products accumulate in float32.
      labels, where, z_loss, label_smoothing, logit_softcap: as for `cross_entropy`. A place of weight 0 adds exactly 0
        even if its hidden state is NaN.
      chunk_size: tokens a chunk, at most; need not divide their number. None: 1024. Of tokens that are sharded under
        `jit` each device works on its share of every chunk: 1024 times the devices gives each as much as one has.
      num_classes: classes, if the last columns of the kernel are padding: they take no part in the loss, and their
        gradient is 0. None: V, times the devices along `vocab_axis`.
      vocab_axis: name of the mapped axis (of `jax.shard_map`, with `check_vma=False`) over which the kernel's columns
        are in equal parts, in order. Hidden states and labels are then the same along it, and so are the sums and the
        gradient of the hidden states.
      vocab_block: columns a block of the second pass; 0: no second pass. None: by the size of the kernel and its dtype.
      check_labels: hold what `checkify` needs to name a wrong label, which is NaN either way. It is an effect, and JAX
        has no fast dispatch for programs with effects: a call costs the host about a millisecond more.

    Returns:
      LossSums in nats, equal to `cross_entropy(hidden @ kernel, ...)`.

    Raises:
      ValueError: shapes or dtypes that do not fit, a coefficient out of range, a chunk size below 1.
    """
    if vocab_block is None:
        # The second pass leaves sums over all tokens in the kernel's dtype, before loss scaling: float16 overflows.
        fits = 4 * kernel.size <= CARRY_LIMIT or kernel.dtype == jnp.float16
        vocab_block = 0 if fits else _DEFAULT_BLOCK
    columns = kernel.shape[-1] * (jax.lax.axis_size(vocab_axis) if vocab_axis else 1)
    if num_classes is not None and not 0 < num_classes <= columns:
        raise ValueError(f"num_classes {num_classes} must be above 0 and at most the {columns} columns of the kernel")
    terms = _check_terms(z_loss, label_smoothing, logit_softcap, num_classes or columns, vocab_axis, vocab_block)
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != kernel.shape[0] or kernel.ndim != 2:
        raise ValueError(
            f"hidden {hidden.shape}, kernel {kernel.shape} and labels {labels.shape} must be [..., D], [D, V] and [...]"
        )
    if hidden.dtype != kernel.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and kernel is {kernel.dtype}: cast one of them")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")

    def sums_over(hidden, kernel, labels, where):
        labels, weights, weight = _check_labels(labels, where, terms.num_classes, check_labels)
        hidden, kernel, labels, weights = _vary_alike(hidden, kernel, labels, weights)
        chunks = _cut(hidden, labels, weights, chunk_size or DEFAULT_CHUNK)
        return LossSums(*_linear_sums(chunks, kernel, terms), weight=weight)

    return _on_auto_axes(sums_over, hidden, kernel, labels, where)


def _on_auto_axes(function: Callable[..., LossSums], *arrays: jax.Array | None) -> LossSums:
    """Calls a function that leaves it to the compiler how its intermediate results are sharded; its own are everywhere.

    On axes of type Explicit, which `jax.make_mesh` gives by default, JAX would ask for the sharding of each.
    """
    meshes = [jax.typeof(array).sharding.mesh for array in arrays if array is not None]
    explicit = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if explicit is None:
        return function(*arrays)
    everywhere = NamedSharding(explicit, PartitionSpec())
    return jax.sharding.auto_axes(function, axes=explicit.explicit_axes, out_sharding=everywhere)(*arrays)


def _vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Inside `jax.shard_map`, marks all arrays as varying over the mesh axes that any of them varies over.

    A scan wants the same marks on what goes round it as on what comes in; elsewhere there are no marks.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(array, tuple(axes - has), to="varying") if axes - has else array
        for array, has in zip(arrays, varying, strict=True)
    )


def _check_terms(z_loss: float, label_smoothing: float, logit_softcap: float | None, *rest) -> _Terms:
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be 0 or more, got {z_loss}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if logit_softcap is not None and not 0 <= logit_softcap < math.inf:
        raise ValueError(f"logit_softcap must be above 0, or None or 0 for none; got {logit_softcap}")
    return _Terms(float(z_loss), float(label_smoothing), float(logit_softcap) if logit_softcap else None, *rest)


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
        # Not on top: it is most of what importing the core takes beyond JAX and optax.
        from jax.experimental import checkify

        checkify.debug_check(
            ~jnp.any(wrong),
            "label {label} at a place that counts is outside [0, {num_classes})",
            label=labels.reshape(-1)[jnp.argmax(wrong)] if labels.size else jnp.int32(0),
            num_classes=jnp.int32(num_classes),
        )
    safe = jnp.where(wrong | (weights == 0), 0, labels).astype(jnp.int32)
    return safe, jnp.where(wrong, jnp.nan, weights), jnp.sum(weights)


def _softcap(logits: jax.Array, cap: float | None) -> jax.Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _sum_terms(logits: jax.Array, labels: jax.Array, weights: jax.Array, terms: _Terms):
    """Sums nll, z-loss and smoothing of float32 logits `[..., V]`; also returns lse `[...]`."""
    classes, is_class = _classes(logits, terms)
    if is_class is not None:
        logits = jnp.where(is_class, logits, -jnp.inf)
    shift = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    if terms.vocab_axis:
        shift = jax.lax.pmax(shift, terms.vocab_axis)
    shifted = logits - shift[..., None]

    def over_classes(x):
        total = jnp.sum(x, axis=-1)
        return jax.lax.psum(total, terms.vocab_axis) if terms.vocab_axis else total

    log_sum = jnp.log(over_classes(jnp.exp(shifted)))
    # Compare and sum: it fuses into the pass over the logits, and its gradient is no scatter.
    nll = log_sum - over_classes(jnp.where(classes == labels[..., None], shifted, 0.0))
    lse = shift + log_sum

    def weighted_sum(x):
        return jnp.sum(jnp.where(weights == 0, 0.0, weights * x))

    zero = jnp.zeros((), jnp.float32)
    z_loss = weighted_sum(terms.z_loss * jnp.square(lse)) if terms.z_loss else zero
    smoothing = zero
    if terms.label_smoothing:
        counted = shifted if is_class is None else jnp.where(is_class, shifted, 0.0)
        cross = log_sum - over_classes(counted) / terms.num_classes
        smoothing = weighted_sum(terms.label_smoothing * (cross - nll))
    return (weighted_sum(nll), z_loss, smoothing), lse


def _classes(logits: jax.Array, terms: _Terms, width: int = 0, start: Any = 0) -> tuple[jax.Array, jax.Array | None]:
    """The class of each column, and whether it is one; None: all are, none is padding.

    `width`: columns of the kernel, if the logits are those from column `start` only.
    """
    width, parts = width or logits.shape[-1], 1
    if terms.vocab_axis:
        start += jax.lax.axis_index(terms.vocab_axis) * width
        parts = jax.lax.axis_size(terms.vocab_axis)
    classes = start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return classes, classes < terms.num_classes if width * parts > terms.num_classes else None


class _Chunks(NamedTuple):
    """Tokens cut into K chunks: hidden `[K, C, D]`, labels `[K, C]`, weights `[K, C]`."""

    hidden: jax.Array
    labels: jax.Array
    weights: jax.Array


def _cut(hidden: jax.Array, labels: jax.Array, weights: jax.Array, longest: int) -> _Chunks:
    """Cuts tokens into as few chunks of at most `longest` as hold them, padded with tokens of weight 0.

    Chunk i takes tokens i, i + K, ...: of tokens that are sharded over devices each has its share of every chunk. All
    chunks are about equally long, or one token too many for a chunk would nearly double the work. Lengths are multiples
    of 128, which suits all hardware, where that adds little, and otherwise of 8.
    """
    num_tokens = math.prod(labels.shape)
    num_chunks = max(-(-num_tokens // longest), 1)
    length = max(-(-num_tokens // num_chunks), 1)
    if num_chunks > 1:
        multiple = 128 if length >= 512 else 8
        length = min(-(-length // multiple) * multiple, longest)

    def split(array: jax.Array, width: tuple[int, ...]) -> jax.Array:
        flat = array.reshape((num_tokens, *width))
        padding = [(0, num_chunks * length - num_tokens)] + [(0, 0)] * len(width)
        return jnp.swapaxes(jnp.pad(flat, padding).reshape((length, num_chunks, *width)), 0, 1)

    return _Chunks(split(hidden, hidden.shape[-1:]), split(labels, ()), split(weights, ()))


def _join(array: jax.Array) -> jax.Array:
    """`[K, C, ...]` to `[N, ...]`, the tokens in the order in which they came: each stays on its device."""
    return jnp.swapaxes(array, 0, 1).reshape(-1, *array.shape[2:])


def _chunk_logits(chunk: _Chunks, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the chunk's hidden states with masked rows zeroed, and their float32 logits `[C, V]`."""
    hidden_CD = jnp.where((chunk.weights != 0)[:, None], chunk.hidden, 0)
    return hidden_CD, jnp.matmul(hidden_CD, kernel, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear_sums(chunks: _Chunks, kernel: jax.Array, terms: _Terms):
    """Returns the sums of nll, z-loss and smoothing over all chunks."""

    def body(sums, chunk):
        _, logits_CV = _chunk_logits(chunk, kernel)
        more, _ = _sum_terms(_softcap(logits_CV, terms.logit_softcap), chunk.labels, chunk.weights, terms)
        return jax.tree.map(jnp.add, sums, more), None

    start, _ = _vary_alike(jnp.zeros(3, jnp.float32), kernel)
    return jax.lax.scan(body, tuple(start), chunks)[0]


def _logit_gradient(
    raw: jax.Array, lse: jax.Array, chunk: _Chunks, scales, terms: _Terms, width: int = 0, start: Any = 0
) -> jax.Array:
    """Gradient of `scales . (nll, z_loss, smoothing)` with respect to the logits before the soft-cap, `[C, V]`."""
    nll, z_loss, smoothing = scales
    capped = _softcap(raw, terms.logit_softcap)
    classes, is_class = _classes(raw, terms, width, start)
    softmax = jnp.exp(capped - lse[:, None])
    # With e = label_smoothing the sum is nll * (p - onehot) + smoothing * e * (onehot - 1 / V) + z_loss * 2 c lse * p.
    at_label = -nll + smoothing * terms.label_smoothing
    elsewhere = -smoothing * terms.label_smoothing / terms.num_classes
    on_softmax = nll + z_loss * 2 * terms.z_loss * lse
    is_label = classes == chunk.labels[:, None]
    gradient = on_softmax[:, None] * softmax + jnp.where(is_label, at_label + elsewhere, elsewhere)
    if is_class is not None:
        gradient = jnp.where(is_class, gradient, 0.0)
    if terms.logit_softcap is not None:
        gradient *= 1 - jnp.square(capped / terms.logit_softcap)
    return gradient * chunk.weights[:, None]


def _sums_and_gradients(chunks: _Chunks, kernel: jax.Array, terms: _Terms, scales):
    """Returns the sums and the gradients of `scales . sums`: hidden `[K, C, D]`, and kernel `[D, V]`.

    The kernel's is in float32; if it is formed in blocks, in the kernel's dtype.
    """
    in_blocks = bool(terms.vocab_block)

    def body(carry, chunk):
        sums, kernel_gradient_DV = carry
        hidden_CD, logits_CV = _chunk_logits(chunk, kernel)
        capped_CV = _softcap(logits_CV, terms.logit_softcap)
        more, lse_C = _sum_terms(capped_CV, chunk.labels, chunk.weights, terms)
        gradient_CV = _logit_gradient(logits_CV, lse_C, chunk, scales, terms).astype(kernel.dtype)
        hidden_gradient_CD = jnp.matmul(gradient_CV, kernel.T, preferred_element_type=jnp.float32)
        if not in_blocks:
            kernel_gradient_DV += jnp.matmul(hidden_CD.T, gradient_CV, preferred_element_type=jnp.float32)
        sums = jax.tree.map(jnp.add, sums, more)
        return (sums, kernel_gradient_DV), (hidden_gradient_CD.astype(chunk.hidden.dtype), lse_C if in_blocks else None)

    carry = jnp.zeros((0,) if in_blocks else kernel.shape, jnp.float32)
    zeros, carry, _ = _vary_alike(jnp.zeros(3, jnp.float32), carry, kernel)
    (sums, kernel_gradient_DV), (hidden_gradient_KCD, lse_KC) = jax.lax.scan(body, (tuple(zeros), carry), chunks)
    if in_blocks:
        kernel_gradient_DV = _kernel_gradient(chunks, kernel, lse_KC, terms, scales)
    return sums, (hidden_gradient_KCD, kernel_gradient_DV)


def _kernel_gradient(chunks: _Chunks, kernel: jax.Array, lse_KC: jax.Array, terms: _Terms, scales) -> jax.Array:
    """The kernel's gradient `[D, V]` in its dtype, a block of columns at a time: whole sums over tokens, in float32."""
    tokens = _Chunks(*map(_join, chunks))
    hidden_ND = jnp.where((tokens.weights != 0)[:, None], tokens.hidden, 0)
    num_columns = kernel.shape[1]
    block = min(terms.vocab_block, num_columns)

    def body(i, gradient_DV):
        # The last block overlaps the one before: the same columns twice, with the same result.
        start = jnp.minimum(i * block, num_columns - block)
        columns_DW = jax.lax.dynamic_slice_in_dim(kernel, start, block, axis=1)
        logits_NW = jnp.matmul(hidden_ND, columns_DW, preferred_element_type=jnp.float32)
        gradient_NW = _logit_gradient(logits_NW, _join(lse_KC), tokens, scales, terms, num_columns, start)
        block_DW = jnp.matmul(hidden_ND.T, gradient_NW.astype(kernel.dtype), preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(gradient_DV, block_DW.astype(kernel.dtype), start, axis=1)

    return jax.lax.fori_loop(0, -(-num_columns // block), body, jnp.zeros_like(kernel))


def _linear_sums_forward(chunks: _Chunks, kernel: jax.Array, terms: _Terms):
    # The gradients are those of the plain total. A caller who weighs nll, z-loss and smoothing differently (the
    # cotangents tell, in the backward pass) gets a second pass; without z-loss and smoothing there is nothing to weigh.
    sums, gradients = _sums_and_gradients(chunks, kernel, terms, scales=(jnp.float32(1),) * 3)
    again = (chunks, kernel) if terms.z_loss or terms.label_smoothing else None
    return sums, (gradients, again, jnp.zeros((), kernel.dtype))


def _linear_sums_backward(terms: _Terms, residuals, cotangents):
    (hidden_gradient, kernel_gradient), again, like_kernel = residuals

    def scaled():
        nll = cotangents[0]
        hidden = (nll * hidden_gradient.astype(jnp.float32)).astype(hidden_gradient.dtype)
        return hidden, (nll * kernel_gradient.astype(jnp.float32)).astype(kernel_gradient.dtype)

    if again is None:
        hidden_gradient, kernel_gradient = scaled()
    else:
        same = (cotangents[0] == cotangents[1]) & (cotangents[0] == cotangents[2])
        hidden_gradient, kernel_gradient = jax.lax.cond(
            same, scaled, lambda: _sums_and_gradients(*again, terms, scales=cotangents)[1]
        )
    if terms.vocab_axis:
        hidden_gradient = jax.lax.psum(hidden_gradient, terms.vocab_axis)
    return _Chunks(hidden_gradient, None, None), kernel_gradient.astype(like_kernel.dtype)


_linear_sums.defvjp(_linear_sums_forward, _linear_sums_backward)
