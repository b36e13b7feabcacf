"""Laws of the towers, the teacher's average and the FLOP formula."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import preset
from model.flops import flops_per_pair, parameter_counts
from model.losses import SingleProcess
from model.masking import corrupt_tokens
from model.objective import Objective
from model.teacher import Teacher
from model.vision import IMAGE_MEAN, IMAGE_STD, VisionTower
from tests.unit.model.samples import make_batch, make_config, make_pair, make_tokens, relative_error


def test_nothing_dropped_is_the_full_forward():
    config = preset("test")
    tower = VisionTower(config.vision, "sdpa")
    images = make_batch(config, 3)["image"]
    everything = torch.arange(config.vision.num_patches).expand(3, -1)
    assert torch.equal(tower(images, everything), tower(images))


def test_dropped_patches_have_no_influence_and_order_has_none():
    config = preset("test")
    tower = VisionTower(config.vision, "sdpa")
    images = make_batch(config, 2)["image"]
    visible = torch.tensor([[0, 3, 9, 14], [1, 2, 7, 11]])
    tokens = tower(images, visible)
    changed = images.clone()
    changed[0, :, 8:16, 8:16] = 0  # patch 5, hidden in both
    changed[1, :, 8:16, 8:16] = 0
    assert torch.equal(tower(changed, visible), tokens)
    shuffled = tower(images, visible[:, [2, 0, 3, 1]])
    assert relative_error(shuffled[:, [0, 2, 4, 1, 3]], tokens) <= 1e-5


def test_patch_embedding_is_a_strided_convolution():
    config = preset("test").vision
    tower = VisionTower(config, "sdpa")
    images = make_batch(preset("test"), 2)["image"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    kernel = tower.patch_embedding.weight.view(config.width, 3, config.patch_size, config.patch_size)
    expected = (
        F.conv2d((images / 255 - mean) / std, kernel, stride=config.patch_size).flatten(2).transpose(1, 2)
    )
    found = []
    tower.patch_embedding.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    tower(images)
    assert relative_error(found[0], expected) <= 1e-6


def test_text_is_causal_and_ends_at_the_end_token():
    config = make_config()
    objective, _ = make_pair(config)
    tokens = make_tokens([4, 6], config)
    states, pooled = objective.text(tokens)
    assert torch.equal(pooled, torch.stack([states[0, 5], states[1, 7]]))
    tokens[:, 9:] = 17
    assert torch.equal(objective.text(tokens)[1], pooled)


def test_teacher_copies_the_student_and_follows_the_centre():
    objective, teacher = make_pair(make_config())
    teacher.load_student(objective)
    student = dict(objective.named_parameters())
    followed = dict(teacher.named_parameters())
    assert all(torch.equal(value, student[name]) for name, value in followed.items())
    assert {name for name in student if name.split(".")[0] in ("vision", "quantizer")} == followed.keys()
    teacher.bfloat16()
    teacher.update_centre_(torch.full_like(teacher.centre, 1e-3), 0.9)
    teacher.update_centre_(torch.full_like(teacher.centre, 2e-3), 0.9)
    assert torch.allclose(teacher.centre, torch.tensor(0.9 * 1e-4 + 0.1 * 2e-3), rtol=1e-6)


@pytest.mark.parametrize(
    ("target", "text_pass"), [("codewords", "own"), ("features", "own"), ("pixels", "shared")]
)
def test_flops_are_what_is_counted(target, text_pass):
    config = make_config()
    config = replace(
        config,
        distill=replace(config.distill, target=target),
        mlm=replace(config.mlm, text_pass=text_pass),
    )
    objective = Objective(config, seed=1)
    teacher = Teacher(config) if config.distill.needs_teacher else None
    batch = make_batch(config, 4)
    batch["tokens"] = make_tokens([9, 9, 9, 9], config)
    _, hidden = corrupt_tokens(
        objective.seed, batch["epoch"], batch["id"], batch["tokens"], config.mlm.mask_ratio, config.text
    )
    formula = flops_per_pair(config, caption_tokens=11, hidden_words=int(hidden.sum()) / 4)
    # SDPA's fused CPU kernel is invisible to the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = objective(batch, teacher, 0.05, SingleProcess()).loss
        forward = counter.get_total_flops()
        loss.backward()
    contrast = 2 * 4 * 4 * config.embed_dim  # one product forward; again and two more backward
    averages = 2 * 2 * 4 * config.distill.codewords  # centre and mean target, reported only
    averages *= target == "codewords"
    assert forward == 4 * formula.forward + contrast + averages
    # Pixels need no gradient, so the patch embeddings' backward is half of what the formula says.
    pixels = 4 * 2 * (16 + 4) * 3 * config.vision.patch_size**2 * config.vision.width
    assert counter.get_total_flops() == 4 * formula.training + 4 * contrast + averages - pixels


def test_parameter_counts_are_the_models():
    config = make_config()
    counts = parameter_counts(config)
    assert sum(counts.values()) == sum(p.numel() for p in Objective(config, seed=0).parameters())
    off = parameter_counts(make_config(0.0, 0.0))
    assert off.keys() == {"logit_scale", "vision", "text", "image_projection", "text_projection"}


def test_vit_b_16_has_the_size_of_clip():
    counts = parameter_counts(preset("vit_b_16"))
    encoders = sum(
        counts[part] for part in ("vision", "text", "image_projection", "text_projection", "logit_scale")
    )
    assert (
        encoders - preset("vit_b_16").text.width == 149_620_737
    )  # CLIP ViT-B/16, and the vector of hidden words
