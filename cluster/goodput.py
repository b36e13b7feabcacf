"""Every second of a run's wall time in exactly one class, from its events alone.

The time line is that of the first rank, over all attempts. It runs from the start of the first attempt's
process to the last event of the newest one. Three rules make the sum right by construction:

- Within an attempt a cursor walks over the measured intervals in the order of their ends; what it passes
  between two of them is start-up before the first step, idle afterwards. So nothing counts twice.
- Where attempts overlap, the newer one counts from its start: the older one can commit nothing any more.
- What lies between two attempts is down time. A killed process takes its last events with it
  (`run.event_seconds`), and that time is down too.

Clocks: the events of one process are timed by its monotonic clock (`EventLog`), so a jump of the wall clock
does not reach them. Attempts on one boot of one host are placed by the monotonic clock that they share;
attempts on different hosts by their wall clocks, as far as these agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cluster.events import by_attempt, live_limits

Class = Literal[
    "productive",
    "data_wait",
    "checkpoint_stall",
    "restore",
    "lost_work",
    "start_up",
    "evaluation",
    "idle",
    "down",
]
CLASSES: tuple[Class, ...] = get_args(Class)
MEANING: dict[Class, str] = {
    "productive": "forward to teacher update of the steps that count",
    "data_wait": "waiting for the batch of a step that counts",
    "checkpoint_stall": "training stood still for a save",
    "restore": "reading a checkpoint",
    "lost_work": "steps that were refused, or trained again by a later attempt",
    "start_up": "process start to the first batch asked for, without the restore",
    "evaluation": "evaluation in training",
    "idle": "alive and none of these",
    "down": "no attempt was running",
}

Event = dict[str, Any]

_SPANS: dict[str, Class] = {
    "checkpoint_stall": "checkpoint_stall",
    "checkpoint_restored": "restore",
    "evaluation": "evaluation",
    "evaluation_failed": "evaluation",
}
"""Events whose `seconds` end with them."""


@dataclass(frozen=True)
class Stretch:
    """Seconds since the start of the run, and what they were spent on."""

    start: float
    end: float
    kind: Class
    attempt: int
    """Of down time: the attempt that ended it."""

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Recovery:
    """How an attempt came to its first applied step, in seconds. Not clipped by a newer attempt."""

    attempt: int
    down: float
    """From the last sign of the attempt before; 0 for the first."""
    launch: float
    """Process start to the attempt's number: imports, meeting the other ranks."""
    build: float
    """Model, optimizer, loader."""
    restore: float
    first_batch: float
    first_step: float

    @property
    def seconds(self) -> float:
        return self.down + self.launch + self.build + self.restore + self.first_batch + self.first_step


@dataclass(frozen=True)
class Ledger:
    began: float
    """Start of the time line, Unix seconds by the first attempt's clock."""
    stretches: tuple[Stretch, ...]
    """Without gap or overlap, in order; neighbours of one class and attempt are joined."""
    recoveries: tuple[Recovery, ...]
    """Of every attempt that applied a step."""

    @property
    def wall_seconds(self) -> float:
        return self.stretches[-1].end if self.stretches else 0.0

    @property
    def seconds(self) -> dict[Class, float]:
        """By class; their sum is `wall_seconds`."""
        total = dict.fromkeys(CLASSES, 0.0)
        for stretch in self.stretches:
            total[stretch.kind] += stretch.seconds
        return total

    @property
    def goodput(self) -> float | None:
        """Share of the wall time that was productive; None before any time has passed."""
        return self.seconds["productive"] / self.wall_seconds if self.wall_seconds else None


def build_ledger(events: Iterable[Event]) -> Ledger:
    """The ledger of a run; `events` as `cluster.events.read_events` returns them."""
    histories = [_AttemptEvents(number, found) for number, found in sorted(by_attempt(events).items())]
    histories = [history for history in histories if history.own]
    if not histories:
        return Ledger(0.0, (), ())
    limits = live_limits([history.goes_back_to for history in histories])
    shifts = _shifts(histories)
    lines = [
        history.stretches(limit, shift)
        for history, limit, shift in zip(histories, limits, shifts, strict=True)
    ]
    whole = _newest_wins(lines)
    start = whole[0].start
    ends = [line[-1].end for line in lines]
    recoveries = []
    for index, (history, line) in enumerate(zip(histories, lines, strict=True)):
        down = max(0.0, line[0].start - max(ends[:index])) if index else 0.0
        if (recovery := history.recovery(down)) is not None:
            recoveries.append(recovery)
    joined = _joined([Stretch(s.start - start, s.end - start, s.kind, s.attempt) for s in whole])
    return Ledger(start, tuple(joined), tuple(recoveries))


