"""LoRA: the additions against merged kernels, and the parameters that an export takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import family
from jaxtrain.models.lora import merge_lora, without_lora
from jaxtrain.models.model import TransformerModel
from jaxtrain.models.size import flops_per_token

SIZES = {"num_layers": 1, "num_heads": 2, "d_model": 16, "d_ff": 24, "max_seq_len": 16, "vocab_size": 31}
ALL = ("query", "key", "value", "out", "up", "gate", "down")
LLAMA = family("llama", **SIZES, num_kv_heads=1, lora_rank=3, lora_alpha=6.0, lora_targets=ALL)
GPT2 = family("gpt2", **SIZES, lora_rank=2, lora_targets=("down", "value"))
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 13))
BATCH = {"inputs": TOKENS[:, :-1], "labels": TOKENS[:, 1:], "where": np.ones((2, 12), bool)}


@pytest.mark.parametrize("config", [LLAMA, pytest.param(GPT2, marks=pytest.mark.slow)], ids=["llama", "gpt2"])
def test_lora_equals_merged_kernels(config):
    """Logits, and gradients of the low-rank matrices, equal those of W + (alpha / R) A B; at first those of W."""
    model, plain = TransformerModel(config), TransformerModel(without_lora(config))
    params, base = (jax.jit(which.init)(jax.random.key(1)) for which in (model, plain))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), without_lora(params), base))
    logits, merged_logits = jax.jit(model.logits), jax.jit(plain.logits)
    np.testing.assert_array_equal(logits(params, TOKENS), merged_logits(base, TOKENS))

    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + noise.normal(0, 0.1, x.shape).astype(np.float32), params)

    def merge(params):
        layers = {name: dict(block) for name, block in params["layers"].items()}
        for block, name in [("attention", name) for name in ALL[:4]] + [("feed_forward", name) for name in ALL[4:]]:
            if lora := layers[block].pop(f"{name}_lora", None):
                addition = jnp.einsum("lir,lro->lio", lora["a"], lora["b"]) * config.lora_alpha / config.lora_rank
                layers[block][name] = layers[block][name] | {"kernel": layers[block][name]["kernel"] + addition}
        return params | {"layers": layers}

    np.testing.assert_allclose(logits(params, TOKENS), merged_logits(merge(params), TOKENS), atol=1e-6, rtol=1e-5)
    mean = lambda model: lambda params: model.loss(params, BATCH).mean()  # noqa: E731
    grads = jax.jit(jax.grad(mean(model)))(params)
    expected = jax.jit(jax.grad(lambda params: mean(plain)(merge(params))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merge_lora(params, config), merge(params))
    assert flops_per_token(config, 12) < flops_per_token(plain.config, 12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_rank": 0}, "model.lora_rank must be above 0"),
        ({"lora_targets": ("quary",)}, "model.lora_targets: 'quary' is none of query, .*; did you mean query?"),
        ({"lora_targets": ()}, "model.lora_targets: '' is none of query"),
        ({"feed_forward": "gelu"}, "model.lora_targets: 'gate' is none of query, key, value, out, up, down"),
        ({"lora_alpha": -1.0}, "model.lora_alpha must be above 0"),
    ],
)
def test_settings_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **fields)
