#!/usr/bin/env python
"""Takes one gear out at a time and trains: cross-entropy, AdamW, the learning-rate schedule, gradient clipping.

A byte-level transformer of two layers learns the Python standard library's source. Each form is trained with several
seeds (initialization and batches), side by side under `jax.vmap`, with the functions that any project can import. The
measure is bits per byte on the held-out tenth.

  python scripts/four_gears.py                      # all forms, 3 seeds; writes docs/four_gears/ and the page's tables
  python scripts/four_gears.py --steps 60 --only adamw sgd --out /tmp/gears
"""

import argparse
import dataclasses
import json
import math
import re
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmark import PACKAGES, Table, device, versions

from jaxtrain.clipping import zclip
from jaxtrain.config import Config, DataConfig, OptimConfig, TrainConfig, llama
from jaxtrain.guard import skip_bad_steps
from jaxtrain.losses import LossSums, cross_entropy
from jaxtrain.models.model import TransformerModel
from jaxtrain.monitoring.health import Health
from jaxtrain.monitoring.rule import RunFacts
from jaxtrain.optim import clipped_adamw, decay_mask
from jaxtrain.schedules import warmup_constant, warmup_cosine, warmup_linear, warmup_stable_decay
from jaxtrain.step import TrainState, make_train_step

ROOT = Path(__file__).resolve().parent.parent
VOCAB, LENGTH, ROWS = 256, 64, 16
PEAK, WARMUP_SHARE, CORRUPT_EVERY = 4e-3, 0.1, 40
MODEL = TransformerModel(
    llama(num_layers=2, num_heads=4, d_model=64, d_ff=192, max_seq_len=LENGTH, vocab_size=VOCAB, attention="xla")
)
Form = dict[str, Any]


def squared_error(params: Any, batch: dict[str, jax.Array]) -> LossSums:
    """Returns the squared error of the softmax against the one-hot label, in the place of the nll."""
    probabilities = jax.nn.softmax(MODEL.logits(params, batch["inputs"]), axis=-1)
    errors = jnp.sum((probabilities - jax.nn.one_hot(batch["labels"], VOCAB)) ** 2, axis=-1)
    sums = MODEL.loss(params, batch)
    return dataclasses.replace(sums, nll=jnp.sum(jnp.where(batch["where"], errors, 0.0)))


def adamw(steps: int, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Returns the full recipe, with changes."""
    rate = options.pop("rate", None) or warmup_cosine(PEAK, steps, _warmup(steps))
    return clipped_adamw(rate, **{"weight_decay": 0.1, "clip_norm": 1.0} | options)


def with_l2(steps: int) -> optax.GradientTransformation:
    """Adam whose gradient holds the decay (L2), which its second moment then divides away."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(0.1, decay_mask),
        optax.adam(warmup_cosine(PEAK, steps, _warmup(steps)), 0.9, 0.95),
    )


def sgd(steps: int, peak: float) -> optax.GradientTransformation:
    """Momentum, with the same schedule and clipping."""
    rate = warmup_cosine(peak, steps, _warmup(steps))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate, momentum=0.9))


def _warmup(steps: int) -> int:
    return max(round(WARMUP_SHARE * steps), 1)


