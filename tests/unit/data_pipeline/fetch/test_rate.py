"""Never more at once than allowed, never closer together, and nothing is kept of idle hosts."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.fetch.download_config import Refused
from data_pipeline.fetch.rate import Turns, pause, retry_after


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [("abcd", {"all": 7}), ("ab", {"all": 6, "a": 3, "b": 3}), ("a", {"all": 3, "a": 3})],
)
def test_bounds_in_all_and_per_host(hosts: str, expected: dict[str, int]):
    now: Counter[str] = Counter()
    most: Counter[str] = Counter()

    async def work(turns: Turns, host: str) -> None:
        async with turns.turn(host):
            now[host] += 1
            most["all"] = max(most["all"], now.total())
            most[host] = max(most[host], now[host])
            await asyncio.sleep(0.001)
            now[host] -= 1

    async def run() -> None:
        turns = Turns(concurrency=7, per_host=3, rate=None, patience=9.0)
        await asyncio.gather(*(work(turns, host) for _ in range(20) for host in hosts))

    asyncio.run(run())
    assert {name: most[name] for name in expected} == expected
    assert max(most[host] for host in hosts) <= 3


def test_a_host_that_does_not_answer_holds_no_place_of_the_others():
    async def run() -> int:
        turns = Turns(concurrency=4, per_host=2, rate=None, patience=9.0)
        forever = asyncio.Event()
        done = 0

        async def wait_for_ever() -> None:
            async with turns.turn("slow"):
                await forever.wait()

        async def quick(n: int) -> None:
            nonlocal done
            async with turns.turn(f"host{n % 3}"):
                done += 1

        stuck = [asyncio.create_task(wait_for_ever()) for _ in range(50)]
        await asyncio.gather(*(quick(n) for n in range(30)))
        for task in stuck:
            task.cancel()
        return done

    assert asyncio.run(asyncio.wait_for(run(), 30)) == 30


@pytest.mark.parametrize(("rate", "interval"), [(50.0, 0.0), (None, 0.02), (1000.0, 0.02)])
def test_requests_to_one_host_are_apart(rate: float | None, interval: float):
    async def run() -> tuple[float, list[float]]:
        turns = Turns(concurrency=8, per_host=8, rate=rate, patience=9.0)
        starts: list[float] = []

        async def work(host: str) -> None:
            async with turns.turn(host, interval):
                starts.append(asyncio.get_running_loop().time())

        begun = asyncio.get_running_loop().time()
        await asyncio.gather(*(work("a") for _ in range(6)))
        return begun, starts

    begun, starts = asyncio.run(run())
    assert all(start >= begun + n * 0.02 for n, start in enumerate(starts))


def test_a_host_that_asks_for_a_pause_gets_it_and_others_do_not_wait():
    async def run() -> tuple[list[str], float]:
        turns = Turns(concurrency=8, per_host=8, rate=None, patience=9.0)
        order: list[str] = []
        loop = asyncio.get_running_loop()

        async def work(host: str, n: int) -> None:
            async with turns.turn(host):
                order.append(f"{host}{n}")

        async with turns.turn("a"):
            turns.hold_back("a", 0.05)
            held = loop.time()
        await asyncio.gather(work("a", 1), work("b", 1), work("b", 2))
        return order, loop.time() - held

    order, waited = asyncio.run(run())
    assert order == ["b1", "b2", "a1"]
    assert waited >= 0.05


def test_a_host_that_asks_for_too_long_a_pause_is_left_alone():
    async def run() -> list[str]:
        turns = Turns(concurrency=8, per_host=8, rate=None, patience=5.0)
        async with turns.turn("a"):
            turns.hold_back("a", 3600)
        words = []
        for host in "aab":
            try:
                async with turns.turn(host):
                    words.append("went")
            except Refused as refused:
                words.append(refused.word)
        return words

    assert asyncio.run(run()) == ["host_busy", "host_busy", "went"]


def test_idle_hosts_are_forgotten():
    async def run() -> int:
        turns = Turns(concurrency=8, per_host=1, rate=1000.0, patience=9.0)
        for n in range(100):
            async with turns.turn(f"host{n}"):
                pass
        for _ in range(500):
            if not turns._hosts:
                break
            await asyncio.sleep(0.01)
        return len(turns._hosts)

    assert asyncio.run(run()) == 0


@given(st.integers(0, 10**6), st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_pauses_grow_to_the_cap_and_are_the_same_each_time(attempt: int, key: int):
    wait = pause(attempt, base=0.5, cap=20.0, key=key)
    whole = min(20.0, 0.5 * 2.0 ** min(attempt, 60))
    assert whole / 2 <= wait < whole
    assert wait == pause(attempt, base=0.5, cap=20.0, key=key)


def test_rows_do_not_all_come_back_at_once():
    assert len({pause(0, 1.0, 9.0, key) for key in range(100)}) == 100


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        (" 0 ", 0.0),
        ("9" * 50, 999_999_999.0),
        ("soon", None),
        ("-3", None),
        ("", None),
    ],
)
def test_retry_after_in_seconds(value: str | None, seconds: float | None):
    assert retry_after(value) == seconds


def test_retry_after_as_a_date():
    late = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    assert 3500 < (retry_after(late) or 0) <= 3600
    assert retry_after(formatdate(time.time() - 500, usegmt=True)) == 0.0
    assert retry_after("Wed, 32 Foo 9999 99:99:99 GMT") is None
