"""Laws of the goodput ledger: on logs whose truth is known it gives that truth, and its classes always sum to
the wall time."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.events import EventLog, read_events
from cluster.goodput import CLASSES, build_ledger
from cluster.store import open_store
from cluster.world import process_clocks


@dataclass
class World:
    """A run that happens in true time `now`; its hosts' wall clocks are off by what they were set to."""

    random: random.Random
    now: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)
    truth: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    boots: dict[str, float] = field(default_factory=dict)
    """When each host was booted, in true time."""
    wall: float = 1.7e9
    """Wall clock at true time 0."""

    def seconds(self, most: float) -> float:
        return self.random.uniform(0.001, most)


class AttemptLog:
    """One attempt of that run: it writes events as the trainer does, and keeps the truth beside them."""

    def __init__(self, world: World, number: int, boot: str) -> None:
        self.world, self.number, self.seq = world, number, 0
        self.spent: list[tuple[str, float]] = []
        launch = world.seconds(20)
        self.spend("start_up", launch)
        self.offset = world.wall  # fixed for the life of the process
        world.boots.setdefault(boot, -world.seconds(1e6))
        monotonic = world.now - world.boots[boot]
        self.say("attempt_opened", process_seconds=launch, boot=boot, monotonic=monotonic)

    def spend(self, kind: str, seconds: float) -> float:
        self.world.now += seconds
        self.spent.append((kind, seconds))
        return seconds

    def say(self, name: str, kind: str = "instant", **fields: Any) -> None:
        header = {"t": self.offset + self.world.now, "attempt": self.number, "rank": 0, "seq": self.seq}
        self.world.events.append({**header, "kind": kind, "name": name, **fields})
        self.seq += 1

    def start(self, resumed: int) -> None:
        self.spend("start_up", self.world.seconds(5))
        if resumed:
            self.say(
                "checkpoint_restored", step=resumed, seconds=self.spend("restore", self.world.seconds(9))
            )
        self.spend("start_up", self.world.seconds(1))
        self.say("attempt_started", resumed_step=resumed or None)

    def step(self, number: int, counts: bool) -> None:
        world = self.world
        if world.random.random() < 0.1:
            data, lost = self.spend("data_wait", world.seconds(1)), self.spend("lost_work", world.seconds(2))
            self.say("step_refused", step=number - 1, data_seconds=data, step_seconds=lost)
        data = self.spend("data_wait" if counts else "lost_work", world.seconds(1))
        worked = self.spend("productive" if counts else "lost_work", world.seconds(2))
        self.say("step", "scalar", step=number, data_seconds=data, step_seconds=worked)
        if world.random.random() < 0.2:
            stall = self.spend("checkpoint_stall", world.seconds(1))
            self.say("checkpoint_stall", "span", step=number, seconds=stall)
        if world.random.random() < 0.1:
            seconds = self.spend("evaluation", world.seconds(9))
            self.say(world.random.choice(["evaluation", "evaluation_failed"]), step=number, seconds=seconds)
        if world.random.random() < 0.1:
            self.spend("idle", world.seconds(1))
            self.say("checkpoint_committed", step=number - 1, seconds=30.0)


def live_run(seed: int, attempts: int) -> World:
    """A run on two hosts with a kill after every attempt, a wall clock that is set at any time, and attempts
    that never get to a step."""
    world = World(random.Random(seed))
    saved = done = 0
    resumes = []
    plan = []
    for _ in range(
        attempts
    ):  # who gets how far is drawn first: whether a step counts depends on what follows
        saved = world.random.randint(saved, done)
        resumes.append(saved)
        done = saved + world.random.choice([0, 1, 5, 20])
        plan.append(done)
    for index, (resumed, last) in enumerate(zip(resumes, plan, strict=True)):
        host = "one"  # wall clocks of two hosts would have to agree; the monotonic clock of one boot must not
        if index:
            world.truth["down"] += (down := world.seconds(100))
            world.now += down
            world.wall += world.random.choice([0.0, 0.0, -5000.0, 7200.0])
        log = AttemptLog(world, index + 1, host)
        log.start(resumed)
        kept = min(resumes[index + 1 :], default=10**9)
        for number in range(resumed + 1, last + 1):
            log.step(number, counts=number <= kept)
            if world.random.random() < 0.05:
                world.wall += world.random.uniform(-4000, 4000)
        for kind, seconds in log.spent:
            world.truth[kind] += seconds
    return world


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), attempts=st.integers(1, 25))
def test_a_log_whose_truth_is_known_gives_that_truth(seed, attempts):
    world = live_run(seed, attempts)
    ledger = build_ledger(world.events)
    assert ledger.wall_seconds == pytest.approx(world.now, rel=1e-6)
    for name in CLASSES:
        assert ledger.seconds[name] == pytest.approx(world.truth[name], rel=1e-6, abs=1e-3), name
    first = [found for found in ledger.recoveries if found.attempt == 1]
    assert all(found.down == 0 for found in first)


_TIMES = st.floats(0, 1e4, allow_nan=False)
_EVENTS = st.lists(
    st.fixed_dictionaries(
        {
            "t": _TIMES,
            "attempt": st.integers(0, 4),
            "rank": st.integers(0, 1),
            "kind": st.sampled_from(["scalar", "span", "instant"]),
            "name": st.sampled_from(
                [
                    "step",
                    "step_refused",
                    "checkpoint_stall",
                    "evaluation",
                    "attempt_opened",
                    "attempt_started",
                ]
            ),
            "step": st.integers(1, 9),
            "seconds": _TIMES,
            "step_seconds": _TIMES,
            "data_seconds": _TIMES,
            "process_seconds": _TIMES,
        }
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(_EVENTS)
def test_whatever_the_log_says_every_second_is_in_one_class(events):
    """Attempts that overlap, intervals that overlap, clocks that disagree, logs that make no sense."""
    ledger = build_ledger([{**event, "seq": number} for number, event in enumerate(events)])
    position = 0.0
    for stretch in ledger.stretches:
        assert stretch.start == pytest.approx(position, abs=1e-6)
        assert stretch.end >= stretch.start
        position = stretch.end
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.wall_seconds, rel=1e-3, abs=1e-6)


def test_a_newer_attempt_cuts_the_older_one():
    """The older one can commit nothing any more, whatever it goes on to do."""
    log = lambda attempt, seq, t, name, **more: {  # noqa: E731
        "attempt": attempt, "rank": 0, "seq": seq, "t": t, "kind": "instant", "name": name, **more
    }  # fmt: skip
    step = lambda attempt, seq, t, number: {  # noqa: E731
        **log(attempt, seq, t, "step", step=number, step_seconds=10.0), "kind": "scalar"
    }  # fmt: skip
    older = [log(1, 0, 100.0, "attempt_opened")] + [step(1, i, 100.0 + 10 * i, i) for i in range(1, 11)]
    newer = [log(2, 0, 152.0, "attempt_opened", process_seconds=2.0), step(2, 1, 162.0, 3)]
    seconds = build_ledger(older + newer).seconds
    assert seconds["productive"] == 20.0 + 10.0  # steps 1 and 2 of the older one, 3 of the newer
    assert seconds["lost_work"] == 30.0
    assert sum(seconds.values()) == 62.0


def test_a_clock_that_is_set_moves_no_event(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    log = EventLog(store, 1, 0)
    log.instant("attempt_opened", **process_clocks())
    monkeypatch.setattr("cluster.events.time.time", lambda: 0.0)
    log.instant("later")
    log.close()
    opened, later = read_events(store)
    assert 0 <= later["t"] - opened["t"] < 60
    assert opened["process_seconds"] > 0
