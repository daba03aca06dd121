"""Lease on a folder behind a URL: one writer at a time on a file system without locks.

The holder has the object `.lease.N.json` of the largest N, and renews it by writing the time into it. Once that lease
has expired or was released, another process takes over by creating N + 1 exclusively: of two candidates one succeeds.
The clocks of the hosts must agree to much less than the lease lasts.
"""

import contextlib
import json
import os
import posixpath
import re
import socket
import threading
import time
import uuid
from typing import Any

from jaxtrain.runtime.remote import open_filesystem, put, reaching

_NAME = re.compile(r"\.lease\.(\d+)\.json")
_SETTLE_SECONDS = 0.5  # between a write and its check, for file systems whose exclusive creation is not atomic


class LeaseLost(OSError):
    """Another process has taken over the lease of this one, which had expired."""


class Lease:
    """Lease of `seconds` on the folder `url`; it is renewed four times as often."""

    def __init__(self, url: str, *, seconds: float = 120.0):
        self.url, self.token = url, uuid.uuid4().hex
        self._seconds = seconds
        with reaching(url):
            self._system, self._root = open_filesystem(url)
        self._number = 0
        self._lost = ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def newest(self) -> tuple[int, dict[str, Any]]:
        """Returns the number and the values of the newest lease; 0 and {} if there has been none."""
        paths: list[str] = []
        with reaching(self.url), contextlib.suppress(FileNotFoundError):
            self._system.invalidate_cache()
            paths = self._system.ls(self._root, detail=False)
        found = [int(match[1]) for path in paths if (match := _NAME.fullmatch(posixpath.basename(path)))]
        number = max(found, default=0)
        for _ in range(2 if number else 0):
            with reaching(self.url), contextlib.suppress(ValueError, FileNotFoundError):  # another write is under way
                return number, dict(json.loads(self._system.cat_file(self._path(number))))
            time.sleep(_SETTLE_SECONDS)
        return number, {}

    def require_free(self, *, own: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
        """Returns `newest()`; raises a ValueError that names the process that holds the lease, if another one does.

        `own` are tokens of leases that ended with a process of this host, which need not expire.
        """
        number, found = self.newest()
        age = max(time.time() - found.get("time", 0.0), 0.0)
        left = found.get("seconds", 0.0) - age
        ended = found.get("token") in own and found.get("host") == socket.gethostname()
        if left > 0 and not found.get("released") and not ended:
            owner = f"process {found.get('process')} on {found.get('host')}, seen {age:.0f} s ago"
            remedy = f"wait for it or stop it (one that was killed loses the run in {left:.0f} s)"
            raise ValueError(f"{self.url} is being trained in by {owner}: {remedy}, or give another --run-dir")
        return number, found

    def acquire(self, *, own: tuple[str, ...] = ()) -> str | None:
        """Takes the lease, and renews it until `release`; returns the token of the previous lease.

        Raises a ValueError if another process holds the lease.
        """
        number, previous = self.require_free(own=own)
        self._number, error = number + 1, None
        try:
            self._write(mode="create")  # raises if the object exists
        except Exception as problem:  # FileExistsError, or what this file system has for it
            error = problem
        time.sleep(_SETTLE_SECONDS)
        if self.newest()[1].get("token") != self.token:
            self.require_free()
            with reaching(self.url, "written"):
                raise error or OSError("the lease is not there after it was written")
        for old in range(max(number - 2, 1), number + 1):
            with contextlib.suppress(FileNotFoundError):
                self._system.rm_file(self._path(old))
        self._thread.start()
        return previous.get("token")

    def require(self) -> None:
        """Raises a LeaseLost if another process has taken over the lease."""
        number, found = self.newest()
        if number > self._number:
            owner = f"process {found.get('process')} on {found.get('host')}"
            self._lost = f"{self.url} was taken over by {owner}, as this process could not renew its lease in time"
        self.require_known()

    def require_known(self) -> None:
        """Raises a LeaseLost if a renewal has found the lease lost; reads nothing."""
        if self._lost:
            raise LeaseLost(f"{self._lost}: this process ends, and uploads nothing more")

    def release(self) -> None:
        """Ends the lease, so that another process need not wait until it expires."""
        self._closed.set()
        self._thread.join(self._seconds)
        with contextlib.suppress(Exception):  # it expires
            self.require()
            self._write(released=True)

    def _renew(self) -> None:
        while not self._closed.wait(self._seconds / 4):
            try:
                self.require()
                self._write()
            except LeaseLost:
                return
            except Exception:  # the network: the next renewal may come in time
                continue

    def _write(self, *, released: bool = False, **options: str) -> None:
        values = {"token": self.token, "host": socket.gethostname(), "process": os.getpid(), "time": time.time()}
        values |= {"seconds": self._seconds, "released": released}
        path, data = self._path(self._number), json.dumps(values).encode()
        put(self._system, path, lambda: self._system.pipe_file(path, data, **options))

    def _path(self, number: int) -> str:
        return posixpath.join(self._root, f".lease.{number}.json")
