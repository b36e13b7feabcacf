"""Law: the teacher in shards is an unsharded fp32 EMA to the bit, and its compute copy is its master."""

import json
import sys
from pathlib import Path

import pytest

from cluster.local_launch import run_local
from tests.support import teacher_worker


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, {"zero_stage": 0}),
        (2, {"zero_stage": 1, "accumulation": 4}),
        (3, {"zero_stage": 2, "precision": "bf16"}),
        (3, {"zero_stage": 3}),
        (1, {"zero_stage": 3, "precision": "bf16", "offload_optimizer": True}),
    ],
)
def test_sharded_teacher_equals_unsharded_ema(processes, settings):
    argv = [sys.executable, teacher_worker.__file__, json.dumps(settings)]
    root = Path(__file__).resolve().parents[2]  # the worker shares code with another one
    assert run_local(argv, processes, {"PYTHONPATH": str(root)}) == 0
