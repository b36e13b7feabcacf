"""Whose turn it is: how many requests run at once, in all and per host, and how far apart those to one host
are; and how long to wait before the next attempt. Not from the paper.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime

from data_pipeline.fetch.download_config import Refused
from data_pipeline.keyed import uniform


class _Host:
    """One host that somebody waits for, or that was asked a moment ago."""

    def __init__(self, slots: int) -> None:
        self.slots = asyncio.Semaphore(slots)
        self.users = 0
        self.next_at = 0.0
        """Time of the loop, in seconds, before which no request may begin."""
        self.asked_until = 0.0
        """The same, as far as the host asked for it."""


class Turns:
    """Bounds on the requests of one process. Belongs to one event loop. Nobody waits longer than `patience`
    seconds because a host asked for it."""

    def __init__(self, concurrency: int, per_host: int, rate: float | None, patience: float) -> None:
        self._all = asyncio.Semaphore(concurrency)
        self._per_host = per_host
        self._interval = 0.0 if rate is None else 1.0 / rate
        self._patience = patience
        self._hosts: dict[str, _Host] = {}

    @asynccontextmanager
    async def turn(self, host: str, interval: float = 0.0) -> AsyncIterator[None]:
        """Hold one place for `host`, at least `interval` seconds after the request before it.

        Who waits for a slow host holds none of the places that the other hosts share. Raises Refused
        "host_busy".
        """
        loop = asyncio.get_running_loop()
        place = self._hosts.setdefault(host, _Host(self._per_host))
        place.users += 1
        try:
            async with place.slots:
                await self._our_turn(place, host)
                place.next_at = loop.time() + max(self._interval, interval)
                try:
                    yield
                finally:
                    self._all.release()
        finally:
            place.users -= 1
            if place.users == 0:
                loop.call_later(max(0.0, place.next_at - loop.time()), self._forget, host)

    async def _our_turn(self, place: _Host, host: str) -> None:
        """Return with one of the places that all hosts share, when `place` may be asked."""
        loop = asyncio.get_running_loop()
        while True:
            while (wait := place.next_at - loop.time()) > 0:
                if place.asked_until - loop.time() > self._patience:
                    raise Refused("host_busy", f"{host} asked to wait longer than download.retry_after_cap")
                await asyncio.sleep(wait)
            await self._all.acquire()
            if place.next_at <= loop.time():
                return
            self._all.release()  # while this one waited another went, or the host asked for a pause

    def hold_back(self, host: str, seconds: float) -> None:
        """Begin no request to `host` for `seconds`, because it asked for that."""
        place = self._hosts.get(host)
        if place is not None:
            place.asked_until = max(place.asked_until, asyncio.get_running_loop().time() + seconds)
            place.next_at = max(place.next_at, place.asked_until)

    def _forget(self, host: str) -> None:
        """Drop what is known of an idle host: a crawl meets more hosts than memory should hold."""
        place = self._hosts.get(host)
        if place is not None and not place.users and place.next_at <= asyncio.get_running_loop().time():
            del self._hosts[host]


def pause(attempt: int, base: float, cap: float, key: int) -> float:
    """Seconds before attempt number `attempt` + 1 (the first is 0): doubling, at most `cap`, and spread by a
    factor in [0.5, 1) that is a pure function of (key, attempt)."""
    spread = 0.5 + 0.5 * float(uniform(0, attempt, key, 0))
    return min(cap, base * 2.0 ** min(attempt, 60)) * spread


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date; None when it says nothing."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])  # 30 years are enough
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError, OSError):
        return None
