"""Of several drivers of one output the newest works; a commit excludes all others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ManifestMismatch, Superseded
from cluster.manifest import MANIFEST, Manifest
from cluster.store import ObjectStore, open_store
from cluster.store_local import LocalStore
from data_pipeline.job import ledger
from data_pipeline.job.drivers import commit_manifest, require_newest, take_over

MINE, OTHER = Manifest("dataset", 1, (), {"of": "mine"}), Manifest("dataset", 1, (), {"of": "another"})


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "set"))


def test_the_newest_driver_works_and_the_others_end(store: ObjectStore) -> None:
    drivers = []
    for number in range(3):
        drivers.append(take_over(store, "same input"))
        require_newest(store, drivers[-1])
        for old in drivers[:number]:
            with pytest.raises(Superseded, match="another job took over"):
                require_newest(store, old)
    with pytest.raises(Superseded, match="another job took over"):
        commit_manifest(store, drivers[0], OTHER)
    assert not store.exists(MANIFEST)
    commit_manifest(store, drivers[2], MINE)
    assert store.get(MANIFEST) == MINE.to_bytes()


def test_a_commit_that_died_is_finished_by_who_comes_next(store: ObjectStore) -> None:
    old = take_over(store, "x")
    commit_manifest(store, take_over(store, "x"), MINE)
    store.delete(MANIFEST)  # as if the driver had died between its last two steps
    with pytest.raises(Superseded, match="has committed"):
        take_over(store, "y")
    assert store.get(MANIFEST) == MINE.to_bytes()
    with pytest.raises(Superseded):
        commit_manifest(store, old, OTHER)
    assert store.get(MANIFEST) == MINE.to_bytes()


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (0, ["took over", "superseded"]),  # before the manifest is laid ready
        (1, ["took over", "superseded"]),  # before the number is taken
        (2, ["came late", "committed"]),  # before the manifest has its name
        (3, ["committed"]),
    ],
)
def test_nobody_takes_over_in_the_midst_of_a_commit(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, step: int, wanted: list[str]
) -> None:
    """Another driver comes before one of the writes of the commit: either it wins, or the commit does."""
    driver = take_over(store, "x")
    outcomes: list[str] = []
    left = step
    real = LocalStore._run

    def other_comes(self: LocalStore, operation: str, key: str, attempt: Any) -> Any:
        nonlocal left
        if operation in ("put", "put_if_absent"):
            left -= 1
            if left == -1:
                outcomes.append(outcome(lambda: take_over(store, "y"), "took over", "came late"))
        return real(self, operation, key, attempt)

    monkeypatch.setattr(LocalStore, "_run", other_comes)
    outcomes.append(outcome(lambda: commit_manifest(store, driver, MINE), "committed", "superseded"))
    assert outcomes == wanted
    assert store.exists(MANIFEST) == (wanted[-1] == "committed")


def outcome(do: Callable[[], object], done: str, superseded: str) -> str:
    """Which of the two words fits."""
    try:
        do()
    except Superseded:
        return superseded
    return done


def test_a_driver_of_before_a_commit_is_not_one_of_after_it(store: ObjectStore) -> None:
    old = take_over(store, "x")
    ledger.delete_under(store, ledger.LEDGER)
    new = take_over(store, "x")
    assert new.number == old.number
    require_newest(store, new)
    with pytest.raises(Superseded):
        require_newest(store, old)


def test_a_manifest_that_is_there_is_never_replaced(store: ObjectStore) -> None:
    driver = take_over(store, "x")
    store.put(MANIFEST, OTHER.to_bytes())
    with pytest.raises((Superseded, ManifestMismatch)):
        commit_manifest(store, driver, MINE)
    with pytest.raises(Superseded):
        take_over(store, "x")
    assert store.get(MANIFEST) == OTHER.to_bytes()
