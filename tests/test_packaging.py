"""The distributions install into a fresh environment and work outside the checkout."""

import re
import shutil
import site
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import QUICK_XLA, ROOT, run, user_environment

TEN_LINES = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL).group(1)
CONFIG = """
from jaxtrain.config import Config, DataConfig, OptimConfig, TrainConfig, llama


def config():
    return Config(
        data=DataConfig(sources=("text/*.txt",)),
        model=llama(num_layers=1, num_heads=1, d_model=8, d_ff=16, max_seq_len=8),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(steps=2, batch_size=2, seq_len=8),
    )
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files that are in the repository: building writes into the tree that it builds."""
    copy = tmp_path_factory.mktemp("source") / "jaxtrain"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, copy, ignore=left_out)
    return copy


def distributions(checkout, folder, *flags):
    """Builds the sdist, and the wheel from the sdist."""
    run([sys.executable, "-m", "build", "--outdir", folder, *flags, checkout])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def fresh_environment(folder):
    """Makes a virtual environment without packages; returns its Python."""
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    return folder / "bin/python"


def borrow_packages(python):
    """Lends the packages of this environment, except jaxtrain's editable installation, to another one."""
    (folder,) = (python.parents[1] / "lib").glob("python*/site-packages")
    (folder / "borrowed.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))


def check_outside(python, folder):
    """Runs the ten lines and trains a config of the user's own with an installed package, away from the checkout."""
    environment = user_environment(JAX_PLATFORMS="cpu", XLA_FLAGS=QUICK_XLA)
    environment.pop("PYTHONPATH", None)
    code = f"{TEN_LINES}\nimport jaxtrain; print(jaxtrain.__file__)"
    where = run([python, "-c", code], cwd=folder, environment=environment)
    assert Path(where.strip()).is_relative_to(python.parents[1])
    (folder / "text").mkdir()
    for i in range(40):
        (folder / f"text/{i}.txt").write_text(f"{i} bottles of beer on the wall\n" * 20)
    (folder / "mine.py").write_text(CONFIG)
    command = [python.parent / "jaxtrain", "train", "mine.py", "--run-dir", "run"]
    run(command, cwd=folder, environment=environment)
    assert (folder / "run/checkpoints/2").is_dir()
    assert (folder / "run/metrics.jsonl").read_text()


def test_the_wheel_works_outside_the_checkout(checkout, tmp_path):
    """Quick sibling: builds and installs without a download, and borrows the dependencies."""
    wheel, sdist = distributions(checkout, tmp_path / "dist", "--no-isolation")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"jaxtrain/py.typed", "jaxtrain/monitoring/page/report.js", "jaxtrain/monitoring/page/uPlot.LICENSE"} <= set(
        names
    )
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "jaxtrain").rglob("*.py")}
    assert modules <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "jaxtrain",
        f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info",
    }
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "configs/quickstart.py", "docs/benchmarks.md", "scripts/test"} <= packed
    assert {"tests/conftest.py", "tests/helpers.py", "tests/core/test_step.py"} <= packed
    assert not [name for name in packed if "__pycache__" in name]

    python = fresh_environment(tmp_path / "fresh")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    run([*pip, wheel])
    borrow_packages(python)
    check_outside(python, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_distribution_installs_with_its_dependencies(kind, checkout, tmp_path):
    wheel, sdist = distributions(checkout, tmp_path / "dist")
    python = fresh_environment(tmp_path / "fresh")
    distribution = wheel if kind == "wheel" else sdist
    run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", distribution], timeout=900)
    run([sys.executable, "-m", "pip", "--python", python, "check"])
    check_outside(python, tmp_path)
