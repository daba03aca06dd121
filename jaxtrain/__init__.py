"""jaxtrain: cross-entropy, AdamW, learning-rate schedules and gradient clipping around one pure JAX train step."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxtrain.version import __version__ as __version__

if TYPE_CHECKING:
    from jaxtrain.config import Config
    from jaxtrain.inference.load import TrainedModel, load
    from jaxtrain.losses import LossSums, cross_entropy, linear_cross_entropy
    from jaxtrain.optim import clipped_adamw, decay_mask
    from jaxtrain.step import TrainState, make_eval_step, make_train_step
    from jaxtrain.training.train import train


__all__ = [
    "Config",
    "LossSums",
    "TrainState",
    "TrainedModel",
    "clipped_adamw",
    "cross_entropy",
    "decay_mask",
    "linear_cross_entropy",
    "load",
    "make_eval_step",
    "make_train_step",
    "train",
]

# Imported on first use: `import jaxtrain` itself imports neither JAX nor any other module.
_MODULES = {
    "Config": "config",
    "LossSums": "losses",
    "TrainState": "step",
    "TrainedModel": "inference.load",
    "clipped_adamw": "optim",
    "cross_entropy": "losses",
    "decay_mask": "optim",
    "linear_cross_entropy": "losses",
    "load": "inference.load",
    "make_eval_step": "step",
    "make_train_step": "step",
    "train": "training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxtrain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxtrain.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
