"""What a dashboard keeps of one run's event log, in bounded memory, brought up to date event by event."""

import itertools
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from cluster.events import ENVELOPE, live_limits
from system.dashboard.columns import Column, Trace
from system.dashboard.ranks import RankGrid
from system.dashboard.step_times import StepTimes
from system.report.history import History, build_history

MOST_SCALARS = 120
MOST_MARKS = 5_000
"""Single events that are kept of each name; of attempts and their ends all are."""
_ALWAYS = ("attempt_opened", "attempt_started", "attempt_ended", "attempt_config")
_PER_RANK = ("checkpoint_part", "rank_times")
_NUMBERS = (float, int)


@dataclass
class _Stretch:
    """Rising steps of one attempt: all of it, or what it did between two rewinds."""

    number: int
    """From 1, as they came."""
    first: dict[str, Any]
    last: dict[str, Any]
    count: int = 0


class RunIndex:
    """One run. Not locked: whoever adds and whoever reads hold the same lock.

    `version` changes whenever something was added.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.version = 0
        self.events = 0
        self.torn = 0
        self.counts: Counter[str] = Counter()
        """Single events by name, all of them."""
        self.ranks = RankGrid()
        self.columns: dict[str, Column] = {}
        self._marks: dict[str, deque[dict[str, Any]]] = defaultdict(lambda: deque(maxlen=MOST_MARKS))
        self._always: list[dict[str, Any]] = []
        self._times = StepTimes()
        self._stretches: dict[int, list[_Stretch]] = defaultdict(list)
        """Of each attempt, in order."""
        self._last_time: dict[int, float] = {}
        self._history: tuple[int, History] | None = None

    def add(self, events: list[dict[str, Any]], torn: int) -> None:
        """Take in the events of one segment, which are of one attempt and one rank."""
        if events:
            attempt = events[0]["attempt"]
            self._last_time[attempt] = max(events[-1]["t"], self._last_time.get(attempt, 0.0))
        for event in events:
            if event["kind"] != "scalar":
                self._mark(event)
        measured = [event for event in events if event["kind"] == "scalar" or event["name"] in _PER_RANK]
        if measured:
            self.ranks.add(measured)
        steps = [event for event in events if _is_step(event)]
        if events and events[0]["rank"] == 0 and events[0]["attempt"] > 0:
            self._times.add([event for event in events if event["name"] != "step" or _is_step(event)])
        self._add_steps(steps)
        self.events += len(events)
        self.torn += torn
        self.version += 1

    def _mark(self, event: dict[str, Any]) -> None:
        self.counts[event["name"]] += 1
        if event["name"] in _ALWAYS:
            self._always.append(event)
        elif event["name"] not in _PER_RANK:
            self._marks[event["name"]].append(event)

    def _add_steps(self, events: list[dict[str, Any]]) -> None:
        for stretch, group in itertools.groupby(events, key=self._stretch):
            own = list(group)
            for name in set().union(*own) - ENVELOPE:
                holders = [event for event in own if event.get(name).__class__ in _NUMBERS]
                if holders and (name in self.columns or len(self.columns) < MOST_SCALARS):
                    steps = [event["step"] for event in holders]
                    values = [event[name] for event in holders]
                    self.columns.setdefault(name, Column()).extend(steps, stretch, values)

    def _stretch(self, event: dict[str, Any]) -> int:
        """Number of the stretch that a step belongs to. One that goes back begins a new stretch, unless it
        merely came late: then it was logged before what is here."""
        own = self._stretches[event["attempt"]]
        if not own or (event["seq"] > own[-1].last["seq"] and event["step"] <= own[-1].last["step"]):
            own.append(_Stretch(1 + sum(map(len, self._stretches.values())), event, event))
        at = own[-1]
        if event["seq"] < at.first["seq"]:
            at = next((s for s in reversed(own) if s.first["seq"] <= event["seq"]), own[0])
        at.first = min(at.first, event, key=_step)
        at.last = max(at.last, event, key=_step)
        at.count += 1
        return at.number

    @property
    def nbytes(self) -> int:
        """Of the series and the grid of ranks, which are nearly all of it."""
        return sum(column.nbytes for column in self.columns.values()) + self.ranks.nbytes

    @property
    def limits(self) -> dict[int, float]:
        """Of each stretch, by number, the step from which a newer one counts."""
        ordered = [stretch for _, own in sorted(self._stretches.items()) for stretch in own]
        limits = live_limits([stretch.first["step"] for stretch in ordered])
        return {stretch.number: limit for stretch, limit in zip(ordered, limits, strict=True)}

    @property
    def last_step(self) -> dict[str, Any] | None:
        """The event of the newest live step."""
        limits = self.limits
        live = [s.last for own in self._stretches.values() for s in own if s.last["step"] < limits[s.number]]
        return max(live, key=_step, default=None)

    def superseded(self, attempt: int) -> int:
        """Steps of the attempt that were trained again. Those of a stretch are one after the other."""
        limits = self.limits
        return sum(
            max(0, min(s.count, s.last["step"] - int(limits[s.number]) + 1))
            for s in self._stretches.get(attempt, ())
            if limits[s.number] <= s.last["step"]
        )

    def trace(self, name: str, first: int, last: int, points: int) -> tuple[Trace, list[tuple[int, Trace]]]:
        """The live line of a scalar, and with their attempts the lines that were trained again. KeyError: no
        such scalar."""
        column, limits = self.columns[name], self.limits
        attempts = {s.number: attempt for attempt, own in self._stretches.items() for s in own}
        lost = column.superseded(limits, first, last, points)
        return column.live(limits, first, last, points), [(attempts[line.stretch], line) for line in lost]

    def history(self) -> History:
        """As of `load_history`, but for `steps`, which holds no scalars and not every step."""
        if self._history is None or self._history[0] != self.version:
            marks = itertools.chain(*self._marks.values())
            events = sorted([*self._always, *marks, *self._times.entries], key=_order)
            history = build_history(self.uri, events)
            attempts = tuple(
                replace(
                    attempt,
                    superseded_steps=self.superseded(attempt.number),
                    end=attempt.end
                    if attempt.reason is not None
                    else max(attempt.end, self._last_time[attempt.number]),
                )
                for attempt in history.attempts
            )
            self._history = self.version, replace(history, attempts=attempts, skipped_events=self.torn)
        return self._history[1]

    def marks(self, *names: str) -> list[dict[str, Any]]:
        """The kept events of these names, or of all, oldest first."""
        found = [event for event in self._always if not names or event["name"] in names]
        for name in names or tuple(self._marks):
            found += self._marks.get(name, ())
        return sorted(found, key=_order)


def facts(event: dict[str, Any]) -> dict[str, Any]:
    """What an event says besides where and when; what JSON cannot say becomes None."""
    return {
        name: None if isinstance(value, float) and not isfinite(value) else value
        for name, value in event.items()
        if name not in ENVELOPE
    }


def _is_step(event: dict[str, Any]) -> bool:
    first_rank = event["rank"] == 0 and event["attempt"] > 0
    return event["name"] == "step" and first_rank and event.get("step").__class__ is int


def _step(event: dict[str, Any]) -> int:
    return event["step"]


def _order(event: dict[str, Any]) -> tuple[int, float, int]:
    return event["attempt"], event["t"], event["seq"]
