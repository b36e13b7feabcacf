"""What `maskclip checkpoint copy|pin|unpin|prune|repair` do. Nothing that is good and new is ever deleted,
and nothing that a running attempt still writes.
"""

import json
from dataclasses import dataclass
from typing import Any

from cluster.errors import CheckpointIncompatible, ConfigError, MaskClipError, ObjectNotFound
from cluster.events import newest_attempt
from cluster.manifest import MANIFEST, FileEntry, Manifest, commit, sha256_file, verify
from cluster.scratch import scratch_folder
from cluster.store import ObjectStore, open_store
from system.checkpoints.commands import Action, check
from system.commands import Args, Result, Rows, knobs


@dataclass(frozen=True, kw_only=True)
class CopyKnobs:
    to: str
    """Run folder that gets the checkpoints."""
    step: int | None = None
    """Only this one; all if none is given."""


@dataclass(frozen=True, kw_only=True)
class PinKnobs:
    step: int
    """Step of the checkpoint."""
    reason: str = ""
    """Stands in the marker, for whoever asks later."""


@dataclass(frozen=True, kw_only=True)
class PruneKnobs:
    keep_last: int = 0
    """Newest checkpoints that stay; 0: only dead attempts' files are deleted."""
    keep_every_steps: int = 0
    """Those at multiples of this stay as well."""
    keep_best: str = ""
    """The one with the highest value of this number of the run's evaluations stays as well."""
    ended: bool = False
    """No process of this run is running: what its newest attempt left behind may go too."""
    dry_run: bool = False
    """Say what would go and delete nothing."""


@dataclass(frozen=True, kw_only=True)
class RepairKnobs:
    ended: bool = False
    """As for prune."""
    dry_run: bool = False
    """Say what would be done and do nothing."""


def copy(args: Args) -> Result:
    """Files first, the manifest last: a copy is whole or is none."""
    from system.checkpoints.checkpoint import committed_steps, open_checkpoint, step_folder
    from system.run_folder import RECORD

    config = knobs(args, CopyKnobs)
    run, target = open_store(args.run), open_store(config.to)
    steps = committed_steps(run) if config.step is None else [config.step]
    if not steps:
        raise ObjectNotFound(f"{args.run}: no committed checkpoint here; correct the URI")
    if run.exists(RECORD):
        record = run.get(RECORD)
        if not target.put_if_absent(RECORD, record):
            same = json.loads(target.get(RECORD))["identity"] == json.loads(record)["identity"]
            if not same:
                raise CheckpointIncompatible(f"{config.to}: is the folder of another run; change to")
    size = 0
    with scratch_folder() as folder:
        path = folder / "file"
        for step in steps:
            store, manifest = open_checkpoint(run, step)
            copied = target.child(f"checkpoints/{step_folder(step)}")
            for entry in manifest.files:
                store.get_file(entry.name, path)
                if path.stat().st_size != entry.size or sha256_file(path) != entry.sha256:
                    raise CheckpointIncompatible(
                        f"{store.uri}/{entry.name}: is not what the manifest says; run "
                        f"`maskclip checkpoint repair {args.run}`"
                    )
                copied.put_file(entry.name, path)
                size += entry.size
            commit(copied, manifest)
    data = {"from": args.run, "to": config.to, "steps": steps, "bytes": size}
    return Result(data, Rows("copied", ("what", "value"), list(data.items())).table())


def pin(args: Args) -> Result:
    from system.checkpoints.checkpoint import open_checkpoint
    from system.checkpoints.retention import PINNED

    config = knobs(args, PinKnobs)
    store, _ = open_checkpoint(open_store(args.run), config.step)
    store.put(PINNED, json.dumps({"reason": config.reason}).encode())
    return Result({"step": config.step, "pinned": True}, f"{store.uri}: pinned")


def unpin(args: Args) -> Result:
    from system.checkpoints.checkpoint import step_folder
    from system.checkpoints.retention import PINNED

    step = knobs(args, PinKnobs).step
    store = open_store(args.run).child(f"checkpoints/{step_folder(step)}")
    if not store.exists(PINNED):
        raise ConfigError(f"{store.uri}: is not pinned; change step")
    store.delete(PINNED)
    return Result({"step": step, "pinned": False}, f"{store.uri}: not pinned any more")


