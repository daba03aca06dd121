"""Commands on data: prepare, inspect."""

import json
from dataclasses import dataclass, fields
from typing import Annotated, Any

from jaxtrain.config import Config
from jaxtrain.fields import Folder, Fraction, LocalPath, NotNegative, Positive, Section, Source, TokenizerSpec
from jaxtrain.runtime.flags import Command
from jaxtrain.runtime.remote import is_run, local_run
from jaxtrain.runtime.terminal import echo

_TEXT_OPTIONS, _COMPLETION_OPTIONS = ("text_field", "formats", "num_workers"), ("chat_template",)


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
    completions: bool = False  # records hold a prompt and its completion, or chat messages; train on completions alone
    chat_template: Folder | None = None  # folder with a chat template, if the tokenizer has none

    def __post_init__(self):
        super().__post_init__()
        unused = _TEXT_OPTIONS if self.completions else _COMPLETION_OPTIONS
        for item in fields(self):
            if item.name in unused and getattr(self, item.name) != item.default:
                other = "goes without" if self.completions else "goes with"
                raise ValueError(f"--{item.name.replace('_', '-')} {other} --completions: change one of them")


def run_prepare(options: PrepareOptions) -> int:
    """Tokenizes text into a token store, which `--data.store` of a config names."""
    more = dict(vars(options))
    lock = not more.pop("no_lock")
    if more.pop("completions"):
        from jaxtrain.data.prepare.completions import prepare_completions

        store = prepare_completions(lock=lock, **{name: more[name] for name in more if name not in _TEXT_OPTIONS})
    else:
        from jaxtrain.data.prepare.prepare import prepare

        store = prepare(lock=lock, **{name: more[name] for name in more if name not in _COMPLETION_OPTIONS})
    for name, split in (("train", store.train), ("validation", store.validation)):
        if split.masks is None:
            size = f"{split.num_bytes:,} bytes ({split.num_bytes / split.num_tokens:.2f} bytes per token)"
        else:
            size = f"{split.num_labels:,} tokens to train on"
        echo(f"{name}: {split.num_tokens:,} tokens, {split.num_documents:,} documents, {size}")
    echo(f"store: {store.path} ({store.vocab_size:,} tokens in the vocabulary)")
    return 0


@dataclass(frozen=True)
class InspectOptions(Section):
    """Options of `jaxtrain inspect`."""

    positional = "path"
    path: Annotated[str, LocalPath("STORE|RUN", or_url=True)]  # token store, token files, or run directory
    windows: NotNegative[int] = 3  # windows of text to show of each split
    json: bool = False  # print one JSON object


def run_inspect(options: InspectOptions) -> int:
    """Shows documents, tokens, duplicates, repetitions and text of a token store or a run."""
    from jaxtrain.data.inspection import UNSTATED_VOCABULARY, inspect_store
    from jaxtrain.data.store import open_store
    from jaxtrain.monitoring.tables import format_table
    from jaxtrain.training.run import open_data, read_config

    mixture: dict[str, Any] = {}
    if is_run(options.path):
        folder = local_run(options.path)
        config = read_config(folder)
        store = open_data(config, folder)
        if store.sources:
            mixture = _describe_mixture(config, store)
    else:
        store = open_store(options.path, vocab_size=UNSTATED_VOCABULARY)
    stores = store.sources or {"": store}
    found = {name: inspect_store(each, options.windows) for name, each in stores.items()}
    if options.json:
        echo(json.dumps({"mixture": mixture, "stores": found} if mixture else found[""]), verbatim=True)
        return 0
    if mixture:
        rows = [[name, *(f"{value:,}" for value in row.values())] for name, row in mixture["sources"].items()]
        echo(f"mixture: {mixture['shares']}")
        echo(format_table(["source", "tokens", "sequences", "read", "passes"], rows))
    for name, result in found.items():
        _show(name, result)
    return 0


def _describe_mixture(config: Config, store: Any) -> dict[str, Any]:
    """Returns the shares of a run's sources, and how often the run reads each."""
    from jaxtrain.mixture import describe_mixture, make_mixture
    from jaxtrain.training.batches import source_windows

    windows = {name: source.count for name, source in source_windows(config, store).items()}
    settings = config.train
    mixture = make_mixture(config.data.mixture, windows, settings.steps, settings.batch_size)
    counts = mixture.counts(settings.steps * settings.batch_size)
    rows = {
        name: {
            "tokens": store.sources[name].train.num_tokens,
            "sequences": windows[name],
            "sequences_read": count,
            "passes": round(count / windows[name], 3) if windows[name] else 0.0,
        }
        for name, count in zip(mixture.names, counts, strict=True)
    }
    return {"shares": describe_mixture(mixture), "sources": rows}


def _show(name: str, found: dict[str, Any]) -> None:
    from jaxtrain.data.inspection import escape
    from jaxtrain.monitoring.tables import format_table

    size = f"{found['vocab_size']:,} tokens in the vocabulary" if found["vocab_size"] else "vocabulary not stated"
    echo(f"{name + ': ' if name else ''}{found['path']} ({size})")
    for split, values in found["splits"].items():
        size = f", {values['bytes']:,} bytes ({values['bytes_per_token']:.2f} per token)" if "bytes" in values else ""
        echo(f"\n{split}: {values['tokens']:,} tokens, {values['distinct_tokens']:,} of them distinct, ", end="")
        echo(f"{values['unigram_entropy_bits']:.2f} bits of entropy each" + size)
        if "documents" in values:
            sizes = values["document_tokens"]
            echo(
                f"{values['documents']:,} documents: median {sizes['median']:,} tokens, mean {sizes['mean']:,.0f}, "
                f"99% {sizes['p99']:,}, longest {sizes['max']:,}"
            )
            head = ["source", "documents", "tokens", "copies", "share of tokens", "repetitive"]
            rows = [{"source": "all", **values}, *values["sources"]]
            echo(format_table(head, [_source_row(row) for row in rows], cut=["source"]))
        rows = [
            [f"'{escape(top['text'])}'", str(top["id"]), f"{top['count'] / values['tokens']:.2%}"]
            for top in values["top_tokens"]
        ]
        echo(format_table(["frequent token", "id", "share"], rows, cut=["frequent token"]))
        for row in values.get("longest", ()):
            echo(f"document {row['document']:,} of {row['tokens']:,} tokens: {escape(row['text'])}")
        for row in values["windows"]:
            echo(f"window at token {row['position']:,}: {escape(row['text'])}")
    echo("\n" + ("\n".join(f"alarm: {alarm}" for alarm in found["alarms"]) or "no alarms"))


def _source_row(row: dict[str, Any]) -> list[str]:
    numbers = [f"{row[name]:,}" for name in ("documents", "tokens", "duplicate_documents")]
    return [row["source"], *numbers, f"{row['duplicate_tokens']:.1%}", f"{row['repetitive_documents']:,}"]


COMMANDS = [
    Command("prepare", PrepareOptions, run_prepare, "prepare texts/ --tokenizer bpe:8192 --out stores/texts"),
    Command("inspect", InspectOptions, run_inspect, "inspect stores/texts"),
]
