"""Raw image-text input as img2dataset writes it, made on the spot."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colour picture that differs by seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    """The image as bytes of a file."""
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def members(key: str, seed: int, width: int = 96, height: int = 64) -> list[tuple[str, bytes]]:
    """The three files of one good sample."""
    return [
        (f"{key}.jpg", encode(noise(width, height, seed))),
        (f"{key}.txt", f"caption of {key}".encode()),
        (f"{key}.json", json.dumps({"key": key, "url": f"https://example.org/{key}.jpg"}).encode()),
    ]


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """A tar with a float time stamp, so a pax header, per member, as the webdataset library writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, payload in files:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            info.mtime = 1700000000.25
            tar.addfile(info, io.BytesIO(payload))
    return path
