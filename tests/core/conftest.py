"""Arguments of a loss that several files share."""

import numpy as np
import pytest
from losses_reference import TOKENS, VOCAB, WIDTH


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    labels = rng.integers(0, VOCAB, TOKENS)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], TOKENS).astype(np.float32)
    weights[-1] = 2.0  # what a wrong padding of the last chunk would repeat
    return hidden, kernel, labels.astype(np.int32), weights
