"""A sink that is slow, hangs or fails costs whoever logs nothing, and what it lost is counted."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from system.sinks.feed import Event, Feed


class Recorded:
    """A sink that does what it is told with each event."""

    def __init__(self, act: Callable[[Event], None]) -> None:
        self.taken: list[Event] = []
        self._act = act

    def take(self, event: Event) -> None:
        self._act(event)
        self.taken.append(event)

    def close(self) -> None:
        self.taken.append({"name": "closed"})


def opened(make: Callable[[], Any], capacity: int = 100) -> tuple[Feed, list[tuple[str, str]]]:
    told: list[tuple[str, str]] = []
    return Feed("it", make, capacity, lambda name, reason: told.append((name, reason))), told


def test_all_events_in_order_then_the_end():
    sink = Recorded(lambda event: None)
    feed, told = opened(lambda: sink)
    for number in range(50):
        feed.offer({"name": str(number)})
    feed.close()
    assert [event["name"] for event in sink.taken] == [*map(str, range(50)), "closed"]
    assert (feed.dropped, told) == (0, [])


def test_a_sink_that_hangs_loses_what_does_not_fit():
    entered, release = threading.Event(), threading.Event()

    def hang(event: Event) -> None:
        entered.set()
        release.wait(30)

    sink = Recorded(hang)
    feed, told = opened(lambda: sink, capacity=3)
    feed.offer({"name": "first"})
    assert entered.wait(10)
    for number in range(10):  # returns at once: the sink does not, until it is released below
        feed.offer({"name": str(number)})
    assert feed.dropped == 7
    assert len(told) == 1
    assert "does not keep up" in told[0][1]
    feed.close(seconds=0.05)
    assert feed.dropped == 10  # those that waited are lost too
    release.set()


def test_one_warning_for_any_number_of_failures():
    def fail(event: Event) -> None:
        if event["bad"]:
            raise OSError("the disk\nis full")

    sink = Recorded(fail)
    feed, told = opened(lambda: sink)
    for number in range(9):
        feed.offer({"name": str(number), "bad": number % 3 == 0})
    feed.close()
    assert told == [("it", "OSError: the disk is full")]
    assert feed.dropped == 3
    assert len(sink.taken) == 6 + 1


@pytest.mark.parametrize("error", [OSError("port 1 is taken"), SystemExit(3)])
def test_a_sink_that_cannot_be_made_gets_nothing(error: BaseException):
    def make() -> Recorded:
        raise error

    feed, told = opened(make)
    for _ in range(5):
        feed.offer({"name": "step"})
    feed.close()
    assert feed.dropped == 5
    assert [name for name, _ in told] == ["it"]


def test_trouble_that_fails_is_no_trouble():
    def make() -> Recorded:
        raise OSError("gone")

    def trouble(name: str, reason: str) -> None:
        raise RuntimeError("nobody listens")

    feed = Feed("it", make, 10, trouble)
    feed.offer({"name": "step"})
    feed.close()
    assert feed.dropped == 1
