"""Segmentation by the nearest class text, to see what the features of single patches know.

Layout: ROOT/images/<name>.jpg|jpeg|png|webp, ROOT/masks/<name>.png (one channel, class number per pixel from
0; 255 is not counted) and ROOT/classes.txt (one name per line, in the order of the numbers).

The whole image is resized to the model's square (its aspect is not kept), every patch is compared with the
class texts, the scores are resized bilinearly to the mask and the best class of every pixel counts. No
sliding window and no refinement, so numbers are comparable between our own models only.

Dense features, all projected into the shared space by the image projection:

- value: in the last block every patch attends to itself alone, so attention passes its value on; residual,
  MLP and final norm stay. This is the training-free path of Zhou et al., "Extract Free Dense Labels from
  CLIP" (ECCV 2022, arXiv 2112.01071; another MaskCLIP than the one that is trained here).
- plain: the patch tokens after the final norm.

Shapes: B batch, P patches, L tokens, D width, E shared space, C classes, H, W size of a mask.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from cluster.errors import DataError
from cluster.store import ObjectStore, open_store
from data_pipeline.image.decode import UndecodableImage, decode_rgb, resize_rgb
from model.vision import VisionTower
from system.choices import Dense
from system.evaluation.data import SEGMENTATION_CLASSES, is_image, listing_digest, stored_lines
from system.evaluation.encoder import Encoder, Report, no_report
from system.evaluation.scoring import mean_interval

IGNORED = 255
IMAGES, MASKS = "images/", "masks/"


@dataclass(frozen=True)
class MaskedImages:
    """Images with a class for every pixel."""

    store: ObjectStore
    class_names: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    """Objects of image and mask, by name."""
    digest: str
    """Of the list of files and sizes."""

    def read(self, side: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """uint8 [side, side, 3] and int64 [H, W] of each pair.

        Raises DataError for a file that cannot be decoded or a number that is no class.
        """
        for image, mask in self.pairs:
            try:
                pixels = resize_rgb(decode_rgb(self.store.get(image)), (side, side))
            except UndecodableImage as error:
                raise DataError(
                    f"{self.store.uri}/{image}: cannot be decoded ({error}); replace it"
                ) from error
            yield pixels, self._mask(mask)

    def _mask(self, name: str) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(self.store.get(name)), formats=["PNG"]) as image:
                mask_HW = np.array(image).astype(np.int64)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.store.uri}/{name}: no PNG ({error}); replace it") from error
        counted = mask_HW[mask_HW != IGNORED]
        if mask_HW.ndim != 2 or (
            counted.size and not 0 <= counted.min() <= counted.max() < len(self.class_names)
        ):
            raise DataError(
                f"{self.store.uri}/{name}: a mask has one channel of class numbers below "
                f"{len(self.class_names)}, or {IGNORED}; correct it or {SEGMENTATION_CLASSES}"
            )
        return mask_HW


def open_masks(uri: str) -> MaskedImages:
    """Raises DataError when there are no images, an image has no mask, or classes.txt is empty."""
    store = open_store(uri)
    names = tuple(stored_lines(store, SEGMENTATION_CLASSES))
    files = {info.key: info.size for part in (IMAGES, MASKS) for info in store.list(part)}
    pairs = []
    for image in sorted(name for name in files if name.startswith(IMAGES) and is_image(name)):
        mask = f"{MASKS}{PurePosixPath(image.removeprefix(IMAGES)).with_suffix('.png')}"
        if mask not in files:
            raise DataError(f"{uri}: {image} has no {mask}; add the mask or remove the image")
        pairs.append((image, mask))
    if not pairs:
        raise DataError(f"{uri}: no images in {IMAGES}; put them there, and their masks in {MASKS}")
    return MaskedImages(store, names, tuple(pairs), listing_digest(list(files.items()), names))


@torch.no_grad()
def dense_tokens(vision: VisionTower, images_BCHW: torch.Tensor, dense: Dense) -> torch.Tensor:
    """[B, P, D] features of the patches after the final norm; see the module's docstring."""
    if dense == "plain":
        return vision(images_BCHW)[:, 1:]
    last = vision.transformer.blocks[-1]
    before: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    try:
        vision(images_BCHW)
    finally:
        hook.remove()
    patches_BPD = before[0][:, 1:]
    # A sequence of one token attends to itself alone.
    alone = last(patches_BPD.flatten(0, 1)[:, None])
    return vision.transformer.norm(alone).view_as(patches_BPD)


def confusion(guess: torch.Tensor, truth: torch.Tensor, classes: int) -> torch.Tensor:
    """int64 [C, C] counts by (truth, guess) of the pixels that are not ignored; any equal shapes."""
    counted = truth != IGNORED
    pairs = truth[counted] * classes + guess[counted]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def intersection_over_union(confusion_CC: torch.Tensor) -> torch.Tensor:
    """float64 [C]: hits over (truth or guess); nan for a class that is in neither."""
    hits_C = confusion_CC.diagonal().double()
    return hits_C / (confusion_CC.sum(dim=0) + confusion_CC.sum(dim=1) - hits_C)


def evaluate_segmentation(
    encoder: Encoder,
    masks: MaskedImages,
    class_CE: torch.Tensor,
    dense: Dense = "value",
    seed: int = 0,
    report: Report = no_report,
) -> dict[str, Any]:
    """Mean IoU over the classes that occur in truth or guess, over all pixels of the set, and pixel accuracy;
    intervals resample images.

    Args:
        class_CE: unit weights of the classes.
    """
    classes, side = len(masks.class_names), encoder.model.config.vision.image_size
    grid = side // encoder.model.config.vision.patch_size
    total_CC = torch.zeros(classes, classes, dtype=torch.int64)
    accuracies: list[float] = []
    for number, (pixels, mask) in enumerate(masks.read(side), start=1):
        image_1CHW = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(encoder.device)
        tokens_1PD = dense_tokens(encoder.vision, image_1CHW, dense)
        with torch.no_grad():
            patch_1PE = encoder.model.embed_tokens(tokens_1PD)
        score_1Cgg = (patch_1PE @ class_CE.T).transpose(1, 2).reshape(1, classes, grid, grid)
        score_CHW = F.interpolate(score_1Cgg, mask.shape, mode="bilinear", align_corners=False)[0]
        counts_CC = confusion(score_CHW.argmax(dim=0).cpu(), torch.from_numpy(mask), classes)
        total_CC += counts_CC
        if counts_CC.sum():
            accuracies.append(float(counts_CC.diagonal().sum() / counts_CC.sum()))
        report(number, len(masks.pairs))
    if not accuracies:
        raise DataError(f"{masks.store.uri}: every pixel is {IGNORED}; correct the masks")
    iou_C = intersection_over_union(total_CC)
    per_class = {
        name: float(value)
        for name, value in zip(masks.class_names, iou_C.tolist(), strict=True)
        if not np.isnan(value)
    }
    return {
        "images": len(masks.pairs),
        "classes": classes,
        "dense": dense,
        "miou": float(iou_C.nanmean()),
        "pixel_accuracy": float(total_CC.diagonal().sum() / total_CC.sum()),
        "mean_image_accuracy": float(np.mean(accuracies)),
        "interval": {"mean_image_accuracy": mean_interval(accuracies, f"segmentation/{seed}")},
        "iou": per_class,
    }
