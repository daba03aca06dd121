"""Every knob of a run: frozen dataclasses, checked when they are made, each field with its unit.

A config file is Python with a function `config() -> Config`; a variant calls it and uses `dataclasses.replace`. It is
the user's own code and is executed. A run directory holds `config.json`, which is read without executing anything.
"""

import dataclasses
import difflib
import json
import math
import runpy
import traceback
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Schedule = Literal["cosine", "linear", "wsd", "sgdr", "constant"]
Clipping = Literal["global_norm", "zclip", "adaptive"]
Remat = Literal["none", "minimal", "full", "offload"]
Ranges = tuple[tuple[int, int], ...]

_INT_LIMIT = 2**31  # what is counted on devices is counted in 32 bits


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_types(section: str, config: Any) -> None:
    """Fields may come from Python, where nothing else would notice; whole numbers must fit in 32 bits."""
    for name, hint in typing.get_type_hints(type(config)).items():
        _check(hint, getattr(config, name), f"{section}.{name}".lstrip("."))


def _require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            allowed = "" if math.isfinite(value) else " and finite"
            _require(value > 0 and not allowed, f"{section}.{name} must be above 0{allowed}, got {value}")


def _require_not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        allowed = "" if math.isfinite(value) else " and finite"
        _require(value >= 0 and not allowed, f"{section}.{name} must be 0 or more{allowed}, got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer; `gpt2` and `llama` below give the two usual styles."""

    vocab_size: int | None = None  # tokens; None takes the size of the token store's tokenizer
    num_layers: int = 4
    num_heads: int = 4  # query heads
    num_kv_heads: int | None = None  # key and value heads; None takes num_heads
    head_dim: int | None = None  # channels per head; None takes d_model / num_heads
    d_model: int = 128  # channels of the residual stream
    d_ff: int = 512  # hidden channels of the feed-forward block
    max_seq_len: int = 256  # tokens; the longest context (rows of the learned position table, size of the KV cache)
    positions: Literal["learned", "rope"] = "rope"
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    feed_forward: Literal["gelu", "swiglu"] = "swiglu"
    use_bias: bool = False  # in every projection and norm
    tie_embeddings: bool = False  # the output head is the transposed token embedding
    qk_norm: bool = False  # RMSNorm on queries and keys, per head
    logit_softcap: float | None = None  # logits become cap * tanh(logits / cap); None disables the cap
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    norm_eps: float = 1e-5
    # Layers per iteration of the loop over layers. "all" removes the loop; "auto" chooses by backend and depth
    scan_unroll: int | Literal["auto", "all"] = "auto"
    vocab_multiple: int = 1  # the tables have vocab_size rows rounded up to a multiple of this; the rest is masked
    remat: Remat = "none"  # what the backward pass computes again instead of keeping it; see models/remat.py
    attention_window: int | None = None  # newest keys that a query attends to, itself included; None: all keys
    attention_softcap: float | None = None  # scores become cap * tanh(scores / cap); None disables the cap
    # Kernel; auto: splash on TPUs, cudnn on NVIDIA GPUs in 16 bits, xla elsewhere and for what those cannot do
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"

    def __post_init__(self):
        _require_types("model", self)
        _require_positive("model", self, "num_layers", "num_heads", "d_model", "d_ff", "max_seq_len", "rope_theta")
        _require_positive("model", self, "norm_eps", "vocab_multiple")
        _require_positive("model", self, "vocab_size", "num_kv_heads", "head_dim", "logit_softcap")
        _require_positive("model", self, "attention_window", "attention_softcap")
        if not isinstance(self.scan_unroll, str):
            _require_positive("model", self, "scan_unroll")
        _require(
            self.head_dim is not None or self.d_model % self.num_heads == 0,
            f"model.d_model {self.d_model} is not divisible by model.num_heads {self.num_heads}: "
            "change one of them or set model.head_dim",
        )
        _require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}",
        )
        _require(
            self.positions != "rope" or self.channels_per_head % 2 == 0,
            f"rotary positions rotate pairs of channels: the head dimension {self.channels_per_head} must be even",
        )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default filled in."""
        return self.num_kv_heads or self.num_heads

    @property
    def channels_per_head(self) -> int:
        """Head dimension, with the default filled in."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and columns of the head: the vocabulary and its padding."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is None: set it to the size of the tokenizer's vocabulary")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def gpt2(
    num_layers: int = 12, num_heads: int = 12, d_model: int = 768, max_seq_len: int = 1024, **fields
) -> ModelConfig:
    """GPT-2 style: learned positions, LayerNorm, GELU, biases, tied head (Radford et al., 2019)."""
    style = {
        "d_ff": 4 * d_model,
        "positions": "learned",
        "norm": "layernorm",
        "feed_forward": "gelu",
        "use_bias": True,
        "tie_embeddings": True,
    }
    sizes = {"num_layers": num_layers, "num_heads": num_heads, "d_model": d_model, "max_seq_len": max_seq_len}
    return ModelConfig(**{**style, **sizes, **fields})


