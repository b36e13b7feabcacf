"""Ctrl-C and SIGTERM: stop at a step, commit, say so in one line, and go on later as if nothing had been."""

import signal
import subprocess
import sys
import time

import pytest

from cluster.store import open_store
from system.checkpoint import committed_steps
from tests.support.runs import instants, live_steps, train, write_recipe


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_commits_and_exits(tmp_path, train_data, number, code):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    words = ["train", str(recipe), f"run.uri={run}", f"data.uri={train_data}", "run.steps=1000"]
    knobs = ["checkpoint.every_steps=900"]
    process = subprocess.Popen(
        [sys.executable, "-m", "system.cli", *words, *knobs], stderr=subprocess.PIPE, text=True
    )
    while not (run.is_dir() and live_steps(run)):
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    stopped = [line for line in errors.splitlines() if "stopped at step" in line]
    assert len(stopped) == 1, errors
    (step,) = committed_steps(open_store(str(run)))
    assert f"stopped at step {step}" in stopped[0]
    assert [event["exit_code"] for event in instants(run, "attempt_ended")] == [code]


def test_a_finished_run_is_left_as_it_is(tmp_path, train_data):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    train(recipe, run, train_data, "run.steps=4")
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.*")}
    train(recipe, run, train_data, "run.steps=4")
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.*")} == before
    assert [event["resumed_step"] for event in instants(run, "attempt_started")] == [None, 4]