class _AttemptEvents:
    """The first rank's events of one attempt, in the order in which they were written."""

    def __init__(self, number: int, events: Sequence[Event]) -> None:
        self.number = number
        self.own = sorted((e for e in events if e["rank"] == 0), key=lambda event: event["seq"])
        self.steps = [event for event in self.own if event["kind"] == "scalar" and event["name"] == "step"]
        # A rank that outlives the first one is a sign of life of the attempt.
        self.end = max(event["t"] for event in events)
        self.opened = self._named("attempt_opened")
        launch = self.opened.get("process_seconds", 0.0)
        self.start = (self.opened or self.own[0])["t"] - launch if self.own else self.end

    def _named(self, name: str) -> Event:
        return next((event for event in self.own if event["name"] == name), {})

    @property
    def goes_back_to(self) -> float:
        """The first step that it trained, or will train; infinite if it did not come so far."""
        firsts = [event["step"] for event in self.steps]
        if started := self._named("attempt_started"):
            firsts.append((started.get("resumed_step") or 0) + 1)
        return min(firsts, default=float("inf"))

    def stretches(self, counts_until: float, shift: float) -> list[Stretch]:
        """From its process's start to its last event, without gap; steps from `counts_until` on are lost.
        `shift` is added to every time."""
        found: list[Stretch] = []
        cursor = self.start

        def upto(time: float, kind: Class) -> None:
            nonlocal cursor
            if time > cursor:
                found.append(Stretch(cursor + shift, time + shift, kind, self.number))
                cursor = time

        between: Class = "start_up"
        for event in self.own:
            for start, end, kind in _measured(event, counts_until):
                upto(min(start, end), between)
                upto(end, kind)
                if kind in ("productive", "lost_work"):
                    between = "idle"
        upto(self.end, between)
        return found or [Stretch(self.start + shift, self.start + shift, between, self.number)]

    def recovery(self, down: float) -> Recovery | None:
        if not self.steps:
            return None
        first = self.steps[0]
        restore = self._named("checkpoint_restored").get("seconds", 0.0)
        batch, step = first.get("data_seconds", 0.0), first.get("step_seconds", 0.0)
        launch = self.opened.get("process_seconds", 0.0)
        build = max(0.0, first["t"] - self.start - launch - restore - batch - step)
        return Recovery(self.number, down, launch, build, restore, batch, step)


def _measured(event: Event, counts_until: float) -> list[tuple[float, float, Class]]:
    """The intervals that end with this event: start, end, class."""
    t = event["t"]
    if event["name"] in ("step", "step_refused"):
        began = t - event.get("step_seconds", 0.0)
        asked = began - event.get("data_seconds", 0.0)
        if event["name"] == "step_refused":
            return [(asked, began, "data_wait"), (began, t, "lost_work")]
        if event["step"] >= counts_until:
            return [(asked, t, "lost_work")]
        return [(asked, began, "data_wait"), (began, t, "productive")]
    kind = _SPANS.get(event["name"])
    return [(t - event.get("seconds", 0.0), t, kind)] if kind else []


def _shifts(histories: Sequence[_AttemptEvents]) -> list[float]:
    """What to add to each attempt's times so that the wall clock's jumps between attempts of one boot vanish:
    there the offset of wall to monotonic clock must stay what it was."""
    shifts: list[float] = []
    offsets: dict[str, float] = {}
    for history in histories:
        boot, monotonic = history.opened.get("boot"), history.opened.get("monotonic")
        shift = 0.0
        if boot and monotonic is not None:
            offset = history.opened["t"] - monotonic
            shift = offsets.setdefault(boot, offset) - offset
        shifts.append(shift)
    return shifts


def _newest_wins(lines: Sequence[list[Stretch]]) -> list[Stretch]:
    """One line without gap or overlap: a newer attempt cuts the older ones, down time fills what is left."""
    pieces: list[Stretch] = []  # from the end to the beginning
    bound = float("inf")
    for line in reversed(lines):
        cut = [Stretch(s.start, min(s.end, bound), s.kind, s.attempt) for s in line if s.start < bound]
        if pieces and cut and cut[-1].end < bound:
            pieces.append(Stretch(cut[-1].end, bound, "down", pieces[-1].attempt))
        pieces += reversed(cut)
        bound = min(bound, line[0].start)
    return pieces[::-1]


def _joined(stretches: Iterable[Stretch]) -> list[Stretch]:
    joined: list[Stretch] = []
    for stretch in stretches:
        last = joined[-1] if joined else None
        if last is not None and (last.kind, last.attempt) == (stretch.kind, stretch.attempt):
            joined[-1] = Stretch(last.start, stretch.end, last.kind, last.attempt)
        elif stretch.end > stretch.start or not joined:
            joined.append(stretch)
    return joined