def llama(num_layers: int, num_heads: int, d_model: int, d_ff: int, max_seq_len: int, **fields) -> ModelConfig:
    """Llama style: RoPE, RMSNorm, SwiGLU, no biases, untied head (arXiv:2302.13971)."""
    sizes = {"num_layers": num_layers, "num_heads": num_heads, "d_model": d_model, "d_ff": d_ff}
    return ModelConfig(**{**sizes, "max_seq_len": max_seq_len, **fields})


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    store: str | None = None  # folder of a token store from `jaxtrain prepare`; None prepares RUN/data from `sources`
    sources: tuple[str, ...] = ()  # files, folders, globs, .gz, .jsonl, or python-stdlib; used if `store` is None
    tokenizer: str = "byte"  # byte | bpe:VOCAB | hf:PATH; used if `store` is None
    validation_fraction: float = 0.02  # of the documents, chosen by hash; used if `store` is None
    text_field: str = "text"  # key of the document in a .jsonl line; used if `store` is None
    verify: bool = True  # read every shard at start and compare its checksum with the manifest
    prefetch: int = 2  # batches held ready on the devices
    skip: tuple[str, ...] = ()  # batches left out, START:STOP (without STOP), counted from 0; more may be added later

    def __post_init__(self):
        _require_types("data", self)
        _require(
            bool(self.store or self.sources),
            "data needs data.store (a folder made by `jaxtrain prepare`) or data.sources (text to prepare)",
        )
        _require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction must be between 0 and 1, got {self.validation_fraction}",
        )
        _require_positive("data", self, "prefetch")
        parse_ranges(self.skip)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, the learning-rate schedule and clipping."""

    peak_lr: float = 1e-3  # learning rate at the end of the warm-up
    schedule: Schedule = "cosine"
    warmup_steps: int = 100  # optimizer steps
    decay_steps: int | None = None  # optimizer steps of the final decay of "wsd", which needs it
    cycles: int = 1  # number of restarts of "sgdr"; train.steps must be a multiple of it
    cycle_decay: float = 1.0  # factor on the peak from one "sgdr" cycle to the next
    floor: float = 0.1  # last learning rate, as a fraction of the peak
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # decoupled, scaled by the learning rate, on matrices only
    clip_norm: float = 1.0  # threshold of the global gradient norm; of "adaptive" see clipping
    clipping: Clipping = "global_norm"  # or "zclip" (a threshold that follows the recent norms, clip_norm at most), or
    # "adaptive" (each unit of each matrix to clip_norm times the norm of its weights; 0.01 is usual)
    mu_dtype: Literal["float32", "bfloat16"] = "float32"  # of Adam's first moment

    def __post_init__(self):
        _require_types("optim", self)
        _require_positive("optim", self, "peak_lr", "eps", "clip_norm", "cycles", "cycle_decay")
        _require_positive("optim", self, "decay_steps")
        _require_not_negative("optim", self, "warmup_steps", "weight_decay")
        _require(0 <= self.floor <= 1, f"optim.floor is a fraction of the peak, from 0 to 1; got {self.floor}")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.{name} must be in [0, 1), got {value}")
        _require(
            self.schedule != "wsd" or self.decay_steps is not None,
            'optim.schedule "wsd" needs optim.decay_steps: the length of its final decay',
        )


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000  # optimizer steps; the schedule ends here
    batch_size: int = 16  # sequences an optimizer step, over all devices and micro-batches
    seq_len: int = 256  # tokens a sequence
    accumulate: int = 1  # micro-batches an optimizer step
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # compute dtype; parameters, moments stay float32
    z_loss: float = 0.0  # coefficient of log^2 Z (1e-4 in PaLM)
    label_smoothing: float = 0.0  # share of the target spread evenly over the vocabulary
    loss_chunk: int | None = None  # tokens per chunk of the loss head; None takes linear_cross_entropy's default
    log_every: int = 10  # optimizer steps
    diagnose_every: int | None = 100  # optimizer steps between logged per-layer statistics; None logs none
    eval_every: int | None = None  # optimizer steps; None evaluates at the end only
    eval_batches: int | None = None  # validation batches per evaluation; None takes the whole split
    replay_check: int | None = (
        None  # optimizer steps between steps that run twice, to compare all bits; None disables it
    )
    stop_after: int | None = None  # step after which the run saves and stops, as if preempted; None disables it
    sample_tokens: int | None = None  # tokens of generated text in sample.txt at the end; None writes no sample
    sample_prompt: str = ""  # text that the sample continues
    init_from: str | None = None  # RUN or RUN/checkpoints/STEP whose weights to start from; None starts from the seed

    def __post_init__(self):
        _require_types("train", self)
        _require_positive("train", self, "steps", "batch_size", "seq_len", "accumulate", "log_every")
        _require_not_negative("train", self, "z_loss")
        _require_positive("train", self, "loss_chunk", "eval_every", "eval_batches", "diagnose_every")
        _require_positive("train", self, "stop_after", "sample_tokens", "replay_check")
        _require(0 <= self.label_smoothing < 1, f"train.label_smoothing must be in [0, 1), got {self.label_smoothing}")
        _require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size {self.batch_size} is not divisible by train.accumulate {self.accumulate}",
        )


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has; one may be -1: all that are left."""

    data: int = -1  # each holds all parameters and takes its rows of the batch
    fsdp: int = 1  # each holds a part of every matrix, gathered layer by layer, and takes its rows of the batch
    tensor: int = 1  # each holds some heads, hidden channels and vocabulary, and takes the same rows as the others

    def __post_init__(self):
        _require_types("mesh", self)
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(size > 0 or size == -1, f"mesh.{name} must be above 0, or -1 for all that are left; got {size}")
        rest = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
        _require(len(rest) <= 1, f"only one axis of the mesh can be -1, got {' and '.join(rest)}")


