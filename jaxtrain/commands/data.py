"""Commands on data: prepare."""

from dataclasses import dataclass
from typing import Annotated

from jaxtrain.fields import Folder, Fraction, LocalPath, Positive, Section, Source, TokenizerSpec
from jaxtrain.runtime.flags import Command
from jaxtrain.runtime.terminal import printable


@dataclass(frozen=True)
class PrepareOptions(Section):
    """Options of `jaxtrain prepare`."""

    positional = "sources"
    sources: tuple[Source, ...]  # files, folders, globs or URLs of text or records, python-stdlib, or - for stdin
    out: Folder  # folder of the new token store
    tokenizer: TokenizerSpec = "byte"  # bpe is trained on the sources; hf is a tokenizer.json
    validation: tuple[Source, ...] = ()  # files to validate on, in place of a share of the sources
    validation_fraction: Fraction[float] = 0.02  # share of the documents, chosen by hash
    eot: str | None = None  # end-of-text token of hf:FILE; none looks for the usual names
    text_field: str = "text"  # field or column that holds the text of a record
    # Python file that adds to jaxtrain.data.prepare.formats.FORMATS
    formats: Annotated[str, LocalPath("FILE.py")] | None = None
    num_workers: Positive[int] | None = None  # processes; none starts one per core
    no_lock: bool = False  # take no lock, for a file system that has none


def run_prepare(options: PrepareOptions) -> int:
    """Tokenizes text into a token store, which `--data.store` of a config names."""
    from jaxtrain.data.prepare.prepare import prepare

    more = dict(vars(options))
    store = prepare(lock=not more.pop("no_lock"), **more)
    for name, split in (("train", store.train), ("validation", store.validation)):
        print(
            f"{name}: {split.num_tokens:,} tokens, {split.num_documents:,} documents, {split.num_bytes:,} bytes "
            f"({(split.num_bytes or 0) / split.num_tokens:.2f} bytes per token)"
        )
    print(printable(f"store: {store.path}") + f" ({store.vocab_size:,} tokens in the vocabulary)")
    return 0


COMMANDS = [
    Command("prepare", PrepareOptions, run_prepare, "prepare texts/ --tokenizer bpe:8192 --out stores/texts"),
]
