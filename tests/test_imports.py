"""Import directions, read from the source; importing a module has no side effects."""

import ast
import sys

import pytest
from helpers import ROOT, run, user_environment

PACKAGE = ROOT / "jaxtrain"
# Each core module with the core modules it may import: upwards only towards the front of this list.
CORE = {
    "checks": set(),
    "trees": set(),
    "schedules": {"checks"},
    "loss_head": set(),
    "losses": {"checks", "trees", "loss_head"},
    "precision": {"checks", "trees"},
    "clipping": {"checks", "trees"},
    "sums": {"trees"},
    "guard": {"checks", "trees", "sums"},
    "optim": {"checks", "trees", "clipping"},
    "gradients": {"losses", "trees"},
    "step": {"checks", "trees", "sums", "losses", "precision", "gradients"},
}
CORE_LIBRARIES = {"jax", "optax", "numpy"}  # importing chex would take 90 ms


def imports(path):
    """Every module name that a file imports, at its top or inside a function; `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import, which this test does not follow"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path):
    """The jaxtrain modules among them, as far as they exist: `models.transformer`, `losses`."""
    found = set()
    for name in imports(path):
        parts = name.split(".")[1:] if name.split(".")[0] == "jaxtrain" else []
        if parts and (PACKAGE.joinpath(*parts).is_dir() or PACKAGE.joinpath(*parts).with_suffix(".py").is_file()):
            found.add(".".join(parts))
    return found


def modules():
    paths = sorted(path for path in PACKAGE.rglob("*.py") if path.stem != "__main__")
    assert len(paths) >= 8
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


@pytest.mark.parametrize("name", [name for name in CORE if (PACKAGE / f"{name}.py").is_file()])
def test_the_core_imports_no_program(name):
    path = PACKAGE / f"{name}.py"
    libraries = {module.split(".")[0] for module in imports(path)} - {"jaxtrain"}
    assert libraries - CORE_LIBRARIES - set(sys.stdlib_module_names) == set()
    assert ours(path) - CORE[name] == set()


def test_the_core_is_there():
    assert {path.stem for path in PACKAGE.glob("*.py")} >= CORE.keys() - {"guard"}
    assert ours(PACKAGE / "step.py") >= {"gradients", "losses", "precision", "trees"}  # the parser finds imports at all


# The wings, from the bottom to the top: a module imports from its own wing and from lines above its own only.
LAYERS = [
    {"checks", "fields", "version"},
    {"trees", "schedules", "mixture", "model_config"},
    {"config", "loss_head", "sums"},
    {"losses", "precision", "clipping", "guard"},
    {"gradients", "optim"},
    {"step"},
    {"runtime"},
    {"models", "data", "monitoring", "checkpoints"},
    {"inference"},
    {"training"},
    {"plan"},
    {"commands"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in sorted(names)}


def test_every_module_has_a_layer():
    wings = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert wings - {"__init__", "__pycache__", "py"} == RANK.keys()


@pytest.mark.parametrize("wing", RANK)
def test_imports_run_downwards(wing):
    folder = PACKAGE / wing
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    assert paths
    wrong = {
        f"{path.relative_to(PACKAGE)} -> {name}"
        for path in paths
        for name in ours(path)
        if name.split(".")[0] != wing and RANK[name.split(".")[0]] >= RANK[wing]
    }
    assert wrong == set()


def test_configs_import_only_the_config():
    for path in (ROOT / "configs").glob("*.py"):
        wrong = {name for name in imports(path) if name.split(".")[0] not in ("jaxtrain", "dataclasses")}
        assert not wrong, f"{path} imports {wrong}"
        assert ours(path) == {"config"}, path


def lines_of(code):
    """Returns what the code prints in a process of its own."""
    return run([sys.executable, "-c", code], environment=user_environment(PYTHONPATH=str(ROOT))).splitlines()


def test_the_config_needs_no_jax():
    """Configs are read by tools that only want numbers, and the command line answers --help at once."""
    loaded = lines_of("import sys, jaxtrain.config\nprint(*sorted({name.split('.')[0] for name in sys.modules}))")[0]
    assert "jaxtrain" in loaded.split()
    assert not {"jax", "jaxlib", "flax", "optax", "orbax", "numpy"} & set(loaded.split())


def test_the_core_needs_little_beside_jax_and_optax():
    """Flax and Orbax alone take longer to import than what is imported here."""
    core = ", ".join(f"jaxtrain.{name}" for name in CORE)
    code = (
        f"import sys, jax, optax\nbefore = set(sys.modules)\nimport {core}\nprint(*sorted(set(sys.modules) - before))"
    )
    more = {name.split(".")[0] for name in lines_of(code)[0].split()} - sys.stdlib_module_names
    assert more <= {"jaxtrain", "jax", "optax"}, more


IMPORT_EACH = """
import importlib, logging, os, warnings
import chex, flax.linen, flax.nnx, jax, numpy, optax, orbax.checkpoint
from jax._src import xla_bridge

def handlers():
    loggers = [logging.getLogger(), *(x for x in logging.Logger.manager.loggerDict.values() if hasattr(x, "handlers"))]
    return [(logger.name, logger.level, str(logger.handlers)) for logger in loggers if logger.handlers or logger.level]

def world():
    return {
        "environment": dict(os.environ),
        "logging": handlers(),
        "JAX flags": dict(jax.config.values),
        "warning filters": list(warnings.filters),
        "working directory": os.getcwd(),
    }

assert not xla_bridge.backends_are_initialized(), "a library did it"
logging.getLogger().handlers.clear()  # absl's: with any handler there, logging.basicConfig would do nothing
for name in MODULES:
    before = world()
    importlib.import_module(name)
    for what, value in world().items():
        assert value == before[what], f"importing {name} changed the {what}: {before[what]} -> {value}"
    assert not xla_bridge.backends_are_initialized(), f"importing {name} started a JAX backend"
    print(name)
"""


def test_importing_does_nothing():
    """No device, no flag, no environment variable, no logging, no output."""
    names = modules()
    assert lines_of(IMPORT_EACH.replace("MODULES", repr(names))) == names
