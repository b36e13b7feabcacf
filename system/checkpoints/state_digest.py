"""A sum over the elements of a state that does not depend on how the state is cut.

Every fp32 element gives a 64-bit hash of its bits, of its position and of its parameter's name; the sums of
any parts of the state add up, with wrap-around, to the digest of the whole. In NumPy and in small pieces: one
thread, little memory, and the interpreter is free while it runs.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

_PIECE = 1 << 16
_WRAP = (1 << 64) - 1


def run_sum(name: str, start: int, values: np.ndarray) -> int:
    """Share of the digest, in [0, 2^64), of elements [start, start + len) of a flattened parameter (fp32)."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    bits, total = values.view(np.int32), 0
    positions = np.arange(_PIECE, dtype=np.uint64)
    for first in range(0, bits.size, _PIECE):
        piece = bits[first : first + _PIECE].astype(np.int64).view(np.uint64)
        mixed = positions[: piece.size] + np.uint64((start + first + key) & _WRAP)
        _mix(mixed)
        mixed ^= piece
        _mix(mixed)
        total += int(mixed.sum(dtype=np.uint64))
    return total & _WRAP


def add(sums: Iterable[int]) -> str:
    """The digest of a state from the sums of its parts."""
    return f"{sum(sums) & _WRAP:016x}"


def _mix(x: np.ndarray) -> None:
    """In place, the 64-bit finaliser of `agreement`."""
    x ^= (x >> np.uint64(30)) & np.uint64(0x3FFFFFFFF)
    x *= np.uint64(-4658895280553007687 & _WRAP)
    x ^= (x >> np.uint64(27)) & np.uint64(0x1FFFFFFFFF)
    x *= np.uint64(-7723592293110705685 & _WRAP)
    x ^= (x >> np.uint64(31)) & np.uint64(0x1FFFFFFFF)
