"""Commands that exchange models with transformers: import, export."""

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxtrain.commands.model import Checkpoint, RunOptions, model_of
from jaxtrain.fields import Folder, LocalPath, Positive, RunFolder, Section
from jaxtrain.runtime.flags import Command
from jaxtrain.runtime.terminal import echo


@dataclass(frozen=True)
class ImportOptions(Section):
    """Options of `jaxtrain import`."""

    positional = "folder"
    folder: Annotated[str, LocalPath("HF_FOLDER")]  # folder of transformers: config.json, safetensors, tokenizer.json
    out: RunFolder  # new run directory


def run_import(options: ImportOptions) -> int:
    """Makes a run directory from a model of transformers."""
    import jax

    from jaxtrain.training.exchange import import_model

    run = import_model(options.folder, options.out)
    c = run.program.model.config
    num_params = sum(leaf.size for leaf in jax.tree.leaves(run.program.abstract_state.params))
    echo(f"model: {num_params:,} parameters, {c.num_layers} layers, d_model {c.d_model}, {c.vocab_size:,} tokens")
    echo(f"run: {options.out}")
    return 0


@dataclass(frozen=True, kw_only=True)
class ExportOptions(RunOptions):
    """Options of `jaxtrain export`."""

    out: Folder  # new folder
    to: Literal["hf"] = "hf"  # format: a folder of transformers
    step: Checkpoint | None = None  # checkpoint; best has the lowest validation loss; none takes the newest
    average: Positive[int] = 1  # newest checkpoints whose parameters are averaged
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the written weights; float32 keeps every bit


def run_export(options: ExportOptions) -> int:
    """Writes the model of a run as a folder that transformers loads."""
    from jaxtrain.training.exchange import export_model
    from jaxtrain.training.run import open_run

    run = open_run(options.run, store=options.data_store, model=model_of(options), data=False)
    step = export_model(run, options.out, step=options.step, average=options.average, dtype=options.dtype)
    echo(f"checkpoint: step {step}")
    echo(f"model: {options.out}")
    return 0


COMMANDS = [
    Command("import", ImportOptions, run_import, "import models/qwen --out runs/qwen"),
    Command("export", ExportOptions, run_export, "export runs/first --to hf --out models/first"),
]
