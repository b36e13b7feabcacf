"""What an image says of itself before any of it is decoded.

Reads the headers of JPEG (ITU-T T.81, Exif 2.3), PNG (third edition, with eXIf), WebP (RFC 9649) and GIF
(89a) from bytes. The work is bounded whatever the bytes are: one pass over at most `MAX_BLOCKS` blocks, no
recursion, nothing allocated by a size that the file claims.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

ImageFormat = Literal["jpeg", "png", "webp", "gif"]
MAX_BLOCKS = 20_000
"""Segments, chunks or sub-blocks that are looked at; real files have far fewer before their pixels."""

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn; the others are tables
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # TEM, RSTn: markers without a length
_NEEDED = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}  # what pixels and colours depend on
_FILL = re.compile(rb"\xff+")
_PNG_COMPONENTS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ORIENTATION = 0x0112


REASONS = {
    "not_an_image": "begins like no image",
    "unsupported_format": "is an image of a format that is not taken: BMP, TIFF, ICO, JPEG 2000, HEIF, AVIF",
    "truncated_header": "ends within its header",
    "broken_header": "has a header that contradicts its format, or a side of 0",
}
"""Why bytes are not an image that this package takes."""


class HeaderError(ValueError):
    """The bytes are not an image that this package takes; `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """The header of one image; sizes are as stored, before the orientation is applied."""

    format: ImageFormat
    width: int
    """Pixels of a stored row."""
    height: int
    components: int
    """1 grey or palette, 2 grey and alpha, 3 colour, 4 colour and alpha; a JPEG with 4 is CMYK or YCCK."""
    bits: int
    """Per component, or per palette index."""
    orientation: int = 1
    """EXIF orientation 1 ... 8; 1 where the file has none or one that means nothing."""
    progressive: bool = False
    """A JPEG in several scans, an interlaced PNG or GIF."""
    private: bool = False
    """A JPEG holds more than an image needs: EXIF, XMP, IPTC, comments, thumbnails, bytes after its end."""


def read_header(data: bytes) -> ImageHeader:
    """Header of the image in `data`; nothing is decoded and no pixel is looked at.

    Raises HeaderError, and nothing else whatever the bytes are.
    """
    try:
        if data[:2] == b"\xff\xd8":
            header = _jpeg(data)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            header = _png(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            header = _webp(data)
        elif data[:6] in (b"GIF87a", b"GIF89a"):
            header = _gif(data)
        else:
            raise HeaderError(*_unknown(data))
    except (struct.error, IndexError):
        raise HeaderError("truncated_header", f"{len(data)} bytes end within the header") from None
    if not (header.width and header.height):
        raise HeaderError("broken_header", f"the size is {header.width} x {header.height}")
    return header


def _unknown(data: bytes) -> tuple[str, str]:
    known = {
        b"BM": "BMP",
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
        b"\0\0\1\0": "ICO",
        b"\0\0\0\x0cjP": "JPEG 2000",
    }
    for start, name in known.items():
        if data.startswith(start):
            return "unsupported_format", name
    if data[4:8] == b"ftyp":
        return "unsupported_format", f"ISO media, brand {data[8:12]!r}"
    return ("not_an_image", f"starts with {data[:8]!r}") if data else ("not_an_image", "0 bytes")


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of the JPEG segments' payloads up to the first scan."""
    at = 2
    for _ in range(MAX_BLOCKS):
        if data[at] != 0xFF:
            raise HeaderError("broken_header", f"no JPEG marker at byte {at}")
        if data[at + 1] == 0xFF:
            at = _FILL.match(data, at).end() - 1  # type: ignore[union-attr]
        marker, at = data[at + 1], at + 2
        if marker in _ALONE:
            continue
        if marker == 0xD9:
            raise HeaderError("broken_header", "the JPEG ends before its first scan")
        (size,) = struct.unpack_from(">H", data, at)
        if size < 2:
            raise HeaderError("broken_header", f"JPEG segment of {size} bytes at byte {at}")
        yield marker, at + 2, at + size
        if marker == 0xDA:
            return
        at += size
    raise HeaderError("broken_header", f"more than {MAX_BLOCKS} JPEG segments")


def _jpeg(data: bytes) -> ImageHeader:
    frame = None
    orientation, private = 1, not data.endswith(b"\xff\xd9")
    for marker, start, end in _segments(data):
        if end > len(data):
            raise HeaderError("truncated_header", f"{len(data)} bytes end within a JPEG segment")
        if marker in _FRAMES:
            if frame is not None:
                raise HeaderError("broken_header", "two JPEG frame headers")
            frame = (marker, *struct.unpack_from(">BHHB", data, start))
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", start):
            private = True
            if orientation == 1:
                orientation = _exif_orientation(data[start + 6 : end])
        elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
            needed = _NEEDED.get(marker)
            private |= needed is None or not data.startswith(needed, start)
    if frame is None:
        raise HeaderError("broken_header", "a JPEG scan without a frame header")
    marker, bits, height, width, components = frame
    return ImageHeader(
        format="jpeg",
        width=width,
        height=height,
        components=components,
        bits=bits,
        orientation=orientation,
        progressive=marker in _PROGRESSIVE,
        private=private,
    )


def _png(data: bytes) -> ImageHeader:
    size, name = struct.unpack_from(">I4s", data, 8)
    if name != b"IHDR" or size != 13:
        raise HeaderError("broken_header", "a PNG that does not start with IHDR")
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if colour not in _PNG_COMPONENTS or max(width, height) > 0x7FFFFFFF:
        raise HeaderError("broken_header", f"PNG of colour type {colour}, {width} x {height}")
    orientation = 1
    for name, start, end in _chunks(data, 33, ">I4s", tail=4):
        if name == b"eXIf":
            orientation = _exif_orientation(data[start:end])
            break
    return ImageHeader(
        format="png",
        width=width,
        height=height,
        components=_PNG_COMPONENTS[colour],
        bits=bits,
        orientation=orientation,
        progressive=interlaced != 0,
    )


def _chunks(data: bytes, at: int, layout: str, tail: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of what is left of the chunks of a PNG or RIFF file, as far as they are complete."""
    for _ in range(MAX_BLOCKS):
        if at + 8 > len(data):
            return
        first, second = struct.unpack_from(layout, data, at)
        name, size = (first, second) if isinstance(first, bytes) else (second, first)
        yield name, at + 8, min(at + 8 + size, len(data))
        at += 8 + size + (tail or size & 1)


def _webp(data: bytes) -> ImageHeader:
    kind = data[12:16]
    orientation, components, bits = 1, 3, 8
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise HeaderError("truncated_header" if len(data) < 26 else "broken_header", "no VP8 key frame")
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    elif kind == b"VP8L":
        if data[20] != 0x2F:
            raise HeaderError("broken_header", "no VP8L signature")
        (packed,) = struct.unpack_from("<I", data, 21)
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        components = 4 if packed >> 28 & 1 else 3
    elif kind == b"VP8X":
        flags, width, width_high, height, height_high = struct.unpack_from("<B3xHBHB", data, 20)
        width, height = (width | width_high << 16) + 1, (height | height_high << 16) + 1
        components = 4 if flags & 0x10 else 3
        for name, start, end in _chunks(data, 12, "<4sI") if flags & 0x08 else ():
            if name == b"EXIF":
                exif = data[start:end]
                orientation = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
                break
    else:
        reason = "truncated_header" if len(data) < 16 else "broken_header"
        raise HeaderError(reason, f"WebP whose first chunk is {kind!r}")
    return ImageHeader(
        format="webp", width=width, height=height, components=components, bits=bits, orientation=orientation
    )


def _gif(data: bytes) -> ImageHeader:
    """The size is the screen's, enlarged to hold the first frame: what a decoder allocates."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    inside = False  # of an extension, which is a row of sub-blocks up to an empty one
    for _ in range(MAX_BLOCKS):
        if inside:
            inside, at = data[at] > 0, at + 1 + data[at]
        elif data[at] == 0x21:
            inside, at = True, at + 2
        else:
            break
    else:
        raise HeaderError("broken_header", f"more than {MAX_BLOCKS} GIF blocks before the first frame")
    if data[at] != 0x2C:
        raise HeaderError("broken_header", f"no GIF frame at byte {at}")
    left, top, frame_width, frame_height, frame_flags = struct.unpack_from("<HHHHB", data, at + 1)
    return ImageHeader(
        format="gif",
        width=max(width, left + frame_width),
        height=max(height, top + frame_height),
        components=1,
        bits=(flags & 7) + 1,
        progressive=frame_flags & 0x40 != 0,
    )


def _exif_orientation(tiff: bytes) -> int:
    """Orientation in the first directory of a TIFF block; 1 where it cannot be found."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for at in range(directory + 2, directory + 2 + 12 * min(entries, 1_000), 12):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, at)
            if tag == _ORIENTATION:
                return value if kind == 3 and count == 1 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
