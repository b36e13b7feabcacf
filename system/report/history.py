"""What happened in a run, read from its event log and from nothing else.

An attempt is one start of the trainer. A step can stand in the log several times: an attempt that was killed
after step 130 and resumed from the checkpoint of step 100 trains 101-130 again. The newest value wins from
its step on; what was logged before it at or after that step is superseded: kept, marked, never drawn as if it
counted.
"""

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from cluster.errors import Hang, MaskClipError, ObjectNotFound
from cluster.events import (
    ENVELOPE,
    by_attempt,
    decode_events,
    live_limits,
    newest_attempt,
    read_claim,
    read_events,
)
from cluster.goodput import Ledger, build_ledger
from cluster.store import ObjectStore


@dataclass(frozen=True)
class StepRecord:
    step: int
    attempt: int
    time: float
    """Unix seconds."""
    values: dict[str, Any]
    """The scalars of the step: loss and its terms, lr, grad_norm, pairs_per_second, ..."""
    live: bool
    """False if this step, or an earlier one, was trained again later."""


@dataclass(frozen=True)
class Attempt:
    number: int
    start: float
    end: float
    """Time of its end, or of the last event that it left behind."""
    reason: str | None
    """Why its first rank ended; None if that rank left no end: it was killed, or it is still running."""
    exit_code: int | None
    """Of the first rank; None with `reason`."""
    silent_ranks: tuple[int, ...]
    """Ranks that left events and no end."""
    first_step: int | None
    last_step: int | None
    superseded_steps: int
    """Steps of this attempt that a newer one trained again."""
    resumed_step: int | None
    """Step of the checkpoint it went on from; None: from scratch."""
    started: bool
    """It got as far as the first step; else it was refused, stopped or killed before that."""
    facts: dict[str, Any] = field(default_factory=dict)
    """processes, zero_stage, precision and whatever else its start event says."""

    @property
    def killed(self) -> bool:
        """A rank left no end, and no named error of the first rank explains it (70: it merely lost its peer).

        For the newest attempt this can also mean that it is still running.
        """
        return bool(self.silent_ranks) and self.exit_code in (None, MaskClipError.exit_code, Hang.exit_code)


