#!/usr/bin/env python
"""Time and memory of the loss head, forward and backward: chunked, dense and optax.

Differentiates the mean loss with respect to the hidden states and the kernel. Runs are interleaved, so that a busy
machine slows all forms alike; the time is the median. The memory is the compiler's plan for temporary arrays.
Arguments and results, equal for all forms, are not in it.

  python scripts/bench_loss.py --vocab 50304 128256 --chunk-size 512 1024 2048 --json loss.json
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from benchmark import Table, interleave, parser, report, start_jax

from jaxtrain.losses import cross_entropy, linear_cross_entropy
from jaxtrain.runtime.memory import ARENA_BYTES


def dense(hidden, kernel, labels):
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return cross_entropy(logits, labels).mean()


def with_optax(hidden, kernel, labels):
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def chunked(chunk_size: int) -> Callable:
    return lambda hidden, kernel, labels: linear_cross_entropy(hidden, kernel, labels, chunk_size=chunk_size).mean()


def measure(forms: dict[str, Callable], arguments: tuple[jax.Array, ...], repeats: int) -> list[dict[str, Any]]:
    """Compiles every form, checks that its loss equals that of the first, and times the forms in turn."""
    compiled, losses = {}, {}
    for name, loss in forms.items():
        compiled[name] = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
        losses[name] = float(compiled[name](*arguments)[0])  # also warms up
    first = losses[next(iter(forms))]
    if any(abs(loss - first) > 1e-5 * abs(first) for loss in losses.values()):
        raise SystemExit(f"the forms disagree: {losses}")
    calls = {name: lambda f=function: jax.block_until_ready(f(*arguments)) for name, function in compiled.items()}
    return [
        {
            "form": name,
            "seconds": statistics.median(seconds),
            "all_seconds": seconds,
            "temporary_bytes": compiled[name].memory_analysis().temp_size_in_bytes,
            "loss": losses[name],
        }
        for name, seconds in interleave(calls, repeats).items()
    ]


def bench(vocab: int, options: argparse.Namespace) -> Table:
    """Measures every form for one vocabulary."""
    keys = jax.random.split(jax.random.key(0), 3)
    dtype = jnp.dtype(options.dtype)
    hidden = jax.random.normal(keys[0], (options.tokens, options.d_model), dtype)
    kernel = jax.random.normal(keys[1], (options.d_model, vocab), dtype) * jnp.asarray(options.d_model**-0.5, dtype)
    labels = jax.random.randint(keys[2], (options.tokens,), 0, vocab)
    forms = {"dense": dense, "optax": with_optax}
    forms |= {f"chunk {size}": chunked(size) for size in options.chunk_size}
    rows = measure(forms, (hidden, kernel, labels), options.repeats)
    memory = ", freed memory returned to the system" if options.return_memory else ""
    table = Table(
        f"Loss head: V {vocab:,}, {options.tokens:,} tokens, D {options.d_model}, {dtype.name}{memory}",
        {"form": "", "seconds": ".3f", "GiB": ".3f", "time / dense": ".3f", "memory / dense": ".3f"},
        notes=[f"Median of {options.repeats} interleaved runs, forward and backward; the compiler's temporary memory."],
    )
    for row in rows:
        seconds, size = row["seconds"], row["temporary_bytes"]
        ratios = seconds / rows[0]["seconds"], size / rows[0]["temporary_bytes"]
        table.rows.append([row["form"], seconds, size / 2**30, *ratios])
    return table


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=8192)
    arguments.add_argument("--d-model", type=int, default=512)
    arguments.add_argument("--vocab", type=int, nargs="+", default=[50_304, 128_256])
    arguments.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments.add_argument("--chunk-size", type=int, nargs="+", default=[512, 1024, 2048], help="tokens per chunk")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument(
        "--return-memory",
        action="store_true",
        help="let the C library return freed memory to the system, unlike the commands on a CPU",
    )
    options = arguments.parse_args()
    if not options.return_memory:
        start_jax(4 * max(options.vocab) * options.d_model > ARENA_BYTES)
    report(options, [bench(vocab, options) for vocab in options.vocab])


if __name__ == "__main__":
    main()
