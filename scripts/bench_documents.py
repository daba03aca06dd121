#!/usr/bin/env python
"""Loss and speed of a model that keeps the documents of a row apart, beside one that does not.

Trains a config on short documents, the functions and classes of Python's standard library, four times: on windows of
the concatenated text, with documents masked, with positions that restart too, and with best-fit packing. All forms have
the same number of steps and of tokens per step, padding included. Each model is evaluated on the same held-out text in
both ways: with each document alone, as it is used later, and behind its neighbours.

  python scripts/bench_documents.py configs/quickstart.py --train.steps 300 --json documents.json
"""

import contextlib
import dataclasses
import json
import os
import re
import statistics
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import jax
from benchmark import Table, interleave, parser, report, start_jax

from jaxtrain.config import Config
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.store import TokenStore
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.flags import parse_config
from jaxtrain.training.batches import batch_source
from jaxtrain.training.evaluation import evaluate_split
from jaxtrain.training.run import assemble, open_run, restore_run_params
from jaxtrain.training.train import train

MASKED = {"mask_documents": True}
FORMS: dict[str, dict[str, Any]] = {
    "concatenated": {},
    "masked": MASKED,
    "masked, positions restart": MASKED | {"restart_positions": True},
    "best fit": MASKED | {"restart_positions": True, "packing": "best_fit"},
}


def write_corpus(file: Path, limit: int) -> None:
    """Writes the functions and classes of the standard library as JSON lines, about `limit` bytes."""
    size = 0
    with file.open("w") as stream:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            for part in re.split(r"\n(?= *(?:def|class|async def) )", path.read_text("utf-8", "ignore")):
                stream.write(json.dumps({"text": part.strip() + "\n"}) + "\n")
                size += len(part)
            if size > limit:
                return


def with_form(config: Config, name: str) -> Config:
    """Returns the config of one form."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **FORMS[name]))


def measure(config: Config, folder: Path, name: str) -> list[Any]:
    """Trains one form; returns its losses and its share of padding."""
    run_dir = folder / name.replace(" ", "_")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train(with_form(config, name), run_dir)
    lines, _ = read_metrics(run_dir / "metrics.jsonl")
    run = open_run(run_dir)
    params, _ = restore_run_params(run)
    nll = []
    for rule in (MASKED, {"mask_documents": False, "restart_positions": False, "packing": "concatenate"}):
        data = dataclasses.replace(run.config.data, **rule)
        model = dataclasses.replace(run.config.model, attention="xla")  # serves both
        one = assemble(dataclasses.replace(run.config, data=data, model=model), run_dir, run.store)
        nll.append(evaluate_split(one, params, run.store.validation)["nll"])
    return [*nll, 100 * statistics.mean(line.get("padding_share", 0.0) for line in lines)]


def time_steps(config: Config, store: TokenStore, repeats: int) -> dict[str, float]:
    """Returns the median seconds of a train step of each form; the forms take turns."""
    forms = {}
    for name in FORMS:
        run = assemble(with_form(config, name), store.path, store)
        state, batch = run.program.init_state(), batch_source(run)(0)
        step = run.program.train_step.lower(state, batch).compile()

        def run_step(step=step, batch=batch, states=[state]):  # noqa: B006 - holds the donated state
            states[0], metrics = step(states[0], batch)
            jax.block_until_ready((states[0], metrics))

        run_step()
        forms[name] = run_step
    return {name: statistics.median(seconds) for name, seconds in interleave(forms, repeats).items()}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("config", help="config file, and flags that change it")
    arguments.add_argument("--bytes", type=int, default=8_000_000, help="size of the corpus")
    arguments.add_argument("--repeats", type=int, default=30, help="timed steps")
    options, flags = arguments.parse_known_args()
    start_jax()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", options.bytes)
        store = prepare([str(folder / "corpus.jsonl")], folder / "store", validation_fraction=0.05, progress=False)
        config = parse_config([options.config, *flags, "--data.store", str(store.path)])
        seconds = time_steps(config, store, options.repeats)
        first = next(iter(seconds.values()))
        rows = [[name, *measure(config, folder, name), 1e3 * seconds[name], seconds[name] / first] for name in FORMS]
    split, settings = store.train, config.train
    table = Table(
        f"Documents kept apart: {settings.steps:,} steps of {settings.batch_size} x {settings.seq_len} tokens, "
        f"{split.num_tokens / split.num_documents:.0f} tokens per document",
        {"": "", "nll, documents alone": ".4f", "nll, concatenated": ".4f", "padding %": ".2f", "ms / step": ".2f"}
        | {"/ concatenated": ".3f"},
        rows,
        [f"Nats per token; {settings.precision}. Times are medians of {options.repeats} interleaved steps."],
    )
    options.config = " ".join([options.config, *flags])
    report(options, [table])


if __name__ == "__main__":
    main()
