"""What the doctor says of this machine, and of stores that are good, bad or away."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cluster.errors import StorageUnavailable
from cluster.store import StoreConfig
from cluster.store_local import LocalStore
from system import cli, doctor
from system.doctor import Check, run_checks


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def store_checks(uri: str) -> dict[str, Check]:
    return by_name(doctor._store(uri))


def test_this_machine_can_train(tmp_path: Path):
    checks = by_name(run_checks(str(tmp_path)))
    needed = ("python", "c++ compiler", "torch", "deepspeed", "store", "put-if-absent")
    assert {name: checks[name].status for name in needed} == dict.fromkeys(needed, "ok")
    assert {"gpu", "attention", "free disk", "shared memory", "open files", "determinism"} <= checks.keys()
    assert all(check.fix for check in checks.values() if check.status == "fail")
    assert list(tmp_path.iterdir()) == []


def test_store_check_leaves_no_folder_behind(tmp_path: Path):
    assert store_checks(str(tmp_path / "new/run"))["put-if-absent"].status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_s3_store_is_exclusive_and_left_empty(s3_env: str):
    checks = store_checks(f"{s3_env}/prefix")
    assert {check.status for check in checks.values()} == {"ok"}


def test_bucket_that_is_not_there(s3_env: str):
    (check,) = store_checks("s3://no-such-bucket-anywhere/prefix").values()
    assert check.status == "fail"
    assert "no-such-bucket-anywhere" in check.detail


def test_address_that_is_no_store(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for uri in (str(tmp_path / "file"), "ftp://host/path"):
        (check,) = store_checks(uri).values()
        assert check.status == "fail"
        assert check.fix


def test_a_store_that_is_away_is_69_and_says_what_failed_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setattr(doctor, "_deepspeed", list)  # seconds of import, and not what this is about
    assert cli.main(["doctor", "s3://bucket/prefix", "--json"]) == 69
    failed = [check for check in json.loads(capsys.readouterr().out) if check["status"] == "fail"]
    assert [check["name"] for check in failed] == ["store"]
    assert "delete" not in failed[0]["detail"]


class Full(LocalStore):
    """Everything that it is asked to write or delete fails."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        raise StorageUnavailable("the disk is full")

    def delete(self, key: str) -> None:
        raise StorageUnavailable("cannot delete")


def test_the_first_failure_is_told_and_not_that_of_the_cleaning_up(tmp_path: Path):
    with pytest.raises(StorageUnavailable, match="the disk is full"):
        doctor._probe(Full(str(tmp_path), StoreConfig()))


class Careless(LocalStore):
    """A store that ignores the condition, as some S3 servers do."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


def test_store_that_ignores_the_condition_fails(tmp_path: Path):
    checks = by_name(doctor._probe(Careless(str(tmp_path), StoreConfig())))
    assert checks["put-if-absent"].status == "fail"
    assert "8 of 8 writers" in checks["put-if-absent"].detail
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "status"),
    [("rich", "ok"), ("rich>=13", "ok"), ("rich>=9999", "fail"), ("no-such-package-here", "fail")],
)
def test_packages_are_compared_with_what_is_needed(line: str, status: str):
    check = doctor._package(Requirement(line))
    assert check.status == status
    assert ("pip install" in check.fix) is (status == "fail")


def test_missing_compiler_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (check,) = doctor._compiler()
    assert (check.status, "not found" in check.detail) == ("fail", True)
    monkeypatch.setenv("CXX", shutil.which(sys.executable) or sys.executable)
    assert doctor._compiler()[0].status == "ok"


def test_a_program_that_fails_or_hangs_gives_its_last_line():
    assert doctor._run([sys.executable, "-c", "raise ValueError('no')"], seconds=60) == "ValueError: no"
    assert "timed out" in str(doctor._run([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.5))
