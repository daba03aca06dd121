"""cuDNN's attention against plain attention, and the calls of cuDNN in a program lowered for a GPU.

On an NVIDIA GPU (`JAX_PLATFORMS=cuda scripts/test -k cudnn`) the first tests run cuDNN. Elsewhere they run the XLA form
of the same call of `jax.nn.dot_product_attention`, which tests our causality, window, scale and groups but not cuDNN.
Lowering for a GPU needs no GPU, only a version of cuDNN: these tests run on every machine.
"""

import functools
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import distance, inputs, output_and_gradients, run
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import PartitionSpec as P

from jaxtrain.config import Config, DataConfig, MeshConfig, TrainConfig, llama
from jaxtrain.models.kernels import cudnn
from jaxtrain.models.kernels.attention import attend
from jaxtrain.runtime.mesh import make_mesh
from jaxtrain.training import program


def an_nvidia_gpu():
    capability = cudnn.capability(jax.local_devices()[0])
    return capability is not None and capability >= cudnn.AMPERE


@pytest.fixture
def gpu_or_xla(monkeypatch):
    """Replaces cuDNN by the XLA form of the same call, unless there is an NVIDIA GPU."""
    if not an_nvidia_gpu():
        plain = jax.nn.dot_product_attention

        def attention(*arrays, implementation, **options):
            # In float32: CPUs have not the products of 16 bits that it asks for.
            wide = (x.astype(jnp.float32) for x in arrays)
            with jax.numpy_dtype_promotion("standard"):
                return plain(*wide, implementation="xla", **options).astype(arrays[0].dtype)

        monkeypatch.setattr(cudnn, "capability", lambda device: cudnn.HOPPER)
        monkeypatch.setattr(jax.nn, "dot_product_attention", attention)


@pytest.mark.parametrize(("dtype", "window"), [(jnp.bfloat16, None), (jnp.bfloat16, 1), (jnp.float16, 17)])
@pytest.mark.parametrize(("num_groups", "width", "length"), [(4, 64, 128), (2, 64, 128), (1, 128, 72)])
@pytest.mark.usefixtures("gpu_or_xla")
def test_kernel_agrees_with_float64(num_groups, width, length, window, dtype):
    """Output and gradients within 2^-6 of the largest number: inputs, weights, their gradient and the results are
    rounded to 2^-9 in bfloat16 (less in float16), and the largest is a few times the usual."""
    arguments = inputs(length, 4, num_groups, width=width, dtype=dtype)
    actual = run(functools.partial(attend, kernel="cudnn", window=window), *arguments)
    assert all(leaf.dtype == dtype for leaf in actual)
    expected = output_and_gradients(*arguments, window=window)
    if window == 1:  # one key has all the weight, and no gradient comes of its score
        assert max(np.abs(np.asarray(leaf, np.float32)).max() for leaf in actual[1:3]) < 2**-6
        actual, expected = (actual[0], actual[3]), (expected[0], expected[3])
    assert distance(actual, expected) < 2**-6


@pytest.mark.usefixtures("gpu_or_xla")
def test_a_query_sees_no_later_key():
    query, key, value, _ = inputs(128, 4, 2, width=64, dtype=jnp.bfloat16)
    attention = jax.jit(functools.partial(attend, kernel="cudnn"))
    before = attention(query, key, value)
    after = attention(query, *(np.concatenate([x[:, :50], 1 + x[:, 50:]], axis=1) for x in (key, value)))
    np.testing.assert_array_equal(before[:, :50], after[:, :50])
    assert (before[:, 50:] != after[:, 50:]).any(axis=(0, 2, 3)).all()


@pytest.mark.parametrize(("window", "local"), [(None, None), (1, (0, 0)), (40, (39, 0)), (128, None)])
def test_the_call_passes_the_arguments(monkeypatch, window, local):
    calls = []
    monkeypatch.setattr(cudnn, "capability", lambda device: cudnn.AMPERE)
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *arrays, **options: calls.append((arrays, options)) or arrays[0]
    )
    query, key, value, _ = inputs(128, 4, 2, width=64, dtype=jnp.bfloat16)
    attend(query, key, value, window=window, kernel="cudnn")
    ((arrays, options),) = calls
    assert all(a is b for a, b in zip(arrays, (query, key, value), strict=True))
    assert options == {"scale": 0.125, "is_causal": True, "local_window_size": local, "implementation": "cudnn"}


