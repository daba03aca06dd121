"""Arithmetic of the loss head: sums over dense logits, and over chunks of tokens with a hand-written gradient.

Shape suffixes: K chunks, C tokens of a chunk, N tokens, D hidden channels, V vocabulary, W columns of a block.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Terms(NamedTuple):
    """Static settings of the loss; hashable.

    Attributes:
      z_loss, label_smoothing, logit_softcap, num_classes, vocab_axis, gather_axis, vocab_block: as for
        `losses.linear_cross_entropy`, with defaults filled in; vocab_block 0 disables the second pass.
    """

    z_loss: float
    label_smoothing: float
    logit_softcap: float | None
    num_classes: int
    vocab_axis: str | None = None
    gather_axis: str | None = None
    vocab_block: int = 0

    def gather(self, kernel: jax.Array) -> jax.Array:
        """All-gathers the kernel's rows over `gather_axis`."""
        return jax.lax.all_gather(kernel, self.gather_axis, axis=0, tiled=True) if self.gather_axis else kernel

    def scatter(self, gradient: jax.Array) -> jax.Array:
        """Reduce-scatters the gradient of a gathered kernel, or of some of its columns."""
        if not self.gather_axis:
            return gradient
        return jax.lax.psum_scatter(gradient, self.gather_axis, scatter_dimension=0, tiled=True)


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Marks all arrays as varying over the mesh axes of `jax.shard_map` that any of them varies over.

    A scan requires the same marks on its carry and its inputs; outside `shard_map` there are none.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(array, tuple(axes - has), to="varying") if axes - has else array
        for array, has in zip(arrays, varying, strict=True)
    )


def softcap(logits: jax.Array, cap: float | None) -> jax.Array:
    """Returns cap * tanh(logits / cap); None disables the cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


class Statistics(NamedTuple):
    """Float32 statistics of logits `[..., V]`; sums are those of this device's columns."""

    shift: jax.Array  # largest logit, `[...]`
    shifted: jax.Array  # logits - shift, `[..., V]`
    total: jax.Array  # sum of exp(shifted), `[...]`
    at_label: jax.Array  # logit of the label, `[...]`; 0 where the label is not among these columns


