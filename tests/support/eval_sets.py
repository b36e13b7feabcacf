"""Small sets to evaluate on, in the layouts that are not ours."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.small_dataset import picture


def write_class_folders(root: Path, sizes: dict[str, int], first: int = 0) -> None:
    """ROOT/<class>/<number>.jpg; pictures count on through the classes in the order of their names."""
    for name, size in sorted(sizes.items()):
        (root / name).mkdir(parents=True)
        for _ in range(size):
            (root / name / f"{first:05d}.jpg").write_bytes(picture(first))
            first += 1


def write_benchmark(
    root: Path,
    labels: Sequence[int],
    names: Sequence[str],
    *,
    tars: int = 2,
    split: str = "test",
    captions: dict[int, list[str]] | None = None,
    count: bool = True,
) -> None:
    """CLIP_benchmark's layout; picture k has the class labels[k], or the captions given for it."""
    (root / split).mkdir(parents=True)
    if names:
        (root / "classnames.txt").write_text("\n".join(names) + "\n")
    if count:
        (root / split / "nshards.txt").write_text(f"{tars}\n")
    for tar_number in range(tars):
        with tarfile.open(root / split / f"{tar_number}.tar", "w") as tar:
            for number in range(tar_number, len(labels), tars):
                if captions is None:
                    _add(tar, f"s{number:07d}.cls", str(labels[number]).encode())
                else:
                    _add(tar, f"s{number:07d}.txt", "\n".join(captions[number]).encode())
                _add(tar, f"s{number:07d}.jpg", picture(number))


def write_masks(root: Path, masks: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """images/, masks/ and classes.txt; picture k goes with masks[k] (uint8 [H, W])."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    for number, mask in enumerate(masks):
        height, width = mask.shape
        (root / f"images/{number:03d}.jpg").write_bytes(picture(number, width, height))
        Image.fromarray(mask).save(root / f"masks/{number:03d}.png")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
