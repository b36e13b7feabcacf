"""Laws of saves that run beside the training: wherever a process is killed, and whatever the store does, the
run that goes on is the run that nothing happened to."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import botocore.session
import pytest

from cluster.errors import Hang, Superseded
from cluster.events import claim_attempt, read_events
from cluster.store import open_store
from system.checkpoints.checkpoint import committed_steps
from tests.integration.test_resume import assert_same_run
from tests.support import save_rig
from tests.support.paths import ROOT
from tests.support.runs import instants, live_steps
from tests.support.troubled_proxy import EXPIRED, UNAVAILABLE, TroubledProxy

KILLED = -9


def rig(run: Path | str, *attempts: str, endpoint: str | None = None, **config: object) -> list[dict]:
    """Attempts of one run, 12 steps, a save every 4; see `save_rig`. `endpoint` is in place of the server."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if endpoint:
        environment |= {"AWS_ENDPOINT_URL": endpoint}
    settings = {"every_steps": 4, **config}
    argv = [sys.executable, save_rig.__file__, str(run), json.dumps(settings), *attempts]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280, check=False, env=environment)
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


TROUBLES: dict[str, tuple[Callable[[TroubledProxy], object], int]] = {
    "503": (lambda proxy: proxy.fail(UNAVAILABLE), 30),
    "expired credentials": (lambda proxy: proxy.fail(EXPIRED), 15),
    "a hanging upload": (lambda proxy: proxy.hang("rank-00001.attempt"), 3),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_an_object_store_in_trouble_stops_nothing(s3_env, s3_server, undisturbed, trouble):
    """From the first commit on, until so many requests have met the trouble."""
    begin, requests = TROUBLES[trouble]
    run, proxy = f"{s3_env}/run", TroubledProxy(s3_server.port)
    store = open_store(run)
    troubled = meanwhile(lambda: bool(committed_steps(store)), lambda: begin(proxy))
    mended = meanwhile(lambda: proxy.met >= requests, proxy.mend)
    patience = {"deadline_seconds": 1, "attempts": 2, "backoff_seconds": 0.05}
    settings = {"store": patience, "deadline_seconds": 3, "every_steps": 2, "pause": 0.4}
    (found,) = rig(run, "whole", endpoint=proxy.endpoint, **settings)
    proxy.close()
    troubled.join()
    mended.join()
    assert proxy.met >= requests
    assert (found["codes"], found["problems"]) == ([0, 0], [])
    assert found["committed"][-1] == 12
    failed = [event for event in read_events(store) if event["name"] == "checkpoint_failed"]
    assert failed
    assert_same_run(run, undisturbed, after=0, last=12)


def test_a_half_upload_of_a_dead_attempt_is_in_nobodys_way(any_s3, undisturbed):
    """What is left behind has the name of the file that will be written."""
    run, name = f"{any_s3}/run", "checkpoints/step-000000004/rank-00000.attempt-0001.safetensors"
    client = botocore.session.get_session().create_client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    where = {"Bucket": any_s3.removeprefix("s3://"), "Key": f"run/{name}"}
    upload = client.create_multipart_upload(**where)["UploadId"]
    client.upload_part(**where, UploadId=upload, PartNumber=1, Body=bytes(5 << 20))
    (found,) = rig(run, "whole", background=False)
    assert found == {"codes": [0, 0], "committed": [4, 8, 12], "problems": []}
    assert_same_run(run, undisturbed, after=0, last=12)


def test_a_slice_of_the_kill_sweep(tmp_path):
    """`make sweep` is the whole of it."""
    kills, result = {"in-teacher": 3, "in-prune": 2}, tmp_path / "found.json"
    words = ["--kills", "4", "--points", *kills, "--json", str(result)]
    command = [sys.executable, "-m", "benchmarks.kill_sweep", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads(result.read_text())
    assert found["wrong"] == []
    assert found["kills"] == 2 * sum(kills.values()) + 4
    assert found["killed"].items() >= kills.items()


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


def test_killed_in_an_upload_to_s3(tmp_path, any_s3, undisturbed):
    """With a copy on the node's own disk, from which the last attempt goes on."""
    run = f"{any_s3}/run"
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
