"""Encoded bytes to RGB pixels, no larger than they are needed, and the resize that follows.

H, W, C: height, width and the three channels. A JPEG is decoded by libjpeg-turbo at 1/1, 1/2, 1/4 or 1/8 of
its size, straight from its DCT coefficients (it knows all eighths, but the other transforms are slower than
what they save). Everything else goes through Pillow, in full size. Not from the paper.
"""

from __future__ import annotations

import io
import re
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.image.header import HeaderError, ImageHeader, read_header

MAX_PIXELS = 89_478_485
"""More than these are not decoded whatever the caller allows: Pillow's own limit, held for every format."""
MAX_SCANS = 100
"""A progressive JPEG may ask for any number of passes over its coefficients; encoders make ten or so."""
MOST_KEPT_BYTES = 16 << 20

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")

# The work is spread over processes: a pool of threads in each would fight over the same cores.
cv2.setNumThreads(1)


class UndecodableImage(ValueError):
    """The bytes are broken, cut short, too many, or of a kind that no decoder here takes."""


class PixelMemory:
    """Where the pixels of one image after another are put: fresh pages cost a tenth to a fifth of a decode.

    The next image overwrites the last one; not for several threads.
    """

    def __init__(self) -> None:
        self._bytes = _unaligned(0)

    def room(self, size: tuple[int, int]) -> np.ndarray:
        """Bytes for (width, height) pixels; kept for the next image unless they are very many."""
        needed = 3 * size[0] * size[1]
        if needed > MOST_KEPT_BYTES:
            return _unaligned(needed)
        if needed > len(self._bytes):
            self._bytes = _unaligned(needed)
        return self._bytes[:needed]


def _unaligned(size: int) -> np.ndarray:
    """So many bytes, 8 past a multiple of 32. libjpeg-turbo writes rows that begin at such a multiple around
    the caches, and the resize that follows would wait for memory: a tenth of a view of 480 x 360."""
    room = np.empty(size + 32, np.uint8)
    start = (8 - room.ctypes.data) % 32
    return room[start : start + size]


def decode_rgb(
    data: bytes,
    header: ImageHeader | None = None,
    at_least: tuple[int, int] | None = None,
    *,
    fast_chroma: bool = False,
    memory: PixelMemory | None = None,
) -> np.ndarray:
    """Pixels of the image in `data`: uint8 HWC RGB, contiguous, as stored (no orientation is applied).

    With `at_least` (width, height) a JPEG is decoded at the smallest of its four sizes that still has as many
    pixels both ways, or in full where none has; other formats always come in full. Transparent parts are
    white, an animation gives its first frame, 16 bits become 8, CMYK becomes RGB without a colour profile.
    `header` saves reading it again. With `fast_chroma` a JPEG's halved colours are repeated instead of
    interpolated: for what will shrink to half or less. With `memory` the pixels of a JPEG lie there, until
    the next image.

    Raises UndecodableImage, also where a lenient decoder would go on and paint the missing half grey. Its
    message is the same in every run.
    """
    try:
        header = header or read_header(data)
    except HeaderError as error:
        raise UndecodableImage(str(error)) from None
    if header.width * header.height > MAX_PIXELS:
        raise UndecodableImage(f"{header.width} x {header.height} pixels, more than {MAX_PIXELS}")
    size = header.width, header.height
    if header.format == "jpeg" and header.components in (1, 3) and header.bits == 8:
        size = _scaled_size(size, at_least or size)
        room = (memory or PixelMemory()).room(size)
        pixels = _decode_jpeg(data, size, header.progressive, fast_chroma, room)
    else:
        pixels = _decode_other(data)
    if pixels.shape != (size[1], size[0], 3):
        raise UndecodableImage(f"{pixels.shape[1]} x {pixels.shape[0]} pixels, not {size[0]} x {size[1]}")
    return pixels


