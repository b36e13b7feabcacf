"""Kills training at every instrumented point and at random moments, and compares with an undisturbed run.

Everything is compared to the bit: the files of every checkpoint (weights, Adam's moments, teacher), their
data position, and the scalars of every step of every attempt.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed

from cluster.events import read_events
from cluster.store import ObjectStore, open_store
from system.checkpoints.checkpoint import committed_steps, open_checkpoint
from system.checkpoints.commands import check
from system.checkpoints.config import CheckpointConfig
from tests.support.faulty_rank import FIRST_RANK_ONLY
from tests.support.save_rig import RESUMED, TRAINED, Rig, attempt, progress

EXACT = ("loss", "image_text", "text_image", "distill", "mlm", "grad_norm", "lr", "ids_digest", "slot")
KILLED = -9
EVERY, STEPS = 2, 10
_PASSED_AT = {
    **dict.fromkeys(("before-prune", "prune", "in-prune"), 2),
    **dict.fromkeys(("in-restore", "restore", "after-restore"), 4),
}
"""The step of which an attempt that goes on from step 4 passes a point; 6 for the others."""


@dataclass
class Outcome:
    """What became of all the kills."""

    kills: int = 0
    killed: dict[str, int] = field(default_factory=dict)
    """Kills by point, or for random moments by what the job was at."""
    attempts: int = 0
    runs: int = 0
    """That were trained to their end."""
    checkpoints: int = 0
    """Committed ones found after an attempt; each was read back and compared, every time."""
    steps: int = 0
    """Whose scalars were compared, over all attempts."""
    most_lost: dict[str, int] = field(default_factory=lambda: {"waited": 0, "beside": 0})
    """Steps that a resume had to repeat, where training waits for its saves, and where they run beside it:
    there the steps count as well that are trained while one is in flight."""
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Sweep:
    def __init__(
        self,
        folder: Path,
        place: Callable[[], str],
        stage: int = 1,
        seed: int = 0,
        progressed: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        """
        Args:
            folder: on a local disk, for the undisturbed run.
            place: the address of a new run.
            progressed: is called after every attempt.
        """
        self.place, self.progressed = place, progressed
        self.random = random.Random(seed)
        waited = CheckpointConfig(every_steps=EVERY, keep_last=2, background=False)
        self.waited = Rig(zero_stage=stage, steps=STEPS, checkpoint=waited, log=str(folder / "ranks.log"))
        self.beside = replace(self.waited, checkpoint=replace(waited, background=True), pause=0.02)
        self.outcome, self._trained = Outcome(), -1
        _ = deepspeed.ops.__compatible_ops__  # is asked of the compiler once, and not in every rank
        self._undisturbed(str(folder / "undisturbed"))

    def _undisturbed(self, uri: str) -> None:
        started = time.monotonic()
        rig = replace(self.waited, checkpoint=CheckpointConfig(every_steps=1, background=False))
        codes = attempt(uri, rig, "whole")
        if any(codes):
            raise RuntimeError(f"the undisturbed run ended with {codes}:\n{Path(rig.log).read_text()}")
        self.length, run = (time.monotonic() - started) / 2, open_store(uri)  # it saves after every step
        self.states = {step: _state(run, step) for step in committed_steps(run)}
        self.scalars = {event["step"]: _exact(event) for event in _scalars(run)}

    def at_points(self, points: Iterable[str]) -> None:
        """A run for each point and victim: killed when step 4 is saved, then at the point, then not."""
        for point in points:
            for victim in ("0", "all") if point in FIRST_RANK_ONLY else ("0", "1", "all"):
                uri = self.place()
                self._attempt(uri, self.waited, "step:5:all")
                self._attempt(uri, self.beside, f"{point}:{_PASSED_AT.get(point, 6)}:{victim}")
                self._attempt(uri, self.beside, "whole")
                self._finished(uri)

    def at_moments(self, kills: int, seconds: float = math.inf) -> None:
        """Runs that are killed at one random moment after the other, until kills or `seconds` are spent."""
        until = self.outcome.kills + kills
        while self.outcome.kills < until and self.outcome.seconds < seconds:
            uri, rig = self.place(), self.random.choice((self.waited, self.beside))
            killed = True
            while killed:
                moment = f"{self.random.uniform(0, self.length):.3f}"
                victim = self.random.choice(("0", "1", "all"))
                again = self.outcome.kills < until
                killed = self._attempt(uri, rig, f"moment:{moment}:{victim}" if again else "whole")
            self._finished(uri)

    def _attempt(self, uri: str, rig: Rig, kill: str) -> bool:
        """Whether it was killed."""
        outcome, run, started = self.outcome, open_store(uri), time.monotonic()
        newest, point = max(committed_steps(run), default=0), kill.split(":")[0]
        codes = attempt(uri, rig, kill)
        killed = KILLED in codes
        outcome.attempts += 1
        outcome.kills += killed
        if killed:
            doing = _doing() if point == "moment" else point
            outcome.killed[doing] = outcome.killed.get(doing, 0) + 1
        elif any(codes) or point not in ("moment", "whole"):
            outcome.wrong.append(f"{uri}: {kill} ended with {codes}")
        self._resumed(uri, newest, "beside" if rig.checkpoint.background else "waited")
        self._compare_checkpoints(uri, run)
        outcome.seconds += time.monotonic() - started
        self.progressed(outcome)
        return killed

    def _resumed(self, uri: str, newest: int, saves: str) -> None:
        """What the attempt repeats of the one before. One that was killed in its start says nothing."""
        resumed = progress[RESUMED]
        if resumed < 0:
            return
        if resumed != newest:
            self.outcome.wrong.append(f"{uri}: went on from step {resumed}, committed was {newest}")
        lost = max(0, self._trained - resumed)
        self.outcome.most_lost[saves] = max(self.outcome.most_lost[saves], lost)
        if saves == "waited" and lost > EVERY:
            self.outcome.wrong.append(f"{uri}: {lost} steps lost, one interval is {EVERY}")
        self._trained = progress[TRAINED]

    def _compare_checkpoints(self, uri: str, run: ObjectStore) -> None:
        for step in committed_steps(run):
            self.outcome.checkpoints += 1
            self.outcome.wrong += check(run, step)
            if _state(run, step) != self.states[step]:
                self.outcome.wrong.append(f"{uri}: the checkpoint of step {step} differs")

    def _finished(self, uri: str) -> None:
        run = open_store(uri)
        if max(committed_steps(run), default=0) != STEPS:
            self.outcome.wrong.append(f"{uri}: no checkpoint of the last step")
        events, seen = _scalars(run), set()
        for event in events:
            seen.add(event["step"])
            if _exact(event) != self.scalars[event["step"]]:
                self.outcome.wrong.append(
                    f"{uri}: step {event['step']} of attempt {event['attempt']} differs"
                )
        if seen != set(range(1, STEPS + 1)):
            self.outcome.wrong.append(f"{uri}: the log has only steps {sorted(seen)}")
        self.outcome.steps += len(events)
        self.outcome.runs += 1
        self._trained = -1
        for info in run.list():
            run.delete(info.key)


def _doing() -> str:
    if progress[RESUMED] < 0:
        return "start or restore"
    return "training" if progress[TRAINED] < STEPS else "last save"


def _state(run: ObjectStore, step: int) -> tuple[Any, ...]:
    """Data position and SHA-256 of the files; their names differ by attempt."""
    _, manifest = open_checkpoint(run, step)
    files = {entry.name.split(".")[0]: entry.sha256 for entry in manifest.files}
    return manifest.meta["slot"], manifest.meta["state_digest"], files


def _scalars(run: ObjectStore) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["kind"] == "scalar"]


def _exact(event: dict[str, Any]) -> dict[str, Any]:
    return {name: event[name] for name in EXACT}
