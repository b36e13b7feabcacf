"""Headers say what the decoder will find, and nothing in them can raise, hang or allocate."""

from __future__ import annotations

import io
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from data_pipeline.image.header import MAX_BLOCKS, REASONS, HeaderError, ImageHeader, read_header
from tests.support.paths import ROOT
from tests.support.raw_input import encode, noise

STARTS = (b"", b"\xff\xd8", b"\xff\xd8\xff\xe1", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8X", b"GIF89a")


def reason(data: bytes) -> str:
    with pytest.raises(HeaderError) as caught:
        read_header(data)
    return caught.value.reason


def outcome(data: bytes) -> tuple[int, int] | str:
    """The size, or the reason for which there is none."""
    try:
        header = read_header(data)
    except HeaderError as error:
        return error.reason
    return header.width, header.height


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def frame(width: int, height: int, components: int = 3, bits: int = 8, marker: int = 0xC0) -> bytes:
    specification = b"".join(bytes((i, 0x11, 0)) for i in range(components))
    return segment(marker, struct.pack(">BHHB", bits, height, width, components) + specification)


SCAN = segment(0xDA, b"\x01\0\0\0\x3f\0")
SOI = b"\xff\xd8"


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("size", [(1, 1), (17, 300), (640, 480)])
def test_the_size_is_the_decoder_s(image_format: str, size: tuple[int, int]) -> None:
    header = read_header(encode(noise(*size), image_format))
    assert (header.format, header.width, header.height) == (image_format.lower(), *size)
    assert header.orientation == 1


@pytest.mark.parametrize(
    ("picture", "image_format", "options", "components", "bits"),
    [
        (Image.new("L", (9, 9)), "JPEG", {}, 1, 8),
        (Image.new("CMYK", (9, 9)), "JPEG", {}, 4, 8),
        (Image.new("LA", (9, 9)), "PNG", {}, 2, 8),
        (Image.new("RGBA", (9, 9)), "PNG", {}, 4, 8),
        (Image.new("1", (9, 9)), "PNG", {}, 1, 1),
        (noise(9, 9).quantize(4), "PNG", {"bits": 2}, 1, 2),
        (Image.fromarray(np.zeros((9, 9), np.uint16)), "PNG", {}, 1, 16),
        (Image.new("RGBA", (9, 9)), "WEBP", {}, 4, 8),
        (Image.new("RGB", (9, 9)), "WEBP", {"lossless": True}, 3, 8),
        (Image.new("RGBA", (9, 9)), "WEBP", {"lossless": True}, 4, 8),
    ],
)
def test_components_and_bits(
    picture: Image.Image, image_format: str, options: dict[str, object], components: int, bits: int
) -> None:
    header = read_header(encode(picture, image_format, **options))
    assert (header.components, header.bits) == (components, bits)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_is_found(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(noise(40, 30), image_format, exif=exif.tobytes())
    header = read_header(data)
    assert (header.width, header.height, header.orientation) == (40, 30, orientation)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ((0x0112, 3, 1, 6), 6),
        ((0x0112, 3, 1, 9), 1),
        ((0x0112, 3, 1, 0), 1),
        ((0x0112, 4, 1, 6), 1),
        ((0x0113, 3, 1, 6), 1),
    ],
)
def test_both_byte_orders_and_meaningless_orientations(
    order: str, entry: tuple[int, int, int, int], expected: int
) -> None:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    tiff = mark + struct.pack(order + "IHHHIHH", 8, 1, *entry, 0)
    data = SOI + segment(0xE1, b"Exif\0\0" + tiff) + frame(40, 30) + SCAN
    assert read_header(data).orientation == expected


def test_an_exif_directory_that_points_outside_is_ignored() -> None:
    for tiff in (b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"II*\0", b"nothing"):
        header = read_header(SOI + segment(0xE1, b"Exif\0\0" + tiff) + frame(40, 30) + SCAN)
        assert (header.orientation, header.private) == (1, True)


def test_progressive_is_seen() -> None:
    picture = noise(64, 64)
    assert read_header(encode(picture, progressive=True)).progressive
    assert not read_header(encode(picture)).progressive


def test_what_a_jpeg_carries_beside_its_pixels_is_private() -> None:
    picture = noise(40, 30)
    assert not read_header(encode(picture)).private
    assert not read_header(encode(picture, icc_profile=b"profile")).private  # needed to show the colours
    assert not read_header(encode(Image.new("CMYK", (8, 8)))).private  # Adobe's marker says which colours
    assert read_header(encode(picture, comment=b"somebody")).private
    assert read_header(encode(picture, xmp=b"<x>somebody</x>")).private
    assert read_header(encode(picture) + b"somebody").private
    for marker, payload in ((0xED, b"Photoshop 3.0\0"), (0xE0, b"JFXX\0"), (0xE2, b"MPF\0")):
        assert read_header(SOI + segment(marker, payload + b"somebody") + encode(picture)[2:]).private


def test_a_gif_is_as_large_as_its_first_frame() -> None:
    """The screen may claim to be small: a decoder allocates what the frame needs."""
    data = bytearray(encode(Image.new("P", (50, 40)), "GIF"))
    struct.pack_into("<HH", data, 6, 1, 1)
    header = read_header(bytes(data))
    assert (header.width, header.height) == (50, 40)
    with Image.open(io.BytesIO(data)) as decoded:
        assert decoded.size == (50, 40)


