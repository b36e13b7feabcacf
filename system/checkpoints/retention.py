"""Which checkpoints stay, and how the others go: the manifest first, so that what is half deleted is none.

A checkpoint goes only after a newer one was committed and read back. Files that an attempt left behind when
it died are collected as well, but for those of quarantined checkpoints: a person may still want them.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from cluster.events import EventLog
from cluster.manifest import MANIFEST
from cluster.store import ObjectStore
from system.checkpoints.checkpoint import committed_steps, step_folder
from system.checkpoints.config import CheckpointConfig

PINNED = "pinned"
_OBJECT = re.compile(r"step-(\d{9})/(.+)")
_ATTEMPT = re.compile(r"rank-\d+\.attempt-(\d+)\.safetensors|parts/(\d+)-rank-\d+\.json")
_UNCOMMITTED = re.compile(r"rank-\d+\.safetensors|rank-\d+\.attempt-\d+\.safetensors|parts/.*")
_SCORED = re.compile(r"events/attempt-(0000/rank-\d+|\d+/rank-00000)/.*")


def doomed(
    steps: Iterable[int],
    newest: int,
    config: CheckpointConfig,
    pinned: Iterable[int] = (),
    scores: Mapping[int, float] | None = None,
) -> list[int]:
    """Steps to delete: what the settings do not keep, never `newest` (which was read back) or a later one."""
    if not config.keep_last:
        return []
    steps = sorted(steps)
    older = [step for step in steps if step < newest]
    kept = {newest, *pinned, *older[max(0, len(older) - config.keep_last + 1) :]}
    if config.keep_every_steps:
        kept |= {step for step in older if step % config.keep_every_steps == 0}
    scored = {step: score for step, score in (scores or {}).items() if step in steps}
    if scored:
        kept.add(max(scored, key=lambda step: (scored[step], step)))
    return [step for step in older if step not in kept]


def pinned_steps(run: ObjectStore) -> list[int]:
    found = (_OBJECT.fullmatch(info.key) for info in run.child("checkpoints").list())
    return sorted(int(match[1]) for match in found if match and match[2] == PINNED)


def delete_checkpoint(run: ObjectStore, step: int) -> int:
    """Delete a checkpoint; returns bytes. Killed in between, it leaves files that are collected later."""
    store = run.child(f"checkpoints/{step_folder(step)}")
    store.delete(MANIFEST)
    freed = 0
    for info in store.list():
        store.delete(info.key)
        freed += info.size
    return freed


def leftovers(run: ObjectStore, live_attempt: int) -> list[tuple[str, int]]:
    """(key, size) of the files under checkpoints/ that no manifest names and that no attempt from
    `live_attempt` on can still commit."""
    folders: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for info in run.child("checkpoints").list():
        if match := _OBJECT.fullmatch(info.key):
            folders[int(match[1])].append((match[2], info.size))
    quarantined = {info.key.split("/")[-1][: len(step_folder(0))] for info in run.list("quarantine/")}
    found = []
    for step, objects in sorted(folders.items()):
        if step_folder(step) in quarantined:
            continue
        named = _named(run, step) if any(name == MANIFEST for name, _ in objects) else set()
        if named is None:  # a manifest that cannot be read says nothing about the files
            continue
        for name, size in objects:
            dead = _UNCOMMITTED.fullmatch(name) and _attempt_of(name) < live_attempt
            if dead and name not in named:
                found.append((f"checkpoints/{step_folder(step)}/{name}", size))
    return found


def _named(run: ObjectStore, step: int) -> set[str] | None:
    """What belongs to a committed checkpoint: its files and the part records of its attempt."""
    try:
        document = json.loads(run.get(f"checkpoints/{step_folder(step)}/{MANIFEST}"))
        attempt = int(document["meta"].get("attempt", 0))
        names = {entry["name"] for entry in document["files"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return names | {f"parts/{attempt:04d}-rank-{rank:05d}.json" for rank in range(len(names))}


def _attempt_of(name: str) -> int:
    match = _ATTEMPT.fullmatch(name)
    return int(match[1] or match[2]) if match else 0


class Scores:
    """One number of the run's evaluations by step, as the event log has it; read further at each call."""

    def __init__(self, run: ObjectStore, name: str) -> None:
        self._run, self._name = run, name
        self._seen: set[str] = set()
        self._scores: dict[int, float] = {}

    def __call__(self) -> dict[int, float]:
        keys = {info.key for info in self._run.list("events/") if _SCORED.fullmatch(info.key)}
        for key in sorted(keys - self._seen):
            lines = self._run.get(key).splitlines()
            for event in (json.loads(line) for line in lines if b'"name":"evaluation"' in line):
                value = event.get(self._name)
                if isinstance(value, int | float):
                    self._scores[int(event["step"])] = float(value)
            self._seen.add(key)
        return self._scores


class Retention:
    """What a run deletes of its own after each commit. Never raises: a failure is an event."""

    def __init__(self, run: ObjectStore, config: CheckpointConfig, events: EventLog) -> None:
        self._run, self._config, self._events = run, config, events
        self._scores = Scores(run, config.keep_best)

    def after_commit(self, step: int) -> None:
        """`step` was committed and read back, on rank 0."""
        try:
            deleted, freed = [], 0
            if self._config.keep_last:
                scores = self._scores() if self._config.keep_best else {}
                pinned = pinned_steps(self._run)
                for old in doomed(committed_steps(self._run), step, self._config, pinned, scores):
                    freed += delete_checkpoint(self._run, old)
                    deleted.append(old)
            dead = leftovers(self._run, self._events.attempt)
            for key, size in dead:
                self._run.delete(key)
                freed += size
            if deleted or dead:
                self._events.instant(
                    "checkpoints_pruned", step=step, steps=deleted, leftovers=len(dead), bytes=freed
                )
        except Exception as error:  # the space comes free with a later one
            self._events.instant("checkpoint_prune_failed", step=step, reason=str(error))
