"""What a person sees of a training run: one live panel on a terminal, plain lines in a log file."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from system.sinks.feed import Event

PLAIN_EVERY_SECONDS = 10.0
SAY, WARN = "say", "warn"
"""Names of events that are only for people: `text` is shown as it is."""

_LOSSES = ("image_text", "text_image", "pairs", "distill", "mlm")


class PanelSink:
    def __init__(self, total_steps: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._total = total_steps
        self._last_line = float("-inf")
        self._refused = 0
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()

    def take(self, event: Event) -> None:
        name = event["name"]
        if name == SAY:
            self._console.print(event["text"], markup=False, soft_wrap=True)
        elif name == WARN:
            self._warn(event["text"])
        elif name == "step_refused":
            self._refused += 1
        elif name == "step" and self._live is not None:
            self._live.update(self._panel(event))
        elif name == "step":
            self._plain(event)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    def _plain(self, event: Event) -> None:
        step, now = event["step"], time.monotonic()
        if step != self._total and now - self._last_line <= PLAIN_EVERY_SECONDS:
            return
        self._last_line = now
        waited = event["data_seconds"] / (event["data_seconds"] + event["step_seconds"])
        numbers = (
            f"loss {event['loss']:.4f}  grad {event['grad_norm']:.2f}  "
            f"{event['pairs_per_second']:.1f} pairs/s  data {waited:.0%}"
        )
        self._console.print(f"step {step}/{self._total}  {numbers}", markup=False, soft_wrap=True)

    def _panel(self, event: Event) -> Panel:
        grid = Table.grid(padding=(0, 2))
        for name, value in self._lines(event):
            grid.add_row(name, value)
        bar = ProgressBar(total=self._total, completed=event["step"])
        title = f"step {event['step']:,} of {self._total:,}, {_time(event['left_seconds'])} left"
        return Panel(Group(bar, grid), title=title, title_align="left")

    def _lines(self, event: Event) -> list[tuple[str, str]]:
        terms = "  ".join(f"{name} {event[name]:.4f}" for name in _LOSSES if name in event)
        speed = f"{event['pairs_per_second']:,.1f} pairs/s"
        if "mfu" in event:
            speed += f"  MFU {event['mfu']:.1%}"
        waited = event["data_seconds"] / (event["data_seconds"] + event["step_seconds"])
        times = f"median {event['step_p50_seconds']:.3g} s  p99 {event['step_p99_seconds']:.3g} s"
        if "rank_skew" in event:
            times += f"  slowest rank {event['slowest_rank']} ({event['rank_skew']:.2f} x the median)"
        teacher = _named(event, {"entropy": "teacher_entropy", "codewords used": "codeword_use"})
        state = _named(event, {"epoch": "epoch", "durable state, s": "durable_age_seconds"})
        return [
            ("loss", f"{event['loss']:.4f}  {terms}"),
            ("gradient", f"{event['grad_norm']:.3g}  lr {event['lr']:.3g}  refused {self._refused}"),
            ("teacher", teacher),
            ("speed", f"{speed}  data {waited:.0%}"),
            ("steps", times),
            ("run", state),
        ]


def _named(event: Event, names: dict[str, str]) -> str:
    found: dict[str, Any] = {shown: event[name] for shown, name in names.items() if name in event}
    return "  ".join(f"{shown} {value:.3g}" for shown, value in found.items())


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days} d {hours} h" if days else f"{hours}:{minutes % 60:02d} h"
