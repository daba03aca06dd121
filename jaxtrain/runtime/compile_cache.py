"""JAX's persistent compilation cache for the command line: a second start does not compile what the first has.

It lies in the user's cache folder and holds no more than machine code: JAX finds an entry by the program, its own
version, the XLA flags and the features of the processor or accelerator, so that one folder serves all. The same
executable comes out of it that was put in.
"""

import contextlib
import glob
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MIN_SECONDS = 0.0  # of compiling: what is quicker is not kept
_TROUBLE = r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)"  # JAX's words


@contextlib.contextmanager
def compile_cache() -> Iterator[None]:
    """Keeps what is compiled inside for the next start, and takes what earlier ones have kept.

    Nothing is changed if JAX already has a cache folder (JAX_COMPILATION_CACHE_DIR) or is to have none
    (JAX_ENABLE_COMPILATION_CACHE=0). A folder or an entry that cannot be used is said on standard error, and costs the
    time to compile.
    """
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        yield
        return
    folder = _default_folder()
    if problem := _prepare(folder):
        print(f"no compile cache: {problem}; JAX_COMPILATION_CACHE_DIR names another folder", file=sys.stderr)
        yield
        return
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache")
        warnings.showwarning = _Trouble(folder, warnings.showwarning)
        settings: dict[str, Any] = {"jax_compilation_cache_dir": str(folder)}
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            settings["jax_persistent_cache_min_compile_time_secs"] = _MIN_SECONDS
        for name, value in settings.items():
            stack.callback(jax.config.update, name, getattr(jax.config, name))
            jax.config.update(name, value)
        stack.callback(reset_cache)
        reset_cache()
        yield


def _default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as its specification says
        base = os.path.expanduser("~/.cache")
    return Path(base) / "jaxtrain" / "compiled"


def _prepare(folder: Path) -> str:
    """Makes the folder; returns what is wrong with it."""
    if not folder.is_absolute():
        return f"{folder} is no folder: this user has no home"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        return str(error)
    if status.st_uid != os.getuid() or status.st_mode & 0o022:  # what lies in it is run
        return f"others may write to {folder}"
    return "" if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else f"{folder} cannot be written to"


class _Trouble:
    """Stands in for `warnings.showwarning`: removes an entry that JAX complains of, and says so in a line."""

    def __init__(self, folder: Path, show: Any):
        self._folder, self._show, self._said = folder, show, set()

    def __call__(self, message: Warning | str, *where: Any, **more: Any) -> None:
        found = re.match(_TROUBLE, str(message), re.DOTALL)
        if not found:
            self._show(message, *where, **more)
            return
        doing, module, problem = found.groups()
        for entry in self._folder.glob(f"{glob.escape(module)}-*"):  # JAX never writes over what is there
            with contextlib.suppress(OSError):
                entry.unlink()
        if doing not in self._said:
            self._said.add(doing)
            outcome = "was damaged and is made anew" if doing == "reading" else "could not be kept"
            print(f"compile cache: {module} {outcome}: {problem}", file=sys.stderr)
