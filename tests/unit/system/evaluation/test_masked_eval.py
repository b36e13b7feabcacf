"""What is said of masked patches, against the same worked out patch by patch."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cluster.errors import ConfigError, DataError, NonFinite
from cluster.store import open_store
from model.config import preset
from model.masking import split_patches
from model.objective import Objective
from model.teacher import Teacher
from system.evaluation.data import EvalSet
from system.evaluation.masked import Distillation, evaluate_masked, load_distillation
from system.run_folder import claim_run
from tests.support.small_dataset import picture, write_dataset
from tests.support.small_run import CHECKPOINTS, run_config, student_and_teacher, write_run

CPU = torch.device("cpu")


def pictures(numbers: list[int]) -> EvalSet:
    def files(positions: Sequence[int]):
        return ((str(numbers[place]), picture(numbers[place])) for place in positions)

    nothing = np.zeros(0, np.int64)
    return EvalSet(
        uri="test",
        layout="folder",
        digest="",
        num_images=len(numbers),
        files=files,
        image_P=nothing,
        label_N=nothing,
    )


def built(target: str) -> Distillation:
    """Student and teacher of different weights, and a centre that matters."""
    config = preset("test")
    config = replace(config, distill=replace(config.distill, target=target))
    student = Objective(config, seed=1).eval()
    if target == "pixels":
        return Distillation(student, None)
    teacher = Teacher(config)
    teacher.load_student(Objective(config, seed=2))
    if target == "codewords":
        teacher.centre.copy_(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    return Distillation(student, teacher.eval())


@pytest.mark.parametrize("target", ["codewords", "features", "pixels"])
def test_scores_are_those_of_single_patches(target: str):
    parts, images = built(target), pictures([3, 4, 5])
    result = evaluate_masked(parts, images, CPU, batch=8, seed=9)
    cosines, agreements = [], []
    (pixels,) = images.views(0, 3, 32, 8)
    student, teacher = parts.student, parts.teacher
    for number in range(3):
        image, place = pixels[number : number + 1], torch.tensor([number])
        visible, masked = split_patches(9, torch.zeros(1, dtype=torch.int64), place, 16, 4)
        with torch.no_grad():
            decoded = student.decoder(student.vision(image, visible), visible, masked)
            for spot, patch in enumerate(masked[0].tolist()):
                if target == "codewords":
                    assert teacher is not None
                    assert teacher.quantizer is not None
                    token = teacher.vision(image)[:, 1 + patch]
                    said, wanted = student.quantizer.mlp(decoded[:, spot]), teacher.quantizer.mlp(token)
                    guess = student.quantizer(decoded[:, spot : spot + 1]).argmax()
                    truth = (teacher(image, torch.tensor([[patch]])) - teacher.centre).argmax()
                    agreements.append(float(guess == truth))
                elif target == "features":
                    assert teacher is not None
                    wanted = teacher(image, torch.tensor([[patch]]))[:, 0]
                    said = student.predictor(decoded[:, spot])
                else:
                    row, column = divmod(patch, 4)
                    part = image[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].float().flatten(1)
                    wanted = F.layer_norm(part, part.shape[-1:])
                    said = student.predictor(decoded[:, spot])
                cosines.append(float(F.cosine_similarity(said, wanted)[0]))
    assert result["cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert result["masked_patches"] == 12
    if target == "codewords":
        assert result["agreement"] == pytest.approx(np.mean(agreements))
    else:
        assert "agreement" not in result


@pytest.mark.parametrize("target", ["codewords", "features", "pixels"])
def test_on_equal_images_nothing_is_better_than_chance(target: str):
    four = evaluate_masked(built(target), pictures([7] * 4), CPU, batch=4)
    assert four["chance"]["cosine"] == pytest.approx(four["cosine"], abs=1e-6)


def test_batch_changes_nothing():
    parts, images = built("codewords"), pictures(list(range(7)))
    one, all_at_once = (evaluate_masked(parts, images, CPU, batch=size) for size in (2, 16))
    assert one["cosine"] == pytest.approx(all_at_once["cosine"], abs=1e-6)
    assert one["agreement"] == all_at_once["agreement"]


def test_mistakes_are_one_clear_line(tmp_path: Path):
    with pytest.raises(DataError, match="at least two images"):
        evaluate_masked(built("pixels"), pictures([1]), CPU, batch=4)
    broken = built("features")
    with torch.no_grad():
        broken.student.predictor.weight.fill_(math.nan)
    with pytest.raises(NonFinite, match="take an earlier checkpoint"):
        evaluate_masked(broken, pictures([1, 2]), CPU, batch=4)
    run, config = open_store(str(tmp_path)), run_config(str(tmp_path), "somewhere")
    without = replace(config.model, distill=replace(config.model.distill, weight=0.0))
    claim_run(run, replace(config, model=without), "0" * 64)
    with pytest.raises(ConfigError, match="leave masked out of tasks"):
        load_distillation(run, None)


def test_a_checkpoint_gives_back_student_and_teacher(tmp_path: Path):
    write_dataset(str(tmp_path / "data"), [3])
    run = write_run(str(tmp_path / "run"), str(tmp_path / "data"))
    parts = load_distillation(run, CHECKPOINTS[0])
    student, averaged = student_and_teacher(run_config("x", "y"), CHECKPOINTS[0])
    assert parts.teacher is not None
    assert all(torch.equal(value, student[name]) for name, value in parts.student.named_parameters())
    assert all(torch.equal(value, averaged[name]) for name, value in parts.teacher.named_parameters())
