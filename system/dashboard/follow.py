"""Keeps indexes of the runs that somebody looks at up to date, each in a thread of its own."""

import json
import logging
import re
import threading
import time
from collections import OrderedDict
from typing import Any

from cluster.errors import MaskClipError, ObjectNotFound
from cluster.store import ObjectStore
from system.dashboard.index import RunIndex
from system.dashboard.log_reader import LogReader

MOST_RUNS = 8
"""Runs with an index in memory; the one that was not asked for longest goes."""
_LOOK_SECONDS = 1.0
_IDLE_SECONDS = 60.0
_PATIENCE_SECONDS = 0.3
_OF_A_RUN = re.compile(r"(.+)/(?:attempts|events)/attempt-\d+.*")

_log = logging.getLogger(__name__)


class Follower:
    """One run. Read `index` under `lock`. Looks at the log once a second while somebody asks for it."""

    def __init__(self, name: str, run: ObjectStore) -> None:
        self.name, self.run = name, run
        self.lock = threading.Lock()
        self.index = RunIndex(run.uri)
        self.config: dict[str, Any] | None = None
        self.done = 0.0
        """Share of the log that is read, while it is read for the first time."""
        self.problem: str | None = None
        """Why the log cannot be read at the moment."""
        self._reader = LogReader(run)
        self._asked = time.monotonic()
        self._stopped = threading.Event()
        self._whole = threading.Event()
        threading.Thread(target=self._follow, name=f"follow-{name}", daemon=True).start()

    def ask(self) -> None:
        """Somebody looks at this run. Waits a moment if it has just been opened."""
        self._asked = time.monotonic()
        self._whole.wait(_PATIENCE_SECONDS)

    def stop(self) -> None:
        self._stopped.set()

    def _follow(self) -> None:
        while not self._stopped.is_set():
            if self.done < 1.0 or time.monotonic() - self._asked < _IDLE_SECONDS:
                try:
                    self._look()
                    self.problem = None
                except MaskClipError as error:
                    self.problem = str(error)
                    self._whole.set()
                except Exception as error:  # a broken log must not end the thread; the page says so
                    _log.exception("reading %s", self.run.uri)
                    self.problem = f"{type(error).__name__}: {error}"
            self._stopped.wait(_LOOK_SECONDS)

    def _look(self) -> None:
        if self.config is None:
            self.config = _config(self.run)
        for batch in self._reader.unread():
            if self._stopped.is_set():
                return
            if batch.events or batch.torn:
                with self.lock:
                    self.index.add(batch.events, batch.torn)
            self.done = max(self.done, batch.done)
        self.done = 1.0
        self._whole.set()


class Runs:
    """The runs at `root`: it is one itself, or a folder of them."""

    def __init__(self, root: ObjectStore) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._followers: OrderedDict[str, Follower] = OrderedDict()
        self._single = bool(root.list("attempts/") or root.list("events/")) or root.exists("config.json")
        self._names: list[str] = []
        self._listed = float("-inf")

    def names(self) -> list[str]:
        """Of all runs, sorted; looked up again after 30 s."""
        if self._single:
            return [self._root.uri.rstrip("/").rpartition("/")[2]]
        with self._lock:
            if time.monotonic() - self._listed > 30:
                keys = (info.key for info in self._root.list())
                found = (_OF_A_RUN.fullmatch(key) for key in keys)
                self._names = sorted({match[1] for match in found if match})
                self._listed = time.monotonic()
            return self._names

    def follower(self, name: str) -> Follower:
        """Of a run that `names` has. Raises ObjectNotFound for any other name."""
        if name not in self.names():
            raise ObjectNotFound(f"{self._root.uri}: no run {name!r} here")
        with self._lock:
            follower = self._followers.get(name)
            if follower is None:
                follower = Follower(name, self._root if self._single else self._root.child(name))
                self._followers[name] = follower
            self._followers.move_to_end(name)
            while len(self._followers) > MOST_RUNS:
                self._followers.popitem(last=False)[1].stop()
        follower.ask()
        return follower

    def close(self) -> None:
        for follower in self._followers.values():
            follower.stop()


def _config(run: ObjectStore) -> dict[str, Any] | None:
    try:
        return json.loads(run.get("config.json"))["config"]
    except (ObjectNotFound, ValueError, KeyError):
        return None
