"""Runs the tasks of a pass in this process or in a pool, keeping each result in a file so that none runs twice."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jaxtrain.runtime.files import read_json, write_json


@contextmanager
def worker_pool(num_workers: int | None, num_tasks: int) -> Iterator[Executor | None]:
    """A pool of `num_workers` processes (None: one per core), or None where one process would do."""
    num_workers = min(num_workers or len(os.sched_getaffinity(0)), num_tasks)
    if num_workers <= 1:
        yield None
        return
    # Spawned, not forked: the parent may have threads (JAX has).
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_limit_threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def run_tasks(
    function: Callable[[Any], dict],
    tasks: Sequence[Any],
    results: Sequence[Path],
    pool: Executor | None,
    advance: Callable[[int], None],
) -> list[dict]:
    """Calls `function` on each task whose result file is missing; returns the results in the order of the tasks.

    Args:
      function: importable by a worker; returns what JSON can hold.
      tasks: its arguments.
      results: one JSON file a task; what is there already is taken as it is.
      pool: where to run; None: here.
      advance: told the index of each task that is done.
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
        raise RuntimeError(
            "a worker process died. In a script, call prepare() under `if __name__ == '__main__':`; short of memory, "
            "pass a smaller num_workers. Finished units are kept: run again"
        ) from None


def _limit_threads() -> None:
    # As many processes as cores run: the tokenizers library's threads would only fight over them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
