"""The memory of a rank: noted every minute, and told when it grows."""

import time

from cluster.events import EventLog
from system.telemetry.machine import memory_bytes

_SETTLED = 3
"""Caches and buffers fill during the first measurements: growth counts from the third one."""


class MemoryWatch:
    def __init__(self, events: EventLog, seconds: float, growth: float) -> None:
        self._events, self._seconds, self._growth = events, seconds, growth
        self._measured, self._last = 0, time.monotonic()
        self._base: dict[str, int] = {}

    def after_step(self, step: int) -> None:
        """Measure if it is time."""
        if time.monotonic() - self._last < self._seconds:
            return
        self._last = time.monotonic()
        self._measured += 1
        now = memory_bytes()
        self._events.instant("memory", step=step, **now)
        if self._measured <= _SETTLED:
            self._base = now
            return
        for name, size in now.items():
            if size > (1 + self._growth) * self._base[name] > 0:
                self._events.instant("memory_growth", step=step, what=name, before=self._base[name], now=size)
                self._base[name] = size
