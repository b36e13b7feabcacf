"""Images for benchmarks: noise that looks like photos to a codec, with a fixed seed, and real photos."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import simplejpeg

from benchmarks.common import BUILD

PHOTO_PACKAGE = "lomiri-wallpapers-16.04"
"""Debian package of 15 photos by nine people under CC-BY-4.0, CC-BY-SA-4.0 and CC0-1.0; its copyright file
says which. They are read from the package, and none is stored here."""


def synthetic_rgb(width: int, height: int, seed: int, slope: float = 1.3) -> np.ndarray:
    """uint8 HWC noise whose amplitude falls with frequency as 1 / f^slope, in luma and two weaker chromas, as
    photos' does (Field, 1987). As a JPEG of quality 85 with 4:2:0 it has about 4 bits per pixel at slope 1.0,
    2.7 at 1.2 and 2.1 at 1.3; web photos have 1 to 2.5."""
    rng = np.random.default_rng([seed, width, height])
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = np.inf
    planes = []
    for deviation in (48, 16, 16):
        noise = rng.standard_normal((*f.shape, 2)) @ np.array([1, 1j])
        plane = np.fft.irfft2(noise / f**slope, s=(height, width))
        planes.append(plane * (deviation / plane.std()))
    luma, blue, red = planes
    rgb = np.stack([luma + 1.402 * red, luma - 0.344 * blue - 0.714 * red, luma + 1.772 * blue], axis=-1)
    return (rgb + 128).clip(0, 255).astype(np.uint8)


def synthetic_jpeg(width: int, height: int, seed: int, quality: int = 85, slope: float = 1.3) -> bytes:
    """`synthetic_rgb` as a baseline 4:2:0 JPEG; the same bytes in every run."""
    return simplejpeg.encode_jpeg(synthetic_rgb(width, height, seed, slope), quality, "RGB", "420")


def photos() -> list[Path]:
    """Paths of the photos, taken from PHOTO_PACKAGE by Debian's tools on the first call; [] without those."""
    folder = BUILD / "photos"
    if not folder.exists() and shutil.which("apt-get") and shutil.which("dpkg-deb"):
        fetched = BUILD / "debian"
        fetched.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", PHOTO_PACKAGE], cwd=fetched, check=False)
        for package in fetched.glob(f"{PHOTO_PACKAGE}_*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return sorted(folder.rglob("*.jpg"))
