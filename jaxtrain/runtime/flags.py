"""Command-line flags of option dataclasses, parsed with suggestions.

Every field of an option class is a flag, `run_dir` as `--run-dir`; the fields of a Config are dotted, as
`--train.steps`. The fields that `positional` names, one or several (`"run file"`), are given without a flag. The
comment beside a field is its help.
"""

import dataclasses
import itertools
import linecache
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from jaxtrain.config import Config, ModelConfig
from jaxtrain.fields import LocalPath, Section, check_value, nearest
from jaxtrain.runtime.config_files import load_config


class Command(NamedTuple):
    """Command of the program."""

    name: str  # word after `jaxtrain`
    options: type[Any]  # option class; its attribute `positional` names the fields without a flag
    run: Callable[[Any], int]  # function of the options that returns an exit code; its docstring is the description
    example: str  # command line without `jaxtrain`


@dataclass(frozen=True)
class Flag:
    """Flag of one field; `path` is dotted for the fields of a Config."""

    path: str
    hint: Any
    default: Any  # MISSING: the flag is required
    help: str

    @property
    def name(self) -> str:
        return "--" + self.path.replace("data_store", "data.store").replace("_", "-")

    @property
    def negation(self) -> str:
        """Returns the spelling that sets a bool to False."""
        section, _, last = self.name.removeprefix("--").rpartition(".")
        return f"--{section}{'.' if section else ''}no-{last}"


def parse(command: Command, words: Sequence[str]) -> Any:
    """Reads the options of a command, an instance of `command.options`, from the words after its name.

    Raises a ValueError for an unknown flag, or a missing or wrong value; it suggests the nearest flag.
    """
    words, config, positional = list(words), None, command.options.positional
    if positional == "config":
        if not words or words[0].startswith("-"):
            raise ValueError(f"give a config first: {usage(command)}, such as configs/quickstart.py")
        file = words.pop(0)
        config = load_config(file)
    flags = {flag.path: flag for flag in list_flags(command.options, config)}
    given, rest = _read(flags, words, command)
    if config is not None and "run_dir" in flags:
        given.setdefault("run_dir", f"runs/{Path(file).stem}")
    if config is not None:
        own = {flag.path for flag in _config_flags(config)}
        given["config"] = _change(config, {path: given.pop(path) for path in list(given) if path in own})
    else:
        rest = _read_positional(command, rest, given)
    if rest:
        raise ValueError(_unexpected(rest[0], [flag.name for flag in flags.values()], command))
    for flag in flags.values():
        if flag.default is MISSING and flag.path not in given:
            raise ValueError(f"{flag.name} {metavar(flag.hint)} is missing: {flag.help}")
    return command.options(**given)


def _read_positional(command: Command, words: list[str], given: dict[str, Any]) -> list[str]:
    """Adds the values without a flag to `given`; returns the words that are left. A tuple takes all of them."""
    hints = typing.get_type_hints(command.options, include_extras=True)
    for name in command.options.positional.split():
        hint = hints[name]
        if words:
            value, words = (tuple(words), []) if kind_of(hint) is tuple else (words[0], words[1:])
            given[name] = check_value(hint, value, metavar(hint))
        elif not hasattr(command.options, name):  # a class attribute is the default
            raise ValueError(f"{metavar(hint)} is missing: {usage(command)}")
    return words


@dataclass(frozen=True)
class _ConfigOptions(Section):
    positional = "config"
    config: Config  # config file: .py with a function config(), or .json


def parse_config(words: Sequence[str]) -> Config:
    """Reads a config file and its flags, `["configs/quickstart.py", "--train.steps", "30"]`; raises as `parse` does."""
    return parse(Command("train", _ConfigOptions, lambda options: 0, ""), words).config


def _read(flags: dict[str, Flag], words: list[str], command: Command) -> tuple[dict[str, Any], list[str]]:
    """Splits words into values by path and the words that belong to no flag."""
    spellings = {flag.name: flag for flag in flags.values()}
    negations = {flag.negation: flag for flag in flags.values() if kind_of(flag.hint) is bool}
    given: dict[str, Any] = {}
    rest: list[str] = []
    while words:
        word = words.pop(0)
        if not re.match("-[-A-Za-z]", word):
            rest.append(word)
            continue
        name, equals, text = word.partition("=")
        name = {"-o": "--out"}.get(name, name.replace("_", "-"))
        flag = spellings.get(name)
        if name in negations and not equals:
            given[negations[name].path] = False
        elif flag is None:
            raise ValueError(_unknown(word.partition("=")[0], [*spellings, *negations], command))
        elif kind_of(flag.hint) is bool and not equals and "".join(words[:1]).lower() not in ("true", "false"):
            given[flag.path] = True
        else:
            texts = [text] if equals else _take(words, many=kind_of(flag.hint) is tuple)
            if not texts:
                raise ValueError(f"{name} needs a value, {metavar(flag.hint)}: {flag.help}")
            given[flag.path] = _convert(flag, texts)
    return given, rest


def _take(words: list[str], *, many: bool) -> list[str]:
    taken: list[str] = []
    while words and not words[0].startswith("--") and (many or not taken):
        taken.append(words.pop(0))
    return taken


def _unexpected(word: str, known: list[str], command: Command) -> str:
    """Returns the error for a word that belongs to no flag, such as `train.steps=3` or a flag after a long dash."""
    flag = "--" + word.partition("=")[0].lstrip("-\u2013\u2014").replace("_", "-")
    hint = f"did you mean {flag}?" if flag in known else f"`jaxtrain {command.name} --help` lists the flags"
    return f"unexpected argument {word!r}; {hint}"


