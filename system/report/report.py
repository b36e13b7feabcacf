"""The story of a run: one self-contained HTML page, a summary for the terminal, a dict for programs.

All three are views of the run folder (event log, config.json, evaluations/); nothing is measured here.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.errors import ConfigError, ObjectNotFound
from cluster.store import ObjectStore
from system.evaluation.view import scores
from system.report import goodput
from system.report.figures import NUM_ATTEMPT_COLOURS, attempt_colour, curves, evaluation_curves
from system.report.history import Attempt, History, Mark, load_history

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
CHECKPOINTS_SHOWN = 20
_EXIT_WORDS = {
    64: "configuration",
    65: "data",
    66: "checkpoint",
    69: "storage",
    75: "preempted",
    76: "not finite",
    77: "hang",
    130: "interrupted",
}
_REFUSALS = (64, 65, 66)
# Stops that are part of a run's normal life: it is meant to go on from them.
_HARMLESS = (75, 130)
# What the line of an evaluation says besides its retrieval: fact of the event -> name.
_SHARES = {
    "top1": "zero-shot",
    "knn_top1": "k-NN",
    "linear_probe_top1": "linear probe",
    "masked_agreement": "masked codewords",
    "miou": "mIoU",
}
_STYLES = {"good": "green", "warn": "yellow", "bad": "red"}


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
        "incidents": [
            _incident(mark) for mark in sorted(history.refusals + history.incidents, key=lambda m: m.time)
        ],
        "evaluations": [
            {key: value for key, value in evaluation.items() if key not in ("examples", "pictures")}
            for evaluation in record.evaluations
        ],
    }
    summary["verdict"] = _verdict(summary, history)
    return summary


def summary(history: History) -> RenderableType:
    """The story of a run for a terminal, from its events alone."""
    facts = summarise(RunRecord(history, None, ()))
    style = _STYLES[facts["verdict"]["level"]]
    headline = Text.assemble((facts["verdict"]["headline"], f"bold {style}"), "  ", (facts["run"], "dim"))
    numbers = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for number in key_numbers(facts):
        numbers.add_row(
            number["name"], Text(number["value"], style="bold"), Text(number["note"], style="dim")
        )
    attempts = Table(
        "attempt", "started (UTC)", "from", "steps", "again later", "lasted", "how it ended", box=None
    )
    for row in facts["attempts"]:
        steps = "none" if row["first_step"] is None else f"{row['first_step']}-{row['last_step']}"
        origin = "scratch" if row["resumed_step"] is None else f"checkpoint {row['resumed_step']}"
        ended = Text(row["outcome"], style=_STYLES[row["level"]])
        again, lasted = str(row["superseded_steps"]), _duration(row["seconds"])
        attempts.add_row(str(row["number"]), _utc(row["start"]), origin, steps, again, lasted, ended)
    evaluations = [Text(_evaluation_line(mark)) for mark in history.evaluations]
    parts: list[RenderableType] = [headline, Text(facts["verdict"]["detail"]), "", numbers, "", attempts, ""]
    if history.ledger.stretches:
        parts += [goodput.table(history.ledger), "", goodput.recovery_table(history.ledger), ""]
    return Group(*parts, *evaluations)


def _evaluation_line(mark: Mark) -> str:
    facts = mark.facts
    found = [
        f"{direction.replace('_', ' ')} R@5 {_percent(facts[f'{direction}_r5'])}"
        for direction in ("image_to_text", "text_to_image")
        if f"{direction}_r5" in facts
    ]
    found += [f"{name} {_percent(facts[fact])}" for fact, name in _SHARES.items() if fact in facts]
    chance = f"; chance {_percent(facts['chance']['r5'])}" if "chance" in facts else ""
    return f"evaluated step {mark.step} ({facts['tower']}) on {facts['data']}: {', '.join(found)}{chance}"


def write_report(record: RunRecord, out: Path) -> dict[str, Any]:
    """Write the HTML page to `out` and return what `summarise` says. Raises ConfigError when `out` cannot be
    written."""
    facts = summarise(record)
    page = _render(record, facts)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(
            f"{out}: the report cannot be written there ({error.strerror}); give another file"
        ) from None
    return {**facts, "report": str(out)}


def _render(record: RunRecord, facts: dict[str, Any]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(percent=_percent, duration=_duration, utc=_utc, size=_size)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    config_text = yaml.safe_dump(record.config, sort_keys=False, width=100) if record.config else ""
    return template.render(
        summary=facts,
        numbers=key_numbers(facts),
        curves=curves(record.history),
        goodput=goodput.rows(record.history.ledger),
        time_line=goodput.time_line(record.history.ledger),
        evaluation_curves=evaluation_curves(record.history),
        evaluations=[
            {**evaluation, "rows": scores(evaluation)} for evaluation in reversed(record.evaluations)
        ],
        config_text=config_text,
        colour=attempt_colour,
        legend_limit=NUM_ATTEMPT_COLOURS,
        checkpoint_limit=CHECKPOINTS_SHOWN,
        written=time.time(),
    )


def key_numbers(facts: dict[str, Any]) -> list[dict[str, str]]:
    """The few numbers at the top of a report: name, value, note."""
    wanted = f"of {facts['steps_wanted']:,}" if facts["steps_wanted"] else ""
    numbers = [{"name": "Steps", "value": f"{facts['steps_done']:,}", "note": wanted}]
    if "loss" in facts["last"]:
        numbers.append({"name": "Loss", "value": f"{facts['last']['loss']:.3f}", "note": "at the last step"})
    if facts["pairs_per_second"] is not None:
        value = f"{facts['pairs_per_second']:,.1f}"
        numbers.append({"name": "Throughput", "value": value, "note": "pairs per second, median"})
    time_note = f"in {_count(len(facts['attempts']), 'attempt')}"
    numbers.append(
        {"name": "Training time", "value": _duration(facts["training_seconds"]), "note": time_note}
    )
    if facts["goodput"]["share"] is not None:
        value, wall = _percent(facts["goodput"]["share"]), _duration(facts["goodput"]["wall_seconds"])
        numbers.append({"name": "Goodput", "value": value, "note": f"productive, of {wall}"})
    lost = f"{_count(facts['superseded_steps'], 'step')} trained again"
    numbers.append({"name": "Kills survived", "value": str(facts["kills"]), "note": lost})
    retrievals = [found["retrieval"] for found in facts["evaluations"] if "retrieval" in found]
    if retrievals:
        retrieval = retrievals[-1]
        value, chance = retrieval["image_to_text"]["r5"], retrieval["chance"]["image_to_text"]["r5"]
        note = f"{value / chance:.1f} times chance ({_percent(chance)})"
        numbers.append({"name": "Image to text R@5", "value": _percent(value), "note": note})
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
    detail = f"{done:,} of {wanted:,} steps" if wanted else _count(done, "step")
    detail += f", newest checkpoint at step {saved:,}" if saved else ", no checkpoint yet"
    if facts["kills"]:
        again = _count(facts["superseded_steps"], "step")
        detail += f"; survived {_count(facts['kills'], 'kill')}, {again} trained again"
    if facts["refused_steps"]:
        detail += f"; {_count(facts['refused_steps'], 'step')} refused"
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
            return "warn", f"no end in the log: still running, or killed (last event {_utc(attempt.end)})"
        return "bad", "killed"
    assert attempt.exit_code is not None  # not killed, so its first rank left an end
    level = "warn" if attempt.exit_code in _HARMLESS else "bad"
    return (
        level,
        f"{_EXIT_WORDS.get(attempt.exit_code, 'error')} (exit {attempt.exit_code}): {attempt.reason}",
    )


def _incident(mark: Mark) -> dict[str, Any]:
    reason = mark.facts.get("reason") or "; ".join(map(str, mark.facts.get("problems", ())))
    reason = reason or ", ".join(f"{key} {value}" for key, value in mark.facts.items())
    what = mark.name.replace("_", " ")
    return {"what": what, "step": mark.step, "attempt": mark.attempt, "time": mark.time, "reason": reason}


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.01 or share == 0 else f"{100 * share:.2g} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{minutes} min {int(seconds % 60)} s" if hours < 1 else f"{hours:,} h {minutes % 60} min"


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
