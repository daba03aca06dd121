"""The config that the tests of findings and of diagnostics start from."""

import pytest
from runs import change


@pytest.fixture
def config(tiny_config):
    """Eleven steps with diagnostics at the tenth; no evaluation follows."""
    settings = {"steps": 300, "stop_after": 11, "diagnose_every": 10}
    return change(tiny_config, train=settings, checkpoint={"every": 1000})
