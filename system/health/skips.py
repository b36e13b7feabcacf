"""Slot windows that a run leaves out, as part of its record (docs/decisions/0008).

A window is the slots of one global batch, [w*B, (w+1)*B), so it means the same at any world size. The record
`skips/window-000000123.json` is written when the run gives a window up. Which windows lie behind a checkpoint
stands in its meta: what was trained is not skipped afterwards.
"""

import json
from collections.abc import Sequence
from typing import Any

from cluster.errors import LossSpike, NonFinite
from cluster.store import ObjectStore
from data_pipeline.loading.order import window_of
from system.agreement import on_rank_zero

FOLDER = "skips/"


def recorded(run: ObjectStore) -> list[dict[str, Any]]:
    """All records of the run, by window."""
    found = [json.loads(run.get(info.key)) for info in run.list(FOLDER)]
    return sorted(found, key=lambda record: record["window"])


def skipped_windows(meta: dict[str, Any], step: int, records: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """Windows that a run leaves out that goes on from the checkpoint of `step` with this meta."""
    behind = tuple(meta.get("skipped_windows", ()))
    position = step + len(behind)
    return behind + tuple(record["window"] for record in records if record["window"] >= position)


def counted(step: int, skipped: tuple[int, ...]) -> dict[str, Any]:
    """For the meta of the checkpoint of `step`."""
    position = window_of(step, skipped)
    return {"skipped_windows": [window for window in skipped if window < position]}


def give_up_window(
    run: ObjectStore, error: type[NonFinite | LossSpike], record: dict[str, Any]
) -> NonFinite | LossSpike:
    """All ranks call it: record the window, or find that this step has failed before. The error that ends the
    attempt.

    Args:
        record: step, window, slots (first and last), reason, and whatever else is known.

    Raises:
        StorageUnavailable: the record could not be written.
    """
    before = on_rank_zero(lambda: _record(run, record))
    first, last = record["slots"]
    what = f"step {record['step']}, slots {first} to {last}: {record['reason']}"
    if before is None:
        return error(
            f"{what}; the next attempt goes on from the newest checkpoint without these slots: run the same "
            "command"
        )
    return error(
        f"{what}; slots {before['slots'][0]} to {before['slots'][1]} were left out at this step before, so "
        "it is not the samples: begin a new run with a lower optimizer.lr, or go on from an older checkpoint"
    )


def _record(run: ObjectStore, record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier failure at the same step, if there is one; else this one is written."""
    for known in recorded(run):
        if known["step"] == record["step"]:
            return known
    name = f"{FOLDER}window-{record['window']:09d}.json"
    run.put_if_absent(name, json.dumps(record, indent=1, sort_keys=True).encode())
    return None