@dataclass(frozen=True)
class Mark:
    """One thing that happened once: a checkpoint, a refused step, an incident or an evaluation."""

    name: str
    """Name of its event."""
    time: float
    attempt: int
    step: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class History:
    uri: str
    attempts: tuple[Attempt, ...]
    steps: tuple[StepRecord, ...]
    """Sorted by step, then attempt."""
    checkpoints: tuple[Mark, ...]
    """facts: seconds, bytes."""
    refusals: tuple[Mark, ...]
    """facts: reason."""
    incidents: tuple[Mark, ...]
    """Checkpoints that could not be written or were set aside as damaged, evaluations that failed, events
    that were lost."""
    evaluations: tuple[Mark, ...]
    """facts: tower, data, file and the headline numbers."""
    ledger: Ledger
    """Where the time went."""
    skipped_events: int
    """Torn or unreadable lines of the log."""

    @property
    def live_steps(self) -> tuple[StepRecord, ...]:
        return tuple(record for record in self.steps if record.live)

    @property
    def superseded_steps(self) -> tuple[StepRecord, ...]:
        return tuple(record for record in self.steps if not record.live)

    @property
    def last_step(self) -> int | None:
        return max((record.step for record in self.steps if record.live), default=None)

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a live scalar, in step order; steps that lack it are left out."""
        return [
            (record.step, float(record.values[name])) for record in self.live_steps if name in record.values
        ]


def load_history(run: ObjectStore) -> History:
    """Read the events of a run folder.

    Raises:
        ObjectNotFound: there is no run (neither events nor a config.json).
    """
    events = read_events(run)
    if not events and not run.exists("config.json"):
        raise ObjectNotFound(
            f"{run.uri}: there is no run here (no config.json, no events); check the path of the run"
        )
    return build_history(run.uri, events)


@dataclass(frozen=True)
class LastWords:
    """How one attempt went, without reading all of it."""

    resumed_step: int | None
    steps_done: int | None
    """The last applied step of the run; None if this attempt applied none."""
    loss: float | None
    """Of that step, if it is finite."""
    ends: tuple[tuple[int, str], ...]
    """(exit code, reason) of each rank that left an end, by rank."""


def own_attempt(run: ObjectStore, since: float) -> int | None:
    """The attempt that a child of this process claimed after `since` (Unix seconds); None if none did."""
    for number in range(newest_attempt(run), 0, -1):
        try:
            claim = read_claim(run, number)
        except ObjectNotFound:
            continue
        if claim["host"] == socket.gethostname() and claim["time"] < since:
            return None
        if (claim["host"], claim.get("parent")) == (socket.gethostname(), os.getpid()):
            return number
    return None


def last_words(run: ObjectStore, attempt: int) -> LastWords:
    """Of its first rank the first segment and the last ones back to the last step; of the others the last."""
    segments: dict[str, list[str]] = {}
    for info in run.list(f"events/attempt-{attempt:04d}/"):
        segments.setdefault(info.key.rpartition("/")[0], []).append(info.key)
    ranks = [sorted(segments[rank]) for rank in sorted(segments)]
    ends, resumed, last = [], None, None
    for place, keys in enumerate(ranks):
        end = decode_events(run.get(keys[-1]))
        ends += [(e["exit_code"], str(e["reason"])) for e in end if e["name"] == "attempt_ended"]
        if place == 0:
            first = decode_events(run.get(keys[0]))
            resumed = next((e.get("resumed_step") for e in first if e["name"] == "attempt_started"), None)
            for key in reversed(keys):
                steps = [event for event in decode_events(run.get(key)) if event["kind"] == "scalar"]
                if steps:
                    last = steps[-1]
                    break
    if last is None:
        return LastWords(resumed, None, None, tuple(ends))
    loss = last.get("loss")
    finite = isinstance(loss, int | float) and isfinite(loss)
    return LastWords(resumed, last["step"], loss if finite else None, tuple(ends))


def build_history(uri: str, events: Iterable[dict]) -> History:
    """Pure part of `load_history`; `events` are sorted by (attempt, t, seq)."""
    events = list(events)
    attempts = by_attempt(events)
    steps = _mark_superseded(
        event
        for event in events
        if event.get("attempt", 0) > 0
        and event["kind"] == "scalar"
        and event["name"] == "step"
        and event["rank"] == 0
    )
    steps_of: dict[int, list[StepRecord]] = {number: [] for number in attempts}
    for record in steps:
        steps_of[record.attempt].append(record)
    return History(
        uri=uri,
        attempts=tuple(_attempt(number, attempts[number], steps_of[number]) for number in sorted(attempts)),
        steps=steps,
        checkpoints=_marks(events, "checkpoint_committed"),
        refusals=_marks(events, "step_refused"),
        incidents=_marks(events, *_INCIDENTS),
        evaluations=_marks(events, "evaluation"),
        ledger=build_ledger(events),
        skipped_events=sum(
            event.get("count", 0) for event in events if event.get("name") == "events_skipped"
        ),
    )


_INCIDENTS = (
    "checkpoint_failed",
    "checkpoint_quarantined",
    "checkpoint_prune_failed",
    "window_given_up",
    "loss_spike",
    "spike_ahead",
    "memory_growth",
    "sample_quarantined",
    "hang",
    "first_loss_off",
    "evaluation_failed",
    "events_dropped",
)


def _facts(event: dict) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in ENVELOPE}


def _mark_superseded(events: Iterable[dict]) -> tuple[StepRecord, ...]:
    """A step's event counts unless a later one has the same step or a lower one: then the run had gone back
    before it. So each step has at most one live value, over restarts and rewinds within an attempt alike."""
    ordered = sorted(events, key=lambda event: (event["attempt"], event["seq"]))
    limits = live_limits([event["step"] for event in ordered])
    records = [
        StepRecord(event["step"], event["attempt"], event["t"], _facts(event), live=event["step"] < limit)
        for event, limit in zip(ordered, limits, strict=True)
    ]
    return tuple(sorted(records, key=lambda record: (record.step, record.attempt)))


def _attempt(number: int, events: list[dict], own: list[StepRecord]) -> Attempt:
    starts = {event["rank"]: event for event in events if event["name"] == "attempt_started"}
    ends = {event["rank"]: event for event in events if event["name"] == "attempt_ended"}
    facts = _facts(starts[0]) if 0 in starts else {}
    ended = ends.get(0, {})
    return Attempt(
        number=number,
        start=min(event["t"] for event in events),
        end=ended["t"] if ended else max(event["t"] for event in events),
        reason=str(ended["reason"]) if ended else None,
        exit_code=int(ended["exit_code"]) if ended else None,
        silent_ranks=tuple(sorted({event["rank"] for event in events} - ends.keys())),
        first_step=own[0].step if own else None,
        last_step=own[-1].step if own else None,
        superseded_steps=sum(not record.live for record in own),
        resumed_step=facts.pop("resumed_step", None),
        started=bool(starts),
        facts=facts,
    )


def _marks(events: list[dict], *names: str) -> tuple[Mark, ...]:
    marks = [
        Mark(event["name"], event["t"], event["attempt"], event.get("step", 0), _facts(event))
        for event in events
        if event["kind"] == "instant" and event["name"] in names
    ]
    return tuple(sorted(marks, key=lambda mark: mark.time))
