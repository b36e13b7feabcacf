"""Law: the norms by tower add up to what the engine and the weights themselves say, at every ZeRO stage."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.local_launch import run_local
from tests.support import norms_worker
from tests.support.paths import ROOT

SETTINGS: list[dict[str, Any]] = [{"zero_stage": stage, "precision": "fp32"} for stage in (0, 1, 2, 3)]
SETTINGS += [
    {"zero_stage": 1, "precision": "bf16"},
    {"zero_stage": 3, "precision": "fp32", "offload_optimizer": True},
]


def test_norms_add_up_at_every_stage(tmp_path: Path):
    argv = [sys.executable, norms_worker.__file__, str(tmp_path), *map(json.dumps, SETTINGS)]
    assert run_local(argv, 2, {"PYTHONPATH": str(ROOT)}) == 0
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/found.json"))]
    assert [result["settings"] for result in found] == SETTINGS
    for result in found:
        rounding = 1e-2 if result["settings"]["precision"] == "bf16" else 1e-4
        measured = [event for event in result["steps"] if "grad_norm_vision" in event]
        assert [event["step"] for event in measured] == [1, 3]  # every second step, from the first on
        for event in measured:
            towers = sum(event[f"grad_norm_{tower}"] ** 2 for tower in ("vision", "text", "heads"))
            assert towers**0.5 == pytest.approx(event["grad_norm"], rel=rounding), result["settings"]
        last = measured[-1]
        whole = sum(last[f"param_norm_{tower}"] ** 2 for tower in ("vision", "text", "heads"))
        assert whole == pytest.approx(result["known"]["param_square"], rel=1e-4)
        vision = last["param_norm_vision"] ** 2
        assert vision == pytest.approx(result["known"]["param_square_vision"], rel=1e-4)
        assert 0.99 < last["teacher_cosine"] < 1.0
