"""Processes of one run: their environment, their exit code, their signals, and that none is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import local_launch
from cluster.errors import Interrupted, Preempted
from cluster.local_launch import run_local
from cluster.stop import StopRequest, stop_raises
from tests.support.paths import ROOT


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def wait_for_files(folder: Path, count: int) -> list[Path]:
    """The files, once there are `count` of them and each has content."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        files = sorted(folder.iterdir())
        if len(files) == count and all(file.stat().st_size for file in files):
            return files
        time.sleep(0.01)
    raise TimeoutError(f"{folder} has {[file.name for file in folder.iterdir()]}, not {count} files")


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie, which only waits to be collected, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    give_up = time.monotonic() + 30
    while any(map(is_alive, pids)):
        assert time.monotonic() < give_up, f"still alive: {[pid for pid in pids if is_alive(pid)]}"
        time.sleep(0.02)


TELL = """
import json, os, sys
print("out", flush=True)
json.dump(dict(os.environ), open(f"{sys.argv[1]}/rank-{os.environ['RANK']}", "w"))
"""


def test_children_get_the_variables_of_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RANK", "7")
    assert run_local(python(TELL, tmp_path), 3, {"EXTRA": "yes"}) == 0
    told = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(3)]
    for rank, env in enumerate(told):
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert env["EXTRA"] == "yes"
        assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert len({env["MASTER_PORT"] for env in told}) == 1
    assert capfd.readouterr().out == "out\n" * 3
    assert run_local(python(TELL, tmp_path), 1, {"OMP_NUM_THREADS": "9"}) == 0
    assert json.loads((tmp_path / "rank-0").read_text())["OMP_NUM_THREADS"] == "9"


END = """
import json, os, signal, sys, time
code = json.loads(sys.argv[1])[int(os.environ["RANK"])]
if code == "wait":  # until the launcher says stop
    time.sleep(1000)
if code == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(sys.argv[2], "w").write("ready")
    time.sleep(1000)
if code == "after stubborn":
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.01)
    code = 66
if code == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([0, 0], 0),
        ([0, 65], 65),
        (["killed", "wait"], 128 + 9),
        (["wait", 75, "wait"], 75),
        (["stubborn", "after stubborn"], 66),
    ],
)
def test_the_first_failure_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: list[object], expected: int
) -> None:
    monkeypatch.setattr(local_launch, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(local_launch, "TERMINATE_SECONDS", 0.2)
    assert run_local(python(END, json.dumps(ends), tmp_path / "ready"), len(ends), None) == expected


def test_a_program_that_cannot_start_leaves_no_handler_behind() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FileNotFoundError):
        run_local(["/no/such/program"], 2, None)
    assert signal.getsignal(signal.SIGTERM) is before


LAUNCH = """
import sys
from cluster.local_launch import run_local
sys.exit(run_local([sys.executable, "-c", *sys.argv[1:]], 2, None))
"""
STOPPABLE = """
import os, sys, time
from cluster.stop import StopRequest
with StopRequest() as stop:
    open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").write(str(os.getpid()))
    while stop.reason is None:
        time.sleep(0.01)
    time.sleep(0.2)  # a step is finished and saved here: a second signal would end it
sys.exit({"interrupted": 130, "preempted": 75}[stop.reason])
"""


@pytest.mark.parametrize(
    ("number", "whole_group", "expected"),
    [(signal.SIGINT, True, 130), (signal.SIGINT, False, 130), (signal.SIGTERM, False, 75)],
    ids=["Ctrl-C in a terminal", "SIGINT", "SIGTERM"],
)
def test_a_signal_reaches_every_child_exactly_once(
    tmp_path: Path, number: signal.Signals, whole_group: bool, expected: int
) -> None:
    launcher = subprocess.Popen(python(LAUNCH, STOPPABLE, tmp_path), cwd=ROOT, start_new_session=True)
    pids = [int(file.read_text()) for file in wait_for_files(tmp_path, 2)]
    if whole_group:
        os.killpg(launcher.pid, number)
    else:
        launcher.send_signal(number)
    assert launcher.wait(timeout=60) == expected
    wait_until_gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_no_child_outlives_a_killed_launcher(tmp_path: Path) -> None:
    launcher = subprocess.Popen(python(LAUNCH, STOPPABLE, tmp_path), cwd=ROOT, start_new_session=True)
    pids = [int(file.read_text()) for file in wait_for_files(tmp_path, 2)]
    launcher.kill()
    launcher.wait()
    wait_until_gone(pids)


STARTING = """
import os, sys, time
from cluster.stop import end_at_once
if sys.argv[2] == "ready":
    end_at_once()
open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").write(str(os.getpid()))
if sys.argv[2] == "late":
    time.sleep(0.5)
    end_at_once()
time.sleep(1000)
"""
LAUNCH_AND_SAY = """
import sys
from cluster.errors import Interrupted, Preempted
from cluster.local_launch import run_local
try:
    run_local([sys.executable, "-c", *sys.argv[1:]], 2, None)
except (Interrupted, Preempted) as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize("child", ["ready", "late"])
def test_children_that_are_still_starting_end_without_a_word(
    tmp_path: Path, number: signal.Signals, expected: int, child: str
) -> None:
    launcher = subprocess.Popen(
        python(LAUNCH_AND_SAY, STARTING, tmp_path, child), cwd=ROOT, stderr=subprocess.PIPE
    )
    pids = [int(file.read_text()) for file in wait_for_files(tmp_path, 2)]
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=60)
    assert (launcher.returncode, errors) == (expected, b"")
    wait_until_gone(pids)


PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").write(str(child.pid))
time.sleep(1000 if sys.argv[2] == "stay" else 0)
"""


@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="the watcher is a shell")
def test_no_grandchild_outlives_a_killed_launcher(tmp_path: Path) -> None:
    launcher = subprocess.Popen(python(LAUNCH, PARENT, tmp_path, "stay"), cwd=ROOT, start_new_session=True)
    pids = [int(file.read_text()) for file in wait_for_files(tmp_path, 2)]
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    wait_until_gone(pids)


def test_no_grandchild_outlives_its_parent_and_the_launcher(tmp_path: Path) -> None:
    assert run_local(python(PARENT, tmp_path, "go"), 2, None) == 0
    wait_until_gone([int(file.read_text()) for file in wait_for_files(tmp_path, 2)])


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, Preempted)])
def test_a_signal_leaves_a_block_as_its_error(number: signal.Signals, kind: type[Exception]) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(kind, match="go on"), stop_raises("go on"):
        signal.raise_signal(number)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def swallowed(number: signal.Signals) -> None:
    """As some libraries do while they are imported."""
    with contextlib.suppress(BaseException):
        signal.raise_signal(number)


def test_a_signal_that_was_swallowed_is_not_forgotten() -> None:
    with stop_raises("go on") as check:
        check()
        swallowed(signal.SIGTERM)
        with pytest.raises(Preempted):
            check()


def test_a_stop_request_is_a_flag() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "preempted"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "preempted"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_interrupt_does_not_wait() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "interrupted"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.reason == "interrupted"
