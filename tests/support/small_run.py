"""Run folders as a trainer leaves them, made without one: configuration, events, checkpoints."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from cluster.events import EventLog, claim_attempt
from cluster.manifest import Manifest, commit, file_entry
from cluster.store import ObjectStore, open_store
from data_pipeline.catalog import load_dataset
from model.config import ModelConfig, preset
from model.objective import Objective
from system.checkpoints.checkpoint import KIND, VERSION, sealed, step_folder
from system.config import DataConfig, RunConfig, TrainConfig
from system.run_folder import claim_run, describe_run

STEPS, KILLED_AFTER, CHECKPOINTS = 12, 9, (6, 12)
FILES = 2

Parameters = dict[str, torch.Tensor]


def run_config(uri: str, data: str, model: ModelConfig | None = None) -> TrainConfig:
    return TrainConfig(
        run=RunConfig(uri=uri, steps=STEPS, seed=5),
        data=DataConfig(uri=data, global_batch=8, streams=1),
        model=model or preset("test"),
    )


def write_run(uri: str, data: str, model: ModelConfig | None = None) -> ObjectStore:
    """A finished run on the committed data set `data`: killed after step 9, resumed from step 6."""
    run, config = open_store(uri), run_config(uri, data, model)
    digest = load_dataset(data).digest
    claim_run(run, config, digest)
    for step in CHECKPOINTS:
        write_checkpoint(run, config, digest, step)
    write_events(run)
    return run


def student_and_teacher(config: TrainConfig, step: int) -> tuple[Parameters, Parameters]:
    """Weights that differ by step, and between the towers."""
    student = {name: p.detach() for name, p in Objective(config.model, seed=step).named_parameters()}
    averaged = {n: p + 0.05 for n, p in student.items() if n.startswith(("vision.", "quantizer."))}
    return student, averaged


def write_checkpoint(run: ObjectStore, config: TrainConfig, dataset: str, step: int) -> None:
    """In the documented format, every parameter cut in pieces over two files."""
    student, teacher = student_and_teacher(config, step)
    kinds = {"master": student, "exp_avg": student, "exp_avg_sq": student, "teacher": teacher}
    files: list[Parameters] = [{} for _ in range(FILES)]
    for kind, parameters in kinds.items():
        for name, parameter in parameters.items():
            cut = parameter.numel() // 3
            for file, start, end in ((0, 0, cut), (1, cut, parameter.numel())):
                if start < end:
                    files[file][f"{kind}/{name}/{start}"] = parameter.flatten()[start:end].clone()
    files[0]["state/teacher.centre/0"] = torch.zeros(config.model.distill.codewords)
    store = run.child(f"checkpoints/{step_folder(step)}")
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        for rank, tensors in enumerate(files):
            path = Path(folder, f"rank-{rank:05d}.safetensors")
            save_file(tensors, path)
            store.put_file(path.name, path)
            entries.append(file_entry(path, path.name))
    seen = step * config.data.global_batch
    shapes = {name: list(parameter.shape) for name, parameter in student.items()}
    meta = {
        **describe_run(config, dataset),
        "step": step,
        "slot": seen,
        "samples_seen": seen,
        "refused_steps": 0,
        "state_digest": f"{step:016x}",
        "parameters": shapes,
    }
    commit(store, sealed(Manifest(KIND, VERSION, tuple(entries), meta)))


def write_events(run: ObjectStore) -> None:
    """Two ranks, two attempts: the first leaves no end, the second goes on from step 6 and finishes."""
    facts = {"processes": 2, "zero_stage": 1, "precision": "bf16"}
    for first, last, resumed in ((1, KILLED_AFTER, None), (CHECKPOINTS[0] + 1, STEPS, CHECKPOINTS[0])):
        attempt = claim_attempt(run)
        logs = [EventLog(run, attempt, rank, flush_seconds=60) for rank in range(2)]
        for log in logs:
            log.instant("attempt_started", resumed_step=resumed, **facts)
        for step in range(first, last + 1):
            values = {"image_text": 2.0 / step, "lr": 1e-3, "grad_norm": 1.0, "pairs_per_second": 30.0}
            logs[0].scalar(step, loss=5.0 / step + 0.01 * attempt, **values)
            if step in CHECKPOINTS:
                logs[0].instant("checkpoint_committed", step=step, seconds=0.2, bytes=1000)
        for log in logs:
            if last == STEPS:
                log.instant("attempt_ended", reason="finished", exit_code=0)
            log.close()
