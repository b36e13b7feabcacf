"""Laws of saves that run beside the training: wherever a process is killed, and whatever the store does, the
run that goes on is the run that nothing happened to."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from cluster.events import claim_attempt, read_events
from cluster.manifest import verify
from cluster.store import open_store
from system.checkpoint import committed_steps, open_checkpoint
from tests.integration.test_resume import assert_same_run
from tests.support.runs import instants, maskclip, train, train_until_killed, write_recipe

BACKGROUND = "checkpoint.background=true"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, train_data: str) -> Path:
    """Saves are waited for in it, none runs beside a step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(write_recipe(folder), folder / "run", train_data)
    return folder / "run"


def assert_all_verify(run: Path) -> None:
    store = open_store(str(run))
    for step in committed_steps(store):
        assert verify(*open_checkpoint(store, step)) == []


SNAPSHOT = [("before-snapshot", 4, 0), ("after-snapshot", 4, 1), ("upload", 4, 1), ("after-part", 4, 0)]
COMMIT = [("commit", 4, 0), ("after-commit", 4, 0), ("restore", 4, 1), ("prune", 4, 0), ("upload", 12, 0)]


@pytest.mark.parametrize("kills", [SNAPSHOT, COMMIT], ids=["snapshot", "commit"])
def test_killed_at_every_point_of_a_save(tmp_path, train_data, undisturbed, kills):
    """One run that is killed again and again, and still ends as if it had never been."""
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    for point, step, rank in kills:
        before = committed_steps(open_store(str(run)))
        keep = "checkpoint.keep_last=1"
        train_until_killed(recipe, run, train_data, BACKGROUND, keep, point=point, step=step, rank=rank)
        assert_all_verify(run)
        after = committed_steps(open_store(str(run)))
        assert not before or max(after) >= max(before)
    train(recipe, run, train_data, BACKGROUND, "checkpoint.keep_last=2")
    assert_same_run(run, undisturbed, after=4, last=12)
    store, attempt = open_store(str(run)), len(kills) + 1
    names = {info.key.rpartition("/")[2] for info in store.child("checkpoints").list("step-000000012")}
    assert names == {
        "manifest.json",
        *(f"rank-{rank:05d}.attempt-{attempt:04d}.safetensors" for rank in range(2)),
        *(f"{attempt:04d}-rank-{rank:05d}.json" for rank in range(2)),
    }
    # What the killed attempts left behind is gone as well.
    folders = {info.key.split("/")[0] for info in store.child("checkpoints").list()}
    assert folders == {f"step-{step:09d}" for step in committed_steps(store)}
    compared = instants(run, "first_loss")
    assert not [event for event in compared if event["off"] or not event["same_topology"]]


def test_a_store_that_fails_for_a_while_stops_nothing(tmp_path, train_data, undisturbed):
    """The folder of the checkpoints is a file until a save has failed."""
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("in the way")

    def repair() -> None:
        give_up = time.monotonic() + 120
        while time.monotonic() < give_up:
            if instants(run, "checkpoint_failed"):
                (run / "checkpoints").unlink()
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=repair)
    watcher.start()
    train(recipe, run, train_data, BACKGROUND, "run.event_seconds=0.05", "checkpoint.every_steps=2")
    watcher.join()
    failed = instants(run, "checkpoint_failed")
    assert failed
    assert "checkpoints" in failed[0]["reason"]
    assert committed_steps(open_store(str(run)))[-1] == 12
    assert_same_run(run, undisturbed, after=0, last=12)


def test_an_older_attempt_cannot_commit(tmp_path, train_data):
    """A newer attempt is claimed while the older one still trains."""
    recipe, run = write_recipe(tmp_path), tmp_path / "run"

    def claim() -> None:
        give_up = time.monotonic() + 120
        while not committed_steps(open_store(str(run))) and time.monotonic() < give_up:
            time.sleep(0.05)
        claim_attempt(open_store(str(run)))

    watcher = threading.Thread(target=claim)
    watcher.start()
    words = ("train", recipe, f"run.uri={run}", f"data.uri={train_data}", "run.steps=400", BACKGROUND)
    done = maskclip(*words)
    watcher.join()
    assert done.returncode == 64, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if "attempt 2 of this run has begun" in line]
    assert len(lines) == 1
    store = open_store(str(run))
    claimed = json.loads(store.get("attempts/attempt-0002.json"))["time"]
    late = [e for e in read_events(store) if e["name"] == "checkpoint_committed" and e["t"] > claimed + 5]
    assert late == []


def test_a_restart_on_the_node_reads_its_own_disk(tmp_path, train_data, undisturbed):
    recipe, run, local = write_recipe(tmp_path), tmp_path / "run", tmp_path / "local"
    knobs = (f"checkpoint.local={local}", "checkpoint.local_keep=1")
    train_until_killed(recipe, run, train_data, *knobs, point="step", step=6)
    (copy,) = local.rglob("rank-00001*")
    copy.write_bytes(copy.read_bytes()[:-1])  # no copy of the committed file any more
    train(recipe, run, train_data, *knobs)
    restored = {e["rank"]: e for e in read_events(open_store(str(run))) if e["name"] == "checkpoint_restored"}
    assert restored[0]["step"] == restored[1]["step"] == 4
    assert restored[0]["store_bytes"] == 0 < restored[0]["local_bytes"]
    assert restored[1]["local_bytes"] == 0 < restored[1]["store_bytes"]
    assert_same_run(run, undisturbed, after=4, last=12)
    assert {path.parent.name for path in local.rglob("rank-*")} == {"step-000000012"}
    shutil.rmtree(local)
    train(recipe, run, train_data, *knobs)  # finished: restores from the store, and is left as it is
