"""The page in a real browser, on a finished run with kills and rewinds."""

import json
from collections.abc import Iterator
from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, Page

from cluster.store import open_store
from system.report.history import load_history
from tests.support.dashboard_server import Server, browser, dashboard, look, needs_browser, number
from tests.support.replayed_run import HOSTILE, Replay, write_killed_and_rewound

pytestmark = needs_browser
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text("utf-8")
PIXEL = "R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_killed_and_rewound(folder / "main")
    (folder / "main/evaluations").mkdir()
    (folder / "main/evaluations/step-000000060-ab.json").write_text(json.dumps(evaluation()))
    other = Replay(folder / "other")
    other.start(1)
    other.steps(1, 1, 30)
    other.flush()
    return folder


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[Server]:
    with dashboard(runs) as found:
        yield found


def evaluation() -> dict:
    shares = {"r1": 0.2, "r5": 0.5, "r10": 0.8, "median_rank": 4}
    answers = [{"picture": 0, "caption": HOSTILE, "score": 0.3, "right": True}]
    example = {"picture": 0, "caption": HOSTILE, "rank": 1, "answers": answers}
    return {
        "version": 2,
        "time": 1.0,
        "step": 60,
        "tower": "student",
        "data": {"uri": "somewhere/data", "digest": "ab", "samples": 100},
        "retrieval": {
            "images": 100,
            "texts": 100,
            "image_to_text": shares,
            "text_to_image": shares,
            "chance": {"image_to_text": shares, "text_to_image": shares},
        },
        "examples": {"image_to_text": [example], "text_to_image": [{**example, "picture": None}]},
        "pictures": {"0": PIXEL},
    }


def shown(page: Page, selector: str) -> list[str]:
    return page.locator(selector).all_inner_texts()


def test_numbers_are_those_of_the_log(chromium: Browser, server: Server, runs: Path):
    page = look(chromium, server.address + "?run=main")
    history = load_history(open_store(str(runs / "main")))
    last = history.live_steps[-1]
    assert number(page, "Step") == str(history.last_step) == "60"
    assert float(number(page, "Loss")) == pytest.approx(last.values["loss"], rel=1e-3)
    assert number(page, "Pairs/s") == "24"
    assert number(page, "Attempts") == str(len(history.attempts)) == "3"
    assert number(page, "Trained again") == str(len(history.superseded_steps)) == "35"
    assert number(page, "Refused") == str(len(history.refusals)) == "1"
    share = history.ledger.goodput
    assert share is not None
    assert number(page, "Goodput") == f"{100 * share:.1f} %"
    assert page.locator("#state").inner_text() == "Finished"
    again = [str(attempt.superseded_steps) for attempt in reversed(history.attempts)]
    assert shown(page, "#attempts tbody tr td:nth-child(5)") == again == ["0", "15", "20"]
    assert shown(page, "#checkpoints tbody th") == ["60", "55", "40", "20"]
    assert shown(page, "#checkpoints tbody td:last-child") == ["verified", "damaged", "verified", "verified"]
    sums = dict(
        zip(shown(page, "#classes tbody th"), shown(page, "#classes tbody td:nth-child(3)"), strict=True)
    )
    seconds, wall = history.ledger.seconds, history.ledger.wall_seconds
    for name, value in seconds.items():
        if value:
            assert float(sums[name.replace("_", " ")].removesuffix(" %")) == pytest.approx(
                100 * value / wall, abs=0.06
            )
    assert page.locator('[data-scalar="loss"] output').inner_text() == f"{last.values['loss']:.4g}"
    assert shown(page, "#changes tbody tr") == ["2\tengine.zero_stage\t1\t2"]
    assert "2 ranks; slowest on average rank 1" in page.locator("#ranks").inner_text()
    assert page.complaints == []  # pyright: ignore[reportAttributeAccessIssue]


def test_what_a_log_or_a_caption_says_stays_text(chromium: Browser, server: Server):
    page = look(chromium, server.address + "?run=main")
    assert HOSTILE in page.locator("#events").inner_text()
    assert HOSTILE in page.locator("#evaluation .ask strong").first.inner_text()
    assert page.locator('img[src="x"]').count() == 0
    assert page.locator("#evaluation img").first.evaluate("e => e.complete && e.naturalWidth") == 1


def test_zoom_and_reading_by_keyboard(chromium: Browser, server: Server):
    page = look(chromium, server.address + "?run=main")
    plot = page.locator('[data-scalar="loss"] .canvas')
    plot.focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#reading").text_content() == "Loss, step 60: 0.9"
    with page.expect_response(lambda answer: "/api/curves" in answer.url and "from=" in answer.url) as zoomed:
        page.keyboard.press("+")
    steps = zoomed.value.json()["curves"]["loss"]["live"]["steps"]
    assert (steps[0], steps[-1]) == (15, 46)
    with page.expect_response(lambda answer: "/api/curves" in answer.url and "from=" not in answer.url):
        page.keyboard.press("0")


def test_runs_are_compared(chromium: Browser, server: Server):
    page = look(chromium, server.address + "?run=main&with=other")
    assert shown(page, "#compared thead th")[1:] == ["main", "other"]
    assert shown(page, "#compared tbody tr:first-child td") == ["60", "30"]
    assert shown(page, "#legend li")[:2] == ["main", "other"]


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("width", [1600, 700])
def test_axe_finds_no_serious_fault(chromium: Browser, server: Server, theme: str, width: int):
    page = look(
        chromium,
        server.address + "?run=main&with=other",
        color_scheme=theme,
        viewport={"width": width, "height": 900},
        bypass_csp=True,  # or the page would refuse axe as well
    )
    page.evaluate(AXE)
    found = page.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'best-practice']})")
    faults = [
        (fault["id"], [node["html"][:160] for node in fault["nodes"][:3]])
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
    assert faults == []
    assert len(found["passes"]) > 20
    assert page.locator("html").get_attribute("data-theme") == theme
