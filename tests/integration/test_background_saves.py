"""Laws of saves that run beside the training: wherever a process is killed, and whatever the store does, the
run that goes on is the run that nothing happened to."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import Hang, Superseded
from cluster.events import claim_attempt, read_events
from cluster.store import open_store
from system.checkpoints.checkpoint import committed_steps
from tests.integration.test_resume import assert_same_run
from tests.support import save_rig
from tests.support.runs import instants, live_steps

KILLED = -9


def rig(run: Path | str, *attempts: str, **config: object) -> list[dict]:
    """Attempts of one run, 12 steps, a save every 4; see `save_rig`."""
    settings = {"every_steps": 4, **config}
    argv = [sys.executable, save_rig.__file__, str(run), json.dumps(settings), *attempts]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"codes"')]


def meanwhile(ready: Callable[[], bool], work: Callable[[], object]) -> threading.Thread:
    """Do something as soon as the run is so far."""

    def wait() -> None:
        give_up = time.monotonic() + 120
        while not ready() and time.monotonic() < give_up:
            time.sleep(0.02)
        work()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves are waited for in it, none runs beside a step."""
    run = tmp_path_factory.mktemp("undisturbed")
    (done,) = rig(run, "whole", background=False)
    assert done == {"codes": [0, 0], "committed": [4, 8, 12], "problems": []}
    return run


KILLS = (
    *("before-snapshot:4:0", "after-snapshot:4:1", "upload:4:1", "after-part:4:0", "commit:4:0"),
    *("after-commit:4:0", "restore:4:1", "step:6:0", "upload:8:0", "prune:4:0", "commit:12:0"),
)


def test_killed_at_every_point_of_a_save(tmp_path, undisturbed):
    """One run that is killed again and again, and still ends as if it had never been."""
    *killed, last = rig(tmp_path, *KILLS, "whole", keep_last=1, pause=0.02)
    newest = 0
    for kill, found in zip(KILLS, killed, strict=True):
        victim = int(kill[-1])
        assert found["codes"][victim] == KILLED, kill
        assert found["codes"][1 - victim] in (Hang.exit_code, 70, 0), kill
        assert found["problems"] == [], kill
        assert max(found["committed"], default=0) >= newest, kill
        newest = max(found["committed"], default=0)
    assert (last["codes"], last["problems"]) == ([0, 0], [])
    assert_same_run(tmp_path, undisturbed, after=0, last=12)
    # What the killed attempts left behind is gone but for what nothing was committed after.
    store = open_store(str(tmp_path))
    folders = {info.key.split("/")[0] for info in store.child("checkpoints").list()}
    assert committed_steps(store)[-1] == 12
    assert folders <= {"step-000000008", "step-000000012"}
    compared = [event for event in read_events(store) if event["name"] == "first_loss"]
    assert compared
    assert all(event["same_topology"] and event["difference"] == 0 for event in compared)
    assert instants(tmp_path, "first_loss_off") == []


def test_a_store_that_fails_for_a_while_stops_nothing(tmp_path, undisturbed):
    """A file lies where the checkpoints' folder should be, until a save has failed."""
    blocked = tmp_path / "checkpoints"
    blocked.write_text("in the way")
    repaired = meanwhile(lambda: bool(instants(tmp_path, "checkpoint_failed")), blocked.unlink)
    (found,) = rig(tmp_path, "whole", every_steps=2, pause=0.2)
    repaired.join()
    assert found["codes"] == [0, 0]
    assert found["committed"][-1] == 12
    failed = instants(tmp_path, "checkpoint_failed")
    assert "checkpoints" in failed[0]["reason"]
    assert_same_run(tmp_path, undisturbed, after=0, last=12)
    assert all(event["stall_seconds"] >= 0 for event in instants(tmp_path, "checkpoint_committed"))


