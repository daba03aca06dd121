"""A finished run for all tests of this folder."""

import pytest
from runs import change, train


@pytest.fixture(scope="package")
def run_dir(tiny_config, tmp_path_factory):
    """Run of 12 steps with checkpoints of steps 5, 10 and 12; the first two were evaluated between steps."""
    folder = tmp_path_factory.mktemp("inference") / "run"
    train(change(tiny_config, train={"eval_every": 5}), folder)
    return folder
