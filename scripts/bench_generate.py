#!/usr/bin/env python
"""Speed of generation: prompts of different lengths in one batch, beside the same prompts one by one.

The parameters are random, and every row gets the full number of tokens. Compilation is not counted.

  python scripts/bench_generate.py --models 6x384 12x768 --json generate.json
"""

import argparse
import functools
import statistics
from typing import Any

import jax
import numpy as np
from benchmark import Table, interleave, parser, report, start_jax

from jaxtrain.config import llama
from jaxtrain.models.decode import Sampling, Timing, generate
from jaxtrain.models.model import TransformerModel


def make_model(name: str, max_seq_len: int) -> tuple[TransformerModel, Any]:
    """Returns a byte-level model of LAYERSxCHANNELS, and random parameters."""
    layers, width = (int(part) for part in name.split("x"))
    config = llama(layers, width // 32, width, 3 * width, max_seq_len, vocab_size=257)
    model = TransformerModel(config)
    return model, jax.jit(model.init)(jax.random.key(0))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=["6x384", "12x768"], metavar="LAYERSxCHANNELS")
    arguments.add_argument("--batch-size", type=int, default=8)
    arguments.add_argument("--prompt", type=int, default=128, help="tokens of the longest prompt")
    arguments.add_argument("--num-tokens", type=int, default=32)
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    start_jax()
    table = Table(
        f"Generation: prompts of up to {options.prompt} tokens, {options.num_tokens} new tokens each",
        {"model": "", "form": "", "prefill tokens/s": ",.0f", "decode tokens/s": ",.0f", "decode / one by one": ".2f"},
        notes=[f"Medians of {options.repeats} interleaved runs; byte-level Llamas, float32, temperature 0.8."],
    )
    for name in options.models:
        table.rows += bench(name, options)
    report(options, [table])


def bench(name: str, options: argparse.Namespace) -> list[list[Any]]:
    """Measures one model."""
    model, params = make_model(name, 2 * options.prompt)
    lengths = np.linspace(options.prompt // 4, options.prompt, options.batch_size).astype(int)
    prompts = [np.random.default_rng(row).integers(0, 256, length) for row, length in enumerate(lengths)]
    batches = {"one by one": [[prompt] for prompt in prompts], f"batch of {options.batch_size}": [prompts]}
    timings: dict[str, list[Timing]] = {form: [] for form in batches}

    def run(form: str) -> None:
        timings[form].append(Timing())
        for batch in batches[form]:
            generate(model, params, batch, options.num_tokens, sampling=Sampling(0.8), timing=timings[form][-1])

    interleave({form: functools.partial(run, form) for form in batches}, 1 + options.repeats)
    rows = []
    for form, found in timings.items():
        prefill = statistics.median(timing.prompt_tokens / timing.prompt_seconds for timing in found[1:])
        decode = statistics.median(timing.new_tokens / timing.new_seconds for timing in found[1:])
        rows.append([name, form, prefill, decode, decode / (rows[0][3] if rows else decode)])
    return rows


if __name__ == "__main__":
    main()
