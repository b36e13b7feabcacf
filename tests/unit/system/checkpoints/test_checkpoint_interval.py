"""When saves are due, and what the automatic interval follows from."""

import math

import pytest

from cluster.events import EventLog, claim_attempt, read_events
from cluster.store import open_store
from system.checkpoints.config import CheckpointConfig
from system.checkpoints.interval import Failures, Interval, observed_failures, plan


@pytest.fixture
def events(tmp_path):
    log = EventLog(open_store(str(tmp_path)), 1, 0)
    yield log
    log.close()


def none() -> Failures:
    return Failures(0.0, 0)


def test_by_steps_it_is_a_function_of_the_step(events):
    interval = Interval(CheckpointConfig(every_steps=7), events, none)
    assert [step for step in range(1, 30) if interval.due(step)] == [7, 14, 21, 28]


def test_by_seconds_it_counts_from_the_last_save(events):
    now = [0.0]
    config = CheckpointConfig(interval="seconds", every_seconds=10)
    interval = Interval(config, events, none, clock=lambda: now[0])
    assert not interval.due(1)
    now[0] = 10
    assert interval.due(2)
    interval.began()
    now[0] = 19
    assert not interval.due(3)


def test_the_plan_loses_least():
    """No other interval has a lower expected loss."""
    failures = Failures(36_000, 3)
    best = plan(2.0, 5.0, 20.0, failures, 3600)
    assert best.seconds_between_failures == 39_600 / 4
    assert best.seconds == pytest.approx(math.sqrt(2 * 2.0 * 9900))

    def loss(seconds: float) -> float:
        return 2.0 / seconds + (seconds / 2 + 25.0) / 9900

    assert best.expected_loss == pytest.approx(loss(best.seconds))
    assert all(loss(best.seconds * factor) > best.expected_loss for factor in (0.5, 0.8, 1.25, 2))
    assert plan(0.001, 500.0, 0, none(), 3600).seconds == 600  # saves do not overlap


def test_auto_plans_from_what_was_measured_and_says_so(tmp_path, events):
    now = [0.0]
    config = CheckpointConfig(interval="auto", mean_failure_hours=1)
    interval = Interval(config, events, lambda: Failures(7200, 2), clock=lambda: now[0])
    interval.restore_seconds = 30
    now[0] = 60
    assert interval.due(1)
    interval.began()
    interval.saved(stall_seconds=2, save_seconds=10)
    expected = math.sqrt(2 * 2 * (3600 + 7200 + 60) / 3)
    now[0] = 60 + expected - 1
    assert not interval.due(2)
    now[0] = 60 + expected + 1
    assert interval.due(3)
    interval.saved(stall_seconds=2, save_seconds=10)  # nearly the same again: no news
    events.close()
    (said,) = [e for e in read_events(open_store(str(tmp_path))) if e["name"] == "checkpoint_interval"]
    assert said["seconds"] == pytest.approx(expected)
    assert said["failures"] == 2
    assert 0 < said["expected_loss"] < 1


def test_failures_of_the_runs_own_attempts(tmp_path):
    run = open_store(str(tmp_path))
    for last in ({}, {"reason": "x", "exit_code": 75}, {"reason": "x", "exit_code": 70}):
        log = EventLog(run, claim_attempt(run), 0)
        log.instant("attempt_started")
        if last:
            log.instant("attempt_ended", **last)
        log.close()
    claim_attempt(run)
    found = observed_failures(run, 4)
    assert found.count == 2
    assert 0 <= found.seconds < 60
