"""Packages of the optional extras of pyproject.toml, which are imported where they are used."""

import importlib
from typing import Any


def import_extra(module: str, extra: str, need: str) -> Any:
    """Imports a module of an extra; the ImportError begins with `need` and names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{need}: pip install 'jaxtrain[{extra}]'") from error
