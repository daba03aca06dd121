"""The model protocol: the built-in transformer implements it; optional members may be absent."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import llama
from jaxtrain.losses import cross_entropy
from jaxtrain.models.model import Model, TransformerModel, axes_of
from jaxtrain.models.size import flops_per_token
from jaxtrain.models.transformer import Transformer, logits

CONFIG = llama(num_layers=1, num_heads=2, d_model=8, d_ff=16, max_seq_len=8, vocab_size=11)
TOKENS = jnp.arange(12).reshape(2, 6) % 11


class Bigram:
    def init(self, key):
        return {"table": jax.random.normal(key, (11, 11)), "bias": jnp.zeros(11)}

    def loss(self, params, batch):
        return cross_entropy(params["table"][batch["inputs"]] + params["bias"], batch["labels"], where=batch["where"])


@pytest.fixture(scope="module")
def params():
    return jax.jit(TransformerModel(CONFIG).init)(jax.random.key(0))


def test_both_are_models():
    assert isinstance(TransformerModel(CONFIG), Model)
    assert isinstance(Bigram(), Model)
    assert not isinstance(object(), Model)


def test_the_transformer_is_the_linen_module(params):
    model, module = TransformerModel(CONFIG, z_loss=0.1, label_smoothing=0.2, chunk_size=5), Transformer(CONFIG)
    batch = {"inputs": TOKENS, "labels": (TOKENS + 1) % 11, "where": TOKENS > 1}

    @jax.jit
    def expected(params):
        hidden, _ = module.apply({"params": params}, TOKENS)
        more = {"where": batch["where"], "z_loss": 0.1, "label_smoothing": 0.2}
        return cross_entropy(logits(module, params, hidden), batch["labels"], **more)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), jax.jit(model.loss)(params, batch), expected(params))

    @jax.jit
    def decoded(params):
        hidden, _ = module.apply({"params": params}, TOKENS)
        first, cache = model.decode(params, TOKENS[:, :4], None, 0)
        second, _ = model.decode(params, TOKENS[:, 4:], cache, 4)
        return jnp.concatenate([first, second], axis=1), logits(module, params, hidden)

    np.testing.assert_allclose(*decoded(params), rtol=1e-5, atol=1e-6)
    assert (model.vocab_size, model.max_seq_len) == (11, 8)
    assert model.flops_per_token(6) == flops_per_token(CONFIG, 6)


def test_optional_members_have_defaults(params):
    bigram = Bigram()
    assert axes_of(bigram, bigram.init(jax.random.key(0))) == {"table": (None, None), "bias": (None,)}
    axes = axes_of(TransformerModel(CONFIG), params)
    assert axes["embedding"] == ("vocab", "embed")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"table": ("embed", None)}, "Bigram.axes must return a tree like the parameters"),
        ({"table": ("embed",), "bias": (None,)}, r"Bigram.axes gives \('embed',\) for table \(11, 11\)"),
        ({"table": ("embed", None), "bias": None}, r"Bigram.axes gives None for bias \(11,\)"),
        ({"table": ("embed", None), "bias": "x"}, r"Bigram.axes gives 'x' for bias \(11,\)"),
    ],
)
def test_axes_that_do_not_fit_are_named(axes, message):
    bigram = Bigram()
    bigram.axes = lambda params: axes
    with pytest.raises(ValueError, match=message):
        axes_of(bigram, bigram.init(jax.random.key(0)))
