"""Exit codes, pickling, and the rank of a process."""

from __future__ import annotations

import pickle

import pytest

from cluster import errors
from cluster.errors import ConfigError, MaskClipError, exit_code_of
from cluster.world import World

CODES = {
    "ConfigError": 64,
    "Superseded": 64,
    "DataError": 65,
    "ShardCorrupt": 65,
    "ManifestMismatch": 65,
    "ObjectNotFound": 65,
    "CheckpointIncompatible": 66,
    "StorageUnavailable": 69,
    "MaskClipError": 70,
    "Preempted": 75,
    "NonFinite": 76,
    "LossSpike": 76,
    "DeviceFault": 77,
    "Hang": 77,
    "Interrupted": 130,
}


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_every_error_has_its_exit_code_and_survives_pickling(name: str, code: int) -> None:
    error = getattr(errors, name)("shard-000003.tar: broken at byte 512; copy it again")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert exit_code_of(copy) == code
    assert error.action in {"human", "restart", "restart_free", "rollback", "stop"}


def test_every_error_class_is_in_the_table() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(CODES)
    assert all(issubclass(getattr(errors, name), MaskClipError) for name in defined)


def test_foreign_exceptions_have_codes_too() -> None:
    assert exit_code_of(KeyboardInterrupt()) == 130
    assert exit_code_of(RuntimeError("?")) == 70


def set_world(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_world_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    set_world(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
    assert World.from_env() == World(rank=5, size=8, local_rank=1, local_size=4)


def test_no_launcher_is_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    set_world(monkeypatch)
    assert World.from_env() == World(rank=0, size=1, local_rank=0, local_size=1)


@pytest.mark.parametrize(
    "values",
    [
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    ],
)
def test_nonsense_in_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str]
) -> None:
    set_world(monkeypatch, **values)
    with pytest.raises(ConfigError, match="RANK"):
        World.from_env()
