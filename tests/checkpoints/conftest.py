"""Checkpoints that several files read."""

import pytest


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """Returns a folder with checkpoints of steps 1, 2 and 3; read-only."""
    from checkpoint_helpers import save_steps

    folder = tmp_path_factory.mktemp("checkpoints")
    save_steps(folder, 1, 2, 3)
    return folder
