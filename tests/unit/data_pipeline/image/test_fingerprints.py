"""Equal pixels have equal hashes; near images have near perceptual hashes, and others do not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data_pipeline.image.decode import decode_rgb
from data_pipeline.image.fingerprints import hamming, perceptual_hash, pixel_hash
from tests.support.raw_input import encode


def picture(seed: int) -> Image.Image:
    """Coarse shapes and fine grain: more like a photo than a gradient."""
    rng = np.random.default_rng(seed)
    total = np.zeros((240, 320, 3))
    for cells, weight in ((3, 90.0), (8, 50.0), (40, 25.0)):
        coarse = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        planes = [
            np.asarray(Image.fromarray(coarse[..., c]).resize((320, 240), Image.Resampling.BICUBIC))
            for c in range(3)
        ]
        total += weight * np.stack(planes, axis=-1)
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


PICTURES = [picture(seed) for seed in range(24)]


def test_the_pixel_hash_is_of_values_and_size() -> None:
    image = np.asarray(PICTURES[0])
    hashed = pixel_hash(image)
    assert len(hashed) == 16
    assert pixel_hash(image.copy()) == hashed
    assert pixel_hash(np.asfortranarray(image)) == hashed
    changed = image.copy()
    changed[-1, -1, 2] ^= 1
    assert pixel_hash(changed) != hashed
    assert pixel_hash(np.ascontiguousarray(image.reshape(320, 240, 3))) != hashed


def test_it_is_the_same_on_every_machine() -> None:
    """Stored marks are compared with those that other machines make later."""
    ramp = (np.arange(64)[:, None, None] * 3 + np.arange(48)[None, :, None] ** 2 // 9).astype(np.uint8)
    image = np.ascontiguousarray(np.broadcast_to(ramp, (64, 48, 3)))
    assert pixel_hash(image).hex() == "225ee372042ea5a025189ec52df1dc45"
    assert f"{perceptual_hash(image):016x}" == "6a5a344d134cb3dd"


@pytest.mark.parametrize("seed", range(8))
def test_near_images_differ_in_few_bits(seed: int) -> None:
    original = PICTURES[seed]
    marked = perceptual_hash(np.asarray(original))
    again = decode_rgb(encode(original, quality=60))
    half = np.asarray(original.resize((160, 120), Image.Resampling.LANCZOS))
    brighter = np.asarray(ImageEnhance.Brightness(original).enhance(1.1))
    squeezed = np.asarray(original.resize((300, 240)))
    for near in (again, half, brighter, squeezed):
        assert hamming(marked, perceptual_hash(near)) <= 6


def test_different_images_differ_in_many_bits() -> None:
    marks = [perceptual_hash(np.asarray(image)) for image in PICTURES]
    distances = [hamming(a, b) for a, b in itertools.combinations(marks, 2)]
    assert min(distances) >= 16
    assert 28 <= np.mean(distances) <= 36


def test_a_mirror_image_is_another_image() -> None:
    image = np.asarray(PICTURES[0])
    assert hamming(perceptual_hash(image), perceptual_hash(np.ascontiguousarray(image[:, ::-1]))) > 16


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (31, 33), (256, 341)])
@pytest.mark.parametrize("value", [0, 7, 255])
def test_one_colour_has_the_mark_of_no_content(shape: tuple[int, int], value: int) -> None:
    assert perceptual_hash(np.full((*shape, 3), value, np.uint8)) == 0


def test_half_of_the_bits_are_set() -> None:
    for image in PICTURES:
        assert perceptual_hash(np.asarray(image)).bit_count() == 32
