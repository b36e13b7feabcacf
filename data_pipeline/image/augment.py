"""Encoded images to uint8 views: a keyed crop for training, the centre for evaluation.

H, W, C: height, width and the three channels of a view. The crop is a pure function of (seed, epoch, sample
id), so it does not depend on the process that makes it or on what that process did before.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from data_pipeline.image.decode import PixelMemory, UndecodableImage, decode_rgb, resize_rgb
from data_pipeline.image.header import HeaderError, read_header
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
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio is {self.ratio}: set it to two rising positive numbers")


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float


def train_view(image: bytes, sample: int, epoch: int, seed: int, cfg: AugmentConfig) -> np.ndarray:
    """The view of one sample (its id) in one epoch: uint8 HWC.

    Crops as Inception did (Szegedy et al., 2015): area and log aspect ratio uniform, ten attempts to fit,
    then the largest centre part with an allowed ratio. Raises UndecodableImage for bytes that are not an
    image.
    """
    width, height = _size(image)
    box = crop_box(width, height, sample=sample, epoch=epoch, seed=seed, cfg=cfg)
    return _square(image, (width, height), box, cfg.image_size)


def eval_view(image: bytes, image_size: int) -> np.ndarray:
    """The largest centre square, resized: uint8 HWC. Raises UndecodableImage when there is no image."""
    width, height = _size(image)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return _square(image, (width, height), Box(left, top, left + side, top + side), image_size)


def crop_box(width: int, height: int, *, sample: int, epoch: int, seed: int, cfg: AugmentConfig) -> Box:
    """The part of a width x height image that `train_view` shows, in whole pixels."""
    widths, heights, samples, epochs = np.array([[width], [height], [sample], [epoch]])
    boxes_n4 = crop_boxes(widths, heights, samples, epochs, seed, cfg)
    return Box(*boxes_n4[0].tolist())


def crop_boxes(
    widths_n: np.ndarray,
    heights_n: np.ndarray,
    samples_n: np.ndarray,
    epochs_n: np.ndarray,
    seed: int,
    cfg: AugmentConfig,
) -> np.ndarray:
    """`crop_box` for n images at once, int arrays [n] each: int64 [n, 4], left, top, right, bottom."""
    width_n1, height_n1 = widths_n[:, None], heights_n[:, None]
    draws_nk4 = uniform(seed, epochs_n[:, None, None], samples_n[:, None, None], STREAMS)
    area_nk, aspect_nk, x_nk, y_nk = np.moveaxis(draws_nk4, -1, 0)
    target_nk = width_n1 * height_n1 * (cfg.scale[0] + area_nk * (cfg.scale[1] - cfg.scale[0]))
    low, high = np.log(cfg.ratio)
    ratio_nk = np.exp(low + aspect_nk * (high - low))
    w_nk, h_nk = np.rint(np.sqrt(target_nk * ratio_nk)), np.rint(np.sqrt(target_nk / ratio_nk))
    fits_nk = (w_nk >= 1) & (w_nk <= width_n1) & (h_nk >= 1) & (h_nk <= height_n1)
    first_n1 = np.argmax(fits_nk, axis=1)[:, None]
    w, h, x, y = (np.take_along_axis(v, first_n1, axis=1)[:, 0] for v in (w_nk, h_nk, x_nk, y_nk))
    left, top = np.floor(x * (widths_n - w + 1)), np.floor(y * (heights_n - h + 1))
    # None of the attempts fits: the centre.
    centre_w = np.minimum(widths_n, np.maximum(1, np.rint(heights_n * cfg.ratio[1])))
    centre_h = np.minimum(heights_n, np.maximum(1, np.rint(widths_n / cfg.ratio[0])))
    some_n = fits_nk.any(axis=1)
    w, h = np.where(some_n, w, centre_w), np.where(some_n, h, centre_h)
    left = np.where(some_n, left, (widths_n - w) // 2)
    top = np.where(some_n, top, (heights_n - h) // 2)
    return np.stack([left, top, left + w, top + h], axis=1).astype(np.int64)


def view(
    image: bytes | memoryview,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    out_HWC: np.ndarray,
    memory: PixelMemory | None = None,
) -> None:
    """Fill `out_HWC` (uint8, square, contiguous) with the part `box` of an encoded image of `size` (width,
    height).

    A JPEG is decoded at the smallest of its sizes at which the box has at least the pixels of the view, at a
    fraction of the cost; there, the box is rounded to whole pixels. What shrinks by less than 2 is
    interpolated linearly: 40 dB from an average over areas on noise and 44 on photos where they differ most,
    at less than a quarter of its cost. All else is as in `resize_rgb`. `memory` is for the decoded pixels.
    Raises UndecodableImage.
    """
    (width, height), side = size, len(out_HWC)
    left, top, right, bottom = box
    needed = math.ceil(width * side / (right - left)), math.ceil(height * side / (bottom - top))
    pixels_HWC = decode_rgb(bytes(image), at_least=needed, memory=memory)
    rows, columns = pixels_HWC.shape[:2]
    x, y = columns / width, rows / height
    left, top = min(max(round(left * x), 0), columns - 1), min(max(round(top * y), 0), rows - 1)
    right, bottom = max(round(right * x), left + 1), max(round(bottom * y), top + 1)
    part_HWC = pixels_HWC[top:bottom, left:right]
    if max(part_HWC.shape[:2]) < 2 * side:
        cv2.resize(part_HWC, (side, side), dst=out_HWC, interpolation=cv2.INTER_LINEAR)
    else:
        out_HWC[:] = resize_rgb(part_HWC, (side, side))


def _square(image: bytes, size: tuple[int, int], box: Box, side: int) -> np.ndarray:
    out_HWC = np.empty((side, side, 3), np.uint8)
    view(image, size, box, out_HWC)
    return out_HWC


def _size(image: bytes) -> tuple[int, int]:
    try:
        header = read_header(image)
    except HeaderError as error:
        raise UndecodableImage(str(error)) from None
    return header.width, header.height
