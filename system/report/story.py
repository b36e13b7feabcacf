"""The story of a run as plain values: how it stands, its attempts, checkpoints and incidents, the few numbers
that matter. The report and the dashboard show it; nothing is measured here."""

import json
from dataclasses import asdict, dataclass
from math import isfinite
from statistics import median
from typing import Any

from cluster.errors import ObjectNotFound
from cluster.store import ObjectStore
from system.report import goodput
from system.report.causes import advice_for_end, advice_for_event
from system.report.history import Attempt, History, Mark, load_history
from system.report.words import count, duration, percent, utc

_EXIT_WORDS = {
    64: "configuration",
    65: "data",
    66: "checkpoint",
    69: "storage",
    75: "preempted",
    76: "rolled back",
    77: "hang",
    130: "interrupted",
}
_REFUSALS = (64, 65, 66)
# Stops that are part of a run's normal life: it is meant to go on from them.
_HARMLESS = (75, 130)


@dataclass(frozen=True)
class RunRecord:
    """All that a report is made of."""

    history: History
    config: dict[str, Any] | None
    """The resolved configuration of the run; None if it never got that far."""
    evaluations: tuple[dict[str, Any], ...]
    """Contents of evaluations/*.json, oldest first."""


def load_run(run: ObjectStore) -> RunRecord:
    """Raises ObjectNotFound when there is no run."""
    history = load_history(run)
    try:
        config = json.loads(run.get("config.json"))["config"]
    except ObjectNotFound:
        config = None
    found = [json.loads(run.get(info.key)) for info in run.list("evaluations/") if info.key.endswith(".json")]
    return RunRecord(history, config, tuple(sorted(found, key=lambda evaluation: evaluation["time"])))


def summarise(record: RunRecord) -> dict[str, Any]:
    """The report as plain JSON values, without pictures: what `--json` prints."""
    history = record.history
    wanted = record.config["run"]["steps"] if record.config else None
    last = history.live_steps[-1].values if history.live_steps else {}
    speeds = [value for _, value in history.series("pairs_per_second")]
    summary: dict[str, Any] = {
        "run": history.uri,
        "name": history.uri.rstrip("/").rsplit("/", 1)[-1],
        "steps_done": history.last_step or 0,
        "steps_wanted": wanted,
        "kills": sum(attempt.killed for attempt in history.attempts[:-1]),
        "superseded_steps": len(history.superseded_steps),
        "refused_steps": len(history.refusals),
        "events_skipped": history.skipped_events,
        "training_seconds": sum(attempt.end - attempt.start for attempt in history.attempts),
        "pairs_per_second": median(speeds) if speeds else None,
        "goodput": goodput.facts(history.ledger),
        "last": {
            name: value for name, value in last.items() if isinstance(value, int | float) and isfinite(value)
        },
        "attempts": [
            _attempt_row(attempt, newest=attempt is history.attempts[-1]) for attempt in history.attempts
        ],
        "checkpoints": [
            {"step": mark.step, "attempt": mark.attempt, "time": mark.time, **mark.facts}
            for mark in history.checkpoints
        ],
        "cost": _cost(record),
        "incidents": _incidents(history),
        "evaluations": [
            {key: value for key, value in evaluation.items() if key not in ("examples", "pictures")}
            for evaluation in record.evaluations
        ],
    }
    summary["verdict"] = _verdict(summary, history)
    return summary


def key_numbers(facts: dict[str, Any]) -> list[dict[str, str]]:
    """The few numbers at the top of a report: name, value, note."""
    wanted = f"of {facts['steps_wanted']:,}" if facts["steps_wanted"] else ""
    numbers = [{"name": "Steps", "value": f"{facts['steps_done']:,}", "note": wanted}]
    if "loss" in facts["last"]:
        numbers.append({"name": "Loss", "value": f"{facts['last']['loss']:.3f}", "note": "at the last step"})
    if facts["pairs_per_second"] is not None:
        value = f"{facts['pairs_per_second']:,.1f}"
        numbers.append({"name": "Throughput", "value": value, "note": "pairs per second, median"})
    time_note = f"in {count(len(facts['attempts']), 'attempt')}"
    numbers.append({"name": "Training time", "value": duration(facts["training_seconds"]), "note": time_note})
    spent, useful = facts["cost"]["rank_hours"], facts["cost"]["productive_rank_hours"]
    note = "" if useful is None else f"{useful:,.2f} of them productive"
    numbers.append({"name": "Cost in rank hours", "value": f"{spent:,.2f}", "note": note})
    if facts["goodput"]["share"] is not None:
        value, wall = percent(facts["goodput"]["share"]), duration(facts["goodput"]["wall_seconds"])
        numbers.append({"name": "Goodput", "value": value, "note": f"productive, of {wall}"})
    lost = f"{count(facts['superseded_steps'], 'step')} trained again"
    numbers.append({"name": "Kills survived", "value": str(facts["kills"]), "note": lost})
    retrievals = [found["retrieval"] for found in facts["evaluations"] if "retrieval" in found]
    if retrievals:
        retrieval = retrievals[-1]
        value, chance = retrieval["image_to_text"]["r5"], retrieval["chance"]["image_to_text"]["r5"]
        note = f"{value / chance:.1f} times chance ({percent(chance)})"
        numbers.append({"name": "Image to text R@5", "value": percent(value), "note": note})
    return numbers


