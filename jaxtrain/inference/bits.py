"""Bits of a text by the loss of a model, beside general compressors."""

import math

import jax
import numpy as np

from jaxtrain.data.compressors import COMPRESSORS, compressor_bits_per_byte
from jaxtrain.data.loader import EvalBatches
from jaxtrain.data.store import Split
from jaxtrain.data.tokenizer import ByteTokenizer
from jaxtrain.inference.load import TrainedModel

_ROWS = 16  # windows of a batch


def model_bits(trained: TrainedModel, data: bytes) -> float:
    """Returns the bits of a text by the model's loss, as one document in windows of `train.seq_len` tokens.

    Raises:
      ValueError: bytes that the tokenizer cannot encode.
    """
    tokenizer = trained.tokenizer
    ids = tokenizer.encode(data if isinstance(tokenizer, ByteTokenizer) else data.decode("utf-8"))
    tokens = np.concatenate([[tokenizer.eot_id], ids]).astype(np.uint32)
    split = Split((tokens,), np.zeros(1, np.int64), len(data))
    batches = EvalBatches(split, _ROWS, trained.config.train.seq_len, trained.model.vocab_size)
    nats = 0.0
    for index in range(batches.num_batches):
        sums = trained.loss(batches.batch(index))
        nats += float((sums[0] if isinstance(sums, tuple) else sums).nll)
    return nats / math.log(2)


def compare_files(trained: TrainedModel, texts: dict[str, bytes]) -> dict[str, dict[str, float | int | None]]:
    """Returns bytes and bits per byte of each text: by the model, with and without its size, and by the compressors.

    The value is None for a text that the tokenizer cannot encode, and for zstd without the zstandard package.
    """
    model_bytes = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(trained.params))
    rows: dict[str, dict[str, float | int | None]] = {}
    for name, text in texts.items():
        try:
            bits = model_bits(trained, text)
        except UnicodeDecodeError:
            bits = None
        row = {
            "bytes": len(text),
            "model": bits and bits / len(text),
            "model + itself": bits and (bits + 8 * model_bytes) / len(text),
        }
        for compressor in COMPRESSORS:
            try:
                row |= compressor_bits_per_byte(text, [compressor])
            except ImportError:
                row[compressor] = None
        rows[name] = row
    return rows
