"""The event log: nothing that happens to the store reaches the caller, and what was lost is counted."""

from __future__ import annotations

import math
import multiprocessing
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.events import EventLog, _from_json, _to_json, claim_attempt, read_events
from cluster.store import ObjectStore, open_store
from tests.unit.cluster import children

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("xyz", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return open_store(
        str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_env")
    )


def test_events_are_read_back_in_order(store: ObjectStore) -> None:
    second = EventLog(store, attempt=2, rank=0)
    first = [EventLog(store, attempt=1, rank=rank, flush_seconds=0.01) for rank in range(2)]
    second.instant("attempt_started", processes=2, resumed_step=None)
    for log in first:
        for step in range(3):
            log.scalar(step, loss=0.5, lr=1e-3)
        with log.span("save", step=3):
            pass
    for log in (second, *first):
        log.close()
    events = read_events(store)
    assert [(event["attempt"], event["t"]) for event in events] == sorted(
        (e["attempt"], e["t"]) for e in events
    )
    for rank in range(2):
        mine = [event for event in events if (event["attempt"], event["rank"]) == (1, rank)]
        assert [event["seq"] for event in mine] == [0, 1, 2, 3]
        assert [(event["kind"], event["name"], event["step"]) for event in mine] == [
            ("scalar", "step", 0),
            ("scalar", "step", 1),
            ("scalar", "step", 2),
            ("span", "save", 3),
        ]
        assert mine[0]["loss"] == 0.5
        assert mine[3]["seconds"] >= 0
    assert events[-1]["name"] == "attempt_started"
    assert events[-1]["resumed_step"] is None
    assert store.list("events/attempt-0002/")[0].key == "events/attempt-0002/rank-00000/segment-000000.jsonl"


def test_a_span_notes_the_exception_and_lets_it_go(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    log = EventLog(store, 1, 0)
    with pytest.raises(ValueError, match="bad"), log.span("work"):
        raise ValueError("bad")
    log.close()
    (event,) = read_events(store)
    assert event["error"] == "ValueError: bad"


@given(VALUES)
def test_every_value_survives(value: object) -> None:
    assert repr(_from_json(_to_json(value))) == repr(value)


def test_values_of_other_libraries_become_numbers_or_text(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    log = EventLog(store, 1, 0)
    log.scalar(3, loss=np.float32(0.5), bad=np.float32("nan"), worst=-math.inf, flag=np.bool_(True))
    log.instant("folder", path=Path("/a"), shape=(1, 2))
    log.close()
    scalar, instant = read_events(store)
    assert (scalar["step"], scalar["loss"], scalar["worst"], scalar["flag"]) == (3, 0.5, -math.inf, True)
    assert math.isnan(scalar["bad"])
    assert (instant["path"], instant["shape"]) == ("/a", [1, 2])
    with pytest.raises(ValueError, match="seq, kind"):
        log.instant("x", seq=1, kind="y")


def test_a_failing_store_costs_the_caller_nothing_and_drops_are_counted(tmp_path: Path) -> None:
    obstacle = tmp_path / "events"
    obstacle.touch()  # the log cannot make its folder: a real failure of the store
    store = open_store(str(tmp_path))
    log = EventLog(store, attempt=1, rank=0, flush_seconds=0.01, capacity=10)
    for number in range(50):
        log.instant("tick", number=number)
        time.sleep(0.001)
    assert log.dropped == 40
    obstacle.unlink()
    log.close()
    log.instant("too late")
    events = read_events(store)
    assert [event["number"] for event in events if event["name"] == "tick"] == list(range(10))
    assert [event["count"] for event in events if event["name"] == "events_dropped"] == [40]
    assert log.dropped == 41


def test_flush_returns_when_the_events_are_in_the_store(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    log = EventLog(store, attempt=1, rank=0, flush_seconds=3600)
    for number in range(3):
        log.instant("tick", number=number)
        assert log.flush()
        assert [event["number"] for event in read_events(store)] == list(range(number + 1))
    log.close()


def test_flush_gives_up_on_a_failing_store_and_keeps_the_events(tmp_path: Path) -> None:
    obstacle = tmp_path / "events"
    obstacle.touch()
    store = open_store(str(tmp_path))
    log = EventLog(store, attempt=1, rank=0, flush_seconds=0.01)
    log.instant("tick")
    assert not log.flush(seconds=0.05)
    obstacle.unlink()
    log.close()
    assert [event["name"] for event in read_events(store)] == ["tick"]


def test_a_store_that_never_comes_back_loses_a_known_number(tmp_path: Path) -> None:
    (tmp_path / "events").touch()
    log = EventLog(open_store(str(tmp_path)), attempt=1, rank=0, flush_seconds=0.01)
    for _ in range(5):
        log.instant("tick")
    log.close()
    assert log.dropped == 5


def test_threads_share_one_log(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    log = EventLog(store, 1, 0, flush_seconds=0.001)
    threads = [Thread(target=lambda: [log.instant("tick") for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert sorted(event["seq"] for event in read_events(store)) == list(range(800))


def test_a_killed_process_leaves_a_readable_log(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    process = multiprocessing.get_context("spawn").Process(
        target=children.log_for_ever, args=(str(tmp_path),)
    )
    process.start()
    while len(store.list("events/")) < 5:
        time.sleep(0.01)
    process.kill()
    process.join()
    events = read_events(store)
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert {event["name"] for event in events} == {"step"}


def test_torn_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    log = EventLog(store, 1, 0)
    log.instant("whole")
    log.close()
    good = store.get("events/attempt-0001/rank-00000/segment-000000.jsonl")
    torn = [
        good[: len(good) // 2],
        b"[1]",
        b'{"t": 1}',
        b"\xff\x00",
        good.replace(b'"seq":0', b'"seq":"x"').strip(),
    ]
    store.put("events/attempt-0001/rank-00000/segment-000001.jsonl", b"\n".join(torn))
    store.put("events/notes.txt", b"not a segment")
    whole, skipped = read_events(store)
    assert whole["name"] == "whole"
    assert skipped == {"kind": "instant", "name": "events_skipped", "count": 5}


def test_no_events_at_all(tmp_path: Path) -> None:
    assert read_events(open_store(str(tmp_path / "nothing"))) == []


def test_every_attempt_has_its_own_number(store: ObjectStore) -> None:
    assert claim_attempt(store) == 1
    claimed: list[int] = []
    threads = [Thread(target=lambda: claimed.append(claim_attempt(store))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(2, 10))
    store.put("attempts/attempt-12345.json", b"")
    assert claim_attempt(store) == 12346
