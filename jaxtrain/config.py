"""Fields of a run: frozen dataclasses, checked when they are made, each field with its unit and its bounds.

A config file is Python with a function `config() -> Config`; a variant calls it and uses `dataclasses.replace`. The
user's own code is executed. A run directory holds `config.json`, which is read without executing anything.
`runtime/config_files.py` reads and writes both; the comment beside a field is its `--help`.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from jaxtrain.fields import (
    Fraction,
    FractionOrZero,
    Interval,
    NotNegative,
    Positive,
    PositiveShare,
    RunOrUrl,
    Section,
    Share,
    Source,
    Store,
    TokenizerSpec,
    check_divisible,
    check_entry,
    parse_ranges,
)
from jaxtrain.mixture import parse_mixture, parse_stores
from jaxtrain.model_config import FAMILIES as FAMILIES
from jaxtrain.model_config import ModelConfig as ModelConfig
from jaxtrain.model_config import family as family
from jaxtrain.model_config import gpt2 as gpt2
from jaxtrain.model_config import llama as llama

Clipping = Literal["global_norm", "zclip", "adaptive"]

_DEFAULT_WARMUP = 100  # optimizer steps


@dataclass(frozen=True)
class SavedModel:
    """Custom model as config.json describes it. It cannot train; the model in the config file can."""

    custom: str
    fields: dict


@dataclass(frozen=True)
class DataConfig(Section, section="data"):
    """Source of the tokens."""

    # token store from `jaxtrain prepare`, or token files of nanoGPT, llm.c, Megatron ...; None prepares `sources`
    store: Store | None = None
    sources: tuple[Source, ...] = ()  # files, folders, globs, URLs or python-stdlib, if `store` is None
    tokenizer: TokenizerSpec = "byte"  # of `sources`; used if `store` is None
    eot: str | None = None  # end-of-text token of a tokenizer hf:FILE; None looks for the usual names
    validation: tuple[Source, ...] = ()  # files to validate on, in place of a share of `sources` or of token files
    validation_fraction: Fraction[float] = 0.02  # share of the documents, chosen by hash; of token files, their end
    text_field: str = "text"  # key of the document in a .jsonl line; used if `store` is None
    verify: bool = True  # compares the checksum of every shard with the manifest at the start
    prefetch: Positive[int] = 2  # batches loaded ahead onto the devices
    # batches to leave out, without STOP; step i reads batch i - 1 if none is left out; a resumed run may add later ones
    skip: tuple[Annotated[str, "START:STOP"], ...] = ()
    stores: tuple[Annotated[str, "NAME=DIR"], ...] = ()  # token stores to mix, in place of `store`
    # shares of `stores` by stage, such as "web:0.7 code:0.3 until 0.8, then web:1"; None: in proportion to their sizes
    mixture: str | None = None
    max_epochs: Positive[float] | None = None  # passes over any source that a run may not exceed; None: no limit
    mask_documents: bool = False  # attention sees no other document of the row, and the loss does not cross into one
    restart_positions: bool = False  # positions count from the start of each document; needs mask_documents
    # concatenate: rows are windows of the text; best_fit: rows hold whole documents and padding; needs mask_documents
    packing: Literal["concatenate", "best_fit"] = "concatenate"

    def __post_init__(self):
        super().__post_init__()
        if not (self.store or self.stores or self.sources):
            raise ValueError("data needs data.store (of `jaxtrain prepare`), data.stores to mix, or data.sources")
        if self.stores and self.store:
            raise ValueError("data.stores replaces data.store: give one of them")
        parse_stores(self.stores)
        if self.mixture is not None:
            if not self.stores:
                raise ValueError("data.mixture mixes data.stores, and there are none: list them as NAME=DIR")
            parse_mixture(self.mixture)
        if not self.mask_documents and (self.restart_positions or self.packing == "best_fit"):
            name = "restart_positions" if self.restart_positions else "packing best_fit"
            raise ValueError(f"data.{name} keeps documents apart: set data.mask_documents too")
        parse_ranges(self.skip)


@dataclass(frozen=True)
class OptimConfig(Section, section="optim"):
    """Optimizer, learning-rate schedule and clipping."""

    name: str = "adamw"  # entry of jaxtrain.optim.OPTIMIZERS
    peak_lr: Positive[float] = 1e-3  # learning rate at the end of the warm-up
    schedule: str = "cosine"  # cosine, linear, wsd, sgdr, constant or another entry of jaxtrain.schedules.SCHEDULES
    warmup_steps: NotNegative[int] | None = None  # optimizer steps; None takes warmup_fraction, or 100 without one
    warmup_fraction: Share[float] | None = None  # share of train.steps, rounded; used if `warmup_steps` is None
    decay_steps: Positive[int] | None = None  # optimizer steps of the final decay of "wsd", which needs it
    cycles: Positive[int] = 1  # restarts of "sgdr"; train.steps must be a multiple
    cycle_decay: Positive[float] = 1.0  # factor on the peak from one "sgdr" cycle to the next
    floor: Share[float] = 0.1  # last learning rate as a fraction of the peak
    b1: FractionOrZero[float] = 0.9  # decay of Adam's first moment
    b2: FractionOrZero[float] = 0.95  # decay of Adam's second moment
    eps: Positive[float] = 1e-8  # added to the root of Adam's second moment
    weight_decay: NotNegative[float] = 0.1  # decoupled, times the learning rate, on matrices only
    clip_norm: Positive[float] = 1.0  # threshold of the global gradient norm; see also clipping
    # global_norm: clips the norm of all gradients; zclip: a threshold that follows recent norms, at most clip_norm;
    # adaptive: clips each unit of a matrix to clip_norm times the norm of its weights (0.01 is usual)
    clipping: Clipping = "global_norm"
    mu_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of Adam's first moment
    # paths of parameters that are not trained: "embedding", "layers/attention/*", or "!head" for all but the head
    frozen: tuple[Annotated[str, "PATTERN"], ...] = ()


@dataclass(frozen=True)
class TrainConfig(Section, section="train"):
    """Steps, batches, precision and logging."""

    steps: Positive[int] = 1000  # optimizer steps; the schedule ends here
    batch_size: Positive[int] = 16  # sequences per optimizer step, over all devices and micro-batches
    seq_len: Positive[int] = 256  # tokens per sequence
    accumulate: Positive[int] = 1  # micro-batches per optimizer step
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # compute dtype; parameters stay float32
    z_loss: NotNegative[float] = 0.0  # coefficient of log^2 Z (1e-4 in PaLM)
    label_smoothing: FractionOrZero[float] = 0.0  # share of the target spread evenly over the vocabulary
    balance_loss: NotNegative[float] = 0.01  # coefficient of the loss that balances the load of experts
    router_z_loss: NotNegative[float] = 0.001  # coefficient of log^2 Z of the routers of experts
    loss_chunk: Positive[int] | None = None  # tokens per chunk of the loss head; None takes the built-in default
    tune_compiler: bool = True  # uses the compiler options of the chip, see runtime/compile_options.py
    log_every: Positive[int] = 10  # optimizer steps whose means make one line of metrics.jsonl
    diagnose_every: Positive[int] | None = 100  # optimizer steps between logged per-layer statistics; None logs none
    eval_every: Positive[int] | None = None  # optimizer steps; None evaluates at the end only
    eval_batches: Positive[int] | None = None  # validation batches per evaluation; None takes the whole split
    replay_check: Positive[int] | None = None  # runs every Nth step twice and compares all bits; None disables it
    stop_after: Positive[int] | None = None  # step after which the run saves and stops, as if preempted
    # minutes without progress, and at least 20 steps' time, that end the run with exit code 75; None disables it
    stall_minutes: Positive[float] | None = 30.0
    sample_tokens: Positive[int] | None = None  # tokens of generated text in sample.txt at the end; None writes none
    sample_prompt: str = ""  # text that the sample continues
    init_from: RunOrUrl | None = None  # RUN or RUN/checkpoints/STEP to take initial weights from; None: random

    def __post_init__(self):
        super().__post_init__()
        check_divisible("train.batch_size", self.batch_size, "train.accumulate", self.accumulate)


@dataclass(frozen=True)
class MeshConfig(Section, section="mesh"):
    """Devices per axis of the mesh; one axis may be -1 and takes the remaining devices."""

    data: int = -1  # data parallelism: every device holds all parameters and takes rows of the batch
    fsdp: int = 1  # sharded data parallelism: every device holds a part of each matrix and takes rows of the batch
    tensor: int = 1  # tensor parallelism: every device holds some heads, hidden channels and vocabulary

    def __post_init__(self):
        super().__post_init__()
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name} must be above 0, or -1 for the remaining devices; got {size}")
        rest = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(f"only one axis of the mesh can be -1, got {' and '.join(rest)}")


@dataclass(frozen=True)
class GuardConfig(Section, section="guard"):
    """Skipping of bad steps. A step that is not finite is always skipped."""

    window: Annotated[int, Interval("[2, inf)")] = 128  # accepted steps that define a spike
    sigmas: Positive[float] | None = 6.0  # deviations above the mean of the window that are a spike; None: no spikes
    max_consecutive: Positive[int] = 10  # skipped steps in a row; more end the run
    # share of skipped steps among the last 1,000 or so; more end the run
    max_share: PositiveShare[float] = 0.05


@dataclass(frozen=True)
class LossScaleConfig(Section, section="loss_scale"):
    """Dynamic loss scaling of float16: the factor on the mean loss."""

    initial: Positive[float] = 2.0**15  # factor at the start
    growth_interval: Positive[int] = 2000  # steps without overflow before the factor doubles; an overflow halves it
    floor: Positive[float] = 1.0  # smallest factor
    ceiling: Positive[float] = 2.0**24  # largest factor

    def __post_init__(self):
        super().__post_init__()
        if not self.floor <= self.initial <= self.ceiling:
            limits = f"loss_scale.floor {self.floor:g} and loss_scale.ceiling {self.ceiling:g}"
            raise ValueError(f"loss_scale.initial {self.initial:g} must lie between {limits}")


@dataclass(frozen=True)
class CheckpointConfig(Section, section="checkpoint"):
    """Schedule and retention of checkpoints."""

    every: Positive[int] = 1000  # optimizer steps; the last step is always saved
    keep: Positive[int] = 3  # newest checkpoints to keep
    keep_every: Positive[int] | None = None  # optimizer steps; checkpoints of multiples are never deleted
    keep_best: Positive[int] | None = None  # checkpoints of the lowest validation loss to keep

    def __post_init__(self):
        super().__post_init__()
        remedy = "only saved steps can be kept"
        check_divisible("checkpoint.keep_every", self.keep_every or 0, "checkpoint.every", self.every, remedy)


@dataclass(frozen=True)
class Config(Section):
    """One run. Each field is also a flag: `--train.steps 500`.

    `model` is a ModelConfig, or any object with the protocol of `jaxtrain.models.model.Model`.
    """

    data: DataConfig
    model: Any = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    seed: NotNegative[int] = 0  # random seed of the initial parameters, the order of the data and the sample

    def __post_init__(self):
        super().__post_init__()
        custom = all(callable(getattr(self.model, name, None)) for name in ("init", "loss"))
        if not (custom or isinstance(self.model, ModelConfig | SavedModel)):
            raise ValueError(f"model: expected a ModelConfig or an object with init and loss, got {self.model!r}")
        longest = getattr(self.model, "max_seq_len", None)
        if longest is not None and self.train.seq_len > longest:
            raise ValueError(f"train.seq_len {self.train.seq_len} exceeds model.max_seq_len {longest}: lower it")
        eval_every, every = self.train.eval_every, self.checkpoint.every
        if self.checkpoint.keep_best and (eval_every is None or eval_every % every):
            needs = f"train.eval_every {eval_every} must be a multiple of checkpoint.every {every}"
            raise ValueError(f"checkpoint.keep_best ranks steps that are both evaluated and saved: {needs}")
        self._check_schedule()

    def __eq__(self, other: object) -> bool:
        """Compares all fields; custom models by class name and fields, since a config file makes a new class."""
        return isinstance(other, Config) and to_dict(self) == to_dict(other)

    def __hash__(self) -> int:
        sections = (getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "model")
        return hash((*sections, self.model if isinstance(self.model, ModelConfig) else None))

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up, with the default filled in."""
        if self.optim.warmup_steps is not None:
            return self.optim.warmup_steps
        if self.optim.warmup_fraction is not None:
            return round(self.optim.warmup_fraction * self.train.steps)
        return _DEFAULT_WARMUP

    @property
    def frozen(self) -> tuple[str, ...]:
        """Patterns of the frozen parameters: `optim.frozen` and, with LoRA, all but its matrices."""
        lora = isinstance(self.model, ModelConfig) and self.model.lora_rank is not None
        return (*self.optim.frozen, *(["!*_lora/?"] if lora else []))

    @property
    def resolved_optim(self) -> OptimConfig:
        """Returns `optim` with the default of `warmup_steps` filled in."""
        return dataclasses.replace(self.optim, warmup_steps=self.warmup_steps)

    def _check_schedule(self) -> None:
        optim, steps = self.resolved_optim, self.train.steps
        if optim.schedule != "cosine":  # the table needs jax, which the default shall not
            from jaxtrain.schedules import SCHEDULES

            check_entry(optim.schedule, SCHEDULES, "optim.schedule", "jaxtrain.schedules.SCHEDULES")
            if check := SCHEDULES[optim.schedule].check:
                check(optim, steps)
        elif self.warmup_steps >= steps:
            problem = f"optim.warmup_steps {self.warmup_steps} leaves no room to decay in train.steps {steps}"
            raise ValueError(f"{problem} (schedule cosine): shorten the warm-up or train longer")


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the fields of a config as JSON values; a custom model as its class name and its fields that are JSON."""
    values = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        known = isinstance(value, Section | SavedModel)
        values[item.name] = dataclasses.asdict(value) if known else value if item.name == "seed" else _describe(value)
    return values


def _describe(model: Any) -> dict[str, Any]:
    fields = {}
    for item in dataclasses.fields(model) if dataclasses.is_dataclass(model) else ():
        try:
            fields[item.name] = json.loads(json.dumps(getattr(model, item.name)))
        except (TypeError, ValueError):  # such as a function or an array
            continue
    return {"custom": type(model).__name__, "fields": fields}
