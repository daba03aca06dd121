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

from benchmark import Table, parser, report

from jaxtrain.config import Config
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.flags import parse_config
from jaxtrain.training.evaluation import evaluate_split
from jaxtrain.training.run import assemble, open_run, restore_params
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


def measure(config: Config, folder: Path, name: str) -> list[Any]:
    """Trains one form; returns its row of the table."""
    run_dir = folder / name.replace(" ", "_")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **FORMS[name]))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train(config, run_dir)
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl")[0] if line["step"] > config.train.log_every]
    run = open_run(run_dir)
    params, _ = restore_params(run)
    nll = []
    for rule in (MASKED, {"mask_documents": False, "restart_positions": False, "packing": "concatenate"}):
        data = dataclasses.replace(run.config.data, **rule)
        model = dataclasses.replace(run.config.model, attention="xla")  # serves both
        one = assemble(dataclasses.replace(run.config, data=data, model=model), run_dir, run.store)
        nll.append(evaluate_split(one, params, run.store.validation)["nll"])
    padding = statistics.mean(line.get("padding_share", 0.0) for line in lines)
    return [name, *nll, 100 * padding, 1e3 * statistics.median(line["step_seconds"] for line in lines)]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("config", help="config file, and flags that change it")
    arguments.add_argument("--bytes", type=int, default=8_000_000, help="size of the corpus")
    options, flags = arguments.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", options.bytes)
        store = prepare([str(folder / "corpus.jsonl")], folder / "store", validation_fraction=0.05, progress=False)
        config = parse_config([options.config, *flags, "--data.store", str(store.path)])
        rows = [measure(config, folder, form) for form in FORMS]
    split, settings = store.train, config.train
    table = Table(
        f"Documents kept apart: {settings.steps:,} steps of {settings.batch_size} x {settings.seq_len} tokens, "
        f"{split.num_tokens / split.num_documents:.0f} tokens per document",
        {"": "", "nll, documents alone": ".4f", "nll, concatenated": ".4f", "padding %": ".2f", "ms / step": ".2f"}
        | {"/ concatenated": ".3f"},
        [[*row, row[-1] / rows[0][-1]] for row in rows],
        [f"Nats per token; {settings.precision}. Time of the logged steps, median; the forms ran one after the other."],
    )
    options.config = " ".join([options.config, *flags])
    report(options, [table])


if __name__ == "__main__":
    main()
