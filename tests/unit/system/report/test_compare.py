"""Two runs side by side, what a run cost, and what went wrong with its cause."""

import re
from pathlib import Path

from rich.console import Console

from cluster.store import open_store
from system.report.report import summary
from system.report.story import load_run, summarise
from tests.support.paths import ROOT
from tests.support.replayed_run import Replay, write_killed_and_rewound
from tests.support.runs import maskclip


def test_two_runs_side_by_side(tmp_path: Path):
    write_killed_and_rewound(tmp_path / "ours")
    log = Replay(tmp_path / "theirs")
    log.start(1)
    log.steps(1, 1, 30)
    log.end(1)
    log.flush()
    out = tmp_path / "report.html"
    done = maskclip(
        "report", tmp_path / "ours", f"compare={tmp_path / 'theirs'}", f"output={out}", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "ours" in done.stdout
    assert "theirs" in done.stdout
    page = out.read_text()
    assert "Side by side" in page
    assert "this run 0.9 at step 60, the other 0.55 at step 30" in page
    assert "<script" not in page


def test_incidents_have_causes_and_the_cost_is_that_of_all_ranks(tmp_path: Path):
    write_killed_and_rewound(tmp_path)
    record = load_run(open_store(str(tmp_path)))
    facts = summarise(record)
    found = {incident["what"]: incident for incident in facts["incidents"]}
    assert list(found) == ["attempt 1 ended", "step refused", "checkpoint quarantined"]
    assert "dmesg" in found["attempt 1 ended"]["advice"]
    assert all(incident["advice"] for incident in facts["incidents"])
    seconds = sum(attempt.end - attempt.start for attempt in record.history.attempts)
    assert facts["cost"]["rank_hours"] == 2 * seconds / 3600
    assert (facts["cost"]["pairs"], facts["cost"]["pairs_again"]) == (60 * 24, 35 * 24)
    console = Console(record=True, width=200)
    console.print(summary(record))
    text = console.export_text()
    assert "checkpoint quarantined" in text
    assert "a file is short" in text


def test_every_alert_and_exit_code_is_in_the_runbook():
    from cluster import errors
    from system.dashboard import alerts

    runbook = (ROOT / "docs/runbook.md").read_text("utf-8")
    source = Path(alerts.__file__).read_text("utf-8")
    names = set(re.findall(r'"(Maskclip\w+)"', source))
    assert len(names) == 11
    assert {name for name in names if f"### {name}\n" not in runbook} == set()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.MaskClipError)}
    assert {code for code in codes if f"| {code} |" not in runbook} == set()
