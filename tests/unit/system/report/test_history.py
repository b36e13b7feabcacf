"""What a run's event log says about its attempts, steps and checkpoints."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ObjectNotFound
from cluster.events import EventLog, claim_attempt
from cluster.store import open_store
from system.report.history import LastWords, build_history, last_words, load_history, own_attempt
from tests.support.paths import ROOT
from tests.support.small_run import CHECKPOINTS, KILLED_AFTER, STEPS, write_events


def test_killed_and_resumed_run(tmp_path: Path):
    run = open_store(str(tmp_path))
    write_events(run)
    history = load_history(run)

    first, second = history.attempts
    assert (first.killed, first.reason, first.silent_ranks) == (True, None, (0, 1))
    assert (second.killed, second.reason, second.exit_code) == (False, "finished", 0)
    assert (first.resumed_step, second.resumed_step) == (None, CHECKPOINTS[0])
    assert (first.first_step, first.last_step) == (1, KILLED_AFTER)
    assert first.superseded_steps == KILLED_AFTER - CHECKPOINTS[0]
    assert first.facts == {"processes": 2, "zero_stage": 1, "precision": "bf16"}
    assert first.start <= first.end <= second.start <= second.end

    assert [record.step for record in history.live_steps] == list(range(1, STEPS + 1))
    assert [record.attempt for record in history.live_steps] == [1] * 6 + [2] * 6
    assert [record.step for record in history.superseded_steps] == [7, 8, 9]
    assert dict(history.series("loss"))[8] == pytest.approx(5.0 / 8 + 0.02)
    assert [mark.step for mark in history.checkpoints] == list(CHECKPOINTS)
    assert history.checkpoints[0].facts == {"seconds": 0.2, "bytes": 1000}
    assert history.last_step == STEPS


def test_a_folder_without_a_run_is_an_error(tmp_path: Path):
    with pytest.raises(ObjectNotFound, match=r"nothing: there is no run here"):
        load_history(open_store(str(tmp_path / "nothing")))


def test_a_run_without_events_is_empty(tmp_path: Path):
    run = open_store(str(tmp_path))
    run.put("config.json", b"{}")
    history = load_history(run)
    assert (history.attempts, history.steps, history.last_step) == ((), (), None)


def test_last_words_are_those_of_the_whole_log(tmp_path: Path):
    run = open_store(str(tmp_path))
    write_events(run)
    first, second = last_words(run, 1), last_words(run, 2)
    assert (first.resumed_step, first.steps_done, first.ends) == (None, KILLED_AFTER, ())
    assert (second.resumed_step, second.steps_done) == (CHECKPOINTS[0], STEPS)
    assert second.loss == pytest.approx(5.0 / STEPS + 0.02)
    assert second.ends == ((0, "finished"), (0, "finished"))


def test_last_words_of_many_segments_and_of_none(tmp_path: Path):
    run = open_store(str(tmp_path))
    assert last_words(run, 1) == LastWords(None, None, None, ())
    log = EventLog(run, 1, 0, flush_seconds=60)
    log.instant("attempt_started", resumed_step=4)
    for step in (5, 6):
        log.scalar(step, loss=float("nan") if step == 6 else 1.0)
        log.flush()
    for _ in range(3):
        log.instant("checkpoint_failed", step=6)
        log.flush()
    log.instant("attempt_ended", reason="Preempted: stopped", exit_code=75)
    log.close()
    assert last_words(run, 1) == LastWords(4, 6, None, ((75, "Preempted: stopped"),))


def test_an_attempt_is_known_by_who_started_it(tmp_path: Path):
    run, since = open_store(str(tmp_path)), time.time()
    assert own_attempt(run, since) is None
    claim = "from cluster.events import claim_attempt; from cluster.store import open_store; "
    claim += f"print(claim_attempt(open_store({str(tmp_path)!r})))"
    claim_attempt(run)  # by somebody else: our parent is not us
    done = subprocess.run([sys.executable, "-c", claim], cwd=ROOT, capture_output=True, check=True)
    claim_attempt(run)
    assert own_attempt(run, since) == int(done.stdout) == 2
    assert own_attempt(run, time.time()) is None


def test_torn_lines_are_counted(tmp_path: Path):
    run = open_store(str(tmp_path))
    write_events(run)
    run.put("events/attempt-0002/rank-00000/segment-000009.jsonl", b'{"t": 1, "att\n')
    assert load_history(run).skipped_events == 1


@pytest.mark.parametrize(
    ("exit_code", "killed"), [(70, True), (77, True), (64, False), (75, False), (130, False)]
)
def test_a_rank_without_an_end_was_killed_unless_a_named_error_explains_it(
    tmp_path: Path, exit_code: int, killed: bool
):
    run = open_store(str(tmp_path))
    logs = [EventLog(run, 1, rank) for rank in range(2)]
    for log in logs:
        log.instant("attempt_started", processes=2)
    logs[0].instant("attempt_ended", reason="RuntimeError: peer is gone", exit_code=exit_code)
    for log in logs:
        log.close()
    (attempt,) = load_history(run).attempts
    assert attempt.silent_ranks == (1,)
    assert attempt.killed is killed


def test_refusals_incidents_and_evaluations_are_marks(tmp_path: Path):
    run = open_store(str(tmp_path))
    log = EventLog(run, 1, 0)
    log.instant("attempt_started", processes=1)
    log.instant("step_refused", step=3, reason="non-finite loss")
    log.instant("checkpoint_failed", step=4, reason="no space")
    log.close()
    for rank in range(2):  # two evaluations, outside of the attempts of the trainer
        outside = EventLog(run, 0, rank)
        outside.instant("evaluation", step=4 + rank, tower="student")
        outside.close()
    history = load_history(run)
    assert [(m.step, m.facts["reason"]) for m in history.refusals] == [(3, "non-finite loss")]
    assert [(m.step, m.name) for m in history.incidents] == [(4, "checkpoint_failed")]
    assert [mark.step for mark in history.evaluations] == [4, 5]
    assert [attempt.number for attempt in history.attempts] == [1]


@given(spans=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 8)), min_size=1, max_size=6))
def test_every_step_is_live_once_and_from_the_newest_attempt(spans: list[tuple[int, int]]):
    """Attempts may begin anywhere: a live step is of the newest attempt that began at or before it."""
    events = [
        {
            "t": 100.0 * attempt + step,
            "attempt": attempt,
            "rank": 0,
            "seq": step,
            "kind": "scalar",
            "name": "step",
        }
        | {"step": step, "loss": 1.0}
        for attempt, (first, length) in enumerate(spans, start=1)
        for step in range(first, first + length)
    ]
    history = build_history("run", events)
    live = {record.step: record.attempt for record in history.live_steps}
    assert len(live) == len(history.live_steps)
    assert len(history.live_steps) + len(history.superseded_steps) == len(events)
    for record in history.steps:
        later = [first for first, length in spans[record.attempt :] if length]
        assert record.live is all(record.step < first for first in later)
