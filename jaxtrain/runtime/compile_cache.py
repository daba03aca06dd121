"""JAX's persistent compilation cache for the command line: a second start does not compile again.

The cache lies in the user's cache folder and holds machine code. JAX finds an entry by the program, its own version,
the XLA flags and the features of the processor or accelerator, so one folder serves all runs. JAX warns about a damaged
entry, compiles again with equal results, and keeps the entry: one line says what to delete, so that the warning ends.
"""

import contextlib
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.runtime.files import cache_folder
from jaxtrain.runtime.terminal import echo


@contextlib.contextmanager
def compile_cache() -> Iterator[None]:
    """Enables JAX's persistent compilation cache inside the block.

    Does nothing if JAX already has a cache folder (JAX_COMPILATION_CACHE_DIR) or must not use one
    (JAX_ENABLE_COMPILATION_CACHE=0). An unusable folder is reported on standard error, and compilation takes its time.
    """
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        yield
        return
    folder = cache_folder("compiled")
    if problem := _prepare(folder):
        echo(f"no compile cache: {problem}; JAX_COMPILATION_CACHE_DIR names another folder", file=sys.stderr)
        yield
        return
    settings: dict[str, str | float] = {"jax_compilation_cache_dir": str(folder)}
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        settings["jax_persistent_cache_min_compile_time_secs"] = 0.0  # no program is too small
    with jax_settings(settings), contextlib.ExitStack() as stack:
        stack.callback(reset_cache)
        reset_cache()
        stack.callback(setattr, warnings, "showwarning", warnings.showwarning)
        warnings.showwarning = _naming_entries(folder, warnings.showwarning)
        yield


def _naming_entries(folder: Path, show: Callable[..., None]) -> Callable[..., None]:
    """Wraps `warnings.showwarning`: a warning about a damaged entry is followed by the files to delete."""

    def naming(message: Warning | str, *arguments: Any, **options: Any) -> None:
        show(message, *arguments, **options)
        if found := re.match(r"Error reading persistent compilation cache entry for '([^']+)'", str(message)):
            entries = shlex.quote(str(folder / found[1])) + "-*-cache"
            echo(f"the program was compiled again; to end this warning: rm {entries}", file=sys.stderr)

    return naming


@contextlib.contextmanager
def jax_settings(values: Mapping[str, Any]) -> Iterator[None]:
    """Changes values of `jax.config` inside the block."""
    import jax

    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            stack.callback(jax.config.update, name, getattr(jax.config, name))
            jax.config.update(name, value)
        yield


def _prepare(folder: Path) -> str:
    """Creates the folder. Returns why it cannot be used, or an empty string."""
    if not folder.is_absolute():
        return f"{folder} is not an absolute path: this user has no home directory"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        return str(error)
    if status.st_uid != os.getuid() or status.st_mode & 0o022:  # the machine code in it is executed
        return f"others may write to {folder}"
    return "" if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else f"{folder} is not writable"