def _verdict(facts: dict[str, Any], history: History) -> dict[str, str]:
    if not history.attempts:
        return {
            "level": "warn",
            "headline": "Not started",
            "detail": "The run has a configuration and no events.",
        }
    newest = _state(facts["attempts"])
    done, wanted = facts["steps_done"], facts["steps_wanted"]
    saved = max((mark.step for mark in history.checkpoints), default=0)
    detail = f"{done:,} of {wanted:,} steps" if wanted else count(done, "step")
    detail += f", newest checkpoint at step {saved:,}" if saved else ", no checkpoint yet"
    if facts["kills"]:
        again = count(facts["superseded_steps"], "step")
        detail += f"; survived {count(facts['kills'], 'kill')}, {again} trained again"
    if facts["refused_steps"]:
        detail += f"; {count(facts['refused_steps'], 'step')} refused"
    headline = {"good": "Finished", "warn": "Not finished", "bad": "Failed"}[newest["level"]]
    if newest["level"] != "good":
        headline += f": {newest['outcome']}"
    return {"level": newest["level"], "headline": headline, "detail": detail + "."}


def _state(attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """The attempt that says how the run stands. One that never got to a step does not, if the run had ended
    before, or if it was refused (wrong settings, data or checkpoint)."""
    for attempt in reversed(attempts[1:]):
        refused = attempt["exit_code"] in _REFUSALS
        if attempt["started"] or not (refused or any(row["exit_code"] == 0 for row in attempts)):
            return attempt
    return attempts[0]


def _attempt_row(attempt: Attempt, *, newest: bool) -> dict[str, Any]:
    level, outcome = _outcome(attempt, newest=newest)
    row = {key: value for key, value in asdict(attempt).items() if key != "facts"}
    facts = {name: attempt.facts.get(name) for name in ("processes", "zero_stage", "precision")}
    row["silent_ranks"] = list(attempt.silent_ranks)
    return {**row, **facts, "seconds": attempt.end - attempt.start, "level": level, "outcome": outcome}


def _outcome(attempt: Attempt, *, newest: bool) -> tuple[str, str]:
    if attempt.exit_code == 0:
        return "good", "finished"
    if attempt.killed:
        if newest:
            return "warn", f"no end in the log: still running, or killed (last event {utc(attempt.end)})"
        return "bad", "killed"
    assert attempt.exit_code is not None  # not killed, so its first rank left an end
    level = "warn" if attempt.exit_code in _HARMLESS else "bad"
    return (
        level,
        f"{_EXIT_WORDS.get(attempt.exit_code, 'error')} (exit {attempt.exit_code}): {attempt.reason}",
    )


def _cost(record: RunRecord) -> dict[str, Any]:
    """What was spent: hours of all ranks together, the part that made progress, pairs with and without
    repetition."""
    history, config = record.history, record.config
    spent = sum((a.end - a.start) * (a.facts.get("processes") or 1) for a in history.attempts) / 3600
    share = history.ledger.goodput
    batch = config["data"].get("global_batch") if config else None
    steps = history.last_step or 0
    return {
        "rank_hours": spent,
        "productive_rank_hours": None if share is None else spent * share,
        "pairs": steps * batch if batch else None,
        "pairs_again": len(history.superseded_steps) * batch if batch else None,
    }


def _incidents(history: History) -> list[dict[str, Any]]:
    """What went wrong, in the order of time: single events, and attempts that ended otherwise than asked."""
    found = [_incident(mark) for mark in history.refusals + history.incidents]
    for attempt in history.attempts:
        newest = attempt is history.attempts[-1]
        level, outcome = _outcome(attempt, newest=newest)
        if level == "bad":
            found.append(
                {
                    "what": f"attempt {attempt.number} ended",
                    "step": attempt.last_step or 0,
                    "attempt": attempt.number,
                    "time": attempt.end,
                    "reason": outcome,
                    "advice": advice_for_end(attempt.exit_code, killed=attempt.killed),
                }
            )
    return sorted(found, key=lambda incident: incident["time"])


def _incident(mark: Mark) -> dict[str, Any]:
    reason = mark.facts.get("reason") or "; ".join(map(str, mark.facts.get("problems", ())))
    reason = reason or ", ".join(f"{key} {value}" for key, value in mark.facts.items())
    return {
        "what": mark.name.replace("_", " "),
        "step": mark.step,
        "attempt": mark.attempt,
        "time": mark.time,
        "reason": reason,
        "advice": advice_for_event(mark.name),
    }
