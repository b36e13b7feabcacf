"""Law: the teacher in shards is an unsharded fp32 EMA to the bit, and its compute copy is its master."""

import json
import sys

import pytest

from cluster.local_launch import run_local
from tests.support import teacher_worker
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("processes", "every_settings"),
    [
        (1, [{"zero_stage": 3, "precision": "bf16", "offload_optimizer": True}]),
        (2, [{"zero_stage": 0}, {"zero_stage": 1, "accumulation": 4}, {"zero_stage": 3, "accumulation": 2}]),
        (3, [{"zero_stage": 2, "precision": "bf16"}, {"zero_stage": 3, "precision": "bf16"}]),
    ],
    ids=["1", "2", "3"],
)
def test_sharded_teacher_equals_unsharded_ema(processes, every_settings):
    argv = [sys.executable, teacher_worker.__file__, json.dumps(every_settings)]
    assert run_local(argv, processes, {"PYTHONPATH": str(ROOT)}) == 0
