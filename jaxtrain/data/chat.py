"""Chat templates: the Jinja text that a tokenizer's folder gives for turning messages into one text."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtrain.runtime.extras import import_extra

TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
TEMPLATE_FILES = (TEMPLATE_FILE, TOKENIZER_CONFIG)

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """Template of a tokenizer."""

    source: str  # the Jinja text, which runs in a sandbox
    special_tokens: Mapping[str, str]  # text of the special tokens by their names in the template, such as `bos_token`

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Returns the text of a conversation; its special tokens are spelled out, see `Tokenizer.encode_special`.

        Args:
          messages: each with `role` and `content`.
          add_generation_prompt: adds the beginning of the assistant's next message.

        Raises:
          ValueError: messages that the template rejects, or a template that is not valid.
        """
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f'a message is {message!r}: give {{"role": "user", "content": "..."}}')
        jinja2 = import_extra("jinja2", "chat", "chat templates need the jinja2 package")
        values = {"messages": messages, "add_generation_prompt": add_generation_prompt, **self.special_tokens}
        try:
            return _compile(self.source).render(values)
        except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise ValueError(f"the chat template rejects the messages: {type(error).__name__}: {error}") from None


def read_template(folder: str | Path) -> ChatTemplate:
    """Reads the chat template in a run directory, a token store or a folder of transformers.

    Raises:
      ValueError: the folder has none, or a damaged one.
    """
    folder = Path(folder)
    try:
        config = json.loads(_read(folder / TOKENIZER_CONFIG) or "{}")
        source = _read(folder / TEMPLATE_FILE) or config.get("chat_template")
        if isinstance(source, list):  # several by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        special = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / TOKENIZER_CONFIG} is damaged: {error}") from None
    if not isinstance(source, str):
        forms = f"{TEMPLATE_FILE} or a chat_template in {TOKENIZER_CONFIG}"
        raise ValueError(f"{folder} has no chat template: put {forms} there, or leave out --chat")
    tokens = {name: text for name, text in special.items() if name.endswith("_token") and isinstance(text, str)}
    return ChatTemplate(source, tokens)


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    """Compiles a template in the environment that transformers gives it."""
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

    def raise_exception(text: str) -> None:
        raise jinja2.TemplateError(text)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)
