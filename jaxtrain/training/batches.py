"""Training batches of a run: its sources, their mixture, packing, and what a resumed run may change of them."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax

from jaxtrain.config import Config
from jaxtrain.data.loader import TrainBatches, Windows, global_batch
from jaxtrain.data.order import skip_to
from jaxtrain.data.packing import PackedWindows, pack_documents
from jaxtrain.data.rows import Documents
from jaxtrain.data.store import Split, TokenStore
from jaxtrain.fields import parse_ranges
from jaxtrain.mixture import Mixture, check_epochs, describe_mixture, make_mixture, past_of
from jaxtrain.runtime.mesh import by_rows
from jaxtrain.training.run import Run, by_name, identity


def train_batches(run: Run) -> TrainBatches:
    """Returns the training batches of a run; step i + 1 reads batch i.

    Raises a ValueError for too little text, a mixture that does not fit, or more passes than `data.max_epochs`.
    """
    data, settings = run.config.data, run.config.train
    apart = documents(run)
    sources, mixture = source_windows(run.config, run.store), None
    counts = {name: source.count for name, source in sources.items()}
    if run.store.sources:
        mixture = make_mixture(data.mixture, counts, settings.steps, settings.batch_size)
    batches = TrainBatches(
        run.store.train,
        seed=run.config.seed,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        vocab_size=run.program.vocab_size,
        skip=parse_ranges(data.skip),
        mixture=mixture,
        sources=tuple(sources.values()),
        documents=apart,
    )
    if data.max_epochs is not None:
        whole = mixture or make_mixture(None, counts, settings.steps, settings.batch_size)
        check_epochs(whole, counts, settings.steps, data.max_epochs)
    return batches


def documents(run: Run) -> Documents:
    """Returns how the rows of a run's batches treat documents.

    Raises a ValueError if documents are to be masked, and the token files do not mark where they begin.
    """
    data, store = run.config.data, run.store
    splits = (store.train, store.validation) if store else ()  # None: text that the evaluation tokenizes
    if data.mask_documents and any(split.document_starts is None for split in splits):
        raise ValueError(
            f"data.mask_documents: {store.path} does not mark where its documents begin (in token files with an "
            "end-of-text token, data.verify finds them); set it to false, or prepare a token store"
        )
    return Documents(data.mask_documents, data.restart_positions, (store or run.tokenizer).eot_id)


def source_windows(config: Config, store: TokenStore) -> dict[str, Windows | PackedWindows]:
    """Returns the windows of each source in the training split; the source of a single store is named ""."""
    stores = store.sources or {"": store}
    sizes = [store.train.num_tokens for store in stores.values()]
    starts = itertools.accumulate(sizes, initial=0)
    seq_len, packing = config.train.seq_len, config.data.packing
    if packing == "concatenate":
        return {name: Windows(*window, seq_len) for name, *window in zip(stores, starts, sizes, strict=False)}
    windows = zip(stores, starts, sizes, strict=False)
    return {name: _packed(store.train, start, start + size, seq_len) for name, start, size in windows}


@functools.lru_cache(maxsize=8)  # a run asks several times
def _packed(split: Split, start: int, stop: int, seq_len: int) -> PackedWindows:
    return pack_documents(split.document_starts, start, stop, seq_len)


def batch_source(run: Run) -> Callable[[int], dict[str, jax.Array]]:
    """Returns `index -> batch`: training batches, placed on the devices."""
    batches = run.hooks.wrap_batches(train_batches(run))
    return functools.partial(global_batch, batches, sharding=by_rows(run.program.mesh))


def check_mixture(run: Run, saved: dict[str, Any], step: int) -> None:
    """Raises a ValueError if a mixture changes what the first `step` steps of a run have read.

    `saved` is the fingerprint in the checkpoint; the run has all of its stores, and perhaps more.
    """
    was, now = by_name(saved["data"]), by_name(identity(run.store))
    if not step or (was.keys() == now.keys() == {""}):
        return
    windows, old, settings = source_windows(run.config, run.store), saved["config"], run.config.train
    counts = {now[name]: source.count for name, source in windows.items()}

    def mixture(text: str | None, sources: dict[str, str], steps: int) -> Mixture:
        return make_mixture(text, {name: counts[sources[name]] for name in sources}, steps, settings.batch_size)

    before = mixture(old["data"].get("mixture"), was, old["train"]["steps"])
    after = mixture(run.config.data.mixture, now, settings.steps)
    batches = skip_to(step - 1, parse_ranges(run.config.data.skip)) + 1
    if past_of(before, was, batches) != past_of(after, now, batches):
        shown = ", now ".join(map(describe_mixture, (before, after)))
        raise ValueError(
            f"data.mixture changes what the first {step} steps have read ({shown}): "
            f"keep the stages up to there, with the end of a stage as a step (`until {step}`), or go back with --rewind"
        )
