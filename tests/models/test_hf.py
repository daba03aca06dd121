"""Models of transformers: each family against transformers itself, through files and back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models.hf.config_json import from_hf_config, to_hf_config
from jaxtrain.models.hf.read import PretrainedFolder, abstract_params
from jaxtrain.models.hf.write import write_model
from jaxtrain.models.lora import merge_lora, without_lora
from jaxtrain.models.model import TransformerModel

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[test-hf]'")
torch = pytest.importorskip("torch", reason="needs torch: pip install '.[test-hf]'")

VOCAB, LENGTH = 67, 20
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": None, "eos_token_id": None}
GEMMA = SIZES | {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24}
GEMMA3 = GEMMA | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 100.0}
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
LOCAL |= {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0}}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3}
# Class of the config and its values. A name with a comma is a variant of a family.
CASES = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt2, untied": ("GPT2Config", GPT2 | {"tie_word_embeddings": False, "n_inner": 40}),
    "llama": ("LlamaConfig", SIZES),
    "llama, 3.2": ("LlamaConfig", SIZES | {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16}),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": 5}),
    "qwen 2": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}),
    "qwen 2, with a window": (
        "Qwen2Config",
        SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen 3": ("Qwen3Config", SIZES | {"head_dim": 16}),
    "olmo 2": ("Olmo2Config", SIZES),
    "mixtral": ("MixtralConfig", SIZES | {"num_local_experts": 4, "sliding_window": 5}),
    "qwen 3, with experts": ("Qwen3MoeConfig", SIZES | EXPERTS | {"moe_intermediate_size": 24, "norm_topk_prob": True}),
    "olmo, with experts": ("OlmoeConfig", SIZES | EXPERTS),
    "gemma 2": ("Gemma2Config", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma 3": ("Gemma3TextConfig", GEMMA3 | {"rope_parameters": LOCAL}),
}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH))


def make(config):
    """Returns a model of transformers with random weights, also of vectors."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.ndim > 1 else 0.5)
    return model


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def like(config, dtype=jnp.float32):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape_of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(shape_of, abstract_params(config))


def read(folder):
    pretrained = PretrainedFolder(folder)
    return pretrained, pretrained.read_params(like(pretrained.config))


@functools.partial(jax.jit, static_argnums=0)
def our_logits(model, params, tokens):
    return model.logits(params, tokens)


# The layer of Mixtral, and the layer of Mistral with the biases of Qwen 2.
SLOW = ("qwen 3, with experts", "olmo, with experts", "qwen 2, with a window")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_a_family_equals_transformers(case, tmp_path):
    """Logits; exported, the same bits, which transformers loads. For one case of a family, also text and bfloat16."""
    name, values = CASES[case]
    theirs = make(getattr(transformers, name)(**values))
    theirs.save_pretrained(tmp_path / "in")
    pretrained, params = read(tmp_path / "in")
    model = TransformerModel(pretrained.config)
    expected = logits_of(theirs)
    np.testing.assert_allclose(our_logits(model, params, TOKENS), expected, atol=1e-4)

    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out", pretrained.config, params, shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again, params_again = read(tmp_path / "out")
    assert (again.family, again.config) == (pretrained.family, pretrained.config)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(params_again), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    np.testing.assert_allclose(logits_of(exported), expected, atol=1e-5)

    if "," not in case:
        prompt = torch.tensor(TOKENS[:, :5])
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
        text = exported.generate(prompt, max_new_tokens=LENGTH - 5, **options).numpy()
        likeliest = np.argmax(our_logits(model, params, text), axis=-1)
        np.testing.assert_array_equal(likeliest[:, 4:-1], text[:, 5:])
        half = our_logits(model, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), TOKENS)
        error = np.sqrt(np.mean(np.square(np.asarray(half) - expected)) / np.mean(np.square(expected)))
        assert error < 0.02  # that of transformers in bfloat16 lies between 0.005 and 0.015


def test_an_export_takes_the_simplest_architecture():
    """A Mistral without a window computes what a Llama does; so does a Gemma 3 whose layers all have one window."""
    mistral = transformers.MistralConfig(**SIZES, sliding_window=None).to_dict()
    config = from_hf_config(mistral)[1]
    assert (to_hf_config(config)[0].style, config) == ("llama", from_hf_config(to_hf_config(config)[1])[1])
    local = transformers.Gemma3TextConfig(**GEMMA | {"layer_types": ["sliding_attention"] * 3}).to_dict()
    config = from_hf_config(local)[1]
    assert (config.global_every, config.local_rope_theta, config.rope_theta) == (None, None, 10_000.0)
    assert from_hf_config(to_hf_config(config)[1]) == (to_hf_config(config)[0], config)


def test_lora_matrices_are_merged_in_an_export(tmp_path):
    targets = ("query", "out", "gate", "down")
    config = dataclasses.replace(from_hf_config(transformers.LlamaConfig(**SIZES).to_dict())[1], lora_rank=3)
    config = dataclasses.replace(config, lora_targets=targets)
    model, noise = TransformerModel(config), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: noise.normal(0, 0.3, leaf.shape).astype(np.float32), jax.eval_shape(model.init, jax.random.key(0))
    )
    write_model(tmp_path, without_lora(config), merge_lora(params, config))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    np.testing.assert_allclose(logits_of(exported), our_logits(model, params, TOKENS), atol=1e-4)
