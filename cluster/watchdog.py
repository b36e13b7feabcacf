"""No progress for too long: say where every thread stands, and end the process.

A rank that hangs holds up all others inside their next collective, so all of them run into their limit within
a step of each other. Each one puts its stacks into the run folder, `hangs/attempt-0001/rank-00000.txt`, waits
a little for the others to do so, and ends with the exit code of `Hang`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Annotated, Self

from pydantic import Field

from cluster.errors import Hang
from cluster.events import EventLog
from cluster.store_base import ObjectStore
from cluster.world import World

Seconds = Annotated[float, Field(gt=0, lt=1e9)]

LEARNED_STEPS, FEWEST_STEPS = 100, 10
LOOK_SECONDS = 0.5
STORE_SECONDS = 15.0
"""For the stacks to reach the run folder, and again for those of the other ranks."""
HELD_SECONDS = 60.0
"""After the limit: a thread that keeps the interpreter to itself keeps the watchdog from running, too."""


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    start_seconds: Seconds = 1800.0
    """Limit of each part of the start: building, the restore, the first batch with the first steps, in which
    kernels are compiled."""
    floor_seconds: Seconds = 300.0
    """The limit of a step is never below this."""
    times_median: Annotated[float, Field(gt=1)] = 20.0
    """Nor below so many times the median of the last steps, waiting for data included."""
    between_seconds: Seconds = 7200.0
    """Limit of what comes between two steps: evaluations, saves that are waited for, the end."""


@dataclass(frozen=True)
class Standstill:
    """What is known of a rank that makes no progress."""

    rank: int
    phase: str
    """What it was doing: the last phase that was begun."""
    steps_done: int
    seconds: float
    """Since its last progress."""
    limit_seconds: float

    def __str__(self) -> str:
        return (
            f"no progress for {self.seconds:.0f} s (limit {self.limit_seconds:.0f} s) after step "
            f"{self.steps_done}, in phase {self.phase!r}"
        )


class Watchdog:
    """Watches this process while its context is entered. Calls cost microseconds; call them in one thread."""

    def __init__(self, config: WatchdogConfig, run: ObjectStore, world: World, events: EventLog) -> None:
        self._config, self._run, self._world, self._events = config, run, world, events
        self._steps: deque[float] = deque(maxlen=LEARNED_STEPS)
        self._steps_done = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._step_began: float | None = None
        self._watched = ("start", time.monotonic(), config.start_seconds)  # replaced as a whole
        self._phase = "start"

    def __enter__(self) -> Self:
        self.begin("start")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    @property
    def step_limit(self) -> float:
        """Seconds that a step may take: learned from the run, once it has made some."""
        if len(self._steps) < FEWEST_STEPS:
            return self._config.start_seconds
        return max(self._config.floor_seconds, self._config.times_median * statistics.median(self._steps))

    def begin(self, phase: str) -> None:
        """A part of the start begins."""
        self._enter(phase, self._config.start_seconds)

    def at(self, phase: str) -> None:
        """What the step is doing now; no progress by itself."""
        self._phase = phase

    def step(self, steps_done: int) -> None:
        """A step begins; `steps_done` were applied before."""
        now = time.monotonic()
        if self._step_began is not None:
            self._steps.append(now - self._step_began)
        self._steps_done, self._step_began = steps_done, now
        self._enter("data", self.step_limit)

    @contextmanager
    def between(self, phase: str) -> Iterator[None]:
        """Inside, no step is being made: the time counts for none."""
        before = self._watched
        entered = time.monotonic()
        self._enter(phase, self._config.between_seconds)
        try:
            yield
        finally:
            spent = time.monotonic() - entered
            if self._step_began is not None:
                self._step_began += spent
            self._watched = (before[0], before[1] + spent, before[2])

    def _enter(self, phase: str, limit: float) -> None:
        self._phase = phase
        self._watched = (phase, time.monotonic(), limit)

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            _, since, limit = self._watched
            still = time.monotonic() - since
            if still > limit:
                self._end(Standstill(self._world.rank, self._phase, self._steps_done, still, limit))
            # Fires by itself, without the interpreter, unless this thread comes here again in time.
            faulthandler.dump_traceback_later(limit - still + HELD_SECONDS, exit=True, file=sys.stderr)

    def _end(self, found: Standstill) -> None:
        """Leave the stacks in the run folder and end the process. The store may fail or hang as well."""
        folder = f"hangs/attempt-{self._events.attempt:04d}/"
        text = json.dumps(asdict(found)) + "\n\n" + _stacks()
        self._events.instant("hang", step=found.steps_done, **_without(asdict(found), "rank", "steps_done"))
        _for_a_time(lambda: self._run.put(f"{folder}rank-{self._world.rank:05d}.txt", text.encode()))
        self._events.flush()
        print(
            f"maskclip rank {self._world.rank}: {found}; its stacks are in {self._run.uri}/{folder} "
            f"(exit code {Hang.exit_code})",
            file=sys.stderr,
            flush=True,
        )
        _for_a_time(lambda: self._others(folder))
        os._exit(Hang.exit_code)

    def _others(self, folder: str) -> None:
        """Wait until every rank has left its stacks: one that sees a dead peer ends without."""
        until = time.monotonic() + STORE_SECONDS
        while len(list(self._run.list(folder))) < self._world.size and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)


def _stacks() -> str:
    """The Python stacks of all threads of this process."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


def _for_a_time(work: Callable[[], object]) -> None:
    """Wait for it as long as the store may take."""

    def tried() -> None:
        with suppress(Exception):  # the process ends in any case
            work()

    thread = threading.Thread(target=tried, daemon=True)
    thread.start()
    thread.join(STORE_SECONDS)