@pytest.fixture
def lowers_for_cuda(monkeypatch):
    """Lowers for GPUs on any machine: states the version of cuDNN, which JAX reads from the library of a GPU."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "capability", lambda device: cudnn.AMPERE)


@pytest.fixture
def eight_devices():
    """Skips the test on a machine with fewer GPUs; the CPU simulates eight devices."""
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, and there are {jax.device_count()}: run it without JAX_PLATFORMS=cuda")


def cudnn_calls(traced):
    """Names of the calls of cuDNN in a program lowered for a GPU, each with its settings."""
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r'@__cudnn\$(\w+)\(.*backend_config = "(.*?)"[,}]', text)
    settings = [json.loads(config.replace(r"\22", '"'))["cudnn_fmha_backend_config"] for _, config in found]
    return [(name, given) for (name, _), given in zip(found, settings, strict=True)], text


FORWARD, BACKWARD = "fmhaSoftmax", "fmhaSoftmaxBackward"  # without Bias: no mask is made


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.usefixtures("lowers_for_cuda", "eight_devices")
def test_kernel_lowers_for_a_gpu(window):
    """Sharded rows and heads in `shard_map`: one call forward, one backward, and no scores [T, T]."""
    query, key = (jax.ShapeDtypeStruct((8, 1024, n, 64), jnp.bfloat16) for n in (4, 2))
    heads = P(("data", "fsdp"), None, "tensor")
    mapped = jax.shard_map(
        functools.partial(attend, window=window, kernel="cudnn"),
        mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)),
        in_specs=(heads, heads, heads),
        out_specs=heads,
        check_vma=False,
    )
    loss = lambda *qkv: jnp.sum(mapped(*qkv).astype(jnp.float32))  # noqa: E731
    calls, text = cudnn_calls(jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key))
    assert [name for name, _ in calls] == [FORWARD, BACKWARD]
    for _, given in calls:
        assert given["mask_type"] == "CAUSAL"
        assert given["sliding_window_length"] == (window or 0)
        assert given["fmha_scale"] == 0.125
    assert "1024x1024" not in text


def program_of(sizes, remat="none", **model):
    # With the loop over layers there is one of each call, however many layers.
    model = llama(2, 4, 64, 96, 256, num_kv_heads=2, vocab_multiple=8, remat=remat, scan_unroll=1, **model)
    config = Config(
        data=DataConfig(store="unused"),
        model=model,
        train=TrainConfig(batch_size=8, seq_len=256, precision="bfloat16"),
        mesh=MeshConfig(*sizes),
    )
    return program.make_program(config, make_mesh(config.mesh), 257)


@pytest.mark.parametrize(
    ("sizes", "remat"), [((1, 1, 1), "none"), ((1, 1, 1), "full"), ((2, 2, 2), "minimal"), ((2, 2, 2), "full")]
)
@pytest.mark.usefixtures("lowers_for_cuda", "eight_devices")
def test_the_whole_train_step_lowers_for_a_gpu(sizes, remat):
    """The backward pass recomputes attention only under full rematerialization."""
    made = program_of(sizes, remat, attention="cudnn", attention_window=100)
    calls, text = cudnn_calls(made.train_step.trace(made.abstract_state, made.abstract_batch))
    assert sorted(name for name, _ in calls) == [FORWARD] * (2 if remat == "full" else 1) + [BACKWARD]
    assert all(given["sliding_window_length"] == 100 for _, given in calls)
    assert "256x256xf32" not in text


def test_a_program_that_names_it_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(cudnn, "capability", lambda device: None)
    with pytest.raises(ValueError, match=r'"cudnn" needs an NVIDIA GPU .* and there is none: use "xla"'):
        program_of((1, 1, 1), attention="cudnn")


@pytest.mark.parametrize(
    ("platform", "name", "capability"),
    [
        ("gpu", "8.0", (8, 0)),
        ("gpu", "12.1", (12, 1)),
        ("gpu", "gfx942", None),
        ("gpu", None, None),
        ("cpu", "9.0", None),
    ],
)
def test_the_capability_is_that_of_nvidia_gpus(platform, name, capability):
    assert cudnn.capability(SimpleNamespace(platform=platform, compute_capability=name)) == capability


def test_a_program_chooses_the_kernel_on_gpus(monkeypatch):
    """Devices, precision and model decide what `auto` means."""
    monkeypatch.setattr(cudnn, "capability", lambda device: cudnn.HOPPER)
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))

    def kernel(precision="bfloat16", **fields):
        config = Config(
            data=DataConfig(store="unused"),
            model=llama(1, 2, 64, 96, 256, **fields),
            train=TrainConfig(precision=precision),
        )
        return program._kernel(config, mesh)

    assert kernel() == "cudnn"
    assert kernel("float32") == kernel(attention_softcap=9.0) == kernel(head_dim=36) == "xla"
    assert kernel(attention_window=9, head_dim=256) == "cudnn"
