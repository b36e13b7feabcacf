"""What a machine lacks is said at once, one line for each thing, before anything is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "requirements/prerequisites.sh"


def run(venv: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), str(venv)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )


def test_prints_the_interpreter(tmp_path: Path):
    (tmp_path / ".stamp").touch()  # what is installed needs little disk any more
    result = run(tmp_path)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, sys.executable, "")


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"PYTHON": "no-such-python"}, ["PYTHON=no-such-python"]),
        ({"CXX": "no-such-compiler"}, ["no-such-compiler"]),
        (
            {"PYTHON": "no-such-python", "CXX": "no-such-compiler"},
            ["PYTHON=no-such-python", "no-such-compiler"],
        ),
    ],
    ids=["python", "compiler", "both"],
)
def test_names_each_missing_thing_in_one_line(tmp_path: Path, environment: dict[str, str], named: list[str]):
    (tmp_path / ".stamp").touch()
    result = run(tmp_path, **environment)
    lines = result.stderr.splitlines()
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(lines) == len(named)
    assert all(line.startswith("missing: ") and name in line for line, name in zip(lines, named, strict=True))
