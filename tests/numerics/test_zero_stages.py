"""Laws of the engine: every ZeRO stage is plain AdamW, and the state is free of topology."""

import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from cluster.events import read_events
from cluster.local_launch import run_local
from cluster.store import open_store
from model.losses import SingleProcess
from model.objective import Objective
from model.teacher import Teacher, ema_update_
from system.checkpoints.checkpoint import open_fragments
from system.engine.optim import build_optimizer, set_learning_rate
from system.schedules import at
from tests.support import engine_worker

STEPS = 10
KINDS = ("master", "exp_avg", "exp_avg_sq", "teacher")
CLIP = 0.5  # below every norm of these steps
OFFLOADED = {"offload_optimizer": True}


def run_worker(processes: int, *jobs: tuple) -> None:
    argv = [sys.executable, engine_worker.__file__, json.dumps(jobs)]
    assert run_local(argv, processes, None) == 0


def state(run: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: open_fragments(open_store(str(run)), step).everything(kind) for kind in KINDS}  # type: ignore[arg-type]


def losses(run: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_events(open_store(str(run))) if e["kind"] == "scalar"}


@cache
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


@pytest.mark.parametrize(
    ("processes", "every_settings"),
    [
        (
            2,
            [
                {"zero_stage": 0, "accumulation": 4, "gradient_clip": CLIP},
                {"zero_stage": 1},
                {"zero_stage": 2, "accumulation": 4, **OFFLOADED},
                {"zero_stage": 3, "gradient_clip": CLIP},
            ],
        ),
        (
            3,
            [
                {"zero_stage": 0},
                {"zero_stage": 1, "accumulation": 4, "gradient_clip": CLIP},
                {"zero_stage": 2},
                {"zero_stage": 3, "accumulation": 4, "offload_parameters": True, **OFFLOADED},
            ],
        ),
    ],
    ids=["2", "3"],
)
def test_every_stage_is_plain_adamw(tmp_path, processes, every_settings):
    """Whatever is sharded, offloaded or accumulated, and though nothing divides the global batch."""
    runs = [tmp_path / str(number) for number, _ in enumerate(every_settings)]
    run_worker(
        processes, *(("train", str(run), STEPS, s) for run, s in zip(runs, every_settings, strict=True))
    )
    for run, settings in zip(runs, every_settings, strict=True):
        found = state(run, STEPS)
        for kind, expected in plain(settings.get("gradient_clip", 0.0)).items():
            assert found[kind].keys() == expected.keys()
            for name, reference in expected.items():
                difference = (found[kind][name] - reference).norm() / reference.norm().clamp(min=1e-12)
                assert difference <= 1e-5, f"{settings}: {kind} {name} differs by {difference:.2e}"


def test_state_moves_between_stages_and_world_sizes_to_the_bit(tmp_path):
    """3 on 2 ranks -> 1 and offloaded 2 on 1 -> 3 and 0 on 3: read back after restore and save, nothing has
    changed."""
    runs = [str(tmp_path / name) for name in ("first", "a", "b", "c", "d")]
    run_worker(2, ("train", runs[0], 4, {"zero_stage": 3}))
    run_worker(
        1,
        ("resave", runs[0], runs[1], {"zero_stage": 1}),
        ("resave", runs[1], runs[2], {"zero_stage": 2, **OFFLOADED}),
    )
    run_worker(
        3, ("resave", runs[2], runs[3], {"zero_stage": 3}), ("resave", runs[3], runs[4], {"zero_stage": 0})
    )
    written = state(Path(runs[0]), 4)
    for run in runs[1:]:
        again = state(Path(run), 4)
        for kind in KINDS:
            assert written[kind].keys() == again[kind].keys()
            for name, tensor in written[kind].items():
                assert torch.equal(tensor, again[kind][name]), f"{kind} {name} differs in {run}"


def test_bf16_stages_agree(tmp_path):
    """Also stage 0, whose optimizer in DeepSpeed takes a step on zero gradients at start-up
    (docs/decisions). At stage 3 the same weights stand elsewhere in memory, and PyTorch's bf16 kernels for
    the CPU round differently there."""
    runs = {str(stage): {"zero_stage": stage, "precision": "bf16"} for stage in range(4)}
    runs["accumulated"] = {"zero_stage": 2, "precision": "bf16", "accumulation": 3}
    run_worker(2, *(("train", str(tmp_path / name), 5, settings) for name, settings in runs.items()))
    run_worker(1, ("train", str(tmp_path / "fp32"), 5, {"zero_stage": 1}))
    curves = {name: losses(tmp_path / name) for name in (*runs, "fp32")}
    tolerances = {"0": 1e-5, "2": 1e-5, "3": 5e-3, "accumulated": 5e-3, "fp32": 0.01}
    for step in range(1, 6):
        for name, tolerance in tolerances.items():
            assert curves[name][step] == pytest.approx(curves["1"][step], rel=tolerance), (name, step)