def _unknown(name: str, known: list[str], command: Command) -> str:
    path = re.sub(r"^no_(\w+\.)", r"\1no_", name.lstrip("-").replace("-", "_"))
    paths = {spelling.removeprefix("--").replace("-", "_"): spelling for spelling in [*known, "--help"]}
    if path.startswith("model.") and not any(known_path.startswith("model.") for known_path in paths):
        return f"unknown flag {name}: only the fields of a frozen dataclass can be set, and this config's model is none"
    near = nearest(path, list(paths))
    hint = f"did you mean {paths[near]}?" if near else f"`jaxtrain {command.name} --help` lists the flags"
    return f"unknown flag {name}: {hint}"


def _convert(flag: Flag, texts: list[str]) -> Any:
    """Converts the text of a value to the type of its field."""
    label = flag.path if "." in flag.path or flag.path == "seed" else flag.name
    if texts == ["none"] and types.NoneType in typing.get_args(flag.hint):
        return None
    kind = kind_of(flag.hint)
    if kind is tuple:
        return check_value(flag.hint, () if texts == ["none"] else tuple(texts), label)
    (text,) = texts
    value: Any = text
    try:
        if kind is bool:
            value = {"true": True, "false": False}[text.lower()]
        elif kind in (int, float):
            value = kind(text)
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        if types.NoneType in typing.get_args(flag.hint):
            expected += " or none"
        if not any(typing.get_origin(choice) is Literal for choice in typing.get_args(flag.hint)):
            raise ValueError(f"{label}: expected {expected}, got {text!r}") from None
    return check_value(flag.hint, value, label)


def kind_of(hint: Any) -> Any:
    """Returns the plain type of a hint: int for `Positive[int] | None`, tuple for `tuple[str, ...]`."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union, Annotated):
        return kind_of(next(choice for choice in typing.get_args(hint) if choice is not types.NoneType))
    return str if origin is Literal else origin or hint


def list_flags(options: type[Any], config: Config | None) -> Iterator[Flag]:
    """Yields the flags of an option class; the defaults are the values of the config, if there is one."""
    hints, docs = typing.get_type_hints(options, include_extras=True), field_docs(options)
    for item in dataclasses.fields(options):
        if item.name not in options.positional.split():
            yield Flag(item.name, hints[item.name], item.default, docs.get(item.name, ""))
    if hints.get("config") is Config:
        yield from _config_flags(config)


def _config_flags(config: Config | None) -> Iterator[Flag]:
    hints, docs = typing.get_type_hints(Config, include_extras=True), field_docs(Config)
    for section in dataclasses.fields(Config):
        hint = hints[section.name]
        value = None if config is None else getattr(config, section.name)
        if section.name == "model":
            hint = ModelConfig if value is None else type(value)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _section_flags(hint, value, section.name)
        elif section.name != "model":
            yield Flag(section.name, hint, section.default if config is None else value, docs[section.name])


def _section_flags(cls: type[Any], value: Any, section: str) -> Iterator[Flag]:
    if not cls.__dataclass_params__.frozen:
        return
    hints, docs = typing.get_type_hints(cls, include_extras=True), field_docs(cls)
    for item in dataclasses.fields(cls):
        if kind_of(hints[item.name]) in (bool, int, float, str, tuple):
            default = item.default if value is None else getattr(value, item.name)
            yield Flag(f"{section}.{item.name}", hints[item.name], default, docs.get(item.name, ""))


def _change(config: Config, values: dict[str, Any]) -> Config:
    """Returns the config with other values, by dotted path."""
    sections: dict[str, dict[str, Any]] = {"": {}}
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        sections.setdefault(section, {})[name] = value
    changes = sections.pop("")
    changes |= {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **changes)


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Returns the comment beside or above each field of a dataclass; none where the source is not at hand."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        above: list[str] = []
        for line in _class_lines(base) if dataclasses.is_dataclass(base) else ():
            field = re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
            if field:
                docs[field[1]] = field[2] or " ".join(above)
            comment = re.match(r"    # (.*)", line)
            above = [*above, comment[1]] if comment else []
    return docs


def _class_lines(cls: type[Any]) -> Iterator[str]:
    """Yields the source lines in the body of a module's class."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
    lines = itertools.dropwhile(lambda line: not line.startswith(f"class {cls.__name__}("), linecache.getlines(file))
    for line in itertools.islice(lines, 1, None):
        if not line.startswith((" ", "\n")):
            return
        yield line.rstrip()


def usage(command: Command) -> str:
    """Returns `jaxtrain NAME POSITIONAL [flags]`."""
    flags = [flag for flag in list_flags(command.options, None) if flag.default is MISSING and "." not in flag.path]
    required = [f"{flag.name} {metavar(flag.hint)}" for flag in flags]
    return " ".join(["jaxtrain", command.name, *positional_metavars(command.options).values(), *required, "[flags]"])


def positional_metavars(options: type[Any]) -> dict[str, str]:
    """Returns the word that stands for each value without a flag, by the name of its field."""
    hints = typing.get_type_hints(options, include_extras=True)
    names = {name: metavar(hints[name]) for name in options.positional.split()}
    return {name: f"[{text}]" if hasattr(options, name) else text for name, text in names.items()}


def metavar(hint: Any) -> str:
    """Returns the word that stands for the value of a flag."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Config:
        return "CONFIG"
    if origin in (types.UnionType, typing.Union):
        return "|".join(metavar(part) for part in parts if part is not types.NoneType)
    if origin is Annotated:
        named = parts[1].metavar if isinstance(parts[1], LocalPath) else parts[1]
        return named if isinstance(named, str) else metavar(parts[0])
    if origin is tuple:
        return f"{metavar(parts[0])}..."
    if origin is Literal:
        return "|".join(parts)
    return {int: "N", float: "X", str: "TEXT"}.get(hint, "VALUE")
