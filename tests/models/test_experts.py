"""Mixture of experts: against a loop over experts, on a mesh, in a run, and what is refused."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import change, shared_program, train

import jaxtrain
from jaxtrain.config import family, llama
from jaxtrain.models.feed_forward import Experts, RouterSums, router_losses
from jaxtrain.models.hf.config_json import from_hf_config, to_hf_config
from jaxtrain.models.layout import logical_axes
from jaxtrain.models.model import TransformerModel
from jaxtrain.models.parallel import Parallel
from jaxtrain.models.size import flops_per_token
from jaxtrain.optim import decay_mask
from jaxtrain.runtime.mesh import by_rows, make_mesh

SIZES = {"num_layers": 2, "num_heads": 2, "d_model": 16, "d_ff": 24, "max_seq_len": 16, "vocab_size": 30}
MIXTURE = llama(**SIZES, num_experts=4)
ACTIVATIONS = {
    "swiglu": lambda up, gate: up * jax.nn.silu(gate),
    "geglu": lambda up, gate: up * jax.nn.gelu(gate),
    "gelu": lambda up, gate: jax.nn.gelu(up),
}


def loop_over_experts(c, params, x_BTD, weight_BT):
    """Every expert computes all tokens; those that did not choose it count 0."""
    logits_BTE = x_BTD @ params["router"]["kernel"]
    probability_BTE = jax.nn.softmax(logits_BTE)
    chosen_BTK = jnp.argsort(-probability_BTE, axis=-1)[..., : c.experts_per_token]
    mask_BTE = jax.nn.one_hot(chosen_BTK, c.num_experts, dtype=bool).any(axis=-2)
    share_BTE = jnp.where(mask_BTE, probability_BTE, 0)
    if c.norm_router:
        share_BTE /= share_BTE.sum(axis=-1, keepdims=True)
    y_BTD, experts = jnp.zeros_like(x_BTD), params["experts"]
    for e in range(c.num_experts):
        up, gate = (x_BTD @ experts[name][e] if name in experts else None for name in ("up", "gate"))
        y_BTD += share_BTE[..., e, None] * (ACTIVATIONS[c.feed_forward](up, gate) @ experts["down"][e])
    square_BT = jax.nn.logsumexp(logits_BTE, axis=-1) ** 2
    sums = [jnp.einsum("bt,bte->e", weight_BT, values) for values in (mask_BTE.astype(jnp.float32), probability_BTE)]
    return y_BTD, RouterSums(*sums, jnp.sum(weight_BT * square_BT))


def relative(actual, expected):
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(tree)))  # noqa: E731
    return norm(jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), actual, expected)) / norm(expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"experts_per_token": 2},
        pytest.param({"experts_per_token": 3, "norm_router": False, "feed_forward": "geglu"}, marks=pytest.mark.slow),
        pytest.param({"experts_per_token": 1, "feed_forward": "gelu", "num_experts": 9}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_mixture_is_a_loop_over_experts(fields):
    """Output, sums, and gradients of all of them; experts without tokens too."""
    c = dataclasses.replace(MIXTURE, **fields)
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD, probe_BTD = (jax.random.normal(key, (2, 7, c.d_model)) for key in keys[:2])
    weight_BT = jax.random.uniform(keys[2], (2, 7))
    module = Experts(c, Parallel())
    params = jax.tree.map(lambda leaf: 20 * leaf, module.init(keys[3], x_BTD, None)["params"])

    def ours(params, x_BTD):
        return module.apply({"params": params}, x_BTD, weight_BT)

    def reference(params, x_BTD):
        return loop_over_experts(c, params, x_BTD, weight_BT)

    def differentiated(function, params, x_BTD):
        def total(*arguments):
            y_BTD, sums = function(*arguments)
            parts = [y_BTD * probe_BTD, sums.probability_E * jnp.arange(1.0 * c.num_experts), 0.1 * sums.square]
            return sum(jnp.sum(part.astype(jnp.float32)) for part in parts), (y_BTD, sums)

        return jax.grad(total, (0, 1), has_aux=True)(params, x_BTD)

    half = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)  # noqa: E731
    exact, expected, rounded = jax.jit(
        lambda *arguments: (
            differentiated(ours, *arguments),
            differentiated(reference, *arguments),
            ours(*half(arguments)),
        )
    )(params, x_BTD)
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(expected), strict=True):
        assert relative(a, b) < 1e-6
    if c.num_experts == 9:
        assert (expected[1][1].load_E == 0).any()
    assert relative(rounded[0], expected[1][0]) < 2**-5
    assert rounded[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(("load", "balance"), [([5, 5, 5, 5], 1), ([10, 10, 0, 0], 2), ([20, 0, 0, 0], 4)])
def test_the_balance_loss_is_1_for_equal_loads_and_largest_for_one_expert(load, balance):
    """Ten tokens choose two experts each, or one expert twice; the probabilities follow the choices."""
    load = jnp.float32([load] * 3)
    losses = router_losses(RouterSums(load, load / 2, jnp.float32([1, 2, 6])), Parallel())
    assert (losses["balance_loss"], losses["router_z_loss"]) == (10 * balance, 3)


@pytest.fixture(scope="module")
def config(tiny_config):
    """A run of four steps on eight devices: hidden channels in two shards, rows in four."""
    model = {
        "num_layers": 1,
        "num_experts": 4,
        "norm_router": False,
        "num_kv_heads": 2,
        "vocab_multiple": 8,
        "remat": "minimal",
    }
    train = {"steps": 4, "accumulate": 1, "balance_loss": 0.5, "router_z_loss": 0.1}
    return change(tiny_config, model=model, train=train, mesh={"data": 2, "fsdp": 2, "tensor": 2})


def test_loss_and_gradient_on_eight_devices_equal_one_device(config):
    """With rows of unequal weight, and matrices large enough that experts matter."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 257, (8, 17)).astype(np.int32)
    where = np.arange(16)[None] < np.array([16, 1, 7, 0, 3, 12, 9, 2])[:, None]
    batch = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "where": where}
    program = shared_program(config, make_mesh(config.mesh), 257)
    state = jax.device_get(program.init_state())
    params = jax.tree.map(lambda leaf, large: leaf * (5 if large else 1), state.params, decay_mask(state.params))
    state = jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, like.sharding), state.replace(params=params), program.abstract_state
    )
    batch_on_mesh = jax.device_put(batch, by_rows(program.mesh))
    state, metrics = program.train_step(state, batch_on_mesh)
    metrics, moment = metrics.unpack(), jax.device_get(optax.tree_utils.tree_get(state.opt_state, "mu"))

    alone = dataclasses.replace(config.model, vocab_size=257, remat="none")
    model = TransformerModel(alone, balance_loss=0.5, router_z_loss=0.1)

    def total(params):
        sums, losses = model.loss(params, batch)
        return sums.mean(), (sums, losses)

    gradient, (sums, losses) = jax.jit(jax.grad(total, has_aux=True))(params)
    np.testing.assert_allclose(metrics["loss"], sums.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["nll"], sums.mean_nll(), rtol=1e-6)
    for name, loss in losses.items():
        np.testing.assert_allclose(metrics[name], loss / sums.weight, rtol=1e-6)
    assert 1.001 < metrics["balance_loss"] < 2  # two of four experts
    factor = (1 - config.optim.b1) * metrics["clip_factor"]
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(moment), jax.tree.leaves(gradient), strict=True):
        assert relative(a, b * factor) < 1e-5, path


