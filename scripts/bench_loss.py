#!/usr/bin/env python
"""Time and memory of the loss head, forward and backward: chunked against dense and against optax.

The gradients are those of the mean loss with respect to the hidden states and the kernel. Runs are interleaved (one of
each form, then again), so that a busy machine slows all alike; the time is the median. The memory is what the compiler
plans for temporary arrays: arguments and results, the same for all forms, are not in it.

  python scripts/bench_loss.py --vocab 50304 128256 --chunk-size 512 1024 2048 --json loss.json
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain.losses import cross_entropy, linear_cross_entropy


def dense(hidden, kernel, labels):
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return cross_entropy(logits, labels).mean()


def with_optax(hidden, kernel, labels):
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def chunked(chunk_size: int) -> Callable:
    return lambda hidden, kernel, labels: linear_cross_entropy(hidden, kernel, labels, chunk_size=chunk_size).mean()


def measure(forms: dict[str, Callable], arguments: tuple[jax.Array, ...], repeats: int) -> list[dict[str, Any]]:
    """Compiles every form, checks that they agree, and times them in turn; the first form is the one compared with."""
    compiled, losses = {}, {}
    for name, loss in forms.items():
        compiled[name] = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
        losses[name] = float(compiled[name](*arguments)[0])  # also warms up
    first = losses[next(iter(forms))]
    if any(abs(loss - first) > 1e-5 * abs(first) for loss in losses.values()):
        raise SystemExit(f"the forms disagree: {losses}")
    seconds = {name: [] for name in forms}
    for _ in range(repeats):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds[name].append(time.perf_counter() - start)
    return [
        {
            "form": name,
            "seconds": statistics.median(seconds[name]),
            "all_seconds": seconds[name],
            "temporary_bytes": compiled[name].memory_analysis().temp_size_in_bytes,
            "loss": losses[name],
        }
        for name in forms
    ]


def bench(vocab: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all forms for one vocabulary and prints their table."""
    keys = jax.random.split(jax.random.key(0), 3)
    dtype = jnp.dtype(options.dtype)
    hidden = jax.random.normal(keys[0], (options.tokens, options.d_model), dtype)
    kernel = jax.random.normal(keys[1], (options.d_model, vocab), dtype) * jnp.asarray(options.d_model**-0.5, dtype)
    labels = jax.random.randint(keys[2], (options.tokens,), 0, vocab)
    forms = {"dense": dense, "optax": with_optax}
    forms |= {f"chunk {size}": chunked(size) for size in options.chunk_size}
    rows = measure(forms, (hidden, kernel, labels), options.repeats)
    print(f"\nV {vocab:,}   tokens {options.tokens:,}   D {options.d_model}   {dtype.name}   repeats {options.repeats}")
    print(f"{'form':<12}{'seconds':>10}{'GiB':>10}{'time/dense':>13}{'memory/dense':>14}")
    for row in rows:
        row |= {"vocab": vocab, "time_ratio": row["seconds"] / rows[0]["seconds"]}
        row["memory_ratio"] = row["temporary_bytes"] / rows[0]["temporary_bytes"]
        size = row["temporary_bytes"] / 2**30
        ratios = f"{row['time_ratio']:>13.3f}{row['memory_ratio']:>14.3f}"
        print(f"{row['form']:<12}{row['seconds']:>10.3f}{size:>10.3f}{ratios}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--vocab", type=int, nargs="+", default=[50_304, 128_256])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--chunk-size", type=int, nargs="+", default=[512, 1024, 2048], help="tokens a chunk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures, versions, device and command here")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}")
    rows = [row for vocab in options.vocab for row in bench(vocab, options)]
    if options.json:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "device": {
                "kind": device.device_kind,
                "platform": device.platform,
                "machine": platform.machine(),
                "cpus": os.cpu_count(),
            },
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "jaxtrain")},
            "tokens": options.tokens,
            "d_model": options.d_model,
            "dtype": options.dtype,
            "repeats": options.repeats,
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