@dataclass(frozen=True)
class GuardConfig:
    """Which steps are skipped, and when there are too many; what is not finite is skipped always."""

    window: int = 128  # accepted steps that a spike is measured against
    sigmas: float | None = 6.0  # deviations above the mean of the window that count as a spike; None ignores spikes
    max_consecutive: int = 10  # skipped steps in a row; more end the run
    max_share: float = 0.05  # share of skipped steps among the last 1,000 or so; a larger one ends the run

    def __post_init__(self):
        _require_types("guard", self)
        _require_positive("guard", self, "sigmas", "max_consecutive")
        _require(self.window >= 2, f"guard.window must be at least 2 steps, got {self.window}")
        _require(0 < self.max_share <= 1, f"guard.max_share must be above 0 and at most 1, got {self.max_share}")


@dataclass(frozen=True)
class LossScaleConfig:
    """Dynamic loss scaling of float16: the factor on the mean loss."""

    initial: float = 2.0**15
    growth_interval: int = 2000  # steps without overflow before it doubles; an overflow halves it
    floor: float = 1.0
    ceiling: float = 2.0**24

    def __post_init__(self):
        _require_types("loss_scale", self)
        _require_positive("loss_scale", self, "initial", "growth_interval", "floor", "ceiling")
        _require(
            self.floor <= self.initial <= self.ceiling,
            f"loss_scale.initial {self.initial:g} must lie between loss_scale.floor {self.floor:g} and "
            f"loss_scale.ceiling {self.ceiling:g}",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep."""

    every: int = 1000  # optimizer steps; the last step is always saved
    keep: int = 3  # newest checkpoints kept
    keep_every: int | None = None  # optimizer steps; checkpoints of its multiples are never deleted; None disables it
    keep_best: int | None = None  # checkpoints with the lowest validation loss to keep; needs train.eval_every

    def __post_init__(self):
        _require_types("checkpoint", self)
        _require_positive("checkpoint", self, "every", "keep", "keep_every", "keep_best")
        _require(
            (self.keep_every or 0) % self.every == 0,
            f"checkpoint.keep_every {self.keep_every} must be a multiple of checkpoint.every {self.every}: "
            "only steps that are saved can be kept",
        )


@dataclass(frozen=True)
class Config:
    """One run. Field by field it is also the command line: `--train.steps 500`."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    seed: int = 0  # of the initial parameters, the order of the data and the sample

    def __post_init__(self):
        _require_types("", self)
        _require_not_negative("config", self, "seed")
        steps, optim = self.train.steps, self.optim
        _require(
            self.train.seq_len <= self.model.max_seq_len,
            f"train.seq_len {self.train.seq_len} exceeds model.max_seq_len {self.model.max_seq_len}",
        )
        eval_every, every = self.train.eval_every, self.checkpoint.every
        _require(
            self.checkpoint.keep_best is None or (eval_every is not None and eval_every % every == 0),
            f"checkpoint.keep_best ranks steps that are both evaluated and saved: train.eval_every {eval_every} must "
            f"be a multiple of checkpoint.every {every}",
        )
        decay = (optim.decay_steps or 0) if optim.schedule == "wsd" else 0 if optim.schedule == "constant" else 1
        _require(
            optim.schedule == "sgdr" or optim.warmup_steps + decay <= steps,
            f"optim.warmup_steps {optim.warmup_steps} leaves no room to decay in train.steps {steps} "
            f"(schedule {optim.schedule}, decay_steps {optim.decay_steps}): shorten the warm-up or train longer",
        )
        _require(
            optim.schedule != "sgdr" or (steps % optim.cycles == 0 and optim.warmup_steps < steps // optim.cycles),
            f"optim.cycles {optim.cycles} must divide train.steps {steps} into cycles longer than optim.warmup_steps "
            f"{optim.warmup_steps}",
        )


def parse_ranges(texts: Sequence[str]) -> Ranges:
    """Reads `START:STOP` texts.

    Returns:
      The same batches as ranges [START, STOP) in ascending order, with gaps between them.

    Raises:
      ValueError: not two whole numbers, or an empty range.
    """
    ranges = []
    for text in texts:
        parts = text.split(":")
        if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts):
            raise ValueError(f"data.skip {text!r} is no range of batches: write START:STOP, such as 12000:12200")
        start, stop = (int(part) for part in parts)
        if start >= stop:
            raise ValueError(f"data.skip {text!r} is empty: batches START to STOP - 1 are left out, so STOP is larger")
        ranges.append((start, stop))
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return tuple(merged)


def to_json(config: Config) -> str:
    """The config as JSON text, one key a field."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """A config from `to_json`'s text; an unknown key or a wrong type is a ValueError that names it."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a config that is not valid JSON: {error}") from None
    return _build(Config, _migrate(values), "")


# What config.json files of versions before None stood for an absent option wrote there.
_ABSENT = {
    "model": ("vocab_size", "num_kv_heads", "head_dim", "logit_softcap", "attention_window", "attention_softcap"),
    "data": ("store",),
    "optim": ("decay_steps",),
    "train": (
        *("loss_chunk", "diagnose_every", "eval_every", "eval_batches", "replay_check", "stop_after"),
        *("sample_tokens", "init_from"),
    ),
    "guard": ("sigmas",),
    "checkpoint": ("keep_every", "keep_best"),
}
_ZEROS = (int, float, str)
_RENAMED = {("model", "scan_unroll"): {-1: "auto", 0: "all"}}


def _migrate(values: Any) -> Any:
    """Replaces 0 and "" by None in the fields where older versions wrote them for an absent option."""
    if not isinstance(values, dict):
        return values
    values = {key: value for key, value in values.items() if key != "faults"}  # deliberate faults, for tests
    if isinstance(values.get("checkpoint"), dict):
        values["checkpoint"] = {key: value for key, value in values["checkpoint"].items() if key != "retries"}
    for section, names in _ABSENT.items():
        if isinstance(values.get(section), dict):
            old = values[section]
            values[section] = old | {name: None for name in names if type(old.get(name)) in _ZEROS and not old[name]}
    for (section, name), replaced in _RENAMED.items():
        if isinstance(values.get(section), dict) and type(values[section].get(name)) is int:
            old = values[section][name]
            values[section] = values[section] | {name: replaced.get(old, old)}
    return values


def _build(cls: type, values: Any, path: str) -> Any:
    _require(isinstance(values, dict), f"config key {path.rstrip('.') or '(top)'}: expected an object, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {path}{near[0]}?" if near else f"; known keys: {', '.join(hints)}"
            raise ValueError(f"unknown config key {path}{key}{hint}")
    for item in dataclasses.fields(cls):
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        _require(item.name in values or not needed, f"config key {path}{item.name} is missing: give at least that one")
    return cls(**{key: _check(hints[key], value, f"{path}{key}") for key, value in values.items()})


def _check(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, f"{path}.")
    origin = typing.get_origin(hint)
    if origin is types.UnionType or origin is typing.Union:
        choices = [choice for choice in typing.get_args(hint) if choice is not types.NoneType]
        if value is None and len(choices) < len(typing.get_args(hint)):
            return None
        named = [choice for choice in choices if typing.get_origin(choice) is Literal]
        return _check(named[0] if named and isinstance(value, str) else choices[0], value, path)
    if origin is Literal:
        known = value in typing.get_args(hint)
        _require(known, f"config key {path}: {value!r} is none of {', '.join(typing.get_args(hint))}")
        return value
    if origin is tuple:
        ok = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        _require(ok, f"config key {path}: expected a list of strings, got {value!r}")
        return tuple(value)
    number = hint is float and isinstance(value, int | float) and not isinstance(value, bool)
    _require(number or type(value) is hint, f"config key {path}: expected {hint.__name__}, got {value!r}")
    large = hint in (int, float) and isinstance(value, int) and abs(value) >= _INT_LIMIT
    _require(not large, f"config key {path}: {value!r:.30} is too large, it must be below 2^31")
    return float(value) if hint is float else value


def load(path: str | Path) -> Config:
    """Reads a config: a `.py` file (executed: it is your own code) or a `.json` file (not executed)."""
    path = Path(path)
    _require(path.is_file(), f"no config file {path}: give a .py file with a function config(), or a config.json")
    _require(path.suffix in (".json", ".py"), f"config {path} must end in .py or .json")
    if path.suffix == ".json":
        try:
            return from_json(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}; mend it, or give another config") from None
    try:
        function = runpy.run_path(str(path)).get("config")
        _require(callable(function), "there is no function config() that returns a Config")
        result = function()
        _require(isinstance(result, Config), f"config() returned {type(result).__name__}, not a Config")
        return result
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}{_line_in(path, error)}: {_say(error)}; mend the config") from error


def _line_in(path: Path, error: BaseException) -> str:
    """` line N`: the last line of the file that led to an error; empty if none did."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f" line {error.lineno}"
    numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" line {numbers[-1]}" if numbers else ""


def _say(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


def differences(old: Config, new: Config) -> list[str]:
    """Lines `key: old -> new` for every field that differs."""
    flat_old, flat_new = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    return [f"{key}: {flat_old[key]!r} -> {flat_new[key]!r}" for key in flat_old if flat_old[key] != flat_new[key]]


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
