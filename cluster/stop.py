"""SIGTERM and Ctrl-C become a flag that the training loop looks at between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Literal, Self

Reason = Literal["interrupted", "preempted"]


class StopRequest:
    """A context in which SIGINT and SIGTERM only set `reason`; the old handlers come back at its end.

    The first signal decides: SIGINT "interrupted", SIGTERM "preempted". A second SIGINT raises
    KeyboardInterrupt at once, for the user who will not wait. Must be entered in the main thread (ValueError
    elsewhere, as Python's signals need it).
    """

    def __init__(self) -> None:
        self.reason: Reason | None = None
        self._interrupts = 0
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.reason is None:
            self.reason = "interrupted" if number == signal.SIGINT else "preempted"