def _scaled_size(full: tuple[int, int], at_least: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the smallest of a JPEG's four sizes that has `at_least`; libjpeg rounds up."""
    sizes = [(-(-full[0] // scale), -(-full[1] // scale)) for scale in (8, 4, 2)]
    return next((size for size in sizes if size[0] >= at_least[0] and size[1] >= at_least[1]), full)


def _decode_jpeg(
    data: bytes, size: tuple[int, int], progressive: bool, fast_chroma: bool, room: np.ndarray
) -> np.ndarray:
    # A marker cannot occur within compressed data, so this counts the scans (and those of a thumbnail).
    if progressive and data.count(b"\xff\xda") > MAX_SCANS:
        raise UndecodableImage(f"JPEG: progressive, of more than {MAX_SCANS} scans")
    try:
        # strict: what libjpeg only warns of (cut short, a bad code) is an error.
        return simplejpeg.decode_jpeg(
            data,
            "RGB",
            fastupsample=fast_chroma,
            min_width=size[0],
            min_height=size[1],
            buffer=room,
            strict=True,
        )
    except ValueError as error:
        raise UndecodableImage(f"JPEG: {error}") from None


def _decode_other(data: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                image.load()
                return np.array(_to_rgb(image))
    except Exception as error:  # Pillow's readers raise nearly anything on broken bytes
        # Pillow names the object that it read by its address in memory, which differs from run to run.
        raise UndecodableImage(f"{type(error).__name__}: {_ADDRESS.sub('bytes', str(error))}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode; transparent parts are white."""
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip instead of scale
        wide = np.asarray(image).astype(np.int64).clip(0, 0xFFFF)
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def resize_rgb(image: np.ndarray, size: tuple[int, int], full: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 HWC `image` resized to `size` (width, height); contiguous.

    `full` is the (width, height) of the picture of which `image` is a scaled decode. Where a scale does not
    divide it, the last column and row lie partly outside the picture; ignoring that would stretch it.

    Up to a factor of 1.5 down, and up, it interpolates linearly, which costs a sixth of an average over areas
    and differs little from it. Between 2 and 3 it does so to twice the size, which it then halves: still half
    the cost. All else is averaged. These filters of OpenCV give the same bits with and without its SIMD and
    vendor paths; its cubic one does not.
    """
    height, width = image.shape[:2]
    scale = 1 if full is None else _scale((width, height), full)
    across, down = (width, height) if full is None else (full[0] / scale, full[1] / scale)
    if (across, down) == size:
        return np.ascontiguousarray(image)
    shrink = max(across / size[0], down / size[1])
    halve = 2 <= shrink < 3
    first = (2 * size[0], 2 * size[1]) if halve else size
    method = cv2.INTER_LINEAR if halve or shrink < 1.5 else cv2.INTER_AREA
    resized = cv2.resize(image, None, fx=first[0] / across, fy=first[1] / down, interpolation=method)
    resized = resized[: first[1], : first[0]]
    return cv2.resize(resized, size, interpolation=cv2.INTER_AREA) if halve else np.ascontiguousarray(resized)


def _scale(size: tuple[int, int], full: tuple[int, int]) -> int:
    for scale in (1, 2, 4, 8):
        if (-(-full[0] // scale), -(-full[1] // scale)) == size:
            return scale
    raise ValueError(f"{size} is no scaled decode of {full}")


def crop_resize_rgb(
    image: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]
) -> np.ndarray:
    """The part `box` of uint8 HWC `image`, resized to `size` (width, height); contiguous.

    `box` is (left, top, right, bottom) in pixels of `image`; it is rounded to whole pixels and cut to the
    image, and covers at least one pixel.
    """
    height, width = image.shape[:2]
    left, top = min(max(round(box[0]), 0), width - 1), min(max(round(box[1]), 0), height - 1)
    right, bottom = min(max(round(box[2]), left + 1), width), min(max(round(box[3]), top + 1), height)
    return resize_rgb(image[top:bottom, left:right], size)
