"""Does the method work? CLIP, + MLM, + self-distillation and both, on two real sets, tested on a new style.

    python -m benchmarks.method_study            # trains what is missing: 20 minutes of one core for all
    python -m benchmarks.method_study --report docs/images/method-2026-11-24.png     # tables and plot

Both sets show emoji, in two flat styles for training and in a rendered one for the test (examples/emoji).
Every recipe configs/study_*.yaml is trained with each seed twice: with as many samples as all the others, and
with as many as the FLOPs of the whole method pay for. What the paper's chain of targets has besides is
trained with equal samples on the first set. A run is one thread and one process without DeepSpeed: passes in
bf16, masters in fp32, as in the engine. It leaves a JSON file with the rank of the right answer to each
query.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.common import BUILD, ROOT
from benchmarks.method_report import report
from cluster.manifest import MANIFEST
from cluster.world import World
from model.flops import flops_per_pair
from model.losses import SingleProcess
from model.masking import corrupt_tokens
from model.objective import Objective
from model.teacher import Teacher, ema_update_
from model.text import cut_to_longest
from system.build import build_loader
from system.config import TrainConfig, load_train_recipe
from system.engine.optim import build_optimizer, set_learning_rate
from system.evaluation.config import EvaluateConfig
from system.evaluation.encoder import Encoder, Share, no_report
from system.evaluation.knn import knn_votes
from system.evaluation.retrieval import right_ranks
from system.evaluation.scoring import label_ranks
from system.evaluation.tasks import FeatureEvaluation
from system.schedules import at

FOLDER = BUILD / "study"
STEPS = {"emoji": 80, "every-emoji": 120}
"""Steps of equal samples, by set: 600 concepts, and all 1,562 that three styles draw."""
STUDY = ("clip", "mlm", "distill", "maskclip")
CHAIN = ("pixels", "features")
"""What the paper's chain has besides: CLIP, pixels, features, EMA (distill), + MLM (maskclip)."""


@dataclass(frozen=True)
class Job:
    """One training and its measurement."""

    data: str
    variant: str
    seed: int
    steps: int

    @property
    def file(self) -> Path:
        return FOLDER / "results" / f"{self.data}-{self.variant}-seed{self.seed}-{self.steps}.json"

    def config(self) -> TrainConfig:
        knobs = (f"run.steps={self.steps}", f"run.seed={self.seed}", f"data.uri={data(self.data, 'train')}")
        return load_train_recipe(str(ROOT / f"configs/study_{self.variant}.yaml"), [*knobs])


def jobs(seeds: int) -> Iterator[Job]:
    """Seeds outermost, so that what is there after any time is balanced; a shared run comes once."""
    for seed in range(seeds):
        for name, steps in STEPS.items():
            yield from (Job(name, variant, seed, steps) for variant in STUDY)
            for variant in STUDY[:-1]:
                paid = steps * gflop_per_pair(name, "maskclip") / gflop_per_pair(name, variant)
                yield Job(name, variant, seed, round(paid))
    for seed in range(seeds):
        yield from (Job("emoji", variant, seed, STEPS["emoji"]) for variant in CHAIN)


def data(name: str, part: str) -> Path:
    return FOLDER / "data" / name / part


def prepare() -> None:
    """The committed sets, from examples/emoji and from the packages that its builder names."""
    every = BUILD / "emoji-all"
    if not every.exists():
        command = [sys.executable, str(ROOT / "examples/emoji/build_emoji.py"), "--every", str(every)]
        subprocess.run(command, check=True)
    for name, source in (("emoji", ROOT / "examples/emoji"), ("every-emoji", every)):
        for part in ("train", "eval"):
            if (data(name, part) / MANIFEST).exists():
                continue
            recipe = ROOT / f"configs/emoji_{part}_data.yaml"
            command = [sys.executable, "-m", "system.cli", "preprocess", str(recipe)]
            command += [f"source.uri={source / part}", f"output={data(name, part)}"]
            subprocess.run(command, check=True, cwd=ROOT)


@cache
def gflop_per_pair(name: str, variant: str) -> float:
    """Training FLOPs of a pair by formula, with the captions of the first 20 batches; in 1e9."""
    config = Job(name, variant, 0, 20).config()
    found = []
    for batch in build_loader(config, World.from_env()).batches(0, 20):
        tokens = cut_to_longest(batch["tokens"], config.model.text)
        _, hidden = corrupt_tokens(
            0, batch["epoch"], batch["id"], tokens, config.model.mlm.mask_ratio, config.model.text
        )
        words = float(hidden.sum()) / len(tokens)
        found.append(flops_per_pair(config.model, tokens.shape[1], words).training)
    return statistics.mean(found) / 1e9


