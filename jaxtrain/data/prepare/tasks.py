"""Runs the tasks of a pass in this process or in a pool; each result goes to a file, so that no task runs twice."""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtrain.runtime.files import read_json, write_json


@contextmanager
def worker_pool(num_workers: int | None, num_tasks: int, format_files: Sequence[str] = ()) -> Iterator[Executor | None]:
    """Yields a pool of worker processes, or None where one process would do.

    The workers end with this process, however it ends. An error inside the block terminates them.

    Args:
      num_workers: processes; None is one a core.
      format_files: Python files that each worker runs first: they register formats.
    """
    num_workers = min(num_workers or len(os.sched_getaffinity(0)), num_tasks)
    if num_workers <= 1:
        yield None
        return
    others = set(multiprocessing.active_children())
    # Spawned, not forked: the parent may have threads (JAX has).
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(tuple(format_files),))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_format_file(file: str) -> None:
    """Runs a Python file that registers formats, with its folder on the path."""
    folder = os.path.dirname(os.path.abspath(file))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    runpy.run_path(file)


def run_tasks(
    function: Callable[[Any], dict],
    tasks: Sequence[Any],
    results: Sequence[Path],
    pool: Executor | None,
    advance: Callable[[int], None],
) -> list[dict]:
    """Calls `function` on each task whose result file is missing; returns the results in the order of the tasks.

    Args:
      function: importable by a worker; returns a JSON value.
      results: one JSON file a task; an existing file is the result of an earlier try.
    """
    found = [read_json(path) for path in results]
    for index, result in enumerate(found):
        if result is not None:
            advance(index)
    pending = [index for index, result in enumerate(found) if result is None]
    for index, result in _outcomes(function, tasks, pending, pool):
        write_json(results[index], result)
        found[index] = result
        advance(index)
    return found


def _outcomes(
    function: Callable[[Any], dict], tasks: Sequence[Any], pending: Sequence[int], pool: Executor | None
) -> Iterator[tuple[int, dict]]:
    if pool is None:
        yield from ((index, function(tasks[index])) for index in pending)
        return
    futures = {pool.submit(function, tasks[index]): index for index in pending}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process died. In a script, call prepare() under `if __name__ == '__main__':`; short of memory, "
            "pass a smaller num_workers. Finished units are stored: run again"
        ) from None


def _start_worker(format_files: tuple[str, ...]) -> None:
    # As many processes as cores run: the tokenizers library's threads would only fight over them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for file in format_files:
        run_format_file(file)


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
