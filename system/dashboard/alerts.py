"""The alerts of a run, from its events alone; names as in docs/runbook.md and the Prometheus rules."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from system.dashboard.index import RunIndex
from system.report.history import History

QUIET_SECONDS = 300.0
LOW_GOODPUT = 0.8
OLD_SAVE_SECONDS = 2 * 3600.0
WAITING_SHARE = 0.2
FEW_CODEWORDS = 0.02
SLOW_RANK = 1.3
RESTARTS, RESTART_SECONDS = 3, 3600.0
RECENT_SECONDS = 900.0
FULL_DISK = 0.1
_WINDOW = 100


@dataclass(frozen=True)
class Alert:
    name: str
    level: Literal["page", "ticket"]
    """page: somebody looks now. ticket: today."""
    text: str


def alerts(index: RunIndex, history: History, now: float, *, running: bool) -> list[Alert]:
    """What is wrong with a run at `now` (Unix seconds); nothing of a run that has ended."""
    last = index.last_step
    if not running or not history.attempts:
        return []
    found = [_no_progress(history, last, now), _restarts(history, now), _goodput(history)]
    found += [_checkpoint(last), _refused(index, now), _store(index, now), _disk(last)]
    found += [_codewords(index), _loader(index), _slow_rank(last)]
    return [alert for alert in found if alert is not None]


def _no_progress(history: History, last: dict[str, Any] | None, now: float) -> Alert | None:
    since = now - max(last["t"] if last else 0.0, history.attempts[-1].start)
    if since < QUIET_SECONDS:
        return None
    return Alert("NoProgress", "page", f"no step for {since / 60:.0f} min")


def _restarts(history: History, now: float) -> Alert | None:
    recent = sum(attempt.start > now - RESTART_SECONDS for attempt in history.attempts[1:])
    if recent <= RESTARTS:
        return None
    return Alert("RestartStorm", "page", f"{recent} restarts in an hour")


def _goodput(history: History) -> Alert | None:
    share, wall = history.ledger.goodput, history.ledger.wall_seconds
    if share is None or wall < 3600 or share >= LOW_GOODPUT:
        return None
    return Alert("GoodputLow", "ticket", f"{100 * share:.1f} % of {wall / 3600:.1f} h were productive")


def _checkpoint(last: dict[str, Any] | None) -> Alert | None:
    age = last.get("durable_age_seconds") if last else None
    if not isinstance(age, int | float) or age < OLD_SAVE_SECONDS:
        return None
    return Alert("CheckpointTooOld", "page", f"the newest durable state is {age / 3600:.1f} h old")


def _refused(index: RunIndex, now: float) -> Alert | None:
    recent = [event for event in index.marks("step_refused") if event["t"] > now - RECENT_SECONDS]
    if len(recent) < 3:
        return None
    return Alert("RefusedSteps", "ticket", f"{len(recent)} refused steps in 15 min")


def _store(index: RunIndex, now: float) -> Alert | None:
    names = ("checkpoint_failed", "checkpoint_prune_failed", "events_dropped")
    recent = [event for event in index.marks(*names) if event["t"] > now - RECENT_SECONDS]
    if not recent:
        return None
    return Alert("StoreErrors", "ticket", f"{recent[-1]['name'].replace('_', ' ')}, {len(recent)} in 15 min")


def _disk(last: dict[str, Any] | None) -> Alert | None:
    free = last.get("disk_free_ratio") if last else None
    if not isinstance(free, int | float) or free >= FULL_DISK:
        return None
    return Alert("DiskLow", "page", f"{100 * free:.1f} % of the fullest disk are free")


def _codewords(index: RunIndex) -> Alert | None:
    use = _recent(index, "codeword_use")
    if use is None or use >= FEW_CODEWORDS:
        return None
    return Alert("CodewordCollapse", "page", f"{100 * use:.2g} % of the codewords are in use")


def _loader(index: RunIndex) -> Alert | None:
    waited, worked = _recent(index, "data_seconds"), _recent(index, "step_seconds")
    if waited is None or worked is None or waited < WAITING_SHARE * (waited + worked):
        return None
    return Alert("LoaderBound", "ticket", f"{100 * waited / (waited + worked):.0f} % of a step is waiting")


def _slow_rank(last: dict[str, Any] | None) -> Alert | None:
    skew = last.get("rank_skew") if last else None
    if last is None or not isinstance(skew, int | float) or skew < SLOW_RANK:
        return None
    return Alert("SlowRank", "ticket", f"rank {last.get('slowest_rank')} takes {skew:.2f} times the median")


def _recent(index: RunIndex, name: str) -> float | None:
    column = index.columns.get(name)
    values = column.live_values(index.limits)[-_WINDOW:] if column else np.empty(0)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
