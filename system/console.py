"""What a person sees of a training run: a live bar on a terminal, plain lines in a log file. Writes to
stderr only."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_SECONDS = 10.0


class Console:
    """Progress of one attempt; silent on all ranks but the first."""

    def __init__(self, total_steps: int, *, active: bool) -> None:
        self._rich = RichConsole(stderr=True, quiet=not active, highlight=False)
        self._live = self._rich.is_terminal and active
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._rich,
        )
        self._task = self._progress.add_task("steps", total=total_steps, numbers="")
        self._total = total_steps
        self._last_line = float("-inf")

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def say(self, message: str) -> None:
        self._rich.print(message, markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        self._rich.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)

    def step(self, step: int, values: dict[str, float]) -> None:
        waited = values["data_seconds"] / (values["data_seconds"] + values["step_seconds"])
        numbers = (
            f"loss {values['loss']:.4f}  grad {values['grad_norm']:.2f}  "
            f"{values['pairs_per_second']:.1f} pairs/s  data {waited:.0%}"
        )
        if self._live:
            self._progress.update(self._task, completed=step, numbers=numbers)
        elif step == self._total or time.monotonic() - self._last_line > PLAIN_EVERY_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self._total}  {numbers}")


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
