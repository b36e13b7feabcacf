"""From a raw row to a sample: header gate, scaled decode, upright RGB, resize, re-encode, caption cleaning.

None of this is from the paper, which takes its data as prepared. Whatever is wrong with a row is a `Reject`,
not an exception.
"""

import io
import re
import unicodedata
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

from data_pipeline.records import RawSample, Reject, Sample, sample_id

_FORMATS = ("JPEG", "PNG", "WEBP")
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")
_JPEG_LONGEST_SIDE = 65_500  # libjpeg's limit
_PILLOW_PIXELS = 89_478_485  # above it Pillow warns of a decompression bomb by itself
# What makes an image upright, by its EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """How images are stored."""

    short_side: int = 256
    """Larger images are scaled down to this short side, in pixels; smaller ones are kept as they are."""
    max_pixels: int = 50_000_000
    """An image with more pixels is refused by its header, before any of it is decoded."""
    quality: int = 92
    """JPEG quality of what is encoded again, 1 to 95."""

    def __post_init__(self) -> None:
        if self.short_side < 1:
            raise ValueError(f"transform.short_side is {self.short_side}: set it to 1 or more")
        if not 1 <= self.max_pixels <= _PILLOW_PIXELS:
            raise ValueError(f"transform.max_pixels is {self.max_pixels}: set it to 1 ... {_PILLOW_PIXELS}")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"transform.quality is {self.quality}: set it to 1 ... 95")


def prepare(raw: RawSample, config: TransformConfig) -> Sample | Reject:
    """Make what is stored of `raw`: an RGB JPEG, short side at most `config.short_side`, and its caption.

    A JPEG that is already upright RGB, small enough and without EXIF keeps its bytes. Equal input gives equal
    bytes. Animations give their first frame. Never raises for what the row contains.
    """

    def reject(reason: str, detail: str) -> Reject:
        return Reject(raw.key, raw.source, reason, detail)

    caption = clean_caption(raw.caption)
    if not caption:
        return reject("empty_caption", "nothing but white space and control characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(raw.image), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return reject("too_many_pixels", str(error))
    except Exception as error:  # Pillow's readers raise nearly anything on broken bytes
        return reject("undecodable", _describe(error))
    width, height = image.size
    if width * height > config.max_pixels:
        return reject("too_many_pixels", f"{width} x {height}, more than {config.max_pixels}")
    if max(_target(image.size, config.short_side)) > _JPEG_LONGEST_SIDE:
        return reject("too_long", f"{width} x {height}, and a JPEG side ends at {_JPEG_LONGEST_SIDE}")
    try:
        upright, encoded = _encode(image, raw.image, config)
    except Exception as error:  # as above: broken scans, tables, chunks, profiles
        return reject("undecodable", _describe(error))
    return Sample(
        id=sample_id(raw.source),
        key=raw.key,
        source=raw.source,
        image=encoded,
        extension="jpg",
        caption=caption,
        width=upright[0],
        height=upright[1],
        meta=raw.meta,
    )


def clean_caption(text: str) -> str:
    """One line: runs of white space become one space, control characters go, everything else stays."""
    printable = "".join(
        " " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) != "Cc"
    )
    return " ".join(printable.split())


def _describe(error: Exception) -> str:
    # Pillow names the object that it read by its address in memory, which differs from run to run.
    return f"{type(error).__name__}: {_ADDRESS.sub('bytes', str(error))}"


def _target(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Size of the stored image: the aspect is kept and nothing is enlarged."""
    short = min(size)
    if short <= short_side:
        return size
    width, height = (round(side * short_side / short) for side in size)
    return width, height


def _encode(image: Image.Image, original: bytes, config: TransformConfig) -> tuple[tuple[int, int], bytes]:
    """Decode, normalise, resize and encode; returns (width, height) and the JPEG."""
    target = _target(image.size, config.short_side)
    # EXIF and XMP may hold a place, a name, an orientation that not every reader heeds: they are not stored.
    plain = image.format == "JPEG" and image.mode == "RGB" and image.info.keys().isdisjoint(("exif", "xmp"))
    if target == image.size and plain:
        image.load()  # finds broken bytes
        return target, original
    # libjpeg decodes at 1/2, 1/4 or 1/8 of the size for a fraction of the cost; never below the target.
    image.draft(None, target)
    image.load()
    rgb = _to_rgb(image)
    if rgb.size != target:
        rgb = rgb.resize(target, Image.Resampling.BICUBIC)
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}  # else a comment would be stored
    out = io.BytesIO()
    rgb.save(out, "JPEG", quality=config.quality, subsampling="4:2:0", optimize=True)
    return rgb.size, out.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode; transparent parts are white."""
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip instead of scale
        wide = np.asarray(image).astype(np.int64).clip(0, 0xFFFF)
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