def test_reasons() -> None:
    assert reason(b"") == "not_an_image"
    assert reason(b"<html>not found</html>") == "not_an_image"
    assert reason(encode(noise(8, 8), "BMP")) == "unsupported_format"
    assert reason(encode(noise(8, 8), "TIFF")) == "unsupported_format"
    assert reason(b"\0\0\0\x1cftypavif") == "unsupported_format"
    assert reason(SOI + frame(0, 10) + SCAN) == "broken_header"
    assert reason(SOI + SCAN) == "broken_header"
    assert reason(SOI + frame(8, 8) + frame(9_000, 9_000) + SCAN) == "broken_header"
    assert reason(SOI + b"\xff\xe0\0\x01") == "broken_header"
    assert reason(png((b"tEXt", b""))) == "broken_header"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_header_cut_anywhere_is_truncated_or_whole(image_format: str) -> None:
    data = encode(noise(33, 21), image_format)
    whole = read_header(data)
    complete = False
    for length in range(3 if image_format == "JPEG" else 12, len(data)):
        if (found := outcome(data[:length])) != "truncated_header":
            assert found == (whole.width, whole.height), length
            complete = True
        else:
            assert not complete, "a longer file was worse than a shorter one"
    assert complete


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(STARTS), st.binary(max_size=300))
def test_bytes_give_a_header_or_a_header_error(start: bytes, rest: bytes) -> None:
    found = outcome(start + rest)
    assert found in REASONS if isinstance(found, str) else min(found) > 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]),
    st.integers(0, 400),
    st.binary(min_size=1, max_size=6),
)
def test_damage_gives_a_header_or_a_header_error(image_format: str, at: int, damage: bytes) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    options = {} if image_format == "GIF" else {"exif": exif.tobytes()}
    data = bytearray(encode(noise(24, 20), image_format, **options))
    at %= len(data)
    data[at : at + len(damage)] = damage
    found = outcome(bytes(data))
    assert found in REASONS if isinstance(found, str) else min(found) > 0


GIF_SCREEN = b"GIF89a" + b"\1\0\1\0\0\0\0"


@pytest.mark.parametrize(
    "data",
    [
        SOI + segment(0xE0, b"") * (MAX_BLOCKS + 1) + frame(8, 8) + SCAN,
        SOI + b"\xff\x01" * (MAX_BLOCKS + 1) + frame(8, 8) + SCAN,
        GIF_SCREEN + b"\x21\xfe" + b"\x01x" * (MAX_BLOCKS + 1) + b"\0\x2c" + b"\1\0" * 5,
        GIF_SCREEN + b"\x21\xfe\0" * (MAX_BLOCKS + 1) + b"\x2c" + b"\1\0" * 5,
    ],
    ids=["segments", "markers", "sub-blocks", "extensions"],
)
def test_too_many_blocks_before_the_pixels_are_refused(data: bytes) -> None:
    with pytest.raises(HeaderError, match=f"more than {MAX_BLOCKS}"):
        read_header(data)


@pytest.mark.parametrize(("blocks", "seen"), [(MAX_BLOCKS - 10, 6), (MAX_BLOCKS + 10, 1)])
def test_the_search_for_an_orientation_ends(blocks: int, seen: int) -> None:
    tiff = b"II*\0" + struct.pack("<IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0)
    header = png((b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)))
    assert read_header(header + b"\0" * 12 * blocks + png((b"eXIf", tiff))[8:]).orientation == seen
    header = b"RIFF\0\0\0\0WEBPVP8X" + struct.pack("<IBHBHBHB", 10, 8, 0, 0, 7, 0, 7, 0)
    exif = b"EXIF" + struct.pack("<I", len(tiff)) + tiff
    assert read_header(header + b"\0" * 8 * blocks + exif).orientation == seen


def test_a_run_of_fill_bytes_is_one_step() -> None:
    assert read_header(SOI + b"\xff" * 5_000_000 + frame(8, 9)[1:] + SCAN).height == 9
    assert reason(SOI + b"\xff" * 5_000_000) == "truncated_header"


def test_a_huge_jpeg_is_known_without_its_pixels() -> None:
    data = SOI + frame(14_000, 14_000) + SCAN + b"\0" * 5_000_000
    tracemalloc.start()
    header = read_header(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    expected = ImageHeader(format="jpeg", width=14_000, height=14_000, components=3, bits=8, private=True)
    assert header == expected
    assert peak < 100_000


def test_every_reason_is_in_the_documentation() -> None:
    lines = (ROOT / "docs/data-format.md").read_text("utf-8").splitlines()
    assert [f"| `{reason}` | {meaning} |" for reason, meaning in REASONS.items()] == [
        line for line in lines if line.startswith(tuple(f"| `{reason}`" for reason in REASONS))
    ]
    code = (ROOT / "data_pipeline/image/header.py").read_text("utf-8")
    found = re.findall(r'"((?:not|unsupported|truncated|broken)_[a-z_]+)"', code)
    assert set(found) == set(REASONS)
