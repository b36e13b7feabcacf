"""The story of a run: one self-contained HTML page, and a summary for the terminal.

Both are views of the run folder (event log, config.json, evaluations/); nothing is measured here.
"""

import os
import time
from pathlib import Path
from typing import Any

import jinja2
import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.errors import ConfigError
from system.evaluation.view import scores
from system.report import compare, goodput
from system.report.figures import NUM_ATTEMPT_COLOURS, attempt_colour, curves, evaluation_curves
from system.report.history import Mark
from system.report.story import RunRecord, key_numbers, summarise
from system.report.words import duration, percent, size, utc

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
CHECKPOINTS_SHOWN = 20
INCIDENTS_SHOWN = 20
# What the line of an evaluation says besides its retrieval: fact of the event -> name.
_SHARES = {
    "top1": "zero-shot",
    "knn_top1": "k-NN",
    "linear_probe_top1": "linear probe",
    "masked_agreement": "masked codewords",
    "miou": "mIoU",
}
_STYLES = {"good": "green", "warn": "yellow", "bad": "red"}


def summary(record: RunRecord, other: RunRecord | None = None) -> RenderableType:
    """The story of a run for a terminal, without its evaluations' tables; beside `other` if it is given."""
    history = record.history
    facts = summarise(RunRecord(history, record.config, ()))
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
        again, lasted = str(row["superseded_steps"]), duration(row["seconds"])
        attempts.add_row(str(row["number"]), utc(row["start"]), origin, steps, again, lasted, ended)
    evaluations = [Text(_evaluation_line(mark)) for mark in history.evaluations]
    parts: list[RenderableType] = [headline, Text(facts["verdict"]["detail"]), "", numbers, "", attempts, ""]
    if history.ledger.stretches:
        parts += [goodput.table(history.ledger), "", goodput.recovery_table(history.ledger), ""]
    if facts["incidents"]:
        parts += [_incident_table(facts["incidents"]), ""]
    if other is not None:
        parts += [compare.table(facts, summarise(other)), ""]
    return Group(*parts, *evaluations)


def _incident_table(incidents: list[dict[str, Any]]) -> Table:
    shown = Table("incident", "step", "when (UTC)", "why", "what to do", box=None)
    for found in incidents[-INCIDENTS_SHOWN:]:
        when, what = utc(found["time"]), found["what"]
        shown.add_row(what, str(found["step"]), when, Text(found["reason"]), found["advice"])
    return shown


def _evaluation_line(mark: Mark) -> str:
    facts = mark.facts
    found = [
        f"{direction.replace('_', ' ')} R@5 {percent(facts[f'{direction}_r5'])}"
        for direction in ("image_to_text", "text_to_image")
        if f"{direction}_r5" in facts
    ]
    found += [f"{name} {percent(facts[fact])}" for fact, name in _SHARES.items() if fact in facts]
    chance = f"; chance {percent(facts['chance']['r5'])}" if "chance" in facts else ""
    return f"evaluated step {mark.step} ({facts['tower']}) on {facts['data']}: {', '.join(found)}{chance}"


def write_report(record: RunRecord, out: Path, other: RunRecord | None = None) -> dict[str, Any]:
    """Write the HTML page to `out` and return what `summarise` says, also of `other` if it is given. Raises
    ConfigError when `out` cannot be written."""
    facts = summarise(record)
    page = _render(record, facts, other)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(
            f"{out}: the report cannot be written there ({error.strerror}); give another file"
        ) from None
    compared = {"compared": summarise(other)} if other else {}
    return {**facts, **compared, "report": str(out)}


def _render(record: RunRecord, facts: dict[str, Any], other: RunRecord | None) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(percent=percent, duration=duration, utc=utc, size=size)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    config_text = yaml.safe_dump(record.config, sort_keys=False, width=100) if record.config else ""
    return template.render(
        summary=facts,
        numbers=key_numbers(facts),
        other=other and summarise(other),
        compared=compare.rows(facts, summarise(other)) if other else [],
        compared_curves=compare.curves([record.history, other.history]) if other else [],
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