def test_one_rank_that_cannot_write_ends_the_save_for_all(tmp_path, undisturbed):
    """The first rank does not wait for its deadline: the next step's all-reduce tells it."""
    folder = tmp_path / "checkpoints/step-000000004"
    folder.mkdir(parents=True)
    (folder / "rank-00001.attempt-0001.safetensors").mkdir()
    (found,) = rig(tmp_path, "whole", pause=0.2)
    assert (found["codes"], found["committed"]) == ([0, 0], [8, 12])
    reasons = [
        e["reason"] for e in read_events(open_store(str(tmp_path))) if e["name"] == "checkpoint_failed"
    ]
    assert any("another rank could not write its part" in reason for reason in reasons)
    assert any("rank 1:" in reason for reason in reasons)
    assert_same_run(tmp_path, undisturbed, after=0, last=12)


def test_an_older_attempt_ends_without_another_commit(tmp_path):
    """A newer attempt is claimed while the older one still trains."""
    run = open_store(str(tmp_path))
    claimed = meanwhile(lambda: bool(committed_steps(run)), lambda: claim_attempt(run))
    (found,) = rig(tmp_path, "whole", every_steps=2, pause=0.3)
    claimed.join()
    assert found["codes"] == [Superseded.exit_code] * 2
    assert found["problems"] == []
    assert 12 not in found["committed"]


def test_a_save_that_is_due_while_one_is_in_flight_is_skipped_and_counted(tmp_path, undisturbed):
    (found,) = rig(tmp_path, "whole", every_steps=1)
    skipped = instants(tmp_path, "checkpoint_skipped")
    assert [event["skipped"] for event in skipped] == list(range(1, len(skipped) + 1))
    assert skipped
    steps = {event["step"] for event in skipped}
    assert (steps - {12}).isdisjoint(found["committed"])  # the last step is saved at the end
    assert steps | set(found["committed"]) == set(range(1, 13))
    assert_same_run(tmp_path, undisturbed, after=0, last=12)


def test_killed_in_an_upload_to_s3(tmp_path, s3_env, undisturbed):
    """With a copy on the node's own disk, from which the last attempt goes on."""
    run = f"{s3_env}/run"
    kills = ("upload:4:1", "commit:4:0", "step:6:1")
    *killed, last = rig(run, *kills, "whole", local=str(tmp_path), pause=0.1)
    assert [found["codes"][int(kill[-1])] for kill, found in zip(kills, killed, strict=True)] == [KILLED] * 3
    assert [found["problems"] for found in (*killed, last)] == [[]] * 4
    assert last["codes"] == [0, 0]
    assert_same_run(run, undisturbed, after=4, last=12)  # type: ignore[arg-type]
    restored = [e for e in read_events(open_store(run)) if e["name"] == "checkpoint_restored"]
    assert {event["step"] for event in restored} == {4}
    assert {event["store_bytes"] for event in restored} == {0}


def test_another_topology_restores_the_same_state(tmp_path, undisturbed):
    """ZeRO 1 on 2 ranks -> ZeRO 2 on 1 -> ZeRO 0 on 3: whoever verifies a file, all get what they need."""
    rig(tmp_path, "step:7:0", background=False, pause=0.4)
    rig(tmp_path, "step:11:0", background=False, pause=0.4, processes=1, zero_stage=2)
    (last,) = rig(tmp_path, "whole", background=False, processes=3, zero_stage=0)
    assert last == {"codes": [0] * 3, "committed": [4, 8, 12], "problems": []}
    assert [event["resumed_step"] for event in instants(tmp_path, "attempt_started")] == [None, 4, 8]
    ours, theirs = live_steps(tmp_path), live_steps(undisturbed)
    for step in range(1, 13):
        assert ours[step]["ids_digest"] == theirs[step]["ids_digest"]
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5)
    compared = instants(tmp_path, "first_loss")
    assert [event["same_topology"] for event in compared] == [False, False]
    assert instants(tmp_path, "first_loss_off") == []
