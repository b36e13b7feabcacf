"""Encoded images to uint8 views: a keyed crop for training, the centre for evaluation.

H, W, C: height, width and the three channels of a view. The crop is a pure function of (seed, epoch, sample
id), so it does not depend on the process that makes it or on what that process did before.
"""

import math
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.keyed import uniform

ATTEMPTS = 10
# One row of draws (area, aspect, x, y) per attempt; the offset keeps them apart from other draws of a sample.
STREAMS = 0x63726F70 + np.arange(4 * ATTEMPTS).reshape(ATTEMPTS, 4)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """The training view: a random part of the image, resized to a square."""

    image_size: int = 224
    """Side of the view in pixels; the model must expect the same."""
    scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest part of the image's area that a crop covers."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Smallest and largest width / height of a crop, before it is resized to a square."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}: set it to 1 or more")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}: set it to two rising numbers in (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {self.ratio}: set it to two rising positive numbers")


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float


def train_view(image: bytes, sample: int, epoch: int, seed: int, cfg: AugmentConfig) -> np.ndarray:
    """The view of one sample (its id) in one epoch: uint8 HWC.

    Crops as Inception did (Szegedy et al., 2015): area and log aspect ratio uniform, ten attempts to fit,
    then the largest centre part with an allowed ratio. Raises what Pillow raises for bytes that are not an
    image.
    """
    with Image.open(BytesIO(image)) as picture:
        box = crop_box(*picture.size, sample=sample, epoch=epoch, seed=seed, cfg=cfg)
        return _resized(picture, box, cfg.image_size)


def eval_view(image: bytes, image_size: int) -> np.ndarray:
    """The largest centre square, resized: uint8 HWC. Raises what Pillow raises when there is no image."""
    with Image.open(BytesIO(image)) as picture:
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return _resized(picture, Box(left, top, left + side, top + side), image_size)


def crop_box(width: int, height: int, *, sample: int, epoch: int, seed: int, cfg: AugmentConfig) -> Box:
    """The part of a width x height image that `train_view` shows, in whole pixels."""
    area, aspect, x, y = uniform(seed, epoch, sample, STREAMS).T
    target = width * height * (cfg.scale[0] + area * (cfg.scale[1] - cfg.scale[0]))
    low, high = np.log(cfg.ratio)
    ratio = np.exp(low + aspect * (high - low))
    widths, heights = np.rint(np.sqrt(target * ratio)), np.rint(np.sqrt(target / ratio))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    if fits.any():
        first = int(np.argmax(fits))
        w, h = int(widths[first]), int(heights[first])
        left, top = int(x[first] * (width - w + 1)), int(y[first] * (height - h + 1))
    else:
        w = min(width, max(1, round(height * cfg.ratio[1])))
        h = min(height, max(1, round(width / cfg.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
    return Box(left, top, left + w, top + h)


def _resized(picture: Image.Image, box: Box, side: int) -> np.ndarray:
    width, height = picture.size
    # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size at a fraction of the cost: take the smallest size
    # at which the box still has at least the pixels of the view. Other formats ignore this.
    needed = (
        math.ceil(width * side / (box.right - box.left)),
        math.ceil(height * side / (box.bottom - box.top)),
    )
    if needed[0] <= width and needed[1] <= height:
        picture.draft("RGB", needed)
    x, y = picture.size[0] / width, picture.size[1] / height
    scaled = (
        box.left * x,
        box.top * y,
        min(box.right * x, picture.size[0]),
        min(box.bottom * y, picture.size[1]),
    )
    view = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=scaled)
    return np.asarray(view)
