"""Lossless compression with a language model: arithmetic coding with its probabilities (arXiv:2309.10668).

The original is cut into streams, which are coded side by side as the rows of one batch. Encoder and decoder call the
same compiled step, one token a row, and turn its probabilities into integers in the same way (`constriction`'s
fixed-point tables), so that both see the same numbers to the bit. The context is cleared after `window` tokens, as the
windows of `jaxtrain eval` do: a file takes as many bits as its loss says.

Shape suffixes: R streams, V vocabulary.
"""

import hashlib
import itertools
import zlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.data.tokenizer import ByteTokenizer, Tokenizer
from jaxtrain.inference.jxz import Header, Stream, pack_file, unpack_file
from jaxtrain.inference.load import TrainedModel
from jaxtrain.models.decode import check_decodes
from jaxtrain.runtime.extras import import_extra
from jaxtrain.version import __version__

MAX_STREAMS, _WINDOWS = 64, 16  # streams of a file, and windows of a stream, unless the caller says otherwise
_PROBE_STEPS = 4

_WRONG = "the decoded bytes are not the original: the model does not give the probabilities that it gave the encoder"

Progress = Callable[[int, int], None]  # done, total: steps of the batch


class StepModel:
    """Probabilities of the next token of each stream, one step at a time."""

    def __init__(self, trained: TrainedModel, num_streams: int, window: int):
        """Compiles the step. A ValueError for a model that cannot decode, or a window longer than its context."""
        model = trained.model
        check_decodes(model, "cannot compress")
        if not 1 <= window <= model.max_seq_len:
            raise ValueError(f"a window of {window} tokens is not in the model's context, 1 to {model.max_seq_len}")
        self.window, self._params = window, trained.params
        token_R = jax.ShapeDtypeStruct((num_streams,), jnp.int32)

        def step(params: Any, cache: Any, token_R: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
            logits_R1V, cache = model.decode(params, token_R[:, None], cache, position)
            return jax.nn.softmax(logits_R1V[:, 0, : model.vocab_size], axis=-1), cache

        empty = jax.eval_shape(
            lambda params, x_R: model.decode(params, x_R[:, None], None, 0)[1], self._params, token_R
        )
        self._cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), empty)
        # Libraries of GPUs may take another algorithm in every process.
        options = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None
        lowered = jax.jit(step, donate_argnums=1).lower(self._params, self._cache, token_R, np.int32(0))
        self._step = lowered.compile(compiler_options=options)

    def __call__(self, token_R: np.ndarray, index: int) -> np.ndarray:
        """Returns float64 `[R, V]` after the tokens int32 `[R]`, which are the last of `index` before and this one."""
        position = np.int32(index % self.window)  # entries of the cache from there on are not seen
        probability_RV, self._cache = self._step(self._params, self._cache, jnp.asarray(token_R), position)
        probability_RV = np.asarray(probability_RV).astype(np.float64)
        if not np.isfinite(probability_RV.sum()):
            raise ValueError("the model's probabilities are not finite: give another checkpoint with --step")
        return probability_RV

    def probe(self, num_streams: int) -> str:
        """Returns a digest of the probabilities for fixed tokens: other arithmetic gives another digest."""
        digest, token_R = hashlib.sha256(), np.zeros(num_streams, np.int32)
        for index in range(min(_PROBE_STEPS, self.window)):
            probability_RV = self(token_R, index)
            digest.update(probability_RV.tobytes())
            token_R = (np.arange(num_streams) * 7 + index).astype(np.int32) % probability_RV.shape[-1]
        return digest.hexdigest()[:16]


def compress(
    trained: TrainedModel,
    data: bytes,
    *,
    num_streams: int | None = None,
    progress: Progress | None = None,
    make_step: Callable[..., Any] = StepModel,
) -> bytes:
    """Compresses bytes.

    A part that the model makes larger, or that the tokenizer cannot reproduce, is stored uncompressed.

    Args:
      num_streams: parts that are coded side by side: more are faster and take some 15 bytes each. None takes up to 64,
        of at least 16 windows.
      make_step: makes the step from `(trained, num_streams, window)`.

    Returns:
      The bytes of a .jxz file.

    Raises:
      ValueError: a model that cannot decode, or fewer than one stream.
      ImportError: no constriction.
    """
    coding = import_extra("constriction", "compress", "compression needs the constriction package")
    window = trained.config.train.seq_len  # as `jaxtrain eval`
    window = min(window, getattr(trained.model, "max_seq_len", window))
    if num_streams is not None and num_streams < 1:
        raise ValueError(f"the number of streams must be 1 or more, got {num_streams}")
    parts = _split(data, trained.tokenizer, window, num_streams)
    tokens = [_encode(trained.tokenizer, part) for part in parts]
    step = make_step(trained, max(len(parts), 1), window)
    probe = step.probe(max(len(parts), 1))
    ends = [int(ids[-1]) if len(ids) else trained.tokenizer.eot_id for ids in tokens]
    firsts = [trained.tokenizer.eot_id, *ends][: len(parts)]
    encoders = [coding.stream.queue.RangeEncoder() for _ in parts]
    family = coding.stream.model.Categorical(perfect=False)
    total = max(map(len, tokens), default=0)
    last_R = np.array(firsts or [0], np.int32)
    for index in range(total):
        probability_RV = step(last_R, index)
        for row, ids in enumerate(tokens):
            if index < len(ids):
                encoders[row].encode(ids[index : index + 1], family, probability_RV[row : row + 1])
                last_R[row] = ids[index]
        if progress:
            progress(index + 1, total)
    streams, payloads = [], []
    for part, ids, first, encoder in zip(parts, tokens, firsts, encoders, strict=True):
        coded = encoder.get_compressed().astype("<u4").tobytes()
        stored = not len(ids) or len(coded) >= len(part)
        payloads.append(part if stored else coded)
        streams.append(Stream(len(part), 0 if stored else len(ids), first, len(payloads[-1])))
    identity = _digest(trained.params), trained.tokenizer.fingerprint[:32], _software(), probe
    return pack_file(Header(len(data), zlib.crc32(data), window, *identity, tuple(streams)), payloads)