def prune(args: Args) -> Result:
    """The newest checkpoint whose every byte verifies stays, and with it everything newer."""
    from system.checkpoints.checkpoint import committed_steps
    from system.checkpoints.config import CheckpointConfig
    from system.checkpoints.retention import Scores, delete_checkpoint, doomed, pinned_steps

    config = knobs(args, PruneKnobs)
    run, steps = open_store(args.run), []
    if config.keep_last:
        policy = CheckpointConfig(
            keep_last=config.keep_last,
            keep_every_steps=config.keep_every_steps,
            keep_best=config.keep_best,
        )
        committed = committed_steps(run)
        good = next((step for step in reversed(committed) if not check(run, step)), None)
        if good is None:
            raise CheckpointIncompatible(f"{args.run}: no checkpoint here verifies, so none is deleted")
        scores = Scores(run, config.keep_best)() if config.keep_best else {}
        steps = doomed(committed, good, policy, pinned_steps(run), scores)
    dead = dead_files(run, config.ended)
    freed = sum(size for _, size in dead)
    if not config.dry_run:
        freed += sum(delete_checkpoint(run, step) for step in steps)
        for key, _ in dead:
            run.delete(key)
    data = {
        "steps": steps,
        "leftovers": [key for key, _ in dead],
        "bytes": freed,
        "deleted": not config.dry_run,
    }
    return Result(data, Rows("prune", ("what", "value"), list(data.items())).table())


def dead_files(run: ObjectStore, ended: bool) -> list[tuple[str, int]]:
    """Files without a manifest of attempts that are dead: older than the newest one, which may be running."""
    from system.checkpoints.retention import leftovers

    return leftovers(run, newest_attempt(run) + int(ended))


def repair(args: Args) -> Result:
    """Damaged checkpoints lose their manifest to quarantine/; one in there whose files are whole again gets
    it back; files of dead attempts go."""
    from system.checkpoints.checkpoint import committed_steps
    from system.checkpoints.restore import quarantine

    config = knobs(args, RepairKnobs)
    run = open_store(args.run)
    problems = {step: found for step in committed_steps(run) if (found := check(run, step))}
    returned = [name for name in (info.key for info in run.list("quarantine/")) if whole_again(run, name)]
    dead = dead_files(run, config.ended)
    if not config.dry_run:
        for name in returned:
            record = json.loads(run.get(name))
            _put_back(run, record)
            run.delete(name)
        for step, found in problems.items():
            quarantine(run, step, found, None)
        for key, _ in dead:
            run.delete(key)
    data = {
        "quarantined": {str(step): found for step, found in problems.items()},
        "put_back": returned,
        "leftovers": [key for key, _ in dead],
        "done": not config.dry_run,
    }
    return Result(data, Rows("repair", ("what", "value"), list(data.items())).table())


def _quarantined(run: ObjectStore, record: dict[str, Any]) -> tuple[ObjectStore, Manifest]:
    """Folder and manifest of a quarantine record. Raises ValueError, KeyError or TypeError if it has none."""
    from system.checkpoints.checkpoint import step_folder

    document = json.loads(record["manifest"])
    files = tuple(FileEntry(e["name"], int(e["size"]), e["sha256"]) for e in document["files"])
    manifest = Manifest(document["kind"], int(document["version"]), files, document["meta"])
    return run.child(f"checkpoints/{step_folder(int(record['step']))}"), manifest


def whole_again(run: ObjectStore, name: str) -> bool:
    try:
        store, manifest = _quarantined(run, json.loads(run.get(name)))
        same_step = manifest.meta["step"] == json.loads(run.get(name))["step"]
        return same_step and not store.exists(MANIFEST) and verify(store, manifest) == []
    except (MaskClipError, ValueError, KeyError, TypeError):
        return False


def _put_back(run: ObjectStore, record: dict[str, Any]) -> None:
    commit(*_quarantined(run, record))


ACTIONS = (
    Action("copy", copy, "copy checkpoints to another run folder: to=RUN step=N, else all", CopyKnobs),
    Action("pin", pin, "keep a checkpoint whatever the retention says: step=N reason=...", PinKnobs),
    Action("unpin", unpin, "let the retention have it again: step=N", PinKnobs),
    Action("prune", prune, "delete old checkpoints and dead attempts' files: keep_last=N ...", PruneKnobs),
    Action("repair", repair, "set damaged checkpoints aside, put whole ones back, tidy up", RepairKnobs),
)
