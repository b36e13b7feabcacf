"""What becomes of an image, and that nothing in a row can raise."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from data_pipeline.records import RawSample, Reject, Sample
from data_pipeline.transforms import TransformConfig, clean_caption, prepare
from tests.support.raw_input import encode, noise

CONFIG = TransformConfig(short_side=64)


def run(image: bytes, caption: str = "a caption", config: TransformConfig = CONFIG) -> Sample | Reject:
    return prepare(RawSample("key", image, caption, {"a": 1}, "0.tar/key"), config)


def kept(image: bytes, config: TransformConfig = CONFIG) -> tuple[Sample, Image.Image]:
    sample = run(image, config=config)
    assert isinstance(sample, Sample), sample
    decoded = Image.open(io.BytesIO(sample.image))
    decoded.load()
    assert (decoded.format, decoded.mode, sample.extension) == ("JPEG", "RGB", "jpg")
    assert decoded.size == (sample.width, sample.height)
    assert decoded.info.keys().isdisjoint(("exif", "xmp", "comment"))
    return sample, decoded


def rejected(image: bytes, config: TransformConfig = CONFIG) -> str:
    result = run(image, config=config)
    assert isinstance(result, Reject), result
    assert (result.key, result.source) == ("key", "0.tar/key")
    return result.reason


def pixel(image: Image.Image, x: int, y: int) -> np.ndarray:
    return np.asarray(image)[y, x].astype(int)


def header_of_jpeg(width: int, height: int) -> bytes:
    """A real JPEG whose header claims another size."""
    data = bytearray(encode(noise(32, 32)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def header_of_png(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels begin."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""))
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_a_huge_image_is_refused_by_its_header() -> None:
    """There is nothing behind these headers, so whoever decodes calls them undecodable."""
    assert rejected(header_of_jpeg(14_000, 14_000)) == "too_many_pixels"
    assert rejected(header_of_png(14_000, 14_000)) == "too_many_pixels"
    assert rejected(header_of_png(1_000, 1_000)) == "undecodable"


def test_the_limit_of_pixels_is_exact() -> None:
    at_limit = TransformConfig(max_pixels=40 * 30)
    kept(encode(noise(40, 30)), at_limit)
    assert rejected(encode(noise(41, 30)), at_limit) == "too_many_pixels"
    assert rejected(header_of_jpeg(9_000, 9_000)) == "too_many_pixels"  # below Pillow's own limit


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_broken_images_are_rejects(image_format: str) -> None:
    data = encode(noise(200, 150), image_format)
    assert rejected(data[: len(data) * 2 // 3]) == "undecodable"
    assert rejected(b"") == "undecodable"
    assert rejected(b"<html>not found</html>") == "undecodable"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(0, 10**6), st.binary(min_size=1, max_size=8))
def test_damage_never_raises(image_format: str, position: int, damage: bytes) -> None:
    data = bytearray(encode(noise(48, 40), image_format))
    position %= len(data)
    data[position : position + len(damage)] = damage
    assert isinstance(run(bytes(data)), Sample | Reject)


def test_a_small_plain_jpeg_keeps_its_bytes() -> None:
    data = encode(noise(100, 64), quality=50)
    sample, _ = kept(data)
    assert sample.image == data
    assert (sample.width, sample.height, sample.caption, sample.meta) == (100, 64, "a caption", {"a": 1})


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (85, 64)),
        ((480, 640), (64, 85)),
        ((65, 64), (65, 64)),
        ((30, 40), (30, 40)),
        ((129, 65), (127, 64)),
    ],
)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_the_short_side_shrinks_to_the_limit_and_never_grows(
    size: tuple[int, int], expected: tuple[int, int], image_format: str
) -> None:
    sample, _ = kept(encode(noise(*size), image_format))
    assert (sample.width, sample.height) == expected


def test_scaled_decoding_gives_the_picture_of_a_full_decoding() -> None:
    picture = noise(1030, 770, seed=3)
    _, scaled = kept(encode(picture, quality=95))
    full = picture.resize(scaled.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(scaled, float) - np.asarray(full, float)).mean() < 2.0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(60, 40), (1200, 800)])
def test_the_orientation_is_applied(orientation: int, size: tuple[int, int]) -> None:
    """The upright picture is red in its top left quarter, blue in the top right one, and wider than high."""
    upright = Image.new("RGB", size, "white")
    upright.paste("red", (0, 0, size[0] // 2, size[1] // 2))
    upright.paste("blue", (size[0] // 2, 0, size[0], size[1] // 2))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose of the inverse
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    sample, decoded = kept(encode(stored, exif=exif.tobytes(), quality=95))
    assert sample.width > sample.height
    quarter = sample.width // 4, sample.height // 4
    assert np.abs(pixel(decoded, *quarter) - (254, 0, 0)).max() < 12
    assert np.abs(pixel(decoded, sample.width - quarter[0], quarter[1]) - (0, 0, 254)).max() < 12


def grey16() -> Image.Image:
    return Image.fromarray(np.full((20, 20), 0x8000, np.uint16))


@pytest.mark.parametrize(
    ("picture", "image_format", "colour"),
    [
        (Image.new("RGBA", (20, 20), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (20, 20), (255, 0, 0, 128)), "WEBP", (255, 127, 127)),
        (Image.new("LA", (20, 20), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("L", (20, 20), 90), "JPEG", (90, 90, 90)),
        (Image.new("1", (20, 20), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (20, 20), (10, 200, 30)).quantize(4), "PNG", (10, 200, 30)),
        (Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (grey16(), "PNG", (128, 128, 128)),
    ],
    ids=["rgba", "webp-alpha", "la", "grey", "bilevel", "palette", "cmyk", "grey16"],
)
def test_every_mode_becomes_rgb(
    picture: Image.Image, image_format: str, colour: tuple[int, int, int]
) -> None:
    _, decoded = kept(encode(picture, image_format))
    assert np.abs(pixel(decoded, 10, 10) - colour).max() <= 5


def test_a_transparent_palette_colour_is_white() -> None:
    picture = Image.new("P", (20, 20), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    _, decoded = kept(encode(picture, "PNG", transparency=1))
    assert pixel(decoded, 10, 10).tolist() == [255, 255, 255]


def test_private_data_is_not_stored() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    for name, block in (("exif", exif.tobytes()), ("xmp", b"<x>somebody</x>")):
        sample, _ = kept(encode(noise(40, 30), "JPEG", **{name: block}))
        assert b"somebody" not in sample.image
    sample, _ = kept(encode(noise(400, 300), comment=b"somebody"))
    assert b"somebody" not in sample.image


def test_what_does_not_fit_a_jpeg_is_rejected() -> None:
    assert rejected(encode(Image.new("1", (70_000, 4)), "PNG")) == "too_long"


def test_equal_input_gives_equal_bytes() -> None:
    for data in (encode(noise(300, 200), "PNG"), b"broken"):
        assert run(data) == run(bytes(bytearray(data)))


def test_captions_become_one_clean_line() -> None:
    assert clean_caption("  two\n\twords\u00a0\u3000here\x00\x07 ") == "two words here"
    assert clean_caption("👩\u200d🚀 naïve") == "👩\u200d🚀 naïve"
    for blank in ("", " \n", "\x00"):
        result = run(encode(noise(8, 8)), blank)
        assert isinstance(result, Reject)
        assert result.reason == "empty_caption"


@pytest.mark.parametrize("wrong", [{"short_side": 0}, {"max_pixels": 10**9}, {"quality": 100}])
def test_a_wrong_setting_is_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"transform\.{next(iter(wrong))}"):
        TransformConfig(**wrong)
