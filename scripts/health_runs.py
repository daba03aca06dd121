"""Short real runs for bench_health.py: healthy ones in many shapes, and sick ones with their expected findings.

Each kind of sickness has two causes: one in the half that constants may be tuned on, one in the half that is reported.
"""

import dataclasses
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.config import CheckpointConfig, Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.config import gpt2 as make_gpt2
from jaxtrain.config import llama as make_llama
from jaxtrain.data.prepare.completions import prepare_completions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.optim import OPTIMIZERS, OptimizerEntry
from jaxtrain.schedules import SCHEDULES, ScheduleEntry, warmup_cosine
from jaxtrain.training import program
from jaxtrain.training.run import Hooks

STEPS, CHANGE = 320, 160  # steps of a run; step of the change that makes some runs sick
SMALL = {"num_layers": 3, "num_heads": 2, "d_model": 32, "d_ff": 64, "max_seq_len": 32}
llama, gpt2 = make_llama(**SMALL), make_gpt2(**SMALL)

Rows = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of the table.

    Attributes:
      name: of the run.
      half: `tuning`, which the constants of the rules may follow, or `report`.
      expected: the finding that must come, then those that may; () for a healthy run.
      store: name of a token store of `Stores`.
      model: of the config.
      sections: fields of the config, by section.
      init: changes the initial parameters.
      batches: `(read, step, rng) -> rows`, makes the batch of a step; `read(step)` returns the rows of the data.
      loss: wraps the loss function.
    """

    name: str
    half: str
    expected: tuple[str, ...] = ()
    store: str = "text"
    model: ModelConfig = llama
    sections: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    init: Callable[[Any], Any] | None = None
    batches: Callable[[Callable[[int], Rows], int, np.random.Generator], Rows] | None = None
    loss: Callable[[Callable], Callable] | None = None

    def config(self, stores: "Stores", steps: int) -> Config:
        """Returns the config: the recipe of a healthy run with the changes of the case."""
        sections = {
            "data": {"store": None if "stores" in self.sections.get("data", {}) else stores.path(self.store)},
            "optim": {"peak_lr": 3e-3, "warmup_steps": steps // 8},
            "train": {"steps": steps, "batch_size": 8, "seq_len": 32, "eval_every": steps // 8, "eval_batches": 4},
            "checkpoint": {"every": steps},
            "mesh": {"data": 1},
        }
        for section, fields in self.sections.items():
            sections[section] = sections.get(section, {}) | fields
        if names := sections["data"].get("stores"):
            sections["data"]["stores"] = tuple(f"{name}={stores.path(name)}" for name in names)
        parts = {"data": DataConfig, "optim": OptimConfig, "train": TrainConfig, "mesh": MeshConfig}
        parts["checkpoint"] = CheckpointConfig
        made = {name: parts[name](**fields) for name, fields in sections.items() if name in parts}
        config = Config(model=self.model, **made)
        return dataclasses.replace(
            config, **{n: dataclasses.replace(getattr(config, n), **f) for n, f in sections.items() if n not in parts}
        )

    def hooks(self) -> Hooks:
        """Returns hooks that apply the changes which no config can say; no report is written."""
        hooks = Hooks(write_report=lambda folder: "not drawn", wrap_loss=self.loss)
        if self.init:
            hooks = hooks._replace(make_program=functools.partial(_make_program, change=self.init))
        if self.batches:
            hooks = hooks._replace(wrap_batches=lambda batches: _Batches(batches, self.batches))
        return hooks


def _make_program(*arguments: Any, change: Callable[[Any], Any], **options: Any) -> program.Program:
    made = program.make_program(*arguments, **options)

    def init_state():
        state = made.init_state()
        return state.replace(params=change(state.params))

    return made._replace(init_state=init_state)


@dataclasses.dataclass(frozen=True, eq=False)
class _Batches:
    """Batches with other contents."""

    batches: Any
    change: Any

    @property
    def batch_size(self) -> int:
        return self.batches.batch_size

    def rows(self, index: int, start: int, stop: int) -> Rows:
        return self.change(
            lambda step: self.batches.rows(step - 1, start, stop), index + 1, np.random.default_rng((index, start))
        )


class Stores:
    """Token stores by name, prepared in a folder when they are first needed."""

    def __init__(self, folder: Path, sources: list[str]):
        self._folder, self._sources = folder, sources

    def path(self, name: str) -> str:
        """Returns the path of a store: `text`, `tiny`, `answers` or `lines`."""
        out = self._folder / name
        if not out.exists():
            {"text": self._text, "tiny": self._tiny, "answers": self._answers, "lines": self._lines}[name](out)
        return str(out)

    def _text(self, out: Path) -> None:
        prepare(self._sources, out, validation_fraction=0.004, progress=False)

    def _write(self, name: str, texts: list[str]) -> list[str]:
        folder = self._folder / f"{name} sources"
        folder.mkdir()
        for i, text in enumerate(texts):
            (folder / f"{i}.txt").write_text(text)
        return [str(folder)]

    def _tiny(self, out: Path) -> None:
        """Few bytes of code, to memorize."""
        lines = Path(json.__file__).read_text().splitlines()[100:]
        texts = ["\n".join(lines[i : i + 4]) for i in range(0, 60, 4)]
        prepare(self._write("tiny", texts), out, validation_fraction=0.3, progress=False)

    def _answers(self, out: Path) -> None:
        """Long prompts with short completions, of which alone the labels count."""
        records = []
        for i in range(2000):
            a, b = random.Random(i).sample(range(100), 2)
            records.append({"prompt": f"What is the larger number, {a} or {b}?", "completion": f" {max(a, b)}"})
        path = self._folder / "answers.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        prepare_completions([str(path)], out, validation_fraction=0.1)

    def _lines(self, out: Path) -> None:
        """Documents of very different difficulty: heavy tails in small batches."""
        rng = random.Random(0)
        texts = ["ab " * 300 if rng.random() < 0.7 else bytes(rng.choices(range(33, 126), k=900)).decode()]
        for _ in range(400):
            texts.append("ab " * 300 if rng.random() < 0.7 else bytes(rng.choices(range(33, 126), k=900)).decode())
        prepare(self._write("lines", texts), out, validation_fraction=0.1, progress=False)


def register() -> None:
    """Adds the optimizer and the schedule of two sick runs to the tables, as a config file would."""
    OPTIMIZERS["growing"] = OptimizerEntry(
        lambda optim, rate, clip: optax.adamw(rate, weight_decay=-30.0), "AdamW with negative decay"
    )
    SCHEDULES["ends_early"] = ScheduleEntry(
        lambda optim, total: lambda step: jnp.where(step < CHANGE, warmup_cosine(optim.peak_lr, total, 40)(step), 0.0),
        "0 from the middle on",
    )


# Causes of sickness.


def from_step(start: int, function: Callable[[Rows, np.random.Generator], Rows]) -> Callable[..., Rows]:
    """Changes the batches from a step on."""

    def batches(read: Callable[[int], Rows], step: int, rng: np.random.Generator) -> Rows:
        rows = read(step)
        return rows | function(rows, rng) if step >= start else rows

    return batches


def random_labels(rows: Rows, rng: np.random.Generator, share: float) -> Rows:
    """Replaces a share of the labels by random bytes."""
    labels = rows["labels"]
    noise = rng.integers(0, 257, labels.shape).astype(labels.dtype)
    return {"labels": np.where(rng.random(labels.shape) < share, noise, labels)}


def random_text(rows: Rows, rng: np.random.Generator) -> Rows:
    """Replaces the text by random bytes."""
    tokens = rng.integers(0, 257, (len(rows["inputs"]), rows["inputs"].shape[1] + 1)).astype(rows["inputs"].dtype)
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}


def masked(rows: Rows, rng: np.random.Generator) -> Rows:
    """Masks four fifths of the labels."""
    return {"where": rows["where"] & (rng.random(rows["where"].shape) < 0.2)}


def factor(function: Callable[[int], float], *, of_loss: bool = True) -> dict[str, Any]:
    """Returns fields of a case whose loss, or whose gradient alone, is multiplied by `function(step)`."""

    def batches(read: Callable[[int], Rows], step: int, rng: np.random.Generator) -> Rows:
        rows = read(step)
        return rows | {"factor": np.full(len(rows["inputs"]), function(step), np.float32)}

    def wrap(loss_fn: Callable) -> Callable:
        def loss(params: Any, batch: Any) -> Any:
            factor = jnp.mean(batch["factor"])
            sums = loss_fn(params, {name: value for name, value in batch.items() if name != "factor"})
            kept = 0.0 if of_loss else jax.lax.stop_gradient(sums.nll) * (1 - factor)
            return sums.replace(nll=factor * sums.nll + kept)

        return loss

    return {"batches": batches, "loss": wrap}


def without_gradient(loss_fn: Callable) -> Callable:
    """Stops the gradient before the parameters."""
    return lambda params, batch: loss_fn(jax.lax.stop_gradient(params), batch)


def scaled(name: str, factor: float) -> Callable[[Any], Any]:
    """Multiplies a parameter of the initial state."""
    return lambda params: params | {name: factor * params[name]}


def zero_layer(index: int) -> Callable[[Any], Any]:
    """Sets all parameters of a layer to 0."""
    return lambda params: params | {"layers": jax.tree.map(lambda x: x.at[index].set(0), params["layers"])}


def _case(half: str) -> Callable[..., Case]:
    def make(name: str, *expected: str, **fields: Any) -> Case:
        known = {field.name for field in dataclasses.fields(Case)}
        sections = {key: fields.pop(key) for key in list(fields) if key not in known}
        return Case(name, half, expected, sections=sections, **fields)

    return make


tuning, report = _case("tuning"), _case("report")
capped = dataclasses.replace(llama, logit_softcap=5.0)
longer = dataclasses.replace(llama, max_seq_len=64)
tied = dataclasses.replace(llama, tie_embeddings=True)

HEALTHY = (
    tuning("cosine"),
    tuning("trapezoid", optim={"schedule": "wsd", "decay_steps": 64}),
    tuning("bfloat16", train={"precision": "bfloat16"}),
    tuning("float16", train={"precision": "float16"}),
    tuning("GPT-2", model=gpt2, optim={"peak_lr": 1e-3}),
    tuning("one row a batch", train={"batch_size": 1}),
    tuning("64 rows a batch", train={"batch_size": 64}),
    tuning("completions", store="answers", model=longer, train={"seq_len": 64}),
    tuning("four restarts", optim={"schedule": "sgdr", "cycles": 4}),
    tuning("frozen embedding", optim={"frozen": ("embedding",)}),
    report("linear", optim={"schedule": "linear", "floor": 0.0}),
    report("constant rate", optim={"schedule": "constant"}),
    report("bfloat16 moments", train={"precision": "bfloat16"}, optim={"mu_dtype": "bfloat16"}),
    report("four micro-batches", train={"accumulate": 4}),
    report("GPT-2, smoothed", model=gpt2, train={"label_smoothing": 0.1, "z_loss": 1e-4}),
    report("heavy tails, 2 rows", store="lines", train={"batch_size": 2}),
    report("whole documents", store="answers", model=longer, train={"seq_len": 64},
           data={"mask_documents": True, "packing": "best_fit"}),
    report("low rate, no warm-up", optim={"peak_lr": 3e-4, "warmup_steps": 0}),
    report("ZClip", optim={"clipping": "zclip"}, train={"batch_size": 2}),
    report("two sources in stages",
           data={"stores": ("text", "lines"), "mixture": "text:1 until 0.5, then text:0.8 lines:0.2"}),
    report("tied, softcap", model=dataclasses.replace(tied, logit_softcap=30.0), optim={"b2": 0.99}),
)  # fmt: skip

SICK = (
    tuning("a sixth of the labels random", "loss_rising", "validation_rising", "skipped_steps",
           batches=from_step(CHANGE, lambda rows, rng: random_labels(rows, rng, 1 / 6))),
    report("text becomes noise, unguarded", "loss_rising", "validation_rising", guard={"sigmas": None},
           batches=from_step(CHANGE, random_text)),
    tuning("half of the labels random", "loss_rising", "skipped_steps", "too_many_bad_steps",
           batches=from_step(CHANGE, lambda rows, rng: random_labels(rows, rng, 1 / 2))),
    report("text becomes noise", "too_many_bad_steps", "skipped_steps", "loss_rising",
           batches=from_step(CHANGE, random_text)),
    tuning("rate of 1e-9", "stuck_at_uniform", optim={"peak_lr": 1e-9}),
    report("all labels random", "stuck_at_uniform",
           batches=from_step(1, lambda rows, rng: random_labels(rows, rng, 1.0))),
    tuning("memorizes 2 kB", "validation_rising", store="tiny", optim={"peak_lr": 1e-2}),
    report("memorizes 2 kB, GPT-2", "validation_rising", store="tiny", model=gpt2, optim={"schedule": "constant"}),
    tuning("saturated logits", "gradient_vanished", "initial_loss", "no_progress", "stuck_at_uniform",
           "adam_frozen", "dead_layer", "loss_rising", model=capped, init=scaled("head", 1e5)),
    report("stopped gradient", "gradient_vanished", "loss_rising", "validation_rising", "adam_frozen", **factor(
        lambda step: 1.0 if step < CHANGE else 1e-9, of_loss=False)),
    tuning("rate of 1", "parameters_growing", "dead_layer", "validation_rising", "loss_rising",
           "exploding_layer", "clipping_saturated", "skipped_steps", "too_many_bad_steps", "stuck_at_uniform",
           "update_norm_rising", optim={"peak_lr": 1.0}),
    report("rate of 0.3, no warm-up", "parameters_growing", "loss_rising", "exploding_layer", "clipping_saturated",
           "skipped_steps", "too_many_bad_steps", "stuck_at_uniform", "update_norm_rising", model=gpt2,
           optim={"peak_lr": 0.3, "warmup_steps": 0}),
    tuning("rate of 0.1, no clipping", "parameters_growing", "exploding_layer", "loss_rising", "stuck_at_uniform",
           "update_norm_rising", optim={"peak_lr": 0.1, "clip_norm": 1e9, "weight_decay": 0.0}),
    report("negative decay", "parameters_growing", "exploding_layer", "loss_rising", "stuck_at_uniform",
           "update_norm_rising", "skipped_steps", optim={"name": "growing", "schedule": "constant"}),
    tuning("most labels masked", "tokens_collapsed", "loss_rising", batches=from_step(CHANGE, masked)),
    report("a stage of short answers", "tokens_collapsed", "loss_rising", "validation_rising",
           data={"stores": ("text", "answers"), "mixture": "text:1 until 0.5, then answers:1"}),
    tuning("clip norm of 0.01", "clipping_saturated", optim={"clip_norm": 0.01}),
    report("summed loss", "clipping_saturated", "initial_loss", **factor(lambda step: 256.0)),
    tuning("head of large weights", "initial_loss", "clipping_saturated", init=scaled("head", 30.0)),
    report("tied embedding of large weights", "initial_loss", "clipping_saturated", model=tied,
           init=scaled("embedding", 50.0)),
    tuning("labels are the inputs", "label_leak", "validation_rising",
           batches=from_step(1, lambda rows, rng: {"labels": rows["inputs"]})),
    report("one batch again and again", "label_leak", "validation_rising",
           batches=lambda read, step, rng: read(1)),
    tuning("one NaN", "skipped_steps", **factor(lambda step: float("nan") if step == CHANGE else 1.0)),
    report("three spikes", "skipped_steps", **factor(
        lambda step: 50.0 if step in (CHANGE, CHANGE + 20, CHANGE + 40) else 1.0)),
    tuning("NaN without end", "too_many_bad_steps", "skipped_steps",
           **factor(lambda step: float("nan") if step >= CHANGE else 1.0)),
    report("every fifth step a NaN", "too_many_bad_steps", "skipped_steps",
           **factor(lambda step: float("nan") if step >= CHANGE and step % 5 == 0 else 1.0)),
    tuning("rate below float32", "learning_rate_zero", "stuck_at_uniform", optim={"peak_lr": 1e-46}),
    report("schedule ends early", "learning_rate_zero", optim={"schedule": "ends_early"}),
    tuning("no label counts", "no_progress", batches=from_step(1, lambda rows, rng: {"where": rows["where"] & False})),
    report("gradient of 0", "no_progress", "gradient_vanished", "stuck_at_uniform", "adam_frozen",
           batches=lambda read, step, rng: read(1), loss=without_gradient,
           optim={"weight_decay": 0.0}),
    tuning("eps of 0.1", "adam_frozen", optim={"eps": 0.1}),
    report("clip norm of 1e-8", "adam_frozen", "clipping_saturated", "stuck_at_uniform", optim={"clip_norm": 1e-8}),
    tuning("second layer is 0", "dead_layer", init=zero_layer(1)),
    report("last layer is 0, GPT-2", "dead_layer", model=gpt2, init=zero_layer(2)),
    tuning("float16, huge embedding", "float16_overflow", "initial_loss", "skipped_steps", "too_many_bad_steps",
           train={"precision": "float16"}, init=scaled("embedding", 1e8)),
    report("float16, loss times 1e6", "float16_overflow", "initial_loss", "skipped_steps", "too_many_bad_steps",
           "clipping_saturated", train={"precision": "float16"}, **factor(lambda step: 1e6)),
)  # fmt: skip
