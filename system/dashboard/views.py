"""What the page shows, as JSON values: each function is one answer of the server."""

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.goodput import CLASSES, MEANING, Class
from system.config import flatten
from system.dashboard.alerts import alerts
from system.dashboard.columns import Trace
from system.dashboard.follow import Follower
from system.dashboard.index import RunIndex, facts
from system.report.goodput import binned
from system.report.history import History
from system.report.story import RunRecord, summarise

MOST_POINTS = 4_000
MOST_EVENTS = 300
CHECKPOINTS_SHOWN = 40
_FRESH_SECONDS = 120.0
"""A run whose log grew in this time is taken to be alive."""
_BINS = 160


def overview(follower: Follower) -> dict[str, Any]:
    """Everything about a run but its curves."""
    now = time.time()
    with follower.lock:
        index = follower.index
        history = index.history()
        story = _story(follower, history)
        running = is_running(history, now)
        return {
            "name": follower.name,
            "uri": follower.run.uri,
            "version": index.version,
            "now": now,
            "read": follower.done,
            "problem": follower.problem,
            "events": index.events,
            "torn": index.torn,
            "running": running,
            "story": story,
            "last": _last(index),
            "scalars": sorted(index.columns),
            "not_finite": {n: c.not_finite for n, c in index.columns.items() if c.not_finite},
            "counts": dict(index.counts),
            "alerts": [{**vars(alert), "level": alert.level} for alert in alerts(index, history, now)],
            "checkpoints": _checkpoints(index),
            "position": _position(index, follower.config),
            "changes": config_changes(index.marks("attempt_config")),
            "ledger": _ledger(history),
        }


def is_running(history: History, now: float) -> bool:
    """The newest attempt has left no end, and was heard of lately."""
    newest = history.attempts[-1] if history.attempts else None
    return newest is not None and newest.reason is None and now - newest.end < _FRESH_SECONDS


def curves(follower: Follower, names: Sequence[str], first: int, last: int, points: int) -> dict[str, Any]:
    """Of every scalar that the run has: the live line, and what was trained again."""
    with follower.lock:
        found = {}
        for name in names:
            if name not in follower.index.columns:
                continue
            live, lost = follower.index.trace(name, first, last, min(points, MOST_POINTS))
            found[name] = {
                "live": _line(live),
                "lost": [{"attempt": attempt, **_line(line)} for attempt, line in lost],
            }
        return {"version": follower.index.version, "curves": found}


def rank_grid(follower: Follower) -> dict[str, Any]:
    with follower.lock:
        return follower.index.ranks.view()


def events(follower: Follower, name: str | None) -> list[dict[str, Any]]:
    """The newest single events, newest first; of one name if it is given."""
    with follower.lock:
        found = follower.index.marks(*([name] if name else []))
    found = sorted(found, key=lambda event: event["t"])
    return [
        {key: event[key] for key in ("t", "attempt", "rank", "name")}
        | {"step": event.get("step"), "facts": facts(event)}
        for event in reversed(found[-MOST_EVENTS:])
        if event["name"] != "attempt_config"
    ]


def config_changes(configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What differs in the configuration of each attempt from that of the one before: key, before, after."""
    flat = [(event["attempt"], flatten(event["config"])) for event in configs]
    return [
        {"attempt": attempt, "key": key, "before": before.get(key), "after": now.get(key)}
        for (_, before), (attempt, now) in itertools.pairwise(flat)
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _story(follower: Follower, history: History) -> dict[str, Any]:
    """The report's summary, with what `history` does not hold taken from the index."""
    index = follower.index
    config = follower.config if follower.config and "steps" in follower.config.get("run", {}) else None
    story = summarise(RunRecord(history, config, ()))
    speeds = index.columns.get("pairs_per_second")
    live = speeds.live_values(index.limits) if speeds else np.empty(0)
    story["superseded_steps"] = sum(attempt.superseded_steps for attempt in history.attempts)
    story["pairs_per_second"] = float(np.nanmedian(live)) if np.isfinite(live).any() else None
    return story


def _last(index: RunIndex) -> dict[str, Any]:
    """The newest live step: its time, attempt and scalars."""
    event = index.last_step
    return (
        {**facts(event), "step": event["step"], "t": event["t"], "attempt": event["attempt"]} if event else {}
    )


def _checkpoints(index: RunIndex) -> dict[str, Any]:
    """The newest commits, each with what became of it. A commit is logged after it was read back."""
    gone = {step for event in index.marks("checkpoints_pruned") for step in event.get("steps", ())}
    damaged = {event.get("step") for event in index.marks("checkpoint_quarantined")}
    commits = index.marks("checkpoint_committed")
    rows = [
        {
            "step": event.get("step"),
            "attempt": event["attempt"],
            "t": event["t"],
            **facts(event),
            "state": "deleted"
            if event.get("step") in gone
            else "damaged"
            if event.get("step") in damaged
            else "verified",
        }
        for event in commits
    ]
    return {
        "count": index.counts["checkpoint_committed"],
        "failed": index.counts["checkpoint_failed"],
        "skipped": index.counts["checkpoint_skipped"],
        "newest": rows[-1] if rows else None,
        "rows": rows[: -CHECKPOINTS_SHOWN - 1 : -1],
    }


def _position(index: RunIndex, config: dict[str, Any] | None) -> dict[str, Any]:
    """Where the run is in its data, and what preprocessing has left out."""
    starts = [event for event in index.marks("attempt_started") if event["rank"] == 0]
    last, start = index.last_step or {}, starts[-1] if starts else {}
    data = (config or {}).get("data", {})
    return {
        "slot": last.get("slot"),
        "epoch": last.get("epoch"),
        "global_batch": data.get("global_batch"),
        "samples": start.get("dataset_samples"),
        "shards": start.get("dataset_shards"),
        "rejects": start.get("dataset_rejects"),
        "uri": data.get("uri"),
        "refused_steps": index.counts["step_refused"],
        "unreadable_samples": index.counts["sample_rejected"],
    }


def _ledger(history: History) -> dict[str, Any]:
    """Goodput by class and its time line; only classes that have any time."""
    ledger = history.ledger
    if not ledger.wall_seconds:
        return {"wall_seconds": 0.0, "share": None, "classes": [], "bins": []}
    seconds = ledger.seconds
    used: list[Class] = [name for name in CLASSES if seconds[name] > 0]
    width, shares = binned(ledger, _BINS)
    return {
        "began": ledger.began,
        "wall_seconds": ledger.wall_seconds,
        "share": ledger.goodput,
        "bin_seconds": width,
        "classes": [{"name": n, "meaning": MEANING[n], "seconds": seconds[n]} for n in used],
        "bins": [[round(value, 4) for value in shares[name]] for name in used],
    }


def _line(trace: Trace) -> dict[str, Any]:
    return {"steps": trace.steps, "values": trace.values}


def clean(value: Any) -> Any:
    """The same without what JSON cannot say: nan and infinity become null."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
