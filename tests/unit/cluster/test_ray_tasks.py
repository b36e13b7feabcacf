"""The window of Ray tasks, on a real local Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.exceptions import LocalRayletDiedError, NodeDiedError, RayError, RaySystemError

from cluster.errors import Hang, MaskClipError, ShardCorrupt
from cluster.ray_tasks import ray_session, run_bounded
from tests.support.paths import ROOT


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session(2):
        yield


def calls(folder: Path, number: int) -> int:
    """Note one more call of task `number`, and say how many there were."""
    path = folder / f"calls-{number}"
    with path.open("a") as file:
        file.write("x")
    return path.stat().st_size


def identity(value: int) -> int:
    return value


def test_results_come_in_order_of_completion_with_their_index(tmp_path: Path) -> None:
    def wait_for_mark(name: str) -> str:
        while not (tmp_path / name).exists():
            time.sleep(0.005)
        return name

    (tmp_path / "b").touch()
    results = run_bounded(wait_for_mark, "abc", window=2, retries=0)
    assert next(results) == (1, "b")
    (tmp_path / "c").touch()
    assert next(results) == (2, "c")
    (tmp_path / "a").touch()
    assert list(results) == [(0, "a")]


def test_at_most_a_window_is_in_flight_and_items_are_read_as_needed(tmp_path: Path) -> None:
    def work(number: int) -> int:
        mark = tmp_path / f"running-{number}"
        mark.touch()
        time.sleep(0.02)
        running = len(list(tmp_path.iterdir()))
        mark.unlink()
        return running

    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for number in range(20):
            read += 1
            yield number

    taken, most_running = 0, 0
    for _, running in run_bounded(work, items(), window=3, retries=0, num_cpus=0.1):
        taken += 1
        most_running = max(most_running, running)
        assert read - taken < 3
    assert taken == 20
    assert 1 <= most_running <= 3


def test_no_items_no_results() -> None:
    assert list(run_bounded(identity, [], window=4, retries=0)) == []
    with pytest.raises(ValueError, match="window is 0"):
        list(run_bounded(identity, [1], window=0, retries=0))


def test_failures_are_retried(tmp_path: Path) -> None:
    def flaky(number: int) -> int:
        attempt = calls(tmp_path, number)
        if number == 1 and attempt <= 2:
            raise OSError("not yet")
        if number == 2 and attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    results = dict(run_bounded(flaky, range(4), window=2, retries=2))
    assert results == {number: number for number in range(4)}


def test_a_task_that_keeps_failing_raises_its_own_exception(tmp_path: Path) -> None:
    def broken(number: int) -> None:
        calls(tmp_path, number)
        raise OSError(28, "no space", "/disk")

    with pytest.raises(OSError, match="no space") as caught:
        list(run_bounded(broken, [0], window=1, retries=2))
    assert type(caught.value) is OSError
    assert calls(tmp_path, 0) == 1 + 3


def test_a_named_error_is_not_retried(tmp_path: Path) -> None:
    def corrupt(number: int) -> None:
        calls(tmp_path, number)
        raise ShardCorrupt("shard-000000.tar: broken at byte 512")

    with pytest.raises(ShardCorrupt, match="byte 512") as caught:
        list(run_bounded(corrupt, [0], window=1, retries=5))
    assert type(caught.value) is ShardCorrupt
    assert calls(tmp_path, 0) == 1 + 1


def test_a_worker_that_keeps_dying_is_named() -> None:
    def die(number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(MaskClipError, match="task 0: its worker process died in attempt 2"):
        list(run_bounded(die, [0], window=1, retries=1))


def test_an_item_is_named_by_its_label() -> None:
    def die(number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(MaskClipError, match="tar 7: its worker process died in attempt 1"):
        list(run_bounded(die, [7], window=1, retries=0, label="tar {}".format))


def test_the_window_follows_the_cluster() -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for number in range(10):
            read += 1
            yield number

    results = run_bounded(identity, items(), window=None, retries=0)
    next(results)
    assert read == 2 * 2  # the session has 2 cores
    assert len(list(results)) == 9


@pytest.mark.parametrize("budget", [5, 6])
def test_all_tasks_share_a_budget(tmp_path: Path, budget: int) -> None:
    """Each of 6 tasks fails once, which each of them may; the sixth failure is one too many for 5."""

    def flaky(number: int) -> int:
        if calls(tmp_path, number) == 1:
            raise OSError("not yet")
        return number

    results = run_bounded(flaky, range(6), window=1, retries=1, budget=budget)
    if budget == 6:
        assert len(list(results)) == 6
    else:
        with pytest.raises(MaskClipError, match="6 tasks failed while 5 succeeded, the last with: not yet"):
            list(results)


def test_success_earns_retries(tmp_path: Path) -> None:
    def flaky(number: int) -> int:
        if number >= 20 and calls(tmp_path, number) == 1:
            raise OSError("not yet")
        return number

    with pytest.raises(MaskClipError, match="1 tasks failed while 9 succeeded"):
        list(run_bounded(flaky, [*range(9), 20], window=1, retries=1, budget=0))
    assert len(list(run_bounded(flaky, [*range(20), 21, 22], window=1, retries=1, budget=0))) == 22


@pytest.mark.parametrize("end", ["failure", "caller stops"])
def test_nothing_runs_on_after_the_end(tmp_path: Path, end: str) -> None:
    beat = tmp_path / "beat"

    def work(number: int) -> None:
        if number == 0:
            while True:
                with beat.open("a") as file:
                    file.write("x")
                time.sleep(0.005)
        while not beat.exists():
            time.sleep(0.005)
        if end == "failure":
            raise ShardCorrupt("broken")

    results = run_bounded(work, [0, 1], window=2, retries=0)
    if end == "failure":
        with pytest.raises(ShardCorrupt):
            list(results)
    else:
        next(results)
        results.close()
    written = beat.stat().st_size
    time.sleep(0.2)
    assert beat.stat().st_size == written


PROGRAM = """
import sys
from pathlib import Path
import ray
from cluster.manifest import sha256_file
from cluster.ray_tasks import ray_session, run_bounded
with ray_session(1):
    print(sorted(run_bounded(sha256_file, [Path(name) for name in sys.argv[1:]], window=2, retries=0)))
assert not ray.is_initialized()
"""


@pytest.mark.parametrize("where", ["joined", "own"])
def test_a_program_elsewhere(tmp_path: Path, where: str) -> None:
    """It joins RAY_ADDRESS and leaves that cluster alone, or starts its own, from any working folder."""
    (tmp_path / "file").write_bytes(b"abc")
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    environment.pop("RAY_ADDRESS", None)
    if where == "joined":
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "file")],
        cwd=ROOT if where == "joined" else tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("[(0, 'ba7816bf")
    assert run.stderr == ""
    assert list(run_bounded(identity, [5], window=1, retries=0)) == [(0, 5)]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_wrong_address_is_named(address: str) -> None:
    program = f"""
import os
os.environ["RAY_ADDRESS"] = "{address}"
from cluster.errors import ConfigError
from cluster.ray_tasks import ray_session
try:
    with ray_session(None):
        pass
except ConfigError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.startswith(f"RAY_ADDRESS={address}: no session")


@pytest.mark.parametrize("error", [RaySystemError("no agent"), LocalRayletDiedError(), NodeDiedError("gone")])
def test_a_failure_of_ray_itself_may_pass(error: RayError) -> None:
    says = f"^Ray failed .{type(error).__name__}: .*run again"
    with pytest.raises(Hang, match=says) as caught, ray_session(1):
        raise error
    assert "\n" not in str(caught.value)
