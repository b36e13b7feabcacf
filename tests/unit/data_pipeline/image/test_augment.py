"""Laws of the views: pure functions of their keys, inside their bounds, and a crop of the picture."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.image.augment import AugmentConfig, crop_box, crop_boxes, eval_view, train_view
from data_pipeline.image.decode import UndecodableImage, crop_resize_rgb
from tests.support.raw_input import noise
from tests.support.small_dataset import picture

CFG = AugmentConfig(image_size=32)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def test_a_view_is_a_function_of_seed_epoch_and_id() -> None:
    image = picture(3)
    views = {
        key: train_view(image, *key, CFG).tobytes()
        for key in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]  # id, epoch, seed
    }
    assert len(set(views.values())) == 4
    for key in reversed(views):
        assert train_view(image, *key, CFG).tobytes() == views[key]


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    sample=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
)
@settings(max_examples=200, deadline=None)
def test_a_crop_lies_inside_the_image(width: int, height: int, sample: int, epoch: int) -> None:
    box = crop_box(width, height, sample=sample, epoch=epoch, seed=0, cfg=CFG)
    assert 0 <= box.left < box.right <= width
    assert 0 <= box.top < box.bottom <= height


def test_crops_fill_their_bounds_and_only_them() -> None:
    boxes = [crop_box(1000, 1000, sample=k, epoch=0, seed=0, cfg=CFG) for k in range(4000)]
    left, top, right, bottom = np.array(boxes).T
    area = (right - left) * (bottom - top) / 1e6
    ratio = (right - left) / (bottom - top)
    assert 0.498 < area.min() < 0.51
    assert area.max() <= 1
    assert 0.745 < ratio.min() < 0.76
    assert 1.31 < ratio.max() < 1.34
    # Where a crop can lie, it lies with equal chance: the middle of left / room is a half.
    assert np.mean(left / np.maximum(1000 - (right - left), 1)) == pytest.approx(0.5, abs=0.02)
    assert np.mean(top / np.maximum(1000 - (bottom - top), 1)) == pytest.approx(0.5, abs=0.02)


def test_a_crop_that_never_fits_is_the_centre() -> None:
    cfg = AugmentConfig(image_size=32, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert crop_box(100, 60, sample=1, epoch=0, seed=0, cfg=cfg) == (20, 0, 80, 60)
    assert crop_box(60, 100, sample=1, epoch=0, seed=0, cfg=cfg) == (0, 20, 60, 80)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_many_crops_at_once_are_the_same_crops(sizes: list[tuple[int, int]], seed: int) -> None:
    samples, epochs = np.arange(len(sizes)) * 7919 + 2**62, np.arange(len(sizes)) % 3
    cfg = AugmentConfig(image_size=32, scale=(0.2, 1.0), ratio=(0.4, 1.5))
    widths, heights = np.array(sizes).T
    together = crop_boxes(widths, heights, samples, epochs, seed, cfg)
    alone = [
        crop_box(w, h, sample=int(s), epoch=int(e), seed=seed, cfg=cfg)
        for (w, h), s, e in zip(sizes, samples, epochs, strict=True)
    ]
    assert together.tolist() == [list(box) for box in alone]


def test_views_equal_a_plain_crop_and_resize() -> None:
    """Without a scaled decode (a PNG has none) a view is exactly the resized crop, close to Pillow's."""
    image = Image.open(io.BytesIO(picture(1, 120, 90)))
    box = crop_box(120, 90, sample=5, epoch=2, seed=7, cfg=CFG)
    plain = crop_resize_rgb(np.array(image), box, (32, 32))
    assert np.array_equal(train_view(encoded(image), 5, 2, 7, CFG), plain)
    centre = crop_resize_rgb(np.array(image), (15, 0, 105, 90), (32, 32))
    assert np.array_equal(eval_view(encoded(image), 32), centre)
    pillow = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC, box=(15, 0, 105, 90)))
    assert np.mean(np.abs(centre.astype(int) - pillow.astype(int))) < 2


@pytest.mark.parametrize("size", [(1024, 768), (515, 1333), (65, 64)])
def test_the_scaled_decode_shows_the_same_picture(size: tuple[int, int]) -> None:
    jpeg = picture(2, *size)
    exact = encoded(Image.open(io.BytesIO(jpeg)))
    for fast, slow in [
        (eval_view(jpeg, 32), eval_view(exact, 32)),
        (train_view(jpeg, 1, 0, 0, CFG), train_view(exact, 1, 0, 0, CFG)),
    ]:
        # A crop begins and ends at whole pixels of the scaled image, which shows where that is small.
        assert np.mean(np.abs(fast.astype(int) - slow.astype(int))) < (2 if min(size) > 100 else 6)


@pytest.mark.parametrize("side", [60, 47, 32, 20, 48, 63])
def test_a_view_that_shrinks_by_less_than_two_is_as_good_as_an_average(side: int) -> None:
    pixels = np.asarray(noise(side, side, seed=side))
    averaged = cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA)
    error = eval_view(encoded(Image.fromarray(pixels)), 32).astype(float) - averaged
    assert 10 * np.log10(255**2 / max(np.mean(error**2), 1e-9)) > 35
    cv2.setUseOptimized(False)
    try:
        plain = eval_view(encoded(Image.fromarray(pixels)), 32)
    finally:
        cv2.setUseOptimized(True)
    assert np.array_equal(plain, eval_view(encoded(Image.fromarray(pixels)), 32))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    image = Image.open(io.BytesIO(picture(4))).convert(mode)
    view = eval_view(encoded(image, "JPEG" if mode == "CMYK" else "PNG"), 24)
    assert view.shape == (24, 24, 3)
    assert view.dtype == np.uint8


def test_what_is_no_image_or_no_setting_is_refused() -> None:
    with pytest.raises(UndecodableImage, match="not_an_image"):
        eval_view(b"not an image", 32)
    with pytest.raises(UndecodableImage):
        eval_view(picture(1, 400, 300)[:-2000], 32)
    with pytest.raises(ValueError, match="image_size is 0: set it to"):
        AugmentConfig(image_size=0)
    for scale in ((0.0, 1.0), (0.5, 1.1), (0.8, 0.5)):
        with pytest.raises(ValueError, match=r"scale is .*: set it to"):
            AugmentConfig(scale=scale)
    with pytest.raises(ValueError, match=r"ratio is .*: set it to"):
        AugmentConfig(ratio=(2.0, 1.0))