def train(config: TrainConfig) -> tuple[Objective, float]:
    """The fp32 masters after the run, and the mean loss of its last ten steps."""
    masters = Objective(config.model, seed=config.run.seed)
    student = Objective(config.model, seed=config.run.seed).bfloat16()
    teacher, averaged = None, None
    if config.model.distill.needs_teacher:
        averaged = Teacher(config.model)
        averaged.load_student(masters)
        teacher = Teacher(config.model)
        teacher.load_student(masters)
        teacher = teacher.bfloat16()
    optimizer = build_optimizer(masters, config.optimizer)
    losses = []
    for step, batch in enumerate(build_loader(config, World.from_env()).batches(0, config.run.steps)):
        scheduled = at(step, config)
        set_learning_rate(optimizer, scheduled.lr)
        output = student(batch, teacher, scheduled.teacher_temperature, SingleProcess())
        output.loss.backward()
        losses.append(float(output.total))
        for master, parameter in zip(masters.parameters(), student.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters.parameters(), student.parameters(), strict=True):
                parameter.copy_(master)
        if teacher is not None and averaged is not None:
            followed = dict(masters.named_parameters())
            names = [name for name, _ in averaged.named_parameters()]
            ema_update_(
                averaged.parameters(), [followed[name].detach() for name in names], scheduled.momentum
            )
            teacher.load_student(averaged)
            if output.centre_K is not None:
                teacher.update_centre_(output.centre_K, config.model.distill.centre_momentum)
    return masters.eval(), statistics.mean(losses[-10:])


@torch.no_grad()
def measure(model: Objective, name: str) -> dict[str, list[int]]:
    """Rank (0 = first) of the right answer to every query, by task. k-NN asks which of the concepts a test
    picture shows, with the training pictures as neighbours."""
    config = EvaluateConfig(
        data=str(data(name, "eval")),
        train=str(data(name, "train")),
        label="meta.concept",
        tasks=("retrieval", "knn"),
    )
    evaluation = FeatureEvaluation(config, config.tasks)
    encoder = Encoder(model, model.vision, torch.device("cpu"), config.batch, Share())
    features = evaluation.encode(encoder, lambda _stage: no_report)
    width = model.config.embed_dim
    image_NE, class_ND = features["images"][:, :width], features["images"][:, width:]
    text_N, image_N = evaluation.groups.group_N, torch.arange(len(image_NE))
    labels, classes = torch.from_numpy(evaluation.train_label_M), len(evaluation.images.class_names)
    votes_NC = knn_votes(
        class_ND, features["train"][:, width:], labels, classes, k=config.k, temperature=config.temperature
    )
    ranks = {
        "image_to_text": right_ranks(image_NE, features["texts"], text_N, image_N),
        "text_to_image": right_ranks(features["texts"], image_NE, image_N, text_N),
        "knn": label_ranks(votes_NC, torch.from_numpy(evaluation.images.label_N)),
    }
    return {task: found.tolist() for task, found in ranks.items()}


def run(job: Job) -> str:
    torch.set_num_threads(1)
    started, config = time.process_time(), job.config()
    model, loss = train(config)
    result = {
        **asdict(job),
        "pairs": job.steps * config.data.global_batch,
        "gflop": job.steps * config.data.global_batch * gflop_per_pair(job.data, job.variant),
        "loss": loss,
        "ranks": measure(model, job.data),
        "cpu_seconds": time.process_time() - started,
    }
    job.file.parent.mkdir(parents=True, exist_ok=True)
    job.file.write_text(json.dumps(result))
    right = {task: statistics.mean(rank < 5 for rank in ranks) for task, ranks in result["ranks"].items()}
    shown = ", ".join(f"{task} at 5 {100 * share:.1f} %" for task, share in right.items())
    return f"{job.file.stem}: {shown}, {result['cpu_seconds']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument(
        "--report", type=Path, metavar="PNG", help="train nothing; tables, and the plot there"
    )
    options = parser.parse_args()
    if options.report is not None:
        report(sorted((FOLDER / "results").glob("*.json")), options.report)
        return
    prepare()
    missing = [job for job in dict.fromkeys(jobs(options.seeds)) if not job.file.exists()]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for number, line in enumerate(pool.imap(run, missing, chunksize=1), start=1):
            print(f"[{number}/{len(missing)}] {line}", flush=True)


if __name__ == "__main__":
    main()
