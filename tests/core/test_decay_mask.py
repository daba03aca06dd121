"""The decay mask on the parameter trees of many models, and its report."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optim_reference import random_tree

from jaxtrain.optim import clipped_adamw, decay_mask, decay_report, global_norm


class Block(nn.Module):
    """Leaves of rank 1, 2 and 3 below one layer, a bias of rank 2 among them."""

    @nn.compact
    def __call__(self, x, _):
        x = nn.LayerNorm()(x) * self.param("gain", nn.initializers.ones, (4,))[None]
        x = nn.DenseGeneral((2, 3), name="heads")(x)
        return nn.DenseGeneral(4, axis=(-2, -1), use_bias=False, name="out")(x), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(5, name="head")(layers(name="layers")(x, None)[0])


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = Block(name=f"layers_{i}")(x, None)
        return nn.Dense(5, name="head")(x)


def test_stacked_model_decays_like_the_unrolled_one():
    """The same paths decay, although a stacked leaf has one more dimension."""

    def table(module):
        params = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 4)))["params"]
        sizes = {}
        for (path, leaf), decays in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(decay_mask(params)), strict=True
        ):
            key = re.sub(r"layers_\d", "layers", jax.tree_util.keystr(path, simple=True, separator="/")), decays
            sizes[key] = sizes.get(key, 0) + leaf.size
        return sizes

    assert table(Stacked()) == table(Unrolled()) == {
        ("head/bias", False): 5,
        ("head/kernel", True): 20,
        ("layers/LayerNorm_0/bias", False): 12,
        ("layers/LayerNorm_0/scale", False): 12,
        ("layers/gain", False): 12,
        ("layers/heads/bias", False): 18,
        ("layers/heads/kernel", True): 72,
        ("layers/out/kernel", True): 72,
    }  # fmt: skip


class Gain(nnx.Module):
    def __init__(self, rngs):
        del rngs
        self.gain = nnx.Param(jnp.ones(4))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.bias = nnx.Param(jnp.zeros((2, 2)))
        self.blocks = nnx.vmap(Gain)(nnx.Rngs(0).split(3))


def test_nnx_state():
    """A list of layers is not stacked, a vmapped layer is; the attribute of the wrapper is not part of the path."""
    state = nnx.state(Nnx(nnx.Rngs(0)), nnx.Param)
    names = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    decayed = [name for name, decays in zip(names, jax.tree.leaves(decay_mask(state)), strict=True) if decays]
    assert decayed == ["embed/embedding", "layers/0/kernel", "layers/1/kernel"]
    assert len(names) == 7


@pytest.mark.parametrize(
    ("params", "decayed"),
    [
        ({"a": (2, 3), "b": (3,), "c": ()}, ["a"]),
        ({"bias": (2, 3), "scale": (2, 3, 4), "kernel": (2, 3, 4)}, ["kernel"]),
        ({"layers": [{"w": (2, 2)}, {"w": (3, 3), "g": (2,)}]}, ["layers/0/w", "layers/1/w"]),
        ({"layers": {"w": (2, 3, 3), "scale": (2, 3), "g": (2, 3)}}, ["layers/w"]),
        ({"blocks": {"attention": {"w": (2, 3, 3), "gain": (2, 3), "bias": (2, 3, 3)}}}, ["blocks/attention/w"]),
        ({"model": {"layers": {"norm": {"w": (2, 3)}}, "w": (2, 3)}}, ["model/w"]),
        ({"encoder": {"layers": {"norm1": (2, 3)}}, "decoder": {"layers": {"ln_1": {"g": (4, 3)}}}}, []),
        ({"layers": (7, 3)}, ["layers"]),
        ({"layers": {"w": (3, 5), "scale": (5,), "v": (3, 5)}}, ["layers/v", "layers/w"]),  # a 1-D scale: no stack
        ({"layers": {"w": (3, 5), "v": (4, 5), "t": ()}}, ["layers/v", "layers/w"]),  # unequal sizes: no stack
        ({"layers": {"w": (1, 5, 5), "g": (1, 5)}}, ["layers/w"]),  # one layer: size 1 does not count
        ({"layers": {"w": (6, 3, 7), "ln": {"scale": (5, 3)}, "skip": (4, 3)}}, ["layers/w"]),  # scan axis 1
        ({"gamma": (1, 8), "layer_scale": (1, 1, 8), "g": (8, 1), "offset": (1, 1, 1, 8)}, []),
        ({"cls_token": (1, 1, 8), "mask_token": (1, 1, 8), "pos_embed": (1, 9, 8)}, ["pos_embed"]),
        ({"h": {"mlp": {"w": (4, 3, 3), "b": (4, 3)}, "ln_1": {"weight": (4, 3), "b": (4, 3)}}}, ["h/mlp/w"]),
        ({"lora": {"a": (8, 2), "b": (2, 8)}}, ["lora/a", "lora/b"]),
        ({"mlp/~/linear_0": {"w": (3, 4), "b": (4,)}, "mlp/~/layer_norm": {"offset": (4,)}}, ["mlp/~/linear_0/w"]),
    ],
    ids=str,
)
def test_plain_trees(params, decayed):
    params = jax.tree.map(jnp.zeros, params, is_leaf=lambda x: isinstance(x, tuple))
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    assert [jax.tree_util.keystr(path, simple=True, separator="/") for path, flag in mask if flag] == decayed


def test_a_wrong_stack_names_both_leaves():
    params = {"layers": {"first": jnp.zeros((2, 3)), "second": jnp.zeros((5, 3))}}
    wrong = r"layers/first has shape \(2, 3\) and layers/second has shape \(5, 3\)"
    with pytest.raises(ValueError, match=wrong):
        decay_mask(params, stacked=("layers",))
    assert decay_mask(params, stacked=()) == {"layers": {"first": True, "second": True}}
    assert decay_mask(params, stacked=("blocks",)) == {"layers": {"first": True, "second": True}}
    with pytest.raises(ValueError, match="layers/second has shape"):
        decay_mask({"layers": {"first": jnp.zeros((2, 3)), "second": jnp.zeros(())}}, stacked=("layers",))


STACKED_NORMS = ("ln_attn", "ln_mlp", "norm_in", "norm_attn", "layernorm_before", "bn1", "GroupNorm_0", "rms_1", "q_ln",
                 "LayerNormalization_0", "batch_normalization", "ln_cross_attn", "norm_2d")  # fmt: skip
VECTORS = ("q_bias", "in_proj_bias", "bias_k", "bias_hh_l0", "gamma_1", "layer_scale_2", "biases", "skip_scale",
           "lambda_1", "lambda_q1")  # fmt: skip

# Shapes of parameter trees as public projects name and stack them, and the leaves that do not decay.
PROJECTS = {
    "nanoGPT in Linen": (
        {"wte": {"embedding": (9, 4)}, "h_0": {"ln_1": {"scale": (4,), "bias": (4,)}, "c_fc": {"kernel": (4, 8)}}},
        ["h_0/ln_1/bias", "h_0/ln_1/scale"],
    ),
    "GPT-2 checkpoints, stacked under h": (
        {"h": {"ln_1": {"g": (3, 4), "b": (3, 4)}, "c_fc": {"w": (3, 4, 8), "b": (3, 8)}}, "wpe": (6, 4)},
        ["h/c_fc/b", "h/ln_1/b", "h/ln_1/g"],
    ),
    "MaxText, scan axis 1": (
        {
            "decoder": {
                "layers": {
                    "mlp": {"wi_0": {"kernel": (4, 3, 8)}},
                    "pre_self_attention_layer_norm": {"scale": (4, 3)},
                    "self_attention": {"query": {"kernel": (4, 3, 2, 2)}, "per_layer": (5, 3)},
                },
                "decoder_norm": {"scale": (4,)},
            },
        },
        ["decoder/decoder_norm/scale", "decoder/layers/pre_self_attention_layer_norm/scale",
         "decoder/layers/self_attention/per_layer"],
    ),
    "big_vision ViT": (
        {
            "cls": (1, 1, 4), "pos_embedding": (1, 9, 4), "embedding": {"kernel": (2, 2, 3, 4), "bias": (4,)},
            "Transformer": {"encoderblock": {"LayerNorm_0": {"scale": (3, 4)}, "MlpBlock_0": {"kernel": (3, 4, 8)}}},
        },
        ["Transformer/encoderblock/LayerNorm_0/scale", "cls", "embedding/bias"],
    ),
    "Hugging Face LLaMA in Flax": (
        {"model": {"layers": {"0": {"input_layernorm": {"weight": (4,)}, "mlp": {"up_proj": {"kernel": (4, 4)}}}}}},
        ["model/layers/0/input_layernorm/weight"],
    ),
    "torch names in one dict": (
        {"layers.0.attention_norm.weight": (4,), "layers.0.wq.weight": (4, 4), "layers.0.q_norm.weight": (2, 2)},
        ["layers.0.attention_norm.weight", "layers.0.q_norm.weight"],
    ),
    "NFNet in Haiku": (
        {"nf_res_block/~/conv0": {"w": (3, 3, 4, 4), "gain": (1, 1, 1, 4), "bias": (4,)}},
        ["nf_res_block/~/conv0/bias", "nf_res_block/~/conv0/gain"],
    ),
    "BatchNorm in Haiku": (
        {"resnet/~/batchnorm": {"scale": (1, 1, 1, 4), "offset": (1, 1, 1, 4)}, "resnet/~/conv": {"w": (3, 3, 1, 4)}},
        ["resnet/~/batchnorm/offset", "resnet/~/batchnorm/scale"],
    ),
    "ConvNeXt and CaiT layer scale": (
        {"stage": {"gamma": (1, 4), "layer_scale": (1, 1, 4), "pwconv": {"kernel": (4, 8)}}, "mask_token": (1, 1, 4)},
        ["mask_token", "stage/gamma", "stage/layer_scale"],
    ),
    "norms under other names, stacked under h": (
        {"h": {key: {"weight": (3, 4)} for key in STACKED_NORMS} | {"norm_proj": {"weight": (3, 4, 8)}}},
        [f"h/{key}/weight" for key in STACKED_NORMS],
    ),
    "biases and gains of two dimensions": ({"x": dict.fromkeys(VECTORS, (2, 3)) | {"bias_table": (4, 2)}},
        [f"x/{name}" for name in VECTORS]),
    "TransformerLens": (
        {"blocks.0": {"attn": {"W_Q": (2, 8, 4), "b_Q": (2, 4), "W_O": (2, 4, 8), "b_O": (8,)}}},
        ["blocks.0/attn/b_O", "blocks.0/attn/b_Q"],
    ),
    "biases beside their weights, stacked under h": (
        {"h": {"wq": (3, 8, 8), "bq": (3, 8), "w_qkv": (3, 8, 9), "b_qkv": (3, 9), "fc_w": (3, 8, 9), "fc_b": (3, 9),
               "w1": (3, 8, 9), "b1": (3, 9), "bv": (3, 8), "norm_proj": (8, 8), "mlp.w": (3, 8, 9), "mlp.b": (3, 9)}},
        [f"h/{name}" for name in ("b1", "b_qkv", "bq", "fc_b", "mlp.b")],
    ),
    "biases of heads, in layers without a stack": (
        {"layers": {"wq": (8, 8, 4), "bq": (8, 4), "norm": {"weight": (8,)}, "lambda": {"kernel": (8, 8)}}},
        ["layers/bq", "layers/norm/weight"],
    ),
    "projections beside norms": (
        {"norm_proj": {"kernel": (8, 4), "bias": (4,)}, "normalizer_proj": (8, 4), "norm": {"proj": {"w": (8, 4)}}},
        ["norm_proj/bias"],
    ),
    "Praxis": ({"x_layers_0": {"linear": {"w": (3, 4, 8)}, "bias": {"b": (3, 8)}}}, ["x_layers_0/bias/b"]),
    "weight normalization": ({"linear": {"v": (4, 8), "g": (4, 1)}}, ["linear/g"]),
    "LoRA": ({"q": {"a": (8, 2), "b": (2, 8)}, "scale": ()}, ["scale"]),
    "nn.scan of blocks": (
        {"blocks": {"norm": {"scale": (3, 4)}, "skip": (3, 4), "attention": {"qkv": {"kernel": (3, 4, 6)}}}},
        ["blocks/norm/scale", "blocks/skip"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("project", PROJECTS)
def test_conventions_of_public_projects(project):
    shapes, expected = PROJECTS[project]
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    undecayed = [jax.tree_util.keystr(path, simple=True, separator="/") for path, flag in mask if not flag]
    assert sorted(undecayed) == sorted(expected)


UNPROVEN = {
    "matrices": {"blocks": {"wq": (8, 8), "wk": (8, 8)}},
    "a bias per head": {"layers": {"w": (8, 8, 4), "bias": (8, 4), "v": (8, 8)}},
    "biases per head": {"layers": {"wq": (8, 8, 4), "bq": (8, 4), "q_bias": (8, 4), "v": (8, 8)}},
    "a scale per head": {"blocks": {"wq": (8, 8), "wk": (8, 8), "q_norm": {"scale": (8, 8)}}},
    "deeper": {"model": {"layers": {"mlp": {"w": (2, 3, 3)}, "gate": (2, 3)}}},
    "one leaf": {"layers": {"w": (4, 4)}},
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_a_matrix_is_never_silently_undecayed(name):
    """Without proof of a stack the error names the leaf and both remedies, which work."""
    params = jax.tree.map(jnp.zeros, UNPROVEN[name], is_leaf=lambda x: isinstance(x, tuple))
    with pytest.raises(ValueError, match=r"may be a matrix, or a vector in each of .* stacked=\(\) if they have none"):
        clipped_adamw(0.1).init(params)
    doubtful = [jnp.ndim(leaf) == 2 for leaf in jax.tree.leaves(params)]
    flat, stacked = (jax.tree.leaves(decay_mask(params, stacked=stacked)) for stacked in ((), ("blocks", "layers")))
    assert all(flag for flag, two in zip(flat, doubtful, strict=True) if two and "per head" not in name)
    assert not any(flag for flag, two in zip(stacked, doubtful, strict=True) if two)
    assert "stacked or not" in decay_report(params, functools.partial(decay_mask, stacked=()))


REPORT = """\
embed/table    1000x8  8,000  decay
layers/kernel  3x8x8     192  decay
layers/scale   3x8        24  -
temperature    scalar      1  -
layers: 3 stacked layers along axis 0
2 parameters of 8,192 numbers decay, 2 of 25 do not"""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["b", "w"], meta_fields=[])
@dataclasses.dataclass
class Callable:
    """Tree with a `__call__`, as modules of Equinox are; its mask has one too."""

    w: object
    b: object

    def __call__(self, x):
        return x @ self.w + self.b


def test_a_mask_that_is_a_tree_may_be_callable():
    params = Callable(w=jnp.ones((2, 3)), b=jnp.ones(3))
    for mask in (decay_mask(params), decay_mask, jax.tree_util.Partial(decay_mask)):
        assert decay_report(params, mask) == decay_report(vars(params), decay_mask(vars(params)))
        assert clipped_adamw(1e-3, mask=mask).init(params)


def test_decay_report():
    params = {"embed": {"table": (1000, 8)}, "layers": {"kernel": (3, 8, 8), "scale": (3, 8)}, "temperature": ()}
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), params, is_leaf=lambda x: isinstance(x, tuple)
    )
    assert decay_report(params, decay_mask) == decay_report(params, decay_mask(params)) == REPORT
    with pytest.raises(ValueError, match="one bool for each parameter"):
        decay_report(params, {"embed": True})
    frozen = jax.tree.map(lambda leaf: leaf.ndim != 3, params)
    *lines, total = decay_report(params, decay_mask, frozen).splitlines()
    assert [line.split()[-1] for line in lines[:4]] == ["frozen", "decay", "frozen", "frozen"]
    assert total == "1 parameters of 192 numbers decay, 0 of 0 do not"


DOUBTS = """\
block/g  4x3    12  decay ?
block/w  4x3x3  36  decay
gamma    1x3     3  - ?
wide     3x4    12  decay
3 parameters of 60 numbers decay, 1 of 3 do not"""


def test_the_report_marks_doubtful_leaves():
    """Size-1 axes, and a leaf of a subtree of stacks under another name."""
    shapes = {"block": {"w": (4, 3, 3), "g": (4, 3)}, "gamma": (1, 3), "wide": (3, 4)}
    report = decay_report(jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple)), decay_mask)
    assert report == DOUBTS
    assert decay_report({}, decay_mask) == "0 parameters of 0 numbers decay, 0 of 0 do not"


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(5, 4)
        return embed.attend(embed(tokens))


def test_tied_embeddings_count_once():
    """One leaf, one decay decision, and a gradient that is the sum of both uses."""
    tokens, model = jnp.array([1, 3]), Tied()
    params = model.init(jax.random.key(0), tokens)["params"]
    assert decay_report(params, decay_mask).endswith("1 parameters of 20 numbers decay, 0 of 0 do not")
    table = params["Embed_0"]["embedding"]
    grads = jax.grad(lambda p: jnp.sum(jnp.square(model.apply({"params": p}, tokens))))(params)
    use_in, use_out = jax.grad(lambda a, b: jnp.sum(jnp.square(a[tokens] @ b.T)), (0, 1))(table, table)
    np.testing.assert_allclose(global_norm(grads), np.linalg.norm(np.float64(use_in) + np.float64(use_out)), rtol=1e-6)


def test_mask_that_does_not_fit():
    params = random_tree(0)
    for mask in ({"dense": True}, lambda p: True):
        with pytest.raises(ValueError, match=r"the decay mask has the structure .* give one bool for each parameter"):
            clipped_adamw(0.1, mask=mask).init(params)
    optimizer = clipped_adamw(0.1, weight_decay=0.5, mask=jax.tree.map(lambda p: p.ndim == 1, params))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert (updates["dense"]["kernel"] == 0).all()
    assert (updates["norm"]["scale"] != 0).all()


@jax.tree_util.register_pytree_node_class
class Named:
    """Array with named axes, a tree without names of its leaves, as Haliax's NamedArray is."""

    def __init__(self, array, axes=()):
        self.array, self.axes = array, axes

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, leaves):
        return cls(*leaves, axes)


def test_a_wrapper_without_names_has_the_name_of_its_field():
    """Haliax 1.3 with Linear and LayerNorm in a Stacked, which failed as blocks/stacked/linear/bias/0."""
    shapes = {"linear": {"weight": (3, 8, 8), "bias": (3, 8)}, "norm": {"weight": (3, 8), "bias": (3, 8)}}
    params = {"blocks": {"stacked": shapes}, "norm": {"weight": (8,)}, "head": {"weight": (8, 16), "bias": (16,)}}
    plain = jax.tree.map(jnp.ones, params, is_leaf=lambda x: isinstance(x, tuple))
    named = jax.tree.map(Named, plain)
    assert jax.tree.leaves(decay_mask(named)) == jax.tree.leaves(decay_mask(plain))
    assert decay_report(named, decay_mask(named)) == decay_report(plain, decay_mask(plain))
    assert decay_mask(named)["blocks"]["stacked"]["linear"]["weight"].array
