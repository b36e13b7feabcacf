"""Which checkpoints go: never the newest good one, and never what an operator or a live attempt needs."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.events import EventLog, claim_attempt
from cluster.manifest import MANIFEST, FileEntry, Manifest, commit
from cluster.store import ObjectStore, open_store
from cluster.store_local import LocalStore
from system.checkpoints.checkpoint import committed_steps, step_folder
from system.checkpoints.config import CheckpointConfig
from system.checkpoints.retention import PINNED, Retention, Scores, delete_checkpoint, doomed, leftovers

STEPS = st.sets(st.integers(1, 200), min_size=1)


@given(steps=STEPS, keep=st.integers(1, 5), every=st.integers(0, 20), pinned=STEPS, data=st.data())
def test_what_is_kept(steps, keep, every, pinned, data):
    newest = data.draw(st.sampled_from(sorted(steps)))
    scores = data.draw(st.dictionaries(st.integers(1, 200), st.floats(0, 1)))
    config = CheckpointConfig(keep_last=keep, keep_every_steps=every)
    gone = set(doomed(steps, newest, config, pinned, scores))
    kept = steps - gone
    assert newest in kept
    assert {step for step in steps if step > newest} <= kept
    assert set(sorted(step for step in steps if step <= newest)[-keep:]) <= kept
    assert (pinned & steps) <= kept
    assert not every or {step for step in steps if step % every == 0} <= kept
    scored = {step: score for step, score in scores.items() if step in steps}
    if scored:
        assert any(scored[step] == max(scored.values()) for step in kept & scored.keys())
    allowed = keep + len(pinned & steps) + (200 // every if every else 0) + 1
    assert len([step for step in kept if step <= newest]) <= allowed


def test_without_a_setting_everything_stays():
    assert doomed([1, 2, 3], 3, CheckpointConfig()) == []


def write(run: ObjectStore, step: int, attempt: int, committed: bool = True) -> None:
    store = run.child(f"checkpoints/{step_folder(step)}")
    name = f"rank-00000.attempt-{attempt:04d}.safetensors"
    store.put(name, b"abc")
    store.put(f"parts/{attempt:04d}-rank-00000.json", b"{}")
    if committed:
        commit(store, Manifest("checkpoint", 2, (FileEntry(name, 3, "x"),), {"attempt": attempt}))


def test_only_dead_attempts_files_are_leftovers(tmp_path):
    run = open_store(str(tmp_path))
    write(run, 4, 1)
    write(run, 4, 2, committed=False)
    write(run, 8, 2, committed=False)
    write(run, 8, 3, committed=False)
    write(run, 12, 2, committed=False)
    run.put(f"quarantine/{step_folder(12)}-12345678.json", b"{}")
    run.put(f"checkpoints/{step_folder(4)}/{PINNED}", b"{}")
    found = [key.removeprefix("checkpoints/") for key, _ in leftovers(run, 3)]
    assert found == [
        f"{step_folder(step)}/{name}"
        for step in (4, 8)
        for name in ("parts/0002-rank-00000.json", "rank-00000.attempt-0002.safetensors")
    ]
    run.put(f"checkpoints/{step_folder(4)}/{MANIFEST}", b"torn")
    assert all(step_folder(4) not in key for key, _ in leftovers(run, 3))


def test_a_half_deleted_checkpoint_is_none(tmp_path, monkeypatch):
    run = open_store(str(tmp_path))
    write(run, 4, 1)
    write(run, 8, 1)
    calls = []

    def failing(store: LocalStore, key: str) -> None:
        calls.append(key)
        if len(calls) == 2:
            raise OSError("killed here")
        delete(store, key)

    delete = LocalStore.delete
    monkeypatch.setattr(LocalStore, "delete", failing)
    with pytest.raises(OSError, match="killed"):
        delete_checkpoint(run, 4)
    assert calls[0] == MANIFEST
    assert committed_steps(run) == [8]
    monkeypatch.setattr(LocalStore, "delete", delete)
    assert delete_checkpoint(run, 8) == 5
    assert committed_steps(run) == []


def test_a_run_prunes_after_a_commit_and_keeps_its_best(tmp_path):
    run = open_store(str(tmp_path))
    for _ in range(2):
        claim_attempt(run)
    for step, attempt in ((4, 1), (8, 2), (12, 2), (16, 2)):
        write(run, step, attempt)
    write(run, 20, 1, committed=False)
    older = EventLog(run, 1, 0)
    older.instant("evaluation", step=4, image_to_text_r5=0.9)
    older.close()
    events = EventLog(run, 2, 0)
    config = CheckpointConfig(keep_last=1, keep_best="image_to_text_r5")
    events.instant("evaluation", step=8, image_to_text_r5=0.5)
    events.flush()
    Retention(run, config, events).after_commit(16)
    events.close()
    assert committed_steps(run) == [4, 16]
    assert {info.key.split("/")[0] for info in run.child("checkpoints").list()} == {
        step_folder(4),
        step_folder(16),
    }
    assert Scores(run, "image_to_text_r5")() == {4: 0.9, 8: 0.5}
    lines = b"".join(run.get(info.key) for info in run.list("events/attempt-0002/")).splitlines()
    (pruned,) = [json.loads(line) for line in lines if b"checkpoints_pruned" in line]
    assert (pruned["steps"], pruned["leftovers"]) == ([8, 12], 2)
