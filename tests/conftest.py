"""Eight simulated devices and JAX's strict modes for every test; set before jax is imported."""

import atexit
import faulthandler
import gc
import os
import shutil
import tempfile

from helpers import QUICK_XLA, STARTED

NUM_DEVICES = 8
# A flag given from outside comes later and wins: XLA_FLAGS=--xla_backend_optimization_level=3 tests what users run.
FLAGS = f"{QUICK_XLA} --xla_force_host_platform_device_count={NUM_DEVICES}"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests compile the same small programs, in this process, in another worker (which has this environment) or in one
# of their own. A process that starts has some twenty of them that take less than a tenth of a second each.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxtrain-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

gc.set_threshold(100_000, 20, 100)  # JAX's caches hold millions of objects that never become garbage

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# An example takes as long as the machine makes it wait.
hypothesis.settings.register_profile("no clock", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("no clock")
STDERR = pytest.StashKey[int]()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also what takes minutes")


def pytest_configure(config):
    config.stash[STDERR] = os.dup(2)  # before pytest captures it


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item, settings):
    """Ends a test that hangs, even in C++ with the GIL, and prints every stack; xdist names it and runs the rest."""
    faulthandler.dump_traceback_later(settings.timeout, exit=True, file=item.config.stash[STDERR])
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer(item):
    faulthandler.cancel_dump_traceback_later()
    return True


def pytest_collection_modifyitems(config, items):
    """Deselects the tests marked slow, unless --slow or `-m` is given; gives each of them half an hour."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))
    if config.getoption("--slow") or config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_sessionfinish():
    gc.freeze()  # pytest and the interpreter collect garbage several times at their ends, for seconds each


@pytest.fixture(autouse=True)
def _no_orphans():
    yield
    while STARTED:
        STARTED.pop().kill()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 40 small text files: sums in words, easy to learn a little of."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        lines = [f"{a} + {a + i} = {a + a + i}\n" for a in range(i, i + 12)]
        (folder / f"{i:02}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def store(corpus, tmp_path_factory):
    """Folder of a byte-level token store of the corpus."""
    from jaxtrain.data.prepare.prepare import prepare

    folder = tmp_path_factory.mktemp("stores") / "store"
    prepare([str(corpus)], folder, validation_fraction=0.2, progress=False)
    return folder


@pytest.fixture(scope="session")
def tiny_config(store):
    """Config of twelve steps that take a second once compiled."""
    from jaxtrain.config import CheckpointConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, llama

    return Config(
        data=DataConfig(store=str(store)),
        model=llama(num_layers=2, num_heads=2, d_model=16, d_ff=32, max_seq_len=16, num_kv_heads=1),
        optim=OptimConfig(peak_lr=1e-2, warmup_steps=3),
        train=TrainConfig(steps=12, batch_size=8, seq_len=16, accumulate=2, log_every=1),
        mesh=MeshConfig(data=1),
        checkpoint=CheckpointConfig(every=5),
    )