def decompress(
    trained: TrainedModel,
    compressed: bytes,
    *,
    progress: Progress | None = None,
    make_step: Callable[..., Any] = StepModel,
) -> bytes:
    """Returns the original of a .jxz file; takes the arguments of `compress`.

    Raises:
      ValueError: no .jxz file, a damaged one, or one of another model, tokenizer, software or kind of device.
      ImportError: no constriction.
    """
    coding = import_extra("constriction", "compress", "compression needs the constriction package")
    header, payloads = unpack_file(compressed)
    _check_same(header, trained)
    rows = max(len(payloads), 1)
    step = make_step(trained, rows, header.window)
    if step.probe(rows) != header.probe:
        raise ValueError("the probabilities are not the encoder's: decompress on a machine of the kind that compressed")
    lengths = [stream.num_tokens for stream in header.streams]
    decoders = [
        coding.stream.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype(np.uint32)) if length else None
        for payload, length in zip(payloads, lengths, strict=True)
    ]
    family = coding.stream.model.Categorical(perfect=False)
    tokens = [np.zeros(length, np.int32) for length in lengths]
    last_R = np.array([stream.first for stream in header.streams] or [0], np.int32)
    for index in range(total := max(lengths, default=0)):
        probability_RV = step(last_R, index)
        for row, ids in enumerate(tokens):
            if index < len(ids):
                try:
                    ids[index] = last_R[row] = decoders[row].decode(family, probability_RV[row : row + 1])[0]
                except AssertionError:  # no symbol has this code
                    raise ValueError(_WRONG) from None
        if progress:
            progress(index + 1, total)
    parts = [
        _decode(trained.tokenizer, ids) if len(ids) else payload for ids, payload in zip(tokens, payloads, strict=True)
    ]
    data = b"".join(parts)
    if len(data) != header.num_bytes or zlib.crc32(data) != header.crc:
        raise ValueError(_WRONG)
    return data


def _split(data: bytes, tokenizer: Tokenizer, window: int, num_streams: int | None) -> list[bytes]:
    """Cuts the original into parts of whole windows of bytes, and not inside a character unless a token is a byte."""
    if num_streams is None:
        num_streams = min(max(len(data) // (_WINDOWS * window), 1), MAX_STREAMS)
    size = window * max(-(-len(data) // (window * num_streams)), 1)
    cuts = list(range(0, len(data), size))
    if not isinstance(tokenizer, ByteTokenizer):
        cuts = [_character_start(data, cut) for cut in cuts]
    return [data[start:stop] for start, stop in itertools.pairwise([*cuts, len(data)])]


def _character_start(data: bytes, index: int) -> int:
    """Returns the start of the UTF-8 character that holds the byte."""
    nearest = range(index, max(index - 4, 0), -1)
    return next((start for start in nearest if data[start] & 0xC0 != 0x80), index)


def _encode(tokenizer: Tokenizer, part: bytes) -> np.ndarray:
    """Returns the tokens of a part; none if they would not give its bytes back."""
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.encode(part)
    try:
        ids = tokenizer.encode(part.decode("utf-8"))
    except ValueError:  # not UTF-8, or text that spells a special token
        return np.zeros(0, np.int32)
    return ids if _decode(tokenizer, ids) == part else ids[:0]


def _decode(tokenizer: Tokenizer, ids: np.ndarray) -> bytes:
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.decode_bytes(ids)
    return tokenizer.continuation([tokenizer.eot_id], ids).encode()


def _check_same(header: Header, trained: TrainedModel) -> None:
    """Raises a ValueError if the model, the tokenizer, the software or the device differs from the encoder's."""
    if header.parameters != _digest(trained.params):
        raise ValueError(
            f"compressed with other parameters ({header.parameters[:8]}...) than {trained!r} has: give the run and "
            "--step that compressed it"
        )
    if header.tokenizer != trained.tokenizer.fingerprint[:32]:
        raise ValueError(f"compressed with another tokenizer ({header.tokenizer[:8]}...) than {trained!r} has")
    if header.software != _software():
        raise ValueError(f"compressed with {header.software}, and this is {_software()}: install the same versions")


def _digest(params: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype};".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()[:32]


def _software() -> str:
    kind = jax.devices()[0].device_kind
    return f"jax {version('jax')}, jaxlib {version('jaxlib')}, jaxtrain {__version__} on {kind}"
