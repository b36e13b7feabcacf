"""A preprocess whose driver and workers are killed again and again is the same, byte for byte."""

from __future__ import annotations

from pathlib import Path

from tests.support.crash_rig import crash


def test_kills_leave_no_trace(tmp_path: Path) -> None:
    outcome, files = crash(kills=5, seed=7, folder=tmp_path)
    assert outcome.kills == 5
    assert outcome.commits >= 1
    assert files > 40  # 24 files of rows, at least 12 shards with an index, and the manifest
    assert outcome.wrong_files == []
    assert outcome.audit_problems == []
