"""Typed and bounded fields of option dataclasses, and suggestions for mistyped names. Imports no library.

A field states its type, its bounds and its meaning in one line: `steps: Positive[int] = 1000  # optimizer steps`.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

Ranges = tuple[tuple[int, int], ...]

_INT_LIMIT = 2**31  # counters on devices have 32 bits


@dataclass(frozen=True)
class Interval:
    """Allowed values of a number, such as `Interval("(0, 1]")`."""

    text: str

    def allows(self, value: float) -> bool:
        low, high = map(float, self.text[1:-1].split(","))
        above = value >= low if self.text[0] == "[" else value > low
        return above and (value <= high if self.text[-1] == "]" else value < high)

    def __str__(self) -> str:
        """Returns what follows "must be" in an error."""
        if self.text.startswith("[") and self.text.endswith(", inf)"):
            return f"{self.text[1:-6]} or more"
        return {"(0, inf)": "above 0", "(0, 1)": "between 0 and 1"}.get(self.text, f"in {self.text}")


@dataclass(frozen=True)
class LocalPath:
    """Marks text that is a path on a local file system, or also a URL; `metavar` stands for it in `--help`."""

    metavar: str
    or_url: bool = False


T = TypeVar("T", int, float)
Positive = Annotated[T, Interval("(0, inf)")]
NotNegative = Annotated[T, Interval("[0, inf)")]
Fraction = Annotated[T, Interval("(0, 1)")]
FractionOrZero = Annotated[T, Interval("[0, 1)")]
PositiveShare = Annotated[T, Interval("(0, 1]")]
Share = Annotated[T, Interval("[0, 1]")]
Folder = Annotated[str, LocalPath("DIR")]
Source = Annotated[str, LocalPath("SOURCE", or_url=True)]
Store = Annotated[str, LocalPath("STORE", or_url=True)]
TokenizerSpec = Annotated[str, LocalPath("byte|bpe:VOCAB|hf:FILE")]
RunFolder = Annotated[str, LocalPath("RUN")]
RunOrUrl = Annotated[str, LocalPath("RUN", or_url=True)]


class Section:
    """Base of all option dataclasses: checks the type and the bounds of every field, and suggests field names."""

    section = ""  # prefix of the fields in errors

    def __init_subclass__(cls, section: str | None = None):
        """Takes the prefix as `class TrainConfig(Section, section="train")`."""
        if section is not None:
            cls.section = section

    def __new__(cls, *values: Any, **fields: Any):
        """Rejects an unknown field with a suggestion."""
        known = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in fields.keys() - set(known):
            raise TypeError(f"{cls.__name__} has no field {name!r}; {suggest(name, known)}")
        return super().__new__(cls)

    def __post_init__(self):
        prefix = f"{self.section}." if self.section else ""
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            object.__setattr__(self, name, check_value(hint, getattr(self, name), f"{prefix}{name}"))


def check_value(hint: Any, value: Any, path: str) -> Any:
    """Checks a value of a field against its type hint: type, choices, bounds and local path.

    Args:
      hint: type of the field, possibly a union with None and with `Annotated` bounds.
      value: the value. A whole number serves as a float, a list as a tuple.
      path: name of the field in errors, such as "train.steps".

    Returns:
      The value in the type of the field.

    Raises:
      ValueError: a value that the hint does not allow; names the field, the value and what is allowed.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in parts:
            return None
        named = [part for part in parts if typing.get_origin(part) is Literal]
        return check_value(named[0] if named and isinstance(value, str) else parts[0], value, path)
    if origin is Literal:
        return check_choice(value, parts, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path}: expected a list of strings, got {value!r}")
        return tuple(check_value(parts[0], item, path) for item in value)
    if origin is Annotated:
        kind, rule = parts
        value = check_value(kind, value, path)
        if isinstance(rule, LocalPath):
            value = expand_user(value)
            (require_one_line if rule.or_url and is_url(value) else require_local)(value, path)
        elif isinstance(rule, Interval) and not rule.allows(value):
            finite = " and finite" if "inf" in rule.text and not math.isfinite(value) else ""
            raise ValueError(f"{path} must be {rule}{finite}, got {value}")
        return value
    whole = hint is float and type(value) is int
    fits = hint is Any or whole or (isinstance(value, hint) and (hint is bool or not isinstance(value, bool)))
    if not fits:
        raise ValueError(f"{path}: expected {hint.__name__}, got {value!r}")
    if type(value) is int and abs(value) >= _INT_LIMIT:
        raise ValueError(f"{path}: {value!r:.30} is too large, it must be below 2^31")
    return float(value) if whole else value


