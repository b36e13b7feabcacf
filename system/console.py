"""What a person sees of a long command, on stderr only: the training run, and the bars of the others."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from system.sinks.feed import Event, Feed
from system.sinks.panel import PLAIN_EVERY_SECONDS, SAY, WARN, PanelSink

_WAITING = 10_000
_log = logging.getLogger(__name__)


class Console:
    """Progress of one attempt; silent on all ranks but the first. Nothing here waits for the terminal."""

    def __init__(self, total_steps: int, *, active: bool) -> None:
        self._total, self._active = total_steps, active
        self._feed: Feed | None = None

    def __enter__(self) -> Self:
        if self._active:
            self._feed = Feed("console", lambda: PanelSink(self._total), _WAITING, _log_trouble)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._feed is not None:
            self._feed.close()

    def say(self, message: str) -> None:
        self.event({"name": SAY, "text": message})

    def warn(self, message: str) -> None:
        self.event({"name": WARN, "text": message})

    def event(self, event: Event) -> None:
        """Show what an event of the run says; subscribe this to the event log."""
        if self._feed is not None:
            self._feed.offer(event)


def _log_trouble(name: str, reason: str) -> None:
    _log.warning("%s: %s", name, reason)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Progress of the other long commands, on stderr; hands out the function that takes (done, total, note).

    On a terminal a bar, which is gone at the end; elsewhere a line every PLAIN_EVERY_SECONDS.
    """
    console = RichConsole(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _plain_lines(label, console)
        return
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=None, note="")

        def report(done: int, total: int, note: str) -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield report


def _plain_lines(label: str, console: RichConsole) -> Callable[[int, int, str], None]:
    last = time.monotonic()

    def report(done: int, total: int, note: str) -> None:
        nonlocal last
        if time.monotonic() - last > PLAIN_EVERY_SECONDS:
            last = time.monotonic()
            console.print(f"{label} {done}/{total}  {note}", markup=False, soft_wrap=True)

    return report
