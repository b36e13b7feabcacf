"""The append-only event log of a run: everything observable is an event, every view reads only these.

An event is one JSON line `{"t", "attempt", "rank", "seq", "kind", "name", ...}`: `t` in Unix seconds, `seq`
counting from 0 within an attempt and rank (a gap is a dropped event), `kind` one of instant, scalar, span.
`t` is the wall clock as the log found it when it was opened, and goes on by the monotonic clock: a wall clock
that is set meanwhile moves no event.
Lines are gathered in memory and a thread writes them as immutable segments
`events/attempt-0001/rank-00000/segment-000000.jsonl`. The caller never waits for the store and never sees its
errors.

JSON has no NaN or infinity: they are written as the strings "nan", "inf", "-inf" and read back as floats.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

from cluster.errors import ObjectNotFound
from cluster.store_base import ObjectStore

_HEADER = ("t", "attempt", "rank", "seq", "kind", "name")
ENVELOPE = frozenset({*_HEADER, "step"})
"""What an event says of where and when it was; all else is what it is about."""
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_SEGMENT_EVENTS = 20_000
_CLOSE_SECONDS = 15.0
_FLUSH_SECONDS = 5.0
_READERS = 8
_ATTEMPT = re.compile(r"attempts/attempt-(\d+)\.json")

_log = logging.getLogger(__name__)


class Target(Protocol):
    """Where segments go: a store, or a spool before it."""

    def put(self, key: str, data: bytes) -> None: ...


class EventLog:
    """The events of one process in one attempt.

    `capacity` bounds the events that wait for the store; beyond it new ones are dropped, counted in
    `dropped`, and reported as an `events_dropped` event once the store is back. At most `flush_seconds` of
    events are lost with a killed process.
    """

    def __init__(
        self,
        store: Target,
        attempt: int,
        rank: int,
        flush_seconds: float = 1.0,
        capacity: int = 100_000,
    ) -> None:
        self._store = store
        self._attempt = attempt
        self._rank = rank
        self._flush_seconds = flush_seconds
        self._capacity = capacity
        self._clock_offset = time.time() - time.monotonic()
        self._lock = threading.Condition()
        self._lines: deque[str] = deque()
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._taken = 0
        self._written = 0
        self._next_seq = 0
        self._next_segment = 0
        self._dropped = 0
        self._reported = 0
        self._failing = False
        self._ended = False
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._writer = threading.Thread(target=self._write_segments, name="event-log", daemon=True)
        self._writer.start()

    @property
    def attempt(self) -> int:
        return self._attempt

    @property
    def dropped(self) -> int:
        """Events that are lost: too many waited, they came after close(), or close() could not write them."""
        return self._dropped + (len(self._lines) if self._ended else 0)

    def subscribe(self, listener: Callable[[dict[str, Any]], None]) -> None:
        """Call `listener` with every later event, header included, also with those that are dropped here. It
        is called in the thread that logs, so it must neither wait nor raise."""
        with self._lock:
            self._listeners.append(listener)

    def instant(self, name: str, **fields: Any) -> None:
        """Something happened now."""
        self._append("instant", name, fields)

    def scalar(self, step: int, **values: Any) -> None:
        """The measured values of one training step, as one event named "step"."""
        self._append("scalar", "step", {"step": step, **values})

    @contextmanager
    def span(self, name: str, **fields: Any) -> Iterator[None]:
        """Time a block: one event at its end with `seconds`, and `error` if an exception left it."""
        start = time.monotonic()
        try:
            yield
        except BaseException as exc:
            fields["error"] = f"{type(exc).__name__}: {exc}"
            raise
        finally:
            self._append("span", name, {**fields, "seconds": time.monotonic() - start})

    def flush(self, seconds: float = _FLUSH_SECONDS) -> bool:
        """Write what was logged until now and wait for it, at most `seconds`. False if the store was not
        that fast; the events stay in line for it."""
        with self._lock:
            logged = self._taken
            self._wake.set()
            return self._lock.wait_for(lambda: self._written >= logged, seconds)

    def close(self) -> None:
        """Write what waits, for a bounded time. Later events are dropped."""
        self._closed.set()
        self._wake.set()
        self._writer.join(_CLOSE_SECONDS)
        self._ended = True
        if self._lines:
            _log.warning("%d events are lost, the store failed until the end", len(self._lines))

    def _append(self, kind: str, name: str, fields: dict[str, Any]) -> None:
        reserved = [field for field in _HEADER if field in fields]
        if reserved:
            raise ValueError(
                f"event {name}: the field names {', '.join(reserved)} belong to the log; choose others"
            )
        with self._lock:
            seq = self._next_seq
            self._next_seq += 1
            event = self._event(seq, kind, name, fields)
            for listener in self._listeners:
                listener(event)
            if self._closed.is_set() or len(self._lines) >= self._capacity:
                self._dropped += 1
                return
            self._queue(event)

    def _queue(self, event: dict[str, Any]) -> None:
        self._lines.append(json.dumps(_to_json(event), allow_nan=False, separators=(",", ":")))
        self._taken += 1

    def _event(self, seq: int, kind: str, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        now = self._clock_offset + time.monotonic()
        header = dict(zip(_HEADER, (now, self._attempt, self._rank, seq, kind, name), strict=True))
        return {**header, **fields}

    def _write_segments(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(self._flush_seconds)
            self._wake.clear()
            self._write_waiting()
        while self._write_waiting():
            pass

    def _write_waiting(self) -> bool:
        """Write one segment of what waits, if anything does. False when nothing was written.

        A segment that failed keeps its number and is written again, with what came since.
        """
        with self._lock:
            lines = list(islice(self._lines, _SEGMENT_EVENTS))
        if not lines:
            return False
        key = (
            f"events/attempt-{self._attempt:04d}/rank-{self._rank:05d}/segment-{self._next_segment:06d}.jsonl"
        )
        try:
            self._store.put(key, ("\n".join(lines) + "\n").encode())
        except Exception as exc:  # whatever it is, it must not stop training
            if not self._failing:
                _log.warning("events wait in memory, the store fails: %s", exc)
            self._failing = True
            return False
        self._failing = False
        self._next_segment += 1
        with self._lock:
            for _ in lines:
                self._lines.popleft()
            self._written += len(lines)
            self._lock.notify_all()
            if self._dropped > self._reported:
                count = self._dropped - self._reported
                self._queue(self._event(self._next_seq, "instant", "events_dropped", {"count": count}))
                self._next_seq += 1
                self._reported = self._dropped
        return True


def read_events(store: ObjectStore) -> list[dict[str, Any]]:
    """All events of the run at `store`, sorted by (attempt, t, seq).

    Lines that are torn or are not events are skipped; their number is the `count` of one last event
    `events_skipped`.
    """
    events, skipped = [], 0
    keys = [info.key for info in store.list("events/") if info.key.endswith(".jsonl")]
    with ThreadPoolExecutor(_READERS) as pool:
        for data in pool.map(lambda key: _get(store, key), keys):
            for line in data.splitlines():
                event = _decode(line)
                if event is None:
                    skipped += 1
                else:
                    events.append(event)
    events.sort(key=lambda event: (event["attempt"], event["t"], event["seq"], event["rank"]))
    if skipped:
        events.append({"kind": "instant", "name": "events_skipped", "count": skipped})
    return events


def claim_attempt(store: ObjectStore) -> int:
    """Take the next free attempt number of the run, from 1. Of racing callers each gets another number."""
    claim = {
        "time": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "parent": os.getppid(),
    }
    data = json.dumps(claim).encode()
    number = newest_attempt(store) + 1
    while not store.put_if_absent(f"attempts/attempt-{number:04d}.json", data):
        number += 1
    return number


def newest_attempt(store: ObjectStore) -> int:
    """The highest number that was claimed; 0 when none was."""
    keys = (_ATTEMPT.fullmatch(info.key) for info in store.list("attempts/"))
    return max((int(match[1]) for match in keys if match), default=0)


def read_claim(store: ObjectStore, attempt: int) -> dict[str, Any]:
    """Who claimed it: time, host, pid, parent (the process that started it)."""
    return json.loads(store.get(f"attempts/attempt-{attempt:04d}.json"))


def _get(store: ObjectStore, key: str) -> bytes:
    try:
        return store.get(key)
    except ObjectNotFound:  # deleted since it was listed
        return b""


def decode_events(data: bytes) -> list[dict[str, Any]]:
    """The events of one segment, in the order of their lines; torn lines are left out."""
    return [event for line in data.splitlines() if (event := _decode(line)) is not None]


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or any(field not in event for field in _HEADER):
        return None
    numbers = (event["t"], event["attempt"], event["seq"], event["rank"])
    if not all(isinstance(number, int | float) for number in numbers):
        return None
    return {
        field: value if isinstance(value, int | float) or field in _HEADER else _from_json(value)
        for field, value in event.items()
    }


def _to_json(value: Any) -> Any:
    """JSON values only: NumPy and torch scalars become numbers, anything unknown its text."""
    if isinstance(value, dict):
        return {str(field): _to_json(item) for field, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, str | int):
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return _to_json(value.item())
    return str(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {field: _from_json(item) for field, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def by_attempt(events: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The events of each attempt, in their order; what belongs to none is left out."""
    found: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("attempt", 0) > 0:
            found.setdefault(event["attempt"], []).append(event)
    return found


def live_limits(firsts: Sequence[float]) -> list[float]:
    """The one rule of what still counts: a stretch of training does up to where a newer one began.

    `firsts` are the lowest steps of the stretches, oldest first. Returns the step of each from which it no
    longer counts.
    """
    limits: list[float] = []
    bound = float("inf")
    for first in reversed(firsts):
        limits.append(bound)
        bound = min(bound, first)
    return limits[::-1]