def check_choice(value: Any, choices: Iterable[str], path: str, otherwise: str = "") -> Any:
    """Returns the value if it is one of the choices; otherwise raises a ValueError that suggests one."""
    choices = list(choices)
    if value not in choices:
        near = nearest(value, choices)
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(f"{path}: {value!r} is none of {', '.join(choices)}{hint}{otherwise}")
    return value


def check_divisible(path: str, value: int, by_path: str, by: int, remedy: str = "change one of them") -> None:
    """Raises a ValueError unless a value is divisible by another; the paths name both."""
    if value % by:
        raise ValueError(f"{path} {value} is not divisible by {by_path} {by}: {remedy}")


def check_entry(name: str, table: Iterable[str], path: str, table_name: str) -> None:
    """Raises a ValueError unless a name is in a table to which config files may add entries."""
    remedy = f"if a config file adds it to {table_name}, give that file, for an existing run with --config CONFIG.py"
    check_choice(name, table, path, f" ({remedy})")


def is_url(path: str | os.PathLike) -> bool:
    """Returns True for text that begins with a `scheme://`, such as gs://bucket/run."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(path)))


def expand_user(path: str) -> str:
    """Replaces a leading `~`, also one after `hf:`: no shell does so in `--run-dir=~/run`, nor in a config file."""
    kind = "hf:" if path.startswith("hf:") else ""
    return kind + os.path.expanduser(path.removeprefix(kind))


def require_local(path: str | os.PathLike, name: str) -> None:
    """Raises a ValueError if a path is empty, holds a line break, or has a `scheme://`, such as gs://bucket/run."""
    if not str(path):
        raise ValueError(f"{name} is '': give a path")
    require_one_line(path, name)
    slashes = "/" if isinstance(path, os.PathLike) else "//"  # pathlib folds two slashes into one
    if re.match(rf"(hf:)?[A-Za-z][A-Za-z0-9+.-]+:{slashes}", str(path)):
        raise ValueError(f"{name} {str(path)!r} is no local path: copy it to a local disk or mount it")


def require_one_line(path: str | os.PathLike, name: str) -> None:
    """Raises a ValueError if a path holds a line break, which would forge a line wherever it is printed."""
    if len(f"{path}.".splitlines()) > 1:
        raise ValueError(f"{name} {str(path)!r} holds a line break: rename it, or name the folder that holds it")


