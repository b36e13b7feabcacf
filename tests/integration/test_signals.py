"""Ctrl-C and SIGTERM: stop at a step, commit, say so in one line, and go on later as if nothing had been.
Ranks that die, that nobody joins or that have another recipe, and two trainings of a run, end as clearly."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import local_launch
from cluster.store import open_store
from system.checkpoints.checkpoint import committed_steps
from tests.support.runs import instants, live_steps, maskclip, train, write_recipe


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


def start(tmp_path: Path, data: str, *knobs: str) -> subprocess.Popen[str]:
    """A long training of tmp_path/run."""
    words = ["train", str(write_recipe(tmp_path)), f"run.uri={tmp_path / 'run'}", f"data.uri={data}"]
    argv = [sys.executable, "-m", "system.cli", *words, "run.steps=1000", *knobs, "--json"]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not what():
        assert process.poll() is None
        time.sleep(0.05)


def end_of(process: subprocess.Popen[str]) -> tuple[dict, list[str]]:
    """The JSON document, and what `maskclip` said on stderr."""
    out, errors = process.communicate(timeout=150)
    assert "Traceback" not in errors
    return json.loads(out), [line for line in errors.splitlines() if line.startswith("maskclip")]


def children(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of the ranks that run."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(line[5:]): int(pid) for line in environment if line.startswith(b"RANK=")}
    return found


@pytest.mark.parametrize(
    ("number", "code", "moment"),
    [
        (signal.SIGTERM, 75, "launcher"),
        (signal.SIGTERM, 75, "ranks"),
        (signal.SIGINT, 130, "ranks"),
        (signal.SIGTERM, 75, "attempt"),
    ],
)
def test_a_signal_before_the_first_step_is_the_same_one_line(tmp_path, train_data, number, code, moment):
    process = start(tmp_path, train_data)
    if moment == "launcher":
        time.sleep(0.5)
    else:
        path = tmp_path / "run/attempts"
        wait_for((lambda: len(children(process)) == 2) if moment == "ranks" else path.exists, process)
    process.send_signal(number)
    data, lines = end_of(process)
    assert (process.returncode, data["exit_code"], len(lines)) == (code, code, 1), lines
    assert "stopped" in data["message"]


def test_a_killed_rank_is_77_and_one_line(tmp_path, train_data):
    process, run = start(tmp_path, train_data), tmp_path / "run"
    wait_for(lambda: run.is_dir() and live_steps(run), process)
    os.kill(children(process)[0], signal.SIGKILL)
    data, lines = end_of(process)
    assert (process.returncode, len(lines)) == (77, 1), lines
    assert "SIGKILL" in lines[0]
    assert (data["error"], data["attempt"], data["resumed_step"]) == ("Hang", 1, None)
    assert data["steps_done"] >= 1
    assert data["loss"] > 0


def test_of_two_trainings_of_one_run_the_newer_one_stays(tmp_path, train_data, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # three processes share the machine
    run = tmp_path / "run"
    older = start(tmp_path, train_data, "run.processes=1")
    wait_for(lambda: run.is_dir() and live_steps(run), older)
    newer = start(tmp_path, train_data, "run.processes=2")
    data, lines = end_of(older)
    assert (older.returncode, data["error"], data["attempt"], len(lines)) == (64, "Superseded", 1, 1)
    wait_for(lambda: 2 in {step["attempt"] for step in live_steps(run).values()}, newer)
    newer.send_signal(signal.SIGTERM)
    data, lines = end_of(newer)
    assert (newer.returncode, data["attempt"], data["last_checkpoint"]) == (75, 2, data["steps_done"])
    assert maskclip("checkpoint", "verify", run).returncode == 0


LATE = """
import sys
from system import build, cli
build.JOIN_SECONDS = 3.0
sys.exit(cli.main(sys.argv[1:]))
"""


def one_rank(recipe: Path, rank: int, port: int, *knobs: str) -> subprocess.Popen[str]:
    """As torchrun starts it."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in places.items()}}
    argv = [sys.executable, "-c", LATE if not knobs else LATE.replace("3.0", "120.0"), "train", str(recipe)]
    return subprocess.Popen(
        [*argv, f"run.uri={recipe.parent / 'run'}", "data.uri=none", *knobs],
        env={**environment, "MASTER_ADDR": "127.0.0.1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_nobody_joins_is_77(tmp_path, rank):
    process = one_rank(write_recipe(tmp_path), rank, local_launch.free_port())
    _, errors = process.communicate(timeout=120)
    lines = [line for line in errors.splitlines() if line.startswith("maskclip")]
    assert (process.returncode, len(lines)) == (77, 1), errors
    assert "did not meet" in lines[0]
    assert not (tmp_path / "run").exists()


def test_ranks_with_two_configurations_are_64_and_open_no_attempt(tmp_path):
    recipe, port = write_recipe(tmp_path), local_launch.free_port()
    ranks = [one_rank(recipe, rank, port, f"optimizer.lr=1e-{3 + rank}") for rank in range(2)]
    ends = [process.communicate(timeout=150)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [64, 64], ends
    lines = [line for end in ends for line in end.splitlines() if line.startswith("maskclip")]
    assert len(lines) == 1, ends
    assert "configuration" in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_left_as_it_is(tmp_path, train_data):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    train(recipe, run, train_data, "run.steps=4")
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.*")}
    train(recipe, run, train_data, "run.steps=4")
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.*")} == before
    assert [event["resumed_step"] for event in instants(run, "attempt_started")] == [None]
