"""Law: the teacher in shards is an unsharded fp32 EMA to the bit, and its compute copy is its master."""

import sys
from pathlib import Path

import pytest

from cluster.local_launch import run_local
from tests.support import teacher_worker


@pytest.mark.parametrize(
    ("stage", "precision", "processes"), [(0, "fp32", 2), (1, "fp32", 2), (2, "bf16", 3)]
)
def test_sharded_teacher_equals_unsharded_ema(stage, precision, processes):
    argv = [sys.executable, teacher_worker.__file__, str(stage), precision]
    root = Path(__file__).resolve().parents[2]  # the worker shares code with another one
    assert run_local(argv, processes, {"PYTHONPATH": str(root)}) == 0