@pytest.mark.slow
def test_a_run_reports_the_losses_of_its_routers_and_its_model_generates(config, tmp_path):
    """The evaluation loss contains neither."""
    outcome = train(change(config, model={"num_layers": 2}), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 4
    for line in steps:
        parts = line["nll"] + line["z_loss"] + 0.5 * line["balance_loss"] + 0.1 * line["router_z_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-6)
    assert abs(outcome["evaluation"]["nll"] - steps[-1]["nll"]) < 0.3
    model = jaxtrain.load(tmp_path / "run")
    prompt = [model.tokenizer.eot_id, *model.tokenizer.encode("1 + 2")]
    text = model.tokenizer.encode(model.generate("1 + 2", 6, temperature=0))
    likeliest = np.argmax(model.logits([[*prompt, *text][:-1]])[0], axis=-1)
    assert likeliest[len(prompt) - 1 :].tolist() == list(text)


def test_a_cache_gives_the_logits_of_the_whole_sequence():
    """A token's experts do not depend on the tokens beside it."""
    model = TransformerModel(dataclasses.replace(MIXTURE, num_layers=1))
    params = jax.tree.map(lambda leaf: 5 * leaf, jax.jit(model.init)(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 30)

    def pieces(params, tokens):
        first, cache = model.decode(params, tokens[:, :8], None, 0)
        last, _ = model.decode(params, tokens[:, 8:], cache, 8)
        return jnp.concatenate([first, last], axis=1), model.logits(params, tokens)

    np.testing.assert_allclose(*jax.jit(pieces)(params, tokens), rtol=1e-5, atol=2e-5)


def test_experts_decay_are_sharded_and_start_like_other_matrices():
    params = jax.jit(TransformerModel(MIXTURE).init)(jax.random.key(0))
    part = params["layers"]["feed_forward"]
    assert {name: leaf.shape for name, leaf in part["experts"].items()} == {
        "up": (2, 4, 16, 24),
        "gate": (2, 4, 16, 24),
        "down": (2, 4, 24, 16),
    }
    assert all(jax.tree.leaves(decay_mask(params)["layers"]["feed_forward"]))
    assert not any(jax.tree.leaves(decay_mask(params)["layers"]["feed_forward_norm"]))
    axes = logical_axes(params)["layers"]["feed_forward"]
    assert axes["experts"]["down"] == ("layers", None, "hidden", "embed")
    for leaf, std in ((part["experts"]["up"], 0.02), (part["experts"]["down"], 0.01), (part["router"]["kernel"], 0.02)):
        assert float(jnp.std(leaf)) == pytest.approx(std, rel=0.2)
    assert len(np.unique(np.asarray(part["experts"]["gate"][:, :, 0, 0]))) == 8


def test_flops_count_the_experts_that_a_token_uses():
    per_expert = 3 * 16 * 24
    one, two, more = (
        flops_per_token(dataclasses.replace(MIXTURE, **fields), 16)
        for fields in ({"experts_per_token": 1}, {}, {"num_experts": 8})
    )
    assert two - one == 6 * 2 * per_expert
    assert more - two == 6 * 2 * 4 * 16  # the router


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"experts_per_token": 5}, "model.experts_per_token 5 exceeds model.num_experts 4: change one of them"),
        ({"use_bias": True}, "model.num_experts has no biases: set model.use_bias false"),
        (
            {"lora_targets": ("query", "up")},
            "model.lora_targets of a mixture of experts: 'up' is none of query, key, value, out",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_options_of_experts_are_errors(fields, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(MIXTURE, **fields)


OLMOE, QWEN, MIXTRAL = (
    to_hf_config(family(name, **SIZES | {"num_experts": 4, "experts_per_token": 2}))[1]
    for name in ("olmoe", "qwen3_moe", "mixtral")
)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (OLMOE | {"clip_qkv": 8.0}, "clip_qkv is 8.0, and the decoder computes None only"),
        (QWEN | {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, and the decoder computes 1 only"),
        (QWEN | {"mlp_only_layers": [0]}, "mlp_only_layers is [0], and the decoder computes [] only"),
        (QWEN | {"architectures": ["Qwen2MoeForCausalLM"]}, "needs shared experts, which the decoder lacks"),
        (MIXTRAL | {"hidden_act": "gelu"}, "hidden_act is 'gelu', and the decoder computes 'silu' only"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "model.experts_per_token 9 exceeds model.num_experts 4"),
    ],
    ids=range(6),
)
def test_other_mixtures_are_refused_by_name(values, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        from_hf_config(values)


def test_both_names_of_the_number_of_experts_are_read_and_a_dense_model_takes_no_mixture():
    renamed = QWEN | {"num_local_experts": QWEN["num_experts"]}
    del renamed["num_experts"]
    assert from_hf_config(renamed) == from_hf_config(QWEN)
    with pytest.raises(ValueError, match="no architecture of transformers computes this model"):
        to_hf_config(llama(**SIZES, qk_norm="projection"))
