"""Checkpoints that several files read."""

import pytest


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """A folder with checkpoints of steps 1, 2 and 3, not to be changed."""
    from checkpoint_helpers import save_steps

    folder = tmp_path_factory.mktemp("checkpoints")
    save_steps(folder, 1, 2, 3)
    return folder
