"""Marks of an image's content, by which duplicates are found.

The pixel hash is equal only for equal pixels. The perceptual hash follows the DCT hash known as pHash
(Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010): which of the lowest
frequencies of a small grey copy of the image lie above their median. It survives scaling and re-encoding, not
crops, turns or mirrors. Not from the paper.
"""

from __future__ import annotations

import hashlib

import cv2
import numpy as np

_SIDE = 32
"""The grey copy is this many pixels wide and high."""
_LOW = 8
"""Frequencies 1 ... 8 both ways: 64 bits. Frequency 0 carries brightness and large gradients, not content."""


def _dct_rows() -> np.ndarray:
    """int64 [8, 32]: rows 1 ... 8 of the DCT-II in fixed point, so that every machine has the same sums."""
    k, n = np.arange(1, _LOW + 1)[:, None], np.arange(_SIDE)[None]
    return np.rint(2**14 * np.cos(np.pi * k * (2 * n + 1) / (2 * _SIDE))).astype(np.int64)


_DCT = _dct_rows()


def pixel_hash(image: np.ndarray) -> bytes:
    """16 bytes (BLAKE2b) of the size and the values of uint8 HWC `image`."""
    height, width = image.shape[:2]
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(height.to_bytes(4, "big") + width.to_bytes(4, "big"))
    hasher.update(np.ascontiguousarray(image).data)
    return hasher.digest()


def perceptual_hash(image: np.ndarray) -> int:
    """64 bits of uint8 RGB HWC `image`; near images differ in few bits, unrelated ones in about 32.

    An image of one colour has no content to mark: the hash is 0.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.int64)
    low = (_DCT @ small @ _DCT.T).ravel()
    bits = low > np.partition(low, low.size // 2 - 1)[low.size // 2 - 1]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hamming(a: int, b: int) -> int:
    """Number of bits in which two perceptual hashes differ."""
    return (a ^ b).bit_count()
