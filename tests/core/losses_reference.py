"""Cross-entropy in float64 numpy; its gradients are complex steps, so that no formula is written twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.losses import LossSums, cross_entropy, linear_cross_entropy

TOKENS, WIDTH, VOCAB = 15, 6, 11


def oracle_terms(logits, labels, z_loss=0.0, label_smoothing=0.0, logit_softcap=None):
    """Per-token nll, z-loss and smoothing of complex128 logits [N, V]."""
    x = logit_softcap * np.tanh(logits / logit_softcap) if logit_softcap else logits
    shift = x.real.max(-1)
    lse = shift + np.log(np.exp(x - shift[:, None]).sum(-1))
    nll = lse - x[np.arange(len(labels)), labels]
    return np.stack([nll, z_loss * lse**2, label_smoothing * (lse - x.mean(-1) - nll)])


def oracle(logits, labels, weights, scales=(1.0, 1.0, 1.0), **terms):
    """Returns float64 sums (nll, z_loss, smoothing) and the gradient of `scales . sums` with respect to the logits."""
    logits = np.asarray(logits, np.float64)
    sums = (oracle_terms(logits + 0j, labels, **terms).real * weights).sum(-1)
    gradient = np.zeros_like(logits)
    for column in range(logits.shape[1]):
        step = np.zeros_like(logits)
        step[:, column] = 1e-30
        gradient[:, column] = np.asarray(scales) @ oracle_terms(logits + 1j * step, labels, **terms).imag / 1e-30
    return sums, gradient * np.asarray(weights)[:, None]


def logsumexp(x):
    return x.max(-1) + np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1))


def softmax(x):
    return np.exp(x - logsumexp(x)[:, None])


def parts(sums: LossSums):
    return jnp.stack([sums.nll, sums.z_loss, sums.smoothing])


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def linear_nll(hidden, kernel, labels):
    return linear_cross_entropy(hidden, kernel, labels).nll


@jax.jit
@jax.value_and_grad
def dense_nll(logits, labels):
    return cross_entropy(logits, labels).nll


def assert_close(actual, expected, rtol=1e-6):
    """The largest difference is at most rtol of the largest number."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    difference = np.abs(actual - expected).max(initial=0)
    assert difference <= rtol * np.abs(expected).max(initial=0), (
        f"off by {difference}, largest {np.abs(expected).max()}"
    )


def chunked(hidden, kernel, labels):
    return linear_cross_entropy(hidden, kernel, labels, chunk_size=64, z_loss=1e-4, logit_softcap=30.0).mean()


def dense(hidden, kernel, labels):
    return cross_entropy(hidden @ kernel, labels, z_loss=1e-4, logit_softcap=30.0).mean()