def sum_terms(
    logits: jax.Array, labels: jax.Array, weights: jax.Array, terms: Terms, *, differentiable: bool = True
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns the sums of nll, z-loss and smoothing of float32 logits `[..., V]`, and lse `[...]`.

    `differentiable` False is for sums whose gradient is written by hand: a GPU then reads the logits once.
    """
    classes, is_class = _classes(logits, terms)
    masked = logits if is_class is None else jnp.where(is_class, logits, -jnp.inf)
    two, one = (functools.partial(form, axis=terms.vocab_axis) for form in (_two_passes, _one_pass))
    if differentiable:
        found = two(masked, logits, labels, classes)
    else:
        found = jax.lax.platform_dependent(masked, logits, labels, classes, cuda=one, default=two)

    def over_parts(sums):
        return jax.lax.psum(sums, terms.vocab_axis) if terms.vocab_axis else sums

    log_sum = jnp.log(over_parts(found.total))
    nll = log_sum - (over_parts(found.at_label) - found.shift)
    lse = found.shift + log_sum

    def weighted_sum(x):
        return jnp.sum(jnp.where(weights == 0, 0.0, weights * x))

    zero = jnp.zeros((), jnp.float32)
    z_loss = weighted_sum(terms.z_loss * jnp.square(lse)) if terms.z_loss else zero
    smoothing = zero
    if terms.label_smoothing:
        counted = found.shifted if is_class is None else jnp.where(is_class, found.shifted, 0.0)
        cross = log_sum - over_parts(jnp.sum(counted, axis=-1)) / terms.num_classes
        smoothing = weighted_sum(terms.label_smoothing * (cross - nll))
    return (weighted_sum(nll), z_loss, smoothing), lse


def _two_passes(masked, logits, labels, classes, axis: str | None) -> Statistics:
    """Computes statistics of `masked`, where columns that are no class are -inf."""
    shift = jax.lax.stop_gradient(jnp.max(masked, axis=-1))
    shift = jax.lax.pmax(shift, axis) if axis else shift
    shifted = masked - shift[..., None]
    return Statistics(shift, shifted, jnp.sum(jnp.exp(shifted), axis=-1), _at_label(logits, labels, classes))


def _one_pass(masked, logits, labels, classes, axis: str | None) -> Statistics:
    largest, total = _reduce_once(masked)
    shift = jax.lax.pmax(largest, axis) if axis else largest
    at_label = _gather(logits, labels, classes)  # of stored numbers: those that are masked would be formed again
    return Statistics(shift, masked - shift[..., None], total * jnp.exp(largest - shift), at_label)


@jax.custom_jvp
def _reduce_once(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the largest logit and the sum of exp(logits - largest), `[...]` each; -inf counts as the least float.

    One reduction (arXiv:1805.02867, algorithm 3): partial sums are rescaled when a larger logit turns up. XLA reads the
    logits once for each reduction: the head of GPT-2 moves 35.9 GB with this one and 42.5 GB with two (`jaxtrain plan
    configs/gpt2_124m.py --topology h100:1 --train.batch-size 32 --train.accumulate 1`).
    """

    def combine(a, b):
        (largest_a, total_a), (largest_b, total_b) = a, b
        factor = jnp.exp(-jnp.abs(largest_a - largest_b))
        total = jnp.where(largest_a >= largest_b, total_a + factor * total_b, factor * total_a + total_b)
        return jnp.maximum(largest_a, largest_b), total

    least = jnp.finfo(jnp.float32).min  # not -inf: the distance of two would be NaN
    operands = jnp.maximum(logits, least), jnp.ones_like(logits)
    return tuple(jax.lax.reduce(operands, (jnp.float32(least), jnp.float32(0)), combine, (logits.ndim - 1,)))


@_reduce_once.defjvp
def _reduce_once_jvp(primals, tangents):
    (logits,), (change,) = primals, tangents
    largest, total = _reduce_once(logits)
    slope = jnp.sum(jnp.exp(logits - largest[..., None]) * change, axis=-1)
    return (largest, total), (jnp.zeros_like(largest), slope)


@jax.custom_jvp
def _at_label(logits: jax.Array, labels: jax.Array, classes: jax.Array) -> jax.Array:
    """Returns the logit of the label, `[...]`; 0 where the label is not among these classes.

    Compare and sum fuses into a pass over the logits on TPUs and GPUs. XLA on a CPU would store the selected logits,
    and the operand of the other sum: twice the memory of the head (scripts/bench_loss.py). There it is a gather.
    """

    return jax.lax.platform_dependent(logits, labels, classes, cpu=_gather, default=_compare_and_sum)


def _gather(logits: jax.Array, labels: jax.Array, classes: jax.Array) -> jax.Array:
    columns = labels - classes[..., 0]
    picked = jnp.take_along_axis(logits, columns[..., None], axis=-1, mode="clip")[..., 0]
    return jnp.where((columns >= 0) & (columns < logits.shape[-1]), picked, 0.0)


def _compare_and_sum(values: jax.Array, labels: jax.Array, classes: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(classes == labels[..., None], values, 0.0), axis=-1)


@_at_label.defjvp
def _at_label_jvp(primals, tangents):
    _, labels, classes = primals
    return _at_label(*primals), _compare_and_sum(tangents[0], labels, classes)  # the transpose is no scatter


def _classes(logits: jax.Array, terms: Terms, width: int = 0, start: Any = 0) -> tuple[jax.Array, jax.Array | None]:
    """Returns the class id of each logit column, and a mask of the real classes (None without padding).

    Args:
      logits: `[..., V]`, or a block of its columns.
      width: columns of the kernel, if the logits are a block.
      start: first column of the block.
    """
    width, parts = width or logits.shape[-1], 1
    if terms.vocab_axis:
        start += jax.lax.axis_index(terms.vocab_axis) * width
        parts = jax.lax.axis_size(terms.vocab_axis)
    classes = start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return classes, classes < terms.num_classes if width * parts > terms.num_classes else None


class Chunks(NamedTuple):
    """Tokens cut into K chunks: hidden `[K, C, D]`, labels `[K, C]`, weights `[K, C]`."""

    hidden: jax.Array
    labels: jax.Array
    weights: jax.Array


def cut(hidden: jax.Array, labels: jax.Array, weights: jax.Array, longest: int) -> Chunks:
    """Cuts tokens into the smallest number of chunks of at most `longest`, padded with tokens of weight 0.

    Chunk i takes tokens i, i + K, ..., so that of sharded tokens each device holds a share of every chunk. All chunks
    are about equally long: otherwise one token more than a chunk holds would nearly double the work. Lengths are
    multiples of 128, which suits all hardware, or of 8 where 128 would add much.
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

    return Chunks(split(hidden, hidden.shape[-1:]), split(labels, ()), split(weights, ()))


def _join(array: jax.Array) -> jax.Array:
    """Reshapes `[K, C, ...]` to `[N, ...]`, in the original order of the tokens, each on its device."""
    return jnp.swapaxes(array, 0, 1).reshape(-1, *array.shape[2:])


def _chunk_logits(chunk: Chunks, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the chunk's hidden states with masked rows zeroed, and their float32 logits `[C, V]`."""
    hidden_CD = jnp.where((chunk.weights != 0)[:, None], chunk.hidden, 0)
    return hidden_CD, jnp.matmul(hidden_CD, kernel, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear_sums(chunks: Chunks, kernel: jax.Array, terms: Terms) -> jax.Array:
    """Returns the sums of nll, z-loss and smoothing over all chunks, float32 [3].

    One array rather than three: under `jax.vmap` a constant output next to a batched one has no gradient.
    """

    def body(sums, chunk):
        _, logits_CV = _chunk_logits(chunk, kernel)
        more, _ = sum_terms(
            softcap(logits_CV, terms.logit_softcap), chunk.labels, chunk.weights, terms, differentiable=False
        )
        return jax.tree.map(jnp.add, sums, more), None

    kernel = terms.gather(kernel)
    start, _ = vary_alike(jnp.zeros(3, jnp.float32), kernel)
    return jnp.stack(jax.lax.scan(body, tuple(start), chunks)[0])


def _logit_gradient(
    raw: jax.Array, lse: jax.Array, chunk: Chunks, scales, terms: Terms, width: int = 0, start: Any = 0
) -> jax.Array:
    """Returns the gradient of `scales . (nll, z_loss, smoothing)` by the logits before the soft-cap, `[C, V]`."""
    nll, z_loss, smoothing = scales
    capped = softcap(raw, terms.logit_softcap)
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


def _sums_and_gradients(chunks: Chunks, kernel: jax.Array, terms: Terms, scales):
    """Returns the sums and the gradients of `scales . sums`: hidden `[K, C, D]`, and kernel `[D, V]`.

    The gradient of the kernel is float32 and not scattered. If it is formed in blocks, it has the kernel's dtype, and
    each block is scattered before the next is formed.
    """
    in_blocks = bool(terms.vocab_block)
    kernel = terms.gather(kernel)

    def body(carry, chunk):
        sums, kernel_gradient_DV = carry
        hidden_CD, logits_CV = _chunk_logits(chunk, kernel)
        capped_CV = softcap(logits_CV, terms.logit_softcap)
        more, lse_C = sum_terms(capped_CV, chunk.labels, chunk.weights, terms, differentiable=False)
        gradient_CV = _logit_gradient(logits_CV, lse_C, chunk, scales, terms).astype(kernel.dtype)
        hidden_gradient_CD = jnp.matmul(gradient_CV, kernel.T, preferred_element_type=jnp.float32)
        if not in_blocks:
            kernel_gradient_DV += jnp.matmul(hidden_CD.T, gradient_CV, preferred_element_type=jnp.float32)
        sums = jax.tree.map(jnp.add, sums, more)
        return (sums, kernel_gradient_DV), (hidden_gradient_CD.astype(chunk.hidden.dtype), lse_C if in_blocks else None)

    carry = jnp.zeros((0,) if in_blocks else kernel.shape, jnp.float32)
    zeros, carry, _ = vary_alike(jnp.zeros(3, jnp.float32), carry, kernel)
    (sums, kernel_gradient_DV), (hidden_gradient_KCD, lse_KC) = jax.lax.scan(body, (tuple(zeros), carry), chunks)
    if in_blocks:
        kernel_gradient_DV = _kernel_gradient(chunks, kernel, lse_KC, terms, scales)
    return sums, (hidden_gradient_KCD, kernel_gradient_DV)


def _kernel_gradient(chunks: Chunks, kernel: jax.Array, lse_KC: jax.Array, terms: Terms, scales) -> jax.Array:
    """Returns the kernel's scattered gradient in its dtype, a block of columns at a time, summed in float32."""
    tokens = Chunks(*map(_join, chunks))
    hidden_ND = jnp.where((tokens.weights != 0)[:, None], tokens.hidden, 0)
    num_columns = kernel.shape[1]
    block = min(terms.vocab_block, num_columns)

    def body(i, gradient_DV):
        # The last block overlaps the previous one: the same columns twice, with the same result.
        start = jnp.minimum(i * block, num_columns - block)
        columns_DW = jax.lax.dynamic_slice_in_dim(kernel, start, block, axis=1)
        logits_NW = jnp.matmul(hidden_ND, columns_DW, preferred_element_type=jnp.float32)
        gradient_NW = _logit_gradient(logits_NW, _join(lse_KC), tokens, scales, terms, num_columns, start)
        block_DW = jnp.matmul(hidden_ND.T, gradient_NW.astype(kernel.dtype), preferred_element_type=jnp.float32)
        block_DW = terms.scatter(block_DW.astype(kernel.dtype))
        return jax.lax.dynamic_update_slice_in_dim(gradient_DV, block_DW, start, axis=1)

    num_rows = kernel.shape[0] // (jax.lax.axis_size(terms.gather_axis) if terms.gather_axis else 1)
    return jax.lax.fori_loop(0, -(-num_columns // block), body, jnp.zeros_like(kernel[:num_rows]))


def _linear_sums_forward(chunks: Chunks, kernel: jax.Array, terms: Terms):
    # The gradients are those of the total. A caller that weights nll, z-loss and smoothing differently, which only the
    # cotangents show, gets a second pass; without z-loss and smoothing there is nothing to weight.
    sums, gradients = _sums_and_gradients(chunks, kernel, terms, scales=(jnp.float32(1),) * 3)
    inputs = (chunks, kernel) if terms.z_loss or terms.label_smoothing else None
    return jnp.stack(sums), (gradients, inputs, jnp.zeros((), kernel.dtype))


def _linear_sums_backward(terms: Terms, residuals, cotangents):
    (hidden_gradient, kernel_gradient), inputs, like_kernel = residuals
    cotangents = tuple(cotangents)

    def scaled():
        nll = cotangents[0]
        hidden = (nll * hidden_gradient.astype(jnp.float32)).astype(hidden_gradient.dtype)
        return hidden, (nll * kernel_gradient.astype(jnp.float32)).astype(kernel_gradient.dtype)

    if inputs is None:
        hidden_gradient, kernel_gradient = scaled()
    else:
        same = (cotangents[0] == cotangents[1]) & (cotangents[0] == cotangents[2])
        hidden_gradient, kernel_gradient = jax.lax.cond(
            same, scaled, lambda: _sums_and_gradients(*inputs, terms, scales=cotangents)[1]
        )
    if terms.vocab_axis:
        hidden_gradient = jax.lax.psum(hidden_gradient, terms.vocab_axis)
    kernel_gradient = kernel_gradient.astype(like_kernel.dtype)
    return Chunks(hidden_gradient, None, None), kernel_gradient if terms.vocab_block else terms.scatter(kernel_gradient)


linear_sums.defvjp(_linear_sums_forward, _linear_sums_backward)
