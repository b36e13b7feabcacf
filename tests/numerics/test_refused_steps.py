"""Law: a step that is refused leaves nothing behind, and is counted."""

import sys
from pathlib import Path

from cluster.local_launch import run_local
from tests.support import refusal_worker


def test_a_refused_step_leaves_nothing_behind_at_any_stage(tmp_path):
    argv = [sys.executable, refusal_worker.__file__, str(tmp_path)]
    root = Path(__file__).resolve().parents[2]  # the worker shares code with another one
    assert run_local(argv, 2, {"PYTHONPATH": str(root)}) == 0
