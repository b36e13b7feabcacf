"""What becomes of an image, and that nothing in a row can raise."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageChops

from data_pipeline.image import transforms
from data_pipeline.image.decode import decode_rgb
from data_pipeline.image.fingerprints import perceptual_hash, pixel_hash
from data_pipeline.image.header import HeaderError, ImageHeader, read_header
from data_pipeline.image.transforms import TransformConfig, clean_caption, prepare, shrink
from data_pipeline.records import Prepared, Reject, SourceRow
from tests.support.raw_input import encode, noise

CONFIG = TransformConfig(short_side=64)


def run(image: bytes, config: TransformConfig = CONFIG) -> Prepared | Reject:
    """As the pipeline does it: an unreadable header ends the row before `prepare` sees it."""
    row = SourceRow(2, 7, "key", "0.tar/key", "a caption", {"a": 1}, image=image)
    try:
        header = read_header(image)
    except HeaderError as error:
        return Reject.of(row, error.reason, error.detail)
    return prepare(row, header, config)


def kept(image: bytes, config: TransformConfig = CONFIG) -> tuple[Prepared, Image.Image]:
    stored = run(image, config)
    assert isinstance(stored, Prepared), stored
    decoded = Image.open(io.BytesIO(stored.image))
    decoded.load()
    assert (decoded.format, decoded.mode, stored.extension) == ("JPEG", "RGB", "jpg")
    assert decoded.size == (stored.width, stored.height)
    assert decoded.info.keys().isdisjoint(("exif", "xmp", "comment", "photoshop"))
    return stored, decoded


def rejected(image: bytes, config: TransformConfig = CONFIG) -> str:
    result = run(image, config)
    assert isinstance(result, Reject), result
    assert (result.chunk, result.row, result.key, result.source) == (2, 7, "key", "0.tar/key")
    assert result.retriable is False
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


def test_the_limit_of_pixels_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "MAX_PIXELS", 40 * 30)
    kept(encode(noise(40, 30)))
    assert rejected(encode(noise(41, 30))) == "too_many_pixels"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("size", [(200, 150), (60, 40)])
@pytest.mark.parametrize("marks", [False, True])
def test_broken_images_are_rejects(image_format: str, size: tuple[int, int], marks: bool) -> None:
    data = encode(noise(*size), image_format, **({"quality": 95} if image_format == "JPEG" else {}))
    config = TransformConfig(short_side=64, fingerprints=marks)
    assert rejected(data[: len(data) * 2 // 3], config) in ("undecodable", "truncated_header")
    if image_format == "JPEG":
        assert rejected(data[: len(data) * 5 // 6], config) == "undecodable"
        assert rejected(data[: len(data) * 5 // 6] + b"\xff\xd9", config) == "undecodable"


def test_a_reject_says_the_same_every_time() -> None:
    for image_format in ("JPEG", "PNG", "WEBP", "GIF"):
        data = encode(noise(200, 150), image_format)
        results = [run(bytes(bytearray(data[:-40]))) for _ in range(2)]
        assert results[0] == results[1]
        assert isinstance(results[0], Reject)
        assert " at 0x" not in results[0].detail


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]), st.integers(0, 10**6), st.binary(min_size=1, max_size=8)
)
def test_damage_never_raises(image_format: str, position: int, damage: bytes) -> None:
    data = bytearray(encode(noise(48, 40), image_format))
    position %= len(data)
    data[position : position + len(damage)] = damage
    assert isinstance(run(bytes(data)), Prepared | Reject)


@pytest.mark.parametrize("options", [{"quality": 50}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("marks", [False, True])
def test_a_small_plain_jpeg_keeps_its_bytes(options: dict[str, Any], marks: bool) -> None:
    data = encode(noise(100, 64), **options)
    stored, _ = kept(data, TransformConfig(short_side=64, fingerprints=marks))
    assert stored.image == data
    assert (stored.width, stored.height) == (100, 64)


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
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_the_short_side_shrinks_to_the_limit_and_never_grows(
    size: tuple[int, int], expected: tuple[int, int], image_format: str
) -> None:
    stored, _ = kept(encode(noise(*size), image_format))
    assert (stored.width, stored.height) == expected


def test_scaled_decoding_gives_the_picture_of_a_full_decoding() -> None:
    picture = noise(1030, 770, seed=3)
    _, scaled = kept(encode(picture, quality=95))
    full = picture.resize(scaled.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(scaled, float) - np.asarray(full, float)).mean() < 2.0


def grain(width: int, height: int) -> Image.Image:
    """Noise that falls by 1 / f: as much fine detail as a sharp photo has."""
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = np.inf
    phases = np.random.default_rng(0).standard_normal((*f.shape, 2)) @ np.array([1, 1j])
    plane = np.fft.irfft2(phases / f**1.2, s=(height, width))
    grey = (128 + 40 * plane / plane.std()).clip(0, 255).astype(np.uint8)
    return Image.merge("RGB", [Image.fromarray(grey)] * 3)


@pytest.mark.parametrize(
    "short", [65, 67, 75, 79, 90, 110, 127, 128, 129, 150, 191, 256, 270, 300, 500, 513, 521]
)
def test_shrinking_is_an_average_over_areas(short: int) -> None:
    """Whatever scale was decoded, nothing that shows is lost against a full decode."""
    picture = grain(short * 3 // 2, short)
    data = encode(picture, quality=95, subsampling=0)
    pixels = shrink(data, read_header(data), (96, 64)).astype(float)
    expected = cv2.resize(decode_rgb(data), (96, 64), interpolation=cv2.INTER_AREA).astype(float)
    assert np.square(pixels - expected).mean() < 255**2 / 10**3.7  # 37 dB


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(60, 40), (1200, 800)])
def test_the_orientation_is_applied(orientation: int, size: tuple[int, int], image_format: str) -> None:
    """The upright picture is red in its top left quarter, blue in the top right one, and wider than high."""
    upright = Image.new("RGB", size, "white")
    upright.paste("red", (0, 0, size[0] // 2, size[1] // 2))
    upright.paste("blue", (size[0] // 2, 0, size[0], size[1] // 2))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose of the inverse
    turned = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored, decoded = kept(encode(turned, image_format, exif=exif.tobytes(), quality=95))
    assert stored.width > stored.height
    quarter = stored.width // 4, stored.height // 4
    assert np.abs(pixel(decoded, *quarter) - (254, 0, 0)).max() < 12
    assert np.abs(pixel(decoded, stored.width - quarter[0], quarter[1]) - (0, 0, 254)).max() < 12


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
        (Image.new("P", (20, 20), 0), "GIF", (0, 0, 0)),
    ],
    ids=["rgba", "webp-alpha", "la", "grey", "bilevel", "palette", "cmyk", "grey16", "gif"],
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


def test_the_first_frame_of_an_animation_is_stored() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for image_format in ("GIF", "WEBP", "PNG"):
        _, decoded = kept(encode(frames[0], image_format, save_all=True, append_images=frames[1:]))
        assert np.abs(pixel(decoded, 10, 10) - (254, 0, 0)).max() <= 5


def test_inks_that_adobe_stores_inverted() -> None:
    """Both kinds of Adobe's four-ink JPEG, CMYK and, by the last byte of its marker, YCCK, hold 255 - ink."""
    inks = Image.new("CMYK", (64, 64), (200, 40, 90, 30))
    _, decoded = kept(encode(inks, quality=100))
    assert np.abs(pixel(decoded, 10, 10) - pixel(inks.convert("RGB"), 10, 10)).max() <= 4

    planes = [Image.new("L", (64, 64), value) for value in (120, 90, 160)]
    inks = Image.merge(
        "CMYK", [*Image.merge("YCbCr", planes).convert("RGB").split(), Image.new("L", (64, 64), 40)]
    )
    stored = Image.merge("CMYK", [*(ImageChops.invert(plane) for plane in planes), inks.getchannel("K")])
    ycck = bytearray(encode(stored, quality=100))
    ycck[ycck.index(b"Adobe") + 11] = 2
    _, decoded = kept(bytes(ycck))
    assert np.abs(pixel(decoded, 10, 10) - pixel(inks.convert("RGB"), 10, 10)).max() <= 4


