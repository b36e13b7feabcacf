"""How well the student guesses, on held-out images, what the teacher sees at the patches that it does not.

The same passes as in training (`model.objective`), with masks keyed by the image's place in the set, so that
every checkpoint is asked the same. What is compared depends on `model.distill.target`: for codewords the unit
vectors before the codewords, and the most likely codeword (the teacher's logits centred); for features and
pixels the prediction and its target.

As chance stands the same with the target of the next image at the same place: a model that says the same of
every image has a high cosine and no more than its chance. Not from the paper, which reports no such number.

Shapes: B batch, V visible and M masked patches, D width, K codewords, F compared values.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cluster.errors import ConfigError, DataError, NonFinite
from cluster.store import ObjectStore
from model.blocks import take_rows
from model.masking import split_patches
from model.objective import Objective
from model.teacher import Teacher
from model.vision import patch_pixels
from system.checkpoints.checkpoint import newest_step, open_fragments
from system.evaluation.data import EvalSet
from system.evaluation.encoder import Report, no_report
from system.evaluation.scoring import mean_interval
from system.run_folder import load_run_config


@dataclass(frozen=True)
class Distillation:
    """Both sides of the masked branch, in eval mode and fp32."""

    student: Objective
    teacher: Teacher | None
    """None where the target is pixels."""


def load_distillation(run: ObjectStore, checkpoint: int | None) -> Distillation:
    """The training modules of a checkpoint, on the CPU.

    Raises:
        ObjectNotFound: no run, or no such checkpoint.
        ConfigError: the run was trained without self-distillation.
    """
    config = load_run_config(run).model
    if config.distill.weight == 0:
        raise ConfigError(f"{run.uri}: trained without self-distillation; leave masked out of tasks")
    step = newest_step(run, checkpoint)
    reader = open_fragments(run, step)
    student = Objective(config, seed=0)
    student.load_state_dict(reader.everything("master"))
    if not config.distill.needs_teacher:
        return Distillation(student.eval(), None)
    teacher = Teacher(config)
    teacher.load_state_dict(reader.everything("teacher"), strict=False)
    if teacher.centre.numel():
        (centre,) = reader.read([("state", "teacher.centre", 0, teacher.centre.numel())])
        teacher.centre.copy_(centre)
    return Distillation(student.eval(), teacher.eval())


Answers = tuple[torch.Tensor, torch.Tensor | None]
"""[B, M, F] values to compare, and the most likely codewords [B, M] where codewords are the target."""


@torch.no_grad()
def student_answers(
    parts: Distillation, images_BCHW: torch.Tensor, visible_BV: torch.Tensor, masked_BM: torch.Tensor
) -> Answers:
    """What the student says of the masked patches when it sees the visible ones."""
    student = parts.student
    decoded_BMD = student.decoder(student.vision(images_BCHW, visible_BV), visible_BV, masked_BM)
    if student.config.distill.target != "codewords":
        return student.predictor(decoded_BMD), None
    return student.quantizer.mlp(decoded_BMD), student.quantizer(decoded_BMD).argmax(dim=-1)


@torch.no_grad()
def teacher_answers(parts: Distillation, seen_BPX: torch.Tensor, masked_BM: torch.Tensor) -> Answers:
    """What is to be said of these patches; `seen_BPX` is of `seen`."""
    teacher = parts.teacher
    if teacher is None:
        return patch_pixels(seen_BPX, masked_BM, parts.student.config.vision), None
    tokens_BMD = take_rows(seen_BPX, masked_BM)
    if teacher.quantizer is None:
        return F.layer_norm(tokens_BMD.float(), tokens_BMD.shape[-1:]), None
    codeword_BM = (teacher.quantizer(tokens_BMD) - teacher.centre).argmax(dim=-1)
    return teacher.quantizer.mlp(tokens_BMD), codeword_BM


@torch.no_grad()
def seen(parts: Distillation, images_BCHW: torch.Tensor) -> torch.Tensor:
    """The teacher's patch tokens [B, P, D] of the whole images; the images themselves for target pixels."""
    return images_BCHW if parts.teacher is None else parts.teacher.vision(images_BCHW)[:, 1:]


def evaluate_masked(
    parts: Distillation,
    images: EvalSet,
    device: torch.device,
    batch: int,
    seed: int = 0,
    report: Report = no_report,
) -> dict[str, Any]:
    """Mean cosine over the masked patches and, with codewords, the share of patches with the teacher's own;
    `chance` of both, and intervals over the images.

    Raises:
        DataError: the set has a single image, so there is no other to compare with.
        NonFinite: a prediction is nan or infinite.
    """
    if images.num_images < 2:
        raise DataError(f"{images.uri}: masked needs at least two images; change data or tasks")
    config = parts.student.config
    parts.student.to(device)
    if parts.teacher is not None:
        parts.teacher.to(device)
    own: dict[str, list[torch.Tensor]] = {}
    other: dict[str, list[torch.Tensor]] = {}
    done = 0
    for images_BCHW in images.views(0, images.num_images, config.vision.image_size, max(2, batch)):
        pixels = images_BCHW.to(device)
        place_B = torch.arange(done, done + len(pixels), device=device)
        visible_BV, masked_BM = split_patches(
            seed, torch.zeros_like(place_B), place_B, config.vision.num_patches, config.num_visible
        )
        said = student_answers(parts, pixels, visible_BV, masked_BM)
        seen_BPX = seen(parts, pixels)
        _compare(own, said, teacher_answers(parts, seen_BPX, masked_BM))
        if len(pixels) > 1:  # the neighbour of a single last image would be itself
            _compare(other, said, teacher_answers(parts, seen_BPX.roll(1, dims=0), masked_BM))
        done += len(pixels)
        report(done, images.num_images)
    scores = {name: torch.cat(parts_B).numpy() for name, parts_B in own.items()}
    if not all(np.isfinite(values_N).all() for values_N in scores.values()):
        raise NonFinite("a prediction at a masked patch is not finite; take an earlier checkpoint")
    return {
        "images": images.num_images,
        "target": config.distill.target,
        "masked_patches": config.vision.num_patches - config.num_visible,
        **{name: float(values_N.mean()) for name, values_N in scores.items()},
        "interval": {name: mean_interval(values_N, f"{name}/{seed}") for name, values_N in scores.items()},
        "chance": {name: float(torch.cat(parts_B).mean()) for name, parts_B in other.items()},
    }


def _compare(found: dict[str, list[torch.Tensor]], said: Answers, wanted: Answers) -> None:
    """Add the mean cosine and agreement of each image."""
    cosine_BM = F.cosine_similarity(said[0].double(), wanted[0].double(), dim=-1)
    found.setdefault("cosine", []).append(cosine_BM.mean(dim=1).cpu())
    if said[1] is not None and wanted[1] is not None:
        found.setdefault("agreement", []).append((said[1] == wanted[1]).double().mean(dim=1).cpu())
