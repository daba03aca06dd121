"""Prompts from the command line or a file: a text a line, or a JSON record a line."""

import json
import sys
from pathlib import Path
from typing import Any

from jaxtrain.runtime.files import read_file

_FORMS = '{"prompt": "..."}, {"messages": [...]} or "..."'


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Reads a file of prompts; `-` is standard input. Blank lines are skipped.

    Returns:
      A record for each line, with `prompt` (a text) or `messages` (a list), and its further fields.

    Raises:
      ValueError: no file, no prompt, a file that is not UTF-8, or a line that is not as the first one.
    """
    try:
        text = sys.stdin.read() if path == "-" else read_file(Path(path).expanduser()).decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"no file {path}: give a file with a prompt on each line, or - for standard input") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it (iconv -t utf-8)") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt: write one on each line")
    if not _is_record(lines[0][1]):
        return [{"prompt": line.removesuffix("\r")} for _, line in lines]
    records = []
    for number, line in lines:
        if not _is_record(line):
            raise ValueError(f"{path} line {number} is not {_FORMS}, as line {lines[0][0]}: correct it")
        record = json.loads(line)
        records.append(record if isinstance(record, dict) else {"prompt": record})
    return records


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if isinstance(record, dict):
        return isinstance(record.get("prompt"), str) or isinstance(record.get("messages"), list)
    return isinstance(record, str)
