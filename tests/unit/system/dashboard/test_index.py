"""What the dashboard keeps of a log is what the log says, in bounded memory, however the log comes."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.events import read_events
from cluster.goodput import build_ledger
from cluster.store import open_store
from system.dashboard.alerts import alerts
from system.dashboard.columns import Column, extremes
from system.dashboard.index import RunIndex
from system.dashboard.log_reader import LogReader
from system.dashboard.ranks import COLUMNS, RankGrid
from system.dashboard.step_times import StepTimes
from system.report.history import build_history, load_history
from tests.support.replayed_run import Replay, write_killed_and_rewound

EVERYTHING = (0, 1 << 60, 100_000)


def take_in(folder: Path, index: RunIndex, reader: LogReader) -> None:
    reader._next_listing = 0.0  # what a page that is open for a while comes to by itself
    for batch in reader.unread():
        index.add(batch.events, batch.torn)


def read(folder: Path) -> RunIndex:
    run = open_store(str(folder))
    index = RunIndex(run.uri)
    take_in(folder, index, LogReader(run))
    return index


def test_killed_and_rewound_run_is_that_of_the_report(tmp_path: Path):
    write_killed_and_rewound(tmp_path)
    index, whole = read(tmp_path), load_history(open_store(str(tmp_path)))
    live, lost = index.trace("loss", *EVERYTHING)
    assert list(zip(live.steps, live.values, strict=True)) == whole.series("loss")
    again = {
        (attempt, step, value)
        for attempt, line in lost
        for step, value in zip(line.steps, line.values, strict=True)
    }
    assert again == {(r.attempt, r.step, r.values["loss"]) for r in whole.superseded_steps}
    history = index.history()
    assert history.attempts == whole.attempts
    assert history.checkpoints == whole.checkpoints
    assert history.incidents == whole.incidents
    assert history.ledger == whole.ledger
    assert index.events == len(read_events(open_store(str(tmp_path))))


def test_fifty_rewinds_leave_one_live_value_per_step(tmp_path: Path):
    log, rng, at = Replay(tmp_path), random.Random(3), 0
    for attempt in range(1, 52):
        first = max(1, at - rng.randrange(9))
        at = first + rng.randrange(3, 20)
        log.start(attempt, resumed=first - 1)
        log.steps(attempt, first, at)
    log.flush()
    index, whole = read(tmp_path), load_history(open_store(str(tmp_path)))
    live, _ = index.trace("loss", *EVERYTHING)
    assert live.steps == sorted(set(live.steps))
    assert list(zip(live.steps, live.values, strict=True)) == whole.series("loss")
    assert [index.superseded(a.number) for a in whole.attempts] == [
        a.superseded_steps for a in whole.attempts
    ]


def test_a_rewind_inside_an_attempt(tmp_path: Path):
    log = Replay(tmp_path)
    log.start(1)
    log.steps(1, 1, 10)
    log.steps(1, 6, 8)
    log.flush()
    live, lost = read(tmp_path).trace("loss", *EVERYTHING)
    assert live.steps == list(range(1, 9))
    assert [(attempt, line.steps) for attempt, line in lost] == [(1, [6, 7, 8, 9, 10])]


def test_a_log_that_grows_is_torn_and_lacks_parts(tmp_path: Path):
    log = Replay(tmp_path)
    log.start(1)
    for first in (1, 11, 21):
        log.steps(1, first, first + 9)
        log.flush()
    middle, last = log.segment(1, 0, 1), log.segment(1, 0, 2)
    whole_middle, whole_last = middle.read_bytes(), last.read_bytes()
    middle.unlink()
    last.write_bytes(whole_last[: len(whole_last) // 2])
    run = open_store(str(tmp_path))
    index, reader = RunIndex(run.uri), LogReader(run)
    take_in(tmp_path, index, reader)
    before = index.trace("loss", *EVERYTHING)[0].steps
    assert before[:10] == list(range(1, 11))
    assert 20 < before[-1] < 30
    assert index.torn == 0  # the half line may still be completed

    last.write_bytes(whole_last + b"{torn\n")
    middle.write_bytes(whole_middle)
    log.steps(1, 31, 35)
    log.flush()
    take_in(tmp_path, index, reader)
    live, lost = index.trace("loss", *EVERYTHING)
    assert (live.steps, lost) == (list(range(1, 36)), [])
    assert index.torn == 1


def test_new_segments_are_found_between_two_listings(tmp_path: Path):
    log = Replay(tmp_path)
    log.start(1)
    log.steps(1, 1, 3)
    log.flush()
    reader = LogReader(open_store(str(tmp_path)))
    list(reader.unread())
    log.steps(1, 4, 6)
    log.flush()
    (batch,) = reader.unread()
    assert [event["step"] for event in batch.events if event["name"] == "step"] == [4, 5, 6]
    assert list(reader.unread()) == []


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=400),
    size=st.integers(2, 50),
)
def test_extremes_keep_the_lowest_the_highest_and_the_ends(values: list[float], size: int):
    array = np.array(values)
    kept = extremes(array, size)
    assert kept[0] == 0
    assert kept[-1] == len(values) - 1
    assert list(kept) == sorted(set(kept))
    if np.isfinite(array).any():
        assert np.nanmin(array[kept]) == np.nanmin(array)
        assert np.nanmax(array[kept]) == np.nanmax(array)


def test_a_column_is_bounded_and_loses_no_spike():
    column, rng = Column(capacity=1000), np.random.default_rng(0)
    values = rng.normal(size=50_000)
    values[[17, 31_000]] = 99.0, -99.0
    values[40_000] = np.inf
    for start in range(0, 50_000, 700):
        part = values[start : start + 700]
        column.extend(list(range(start, start + len(part))), 1, part.tolist())
    assert column.nbytes < 200_000
    line = column.live({1: float("inf")}, *EVERYTHING)
    assert all(
        value is None or value == values[step] for step, value in zip(line.steps, line.values, strict=True)
    )
    found = dict(zip(line.steps, line.values, strict=True))
    assert (found[17], found[31_000], line.steps[-1], column.not_finite) == (99.0, -99.0, 49_999, 1)
    assert np.diff(line.steps).max() < 50_000 / 100  # as fine at the beginning as later
    few = column.live({1: float("inf")}, 0, 1 << 60, 100)
    assert len(few.steps) <= 110
    assert {99.0, -99.0} <= set(few.values)


@pytest.mark.parametrize("most", [10_000, 60])
def test_joined_steps_have_the_same_ledger_but_for_the_ends_of_attempts(tmp_path: Path, most: int):
    log = Replay(tmp_path)
    log.start(1)
    log.steps(1, 1, 400)
    log.start(2, resumed=360)
    log.steps(2, 361, 900)
    log.end(2)
    log.flush()
    events = read_events(open_store(str(tmp_path)))
    steps = [event for event in events if event["rank"] == 0 and event["name"] == "step"]
    times = StepTimes(most)
    for start in range(0, len(steps), 100):
        times.add(steps[start : start + 100])
    others = [event for event in events if event["name"] not in ("step", "rank_times")]
    joined = build_ledger(sorted([*others, *times.entries], key=lambda e: (e["attempt"], e["t"], e["seq"])))
    exact = build_ledger(events)
    slack = 0.0 if most > len(steps) else 40.0
    assert joined.wall_seconds == exact.wall_seconds
    for name, seconds in exact.seconds.items():
        assert joined.seconds[name] == pytest.approx(seconds, abs=slack + 1e-3)
    assert len(times.entries) <= most


def test_the_grid_of_ranks_is_bounded_and_shows_the_slow_one():
    grid = RankGrid()
    for second in range(0, 100_000, 50):
        event = {
            "t": 1e9 + second,
            "attempt": 1,
            "rank": 0,
            "seq": 0,
            "kind": "instant",
            "name": "rank_times",
        }
        grid.add([event | {"seconds": [1.0, 1.0, 3.0]}])
    rows = grid.view()["measures"]["step work"]
    assert (len(rows), len(rows[0])) == (3, pytest.approx(COLUMNS, abs=COLUMNS // 2))
    assert [row[0] for row in rows] == [1.0, 1.0, 3.0]


def test_what_is_no_event_of_ours_harms_nothing(tmp_path: Path):
    log = Replay(tmp_path)
    log.start(1)
    log.put(1, "scalar", "step", step="three", loss=1.0)
    log.put(1, "scalar", "step", loss=1.0)
    log.put(1, "scalar", "step", step=1, loss="nan", note="a word", grad_norm=None, lr=[1.0])
    log.put(1, "scalar", "step", step=2, loss=2.0, note=3.0)
    log.put(1, "instant", "rank_times", seconds="none")
    log.flush()
    index = read(tmp_path)
    live, _ = index.trace("loss", *EVERYTHING)
    assert (live.steps, live.values) == ([1, 2], [None, 2.0])
    assert index.columns["loss"].not_finite == 1
    assert build_history("x", []).attempts == ()


def test_alerts_fire_and_clear(tmp_path: Path):
    log = Replay(tmp_path)
    for attempt in range(1, 6):
        log.start(attempt, resumed=10 * (attempt - 1) or None)
        log.steps(attempt, 10 * attempt - 9, 10 * attempt)
        log.put(attempt, "instant", "checkpoint_failed", step=10 * attempt, reason="no space")
    log.flush()
    index = read(tmp_path)

    def names(now: float) -> list[str]:
        return [alert.name.removeprefix("Maskclip") for alert in alerts(index, index.history(), now)]

    assert names(log.now + 1) == ["RestartStorm", "CheckpointFailed"]
    assert names(log.now + 700) == ["NoProgress", "RestartStorm"]
    assert names(log.now + 7200) == ["NoProgress"]
    assert names(log.now + 90_000) == []
    log.end(5)
    log.flush()
    ended = read(tmp_path)
    assert alerts(ended, ended.history(), log.now + 700) == []
