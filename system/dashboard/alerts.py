"""The alerts of a run, from its events alone; names as in docs/runbook.md and the Prometheus rules."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from system.dashboard.index import RunIndex
from system.monitoring.alerts import ALERTS as RULES
from system.monitoring.thresholds import (
    FEW_CODEWORDS,
    FULL_DISK,
    LEARNT_STEPS,
    LOW_GOODPUT,
    OLD_SAVE_SECONDS,
    QUIET_SECONDS,
    REFUSALS,
    RESTARTS,
    SLOW_RANK,
    WAITING_SHARE,
)
from system.report.history import History

DEAD_SECONDS = 86_400.0
RESTART_SECONDS = 3600.0
RECENT_SECONDS = 600.0
_LEVELS: dict[str, Literal["page", "ticket"]] = {rule.name: rule.severity for rule in RULES}
_WINDOW = 100


@dataclass(frozen=True)
class Alert:
    name: str
    """Of its rule in `system.monitoring.alerts`."""
    text: str

    @property
    def level(self) -> Literal["page", "ticket"]:
        """page: somebody looks now. ticket: today."""
        return _LEVELS[self.name]


def alerts(index: RunIndex, history: History, now: float) -> list[Alert]:
    """What is wrong with a run at `now` (Unix seconds). Nothing of one whose newest attempt has ended, or has
    been silent for a day: nobody waits for it."""
    newest = history.attempts[-1] if history.attempts else None
    if newest is None or newest.reason is not None or now - newest.end > DEAD_SECONDS:
        return []
    last = index.last_step
    found = [_no_progress(newest.start, last, now), _restarts(history, now), _goodput(history)]
    found += [_checkpoint(last), _failed_save(index, now), _refused(index, now), _dropped(index, now)]
    found += [_disk(last), _codewords(index, last), _loader(index), _slow_rank(last)]
    return [alert for alert in found if alert is not None]


def _no_progress(start: float, last: dict[str, Any] | None, now: float) -> Alert | None:
    since = now - max(last["t"] if last else 0.0, start)
    if since < QUIET_SECONDS:
        return None
    return Alert("MaskclipNoProgress", f"no step for {since / 60:.0f} min")


def _restarts(history: History, now: float) -> Alert | None:
    recent = sum(attempt.start > now - RESTART_SECONDS for attempt in history.attempts[1:])
    if recent < RESTARTS:
        return None
    return Alert("MaskclipRestartStorm", f"{recent} restarts in an hour")


def _goodput(history: History) -> Alert | None:
    share, wall = history.ledger.goodput, history.ledger.wall_seconds
    if share is None or wall < 3600 or share >= LOW_GOODPUT:
        return None
    return Alert("MaskclipGoodputLow", f"{100 * share:.1f} % of {wall / 3600:.1f} h were productive")


def _checkpoint(last: dict[str, Any] | None) -> Alert | None:
    age = last.get("durable_age_seconds") if last else None
    if not isinstance(age, int | float) or age < OLD_SAVE_SECONDS:
        return None
    return Alert("MaskclipCheckpointTooOld", f"the newest durable state is {age / 3600:.1f} h old")


def _refused(index: RunIndex, now: float) -> Alert | None:
    recent = [event for event in index.marks("step_refused") if event["t"] > now - RECENT_SECONDS]
    if len(recent) <= REFUSALS:
        return None
    return Alert("MaskclipStepsRefused", f"{len(recent)} refused steps in 10 min")


def _failed_save(index: RunIndex, now: float) -> Alert | None:
    recent = [event for event in index.marks("checkpoint_failed") if event["t"] > now - RECENT_SECONDS]
    if not recent:
        return None
    return Alert("MaskclipCheckpointFailed", f"{recent[-1].get('reason')}")


def _dropped(index: RunIndex, now: float) -> Alert | None:
    recent = [event for event in index.marks("events_dropped") if event["t"] > now - RECENT_SECONDS]
    if not recent:
        return None
    return Alert("MaskclipTelemetryDropped", f"{recent[-1].get('count')} events are lost")


def _disk(last: dict[str, Any] | None) -> Alert | None:
    free = last.get("disk_free_ratio") if last else None
    if not isinstance(free, int | float) or free >= FULL_DISK:
        return None
    return Alert("MaskclipDiskFull", f"{100 * free:.1f} % of the fullest disk are free")


def _codewords(index: RunIndex, last: dict[str, Any] | None) -> Alert | None:
    use = _recent(index, "codeword_use")
    if use is None or use >= FEW_CODEWORDS or last is None or last["step"] <= LEARNT_STEPS:
        return None
    return Alert("MaskclipCodewordCollapse", f"{100 * use:.2g} % of the codewords are in use")


def _loader(index: RunIndex) -> Alert | None:
    waited, worked = _recent(index, "data_seconds"), _recent(index, "step_seconds")
    if waited is None or worked is None or waited < WAITING_SHARE * (waited + worked):
        return None
    return Alert("MaskclipLoaderBound", f"{100 * waited / (waited + worked):.0f} % of a step: waiting")


def _slow_rank(last: dict[str, Any] | None) -> Alert | None:
    skew = last.get("rank_skew") if last else None
    if last is None or not isinstance(skew, int | float) or skew < SLOW_RANK:
        return None
    return Alert("MaskclipSlowRank", f"rank {last.get('slowest_rank')} {skew:.2f} times the median")


def _recent(index: RunIndex, name: str) -> float | None:
    column = index.columns.get(name)
    values = column.live_values(index.limits)[-_WINDOW:] if column else np.empty(0)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
