"""How long this rank works on a step before it depends on the others: what makes a slow rank visible.

In a synchronous step all ranks take the same time, because the fast ones wait for the slow one inside a
collective. What tells them apart is the work up to there: the wait for data and the rank's own passes, until
its features meet those of the others. The time of each step is known when the next one starts, so nothing
waits for the device.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Mark = float | torch.cuda.Event
_MARKS = 4  # start, into and out of the count of the weights, into the exchange of features


class WorkClock:
    def __init__(self) -> None:
        self._marks: list[Mark] = []
        self._waited = 0.0
        self.seconds = 0.0
        """Of the step before; 0 when none was complete."""

    def start(self, data_seconds: float) -> None:
        """A step begins; `data_seconds` is what its batch was waited for."""
        if len(self._marks) == _MARKS:
            begin, into, out, meet = self._marks
            self.seconds = self._waited + _between(begin, into) + _between(out, meet)
        self._marks = [_now()]
        self._waited = data_seconds

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Around a collective of the forward."""
        self._mark()
        yield
        self._mark()

    def _mark(self) -> None:
        if 0 < len(self._marks) < _MARKS:
            self._marks.append(_now())


def _now() -> Mark:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Mark, last: Mark) -> float:
    """Seconds. The device has passed both marks: every step ends with a value that the host reads."""
    if isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event):
        return first.elapsed_time(last) / 1000.0
    assert not isinstance(first, torch.cuda.Event)
    assert not isinstance(last, torch.cuda.Event)
    return last - first