def forms(steps: int) -> dict[str, Form]:
    """Returns the forms by name: the gear that differs, a label, the optimizer, and what else differs."""
    warmup, edge = _warmup(steps), warmup_cosine(10 * PEAK, steps, _warmup(steps))
    clips: dict[str, Callable[..., Any]] = {
        "none": lambda **o: adamw(steps, clip_norm=None, **o),
        "1.0": lambda **o: adamw(steps, **o),
        "zclip": lambda **o: adamw(steps, clip=zclip(), **o),
        "skip": lambda **o: skip_bad_steps(adamw(steps, **o), clip_norm=1.0, window=32),
    }
    table = {
        "adamw": ("all", "the full recipe", adamw(steps)),
        "mse": ("cross-entropy", "squared error of the softmax", adamw(steps), squared_error),
        "sgd": ("AdamW", "SGD, momentum 0.9, lr 0.3", sgd(steps, 0.3)),
        "sgd low": ("AdamW", "SGD, momentum 0.9, lr 0.1", sgd(steps, 0.1)),
        "sgd high": ("AdamW", "SGD, momentum 0.9, lr 1", sgd(steps, 1.0)),
        "l2": ("AdamW", "Adam with L2 in the gradient", with_l2(steps)),
        "decay all": ("AdamW", "decay on everything", adamw(steps, mask=lambda p: jax.tree.map(lambda _: True, p))),
        "decay none": ("AdamW", "no decay", adamw(steps, weight_decay=0.0)),
        "b2": ("AdamW", "b2 0.999", adamw(steps, b2=0.999)),
        "no warmup": ("schedule", "no warm-up", adamw(steps, rate=warmup_cosine(PEAK, steps, 0))),
        "constant": ("schedule", "no decay of the rate", adamw(steps, rate=warmup_constant(PEAK, warmup))),
        "linear": ("schedule", "linear", adamw(steps, rate=warmup_linear(PEAK, steps, warmup))),
        "wsd": ("schedule", "trapezoid (wsd)", adamw(steps, rate=warmup_stable_decay(PEAK, steps, warmup, steps // 5))),
    }
    keys = ("gear", "label", "optimizer", "loss")
    named: dict[str, Form] = {name: dict(zip(keys, row, strict=False)) for name, row in table.items()}
    for name, clip in clips.items():
        if name != "1.0":
            named[f"clip {name}"] = {"gear": "clipping", "label": f"clip {name}", "optimizer": clip()}
        named[f"bad {name}"] = {
            "gear": "clipping, corrupted batches",
            "label": f"clip {name}",
            "optimizer": clip(),
            "corrupt": True,
        }
        named[f"edge {name}"] = {
            "gear": "clipping, ten times the learning rate",
            "label": f"clip {name}",
            "optimizer": clip(rate=edge),
        }
    gears = [form["gear"] for form in named.values()]
    return dict(sorted(named.items(), key=lambda item: gears.index(item[1]["gear"])))


def read_corpus() -> np.ndarray:
    """Returns the bytes of the standard library's modules, uint8 `[N]`, without its packages."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8)


def train(form: Form, steps: int, seeds: int, corpus: np.ndarray) -> dict[str, Any]:
    """Trains a form with every seed at once. Returns the bits per byte by seed and the metrics `[seed, step]`."""
    step = make_train_step(form.get("loss", MODEL.loss), form["optimizer"])
    held_out = len(corpus) // 10
    train_set, test_set = (jnp.asarray(part, jnp.int32) for part in (corpus[:-held_out], corpus[-held_out:]))

    def run(key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        init_key, data_key, bad_key = jax.random.split(key, 3)
        starts = jax.random.randint(data_key, (steps, ROWS), 0, len(train_set) - LENGTH - 1)
        noise = jax.random.randint(bad_key, (steps, ROWS, LENGTH), 0, VOCAB)

        def body(state: TrainState, inputs: tuple[jax.Array, ...]) -> tuple[TrainState, Any]:
            index, start, wrong = inputs
            batch = _batch(train_set, start)
            if form.get(
                "corrupt"
            ):  # labels of one byte value, in a whole batch now and then, after a quarter of the run
                bad = (index % CORRUPT_EVERY == CORRUPT_EVERY - 1) & (index > steps // 4)
                batch |= {"labels": jnp.where(bad, wrong, batch["labels"])}
            return step(state, batch)

        state = TrainState.create(MODEL.init(init_key), form["optimizer"])
        state, metrics = jax.lax.scan(body, state, (jnp.arange(steps), starts, noise))
        windows = jnp.arange(0, min(len(test_set) - LENGTH - 1, 512 * LENGTH), LENGTH)
        sums = MODEL.loss(state.params, _batch(test_set, windows))
        return sums.nll / sums.weight / math.log(2), metrics

    keys = jax.random.split(jax.random.key(0), seeds)
    bits, metrics = jax.jit(jax.vmap(run))(keys)
    return {"bits": np.asarray(bits), "metrics": {name: np.asarray(x) for name, x in metrics.items()}}


def _batch(data: jax.Array, starts: jax.Array) -> dict[str, jax.Array]:
    tokens = data[starts[:, None] + jnp.arange(LENGTH + 1)[None]]
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "where": jnp.ones(tokens[:, 1:].shape, bool)}


def first_gradients() -> dict[str, float]:
    """Returns the norm per token of the gradient with respect to the logits, at initialization, of both losses."""
    logits = 0.02 * jax.random.normal(jax.random.key(0), (512, VOCAB))
    labels = jax.random.randint(jax.random.key(1), (512,), 0, VOCAB)
    squared = lambda x: jnp.sum((jax.nn.softmax(x) - jax.nn.one_hot(labels, VOCAB)) ** 2)  # noqa: E731
    losses = {"cross-entropy": lambda x: cross_entropy(x, labels).nll, "squared error": squared}
    norm = lambda loss: jax.jit(lambda x: jnp.linalg.norm(jax.grad(loss)(x), axis=-1).mean())  # noqa: E731
    return {name: float(norm(loss)(logits)) for name, loss in losses.items()}


def numbers(rows: int = 2048) -> dict[str, float]:
    """Returns the figures that are often quoted otherwise, each by a line of code; the first is a mean over `rows`."""
    keys, classes = jax.random.split(jax.random.key(0)), 50_000
    labels = jax.random.randint(keys[1], (rows,), 0, classes)
    normal = jax.random.normal(keys[0], (rows, classes))
    mean_loss = jax.jit(lambda logits, labels: cross_entropy(logits, labels).mean())
    library = optax.schedules.warmup_cosine_decay_schedule(0.0, 1.0, 100, 1000)
    return {
        "nats of standard normal logits, 50,000 classes": float(mean_loss(normal, labels)),
        "ln 50,000 + 1/2": math.log(classes) + 0.5,
        "nats of equal logits, 50,000 classes": float(mean_loss(jnp.zeros((1, classes)), labels[:1])),
        "GB of parameters and moments, 70e9, float32": 70e9 * (4 + 4 + 4) / 1e9,
        "GB with the gradients": 70e9 * (4 + 4 + 4 + 4) / 1e9,
        "last rate of optax's warmup_cosine_decay_schedule, of the peak": float(library(1000)),
        "last rate of warmup_cosine, of the peak": float(warmup_cosine(1.0, 1000, 100)(999)),
    }


def diagnose(metrics: dict[str, np.ndarray], steps: int) -> list[str]:
    """Returns the names of the findings of jaxtrain's rules on the first seed's metrics."""
    config = Config(
        data=DataConfig(store="unused"),
        model=MODEL.config,
        optim=OptimConfig(peak_lr=PEAK, warmup_steps=_warmup(steps)),
        train=TrainConfig(steps=steps, batch_size=ROWS, seq_len=LENGTH, log_every=1),
    )
    health, found = Health(RunFacts(config, vocab_size=VOCAB)), []
    for index in range(steps):
        line = {name: values[0, index] for name, values in metrics.items()}
        found += health.observe({"step": index + 1} | {n: float(v) for n, v in line.items() if np.ndim(v) == 0})
    return list(dict.fromkeys(finding.name for finding in found))


def make_tables(results: dict[str, Form], seeds: int, steps: int) -> list[Table]:
    """Returns the table of forms, and that of the first gradients and the numbers."""
    base = results["adamw"]["bits"] if "adamw" in results else None
    columns = {
        "gear": "",
        "form": "",
        "bits per byte": ".3f",
        "least": ".3f",
        "most": ".3f",
        "above the recipe": "+.3f",
    }
    columns |= {"median grad norm": ".2f", "largest": ".1f", "findings": ""}
    note = (
        f"Mean, least and most of {seeds} seeds; {steps} steps of {ROWS} x {LENGTH} bytes. Findings: of the first seed."
    )
    table = Table("Bits per byte on held-out bytes", columns, notes=[note])
    for result in results.values():
        bits = result["bits"]
        gap = None if base is None else float(np.mean(bits - base))
        row = [result["gear"], result["label"], *map(float, (bits.mean(), bits.min(), bits.max())), gap]
        table.rows.append([*row, *result["norms"], ", ".join(result["findings"]) or "none"])
    more = Table("Numbers", {"": "", "value": ".4g"})
    more.rows += [[f"gradient norm a token, {name}, at initialization", x] for name, x in first_gradients().items()]
    more.rows += [[name, value] for name, value in numbers().items()]
    return [table, more]


def write_page(page: Path, tables: list[Table], where: str) -> None:
    """Replaces the part of a page between its two markers by the tables."""
    text = "\n\n".join([f"`{where}`", *(table.markdown() for table in tables)])
    begin, end = "<!-- tables -->", "<!-- end of tables -->"
    old = page.read_text() if page.exists() else f"{begin}\n{end}\n"
    page.write_text(re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n\n{text}\n\n{end}", old, flags=re.DOTALL))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--only", nargs="+", metavar="FORM", help="names of forms; default: all")
    arguments.add_argument("--out", type=Path, default=ROOT / "docs/four_gears", help="folder of figures and record")
    options = arguments.parse_args()
    every = forms(options.steps)
    if unknown := set(options.only or ()) - set(every):
        sys.exit(f"error: no form {', '.join(sorted(unknown))}; the forms are {', '.join(every)}")
    corpus, results = read_corpus(), {}
    for name in options.only or every:
        begin = time.perf_counter()
        trained = train(every[name], options.steps, options.seeds, corpus)
        norm = trained["metrics"].get("grad_norm", np.zeros((1, 1)))
        results[name] = {key: every[name][key] for key in ("gear", "label")} | {
            "bits": trained["bits"],
            "norm": norm,
            "norms": [float(np.median(norm)), float(norm.max())],
            "findings": diagnose(trained["metrics"], options.steps),
        }
        print(f"{name:12} {trained['bits'].round(3)}  {time.perf_counter() - begin:.1f} s", flush=True)
    tables = make_tables(results, options.seeds, options.steps)
    for table in tables:
        print(table.text())
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"device": device(), "versions": versions(PACKAGES), "steps": options.steps, "seeds": options.seeds}
    bits = {name: result["bits"].tolist() for name, result in results.items()}
    record |= {"bits": bits, "findings": {name: result["findings"] for name, result in results.items()}}
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    from four_gears_figures import draw_bits, draw_norms

    draw_bits(results, options.out / "bits.png")
    draw_norms(results, options.out / "norms.png")
    software = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    write_page(options.out.with_suffix(".md"), tables, f"{record['device']['machine']}; {software}")


if __name__ == "__main__":
    main()
