"""Files of text as a split, tokenized in memory: for an evaluation that needs no token store."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxtrain.data.prepare.documents import plan_units, read_documents
from jaxtrain.data.prepare.sources import find_sources
from jaxtrain.data.store import STORE_MANIFEST, Split, open_store
from jaxtrain.data.token_files import find_token_files
from jaxtrain.data.tokenizer import Tokenizer


def open_split(source: str, split: str, tokenizer: Tokenizer) -> Split:
    """Opens a split of a token store, or tokenizes files of text.

    Args:
      source: a token store, or files as `jaxtrain prepare` takes them, with the text of records in `text`.
      split: "train" or "validation" of a token store.

    Raises:
      ValueError: no such file, another tokenizer, or no text.
    """
    path = Path(source).expanduser()
    if (path / STORE_MANIFEST).is_file() or (path.exists() and find_token_files(path)):
        store = open_store(path, vocab_size=tokenizer.vocab_size)
        if store.tokenizer_file is not None and store.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(f"{path} was tokenized with another tokenizer than the model's: give its text instead")
        return getattr(store, split)
    files, _ = find_sources([source])
    documents = (document for unit in plan_units(files, 1 << 62) for _, document in read_documents(unit, "text"))
    return tokenize(documents, tokenizer, source)


def tokenize(documents: Iterable[str | Iterable[str]], tokenizer: Tokenizer, name: str = "the text") -> Split:
    """Tokenizes documents, each after an end-of-text token, so that every token of their text is a label.

    Returns:
      A split whose `num_bytes` are the UTF-8 bytes of the documents. Empty documents are left out.

    Raises:
      ValueError: no text, or text that is no token to the tokenizer.
    """
    pieces, starts, num_tokens, num_bytes = [], [], 0, 0
    for document in documents:
        text = document if isinstance(document, str) else "".join(document)
        if text:
            ids = tokenizer.encode(text)
            starts.append(num_tokens)
            pieces.append(np.concatenate([np.array([tokenizer.eot_id]), ids]).astype(np.uint32))
            num_tokens, num_bytes = num_tokens + 1 + len(ids), num_bytes + len(text.encode("utf-8"))
    if num_tokens < 2:
        what = "is no token to the tokenizer" if num_bytes else "is empty"
        raise ValueError(f"{name} {what}: give text of at least one token")
    return Split((np.concatenate(pieces),), np.array(starts, np.int64), num_bytes, name)
