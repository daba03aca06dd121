"""Tokenizers of models of transformers: of a folder, and the tokenizer files of an export."""

import json
import shutil
from pathlib import Path
from typing import Any

from jaxtrain.data.chat import TEMPLATE_FILE, TOKENIZER_CONFIG
from jaxtrain.data.tokenizer import (
    TOKENIZER_FILE,
    BPETokenizer,
    ByteTokenizer,
    begin_with_eot,
    byte_level_json,
    read_hf,
)
from jaxtrain.models.hf.read import PretrainedFolder
from jaxtrain.runtime.files import read_json, read_object, write_json, write_text

GENERATION_CONFIG = "generation_config.json"
# Files beside tokenizer.json that a run directory takes over from the folder, and an export from the run directory.
COMPANIONS = (TOKENIZER_CONFIG, TEMPLATE_FILE, GENERATION_CONFIG, "special_tokens_map.json")


def read_tokenizer(model: PretrainedFolder) -> BPETokenizer | ByteTokenizer:
    """Reads the tokenizer of a model; its end-of-text token is the one that the folder's configs name.

    Tokens beyond the model's vocabulary, such as those for images, are left out.
    """
    file = model.path / TOKENIZER_FILE
    if not file.is_file():
        raise ValueError(f"{file} is missing: save it with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")
    eot = _end_of_text(model, read_object(file))
    try:
        tokenizer = read_hf(file)
        if eot not in (None, tokenizer.eot_text):
            tokenizer = read_hf(file, eot)
    except ValueError:
        tokenizer = read_hf(file, eot)
    limit = model.config.vocab_rows
    if isinstance(tokenizer, BPETokenizer) and tokenizer.vocab_size > limit:
        values = json.loads(tokenizer.json_text)
        values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < limit]
        tokenizer = BPETokenizer(json.dumps(values))
    if tokenizer.vocab_size > limit:
        raise ValueError(f"{file} has {tokenizer.vocab_size} tokens, and the model {limit} only")
    return tokenizer


def _end_of_text(model: PretrainedFolder, tokenizer: dict[str, Any]) -> str | None:
    """Returns the text of the end-of-text token by tokenizer_config.json or config.json; None if both name none."""
    token = read_object(model.path / TOKENIZER_CONFIG).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
        return token
    number = model.values.get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and entry.get("id") == number:
            return entry.get("content")
    return None


def copy_companions(source: Path, folder: Path) -> None:
    """Copies the files that belong to a tokenizer, where they exist, from one folder to another."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_tokenizer(
    folder: Path, run_dir: Path, tokenizer: BPETokenizer | ByteTokenizer, *, begins: bool
) -> dict[str, Any]:
    """Writes the tokenizer files of an export; returns the special tokens for config.json.

    Args:
      folder: the exported folder.
      run_dir: the run directory, whose `COMPANIONS` are taken over.
      tokenizer: tokenizer of the run.
      begins: the run begins texts with its end-of-text token; the files say so, unless `COMPANIONS` say otherwise.
    """
    copy_companions(run_dir, folder)
    begins = begins and not (folder / TOKENIZER_CONFIG).exists()
    library = BPETokenizer(byte_level_json()) if isinstance(tokenizer, ByteTokenizer) else tokenizer
    write_text(folder / TOKENIZER_FILE, begin_with_eot(library) if begins else library.library_json)
    ids = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}  # one token separates documents
    if not (folder / TOKENIZER_CONFIG).exists():
        names = {"bos_token": tokenizer.eot_text, "eos_token": tokenizer.eot_text, "add_bos_token": begins}
        write_json(folder / TOKENIZER_CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    given = read_json(folder / GENERATION_CONFIG)
    if isinstance(given, dict):
        return {name: given[name] for name in ids if name in given}
    write_json(folder / GENERATION_CONFIG, ids)
    return ids
