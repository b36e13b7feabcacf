"""The page, the terminal summary and the dict that tell the story of a run."""

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from cluster.errors import ConfigError, ObjectNotFound
from cluster.events import EventLog
from cluster.store import ObjectStore, open_store
from system.report.figures import thin
from system.report.report import summary, write_report
from system.report.story import load_run, summarise
from system.run_folder import claim_run
from tests.support.small_run import STEPS, run_config, write_events

JPEG = "/9j/4AAQSkZJRg=="
HOSTILE = "<script>alert('x')</script> & \"quotes\""


class Page(HTMLParser):
    """Everything in a page that could ask for something outside of it, all ids and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset", "action") and value:
                self.references.append(value)
            if name == "id" and value:
                self.ids.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


def evaluation(step: int = STEPS) -> dict:
    chance = {"r1": 0.01, "r5": 0.05, "r10": 0.1}
    scores = {"r1": 0.2, "r5": 0.5, "r10": 0.8, "median_rank": 4}
    answers = [{"picture": 0, "caption": HOSTILE, "score": 0.3, "right": True}]
    return {
        "version": 1,
        "time": 1e9,
        "step": step,
        "tower": "student",
        "data": {"uri": "somewhere/data", "digest": "ab", "samples": 100},
        "retrieval": {
            "images": 100,
            "texts": 100,
            "image_to_text": scores,
            "text_to_image": scores,
            "chance": {"image_to_text": chance, "text_to_image": chance},
        },
        "zero_shot": {"classes": 100, "top1": 0.1, "top5": 0.4, "chance": {"top1": 0.01, "top5": 0.05}},
        "examples": {
            "image_to_text": [{"picture": 0, "caption": HOSTILE, "rank": 1, "answers": answers}],
            "text_to_image": [{"caption": HOSTILE, "rank": 1, "answers": answers}],
        },
        "pictures": {"0": JPEG},
    }


@pytest.fixture
def run(tmp_path: Path) -> ObjectStore:
    """Killed after step 9, resumed from step 6, finished and evaluated."""
    run = open_store(str(tmp_path / "run"))
    claim_run(run, run_config(run.uri, "somewhere"), "0" * 64)
    write_events(run)
    run.put("evaluations/step-000000012-abababab.json", json.dumps(evaluation()).encode())
    return run


def page_of(run: ObjectStore, tmp_path: Path) -> Page:
    write_report(load_run(run), tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_page_is_self_contained(run: ObjectStore, tmp_path: Path):
    page = page_of(run, tmp_path)
    assert {reference[0] for reference in page.references if not reference.startswith("data:")} <= {"#"}
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!['\"]?(#|data:))|<(script|link rel=.stylesheet|iframe)", text)
    assert {reference[1:] for reference in page.references if reference[0] == "#"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_page_has_every_part(run: ObjectStore, tmp_path: Path):
    page = page_of(run, tmp_path)
    story = ("Finished", "12 of 12 steps", "survived 1 kill, 3 steps trained again", "checkpoint 6")
    numbers = ("50.0 %", "10.0 times chance", "zero-shot, 100 classes")
    for words in (*story, *numbers, "Learning rate", "Throughput", "global_batch"):
        assert words in page.text
    assert page.tags.count("figure") == 6  # time line, loss, image_text, lr, pairs_per_second, grad_norm
    assert page.tags.count("img") == 2 + 1


def test_captions_are_text_and_not_markup(run: ObjectStore, tmp_path: Path):
    page = page_of(run, tmp_path)
    assert "script" not in page.tags
    assert HOSTILE in page.text


def test_summary_is_json_and_the_terminal_shows_it(run: ObjectStore, tmp_path: Path):
    facts = write_report(load_run(run), tmp_path / "report.html")
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert (facts["steps_done"], facts["steps_wanted"], facts["kills"]) == (12, 12, 1)
    assert facts["superseded_steps"] == 3
    assert facts["evaluations"][0]["retrieval"]["image_to_text"]["r5"] == 0.5
    assert "pictures" not in facts["evaluations"][0]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary(load_run(run)))
    text = console.export_text()
    for words in ("Finished", "12 steps", "killed", "checkpoint 6", "7-12"):
        assert words in text


@pytest.mark.parametrize(
    ("reason", "exit_code", "level", "words"),
    [
        ("finished", 0, "good", "Finished"),
        ("Preempted: stopped at step 3", 75, "warn", "preempted (exit 75)"),
        ("NonFinite: step 3", 76, "bad", "Failed: rolled back (exit 76)"),
        ("ValueError: x", 70, "bad", "error (exit 70): ValueError"),
        (None, None, "warn", "still running, or killed"),
    ],
)
def test_verdict_follows_the_newest_attempt(tmp_path: Path, reason, exit_code, level, words: str):
    run = open_store(str(tmp_path))
    log = EventLog(run, 1, 0)
    log.instant("attempt_started", processes=1, zero_stage=0, precision="fp32", resumed_step=None)
    log.scalar(1, loss=1.0)
    if reason:
        log.instant("attempt_ended", reason=reason, exit_code=exit_code)
    log.close()
    verdict = summarise(load_run(run))["verdict"]
    assert verdict["level"] == level
    assert words in verdict["headline"]


@pytest.mark.parametrize(
    ("exit_code", "finished", "verdict"),
    [
        (66, True, "Finished"),
        (69, True, "Finished"),
        (None, True, "Finished"),
        (66, False, "Not finished: preempted"),
        (69, False, "Failed: storage"),
    ],
)
def test_an_attempt_that_never_started_is_not_how_the_run_stands(
    tmp_path: Path, exit_code: int | None, finished: bool, verdict: str
):
    run = open_store(str(tmp_path))
    first, second = EventLog(run, 1, 0), EventLog(run, 2, 0)
    first.instant("attempt_started", processes=1, resumed_step=None)
    first.scalar(1, loss=1.0)
    first.instant("attempt_ended", reason="end", exit_code=0 if finished else 75)
    if exit_code is None:
        second.instant("checkpoint_quarantined", step=1, problems=[])
    else:
        second.instant("attempt_ended", reason="no", exit_code=exit_code)
    first.close()
    second.close()
    facts = summarise(load_run(run))
    assert facts["verdict"]["headline"].startswith(verdict)
    assert len(facts["attempts"]) == 2


def test_a_run_that_only_has_a_configuration_has_a_page(tmp_path: Path):
    run = open_store(str(tmp_path / "run"))
    claim_run(run, run_config(run.uri, "somewhere"), "0" * 64)
    assert "Not started" in page_of(run, tmp_path).text


def test_values_that_are_not_finite_leave_gaps(tmp_path: Path):
    run = open_store(str(tmp_path / "run"))
    log = EventLog(run, 1, 0)
    for step, loss in enumerate([1.0, math.nan, math.inf, 2.0], start=1):
        log.scalar(step, loss=loss, grad_norm=math.nan)
    log.close()
    page = page_of(run, tmp_path)
    assert page.tags.count("figure") == 2  # time line, loss
    assert json.dumps(summarise(load_run(run)), allow_nan=False)


def test_mistakes_are_one_clear_error(run: ObjectStore, tmp_path: Path):
    with pytest.raises(ObjectNotFound, match="there is no run here"):
        write_report(load_run(open_store(str(tmp_path / "nothing"))), tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(load_run(run), tmp_path / "file" / "report.html")


def test_thinning_keeps_the_ends_and_every_spike():
    points = [(step, 1.0) for step in range(10_000)]
    points[4321] = (4321, 9.0)
    points[8765] = (8765, -9.0)
    thinned = thin(points, limit=100)
    assert len(thinned) <= 100
    assert {(4321, 9.0), (8765, -9.0)} <= set(thinned)
    assert [step for step, _ in thinned] == sorted(step for step, _ in thinned)
    assert thin(points[:50], limit=100) == points[:50]
