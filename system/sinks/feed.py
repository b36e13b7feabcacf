"""A sink at work: a thread of its own behind a bounded queue, so that it can be slow, hang or fail alone."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

Event = dict[str, Any]

_CLOSE_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the events of one rank, in order. Made, used and closed in one thread, where it may wait and
    raise as it likes."""

    def take(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Feed:
    """Hands events to the sink that `make` makes.

    `offer` never waits and never raises. An event is lost when the queue is full, the sink could not be made,
    or taking it failed; `dropped` counts all of these. Of all troubles only the first is told, as one line.
    """

    def __init__(
        self, name: str, make: Callable[[], Sink], capacity: int, trouble: Callable[[str, str], None]
    ) -> None:
        """`trouble` gets the name of the sink and what happened."""
        self.name = name
        self.dropped = 0
        self._make, self._trouble = make, trouble
        self._capacity = capacity
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._told = False
        self._thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def offer(self, event: Event) -> None:
        with self._changed:
            full = len(self._events) >= self._capacity or self._closed
            if full:
                self.dropped += 1
            else:
                self._events.append(event)
                self._changed.notify()
        if full and not self._closed:
            self._tell(f"it does not keep up: {self._capacity} events wait, further ones are lost")

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Let the sink take what waits, for a bounded time; what it has not taken by then is lost."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            with self._changed:
                self.dropped += len(self._events)
                self._events.clear()

    def _work(self) -> None:
        sink = self._guarded(self._make)
        while (event := self._next()) is not None:
            if sink is None or not self._guarded(lambda event=event, sink=sink: sink.take(event) or True):
                self.dropped += 1
        if sink is not None:
            self._guarded(sink.close)

    def _next(self) -> Event | None:
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._closed)
            return self._events.popleft() if self._events else None

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except BaseException as error:  # SystemExit included: some libraries raise it
            reason = " ".join(str(error).split())
            self._tell(f"{type(error).__name__}: {reason}" if reason else type(error).__name__)
            return None

    def _tell(self, reason: str) -> None:
        if self._told:
            return
        self._told = True
        try:
            self._trouble(self.name, reason)
        except Exception:
            _log.exception("sink %s: %s", self.name, reason)
