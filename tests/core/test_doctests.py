"""The examples in the docstrings of the public core run and print what they say."""

import doctest
import importlib

import jax
import pytest

MODULES = ["losses", "schedules", "clipping", "optim", "guard", "precision", "step", "trees"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as users have it
        result = doctest.testmod(importlib.import_module(f"jaxtrain.{name}"))
    assert result.failed == 0
    assert result.attempted > 0
