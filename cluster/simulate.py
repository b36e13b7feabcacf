"""A run that did not happen: where its time would go, from measured costs and a failure rate.

Discrete events: an attempt restarts, restores and trains; a save takes its snapshot when it is due and counts
from its commit on; a failure ends the attempt wherever it stands, and the next one goes on from the newest
commit. One failure anywhere stops the whole job, as it does where every rank takes part in every step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cluster.goodput import CLASSES, Class


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a run of the modelled job costs, in seconds. All of them are measured on a real one."""

    step_seconds: float
    """A step, forward to teacher update."""
    waiting_seconds: float = 0.0
    """Per step, outside of it and of saves: data wait and the loop's own time."""
    stall_seconds: float
    """A save holds training up."""
    save_seconds: float
    """From the snapshot to the commit, in the background; a save that is due meanwhile waits for it."""
    restart_seconds: float
    """From the failure to where the restore begins: noticing, placing, launch, build."""
    restore_seconds: float


@dataclass(frozen=True)
class Outcome:
    """The ledger of a simulated run."""

    seconds: dict[Class, float]
    failures: int

    @property
    def wall_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Productive share of the wall time."""
        return self.seconds["productive"] / self.wall_seconds


def poisson(mean_seconds: float, seed: int) -> Iterator[float]:
    """Lifetimes of attempts whose failures come at a constant rate."""
    source = random.Random(seed)
    while True:
        yield source.expovariate(1 / mean_seconds)


def simulate(costs: Costs, interval_seconds: float, steps: int, lifetimes: Iterable[float]) -> Outcome:
    """Run to `steps` applied steps.

    Args:
        interval_seconds: between the begins of two saves.
        lifetimes: of the attempts, from the end of the one before to the failure; when there are no more, the
            attempt that is then under way is the last one.

    Raises:
        ValueError: attempts fail so soon that the run does not come forward.
    """
    limit = 100 * (steps * (costs.step_seconds + costs.waiting_seconds) + costs.restart_seconds)
    seconds: dict[Class, float] = dict.fromkeys(CLASSES, 0.0)
    saved, failures, lives = 0, 0, iter(lifetimes)
    while True:
        attempt = _Attempt(costs, interval_seconds, saved, first=failures == 0)
        attempt.run(steps, next(lives, float("inf")))
        for kind, spent in attempt.seconds.items():
            seconds[kind] += spent
        saved = attempt.committed
        if saved >= steps:
            return Outcome(seconds, failures)
        failures += 1
        if sum(seconds.values()) > limit:
            raise ValueError(f"no end in sight after {failures} failures at step {saved} of {steps}")


class _Attempt:
    """From one failure to the next."""

    def __init__(self, costs: Costs, interval: float, saved: int, *, first: bool) -> None:
        self.costs, self.interval = costs, interval
        self.committed = self.step = saved
        self.resumes = not first and saved > 0
        self.seconds: dict[Class, float] = dict.fromkeys(CLASSES, 0.0)
        self.now = 0.0

    def run(self, steps: int, life: float) -> None:
        costs, per_step = self.costs, self.costs.step_seconds + self.costs.waiting_seconds
        up = self._spend("start_up", costs.restart_seconds, life)
        up = up and self._spend("restore", costs.restore_seconds * self.resumes, life)
        due, landing, flying = self.now + self.interval, 0.0, self.committed
        while up and self.step < steps:
            wait = max(due, landing) - self.now
            up = self._train(min(max(1, math.ceil(wait / per_step)), steps - self.step), life)
            if landing <= self.now:
                self.committed = flying
            if up and self.step < steps:
                due, landing, flying = self.now + self.interval, self.now + costs.save_seconds, self.step
                up = self._spend("checkpoint_stall", costs.stall_seconds, life)
        # The last save is waited for.
        if up and self._spend("checkpoint_stall", costs.save_seconds, life):
            self.committed = steps
        lost = self.step - self.committed
        self.seconds["productive"] -= lost * costs.step_seconds
        self.seconds["data_wait"] -= lost * costs.waiting_seconds
        self.seconds["lost_work"] += lost * per_step

    def _train(self, steps: int, life: float) -> bool:
        """False if the failure came first; a step that it cut short is lost."""
        costs, per_step = self.costs, self.costs.step_seconds + self.costs.waiting_seconds
        done = int(min(steps, (life - self.now) / per_step))
        self.step += done
        self.now += done * per_step
        self.seconds["productive"] += done * costs.step_seconds
        self.seconds["data_wait"] += done * costs.waiting_seconds
        return done == steps or self._spend("lost_work", per_step, life)

    def _spend(self, kind: Class, seconds: float, life: float) -> bool:
        """False if the failure came first."""
        spent = min(seconds, life - self.now)
        self.seconds[kind] += spent
        self.now += spent
        return spent >= seconds
