"""Which driver of a preprocess job works on an output, and how its commit excludes all others.

Drivers do not share the work: each takes the output over from the one before, by an object with the next
number (`ledger/driver-000002.json`). The tasks of the one before look at it before they put anything, and
end. A commit takes the next number itself, so nobody can take over in its midst; a driver that comes after a
commit that died finishes it. A put that was under way when another driver took over is not called back: it
would have to last longer than the whole work of the other to reach a committed file.
"""

from __future__ import annotations

import json
import secrets
from contextlib import suppress
from dataclasses import dataclass

from cluster import manifest as manifests
from cluster.errors import ObjectNotFound, Superseded
from cluster.manifest import MANIFEST, Manifest
from cluster.store import ObjectStore
from data_pipeline.job.ledger import LEDGER, canonical

DRIVERS = f"{LEDGER}driver-"


@dataclass(frozen=True)
class Driver:
    """One run of a job, and its place among those that took the output over."""

    number: int
    record: bytes
    """What its object holds; the token in it tells it from a driver with the same number after a commit."""


def take_over(store: ObjectStore, inputs: str) -> Driver:
    """Become the newest driver of the claimed folder, for the input with this digest.

    Raises Superseded when the data set is committed; a commit that was begun is finished here.
    """
    record = canonical({"inputs": inputs, "token": secrets.token_hex(8)})
    names = [key for key, _ in store.list(DRIVERS)]
    number = int(names[-1].removeprefix(DRIVERS).partition(".")[0]) if names else 1
    while not store.put_if_absent(_driver_key(number), record):
        begun = json.loads(store.get(_driver_key(number))).get("commit")
        if begun is not None:
            store.put_if_absent(MANIFEST, store.get(begun))
            break
        number += 1
    driver = Driver(number, record)
    require_newest(store, driver)  # the manifest may be there since the caller looked
    return driver


def require_newest(store: ObjectStore, driver: Driver | None) -> None:
    """Raises Superseded when another driver took over or the data set is committed (None: nobody asks)."""
    if driver is None:
        return
    if store.exists(MANIFEST):
        raise Superseded(f"{store.uri}: another job has committed this data set; run again to look at it")
    key = _driver_key(driver.number)
    names = [key for key, _ in store.list(DRIVERS)]
    with suppress(ObjectNotFound):
        if names and names[-1] == key and store.get(key) == driver.record:
            return
    raise _taken_over(store)


def commit_manifest(store: ObjectStore, driver: Driver, manifest: Manifest) -> None:
    """Put the manifest, unless another driver took over.

    Raises:
        Superseded: another driver did.
        ManifestMismatch: another data set is committed.
    """
    require_newest(store, driver)
    begun = f"{LEDGER}manifest-{driver.number:06d}.json"
    store.put(begun, manifest.to_bytes())
    # The step that decides. From here on nobody can take over, and a driver that comes puts this manifest.
    if not store.put_if_absent(_driver_key(driver.number + 1), canonical({"commit": begun})):
        raise _taken_over(store)
    manifests.commit(store, manifest)


def _driver_key(number: int) -> str:
    return f"{DRIVERS}{number:06d}.json"


def _taken_over(store: ObjectStore) -> Superseded:
    return Superseded(
        f"{store.uri}: another job took over this output; wait for it, or run this one again to take over"
    )
