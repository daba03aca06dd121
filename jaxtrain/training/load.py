"""A trained model for use from Python."""

import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxtrain.config import Config
from jaxtrain.data.tokenizer import Tokenizer
from jaxtrain.losses import LossSums
from jaxtrain.training.generate import Sampling, continue_text
from jaxtrain.training.run import Run, open_run, restore_params


class TrainedModel:
    """Model of a run, with the parameters of one of its checkpoints.

    Attributes:
      config: config of the run.
      params: parameters, a tree of float32 arrays.
      step: train steps that the parameters have seen.
    """

    def __init__(self, run: Run, params: chex.ArrayTree, step: int):
        self.config: Config = run.config
        self.params, self.step = params, step
        self._run = run

    def __repr__(self) -> str:
        return f"TrainedModel({str(self._run.folder)!r}, step={self.step})"

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the data; a ValueError if the run was trained on token files without one."""
        return self._run.tokenizer

    def logits(self, tokens: Any) -> jax.Array:
        """Returns the float32 logits `[B, T, V]` of the token after each of `tokens`, int `[B, T]`."""
        return self._logits(self.params, jnp.asarray(tokens, jnp.int32))

    def loss(self, batch: dict[str, Any]) -> LossSums:
        """Returns the loss, summed over the tokens of a batch: `inputs`, `labels` int `[B, T]` and `where` bool."""
        return self._loss(self.params, {name: jnp.asarray(value) for name, value in batch.items()})

    def generate(
        self,
        prompt: str = "",
        num_tokens: int = 64,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Continues a text; returns the new text. See `jaxtrain generate --help` for the arguments."""
        sampling = Sampling(temperature, top_k, top_p)
        return continue_text(self._run, self.params, prompt, num_tokens, seed=seed, sampling=sampling)

    @functools.cached_property
    def _logits(self) -> Any:
        model = self._run.program.model
        return jax.jit(lambda params, tokens: model.decode(params, tokens, None, 0)[0])

    @functools.cached_property
    def _loss(self) -> Any:
        return jax.jit(self._run.program.model.loss)


def load(run_dir: str | Path, step: int | None = None, *, model: Any = None) -> TrainedModel:
    """Loads the model of a run; reads nothing outside the run directory.

    Args:
      run_dir: directory of a run that has a checkpoint.
      step: step of the checkpoint; None takes the newest.
      model: the model of a run whose config file defined its own.

    Raises:
      ValueError: no run, no such checkpoint, or a damaged one.

    Example:
      model = jaxtrain.load("runs/quickstart")
      print(model.generate("def main"))
    """
    run = open_run(run_dir, model=model, data=False)
    params, step = restore_params(run, step)
    params = jax.device_put(params, run.program.mesh.devices.flat[0])
    return TrainedModel(run, params, step)
