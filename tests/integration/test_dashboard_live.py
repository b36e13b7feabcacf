"""A training under way, looked at in a browser: new points come without a reload."""

import subprocess
import sys
from pathlib import Path

from tests.support.dashboard_server import browser, dashboard, look, needs_browser, number
from tests.support.runs import live_steps, write_recipe


@needs_browser
def test_new_points_of_a_live_run_appear_without_reload(tmp_path: Path, train_data: str):
    run = tmp_path / "run"
    knobs = (f"run.uri={run}", f"data.uri={train_data}", "run.steps=30", "run.event_seconds=0.2")
    argv = [sys.executable, "-m", "system.cli", "train", str(write_recipe(tmp_path)), *knobs]
    trainer = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (run / "events").exists():
            assert trainer.poll() is None
        with dashboard(run) as server, browser() as chromium:
            page = look(chromium, server.address)
            page.evaluate("window.loadedOnce = true")
            page.wait_for_selector('[data-scalar="loss"]', timeout=120_000)
            first = number(page, "Step")
            tile = page.locator('[data-number="Step"] dd')
            tile.filter(has_not_text=f"{first}of").wait_for(timeout=60_000)
            assert trainer.wait(200) == 0
            page.get_by_text("Finished", exact=True).wait_for(timeout=60_000)
            assert page.evaluate("window.loadedOnce")
            steps = live_steps(run)
            assert number(page, "Step") == str(max(steps)) == "30"
            assert page.locator('[data-scalar="loss"] output').inner_text() == f"{steps[30]['loss']:.4g}"
    finally:
        trainer.kill()
        trainer.wait()
