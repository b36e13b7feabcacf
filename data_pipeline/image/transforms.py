"""From the bytes of an image to what is stored of it: scaled decode, resize, upright RGB, re-encode, marks.

None of this is from the paper, which takes its data as prepared. Whatever is wrong with an image is a
`Reject`, not an exception.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg

from data_pipeline.image.decode import MAX_PIXELS, UndecodableImage, decode_rgb, resize_rgb
from data_pipeline.image.fingerprints import perceptual_hash, pixel_hash
from data_pipeline.image.header import ImageHeader
from data_pipeline.ingest.captions import visible
from data_pipeline.records import Prepared, Reject, SourceRow

_BYTE_ORDER_MARK = "\ufeff"
_JPEG_LONGEST_SIDE = 65_500  # libjpeg's limit
# What makes an image upright, by its EXIF orientation; transposing swaps height and width.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[:, ::-1],
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: image.transpose(1, 0, 2)[::-1],
}


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """How images are stored."""

    short_side: int = 256
    """Larger images are scaled down to this short side, in pixels; smaller ones are kept as they are."""
    quality: int = 92
    """JPEG quality of what is encoded again, 1 to 95."""
    fingerprints: bool = True
    """Mark each image by the hash of its pixels and by a perceptual hash; duplicates are found by them."""

    def __post_init__(self) -> None:
        if self.short_side < 1:
            raise ValueError(f"transform.short_side is {self.short_side}: set it to 1 or more")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"transform.quality is {self.quality}: set it to 1 ... 95")


def prepare(row: SourceRow, header: ImageHeader, config: TransformConfig) -> Prepared | Reject:
    """Make what is stored of the image of `row`: an RGB JPEG, short side at most `config.short_side`.

    A JPEG that is already upright 8-bit RGB, small enough and free of private data keeps its bytes; it is
    decoded all the same, to find broken ones. Equal input gives equal bytes. Animations give their first
    frame. What is encoded again has 4:2:0 chroma and libjpeg's standard Huffman tables: tables made for each
    image would save 6 % of the bytes at five times the cost of encoding. Never raises for what the image
    contains: the reasons are too_many_pixels, too_long and undecodable.
    """
    if row.image is None:
        raise ValueError(f"{row.source} has no image: download it first")
    stored = header.width, header.height
    if header.width * header.height > MAX_PIXELS:
        return Reject.of(row, "too_many_pixels", f"{stored[0]} x {stored[1]}, more than {MAX_PIXELS}")
    target = _target(stored, config.short_side)
    if max(target) > _JPEG_LONGEST_SIDE:
        detail = f"{stored[0]} x {stored[1]}, and a JPEG side ends at {_JPEG_LONGEST_SIDE}"
        return Reject.of(row, "too_long", detail)
    passes = target == stored and _is_plain(header)
    try:
        if passes:
            # Broken bytes show at any scale; where nothing else is wanted of the pixels, take the cheapest.
            pixels = decode_rgb(row.image, header, None if config.fingerprints else (1, 1))
        else:
            pixels = shrink(row.image, header, target)
    except UndecodableImage as error:
        return Reject.of(row, "undecodable", str(error))
    if passes:
        encoded, (width, height) = row.image, stored
    else:
        # Fewer pixels are turned after the resize than before it.
        pixels = np.ascontiguousarray(_UPRIGHT.get(header.orientation, _same)(pixels))
        encoded = simplejpeg.encode_jpeg(pixels, config.quality, "RGB", "420")
        height, width = pixels.shape[:2]
    marks = (pixel_hash(pixels), perceptual_hash(pixels)) if config.fingerprints else (None, None)
    return Prepared(encoded, "jpg", width, height, *marks)


def shrink(image: bytes, header: ImageHeader, target: tuple[int, int]) -> np.ndarray:
    """Pixels of an encoded `image` at the size `target` (width, height): uint8 HWC, contiguous, not turned.

    Decodes at a scale that leaves 1.25 times the pixels both ways, or just the target. A resize from only a
    few pixels more would blur what one from all of them keeps: against a full decode and an average over
    areas, the sharpest photos keep 30 dB from 1.05 times the pixels and 35 dB from 1.25 times. Raises
    UndecodableImage.
    """
    stored = header.width, header.height
    exact = any(stored == (scale * target[0], scale * target[1]) for scale in (1, 2, 4, 8))
    least = target if exact else (math.ceil(1.25 * target[0]), math.ceil(1.25 * target[1]))
    pixels = decode_rgb(image, header, least, fast_chroma=min(stored) >= 2 * min(target))
    return resize_rgb(pixels, target, stored if header.format == "jpeg" else None)


def clean_caption(text: str) -> str:
    """One line: runs of white space become one space, control characters and byte order marks go, everything
    else stays. "" where nothing that can be seen is left."""
    if not visible(text):
        return ""
    printable = "".join(
        " " if c.isspace() else c
        for c in text
        if c.isspace() or (unicodedata.category(c) != "Cc" and c != _BYTE_ORDER_MARK)
    )
    return " ".join(printable.split())


def _same(image: np.ndarray) -> np.ndarray:
    return image


def _is_plain(header: ImageHeader) -> bool:
    """The file itself may be stored: every reader sees the same pixels in it, and nothing but pixels."""
    rgb = header.format == "jpeg" and (header.components, header.bits) == (3, 8)
    return rgb and header.orientation == 1 and not header.private


def _target(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Size of the stored image: the aspect is kept and nothing is enlarged."""
    short = min(size)
    if short <= short_side:
        return size
    width, height = (round(side * short_side / short) for side in size)
    return width, height
