"""Coordination through the store, without other processes."""

import time

import jax
import pytest

from jaxtrain.runtime import processes


class SlowStore:
    """A key-value store whose answers take 2 ms on their way, as those of `jax.distributed`'s client."""

    def __init__(self, **values):
        self.values = {key.replace("__", "/"): value for key, value in values.items()}

    def key_value_dir_get(self, key):
        return [(name, value) for name, value in self.values.items() if name.startswith(f"{key}/")]

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: Config key {key} not found.")
        return self.values[key]

    def blocking_key_value_get(self, key, milliseconds):
        if milliseconds < 2 or key not in self.values:
            time.sleep(milliseconds / 1000)
            raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: GetKeyValue() timed out with key: {key}")
        return self.values[key]


def test_a_late_or_slow_value_of_the_store_is_read():
    def get(key, seconds, **values):
        return processes.wait_for(SlowStore(**values), key, time.monotonic() + seconds)

    assert get("said", 0.0, said="1") == "1"  # who waited for a first process has no time left for the second
    assert get("said", 60.0, said="1", jaxtrain__failed__0="process 0 failed") == "1"
    assert get("said", 0.01) is None
    with pytest.raises(ValueError, match=r"^process 0 failed$"):
        get("said", 60.0, jaxtrain__failed__0="process 0 failed")


@pytest.mark.parametrize("text", ["0", "soon", "inf"])
def test_a_time_out_that_is_none_is_an_error(monkeypatch, text):
    monkeypatch.setenv("JAXTRAIN_TIMEOUT", text)
    with pytest.raises(ValueError, match=f"JAXTRAIN_TIMEOUT must be .* got '{text}'"):
        processes.time_limit()


def test_one_process_agrees_with_itself():
    processes.agree("nothing", {"a": object()})  # not even looked at
    assert processes.run_on_lead("think", lambda: 7) == 7
    assert processes.is_lead()
    assert processes.StopVote().reason("SIGINT", 3) == "SIGINT"
    assert processes.StopVote().reason(None, 3) is None
