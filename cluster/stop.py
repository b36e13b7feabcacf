"""What SIGTERM, SIGUSR1 and Ctrl-C do: a flag between two steps, an error in a launcher, the end where
nothing is to be saved yet."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Literal, Self

from cluster.errors import Interrupted, Preempted

Reason = Literal["interrupted", "preempted"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what batch systems send ahead of a time limit (Slurm: --signal)."""


def reason_of(number: int) -> Reason:
    return "interrupted" if number == signal.SIGINT else "preempted"


def stopped(reason: Reason, message: str) -> Interrupted | Preempted:
    """The error that ends a process which was asked to stop."""
    return Interrupted(message) if reason == "interrupted" else Preempted(message)


def end_at_once() -> None:
    """Both signals end this process at once and without a word: there is nothing to save yet, and whoever
    started it says why. A Ctrl-C that `local_launch` held back comes now."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class _Asked(BaseException):
    """No Exception, which somebody on the way could take for a failure of his own; and no KeyboardInterrupt,
    after which Python may end by SIGINT whatever the exit code is."""


@contextmanager
def stop_raises(message: str) -> Iterator[Callable[[], None]]:
    """Both signals leave the block as `Preempted` or `Interrupted`. Must be entered in the main thread.

    Yields a function that raises if one came and was swallowed on its way, as some libraries do while they
    are imported: call it before anything long.
    """
    asked: list[Reason] = []

    def handle(number: int, frame: FrameType | None) -> None:
        asked.append(reason_of(number))
        raise _Asked

    def check() -> None:
        if asked:
            raise stopped(asked[0], message)

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield check
    except _Asked:
        raise stopped(asked[0], message) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
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
            self.reason = reason_of(number)
