"""Bits of a text by the loss of a model, beside general compressors."""

import math

import jax
import numpy as np

from jaxtrain.data.compressors import COMPRESSORS, compressor_bits_per_byte
from jaxtrain.data.tokenizer import ByteTokenizer
from jaxtrain.inference.load import TrainedModel

_ROWS = 16  # windows of a batch


def model_bits(trained: TrainedModel, data: bytes) -> float:
    """Returns the bits of a text by the model's loss, as one document in windows of `train.seq_len` tokens.

    Raises:
      ValueError: bytes that the tokenizer cannot encode.
    """
    tokenizer, window = trained.tokenizer, trained.config.train.seq_len
    ids = tokenizer.encode(data if isinstance(tokenizer, ByteTokenizer) else data.decode("utf-8"))
    rows = -(-len(ids) // window)
    inputs = np.zeros(-(-rows // _ROWS) * _ROWS * window, np.int32)
    labels, where = inputs.copy(), np.arange(inputs.size) < len(ids)
    labels[: len(ids)] = ids
    inputs[: len(ids)] = np.concatenate([[tokenizer.eot_id], ids[:-1]])
    arrays = {"inputs": inputs, "labels": labels, "where": where}
    nats = 0.0
    for start in range(0, inputs.size, _ROWS * window):
        batch = {name: x[start : start + _ROWS * window].reshape(_ROWS, window) for name, x in arrays.items()}
        sums = trained.loss(batch)
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