def test_private_data_is_not_stored() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    for name, block in (("exif", exif.tobytes()), ("xmp", b"<x>somebody</x>"), ("comment", b"somebody")):
        stored, _ = kept(encode(noise(40, 30), "JPEG", **{name: block}))
        assert b"somebody" not in stored.image
    stored, _ = kept(encode(noise(40, 30)) + b"somebody")
    assert b"somebody" not in stored.image


def test_what_does_not_fit_a_jpeg_is_rejected() -> None:
    assert rejected(encode(Image.new("1", (70_000, 4)), "PNG")) == "too_long"


def test_equal_input_gives_equal_bytes() -> None:
    for data in (encode(noise(300, 200), "PNG"), b"broken"):
        assert run(data) == run(bytes(bytearray(data)))


def test_captions_become_one_clean_line() -> None:
    assert clean_caption("  two\n\twords\u00a0\u3000here\x00\x07 ") == "two words here"
    assert clean_caption("👩\u200d🚀 naïve") == "👩\u200d🚀 naïve"
    assert clean_caption("\ufeffa\ufeff dog") == "a dog"
    for nothing in (" \x00\n", "\ufeff", "\u200b \u200d", "\ufe0f"):
        assert clean_caption(nothing) == ""


@pytest.mark.parametrize("size", [(100, 64), (300, 200)], ids=["kept", "encoded"])
def test_marks_are_of_the_pixels_before_encoding(size: tuple[int, int]) -> None:
    data = encode(noise(*size), quality=95)
    stored, _ = kept(data, TransformConfig(short_side=64, quality=30))
    target = stored.width, stored.height
    pixels = shrink(data, read_header(data), target)
    assert (stored.pixels, stored.perceptual) == (pixel_hash(pixels), perceptual_hash(pixels))
    without, _ = kept(data, TransformConfig(short_side=64, quality=30, fingerprints=False))
    assert without == Prepared(stored.image, "jpg", stored.width, stored.height)


def test_the_same_pixels_from_another_file_have_the_same_mark() -> None:
    picture = noise(60, 50)
    stored = [kept(encode(picture, image_format))[0] for image_format in ("PNG", "GIF", "PNG")]
    lossless = kept(encode(picture, "WEBP", lossless=True))[0]
    assert stored[0].pixels == lossless.pixels == stored[2].pixels
    assert stored[0].pixels != stored[1].pixels


def test_a_row_without_an_image_is_a_mistake_of_the_caller() -> None:
    header = ImageHeader(format="jpeg", width=8, height=8, components=3, bits=8)
    with pytest.raises(ValueError, match="download"):
        prepare(SourceRow(0, 0, "k", "s", "c", {}, url="https://example.org"), header, CONFIG)


@pytest.mark.parametrize("wrong", [{"short_side": 0}, {"quality": 0}, {"quality": 100}])
def test_a_wrong_setting_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"transform\.{next(iter(wrong))}"):
        TransformConfig(**wrong)
