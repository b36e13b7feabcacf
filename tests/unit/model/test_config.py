"""Presets, and how a recipe's section is laid over one."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from model.config import PRESETS, DistillConfig, MlmConfig, TextConfig, VisionConfig, preset, resolve


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_complete(name: str):
    config = preset(name)
    assert config.preset == name
    assert resolve({"preset": name}) == asdict(config)
    assert 0 < config.num_visible < config.vision.num_patches


def test_a_section_is_laid_over_its_preset():
    section = {"preset": "vit_b_16", "distill": {"weight": 0.1}, "attention": "sdpa"}
    config = preset("vit_b_16")
    expected = replace(config, distill=replace(config.distill, weight=0.1), attention="sdpa")
    assert resolve(section) == asdict(expected)
    assert section == {"preset": "vit_b_16", "distill": {"weight": 0.1}, "attention": "sdpa"}


def test_a_small_preset_keeps_its_small_head():
    assert resolve({"preset": "tiny", "distill": {"weight": 0.1}})["distill"]["codewords"] == 512


def test_resolving_again_changes_nothing():
    once = resolve({"preset": "tiny", "mlm": {"weight": 0.0}})
    assert resolve(once) == once


def test_the_default_is_tiny():
    assert resolve({}) == asdict(preset("tiny"))


def test_unknown_keys_are_left_for_the_validator():
    assert resolve({"distill": {"wieght": 1}})["distill"]["wieght"] == 1


@pytest.mark.parametrize("name", ["vit_b_17", 3, None])
def test_an_unknown_preset_is_named_with_the_known_ones(name: Any):
    with pytest.raises(ValueError, match=r"set model\.preset to one of .*vit_b_16"):
        resolve({"preset": name})


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (
            lambda: VisionConfig(image_size=65, patch_size=8, width=64, layers=2, heads=2),
            "model.vision.image_size",
        ),
        (
            lambda: VisionConfig(image_size=64, patch_size=8, width=60, layers=2, heads=2),
            "model.vision.heads",
        ),
        (lambda: TextConfig(width=64, layers=0, heads=2), "model.text.layers"),
        (lambda: DistillConfig(weight=-1.0), "model.distill.weight"),
        (lambda: DistillConfig(mask_ratio=1.0), "model.distill.mask_ratio"),
        (lambda: DistillConfig(student_temperature=0.0), "model.distill.student_temperature"),
        (lambda: MlmConfig(mask_ratio=0.0), "model.mlm.mask_ratio"),
        (lambda: replace(preset("test"), distill=DistillConfig(mask_ratio=0.99)), "model.distill.mask_ratio"),
    ],
)
def test_nonsense_is_refused_with_the_key_to_change(build: Any, key: str):
    with pytest.raises(ValueError, match=key):
        build()
