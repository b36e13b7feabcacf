"""What a decoder gives, at which scale, and that damage is never painted over."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.image import decode
from data_pipeline.image.decode import PixelMemory, UndecodableImage, crop_resize_rgb, decode_rgb, resize_rgb
from data_pipeline.image.header import read_header
from tests.support.raw_input import encode, noise

FORMATS = ["JPEG", "PNG", "WEBP", "GIF"]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.square(a.astype(float) - b.astype(float)).mean(), 1e-9))


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_becomes_contiguous_rgb(image_format: str) -> None:
    picture = noise(61, 43)
    pixels = decode_rgb(encode(picture, image_format))
    assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((43, 61, 3), np.uint8, True)
    assert psnr(pixels, np.asarray(picture)) > 30


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    ("at_least", "expected"),
    [
        (None, (1001, 777)),
        ((1001, 777), (1001, 777)),
        ((502, 100), (1001, 777)),
        ((501, 389), (501, 389)),
        ((500, 390), (1001, 777)),
        ((251, 195), (251, 195)),
        ((252, 195), (501, 389)),
        ((126, 98), (126, 98)),
        ((1, 1), (126, 98)),
        ((5000, 1), (1001, 777)),
    ],
)
def test_the_scale_is_the_smallest_that_suffices(
    at_least: tuple[int, int] | None, expected: tuple[int, int], progressive: bool
) -> None:
    data = encode(noise(1001, 777), progressive=progressive)
    pixels = decode_rgb(data, read_header(data), at_least)
    assert pixels.shape == (expected[1], expected[0], 3)


def test_a_scaled_decode_is_the_picture() -> None:
    picture = noise(1024, 768, seed=3)
    pixels = decode_rgb(encode(picture, quality=95), at_least=(256, 192))
    assert psnr(pixels, np.asarray(picture.reduce(4))) > 38


def test_fast_chroma_does_not_show_once_the_image_is_halved() -> None:
    data = encode(noise(640, 480, seed=3), quality=95, subsampling=2)
    fine, fast = decode_rgb(data), decode_rgb(data, fast_chroma=True)
    assert not np.array_equal(fine, fast)
    assert psnr(resize_rgb(fine, (256, 192)), resize_rgb(fast, (256, 192))) > 45


def test_kept_memory_changes_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger, smaller, scaled, broken and other images after one another leave nothing behind."""
    memory, jpeg = PixelMemory(), encode(noise(64, 48))
    sizes = [(64, 48), (320, 200), (31, 77), (320, 200)]
    images = [encode(noise(*size, seed=k)) for k, size in enumerate(sizes)] + [encode(noise(40, 40), "PNG")]
    for data in images:
        with pytest.raises(UndecodableImage):
            decode_rgb(jpeg[: len(jpeg) // 2], memory=memory)
        for at_least in (None, (1, 1)):
            alone = decode_rgb(data, at_least=at_least)
            assert np.array_equal(decode_rgb(data, at_least=at_least, memory=memory), alone)
    first = decode_rgb(images[0], memory=memory)
    assert np.shares_memory(first, decode_rgb(images[2], memory=memory))
    monkeypatch.setattr(decode, "MOST_KEPT_BYTES", 3 * 64 * 48)
    memory = PixelMemory()
    large = decode_rgb(images[1], memory=memory)
    assert not np.shares_memory(large, decode_rgb(images[0], memory=memory))


def test_other_formats_ignore_the_scale() -> None:
    assert decode_rgb(encode(noise(640, 480), "PNG"), at_least=(10, 10)).shape == (480, 640, 3)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("part", [0.3, 0.66, 0.95])
@pytest.mark.parametrize("at_least", [None, (1, 1)])
def test_a_cut_image_is_refused(image_format: str, part: float, at_least: tuple[int, int] | None) -> None:
    data = encode(noise(200, 150), image_format)
    with pytest.raises(UndecodableImage):
        decode_rgb(data[: int(len(data) * part)], at_least=at_least)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("at_least", [None, (1, 1)])
def test_a_jpeg_whose_end_was_glued_on_is_refused(
    progressive: bool, at_least: tuple[int, int] | None
) -> None:
    """Pillow and OpenCV paint the missing part grey."""
    data = encode(noise(200, 150), quality=95, progressive=progressive)
    glued = data[: len(data) * 2 // 3] + b"\xff\xd9"
    Image.open(io.BytesIO(glued)).load()
    with pytest.raises(UndecodableImage, match="premature end"):
        decode_rgb(glued, at_least=at_least)


def test_bytes_after_the_end_do_no_harm() -> None:
    data = encode(noise(64, 48))
    assert np.array_equal(decode_rgb(data + b"\r\n"), decode_rgb(data))


def test_more_pixels_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 48)
    for image_format in FORMATS:
        decode_rgb(encode(noise(64, 48), image_format))
        with pytest.raises(UndecodableImage, match="65 x 48"):
            decode_rgb(encode(noise(65, 48), image_format), at_least=(1, 1))


@pytest.mark.parametrize("image_format", FORMATS)
def test_pixels_of_another_size_than_the_header_s_are_refused(image_format: str) -> None:
    header = read_header(encode(noise(64, 48), image_format))
    with pytest.raises(UndecodableImage, match=r"pixels, not 64 x 48|too small to decode"):
        decode_rgb(encode(noise(80, 60), image_format), header)


def test_more_scans_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(noise(64, 48), progressive=True)
    decode_rgb(data)
    monkeypatch.setattr(decode, "MAX_SCANS", 3)
    with pytest.raises(UndecodableImage, match="more than 3 scans"):
        decode_rgb(data)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(FORMATS), st.integers(0, 10**6), st.binary(min_size=1, max_size=8))
def test_damage_gives_pixels_or_one_error(image_format: str, position: int, damage: bytes) -> None:
    data = bytearray(encode(noise(48, 40), image_format))
    position %= len(data)
    data[position : position + len(damage)] = damage
    assert _outcome(bytes(data)) == _outcome(bytes(data))


def _outcome(data: bytes) -> tuple[int, ...] | str:
    try:
        return decode_rgb(data).shape
    except UndecodableImage as error:
        return str(error)


@pytest.mark.parametrize(
    "size", [(150, 120), (120, 96), (101, 80), (90, 72), (40, 32), (400, 320), (150, 60)]
)
def test_a_resize_is_the_picture(size: tuple[int, int]) -> None:
    picture = noise(150, 120, seed=1)
    resized = resize_rgb(np.asarray(picture), size)
    assert resized.shape == (size[1], size[0], 3)
    assert psnr(resized, np.asarray(noise(*size, seed=1))) > 40


def test_a_large_shrink_averages() -> None:
    """A chessboard of single pixels is grey from afar; a filter of a few taps would pick out one colour."""
    board = np.indices((300, 300)).sum(0) % 2 * 255
    board = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
    small = resize_rgb(board, (90, 75))
    assert np.abs(small.astype(int) - 127).max() < 32


@pytest.mark.parametrize("size", [(341, 256), (400, 320), (200, 150), (90, 70), (600, 450)])
def test_a_resize_is_the_same_bits_without_simd(size: tuple[int, int]) -> None:
    """Machines of one cluster differ in it, and what they store must not."""
    image = np.random.default_rng(0).integers(0, 256, (384, 512, 3), dtype=np.uint8)
    fast = resize_rgb(image, size)
    cv2.setUseOptimized(False)
    try:
        assert np.array_equal(resize_rgb(image, size), fast)
    finally:
        cv2.setUseOptimized(True)


@pytest.mark.parametrize("size", [(1001, 777), (1007, 769), (1000, 776)])
def test_a_scale_that_does_not_divide_the_size_does_not_stretch(size: tuple[int, int]) -> None:
    picture = np.asarray(noise(*size, seed=5))
    scaled = decode_rgb(encode(Image.fromarray(picture), quality=95, subsampling=0), at_least=(124, 96))
    expected = np.asarray(Image.fromarray(picture).resize((124, 96), Image.Resampling.BOX))
    right = psnr(resize_rgb(scaled, (124, 96), size), expected)
    stretched = psnr(resize_rgb(scaled, (124, 96)), expected)
    assert right > 44
    assert right == stretched if size == (1000, 776) else right > stretched + 2
    with pytest.raises(ValueError, match="no scaled decode"):
        resize_rgb(scaled, (124, 96), (size[0] + 8, size[1]))


def test_the_crop_is_the_part_of_the_image() -> None:
    image = np.asarray(noise(100, 80))
    assert np.array_equal(crop_resize_rgb(image, (10, 20, 60, 70), (50, 50)), image[20:70, 10:60])
    assert np.array_equal(crop_resize_rgb(image, (9.6, 20.4, 60.2, 69.7), (50, 50)), image[20:70, 10:60])
    assert np.array_equal(crop_resize_rgb(image, (-5, -5, 200, 200), (100, 80)), image)
    single = crop_resize_rgb(image, (99.9, 79.9, 99.9, 79.9), (3, 3))
    assert np.array_equal(single, np.broadcast_to(image[79, 99], (3, 3, 3)))
    view = crop_resize_rgb(image, (10, 20, 60, 70), (32, 32))
    assert (view.shape, view.flags.c_contiguous) == ((32, 32, 3), True)