# Names of other tools for our fields.
_SYNONYMS = {
    "optim.peak_lr": "lr learning_rate max_lr peak_learning_rate",
    "optim.floor": "min_lr end_lr min_learning_rate",
    "optim.warmup_steps": "warmup warmup_iters num_warmup_steps",
    "optim.weight_decay": "wd decay",
    "optim.clip_norm": "clip grad_clip max_grad_norm gradient_clip clip_grad",
    "optim.b1": "beta1 adam_beta1",
    "optim.b2": "beta2 adam_beta2",
    "optim.name": "optimizer optim",
    "optim.schedule": "lr_schedule lr_scheduler scheduler lr_decay_style",
    "train.steps": "epochs num_epochs max_steps num_steps iterations iters max_iters num_train_steps",
    "train.batch_size": "bs batch global_batch_size train_batch_size",
    "train.seq_len": "sequence_length seq_length block_size context context_length max_length",
    "train.accumulate": "gradient_accumulation_steps grad_accum grad_accum_steps accumulation_steps micro_batches",
    "train.precision": "dtype bf16 fp16 fp32 amp mixed_precision",
    "train.log_every": "log_interval logging_steps",
    "train.eval_every": "eval eval_interval eval_steps evaluate_every",
    "train.eval_batches": "eval_iters",
    "model.num_layers": "layers n_layer n_layers depth num_hidden_layers",
    "model.num_heads": "heads n_head n_heads num_attention_heads",
    "model.d_model": "n_embd hidden_size hidden_dim width dim embed_dim",
    "model.d_ff": "intermediate_size ffn_dim mlp_dim",
    "model.num_experts": "num_local_experts n_experts experts",
    "model.experts_per_token": "num_experts_per_tok top_k_experts moe_topk",
    "checkpoint.every": "save_every save_steps save_interval checkpoint_every",
    "data.sources": "data dataset source text train_data",
    "mesh.data": "dp ddp data_parallel",
    "mesh.fsdp": "zero zero3 shard",
    "mesh.tensor": "tp tensor_parallel model_parallel",
    "run_dir": "output_dir output out_dir out save_dir resume workdir",
    "devices": "gpus num_gpus chips num_devices",
    "png": "out output plot",
    # values
    "wsd": "trapezoid trapezoidal",
    "sgdr": "restarts",
    "float32": "fp32 f32",
    "bfloat16": "bf16",
    "float16": "fp16 f16 half",
    "validation": "val dev",
    # commands
    "train": "fit finetune",
    "generate": "sample complete",
    "prepare": "tokenize preprocess",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that a mistyped one most likely stands for; None if there is none.

    A name also stands for a dotted one of the same last part (`steps`, train.steps), for a synonym (`lr`,
    optim.peak_lr), and for the only known name that it begins (`allow`, allow_change).
    """
    lasts: dict[str, str] = {}
    for path in known:
        lasts.setdefault(path, path)
        lasts.setdefault(path.split(".")[-1], path)
    name = name.lower().replace("-", "_")
    last = name.split(".")[-1]
    synonyms: dict[str, str] = {}
    for path, words in _SYNONYMS.items():
        if target := lasts.get(path) or lasts.get(path.split(".")[-1]):
            synonyms |= dict.fromkeys(words.split(), target)
    if last in synonyms:
        return synonyms[last]
    begun = {path for word, path in lasts.items() if len(name) > 2 and word.startswith(name)}
    if len(begun) == 1:
        return begun.pop()
    spellings = synonyms | lasts
    for word, among, cutoff in ((name, lasts, 0.85), (last, spellings, 0.6), (name, lasts, 0.6)):
        if near := difflib.get_close_matches(word, among, n=1, cutoff=cutoff):
            return spellings[near[0]]
    return None


def suggest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Returns "did you mean ...?" with the nearest name, or the list of known names; `prefix` stands before them."""
    near = nearest(name, known)
    return f"did you mean {prefix}{near}?" if near else f"known: {', '.join(known)}"


def parse_range(text: str, name: str) -> range:
    """Reads a range START:STOP of whole numbers, without STOP. Raises a ValueError for other text or an empty range."""
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts):
        raise ValueError(f"{name} {text!r} is not a range: write START:STOP, such as 10:13")
    found = range(int(parts[0]), int(parts[1]))
    if not found:
        raise ValueError(f"{name} {text!r} is empty: it means START to STOP - 1, so STOP must be larger than START")
    return found


def parse_ranges(texts: Sequence[str]) -> Ranges:
    """Reads the texts of `data.skip` as ascending ranges [START, STOP) with gaps between them; see `parse_range`."""
    merged: list[tuple[int, int]] = []
    for part in sorted((parse_range(text, "data.skip") for text in texts), key=lambda part: part.start):
        if merged and part.start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], part.stop))
        else:
            merged.append((part.start, part.stop))
    return tuple(merged)
