"""The text of `jaxtrain COMMAND --help`."""

import contextlib
import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING

from jaxtrain.config import Config, ModelConfig
from jaxtrain.runtime.config_files import load_config
from jaxtrain.runtime.flags import Command, Flag, field_docs, kind_of, list_flags, metavar, positional_metavars, usage

_COLUMN = 36  # characters before the text of a flag


def show_help(command: Command, words: Sequence[str]) -> str:
    """Returns the help of a command; a config that is its first word gives the defaults, unless it cannot be read."""
    config = None
    if command.options.positional == "config" and words and words[0][:1] != "-":
        with contextlib.suppress(ValueError):
            config = load_config(words[0])
    width = min(shutil.get_terminal_size().columns, 120)
    positional = command.options.positional
    lines = [f"usage: {usage(command)}", ""]
    for paragraph in (inspect.getdoc(command.run) or "").split("\n\n"):
        lines += [*textwrap.wrap(paragraph, width), ""]
    lines += ["example:", f"  jaxtrain {command.example}", ""]
    arguments, docs = positional_metavars(command.options), field_docs(command.options)
    lines += ["argument:" if len(arguments) == 1 else "arguments:"]
    lines += [line for name, word in arguments.items() for line in _entry(word, docs[name], width)]
    titles, groups = {"": "options:"}, {"": []}
    for item in dataclasses.fields(Config) if positional == "config" else ():
        cls = ModelConfig if item.name == "model" else item.type
        if dataclasses.is_dataclass(cls):
            title = re.split(r"[.;\n]", inspect.getdoc(cls) or "")[0]
            titles[item.name], groups[item.name] = f"{item.name}: {title[:1].lower()}{title[1:]}", []
    for flag in list_flags(command.options, config):
        groups[flag.path.rpartition(".")[0]].append(flag)
    for section, flags in groups.items():
        if flags:
            lines += ["", titles[section]]
        for flag in flags:
            lines += _entry(*_columns(flag), width)
    return "\n".join(lines)


def _columns(flag: Flag) -> tuple[str, str]:
    """Returns the two columns of a flag: its spelling, and its help with the default."""
    if kind_of(flag.hint) is bool:
        spelling = f"{flag.name} / {flag.negation}" if flag.default else flag.name
        return spelling, flag.help
    default, text = flag.default, re.sub(r"\bNone\b", "none", flag.help)
    if default is MISSING:
        note = " (required)"
    elif default in (None, ()):
        note = "" if re.search(r"\bnone\b", text) else " (default: none)"
    else:
        shown = " ".join(default) if isinstance(default, tuple) else default
        note = f" (default: {shown:g})" if isinstance(shown, float) else f" (default: {shown})" if shown != "" else ""
    return f"{flag.name} {metavar(flag.hint)}", text + note


def _entry(left: str, right: str, width: int) -> list[str]:
    """Returns the lines of an entry in two columns."""
    indent, space = " " * _COLUMN, max(width - _COLUMN, 24)
    text = textwrap.wrap(right, space, break_long_words=False, break_on_hyphens=False) or [""]
    first = f"  {left}"
    if len(first) + 2 > _COLUMN:
        return [first, *(indent + line for line in text)]
    return [first.ljust(_COLUMN) + text[0], *(indent + line for line in text[1:])]
