"""Temporary folders go with their process, also with one that is killed."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster.scratch import PREFIX, scratch_folder
from tests.support.paths import ROOT

HOLD = """
import sys
from cluster.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "file").write_bytes(bytes(1000))
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def holder() -> tuple[subprocess.Popen[str], Path]:
    """A process with a folder, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_gone_afterwards(place: Path):
    with scratch_folder() as folder:
        (folder / "file").touch()
        assert folder.parent == place
    assert list(place.glob(f"{PREFIX}*")) == []


def test_a_killed_process_leaves_nothing_for_long_and_a_living_one_keeps_its_own(place: Path):
    (killed, left), (living, kept) = holder(), holder()
    mine = place / "maskclip-experiments"
    mine.mkdir()
    killed.kill()
    killed.wait()
    assert (left / "file").exists()
    with scratch_folder() as folder:
        assert sorted(place.glob(f"{PREFIX}*")) == sorted([kept, folder])
        assert (kept / "file").exists()
    living.communicate("")
    assert living.returncode == 0
    assert list(place.glob(f"{PREFIX}*")) == []
    assert mine.exists()
