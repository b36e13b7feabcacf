"""Law: a step that is refused leaves nothing behind, and is counted."""

import sys

from cluster.local_launch import run_local
from tests.support import refusal_worker
from tests.support.paths import ROOT


def test_a_refused_step_leaves_nothing_behind_at_any_stage(tmp_path):
    argv = [sys.executable, refusal_worker.__file__, str(tmp_path)]
    assert run_local(argv, 2, {"PYTHONPATH": str(ROOT)}) == 0
