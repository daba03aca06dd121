"""Texts, their files, and what a store holds of them, for the tests of `prepare`."""

import json

from jaxtrain.data.prepare.documents import hash_document
from jaxtrain.data.prepare.passes import Limits
from jaxtrain.data.store import Split

SMALL_BYTES = 2000


SMALL = Limits(unit_bytes=SMALL_BYTES)


DOCUMENTS = [f"document {number}: " + "the quick brown fox, é and 漢字\n" * (number % 7 + 1) for number in range(60)]


def hash_fraction(text: str) -> float:
    return hash_document("", text)[0]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in texts))
    return str(path)


def documents_of(split: Split) -> list[list[int]]:
    """Tokens of each document, its end-of-text token first."""
    ends = [*split.document_starts[1:].tolist(), split.num_tokens]
    return [split.read(start, end - start).tolist() for start, end in zip(split.document_starts, ends, strict=True)]


def texts_of(store, split: Split) -> list[str]:
    documents = documents_of(split)
    assert all(document[0] == store.eot_id and store.eot_id not in document[1:] for document in documents)
    texts = [store.tokenizer.decode(document[1:]) for document in documents]
    assert split.num_bytes == sum(len(text.encode()) for text in texts)
    assert split.num_documents == len(texts)
    return texts


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
