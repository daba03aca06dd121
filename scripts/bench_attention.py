#!/usr/bin/env python
"""Speed of the attention kernels that this machine can run, forward, and forward with backward.

Compares our "xla" kernel, the XLA form of `jax.nn.dot_product_attention`, and the kernel that "auto" chooses on an
accelerator: cudnn on NVIDIA GPUs, splash on TPUs. Outputs and gradients must agree before the kernels are timed. Runs
are interleaved, so that a busy machine slows all kernels alike; the time is the median.

FLOPs count the unmasked scores: two products forward and five backward. A kernel that does not fit in the memory of the
device has no figures.

  python scripts/bench_attention.py --shape 8,2048,16,16,128 2,8192,16,16,128 --dtype bfloat16 --json attention.json
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from benchmark import Table, interleave, parser, report, start_jax

from jaxtrain.models.kernels import cudnn
from jaxtrain.models.kernels.attention import attend, choose_kernel


class Shape(NamedTuple):
    """Rows, tokens, query heads, key and value heads, channels per head; `B,T,H,G,K` on the command line."""

    rows: int
    tokens: int
    heads: int
    groups: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        sizes = text.split(",")
        if len(sizes) != 5 or not all(size.isdecimal() and int(size) for size in sizes):
            raise argparse.ArgumentTypeError(f"got {text}: a shape is B,T,H,G,K, such as 8,2048,16,16,128")
        return cls(*map(int, sizes))


SMALL = ["1,256,8,8,64", "1,512,8,2,64"]  # for a CPU
LARGE = ["32,4096,32,8,128", "8,2048,16,16,128", "8,2048,32,32,64", "16,1024,32,32,64", "2,8192,16,16,128"]
Form = Callable[..., jax.Array]


def forms_for(shape: Shape, dtype: jnp.dtype, window: int | None, num_segments: int | None) -> dict[str, Form]:
    """Returns the kernels that this machine can run; ours by XLA is first. With segments: the kernels that take them.

    The fastest kernel without segments is then last, to show what they cost.
    """
    device = jax.devices()[0]
    capability = cudnn.capability(device)
    fastest = choose_kernel("auto", device.platform, dtype, shape.tokens, shape.width, capability=capability)
    forms = {"xla": functools.partial(attend, kernel="xla", window=window)}
    if device.platform != "cpu" or dtype == jnp.float32:  # uses 16-bit products that CPUs lack
        local = (window - 1, 0) if window else None
        forms["jax.nn xla"] = functools.partial(
            jax.nn.dot_product_attention, is_causal=True, local_window_size=local, implementation="xla"
        )
    plain = forms | {fastest: functools.partial(attend, kernel=fastest, window=window)}
    if num_segments is None:
        return plain
    ids = jnp.broadcast_to(jnp.arange(shape.tokens) * num_segments // shape.tokens, (shape.rows, shape.tokens))
    serving = {
        "xla",
        choose_kernel("auto", device.platform, dtype, shape.tokens, shape.width, segments=True, capability=capability),
    }
    forms = {
        name: functools.partial(attend, kernel=name, window=window, segment_ids=ids) for name in sorted(serving)[::-1]
    }
    return forms | {f"{fastest}, one segment": plain[fastest]}


def compile_both(form: Form, arguments: tuple[jax.Array, ...]) -> tuple[Form, Form] | None:
    """Compiles forward, and forward with backward. Returns None if they do not fit in the memory of the device."""

    def both(query, key, value, cotangent):
        output, pullback = jax.vjp(form, query, key, value)
        return output, *pullback(cotangent)

    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))
    try:
        compiled = jax.jit(form).lower(*arguments[:3]).compile(), jax.jit(both).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    memory = compiled[1].memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return compiled if needed < limit else None


def check(compiled: dict[str, tuple[Form, Form]], arguments: tuple[jax.Array, ...], tolerance: float) -> None:
    """Ends the program if the output or a gradient of a kernel differs from that of the first; also warms up."""
    first = None
    for name, (forward, both) in compiled.items():
        if name.endswith("one segment"):  # another result
            continue
        jax.block_until_ready(forward(*arguments[:3]))
        results = [np.asarray(leaf, np.float32) for leaf in both(*arguments)]
        first = first or results
        worst = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(results, first, strict=True))
        if not worst <= tolerance:
            raise SystemExit(f"{name} differs from {next(iter(compiled))} by {worst:.2g} of the largest value")


def bench(shape: Shape, options: argparse.Namespace) -> Table:
    """Measures every kernel for one shape."""
    dtype = jnp.dtype(options.dtype)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (shape.heads, shape.groups, shape.groups, shape.heads)  # queries, keys, values, cotangent
    arguments = tuple(
        jax.random.normal(key, (shape.rows, shape.tokens, n, shape.width), dtype)
        for key, n in zip(keys, heads, strict=True)
    )
    forms = forms_for(shape, dtype, options.window, options.segments)
    tried = {name: compile_both(form, arguments) for name, form in forms.items()}
    compiled = {name: pair for name, pair in tried.items() if pair}
    exact = dtype == jnp.float32 and jax.devices()[0].platform == "cpu"  # accelerators round products
    check(compiled, arguments, 1e-5 if exact else 2**-6)

    def time(which: int, inputs: tuple[jax.Array, ...]) -> dict[str, float]:
        calls = {name: lambda f=pair[which]: jax.block_until_ready(f(*inputs)) for name, pair in compiled.items()}
        return {name: statistics.median(s) for name, s in interleave(calls, options.repeats).items()}

    window = min(options.window or shape.tokens, shape.tokens)
    seen = shape.rows * shape.heads * (shape.tokens * window - window * (window - 1) // 2)
    flops = 4 * seen * shape.width
    table = Table(
        f"Attention: B {shape.rows}, T {shape.tokens:,}, H {shape.heads}/{shape.groups}, K {shape.width}, {dtype.name}"
        + (f", window {options.window}" if options.window else "")
        + (f", {options.segments} segments" if options.segments else ""),
        {"kernel": "", "forward ms": ".3f", "forward TFLOP/s": ".3f", "forward / xla": ".3f"}
        | {"both ms": ".3f", "both TFLOP/s": ".3f", "both / xla": ".3f"},
        notes=[f"Median of {options.repeats} interleaved runs; both: with backward, 3.5 times the FLOPs of forward."],
    )
    measured = [(1, time(0, arguments[:3])), (3.5, time(1, arguments))]
    for name in forms:
        row = [name]
        for factor, seconds in measured:
            own, first = seconds.get(name), seconds.get("xla")
            row += [own and 1e3 * own, own and factor * flops / own / 1e12, own and first and own / first]
        table.rows.append(row)
    return table


def main() -> None:
    on_cpu = start_jax() == "cpu"
    arguments = parser(__doc__)
    arguments.add_argument("--shape", type=Shape.parse, nargs="+", help="B,T,H,G,K: rows, tokens, heads, groups, width")
    arguments.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32" if on_cpu else "bfloat16"
    )
    arguments.add_argument("--window", type=int, help="number of newest keys that a query attends to; default: all")
    arguments.add_argument("--segments", type=int, help="equal segments of a row that attention keeps apart")
    arguments.add_argument("--repeats", type=int, default=7)
    options = arguments.parse_args()
    options.shape = options.shape or [Shape.parse(text) for text in (SMALL if on_cpu else LARGE)]
    report(options, [bench(shape, options) for shape in options.shape])


if __name__ == "__main__":
    main()
