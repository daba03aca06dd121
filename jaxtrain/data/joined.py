"""Token stores joined into one: the data of a mixture."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from jaxtrain.data.store import Split, TokenStore
from jaxtrain.runtime.files import sha256_file


def join_stores(stores: Mapping[str, TokenStore]) -> TokenStore:
    """Joins stores of one tokenizer into one whose splits hold the tokens of all, in order. Copies no tokens.

    Raises:
      ValueError: another tokenizer, vocabulary or end-of-text token; names the stores.
    """
    first, *others = stores.items()
    for name, store in others:
        for what in ("vocab_size", "eot_id"):
            mine, theirs = getattr(first[1], what), getattr(store, what)
            if mine != theirs:
                raise ValueError(f"data.stores: {first[0]} has {what} {mine}, {name} {theirs}: prepare both with one")
        if _tokenizer(first[1]) != _tokenizer(store):
            raise ValueError(
                f"data.stores: {first[0]} and {name} have different tokenizers: prepare both with one, such as "
                f"--tokenizer hf:{first[1].tokenizer_file}"
            )
    identity = json.dumps(sorted((name, store.fingerprint) for name, store in stores.items()))
    return replace(
        first[1],
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        train=_join([store.train for store in stores.values()]),
        validation=_join([store.validation for store in stores.values()]),
        sources=stores,
    )


def _tokenizer(store: TokenStore) -> str | None:
    return store.tokenizer_file and sha256_file(store.tokenizer_file)


def _join(splits: Sequence[Split]) -> Split:
    offsets = np.cumsum([0, *(split.num_tokens for split in splits)])
    starts = [
        split.document_starts + offset
        for split, offset in zip(splits, offsets, strict=False)
        if split.document_starts is not None
    ]
    sizes = [split.num_bytes for split in splits if split.num_bytes is not None]
    masks = [
        mask
        for split in splits
        for mask in split.masks or [np.broadcast_to(np.uint8(1), len(shard)) for shard in split.shards]
    ]
    return Split(
        tuple(shard for split in splits for shard in split.shards),
        np.concatenate(starts) if len(starts) == len(splits) else None,
        sum(sizes) if len(sizes) == len(splits) else None,
        masks=tuple(masks) if any(split.masks for split in splits) else None,
    )
