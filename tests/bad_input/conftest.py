import json
import shutil

import pytest
from bad_helpers import World
from runs import train

from jaxtrain.runtime.config_files import to_json


@pytest.fixture(scope="session")
def good(tiny_config, tmp_path_factory):
    """A finished run and a config."""
    folder = tmp_path_factory.mktemp("good")
    train(tiny_config, folder / "run")
    (folder / "config.json").write_text(to_json(tiny_config))
    return folder


@pytest.fixture
def world(good, store, corpus, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(store, tmp_path / "store")
    shutil.copytree(good / "run", tmp_path / "run")
    config = json.loads((good / "config.json").read_text())
    config["data"]["store"] = str(tmp_path / "store")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(work)
    return World(work, tmp_path / "config.json", tmp_path / "store", tmp_path / "run", corpus, tmp_path / "out")
