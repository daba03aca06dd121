"""Memory of import and export: the host holds one tensor at a time beside the parameters on the devices."""

import json

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, run_python, user_environment

from jaxtrain.config import family
from jaxtrain.models.hf import read, write
from jaxtrain.models.hf.read import PretrainedFolder, abstract_params

SIZES = {"num_layers": 6, "num_heads": 4, "d_model": 64, "d_ff": 192, "max_seq_len": 16, "vocab_size": 400}


def test_no_more_than_a_tensor_lies_beside_the_parameters(tmp_path, monkeypatch):
    config = family("llama", **SIZES)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract_params(config))
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(like))
    largest = 400 * 64 * 4
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), like)
    others = sum(array.nbytes for array in jax.live_arrays()) - total
    seen = []

    def watched(function):
        def call(*arguments):
            result = function(*arguments)
            seen.append(sum(array.nbytes for array in jax.live_arrays()) - others)
            return result

        return call

    monkeypatch.setattr(write, "_assemble", watched(write._assemble))
    write.write_model(tmp_path, config, params)
    assert len(seen) == 6 * 9 + 3
    assert total < max(seen) <= total + largest
    del params
    seen.clear()
    monkeypatch.setattr(read, "_read_piece", watched(read._read_piece))
    PretrainedFolder(tmp_path).read_params(like)
    assert len(seen) == 6 * 9 + 3
    assert max(seen) <= total + largest


MEASURE = """
import json, sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
from jaxtrain.config import family
from jaxtrain.models.hf.read import PretrainedFolder, abstract_params
from jaxtrain.models.hf.write import write_model

folder = Path(FOLDER)
config = family("llama", num_layers=8, num_heads=16, d_model=2048, d_ff=8192, max_seq_len=2048, vocab_size=40_000)
device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract_params(config))
sizes = {"parameters": sum(leaf.size * 4 for leaf in jax.tree.leaves(like)), "largest": 40_000 * 2048 * 4}

def anonymous():  # without the pages of mapped files, which the system takes back when it needs them
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def peak(function):
    before, highest, done = anonymous(), 0, threading.Event()
    def watch():
        nonlocal highest
        while not done.is_set():
            highest = max(highest, anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    result = jax.block_until_ready(function())
    done.set()
    thread.join()
    return result, highest - before

params = jax.block_until_ready(jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), like))
_, sizes["export"] = peak(lambda: write_model(folder, config, params, dtype=DTYPE, shard_bytes=10**9))
del params
_, sizes["import"] = peak(lambda: PretrainedFolder(folder).read_params(like))
print(json.dumps(sizes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_holds_less_than_two_tensors_of_a_model_of_three_gigabytes(dtype, tmp_path):
    code = MEASURE.replace("FOLDER", repr(str(tmp_path))).replace("DTYPE", repr(dtype))
    sizes = json.loads(run_python(code, environment=user_environment(PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")))
    print(sizes)
    assert sizes["parameters"] > 2.7e9
    assert sizes["export"] < 2 * sizes["largest"]
    assert sizes["import"] - sizes["parameters"] < 2 * sizes["largest"]
