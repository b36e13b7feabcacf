"""When a save is due.

Young's rule: with a stall of C seconds a save and M seconds between two failures, saves every sqrt(2 C M)
seconds lose least. What is lost then is C of every interval, and at a failure half an interval, the time
until a snapshot is durable, and the restart. (J. W. Young, 1974; J. T. Daly, 2006.)
"""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from cluster.errors import Interrupted, Preempted
from cluster.events import EventLog, read_claim
from cluster.store import ObjectStore
from system.checkpoints.config import CheckpointConfig

_FIRST_SAVE_SECONDS = 60.0
_LONGEST_SECONDS = 6 * 3600.0
_PLANNED = (0, Preempted.exit_code, Interrupted.exit_code)
"""Exit codes of attempts that saved before they ended: no failures."""
_SEGMENT = re.compile(r"events/attempt-(\d{4})/rank-00000/segment-\d+\.jsonl")


@dataclass(frozen=True)
class Failures:
    """What the attempts before this one tell."""

    seconds: float
    """That they ran."""
    count: int
    """Of them that ended without a save."""


def observed_failures(run: ObjectStore, attempt: int) -> Failures:
    """Lifetimes and ends of the attempts before `attempt`, from their claims and the last events of their
    first rank."""
    last: dict[int, str] = {}
    for info in run.list("events/"):
        if match := _SEGMENT.fullmatch(info.key):
            last[int(match[1])] = info.key
    seconds, count = 0.0, 0
    for number in range(1, attempt):
        if number not in last:
            continue
        event = json.loads(run.get(last[number]).splitlines()[-1])
        seconds += max(0.0, event["t"] - read_claim(run, number)["time"])
        count += event["name"] != "attempt_ended" or event["exit_code"] not in _PLANNED
    return Failures(seconds, count)


@dataclass(frozen=True)
class Plan:
    """An interval and what it is expected to cost."""

    seconds: float
    stall_seconds: float
    save_seconds: float
    restore_seconds: float
    seconds_between_failures: float
    failures: int
    expected_loss: float
    """Share of the run's time that stalls, work done twice and restores take."""


def plan(stall: float, save: float, restore: float, failures: Failures, prior_seconds: float) -> Plan:
    """
    Args:
        stall: seconds that a save holds training up.
        save: seconds from the snapshot until it is committed; saves do not overlap.
        restore: seconds of a restore.
        prior_seconds: time between failures to begin with; counts as one failure seen in that time.
    """
    between = (prior_seconds + failures.seconds) / (1 + failures.count)
    best = math.sqrt(2 * max(stall, 1e-3) * between)
    seconds = min(max(best, 1.2 * save), _LONGEST_SECONDS)
    loss = stall / seconds + (seconds / 2 + save + restore) / between
    return Plan(seconds, stall, save, restore, between, failures.count, loss)


class Interval:
    """Asked before every step. By steps it is a pure function, the same on every rank; by time only the first
    rank's answer counts, and `agree` carries it to the others."""

    def __init__(
        self,
        config: CheckpointConfig,
        events: EventLog,
        failures: Callable[[], Failures],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`failures` is called once, when the first plan is made; it may read the store."""
        self._config, self._events, self._failures, self._clock = config, events, failures, clock
        self._began = self._last = clock()
        self._seen: Failures | None = None
        self._plan: Plan | None = None
        self.restore_seconds = 0.0

    def due(self, step: int) -> bool:
        """Whether the state after `step` shall be saved."""
        if self._config.interval == "steps":
            return step % self._config.every_steps == 0
        return self._clock() - self._last >= self._seconds

    @property
    def _seconds(self) -> float:
        if self._config.interval == "seconds":
            return self._config.every_seconds
        return _FIRST_SAVE_SECONDS if self._plan is None else self._plan.seconds

    def began(self) -> None:
        """A save has begun."""
        self._last = self._clock()

    def saved(self, stall_seconds: float, save_seconds: float) -> None:
        """What a save has cost. With `auto` the next interval follows from it; called in a background
        thread."""
        if self._config.interval != "auto":
            return
        if self._seen is None:
            self._seen = self._failures()
        now = Failures(self._seen.seconds + self._clock() - self._began, self._seen.count)
        prior = 3600 * self._config.mean_failure_hours
        new = plan(stall_seconds, save_seconds, self.restore_seconds, now, prior)
        if self._plan is None or abs(new.seconds / self._plan.seconds - 1) > 0.1:
            self._plan = new
            self._events.instant("checkpoint_interval", **asdict(new))
