"""A trained model for use from Python, without the training loop."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.restore import restore_params
from jaxtrain.checkpoints.run_config import read_config
from jaxtrain.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxtrain.data.chat import TOKENIZER_CONFIG
from jaxtrain.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from jaxtrain.inference.generate import complete
from jaxtrain.losses import LossSums
from jaxtrain.models.decode import Sampling
from jaxtrain.models.hf.read import PretrainedFolder, abstract_params, is_pretrained
from jaxtrain.models.lora import merge_lora, uses_lora, without_lora
from jaxtrain.models.model import TransformerModel
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.files import read_object, sha256_file
from jaxtrain.runtime.mesh import replicated
from jaxtrain.runtime.remote import local_run


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainedModel:
    """Model with trained parameters.

    Attributes:
      model: the functions of the model: `init(key)`, `loss(params, batch)` and, for text, `decode`.
      params: parameters, a tree of float32 arrays on one device.
      config: config of the run; of a folder of transformers, a config with its model.
      step: train steps that the parameters have seen; 0 for a folder of transformers.
      folder: the run directory, or the folder of transformers.
      maybe_tokenizer: see `tokenizer`.
      pretrained: True for a folder of transformers, and for a run that `jaxtrain import` made of one.
    """

    model: Any
    params: chex.ArrayTree
    config: Config
    step: int
    folder: Path
    maybe_tokenizer: Tokenizer | None
    pretrained: bool = False

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the data; a ValueError if the run was trained on token files without one."""
        if self.maybe_tokenizer is None:
            raise ValueError(f"{self.folder} has no tokenizer: put the {TOKENIZER_FILE} of its token files there")
        return self.maybe_tokenizer

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a text: the end-of-text token and, for a model of transformers, all of its `eos_token_id`."""
        found = {self.tokenizer.eot_id}
        for name in ("config.json", "generation_config.json"):
            ids = read_object(self.folder / name).get("eos_token_id")
            found.update(token for token in (ids if isinstance(ids, list) else [ids]) if isinstance(token, int))
        return tuple(sorted(found))

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the token ids of a text that begins a document, with the tokens that the model expects before it.

        For a run it is the end-of-text token. For a pretrained model its tokenizer adds them, as in transformers; for
        an exported run that is the end-of-text token too.
        """
        if self.pretrained and not self._begins and (ids := self.tokenizer.encode_whole(text).tolist()):
            return ids
        return [self.tokenizer.eot_id, *self.tokenizer.encode(text).tolist()]

    @functools.cached_property
    def _begins(self) -> bool:
        names = read_object(self.folder / TOKENIZER_CONFIG)
        return names.get("add_bos_token") is True and names.get("bos_token") == names.get("eos_token")

    def __repr__(self) -> str:
        return f"TrainedModel({str(self.folder)!r}, step={self.step})"

    def logits(self, tokens: Any) -> jax.Array:
        """Returns the float32 logits `[B, T, V]` of the token after each of `tokens`, int `[B, T]`.

        Raises:
          ValueError: more tokens than the model's context, or a custom model that has neither `logits` nor `decode`.
        """
        return self.logits_fn(self.params, jnp.asarray(tokens, jnp.int32))

    def loss(self, batch: dict[str, Any]) -> LossSums:
        """Returns the loss, summed over the tokens of a batch: `inputs`, `labels` int `[B, T]` and `where` bool."""
        return self._loss(self.params, {name: jnp.asarray(value) for name, value in batch.items()})

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        num_tokens: int = 64,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        batch_size: int = 8,
    ) -> Any:
        """Continues a text, or a list of texts. Returns the new text, or a list.

        Args:
          prompt: beginning of a document; several run in batches.
          num_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed: see `jaxtrain generate --help`.
          stop: strings that end a text; they are left out of it.
          batch_size: prompts per batch.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        prompts = [self.encode_prompt(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        options: dict[str, Any] = {"seed": seed, "sampling": sampling, "batch_size": batch_size}
        options |= {"stop": [stop] if isinstance(stop, str) else stop, "stop_ids": self.stop_ids}
        made = complete(self.model, self.params, self.tokenizer, prompts, num_tokens, **options)
        texts = [completion.text for completion in made]
        return texts[0] if isinstance(prompt, str) else texts

    @functools.cached_property
    def logits_fn(self) -> Callable[[Any, jax.Array], jax.Array]:
        """Jitted function from parameters and tokens to the logits, see `logits`."""
        if hasattr(self.model, "logits"):
            return jax.jit(self.model.logits)
        if not hasattr(self.model, "decode"):
            raise ValueError(f"{type(self.model).__name__} has neither logits nor decode: add one, see models/model.py")
        return jax.jit(lambda params, tokens: self.model.decode(params, tokens, None, 0)[0])

    @functools.cached_property
    def _loss(self) -> Any:
        return jax.jit(self.model.loss)


def load(
    run_dir: str | Path,
    step: int | Literal["best"] | None = None,
    *,
    model: Any = None,
    average: int = 1,
    store: str | None = None,
) -> TrainedModel:
    """Loads the model of a run onto the first device of each process; imports nothing of the training.

    Args:
      run_dir: directory of a run that has a checkpoint, or a folder that `save_pretrained` of transformers wrote; or
        a URL of one.
      step: step of the checkpoint, or "best" for the lowest validation loss in metrics.jsonl; None takes the newest.
      model: the model of a run whose config file defined one.
      average: number of checkpoints, the newest up to `step`, whose parameters are averaged (arXiv:1706.03762, 6.1).
      store: token store with the tokenizer, for a run directory that has no copy; None takes the store in the config.

    Raises:
      ValueError: no run, no such checkpoint, or a damaged one.
    """
    folder = local_run(run_dir)
    first = {device.process_index: device for device in reversed(jax.devices())}  # of each process
    everywhere = replicated(Mesh(np.array([first[process] for process in sorted(first)]), ("processes",)))
    if is_pretrained(folder):
        if step is not None or average != 1 or model is not None:
            raise ValueError(f"{folder} is no run: it has one step and its own model; give the folder alone")
        return _load_pretrained(folder, everywhere)
    config = read_config(folder, model)
    step = find_step(folder, step)
    source = folder
    if not (folder / TOKENIZER_FILE).is_file():
        source = Path(store or config.data.store or folder / "data").expanduser()
    tokenizer = load_tokenizer(source) if (source / TOKENIZER_FILE).is_file() else None
    trained = definition = config.model
    if isinstance(definition, ModelConfig):
        vocab_size = definition.vocab_size or (tokenizer or load_tokenizer(source)).vocab_size
        trained = dataclasses.replace(definition, vocab_size=vocab_size, attention="auto")
        definition = TransformerModel(trained)
    if average < 1:
        raise ValueError(f"average must be 1 or more checkpoints, got {average}")
    shapes = jax.eval_shape(definition.init, jax.random.key(0))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes)
    tokenizer_hash = sha256_file(source / TOKENIZER_FILE) if tokenizer else None
    params, step = read_mean(folder, like, step, average, tokenizer_hash, trained)
    params = jax.tree.map(lambda leaf: leaf.addressable_data(0), params)
    if uses_lora(trained):
        definition = TransformerModel(without_lora(trained))
        config = dataclasses.replace(config, model=without_lora(config.model))
    return TrainedModel(definition, params, config, step, folder, tokenizer, pretrained=is_imported(folder, step))


def is_imported(folder: Path, step: int) -> bool:
    """Returns True for a checkpoint of a run that `jaxtrain import` made: it has seen no step here."""
    return step == 0 and not (folder / "metrics.jsonl").exists()


def _load_pretrained(folder: Path, sharding: jax.sharding.Sharding) -> TrainedModel:
    from jaxtrain.inference.pretrained import read_tokenizer

    found = PretrainedFolder(folder)
    tokenizer = read_tokenizer(found)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=sharding), abstract_params(found.config)
    )
    params = jax.tree.map(lambda leaf: leaf.addressable_data(0), found.read_params(like))
    settings = TrainConfig(seq_len=min(found.config.max_seq_len, 1024), batch_size=8)
    config = Config(data=DataConfig(sources=(str(folder),)), model=found.config, train=settings)
    model = TransformerModel(dataclasses.replace(found.config, attention="auto"))
    return TrainedModel(model, params, config, 0, folder, tokenizer, pretrained=True)


def read_mean(
    folder: Path, like: Any, step: int | None, average: int, tokenizer_sha256: str | None, model: Any
) -> tuple[Any, int]:
    """Reads the mean of the parameters of `average` checkpoints, the last one of `step`; returns it with that step.

    LoRA matrices of `model`, the model of the run, are merged.
    """
    if not (folder / "checkpoints").is_dir():
        raise ValueError(f"no checkpoint in {folder}: train first, or give another run directory")
    checkpoints = CheckpointFolder(folder / "checkpoints")
    params, saved, step = restore_params(checkpoints, like, step)
    params = merge_lora(params, model)
    if tokenizer_sha256 and saved.get("tokenizer") != tokenizer_sha256:
        raise ValueError(f"the checkpoint of step {step} was made with another tokenizer than {folder} holds")
    earlier = [other for other in checkpoints.steps() if other < step]
    if len(earlier) < average - 1:
        raise ValueError(f"average {average} needs as many checkpoints up to step {step}, not {1 + len(earlier)}")
    for other in earlier[len(earlier) - average + 1 :]:
        params = jax.tree.map(jnp.add, params, merge_lora(restore_params(checkpoints, like, other)[0], model))
    return (jax.tree.map(lambda leaf: leaf / average, params) if average > 1 else params), step


def find_step(folder: Path, step: int | Literal["best"] | None) -> int | None:
    """Returns the step of the checkpoint with the lowest recorded validation loss for "best", and other steps as given.

    Raises:
      ValueError: no checkpoint was evaluated.
    """
    if step != "best":
        return step
    events = read_metrics(folder / "metrics.jsonl")[1]
    losses = {event["step"]: event["nll"] for event in events if event["event"] == "eval"}
    saved = set(CheckpointFolder(folder / "checkpoints").require())
    if not losses.keys() & saved:
        raise ValueError(f"no checkpoint in {folder} was evaluated: give a step of {sorted(saved)} instead of best")
    return min(losses.keys() & saved, key=lambda step: (losses[step], step))
