"""The planner's bytes are those of a real run on the CPU: within 5 % what a rank holds between steps and what
the forward leaves for the backward, within 10 % the most of a whole step."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from model.config import preset
from model.losses import SingleProcess
from model.objective import Objective
from model.teacher import Teacher
from system.planning.activations import activation_bytes, made_up_batch
from system.planning.memory import Shapes, rank_memory
from system.planning.storage_tracker import StorageTracker
from tests.support import memory_worker
from tests.support.memory_worker import BATCH, CAPTION_TOKENS, worker_config

SETTINGS = [{"zero_stage": stage, "precision": "bf16"} for stage in range(4)]
SETTINGS += [{"zero_stage": stage, "precision": "fp32"} for stage in (0, 1)]
LAUNCH = """
import sys
from cluster.local_launch import run_local
sys.exit(run_local([sys.executable, *sys.argv[1:]], 2, None))
"""


def test_memory_of_a_rank_is_what_a_run_allocates():
    argv = [sys.executable, "-c", LAUNCH, memory_worker.__file__, json.dumps(SETTINGS)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for settings, found in zip(SETTINGS, json.loads(done.stdout.splitlines()[-1]), strict=True):
        config = worker_config(settings)
        per_pair = activation_bytes(config.model, settings["precision"], CAPTION_TOKENS)
        memory = rank_memory(config, Shapes.of(config), settings["zero_stage"], 2, per_pair)
        assert found["activations"] == pytest.approx(memory.activations + memory.gathered, rel=0.05), settings
        assert found["state"] == pytest.approx(memory.state, rel=0.05), settings
        assert found["peak"] == pytest.approx(memory.device, rel=0.1), settings


@pytest.mark.parametrize("changes", [{"recompute_every": 2}, {"recompute_every": 0}])
def test_activations_of_the_whole_model_follow_from_a_few_layers(changes):
    config = replace(preset("tiny"), **changes)
    objective, teacher = Objective(config, seed=0), Teacher(config)
    batch = made_up_batch(config, BATCH, CAPTION_TOKENS)
    with StorageTracker() as tracker:
        output = objective(batch, teacher, 0.05, SingleProcess())
        found = tracker.alive
    del output
    assert found == pytest.approx(BATCH * activation_bytes(config, "fp32", CAPTION_TOKENS), rel=0.05)
