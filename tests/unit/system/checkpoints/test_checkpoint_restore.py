"""One process saves and restores a state: damage is always found, and nothing good is ever given up."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from cluster.errors import CheckpointIncompatible, StorageUnavailable, Superseded
from cluster.events import EventLog, claim_attempt, read_events
from cluster.manifest import MANIFEST
from cluster.store import ObjectStore, open_store
from cluster.store_local import LocalStore
from system.checkpoints import save as checkpoint_save
from system.checkpoints.checkpoint import committed_steps, open_checkpoint, step_folder
from system.checkpoints.local_tier import LocalTier
from system.checkpoints.restore import restore
from system.checkpoints.save import SaveJob
from tests.support.held_state import HeldState, save_job
from tests.support.small_dataset import flip_byte


@pytest.fixture(scope="module", autouse=True)
def alone():
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path) -> ObjectStore:
    return open_store(str(tmp_path / "run"))


@pytest.fixture
def events(run):
    log = EventLog(run, claim_attempt(run), 0, flush_seconds=0.05)
    yield log
    log.close()


def save(run: ObjectStore, events: EventLog, step: int, state: HeldState, **knobs) -> SaveJob:
    done = save_job(run, events, step, state, **knobs)
    done.run()
    return done


def test_what_was_saved_comes_back(run, events):
    saved, filled = HeldState(1), HeldState(2)
    assert save(run, events, 4, saved).committed
    restored = restore(run, filled, events, None)  # type: ignore[arg-type]
    assert (restored.step, restored.meta["slot"], restored.meta["attempt"]) == (4, 32, 1)
    assert filled.equals(saved)


def test_every_flip_and_every_truncation_is_found(run, events):
    """Each time the checkpoint before is taken: no value of the damaged one survives."""
    older, newer = HeldState(1), HeldState(2)
    save(run, events, 4, older)
    save(run, events, 8, newer)
    folder = Path(run.uri, "checkpoints", step_folder(8))
    files = [folder / MANIFEST, *folder.glob("*.safetensors")]
    whole = {path: path.read_bytes() for path in files}
    draw = random.Random(5)
    for number in range(400):
        path = draw.choice(files)
        data = bytearray(whole[path])
        if number % 4 == 0:
            del data[draw.randrange(len(data)) :]
        else:
            # Headers and names are small, so they get more than their share.
            end = len(data) if number % 2 else min(len(data), 700)
            data[draw.randrange(end)] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        filled = HeldState(3)
        restored = restore(run, filled, events, None)  # type: ignore[arg-type]
        assert restored.step == 4, f"{number}: {path.name}"
        assert filled.equals(older)
        assert committed_steps(run) == [4]
        for kept, original in whole.items():
            kept.write_bytes(original)
    filled = HeldState(3)
    assert restore(run, filled, events, None).step == 8  # type: ignore[arg-type]
    assert filled.equals(newer)


def test_when_all_are_damaged_the_run_does_not_begin_again(run, events):
    save(run, events, 4, HeldState(1))
    (file,) = Path(run.uri).glob("checkpoints/*/*.safetensors")
    file.write_bytes(b"")
    with pytest.raises(CheckpointIncompatible, match="every checkpoint of this run is damaged"):
        restore(run, HeldState(2), events, None)  # type: ignore[arg-type]


def test_a_checkpoint_of_another_model_is_not_damage(run, events):
    save(run, events, 4, HeldState(1))
    other = HeldState(2)
    other.shapes["b"] = [2]
    with pytest.raises(CheckpointIncompatible, match="first difference: b"):
        restore(run, other, events, None)  # type: ignore[arg-type]
    assert committed_steps(run) == [4]


def test_an_older_attempt_cannot_commit_and_files_never_mix(run, events):
    old = save_job(run, events, 4, HeldState(1))
    newer = EventLog(run, claim_attempt(run), 0)
    fresh = save(run, newer, 4, HeldState(2))
    manifest = run.get(f"checkpoints/{step_folder(4)}/{MANIFEST}")
    old.run()
    newer.close()
    assert fresh.committed
    assert not old.committed
    assert isinstance(old.error, Superseded)
    assert run.get(f"checkpoints/{step_folder(4)}/{MANIFEST}") == manifest
    filled = HeldState(3)
    restore(run, filled, events, None)  # type: ignore[arg-type]
    assert filled.equals(HeldState(2))


def test_a_part_that_never_comes_ends_the_save_by_its_deadline(run, events):
    alone = save_job(run, events, 4, HeldState(1), deadline_seconds=0.3)
    lonely = replace(alone, place=replace(alone.place, ranks=2))
    lonely.run()
    assert isinstance(lonely.error, StorageUnavailable)
    assert "deadline_seconds" in str(lonely.error)
    assert committed_steps(run) == []


def test_what_reads_back_changed_is_taken_back_and_nothing_old_goes(run, events, monkeypatch):
    """A store that loses a byte between the upload and the read."""
    save(run, events, 4, HeldState(1))
    commit = checkpoint_save.commit

    def losing(store, manifest):
        (path,) = Path(store.uri).glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-1])
        return commit(store, manifest)

    monkeypatch.setattr(checkpoint_save, "commit", losing)
    done = save(run, events, 8, HeldState(2), keep_last=1)
    assert done.failed
    assert committed_steps(run) == [4]


def test_a_failed_save_is_an_event_and_the_next_one_works(run, events, monkeypatch):
    put = LocalStore.put_pieces

    def refusing(store, key, pieces):
        raise StorageUnavailable(f"{store.uri}/{key}: 503")

    monkeypatch.setattr(LocalStore, "put_pieces", refusing)
    assert save(run, events, 4, HeldState(1)).failed
    monkeypatch.setattr(LocalStore, "put_pieces", put)
    assert save(run, events, 8, HeldState(2)).committed
    events.flush()
    found = {e["name"]: e for e in read_events(run)}
    assert "503" in found["checkpoint_failed"]["reason"]
    assert found["checkpoint_failed"]["step"] == 4
    committed = found["checkpoint_committed"]
    assert committed["step"] == 8
    assert committed["bytes"] == sum(entry.size for entry in open_checkpoint(run, 8)[1].files)
    assert {"stall_seconds", "write_seconds", "upload_seconds"} <= found["checkpoint_part"].keys()


def test_the_nodes_own_copy_is_read_if_it_is_what_was_committed(run, events, tmp_path):
    local = LocalTier(str(tmp_path / "local"), run.uri, keep=1)
    saved = HeldState(1)
    for step in (4, 8):
        save_job(run, events, step, saved, local).run()
    (copy,) = (tmp_path / "local").rglob("*.safetensors")  # that of step 4 has gone
    filled = HeldState(2)
    restore(run, filled, events, local)  # type: ignore[arg-type]
    flip_byte(copy, 3000)
    restore(run, filled, events, local)  # type: ignore[arg-type]
    events.flush()
    first, second = (e for e in read_events(run) if e["name"] == "checkpoint_restored")
    assert first["store_bytes"] == 0 < first["local_bytes"]
    assert second["local_bytes"] == 0 < second["store_bytes"]
    assert filled.equals(saved)
