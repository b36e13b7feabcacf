"""Laws of the engine: every ZeRO stage is plain AdamW, and the state is free of topology."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.events import read_events
from cluster.local_launch import run_local
from cluster.store import open_store
from model.losses import SingleProcess
from model.objective import Objective
from model.teacher import Teacher, ema_update_
from system.checkpoint import read_parameters
from system.optim import build_optimizer, set_learning_rate
from system.schedules import at
from tests.support import engine_worker

STEPS = 10
KINDS = ("master", "exp_avg", "exp_avg_sq", "teacher")


def run_worker(run: Path, steps: int, processes: int, **settings: Any) -> None:
    argv = [sys.executable, engine_worker.__file__, "train", str(run), str(steps), json.dumps(settings)]
    assert run_local(argv, processes, None) == 0


def state(run: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: read_parameters(open_store(str(run)), step, kind) for kind in KINDS}  # type: ignore[arg-type]


def losses(run: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_events(open_store(str(run))) if e["kind"] == "scalar"}


CLIP = 0.5  # lower than every norm of these steps


@pytest.fixture(scope="module", params=[0.0, CLIP])
def clip(request) -> float:
    return request.param


@pytest.fixture(scope="module")
def plain(clip: float) -> dict[str, dict[str, torch.Tensor]]:
    """Ten steps of PyTorch's AdamW on the whole batch in one process: no DeepSpeed, no engine of ours."""
    config = engine_worker.worker_config("none", STEPS, {})
    objective = Objective(config.model, seed=config.run.seed)
    teacher = Teacher(config.model)
    teacher.load_student(objective)
    optimizer = build_optimizer(objective, config.optimizer)
    followed = dict(objective.named_parameters())
    for step in range(STEPS):
        values = at(step, config)
        set_learning_rate(optimizer, values.lr)
        output = objective(
            engine_worker.made_up_batch(step), teacher, values.teacher_temperature, SingleProcess()
        )
        output.loss.backward()
        if clip:
            assert torch.nn.utils.clip_grad_norm_(objective.parameters(), clip) > clip
        optimizer.step()
        optimizer.zero_grad()
        students = [followed[name].detach() for name, _ in teacher.named_parameters()]
        ema_update_(list(teacher.parameters()), students, values.momentum)
        teacher.update_centre_(output.centre_K, config.model.distill.centre_momentum)
    return {
        "master": {name: p.detach() for name, p in objective.named_parameters()},
        "teacher": {name: p.detach() for name, p in teacher.named_parameters()},
    }


@pytest.mark.parametrize(("stage", "processes"), [(0, 2), (1, 2), (2, 2), (2, 3)])
def test_every_stage_is_plain_adamw(tmp_path, plain, stage, processes):
    run_worker(tmp_path, stage, "fp32", STEPS, processes)
    found = state(tmp_path, STEPS)
    for kind, expected in plain.items():
        assert found[kind].keys() == expected.keys()
        for name, reference in expected.items():
            difference = (found[kind][name] - reference).norm() / reference.norm().clamp(min=1e-12)
            assert difference <= 1e-5, f"{kind} {name}: relative difference {difference:.2e}"


def test_state_moves_between_stages_and_world_sizes_to_the_bit(tmp_path):
    """ZeRO-2 on 2 ranks -> ZeRO-1 on 1 -> ZeRO-0 on 3: read back after restore and save, nothing has
    changed."""
    run_worker(tmp_path, 2, "fp32", 4, 2)
    written = state(tmp_path, 4)
    for stage, processes in ((1, 1), (0, 3)):
        copy = tmp_path / f"stage{stage}"
        run_worker_resave(tmp_path, copy, stage, processes)
        again = state(copy, 4)
        for kind in KINDS:
            assert written[kind].keys() == again[kind].keys()
            for name, tensor in written[kind].items():
                assert torch.equal(tensor, again[kind][name]), f"{kind} {name} differs at stage {stage}"


def run_worker_resave(source: Path, target: Path, stage: int, processes: int) -> None:
    argv = [sys.executable, engine_worker.__file__, "resave", str(source), str(target), str(stage)]
    assert run_local(argv, processes, None) == 0


def test_bf16_stages_agree(tmp_path):
    """Also stage 0, whose optimizer in DeepSpeed takes a step on zero gradients at start-up
    (docs/decisions)."""
    curves = {}
    for stage in (0, 1, 2):
        run_worker(tmp_path / f"bf16-{stage}", stage, "bf16", 5, 2)
        curves[stage] = losses(tmp_path / f"bf16-{stage}")
    run_worker(tmp_path / "fp32", 1, "fp32", 5, 1)
    full = losses(tmp_path / "fp32")
    for step in range(1, 6):
        assert curves[0][step] == pytest.approx(curves[1][step], rel=1e-5)
        assert curves[2][step] == pytest.approx(curves[1][step], rel=1e-5)
        assert curves[1][step] == pytest.approx(full[step], rel=0.01)
